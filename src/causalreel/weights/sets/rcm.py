"""Data of rCM: webdataset tars with `KEY.latent.pt` (C,F,H,W), `KEY.embed.pt` (K,E) and `KEY.prompt.txt`.

Of a trajectory (S,C,F,H,W) rCM takes the first entry for the true clip, and so does this. Tensors are read and never
code. A tar without its end mark was cut off, which no reader of tars notices when the cut is between two members.
"""

from __future__ import annotations

import logging
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from causalreel.data.packing import Row
from causalreel.foreign import shown
from causalreel.headers import NOT_WEIGHTS
from causalreel.weights.pickles import read_pickle
from causalreel.weights.sets import Found, Wanted
from causalreel.weights.sets.clips import caption, channels_first, check_text

log = logging.getLogger(__name__)

WHAT = "tars of rCM (.tar with .latent.pt, .embed.pt and .prompt.txt), or a folder of such"
PARTS = ("latent.pt", "embed.pt", "prompt.txt")
MEMBERS = 3_000_000
PART_BYTES = 1 << 32
HEADER_BYTES = 1 << 20
BLOCK = 512
"""Bytes of a tar's blocks, two of which, all zeros, end it."""


def is_one(path: Path) -> bool:
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".tar" else []
    return sorted(path.glob("*.tar"))


def rows(path: Path, wanted: Wanted) -> Iterator[Found]:
    for file in _files(path):
        with tempfile.TemporaryDirectory(prefix="causalreel-") as scratch:
            for key, parts in _samples(file).items():
                place = f"{file.name}, {shown(key, 200)}"
                yield Found(place, partial(_row, file, parts, wanted, place, Path(scratch) / "part.pt"))


Part = tuple[int, int]
"""Place and bytes in the tar."""


def _samples(file: Path) -> dict[str, dict[str, Part]]:
    """Samples of a tar by key, in their order, each with all of its parts."""
    found: dict[str, dict[str, Part]] = {}
    others: set[str] = set()
    for name, part in members(file):
        above, _, last = name.rpartition("/")
        stem, _, suffix = last.partition(".")
        key = f"{above}/{stem}" if above else stem
        if suffix not in PARTS:
            others.add(f".{suffix}")
            continue
        if suffix in found.setdefault(key, {}):
            raise ValueError(f"{file}: '{shown(name)}' is in it twice")
        found[key][suffix] = part
    if others:
        log.warning("%s: members %s are not read", file.name, ", ".join(shown(each, 40) for each in sorted(others)[:5]))
    if not found:
        raise ValueError(f"{file} holds no samples: {WHAT}")
    for key, parts in found.items():
        if lost := [part for part in PARTS if part not in parts]:
            names = {"latent.pt": "latents", "embed.pt": "embeddings of its text", "prompt.txt": "a prompt"}
            raise ValueError(f"{file}: sample '{shown(key)}' is without {names[lost[0]]}: it has no .{lost[0]}")
    return found


def members(file: Path) -> Iterator[tuple[str, Part]]:
    """The files of a tar, their names and places; ValueError if it is none, is damaged, or was cut off anywhere."""
    size = file.stat().st_size
    with file.open("rb") as raw:
        first = raw.read(64)
        if not first:
            raise ValueError(f"{file} is empty, no tar")
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


def _row(file: Path, parts: dict[str, Part], wanted: Wanted, place: str, scratch: Path) -> Row:
    latents = _tensor(file, parts["latent.pt"], f"{place}.latent.pt", scratch)
    clip = latents[0] if latents.ndim == 5 else latents
    told = caption(_bytes(file, parts["prompt.txt"]), f"{place}.prompt.txt")
    text = check_text(_tensor(file, parts["embed.pt"], f"{place}.embed.pt", scratch), f"{place}.embed.pt")
    return Row(told, place, channels_first(clip, f"{place}.latent.pt", wanted), text)


def _tensor(file: Path, part: Part, place: str, scratch: Path) -> Tensor:
    """A tensor that torch.save wrote, read as data."""
    scratch.write_bytes(_bytes(file, part))
    try:
        found = read_pickle(scratch, mmap=False)
    except ValueError as error:
        raise ValueError(str(error).replace(str(scratch), f"member {place}")) from None
    if not isinstance(found, Tensor):
        raise ValueError(f"{place} holds a {type(found).__name__}, a tensor is expected")
    return found


def _bytes(file: Path, part: Part) -> bytes:
    with file.open("rb") as raw:
        raw.seek(part[0])
        return raw.read(part[1])
