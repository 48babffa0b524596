"""Keys that are held while a video plays, to camera poses and action numbers as a model was trained with them.

What an export says of its keys is a `Steering`; a `Course` is one camera that moves by them, frame by frame, and by
nothing else, so that the same keys give the same poses again. It counts latent frames: the keys of a frame lead from
the pose before it to its own, and the first frame is the identity.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from causalreel.control.poses import Array, inverted
from causalreel.control.strings import FRAMES, MOST_LATENTS, MOTIONS, Dialect, Walk, dialect, held, padded, poses
from causalreel.foreign import shown
from causalreel.spelling import nearest

FIRST, NONE = "first", "none "
"""Columns of the actions beside keys: 1 in a video's first frame; `none w`: 1 where no key of w's group counts."""


@dataclass(frozen=True)
class Steering:
    """The keys of a model, what each does to the camera, and how the network is told."""

    keys: tuple[tuple[str, ...], ...] = (("w", "s", "a", "d"), ("left", "right"))
    """Keys by group: of those of one group that are held, the one pressed last counts."""
    step: float = 0.08
    """Length of a step in a latent frame, in the units of the poses that the network reads."""
    degrees: float = 3.0
    """Angle of a turn or a look in a latent frame."""
    walks: bool = False
    """Moves in the horizontal plane and turns about the world's vertical; otherwise both by the camera's own axes."""
    halves_turn: bool = False
    """Half of a turn before the step and half behind it, so that opposite keys undo each other exactly."""
    pitch_limit: float | None = None
    """Largest pitch in degrees, for a camera that walks."""
    intrinsics: tuple[float, float, float, float] = (0.5, 0.5, 0.5, 0.5)
    """fx, fy, cx, cy, normalised by the image's size."""
    actions: tuple[str, ...] = ()
    """Columns of the network's actions: a key: 1 where it counts; `none KEY`: 1 where none of that key's group does;
    `first`: 1 in the first frame of a video. In the first frame no key counts."""

    def __post_init__(self) -> None:
        names = self.names
        unknown = [name for name in names if name not in MOTIONS]
        if not names or unknown or len(set(names)) != len(names):
            raise ValueError(f"keys must be some of {', '.join(MOTIONS)}, each once; got {shown(str(self.keys))}")
        if not 0 < self.step < 1e6 or not 0 < self.degrees < 180:
            raise ValueError(f"step must be positive and degrees below 180, got {self.step} and {self.degrees}")
        if not all(0 < focal < 4 for focal in self.intrinsics[:2]):
            raise ValueError(f"intrinsics must be normalised by the image's size, got {self.intrinsics}")
        known = {*names, FIRST, *(NONE + name for name in names)}
        if wrong := [column for column in self.actions if column not in known]:
            raise ValueError(f"actions: {shown(wrong[0])!r} is neither a key, nor `none KEY`, nor `first`")

    @property
    def names(self) -> tuple[str, ...]:
        """All keys in order."""
        return tuple(name for group in self.keys for name in group)

    @property
    def rule(self) -> Dialect:
        """How they move a camera."""
        return Dialect(
            "keys-n",
            "latent",
            self.step,
            self.degrees,
            {name: MOTIONS[name] for name in self.names},
            walks=self.walks,
            pitch_limit=self.pitch_limit,
            halves_turn=self.halves_turn,
        )

    def check(self, pressed: Iterable[str]) -> None:
        """ValueError for a key that there is not, which names the nearest."""
        for key in pressed:
            if key not in self.names:
                meant = nearest(key, self.names)
                hint = f", did you mean {meant!r}?" if meant else ""
                raise ValueError(f"keys: unknown {shown(key)!r}{hint}; there are {', '.join(self.names)}")

    def counting(self, pressed: Sequence[str]) -> tuple[str, ...]:
        """Of the keys that are held, in the order in which they were pressed, those that count: one a group."""
        found = []
        for group in self.keys:
            ours = [key for key in pressed if key in group]
            found += ours[-1:]
        return tuple(found)

    def row(self, counting: Iterable[str], *, is_first: bool = False) -> list[float]:
        """The network's actions for a frame."""
        keys = frozenset(counting)
        row = []
        for column in self.actions:
            if column == FIRST:
                row.append(float(is_first))
            elif column.startswith(NONE):
                group = next(group for group in self.keys if column.removeprefix(NONE) in group)
                row.append(float(keys.isdisjoint(group)))
            else:
                row.append(float(column in keys))
        return row

    def keys_of(self, before: Array, after: Array) -> tuple[str, ...]:
        """The keys, one a group, that come nearest to the motion between two poses c2w (4,4): half a step or more."""
        moved = np.linalg.inv(before) @ after
        turn = math.degrees(math.atan2(moved[0, 2], moved[2, 2])) / self.degrees
        look = math.degrees(math.asin(float(np.clip(-moved[1, 2], -1, 1)))) / self.degrees
        motion = np.array([moved[2, 3] / self.step, moved[0, 3] / self.step, moved[1, 3] / self.step, turn, look])
        found = []
        for group in self.keys:
            share, key = max((float(np.dot(MOTIONS[key], motion)), key) for key in group)
            found += [key] if share >= 0.5 else []
        return tuple(found)

    def ahead(self, text: str, name: str, start: Array) -> list[Array]:
        """Poses (4,4) of the latent frames behind `start` that a trajectory string in a dialect leads through: at most
        `MOST_LATENTS`."""
        rule = dialect(name)
        frames = held(text, rule)
        latents = len(frames) // (1 if rule.unit == "latent" else FRAMES)
        if latents > MOST_LATENTS:
            raise ValueError(
                f"trajectory: leads through {latents:,} latent frames, at most {MOST_LATENTS:,} can be used"
            )
        made = poses(frames if rule.unit == "latent" else padded(frames), rule)
        made = made[1:] if rule.unit == "latent" else made[4::4]
        return [start @ pose for pose in made]


@dataclass(frozen=True)
class Frame:
    """What the network is told of a latent frame."""

    c2w: Array
    """(4,4), the video's first frame the identity."""
    intrinsics: tuple[float, ...]
    actions: list[float]
    keys: tuple[str, ...]
    """That counted."""

    @property
    def w2c(self) -> Array:
        return inverted(self.c2w[None])[0]


class Course:
    """One camera that is steered: by the keys held, or by poses that were given for the frames to come."""

    def __init__(self, steering: Steering) -> None:
        self.steering = steering
        self.pressed: tuple[str, ...] = ()
        """Held now, in the order in which they were pressed."""
        self.told: tuple[str, ...] = ()
        """Held in the latest frames, or pressed for them and let go of before, in the order in which they went down."""
        self._down: tuple[str, ...] = ()
        """Those that went down since a frame was made by keys, held or not."""
        self._held_before: tuple[str, ...] = ()
        """Held when the latest frames were made."""
        self._carried: tuple[str, ...] = ()
        """That went down before a video's first frame, in which no key counts."""
        self.begin()

    def begin(self) -> None:
        """A video begins: the camera is at the identity; keys that are held stay so."""
        self._walk = Walk(self.steering.rule)
        self._ahead: deque[Array] = deque()
        self._intrinsics: tuple[float, ...] = self.steering.intrinsics
        self._is_first = True

    @property
    def pose(self) -> Array:
        """c2w (4,4) of the last frame."""
        return self._walk.pose

    @property
    def tapped(self) -> tuple[str, ...]:
        """What `press` has to be told beside `pressed`, so that a course with the same frames behind it does the same
        from now on: keys that went down and are not held any more, and those before them."""
        held = _newly(self.pressed, self._held_before)  # these it finds out by itself
        is_end = not held or self._down[-len(held) :] == held
        return self._down[: len(self._down) - len(held)] if is_end else self._down

    def holds(self, pressed: Sequence[str], tapped: Sequence[str] = ()) -> bool:
        """Whether to press these changes nothing."""
        return not self._ahead and not tapped and self.pressed == tuple(dict.fromkeys(pressed))

    def press(self, pressed: Sequence[str], tapped: Sequence[str] = ()) -> None:
        """These keys are held from the next frame on; poses given for later frames are left out.

        A key that went down counts in the next frames even if it is let go of before they are made. tapped: keys that
        went down and up again since this was called last.
        """
        pressed = tuple(dict.fromkeys(pressed))
        new = [key for key in _newly(pressed, self.pressed) if key not in tapped]
        for key in (*tapped, *new):  # a key that goes down again is the latest
            self._down = (*(other for other in self._down if other != key), key)
        self.pressed = pressed
        self._ahead.clear()

    def follow(self, c2w: Iterable[Array], intrinsics: Sequence[float] | None = None) -> None:
        """The next frames have these poses (4,4); then the camera stays until a key is pressed. No key is held."""
        self.pressed, self._down = (), self._carried
        self._ahead = deque(c2w)
        if intrinsics is not None:
            self._intrinsics = tuple(float(number) for number in intrinsics)

    def next(self, frames: int) -> list[Frame]:
        """So many latent frames; what went down since the last ones counts in all of them."""
        held = (key for key in self.pressed if key not in self._down)
        self.told = () if self._ahead else (*held, *self._down)
        counts = frames > self._is_first  # no key does in a video's first frame
        made = [self._next() for _ in range(frames)]
        self._held_before = self.pressed
        self._down = self._carried = () if counts else self._down
        return made

    def _next(self) -> Frame:
        is_first, self._is_first = self._is_first, False
        keys: tuple[str, ...] = ()
        if self._ahead:
            before, after = self._walk.pose, self._ahead.popleft()
            keys = () if is_first else self.steering.keys_of(before, after)
            self._walk.place(after)
        elif not is_first:
            keys = self.steering.counting(self.told)
            self._walk.step(keys)
        row = self.steering.row(keys, is_first=is_first)
        return Frame(self._walk.pose.copy(), self._intrinsics, row, keys)


def _newly(pressed: tuple[str, ...], before: Sequence[str]) -> tuple[str, ...]:
    """Of the keys that are held, in the order in which they were pressed, those that went down since `before` were."""
    left = iter(before)
    held = next((count for count, key in enumerate(pressed) if key not in left), len(pressed))
    return pressed[held:]
