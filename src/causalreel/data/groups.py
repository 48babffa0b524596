"""Videos in groups, the unit of preparing: what each is made of, where its parts lie, and how they become shards."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalreel.data.clips import Cutting
from causalreel.data.listing import Item
from causalreel.data.manifest import ShardEntry
from causalreel.data.packing import Moments, Row, pack
from causalreel.files import replacing, write_text
from causalreel.foreign import read_json
from causalreel.hashed import write_tensors
from causalreel.types import TextEncoder, VideoCodec

log = logging.getLogger(__name__)

WORK = ".prepare"
TELL_S = 10.0
SHOWN = 16
"""Videos of a group of which the contact sheet may show a clip."""


@dataclass(frozen=True)
class Models:
    """What clips and captions are encoded with, loaded when it is needed."""

    load_codec: Callable[[], VideoCodec]
    load_text: Callable[[], TextEncoder]
    codec: str
    """What tells the codec from others."""
    text: str
    """What tells the text encoder from others."""
    device: torch.device
    """Where the codec is."""


@dataclass(frozen=True)
class Share:
    """This process among those that share the work."""

    rank: int = 0
    size: int = 1


@dataclass(frozen=True)
class Plan:
    """What a prepared folder is made of, but for the files' contents."""

    cutting: Cutting
    models: Models
    dtype: torch.dtype = torch.float16
    """Of the latents."""
    batch: int = 1
    """Clips of one video that are encoded at once."""
    shard: int = 64
    """Clips of a shard, at most."""
    group: int = 16
    """Videos of a group."""

    def made(self, source: str, items: Sequence[Item]) -> dict[str, Any]:
        """All that decides what the folder will hold."""
        listed = [[item.name, item.caption, item.start, item.end] for item in items]
        return {
            "source": source,
            "videos": len(items),
            "listing": hashlib.sha256(json.dumps(listed).encode()).hexdigest(),
            "codec": self.models.codec,
            "text": self.models.text,
            "dtype": str(self.dtype).removeprefix("torch."),
            "batch": self.batch,
            "shard": self.shard,
            "group": self.group,
            **asdict(self.cutting),
        }


class Group:
    """Some videos: where what is made of them lies, and what is done."""

    def __init__(self, out: Path, number: int, items: Sequence[Item], plan: Plan) -> None:
        self.out, self.number, self.items, self.plan = out, number, items, plan
        self.work = out / WORK / f"{number:05d}"
        self.record = out / WORK / f"{number:05d}.json"
        self.text = self.work / "text.safetensors"

    @property
    def is_done(self) -> bool:
        """Whether its shards are there, as its record says."""
        if not self.record.is_file():
            return False
        entries = [ShardEntry(**entry) for entry in read_json(self.record)["shards"]]
        sizes = [(self.out / e.file).stat().st_size if (self.out / e.file).is_file() else -1 for e in entries]
        return sizes == [entry.bytes for entry in entries]

    def part(self, item: int, number: int) -> Path:
        return self.work / f"{item:05d}-{number:05d}.safetensors"

    def end(self, item: int) -> Path:
        """Written when all clips of a video are."""
        return self.work / f"{item:05d}.json"

    def close(self) -> None:
        """Pack what was encoded into shards, write the record, remove the parts."""
        rows, moments, tiles, left, entries = [], Moments(), [], [], []
        embedded = read_part(self.text)
        for at, item in enumerate(self.items):
            told, is_shown = read_json(self.end(at)), len(tiles) < SHOWN
            left += told["left"]
            for number in range(told["parts"]):
                for name, tensors in clips_in(self.part(at, number)):
                    if is_shown:
                        is_shown = False
                        tiles.append({"caption": item.caption, "file": self._keep_tile(len(tiles), tensors["shown"])})
                    moments.add(tensors["latents"])
                    text = embedded[f"text.{at}"]
                    rows.append(Row(item.caption or "", f"{item.name} at {name} s", tensors["latents"], text))
                    if len(rows) == self.plan.shard:
                        entries.append(self._pack(len(entries), rows))
                        rows = []
        if rows:
            entries.append(self._pack(len(entries), rows))
        kept = {"shards": [vars(e) for e in entries], "left": left, "moments": moments.kept(), "tiles": tiles}
        write_text(self.record, json.dumps(kept))
        shutil.rmtree(self.work, ignore_errors=True)

    def _pack(self, number: int, rows: Sequence[Row]) -> ShardEntry:
        return pack(self.out / f"latents-{self.number:05d}-{number:03d}.safetensors", rows)

    def _keep_tile(self, number: int, shown: Tensor) -> str:
        name = f"{self.number:05d}-{number}.tile.safetensors"
        with replacing(self.out / WORK / name) as partial:
            write_tensors(partial, {"shown": shown})
        return name


def clips_in(part: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The clips of a part: when each begins in its video, and its tensors."""
    tensors = read_part(part)
    for row, start in enumerate(tensors["starts"].tolist()):
        yield f"{start:.3f}", {name: tensors[name][row] for name in ("latents", "shown")}


def read_part(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in `.prepare`, mapped; ValueError that says what to delete if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        gone = path if path.parent.name == WORK else path.parent
        raise ValueError(f"{path} is damaged ({error}); delete {gone} and run the same command again") from None


def write_part(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        write_tensors(partial, tensors)


class Teller:
    """Says something, but not too often."""

    def __init__(self) -> None:
        self._at = time.monotonic()

    def __call__(self, line: str) -> None:
        if time.monotonic() > self._at + TELL_S:
            log.info("%s", line)
            self._at = time.monotonic()
