// Keys that steer the video: held on a keyboard, on the page's pads or on a gamepad. What is sent is the state, all keys
// that are held in the order in which they were pressed, and never faster than the server takes it: the latest wins.
// With it go the keys that went down and up again since the last message: a short press counts too.

import { Map as Chart } from "./map.js";
import { $, say } from "./page.js";

const APART_MS = 60; // between two messages: slower than the rate that a client has
const AGAIN_MS = 400; // after one that was refused
const STICK = 0.5; // from here on a stick is pushed
const RECENT = 40; // latencies that are remembered

// What a key of the keyboard can mean: the first of these that the model has. A letter counts by its place, which has
// the name of the letter there on a US keyboard, whatever the layout writes on it.
const PLACES = {
  ...Object.fromEntries([..."abcdefghijklmnopqrstuvwxyz"].map((letter) => [`Key${letter.toUpperCase()}`, [letter]])),
  ArrowLeft: ["left", "j", "a"], ArrowRight: ["right", "l", "d"],
  ArrowUp: ["up", "i", "w"], ArrowDown: ["down", "k", "s"],
};
const STICKS = [["a", "d"], ["w", "s"], ["left", "right", "j", "l"], ["up", "down", "i", "k"]]; // axes 0 to 3, low and high
const CROSS = [["up", "w"], ["down", "s"], ["left", "j", "a"], ["right", "l", "d"]]; // buttons 12 to 15
const WORDS = [["forward", "back"], ["right", "left"], ["down", "up"], ["turn right", "turn left"], ["look up", "look down"]];
const SIGNS = { left: "\u2190", right: "\u2192", up: "\u2191", down: "\u2193" };

/** What a key does, by the model's own words: "forward", "turn left". */
function meaning(motion) {
  const at = motion.findIndex((part) => part !== 0);
  return at < 0 ? "" : WORDS[at][motion[at] > 0 ? 0 : 1];
}

export class Steering {
  /** send(pressed, tapped) -> a promise of the command's number. */
  constructor(send) {
    this.send = send;
    this.names = [];
    this.held = new globalThis.Map(); // key -> where it is held: "keyboard", "pad", "gamepad"
    this.chart = new Chart($("map"), $("where"));
    this.told = "";
    this.downs = []; // keys that went down since the last message, held or not
    this.since = null; // when the first change was made that is not sent yet
    this.sent = new globalThis.Map(); // command number -> when its key went down or up
    this.latencies = [];
    this.isOn = this.isBusy = false;
    addEventListener("keydown", (event) => this.down(event));
    addEventListener("keyup", (event) => this.up(event));
    for (const name of ["blur", "pagehide"]) addEventListener(name, () => this.releaseAll());
    document.addEventListener("visibilitychange", () => { if (document.hidden) this.releaseAll(); });
    document.addEventListener("focusin", ({ target }) => { if (isField(target)) this.release("keyboard"); });
    addEventListener("gamepadconnected", () => this.poll());
  }

  // ---- what the model has ----

  /** control: what the server says of the model's keys; null: it has none, and all of this stays hidden. */
  allow(control) {
    this.control = control;
    this.names = control ? control.keys.flat() : [];
    this.chart.step = control?.step ?? 1;
    $("steer").hidden = $("steer-keys").hidden = !control;
    $("step-key").hidden = this.names.includes("s");
    if (!control) return;
    const groups = control.keys.map((group) => {
      const pad = document.createElement("div");
      const titles = group.map((key) => meaning(control.motions[key]));
      pad.className = "pad";
      pad.setAttribute("role", "group");
      pad.setAttribute("aria-label", titles.some((title) => /turn|look/.test(title)) ? "Look" : "Move");
      pad.append(...group.map((key, index) => this.button(key, titles[index])));
      return pad;
    });
    $("pads").replaceChildren(...groups);
  }

  button(key, title) {
    const button = document.createElement("button");
    button.type = "button";
    button.dataset.key = key;
    button.dataset.place = title.replace(/.* /, "");
    button.setAttribute("aria-label", title);
    button.setAttribute("aria-pressed", "false");
    button.textContent = SIGNS[key] ?? key.toUpperCase();
    button.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      button.setPointerCapture?.(event.pointerId);
      this.press(key, "pad", event.timeStamp);
    });
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) {
      button.addEventListener(name, (event) => this.lift(key, "pad", event.timeStamp));
    }
    button.addEventListener("contextmenu", (event) => event.preventDefault());
    for (const [name, act] of [["keydown", "press"], ["keyup", "lift"]]) { // Space and Enter hold it as a finger does
      button.addEventListener(name, (event) => {
        if (event.key !== " " && event.key !== "Enter") return;
        event.preventDefault();
        event.stopPropagation();
        this[act](key, "pad", event.timeStamp);
      });
    }
    button.addEventListener("blur", () => this.lift(key, "pad", performance.now()));
    return button;
  }

  // ---- what is held ----

  /** The model's key for a key of the keyboard, "" for none. */
  named(event) {
    const wanted = PLACES[event.code] ?? (event.code ? [] : [event.key.toLowerCase()]); // keyboards on screens name no place
    return wanted.find((name) => this.names.includes(name)) ?? "";
  }

  /** Whether the key steers, so that it is no shortcut. */
  takes(event) {
    return this.isOn && !isField(event.target) && !(event.ctrlKey || event.metaKey || event.altKey)
      && this.named(event) !== "" && !(event.code.startsWith("Arrow") && event.target.closest?.("#timeline, #format"));
  }

  down(event) {
    if (event.metaKey) this.release("keyboard"); // the system keeps what is let go of meanwhile to itself
    if (!this.takes(event)) return;
    event.preventDefault();
    if (!event.repeat) this.press(this.named(event), "keyboard", event.timeStamp);
  }

  up(event) { this.lift(this.named(event), "keyboard", event.timeStamp); }

  press(key, source, at) {
    if (!this.isOn || !key) return;
    const sources = this.held.get(key);
    if (sources) sources.add(source);
    else this.held.set(key, new Set([source]));
    if (sources) return;
    this.downs = [...this.downs.filter((other) => other !== key), key];
    this.changed(at);
  }

  lift(key, source, at) {
    const sources = this.held.get(key);
    if (!sources?.delete(source) || sources.size) return;
    this.held.delete(key);
    this.changed(at);
  }

  release(source) { for (const key of [...this.held.keys()]) this.lift(key, source, performance.now()); }

  /** Nobody looks, or nobody can tell any more what is held. */
  releaseAll() { for (const source of ["keyboard", "pad", "gamepad"]) this.release(source); }

  get pressed() { return [...this.held.keys()]; }

  /** Pressed and let go of since the last message. */
  get tapped() { return this.downs.filter((key) => !this.held.has(key)); }

  poll() {
    const pads = [...(navigator.getGamepads?.() ?? [])].filter(Boolean);
    const pushed = new Set();
    const first = (names) => names.find((name) => this.names.includes(name));
    for (const { axes, buttons } of pads) {
      STICKS.forEach((names, axis) => {
        const [low, high] = [first(names.filter((_, i) => i % 2 === 0)), first(names.filter((_, i) => i % 2))];
        if (axes[axis] < -STICK && low) pushed.add(low);
        if (axes[axis] > STICK && high) pushed.add(high);
      });
      CROSS.forEach((names, index) => { if (buttons[12 + index]?.pressed) pushed.add(first(names)); });
    }
    for (const key of this.names) this[pushed.has(key) ? "press" : "lift"](key, "gamepad", performance.now());
    if (pads.length) requestAnimationFrame(() => this.poll());
  }

  changed(at) {
    this.since ??= at;
    this.paint();
    this.tell();
  }

  // ---- what is told, and what came of it ----

  /** Send the state if it is another one than was sent last, or was for a moment; one message at a time. */
  async tell() {
    const [pressed, tapped] = [this.pressed, this.tapped];
    if (this.isBusy || !this.isOn || (pressed.join() === this.told && !tapped.length)) return;
    const at = this.since ?? performance.now();
    Object.assign(this, { isBusy: true, since: null, downs: [] }); // if it is refused these are too old to be sent again
    let wait = APART_MS;
    try {
      const number = await this.send(pressed, tapped);
      this.told = pressed.join();
      this.sent.set(number, at);
    } catch (problem) {
      wait = AGAIN_MS;
      this.since ??= at;
      if (problem.status) say(problem.message);
    }
    setTimeout(() => {
      this.isBusy = false;
      this.tell();
    }, wait);
  }

  /** A session begins or its connection is back; held: what the server says. */
  meet(held) {
    this.told = (held ?? []).join();
    this.downs = [];
    this.isOn = this.names.length > 0;
    this.tell();
  }

  /** The session is over, or another one begins. */
  leave() {
    this.isOn = false;
    this.releaseAll();
    this.sent.clear();
    this.chart.clear();
    this.shown = [];
    this.paint();
  }

  /** The first frame of a chunk is on the screen. */
  began(header) {
    if (!this.names.length) return;
    for (const { number, name } of header.commands ?? []) {
      if (name === "restart" || name === "image") this.chart.clear();
      const at = this.sent.get(number);
      this.sent.delete(number);
      if (at !== undefined) this.measured(performance.now() - at);
    }
    this.shown = header.keys ?? [];
    this.chart.add(header.camera ?? []);
    this.paint();
  }

  measured(latency) {
    this.latencies = [...this.latencies, latency].slice(-RECENT);
    const ordered = [...this.latencies].sort((a, b) => a - b);
    const at = (share) => Math.round(ordered[Math.min(ordered.length - 1, Math.floor(share * ordered.length))]);
    const many = ordered.length > 4 ? ` Half of the last ${ordered.length} within ${at(0.5)} ms, 95 % within ${at(0.95)} ms.` : "";
    $("key-latency").textContent = `From the key to the first picture made with it: ${Math.round(latency)} ms.${many}`;
    $("key-latency").dataset.ms = latency.toFixed(1);
  }

  paint() {
    for (const button of $("pads").querySelectorAll("button")) {
      const { key } = button.dataset;
      button.setAttribute("aria-pressed", String(this.held.has(key)));
      button.classList.toggle("shown", (this.shown ?? []).includes(key));
    }
    const label = (key) => SIGNS[key] ?? key.toUpperCase();
    $("held").textContent = this.pressed.map(label).join(" ") || "none";
    $("held-shown").textContent = (this.shown ?? []).map(label).join(" ") || "none";
  }
}

function isField(target) { return Boolean(target?.closest?.("input:not([type=checkbox]), textarea, select, [contenteditable]")); }
