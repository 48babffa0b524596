"""Tars from strangers: names and places of their members, within bounds, and whether the file is whole.

A tar ends with two blocks of zeros. Readers of tars do not ask for them, so that one that was cut off between two
members looks like a shorter one; here it is refused.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from causalreel.foreign import shown
from causalreel.headers import NOT_WEIGHTS

MEMBERS = 3_000_000
PART_BYTES = 1 << 34
HEADER_BYTES = 1 << 20
BLOCK = 512

COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
"""How compressed files begin."""

Part = tuple[int, int]
"""Place and bytes in a tar."""


def members(file: Path) -> Iterator[tuple[str, Part]]:
    """The files of a tar, their names and places; ValueError if it is none, is damaged, or was cut off anywhere."""
    size = file.stat().st_size
    with file.open("rb") as raw:
        first = raw.read(64)
        if not first:
            raise ValueError(f"{file} is empty, no tar")
        if kind := next((kind for start, kind in COMPRESSED if first.startswith(start)), None):
            raise ValueError(
                f"{file} is no tar but compressed with {kind}: unpack it to a .tar, whose members are read in place"
            )
        if what := next((what for start, what in NOT_WEIGHTS if first.startswith(start)), None):
            raise ValueError(f"{file} is no tar but {what}")
        raw.seek(0)
        try:
            archive = tarfile.open(fileobj=_Headers(raw), mode="r:")  # type: ignore[call-overload]  # noqa: SIM115
            count = 0
            while (member := archive.next()) is not None:
                archive.members.clear()  # which would hold every name
                count += 1
                if count > MEMBERS:
                    raise ValueError(f"{file} has more than {MEMBERS:,} members")
                if member.issparse() or member.size > PART_BYTES:
                    raise ValueError(f"{file}: '{shown(member.name)}' is sparse or larger than {PART_BYTES:,} bytes")
                if member.offset_data + member.size > size:
                    raise ValueError(f"{file} was cut off in the middle of '{shown(member.name)}'")
                if member.isfile():
                    yield member.name, (member.offset_data, member.size)
        except (tarfile.TarError, EOFError, UnicodeError, OverflowError) as error:
            raise ValueError(
                f"{file} is no tar, is damaged, or was cut off in the middle of a member ({shown(str(error), 100)})"
            ) from None
        raw.seek(archive.offset)
        if len(end := raw.read(2 * BLOCK)) < 2 * BLOCK or end.strip(b"\0"):
            raise ValueError(f"{file} was cut off between two members: its end mark is missing, so are samples")
        while rest := raw.read(1 << 24):
            if rest.strip(b"\0"):
                raise ValueError(f"{file} goes on behind its end mark: tars that were put together are not read")


class _Headers:
    """A file of which no more is read at once than a header takes, whatever that says of its length."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.seek, self.tell = file, file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self.file.read(size)


def read_member(file: Path, part: Part) -> bytes:
    """The bytes of a member."""
    with file.open("rb") as raw:
        raw.seek(part[0])
        return raw.read(part[1])
