"""Data sources in memory: rows by index, on the device they are trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from causalreel.types import Conditioning, LatentBatch, TrajectoryBatch, VideoBatch


@dataclass(frozen=True)
class _Clips:
    """Latents (R,...) in any float type, and their conditioning."""

    latents: Tensor
    conditioning: Conditioning
    reads: Tensor | None = None
    """(R,F) long where captions change: the text of every frame, as a row of the conditioning's text."""

    def __post_init__(self) -> None:
        rows = len(self.conditioning) if self.reads is None else len(self.reads)
        if len(self.latents) != rows:
            raise ValueError(f"latents and conditioning must have as many rows, got {len(self.latents)} and {rows}")

    def __len__(self) -> int:
        return len(self.latents)

    def _rows(self, indices: Tensor) -> tuple[Conditioning, Tensor]:
        rows = indices.to(self.latents.device)
        if self.reads is None:
            return self.conditioning[rows], self.latents[rows]
        reads, held = self.reads[rows], self.conditioning
        fields = {name: value[rows] for name, value in held.fields.items()}
        return Conditioning(held.text[reads], fields, tuple(range(reads.shape[1]))), self.latents[rows]


class LatentSource(_Clips):
    """Latents (R,F,C,H,W) in any float type, and their conditioning."""

    def batch(self, indices: Tensor) -> LatentBatch:
        return LatentBatch(*self._rows(indices))


class TrajectorySource(_Clips):
    """A teacher's trajectories (R,S,F,C,H,W) in any float type, and their conditioning."""

    def batch(self, indices: Tensor) -> TrajectoryBatch:
        return TrajectoryBatch(*self._rows(indices))


@dataclass(frozen=True)
class ClipSource:
    """Pixel clips (R,T,3,H,W) uint8; rows come as video in [-1, 1]: for training codecs."""

    clips: Tensor

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, indices: Tensor) -> VideoBatch:
        rows = self.clips[indices.to(self.clips.device)]
        return VideoBatch(Conditioning(torch.zeros(len(rows), 0, 0, device=rows.device)), rows.float() / 127.5 - 1)
