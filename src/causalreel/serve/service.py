"""What the server does, apart from how it is asked: sessions opened and steered within limits. HTTP, WebSocket and
WebRTC are its callers; all of it may block and is called from threads."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from causalreel.control.strings import MOTIONS
from causalreel.foreign import shown
from causalreel.infer.commands import describe, parse
from causalreel.infer.live import hints, understand
from causalreel.nn.camera import W2C
from causalreel.serve.counters import Counters
from causalreel.serve.given import film_of, pictures_in, restyle_of
from causalreel.serve.guard import SMALL
from causalreel.serve.handle import Handle
from causalreel.serve.records import parse_record
from causalreel.serve.safety import ApiError, Rates, Settings, decode_base64, decode_picture
from causalreel.serve.scheduler import Busy, Scheduler
from causalreel.serve.wire import SessionRequest, parse_message, plain

if TYPE_CHECKING:
    from torch import Tensor

    from causalreel.serve.jobs import Jobs

log = logging.getLogger(__name__)

Result = TypeVar("Result")
WORKERS = 4
PATIENCE = 100
"""Messages in a row that are told to be too many before the connection is closed."""
TOO_FAST = "too many messages; slow down"


class Service:
    """One scheduler and the limits around it."""

    def __init__(self, scheduler: Scheduler, settings: Settings) -> None:
        self.scheduler, self.settings = scheduler, settings
        self.counters = Counters(self.facts)
        self.rates = Rates(settings.requests_per_s, settings.burst)
        self.jobs: Jobs | None = None
        self.is_stopping = False
        """The server is going to end: nothing new is waited for."""
        self.viewers: dict[str, Any] = {}
        """Session -> the connection that is served its frames; a newer one takes over."""
        self.threads = ThreadPoolExecutor(max(2, os.cpu_count() or 2), thread_name_prefix="encode")
        """Threads that encode chunks; more than there are cores would only get in the way of each other."""
        self.workers = ThreadPoolExecutor(WORKERS, thread_name_prefix="work")
        """Threads that check requests and encode prompts."""
        self.cameras = ThreadPoolExecutor(scheduler.limits.sessions, thread_name_prefix="camera")
        """Threads that decode frames as they come, one for each session that can be: none waits for another's."""

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
        self.counters.refused.labels(code).inc()

    def open(self, request: SessionRequest) -> Handle:
        """Open a session; ApiError 400 for what the model cannot do, 503 when there is no room."""
        try:
            self.scheduler.admit()  # before anything is checked for nothing
            pipeline, most = self.scheduler.pipeline, self.settings
            restyle = restyle_of(request, pipeline)
            film = film_of(request, pipeline, frames=most.video_frames, pixels=most.image_pixels)
            handle = self.scheduler.open(request, pace=request.pace, id=self.new_id(), restyle=restyle, film=film)
        except Busy as error:
            raise ApiError(503, "busy", str(error), {"retry-after": "5"}) from error
        except ValueError as error:
            raise ApiError(400, "invalid_request", str(error)) from error
        log.info("session %s opened%s", handle.id, self.said(request.prompt))
        return handle

    def open_replay(self, body: bytes) -> tuple[Handle, list[str]]:
        """Open a session that plays a record again -> it, and why its frames may differ; errors as for `open`."""
        try:
            record, pipeline = parse_record(body), self.scheduler.pipeline
            try:
                understand(pipeline.export, record.prompts)
                handle = self.scheduler.open(record, id=self.new_id())
            except ValueError as error:
                if record.model == pipeline.export.name:
                    raise
                told = f"the record was made with {shown(record.model, 80)}, this server shows {pipeline.export.name}"
                raise ValueError(f"{told}: {error}") from error
        except Busy as error:
            raise ApiError(503, "busy", str(error), {"retry-after": "5"}) from error
        except ValueError as error:
            raise ApiError(400, "invalid_request", str(error)) from error
        log.info("session %s opened from a record", handle.id)
        return handle, record.differences(pipeline)

    def model(self) -> dict[str, Any]:
        """The model and what its prompts may say."""
        pipeline = self.scheduler.pipeline
        height, width = pipeline.size
        return {
            "name": pipeline.export.name,
            "width": width,
            "height": height,
            "fps": pipeline.export.fps,
            "takes_picture": pipeline.sampling.chunk == 1,
            "loras": {} if pipeline.loras is None else dict(pipeline.loras.strengths),
            **hints(pipeline.export),
            "fields": sorted(pipeline.fields),
            "control": self.control(),
            "commands": describe(),
        }

    def control(self) -> dict[str, Any] | None:
        """The keys of the model, if it has some."""
        pipeline = self.scheduler.pipeline
        steering = pipeline.control
        if steering is None:
            return None
        return {
            "keys": [list(group) for group in steering.keys],
            "motions": {name: list(MOTIONS[name]) for name in steering.names},
            "step": steering.step,
            "degrees": steering.degrees,
            "latent_frames_per_s": pipeline.export.fps / pipeline.geometry.temporal,
            "has_camera": W2C in pipeline.fields,
        }

    def new_id(self) -> str:
        """An id that nobody guesses, with the replica's name before it if it has one."""
        name = self.settings.replica
        return secrets.token_hex(16) if name is None else f"{name}-{secrets.token_hex(16)}"

    def handle(self, session_id: str) -> Handle:
        """The session's handle; ApiError 404."""
        handle = self.scheduler.get(session_id)
        if handle is None:
            raise ApiError(404, "no_session", "there is no session of that id; it may have ended")
        return handle

    def command(self, handle: Handle, fields: dict[str, Any]) -> int:
        """Check a command and hand it over -> its number; ValueError."""
        command = parse(fields, picture=self.encoded_picture)
        number = handle.command(command)
        log.info("session %s: %s%s", handle.id, command.name, self.said(next(iter(command.prompts), None)))
        return number

    def feed(self, handle: Handle, message: bytes) -> None:
        """Frames that a client sends for its session; ValueError."""
        if not handle.decoding.acquire(blocking=False):
            raise ValueError("frames of this session are still being decoded; send a message of them after the other")
        try:
            handle.feed(pictures_in(message, self.scheduler.pipeline.size))
        finally:
            handle.decoding.release()

    def state(self, handle: Handle) -> dict[str, Any]:
        """The message that tells a session's state."""
        return {"type": "state", "state": plain(handle.session.state())}

    def encoded_picture(self, text: Any) -> Tensor:
        """Base64, or a data: URL of it -> (3,H,W) in [-1,1]; ValueError."""
        return self.picture(decode_base64(text))

    def picture(self, data: bytes) -> Tensor:
        return decode_picture(data, self.scheduler.pipeline.size, pixels=self.settings.image_pixels)

    def said(self, text: str | None) -> str:
        """What a log line may say of a prompt; one line of it, whatever it holds."""
        return f": {text!r}" if text and self.settings.log_prompts else ""

    def stop(self) -> None:
        """Take nothing new and end all sessions; a video that is being made is interrupted."""
        self.is_stopping = True
        if self.jobs is not None:
            self.jobs.stopping.set()
        self.scheduler.close()

    def close(self) -> None:
        for pool in (self.threads, self.workers, self.cameras):
            pool.shutdown(wait=False, cancel_futures=True)


class Talk:
    """What one connection says of one session. Every message costs a token of its client's rate, whatever it holds."""

    def __init__(self, service: Service, handle: Handle, client: str) -> None:
        self.service, self.handle, self.client = service, handle, client
        self.refused = 0
        """Messages in a row that came too fast."""

    @property
    def is_too_much(self) -> bool:
        """The client goes on though it was told to slow down: close."""
        return self.refused >= PATIENCE

    def threads(self, text: str | bytes) -> ThreadPoolExecutor:
        """Those that answer a message: frames take long and are many, and hold up no commands and no other session."""
        return self.service.cameras if self.is_frames(text) else self.service.workers

    def is_frames(self, text: str | bytes) -> bool:
        """Whether a message holds frames that the session is made of."""
        return isinstance(text, bytes) and self.handle.session.video.feed is not None

    def answer(self, text: str | bytes) -> list[dict[str, Any]]:
        """A client's message -> the messages that answer it; never raises for what a client can send."""
        said: Any = None
        try:
            wait = self.service.rates.take(self.client)
            self.refused = self.refused + 1 if wait > 0 else 0
            is_small = len(text) <= SMALL
            if not is_small and wait > 0:
                raise ValueError(TOO_FAST)
            if len(text) > self.service.settings.body_bytes:
                raise ValueError(
                    f"messages must have at most {self.service.settings.body_bytes} bytes, got {len(text)}"
                )
            if isinstance(text, bytes) and self.is_frames(text):
                if wait > 0:
                    raise ValueError(TOO_FAST)
                self.service.feed(self.handle, text)
                return []
            message = parse_message(text)
            said = message.pop("id", None)
            said = said if isinstance(said, (int, str)) and len(str(said)) <= 64 else None
            if wait > 0:
                raise ValueError(TOO_FAST)
            kind = message.pop("type")
            if kind == "ping" and is_small:
                return [{"type": "pong", "id": said}]
            if kind not in ("ping", "command"):
                raise ValueError("type must be command or ping")
            if not is_small and len(text) - len(str(message.get("image", ""))) > SMALL:
                raise ValueError(f"messages without a picture must have at most {SMALL} bytes")
            number = self.service.command(self.handle, message)
        except ValueError as error:
            return [{"type": "error", "id": said, "message": _ascii(error)}]
        return [{"type": "ack", "id": said, "number": number}, self.service.state(self.handle)]


def _ascii(error: Exception) -> str:
    return str(error).encode("ascii", "backslashreplace").decode("ascii")
