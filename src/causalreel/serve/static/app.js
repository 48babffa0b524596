// The page's wiring: buttons to commands, messages to words and pictures. Nothing here is fetched from other hosts.
// A link may carry ?prompt=...&seed=...&steps=...&fps=... for the session it starts.

import { Timeline } from "./charts.js";
import { fullScreen, keepInSight, limit, onSubmit, shortcuts } from "./controls.js";
import { Given } from "./given.js";
import { $, connection, overlay, round, say, stored, tell } from "./page.js";
import { FirstPicture } from "./picture.js";
import { Playback } from "./playback.js";
import { Decoder, hasVideoDecoder, Player } from "./player.js";
import { explainModes, modeOf, promptError, sendPrompt } from "./prompting.js";
import { History } from "./prompts.js";
import { replacing } from "./replace.js";
import { copyLink, readReplay, Recorder, saveReplay, toggleRecording } from "./sharing.js";
import { Speed } from "./speed.js";
import { Steering } from "./steer.js";
import { Api, Problem, Stream } from "./wire.js";
import { Words } from "./words.js";

const SMALL = 256; // pixels across, up to which a video is enlarged without smoothing
const link = new URLSearchParams(location.search);

const now = {
  api: new Api(stored(() => sessionStorage, "token") ?? ""),
  stream: null,
  id: null,
  state: {},
  isPaused: false,
  isAway: false, // the connection is
  stepping: false,
  asking: 0, // pause and resume commands without an answer yet
  sent: new Map(), // command number -> {name, at}: when it was asked for, until its first pixels are shown
};

// --------------------------------------------------------------------------------------------------- what is shown

const speed = new Speed();
const past = new History($("prompt"), $("history"), $("forget"), send, () => promptError(""));
const timeline = new Timeline($("timeline"), $("timeline-empty"), (prompt) => past.show(prompt));
const words = new Words(
  { box: $("prompt"), examples: $("examples"), words: $("words"), another: $("another") },
  { use: (text) => { past.show(text); send(); }, edited: () => promptError("") },
);

const player = new Player($("video"), {
  shown(item) {
    const { header, index } = item;
    if (!now.stream?.isOver) overlay(""); // what had arrived before the end is still shown
    shape($("video"));
    timeline.shown($("video"), item);
    if (index === 0) began(header);
    if (player.budget === 0 && now.stepping) playback.endStep();
    else if (header.sequence + 1 === now.replay && index + 1 === header.frames) playback.replayed();
  },
  starved() {
    if (now.isPaused || now.stepping || !now.stream || now.stream.isOver) return;
    overlay(now.isAway ? "No connection, trying again" : "Waiting for the next chunk");
  },
  skipped(count) { say(`${count} frames were skipped to catch up.`); },
});
const playback = new Playback(now, player, order);
const replace = replacing(now, { end: endSession, begin, fresh: () => now.api.create(options()) });
const decoder = new Decoder((item) => player.push(item), (problem) => undecodable(problem));
const recorder = new Recorder($("video"));
const picture = new FirstPicture($("video"), (image) => command("image", { image }));
const steering = new Steering((pressed, tapped) => command("keys", tapped.length ? { pressed, tapped } : { pressed }));

const given = new Given(now.api, { replace, options, command, stream: () => now.stream, model: () => now.model });

/** The screen takes the video's shape; small videos are enlarged without smoothing. */
function shape({ width, height }) {
  $("video").classList.toggle("small", width <= SMALL);
  $("frame").style.setProperty("--shape", width / height);
}

/** The first frame of a chunk is on the screen. */
function began(header) {
  if ($("playing").textContent !== header.prompt) {
    $("playing").textContent = header.prompt;
    $("caption").hidden = false;
    $("video").setAttribute("aria-label", `Video of: ${header.prompt}`);
    say(`Showing: ${header.prompt}`);
  }
  if (now.replay && header.sequence >= now.replay) playback.replaying(null);
  steering.began(header);
  for (const { number, name, latency_s } of header.commands ?? []) {
    const sent = now.sent.get(number);
    now.sent.delete(number);
    if (name === "keys") continue; // told of beside the pads
    const server = Number.isFinite(latency_s) ? `${latency_s.toFixed(2)} s to its first picture on the server` : "";
    const screen = sent ? `${((performance.now() - sent.at) / 1000).toFixed(2)} s to the screen` : "";
    $("reaction").textContent = `Last command, ${name}: ${[server, screen].filter(Boolean).join(", ")}.`;
  }
}

function chunk(header, parts) {
  decoder.take(header, parts);
  speed.chunk(header);
  if (now.stepping) player.budget = Math.max(player.budget, 0) + header.frames;
}

function measure() {
  speed.measure(player.rate(), Boolean(!now.isPaused && !now.isAway && now.stream && !now.stream.isOver));
}

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
  const chosen = { prompt: $("prompt").value.trim() || now.model.examples[0], seed: Number($("seed").value) || 0 };
  for (const name of ["steps", "fps"]) {
    if (link.has(name) && Number(link.get(name)) > 0) chosen[name] = Number(link.get(name));
  }
  return chosen;
}

/** Join the session that `open` gives: by default the one from before a reload, or else a new one. -> it, or null. */
async function begin(open = known) {
  leave();
  connection("wait", "Connecting");
  overlay("Starting");
  tell("");
  try {
    await meet();
    const opened = await open();
    join(opened);
    return opened;
  } catch (problem) {
    refused(problem);
    return null;
  }
}

async function known() {
  const id = stored(() => sessionStorage, "session");
  return (id && (await alive(id))) || now.api.create(options());
}

/** What the model is and understands, asked for once. */
async function meet() {
  if (now.model) return;
  now.model = await now.api.model();
  $("model").textContent = now.model.name;
  if (!$("prompt").value.trim()) $("prompt").value = now.model.examples[0] ?? "";
  words.show(now.model);
  modeOf(now.model);
  picture.allow(now.model.takes_picture);
  steering.allow(now.model.control);
  limit(now.model.commands);
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
  if (problem.status === 401) {
    overlay("Locked");
    $("access").hidden = false;
    if (now.api.token) tell("The server did not take this token.");
    $("token").focus();
    return;
  }
  overlay(problem.code === "busy" ? "No room at the moment" : "Not started", true);
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
      now.isAway = false;
      connection("live", "Live");
      changed(message.state);
      steering.meet(message.state.keys);
    },
    chunk,
    state: (message) => changed(message.state),
    error: (message) => tell(message.message),
    link: (kind, text) => {
      now.isAway = true;
      connection(kind, text);
      say(text);
      if (kind === "down" && player.isStarved) overlay(text);
    },
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
  speed.clear();
  steering.leave();
  given.end();
  now.sent.clear();
  now.stepping = false;
  playback.show(false);
  timeline.clear();
  picture.mark(false);
  $("caption").hidden = true;
  $("playing").textContent = "";
}

function ended(reason, isError, status) {
  stored(() => sessionStorage, "session", null);
  steering.leave();
  given.end();
  enable(false);
  connection("down", "Ended");
  overlay(`The session has ended${/^closed/.test(reason) ? "" : `: ${reason}`}`, true);
  if (status === 401) {
    refused(new Problem(reason, 401));
    return;
  }
  if (isError) tell(`The session has ended: ${reason} `);
  else say(`The session has ended: ${reason}`);
}

/** Another window plays this session now: one viewer at a time. */
function takenOver() {
  stored(() => sessionStorage, "session", null);
  steering.leave();
  given.end();
  enable(false);
  connection("down", "Shown elsewhere");
  overlay("Shown in another window", true);
  tell("Another window plays this session now.");
}

function changed(state) {
  now.state = state;
  if (!now.state.pending) picture.mark(Boolean(now.state.has_image));
  playback.replaying(now.state.replaying);
  given.mark(now.state);
  $("replay").disabled = given.isGiven || $("end").disabled;
  const isPaused = Boolean(now.state.paused);
  const isAhead = now.replay && now.state.sequence >= now.replay; // it paused at the end, which is not shown yet
  const isSettled = !now.state.pending && !now.asking && !isAhead; // no command of ours is on its way to change it
  if (isSettled && isPaused !== now.isPaused && !now.stepping) playback.follow(isPaused);
  for (const name of ["steps", "fps", "seed"]) {
    const value = now.state[name];
    const field = $(name);
    if (typeof value === "number" && document.activeElement !== field) field.value = round(value);
  }
}

function enable(isOn) {
  for (const id of ["pause", "step", "restart", "send", "end"]) $(id).disabled = !isOn;
  for (const id of ["seed-form", "steps-form", "fps-form"]) $(id).querySelector("button").disabled = !isOn;
  $("image").disabled = !(isOn && now.model?.takes_picture);
  $("without").disabled = $("replay").disabled = $("link").disabled = !isOn;
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

function send(event) {
  event?.preventDefault();
  return sendPrompt(command, (text) => past.add(text));
}

// ----------------------------------------------------------------------------------------------- beginning and ending

function record() { return toggleRecording(recorder); }

function share() {
  const values = { prompt: $("playing").textContent || $("prompt").value, seed: $("seed").value };
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

/** A session that shows what a replay file holds, in place of the one that plays. */
async function openReplay(file) {
  try {
    const text = await readReplay(file);
    const opened = await replace(() => now.api.replay(text));
    if (opened?.notes.length) tell(`The replay may differ from what was recorded: ${opened.notes.join("; ")}.`);
  } catch (problem) {
    tell(problem.message);
  }
}

/** A file dropped anywhere on the page: a replay file or a first picture. */
function drop(event) {
  const [file] = event.dataTransfer?.files ?? [];
  if (!file) return;
  event.preventDefault();
  if (/json/.test(file.type) || file.name.endsWith(".json")) openReplay(file);
  else if ($("image").disabled) tell("There is no session that takes a picture.");
  else picture.give(file);
}

// ------------------------------------------------------------------------------------------------------------ wiring

const SHORTCUTS = {
  k: () => playback.toggle(), " ": () => playback.toggle(), s: () => playback.step(), r: () => playback.restart(),
  c: record, f: fullScreen,
  "/": () => $("prompt").focus(),
};

function wire() {
  if (hasVideoDecoder) $("format").append(new Option("H.264 video", "h264"));
  const buttons = {
    pause: SHORTCUTS.k, step: SHORTCUTS.s, restart: SHORTCUTS.r, record, full: fullScreen, link: share,
    replay: () => saveReplay(now.api, now.id),
    again: () => replace(), start: () => replace(), end: endSession,
  };
  for (const [id, act] of Object.entries(buttons)) $(id).addEventListener("click", act);
  if (!Recorder.type) Object.assign($("record"), { disabled: true, title: "This browser cannot record" });
  $("prompt-form").addEventListener("submit", send);
  explainModes();
  $("format").addEventListener("change", () => {
    player.fresh();
    now.stream?.change(query());
  });
  $("open").addEventListener("change", () => {
    if ($("open").files[0]) openReplay($("open").files[0]);
    $("open").value = "";
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", drop);
  onSubmit("seed-form", SHORTCUTS.r);
  const set = (name, unit) => order(name, { [name]: Number($(name).value) }, `${$(name).value} ${unit}`);
  onSubmit("steps-form", () => set("steps", "steps a chunk"));
  onSubmit("fps-form", () => set("fps", "frames per second"));
  onSubmit("access", () => {
    now.api.token = $("token").value;
    stored(() => sessionStorage, "token", now.api.token);
    $("access").hidden = true;
    begin();
  });
  shortcuts(SHORTCUTS, (event) => steering.takes(event));
  keepInSight($("frame"), $("prompt-form"));
  setInterval(measure, 500);
  setInterval(() => { if (now.stream?.socket?.readyState === 1) now.stream.ping(); }, 20_000);
}

wire();
$("prompt").value = link.get("prompt") ?? "";
if (link.has("seed")) $("seed").value = link.get("seed");
enable(false);
if (matchMedia("(prefers-reduced-motion: reduce)").matches) {
  connection("down", "Not started");
  overlay("Not started, as this device asks for less motion.", true);
  meet().catch(refused);
} else {
  begin();
}
