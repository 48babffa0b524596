// Small things that every part of the page uses: elements, words for eyes and for screen readers, files, memory.

export const $ = (id) => document.getElementById(id);

/** For screen readers. */
export function say(text) { $("say").textContent = text; }

/** A problem, for everybody; an empty text takes it away. */
export function tell(text) {
  $("problem").hidden = !text;
  $("problem").textContent = text;
}

export function connection(kind, text) {
  $("connection").dataset.kind = kind;
  $("connection").textContent = text;
}

/** Words over the picture; isOver: nothing plays, and a press begins a new session. */
export function overlay(text, isOver = false) {
  $("overlay").hidden = !text;
  $("words-over").textContent = text;
  $("start").hidden = !isOver;
}

export function round(number) { return Number.isFinite(number) ? String(Math.round(number * 100) / 100) : "?"; }

/** Read a value, write one, or remove it (null). */
export function stored(store, key, value) {
  try {
    if (value === undefined) return store().getItem(`causalreel.${key}`);
    if (value === null) store().removeItem(`causalreel.${key}`);
    else store().setItem(`causalreel.${key}`, value);
  } catch {
    // a browser may forbid storage; the page then forgets between visits
  }
  return null;
}

/** Have the browser save a file. */
export function save(blob, name) {
  const anchor = document.createElement("a");
  anchor.href = URL.createObjectURL(blob);
  anchor.download = name;
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(anchor.href), 60_000);
}

export function stamp() { return new Date().toISOString().slice(0, 19).replaceAll(":", "").replace("T", "-"); }
