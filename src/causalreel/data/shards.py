"""Prepared latents and captions read back, each shard checked: shapes, types, values, one caption a clip.

A shard is `latents-NAME.safetensors` with `latents` (R,F,C,h,w) in a float type, and `latents-NAME.txt` beside it with
one caption a line. Lines end at line feeds only. Shards may be made by hand; those of `prepare` hold a hash of their
latents, which is compared.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalreel.fingerprint import fingerprint
from causalreel.foreign import read_text, shown
from causalreel.headers import read_header

TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}

CAPTIONS_BYTES = 1 << 28

EXPECTED = "'latents' (clips,frames,channels,height,width), 1 or more of each, in float16, bfloat16 or float32"


def load_prepared(folder: str | Path, *, rows: int | None = None) -> tuple[Tensor, list[str]]:
    """-> latents (R,F,C,h,w) on the CPU and their captions; the first `rows` of them.

    Raises ValueError, in one line that names the file, for shards that do not fit each other or their captions.
    """
    folder = Path(folder)
    first, latents, told = None, [], []
    for path in shards(folder):
        shape, kind = layout(path)
        first = first or (path.name, shape, kind)
        if (shape[1:], kind) != (first[1][1:], first[2]):
            raise ValueError(
                f"{path} holds clips of {shape[1:]} in {kind}, {first[0]} of {first[1][1:]} in {first[2]}: "
                "all shards need the same (frames,channels,height,width) and type"
            )
        latents.append(_values(path))
        told += read_captions(path, shape[0])
        if rows is not None and len(told) >= rows:
            break
    if rows is not None and rows > len(told):
        raise ValueError(f"{folder} has {len(told)} clips, {rows} were asked for")
    return torch.cat(latents)[:rows], told[:rows]


def shards(folder: Path) -> list[Path]:
    """The shards of a folder in their order; ValueError if there is none."""
    found = sorted(path for path in folder.glob("latents-*.safetensors") if path.is_file())
    if not found:
        raise ValueError(f"no prepared data in {folder}: make it with `causalreel encode`")
    return found


def layout(shard: Path) -> tuple[tuple[int, ...], str]:
    """Shape and type of a shard's latents, from its header; ValueError if training could not use them."""
    try:
        entries = read_header(shard).entries
    except ValueError as error:
        raise ValueError(f"{error}; delete it and run `causalreel encode` again") from None
    if "latents" not in entries:
        held = ", ".join(shown(name) for name in sorted(entries)[:4]) or "nothing"
        raise ValueError(f"{shard} holds {held}, expected {EXPECTED}")
    shape, kind = entries["latents"].shape, entries["latents"].dtype
    if len(shape) != 5 or kind not in TYPES or 0 in shape:
        raise ValueError(f"{shard} holds 'latents' {shape} in {kind}, expected {EXPECTED}")
    return shape, str(TYPES[kind]).removeprefix("torch.")


def read_captions(shard: Path, clips: int) -> list[str]:
    """The captions beside a shard of `clips` clips, one a clip and none of them blank."""
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
            return f"{path.with_suffix('.txt')}, line {row + 1}"
        row -= clips
    raise IndexError(f"{folder} has no clip {row}")


def _values(shard: Path) -> Tensor:
    """The latents of a shard, finite and as they were written."""
    try:
        with safe_open(shard, framework="pt") as file:
            latents, claimed = file.get_tensor("latents"), (file.metadata() or {}).get("sha256")
    except SafetensorError as error:
        raise _damaged(shard, error) from None
    if claimed is not None and claimed != fingerprint({"latents": latents}):
        raise _damaged(shard, "its latents are not those that were written")
    for start in itertools.count(0, 1024):
        part = latents[start : start + 1024]
        if not len(part):
            return latents
        if not part.sum(dtype=torch.float64).isfinite():
            row = int((~part.isfinite()).flatten(1).any(1).nonzero()[0])
            raise ValueError(f"{shard}: clip {start + row} has latents that are not finite, numbers are expected")
    raise AssertionError


def _damaged(shard: Path, error: object) -> ValueError:
    return ValueError(f"{shard} is damaged ({error}); delete it and run `causalreel encode` again")
