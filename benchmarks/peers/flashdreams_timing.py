"""The timed part: rollouts of the generator, streams through a decoder, and one group of settings after the other."""

from __future__ import annotations

import gc
import importlib
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.flashdreams_package import (
    build_decoder,
    build_pipeline,
    remove_graph_breaks,
    scheduler_config,
    stub_absent,
    use_compile_mode,
)
from benchmarks.peers.flashdreams_settings import Options, Setting, Work

# ---- timing ----------------------------------------------------------------------------------------------------------


class Marks:
    """Points in the device's time: events on a GPU, the clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"
        self.points: list[Any] = []

    def mark(self) -> None:
        import torch

        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append(event)
        else:
            self.points.append(time.perf_counter())

    def spans_ms(self) -> list[float]:
        """Milliseconds between neighbouring marks; waits for the device."""
        pairs = list(zip(self.points, self.points[1:], strict=False))
        if not self.on_gpu:
            return [1000 * (after - before) for before, after in pairs]
        self.points[-1].synchronize()
        return [before.elapsed_time(after) for before, after in pairs]


def synchronize(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


@dataclass
class Rollout:
    """Times of one rollout in ms: wall clock of all, and each block's denoising and cache update."""

    total: float
    denoise: list[float]
    update: list[float]
    latents: list[Any]


class Generator:
    """A pipeline with one step list for block 1 and one for the others; the package has no such config of its own."""

    def __init__(self, pipeline: Any, work: Work, options: Options) -> None:
        import torch

        self.pipeline, self.work, self.device = pipeline, work, options.device
        draw = torch.Generator().manual_seed(1)
        self.text = torch.randn(1, *work.text, generator=draw).to(options.device, torch.bfloat16)

    def set_steps(self, setting: Setting) -> None:
        self.blocks = self.work.frames // setting.chunk
        self.first, self.rest = (
            scheduler_config(steps).setup().to(self.device) for steps in (setting.first, setting.rest)
        )

    def start(self) -> Any:
        """A cache for a new rollout (text keys and values included: neither is timed), with block 1's steps set."""
        self.pipeline.diffusion_model.scheduler = self.first
        context = {"height": self.work.height, "width": self.work.width, "text_embeddings": self.text}
        cache = self.pipeline.initialize_cache(transformer_context=context)
        synchronize(self.device)
        return cache

    def rollout(self) -> Rollout:
        """All blocks; the cache update runs after the last one too, as the package's own runner does."""
        cache, marks, latents = self.start(), Marks(self.device), []
        began = time.perf_counter()
        marks.mark()
        for block in range(self.blocks):
            latents.append(self.pipeline.generate(block, cache))
            self.pipeline.diffusion_model.scheduler = self.rest
            marks.mark()
            self.pipeline.finalize(block, cache)
            marks.mark()
        synchronize(self.device)
        total = 1000 * (time.perf_counter() - began)
        spans = marks.spans_ms()
        return Rollout(total, spans[0::2], spans[1::2], latents)

    def first_pixels(self, decoder: Any) -> float:
        """Milliseconds from the start of denoising to block 1's pixels, decoded as one chunk."""
        cache, decoding = self.start(), decoder.initialize_autoregressive_cache()
        began = time.perf_counter()
        latent = self.pipeline.generate(0, cache)
        decoder(input=latent, autoregressive_index=0, cache=decoding)
        synchronize(self.device)
        return 1000 * (time.perf_counter() - began)

    def calls_of(self, run: Callable[[], Any]) -> int:
        """How often the network is called during `run`."""
        transformer, calls = self.pipeline.diffusion_model.transformer, 0
        plain = transformer.predict_flow

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return plain(*args, **kwargs)

        transformer.predict_flow = counted
        try:
            run()
        finally:
            del transformer.predict_flow
        return calls


def graphs_compiled() -> int:
    """Graphs that torch.compile has made in this process."""
    counters = importlib.import_module("torch._dynamo.utils").counters
    return int(counters["stats"].get("unique_graphs", 0))


def require_finite(tensors: Iterable[Any], what: str) -> None:
    for tensor in tensors:
        if not bool(tensor.isfinite().all()) or float(tensor.float().std()) == 0:
            raise RuntimeError(f"{what} are not finite or constant: the run is broken, its times mean nothing")


def time_generator(generator: Generator, setting: Setting, options: Options, decoder: Any) -> dict[str, Any]:
    """Warm up, count, then time `options.repeats` rollouts -> the setting's record."""
    generator.set_steps(setting)
    began = time.perf_counter()
    for _ in range(max(options.warmup - 1, 0)):
        generator.rollout()
    calls = generator.calls_of(lambda: require_finite(generator.rollout().latents, "latents"))
    due = len(setting.first) + (generator.blocks - 1) * len(setting.rest) + generator.blocks
    if calls != due:
        raise RuntimeError(f"{setting.name}: {calls} network calls in a rollout, {due} expected")
    warmup_s, compiled = time.perf_counter() - began, graphs_compiled()
    reset_peak(options.device)
    rollouts = [generator.rollout() for _ in range(options.repeats)]
    block = [statistics.median(r.denoise[i] + r.update[i] for r in rollouts) for i in range(generator.blocks)]
    record: dict[str, Any] = {
        "rollout_ms": statistics.median(r.total for r in rollouts),
        "rollouts_ms": [r.total for r in rollouts],
        "without_last_update_ms": statistics.median(r.total - r.update[-1] for r in rollouts),
        "block_1_ms": block[0],
        "block_2_ms": block[min(1, len(block) - 1)],
        "block_last_ms": block[-1],
        "block_ms": block,
        "block_1_denoise_ms": statistics.median(r.denoise[0] for r in rollouts),
        "network_calls": calls,
        "graphs_compiled_while_timing": graphs_compiled() - compiled,
        "warmup_s": warmup_s,
        "peak_gib": peak_gib(options.device),
    }
    record["pixel_fps"] = 1000 * generator.work.pixel_frames / record["rollout_ms"]
    if decoder is not None:
        times = [generator.first_pixels(decoder) for _ in range(options.warmup + options.repeats)]
        record["first_pixels_wan_vae_ms"] = statistics.median(times[options.warmup :])
    return record


def time_decoder(decoder: Any, setting: Setting, work: Work, options: Options) -> dict[str, Any]:
    """Stream random latents chunk by chunk: the first chunk, the steady ones, and the whole clip -> a record.

    The package runs chunk 1 apart, chunks 2 and 3 as warm-up and captures its CUDA graph at chunk 4, in every stream
    anew; chunks from the fifth on are steady. The stream goes past the clip when that leaves fewer than eight of them.
    """
    import torch

    clip = work.frames // setting.chunk
    chunks = max(clip, 12)
    draw = torch.Generator().manual_seed(2)
    shape = (1, setting.chunk, 16, work.height, work.width)
    latents = [torch.randn(shape, generator=draw).to(options.device, torch.bfloat16) for _ in range(chunks)]

    def stream() -> list[float]:
        cache, marks, pixels = decoder.initialize_autoregressive_cache(), Marks(options.device), latents[0]
        synchronize(options.device)
        marks.mark()
        for index, latent in enumerate(latents):
            pixels = decoder(input=latent, autoregressive_index=index, cache=cache)
            marks.mark()
            due = 4 * setting.chunk - (3 if index == 0 else 0)
            if pixels.shape[1] != due:
                raise RuntimeError(f"chunk {index} gave {pixels.shape[1]} pixel frames, {due} expected")
        require_finite([pixels], "pixels")
        return marks.spans_ms()

    began = time.perf_counter()
    for _ in range(options.warmup):
        stream()
    warmup_s, compiled = time.perf_counter() - began, graphs_compiled()
    reset_peak(options.device)
    streams = [stream() for _ in range(options.repeats)]
    return {
        "steady_ms_per_latent": statistics.median(ms for s in streams for ms in s[4:]) / setting.chunk,
        "first_chunk_ms": statistics.median(s[0] for s in streams),
        "clip_ms": statistics.median(sum(s[:clip]) for s in streams),
        "chunk_ms": [statistics.median(s[i] for s in streams) for i in range(chunks)],
        "graphs_compiled_while_timing": graphs_compiled() - compiled,
        "warmup_s": warmup_s,
        "peak_gib": peak_gib(options.device),
    }


def reset_peak(device: str) -> None:
    import torch

    gc.collect()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    import torch

    return None if device == "cpu" else torch.cuda.max_memory_allocated() / 2**30


# ---- one group of settings, in its own process -----------------------------------------------------------------------


def run_group(settings: Sequence[Setting], work: Work, options: Options) -> Iterator[dict[str, Any]]:
    """Settings of one group in this process -> their records, as they come; a setting that fails says so in its own."""
    import torch

    stubbed = stub_absent()
    torch.backends.cudnn.benchmark = True
    version = importlib.import_module("flashdreams").__version__
    changed = list(remove_graph_breaks()) if options.removes_breaks(settings[0].chunk) else []
    if options.compile_mode:
        use_compile_mode(options.compile_mode)
    told = {"version": version, "stubbed": stubbed, "min_max_in": changed, "compile_mode": options.compile_mode}
    yield {"kind": "environment", **told, **machine(options.device)}
    built: Generator | None = None
    decoder: Any = None
    for setting in settings:
        head = {
            "kind": "decoder" if setting.decoder else "generator",
            "setting": setting.name,
            **variant(options, setting),
        }
        try:
            if setting.decoder:
                times = time_decoder(build_decoder(setting.decoder, work, options), setting, work, options)
            else:
                if built is None:
                    built = Generator(build_pipeline(setting.chunk, work, options), work, options)
                    decoder = build_decoder("wan", work, options)
                times = time_generator(built, setting, options, decoder)
            yield {**head, "status": "ok", **times}
        except Exception as error:
            traceback.print_exc()
            yield {**head, "status": "failed", "error": f"{type(error).__name__}: {error}"[:2000]}


def variant(options: Options, setting: Setting) -> dict[str, str]:
    """How this setting's code was run, in words."""
    if setting.decoder == "wan":
        return {"variant": "eager kernels, CUDA graph"}
    if not options.compiled:
        return {"variant": "eager"}
    if setting.decoder:
        return {"variant": "compiled, CUDA graph"}
    return {"variant": "compiled, no graph breaks" if options.removes_breaks(setting.chunk) else "compiled"}


def machine(device: str) -> dict[str, Any]:
    """Names and versions that the numbers depend on."""
    import torch

    if device == "cpu":
        return {"device": "cpu", "torch": torch.__version__}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        state = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        state = f"nvidia-smi: {error}"
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver, clocks, power limit": state,
    }
