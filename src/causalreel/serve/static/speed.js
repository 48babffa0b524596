// How fast chunks are made and shown, in numbers, curves and words.

import { Graph } from "./charts.js";
import { $, round, say } from "./page.js";

const SLOWER = 0.92; // share of the frame rate below which generation is called slower than real time
const AGAIN = 0.97; // and from which on it is no longer called that: a rate between them changes nothing
const RECENT = 8; // chunks that are averaged
const OFTEN = 5; // measures in a row that are slow before it is called so: others are of a beginning, or of a moment

export class Speed {
  constructor() {
    const isWorse = (value, line) => value > line;
    this.latency = new Graph($("latency-graph"), { bars: true, digits: 2, isWorse });
    this.rate = new Graph($("rate-graph"), { bars: false, digits: 0, isWorse: () => false });
    this.isSlow = false;
    this.clear();
  }

  clear() {
    this.chunks = [];
    this.slowly = 0;
    this.latency.clear();
    this.rate.clear();
    this.call(false);
  }

  chunk({ timings = {}, frames, fps }) {
    const { denoise_s = 0, decode_s = 0, encode_s = 0 } = timings;
    const made = { made_s: denoise_s + decode_s + encode_s, span_s: frames / fps, frames };
    this.chunks = [...this.chunks, made].slice(-RECENT);
    this.fps = fps;
    this.latency.add(made.made_s, made.span_s);
  }

  /** rate: frames shown per second, null while that is not known; isLive: the video is meant to move. */
  measure(rate, isLive) {
    if (!this.chunks.length) return;
    const mean = (key) => this.chunks.reduce((total, each) => total + each[key], 0) / this.chunks.length;
    const [made_s, span_s] = [mean("made_s"), mean("span_s")];
    const isKnown = rate !== null && isLive;
    if (isKnown) this.rate.add(rate, this.fps);
    const shown = isKnown ? ` Shown: ${rate.toFixed(1)} of ${round(this.fps)} frames per second.` : "";
    $("speed").textContent =
      `A chunk of ${this.chunks.at(-1).frames} frames takes ${made_s.toFixed(3)} s to make and ${span_s.toFixed(3)} s `
      + `to play: ${(span_s / made_s).toFixed(1)} times real time.${shown}`;
    this.slowly = isKnown && rate < (this.isSlow ? AGAIN : SLOWER) * this.fps ? this.slowly + 1 : 0;
    const isSlow = this.slowly > (this.isSlow ? 0 : OFTEN);
    this.call(isSlow, isSlow ? slowWords(rate, this.fps, made_s > span_s) : "", isLive);
  }

  call(isSlow, words = "", isLive = false) {
    if (isSlow) $("slow").textContent = words;
    if (isSlow === this.isSlow) return;
    this.isSlow = isSlow;
    $("slow").hidden = !isSlow;
    if (isSlow) say(words);
    else if (isLive) say("Generation keeps up with real time.");
  }
}

function slowWords(rate, fps, isModel) {
  const why = isModel
    ? "The model takes longer for a chunk than the chunk plays; fewer steps or a lower frame rate help."
    : "The model is fast enough; other sessions or the connection take the time.";
  return `Slower than real time: ${rate.toFixed(1)} of ${round(fps)} frames per second arrive. ${why}`;
}
