"""What goes over the wire: requests and commands as checked models, chunks as binary messages, and their JSON kin.

A binary message is one chunk: 4 bytes, big endian, with the length of a JSON header; the header; then the payloads one
behind the other, whose sizes the header names. Text messages are JSON both ways. WebSocket and WebRTC's data channel
speak the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from causalreel.foreign import parse_json
from causalreel.infer.commands import CHUNK, MOST_VALUES, SEED, STEPS, STRENGTH, Options
from causalreel.infer.values import Choice, Film, Picture, Switch, Text, Whole
from causalreel.serve.handle import Pace

if TYPE_CHECKING:
    from causalreel.serve.emitted import Applied, Emitted

Format = Literal["jpeg", "webp", "h264"]
HEAD = 4
"""Bytes of the length of a header."""


@dataclass(frozen=True, eq=False)
class SessionRequest(Options):
    """A session to open. What is left out is the model's own."""

    pace: Annotated[Pace, Choice(get_args(Pace), "As fast as it is shown, or as fast as it is made.")] = "realtime"
    video: Annotated[Any, Film("A video file that the session is made of, and ends with.")] = None
    """Base64."""
    camera: Annotated[bool, Switch("Make it of frames that are sent while it goes on; the latest count.")] = False
    strength: Annotated[float | None, STRENGTH] = None
    """Of either; None: 0.6."""


@dataclass(frozen=True, eq=False)
class VideoRequest:
    """A video to make, as `causalreel generate` would."""

    prompt: Annotated[str, Text("What to show.")]
    seed: Annotated[int, SEED] = 0
    frames: Annotated[int | None, Whole(1, 1_000_000, "Pixel frames; left out: as many as a training clip.")] = None
    steps: Annotated[int | None, STEPS] = None
    chunk: Annotated[int | None, CHUNK] = None
    image: Annotated[Any, Picture("First picture, for frame-wise models.")] = None
    """(H,W,3) uint8."""


class EndView(BaseModel):
    """How a session ended."""

    reason: str
    is_error: bool


class SessionView(BaseModel):
    """A session as the API shows it."""

    id: str
    stream: str
    state: dict[str, Any]
    ended: EndView | None = None


class ReplayView(SessionView):
    """A session that plays a record again."""

    notes: list[str]
    """Why its frames may differ from those recorded: another version, device, model."""


class ReadyView(BaseModel):
    """Whether sessions can be opened."""

    ready: bool
    free_sessions: int


class CommandView(BaseModel):
    """A live command."""

    name: str
    about: str
    typed: str
    """How it is written in a line of text."""
    arguments: dict[str, Any]
    """As JSON Schema has them."""


class ControlView(BaseModel):
    """The keys of a model that is steered by them."""

    keys: list[list[str]]
    """By group: of those of one group that are held, the one pressed last counts."""
    motions: dict[str, list[float]]
    """What each does in a latent frame, in steps and turns: forward, right, down, turn right, look up."""
    step: float
    degrees: float
    latent_frames_per_s: float
    """How often the keys that are held count."""
    has_camera: bool
    """Whether it takes poses (the command camera)."""


class ModelView(BaseModel):
    """The model that this server runs."""

    name: str
    width: int
    height: int
    fps: float
    takes_picture: bool
    """Whether a session can begin with a picture."""
    loras: dict[str, float]
    """LoRAs that it was loaded with, and how much each counts now."""
    examples: list[str]
    """Prompts to begin with."""
    words: dict[str, list[str]] | None
    """All words that its prompts may use, by what they describe; null: any text."""
    synonyms: dict[str, str]
    """Other spellings of these words."""
    mode: str
    """How another prompt is taken where `mode` is not said."""
    changes: bool
    """Whether another prompt changes a video that plays; where not, it wants a restart."""
    fields: list[str]
    """Fields of its conditioning: what a session may begin with and change by the command field."""
    control: ControlView | None
    """Its keys; null: prompts alone steer it."""
    commands: list[CommandView]
    """What a session can be told."""


class Record(BaseModel):
    """What `GET /v1/sessions/{session_id}/record` gives."""

    model_config = ConfigDict(extra="allow")

    format: str
    model: str
    policy: str
    options: dict[str, Any]
    commands: list[dict[str, Any]]
    chunks: int


class SessionList(BaseModel):
    """All sessions."""

    object: Literal["list"] = "list"
    data: list[SessionView]


class CommandTaken(BaseModel):
    """A command that was taken; it is in force when a chunk tells its number."""

    number: int
    state: dict[str, Any]


class VideoError(BaseModel):
    """Why a video was not made."""

    code: str
    message: str


class VideoView(BaseModel):
    """A video job: status, and when it is completed, how large it is."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed", "cancelled", "interrupted"]
    progress: Annotated[int, Field(ge=0, le=100)]
    created_at: int
    started_at: int | None = None
    completed_at: int | None = None
    prompt: str
    seed: int
    frames: int
    fps: float
    size: str
    steps: int | None = None
    chunk: int | None = None
    bytes: int | None = None
    error: VideoError | None = None


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[VideoView]
    has_more: bool


class Deleted(BaseModel):
    """What is no longer there."""

    id: str
    deleted: Literal[True] = True


class ErrorDetail(BaseModel):
    """A code for programs, a message for people."""

    code: str
    message: str


class ErrorView(BaseModel):
    """Every answer that is an error."""

    error: ErrorDetail


def explain(error: Any) -> str:
    """What a ValidationError finds wrong with a request, without the values it held: secret, huge, not encodable."""
    parts = []
    for detail in error.errors()[:5]:
        where = ".".join(str(place)[:40] for place in detail["loc"]) or "request"
        parts.append(f"{where}: {detail['msg']}")
    return "; ".join(parts).encode("ascii", "backslashreplace").decode("ascii")


def parse_message(text: str | bytes) -> dict[str, Any]:
    """A client's text message -> its fields; ValueError for anything but a JSON object with a type."""
    if isinstance(text, bytes):
        raise ValueError("messages must be text with JSON, got bytes; frames are for sessions opened with camera: true")
    message = parse_json(text, "the message", items=MOST_VALUES)
    if not isinstance(message.get("type"), str):
        raise ValueError("messages must be objects with a type")
    return message


def dumps(message: dict[str, Any]) -> str:
    """A text message; ASCII, and without NaN, which JavaScript does not read."""
    return json.dumps(plain(message), allow_nan=False, separators=(",", ":"))


def plain(value: Any) -> Any:
    """The value as JSON can hold it; tensors are left to the record."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Tensor):
        return f"tensor {'x'.join(map(str, value.shape))}"
    if isinstance(value, float) and value - value != 0:  # infinite or not a number
        return None
    return value


def applied(command: Applied) -> dict[str, Any]:
    """A command that took effect, as the header of a chunk tells it."""
    return {
        "number": command.number,
        "name": command.name,
        "chunk": command.chunk,
        "frame": command.frame,
        "latency_s": command.latency_s,
    }


def steered(emitted: Emitted) -> dict[str, Any]:
    """The keys held while a chunk was made, and its camera: x, y, z, yaw and pitch a latent frame."""
    camera = [[one.x, one.y, one.z, one.yaw, one.pitch] for one in emitted.camera]
    return {"keys": list(emitted.keys), "camera": camera}


def pack(emitted: Emitted, payloads: list[bytes], *, form: str, fps: float, keyframe: bool, encode_s: float) -> bytes:
    """A chunk and its encoded frames -> a binary message."""
    timings = emitted.timings
    header = {
        "type": "chunk",
        "sequence": emitted.sequence,
        "first_frame": emitted.first_frame,
        "frames": len(emitted.frames),
        "fps": fps,
        "prompt": emitted.prompt,
        "format": form,
        "sizes": [len(payload) for payload in payloads],
        "keyframe": keyframe,
        "timings": {
            "denoise_s": timings.denoise_s,
            "decode_s": timings.decode_s,
            "encode_s": encode_s,
            "queue_s": timings.queue_s,
        },
        "commands": [applied(command) for command in emitted.commands],
        **steered(emitted),
    }
    coded = dumps(header).encode("ascii")
    return b"".join([len(coded).to_bytes(HEAD, "big"), coded, *payloads])


def unpack(message: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """A binary message -> its header and payloads; ValueError if they do not fill it exactly."""
    length = int.from_bytes(message[:HEAD], "big")
    if len(message) < HEAD + length:
        raise ValueError(f"message must hold a header of {length} bytes, got {len(message) - HEAD}")
    header = json.loads(message[HEAD : HEAD + length])
    payloads, at = [], HEAD + length
    for size in header["sizes"]:
        payloads.append(message[at : at + size])
        at += size
    if at != len(message):
        raise ValueError(f"payloads must fill the message: {at} of {len(message)} bytes")
    return header, payloads
