// The page's wiring: buttons to commands, messages to words and pictures. Nothing here is fetched from other hosts.
// A link may carry ?prompt=...&seed=...&steps=...&fps=... for the session it starts.

import { Graph, Timeline } from "./charts.js";
import { $, connection, overlay, say, stored, tell } from "./page.js";
import { Decoder, hasVideoDecoder, Player } from "./player.js";
import { History } from "./prompts.js";
import { copyLink, Recorder, saveReplay, toggleRecording } from "./sharing.js";
import { Api, Problem, Stream } from "./wire.js";

const FIRST_PROMPT = "a large red circle moves right slowly on a dark background";
const SMALL = 256; // pixels across, up to which a video is enlarged without smoothing
const SLOWER = 0.92; // share of the frame rate below which generation is called slower than real time

const link = new URLSearchParams(location.search);

const now = {
  api: new Api(stored(() => sessionStorage, "token") ?? ""),
  stream: null,
  id: null,
  state: {},
  isPaused: false,
  isSlow: false,
  stepping: false,
  asking: 0, // pause and resume commands without an answer yet
  chunks: [], // recent {made_s, span_s, frames}
  sent: new Map(), // command number -> {name, at}: when it was asked for, until its first pixels are shown
};

// --------------------------------------------------------------------------------------------------- what is shown

const graphs = {
  latency: new Graph($("latency-graph"), { bars: true, digits: 2, isWorse: (value, line) => value > line }),
  rate: new Graph($("rate-graph"), { bars: false, digits: 0, isWorse: () => false }),
};
const past = new History($("prompt"), $("history"), $("forget"), sendPrompt, () => promptError(""));
const timeline = new Timeline($("timeline"), (prompt) => past.show(prompt));

const player = new Player($("video"), {
  shown(item) {
    const { header, index } = item;
    overlay("");
    $("video").classList.toggle("small", $("video").width <= SMALL);
    timeline.shown($("video"), item);
    if (index === 0) began(header);
    if (player.budget === 0 && now.stepping) endStep();
  },
  starved() {
    if (!now.isPaused && !now.stepping && now.stream && !now.stream.isOver) overlay("Waiting for the next chunk");
  },
  skipped(count) { say(`${count} frames were skipped to catch up.`); },
});
const decoder = new Decoder((item) => player.push(item), (problem) => undecodable(problem));
const recorder = new Recorder($("video"));

/** The first frame of a chunk is on the screen. */
function began(header) {
  if ($("playing").textContent !== header.prompt) {
    $("playing").textContent = header.prompt;
    $("video").setAttribute("aria-label", `Video of: ${header.prompt}`);
    say(`Now playing: ${header.prompt}`);
  }
  for (const { number, name, latency_s } of header.commands ?? []) {
    const sent = now.sent.get(number);
    now.sent.delete(number);
    const server = Number.isFinite(latency_s) ? `${latency_s.toFixed(2)} s to its first picture on the server` : "";
    const screen = sent ? `${((performance.now() - sent.at) / 1000).toFixed(2)} s to the screen` : "";
    $("reaction").textContent = `Last command, ${name}: ${[server, screen].filter(Boolean).join(", ")}.`;
  }
}

function chunk(header, parts) {
  decoder.take(header, parts);
  const { denoise_s = 0, decode_s = 0, encode_s = 0 } = header.timings ?? {};
  const made = { made_s: denoise_s + decode_s + encode_s, span_s: header.frames / header.fps, frames: header.frames };
  now.chunks.push(made);
  if (now.chunks.length > 40) now.chunks.shift();
  now.fps = header.fps;
  graphs.latency.add(made.made_s, made.span_s);
  if (now.stepping) player.budget = Math.max(player.budget, 0) + header.frames;
}

function measure() {
  const recent = now.chunks.slice(-8);
  if (!recent.length) return;
  const sum = (key) => recent.reduce((total, each) => total + each[key], 0);
  const [made_s, span_s] = [sum("made_s") / recent.length, sum("span_s") / recent.length];
  const rate = player.rate();
  const isKnown = rate !== null && !now.isPaused;
  if (isKnown) graphs.rate.add(rate, now.fps);
  const shown = isKnown ? ` Shown: ${rate.toFixed(1)} of ${round(now.fps)} frames per second.` : "";
  $("speed").textContent =
    `A chunk of ${recent.at(-1).frames} frames takes ${made_s.toFixed(3)} s to make and ${span_s.toFixed(3)} s `
    + `to play: ${(span_s / made_s).toFixed(1)} times real time.${shown}`;
  const isLive = !now.isPaused && now.stream && !now.stream.isOver;
  const isSlow = isLive && rate !== null && rate < SLOWER * now.fps;
  if (isSlow) $("slow").textContent = slowWords(rate, made_s > span_s);
  if (isSlow !== now.isSlow) {
    now.isSlow = isSlow;
    $("slow").hidden = !isSlow;
    say(isSlow ? $("slow").textContent : "Generation keeps up with real time.");
  }
}

function slowWords(rate, isModel) {
  const why = isModel
    ? "The model takes longer for a chunk than the chunk plays; fewer steps or a lower frame rate help."
    : "The model is fast enough; other sessions or the connection take the time.";
  return `Slower than real time: ${rate.toFixed(1)} of ${round(now.fps)} frames per second arrive. ${why}`;
}

function round(number) { return Number.isFinite(number) ? String(Math.round(number * 100) / 100) : "?"; }

function undecodable(problem) {
  console.error(problem);
  const format = $("format").value;
  tell(`This browser could not decode the stream as ${format}: ${problem.message}`);
  if (format !== "h264") return;
  $("format").value = "webp"; // pictures are decoded everywhere
  now.stream?.change(query());
}

// --------------------------------------------------------------------------------------------------------- sessions

function options() {
  const chosen = { prompt: $("prompt").value.trim() || FIRST_PROMPT, seed: Number($("seed").value) || 0 };
  for (const name of ["steps", "fps"]) {
    if (link.has(name) && Number(link.get(name)) > 0) chosen[name] = Number(link.get(name));
  }
  return chosen;
}

async function begin() {
  leave();
  connection("wait", "Connecting");
  overlay("Starting");
  tell("");
  try {
    const known = stored(() => sessionStorage, "session");
    join((known && (await alive(known))) || (await now.api.create(options())));
  } catch (problem) {
    refused(problem);
  }
}

/** The session if it still goes on, after a reload of the page. */
async function alive(id) {
  try {
    const { state } = await now.api.look(id);
    return state.closed ? null : { id, state, after: state.sequence - 1 }; // it counts the chunks made
  } catch (problem) {
    if (problem.status === 404) return null;
    throw problem;
  }
}

function refused(problem) {
  connection("down", "Not connected");
  overlay("");
  if (problem.status === 401) {
    $("access").hidden = false;
    if (now.api.token) tell("The server did not take this token.");
    $("token").focus();
    return;
  }
  tell(problem.message);
}

function join({ id, state, after = -1 }) {
  stored(() => sessionStorage, "session", id);
  now.id = id;
  now.state = state;
  $("session").textContent = id;
  now.stream = new Stream(now.api, id, query(), {
    hello: (message) => {
      decoder.reset(message.codec);
      connection("live", "Live");
      changed(message.state);
    },
    chunk,
    state: (message) => changed(message.state),
    error: (message) => tell(message.message),
    link: (kind, text) => { connection(kind, text); say(text); },
    lost: () => say("Some chunks were missed while the connection was away."),
    taken: () => takenOver(),
    ended: (reason, isError, status) => ended(reason, isError, status),
  });
  now.stream.after = after;
  now.stream.open();
  enable(true);
}

/** Small videos are shown enlarged, artefacts too, and cost little. */
function query() { return { format: $("format").value, quality: now.state.width <= SMALL ? 98 : 90 }; }

/** Leave the session without ending it. */
function leave() {
  now.stream?.stop();
  now.stream = null;
  decoder.drop();
  player.clear();
  player.play();
  now.chunks.length = 0;
  now.sent.clear();
  now.stepping = false;
  showPaused(false);
  timeline.clear();
  for (const graph of Object.values(graphs)) graph.clear();
}

function ended(reason, isError, status) {
  stored(() => sessionStorage, "session", null);
  enable(false);
  connection("down", "Ended");
  overlay("The session has ended");
  if (status === 401) {
    refused(new Problem(reason, 401));
    return;
  }
  if (isError) tell(`The session has ended: ${reason} A new session can be started below.`);
  else say(`The session has ended: ${reason}`);
}

/** Another window plays this session now: one viewer at a time. */
function takenOver() {
  stored(() => sessionStorage, "session", null);
  enable(false);
  connection("down", "Shown elsewhere");
  overlay("");
  tell("Another window plays this session now. A new session can be started below.");
}

function changed(state) {
  now.state = state;
  $("model").textContent = now.state.model ?? "";
  const isPaused = Boolean(now.state.paused);
  const isSettled = !now.state.pending && !now.asking; // no command of ours is on its way to change it
  if (isSettled && isPaused !== now.isPaused && !now.stepping) {
    showPaused(isPaused);
    if (isPaused) player.freeze();
    else player.play();
  }
  for (const name of ["steps", "fps", "seed"]) {
    const value = now.state[name];
    const field = $(name);
    if (typeof value === "number" && document.activeElement !== field) field.value = round(value);
  }
}

function showPaused(isPaused) {
  now.isPaused = isPaused;
  $("pause").setAttribute("aria-pressed", String(isPaused));
  $("pause").textContent = isPaused ? "Resume" : "Pause";
  if (isPaused) overlay("Paused");
  player.fresh();
}

function enable(isOn) {
  for (const id of ["pause", "step", "restart", "send", "end"]) $(id).disabled = !isOn;
  for (const id of ["seed-form", "steps-form", "fps-form"]) $(id).querySelector("button").disabled = !isOn;
  $("image").disabled = !isOn;
}

// --------------------------------------------------------------------------------------------------------- commands

async function command(name, values = {}) {
  const at = performance.now();
  if (!now.stream) throw new Problem("There is no session.");
  const number = await now.stream.command(name, values);
  now.sent.set(number, { name, at });
  if (now.sent.size > 50) now.sent.delete(now.sent.keys().next().value);
  return number;
}

/** Send a command and say what became of it. */
async function order(name, values, done) {
  tell("");
  try {
    await command(name, values);
    if (done) say(done);
    return true;
  } catch (problem) {
    tell(problem.message);
    return false;
  }
}

async function togglePause() {
  const isPaused = !now.isPaused;
  now.stepping = false;
  showPaused(isPaused);
  if (isPaused) {
    player.freeze();
  } else {
    overlay("");
    player.play();
  }
  now.asking += 1;
  const isTaken = await order(isPaused ? "pause" : "resume", {}, isPaused ? "Paused" : "Playing");
  now.asking -= 1;
  if (!isTaken) {
    showPaused(!isPaused);
    if (isPaused) player.play();
    else player.freeze();
  }
}

/** Show one more chunk: one that has arrived already, or else one that the server makes for it. */
async function step() {
  if (!now.isPaused) await togglePause();
  now.stepping = true;
  const next = player.queue[0];
  if (next) {
    player.play(player.queue.filter((item) => item.header.sequence === next.header.sequence).length);
  } else {
    player.play(0);
    overlay("Making one chunk");
    if (!(await order("step", { chunks: 1 }))) endStep();
  }
}

function endStep() {
  now.stepping = false;
  overlay("Paused");
  say("One chunk shown.");
}

async function restart() {
  const field = $("seed");
  if (!field.reportValidity()) return;
  if (await order("restart", { seed: Number(field.value) }, `Restarted with seed ${field.value}`)) {
    if (now.isPaused) await togglePause();
  }
}

async function sendPrompt(event) {
  event?.preventDefault();
  const text = $("prompt").value.trim();
  const values = { text, mode: $("mode").value };
  if (values.mode === "fade") values.chunks = Number($("fade").value) || 1;
  try {
    if (!text) throw new Problem("Write what the video should show.");
    await command("prompt", values);
    promptError("");
    past.add(text);
    say("The prompt changes at the next chunk.");
  } catch (problem) {
    promptError(problem.message);
  }
}

function promptError(text) {
  $("prompt-error").hidden = !text;
  $("prompt-error").textContent = text;
  $("prompt").setAttribute("aria-invalid", String(Boolean(text)));
  if (text) say(text);
}

/** A picture, made small before it travels: the server crops it to the video's shape. */
async function startFrom(file) {
  tell("");
  try {
    const picture = await createImageBitmap(file);
    const most = 2 * Math.max($("video").width, $("video").height);
    const scale = Math.min(1, most / Math.min(picture.width, picture.height));
    const small = document.createElement("canvas");
    small.width = Math.max(1, Math.round(picture.width * scale));
    small.height = Math.max(1, Math.round(picture.height * scale));
    small.getContext("2d").drawImage(picture, 0, 0, small.width, small.height);
    picture.close();
    await command("image", { image: small.toDataURL("image/png").split(",")[1] });
    say("The video starts again from your picture.");
  } catch (problem) {
    tell(problem instanceof Problem ? problem.message : "This file is not a picture that the browser can read.");
  }
  $("image").value = "";
}

// ----------------------------------------------------------------------------------------------- beginning and ending

function record() { return toggleRecording(recorder); }

function share() {
  const values = { prompt: $("playing").textContent || options().prompt, seed: $("seed").value };
  if ($("fps").value) values.fps = $("fps").value;
  return copyLink(values);
}

async function endSession() {
  const id = now.id;
  try {
    await now.api.end(id);
    if (now.stream && !now.stream.isOver) {
      now.stream.stop();
      ended("closed here.", false);
    }
    player.clear();
  } catch (problem) {
    tell(problem.message);
  }
}

async function newSession() {
  if (now.stream && !now.stream.isOver) await endSession();
  stored(() => sessionStorage, "session", null);
  await begin();
}

// ------------------------------------------------------------------------------------------------------------ wiring

function fullScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else $("screen").requestFullscreen?.().catch((problem) => tell(problem.message));
}

const SHORTCUTS = {
  k: togglePause, " ": togglePause, s: step, r: restart, c: record, f: fullScreen,
  "/": () => $("prompt").focus(),
};

function shortcut(event) {
  const isTaken = event.target.closest("input, textarea, select, [contenteditable]")
    || (event.key === " " && event.target.closest("button, summary, a, ol"));
  if (isTaken || event.ctrlKey || event.metaKey || event.altKey || !$("shortcuts").checked) return;
  const act = SHORTCUTS[event.key.toLowerCase()];
  if (!act || (event.repeat && event.key !== "s")) return;
  event.preventDefault();
  act();
}

function onSubmit(id, act) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
}

function wire() {
  if (hasVideoDecoder) $("format").append(new Option("H.264 video", "h264"));
  const buttons = {
    pause: togglePause, step, restart, record, full: fullScreen, replay: () => saveReplay(now.api, now.id), link: share,
    again: newSession, end: endSession,
  };
  for (const [id, act] of Object.entries(buttons)) $(id).addEventListener("click", act);
  if (!Recorder.type) Object.assign($("record"), { disabled: true, title: "This browser cannot record" });
  $("prompt-form").addEventListener("submit", sendPrompt);
  $("mode").addEventListener("change", () => { $("fade-part").hidden = $("mode").value !== "fade"; });
  $("format").addEventListener("change", () => {
    player.fresh();
    now.stream?.change(query());
  });
  $("image").addEventListener("change", () => { if ($("image").files[0]) startFrom($("image").files[0]); });
  onSubmit("seed-form", restart);
  const set = (name, unit) => order(name, { [name]: Number($(name).value) }, `${$(name).value} ${unit}`);
  onSubmit("steps-form", () => set("steps", "steps a chunk"));
  onSubmit("fps-form", () => set("fps", "frames per second"));
  onSubmit("access", () => {
    now.api.token = $("token").value;
    stored(() => sessionStorage, "token", now.api.token);
    $("access").hidden = true;
    begin();
  });
  document.addEventListener("keydown", shortcut);
  setInterval(measure, 500);
  setInterval(() => { if (now.stream?.socket?.readyState === 1) now.stream.ping(); }, 20_000);
}

wire();
$("prompt").value = link.get("prompt") ?? FIRST_PROMPT;
if (link.has("seed")) $("seed").value = link.get("seed");
enable(false);
if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
  connection("down", "Not started");
  overlay("Not started, as this device asks for less motion. New session starts it.");
} else {
  begin();
}
