"""What the server does, apart from how it is asked: sessions opened and steered within limits. HTTP, WebSocket and
WebRTC are its callers; all of it may block and is called from threads."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from causalreel.serve.metrics import Metrics
from causalreel.serve.safety import ApiError, Rates, Settings, decode_base64, decode_picture, is_readable
from causalreel.serve.scheduler import Busy, Handle, Scheduler
from causalreel.serve.session import Options
from causalreel.serve.wire import SessionRequest, command_of, parse, plain

if TYPE_CHECKING:
    from torch import Tensor

    from causalreel.serve.jobs import Jobs

log = logging.getLogger(__name__)

Result = TypeVar("Result")
WORKERS = 4


class Service:
    """One scheduler and the limits around it."""

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self.scheduler, self.settings = scheduler, settings
        self.metrics = Metrics(self.facts)
        self.rates = Rates(settings.requests_per_s, settings.burst)
        self.jobs: Jobs | None = None
        self.viewers: dict[str, Any] = {}
        """Session -> the connection that is served its frames; a newer one takes over."""
        self.threads = ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="encode")
        """Threads that encode chunks; more than there are cores would only get in the way of each other."""

        self.workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="work")
        """Threads that check requests and encode prompts."""

    async def work(self, do: Callable[..., Result], *arguments: Any) -> Result:
        """Have a thread do what takes a while; few at a time, or the event loop would not get its turn."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, do, *arguments)

    def facts(self) -> dict[str, Any]:
        """Numbers of what is now: the scheduler's, viewers, jobs."""
        more: dict[str, Any] = {"viewers": len(self.viewers)}
        if self.jobs is not None:
            more["video_jobs"] = self.jobs.counts()
        return self.scheduler.facts() | more

    def refused(self, code: str) -> None:
        """Count a request that was answered with an error."""
        self.metrics.refused.labels(code).inc()

    def open(self, request: SessionRequest) -> Handle:
        """Open a session; ApiError 400 for what the model cannot do, 503 when there is no room."""
        try:
            image = None if request.image is None else self.picture(decode_base64(request.image))
            options = Options(
                prompt=self.prompt(request.prompt),
                seed=request.seed,
                steps=request.steps,
                chunk=request.chunk,
                fps=request.fps,
                image=image,
            )
            handle = self.scheduler.open(options, pace=request.pace)
        except Busy as error:
            raise ApiError(503, "busy", str(error), {"retry-after": "5"}) from error
        except ValueError as error:
            raise ApiError(400, "invalid_request", str(error)) from error
        log.info("session %s opened%s", handle.id, self.said(request.prompt))
        return handle

    def handle(self, session_id: str) -> Handle:
        """The session's handle; ApiError 404."""
        handle = self.scheduler.get(session_id)
        if handle is None:
            raise ApiError(404, "no_session", "there is no session of that id; it may have ended")
        return handle

    def command(self, handle: Handle, fields: dict[str, Any]) -> int:
        """Check a command and hand it over -> its number; ValueError."""
        name, arguments = command_of(fields)
        for key in ("text", "prompt"):
            if key in arguments:
                arguments[key] = self.prompt(arguments[key])
        if "image" in arguments:
            arguments["image"] = self.picture(decode_base64(arguments["image"]))
        number = handle.command(name, **arguments)
        log.info("session %s: %s%s", handle.id, name, self.said(arguments.get("text") or arguments.get("prompt")))
        return number

    def answer(self, handle: Handle, text: str | bytes, client: str) -> list[dict[str, Any]]:
        """A client's message -> the messages that answer it; never raises for what a client can send."""
        said: Any = None
        try:
            if len(text) > self.settings.body_bytes:
                raise ValueError(f"messages must have at most {self.settings.body_bytes} bytes, got {len(text)}")
            message = parse(text)
            said = message.pop("id", None)
            said = said if isinstance(said, (int, str)) and len(str(said)) <= 64 else None
            kind = message.pop("type")
            if kind == "ping":
                return [{"type": "pong", "id": said}]
            if kind != "command":
                raise ValueError("type must be command or ping")
            if self.rates.take(client) > 0:
                raise ValueError("too many commands; slow down")
            number = self.command(handle, message)
        except ValueError as error:
            return [{"type": "error", "id": said, "message": _ascii(error)}]
        return [{"type": "ack", "id": said, "number": number}, self.state(handle)]

    def state(self, handle: Handle) -> dict[str, Any]:
        """The message that tells a session's state."""
        return {"type": "state", "state": plain(handle.session.state())}

    def prompt(self, text: str) -> str:
        return is_readable(text, self.settings.prompt_chars)

    def picture(self, data: bytes) -> Tensor:
        return decode_picture(data, self.scheduler.pipeline.size, pixels=self.settings.image_pixels)

    def said(self, text: str | None) -> str:
        """What a log line may say of a prompt; one line of it, whatever it holds."""
        return f": {text!r}" if text and self.settings.log_prompts else ""

    def close(self) -> None:
        for pool in (self.threads, self.workers):
            pool.shutdown(wait=False, cancel_futures=True)


def _ascii(error: Exception) -> str:
    return str(error).encode("ascii", "backslashreplace").decode("ascii")
