"""Pictures and videos from files as the first frames of a clip: cut to the model's size and to whole latent frames."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.data.video import read_video

log = logging.getLogger(__name__)


Fit = Literal["crop", "pad"]
"""How a picture of another shape is brought to the video's: its longer side cropped, or black bars added."""


def read_picture(path: str | Path, size: tuple[int, int] | None = None, how: Fit = "crop") -> Tensor:
    """A picture file -> (1,3,H,W) in [-1,1] of `size` (height, width), or as large as it is."""
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    frames = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1
    return frames if size is None else fit(frames, size, how)


def read_clip(path: str | Path, size: tuple[int, int], *, unit: int, factor: int, how: Fit = "crop") -> Tensor:
    """A video file -> (T,3,H,W) in [-1,1] of `size`; its first frames up to a multiple of `unit` latent frames."""
    video, _ = read_video(path)
    latent = (1 + (len(video) - 1) // factor) // unit * unit
    if latent == 0:
        raise ValueError(f"{path} has {len(video)} frames, fewer than one chunk ({1 + factor * (unit - 1)})")
    kept = 1 + factor * (latent - 1)
    if kept < len(video):
        log.info("%s: using the first %d of %d frames", path, kept, len(video))
    return fit(video[:kept], size, how)


def fit(frames: Tensor, size: tuple[int, int], how: Fit = "crop") -> Tensor:
    """(T,3,h,w) -> (T,3,H,W), the aspect kept: resized to cover `size` and cropped around the centre, or to lie within
    it between black bars. The released code stretches instead, which distorts."""
    if how not in ("crop", "pad"):
        raise ValueError(f"fit must be crop or pad, got {how!r}")
    height, width = size
    choose, bound = (max, max) if how == "crop" else (min, min)
    scale = choose(height / frames.shape[-2], width / frames.shape[-1])
    inner = [max(1, bound(side, round(old * scale))) for side, old in zip(size, frames.shape[-2:], strict=True)]
    if inner != list(frames.shape[-2:]):
        frames = F.interpolate(frames, inner, mode="bilinear", antialias=True, align_corners=False)
    top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
    if how == "pad":
        sides = (-left, width - inner[1] + left, -top, height - inner[0] + top)
        return F.pad(frames.clamp(-1, 1), sides, value=-1.0)
    return frames[..., top : top + height, left : left + width].clamp(-1, 1).contiguous()
