"""Data of Causal Forcing and Self Forcing: an LMDB, or a folder of them, with float16 rows and prompts.

Keys: `latents_shape`, `prompts_shape` (numbers in decimal, the first one the rows), `latents_{i}_data`,
`prompts_{i}_data`. A row is a clip (F,C,H,W) or a trajectory (S,F,C,H,W) from noise to the true clip, which is last.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from causalreel.data.packing import Row
from causalreel.foreign import shown
from causalreel.weights.sets import Found, Wanted
from causalreel.weights.sets.clips import PROMPT_BYTES, caption, check_channels, finished
from causalreel.weights.sets.pages import Pages, is_lmdb

log = logging.getLogger(__name__)

WHAT = "an LMDB of Causal or Self Forcing (data.mdb, or one file), or a folder of such"
ROWS = 10_000_000
ROW_BYTES = 1 << 32
OTHERS = ("poses", "intrinsics", "viewmats", "Ks")
"""Of other projects' LMDBs of this kind: not read."""


def is_one(path: Path) -> bool:
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    """The data files of a file, a folder, or a folder of folders or files, these by their names.

    LMDBs that are no folders may have any name; in a folder those that end with .mdb or .lmdb are taken.
    """
    if path.is_file():
        return [path] if path.suffix == ".mdb" or is_lmdb(path) else []
    if (path / "data.mdb").is_file():
        return [path / "data.mdb"]
    alone = [file for ending in ("mdb", "lmdb") for file in path.glob(f"*.{ending}") if file.is_file()]
    return sorted([*path.glob("*/data.mdb"), *(file for file in alone if file.name != "lock.mdb")])


def rows(path: Path, wanted: Wanted) -> Iterator[Found]:
    for file in _files(path):
        with Pages(file) as pages:
            count, shape = _shapes(pages, wanted)
            for number in range(count):
                place = f"{file.parent.name if file.name == 'data.mdb' else file.name}, row {number}"
                yield Found(place, partial(_row, pages, number, shape, wanted, f"{file}: row {number}"))


def _shapes(pages: Pages, wanted: Wanted) -> tuple[int, tuple[int, ...]]:
    """-> how many rows an LMDB has, and a row's shape."""
    latents, prompts = (_numbers(pages, f"{name}_shape") for name in ("latents", "prompts"))
    count, shape = latents[0], list(latents[1:] or wanted.shape or ())
    if not latents[1:] and wanted.shape is None:
        raise ValueError(
            f"{pages.path}: latents_shape is {shown(str(count))}, the row shape is not recorded (it is the last source "
            f"file's, which held nothing new); give it, such as 6,21,16,60,104"
        )
    if wanted.shape is not None and tuple(shape) != wanted.shape:
        raise ValueError(f"{pages.path}: rows are {tuple(shape)}, the shape that was given is {wanted.shape}")
    if len(shape) not in (4, 5) or not 0 < 2 * math.prod(shape) <= ROW_BYTES:
        raise ValueError(f"{pages.path}: rows of {tuple(shape)}; ([states,]frames,channels,height,width) is expected")
    check_channels(shape[-3], str(pages.path))
    if prompts[0] != count:
        raise ValueError(f"{pages.path}: {count} latents and {prompts[0]} prompts")
    for name in ("latents", "prompts"):
        if pages.get(f"{name}_{count}_data".encode(), most=ROW_BYTES) is not None:
            raise ValueError(f"{pages.path}: {name}_shape says {count} rows, there is a row {count}")
    left = [name for name in OTHERS if pages.get(f"{name}_shape".encode(), most=1000) is not None]
    if left:
        log.warning("%s also holds %s, which are not imported", pages.path, ", ".join(left))
    return count, tuple(shape)


def _numbers(pages: Pages, key: str) -> tuple[int, ...]:
    data = pages.get(key.encode(), most=1000)
    if data is None:
        raise ValueError(f"{pages.path} has no {key}: it is no data set of Causal or Self Forcing")
    if not re.fullmatch(rb"\d{1,12}( \d{1,12}){0,8}", data.strip()):
        raise ValueError(f"{pages.path}: {key} is '{shown(data.decode('latin-1'), 60)}', numbers are expected")
    found = tuple(map(int, data.split()))
    if not 0 < found[0] <= ROWS:
        raise ValueError(f"{pages.path}: {key} says {found[0]:,} rows, 1 to {ROWS:,} are read")
    return found


def _row(pages: Pages, number: int, shape: tuple[int, ...], wanted: Wanted, place: str) -> Row:
    size = 2 * math.prod(shape)
    data = pages.get(f"latents_{number}_data".encode(), most=ROW_BYTES)
    told = pages.get(f"prompts_{number}_data".encode(), most=PROMPT_BYTES)
    if data is None or told is None:
        raise ValueError(f"{place} has no {'latents' if data is None else 'prompt'}")
    if len(data) != size:
        raise ValueError(f"{place} has {len(data):,} bytes of latents, {shape} in float16 takes {size:,}")
    clip = torch.frombuffer(bytearray(data), dtype=torch.float16).view(shape)
    if len(shape) == 4 and wanted.trajectories:
        raise ValueError(f"{place} is a clip {shape}, no trajectory")
    if len(shape) == 5 and not wanted.trajectories:
        clip = clip[-1]
    return Row(caption(told, place), place, finished(clip, place, wanted))
