// What leaves the page: recordings, replay files, links.

import { $, save, say, stamp, tell } from "./page.js";

/** The canvas -> a file, by the first container that the browser can write. */
export class Recorder {
  static types = ["video/mp4;codecs=avc1.42E01E", "video/mp4", "video/webm;codecs=vp9", "video/webm"];

  constructor(canvas) {
    this.canvas = canvas;
    this.recorder = null;
  }

  get isOn() { return this.recorder !== null; }

  static get type() {
    if (typeof MediaRecorder !== "function") return undefined;
    return Recorder.types.find((type) => MediaRecorder.isTypeSupported(type));
  }

  start() {
    const parts = [];
    const stream = this.canvas.captureStream();
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

  /** -> the recording as a Blob */
  stop() {
    this.recorder.stop();
    this.recorder = null;
    return this.done;
  }
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
