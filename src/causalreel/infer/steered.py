"""A clip's course: keys, a trajectory string or poses from a file, as the fields that a model's network takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from causalreel.control.files import read_poses
from causalreel.control.poses import Array, check_unit, intrinsics_rows, relative
from causalreel.control.steering import Course, Frame, Steering
from causalreel.control.strings import MOST_LATENTS
from causalreel.foreign import shown

LONGEST = MOST_LATENTS
"""Latent frames that keys may be held for: no clip has more."""
PIECE = re.compile(r"([a-z]+(?:\+[a-z]+)*)(?:\*0*([1-9][0-9]*))?")
"""Keys that are held together, and for how long."""

Held = tuple[str, ...]


@dataclass(frozen=True)
class Steered:
    """How the camera of a clip goes; one of the three."""

    keys: str | None = None
    """Such as "w*5,left+w*3,none*2": keys, and for how many latent frames; see `read_held`."""
    trajectory: str | None = None
    """A string of another project, in its `dialect`."""
    dialect: str | None = None
    poses: Path | None = None
    """A file with a pose for each latent frame, in its `convention`."""
    convention: str | None = None
    """c2w or w2c."""
    intrinsics: str | None = None
    """fx fy cx cy, normalised by the image's size; None: those of the poses' file, or the model's."""

    def __post_init__(self) -> None:
        if sum(given is not None for given in (self.keys, self.trajectory, self.poses)) > 1:
            raise ValueError("--keys, --trajectory and --poses exclude each other")
        if (self.trajectory is None) != (self.dialect is None):
            raise ValueError("--trajectory and --dialect go together: the same string means other motions elsewhere")
        if (self.poses is None) != (self.convention is None):
            raise ValueError("--poses and --convention (c2w or w2c) go together: no file says which it holds")

    @property
    def is_given(self) -> bool:
        return self.keys is not None or self.trajectory is not None or self.poses is not None

    def fields(self, steering: Steering, latents: int | None) -> dict[str, Tensor]:
        """-> w2c (1,F,4,4), intrinsics (1,F,4), actions (1,F,A) of that many latent frames; None: as many as it gives.

        Without anything given the camera stays. ValueError for what cannot be read or is too short.
        """
        if self.intrinsics is not None:
            steering = replace(steering, intrinsics=read_intrinsics(self.intrinsics))
        course = Course(steering)
        if self.keys is not None:
            held = read_held(self.keys, steering)
            count = _enough(len(held), latents, "--keys")
            frames = course.next(1)
            for pressed in held[: count - 1]:
                course.press(pressed)
                frames += course.next(1)
        elif self.is_given:
            ahead, rows, what = self._ahead(steering)
            count = _enough(len(ahead), latents, what)
            first = course.next(1)
            course.follow(ahead)
            frames = first + course.next(count - 1)
            if rows is not None and self.intrinsics is None:
                told = (tuple(row) for row in rows.tolist())
                frames = [replace(frame, intrinsics=row) for frame, row in zip(frames, told, strict=False)]
        else:
            frames = course.next(latents or 1)
        return _tensors(frames)

    def _ahead(self, steering: Steering) -> tuple[list[Array], Array | None, str]:
        """Poses behind the first frame, seen from it, and intrinsics of all frames if there are any of their own."""
        if self.trajectory is not None:
            assert self.dialect is not None
            return steering.ahead(self.trajectory, self.dialect, np.eye(4)), None, "--trajectory"
        assert self.poses is not None and self.convention is not None
        track = read_poses(self.poses, convention=self.convention)
        return list(relative(track.c2w)[1:]), track.intrinsics, "--poses"


def read_held(text: str, steering: Steering) -> list[Held]:
    """Keys and for how many latent frames, such as "w*5,left+w*3,none*2" -> those held in each frame behind the first.

    Pieces stand behind a comma or spaces; + holds keys together, and spaces around + and * mean nothing. ValueError
    naming the piece that cannot be read, or the nearest key.
    """
    frames: list[Held] = []
    plain = re.sub(" ?([*+]) ?", r"\1", " ".join(text.lower().split()))
    for piece in re.split(" ?, ?| ", plain):
        match = PIECE.fullmatch(piece)
        if match is None:
            told = f"cannot read {shown(piece)!r}" if text.strip() else "got nothing"
            raise ValueError(f"keys: {told}; expected pieces such as w*5, left+w*3 or none*2, by commas or spaces")
        names = tuple(match[1].split("+"))
        pressed = () if names == ("none",) else names
        steering.check(pressed)
        count = int((match[2] or "1")[:9])
        if len(frames) + count > LONGEST:
            raise ValueError(f"keys: lead through more than {LONGEST:,} latent frames, the most of a clip")
        frames += [pressed] * count
    return frames


def read_intrinsics(text: str) -> tuple[float, float, float, float]:
    """Four numbers by commas or spaces, fx fy cx cy normalised by the image's size; ValueError for others."""
    try:
        rows = intrinsics_rows([float(number) for number in text.replace(",", " ").split()], "--intrinsics")
    except ValueError:
        told = "expected fx,fy,cx,cy, four finite numbers normalised by the image's size, fx and fy above 0"
        raise ValueError(f"--intrinsics: {told}; got {shown(text)!r}") from None
    check_unit(rows, is_normalised=True, what="--intrinsics")
    fx, fy, cx, cy = rows[0].tolist()
    return fx, fy, cx, cy


def _enough(given: int, latents: int | None, what: str) -> int:
    """Latent frames of the clip, the first counted; ValueError where fewer are given."""
    if latents is not None and given < latents - 1:
        raise ValueError(
            f"{what}: leads through {given} latent frames behind the first, the video has {latents - 1}: give as many, "
            f"or ask for {1 + given} with --latent-frames"
        )
    if latents is None and given > LONGEST:
        raise ValueError(
            f"{what}: leads through {given:,} latent frames behind the first, at most {LONGEST:,} can be made"
        )
    return 1 + given if latents is None else latents


def _tensors(frames: Sequence[Frame]) -> dict[str, Tensor]:
    rows = {
        "w2c": [frame.w2c.tolist() for frame in frames],
        "intrinsics": [list(frame.intrinsics) for frame in frames],
        "actions": [frame.actions for frame in frames],
    }
    return {name: torch.tensor(value, dtype=torch.float32)[None] for name, value in rows.items()}
