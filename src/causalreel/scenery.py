"""The words of the walkable world's captions and keys: what stands where, how a prompt splits, what it leaves open.

A scene is six directions around the start, each with an object or with nothing, a floor and a sky. A caption names all
of it: "a red pillar ahead, a blue block right, nothing behind right, ..., sand floor, day sky". Pure Python.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from causalreel.foreign import shown
from causalreel.spelling import nearest

KEYS = ("w", "a", "s", "d", "left", "right")
"""Keys in the order of their numbers in the field `actions`: forward, to the left, back, to the right, turns."""

DIRECTIONS = ("ahead", "right", "behind right", "behind", "behind left", "left")
"""Every 60 degrees, clockwise, seen from the start."""
COLORS = ("red", "green", "blue", "yellow", "magenta", "cyan")
SHAPES = ("pillar", "block")
NOTHING = "nothing"
FLOORS = ("sand", "slate", "grass", "clay")
SKIES = ("day", "dusk", "night")

SLOTS = {
    "direction": DIRECTIONS,
    "color": COLORS,
    "shape": (*SHAPES, NOTHING),
    "floor": FLOORS,
    "sky": SKIES,
}
"""Kinds of words, for who lists them."""

Object = tuple[str, str]
"""Colour and shape."""

_FILLER = {"a", "an", "the", "on", "under", "and", "is", "stands", "there", "to", "of", "me", "in", "front"}


@dataclass(frozen=True)
class Scene:
    """What a prompt says: for each direction an object, None for nothing, or no entry where it is left open."""

    objects: dict[str, Object | None]
    floor: str | None = None
    sky: str | None = None

    @property
    def is_complete(self) -> bool:
        return len(self.objects) == len(DIRECTIONS) and self.floor is not None and self.sky is not None


def compose(scene: Scene) -> str:
    """The sentence that `parse` reads; what is open is left out."""
    parts = []
    for direction in DIRECTIONS:
        if direction in scene.objects:
            found = scene.objects[direction]
            parts.append(f"{NOTHING if found is None else f'a {found[0]} {found[1]}'} {direction}")
    parts += [f"{scene.floor} floor"] if scene.floor else []
    parts += [f"{scene.sky} sky"] if scene.sky else []
    return ", ".join(parts)


def parse(prompt: str) -> Scene:
    """A prompt's scene. ValueError that names the piece, and the nearest word, for what cannot be read.

    Pieces stand between commas: "red pillar ahead", "nothing left", "sand floor", "night sky".
    """
    objects: dict[str, Object | None] = {}
    grounds: dict[str, str] = {}
    for piece in re.split(r"[,.;]", prompt.lower()):
        words = [word for word in piece.split() if word not in _FILLER]
        if not words:
            continue
        if words[-1] in ("floor", "sky"):
            allowed = FLOORS if words[-1] == "floor" else SKIES
            _once(words[-1], grounds, prompt)
            grounds[words[-1]] = _one(words[:-1], allowed, piece)
            continue
        direction, rest = _direction(words, piece)
        _once(direction, objects, prompt)
        objects[direction] = _object(rest, piece)
    if not objects and not grounds:
        raise ValueError(f"the prompt describes nothing of the walkable world: {shown(prompt)!r}; {_EXAMPLE}")
    return Scene(objects, grounds.get("floor"), grounds.get("sky"))


def complete(scene: Scene, seed: int) -> Scene:
    """The scene with everything drawn that it leaves open, by the seed: colours differ where they can."""
    draw = random.Random(seed)
    objects = dict(scene.objects)
    taken = {found[0] for found in objects.values() if found}
    for direction in DIRECTIONS:
        color = draw.choice([color for color in COLORS if color not in taken] or list(COLORS))
        shape, is_there = draw.choice(SHAPES), draw.random() < 0.75
        if direction not in objects:
            objects[direction] = (color, shape) if is_there else None
            taken |= {color} if is_there else set()
    floor, sky = draw.choice(FLOORS), draw.choice(SKIES)
    return Scene(objects, scene.floor or floor, scene.sky or sky)


_EXAMPLE = "such as 'a red pillar ahead, nothing behind, sand floor, day sky'"


def _once(what: str, known: dict, prompt: str) -> None:
    if what in known:
        raise ValueError(f"the prompt says twice what is {what}: {shown(prompt)!r}")


def _direction(words: list[str], piece: str) -> tuple[str, list[str]]:
    """The direction in a piece, and its other words."""
    sides = [word for word in words if word in ("ahead", "right", "left", "behind", "back")]
    rest = [word for word in words if word not in sides]
    sides = ["behind" if word == "back" else word for word in sides]
    name = " ".join(sorted(sides, key=("behind", "ahead", "right", "left").index))
    if name not in DIRECTIONS:
        raise ValueError(
            f"cannot read {shown(piece.strip())!r}: expected a direction, {', '.join(DIRECTIONS)}{_near(words)}"
        )
    return name, rest


def _object(words: list[str], piece: str) -> Object | None:
    if words == [NOTHING]:
        return None
    if len(words) != 2 or words[0] not in COLORS or words[1] not in SHAPES:
        raise ValueError(
            f"cannot read {shown(piece.strip())!r}: expected the word {NOTHING}, or a colour ({', '.join(COLORS)}) and "
            f"a shape ({', '.join(SHAPES)}){_near([word for word in words if word not in (*COLORS, *SHAPES)])}"
        )
    return words[0], words[1]


def _one(words: list[str], allowed: tuple[str, ...], piece: str) -> str:
    if len(words) != 1 or words[0] not in allowed:
        raise ValueError(f"cannot read {shown(piece.strip())!r}: expected one of {', '.join(allowed)}{_near(words)}")
    return words[0]


def _near(words: list[str]) -> str:
    known = (*COLORS, *SHAPES, NOTHING, *FLOORS, *SKIES, "ahead", "behind", "left", "right", "floor", "sky")
    for word in words:
        if word not in known and (found := nearest(word, known)):
            return f"; did you mean {found!r}?"
    return ""
