// From payloads to the screen: decoding in order, a playback clock, and what it saw of speed.

const CATCH_UP_S = 3; // more than this in the queue is played a quarter faster
const LONGEST_S = 20; // and more than this is not kept
const WINDOW_MS = 4000; // over which the shown rate is taken

/** Whether this browser can decode H.264 access units (not on a page without a secure context). */
export const hasVideoDecoder = typeof VideoDecoder === "function";

/** Payloads of streams -> pictures, in the order in which they came. */
export class Decoder {
  constructor(deliver, fail) {
    Object.assign(this, { deliver, fail });
    this.gate = Promise.resolve(); // into the decoders: a new one opens when the old one is empty
    this.turn = Promise.resolve(); // out of them
    this.coder = null;
    this.pending = new Map();
    this.codec = "";
    this.era = 0;
  }

  /** A new connection: the next access unit is a key frame. What came before is still delivered. */
  reset(codec) {
    this.enter(async () => {
      const { coder } = this;
      Object.assign(this, { coder: null, codec });
      if (coder?.state !== "configured") return;
      await coder.flush();
      coder.close();
      this.pending.clear();
    });
  }

  /** Another session: what is still on its way is not delivered. */
  drop() { this.era += 1; }

  take(header, parts) {
    const { era } = this;
    this.enter(() => (header.format === "h264" ? this.feed(header, parts, era) : this.stills(header, parts, era)));
  }

  enter(act) { this.gate = this.gate.then(act).catch((problem) => this.fail(problem)); }

  leave(picture, facts) {
    this.turn = this.turn.then(async () => {
      const item = { picture: await picture, ...facts };
      if (facts.era === this.era) this.deliver(item);
      else item.picture.close();
    }).catch((problem) => this.fail(problem));
  }

  stills(header, parts, era) {
    const type = `image/${header.format}`;
    parts.forEach((part, index) => this.leave(createImageBitmap(new Blob([part], { type })), { header, index, era }));
  }

  feed(header, parts, era) {
    if (!this.coder) {
      if (!header.keyframe) return;
      this.coder = new VideoDecoder({ output: (frame) => this.decoded(frame), error: (problem) => this.fail(problem) });
      this.coder.configure({ codec: this.codec, optimizeForLatency: true });
    }
    parts.forEach((data, index) => {
      const timestamp = header.first_frame + index; // a name for the frame; the clock is ours
      this.pending.set(timestamp, { header, index, era });
      const type = header.keyframe && index === 0 ? "key" : "delta";
      this.coder.decode(new EncodedVideoChunk({ type, timestamp, data }));
    });
  }

  decoded(frame) {
    const facts = this.pending.get(frame.timestamp);
    this.pending.delete(frame.timestamp);
    const picture = createImageBitmap(frame); // a decoder lends few frames: copy and hand back
    picture.finally(() => frame.close()).catch(() => {}); // a failure is told where the picture is awaited
    if (facts) this.leave(picture, facts);
  }
}

/** Shows queued frames at their rate; `shown(item)` after each, `starved()` when the next frame is late. */
export class Player {
  constructor(canvas, { shown, starved, skipped }) {
    Object.assign(this, { canvas, shown, starved, skipped });
    this.brush = canvas.getContext("2d", { willReadFrequently: true });
    this.queue = [];
    this.due = 0;
    this.budget = Infinity; // frames that may still be shown; 0 is a still picture
    this.isStarved = true;
    this.marks = []; // times of shown frames
    this.since = performance.now(); // start of the span over which the rate is meant
    const loop = () => {
      this.tick();
      requestAnimationFrame(loop);
    };
    requestAnimationFrame(loop);
    setInterval(() => { if (document.hidden) this.tick(); }, 250); // hidden tabs draw no animation frames
  }

  push(item) {
    this.queue.push(item);
    const most = LONGEST_S * item.header.fps;
    if (this.queue.length > most) {
      const dropped = this.queue.splice(0, Math.ceil(most / 2));
      for (const { picture } of dropped) picture.close();
      this.skipped(dropped.length);
    }
  }

  tick() {
    const now = performance.now();
    while (this.queue.length && this.budget > 0 && (this.isStarved || now >= this.due)) {
      const item = this.queue.shift();
      const span = 1000 / item.header.fps;
      const hurry = this.queue.length > CATCH_UP_S * item.header.fps ? 0.75 : 1;
      this.due = (this.isStarved ? now : this.due) + span * hurry;
      if (now - this.due > 1000) this.due = now + span;
      this.isStarved = false;
      this.budget -= 1;
      this.marks.push(now);
      this.draw(item);
    }
    while (this.marks.length && now - this.marks[0] > WINDOW_MS) this.marks.shift();
    if (!this.queue.length && this.budget > 0 && !this.isStarved && now > this.due + 20) {
      this.isStarved = true;
      this.starved();
    }
  }

  draw(item) {
    const { canvas } = this;
    const { width, height } = item.picture;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    this.brush.drawImage(item.picture, 0, 0);
    const frame = item.header.first_frame + item.index;
    Object.assign(canvas.dataset, { sequence: item.header.sequence, frame });
    this.shown(item);
    const detail = { sequence: item.header.sequence, frame, prompt: item.header.prompt };
    canvas.dispatchEvent(new CustomEvent("frame", { detail }));
    item.picture.close();
  }

  freeze() { this.budget = 0; }

  /** Play on, for ever or so many frames. */
  play(frames = Infinity) {
    this.budget = frames;
    this.isStarved = true;
    this.fresh();
  }

  clear() {
    for (const { picture } of this.queue) picture.close();
    this.queue.length = 0;
    this.isStarved = true;
    this.fresh();
  }

  /** Forget the past rate: what comes is not comparable. */
  fresh() {
    this.marks.length = 0;
    this.since = performance.now();
  }

  /** Frames per second shown lately; null until the span is long enough to tell. */
  rate() {
    const span = Math.min(WINDOW_MS, performance.now() - this.since);
    return span < 0.75 * WINDOW_MS ? null : (1000 * this.marks.length) / span;
  }
}
