"""Data sources in memory: rows by index, on the device they are trained on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from causalreel.types import Batch, Conditioning


@dataclass(frozen=True)
class LatentSource:
    """Latents (R,F,C,H,W), or trajectories (R,S,F,C,H,W), in any float type, and text (R,K,E) beside them."""

    latents: Tensor
    text: Tensor

    def __post_init__(self) -> None:
        if len(self.latents) != len(self.text):
            raise ValueError(f"latents and text must have as many rows, got {len(self.latents)} and {len(self.text)}")

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: Tensor) -> Batch:
        rows = indices.to(self.latents.device)
        return Batch(Conditioning(self.text[rows]), self.latents[rows])


@dataclass(frozen=True)
class ClipSource:
    """Pixel clips (R,T,3,H,W) uint8; rows come as video in [-1, 1] in `Batch.latents`: for training codecs."""

    clips: Tensor

    def __len__(self) -> int:
        return len(self.clips)

    def batch(self, indices: Tensor) -> Batch:
        rows = self.clips[indices.to(self.clips.device)]
        return Batch(Conditioning(torch.zeros(len(rows), 0, 0, device=rows.device)), rows.float() / 127.5 - 1)
