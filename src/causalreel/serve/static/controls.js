// Forms, shortcuts and the full screen: what a press leads to, apart from what it does.

import { $, tell } from "./page.js";

/** Give the fields for numbers the limits of the commands that they are sent with. */
export function limit(commands) {
  for (const [name, about] of commands.flatMap((command) => Object.entries(command.arguments.properties))) {
    const { minimum, maximum } = about.anyOf?.[0] ?? about;
    if ($(name)?.type === "number") Object.assign($(name), { min: minimum, max: maximum });
  }
}

export function onSubmit(id, act) {
  $(id).addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
}

export function fullScreen() {
  if (document.fullscreenElement) document.exitFullscreen();
  else $("screen").requestFullscreen?.().catch((problem) => tell(problem.message));
}

/** Where the prompt is below the video and it is out of sight, it plays small in a corner; a press leads back to it. */
export function keepInSight(frame, form) {
  const seen = new Map([[frame, true], [form, false]]);
  const watch = new IntersectionObserver((changes) => {
    for (const { target, intersectionRatio } of changes) seen.set(target, intersectionRatio > 0.2);
    $("screen").classList.toggle("mini", !seen.get(frame) && seen.get(form));
  }, { threshold: [0, 0.2, 0.4] });
  for (const one of seen.keys()) watch.observe(one);
  $("screen").addEventListener("click", () => {
    if ($("screen").classList.contains("mini")) frame.scrollIntoView({ block: "start" });
  });
}

/** Keys that press buttons, by what they write; steers(event): whether the key steers the video, which comes first. */
export function shortcuts(acts, steers) {
  document.addEventListener("keydown", (event) => {
    if (steers(event)) return;
    const isTaken = event.target.closest("input, textarea, select, [contenteditable]")
      || (event.key === " " && event.target.closest("button, summary, a, ol"));
    if (isTaken || event.ctrlKey || event.metaKey || event.altKey || !$("shortcuts").checked) return;
    const act = acts[event.key.toLowerCase()];
    if (!act || (event.repeat && event.key !== "s")) return;
    event.preventDefault();
    act();
  });
}
