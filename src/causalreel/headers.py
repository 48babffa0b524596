"""The header of a .safetensors file, checked before the file is mapped.

What a header may say wrongly is known here and told in one line; the library behind it gets files that are in order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from causalreel.foreign import ordinary_file, parse_json, shown

HEADER_BYTES = 100_000_000
"""Of a header, as the format says."""

TENSORS = 100_000
"""In one file."""

NAME = 1000
"""Characters of a tensor's name."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a .safetensors file: name of its type, shape, and first and last byte + 1 behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a .safetensors file says of itself."""

    entries: dict[str, Entry]
    metadata: dict[str, str]


_NAMES = {
    64: "F64 I64 U64 C64",
    32: "F32 I32 U32",
    16: "F16 BF16 I16 U16",
    8: "I8 U8 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    4: "F4",
}
BITS = {name: bits for bits, names in _NAMES.items() for name in names.split()}
"""Names of types -> bits of a value."""

NOT_WEIGHTS = (
    (b"version https://git-lfs", "a Git LFS pointer: the data itself was not downloaded"),
    (b"<!DOCTYPE", "a web page: the download went wrong"),
    (b"<html", "a web page: the download went wrong"),
    (b"{", "JSON text"),
)
"""How files begin that are often taken for weights, and what they are."""


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a .safetensors file; ValueError, in one line, if it is not whole or the file does not fit it.

    Afterwards every tensor is known to lie in the file, to be as long as its shape says, and to share no byte.
    """
    path = ordinary_file(path, "weights file")
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little") if len(first) == 8 else -1
        if not 0 < length <= size - 8:
            refuse_other(path, first + file.read(64))
            raise ValueError(f"{path} is damaged or was cut off while it was written: its header is not whole")
        if length > HEADER_BYTES:
            raise ValueError(f"{path} is damaged: a header of {length:,} bytes, at most {HEADER_BYTES:,} are allowed")
        text = file.read(length)
    try:
        return _header(text, size - 8 - length, path)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is damaged: its header is not UTF-8 text") from None


def refuse_other(path: Path, first: bytes) -> None:
    """ValueError if a file that begins with these bytes is known to be no weights."""
    for start, what in NOT_WEIGHTS:
        if first.startswith(start):
            raise ValueError(f"{path} is not a checkpoint but {what}")
    if not first:
        raise ValueError(f"{path} is damaged or was cut off: it is empty, which is not a checkpoint")


def _header(text: bytes, room: int, path: Path) -> Header:
    """room: bytes behind the header."""
    if text.count(b"{") > TENSORS + 2 or text.count(b",") > 12 * TENSORS:
        raise ValueError(f"{path} is damaged: its header names more than {TENSORS:,} tensors")
    found = parse_json(text.decode("utf-8"), f"{path} is damaged: its header", items=14 * TENSORS)
    told = found.pop("__metadata__", None) or {}
    if not isinstance(told, dict) or not all(isinstance(value, str) for value in told.values()):
        raise ValueError(f"{path} is damaged: its header's __metadata__ is no object of texts: {shown(told, 60)}")
    entries = {name: _entry(name, entry, path) for name, entry in found.items()}
    end = max((entry.end for entry in entries.values()), default=0)
    if room < end:
        before = 8 + len(text)
        raise ValueError(
            f"{path} is damaged or was cut off while it was written: it is shorter than its header says, "
            f"{before + room} of {before + end} bytes "
            f"(truncated: a download that did not finish? run it again, it resumes)"
        )
    at = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            how = "overlaps another" if entry.start < at else "leaves a gap before it"
            raise ValueError(f"{path} is damaged: '{shown(name)}' {how} (its data_offsets begin at {entry.start:,})")
        at = entry.end
    if room != at:
        raise ValueError(f"{path} is damaged: {room - at:,} bytes behind its last tensor belong to none")
    return Header(entries, told)


def _entry(name: str, entry: Any, path: Path) -> Entry:
    """One tensor's entry, checked by itself."""

    def wrong(what: str, got: object) -> ValueError:
        return ValueError(f"{path} is damaged: '{shown(name)}' has {what}, got {shown(got, 60)}")

    if len(name) > NAME:
        raise ValueError(f"{path} is damaged: a name of {len(name):,} characters, '{shown(name, 60)}'; at most {NAME}")
    if not isinstance(entry, dict):
        raise wrong("no dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise wrong("an unknown dtype", dtype)
    if not _are_sizes(shape) or len(shape) > 32:
        raise wrong("a shape that is no list of at most 32 whole numbers from 0 on", shape)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("data_offsets that are no two whole numbers, the first not above the second", offsets)
    bits = BITS[dtype]
    for side in shape:
        bits *= side
    if bits != 8 * (offsets[1] - offsets[0]):
        raise wrong(f"data_offsets that do not fit {shown(tuple(shape), 60)} values of {dtype}", offsets)
    return Entry(dtype, tuple(shape), *offsets)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**48 for number in value)
