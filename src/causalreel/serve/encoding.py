"""One viewer's encoder: each chunk of pixels into the payloads of its message."""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from causalreel.serve.frames import H264Encoder, StillFormat, stills
from causalreel.serve.wire import Format

QUALITY = 85
RATE = 30.0
"""Frames per second that H.264 is encoded for; it decides no more than how often a keyframe comes."""


class Encoder(Protocol):
    """Frames (t,H,W,3) uint8 -> payloads, and whether a decoder may begin with them."""

    codec: str

    def encode(self, frames: Tensor) -> tuple[list[bytes], bool]: ...


def encoder(form: Format, size: tuple[int, int], *, quality: int | None = None) -> Encoder:
    """An encoder for videos of `size` (height, width); quality 1..100, higher is better; ValueError."""
    quality = QUALITY if quality is None else quality
    return _H264(size, quality) if form == "h264" else _Stills(form, quality)


class _Stills:
    """A picture a frame: nothing depends on what was sent before."""

    def __init__(self, form: StillFormat, quality: int) -> None:
        self.codec, self.quality = form, quality
        self.form: StillFormat = form

    def encode(self, frames: Tensor) -> tuple[list[bytes], bool]:
        return stills(frames, self.form, quality=self.quality), True


class _H264:
    """An access unit a frame. Every viewer has an encoder of its own, so who comes back begins with a keyframe."""

    def __init__(self, size: tuple[int, int], quality: int) -> None:
        crf = round(40 - 0.3 * quality)  # 100 -> 10, 85 -> 14, 1 -> 40
        self.encoder = H264Encoder(*size, RATE, crf=crf)
        self.codec = _codec(size, crf)

    def encode(self, frames: Tensor) -> tuple[list[bytes], bool]:
        units = self.encoder.encode(frames)
        return [unit.data for unit in units], units[0].is_keyframe


@lru_cache
def _codec(size: tuple[int, int], crf: int) -> str:
    """WebCodecs' name of such a stream; a viewer needs it before the first frame, so a black one is encoded for it."""
    trial = H264Encoder(*size, RATE, crf=crf)
    trial.encode(torch.zeros(1, *size, 3, dtype=torch.uint8))
    assert trial.codec is not None
    return trial.codec
