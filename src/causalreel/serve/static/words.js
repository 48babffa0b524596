// What the model understands, before anybody asks: examples, and for the tiny world its words, to be pressed.

const MOST = 2; // things in a prompt

/** A prompt -> its things, each {slot: word}, and the background; words that are not known are left out. */
export function read(text, slots, synonyms) {
  const known = new Map(Object.entries(slots).flatMap(([slot, words]) => words.map((word) => [word, slot])));
  const found = { things: [{}], background: null };
  for (const raw of text.toLowerCase().split(/[^a-z]+/)) {
    const word = synonyms[raw] ?? raw;
    const slot = known.get(word);
    if (raw === "and" && found.things.length < MOST) found.things.push({});
    else if (slot === "background") found.background = word;
    else if (slot) found.things.at(-1)[slot] = word;
  }
  return found;
}

/** The sentence that says so; the same as training's where every word is given. */
export function compose({ things, background }) {
  const clauses = things.map((thing) => {
    const moves = thing.direction || thing.speed ? ["moves", thing.direction, thing.speed] : [];
    return ["a", thing.size, thing.color, thing.shape, ...moves].filter(Boolean).join(" ");
  });
  return clauses.join(" and ") + (background ? ` on a ${background} background` : "");
}

/** The part of the prompt form below the box. `use(prompt)` sends an example, `edited()` follows a pressed word. */
export class Words {
  constructor({ box, examples, words, another }, { use, edited }) {
    Object.assign(this, { box, examples, words, another, use, edited });
    this.slots = null;
    this.synonyms = {};
    this.buttons = [];
    box.addEventListener("input", () => this.mark());
    another.addEventListener("click", () => this.second());
  }

  /** examples: prompts; words: slot -> its words, or null where the model takes any text. */
  show({ examples = [], words = null, synonyms = {} }) {
    this.slots = words;
    this.synonyms = synonyms;
    this.examples.hidden = !examples.length;
    this.examples.querySelector(".chips").replaceChildren(...examples.map((text) => button(text, () => this.use(text))));
    this.words.hidden = !words;
    this.buttons = [];
    this.words.querySelector(".slots").replaceChildren(...Object.entries(words ?? {}).map((entry) => this.row(...entry)));
    this.mark();
  }

  row(slot, words) {
    const row = document.createElement("div");
    row.setAttribute("role", "group");
    row.setAttribute("aria-label", slot);
    const name = document.createElement("span");
    name.textContent = slot;
    const chips = words.map((word) => {
      const chip = button(word, () => this.press(slot, word));
      this.buttons.push({ chip, slot, word });
      return chip;
    });
    const all = document.createElement("div");
    all.append(...chips);
    row.append(name, all);
    return row;
  }

  /** Which thing is meant: the one in which the box's caret stands. */
  thing(count) {
    const before = this.box.value.slice(0, this.box.selectionStart ?? 0);
    return Math.min(before.split(/\band\b/i).length, count) - 1;
  }

  /** Put a word where one of its kind stands, or take it out again; what a prompt leaves open is the seed's to choose. */
  press(slot, word) {
    const said = read(this.box.value, this.slots, this.synonyms);
    const at = this.thing(said.things.length);
    const place = slot === "background" ? said : said.things[at];
    place[slot] = place[slot] === word ? null : word;
    this.write(said, at);
  }

  second() {
    const said = read(this.box.value, this.slots, this.synonyms);
    if (said.things.length < MOST) {
      const [{ color }] = said.things;
      said.things.push({ color: this.slots.color.find((each) => each !== color), shape: this.slots.shape.at(-1) });
    } else {
      said.things.length = 1;
    }
    this.write(said, said.things.length - 1);
  }

  write(said, at) {
    const text = compose(said);
    this.box.value = text === "a" ? "" : text;
    const caret = compose({ things: said.things.slice(0, at + 1), background: null }).length;
    this.box.setSelectionRange(caret, caret);
    this.edited();
    this.mark();
  }

  /** Press down the words that the prompt holds. */
  mark() {
    if (!this.slots) return;
    const said = read(this.box.value, this.slots, this.synonyms);
    const thing = said.things[this.thing(said.things.length)];
    for (const { chip, slot, word } of this.buttons) {
      const isIn = (slot === "background" ? said.background : thing[slot]) === word;
      chip.setAttribute("aria-pressed", String(isIn));
    }
    this.another.textContent = said.things.length < MOST ? "and a second thing" : "only one thing";
  }
}

function button(text, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", act);
  return made;
}
