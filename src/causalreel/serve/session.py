"""One live session: commands that take effect at chunk borders, chunks with what took effect, and a record of both.

A session makes pixels when it is asked for the next chunk and does nothing else: no threads, no network, no clock that
decides what is shown. So its record replays to the same frames, bit for bit on a CPU. What commands mean is theirs
(`infer.commands`), what they change the video's (`infer.live_video`).
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalreel.data.video import on_host
from causalreel.infer import values
from causalreel.infer.commands import COMMANDS, Command, Image, LoRA, Options, Prompt, Scene, parse
from causalreel.infer.live import PolicyKind
from causalreel.infer.live_video import LiveVideo
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.restyle import Restyle
from causalreel.infer.schedule import step_count
from causalreel.serve.begun import Begun, aside
from causalreel.serve.emitted import Applied, Emitted, Seen, described
from causalreel.serve.records import (
    FORMAT,
    MAX_COMMANDS,
    MAX_ENTRIES,
    MAX_LETTERS,
    MAX_PICTURES,
    MOST_CHUNKS,
    MOST_PIXELS,
    Record,
    Recorded,
    checked_record,
    fold,
    made_by,
    packed,
)

__all__ = ["Options", "Session"]

MAX_TOLD = 1000
"""Commands, the last of them, of which the next chunk tells that they took effect."""


@dataclass
class _Pending:
    """A checked command that waits for a chunk border."""

    number: int
    command: Command
    told_s: float
    encoded: tuple[Scene, Tensor] | None
    """Its scene with what it says, and that encoded."""


class Session:
    """One live video. `command`, `state` and `record` may be called from any thread, `next_chunk` from one at a time.

    policy: "renew" or "slide", see `infer.live.Policy`; None: the model's. Raises ValueError for options that the model
    cannot meet.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        options: Options,
        *,
        id: str | None = None,
        policy: PolicyKind | None = None,
        clock: Callable[[], float] = time.monotonic,
        record: Record | None = None,
        restyle: Restyle | None = None,
    ) -> None:
        """record: what it does by itself until somebody else changes the picture; at its end the session pauses.
        restyle: a given video that it is made of, at whose end it closes."""
        self.id = uuid.uuid4().hex if id is None else id
        self.pipeline, self.clock = pipeline, clock
        self.video = LiveVideo(pipeline, options, policy, restyle=restyle)
        self._loras = self._loras_now()
        """What the video began with; they may change for other sessions' sake."""
        self.has_input = True
        """Whether what it is made of goes on."""
        self.sequence = self.frames = 0
        """Chunks and pixel frames made so far."""
        self._started = 0
        """Chunks begun so far; one more than made while the next one is on its way."""
        self._begun: Begun | None = None
        self._failure: Exception | None = None
        self._told_loras = dict(self._loras)
        """As far as the record knows them."""
        self._intended = self.video.scene
        """The scene when all pending commands have been taken."""
        self._order, self._lock = threading.Lock(), threading.Lock()
        self._pending: list[_Pending] = []
        self._taken: list[Applied] = []
        """In force, but not yet reported with a chunk; when they were told, where their latency will be."""
        self._log: list[Recorded] = []
        self._is_full = False
        self._recorded = MOST_CHUNKS
        """Chunks that the record can make again: others may change the model's LoRAs when there is no room for it."""
        self._last: Applied | None = None
        """The latest command that a chunk has told of."""
        self._count = 0
        self._record = record
        self._waiting = deque(() if record is None else record.commands)
        """Commands of the record that are still to come."""

    @property
    def prompt(self) -> str:
        """In force now."""
        return self.video.scene.prompt

    @property
    def fps(self) -> float:
        """Pixel frames per second at which it is meant to be shown."""
        return self.video.fps

    @property
    def paused(self) -> bool:
        return self.video.paused

    @property
    def closed(self) -> bool:
        return self.video.closed

    # ---- commands ----

    def command(self, command: Command | str, **arguments: Any) -> int:
        """Check a command now, have it take effect at the next chunk border; -> its number (1, 2, ...).

        command: one of `infer.commands`, or its name with its arguments; a picture is (3,H,W) in [-1,1]. Raises
        ValueError for unknown commands, arguments and values, for what the model cannot do, and in a closed session.
        """
        command = command if isinstance(command, Command) else parse({**arguments, "name": command})
        return self._tell(command, ends_replay=command.changes_frames)

    def _tell(self, command: Command, *, ends_replay: bool = False) -> int:
        told_s = self.clock()
        command = command.suited(self.video)
        command.check(self.video)
        with self._order:  # encoding text may take long, and nobody but other commands waits for it
            if self.closed:
                raise ValueError(f"session {self.id} is closed")
            self._refuse_more(command)
            scene = command.scene(self._intended)
            encoded = None if scene is None else self.video.encode(scene, begins=command.begins_again)
            self._intended = self._intended if encoded is None else encoded[0]
            if ends_replay:
                self._record = None
                self._waiting.clear()
            self._count += 1
            with self._lock:
                self._pending.append(_Pending(self._count, command, told_s, encoded))
            return self._count

    def _refuse_more(self, command: Command) -> None:
        """ValueError if the record has no room for another command; there is always some to let go of keys."""
        if command.is_always_taken:
            return
        with self._lock:
            held = [entry.command for entry in (*self._log, *self._pending) if not entry.command.is_always_taken]
        room = MAX_COMMANDS + command.is_release
        pictures = [] if command.picture is None else [one.picture for one in (command, *held)]
        pictures = [picture for picture in pictures if picture is not None]
        first = [] if self.video.options.image is None else [self.video.options.image]
        pixels = sum(picture[..., 0].numel() for picture in (*pictures, *first))
        entries = command.entries and command.entries + sum(one.entries for one in held)
        letters = command.letters and command.letters + sum(one.letters for one in held)
        is_full = len(held) >= room or entries > MAX_ENTRIES or letters > MAX_LETTERS
        if is_full or len(pictures) > MAX_PICTURES or (pictures and pixels > MOST_PIXELS):
            always = [name for name, kind in COMMANDS.items() if kind.is_always_taken]
            raise ValueError(
                f"a session's record holds at most {MAX_COMMANDS} commands, {MAX_PICTURES} with a picture, of "
                f"{MOST_PIXELS} pixels together, {MAX_ENTRIES} numbers of poses and fields and names of keys, and "
                f"{MAX_LETTERS} letters; {', '.join(always)} go on, for others open a new session"
            )

    def state(self) -> dict[str, Any]:
        """What it is doing, as JSON takes it."""
        (height, width), video = self.pipeline.size, self.video
        with self._lock:
            return {
                "id": self.id,
                "model": self.pipeline.export.name,
                "prompt": video.scene.prompt,
                "seed": video.scene.seed,
                "steps": step_count(video.sampling),
                "chunk": video.sampling.chunk,
                "fps": video.fps,
                "width": width,
                "height": height,
                "policy": video.policy.kind,
                "has_image": video.scene.picture is not None,
                "strength": video.strength,
                "camera": video.feed is not None,
                "fields": {name: value.tolist() for name, value in video.fields.items()},
                "keys": list(video.pressed),
                "applied": None if self._last is None else self._last.receipt,
                "paused": video.paused,
                "closed": video.closed,
                "sequence": self.sequence,
                "frames": self.frames,
                "pending": len(self._pending),
                "replaying": None if self._record is None else self._record.chunks,
            }

    @property
    def has_pending(self) -> bool:
        """Whether commands wait for the next chunk border."""
        return bool(self._pending)

    @property
    def can_run(self) -> bool:
        """Whether `next_chunk` would make a chunk, if no command waits."""
        return self.video.can_run and not (self._begun is None and self.video.is_waiting)

    @property
    def given_bytes(self) -> int:
        """Host memory of what clients gave it: frames of a video, pictures to begin with, now and in its record."""
        with self._lock:
            commands = [entry.command for entry in (*self._log, *self._pending, *tuple(self._waiting))]
        pictures = [self.video.options.image, *(one.image for one in commands if isinstance(one, Image))]
        return self.video.given_bytes + sum(one.nbytes for one in pictures if one is not None)

    def feed(self, pictures: Iterable[np.ndarray]) -> None:
        """Further frames (H,W,3) uint8 of the camera that it is made of; ValueError if it is not."""
        if self.video.feed is None:
            raise ValueError("this session takes no frames; open one with camera: true")
        self.video.feed.put(pictures)

    def take_commands(self) -> None:
        """Have the pending commands take effect now, between two chunks; for the thread that asks for chunks."""
        with self._lock, aside(self.pipeline.device):
            self._keep_loras()
            taken, self._pending = self._pending, []
            for pending in taken:
                if self.closed:
                    break
                is_idle, before = pending.command.is_idle(self.video), self.video.scene.said
                self.video.take(pending.command, pending.encoded)
                if not is_idle:
                    command = pending.command.as_taken(self.video)
                    self._keep(Recorded(self._started, command, pending.number, before))
                arguments = described(pending.command.arguments)
                self._taken.append(Applied(pending.number, pending.command.name, arguments, pending.told_s))
            self._told_loras = self._loras_now()
            del self._taken[:-MAX_TOLD]
        if self.closed:
            self._begun = None
            self.video.reset()

    def _keep_loras(self) -> None:
        """Log what other sessions of the model made of its LoRAs since: these frames change with them."""
        for name, strength in self._loras_now().items():
            if strength == self._told_loras[name]:
                continue
            if sum(not entry.command.is_always_taken for entry in self._log) >= MAX_COMMANDS:
                self._recorded = min(self._started, self._recorded)
            else:
                self._keep(Recorded(self._started, LoRA(lora=name, strength=strength)))

    def _loras_now(self) -> dict[str, float]:
        return {} if self.pipeline.loras is None else dict(self.pipeline.loras.strengths)

    def _keep(self, entry: Recorded) -> None:
        """Log a command that took effect. A full log has none of those always taken: the frames are the same."""
        if len(self._log) >= MAX_COMMANDS:
            self._log = [other for other in self._log if not other.command.is_always_taken]
            self._is_full = True
        if not (self._is_full and entry.command.is_always_taken):
            changes = isinstance(entry.command, Prompt)
            fold(self._log, entry, lambda before: not changes or self.video.says_the_same(before))

    # ---- chunks ----

    def next_chunk(self, *, ahead: Callable[[], bool] = lambda: False) -> Emitted | None:
        """Take the pending commands and make the next chunk; None while paused and after close.

        ahead: asked while pixels are made of the chunk: whether the one behind it is to be begun meanwhile, on a GPU at
        the same time. The commands that have come until then take effect with that one; later ones with the one after.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        self.take_commands()
        begun, self._begun = self._begun or self._begin(), None
        if begun is None or not self.video.can_run:
            self._begun = begun
            return None
        self.video.to_step = max(self.video.to_step - 1, 0)
        with torch.no_grad():
            frames = begun.decoded()
            if ahead():
                self._begin_ahead()
            pictures = on_host(frames)
        done = self.clock()
        place = {"chunk": self.sequence, "frame": self.frames}
        commands = tuple(replace(applied, latency_s=done - applied.latency_s, **place) for applied in begun.taken)
        emitted = Emitted(
            self.sequence,
            self.frames,
            pictures,
            begun.prompt,
            begun.timings(done),
            commands,
            keys=begun.keys,
            camera=tuple(map(Seen.of, begun.seen)),
        )
        with self._lock:
            self.sequence, self.frames = self.sequence + 1, self.frames + len(pictures)
            self._last = commands[-1] if commands else self._last
            if self._record is not None and self.sequence == self._record.chunks:
                self.video.paused, self.video.to_step = True, 0
        return emitted

    def _begin(self, *, is_ahead: bool = False) -> Begun | None:
        """Have the latents of the next chunk made, with what commands and the record say; None if there is none."""
        if self._record is not None and self.can_run:
            self._follow_record()
            self.take_commands()
        if not self.can_run:
            return None
        if not self.video.has_input():
            self.has_input, self.video.closed = False, True
            self.video.reset()
            return None
        begun = Begun.of(self.video, self.clock, is_ahead=is_ahead)
        begun.taken, self._taken = self._taken, []
        self._started += 1
        return begun

    def _begin_ahead(self) -> None:
        """Begin the chunk behind the one that is being decoded; what goes wrong is told when it is asked for."""
        if self._record is not None and self._started >= self._record.chunks:
            return
        try:
            self.take_commands()
            self._begun = self._begin(is_ahead=True)
        except Exception as error:
            self._failure = error

    def _follow_record(self) -> None:
        """Tell what the record says before this chunk; pauses change no frame and are left out."""
        while self._waiting and self._waiting[0].at <= self._started:
            command = self._waiting.popleft().command
            if not command.is_always_taken:
                self._tell(command)
        if self._record is not None and self.sequence >= self._record.chunks:
            self._record = None  # somebody has resumed what paused at its end

    def close(self) -> None:
        """Close at once and let go of all memory; for the thread that asks for chunks."""
        with self._lock:
            self.video.closed = True
            self._pending.clear()
        self._begun = self._failure = None  # whose traceback holds the tensors of the call that failed
        self.video.reset()

    # ---- the record ----

    def record(self) -> dict[str, Any]:
        """Options and commands with the chunk at which each took effect, as JSON takes it; for `replay`. ValueError for
        a session that is made of a given video."""
        if self.video.strength is not None:
            raise ValueError("a session that is made of a given video has no replay file, which would not hold it")
        with self._lock:
            options = {one.name: getattr(self.video.options, one.name) for one in values.parameters(Options)}
            if not options["fields"]:  # which files of earlier versions do not have
                del options["fields"]
            chunks = min(self.sequence, self._recorded)
            commands = [
                {
                    "number": entry.number,
                    "at": entry.at,
                    "name": entry.command.name,
                    "arguments": packed(entry.command.recorded),
                }
                for entry in self._log
                if entry.at <= chunks  # a chunk may have been begun that nobody has yet
            ]
            return {
                "format": FORMAT,
                **made_by(self.pipeline, self.video.policy.context, self._loras),
                "model": self.pipeline.export.name,
                "policy": self.video.policy.kind,
                "options": packed(options),
                "commands": commands,
                "chunks": chunks,
            }

    @classmethod
    def of(cls, pipeline: Pipeline, record: Record, **how: Any) -> Session:
        """A session that plays the record again and then pauses; how: id and clock. ValueError for what the model
        cannot do; `Record.differences` says whether its frames will be those recorded."""
        record.fits(pipeline.size)
        session = cls(pipeline, record.options, policy=record.policy, record=record, **how)
        for entry in record.commands:
            entry.command.check(session.video)
        return session

    @classmethod
    def replay(cls, pipeline: Pipeline, record: dict[str, Any]) -> Iterator[Emitted]:
        """Make the chunks of a recorded session again, frames bit for bit on a CPU; raises ValueError at once."""
        found = checked_record(record)
        if found.model != pipeline.export.name:
            raise ValueError(f"record was made with the model {found.model!r}, this is {pipeline.export.name!r}")
        return cls.of(pipeline, found).replayed()

    def replayed(self) -> Iterator[Emitted]:
        """The chunks of the record that it plays."""
        chunks = 0 if self._record is None else self._record.chunks
        while self.sequence < chunks and (made := self.next_chunk()) is not None:
            yield made
