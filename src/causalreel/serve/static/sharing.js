// What leaves the page: recordings, replay files, links.

import { $, save, say, stamp, tell } from "./page.js";
import { Problem } from "./wire.js";

const MOST_BYTES = 12e6; // of a replay file, as the server has it

const LARGEST = 1920 * 1088; // pixels of a recording: H.264's level 4

/** The video -> a file, in the size in which it is shown, by the first container that the browser can write. */
export class Recorder {
  static types = ["video/mp4;codecs=avc1.42E028", "video/mp4", "video/webm;codecs=vp9", "video/webm"];

  constructor(video) {
    this.video = video;
    this.recorder = null;
    video.addEventListener("frame", () => this.draw());
  }

  get isOn() { return this.recorder !== null; }

  static get type() {
    if (typeof MediaRecorder !== "function") return undefined;
    return Recorder.types.find((type) => MediaRecorder.isTypeSupported(type));
  }

  start() {
    const parts = [];
    this.sheet = document.createElement("canvas");
    Object.assign(this.sheet, shownSize(this.video));
    this.draw();
    const stream = this.sheet.captureStream();
    const recorder = new MediaRecorder(stream, { mimeType: Recorder.type, videoBitsPerSecond: 8e6 });
    recorder.ondataavailable = ({ data }) => { if (data.size) parts.push(data); };
    this.done = new Promise((resolve) => {
      recorder.onstop = () => {
        for (const track of stream.getTracks()) track.stop();
        resolve(new Blob(parts, { type: recorder.mimeType.split(";")[0] }));
      };
    });
    recorder.start(1000);
    this.recorder = recorder;
  }

  /** Every pixel of the video becomes a square of pixels. */
  draw() {
    if (!this.sheet) return;
    const brush = this.sheet.getContext("2d", { alpha: false });
    brush.imageSmoothingEnabled = false;
    brush.drawImage(this.video, 0, 0, this.sheet.width, this.sheet.height);
  }

  /** -> the recording as a Blob */
  stop() {
    this.recorder.stop();
    this.recorder = this.sheet = null;
    return this.done;
  }
}

/** The multiple of the video's size that comes nearest to how large it is on the screen; even, as encoders want it. */
function shownSize({ width, height, clientWidth }) {
  const wanted = Math.round((clientWidth * (window.devicePixelRatio || 1)) / width);
  const times = Math.max(1, Math.min(wanted, Math.floor(Math.sqrt(LARGEST / (width * height)))));
  const even = (side) => side + (side % 2);
  return { width: even(width * times), height: even(height * times) };
}

/** Record what is shown, or stop and save it. */
export async function toggleRecording(recorder) {
  if (recorder.isOn) {
    $("record").setAttribute("aria-pressed", "false");
    $("record").textContent = "Record";
    const file = await recorder.stop();
    save(file, `causalreel-${stamp()}.${file.type.includes("mp4") ? "mp4" : "webm"}`);
    say("The recording is saved.");
    return;
  }
  try {
    recorder.start();
    $("record").setAttribute("aria-pressed", "true");
    $("record").textContent = "Stop and save";
    say("Recording");
  } catch (problem) {
    tell(`This browser could not record: ${problem.message}`);
  }
}

/** The session's replay file: shared where the device shares files, else saved. */
export async function saveReplay(api, id) {
  try {
    const record = await api.record(id);
    const name = `causalreel-${stamp()}.replay.json`;
    const file = new File([JSON.stringify(record, null, 1)], name, { type: "application/json" });
    const isTouch = matchMedia("(pointer: coarse)").matches;
    if (isTouch && navigator.canShare?.({ files: [file] })) await navigator.share({ files: [file], title: name });
    else save(file, name);
  } catch (problem) {
    if (problem.name !== "AbortError") tell(problem.message);
  }
}

/** A chosen or dropped replay file -> its text; a Problem for what cannot be one. */
export async function readReplay(file) {
  if (file.size > MOST_BYTES) {
    const most = `${file.name} has more than ${MOST_BYTES / 1e6} MB, the most that a server takes`;
    throw new Problem(`${most}: if it is a replay file, causalreel replay plays it.`);
  }
  const text = await file.text();
  let format = null;
  try {
    format = JSON.parse(text)?.format;
  } catch {
    // not JSON: no format
  }
  if (typeof format === "string" && format.startsWith("causalreel-session/")) return text;
  throw new Problem(`${file.name} is not a replay file: those are saved by this page or by causalreel stream --record.`);
}

/** A link to this page that begins with these values. */
export async function copyLink(values) {
  const url = new URL(document.baseURI);
  url.hash = "";
  url.search = new URLSearchParams(values).toString();
  try {
    await navigator.clipboard.writeText(url.href);
    say("The link is copied.");
    $("link").textContent = "Link copied";
    setTimeout(() => { $("link").textContent = "Copy link"; }, 2000);
  } catch {
    window.prompt("Copy this link:", url.href); // no clipboard without a secure context
  }
}
