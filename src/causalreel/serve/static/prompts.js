// The prompt box and what was written in it before. The past stays in this browser.

import { stored } from "./page.js";

const REMEMBERED = 30;
const KEY = "prompts";

export class History {
  constructor(box, list, forget, send, edited) {
    Object.assign(this, { box, list, forget, send, edited });
    this.texts = read();
    this.at = -1; // -1: what is being written; 0: the latest
    this.draft = "";
    box.addEventListener("keydown", (event) => this.key(event));
    forget.addEventListener("click", () => {
      this.texts = [];
      stored(() => localStorage, KEY, null);
      this.draw();
    });
    this.draw();
  }

  add(text) {
    this.texts = [text, ...this.texts.filter((each) => each !== text)].slice(0, REMEMBERED);
    this.at = -1;
    stored(() => localStorage, KEY, JSON.stringify(this.texts));
    this.draw();
  }

  /** Put a text into the box, to be sent or changed. */
  show(text) {
    this.box.value = text;
    this.box.dispatchEvent(new Event("input"));
    this.edited();
    if (matchMedia("(pointer: fine)").matches) this.box.focus({ preventScroll: true }); // or a keyboard covers the video
  }

  draw() {
    this.list.replaceChildren(...this.texts.map((text) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.onclick = () => this.show(text);
      item.append(button);
      return item;
    }));
    this.forget.disabled = !this.texts.length;
  }

  /** Enter sends; Up and Down walk through the past from the first and the last line of the box. */
  key(event) {
    const { box } = this;
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.send();
      return;
    }
    const isUp = event.key === "ArrowUp" && !box.value.slice(0, box.selectionStart).includes("\n");
    const isDown = event.key === "ArrowDown" && !box.value.slice(box.selectionEnd).includes("\n");
    const to = this.at + (isUp ? 1 : -1);
    if (!(isUp || isDown) || to < -1 || to >= this.texts.length) return;
    event.preventDefault();
    if (this.at === -1) this.draft = box.value;
    this.at = to;
    this.show(to === -1 ? this.draft : this.texts[to]);
  }
}

function read() {
  try {
    const texts = JSON.parse(stored(() => localStorage, KEY) ?? "[]");
    return Array.isArray(texts) ? texts.filter((text) => typeof text === "string") : [];
  } catch {
    return [];
  }
}
