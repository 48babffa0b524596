"""Many sessions on one model: one thread makes chunks, one at a time, for whoever needs the next one first.

Each session has a virtual deadline: when the playback of its last chunk will be over. The earliest deadline goes first,
so sessions share the model evenly by playing time when it cannot keep up. A session whose reader has not taken what is
made, or that is far enough ahead of its frame rate, is not run: nothing here grows without bound. A session that fails
ends with a message; the thread goes on.
"""

from __future__ import annotations

import gc
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from causalreel.infer.live import PolicyKind, first_prompt
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.restyle import GivenVideo, Restyle
from causalreel.serve.handle import Ended, Handle, Limits, Pace
from causalreel.serve.memory import free_bytes, held_bytes, process_bytes
from causalreel.serve.records import Record
from causalreel.serve.session import Options, Session

log = logging.getLogger(__name__)


class Busy(RuntimeError):
    """No room for another session; says why."""


class Scheduler:
    """Sessions on one pipeline, run by one thread between `start` and `close`.

    policy: "renew" or "slide" for all sessions; None: the model's. warm: prompt of a session whose first chunks are
    made and thrown away before all others, which compiles, records and measures what a session takes; empty: the
    model's first example; None: the first session does that.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        limits: Limits = Limits(),
        *,
        policy: PolicyKind | None = None,
        warm: str | None = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pipeline, self.limits, self.clock = pipeline, limits, clock
        self.policy: PolicyKind | None = policy
        self.is_ready = False
        """The model has been warmed up and the thread runs."""
        self.session_bytes = 0
        """Memory of one session as measured; 0 until then."""
        self.made = 0
        """Chunks made since the start."""
        self._warm = first_prompt(pipeline.export) if warm == "" else warm
        self._is_measured = False
        self._budget: int | None = None
        self._host_budget: int | None = None
        self._handles: dict[str, Handle] = {}
        self._condition = threading.Condition()
        self._is_closed = self._is_stale = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread; returns at once, `is_ready` says when it is warm."""
        if self._thread is not None:
            raise RuntimeError("the scheduler has been started before")
        self._budget, self._host_budget = free_bytes(self.pipeline.device), free_bytes(torch.device("cpu"))
        self._thread = threading.Thread(target=self._run, name="causalreel-scheduler", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End all sessions and the thread."""
        with self._condition:
            self._is_closed = True
            handles = list(self._handles.values())
            self._condition.notify_all()
        for handle in handles:
            handle.end(Ended("the server is shutting down"))
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self.is_ready = False

    def open(
        self,
        options: Options | Record,
        *,
        pace: Pace = "realtime",
        id: str | None = None,
        restyle: Restyle | None = None,
        film: Callable[[int], GivenVideo] | None = None,
    ) -> Handle:
        """A new session, or one that plays a record again; id: None makes one. restyle: a video that it is made of, and
        ends with; film: makes its frames, of at most so many bytes, once all else has been checked. Raises Busy where
        there is no room, ValueError for what the model cannot meet."""
        if pace not in ("realtime", "max"):
            raise ValueError(f"pace must be realtime or max, got {pace!r}")
        self.admit()
        if isinstance(options, Record):
            session = Session.of(self.pipeline, options, id=id, clock=self.clock)
        else:
            how: dict[str, Any] = {"policy": self.policy, "clock": self.clock, "restyle": restyle}
            session = Session(self.pipeline, options, id=id, **how)
        if film is not None:
            self.admit(session.given_bytes)
            session.video.give(film(self.room()))
        handle = Handle(session, pace, self.limits, self.clock, self.wake)
        with self._condition:
            self.admit(session.given_bytes)  # text may have taken long to encode, a video to be decoded
            self._handles[handle.id] = handle
        self.wake()
        return handle

    def get(self, id: str) -> Handle | None:
        """The session of this id, for a while after its end too; None if there is none."""
        return self._handles.get(id)

    def handles(self) -> list[Handle]:
        """All sessions, oldest first, those included that ended a short while ago."""
        with self._condition:
            return list(self._handles.values())

    def facts(self) -> dict[str, Any]:
        """Numbers for health checks and metrics; bytes, or None where the system does not say."""
        live = [handle for handle in self.handles() if handle.ended is None]
        now, device = self.clock(), self.pipeline.device
        return {
            "is_ready": self.is_ready,
            "sessions": len(live),
            "max_sessions": self.limits.sessions,
            "queue_depth": sum(handle.may_run(now) for handle in live),
            "buffered_chunks": sum(len(handle._kept) for handle in live),
            "chunks": self.made,
            "session_bytes": self.session_bytes,
            "budget_bytes": self._budget,
            "free_bytes": free_bytes(device),
            "process_bytes": process_bytes(),
            "device_bytes": torch.cuda.memory_reserved(device) if device.type == "cuda" else None,
        }

    def wake(self) -> None:
        """Have the thread look again at who may run."""
        with self._condition:
            self._is_stale = True
            self._condition.notify_all()

    # ---- admission ----

    def admit(self, given: int = 0) -> None:
        """Busy unless there is room for another session, with what it was given in host memory."""
        live = sum(handle.ended is None for handle in self._handles.copy().values())
        if self._is_closed:
            raise Busy("the server is shutting down")
        if live >= self.limits.sessions:
            count = self.limits.sessions
            raise Busy(f"all {count} sessions are taken" if count > 1 else "the only session is taken")
        if self._budget is None or self._host_budget is None:
            return
        free = int(self.limits.memory_share * self._budget) - live * self.session_bytes
        room = self.room()
        if self.session_bytes > free or given > room:
            needed, free = (given, room) if given > room else (self.session_bytes, free)
            raise Busy(f"no memory for another session: it needs {_mib(needed)} MiB, {_mib(free)} MiB are free")

    def room(self) -> int:
        """Bytes of host memory that is free for what another session is given, such as a video's frames."""
        if self._host_budget is None:
            return sys.maxsize
        handles = list(self._handles.copy().values())
        free = int(self.limits.memory_share * self._host_budget) - sum(one.session.given_bytes for one in handles)
        if self.pipeline.device.type == "cpu":  # where sessions themselves live too, this one included
            free -= (sum(one.ended is None for one in handles) + 1) * self.session_bytes
        return max(free, 0)

    def _measure(self, session: Session) -> None:
        """What the first session comes to hold, with the chunks that are kept for its reader."""
        if self._is_measured:
            return
        height, width = self.pipeline.size
        chunk = height * width * 3 * (session.video.sampling.chunk or 1) * self.pipeline.codec.geometry.temporal
        buffers = chunk * (self.limits.buffer_chunks + self.limits.resume_chunks)
        self.session_bytes = max(self.session_bytes, held_bytes(session, without=(self.pipeline,)) + buffers)
        self._is_measured = session.sequence > self._full_after(session)

    def _full_after(self, session: Session) -> int:
        """Chunks after which a session holds as much as it ever will."""
        return self.pipeline.export.frames // (session.video.sampling.chunk or 1) + 1

    # ---- the thread ----

    def _run(self) -> None:
        if self.pipeline.device.type == "cuda" and self.pipeline.device.index is not None:
            torch.cuda.set_device(self.pipeline.device)
        if self._warm is not None:
            self._warm_up(self._warm)
        self.is_ready = not self._is_closed
        while not self._is_closed:
            handle = self._next()
            if handle is not None:
                self._run_one(handle)
        for handle in self.handles():
            handle.session.close()

    def _warm_up(self, prompt: str) -> None:
        try:
            session = Session(self.pipeline, Options(prompt), policy=self.policy)
            while not (self._is_measured or self._is_closed):
                session.next_chunk()
                self._measure(session)
            session.command("prompt", text=prompt, mode="recompute")  # reads a full window again
            session.next_chunk()
            session.close()
            if self.pipeline.device.type == "cuda":  # the first call of each kind is recorded: not while people watch
                self._warm_up_early_prompts(prompt, session.video.policy.keep // (session.video.sampling.chunk or 1))
        except Exception:
            log.exception("the model could not be warmed up")
            _free_memory()

    def _warm_up_early_prompts(self, prompt: str, most: int) -> None:
        """A prompt that changes before `most` chunks are made reads fewer frames again: each number of them once."""
        for chunks in range(1, most):
            session = Session(self.pipeline, Options(prompt), policy=self.policy)
            for turn in range(chunks + 2):
                if self._is_closed:
                    return
                if turn == chunks:
                    session.command("prompt", text=prompt, mode="recompute")
                session.next_chunk()
            session.close()

    def _next(self) -> Handle | None:
        """Whose chunk comes next; waits a while if there is nothing to do."""
        self._reap()
        for handle in self.handles():
            self._take_commands(handle)
        now = self.clock()
        with self._condition:
            self._is_stale = False
            ready = [handle for handle in self._handles.values() if handle.may_run(now)]
            if ready:
                return min(ready, key=lambda handle: handle.due_s)
            later = [h.due_s - h.lead_s - now for h in self._handles.values() if h.ended is None and h.pace != "max"]
            wait = min((s for s in later if s > 0), default=1.0)
            self._condition.wait_for(lambda: self._is_stale or self._is_closed, min(wait, 1.0))
        return None

    def _run_one(self, handle: Handle) -> None:
        start, session = self.clock(), handle.session
        try:
            made = session.next_chunk(ahead=lambda: self._goes_on(handle))
            self._measure(session)
        except Exception as error:
            _fail(handle, error)
            return
        if made is not None:
            self.made += 1
            handle.add(made, start, self.clock())
        if session.closed:
            handle.end(Ended("closed by client" if session.has_input else "the given video is over"))

    def _goes_on(self, handle: Handle) -> bool:
        """Whether this session is the one to be run next, once the chunk in the making is there: then it may be begun
        already. Whoever is ahead of his reader or of playback, or shares the model, begins none early, since commands
        would come too late for it."""
        now = self.clock()
        if self._is_closed or handle.ended is not None or handle.waiting + 1 >= self.limits.buffer_chunks:
            return False
        if any(other is not handle and other.may_run(now) for other in self.handles()):
            return False
        return handle.pace == "max" or handle.is_behind(now)

    def _take_commands(self, handle: Handle) -> None:
        """Commands take effect though no chunk is due: also if nobody reads, or playback is far behind."""
        if handle.ended is not None or not handle.session.has_pending:
            return
        try:
            handle.session.take_commands()
        except Exception as error:
            _fail(handle, error)
            return
        handle.tell()
        if handle.session.closed:
            handle.end(Ended("closed by client"))

    def _reap(self) -> None:
        now, ended = self.clock(), []
        for handle in self.handles():
            is_idle = now - handle.seen_s > self.limits.idle_s
            if handle.ended is None and is_idle:
                handle.end(Ended(f"nobody read it for {self.limits.idle_s:g} s"))
            if handle.ended is not None:
                handle.session.close()
                ended.append((is_idle, handle))
        forgotten = [h for is_idle, h in ended if is_idle] + [h for _, h in ended[: -self.limits.sessions]]
        with self._condition:
            for handle in forgotten:
                self._handles.pop(handle.id, None)


def _fail(handle: Handle, error: Exception) -> None:
    """End this session alone, its memory first."""
    handle.session.close()
    reason = _explain(error)
    error.__traceback__ = None  # it holds the tensors of the call that failed
    _free_memory()
    handle.end(Ended(reason, is_error=True))


def _explain(error: Exception) -> str:
    """What a session's reader is told; everything else goes to the log."""
    words = str(error).lower()
    is_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if is_memory or (isinstance(error, RuntimeError) and ("out of memory" in words or "alloc" in words)):
        log.warning("a session ran out of memory: %s", " ".join(str(error).split())[:300])
        return "out of memory: the server had none left for this session; others go on"
    log.error("a session failed", exc_info=error)
    return "the session failed; the server's log says why"


def _mib(size: int) -> str:
    return f"{max(size, 0) / 2**20:.0f}"


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
