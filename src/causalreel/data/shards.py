"""Prepared data read back, each shard checked: shapes, types, values, one caption a clip.

A shard is `latents-NAME.safetensors` with one tensor of clips, `latents` (R,F,C,h,w) or `trajectories` (R,S,F,C,h,w),
in a float type; shards of prompts alone have neither. Beside it:

- `text` (N,E), the text embeddings of all clips one after the other, without their zero rows, and `text_rows` (R), how
  many of them are each clip's; shards without text have captions that the tiny text encoder reads.
- `captions` (N) uint8 and `captions_rows` (R), the captions in UTF-8, byte for byte; or `latents-NAME.txt` with one
  caption a line, which ends at line feeds only.
- `sources` and `sources_rows`, in the same form: where a clip comes from.
- `field.NAME` (R,F,...), float: fields of the conditioning with an entry for each latent frame, such as cameras.

Shards may be made by hand; those of the package hold a hash of their tensors, which is compared when they are read
whole, and a manifest beside them names each with the hash of its file (`data.manifest`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalreel.fingerprint import fingerprint
from causalreel.foreign import read_text, shown
from causalreel.headers import Entry, read_header

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

CAPTIONS_BYTES = 1 << 28

CLIPS = {"latents": 5, "trajectories": 6}
"""Tensors of clips and their dimensions."""

FIELD = "field."
"""What names of fields begin with."""

REMEDY = "delete it and run again what made it (`causalreel prepare`, `causalreel import` or `causalreel encode`)"

EXPECTED = "'latents' (clips,frames,channels,height,width), 1 or more of each, in float16, bfloat16 or float32"


@dataclass(frozen=True)
class Shard:
    """One shard, as its header says; `rows` reads from it."""

    path: Path
    clips: int
    kind: str | None
    """latents, trajectories, or None for prompts alone."""
    shape: tuple[int, ...]
    """Of a clip."""
    dtype: torch.dtype
    entries: dict[str, Entry]
    start: int
    """Where the values begin in the file."""

    @property
    def text_width(self) -> int | None:
        """Width of the stored text embeddings; None: there are none."""
        return self.entries["text"].shape[1] if "text" in self.entries else None

    def lengths(self, name: str) -> np.ndarray:
        """Entries of `text`, `captions` or `sources` that each clip has (R) int64; they add up."""
        entry = self.entries[f"{name}_rows"]
        found = np.fromfile(self.path, "<i8", self.clips, offset=self.start + entry.start)
        total = self.entries[name].shape[0]
        if len(found) != self.clips or (found < 0).any() or (found > total).any() or int(found.sum()) != total:
            raise damaged(self.path, f"'{name}_rows' does not add up to the {total:,} rows of '{name}'")
        return found

    def clip(self, row: int) -> Tensor:
        """The latents or trajectory of a row, for who reads few or one after the other."""
        assert self.kind is not None
        size = self.dtype.itemsize * int(np.prod(self.shape))
        at = self.start + self.entries[self.kind].start + row * size
        return torch.from_numpy(np.fromfile(self.path, np.uint8, size, offset=at)).view(self.dtype).view(self.shape)

    def texts(self) -> list[Tensor]:
        """The stored text of all clips (K,E)."""
        entry = self.entries["text"]
        data = np.fromfile(self.path, np.uint8, entry.end - entry.start, offset=self.start + entry.start)
        whole = torch.from_numpy(data).view(TYPES[entry.dtype]).view(entry.shape)
        return list(whole.split(self.lengths("text").tolist()))


def read_shard(path: Path) -> Shard:
    """A shard's header, checked; ValueError if training could not use it."""
    try:
        entries = read_header(path).entries
    except ValueError as error:
        reason, _, _ = str(error).partition(" (truncated: a download")  # shards are made, not fetched
        raise ValueError(f"{reason}; {REMEDY}") from None
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    found = [name for name in CLIPS if name in entries]
    if not found and "text" not in entries:
        held = ", ".join(shown(name) for name in sorted(entries)[:4]) or "nothing"
        raise ValueError(f"{path} holds {held}, expected {EXPECTED}")
    kind = found[0] if found else None
    if kind is None:
        clips, shape, dtype = entries["text_rows"].shape[0] if "text_rows" in entries else 0, (), torch.float32
    else:
        (clips, *rest), name = entries[kind].shape or (0,), entries[kind].dtype
        if len(rest) + 1 != CLIPS[kind] or name not in TYPES or 0 in (clips, *rest):
            raise ValueError(f"{path} holds '{kind}' {entries[kind].shape} in {name}, expected {EXPECTED}")
        shape, dtype = tuple(rest), TYPES[name]
    for name in ("text", "captions", "sources"):
        _check_ragged(path, entries, name, clips)
    for name, entry in entries.items():
        frames = shape[-4] if shape else 0
        if name.startswith(FIELD) and (entry.shape[:2] != (clips, frames) or entry.dtype not in TYPES):
            raise ValueError(
                f"{path} holds {shown(name)} {entry.shape} in {entry.dtype}, expected ({clips},{frames},...), an entry "
                f"for each latent frame of each clip, in {' or '.join(TYPES)}"
            )
    return Shard(path, clips, kind, shape, dtype, entries, start)


def _check_ragged(path: Path, entries: dict[str, Entry], name: str, clips: int) -> None:
    """ValueError unless a tensor of unequal rows and their lengths fit each other, or neither is there."""
    values, lengths = entries.get(name), entries.get(f"{name}_rows")
    if values is None and lengths is None:
        return
    kinds, dimensions = (tuple(TYPES), 2) if name == "text" else (("U8",), 1)
    if values is None or len(values.shape) != dimensions or values.dtype not in kinds or 0 in values.shape[1:]:
        got = "nothing" if values is None else f"{values.shape} in {values.dtype}"
        raise ValueError(f"{path} holds '{name}' {got}, expected {dimensions} dimensions in {' or '.join(kinds)}")
    if lengths is None or lengths.shape != (clips,) or lengths.dtype != "I64" or clips < 1:
        got = "nothing" if lengths is None else f"{lengths.shape} in {lengths.dtype}"
        raise ValueError(f"{path} holds '{name}_rows' {got}, expected ({clips},) in I64")


def layout(shard: Path) -> tuple[tuple[int, ...], str]:
    """Shape and type of a shard's clips, from its header; ValueError if training could not use them."""
    found = read_shard(shard)
    return (found.clips, *found.shape), str(found.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Prepared:
    """A prepared set in memory, on the CPU."""

    latents: Tensor
    """(R,F,C,h,w)."""
    captions: list[str]
    fields: dict[str, Tensor]
    """Name -> (R,F,...) float32."""


def load_prepared(folder: str | Path, *, rows: int | None = None) -> Prepared:
    """The first `rows` clips of a folder, all by default. For sets that fit in memory.

    Raises ValueError, in one line that names the file, for shards that do not fit each other or their captions.
    """
    folder = Path(folder)
    first, parts, told = None, list[dict[str, Tensor]](), list[str]()
    for path in shards(folder):
        shard = read_shard(path)
        first = agree(first, shard)
        if shard.kind != "latents":
            raise ValueError(f"{path} holds {shard.kind or 'only prompts'}, expected {EXPECTED}")
        parts.append(_values(path))
        told += read_captions(path, shard.clips)
        if rows is not None and len(told) >= rows:
            break
    if rows is not None and rows > len(told):
        raise ValueError(f"{folder} has {len(told)} clips, {rows} were asked for")
    held = {name: torch.cat([part[name] for part in parts])[:rows] for name in parts[0]}
    fields = {name.removeprefix(FIELD): value.float() for name, value in held.items() if name.startswith(FIELD)}
    return Prepared(held["latents"], told[:rows], fields)


def agree(first: Shard | None, shard: Shard) -> Shard:
    """The first shard of a folder; ValueError if another has clips or text of another kind."""
    if first is None:
        return shard
    if (first.kind, first.shape, first.dtype) != (shard.kind, shard.shape, shard.dtype):
        kinds = [f"{s.shape} in {str(s.dtype).removeprefix('torch.')}" for s in (shard, first)]
        raise ValueError(
            f"{shard.path} holds clips of {kinds[0]}, {first.path.name} of {kinds[1]}: "
            "all shards need the same (frames,channels,height,width) and type"
        )
    fields = [{name: e.shape[1:] for name, e in s.entries.items() if name.startswith(FIELD)} for s in (shard, first)]
    if fields[0] != fields[1]:
        told = [", ".join(f"{name} {shape}" for name, shape in sorted(found.items())) or "none" for found in fields]
        raise ValueError(f"{shard.path} has fields: {told[0]}; {first.path.name}: {told[1]}; all shards need the same")
    texts = [(s.entries["text"].shape[1], s.entries["text"].dtype) if s.text_width else None for s in (shard, first)]
    if texts[0] != texts[1]:
        told = ["no text" if text is None else f"text of width {text[0]} in {text[1]}" for text in texts]
        raise ValueError(f"{shard.path} has {told[0]}, {first.path.name} {told[1]}: all shards need the same")
    return first


def shards(folder: Path) -> list[Path]:
    """The shards of a folder in their order; ValueError if there is none."""
    found = sorted(path for path in folder.glob("latents-*.safetensors") if path.is_file())
    if not found:
        raise ValueError(f"no prepared data in {folder}: make it with `causalreel prepare` or `causalreel encode`")
    return found


def read_captions(path: Path, clips: int) -> list[str]:
    """The captions of a shard of `clips` clips: its own, else those beside it, one a line, none of them blank."""
    shard = read_shard(path)
    if "captions" in shard.entries:
        return read_ragged_text(shard, "captions")
    return _captions_beside(path, clips)


def read_ragged_text(shard: Shard, name: str) -> list[str]:
    """The texts of all clips that a shard keeps under a name."""
    entry = shard.entries[name]
    if entry.shape[0] > CAPTIONS_BYTES:
        raise damaged(shard.path, f"'{name}' has {entry.shape[0]:,} bytes, at most {CAPTIONS_BYTES:,} are read")
    data = np.fromfile(shard.path, np.uint8, entry.shape[0], offset=shard.start + entry.start).tobytes()
    ends = np.cumsum(shard.lengths(name)).tolist()
    try:
        return [data[start:end].decode() for start, end in itertools.pairwise([0, *ends])]
    except UnicodeDecodeError:
        raise damaged(shard.path, f"'{name}' is not UTF-8 text") from None


def _captions_beside(shard: Path, clips: int) -> list[str]:
    path = shard.with_suffix(".txt")
    if not path.exists():
        raise ValueError(f"{path} is missing: a caption a line for each of the {clips} clips of {shard.name}")
    text = read_text(path, most=CAPTIONS_BYTES, what="file of captions")
    lines = text.split("\n")
    told = [line.removesuffix("\r") for line in (lines if lines[-1] else lines[:-1])]
    blank = next((number for number, line in enumerate(told, 1) if not line.strip()), None)
    if len(told) != clips:
        also = "" if blank is None else f"; line {blank} is blank"
        raise ValueError(f"{shard} has {clips} latents but {len(told)} captions in {path.name}, one a line{also}")
    if blank is not None:
        raise ValueError(f"{path}: line {blank} is blank, a caption is expected")
    return told


def caption_place(folder: str | Path, row: int) -> str:
    """File and line of a clip's caption, for messages."""
    for path in shards(Path(folder)):
        clips = layout(path)[0][0]
        if row < clips:
            is_inside = "captions" in read_shard(path).entries
            return f"{path}, clip {row}" if is_inside else f"{path.with_suffix('.txt')}, line {row + 1}"
        row -= clips
    raise IndexError(f"{folder} has no clip {row}")


def _values(shard: Path) -> dict[str, Tensor]:
    """The latents and fields of a shard, finite and as they were written."""
    try:
        with safe_open(shard, framework="pt") as file:
            claimed = (file.metadata() or {}).get("sha256")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise damaged(shard, error) from None
    if claimed is not None and claimed != fingerprint(tensors):
        raise damaged(shard, "its latents are not those that were written")
    found = {name: value for name, value in tensors.items() if name == "latents" or name.startswith(FIELD)}
    for name, values in found.items():
        for start in range(0, len(values), 1024):
            part = values[start : start + 1024]
            if not part.sum(dtype=torch.float64).isfinite():
                row = int((~part.isfinite()).flatten(1).any(1).nonzero()[0])
                raise ValueError(
                    f"{shard}: clip {start + row} has values of {name} that are not finite, numbers are expected"
                )
    return found


def damaged(shard: Path, error: object) -> ValueError:
    return ValueError(f"{shard} is damaged ({error}); {REMEDY}")
