"""One live video: an endless rollout with its decoder, steered by commands that take effect at chunk borders.

A session makes pixels when it is asked for the next chunk and does nothing else: no threads, no network, no clock that
decides what is shown. So its command log replays to the same frames, bit for bit on a CPU.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from causalreel.data.video import to_bytes
from causalreel.infer.live import Live, Policy, PolicyKind, encode_prompt
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import adapt
from causalreel.serve.commands import (
    ALWAYS,
    LEAST_FPS,
    MOST_CHUNKS,
    MOST_FPS,
    MOST_SEED,
    MOST_STEPS,
    check,
    fold,
    integer,
    number,
    text,
)
from causalreel.serve.records import (
    FORMAT,
    MAX_COMMANDS,
    MAX_PICTURES,
    Record,
    checked_record,
    made_by,
    pack,
    packed,
    pixels,
)
from causalreel.types import DecodeStream

CHANGES = ("prompt", "restart", "steps", "image")
"""Commands that change what is shown."""
MAX_TOLD = 1000
"""Commands, the last of them, of which the next chunk tells that they took effect."""


@dataclass(frozen=True)
class Options:
    """How a session begins."""

    prompt: str
    seed: int = 0
    steps: int | None = None
    """Denoising steps per chunk; None: the model's."""
    chunk: int | None = None
    """Latent frames made together; None: the model's."""
    fps: float | None = None
    """Pixel frames per second at which it is meant to be shown; None: the model's. Does not change the frames."""
    image: Tensor | None = None
    """First picture (3,H,W) in [-1,1], for frame-wise models; its values are rounded to 8 bits."""


@dataclass(frozen=True)
class Applied:
    """A command that took effect."""

    number: int
    name: str
    arguments: dict[str, Any]
    latency_s: float
    """From the command to its first affected pixels being ready; time spent paused counts."""


@dataclass(frozen=True)
class Timings:
    """Where the time of a chunk went, in seconds."""

    denoise_s: float
    decode_s: float
    queue_s: float = 0.0
    """Waiting for the model, while it worked for other sessions."""
    encode_s: float = 0.0
    """Into stills or video, by whoever sends it."""


@dataclass(frozen=True)
class Emitted:
    """A chunk of pixels."""

    sequence: int
    """0, 1, 2 ..."""
    first_frame: int
    """Number of its first pixel frame in the session."""
    frames: Tensor
    """(t,H,W,3) uint8 on the CPU."""
    prompt: str
    """In force when it was made."""
    timings: Timings
    commands: tuple[Applied, ...] = ()
    """What took effect with it."""


@dataclass
class _Pending:
    """A checked command that waits for a chunk border."""

    number: int
    name: str
    arguments: dict[str, Any]
    told_s: float
    text: Tensor | None = None


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
    ) -> None:
        """record: what it does by itself until somebody else changes the picture; at its end the session pauses."""
        self.id = uuid.uuid4().hex if id is None else id
        self.pipeline, self.clock = pipeline, clock
        seed = integer("seed", options.seed, 0, MOST_SEED)
        steps = None if options.steps is None else integer("steps", options.steps, 1, MOST_STEPS)
        chunk = None if options.chunk is None else integer("chunk", options.chunk, 1, pipeline.export.frames)
        fps = pipeline.export.fps if options.fps is None else number("fps", options.fps, LEAST_FPS, MOST_FPS)
        self._picture = None if options.image is None else self._check_picture(options.image)
        self.options = options
        self.sampling = adapt(pipeline.sampling, steps=steps, chunk=chunk)
        self.policy = Policy.of(pipeline.export, self.sampling, policy)
        if self._picture is not None:
            self._refuse_picture()
        self.prompt, self.seed, self.fps = text("prompt", options.prompt), seed, fps
        self.paused = self.closed = False
        self.sequence = self.frames = 0
        """Chunks and pixel frames made so far."""
        self._to_step = 0
        self._intended = (self.prompt, self.seed, self._picture)
        """Prompt, seed and picture when all pending commands have been taken."""
        self._order, self._lock = threading.Lock(), threading.Lock()
        self._pending: list[_Pending] = []
        self._taken: list[Applied] = []
        """In force, but not yet reported with a chunk; when they were told, where their latency will be."""
        self._log: list[dict[str, Any]] = []
        self._is_full = False
        self._count = 0
        self._text = encode_prompt(pipeline, self.prompt, self.seed, _first(self._picture))
        self._record = record
        self._waiting = deque(() if record is None else record.commands)
        """Commands of the record that are still to come."""
        self._live: Live | None = None
        self._decode: DecodeStream | None = None

    # ---- commands ----

    def command(self, name: str, **arguments: Any) -> int:
        """Check a command now, have it take effect at the next chunk border; -> its number (1, 2, ...).

        prompt(text, mode="recompute" | "switch" | "fade", chunks=4), pause, resume, step(chunks=1): of a paused
        session; restart(seed=None, prompt=None): from the first frame; steps(steps), fps(fps),
        image(image): restart from a picture (3,H,W) in [-1,1], or from none if None; close.
        Raises ValueError for unknown commands, arguments and values, and in a closed session.
        """
        return self._tell(name, arguments, ends_replay=name in CHANGES)

    def _tell(self, name: str, arguments: dict[str, Any], *, ends_replay: bool = False) -> int:
        told_s = self.clock()
        checked = check(name, arguments)
        if name == "steps":
            adapt(self.pipeline.sampling, steps=checked["steps"])
        if checked.get("image") is not None:
            self._refuse_picture()
            checked["image"] = self._check_picture(checked["image"])
        with self._order:  # encoding text may take long, and nobody but other commands waits for it
            is_picture = checked.get("image") is not None
            if self.closed:
                raise ValueError(f"session {self.id} is closed")
            self._refuse_more(name, is_picture)
            prompt, seed, picture = self._intended
            prompt = checked.get("text") or checked.get("prompt") or prompt
            seed = seed if checked.get("seed") is None else checked["seed"]
            picture = checked["image"] if name == "image" else picture
            needs_text = name in ("prompt", "restart", "image")
            begins_with = None if name == "prompt" else _first(picture)
            encoded = encode_prompt(self.pipeline, prompt, seed, begins_with) if needs_text else None
            self._intended = (prompt, seed, picture)
            if ends_replay:
                self._record = None
                self._waiting.clear()
            self._count += 1
            with self._lock:
                self._pending.append(_Pending(self._count, name, checked, told_s, encoded))
            return self._count

    def _refuse_more(self, name: str, is_picture: bool) -> None:
        """ValueError if the record has no room for another command."""
        if name in ALWAYS:
            return
        with self._lock:
            told = [(entry["name"], entry["arguments"]) for entry in self._log]
            told += [(command.name, command.arguments) for command in self._pending]
        kept = sum(one not in ALWAYS for one, _ in told)
        pictures = sum(arguments.get("image") is not None for _, arguments in told) if is_picture else 0
        if kept >= MAX_COMMANDS or pictures + is_picture > MAX_PICTURES:
            raise ValueError(
                f"a session's record holds at most {MAX_COMMANDS} commands, {MAX_PICTURES} with a picture; "
                f"{', '.join(ALWAYS)} go on, for others open a new session"
            )

    def state(self) -> dict[str, Any]:
        """What it is doing, as JSON takes it."""
        height, width = self.pipeline.size
        with self._lock:
            return {
                "id": self.id,
                "model": self.pipeline.export.name,
                "prompt": self.prompt,
                "seed": self.seed,
                "steps": self.sampling.multistep or len(self.sampling.steps),
                "chunk": self.sampling.chunk,
                "fps": self.fps,
                "width": width,
                "height": height,
                "policy": self.policy.kind,
                "has_image": self._picture is not None,
                "paused": self.paused,
                "closed": self.closed,
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
        return not self.closed and (not self.paused or self._to_step > 0)

    # ---- chunks ----

    def next_chunk(self) -> Emitted | None:
        """Take the pending commands and make the next chunk; None while paused and after close."""
        self.take_commands()
        if self._record is not None and self.can_run:
            self._follow_record()
            self.take_commands()
        if not self.can_run:
            return None
        with torch.no_grad():
            start = self.clock()
            latents = self._next_latents()
            _finish(latents)
            denoised = self.clock()
            assert self._decode is not None
            frames = to_bytes(self._decode(latents)[0])  # (t,H,W,3)
        done = self.clock()
        self._to_step = max(self._to_step - 1, 0)
        taken, self._taken = self._taken, []
        commands = tuple(replace(applied, latency_s=done - applied.latency_s) for applied in taken)
        timings = Timings(denoised - start, done - denoised)
        emitted = Emitted(self.sequence, self.frames, frames, self.prompt, timings, commands)
        with self._lock:
            self.sequence, self.frames = self.sequence + 1, self.frames + len(frames)
            if self._record is not None and self.sequence == self._record.chunks:
                self.paused, self._to_step = True, 0
        return emitted

    def _follow_record(self) -> None:
        """Say what the record says before this chunk; pauses change no frame and are left out."""
        while self._waiting and self._waiting[0].at <= self.sequence:
            one = self._waiting.popleft()
            if one.name in (*CHANGES, "fps"):
                self._tell(one.name, _with_pixels(one.arguments))
        if self._record is not None and self.sequence >= self._record.chunks:
            self._record = None  # somebody has resumed what paused at its end

    def close(self) -> None:
        """Close at once and let go of all memory; for the thread that asks for chunks."""
        with self._lock:
            self.closed = True
            self._pending.clear()
        self._let_go()

    def _next_latents(self) -> Tensor:
        if self._live is None:
            first = None
            if self._picture is not None:
                first = self.pipeline.codec.encode(
                    pixels(self._picture)[None, None].to(self.pipeline.device)
                )  # (1,1,C,h,w)
            how: dict[str, Any] = {"sampling": self.sampling, "policy": self.policy}
            self._live = Live(self.pipeline, self._text, seed=self.seed, first=first, **how)
            self._decode = self.pipeline.codec.stream() if self.pipeline.decoder is None else self.pipeline.decoder(1)
            if first is not None:
                return first
        return self._live.next_chunk().latents

    def take_commands(self) -> None:
        """Have the pending commands take effect now, between two chunks; for the thread that asks for chunks."""
        with self._lock:
            taken, self._pending = self._pending, []
            for command in taken:
                if self.closed:
                    break
                self._apply(command)
                self._keep(command)
                told = _describe(command.arguments)
                self._taken.append(Applied(command.number, command.name, told, command.told_s))
            del self._taken[:-MAX_TOLD]
        if self.closed:
            self._let_go()

    def _keep(self, command: _Pending) -> None:
        """Log a command that took effect. A full log has none of `ALWAYS`, without which the frames are the same."""
        if len(self._log) >= MAX_COMMANDS:
            self._log = [entry for entry in self._log if entry["name"] not in ALWAYS]
            self._is_full = True
        if not (self._is_full and command.name in ALWAYS):
            entry = {"number": command.number, "at": self.sequence, "name": command.name}
            fold(self._log, {**entry, "arguments": command.arguments})

    def _apply(self, command: _Pending) -> None:
        arguments = command.arguments
        match command.name:
            case "prompt":
                assert command.text is not None
                self.prompt, self._text = arguments["text"], command.text
                if self._live is not None:
                    self._live.tell(command.text, mode=arguments["mode"], chunks=arguments["chunks"])
            case "pause":
                self.paused, self._to_step = True, 0
            case "resume":
                self.paused = False
            case "step":
                self._to_step = min(MOST_CHUNKS, self._to_step + arguments["chunks"]) if self.paused else 0
            case "restart" | "image":
                assert command.text is not None
                if command.name == "image":
                    self._picture = arguments["image"]
                self.prompt, self._text = arguments.get("prompt") or self.prompt, command.text
                self.seed = self.seed if arguments.get("seed") is None else arguments["seed"]
                self._let_go()
            case "steps":
                self.sampling = adapt(self.pipeline.sampling, steps=arguments["steps"], chunk=self.sampling.chunk)
                if self._live is not None:
                    self._live.resample(self.sampling)
            case "fps":
                self.fps = arguments["fps"]
            case "close":
                self.closed = True

    def _let_go(self) -> None:
        if self._live is not None:
            self._live.close()
        self._live = self._decode = None

    # ---- the record ----

    def record(self) -> dict[str, Any]:
        """Options and commands with the chunk at which each took effect, as JSON takes it; for `replay`."""
        with self._lock:
            options = self.options
            picture = None if options.image is None else pack(self._check_picture(options.image))
            begin = {"prompt": options.prompt, "seed": options.seed, "steps": options.steps, "chunk": options.chunk}
            commands = [{**entry, "arguments": packed(entry["arguments"])} for entry in self._log]
            return {
                "format": FORMAT,
                **made_by(self.pipeline),
                "model": self.pipeline.export.name,
                "policy": self.policy.kind,
                "options": {**begin, "fps": options.fps, "image": picture},
                "commands": commands,
                "chunks": self.sequence,
            }

    @classmethod
    def of(cls, pipeline: Pipeline, record: Record, **how: Any) -> Session:
        """A session that plays the record again and then pauses; how: id and clock. ValueError for what the model
        cannot do; `Record.differences` says whether its frames will be those recorded."""
        record.fits(pipeline.size)
        if any(one.name == "steps" for one in record.commands):
            adapt(pipeline.sampling, steps=1)
        options = Options(**_with_pixels(record.options))
        return cls(pipeline, options, policy=record.policy, record=record, **how)

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

    def _check_picture(self, picture: Any) -> Tensor:
        """(3,H,W) in [-1,1] -> (H,W,3) uint8."""
        size = (3, *self.pipeline.size)
        shape = tuple(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
        if shape != size:
            raise ValueError(f"image must be a tensor {size} in [-1,1], got {shape}")
        return to_bytes(picture)[0]

    def _refuse_picture(self) -> None:
        if self.sampling.chunk != 1:
            raise ValueError(
                f"a picture to begin with needs a frame-wise model (chunk 1); this one has chunk {self.sampling.chunk}"
            )


def _first(picture: Tensor | None) -> Tensor | None:
    """(H,W,3) uint8 -> (3,H,W), as `encode_prompt` wants the picture that a stream begins with."""
    return None if picture is None else pixels(picture)


def _with_pixels(arguments: dict[str, Any]) -> dict[str, Any]:
    """What a record holds, with its picture as a session takes it."""
    return {key: pixels(value) if isinstance(value, Tensor) else value for key, value in arguments.items()}


def _describe(arguments: dict[str, Any]) -> dict[str, Any]:
    """As JSON takes it, without pixels."""
    return {k: f"{v.shape[1]} x {v.shape[0]} pixels" if isinstance(v, Tensor) else v for k, v in arguments.items()}


def _finish(x: Tensor) -> None:
    """Wait until a GPU has made it, so that timings are true."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def with_queue(emitted: Emitted, queue_s: float) -> Emitted:
    """The chunk with the time that it waited for the model."""
    return replace(emitted, timings=replace(emitted.timings, queue_s=queue_s))
