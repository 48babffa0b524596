"""Trajectory strings: held keys and how long, in the grammars and with the motions of several projects.

`w*19` (minWM), `w-3, right-1` (HY-WorldPlay), `w-10,iw-15,none-10` (LingBot-World, SANA-WM), `WWWWLLLL` (one letter a
pixel frame). A dialect is data: its grammar, the frames it counts, its steps and its rule of motion.
Live keys go through the same `Walk`, so that a recorded session gives the same poses again.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from causalreel.control.poses import Array, inverted, look_up, resampled, turn_right
from causalreel.foreign import shown
from causalreel.spelling import nearest

FRAMES = 4
"""Pixel frames of a latent frame, after the first."""

LONGEST = 1_000_000
"""Frames that a string may name."""
MOST_LATENTS = 10_000
"""Latent frames that it may lead through where nobody says how many there are: 40 minutes of Wan2.1's video."""

Motion = tuple[float, float, float, float, float]
"""Forward, to the right, down; turn to the right, look up: each in steps."""

MOVES: Mapping[str, Motion] = {
    "w": (1, 0, 0, 0, 0),
    "s": (-1, 0, 0, 0, 0),
    "d": (0, 1, 0, 0, 0),
    "a": (0, -1, 0, 0, 0),
    "dn": (0, 0, 1, 0, 0),
    "u": (0, 0, -1, 0, 0),
    "l": (0, 0, 0, 1, 0),
    "j": (0, 0, 0, -1, 0),
    "i": (0, 0, 0, 0, 1),
    "k": (0, 0, 0, 0, -1),
}
_WASD_IJKL = {key: MOVES[key] for key in "wsadjlik"}
_WORDS = {
    **{key: MOVES[key] for key in "wsad"},
    "right": MOVES["l"],
    "left": MOVES["j"],
    "up": MOVES["i"],
    "down": MOVES["k"],
}
MOTIONS: Mapping[str, Motion] = {**MOVES, **_WORDS}
"""Of all keys, by letters and by words."""
_LETTERS = {**_WASD_IJKL, "i": MOVES["k"], "k": MOVES["i"]}  # its i looks down
_STRAFING_JL = {**_WASD_IJKL, "a": MOVES["j"], "d": MOVES["l"], "j": MOVES["a"], "l": MOVES["d"]}


@dataclass(frozen=True)
class Dialect:
    """What a string means."""

    grammar: Literal["key*n", "word-n", "keys-n", "letters"]
    """key*n and word-n: one key at a time; keys-n: several, or none; letters: one letter a frame."""
    unit: Literal["latent", "pixel"]
    """Frames that are counted."""
    step: float
    """Length of a step, in a frame that is counted."""
    degrees: float
    """Angle of a turn, in a frame that is counted."""
    keys: Mapping[str, Motion] = field(default_factory=lambda: _WASD_IJKL)
    """Key -> its motion."""
    walks: bool = False
    """Moves in the horizontal plane and turns about the world's vertical; otherwise both by the camera's own axes."""
    pitch_limit: float | None = None
    """Largest pitch in degrees."""
    clamps: bool = False
    """A look that would pass the limit ends at it; otherwise it is left out."""
    inertia: tuple[float, float] | None = None
    """Time constants in seconds towards a speed and towards rest, after the last key was pressed, with which all speeds
    jump; None: they always do."""
    fps: float = 16.0
    """Frames a second, for the inertia."""
    halves_turn: bool = False
    """Half of a turn or look before the step and half behind it; otherwise all of it before."""


DIALECTS: Mapping[str, Dialect] = {
    "minwm": Dialect("key*n", "latent", 0.08, 3.0, MOVES),
    "worldplay": Dialect("word-n", "latent", 0.08, 3.0, _WORDS),
    "lingbot": Dialect("keys-n", "pixel", 0.05, 2.0, walks=True, pitch_limit=85),
    "sana": Dialect("keys-n", "pixel", 0.05, 1.2, walks=True, pitch_limit=85),
    "sana-2": Dialect(
        "keys-n", "pixel", 0.025, 0.6, _STRAFING_JL, walks=True, pitch_limit=60, clamps=True, inertia=(0.45, 1.0)
    ),
    "letters": Dialect("letters", "pixel", 0.02, 0.75, _LETTERS),
}
"""By name: minWM, HY-WorldPlay, LingBot-World, SANA-WM by its first and by its later rule, one letter a pixel frame."""


def dialect(name: str) -> Dialect:
    """The dialect of that name; ValueError that names the nearest and all there are."""
    if name not in DIALECTS:
        raise ValueError(f"dialect: unknown {shown(name)!r}{_hint(name, DIALECTS)}; there are {', '.join(DIALECTS)}")
    return DIALECTS[name]


# ---- grammar ---------------------------------------------------------------------------------------------------------


def held(text: str, rule: Dialect) -> list[frozenset[str]]:
    """The keys that are held in each frame that the dialect counts. ValueError naming the piece that cannot be read."""
    if rule.grammar == "letters":
        return [_letter(letter, place, rule) for place, letter in enumerate(text)]
    frames: list[frozenset[str]] = []
    for keys, count in _pieces(text, rule):
        if len(frames) + count > LONGEST:
            raise ValueError(f"trajectory: more than {LONGEST:,} frames")
        frames += [keys] * count
    if rule.grammar == "keys-n" and not frames:
        raise ValueError("trajectory: got an empty one, expected keys and frames such as w-10,none-5")
    return frames


def _pieces(text: str, rule: Dialect) -> Iterable[tuple[frozenset[str], int]]:
    if rule.grammar == "keys-n":
        text = re.sub(r"\s", "", text.lower().replace("，", ","))  # noqa: RUF001
    if rule.grammar == "word-n" and not text.strip():
        return  # no motion: the first pose alone
    for piece in text.split(","):
        yield _piece(piece if rule.grammar == "keys-n" else piece.strip(), rule)


_NUMBER = {"key*n": r"\d{1,9}", "word-n": r"\d{1,9}(?:\.\d{1,9})?", "keys-n": r"0*[1-9]\d{0,8}"}
_EXAMPLE = {"key*n": "w*3", "word-n": "w-3", "keys-n": "w-3 or iw-15"}


def _piece(piece: str, rule: Dialect) -> tuple[frozenset[str], int]:
    sign = re.escape("*" if rule.grammar == "key*n" else "-")
    match = re.fullmatch(rf"([A-Za-z]+){sign}({_NUMBER[rule.grammar]})", piece, re.ASCII)
    if match is None:
        raise ValueError(f"trajectory: cannot read {shown(piece)!r}; expected pieces such as {_EXAMPLE[rule.grammar]}")
    word, count = match[1], int(float(match[2]))
    names = [word] if rule.grammar != "keys-n" else [] if word == "none" else list(word)
    for name in names:
        if name not in rule.keys:
            raise ValueError(_unknown(name, rule))
    return frozenset(names), count


def _letter(letter: str, place: int, rule: Dialect) -> frozenset[str]:
    if letter not in {key.upper() for key in rule.keys}:
        raise ValueError(f"trajectory: letter {place + 1} is {shown(letter)!r}; there are {_listed(rule).upper()}")
    return frozenset([letter.lower()])


def _listed(rule: Dialect) -> str:
    return ", ".join(rule.keys)


def _unknown(name: str, rule: Dialect) -> str:
    also = " and none" if rule.grammar == "keys-n" else ""
    return f"trajectory: unknown key {shown(name)!r}{_hint(name, rule.keys)}; there are {_listed(rule)}{also}"


def _hint(word: str, known: Iterable[str]) -> str:
    found = nearest(word, known)
    return f", did you mean {found!r}?" if found else ""


# ---- motion ----------------------------------------------------------------------------------------------------------


class Walk:
    """A camera that moves frame by frame by the keys held; it starts at the identity. The only integrator of keys."""

    def __init__(self, rule: Dialect) -> None:
        self.rule = rule
        self.pose = np.eye(4)  # c2w
        self._pitch = 0.0  # radians
        self._speed = np.zeros(5)
        self._held: frozenset[str] = frozenset()

    def step(self, keys: Iterable[str]) -> Array:
        """Move for one frame with these keys held -> c2w (4,4). ValueError for a key that the dialect does not have."""
        pressed = frozenset(keys)
        for key in sorted(pressed):
            if key not in self.rule.keys:
                raise ValueError(_unknown(key, self.rule))
        forward, right, down, turn, look = self._velocity(pressed)
        length, angle = self.rule.step, math.radians(self.rule.degrees)
        move, how = np.array([right, down, forward]) * length, self._walk if self.rule.walks else self._fly
        if self.rule.halves_turn:
            how(move, turn * angle / 2, look * angle / 2)
            how(np.zeros(3), turn * angle / 2, look * angle / 2)
        else:
            how(move, turn * angle, look * angle)
        return self.pose.copy()

    def place(self, pose: Array) -> None:
        """Go on from here: c2w (4,4)."""
        self.pose = np.array(pose, dtype=np.float64)
        self._pitch = float(np.arcsin(np.clip(-self.pose[1, 2], -1, 1)))

    def _velocity(self, pressed: frozenset[str]) -> Array:
        wanted = np.sum([self.rule.keys[key] for key in sorted(pressed)] or [(0.0,) * 5], axis=0)
        if self.rule.inertia is None:
            return wanted
        is_pressed, self._held = bool(pressed - self._held), pressed
        seconds = np.where(wanted != 0, *self.rule.inertia)
        share = 1 - np.exp(-1 / (self.rule.fps * seconds))
        self._speed = wanted if is_pressed else self._speed + share * (wanted - self._speed)
        return self._speed

    def _fly(self, move: Array, turn: float, look: float) -> None:
        """By the camera's own axes."""
        self.pose[:3, :3] = self.pose[:3, :3] @ turn_right(turn) @ look_up(look)
        self.pose[:3, 3] += self.pose[:3, :3] @ move

    def _walk(self, move: Array, turn: float, look: float) -> None:
        """Upright: turns about the vertical, looks up to the limit, moves in the plane."""
        pitch = self._pitch + look
        if self.rule.pitch_limit is not None and abs(pitch) > (limit := math.radians(self.rule.pitch_limit)) + 1e-12:
            pitch = math.copysign(limit, pitch) if self.rule.clamps else self._pitch
        rotation = turn_right(turn) @ self.pose[:3, :3] @ look_up(pitch - self._pitch)
        self._pitch, self.pose[:3, :3] = pitch, rotation
        for axis, size in ((2, move[2]), (0, move[0])):
            level = rotation[:, axis] * (1, 0, 1)
            self.pose[:3, 3] += size * level / (np.linalg.norm(level) + 1e-6)


def poses(frames: Sequence[Iterable[str]], rule: Dialect) -> Array:
    """Keys held in each frame -> c2w (1 + frames, 4, 4), the first the identity."""
    walk = Walk(rule)
    return np.stack([np.eye(4), *(walk.step(keys) for keys in frames)])


def steady(rule: Dialect) -> Dialect:
    """The dialect without inertia."""
    return replace(rule, inertia=None)


# ---- latents ---------------------------------------------------------------------------------------------------------

Spacing = Literal["every", "even"]


def latent_times(count: int, spacing: Spacing = "every") -> Array:
    """Pixel frame of each latent frame, for `count` poses of pixel frames.

    every: the first and each 4th after it; as many as the poses reach. even: LingBot-World's, whose 4n+2 poses are
    shared among n+1 latents at equal distances, so that latents drift up to a frame behind the keys.
    """
    if spacing == "every":
        return np.arange(0, count, FRAMES, dtype=np.float64)
    latents = (count - 2) // FRAMES + 1
    return np.linspace(0, count - 1, latents) if latents > 1 else np.zeros(1)


def padded(frames: Sequence[frozenset[str]]) -> list[frozenset[str]]:
    """Frames with none held appended, up to 4n + 1 of them."""
    return [*frames, *[frozenset[str]()] * (-(len(frames) - 1) % FRAMES)]


def latent_poses(
    text: str, name: str, *, spacing: Spacing | None = None, latents: int | None = None, most: int = MOST_LATENTS
) -> Array:
    """A trajectory string -> c2w (latent frames, 4, 4), the first the identity.

    spacing: how pixel frames become latents (see `latent_times`); None: even for LingBot-World, as its code does, every
    4th for the others. latents: as many are needed; a string that is too short is a ValueError that says how many steps
    there must be, a longer one is cut. Where that is None, one that leads through more than `most` is a ValueError. No
    pose is computed that is not returned.
    """
    rule = dialect(name)
    told = held(text, rule)
    spacing = spacing or ("even" if name == "lingbot" else "every")
    frames = padded(told) if rule.unit == "pixel" and spacing == "even" else told
    at = np.arange(1.0 + len(frames)) if rule.unit == "latent" else latent_times(1 + len(frames), spacing)
    if latents is None and len(at) > most:
        raise ValueError(f"trajectory: leads through {len(at):,} latent frames, at most {most:,} can be used")
    if latents is not None and len(at) < latents:
        needed = latents - 1 if rule.unit == "latent" else FRAMES * (latents - 1)
        raise ValueError(
            f"trajectory: gives {len(at)} poses for {latents} latent frames; "
            f"its numbers must add up to {needed} or more {rule.unit} frames, got {len(told)}"
        )
    at = at[:latents]
    made = poses(frames[: math.ceil(at[-1])], rule)
    return made if rule.unit == "latent" else resampled(made, at)


def view_matrices(c2w: Array) -> Array:
    """c2w (N,4,4) -> w2c, what networks take."""
    return inverted(c2w)
