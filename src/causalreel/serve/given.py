"""What a session is made of beside noise: a video file that came with the request, or frames that a client goes on
sending, such as a camera's. Both are foreign bytes: bounded in number, size and time before they are pixels."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from causalreel.data.pictures import decode_picture, scanned_pixels
from causalreel.data.video_in import open_video
from causalreel.infer.restyle import Feed, GivenVideo, Restyle
from causalreel.infer.values import Picture
from causalreel.serve.safety import FORMATS, MIB, SCANNED, ApiError, decode_base64
from causalreel.serve.scheduler import Busy
from causalreel.serve.wire import SessionRequest

if TYPE_CHECKING:
    from causalreel.infer.pipeline import Pipeline

STRENGTH = 0.5
"""Where a request names none."""
FILM_BYTES = 256 * MIB
"""Of a video's frames, as large as the model's."""
FILM_S = 20.0
"""Seconds in which they must be decoded."""
MOST_FRAMES = 8
"""Of one message."""
FRAME_PIXELS = 2_100_000
"""Of one of them: 1080p."""
NAME = re.compile(r"<_io\.BytesIO object at \w+>:? ")
_filming = threading.Lock()


def restyle_of(request: SessionRequest, pipeline: Pipeline) -> Restyle | None:
    """What a request wants its session to be made of; None: of noise. A video is still without frames; see `film_of`.

    ValueError for what cannot be.
    """
    if request.video is None and not request.camera:
        if request.strength is not None:
            raise ValueError("strength is for a given video or a camera; there is none")
        return None
    if request.video is not None and request.camera:
        raise ValueError("a session is made of a video or of a camera's frames, not of both")
    strength, size = STRENGTH if request.strength is None else request.strength, pipeline.size
    if request.video is not None:
        return Restyle(GivenVideo.of_pictures([], size), strength)
    chunk = pipeline.sampling.chunk if request.chunk is None else request.chunk
    return Restyle(GivenVideo.of_feed(Feed(pipeline.geometry.temporal * (chunk or 1)), size), strength)


def film_of(
    request: SessionRequest, pipeline: Pipeline, *, frames: int, pixels: int
) -> Callable[[int], GivenVideo] | None:
    """What decodes a request's video, if it has one: of at most so many bytes -> its frames; ValueError for what is
    none, Busy where memory is short, ApiError 503 while another one is decoded. frames, pixels: most of it, and of a
    frame."""
    if request.video is None:
        return None
    data = decode_base64(request.video, "video must be base64 of a video file")

    def decoded(room: int) -> GivenVideo:
        if not _filming.acquire(blocking=False):
            raise ApiError(503, "busy", "another video is being decoded", {"retry-after": "2"})
        try:
            found = film(data, pipeline, frames=frames, pixels=pixels, room=room)
        finally:
            _filming.release()
        return GivenVideo.of_pictures(found, pipeline.size)

    return decoded


def film(data: bytes, pipeline: Pipeline, *, frames: int, pixels: int, room: int = FILM_BYTES) -> list[np.ndarray]:
    """A video file -> its frames at the model's rate and of its size, (H,W,3) uint8 each; ValueError. room: bytes that
    they may take at present; Busy beyond."""
    (height, width), fps = pipeline.size, pipeline.export.fps
    most = min(frames, FILM_BYTES // (height * width * 3))
    found: list[np.ndarray] = []
    try:
        with open_video(io.BytesIO(data), fps=fps, size=(height, width), seconds=FILM_S) as reel:
            if reel.size[0] * reel.size[1] > pixels:
                raise ValueError(f"its frames must have at most {pixels} pixels, got {reel.size[1]}x{reel.size[0]}")
            for picture in reel.frames:
                if len(found) == most:
                    raise ValueError(
                        f"it has more than {most} frames at {fps:g} a second, the most that a session takes"
                    )
                if (len(found) + 1) * picture.nbytes > room:
                    raise Busy(
                        f"no memory for this session's video: its frames need more than the {room / MIB:.1f} MiB that "
                        "are free"
                    )
                found.append(picture)
    except ValueError as error:
        raise ValueError(f"video: {NAME.sub('', str(error))}") from None
    return found


def pictures_in(message: bytes, size: tuple[int, int]) -> list[np.ndarray]:
    """A binary message of a client, pictures one behind the other with 4 bytes of length before each (big endian) ->
    (H,W,3) uint8 each, cut to the size; ValueError."""
    parts, at = [], 0
    while at < len(message) or not parts:
        length = int.from_bytes(message[at : at + 4], "big")
        at += 4 + length
        if length == 0 or at > len(message) or len(parts) == MOST_FRAMES:
            raise ValueError(
                f"a message of frames holds 1 to {MOST_FRAMES} pictures, each behind 4 bytes of its length"
            )
        parts.append(message[at - length : at])
    how: dict[str, Any] = {"name": "frame", "formats": FORMATS, "pixels": FRAME_PIXELS}
    scanned = sum(scanned_pixels(part, **how) for part in parts)
    if scanned > SCANNED:
        raise ValueError(
            f"frames of a message must have at most {SCANNED} pixels together, a JPEG's counted once for each scan; "
            f"got {scanned}: send fewer, or no progressive ones"
        )
    return [Picture().read("frame", decode_picture(part, size, **how)[0]).numpy() for part in parts]
