"""Videos from files: upright, in their own colours, with frames picked by their time stamps and fitted as they are
decoded, so that memory holds what is wanted and not what the file holds.

Files are foreign bytes: only demuxers of single files are allowed (no playlists, which fetch others), frames of more
than `PIXELS` and files of more than `RATE` frames in a second are refused, and no more is decoded than is wanted.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from causalreel.data.colour import to_rgb
from causalreel.data.pictures import ASPECT, Fit, fit_image

log = logging.getLogger(__name__)

PIXELS = 8192 * 4320
"""Most pixels of a frame."""
RATE = 1000
"""Most frames of a file in a second that is wanted."""
LATE = 0.05
"""Part of a frame's time by which a frame may come late and still be shown: time stamps are rounded, often to ms."""
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,live_flv,ogg,gif,apng,h264,hevc,av1,obu,ivf,"
    "m4v,mjpeg,mjpeg_2000,asf,yuv4mpegpipe,nut,mxf,rm,dv,vc1,webp_pipe,swf,wtv,film_cpk,bink,smjpeg"
)


@dataclass(frozen=True)
class _Shown:
    """A decoded frame and when it is shown, in seconds from the first one."""

    frame: Any
    time: float
    duration: float


def read_video(
    path: str | os.PathLike[str],
    *,
    frames: int | None = None,
    fps: float | None = None,
    size: tuple[int, int] | None = None,
    how: Fit = "crop",
) -> tuple[Tensor, float]:
    """File -> video (T,3,H,W) float32 in [-1,1], at most the first `frames` frames; and its frames per second.

    fps: frames at this rate, each the one that a player shows at that time; None: all frames as they are.
    size: (height, width) that each is fitted to; None: as large as they are, of square pixels. Raises ValueError or
    FileNotFoundError.
    """
    with _opened(path) as (container, stream):
        rate = float(stream.average_rate or stream.base_rate or 0) if fps is None else fps
        shown = _frames(path, container, stream)
        if fps is not None:
            shown = _at_rate(path, shown, fps)
        pictures = list(_pictures(itertools.islice(shown, frames), stream, size, how))
    if not pictures:
        raise ValueError(f"{path} holds no frames that can be decoded")
    if any(picture.shape != pictures[0].shape for picture in pictures):
        raise ValueError(f"{path}: its frames change their size")
    video = torch.from_numpy(np.stack(pictures))  # (T,H,W,3)
    return video.permute(0, 3, 1, 2).float().div_(127.5).sub_(1), rate


@dataclass(frozen=True)
class Reel:
    """A video being decoded: its frames at a rate and of a size, as they are asked for."""

    size: tuple[int, int]
    """Height and width of the file's first frame, upright and of square pixels."""
    frames: Iterator[np.ndarray]
    """(H,W,3) uint8; a frame that is shown for longer comes again."""


@contextlib.contextmanager
def open_video(
    path: str | os.PathLike[str] | BinaryIO,
    *,
    fps: float,
    size: tuple[int, int],
    how: Fit = "crop",
    start: float = 0.0,
    end: float | None = None,
    seconds: float | None = None,
) -> Iterator[Reel]:
    """The frames of a file between `start` and `end` (seconds) at a rate, each fitted to `size` (height, width).

    Only frames that are asked for are decoded. What is before `start` is decoded and not looked at. seconds: of the
    clock, after which no more of the file is decoded, shown or not: a ValueError. Raises as `read_video`, also while
    the frames are iterated.
    """
    with _opened(path) as (container, stream):
        shown = _between(_frames(path, container, stream, seconds), start, end)
        first = next(shown, None)
        if first is None:
            until = "" if end is None else f" and before {end:g} s"
            raise ValueError(f"{path} holds no frames that can be decoded from {start:g} s on{until}")
        height, width = first.frame.height, round(first.frame.width * _aspect(stream))
        upright = (width, height) if _turns(first.frame)[0] else (height, width)
        timed = _at_rate(path, itertools.chain([first], shown), fps)
        yield Reel(upright, _pictures(timed, stream, size, how))


def count_frames(path: str | os.PathLike[str], *, fps: float, most: int | None = None) -> int:
    """How many frames a file has at a rate, at most `most`; they are decoded and not looked at. Raises as there."""
    with _opened(path) as (container, stream):
        count = sum(1 for _ in itertools.islice(_at_rate(path, _frames(path, container, stream), fps), most))
    if count == 0:
        raise ValueError(f"{path} holds no frames that can be decoded")
    return count


def _between(shown: Iterator[_Shown], start: float, end: float | None) -> Iterator[_Shown]:
    """The frames shown from `start` on and before `end`, their times counted from `start`."""
    for each in shown:
        if end is not None and each.time >= end:
            return
        if each.time + each.duration > start + 1e-6:
            yield _Shown(each.frame, max(0.0, each.time - start), each.duration) if start else each


def _pictures(shown: Iterable[_Shown], stream: Any, size: tuple[int, int] | None, how: Fit) -> Iterator[np.ndarray]:
    """Decoded frames -> (H,W,3) uint8 each; one that comes again is converted once."""
    last = turns = picture = None
    for each in shown:
        turns = _turns(each.frame) if turns is None else turns
        picture = picture if each is last else _picture(each.frame, stream, turns, size, how)
        last = each
        assert picture is not None
        yield picture


def _aspect(stream: Any) -> float:
    """Width of a pixel by its height."""
    aspect = float(stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1)
    return aspect if 1 / 16 <= aspect <= 16 else 1.0


def _metadata() -> dict[str, Any]:
    """What `av.open` is told of metadata that are not UTF-8. PyAV 19 and later escape them and take no such word."""
    import av

    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


@contextlib.contextmanager
def _opened(path: str | os.PathLike[str] | BinaryIO) -> Iterator[tuple[Any, Any]]:
    """The container of a file, a named pipe or what is open, and its video stream; checked by its head."""
    import av
    from av.error import FFmpegError
    from av.stream import Disposition

    if isinstance(path, str | os.PathLike) and not (Path(path).is_file() or Path(path).is_fifo()):
        raise FileNotFoundError(f"no video file at {path}")
    options = {"format_whitelist": DEMUXERS, "protocol_whitelist": "file"}
    with contextlib.ExitStack() as stack:  # an open file has no name that FFmpeg could take for a protocol
        file = stack.enter_context(open(path, "rb")) if isinstance(path, str | os.PathLike) else path
        try:
            container = av.open(file, options=options, **_metadata())
        except (FFmpegError, OSError, ValueError, MemoryError) as error:
            raise ValueError(f"{path} cannot be read as a video: {_said(error)}") from error
        with container:
            covers = Disposition.attached_pic  # of music
            stream = next((each for each in container.streams.video if not each.disposition & covers), None)
            if stream is None:
                kinds = sorted({each.type for each in container.streams})
                raise ValueError(f"{path} holds no video stream, {'only ' + ', '.join(kinds) if kinds else 'nothing'}")
            if stream.codec_context is None:
                raise ValueError(f"{path}: its kind of video cannot be decoded here")
            width, height = stream.codec_context.width, stream.codec_context.height
            if width * height > PIXELS:
                raise ValueError(f"{path}: frames must have at most {PIXELS} pixels, got {width}x{height}")
            if max(width, height) > ASPECT * max(1, min(width, height)):
                raise ValueError(f"{path}: frames must be at most {ASPECT} times as long as wide, got {width}x{height}")
            stream.codec_context.thread_count = 4  # not one for each core: threads hold frames
            stream.codec_context.options = {"max_pixels": str(PIXELS)}
            yield container, stream


def _frames(path: Any, container: Any, stream: Any, allowed: float | None = None) -> Iterator[_Shown]:
    """Frames as they are decoded, their times counted from the first and never falling. What is damaged is left out,
    and said at the end."""
    from av.error import FFmpegError

    until = None if allowed is None else monotonic() + allowed
    step = 1 / float(stream.average_rate or stream.base_rate or 25)
    first, last, damaged = 0.0, None, 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (FFmpegError, OSError, IndexError, MemoryError):  # an index of a stream that is not there
            damaged, packet = damaged + 1, None
        if packet is None:
            break
        if until is not None and monotonic() > until:
            raise ValueError(f"{path}: its frames cannot be decoded in {allowed:g} s")
        try:
            decoded = packet.decode()
        except (FFmpegError, OSError, MemoryError) as error:
            damaged += 1
            if last is None and damaged > 100:
                raise ValueError(f"{path} cannot be read as a video: {_said(error)}") from error
            continue
        for frame in decoded:
            if frame.is_corrupt and last is not None:
                damaged += 1
                continue
            if last is None:
                first = frame.time or 0.0
            time = last.time + step if frame.time is None and last is not None else (frame.time or first) - first
            if last is not None and time < last.time:  # the clock was set back: go on from here
                first, time = first + time - last.time - step, last.time + step
            seconds = float((frame.duration or 0) * (frame.time_base or 0)) or step
            last = _Shown(frame, time, seconds)
            yield last
    end = 0.0 if last is None else last.time + last.duration
    told = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    if last is not None and (damaged or end < 0.9 * told - 0.5):
        log.warning("%s is damaged or was cut off: %.2f s of %.2f s can be decoded", path, end, max(told, end))


def _at_rate(path: Any, shown: Iterator[_Shown], fps: float) -> Iterator[_Shown]:
    """What a player shows at 0, 1/fps, 2/fps ...: at each of these times the latest frame that is due."""
    held, count = None, 0
    for decoded, each in enumerate(shown, start=1):
        if decoded > RATE * (each.time + 1):
            raise ValueError(f"{path} holds more than {RATE} frames in a second")
        while held is not None and count + LATE < each.time * fps:
            yield held
            count += 1
        held = each
    while held is not None and (count == 0 or count + LATE < (held.time + held.duration) * fps):
        yield held
        count += 1


Turns = tuple[bool, bool, bool]
"""Whether rows and columns change places, and then whether the picture is mirrored from left to right, from top to
bottom."""


def _picture(frame: Any, stream: Any, turns: Turns, size: tuple[int, int] | None, how: Fit) -> np.ndarray:
    """-> (H,W,3) uint8, upright, of square pixels, fitted."""
    from PIL import Image

    aspect = _aspect(stream)
    is_turned, across, down = turns
    pixels = to_rgb(frame)
    if is_turned:
        pixels, aspect = pixels.swapaxes(0, 1), 1 / aspect
    picture = Image.fromarray(np.ascontiguousarray(pixels[:: -1 if down else 1, :: -1 if across else 1]))
    if size is not None:
        return np.array(fit_image(picture, size, how, aspect=aspect))
    if aspect == 1:
        return np.array(picture)
    return np.array(picture.resize((max(1, round(picture.width * aspect)), picture.height), Image.Resampling.BILINEAR))


def _turns(frame: Any) -> Turns:
    """By the file's display matrix, to whole quarters. Asked of the first frame only: PyAV ties a frame that is asked
    into a cycle, which is freed late."""
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return False, False, False
    across_x, down_x, _, across_y, down_y = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if abs(down_x) > abs(across_x):
        return True, across_y < 0, down_x < 0
    return False, across_x < 0, down_y < 0


def _said(error: BaseException) -> str:
    return getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
