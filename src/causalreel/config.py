"""Typed frozen dataclasses <-> YAML, with `extends:`, dotted overrides and strict keys.

YAML holds only differences from the defaults of the dataclass and from the file it extends. Nothing is read with a
fallback: an unknown key is an error that names the nearest valid one. `load(dump(config))` gives `config` again.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from causalreel.foreign import read_text, shown

T = TypeVar("T")

FREE: Mapping[str, bool] = types.MappingProxyType({"free": True})
"""Metadata of a field that may change between a run and its resumption: `field(default=..., metadata=FREE)`."""

MASK = "mask"
"""Key of metadata: a function of a field's value that gives what `dump` and `to_dict` say in its place."""


NODES, DEPTH, FILES = 20_000, 40, 64
"""Limits of what is read: values of a file, levels of nesting, files with all those that they extend."""


# ------------------------------------------------------------------------------------------------------------ reading


def load(path: str | Path, cls: type[T], overrides: Sequence[str] = (), *, alone: bool = False) -> T:
    """Read a YAML file (with the files it extends) and `key.key=value` overrides into `cls`.

    alone: the file is a stranger's and may not extend others.
    """
    try:
        return build(cls, read(path, overrides, alone=alone))
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def loads(text: str, cls: type[T], overrides: Sequence[str] = ()) -> T:
    """Read YAML text, which cannot extend a file, and overrides into `cls`."""
    return build(cls, override(_mapping(parse(text, "the text"), "the text"), overrides))


def read(path: str | Path, overrides: Sequence[str] = (), *, alone: bool = False) -> dict[str, Any]:
    """The merged mapping of a YAML file, the files it extends and the overrides; not yet checked against a class."""
    return override(_read(Path(path), (), [0], alone), overrides)


def _read(path: Path, above: tuple[Path, ...], count: list[int], alone: bool) -> dict[str, Any]:
    """above: the files whose `extends` led here; count: of files read so far."""
    if path.resolve() in above:
        raise ValueError(f"extends: {path} extends itself, by way of {' -> '.join(p.name for p in above)}")
    if not path.is_file():
        wanted_by = f", which {above[-1]} extends" if above else ""
        raise ValueError(f"config: no file {path}{wanted_by}")
    count[0] += 1
    if count[0] > FILES:
        raise ValueError(f"extends: {path} and what it extends are more than {FILES} files")
    content = _mapping(parse(read_text(path, what="config"), str(path)), str(path))
    parents = content.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        raise ValueError(f"{path}: extends: got {_describe(parents)}, expected the name of a file, or a list of them")
    if parents and alone:
        raise ValueError(f"{path}: extends: this file stands for itself and cannot extend '{shown(parents[0])}'")
    merged: dict[str, Any] = {}
    for parent in parents:
        if Path(parent).suffix not in (".yaml", ".yml"):
            raise ValueError(f"{path}: extends: got '{shown(parent)}', expected the name of a .yaml file")
        merged = merge(merged, _read(path.parent / parent, (*above, path.resolve()), count, alone))
    return merge(merged, content)


def parse(text: str, place: str) -> Any:
    """YAML text -> plain values, within `NODES` and `DEPTH`; ValueError in one line."""
    return copy.deepcopy(_parsed(text, place))


@functools.lru_cache(maxsize=32)
def _parsed(text: str, place: str) -> Any:
    """The same, to be left as it is: a model's config is asked for several times, and parsing it takes milliseconds."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{place} is not YAML: {shown(' '.join(str(error).split()), 300)}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:  # of a tag's own reading
        raise ValueError(f"{place} is not YAML: {shown(str(error), 200)}") from None


class _Loader(yaml.SafeLoader):
    """Plain values only, a bounded number of them: what an alias repeats counts each time."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._nodes, self._level = 0, 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        before, mark = self._nodes, self.peek_event().start_mark
        self._level += 1
        if self.check_event(yaml.AliasEvent):
            node = super().compose_node(parent, index)
            self._nodes += self._sizes.get(id(node), NODES + 1)  # a node within itself has no size yet
        else:
            self._nodes += 1
            node = super().compose_node(parent, index) if self._level <= DEPTH else None
            self._sizes[id(node)] = self._nodes - before
        self._level -= 1
        if node is None or self._nodes > NODES:
            raise yaml.MarkedYAMLError(None, None, f"more than {NODES} values or {DEPTH} levels", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Each key once, and no merge keys: the library gives a mapping that was merged twice the wrong values."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                told = "merge keys (<<) are not read here; `extends` lays one file upon another"
                raise yaml.MarkedYAMLError(None, None, told, key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
                seen.add(key.value)
        return node


def _mapping(content: Any, place: str) -> dict[str, Any]:
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{place}: got {_describe(content)}, expected a mapping")
    return content


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid upon it: mappings merge key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def override(content: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`content` with each `key.key=value` laid upon it; the value is YAML."""
    merged = dict(content)
    for text in overrides:
        key, equals, value = text.partition("=")
        names = key.strip().split(".")
        if not equals or not all(names):
            raise ValueError(f"override: got '{shown(text)}', expected key=value or key.key=value")
        try:
            parsed: Any = parse(value, "it")
        except ValueError:
            raise ValueError(f"override {key}: '{shown(value)}' is not a YAML value") from None
        for name in reversed(names):
            parsed = {name: parsed}
        merged = merge(merged, parsed)
    return merged


# ----------------------------------------------------------------------------------------------------------- building


def build(cls: type[T], content: Mapping[str, Any], place: str = "") -> T:
    """An instance of the dataclass `cls` from plain YAML values, checked strictly; `place` starts its messages."""
    kinds = _field_types(cls)
    for key in content:
        if key not in kinds:
            raise ValueError(_unknown(str(key), kinds, place))
    values = {key: _convert(value, kinds[key], _join(place, key)) for key, value in content.items()}
    missing = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in values and _is_required(f)]  # type: ignore[arg-type]
    if missing:
        raise ValueError(f"{_at(place)}{missing[0]!r} is missing; it has no default")
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{_at(place)}{error}") from None


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"cls: got {cls!r}, expected a dataclass")
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _unknown(key: str, allowed: Iterable[str], place: str) -> str:
    allowed = sorted(allowed)
    near = difflib.get_close_matches(key[:60], allowed, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"unknown key '{shown(key)}' in {place or 'the top level'}{hint} allowed: {', '.join(allowed) or 'none'}"


def _convert(value: Any, kind: Any, place: str) -> Any:
    """`value` from YAML as an instance of the annotation `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, place)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            raise _mismatch(place, " | ".join(map(repr, arguments)), value)
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise _mismatch(place, f"a mapping with the keys of {kind.__name__}", value)
        return build(kind, value, place)
    container = origin or kind
    if container is tuple:
        return _convert_tuple(value, arguments, place)
    if container in (list, Sequence):
        item = arguments[0] if arguments else Any
        items = (_convert(entry, item, f"{place}[{i}]") for i, entry in enumerate(_items(value, place)))
        return list(items) if container is list else tuple(items)
    if container in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise _mismatch(place, "a mapping", value)
        key_kind, item = arguments or (Any, Any)
        return {_convert(k, key_kind, _join(place, k)): _convert(v, item, _join(place, k)) for k, v in value.items()}
    return _convert_scalar(value, kind, place)


def _convert_tuple(value: Any, kinds: tuple[Any, ...], place: str) -> tuple[Any, ...]:
    values = _items(value, place)
    if not kinds:
        return tuple(values)
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(values)
    if len(kinds) != len(values):
        raise ValueError(f"{place}: got {len(values)} values, expected {len(kinds)}")
    return tuple(_convert(v, kind, f"{place}[{i}]") for i, (v, kind) in enumerate(zip(values, kinds, strict=True)))


def _items(value: Any, place: str) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise _mismatch(place, "a list", value)
    return value


def _convert_scalar(value: Any, kind: Any, place: str) -> Any:
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 2e-6, which has no point, as text
        try:
            value = float(value)
        except ValueError:
            raise _mismatch(place, "float", value) from None
    if kind is float and isinstance(value, float) and math.isnan(value):
        raise _mismatch(place, "a number", value)
    if type(value) is int and abs(value) >= 2**1000:  # neither a float nor printed
        raise ValueError(f"{place}: got a whole number of {value.bit_length()} bits")
    if kind is float and type(value) is int:
        return float(value)
    if kind is type(None) or kind is None:
        if value is None:
            return None
    elif kind not in (str, int, float, bool, Path):
        raise TypeError(f"{place}: fields of type {kind!r} cannot be read from YAML")
    elif type(value) is kind:
        return value
    raise _mismatch(place, getattr(kind, "__name__", str(kind)), value)


def _convert_union(value: Any, kinds: tuple[Any, ...], place: str) -> Any:
    """The first member that fits: those of exactly the value's type before those that convert it."""
    if value is None and type(None) in kinds:
        return None
    members = [kind for kind in kinds if kind is not type(None)]
    structures: list[Any] = [kind for kind in members if dataclasses.is_dataclass(kind)]
    if isinstance(value, Mapping) and len(structures) > 1:
        return build(_choose(value, structures, place), value, place)
    nested = [kind for kind in members if kind in structures or typing.get_origin(kind) not in (None, Literal)]
    if len(members) == 1 or (isinstance(value, (Mapping, list)) and len(nested) == 1):
        return _convert(value, (nested or members)[0], place)
    for kind in sorted(members, key=lambda kind: type(value) is not kind):
        try:
            return _convert(value, kind, place)
        except ValueError:
            continue
    raise _mismatch(place, " | ".join(getattr(kind, "__name__", str(kind)) for kind in kinds), value)


def _choose(value: Mapping[str, Any], candidates: Sequence[type], place: str) -> type:
    """The dataclass whose Literal fields (its tag, such as `kind: Literal["dmd"] = "dmd"`) agree with `value`; the one
    that has none where `value` has no tag."""
    tags: dict[str, list[Any]] = {}
    fitting: list[type] = []
    plain: list[type] = []
    for cls in candidates:
        literals = {k: typing.get_args(t) for k, t in _field_types(cls).items() if typing.get_origin(t) is Literal}
        for key, choices in literals.items():
            tags.setdefault(key, []).extend(choices)
        if literals and all(key in value and value[key] in choices for key, choices in literals.items()):
            fitting.append(cls)
        if not literals:
            plain.append(cls)
    if not fitting and not tags.keys() & value.keys():  # the one without a tag, if there is one
        fitting = plain
    if len(fitting) != 1:
        expected = "; ".join(f"{key}: {' | '.join(map(repr, dict.fromkeys(c)))}" for key, c in tags.items())
        raise ValueError(f"{place}: one key must choose the variant: {expected or 'none of them has a tag'}")
    return fitting[0]


def _mismatch(place: str, expected: str, value: Any) -> ValueError:
    hint = (
        "; on, off, yes and no are booleans in YAML, quote them" if isinstance(value, bool) and "'" in expected else ""
    )
    return ValueError(f"{place}: got {_describe(value)}, expected {expected}{hint}")


def _describe(value: Any) -> str:
    return (
        "null"
        if value is None
        else f"{shown(value if not isinstance(value, str) else repr(value), 80)} ({type(value).__name__})"
    )


def _join(place: str, key: Any) -> str:
    return f"{place}.{shown(key, 60)}" if place else shown(key, 60)


def _at(place: str) -> str:
    return f"{place}: " if place else ""


# ------------------------------------------------------------------------------------------------------------ writing


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain YAML values, every field written out, but for what `MASK` hides."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"config: got {config!r}, expected an instance of a dataclass")
    fields = (field for field in dataclasses.fields(config) if field.init)
    return {field.name: _plain(field.metadata.get(MASK, _same)(getattr(config, field.name))) for field in fields}


def _same(value: Any) -> Any:
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def dump(config: Any) -> str:
    """The config as YAML text with every field, in the order of the dataclass."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Short lists of scalars on one line; no anchors for objects that occur twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_list(self, data: Any) -> yaml.SequenceNode:
        is_flat = not any(isinstance(item, (list, dict)) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=is_flat)

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Line breaks of Unicode survive only as escapes, which only double quotes have."""
        style = '"' if set(data) & set("\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_str)


# ---------------------------------------------------------------------------------------------------------- comparing


def fixed(config: Any) -> dict[str, Any]:
    """The fields that must not change when a run is resumed, as {"dotted.key": plain value}; see `FREE`."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.init and not field.metadata.get("free"):
            found.update(_fixed(getattr(config, field.name), field.name))
    return found


def defaults(config: Any, known: Iterable[str], place: str = "") -> dict[str, Any]:
    """Of what `fixed` gives, the values of fields that are not set: what a run had before a field was known.

    known: keys that the run had, below `place`. An entry of a mapping of which it had none, such as the adapters of a
    role, is not older than its fields: it was not there, and has no defaults.
    """
    known = tuple(known)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if not field.init or field.metadata.get("free"):
            continue
        value = getattr(config, field.name)
        entries = value if isinstance(value, Mapping) else {"": value}
        for name, entry in entries.items():
            if dataclasses.is_dataclass(entry) and field.default is not None:
                below = _join(field.name, name) if name else field.name
                whole = _join(place, below)
                if not name or any(key.startswith(f"{whole}.") for key in known):
                    found |= {_join(below, key): item for key, item in defaults(entry, known, whole).items()}
        if field.default is not dataclasses.MISSING:
            found |= _fixed(field.default, field.name)
        elif field.default_factory is not dataclasses.MISSING:
            found |= _fixed(field.default_factory(), field.name)
    return found


def _fixed(value: Any, place: str) -> dict[str, Any]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {_join(place, key): item for key, item in fixed(value).items()}
    if isinstance(value, Mapping):
        return {key: item for name, entry in value.items() for key, item in _fixed(entry, _join(place, name)).items()}
    return {place: _plain(value)}
