// What a session is made of beside noise: a video file, or the frames of this device's camera while it goes on.

import { $, say, tell } from "./page.js";
import { Problem } from "./wire.js";

const MOST_BYTES = 12e6; // of a file, as the server has it
const MOST_FRAMES = 8; // of a message
const MESSAGES_PER_S = 6; // of the camera's, which count against the rate that a client has
const MOST_WAITING = 1e6; // bytes that the socket has not sent: beyond them frames are left out

export class Given {
  /** replace(open): join the session that `open` gives in place of the one that plays -> it, or null; command(name,
   *  values); stream() and model(). */
  constructor(api, { replace, options, command, stream, model }) {
    Object.assign(this, { api, replace, options, command, stream, model });
    this.media = null;
    this.timer = 0;
    $("given").addEventListener("change", () => {
      if ($("given").files[0]) this.act(() => this.file($("given").files[0]));
      $("given").value = "";
    });
    $("camera").addEventListener("click", () => this.act(() => (this.media ? this.end() : this.camera())));
    $("strength").addEventListener("input", () => this.say());
    $("strength").addEventListener("change", () => this.act(() => this.tell()));
    $("camera").disabled = !navigator.mediaDevices;
    if (!navigator.mediaDevices) $("camera").title = "Browsers give a camera on https and on loopback addresses only";
    this.say();
  }

  get strength() { return Number($("strength").value); }

  say() { $("strength-value").textContent = this.strength.toFixed(2); }

  async act(what) {
    tell("");
    try {
      await what();
    } catch (problem) {
      tell(problem instanceof Problem ? problem.message : `There is no camera: ${problem.message}`);
    }
  }

  /** A new session of a file, which ends with it. */
  file(file) {
    if (file.size > MOST_BYTES) throw new Problem(`${file.name} has more than ${MOST_BYTES / 1e6} MB.`);
    const form = new FormData();
    for (const [name, value] of Object.entries({ ...this.options(), strength: this.strength })) form.append(name, value);
    form.append("video", file);
    return this.replace(() => this.api.create(form));
  }

  /** A new session of what the camera sees. */
  async camera() {
    const wanted = { width: { ideal: 640 }, facingMode: "user" };
    const media = await navigator.mediaDevices.getUserMedia({ video: wanted, audio: false });
    const opened = await this.replace(
      () => this.api.create({ ...this.options(), camera: true, strength: this.strength }),
    );
    if (opened) this.watch(media);
    else for (const track of media.getTracks()) track.stop();
  }

  async watch(media) {
    this.media = media;
    Object.assign($("mirror"), { srcObject: media, hidden: false });
    $("camera").textContent = "Stop the camera";
    const { width, height, fps } = this.model();
    const sheet = Object.assign(document.createElement("canvas"), { width, height });
    const each = Math.min(MOST_FRAMES, Math.ceil(fps / MESSAGES_PER_S));
    let frames = [];
    this.timer = setInterval(async () => {
      const frame = await seen($("mirror"), sheet);
      if (!frame || this.media !== media) return;
      frames.push(frame);
      if (frames.length < each) return;
      this.stream()?.push(joined(frames), MOST_WAITING);
      frames = [];
    }, 1000 / fps);
    await $("mirror").play();
    say("The video is made of what the camera sees.");
  }

  /** Another strength: at once where something is given, else for what is begun next. */
  async tell() {
    if (this.isGiven) await this.command("strength", { strength: this.strength });
  }

  /** What the server says of the session. */
  mark({ strength, camera }) {
    this.isGiven = typeof strength === "number";
    const waits = camera && !this.media;
    $("given-now").textContent = !this.isGiven ? "" : waits ? "This session waits for a camera that is no longer sent."
      : camera ? "This video is made of what the camera sees." : "This video is made of the one you gave, and ends with it.";
  }

  /** Let go of the camera; the session waits for it, and is closed if nothing comes. */
  end() {
    clearInterval(this.timer);
    for (const track of this.media?.getTracks() ?? []) track.stop();
    this.media = null;
    Object.assign($("mirror"), { srcObject: null, hidden: true });
    $("camera").textContent = "Use the camera";
  }
}

/** The middle of what a video element shows, in the shape of the sheet -> a JPEG file; null while it shows nothing. */
async function seen(video, sheet) {
  const { videoWidth, videoHeight } = video;
  if (!videoWidth) return null;
  const scale = Math.min(videoWidth / sheet.width, videoHeight / sheet.height);
  const [wide, high] = [sheet.width * scale, sheet.height * scale];
  const [left, top] = [(videoWidth - wide) / 2, (videoHeight - high) / 2];
  sheet.getContext("2d", { alpha: false }).drawImage(video, left, top, wide, high, 0, 0, sheet.width, sheet.height);
  const file = await new Promise((done) => { sheet.toBlob(done, "image/jpeg", 0.92); });
  return file ? new Uint8Array(await file.arrayBuffer()) : null;
}

/** Pictures one behind the other, 4 bytes of length before each. */
function joined(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + 4 + part.length, 0));
  let at = 0;
  for (const part of parts) {
    new DataView(whole.buffer).setUint32(at, part.length);
    whole.set(part, at + 4);
    at += 4 + part.length;
  }
  return whole;
}
