// Pausing, stepping and beginning again, and the end of a replay: what the screen does at once, and what the server is asked.

import { $, overlay, say } from "./page.js";

export class Playback {
  /** now: the page's state; order(name, values, done): send a command and say what became of it -> whether it was taken. */
  constructor(now, player, order) { Object.assign(this, { now, player, order }); }

  show(isPaused, words = "Paused") {
    this.now.isPaused = isPaused;
    $("pause").setAttribute("aria-pressed", String(isPaused));
    $("pause").textContent = isPaused ? "Resume" : "Pause";
    if (isPaused) overlay(words);
    this.player.fresh();
  }

  /** What the server says: paused or not, also by others. */
  follow(isPaused) {
    this.show(isPaused);
    if (isPaused) this.player.freeze();
    else this.player.play();
  }

  async toggle() {
    const isPaused = !this.now.isPaused;
    this.now.stepping = false;
    if (!isPaused) overlay("");
    this.follow(isPaused);
    this.now.asking += 1;
    const isTaken = await this.order(isPaused ? "pause" : "resume", {}, isPaused ? "Paused" : "Playing");
    this.now.asking -= 1;
    if (!isTaken) this.follow(!isPaused);
  }

  /** Show one more chunk: one that has arrived already, or else one that the server makes for it. */
  async step() {
    if (!this.now.isPaused) await this.toggle();
    this.now.stepping = true;
    const next = this.player.queue[0];
    if (next) {
      this.player.play(this.player.queue.filter((item) => item.header.sequence === next.header.sequence).length);
    } else {
      this.player.play(0);
      overlay("Making one chunk");
      if (!(await this.order("step", { chunks: 1 }))) this.endStep();
    }
  }

  endStep() {
    this.now.stepping = false;
    overlay("Paused");
    say("One chunk shown.");
  }

  async restart() {
    const field = $("seed");
    if (!field.reportValidity()) return;
    if (await this.order("restart", { seed: Number(field.value) }, `Restarted with seed ${field.value}`)) {
      if (this.now.isPaused) await this.toggle();
    }
  }

  /** chunks: of the replay file that this session plays; null where nobody plays one or somebody has taken over. */
  replaying(chunks) {
    this.now.replay = chunks ?? null;
    $("showing").textContent = this.now.replay ? "Replay of" : "Showing";
  }

  /** The last frame of a replay is on the screen; the server has paused and waits. */
  replayed() {
    this.show(true, "The replay is over; Resume goes on from here");
    this.player.freeze();
    say("The replay is over. Resume goes on from here.");
  }
}
