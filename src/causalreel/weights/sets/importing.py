"""Sets of other projects written as prepared folders: the same shards, whatever the data was before."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from causalreel.data.manifest import Manifest, ShardEntry, read_manifest, write_manifest
from causalreel.data.packing import Moments, Row, pack, write_null
from causalreel.data.shards import TYPES, read_ragged_text, read_shard
from causalreel.folders import claim
from causalreel.hashed import sha256_of
from causalreel.types import TextEncoder
from causalreel.weights.sets import Found, Wanted, find_rows

log = logging.getLogger(__name__)

TELL_S = 10.0


@dataclass(frozen=True)
class Text:
    """The text encoder of an import: embeds what has no embeddings yet, and the unconditional text."""

    load: Callable[[], TextEncoder]
    identity: str


def import_set(
    source: Path, out: Path, *, wanted: Wanted = Wanted(), text: Text | None = None, shard: int = 64
) -> Manifest:
    """Write the set at `source` (see `find_rows`) into the folder `out`; goes on where it was stopped.

    text: None keeps the embeddings that the set has, and sets of prompts without any get none. shard: clips of a
    shard. ValueError, in one line, for the first row that is damaged; nothing is left out.
    """
    made = {"source": str(source), "text": text.identity if text else None, "shard": shard}
    made |= {"trajectories": wanted.trajectories, "frames": wanted.frames, "dtype": wanted.dtype and str(wanted.dtype)}
    with claim(out, "importing"):
        held = read_manifest(out)
        if held is not None and held.made != made:
            raise ValueError(f"{out} holds other data, made from {held.made.get('source')}: use another folder")
        encoder = text.load() if text else None
        writer = _Writer(out, shard, encoder, wanted.dtype)
        for found in find_rows(source, wanted):
            writer.add(found)
        writer.finish()
        if not writer.entries:
            raise ValueError(f"{source} has no rows")
        null = write_null(out, encoder.null(1)[0]) if encoder else None
        manifest = Manifest(tuple(writer.entries), made, writer.moments.told(), null)
        write_manifest(out, manifest)
    return manifest


class _Writer:
    """Rows into shards. A shard that is there, with the same rows, is left as it is and its rows are not read."""

    def __init__(self, out: Path, size: int, encoder: TextEncoder | None, dtype: torch.dtype | None) -> None:
        self.out, self.size, self.encoder, self.dtype = out, size, encoder, dtype
        self._types: dict[str, torch.dtype] = {}
        self.entries: list[ShardEntry] = []
        self.moments = Moments()
        self._rows: list[Row] = []
        self._skipped = 0
        self._there: list[str] = self._sources()
        self._told = time.monotonic()

    def add(self, found: Found) -> None:
        at = self._skipped + len(self._rows)
        if self._there and not self._rows:
            if at < len(self._there) and self._there[at] == found.source:
                self._skipped += 1
            else:
                raise ValueError(f"{self._path} holds other rows than those imported: use another folder")
        else:
            self._rows.append(self._read(found))
        if self._skipped + len(self._rows) == self.size:
            self._close()

    def finish(self) -> None:
        if self._skipped + len(self._rows):
            self._close()
        for path in sorted(self.out.glob("latents-*.safetensors"))[len(self.entries) :]:
            raise ValueError(f"{path} is there and is not of this set: use another folder")

    @property
    def _path(self) -> Path:
        return self.out / f"latents-{len(self.entries):05d}.safetensors"

    def _sources(self) -> list[str]:
        """Where the rows of the next shard come from, if it is there."""
        return read_ragged_text(read_shard(self._path), "sources") if self._path.is_file() else []

    def _read(self, found: Found) -> Row:
        row = found.read()
        if row.text is None and self.encoder is not None:
            try:
                row = replace(row, text=self.encoder.encode([row.caption])[0].cpu())
            except ValueError as error:
                raise ValueError(f"{row.source}: {error}") from None
        if row.text is None and row.clip is None:
            raise ValueError(f"{row.source}: prompts alone need a model whose text encoder embeds them (--model)")
        parts = {
            "clip": self._typed(row.clip, "latents", row.source),
            "text": self._typed(row.text, "text", row.source),
        }
        return replace(row, source=found.source, **parts)

    def _typed(self, value: Tensor | None, what: str, place: str) -> Tensor | None:
        """In the set's type; ValueError where that would change values and nobody has asked for it."""
        if value is None:
            return None
        if self.dtype is not None:
            return value.to(self.dtype)
        kept = self._types.setdefault(what, value.dtype if value.dtype in TYPES.values() else torch.float32)
        converted = value.to(kept)
        if not torch.equal(converted.to(value.dtype), value):
            names = [str(kind).removeprefix("torch.") for kind in (value.dtype, kept)]
            raise ValueError(f"{place}: {what} in {names[0]}, the set's are in {names[1]}: give the type of all")
        return converted

    def _close(self) -> None:
        if self._there:
            shard = read_shard(self._path)
            self._types.setdefault("latents", shard.dtype)
            if shard.text_width is not None:
                self._types.setdefault("text", TYPES[shard.entries["text"].dtype])
            if self._skipped != shard.clips:
                raise ValueError(f"{self._path} holds other rows than those imported: use another folder")
            clips = (shard.clip(row) for row in range(shard.clips if shard.kind else 0))
            self.entries.append(
                ShardEntry(self._path.name, shard.clips, self._path.stat().st_size, sha256_of(self._path))
            )
        else:
            clips = (row.clip for row in self._rows if row.clip is not None)
            self.entries.append(pack(self._path, self._rows))
        for clip in clips:
            self.moments.add(clip)
        self._rows, self._skipped = [], 0
        self._there = self._sources()
        if time.monotonic() > self._told + TELL_S:
            log.info("imported %d rows", sum(entry.clips for entry in self.entries))
            self._told = time.monotonic()
