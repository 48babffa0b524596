"""What a session hands out: chunks of pixels, where their time went, what took effect, where the camera is."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from causalreel.control.steering import Frame


@dataclass(frozen=True)
class Timings:
    """Where the time of a chunk went, in seconds; what was done beside other chunks counts whole."""

    denoise_s: float
    decode_s: float
    queue_s: float = 0.0
    """Waiting for the model, while it worked for other sessions."""
    encode_s: float = 0.0
    """Into stills or video, by whoever sends it."""


@dataclass(frozen=True)
class Applied:
    """A command that took effect."""

    number: int
    name: str
    arguments: dict[str, Any]
    latency_s: float
    """From the command to its first affected pixels being ready; time spent paused counts."""
    chunk: int = 0
    """Number of the chunk with which it took effect."""
    frame: int = 0
    """Number of that chunk's first pixel frame."""

    @property
    def receipt(self) -> dict[str, Any]:
        """That it took effect: its number, and the chunk and the pixel frame with which it did."""
        return {"number": self.number, "name": self.name, "chunk": self.chunk, "frame": self.frame}


@dataclass(frozen=True)
class Seen:
    """A camera as a map shows it, in the axes of the video's first one: x to the right, y down, z forward."""

    x: float
    y: float
    z: float
    yaw: float
    """Degrees to the right."""
    pitch: float
    """Degrees up."""

    @staticmethod
    def of(frame: Frame) -> Seen:
        """The camera of a latent frame."""
        pose = frame.c2w
        yaw = math.degrees(math.atan2(pose[0, 2], pose[2, 2]))
        pitch = math.degrees(math.asin(min(1.0, max(-1.0, -pose[1, 2]))))
        x, y, z = (round(float(number), 4) + 0.0 for number in pose[:3, 3])  # + 0.0: no negative zero is shown
        return Seen(x, y, z, round(yaw, 3) + 0.0, round(pitch, 3) + 0.0)


@dataclass(frozen=True)
class Emitted:
    """A chunk of pixels."""

    sequence: int
    """0, 1, 2 ..."""
    first_frame: int
    """Number of its first pixel frame in the session."""
    frames: Tensor
    """(t,H,W,3) uint8 on the CPU."""
    prompt: str
    """In force when it was made."""
    timings: Timings
    commands: tuple[Applied, ...] = ()
    """What took effect with it."""
    keys: tuple[str, ...] = ()
    """That count in it: held, or pressed for it and let go of before."""
    camera: tuple[Seen, ...] = ()
    """Where the camera is in its latent frames, for models with keys."""


def with_queue(emitted: Emitted, queue_s: float) -> Emitted:
    """The chunk with the time that it waited for the model."""
    return replace(emitted, timings=replace(emitted.timings, queue_s=queue_s))


def described(arguments: dict[str, Any]) -> dict[str, Any]:
    """A command's arguments as JSON takes them, without pixels."""
    return {k: f"{v.shape[1]} x {v.shape[0]} pixels" if isinstance(v, Tensor) else v for k, v in arguments.items()}
