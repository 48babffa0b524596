"""Data of rCM: webdataset tars with `KEY.latent.pt` (C,F,H,W), `KEY.embed.pt` (K,E) and `KEY.prompt.txt`.

Of a trajectory (S,C,F,H,W) rCM takes the first entry for the true clip, and so does this. Tensors are read and never
code. A tar without its end mark was cut off, which no reader of tars notices when the cut is between two members.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from causalreel.data.packing import Row
from causalreel.data.tars import Part, members, read_member
from causalreel.foreign import shown
from causalreel.weights.pickles import read_pickle
from causalreel.weights.sets import Found, Wanted
from causalreel.weights.sets.clips import PROMPT_BYTES, caption, channels_first, check_text

log = logging.getLogger(__name__)

WHAT = "tars of rCM (.tar with .latent.pt, .embed.pt and .prompt.txt), or a folder of such"
PART_BYTES = 1 << 32
PACKED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
"""Compressed tars, which are refused with what to do."""
PARTS = ("latent.pt", "embed.pt", "prompt.txt")


def is_one(path: Path) -> bool:
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.name.endswith((".tar", *PACKED)) else []
    return sorted(path.glob("*.tar"))


def rows(path: Path, wanted: Wanted) -> Iterator[Found]:
    for file in _files(path):
        with tempfile.TemporaryDirectory(prefix="causalreel-") as scratch:
            for key, parts in _samples(file).items():
                place = f"{file.name}, {shown(key, 200)}"
                yield Found(place, partial(_row, file, parts, wanted, place, Path(scratch) / "part.pt"))


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
        most = PROMPT_BYTES if suffix == "prompt.txt" else PART_BYTES
        if part[1] > most:
            raise ValueError(f"{file}: '{shown(name)}' has {part[1]:,} bytes, at most {most:,} are read")
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


def _row(file: Path, parts: dict[str, Part], wanted: Wanted, place: str, scratch: Path) -> Row:
    latents = _tensor(file, parts["latent.pt"], f"{place}.latent.pt", scratch)
    clip = latents[0] if latents.ndim == 5 and len(latents) else latents
    told = caption(read_member(file, parts["prompt.txt"]), f"{place}.prompt.txt")
    text = check_text(_tensor(file, parts["embed.pt"], f"{place}.embed.pt", scratch), f"{place}.embed.pt")
    return Row(told, place, channels_first(clip, f"{place}.latent.pt", wanted), text)


def _tensor(file: Path, part: Part, place: str, scratch: Path) -> Tensor:
    """A tensor that torch.save wrote, read as data."""
    scratch.write_bytes(read_member(file, part))
    try:
        found = read_pickle(scratch, mmap=False)
    except ValueError as error:
        raise ValueError(str(error).replace(str(scratch), f"member {place}")) from None
    if not isinstance(found, Tensor):
        raise ValueError(f"{place} holds a {type(found).__name__}, a tensor is expected")
    return found.detach()
