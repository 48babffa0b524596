"""Values from outside, as annotations of a dataclass's fields: what reads, limits and describes them stands once.

A field is written `steps: Annotated[int, Whole(1, 100, "Denoising steps per chunk.")]`. `read` makes the dataclass of
names and values that came over a network, from a file or from a program, `typed` of words that were typed, and `schema`
describes it as JSON Schema does. A field with a default may be left out, and may be null where that default is None.
Errors are ValueErrors of one line.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

MOST_TEXT = 10_000
"""Characters of a prompt."""
MOST_NUMBERS = 64
"""Of what one frame is given in a field."""
LARGEST = 1e9
"""Of these numbers."""

Reads = Callable[[Any], "Tensor"]
"""A picture as it comes, such as base64 or a path -> (3,H,W) in [-1,1], or (H,W,3) uint8; ValueError."""
Read = TypeVar("Read")


class WrongKind(ValueError):
    """A value is missing, unknown, of another type or beyond its limits."""


class Kind:
    """What a value may be."""

    about: str
    """What it is for, in a line."""
    takes_rest: ClassVar[bool] = False
    """Whether typed words go on to the end of the line."""

    def read(self, name: str, value: Any) -> Any:
        """The value, checked; ValueError that names it."""
        raise NotImplementedError

    def typed(self, words: str) -> Any:
        """What typed words mean; words that mean nothing stay what they are, for `read` to refuse."""
        return words

    def schema(self) -> dict[str, Any]:
        """As JSON Schema describes it."""
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Kind):
    """Words for the model to read."""

    about: str = ""
    most: int = MOST_TEXT
    takes_rest: ClassVar[bool] = True

    def read(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            wrong = ValueError if isinstance(value, str) else WrongKind
            raise wrong(f"{name} must be a text that is not empty, got {shown(value)}")
        if len(value) > self.most:
            most, size = f"of at most {self.most} characters", f"of {len(value)} characters"
            raise WrongKind(f"{name} must be a text that is not empty, {most}, got {shown(value)} {size}")
        if any(0xD800 <= ord(letter) <= 0xDFFF or (ord(letter) < 32 and letter not in "\t\n\r") for letter in value):
            raise ValueError(f"{name} must be a text without control characters and halves of surrogate pairs")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, "maxLength": self.most}


@dataclass(frozen=True)
class Name(Kind):
    """A name of something that the model has."""

    about: str = ""

    def read(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not value.isidentifier() or len(value) > 80:
            raise WrongKind(f"{name} must be a name, got {shown(value)}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, "maxLength": 80}


@dataclass(frozen=True)
class Word(Kind):
    """A name of something that the user has, such as a file's: no spaces, nothing that cannot be printed."""

    about: str = ""

    def read(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= 80 or not value.isprintable() or " " in value:
            raise WrongKind(f"{name} must be a name without spaces, got {shown(value)}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1, "maxLength": 80}


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number, both ends included."""

    least: int
    most: int
    about: str = ""

    def read(self, name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not self.least <= value <= self.most:
            raise WrongKind(f"{name} must be a whole number from {self.least} to {self.most}, got {shown(value)}")
        return value

    def typed(self, words: str) -> Any:
        return _parsed(int, words)

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.least, "maximum": self.most}


@dataclass(frozen=True)
class Number(Kind):
    """A number, both ends included, or all but the lower one."""

    least: float
    most: float
    about: str = ""
    is_above: bool = False
    """Whether `least` itself is too little."""

    def read(self, name: str, value: Any) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and self.least <= value <= self.most
        if not is_number or (self.is_above and value == self.least):
            limits = "above {:g} and at most {:g}" if self.is_above else "from {:g} to {:g}"
            raise WrongKind(f"{name} must be a number {limits.format(self.least, self.most)}, got {shown(value)}")
        return float(value)

    def typed(self, words: str) -> Any:
        return _parsed(float, words)

    def schema(self) -> dict[str, Any]:
        least = "exclusiveMinimum" if self.is_above else "minimum"
        return {"type": "number", least: self.least, "maximum": self.most}


@dataclass(frozen=True)
class Choice(Kind):
    """One of several words."""

    words: tuple[str, ...]
    about: str = ""

    def read(self, name: str, value: Any) -> str:
        if value not in self.words:
            raise WrongKind(f"{name} must be one of {', '.join(self.words)}, got {shown(value)}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.words)}


@dataclass(frozen=True)
class Picture(Kind):
    """A picture; what `read` makes of it is (H,W,3) uint8, or None for no picture."""

    about: str = ""
    takes_rest: ClassVar[bool] = True

    def read(self, name: str, value: Any) -> Any:
        from torch import Tensor, uint8

        from causalreel.data.video import to_bytes

        is_bytes = isinstance(value, Tensor) and value.dtype == uint8 and value.ndim == 3 and value.shape[2] == 3
        if value is None or is_bytes:
            return value
        if not isinstance(value, Tensor) or value.ndim != 3 or value.shape[0] != 3 or not value.is_floating_point():
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise WrongKind(f"{name} must be a tensor (3,H,W) in [-1,1], got {got}")
        return to_bytes(value)[0]

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "contentEncoding": "base64"}, {"type": "null"}]}


@dataclass(frozen=True)
class Film(Kind):
    """A video file, in base64."""

    about: str = ""

    def read(self, name: str, value: Any) -> Any:
        if not isinstance(value, str) or not value:
            raise WrongKind(f"{name} must be a video file, in base64, got {shown(value)}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [{"type": "string", "contentEncoding": "base64"}, {"type": "null"}]}


@dataclass(frozen=True)
class Switch(Kind):
    """Yes or no."""

    about: str = ""

    def read(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise WrongKind(f"{name} must be true or false, got {shown(value)}")
        return value

    def typed(self, words: str) -> Any:
        return {"true": True, "false": False}.get(words, words)

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Words(Kind):
    """Some words, each once, in their order; typed, they stand side by side."""

    about: str = ""
    most: int = 32
    takes_rest: ClassVar[bool] = True

    def read(self, name: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or len(value) > self.most:
            raise WrongKind(f"{name} must be a list of at most {self.most} words, got {shown(value)}")
        return tuple(dict.fromkeys(Word().read(f"{name}[{place}]", word) for place, word in enumerate(value)))

    def typed(self, words: str) -> Any:
        return words.replace(",", " ").replace("+", " ").split()

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": Word().schema(), "maxItems": self.most}


@dataclass(frozen=True)
class Numbers(Kind):
    """What a frame is given in a field: a number, or numbers in lists of equal lengths."""

    about: str = ""
    most: int = MOST_NUMBERS
    takes_rest: ClassVar[bool] = True

    def read(self, name: str, value: Any) -> Any:
        value = value.tolist() if hasattr(value, "tolist") else value
        if _shape(value, self.most) is None or count(value) > self.most:
            raise WrongKind(
                f"{name} must be a number, or at most {self.most} in lists of equal lengths, from {-LARGEST:g} to "
                f"{LARGEST:g}; got {shown(value)}"
            )
        return value

    def typed(self, words: str) -> Any:
        return _parsed(json.loads, words)

    def schema(self) -> dict[str, Any]:
        return {"type": ["number", "array"]}


@dataclass(frozen=True)
class NumbersByName(Kind):
    """The fields that a stream begins with: name -> what a frame is given."""

    about: str = ""

    def typed(self, words: str) -> Any:
        return _parsed(json.loads, words)

    def read(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, Mapping) or len(value) > MOST_NUMBERS:
            raise WrongKind(f"{name} must be an object with a value for each field, got {shown(value)}")
        return {Name().read(name, key): Numbers().read(f"{name}.{key}", item) for key, item in value.items()}

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": Numbers().schema()}


# ---- dataclasses of them ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameter:
    """A field of a dataclass whose annotation says what its value may be."""

    name: str
    kind: Kind
    default: Any
    """`dataclasses.MISSING` for what must be given."""

    @property
    def is_needed(self) -> bool:
        return self.default is dataclasses.MISSING


@functools.lru_cache(maxsize=256)
def parameters(cls: type) -> tuple[Parameter, ...]:
    """The fields of a dataclass in order."""
    hints, found = typing.get_type_hints(cls, include_extras=True), []
    for field in dataclasses.fields(cls):
        kind = next(extra for extra in hints[field.name].__metadata__ if isinstance(extra, Kind))
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found.append(Parameter(field.name, kind, default))
    return tuple(found)


def read(cls: type[Read], given: Mapping[str, Any], *, what: str, picture: Reads | None = None) -> Read:
    """The dataclass of these names and values; what: who takes them, for the message. picture: reads one as it comes,
    which takes a while and is done when all else is right; None: it is a tensor."""
    known = parameters(cls)
    names = [one.name for one in known]
    if unknown := [name for name in given if name not in names]:
        raise _unknown(cls, unknown[0], what)
    values: dict[str, Any] = {}
    for one in sorted(known, key=lambda one: isinstance(one.kind, Picture)):
        value = given.get(one.name)
        if value is None and (one.default is None or (one.name not in given and not one.is_needed)):
            continue
        if one.name not in given and isinstance(one.kind, Picture):
            raise WrongKind(f"{what} needs the argument {one.name}: a picture, or None to begin without")
        if isinstance(one.kind, Picture) and picture is not None and value is not None:
            value = picture(value)
        values[one.name] = one.kind.read(one.name, value)
    return cls(**values)


def typed(cls: type, words: str, *, what: str) -> dict[str, Any]:
    """What words that were typed give the fields in turn; a text takes all that is left. ValueError for more."""
    found: dict[str, Any] = {}
    words = words.strip()
    for one in parameters(cls):
        if not words:
            break
        word, _, rest = (words, "", "") if one.kind.takes_rest else words.partition(" ")
        found[one.name], words = one.kind.typed(word), rest.strip()
    if words:
        raise _unknown(cls, words, what)
    return found


def schema(cls: type) -> dict[str, Any]:
    """A JSON Schema of the fields: properties, and those of them that must be given."""
    properties: dict[str, Any] = {}
    for one in parameters(cls):
        described = one.kind.schema()
        if one.default is None and "anyOf" not in described:
            described = {"anyOf": [described, {"type": "null"}]}
        more = {} if one.is_needed else {"default": one.default}
        properties[one.name] = described | more | ({"description": one.kind.about} if one.kind.about else {})
    needed = [one.name for one in parameters(cls) if one.is_needed]
    return {"type": "object", "properties": properties, "additionalProperties": False} | (
        {"required": needed} if needed else {}
    )


def _unknown(cls: type, got: str, what: str) -> WrongKind:
    names = ", ".join(one.name for one in parameters(cls))
    return WrongKind(f"{what} takes {names or 'no arguments'}; got {got!r:.80}")


def _parsed(parse: Callable[[str], Any], words: str) -> Any:
    try:
        return parse(words)
    except (ValueError, RecursionError):
        return words


def _shape(value: Any, most: int, levels: int = 4) -> tuple[int, ...] | None:
    """The shape of at most so many numbers in nested lists; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return () if -LARGEST <= value <= LARGEST else None
    if not isinstance(value, list | tuple) or not 0 < len(value) <= most or levels == 0:
        return None
    inner = {_shape(item, most, levels - 1) for item in value}
    below = inner.pop()
    return None if inner or below is None else (len(value), *below)


def count(value: Any) -> int:
    """How many values nested lists hold."""
    return sum(map(count, value)) if isinstance(value, list | tuple) else 1


def shown(value: Any) -> str:
    """A value in a message; Python refuses to print whole numbers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 1 << 80:
        return f"a number of {value.bit_length()} bits"
    try:
        return f"{value!r:.80}"
    except RecursionError:
        return "lists in lists"
