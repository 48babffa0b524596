"""Finished videos of camera models, as benchmarks of the field keep them: {id}.mp4 beside a manifest.json.

Where a trajectory comes back to a pose that it has left, the picture should be there again: what is measured is how
alike the two pictures are, on any video, without estimating poses. `control.benchmarks` says what the files are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from causalreel.control.benchmarks import output_name
from causalreel.control.poses import Array
from causalreel.control.strings import FRAMES, latent_poses
from causalreel.data.video_in import read_video
from causalreel.eval.control import psnr
from causalreel.foreign import read_json, shown

LONGEST = 10_000
"""Frames of a video that are read."""
SIDE = 256
"""Pictures are compared at this height, so that videos of different sizes compare."""
SAME, AWAY = (0.01, 0.01), (0.05, 0.05)
"""Distance in the trajectory's units, and radians: up to which poses are the same, and from which one has left."""


@dataclass(frozen=True)
class Result:
    """A finished video."""

    id: str
    video: Path
    trajectory: str | None


def read_manifest(folder: str | Path) -> list[Result]:
    """The videos of a folder's manifest.json; ValueError naming an item that lacks something, or a video not there."""
    folder = Path(folder)
    place = folder / "manifest.json"
    items = read_json(place, what="manifest of videos").get("items")
    if not isinstance(items, list) or not items:
        raise ValueError(f"{place}: items is {shown(items)}, expected a list of videos")
    found = []
    for number, item in enumerate(items):
        where = f"{place}, item {number}"
        if not isinstance(item, Mapping):
            raise ValueError(f"{where}: expected an object, got {shown(item)}")
        name, trajectory = item.get("id"), item.get("trajectory")
        if not isinstance(name, str) or not (trajectory is None or isinstance(trajectory, str)):
            raise ValueError(
                f"{where}: id must be text, trajectory text or null; got {shown(name)}, {shown(trajectory)}"
            )
        video = item.get("video", output_name(name))
        if not isinstance(video, str) or Path(video).name != video:
            raise ValueError(f"{where}: video is {shown(video)}, expected a file's name in the folder")
        if not (folder / video).is_file():
            raise ValueError(f"{where}: {folder / video} is missing")
        found.append(Result(name, folder / video, trajectory))
    return found


def returns(c2w: Array) -> list[tuple[int, int]]:
    """Poses (F,4,4) -> pairs of frames with the same pose, of which the path has left it in between."""
    found = []
    for first, pose in enumerate(c2w):
        distance = np.linalg.norm(c2w[first:, :3, 3] - pose[:3, 3], axis=-1)  # (F-first,)
        traces = np.einsum("aij,ij->a", c2w[first:, :3, :3], pose[:3, :3])
        angle = np.arccos(np.clip((traces - 1) / 2, -1, 1))
        left = np.flatnonzero((distance >= AWAY[0]) | (angle >= AWAY[1]))
        if len(left):
            start = int(left[0])
            back = start + np.flatnonzero((distance[start:] <= SAME[0]) & (angle[start:] <= SAME[1]))[:1]
            found += [(first, first + int(later)) for later in back]
    return found


def revisited(result: Result, dialect: str) -> tuple[float, int]:
    """-> mean PSNR in dB of what a video shows when it is back where it was, and how often it is; NaN if never.

    ValueError for a trajectory that the dialect cannot read or that is longer than the video.
    """
    if result.trajectory is None:
        return float("nan"), 0
    try:
        poses = latent_poses(result.trajectory, dialect, most=(LONGEST - 1) // FRAMES + 1)
    except ValueError as error:
        raise ValueError(f"{result.video}: {error}") from None
    pairs = returns(poses)
    if not pairs:
        return float("nan"), 0
    last = FRAMES * max(later for _, later in pairs)
    height, width = read_video(result.video, frames=1)[0].shape[-2:]
    scale = min(1.0, SIDE / height)
    size = (max(1, round(scale * height)), max(1, round(scale * width)))
    video, _ = read_video(result.video, frames=last + 1, size=size)
    if len(video) <= last:
        raise ValueError(
            f"{result.video} has {len(video)} frames, its trajectory {shown(result.trajectory)} is back at frame {last}"
        )
    found = [float(psnr(video[FRAMES * a], video[FRAMES * b])) for a, b in pairs]
    return sum(found) / len(found), len(found)


def measure(folder: str | Path, dialect: str) -> dict[str, Tensor]:
    """A folder's videos -> `revisit psnr` and `revisits` of each (B,), NaN and 0 where a path never comes back."""
    found = [revisited(result, dialect) for result in read_manifest(folder)]
    return {
        "revisit psnr": torch.tensor([value for value, _ in found]),
        "revisits": torch.tensor([float(count) for _, count in found]),
    }
