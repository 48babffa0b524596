"""The words of the tiny world's captions: which exist, what each one describes, and how a prompt splits into them.

Shared by the world that writes captions (`data.world`), the tiny text encoder and the metrics. Pure Python. A prompt
such as "a large red circle moves right slowly and a small blue square moves up quickly on a dark background" becomes
seven or more tokens; articles, verbs and other filler carry nothing and are dropped. What a prompt leaves out is free.
"""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from causalreel.foreign import shown
from causalreel.spelling import nearest

SIZES = ("small", "large")
COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = ("right", "down", "left", "up")
SPEEDS = ("slowly", "quickly")
BACKGROUNDS = ("dark", "grey", "light")
BACKGROUND_RGB = ((18, 18, 24), (122, 122, 126), (240, 240, 240))
"""Colours 0..255 of each of them."""
COLOR_RGB = ((230, 38, 38), (38, 184, 64), (44, 84, 240), (250, 216, 40), (226, 50, 200), (40, 212, 228))
"""Colours 0..255 of each word of COLORS."""

SLOTS: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "color": COLORS,
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
    "background": BACKGROUNDS,
}
"""Slot -> its words, in the order of the class numbers used by `data.world`."""

WORDS: dict[str, str] = {word: slot for slot, words in SLOTS.items() for word in words}
"""Word -> slot, for the canonical words."""

SYNONYMS: dict[str, str] = {
    "big": "large",
    "little": "small",
    "pink": "magenta",
    "disc": "circle",
    "gray": "grey",
    "slow": "slowly",
    "quick": "quickly",
    "fast": "quickly",
    "upward": "up",
    "upwards": "up",
    "downward": "down",
    "downwards": "down",
    "leftward": "left",
    "leftwards": "left",
    "rightward": "right",
    "rightwards": "right",
}
"""Accepted spellings -> the canonical word that the token carries."""

_VERBS = ("moves", "moving", "move", "goes", "going", "travels", "travelling", "is")
_SMALL_WORDS = (
    "a",
    "an",
    "the",
    "one",
    "that",
    "which",
    "to",
    "toward",
    "towards",
    "on",
    "over",
    "against",
    "in",
    "with",
)
FILLER = frozenset((*_VERBS, *_SMALL_WORDS, "background"))
"""Words that a prompt may contain and that describe nothing."""

MAX_OBJECTS = 2
BACKGROUND_INDEX = MAX_OBJECTS
"""The object index of a background word."""


class Token(NamedTuple):
    """One word that describes something: canonical word, its slot, and which object (0, 1; background: 2)."""

    word: str
    slot: str
    object_index: int


@dataclass(frozen=True)
class ObjectSpec:
    """What a caption says of one object; None means that it leaves the choice open."""

    color: str
    shape: str
    size: str | None = None
    direction: str | None = None
    speed: str | None = None


@dataclass(frozen=True)
class Caption:
    """A parsed caption: one or two objects in the order named, and the background if it is named."""

    objects: tuple[ObjectSpec, ...]
    background: str | None = None


def tokenize(text: str) -> list[Token]:
    """Prompt -> its describing words in order, each with its slot and object.

    Case, commas, full stops and filler words do not matter; "and" starts the second object. Raises ValueError for an
    unknown word, a third object, two of one colour, an attribute given twice, a background word that does not stand
    before "background", and a prompt that describes nothing.
    """
    words = [w for w in (raw.strip(string.punctuation) for raw in text.lower().replace(",", " ").split()) if w]
    tokens: list[Token] = []
    taken: dict[tuple[str, int], str] = {}
    index = 0
    for position, raw in enumerate(words):
        if raw == "and":
            index += 1
            if index >= MAX_OBJECTS:
                raise ValueError(f"prompt names more than {MAX_OBJECTS} objects: {text!r}")
            continue
        if raw in FILLER:
            continue
        word = SYNONYMS.get(raw, raw)
        slot = WORDS.get(word)
        if slot is None:
            raise ValueError(_unknown(raw))
        if slot == "background" and words[position + 1 : position + 2] != ["background"]:
            raise ValueError(f"{raw!r} describes the background only: write 'on a {word} background', got {text!r}")
        owner = BACKGROUND_INDEX if slot == "background" else index
        earlier = taken.setdefault((slot, owner), word)
        if earlier != word:
            raise ValueError(f"prompt gives two {slot} words for one thing, {earlier!r} and {word!r}: {text!r}")
        if Token(word, slot, owner) not in tokens:
            tokens.append(Token(word, slot, owner))
    colors = [token.word for token in tokens if token.slot == "color"]
    if len(set(colors)) < len(colors):
        raise ValueError(
            f"prompt gives two things the colour {colors[0]}; they differ in colour in this world: {text!r}"
        )
    if words and words[-1] == "and":
        raise ValueError(f"prompt ends with 'and': {text!r}")
    if not tokens:
        raise ValueError(f"prompt {text!r} describes nothing; write for example 'a large red circle moves right'")
    return tokens


def parse_caption(text: str) -> Caption:
    """Prompt -> what it asks for. Beyond `tokenize`, every object needs a colour and a shape, else ValueError."""
    objects, background = _gather(text)
    if not objects:
        raise ValueError(f"prompt {text!r} names no object; write for example 'a red circle on a dark background'")
    for number, attributes in enumerate(objects, start=1):
        for slot in ("color", "shape"):
            if slot not in attributes:
                raise ValueError(f"object {number} of prompt {text!r} has no {slot}; allowed: {', '.join(SLOTS[slot])}")
    return Caption(tuple(ObjectSpec(**attributes) for attributes in objects), background)


def compose(caption: Caption) -> str:
    """Caption -> the sentence that training uses; `parse_caption(compose(c)) == c`."""
    text = " and ".join(_clause(spec) for spec in caption.objects)
    return text if caption.background is None else f"{text} on a {caption.background} background"


def background_of(text: str) -> str | None:
    """The background that a prompt names, if it does."""
    return _gather(text)[1]


def complete(
    text: str,
    seed: int,
    *,
    background: str | None = None,
    before: str | None = None,
    going: Sequence[str | None] | None = None,
) -> str:
    """Prompt -> a full sentence in the wording of training; what it leaves open is drawn by (prompt, seed).

    background: the one that holds unless the prompt names another. before: the sentence that holds until now, if the
    prompt changes a video that goes on: then what it leaves open stays as it was, and things are named in the order in
    which that sentence named them, those that come last (`_succeeding`). going: the directions in which the objects of
    that sentence go by now, which is not always where it sent them; None: not known, and none is told. Without it they
    are taken to go where they were sent.

    The world's captions name every attribute, and a model trained on them reads a shorter prompt poorly: this is to the
    tiny world what rewriting prompts is to large models. A full sentence comes back as it was, but for that order;
    `tokenize` refuses the rest.
    """
    chance = random.Random(f"{seed}/{' '.join(text.split()).lower()}")
    objects, named_background = _gather(text)
    there = set[int]()
    if before is not None:
        objects, background, there = _succeeding(objects, before, going)
    background = named_background or background or chance.choice(BACKGROUNDS)
    objects = objects or [{}]
    named = {attributes["color"] for attributes in objects if "color" in attributes}
    for number, attributes in enumerate(objects):
        free = [color for color in COLORS if color not in named]
        named.add(attributes.setdefault("color", chance.choice(free)))
        for slot in ("shape", "size", "direction", "speed"):
            if slot != "direction" or number not in there:
                attributes.setdefault(slot, chance.choice(SLOTS[slot]))
    return compose(Caption(tuple(ObjectSpec(**attributes) for attributes in objects), background))


def _succeeding(
    objects: list[dict[str, str]], before: str, going: Sequence[str | None] | None
) -> tuple[list[dict[str, str]], str | None, set[int]]:
    """The objects that a prompt names, filled from those of the sentence before it and in their order, the background
    that was, and the numbers of the objects that were there. Of a prompt that names none all stay.
    """
    old, background = _gather(before)
    for one, way in zip(old, going or (), strict=going is not None):
        one.pop("direction", None)
        one |= {} if way is None else {"direction": way}
    objects = objects or [{} for _ in old]
    was = matched([one.get("color") for one in old], [one.get("color") for one in objects])
    order = _standing(was)
    stays = {place: old[one] for place, one in enumerate(was[number] for number in order) if one is not None}
    return [stays.get(place, {}) | objects[number] for place, number in enumerate(order)], background, set(stays)


def matched(old: Sequence[str | None], new: Sequence[str | None]) -> list[int | None]:
    """Colours of the objects before and behind a change -> of each later one the number of the one that it was.

    One of a colour that is there is that one, the others follow in their order; None: it comes.
    """
    left = list(range(len(old)))
    found: list[int | None] = [None] * len(new)
    for number, color in enumerate(new):
        same = [i for i in left if color is not None and old[i] == color]
        if same:
            found[number] = same[0]
            left.remove(same[0])
    return [left.pop(0) if one is None and left else one for one in found]


def retold(before: str, after: str, going: Sequence[str | None] | None = None) -> str:
    """The completed sentence before a change, as it is told where it is read again: its objects in the order of those
    that they become in the sentence behind it, those that go last, so that what is there has its place in both.

    going: the directions in which its objects go by now; None: not known. One that has turned since it was told, and is
    now told the same direction again, is said to go as it does: two sentences that say the same ask for nothing.
    """
    old, new = parse_caption(before), parse_caption(after)
    objects, became = list(old.objects), matched([one.color for one in old.objects], [one.color for one in new.objects])
    for is_to, was in zip(new.objects, became, strict=True):
        if was is not None and going is not None and is_to.direction == objects[was].direction:
            objects[was] = replace(objects[was], direction=going[was] or is_to.direction)
    order = [one for one in became if one is not None]
    order += [one for one in range(len(objects)) if one not in order]
    return compose(Caption(tuple(objects[one] for one in order), old.background))


def _standing(was: Sequence[int | None]) -> list[int]:
    """What `matched` found -> the numbers of the later objects, in the order in which they stood before; what comes is
    last."""
    return sorted(range(len(was)), key=lambda number: (was[number] is None, was[number] or 0))


def said_of(text: str, *, before: str | None = None) -> Caption:
    """What a prompt says, with "" for a colour or a shape that it leaves open; its objects in the order in which
    `complete` has them behind the sentence `before`."""
    objects, background = _gather(text)
    if before is not None:
        old, _ = _gather(before)
        was = matched([one.get("color") for one in old], [one.get("color") for one in objects])
        objects = [objects[number] for number in _standing(was)]
    return Caption(tuple(ObjectSpec(**({"color": "", "shape": ""} | attributes)) for attributes in objects), background)


def _gather(text: str) -> tuple[list[dict[str, str]], str | None]:
    """Prompt -> slot -> word of each object, and the background if it is named."""
    objects: list[dict[str, str]] = []
    background = None
    for word, slot, index in tokenize(text):
        if slot == "background":
            background = word
            continue
        while len(objects) <= index:
            objects.append({})
        objects[index][slot] = word
    return objects, background


def _clause(spec: ObjectSpec) -> str:
    words = ["a", spec.size, spec.color, spec.shape]
    if spec.direction is not None or spec.speed is not None:
        words += ["moves", spec.direction, spec.speed]
    return " ".join(word for word in words if word is not None)


def _unknown(word: str) -> str:
    close = nearest(word, [*WORDS, *SYNONYMS])
    hint = "" if close is None else f"did you mean {SYNONYMS.get(close, close)!r}? "
    allowed = "; ".join(f"{slot}: {', '.join(words)}" for slot, words in SLOTS.items())
    return f"unknown word {shown(repr(word), 60)}; {hint}the words are {allowed}"
