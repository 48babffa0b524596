"""A session as a video track: its chunks read in order, its frames given out when they are due."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from torch import Tensor

from causalreel.data.colour import BT601, BT709, to_yuv
from causalreel.serve.emitted import Emitted
from causalreel.serve.handle import Ended, Handle, Lost
from causalreel.serve.wire import applied, steered

try:
    from aiortc.mediastreams import MediaStreamError, MediaStreamTrack
except ImportError as error:
    raise ImportError("WebRTC needs aiortc; install it with: pip install 'causalreel[webrtc]'") from error

CLOCK = 90_000
"""Ticks of a video track's clock in a second (RFC 6184, RFC 7741)."""
LOOK_S = 1.0
"""A viewer of a session that makes nothing, such as a paused one, looks so often."""


class Pace:
    """When frames are due, for a clock that never runs behind: a late frame moves all later ones, none is dropped."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.start, self.due = now, 0.0, None

    def next(self, fps: float) -> tuple[float, int]:
        """Frames per second of the next frame -> seconds to wait for it, its time stamp in ticks of `CLOCK`."""
        now = self.now()
        if self.due is None:
            self.start = self.due = now
        else:
            self.due = max(self.due + 1 / fps, now)
        return self.due - now, round((self.due - self.start) * CLOCK)


class Reader:
    """The chunks of one session in order, one at a time: what is not asked for stays in the scheduler's buffer."""

    def __init__(self, handle: Handle, after: int | None) -> None:
        """after: the last chunk that the client has seen; None: go on where the last viewer was."""
        self.handle, self.after = handle, handle.taken if after is None else after
        self.lost: list[str] = []
        """What could not be shown, to be told."""
        self.is_open = True
        self._loop, self._news = asyncio.get_running_loop(), asyncio.Event()
        self._deaf = handle.listen(self._wake)

    async def next(self) -> Emitted | Ended | None:
        """The next chunk, how the session ended, or None after `close`."""
        while self.is_open:
            self._news.clear()
            try:
                item = self.handle.pull(self.after, 0)
            except Lost as error:  # a live picture does not wait for what is gone
                self.lost.append(str(error))
                self.after = self.handle.taken
                continue
            if isinstance(item, Emitted):
                self.after = item.sequence
            if item is not None:
                return item
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._news.wait(), LOOK_S)  # looking keeps a quiet session from being reaped
        return None

    def close(self) -> None:
        """Have `next` return None, a waiting one too."""
        self.is_open = False
        self._deaf()
        self._news.set()

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._news.set)


class SessionTrack(MediaStreamTrack):
    """Frames of a session at its frame rate, every one of them once; a session that is slower makes the track wait."""

    kind = "video"

    def __init__(
        self,
        reader: Reader,
        tell: Callable[[dict[str, Any]], None],
        began: Callable[[Emitted], None],
        shorter_side: int,
    ) -> None:
        """tell: sends the client a message; began: called when a chunk's first frame is given out."""
        super().__init__()
        self.reader, self.tell, self.began, self.shorter_side = reader, tell, began, shorter_side
        self.pace = Pace()
        self.frames: list[Any] = []  # arrays (H,W,3) of the chunk being shown, the next one last
        self.chunk: Emitted | None = None  # until its first frame is given out
        self.fps = 1.0
        self.matrix = BT709
        """Of the frames; see `matrix_of`."""
        self.is_over = asyncio.Event()

    async def recv(self) -> Any:
        """The next frame when it is due."""
        while not self.frames:
            await self._read()
        picture = self.frames.pop()
        wait, stamp = self.pace.next(self.fps)
        if wait > 0:
            await asyncio.sleep(wait)
        if self.readyState != "live":
            raise MediaStreamError
        if self.chunk is not None:
            self.tell(header(self.chunk, self.fps))
            self.began(self.chunk)
            self.chunk = None
        frame = to_yuv(picture, matrix=self.matrix)
        frame.pts, frame.time_base = stamp, Fraction(1, CLOCK)
        return frame

    async def _read(self) -> None:
        chunk = await self.reader.next() if self.readyState == "live" else None
        for message in self.reader.lost:
            self.tell({"type": "error", "id": None, "code": "lost", "message": message})
        self.reader.lost.clear()
        if isinstance(chunk, Ended):
            self.tell({"type": "ended", "reason": chunk.reason, "is_error": chunk.is_error})
        if not isinstance(chunk, Emitted):
            self.stop()
            raise MediaStreamError
        state = self.reader.handle.session.state()
        self.fps = float(state["fps"])
        self.frames = list(enlarged(chunk.frames, self.shorter_side).numpy()[::-1])
        self.chunk = chunk
        if chunk.commands:
            self.tell({"type": "state", "state": state})

    def stop(self) -> None:
        """End the track, and the reading with it."""
        self.reader.close()
        self.is_over.set()
        super().stop()


def matrix_of(sdp: str) -> int:
    """An answer -> the matrix that its client takes untagged video for, and aiortc's encoders write no tags.

    By the codec, which is H.264 wherever it is offered: browsers show that as BT.709 at every size, and VP8 as BT.601,
    which its format lays down (RFC 6386).
    """
    return BT709 if " H264/" in sdp else BT601


def enlarged(frames: Tensor, shorter_side: int) -> Tensor:
    """(t,H,W,3) -> the same with each pixel repeated until the shorter side has at least so many, if it has fewer."""
    factor = -(-shorter_side // min(frames.shape[1:3]))
    return frames.repeat_interleave(factor, 1).repeat_interleave(factor, 2) if factor > 1 else frames


def header(chunk: Emitted, fps: float) -> dict[str, Any]:
    """What the client is told of a chunk whose first frame is now sent."""
    return {
        "type": "chunk",
        "sequence": chunk.sequence,
        "first_frame": chunk.first_frame,
        "frames": len(chunk.frames),
        "fps": fps,
        "prompt": chunk.prompt,
        "timings": asdict(chunk.timings),
        "commands": [applied(command) for command in chunk.commands],
        **steered(chunk),
    }
