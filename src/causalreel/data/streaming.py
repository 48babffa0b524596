"""A data source that holds nothing: rows are read from their places in the shards when they are asked for.

The text comes as it was stored and is padded on the device. Batches that are about to be asked for are read ahead, in
a thread, into memory that a GPU copies from directly. Which rows make a batch, and that a batch which reaches over the
end of an epoch is filled from the next, is the business of `train.stage.DataCursor`: no row is left out.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.data.compared import compare
from causalreel.data.manifest import NULL, Manifest, read_manifest
from causalreel.data.shards import FIELD, TYPES, Shard, agree, damaged, read_ragged_text, read_shard, shards
from causalreel.types import Batch, Conditioning, LatentBatch, TrajectoryBatch

log = logging.getLogger(__name__)

OPEN = 64
"""Files that are held open."""
GIB = 2**30
HASHED = 16 * GIB
"""Bytes that a process compares with their hashes before it trains: a quarter of a minute."""


@dataclass(frozen=True)
class PreparedSet:
    """The shards of a folder, by their headers: what there is, and where."""

    folder: Path
    shards: tuple[Shard, ...]
    manifest: Manifest | None
    rows: int
    """Clips that are used."""

    @property
    def kind(self) -> str | None:
        """latents, trajectories, or None for prompts alone."""
        return self.shards[0].kind

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a clip."""
        return self.shards[0].shape

    @property
    def text_width(self) -> int | None:
        """Width of the stored text; None: none is stored."""
        return self.shards[0].text_width

    def null(self) -> Tensor | None:
        """The unconditional text (1,K,E) that was stored beside the shards, if there is one."""
        path = self.folder / NULL
        if not path.exists():
            return None
        shape, start, size, dtype = read_shard_text(path)
        if not size:
            return torch.zeros(1, *shape, dtype=dtype)
        text = torch.from_numpy(np.fromfile(path, np.uint8, size, offset=start)).view(dtype).view(1, *shape)
        if not text.isfinite().all():
            raise damaged(path, "the unconditional text has values that are not finite")
        return text

    def verify(self, rank: int = 0, size: int = 1, known: Mapping[str, str] | None = None) -> dict[str, str]:
        """Compare the files with the hashes of the manifest, the `rank`-th of `size` shares of them; ValueError that
        names the one that differs. Where one share is of more than `HASHED` bytes, all shards are left to `causalreel
        prepare --check`: no process waits for another's. known: files that need not be read; -> those of this share,
        see `data.compared`."""
        known, found = known or {}, {}
        if self.manifest is None:
            return {}
        told = {shard.file: shard for shard in self.manifest.shards}
        if rank == 0 and self.manifest.null is not None:
            found |= compare(self.folder / NULL, self.manifest.null, known)
        paths = [shard.path for shard in self.shards]
        shares = [sum(told[path.name].bytes for path in paths[at::size]) for at in range(size)]
        if max(shares) > HASHED:
            told_of = "%s: %.0f GiB are not compared with their hashes; `causalreel prepare --check` does that"
            log.info(told_of, self.folder, sum(shares) / GIB)
            return found
        if sum(shares) > GIB:
            again = ", as far as that was not done before" if known else ""
            log.info("%s: comparing %.0f GiB with their hashes%s", self.folder, sum(shares) / GIB, again)
        for path in paths[rank::size]:
            found |= compare(path, told[path.name].sha256, known)
        return found

    def captions(self, stop: int | None = None) -> list[str]:
        """Of the first `stop` clips, for who wants to look."""
        told: list[str] = []
        for shard in self.shards:
            if stop is not None and len(told) >= stop:
                break
            told += read_ragged_text(shard, "captions") if "captions" in shard.entries else []
        return told[:stop]


def read_shard_text(path: Path) -> tuple[tuple[int, ...], int, int, torch.dtype]:
    """Shape, place, bytes and type of the text in a file of one text."""
    from causalreel.headers import read_header

    entry = read_header(path).entries.get("text")
    if entry is None or len(entry.shape) != 2 or entry.dtype not in TYPES:
        raise ValueError(f"{path} holds no 'text' (tokens,width) in {' or '.join(TYPES)}")
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    return entry.shape, start + entry.start, entry.end - entry.start, TYPES[entry.dtype]


def open_set(folder: str | Path, *, rows: int | None = None) -> PreparedSet:
    """A prepared folder; ValueError, in one line that names the file, if it is not whole. Reads headers only."""
    folder = Path(folder)
    paths, manifest = shards(folder), read_manifest(folder)
    told = {shard.file: shard for shard in manifest.shards} if manifest is not None else {}
    if manifest is not None:
        if lost := sorted(set(told) - {path.name for path in paths}):
            raise ValueError(f"{folder}: shard {lost[0]} of its manifest is missing")
        paths = [folder / name for name in told]
    found: list[Shard] = []
    for path in paths:
        shard = read_shard(path)
        agree(found[0] if found else None, shard)
        if manifest is not None and (told[path.name].clips, told[path.name].bytes) != (
            shard.clips,
            path.stat().st_size,
        ):
            raise damaged(path, "it is not the shard that the manifest names")
        found.append(shard)
    total = sum(shard.clips for shard in found)
    if rows is not None and rows > total:
        raise ValueError(f"{folder} has {total} clips, {rows} were asked for")
    return PreparedSet(folder, tuple(found), manifest, total if rows is None else rows)


@dataclass(frozen=True)
class _Row:
    """What is read of a row."""

    clip: Tensor | None
    """Its latents or trajectory, if the set has any."""
    text: Tensor
    """(K,E)."""
    fields: dict[str, Tensor]
    """Name -> (F,...)."""


class ShardSource:
    """Implements `train.stage.DataSource` for a prepared set with stored text.

    length: tokens that the text is padded to, with zero rows, on `device`. Any subset of rows is served at the cost of
    these rows alone. ValueError for a row that is not finite or cannot be read, naming its shard.
    blank: for prompts alone, the shape (F,C,H,W) of the clips that are to be made of them: rows then hold latents of
    zeros, which take no memory and are there for their shape.
    """

    def __init__(
        self,
        data: PreparedSet,
        *,
        length: int,
        device: torch.device | str = "cpu",
        blank: tuple[int, ...] | None = None,
    ) -> None:
        if data.text_width is None:
            raise ValueError(f"{data.folder} has no stored text: make it with `causalreel prepare`")
        self.data, self.length, self.device, self.blank = data, length, torch.device(device), blank
        self._first = [0, *accumulate(shard.clips for shard in data.shards)]
        self._ends = [np.cumsum(shard.lengths("text")) for shard in data.shards]
        self._files: OrderedDict[int, BinaryIO] = OrderedDict()
        self._reader = ThreadPoolExecutor(1, "causalreel data")
        self._ahead: dict[int, Future[_Row]] = {}
        longest = max(int(np.diff(ends, prepend=0).max()) for ends in self._ends)
        if longest > length:
            raise ValueError(f"{data.folder} has texts of {longest} tokens, the network takes {length}")

    def __len__(self) -> int:
        return self.data.rows

    def expect(self, indices: Tensor) -> None:
        """Rows (n,) that will be asked for soon, the soonest first: they are read meanwhile, all others forgotten."""
        wanted = dict.fromkeys(indices.tolist())
        for row in [row for row in self._ahead if row not in wanted]:
            self._ahead.pop(row).cancel()
        for row in wanted:
            if row not in self._ahead:
                self._ahead[row] = self._reader.submit(self._read, row)

    def batch(self, indices: Tensor) -> Batch:
        """Rows (B,) -> latents (B,F,C,H,W) or trajectories (B,S,F,C,H,W) as they are stored, text (B,length,E), and the
        set's fields (B,F,...) float32."""
        order = indices.tolist()
        waiting = {
            row: self._ahead.pop(row, None) or self._reader.submit(self._read, row) for row in dict.fromkeys(order)
        }
        found = {row: future.result() for row, future in waiting.items()}
        rows = [found[row] for row in order]
        text = self._moved([row.text for row in rows])
        text = F.pad(text, (0, 0, 0, self.length - text.shape[1]))  # (B,K,E) -> (B,length,E)
        fields = {name: self._moved([row.fields[name] for row in rows]).float() for name in rows[0].fields}
        conditioning, clips = Conditioning(text, fields), [row.clip for row in rows if row.clip is not None]
        if not clips and self.blank is not None:
            return LatentBatch(conditioning, text.new_zeros(()).expand(len(text), *self.blank))
        if not clips:
            return Batch(conditioning)
        return (LatentBatch if self.data.kind == "latents" else TrajectoryBatch)(conditioning, self._moved(clips))

    def close(self) -> None:
        """Stop reading ahead and let go of the files."""
        self._reader.shutdown(cancel_futures=True)
        while self._files:
            self._files.popitem()[1].close()

    def __del__(self) -> None:
        if hasattr(self, "_reader"):
            self._reader.shutdown(wait=False, cancel_futures=True)

    def _moved(self, rows: Sequence[Tensor]) -> Tensor:
        """Tensors of rows (k,...), of unequal k -> (B,K,...) on the device, zeros at the end of the shorter ones."""
        shape = (len(rows), max(1, max(map(len, rows))), *rows[0].shape[1:])
        stacked = torch.zeros(shape, dtype=rows[0].dtype, pin_memory=self.device.type == "cuda")
        for target, row in zip(stacked, rows, strict=True):
            target[: len(row)] = row
        return stacked.to(self.device, non_blocking=True)

    # ---- in the reader's thread

    def _read(self, number: int) -> _Row:
        shard, row = self._place(number)
        held, ends = self.data.shards[shard], self._ends[shard]
        entry, first = held.entries["text"], int(ends[row - 1]) if row else 0
        text = torch.empty((int(ends[row]) - first, entry.shape[1]), dtype=TYPES[entry.dtype])
        self._fill(text, shard, "text", row, first * entry.shape[1] * text.element_size())
        if held.kind is None:
            return _Row(None, text, {})
        clip = torch.empty(held.shape, dtype=held.dtype)
        self._fill(clip, shard, held.kind, row, row * clip.nbytes)
        fields: dict[str, Tensor] = {}
        for name, entry in held.entries.items():
            if name.startswith(FIELD):
                value = torch.empty(entry.shape[1:], dtype=TYPES[entry.dtype])
                self._fill(value, shard, name, row, row * value.nbytes)
                fields[name.removeprefix(FIELD)] = value
        return _Row(clip, text, fields)

    def _place(self, row: int) -> tuple[int, int]:
        """A row of the set -> its shard and its row there."""
        if not 0 <= row < len(self):
            raise IndexError(f"{self.data.folder} has {len(self)} clips, row {row} was asked for")
        shard = bisect_right(self._first, row) - 1
        return shard, row - self._first[shard]

    def _fill(self, target: Tensor, shard: int, name: str, row: int, offset: int) -> None:
        """Read a tensor of row `row` that begins `offset` bytes behind the start of the shard's tensor `name`."""
        if not target.numel():
            return
        held = self.data.shards[shard]
        room, done = target.reshape(-1).view(torch.uint8).numpy().data, 0
        file = self._file(shard)
        file.seek(held.start + held.entries[name].start + offset)
        while done < len(room):
            got = file.readinto(room[done:])  # type: ignore[attr-defined] - unbuffered files have it
            if not got:
                raise damaged(held.path, "it became shorter while it was read")
            done += got
        if not torch.isfinite(target).all():
            raise ValueError(f"{held.path}: clip {row} has values of {name} that are not finite, numbers are expected")

    def _file(self, shard: int) -> BinaryIO:
        if shard not in self._files:
            if len(self._files) >= OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[shard] = open(self.data.shards[shard].path, "rb", buffering=0)  # noqa: SIM115 - it stays open
        self._files.move_to_end(shard)
        return self._files[shard]
