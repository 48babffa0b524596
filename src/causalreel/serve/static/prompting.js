// How a prompt is changed: the box is sent as a command, in one of the ways that the page names.

import { $, say } from "./page.js";
import { Problem } from "./wire.js";

const MODES = {
  recompute: "The picture goes on. The model looks at its last frames again with the new prompt: shows soonest.",
  switch: "The picture goes on. The model remembers its last frames as they were: the old may linger a little.",
  forget: "The picture goes on from its last moment. What was before is forgotten: things turn where they are told.",
  fade: "The picture goes on, and moves from the old prompt to the new one in equal steps.",
  restart: "A new video from its first frame, with this prompt and the same seed.",
};

/** Send what the box holds by command(name, values); taken(text): the server has it. */
export async function sendPrompt(command, taken) {
  const text = $("prompt").value.trim();
  const mode = $("mode").value;
  const values = mode === "restart" ? { prompt: text } : { text, mode };
  if (mode === "fade") values.chunks = Number($("fade").value) || 1;
  try {
    if (!text) throw new Problem("Write what the video should show.");
    await command(mode === "restart" ? "restart" : "prompt", values);
    promptError("");
    taken(text);
    say(mode === "restart" ? "Starting again with this prompt." : "The prompt changes at the next chunk.");
  } catch (problem) {
    promptError(problem.message.replace(/; allowed words are .*/, "; the words it knows are below")); // to be pressed
  }
}

export function promptError(text) {
  $("prompt-error").hidden = !text;
  $("prompt-error").textContent = text;
  $("prompt").setAttribute("aria-invalid", String(Boolean(text)));
  if (text) say(text);
}

let isChosen = false;

/** What a model's prompts do until somebody chooses: where they change nothing that plays, the video begins again. */
export function modeOf({ changes = true, mode = "recompute" }) {
  if (isChosen) return;
  $("mode").value = changes ? mode : "restart";
  explain();
}

function explain() {
  $("fade-part").hidden = $("mode").value !== "fade";
  $("mode-help").textContent = MODES[$("mode").value];
}

/** Say what the chosen way does. */
export function explainModes() {
  $("mode").addEventListener("change", () => {
    isChosen = true;
    explain();
  });
  explain();
}
