"""What a prepared folder says of itself: `manifest.json`, with a hash of every shard and of what made them.

Folders made by hand need none; where there is one, the shards must be those that it names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from causalreel.files import write_text
from causalreel.foreign import file_in, read_json, shown

MANIFEST = "manifest.json"
NULL = "null.safetensors"
"""Beside the shards: the unconditional text, `text` (K,E)."""
FORMAT = 1
BYTES = 64 << 20
"""Of a manifest: one of 300,000 shards takes as much."""


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a prepared folder."""

    file: str
    clips: int
    bytes: int
    sha256: str
    """Of the whole file."""


@dataclass(frozen=True)
class Manifest:
    """A prepared folder."""

    shards: tuple[ShardEntry, ...]
    made: dict[str, Any] = field(default_factory=dict)
    """What made the data: source, codec, text encoder, sizes, rates, filters."""
    statistics: dict[str, Any] = field(default_factory=dict)
    """Of the latents: mean and standard deviation of each channel, smallest and largest value."""
    null: str | None = None
    """Hash of the unconditional text's file; None: there is none."""

    @property
    def clips(self) -> int:
        return sum(shard.clips for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Of everything that training reads: two folders with the same one hold the same rows in the same order."""
        rows = [[shard.file, shard.sha256] for shard in self.shards]
        return hashlib.sha256(json.dumps([rows, self.null]).encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Whole or not at all; it is written last, and makes the folder one that is finished."""
    found = {
        "format": FORMAT,
        "clips": manifest.clips,
        "made": manifest.made,
        "statistics": manifest.statistics,
        "null": manifest.null,
        "shards": [vars(shard) for shard in manifest.shards],
    }
    write_text(folder / MANIFEST, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def read_manifest(folder: str | Path) -> Manifest | None:
    """A folder's manifest, None if it has none; ValueError, naming it, if it is not one."""
    path = Path(folder) / MANIFEST
    if not path.exists():
        return None
    found = read_json(path, most=BYTES, what="manifest")
    if found.get("format") != FORMAT:
        raise ValueError(f"{path}: format {shown(found.get('format'), 40)} is not known here, {FORMAT} is")
    entries = found.get("shards")
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ValueError(f"{path} lists no shards")
    shards = tuple(_entry(entry, path) for entry in entries)
    if len({shard.file for shard in shards}) < len(shards):
        raise ValueError(f"{path} lists a shard twice")
    made, statistics, null = found.get("made") or {}, found.get("statistics") or {}, found.get("null")
    if not isinstance(made, dict) or not isinstance(statistics, dict) or not isinstance(null, (str, type(None))):
        raise ValueError(f"{path}: made and statistics must be objects, null a hash or null")
    return Manifest(shards, made, statistics, null)


def _entry(entry: Any, path: Path) -> ShardEntry:
    names = {"file": str, "clips": int, "bytes": int, "sha256": str}
    if not isinstance(entry, Mapping) or any(type(entry.get(name)) is not kind for name, kind in names.items()):
        raise ValueError(f"{path}: a shard has {', '.join(names)}, got {shown(entry, 100)}")
    found = ShardEntry(**{name: entry[name] for name in names})
    file_in(path.parent, found.file, str(path))
    if found.clips < 1 or found.bytes < 1:
        raise ValueError(f"{path}: shard {shown(found.file, 60)} has {found.clips} clips and {found.bytes} bytes")
    return found
