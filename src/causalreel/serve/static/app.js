// The page's wiring: buttons to commands, messages to words and pictures. Nothing here is fetched from other hosts.
// A link may carry ?prompt=...&seed=...&steps=...&fps=... for the session it starts.

import { Graph, Timeline } from "./charts.js";
import { Decoder, hasVideoDecoder, Player, Recorder } from "./player.js";
import { Api, Problem, Stream } from "./wire.js";

const FIRST_PROMPT = "a large red circle moves right slowly on a dark background";
const SLOWER = 0.92; // share of the frame rate below which generation is called slower than real time
const REMEMBERED = 30;

const $ = (id) => document.getElementById(id);
const link = new URLSearchParams(location.search);

const now = {
  api: new Api(stored(sessionStorage, "token") ?? ""),
  stream: null,
  id: null,
  state: {},
  isPaused: false,
  isSlow: false,
  stepping: false,
  chunks: [], // recent {made_s, span_s, frames}
  sent: new Map(), // command number -> {name, at}: when it was asked for, until its first pixels are shown
};

// ------------------------------------------------------------------------------------------------------------ words

function say(text) { $("say").textContent = text; }

function tell(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text;
}

function connection(kind, text) {
  $("connection").dataset.kind = kind;
  $("connection").textContent = text;
}

function overlay(text) { $("overlay").textContent = text; }

function stored(store, key, value) {
  try {
    if (value === undefined) return store.getItem(`causalreel.${key}`);
    if (value === null) store.removeItem(`causalreel.${key}`);
    else store.setItem(`causalreel.${key}`, value);
  } catch {
    // a browser may forbid storage; the page then forgets between visits
  }
  return null;
}

// --------------------------------------------------------------------------------------------------- what is shown

const graphs = {
  latency: new Graph($("latency-graph"), { bars: true, digits: 2, isWorse: (value, line) => value > line }),
  rate: new Graph($("rate-graph"), { bars: false, digits: 0, isWorse: () => false }),
};
const timeline = new Timeline($("timeline"), (prompt) => { setPrompt(prompt); $("prompt").focus(); });

const player = new Player($("video"), {
  shown(item) {
    const { header, index } = item;
    overlay("");
    $("video").classList.toggle("small", $("video").width <= 256);
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
  if (rate !== null && !now.isPaused) graphs.rate.add(rate, now.fps);
  const shown = rate === null || now.isPaused ? "" : ` Shown: ${rate.toFixed(1)} of ${round(now.fps)} frames per second.`;
  $("speed").textContent =
    `A chunk of ${recent.at(-1).frames} frames takes ${made_s.toFixed(3)} s to make and ${span_s.toFixed(3)} s to play: `
    + `${(span_s / made_s).toFixed(1)} times real time.${shown}`;
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
  tell(`This browser could not decode the stream as ${$("format").value}: ${problem.message}`);
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
    const known = stored(sessionStorage, "session");
    const id = (known && (await alive(known))) || (await now.api.create(options())).id;
    join(id);
  } catch (problem) {
    refused(problem);
  }
}

/** The id if its session still goes on, after a reload of the page. */
async function alive(id) {
  try {
    const found = await now.api.look(id);
    const state = found.state ?? found;
    now.resume = state.sequence;
    return state.closed ? null : id;
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

function join(id) {
  stored(sessionStorage, "session", id);
  now.id = id;
  $("session").textContent = id;
  now.stream = new Stream(now.api, id, query(), {
    hello: (message) => {
      decoder.reset(message.codec);
      connection("live", "Live");
      changed(message.state);
    },
    chunk,
    state: (message) => changed(message.state ?? message),
    error: (message) => tell(message.message),
    link: (kind, text) => { connection(kind, text); say(text); },
    lost: () => say("Some chunks were missed while the connection was away."),
    ended: (reason, isError, status) => ended(reason, isError, status),
  });
  if (now.resume !== undefined) now.stream.after = now.resume;
  delete now.resume;
  now.stream.open();
  enable(true);
}

function query() { return { format: $("format").value, quality: 92 }; }

/** Leave the session without ending it. */
function leave() {
  now.stream?.stop();
  now.stream = null;
  player.clear();
  player.play();
  decoder.reset("");
  now.chunks.length = 0;
  now.sent.clear();
  now.stepping = false;
  showPaused(false);
  timeline.clear();
  for (const graph of Object.values(graphs)) graph.clear();
}

function ended(reason, isError, status) {
  stored(sessionStorage, "session", null);
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

function changed(state) {
  now.state = state ?? {};
  const isPaused = Boolean(now.state.paused);
  if (isPaused !== now.isPaused && !now.stepping) {
    showPaused(isPaused);
    if (isPaused) player.freeze();
    else player.play();
  }
  for (const name of ["steps", "fps", "seed"]) {
    const value = now.state[name];
    const field = $(name);
    if (typeof value === "number" && document.activeElement !== field) field.value = round(value);
  }
  if (Array.isArray(now.state.steps) && document.activeElement !== $("steps")) $("steps").value = now.state.steps.length;
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
  if (!(await order(isPaused ? "pause" : "resume", {}, isPaused ? "Paused" : "Playing"))) {
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
    remember(text);
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

// ----------------------------------------------------------------------------------------------------- past prompts

const past = { list: JSON.parse(stored(localStorage, "prompts") ?? "[]"), at: -1, draft: "" };

function remember(text) {
  past.list = [text, ...past.list.filter((each) => each !== text)].slice(0, REMEMBERED);
  past.at = -1;
  stored(localStorage, "prompts", JSON.stringify(past.list));
  showPast();
}

function showPast() {
  const items = past.list.map((text) => {
    const item = document.createElement("li");
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.onclick = () => { setPrompt(text); $("prompt").focus(); };
    item.append(button);
    return item;
  });
  $("history").replaceChildren(...items);
  $("forget").disabled = !items.length;
}

function setPrompt(text) {
  $("prompt").value = text;
  promptError("");
}

/** Up and Down walk through earlier prompts, from the first and last line of the box. */
function walk(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    sendPrompt();
    return;
  }
  const box = $("prompt");
  const isUp = event.key === "ArrowUp" && !box.value.slice(0, box.selectionStart).includes("\n");
  const isDown = event.key === "ArrowDown" && !box.value.slice(box.selectionEnd).includes("\n");
  const to = past.at + (isUp ? 1 : -1);
  if (!(isUp || isDown) || to < -1 || to >= past.list.length) return;
  event.preventDefault();
  if (past.at === -1) past.draft = box.value;
  past.at = to;
  setPrompt(to === -1 ? past.draft : past.list[to]);
}

// ------------------------------------------------------------------------------------------------- files and sharing

async function toggleRecording() {
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

async function saveReplay() {
  try {
    const record = await now.api.record(now.id);
    const name = `causalreel-${stamp()}.replay.json`;
    const file = new File([JSON.stringify(record, null, 1)], name, { type: "application/json" });
    const isTouch = matchMedia("(pointer: coarse)").matches;
    if (isTouch && navigator.canShare?.({ files: [file] })) await navigator.share({ files: [file], title: name });
    else save(file, name);
  } catch (problem) {
    if (problem.name !== "AbortError") tell(problem.message);
  }
}

function save(blob, name) {
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(blob);
  anchor.download = name;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 60_000);
}

function stamp() { return new Date().toISOString().slice(0, 19).replaceAll(":", "").replace("T", "-"); }

async function copyLink() {
  const url = new URL(document.baseURI);
  url.hash = "";
  const values = { prompt: $("playing").textContent || options().prompt, seed: $("seed").value };
  if ($("fps").value) values.fps = $("fps").value;
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
  stored(sessionStorage, "session", null);
  await begin();
}

// ------------------------------------------------------------------------------------------------------------ wiring

function fullScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else $("screen").requestFullscreen?.().catch((problem) => tell(problem.message));
}

const SHORTCUTS = {
  k: togglePause, " ": togglePause, s: step, r: restart, c: toggleRecording, f: fullScreen,
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
    pause: togglePause, step, restart, record: toggleRecording, full: fullScreen, replay: saveReplay, link: copyLink,
    again: newSession, end: endSession,
    forget: () => { past.list = []; stored(localStorage, "prompts", null); showPast(); },
  };
  for (const [id, act] of Object.entries(buttons)) $(id).addEventListener("click", act);
  if (!Recorder.type) Object.assign($("record"), { disabled: true, title: "This browser cannot record" });
  $("prompt-form").addEventListener("submit", sendPrompt);
  $("prompt").addEventListener("keydown", walk);
  $("mode").addEventListener("change", () => { $("fade-part").hidden = $("mode").value !== "fade"; });
  $("format").addEventListener("change", () => {
    player.fresh();
    now.stream?.change(query());
  });
  $("image").addEventListener("change", () => { if ($("image").files[0]) startFrom($("image").files[0]); });
  onSubmit("seed-form", restart);
  onSubmit("steps-form", () => order("steps", { steps: Number($("steps").value) }, `${$("steps").value} steps a chunk`));
  onSubmit("fps-form", () => order("fps", { fps: Number($("fps").value) }, `${$("fps").value} frames per second`));
  onSubmit("access", () => {
    now.api.token = $("token").value;
    stored(sessionStorage, "token", now.api.token);
    $("access").hidden = true;
    begin();
  });
  document.addEventListener("keydown", shortcut);
  setInterval(measure, 500);
  setInterval(() => { if (now.stream?.socket?.readyState === 1) now.stream.ping(); }, 20_000);
}

wire();
showPast();
setPrompt(link.get("prompt") ?? FIRST_PROMPT);
if (link.has("seed")) $("seed").value = link.get("seed");
enable(false);
begin();
