"""How fast a pipeline is: first-frame latency, chunk latency, throughput and memory, decoding included."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from causalreel.infer.pipeline import Pipeline


@dataclass(frozen=True)
class Speed:
    """Medians over the measured runs."""

    first_frame_latency_s: float
    """From the request, text encoding included, to the first pixel frames."""
    chunk_latency_s: float
    """Between two chunks of pixel frames."""
    throughput: float
    """Pixel frames per second of the whole batch, from the request to the last frame."""
    frames: int
    """Pixel frames of a clip."""
    batch: int
    """Clips made together."""
    peak_memory_mib: float | None
    """Most device memory held; None where the device does not count it."""


def measure(pipeline: Pipeline, prompts: Sequence[str], *, frames: int | None = None, runs: int = 3) -> Speed:
    """Generate `runs` times after one warm-up, as one batch."""
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    is_cuda = pipeline.device.type == "cuda"
    times, pixels = _run(pipeline, prompts, frames)  # warm-up
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(pipeline.device)
    measured = [_run(pipeline, prompts, frames)[0] for _ in range(runs)]
    gaps = [later - earlier for times in measured for earlier, later in pairwise(times)]
    return Speed(
        first_frame_latency_s=statistics.median(times[0] for times in measured),
        chunk_latency_s=statistics.median(gaps or times),
        throughput=statistics.median(len(prompts) * pixels / times[-1] for times in measured),
        frames=pixels,
        batch=len(prompts),
        peak_memory_mib=torch.cuda.max_memory_allocated(pipeline.device) / 2**20 if is_cuda else None,
    )


def _run(pipeline: Pipeline, prompts: Sequence[str], frames: int | None) -> tuple[list[float], int]:
    """-> seconds from the request to each chunk's frames, and the clip's length in pixel frames."""
    start, times, pixels = time.perf_counter(), [], 0
    for part in pipeline.stream(prompts, frames=frames):
        if pipeline.device.type == "cuda":
            torch.cuda.synchronize(pipeline.device)
        times.append(time.perf_counter() - start)
        pixels += part.shape[1]
    return times, pixels
