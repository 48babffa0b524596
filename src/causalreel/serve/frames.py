"""Chunks of pixels (t,H,W,3) uint8 as bytes: single pictures, H.264 access units for a live decoder, video files.

Needs Pillow for pictures and PyAV for video; both come with the package.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal

import av
import numpy as np
from av.video.frame import PictureType
from PIL import Image
from torch import Tensor

from causalreel.data.colour import tag, to_yuv
from causalreel.data.video import encode, write_video

StillFormat = Literal["jpeg", "webp"]
LIVE = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}
"""Settings of x264 for a pipe."""


def stills(frames: Tensor, format: StillFormat = "jpeg", *, quality: int = 85) -> list[bytes]:
    """(t,H,W,3) uint8 -> one picture file for each frame; quality 1..100."""
    if format not in ("jpeg", "webp"):
        raise ValueError(f"format must be jpeg or webp, got {format!r}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1 to 100, got {quality}")
    how: dict[str, Any] = {"subsampling": 0} if format == "jpeg" else {"method": 0}
    return [_still(picture, format, quality, how) for picture in _arrays(frames)]


def _still(picture: np.ndarray, format: str, quality: int, how: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format, quality=quality, **how)
    return file.getvalue()


@dataclass(frozen=True)
class Unit:
    """One encoded frame."""

    data: bytes
    """Annex B; a keyframe carries its parameter sets."""
    is_keyframe: bool


class H264Encoder:
    """One H.264 stream without delay: every frame comes back at once, for WebCodecs and the like.

    height and width must be even. crf: 0..51, lower is better. A keyframe comes every `keyframe_s` seconds, at the
    start and when it is asked for.
    """

    def __init__(self, height: int, width: int, fps: float, *, crf: int = 20, keyframe_s: float = 4.0) -> None:
        if height % 2 or width % 2:
            raise ValueError(f"H.264 needs even height and width, got {height} x {width}")
        if not fps > 0 or not 0 <= crf <= 51:
            raise ValueError(f"fps must be positive and crf 0 to 51; got {fps} and {crf}")
        rate = Fraction(fps).limit_denominator(1001)
        context: Any = av.CodecContext.create("libx264", "w")
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        tag(context)
        context.framerate, context.time_base = rate, 1 / rate
        context.options = {
            "preset": "veryfast",
            "tune": "zerolatency",
            "profile": "baseline",
            "crf": str(crf),
            "forced-idr": "1",
            "g": str(max(1, round(fps * keyframe_s))),
            "x264-params": "repeat-headers=1:scenecut=0:sliced-threads=0:threads=1",
        }
        self._context, self._count, self._size = context, 0, (height, width)
        self.codec: str | None = None
        """WebCodecs' name of the stream, such as avc1.42c00a; known after the first frame."""

    def encode(self, frames: Tensor, *, keyframe: bool = False) -> list[Unit]:
        """(t,H,W,3) uint8 -> one unit a frame; keyframe: the first of them can be decoded without those before it."""
        units = []
        for picture in _arrays(frames):
            if picture.shape[:2] != self._size:
                raise ValueError(f"frames must be {self._size} pixels, got {picture.shape[:2]}")
            frame = to_yuv(picture)
            frame.pts = self._count
            if keyframe or self._count == 0:
                frame.pict_type = PictureType.I
            keyframe = False
            self._count += 1
            packets = self._context.encode(frame)
            units.append(Unit(b"".join(bytes(p) for p in packets), any(p.is_keyframe for p in packets)))
        if self.codec is None and units:
            self.codec = codec_string(units[0].data)
        return units


def codec_string(data: bytes) -> str:
    """Annex B bytes with a sequence parameter set -> RFC 6381 name: avc1. and profile, constraints, level in hex."""
    start = data.find(b"\x00\x00\x01")
    while start >= 0:
        unit = data[start + 3 : start + 7]
        if len(unit) == 4 and unit[0] & 0x1F == 7:
            return f"avc1.{unit[1:].hex()}"
        start = data.find(b"\x00\x00\x01", start + 3)
    raise ValueError("data holds no sequence parameter set")


def write_mp4(path: str | Path, chunks: Iterable[Tensor], fps: float, *, scale: int = 1) -> int:
    """Chunks (t,H,W,3) uint8 -> a file that appears when it is complete; -> frames. As `data.video.write_video`."""
    return write_video(path, (frames.permute(0, 3, 1, 2) for frames in chunks), fps, scale=scale)


def pipe(file: BinaryIO, chunks: Iterable[Tensor], fps: float, format: Literal["rgb24", "y4m", "mp4"]) -> int:
    """Chunks (t,H,W,3) uint8 -> a pipe, each as soon as it is there; -> frames.

    rgb24: bare bytes; y4m: YUV 4:4:4 with a header that says size and rate, but cannot say that its matrix is BT.709;
    mp4: fragments, one a frame.
    """
    if format == "mp4":
        pictures = (picture for frames in chunks for picture in frames)
        fragments = {"movflags": "frag_every_frame+empty_moov+default_base_moof"}
        return encode(_Written(file), pictures, fps, "mp4", options=LIVE, container_options=fragments)
    if format not in ("rgb24", "y4m"):
        raise ValueError(f"format must be rgb24, y4m or mp4, got {format!r}")
    count = 0
    for picture in _each(chunks):
        if format == "y4m":
            if count == 0:
                rate = Fraction(fps).limit_denominator(1001)
                height, width = picture.shape[:2]
                head = f"YUV4MPEG2 W{width} H{height} F{rate.numerator}:{rate.denominator} Ip A1:1 C444"
                file.write(f"{head} XCOLORRANGE=LIMITED\n".encode())
            file.write(b"FRAME\n" + np.ascontiguousarray(to_yuv(picture, "yuv444p").to_ndarray()).tobytes())
        else:
            file.write(picture.tobytes())
        file.flush()
        count += 1
    return count


class _Written:
    """A pipe as PyAV wants it: written to, never sought."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data: bytes) -> int:
        self.file.write(data)
        self.file.flush()
        return len(data)


def _each(chunks: Iterable[Tensor]) -> Iterator[np.ndarray]:
    for frames in chunks:
        yield from _arrays(frames)


def _arrays(frames: Tensor) -> list[np.ndarray]:
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames must be (t,H,W,3) uint8, got {tuple(frames.shape)}")
    return list(frames.contiguous().numpy())
