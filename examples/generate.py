"""Prompts to video files: python examples/generate.py [PROMPT ...]

Makes one clip per prompt, a batch at a time, and shows that a clip depends on its prompt and seed alone.
"""
# ruff: noqa: T201

from __future__ import annotations

import sys

import torch

import causalreel
from causalreel.data.video import write_video

PROMPTS = [
    "a large red circle moves right slowly on a dark background",
    "a small yellow square moves down quickly and a large cyan triangle moves left slowly on a grey background",
]


def main(prompts: list[str]) -> None:
    pipeline = causalreel.load("tiny")  # or the folder of an export; device="cpu" to stay off the GPU
    video = pipeline.generate(prompts, seed=0)  # (B,T,3,H,W) in [-1, 1]; clip i has seed 0 + i
    for index, clip in enumerate(video):
        path = f"generated-{index}.mp4"
        frames = write_video(path, clip, pipeline.export.fps, scale=4)
        print(f"{path}: {frames} frames, {prompts[index]!r}")

    alone = pipeline.generate(prompts[-1], seed=len(prompts) - 1)
    print(f"alone or in a batch: largest difference {torch.max(torch.abs(alone[0] - video[-1])):.1e}")


if __name__ == "__main__":
    main(sys.argv[1:] or PROMPTS)
