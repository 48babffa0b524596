"""What the frames of any video look like, without a network and without a prompt: light, colour, sharpness, motion.

Luma is that of BT.709 on [0, 1]. Values of one video compare over its length, and between videos of one size: sharpness
and motion depend on how large a pixel is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STATISTICS = ("brightness", "contrast", "saturation", "colourfulness", "sharpness", "motion")
"""brightness: mean luma. contrast: its standard deviation. saturation: mean of the largest less the smallest colour.
colourfulness: Hasler and Suesstrunk (2003), on [0, 1]. sharpness: standard deviation of the Laplacian of luma. motion:
mean absolute change of luma from the frame before, NaN where there is none."""

LUMA = (0.2126, 0.7152, 0.0722)


@torch.no_grad()
def frame_statistics(video: Tensor, before: Tensor | None = None) -> dict[str, Tensor]:
    """video (B,T,3,H,W) in [-1,1], the frame before it (B,3,H,W) if there is one -> `STATISTICS`, (B,T) each."""
    if video.ndim != 5 or video.shape[2] != 3 or min(video.shape[-2:]) < 3:
        raise ValueError(f"video must be (B,T,3,H,W) of at least 3x3 pixels, got {tuple(video.shape)}")
    picture = (torch.nan_to_num(video.float(), nan=0.0).clamp(-1, 1) + 1) / 2
    luma = _luma(picture)  # (B,T,H,W)
    red, green, blue = picture.unbind(2)
    ways = torch.stack([red - green, (red + green) / 2 - blue])  # (2,B,T,H,W)
    spread, middle = ways.var((-2, -1), correction=0).sum(0).sqrt(), ways.mean((-2, -1)).square().sum(0).sqrt()
    first = torch.full_like(luma[:, :1], float("nan"))
    if before is not None:
        first = _luma((torch.nan_to_num(before.float(), nan=0.0).clamp(-1, 1) + 1) / 2)[:, None]
    return {
        "brightness": luma.mean((-2, -1)),
        "contrast": luma.flatten(2).std(2, correction=0),
        "saturation": (picture.amax(2) - picture.amin(2)).mean((-2, -1)),
        "colourfulness": spread + 0.3 * middle,
        "sharpness": _laplacian(luma).flatten(2).std(2, correction=0),
        "motion": (luma - torch.cat([first, luma[:, :-1]], dim=1)).abs().mean((-2, -1)),
    }


def _luma(picture: Tensor) -> Tensor:
    """(...,3,H,W) -> (...,H,W)."""
    return (picture * picture.new_tensor(LUMA)[:, None, None]).sum(-3)


def _laplacian(luma: Tensor) -> Tensor:
    """(B,T,H,W) -> (B,T,H-2,W-2)."""
    kernel = luma.new_tensor([[0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    return F.conv2d(luma.flatten(0, 1)[:, None], kernel)[:, 0].unflatten(0, luma.shape[:2])
