"""Training data in the formats of other projects, read within bounds: what is wrong is one line that names file and
row, and nothing is left out in silence.

Each reader gives the rows of a file or folder in their natural order, each with a name and a function that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from causalreel.data.packing import Row
from causalreel.foreign import shown


@dataclass(frozen=True)
class Found:
    """A row that is there."""

    source: str
    """File and row."""
    read: Callable[[], Row]


@dataclass(frozen=True)
class Wanted:
    """How a set is read."""

    trajectories: bool = False
    """Whole trajectories instead of the true clips at their ends."""
    shape: tuple[int, ...] | None = None
    """Of an LMDB's rows, where it does not say it."""
    frames: int | None = None
    """Clips are cut to their first latent frames; None: as long as they are."""
    dtype: torch.dtype | None = None
    """Of latents and text; None: that of the first row, which others may be converted to if that changes no value."""


def find_rows(path: Path, wanted: Wanted = Wanted()) -> Iterator[Found]:
    """The rows of a set of any known format; ValueError, in one line, for what is none or is damaged."""
    from causalreel.weights.sets import fastvideo, lmdb, musubi, prompts, rcm

    path = Path(path)
    if not path.exists():
        raise ValueError(f"no data at {shown(str(path), 400)}")
    readers = (lmdb, rcm, fastvideo, musubi, prompts)
    reader = next((each for each in readers if each.is_one(path)), None)
    if reader is None:
        raise ValueError(f"{path} holds no data of a known format: {'; '.join(each.WHAT for each in readers)}")
    if wanted.trajectories and reader is not lmdb:
        raise ValueError(f"{path}: trajectories are read from LMDBs only; no other format says what each entry is")
    if wanted.shape is not None and reader is not lmdb:
        raise ValueError(f"{path}: the shape of rows is given for LMDBs only; {reader.WHAT} hold it")
    return reader.rows(path, wanted)
