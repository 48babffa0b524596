"""One session's frames to one WebSocket: what is sent waits for what is read, so a slow viewer holds nothing but his
own session. A viewer that comes back says what he saw last; a second viewer of a session takes the first one's place.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from causalreel.serve.emitted import Emitted
from causalreel.serve.encoding import encoder
from causalreel.serve.handle import Ended, Handle, Lost
from causalreel.serve.safety import SUBPROTOCOL, ApiError, client_of
from causalreel.serve.service import Service, Talk
from causalreel.serve.wire import Format, dumps, pack

log = logging.getLogger(__name__)

LOOK_S = 1.0
"""A viewer of a session that makes nothing, such as a paused one, looks so often."""
SEND_S = 60.0
"""A viewer that takes no byte for so long is cut off; he may come back."""
REPLACED, SLOW, LOST, TOO_MUCH = 4001, 4002, 4003, 1008
"""Close codes: another viewer took over; the viewer did not read; what he asks for is no longer kept; he goes on
sending though he was told that it is too much."""
CLEAN = (1000, 1001)


@dataclass(frozen=True)
class Wish:
    """How a viewer wants the stream: the query of its address."""

    form: Format = "jpeg"
    after: int = -1
    """The last sequence number that was seen; -1: none."""
    quality: int | None = None


class Viewer:
    """A viewer's connection while it lasts. ValueError for a wish that cannot be met."""

    def __init__(self, socket: WebSocket, service: Service, handle: Handle, wish: Wish) -> None:
        self.socket, self.service, self.handle, self.wish = socket, service, handle, wish
        self.encoder = encoder(wish.form, service.scheduler.pipeline.size, quality=wish.quality)
        self.sending = asyncio.Lock()
        self.replaced, self.news = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Serve until the session ends, the viewer leaves, or another takes over; ApiError before it is accepted."""
        viewers, key = self.service.viewers, self.handle.id
        before = viewers.get(key)
        if before is None and len(viewers) >= self.service.settings.streams:
            raise ApiError(503, "busy", f"all {self.service.settings.streams} streams are taken")
        viewers[key] = self
        if before is not None:
            before.replaced.set()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server ends
                loop.call_soon_threadsafe(self.news.set)

        deaf = self.handle.listen(wake)
        try:
            offered = self.socket.scope.get("subprotocols", [])
            await self.socket.accept(SUBPROTOCOL if SUBPROTOCOL in offered else None)
            await self.tell(self.hello())
            await self.serve()
        except (
            WebSocketDisconnect,
            OSError,
            RuntimeError,
            asyncio.TimeoutError,
        ) as error:
            if getattr(error, "code", None) not in CLEAN:
                self.service.counters.dropped.inc()
        finally:
            deaf()
            if viewers.get(key) is self:
                del viewers[key]

    async def serve(self) -> None:
        """Listen, play and stand ready to give way, until the first of them is over."""
        tasks = [asyncio.create_task(part) for part in (self.listen(), self.play(), self.give_way())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.add_done_callback(_looked_at)
                task.cancel()
            await asyncio.wait(tasks)
        code, reason = next(iter(done)).result()
        if code == SLOW:
            self.service.counters.dropped.inc()
        await asyncio.wait_for(self.socket.close(code, reason), LOOK_S)

    async def listen(self) -> tuple[int, str]:
        """Take messages until the viewer leaves, which raises, or does not heed the rate."""
        talk = Talk(self.service, self.handle, client_of(self.socket.scope))
        while not talk.is_too_much:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                raise WebSocketDisconnect(message.get("code", 1006))
            said = message.get("text")
            said = message.get("bytes", b"") if said is None else said
            for answer in await asyncio.get_running_loop().run_in_executor(talk.threads(said), talk.answer, said):
                await self.tell(answer)
        return TOO_MUCH, "too many messages"

    async def play(self) -> tuple[int, str]:
        """Send chunk after chunk until there are no more -> how to close."""
        loop, after = asyncio.get_running_loop(), self.wish.after
        while True:
            try:
                pulled = await self.pull(after)
            except (Lost, ValueError) as error:
                return await self.cannot_resume(error)
            if isinstance(pulled, Ended):
                await self.tell({"type": "ended", "reason": pulled.reason, "is_error": pulled.is_error})
                return 1000, "ended"
            message = await loop.run_in_executor(self.service.threads, self.coded, pulled)
            start = time.monotonic()
            try:
                await asyncio.wait_for(self.send(message), SEND_S)
            except asyncio.TimeoutError:
                return SLOW, "not read"
            self.service.counters.sent.observe(time.monotonic() - start)
            self.service.counters.bytes.inc(len(message))
            self.service.counters.given(pulled, "stream")
            after = pulled.sequence
            if pulled.commands:
                await self.tell(self.service.state(self.handle))

    async def pull(self, after: int) -> Emitted | Ended:
        """The chunk behind `after` as soon as it is there, without a thread that waits for it."""
        while True:
            self.news.clear()
            pulled = self.handle.pull(after, 0)
            if pulled is not None:
                return pulled
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.news.wait(), LOOK_S)  # looking keeps a quiet session from being reaped

    async def cannot_resume(self, error: Exception) -> tuple[int, str]:
        """Say so, and after what the viewer may go on."""
        self.service.counters.lost.inc()
        after = max(self.handle.session.state()["sequence"] - 1, -1)
        await self.tell({"type": "error", "id": None, "code": "lost", "message": str(error), "after": after})
        return LOST, "lost"

    async def give_way(self) -> tuple[int, str]:
        await self.replaced.wait()
        return REPLACED, "another viewer took over"

    def coded(self, emitted: Emitted) -> bytes:
        """A chunk -> its message; in a thread."""
        start = time.monotonic()
        payloads, keyframe = self.encoder.encode(emitted.frames)
        took = time.monotonic() - start
        fps = float(self.handle.session.state()["fps"])
        return pack(emitted, payloads, form=self.wish.form, fps=fps, keyframe=keyframe, encode_s=took)

    def hello(self) -> dict[str, Any]:
        height, width = self.service.scheduler.pipeline.size
        state = self.service.state(self.handle)["state"]
        return {"type": "hello", "state": state, "width": width, "height": height, "codec": self.encoder.codec}

    async def tell(self, message: dict[str, Any]) -> None:
        async with self.sending:
            await self.socket.send_text(dumps(message))

    async def send(self, message: bytes) -> None:
        async with self.sending:
            await self.socket.send_bytes(message)


def _looked_at(task: asyncio.Task[Any]) -> None:
    """Its error has been seen: the first one's decided, the others were told to stop."""
    if not task.cancelled():
        task.exception()
