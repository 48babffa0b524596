"""How a video looks, in three numbers that fall or rise when training goes wrong: motion, contrast, colour."""

from __future__ import annotations

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


@torch.no_grad()
def looks(video: Tensor) -> dict[str, Tensor]:
    """video (B,T,3,H,W) in [-1, 1] -> scalars () float32, of pixel values from 0 to 1.

    motion: mean change of a pixel from a frame to the next; NaN of a single frame. contrast: standard deviation of the
    luma, of each frame. colour: mean distance of a pixel's channels from its luma.
    """
    pixels = (video.float() + 1) / 2
    weights = torch.tensor(LUMA, device=video.device).view(3, 1, 1)
    luma = (pixels * weights).sum(-3)  # (B,T,H,W)
    return {
        "motion": (pixels[:, 1:] - pixels[:, :-1]).abs().mean(),
        "contrast": luma.std((-2, -1), correction=0).mean(),
        "colour": (pixels - luma.unsqueeze(-3)).abs().mean(),
    }
