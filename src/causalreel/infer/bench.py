"""How fast a pipeline is: first pixels, chunk latency at the start and with a full window, throughput, memory.

Two kinds of rollouts are timed after one to warm up. In the first nothing waits for the GPU but the caller who wants
pixels, as in use: throughput and first-frame latency. In the second every chunk is waited for before the next one is
begun: chunk latencies. Pixels are ready on the device; copying them to the host is the caller's affair and not counted.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch

from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import Schedule, step_count
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.presets import ModelConfig
from causalreel.rollout import Call


@dataclass(frozen=True)
class Latency:
    """Seconds a chunk takes, from the one before it."""

    p50: float
    p90: float
    count: int
    """Chunks measured, all runs together."""


@dataclass(frozen=True)
class Speed:
    """Medians over the measured runs, unless it says otherwise."""

    first_frame_latency_s: float
    """From prepared text to the first pixel frames."""
    first_frame_latency_with_text_s: float
    """From the request, text encoding included, to the first pixel frames."""
    chunk_at_start: Latency
    """Denoise and decode of the second to fourth chunk, nothing overlapped."""
    chunk_at_end: Latency
    """The same of the last three chunks; the window is full if the clip is longer."""
    throughput: float
    """Pixel frames per second of the whole batch, decoding included."""
    generator_throughput: float
    """The same without decoding."""
    frames: int
    """Pixel frames of a clip."""
    batch: int
    """Clips made together."""
    window_fill: float
    """Share of the window that the last chunk sees filled; 1 for a whole clip without a window."""
    peak_memory_mib: float | None
    """Most device memory in tensors, warm-up and recording included; None where the device does not count it."""
    reserved_memory_mib: float | None
    """Most device memory that torch held, recordings' working memory and spare room included."""
    tflops: float | None
    """Rate of the generator's products and attention alone, in 1e12 operations per second."""
    matmul_tflops: float | None
    """What a large bfloat16 product reaches on this device, measured beside it."""
    conditions: dict[str, Any] = field(default_factory=dict)
    """Hardware, versions, model, shapes."""

    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)

    def table(self) -> str:
        """Lines for a terminal."""
        rows = {
            "first pixels": f"{1000 * self.first_frame_latency_s:.1f} ms "
            f"({1000 * self.first_frame_latency_with_text_s:.1f} with text encoding)",
            "chunk, start": _shown(self.chunk_at_start),
            f"chunk, window {self.window_fill:.0%} full": _shown(self.chunk_at_end),
            "throughput": f"{self.throughput:.1f} frames/s ({self.generator_throughput:.1f} without decoding)",
        }
        if self.peak_memory_mib is not None and self.reserved_memory_mib is not None:
            held = f"{self.reserved_memory_mib / 1024:.2f} GiB reserved"
            rows["peak memory"] = f"{self.peak_memory_mib / 1024:.2f} GiB in tensors, {held}"
        if self.tflops is not None and self.matmul_tflops is not None:
            share = self.tflops / self.matmul_tflops
            rows["generator"] = f"{self.tflops:.0f} TFLOP/s, {share:.0%} of a bf16 product's {self.matmul_tflops:.0f}"
        facts = ", ".join(f"{key} {value}" for key, value in self.conditions.items())
        return "\n".join([facts, *(f"  {name:24s} {value}" for name, value in rows.items())])


def _shown(latency: Latency) -> str:
    return f"p50 {1000 * latency.p50:.1f} ms, p90 {1000 * latency.p90:.1f} ms ({latency.count} chunks)"


def measure(pipeline: Pipeline, prompts: Sequence[str], *, frames: int | None = None, runs: int = 3) -> Speed:
    """Generate `runs` times in each manner after one warm-up, as one batch."""
    if runs < 1:
        raise ValueError(f"runs must be at least 1, got {runs}")
    plan, is_cuda = pipeline.schedule(frames=frames), pipeline.device.type == "cuda"
    wait: Callable[[], Any] = torch.cuda.synchronize if is_cuda else _nothing
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(pipeline.device)
    for ahead in (True, False):
        _pixels(pipeline, prompts, frames, wait, ahead=ahead)
    flowing = [_pixels(pipeline, prompts, frames, wait, ahead=True) for _ in range(runs)]
    stepped = [_pixels(pipeline, prompts, frames, wait, ahead=False) for _ in range(runs)]
    peak = torch.cuda.max_memory_allocated(pipeline.device) / 2**20 if is_cuda else None
    reserved = torch.cuda.max_memory_reserved(pipeline.device) / 2**20 if is_cuda else None
    alone = statistics.median(_latents(pipeline, prompts, frames, wait) for _ in range(runs))
    pixels = len(prompts) * pipeline.codec.geometry.frames_of(plan.frames)
    gaps = [[b - a for a, b in pairwise(run.times)] or run.times for run in stepped]
    chunk = plan.sampling.chunk or plan.frames
    fill = (plan.context.span(plan.frames, chunk) or 0) / (plan.context.most_seen(chunk) or plan.frames)
    return Speed(
        first_frame_latency_s=statistics.median(run.times[0] - run.text for run in flowing),
        first_frame_latency_with_text_s=statistics.median(run.times[0] for run in flowing),
        chunk_at_start=_latency(gap for run in gaps for gap in run[:3]),
        chunk_at_end=_latency(gap for run in gaps for gap in run[-3:]),
        throughput=statistics.median(pixels / (run.times[-1] - run.text) for run in flowing),
        generator_throughput=pixels / alone,
        frames=pixels // len(prompts),
        batch=len(prompts),
        window_fill=fill,
        peak_memory_mib=peak,
        reserved_memory_mib=reserved,
        tflops=len(prompts) * _operations(pipeline, plan) / alone / 1e12,
        matmul_tflops=matmul_ceiling(pipeline.device) if is_cuda else None,
        conditions=_conditions(pipeline, plan),
    )


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class _Run:
    text: float
    """Seconds until the text was encoded."""
    times: list[float]
    """Seconds until each chunk's pixels were there."""


def _pixels(
    pipeline: Pipeline, prompts: Sequence[str], frames: int | None, wait: Callable[[], Any], *, ahead: bool
) -> _Run:
    wait()
    start, times = time.perf_counter(), []
    stream = pipeline.stream(prompts, frames=frames, ahead=ahead)
    if not ahead:
        wait()
    text = time.perf_counter() - start
    for _ in stream:
        if ahead:
            _wait_for_here(pipeline.device)
        else:
            wait()
        times.append(time.perf_counter() - start)
    return _Run(text, times)


def _wait_for_here(device: torch.device) -> None:
    """Until this stream is done: pixels are ready, the next chunk may still be in the making."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _latents(pipeline: Pipeline, prompts: Sequence[str], frames: int | None, wait: Callable[[], Any]) -> float:
    """Seconds of a rollout without decoding."""
    chunks = pipeline.latents(prompts, frames=frames)
    wait()
    start = time.perf_counter()
    for _ in chunks:
        pass
    wait()
    return time.perf_counter() - start


def _latency(seconds: Iterable[float]) -> Latency:
    values = sorted(seconds)
    return Latency(statistics.median(values), values[min(len(values) - 1, int(0.9 * len(values)))], len(values))


def _operations(pipeline: Pipeline, plan: Schedule) -> float:
    """Multiplications and additions of one clip's products and attention."""
    latent, config = pipeline.export.latent, pipeline.export.model
    tokens = latent.height * latent.width // config.patch**2
    rows = 1 if plan.sampling.guidance == 1 else 2
    return rows * sum(operations(call, config, tokens, plan.context) for call in plan.plan())


def operations(call: Call, config: ModelConfig, tokens: int, context: ContextPolicy) -> float:
    """Multiplications and additions of one denoiser call, `tokens` a frame: linear layers, text and self-attention.

    Text keys, embeddings and the head are left out: together below 1 %.
    """
    queries = call.frames * tokens
    weights = config.layers * (6 * config.dim**2 + 2 * config.dim * config.ffn_dim)
    visible, end = 0, call.start
    for size in call.sizes:
        end += size
        seen = context.span(end, size) or 0
        visible += size * tokens * seen * tokens
    attention = 4 * config.dim * config.layers * (visible + queries * config.text_length)
    return 2 * queries * weights + attention


def matmul_ceiling(device: torch.device) -> float:
    """Rate of a product of 8192x8192 random bfloat16 matrices, in 1e12 operations a second."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.matmul(a, b)
        end.record()
        torch.cuda.synchronize(device)
        times.append(start.elapsed_time(end) / 1000)
    return 2 * 8192**3 / statistics.median(times[2:]) / 1e12


def _conditions(pipeline: Pipeline, plan: Schedule) -> dict[str, Any]:
    height, width = pipeline.size
    return {
        "model": pipeline.export.name,
        "pixels": f"{height}x{width}",
        "latent_frames": plan.frames,
        "chunk": plan.sampling.chunk,
        "steps": step_count(plan.sampling),
        "window": plan.context.most_seen(plan.sampling.chunk or plan.frames),
        "device": device_name(pipeline.device),
        "torch": str(torch.__version__),
        **gpu_facts(pipeline.device),
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Library versions and, where the driver tells, the clock in MHz."""
    if device.type != "cuda":
        return {"threads": torch.get_num_threads()}
    facts: dict[str, Any] = {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    try:
        facts["clock_mhz"] = torch.cuda.clock_rate(device)
    except (ImportError, ModuleNotFoundError, RuntimeError):  # needs NVML's Python package
        facts["clock_mhz"] = None
    return facts
