"""Pictures and videos from files as the first frames of a clip: cut to the model's size and to whole latent frames."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor

from causalreel.data.pictures import Fit, decode_picture, fit, read_picture
from causalreel.data.video_in import read_video
from causalreel.types import Geometry

__all__ = ["Fit", "decode_picture", "fit", "read_clip", "read_picture"]

log = logging.getLogger(__name__)


def read_clip(
    path: str | Path,
    size: tuple[int, int],
    *,
    unit: int,
    geometry: Geometry,
    how: Fit = "crop",
    fps: float | None = None,
    most: int | None = None,
) -> Tensor:
    """A video file -> (T,3,H,W) in [-1,1] of `size`; its first frames up to a multiple of `unit` latent frames.

    fps: the model's, at which frames are picked by their time; None: all frames of the file. most: latent frames, a
    multiple of `unit`, that there is room for; no more is decoded than it takes to see that a video is longer, which
    is a ValueError.
    """
    limit = None if most is None else geometry.frames_of(most + unit)
    video, _ = read_video(path, frames=limit, fps=fps, size=size, how=how)
    latent = geometry.latents_in(len(video)) // unit * unit
    at = "" if fps is None else f" at {fps:g} a second"
    if latent == 0:
        raise ValueError(f"{path} has {len(video)} frames{at}, fewer than one chunk ({geometry.frames_of(unit)})")
    if most is not None and latent > most:
        raise ValueError(
            f"{path} has more than {geometry.frames_of(most)} frames{at}, which leaves no room for new ones: ask for a "
            f"longer video with --frames, or give a shorter one"
        )
    kept = geometry.frames_of(latent)
    if kept < len(video):
        log.info("%s: using the first %d of %d frames%s", path, kept, len(video), at)
    return video[:kept]
