"""Text and JSON from strangers: read within bounds, and shown in messages without their tricks.

Whatever is wrong is a ValueError in one short line; memory and time are bounded by the limits below, however the bytes
were made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TEXT_BYTES = 1 << 20
"""Of a config or another small text."""

JSON_BYTES = 16 << 20
"""Of an index of shards: one of 100,000 tensors takes as much."""

BLOCK = 1 << 20
"""Letters of a text that are looked at together."""
MARKS_OF_VALUES = tuple(b",[{")
MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def shown(value: object, most: int = 120) -> str:
    """A stranger's text for a message: control characters, line breaks and text directions as escapes, and shortened.

    What is no text is shown as its repr.
    """
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError, MemoryError):  # a number too long to be printed, a list in itself
        text = f"a {type(value).__name__}"
    if len(text) > most:
        text = f"{text[: most * 2 // 3]}...{text[len(text) - most // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def ordinary_file(path: str | os.PathLike[str], what: str) -> Path:
    """The path; ValueError if there is no file, or no ordinary one: a pipe or a device may never end."""
    path = Path(path)
    try:
        is_file, exists = path.is_file(), path.exists()
    except (OSError, ValueError) as error:  # a name that is too long, a zero byte in it
        raise ValueError(f"{what}: {shown(str(path))}: {getattr(error, 'strerror', None) or error}") from None
    if not is_file:
        told = "not found" if not exists else "is a folder" if path.is_dir() else "is no ordinary file"
        raise ValueError(f"{what} {told}: {shown(str(path), 400)}")
    return path


def read_text(path: str | os.PathLike[str], *, most: int = TEXT_BYTES, what: str = "text file") -> str:
    """A text file of at most `most` bytes in UTF-8, with or without a byte-order mark."""
    path = ordinary_file(path, what)
    with path.open("rb") as file:
        data = file.read(min(most, max(path.stat().st_size, 1 << 16)) + 1)  # as much is set aside as is asked for
    if len(data) > most:
        raise ValueError(f"{path} is too large for a {what}: more than {most:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        looks = MARKS.get(data[:2]) or ("UTF-16" if data[1:2] == b"\0" or data[:1] == b"\0" else None)
        hint = f"it looks like {looks}" if looks else f"byte {error.start} is {data[error.start]:#04x}"
        raise ValueError(f"{path} is not UTF-8 text ({hint}); a {what} is") from None


def read_json(path: str | os.PathLike[str], *, most: int = JSON_BYTES, what: str = "JSON file") -> dict[str, Any]:
    """A JSON file whose top level is an object; see `parse_json`."""
    return parse_json(read_text(path, most=most, what=what), str(path))


def parse_json(text: str, place: str, *, items: int = 1_000_000) -> dict[str, Any]:
    """JSON text with an object at the top, no name twice in one object and at most `items` values."""
    found = _parse(text, place, items)
    if not isinstance(found, dict):
        raise ValueError(f"{place} holds a {type(found).__name__}, a JSON object is expected")
    return found


def read_json_list(path: str | os.PathLike[str], *, what: str = "JSON file") -> list[Any]:
    """A JSON file whose top level is a list; bounded as `parse_json`."""
    found = _parse(read_text(path, most=JSON_BYTES, what=what), str(path), 1_000_000)
    if not isinstance(found, list):
        raise ValueError(f"{path} holds a {type(found).__name__}, a JSON list is expected")
    return found


def holds_more(text: str, items: int) -> bool:
    """Whether JSON text holds more than so many values, before it is parsed: by its marks outside of strings.

    Time is linear in the text, whatever it is.
    """
    if sum(map(text.count, ",[{")) <= items:
        return False
    import numpy as np

    bare, count, is_inside = text.replace("\\\\", "").replace('\\"', ""), 0, 0
    for start in range(0, len(bare), BLOCK):
        block = np.frombuffer(bare[start : start + BLOCK].encode("ascii", "replace"), np.uint8)
        inside = np.bitwise_xor.accumulate((block == ord('"')).astype(np.uint8)) ^ is_inside
        is_inside = int(inside[-1])
        count += int(np.isin(block[inside == 0], MARKS_OF_VALUES).sum())
    return count > items


def _parse(text: str, place: str, items: int) -> Any:
    if holds_more(text, items):
        raise ValueError(f"{place} has more than {items:,} values")
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{place} is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is no JSON: {error}") from None
    except ValueError as error:
        raise ValueError(f"{place}: {shown(str(error))}") from None


def text_of(found: Mapping[str, Any], key: str, place: str) -> Mapping[str, str]:
    """The object of texts under a key, such as an index's weight_map."""
    value = found.get(key)
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        got = f"it has no {key}" if value is None else f"{key} must be an object of texts, got {shown(value, 60)}"
        raise ValueError(f"{place}: {got}")
    return value


def number_of(found: Mapping[str, Any], key: str, place: str, kind: Callable[[Any], Any] = int) -> Any:
    """The positive number under a key, None where there is none or null."""
    value = found.get(key)
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value < 2**31 or kind(value) != value:
        raise ValueError(f"{place}: {key} must be a positive {kind.__name__}, got {shown(value, 60)}")
    return kind(value)


def file_in(folder: Path, name: str, place: str) -> Path:
    """The file of this plain name in a folder, as a list in that folder names it; ValueError if it leads out.

    Links may lead to files of the folder itself, and from a snapshot of the hub's cache to that cache's blobs.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\\0") or len(os.fsencode(name)) > 255:
        raise ValueError(f"{place} names '{shown(name)}', a plain name of a file beside it is expected")
    path = folder / name
    if path.is_symlink():
        home, end = folder.resolve(), path.resolve()
        snapshots = next((above for above in (home, *home.parents) if above.name == "snapshots"), None)
        allowed = [home] if snapshots is None else [home, snapshots.parent / "blobs"]
        if end.parent not in allowed:
            raise ValueError(
                f"{place} names {name!r}, a link that leads out of {folder}; only the hub's cache has such"
            )
    return path


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))
        raise ValueError(f"the name '{shown(twice)}' stands twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
