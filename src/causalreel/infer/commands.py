"""Live commands: what a live video can be told while it plays.

A command is a frozen dataclass: its fields say what it takes and in which limits, its methods what it does. Entering it
in `COMMANDS` is all: HTTP, WebSocket, WebRTC, scripts, typed lines and Python make it by `parse`, records keep it, and
`describe` is what the API's document and the page say of it. Nothing here knows a network or a session.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from causalreel.control.strings import DIALECTS
from causalreel.foreign import parse_json
from causalreel.infer import values
from causalreel.infer.values import (
    Choice,
    Name,
    Number,
    Numbers,
    NumbersByName,
    Picture,
    Reads,
    Text,
    Whole,
    Word,
    Words,
)

if TYPE_CHECKING:
    from torch import Tensor

    from causalreel.infer.live_video import LiveVideo

Mode = Literal["switch", "recompute", "fade", "forget"]
MODES: tuple[str, ...] = get_args(Mode)

MOST_CAMERA = 4096
"""Numbers of the poses of a command: 256 poses."""
MOST_CHUNKS = 1000
"""Of a step or a fade."""
MOST_VALUES = 8192
"""Of a command's JSON."""
SEED = Whole(0, (1 << 53) - 1, "Of the noise, and of what a prompt leaves open; exact in JavaScript too.")
STEPS = Whole(1, 100, "Denoising steps per chunk.")
STRENGTH = Number(
    0, 1, "Noise level at which chunks of a given video begin; at 1 nothing of it is left.", is_above=True
)
RATE = Number(0.1, 240.0, "Pixel frames per second of playing; does not change the frames.")
CHUNK = Whole(1, 1 << 16, "Latent frames made together; the model says how many there can be.")


@dataclass(frozen=True, eq=False)
class Options:
    """How a live video begins."""

    prompt: Annotated[str, Text("What to show first.")]
    seed: Annotated[int, SEED] = 0
    steps: Annotated[int | None, STEPS] = None
    """None: the model's."""
    chunk: Annotated[int | None, CHUNK] = None
    """None: the model's."""
    fps: Annotated[float | None, RATE] = None
    """None: the model's."""
    image: Annotated[Any, Picture("First picture, for frame-wise models.")] = None
    """(3,H,W) in [-1,1], whose values are rounded to 8 bits, or (H,W,3) uint8."""
    fields: Annotated[Mapping[str, Any], NumbersByName("What the model's fields hold at first.")] = field(
        default_factory=dict
    )
    """Field of the conditioning -> its value for a frame: a number, or nested lists of them."""

    def checked(self) -> Options:
        """The same with every value read; ValueError."""
        given = {one.name: getattr(self, one.name) for one in values.parameters(Options)}
        return values.read(Options, given, what="a session")


@dataclass(frozen=True, eq=False)
class Scene:
    """What the words of a video are made of."""

    prompt: str
    seed: int
    picture: Tensor | None = None
    """(H,W,3) uint8 that it begins with."""
    said: str | None = None
    """The completed prompt that holds, which a change of it leaves as it is where it says nothing; None: at first."""


@dataclass(frozen=True)
class Command:
    """What every command is asked. A class of its own says `name` and what differs."""

    name: ClassVar[str]
    changes_frames: ClassVar[bool] = True
    """Whether frames depend on it, beyond when they are made."""
    is_always_taken: ClassVar[bool] = False
    """Whether it is taken however full a record is, which can do without it."""
    begins_again: ClassVar[bool] = False
    """Whether the video begins again from its first frame."""
    group: ClassVar[str] = ""
    """Commands of one group have an order; those of different groups do not know of each other. "": it is alone."""

    @property
    def side(self) -> str:
        """The name of its group."""
        return self.group or self.name

    def supersede(self, old: Command) -> Command | None:
        """What it comes to behind a command of its group at the same border, which then goes; None: both stay."""
        return self if old.name == self.name else None

    def check(self, video: LiveVideo) -> None:
        """ValueError if this model cannot obey it. What words mean is found out when they are encoded."""

    def suited(self, video: LiveVideo) -> Command:
        """The same with what it leaves to the model filled in."""
        return self

    def is_idle(self, video: LiveVideo) -> bool:
        """Whether it changes nothing, so that a record can do without it."""
        return False

    def scene(self, before: Scene) -> Scene | None:
        """The scene from now on, for which words are encoded; None: it stays as it is."""
        return None

    def apply(self, video: LiveVideo) -> None:
        """Take effect, between two chunks, when the scene is already the new one."""
        raise NotImplementedError

    def as_taken(self, video: LiveVideo) -> Command:
        """What a record says of it, when it has taken effect: with what came before it at the same border."""
        return self

    @property
    def arguments(self) -> dict[str, Any]:
        """Its fields by name."""
        return {one.name: getattr(self, one.name) for one in values.parameters(type(self))}

    @property
    def recorded(self) -> dict[str, Any]:
        """Its fields as a record has them."""
        return self.arguments

    @property
    def prompts(self) -> tuple[str, ...]:
        """What it gives the model to read."""
        texts = [one.name for one in values.parameters(type(self)) if isinstance(one.kind, Text)]
        return tuple(text for text in (getattr(self, name) for name in texts) if text is not None)

    @functools.cached_property  # a session asks all that it holds, at every command
    def entries(self) -> int:
        """How many numbers and words it holds in lists."""
        lists = (given for given in self.arguments.values() if isinstance(given, list | tuple))
        return sum(values.count(given) for given in lists if given)

    @functools.cached_property
    def letters(self) -> int:
        """How long its texts are in JSON, in which every letter is ASCII."""
        return sum(len(json.dumps(given)) for given in self.arguments.values() if isinstance(given, str))

    @property
    def is_release(self) -> bool:
        """Whether it lets go of all keys, for which a record always keeps room: nobody is left walking."""
        return False

    @property
    def picture(self) -> Tensor | None:
        """The picture that it holds, (H,W,3) uint8."""
        held = [one.name for one in values.parameters(type(self)) if isinstance(one.kind, Picture)]
        return getattr(self, held[0]) if held else None


@dataclass(frozen=True)
class Prompt(Command):
    """Another prompt: `switch` changes the text alone, `recompute` the context's too, `forget` leaves the end of
    the context alone, `fade` goes over in `chunks`."""

    name: ClassVar[str] = "prompt"
    group: ClassVar[str] = "scene"
    text: Annotated[str, Text("What to show.")]
    mode: Annotated[Mode | None, Choice(MODES, "How the old prompt goes; none: as suits the model.")] = None
    chunks: Annotated[int, Whole(1, MOST_CHUNKS, "Of a fade.")] = 4

    def supersede(self, old: Command) -> Command | None:
        if not isinstance(old, Prompt) or (self.mode == "fade" and old.mode != "fade"):
            return None
        begins_anew = old.mode in ("recompute", "forget") and self.mode in (None, "switch")  # a segment, in any case
        return replace(self, mode=old.mode) if begins_anew else self

    def suited(self, video: LiveVideo) -> Command:
        return self if self.mode else replace(self, mode=video.prompt_mode)

    def scene(self, before: Scene) -> Scene:
        return replace(before, prompt=self.text)

    def apply(self, video: LiveVideo) -> None:
        assert self.mode is not None
        video.read_prompt(self.mode, self.chunks)


@dataclass(frozen=True)
class _Course(Command):
    """What changes when chunks are made, and none of them."""

    changes_frames: ClassVar[bool] = False
    is_always_taken: ClassVar[bool] = True
    group: ClassVar[str] = "course"

    def supersede(self, old: Command) -> Command | None:
        return self


@dataclass(frozen=True)
class Pause(_Course):
    """Make no more chunks."""

    name: ClassVar[str] = "pause"

    def apply(self, video: LiveVideo) -> None:
        video.paused, video.to_step = True, 0


@dataclass(frozen=True)
class Resume(_Course):
    """Go on."""

    name: ClassVar[str] = "resume"

    def apply(self, video: LiveVideo) -> None:
        video.paused, video.to_step = False, 0


@dataclass(frozen=True)
class Step(_Course):
    """Make so many chunks of a paused video."""

    name: ClassVar[str] = "step"
    chunks: Annotated[int, Whole(1, MOST_CHUNKS, "How many.")] = 1

    def supersede(self, old: Command) -> Command | None:
        return Step(min(MOST_CHUNKS, self.chunks + old.chunks)) if isinstance(old, Step) else None

    def apply(self, video: LiveVideo) -> None:
        video.to_step = min(MOST_CHUNKS, video.to_step + self.chunks) if video.paused else 0


@dataclass(frozen=True)
class Restart(Command):
    """Begin again, with another seed or prompt if given, and with the first picture if there is one."""

    name: ClassVar[str] = "restart"
    begins_again: ClassVar[bool] = True
    group: ClassVar[str] = "scene"
    seed: Annotated[int | None, SEED] = None
    prompt: Annotated[str | None, Text("What to show.")] = None

    def supersede(self, old: Command) -> Command | None:
        if not isinstance(old, Restart):
            return None
        return Restart(old.seed if self.seed is None else self.seed, self.prompt or old.prompt)

    def scene(self, before: Scene) -> Scene:
        seed = before.seed if self.seed is None else self.seed
        return replace(before, prompt=self.prompt or before.prompt, seed=seed, said=None)

    def apply(self, video: LiveVideo) -> None:
        video.reset()


@dataclass(frozen=True)
class Steps(Command):
    """Denoising steps from now on."""

    name: ClassVar[str] = "steps"
    steps: Annotated[int, STEPS]

    def check(self, video: LiveVideo) -> None:
        video.sampling_of(self.steps)

    def apply(self, video: LiveVideo) -> None:
        video.resample(self.steps)


@dataclass(frozen=True)
class Strength(Command):
    """How much of the given video, or of the camera's, is made anew from now on: 1 keeps nothing of it."""

    name: ClassVar[str] = "strength"
    strength: Annotated[float, STRENGTH]

    def check(self, video: LiveVideo) -> None:
        video.check_strength()

    def apply(self, video: LiveVideo) -> None:
        video.set_strength(self.strength)


@dataclass(frozen=True)
class Rate(Command):
    """Frames per second of playing from now on."""

    name: ClassVar[str] = "fps"
    changes_frames: ClassVar[bool] = False
    fps: Annotated[float, RATE]

    def apply(self, video: LiveVideo) -> None:
        video.fps = self.fps


@dataclass(frozen=True, eq=False)
class Image(Command):
    """Begin again from a picture (frame-wise models), or from none if that is null."""

    name: ClassVar[str] = "image"
    begins_again: ClassVar[bool] = True
    group: ClassVar[str] = "scene"
    image: Annotated[Any, Picture("A PNG, JPEG or WebP file, in base64 or a data: URL; in scripts its path.")]

    def check(self, video: LiveVideo) -> None:
        if self.image is not None:
            video.check_picture(self.image)

    def scene(self, before: Scene) -> Scene:
        return replace(before, picture=self.image, said=None)

    def apply(self, video: LiveVideo) -> None:
        video.reset()


@dataclass(frozen=True)
class Field(Command):
    """What a field of the conditioning holds from now on, for models that have one; the latest counts."""

    name: ClassVar[str] = "field"
    field: Annotated[str, Name("Its name.")]
    value: Annotated[Any, Numbers("For every frame: a number or nested lists, in the shape that it began with.")]

    @property
    def side(self) -> str:
        return f"field {self.field}"

    def check(self, video: LiveVideo) -> None:
        video.check_field(self.field, self.value)

    def apply(self, video: LiveVideo) -> None:
        video.set_field(self.field, self.value)


@dataclass(frozen=True)
class Keys(Command):
    """The keys that are held from now on, in the order in which they were pressed; all others are released."""

    name: ClassVar[str] = "keys"
    group: ClassVar[str] = "camera"
    pressed: Annotated[tuple[str, ...], Words("Names of keys; none: nothing is held.")] = ()
    tapped: Annotated[tuple[str, ...], Words("Pressed and let go of since the last message; they count once.")] = ()

    @property
    def recorded(self) -> dict[str, Any]:
        return self.arguments if self.tapped else {"pressed": self.pressed}  # as earlier versions read it

    @property
    def is_release(self) -> bool:
        return not self.pressed and not self.tapped

    def supersede(self, old: Command) -> Command | None:
        return self if isinstance(old, Keys | Trajectory) else None

    def check(self, video: LiveVideo) -> None:
        video.check_keys((*self.pressed, *self.tapped))

    def is_idle(self, video: LiveVideo) -> bool:
        return video.holds(self.pressed, self.tapped)

    def apply(self, video: LiveVideo) -> None:
        video.press(self.pressed, self.tapped)

    def as_taken(self, video: LiveVideo) -> Keys:
        taken = Keys(*video.keys_down)
        return self if taken == self else taken


@dataclass(frozen=True)
class Trajectory(Command):
    """Move the camera by a trajectory string from where it is; then it stays. Keys that are held are released."""

    name: ClassVar[str] = "trajectory"
    group: ClassVar[str] = "camera"
    dialect: Annotated[str, Choice(tuple(DIALECTS), "Whose string it is.")]
    text: Annotated[str, Text("Such as w*8,l*4.")]

    def supersede(self, old: Command) -> Command | None:
        return self if isinstance(old, Keys | Trajectory) else None

    def check(self, video: LiveVideo) -> None:
        video.check_trajectory(self.text, self.dialect)

    def apply(self, video: LiveVideo) -> None:
        video.follow_string(self.text, self.dialect)


@dataclass(frozen=True)
class Camera(Command):
    """Where the camera is in the frames to come, a pose a latent frame; then it stays. Keys are released."""

    name: ClassVar[str] = "camera"
    group: ClassVar[str] = "camera"
    poses: Annotated[Any, Numbers("(4,4) or (N,4,4), in the axes of the video's first camera.", MOST_CAMERA)]
    convention: Annotated[str, Choice(("c2w", "w2c"), "World from camera, or its inverse.")] = "c2w"
    intrinsics: Annotated[Any, Numbers("fx fy cx cy, normalised by the image's size; null: as they are.")] = None

    def supersede(self, old: Command) -> Command | None:
        if isinstance(old, Camera):
            return self if self.intrinsics is not None or old.intrinsics is None else None
        return self if isinstance(old, Keys | Trajectory) else None

    def check(self, video: LiveVideo) -> None:
        video.check_poses(self.poses, self.convention, self.intrinsics)

    def apply(self, video: LiveVideo) -> None:
        video.follow_poses(self.poses, self.convention, self.intrinsics)


@dataclass(frozen=True)
class LoRA(Command):
    """The strength of a LoRA that the model was loaded with, 0 for without it; every session of the model changes."""

    name: ClassVar[str] = "lora"
    lora: Annotated[str, Word("Its name: its file's, without the suffix.")]
    strength: Annotated[float, Number(-100, 100, "How much it counts.")]

    @property
    def side(self) -> str:
        return f"lora {self.lora}"

    def check(self, video: LiveVideo) -> None:
        video.check_lora(self.lora, self.strength)

    def apply(self, video: LiveVideo) -> None:
        video.pipeline.set_loras({self.lora: self.strength})


@dataclass(frozen=True)
class Close(Command):
    """End it."""

    name: ClassVar[str] = "close"
    changes_frames: ClassVar[bool] = False
    is_always_taken: ClassVar[bool] = True

    def apply(self, video: LiveVideo) -> None:
        video.closed = True


COMMANDS: dict[str, type[Command]] = {
    kind.name: kind
    for kind in (
        Prompt,
        Pause,
        Resume,
        Step,
        Restart,
        Steps,
        Strength,
        Rate,
        Image,
        Keys,
        Trajectory,
        Camera,
        Field,
        LoRA,
        Close,
    )
}
"""Name -> the command. What is entered here is taken by every way in, and described."""


def parse(given: Mapping[str, Any], *, picture: Reads | None = None) -> Command:
    """A command of its name and arguments; ValueError. picture: reads one as it comes; None: it is a tensor.

    What depends on the model is the video's to check: words, steps of a many-step model, shape and use of a picture.
    """
    name = given.get("name")
    if not isinstance(name, str) or name not in COMMANDS:
        raise ValueError(f"name must be one of {', '.join(COMMANDS)}, got {values.shown(name)}")
    arguments = {key: value for key, value in given.items() if key != "name"}
    return values.read(COMMANDS[name], arguments, what=name, picture=picture)


def parse_line(line: str, *, picture: Reads | None = None) -> Command | None:
    """A typed line -> its command, None for an empty one; ValueError.

    A line is a prompt; /NAME and its arguments in turn (/step 3, /restart 7 a red circle); /switch, /recompute,
    /forget or /fade and a prompt; or, from { on, JSON as it is sent to a server.
    """
    line = line.strip()
    if not line:
        return None
    if line.startswith("{"):
        return parse(parse_json(line, "the line", items=MOST_VALUES), picture=picture)
    if not line.startswith("/"):
        return parse({"name": Prompt.name, "text": line})
    name, _, rest = line[1:].partition(" ")
    if name in MODES:
        return parse({"name": Prompt.name, "mode": name, "text": rest.strip()})
    given = values.typed(COMMANDS[name], rest, what=name) if name in COMMANDS else {}
    return parse({**given, "name": name}, picture=picture)


def describe() -> list[dict[str, Any]]:
    """Every command: name, what it does, how it is typed, and its arguments as JSON Schema has them."""
    found = []
    for name, kind in COMMANDS.items():
        words = []
        for one in values.parameters(kind):
            words.append(one.name.upper() if one.is_needed else f"[{one.name.upper()}]")
            if one.kind.takes_rest:
                break
        about = " ".join((kind.__doc__ or "").split())
        typed = " ".join([f"/{name}", *words])
        found.append({"name": name, "about": about, "typed": typed, "arguments": values.schema(kind)})
    return found
