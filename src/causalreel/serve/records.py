"""Records of sessions, which make the same video again: written as JSON, read with limits, checked before any model.

A record holds how a session began, the pictures it was given and its commands with the chunk at which each took effect.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from causalreel import __version__
from causalreel.foreign import holds_more, shown
from causalreel.infer import values
from causalreel.infer.commands import Close, Command, Options, parse
from causalreel.infer.live import Policy, PolicyKind
from causalreel.infer.models import Profile, profile
from causalreel.infer.schedule import adapt
from causalreel.infer.values import Text, Whole
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.registry import described, policy_from, without_own

if TYPE_CHECKING:
    from causalreel.infer.pipeline import Pipeline
    from causalreel.weights.export import Sampling

FORMAT = "causalreel-session/1"
MAX_COMMANDS = 10_000
"""Commands that a session keeps, for its record; superseded ones do not count, and some are taken beyond them."""
MAX_PICTURES = 64
"""Pictures among them."""
MAX_ENTRIES = 40_000
"""Numbers of poses and fields, and names of keys, in all of them: so few that a file of them can be read again."""
MOST_CHUNKS = 1 << 27
"""A year of chunks."""
MOST_BYTES = 288 << 20
"""Of a file: of all that is named above and below."""
MAX_LETTERS = 4 << 20
"""Of all prompts and other texts in them, as JSON writes them."""
MOST_VALUES = 10 * (MAX_COMMANDS + 1) + 6 * MAX_ENTRIES
"""Of its JSON: what a session's commands can come to at most, each number in lists of its own."""
MOST_PIXELS = 1 << 26
"""Of all its pictures together, which take up to 4 bytes each."""

KEYS = {"format", "model", "policy", "options", "commands", "chunks"}
MADE_BY = ("version", "torch", "device", "size", "context", "sampling", "weights", "loras")
"""What else the frames depend on; files of earlier versions leave it out."""
MOST_SHOWN = 400
"""Characters of a recorded value in a message: any context policy with all its numbers."""


@dataclass(frozen=True, eq=False)
class Recorded:
    """A command and the chunk before which it took effect."""

    at: int
    command: Command
    number: int = 0
    """Its number in the session that recorded it."""
    before: str | None = None
    """The completed prompt that held until it, which may fill what it leaves open."""


@dataclass(frozen=True, eq=False)
class Record:
    """A record that has been checked."""

    model: str
    policy: PolicyKind
    options: Options
    commands: tuple[Recorded, ...]
    chunks: int
    made_by: dict[str, str] = field(default_factory=dict)

    @property
    def pictures(self) -> list[Tensor]:
        """(H,W,3) uint8 each."""
        given = [self.options.image, *(one.command.picture for one in self.commands)]
        return [picture for picture in given if picture is not None]

    @property
    def prompts(self) -> list[str]:
        """Every prompt in it once, in order."""
        later = (text for one in self.commands for text in one.command.prompts)
        return list(dict.fromkeys([self.options.prompt, *later]))

    def fits(self, size: tuple[int, int]) -> None:
        """ValueError unless its pictures are of the video's size (height, width)."""
        for picture in self.pictures:
            if tuple(picture.shape[:2]) != size:
                found = f"{picture.shape[1]}x{picture.shape[0]}"
                raise ValueError(f"the record's pictures are {found} pixels, the model's videos {size[1]}x{size[0]}")

    def differences(self, pipeline: Pipeline) -> list[str]:
        """Why the frames may differ from those recorded, each in a few words."""
        context, chunk = self._own(pipeline), self._sampling(pipeline).chunk or 1
        here = {"model": pipeline.export.name, **made_by(pipeline, context)}
        recorded = {"model": self.model, **self.made_by}
        if self._means(context, frames=pipeline.export.frames, chunk=chunk):
            recorded["context"] = here["context"]
        named = {key: recorded[key] for key in here if key in recorded and recorded[key] != here[key]}
        words = {"weights": "the weights are others"}
        return [words.get(key, f"{key} was {shown(was, MOST_SHOWN)}, is {here[key]}") for key, was in named.items()]

    def policy_for(self, model: Profile) -> tuple[str | None, bool]:
        """The context policy under which a model replays it, None for the model's own; and whether its numbers are
        known to be meant for it. ValueError if it cannot be read.

        Another model than the one that recorded has its own policy, or the one that was named with the numbers that
        were; its own chunk and clips give the others. Where the one that recorded is not here, all numbers stay.
        """
        recorded = self.made_by.get("context")
        if recorded is None or recorded == described(model.export.context):
            return None, True
        if self.model == model.export.name:
            return recorded, True
        try:
            recorder = profile(self.model)
        except (ValueError, OSError):
            recorder = None
        if recorder is None or recorder.export.name != self.model:
            return recorded, ":" not in recorded or recorded == described(self._own(model))
        chunk = self._sampling(recorder).chunk or 1
        frames = recorder.export.frames // chunk * chunk
        policy = policy_from(recorded, frames=frames, chunk=chunk)
        return (None if policy == self._own(recorder) else without_own(policy, frames=frames, chunk=chunk)), True

    def _sampling(self, model: Profile | Pipeline) -> Sampling:
        return adapt(model.sampling, steps=self.options.steps, chunk=self.options.chunk)

    def _own(self, model: Profile | Pipeline) -> ContextPolicy:
        """In force for a model of which no other policy is asked."""
        return Policy.of(model.export, self._sampling(model), self.policy).context

    def _means(self, context: ContextPolicy, *, frames: int, chunk: int) -> bool:
        """Whether the context policy recorded is this one, in other words: files of earlier versions have the export's
        own, which may keep everything, for the window that comes of it."""
        frames = frames // chunk * chunk
        try:
            recorded = policy_from(self.made_by.get("context", ""), frames=frames, chunk=chunk)
        except ValueError:
            return False
        return context == (recorded.bounded(frames) if self.policy == "slide" else recorded)


def made_by(
    pipeline: Pipeline, context: ContextPolicy | None = None, loras: Mapping[str, float] | None = None
) -> dict[str, str]:
    """What the frames depend on besides the record. context: the policy in force; None: the export's. loras: with which
    strengths it began; None: those of now."""
    is_cuda = pipeline.device.type == "cuda"
    device = torch.cuda.get_device_name(pipeline.device) if is_cuda else pipeline.device.type
    size = f"{pipeline.size[1]}x{pipeline.size[0]}"
    known = {"version": __version__, "torch": torch.__version__, "device": device, "size": size}
    known["context"] = described(context or pipeline.export.context)
    known["sampling"] = _sampled(pipeline.sampling)
    if pipeline.loras is not None:  # whose weights change with the strengths
        strengths = pipeline.loras.strengths if loras is None else loras
        return {**known, "loras": ", ".join(f"{name} {strength:g}" for name, strength in strengths.items())}
    weights = fingerprint(pipeline.denoiser)
    return known if weights is None else {**known, "weights": weights}


def _sampled(sampling: Sampling) -> str:
    """The model's steps, and what else of its sampling is not as in most models, in a line."""
    named = {one.name: getattr(sampling, one.name) for one in fields(sampling)}
    plain = {one.name: one.default for one in fields(sampling)}
    told = {name: value for name, value in named.items() if "steps" in name or value != plain[name]}
    return ", ".join(f"{name} {_numbers(value)}" for name, value in told.items())


def _numbers(value: object) -> str:
    if isinstance(value, tuple):
        return "(" + " ".join(map(_numbers, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def fingerprint(network: torch.nn.Module) -> str | None:
    """A name for the weights: a hash of some values of each tensor, as bfloat16, which every type holds alike.

    None where they are kept in another form, such as fp8.
    """
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in network.state_dict().items():
        if tensor.is_meta or not tensor.numel() or not tensor.is_floating_point() or tensor.element_size() < 2:
            return None
        values = tensor.detach().flatten()
        sample = values[:: max(1, len(values) // 16)][:16].to("cpu", torch.bfloat16)
        found.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def fold(log: list[Recorded], entry: Recorded, stands: Callable[[str | None], bool] = lambda before: True) -> None:
    """Append a command that took effect to a log of them; what it supersedes goes.

    Superseded is what came at the same chunk border and shows in no chunk, since the later command alone leads to the
    same: a replay of the log makes the same frames. stands: whether it means the same behind another completed prompt,
    which a prompt that leaves something open may not.
    """
    command, before = entry.command, entry.before
    while (place := _last(log, entry.at, command.side)) is not None:
        merged = command.supersede(log[place].command)
        if merged is None or not stands(log[place].before):
            break
        command, before = merged, log[place].before
        del log[place]
    log.append(replace(entry, command=command, before=before))


def _last(log: list[Recorded], at: int, side: str) -> int | None:
    """Where the last command of a side stands that took effect at this border."""
    for place in range(len(log) - 1, -1, -1):
        if log[place].at != at:
            return None
        if log[place].command.side == side:
            return place
    return None


# ---- reading --------------------------------------------------------------------------------------------------------


def read_record(path: str | Path) -> Record:
    """A replay file, checked as a whole; ValueError names the file and what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no replay file at {path}")
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES >> 20} MiB: it is no replay file")
    try:
        return parse_record(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_record(data: bytes) -> Record:
    """JSON in UTF-8 -> a record; ValueError."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not a text file in UTF-8, and so no replay file") from None
    if holds_more(text, MOST_VALUES):
        raise ValueError(f"it holds more than {MOST_VALUES} values: it is no replay file")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON, and so no replay file") from None
    return checked_record(value)


def checked_record(value: Any) -> Record:
    """The JSON value of a record -> a record; ValueError says what is wrong with it."""
    form = value.get("format") if isinstance(value, dict) else None
    if form != FORMAT:
        raise ValueError(f"a record must have the format {FORMAT}, got {form!r:.80}")
    _keys("the record", value, needed=KEYS, allowed=KEYS | set(MADE_BY))
    if value["policy"] not in get_args(PolicyKind):
        raise ValueError(f"policy must be one of {', '.join(get_args(PolicyKind))}, got {value['policy']!r:.80}")
    chunks = Whole(0, MOST_CHUNKS).read("chunks", value["chunks"])
    pixels = _Pixels()
    return Record(
        Text().read("model", value["model"]),
        value["policy"],
        _options(value["options"], pixels),
        _commands(value["commands"], chunks, pixels),
        chunks,
        {key: Text().read(key, value[key]) for key in MADE_BY if key in value},
    )


def _options(value: Any, pixels: _Pixels) -> Options:
    _keys("options", value, needed={"prompt"}, allowed={one.name for one in values.parameters(Options)})
    given = {key: item for key, item in value.items() if item is not None or key == "prompt"}
    return values.read(Options, given, what="options", picture=pixels.unpack)


def _commands(value: Any, chunks: int, pixels: _Pixels) -> tuple[Recorded, ...]:
    if not isinstance(value, list) or len(value) > MAX_COMMANDS + 1:  # a full one can still let go of keys
        raise ValueError(f"commands must be a list of at most {MAX_COMMANDS}")
    found: list[Recorded] = []
    for index, entry in enumerate(value):
        try:
            _keys("it", entry, needed={"at", "name", "arguments"}, allowed={"at", "name", "arguments", "number"})
            at = Whole(found[-1].at if found else 0, chunks).read("at", entry["at"])
            arguments = entry["arguments"]
            if not isinstance(arguments, dict):
                raise ValueError(f"arguments must be an object, got {arguments!r:.80}")
            command = parse({**arguments, "name": entry["name"]}, picture=pixels.unpack)
            if isinstance(command, Close) and at < chunks:
                raise ValueError(f"it closes the session at chunk {at} of {chunks}")
        except ValueError as error:
            raise ValueError(f"command {index + 1}: {error}") from None
        found.append(Recorded(at, command))
    return tuple(found)


def _keys(what: str, value: Any, *, needed: set[str], allowed: set[str]) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{what} must be an object, got {value!r:.80}")
    if missing := sorted(needed - value.keys()):
        raise ValueError(f"{what} is not complete: {missing[0]} is missing")
    if unknown := sorted(value.keys() - allowed):
        raise ValueError(f"{what} holds {unknown[0]!r:.80}, which is not known; there are {', '.join(sorted(allowed))}")


# ---- pictures -------------------------------------------------------------------------------------------------------


class _Pixels:
    """Unpacks the pictures of one record, which are few and not large."""

    def __init__(self) -> None:
        self.pictures = self.pixels = 0

    def unpack(self, packed: Any) -> Tensor:
        """-> (H,W,3) uint8"""
        _keys("a picture", packed, needed={"height", "width", "zlib"}, allowed={"height", "width", "zlib"})
        height, width = (Whole(1, 1 << 14).read(side, packed[side]) for side in ("height", "width"))
        self.pictures, self.pixels = self.pictures + 1, self.pixels + height * width
        if self.pictures > MAX_PICTURES + 1 or self.pixels > MOST_PIXELS:
            raise ValueError(f"a record holds at most {MAX_PICTURES + 1} pictures of {MOST_PIXELS} pixels together")
        size = height * width * 3
        try:
            data = _inflate(base64.b64decode(packed["zlib"], validate=True), size)
        except (ValueError, TypeError, zlib.error) as error:
            raise ValueError(f"the record's picture cannot be read: {error}") from None
        if len(data) != size:
            raise ValueError(f"the record's picture must have {size} bytes, got {len(data)}")
        return torch.frombuffer(data, dtype=torch.uint8).view(height, width, 3)


def _inflate(packed: bytes, most: int) -> bytearray:
    """At most so many bytes of compressed data, and little more of them in memory than once."""
    stream, data = zlib.decompressobj(), bytearray()
    for start in range(0, len(packed), 1 << 14):
        data += stream.decompress(packed[start : start + (1 << 14)], most - len(data))
        if len(data) == most:  # 0 more would mean all
            break
    return data


def pack(picture: Tensor) -> dict[str, Any]:
    """(H,W,3) uint8 -> JSON"""
    data = base64.b64encode(zlib.compress(picture.contiguous().numpy().tobytes())).decode()
    return {"height": picture.shape[0], "width": picture.shape[1], "zlib": data}


def packed(given: dict[str, Any]) -> dict[str, Any]:
    """Arguments or options as JSON takes them."""
    return {key: pack(value) if isinstance(value, Tensor) else value for key, value in given.items()}
