"""Clips cut from a video: of one length, rate and size, without what a model should not learn from.

What is left out is told with its reason, and why a clip was taken can be measured again from these few numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from causalreel.data.pictures import Fit
from causalreel.data.video_in import open_video

EVERY = 4
"""Rows and columns of which one is looked at when a clip is measured."""


@dataclass(frozen=True)
class Cutting:
    """How clips are cut, and which are left out."""

    frames: int
    """Pixel frames of a clip."""
    fps: float
    """Frames in a second: those of a video are picked by their times."""
    height: int
    """Pixels."""
    width: int
    """Pixels."""
    fit: Fit = "crop"
    """What does not have the shape: its longer side cropped, or black bars added."""
    stride: int | None = None
    """Frames from one clip's start to the next one's; None: clips follow each other."""
    most: int | None = None
    """Clips of one video, the first ones; None: all."""
    upscale: bool = False
    """Also videos that are smaller than a clip."""
    motion: float = 0.5
    """Least mean difference of frames that follow each other, of 255: below it a clip is static."""
    brightness: float = 8.0
    """Least mean brightness of a clip, of 255: below it it is black."""
    scenes: bool = False
    """No clip goes over a cut between scenes, which PySceneDetect finds."""

    def __post_init__(self) -> None:
        allowed = {"frames": 1, "stride": 1, "most": 1, "height": 1, "width": 1, "motion": 0, "brightness": 0}
        for name, least in allowed.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 < self.fps <= 1000:
            raise ValueError(f"fps must be above 0 and at most 1000, got {self.fps}")


@dataclass(frozen=True)
class Clip:
    """Frames (T,H,W,3) uint8 from `start` (seconds in the file) on."""

    start: float
    frames: np.ndarray


@dataclass(frozen=True)
class LeftOut:
    """A part of a video that no clip was made of, from `start` (seconds) on, and why."""

    start: float
    reason: str


def cut(path: Path, how: Cutting, *, start: float = 0.0, end: float | None = None) -> Iterator[Clip | LeftOut]:
    """The clips of a video, and what is left out of it, in the order of time. ValueError if it cannot be decoded.

    A clip begins where the last one ended (or `stride` frames behind its start), or right behind a cut between scenes;
    frames that are too few for one are left out.
    """
    with open_video(path, fps=how.fps, size=(how.height, how.width), how=how.fit, start=start, end=end) as reel:
        if small := _too_small(reel.size, how):
            yield LeftOut(start, small)
            return
        is_cut = _detector(how.fps) if how.scenes else _never
        held: list[np.ndarray] = []
        begin = taken = 0  # frame of the video that `held` begins with; clips that were taken
        for number, frame in enumerate(reel.frames):
            if is_cut(frame) and held:
                yield LeftOut(start + begin / how.fps, f"a cut after {len(held)} frames")
                held, begin = [], number
            if number < begin:
                continue
            held.append(frame)
            if len(held) == how.frames:
                clip = np.stack(held)
                reason = _reason(clip, how)
                at = start + begin / how.fps
                yield LeftOut(at, reason) if reason else Clip(at, clip)
                taken += not reason
                if taken == how.most:
                    return
                begin += how.stride or how.frames
                held = held[how.stride or how.frames :]
        if not taken and not begin:
            yield LeftOut(start, f"too short: {len(held)} frames at {how.fps:g} a second, a clip has {how.frames}")


def _too_small(size: tuple[int, int], how: Cutting) -> str:
    """Why a video would have to be enlarged; nothing if it need not be."""
    sides = [size[0] / how.height, size[1] / how.width]
    if how.upscale or (min(sides) if how.fit == "crop" else max(sides)) >= 1:
        return ""
    return f"too small: {size[1]}x{size[0]}, a clip has {how.width}x{how.height}"


def _reason(clip: np.ndarray, how: Cutting) -> str:
    """Why a clip is not taken; nothing if it is."""
    seen = clip[:, ::EVERY, ::EVERY].astype(np.float32)
    brightness = float(seen.mean())
    if brightness < how.brightness:
        return f"black: brightness {brightness:.2f} of 255, at least {how.brightness:g}"
    motion = float(np.abs(np.diff(seen, axis=0)).mean()) if len(seen) > 1 else np.inf
    if motion < how.motion:
        return f"static: motion {motion:.3f} of 255, at least {how.motion:g}"
    return ""


class _IsCut(Protocol):
    def __call__(self, frame: np.ndarray) -> bool: ...


def _never(frame: np.ndarray) -> bool:
    return False


def _detector(fps: float) -> _IsCut:
    """Whether a frame is the first of another scene, asked frame after frame."""
    try:
        from scenedetect import ContentDetector, FrameTimecode
    except ImportError as error:
        raise ImportError("finding cuts needs PySceneDetect: pip install 'causalreel[data]'") from error
    detector: Any = ContentDetector(min_scene_len=0)
    numbers = iter(range(1 << 40))

    def is_cut(frame: np.ndarray) -> bool:
        return bool(
            detector.process_frame(FrameTimecode(next(numbers), float(fps)), np.ascontiguousarray(frame[..., ::-1]))
        )

    return is_cut
