"""Watch a video arrive: python examples/stream.py [PIXEL_FRAMES]

Streams a clip longer than those of training, chunk by chunk, and prints when each chunk was ready to be shown.
"""
# ruff: noqa: T201

from __future__ import annotations

import sys
import time

import torch

import causalreel

PROMPT = "a large green triangle moves left quickly on a light background"


def main(frames: int) -> None:
    pipeline = causalreel.load("tiny")
    start, shown = time.perf_counter(), 0
    for part in pipeline.stream(PROMPT, frames=frames, seed=1):  # (1,t,3,H,W), lazily
        if part.is_cuda:
            torch.cuda.synchronize()  # otherwise the time is that of asking, not of having
        shown += part.shape[1]
        elapsed = time.perf_counter() - start
        print(f"{elapsed:7.3f} s: {shown:4d} of {frames} frames, {shown / elapsed:6.1f} frames/s")
    print(f"played at {pipeline.export.fps:g} frames/s the clip lasts {shown / pipeline.export.fps:.1f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 89)  # 1 + 4 (n - 1) for n latent frames
