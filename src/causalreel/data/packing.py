"""Shards written: clips, text embeddings without their zero rows, captions and where each clip comes from.

Whoever prepares or imports data writes with `pack`, whatever the data was before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from causalreel.data.manifest import NULL, ShardEntry
from causalreel.data.shards import FIELD
from causalreel.files import replacing
from causalreel.fingerprint import fingerprint
from causalreel.hashed import write_tensors

Kind = Literal["latents", "trajectories"]


@dataclass(frozen=True)
class Row:
    """One clip before it is packed."""

    caption: str
    source: str
    """Where it comes from: file and time, or file and row."""
    clip: Tensor | None = None
    """Latents (F,C,h,w) or a trajectory (S,F,C,h,w), whose last entry is the true clip; None for a prompt alone."""
    text: Tensor | None = None
    """Its text embeddings (K,E); zero rows at the end are left out."""
    fields: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Fields of the conditioning, such as w2c: name -> (F,...), an entry for each latent frame."""


def without_zeros(text: Tensor) -> Tensor:
    """text (K,E) -> (k,E): without the zero rows at its end, which stand for no token."""
    told = text.ne(0).any(1).nonzero()
    return text[: int(told[-1]) + 1 if len(told) else 0]


def pack(path: Path, rows: Sequence[Row]) -> ShardEntry:
    """Write a shard, whole or not at all. All rows have clips of one shape and type, or none has; so with text.

    Raises ValueError, naming the row, for what is not finite or does not fit the others.
    """
    first = rows[0]
    tensors: dict[str, Tensor] = {}
    for row in rows:
        _check(row, first)
    if first.clip is not None:
        tensors["latents" if first.clip.ndim == 4 else "trajectories"] = torch.stack(
            [r.clip for r in rows if r.clip is not None]
        )
    for name in first.fields:
        tensors[FIELD + name] = torch.stack([row.fields[name] for row in rows]).contiguous()
    if first.text is not None:
        texts = [without_zeros(row.text) for row in rows if row.text is not None]
        tensors["text"], tensors["text_rows"] = torch.cat(texts), _lengths(texts)
    for name, told in (("captions", [r.caption for r in rows]), ("sources", [r.source for r in rows])):
        data = [text.encode() for text in told]
        tensors[name] = torch.frombuffer(bytearray(b"".join(data)) or bytearray(1), dtype=torch.uint8)[
            : sum(map(len, data))
        ]
        tensors[f"{name}_rows"] = _lengths(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        sha256 = write_tensors(partial, tensors, {"sha256": fingerprint(tensors)})
        size = partial.stat().st_size
    return ShardEntry(path.name, len(rows), size, sha256)


def write_null(folder: Path, text: Tensor) -> str:
    """The unconditional text (K,E) beside the shards -> the hash of its file."""
    with replacing(folder / NULL) as partial:
        return write_tensors(partial, {"text": without_zeros(text).cpu()})


def _lengths(rows: Sequence[Any]) -> Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)


def _check(row: Row, first: Row) -> None:
    """ValueError unless a row is finite and like the first one."""
    for what, value, like in (("latents", row.clip, first.clip), ("text", row.text, first.text)):
        if value is None or like is None:
            if value is not like:
                raise ValueError(
                    f"{row.source} has {'no ' * (value is None)}{what}, {first.source} has{' none' * (like is None)}"
                )
            continue
        shapes = (value.shape, like.shape) if what == "latents" else (value.shape[1:], like.shape[1:])
        if shapes[0] != shapes[1] or value.dtype != like.dtype:
            raise ValueError(
                f"{row.source} has {what} {tuple(value.shape)} in {value.dtype}, {first.source} {tuple(like.shape)} in "
                f"{like.dtype}: all clips of a set need the same frames, channels, height, width and type"
            )
        if not value.isfinite().all():
            raise ValueError(f"{row.source} has values of {what} that are not finite, numbers are expected")
    shapes = [{name: (tuple(value.shape), value.dtype) for name, value in one.fields.items()} for one in (row, first)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{row.source} has fields {shapes[0]}, {first.source} {shapes[1]}: all clips need the same")
    frames = 0 if row.clip is None else row.clip.shape[-4]
    for name, value in row.fields.items():
        if value.shape[:1] != (frames,) or not value.isfinite().all():
            raise ValueError(
                f"{row.source} has {name} {tuple(value.shape)}, expected finite numbers ({frames},...), an entry for "
                f"each latent frame"
            )


@dataclass
class Moments:
    """Running mean and standard deviation of latents by channel, in float64, and how far they reach."""

    count: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    squares: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    least: float = 0.0
    most: float = 0.0

    def add(self, clip: Tensor) -> None:
        """clip (...,C,h,w)."""
        values = clip.double().movedim(-3, 0).flatten(1)  # (C,n)
        if not self.count:
            self.total = self.squares = torch.zeros(len(values), dtype=torch.float64)
            self.least = self.most = float(values[0, 0])
        self.count += values.shape[1]
        self.total = self.total + values.sum(1)
        self.squares = self.squares + values.square().sum(1)
        self.least, self.most = min(self.least, float(values.min())), max(self.most, float(values.max()))

    def plus(self, other: Moments) -> Moments:
        if not self.count or not other.count:
            return self if self.count else other
        total, squares = self.total + other.total, self.squares + other.squares
        least, most = min(self.least, other.least), max(self.most, other.most)
        return Moments(self.count + other.count, total, squares, least, most)

    def told(self) -> dict[str, Any]:
        """For a manifest; what `revived` reads."""
        if not self.count:
            return {}
        mean = self.total / self.count
        std = (self.squares / self.count - mean.square()).clamp(min=0).sqrt()
        return {
            "mean": [round(v, 5) for v in mean.tolist()],
            "std": [round(v, 5) for v in std.tolist()],
            "least": self.least,
            "most": self.most,
        }

    def kept(self) -> dict[str, Any]:
        """Everything, as JSON: what `revived` takes."""
        return vars(self) | {"total": self.total.tolist(), "squares": self.squares.tolist()}

    @staticmethod
    def revived(kept: dict[str, Any]) -> Moments:
        tensors = {name: torch.tensor(kept[name], dtype=torch.float64) for name in ("total", "squares")}
        return Moments(**{**kept, **tensors})
