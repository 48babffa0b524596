"""Pictures and videos from files as the first frames of a clip: cut to the model's size and to whole latent frames."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.data.video import read_video

log = logging.getLogger(__name__)


def read_picture(path: str | Path, size: tuple[int, int]) -> Tensor:
    """A picture file -> (1,3,H,W) in [-1,1] of `size` (height, width), its longer side cropped around the centre."""
    from PIL import Image, UnidentifiedImageError

    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture at {path}")
    try:
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error
    return fit(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1, size)


def read_clip(path: str | Path, size: tuple[int, int], *, unit: int, factor: int) -> Tensor:
    """A video file -> (T,3,H,W) in [-1,1] of `size`; its first frames up to a multiple of `unit` latent frames."""
    video, _ = read_video(path)
    latent = (1 + (len(video) - 1) // factor) // unit * unit
    if latent == 0:
        raise ValueError(f"{path} has {len(video)} frames, fewer than one chunk ({1 + factor * (unit - 1)})")
    kept = 1 + factor * (latent - 1)
    if kept < len(video):
        log.info("%s: using the first %d of %d frames", path, kept, len(video))
    return fit(video[:kept], size)


def fit(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """(T,3,h,w) -> (T,3,H,W): resized to cover `size` and cropped around the centre."""
    height, width = size
    scale = max(height / frames.shape[-2], width / frames.shape[-1])
    inner = [max(side, round(old * scale)) for side, old in zip(size, frames.shape[-2:], strict=True)]
    if inner != list(frames.shape[-2:]):
        frames = F.interpolate(frames, inner, mode="bilinear", antialias=True, align_corners=False)
    top, left = (inner[0] - height) // 2, (inner[1] - width) // 2
    return frames[..., top : top + height, left : left + width].clamp(-1, 1).contiguous()
