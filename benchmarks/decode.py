"""Streaming decode at one size with random weights: the plain path and the fast ones, times, memory, error.

    python benchmarks/decode.py --out decode.json                # everything; about two minutes on an H200
    python benchmarks/decode.py --only winograd,taehv            # variants whose name holds one of these
    python benchmarks/decode.py --height 64 --width 96 --repeat 2 --device cpu --dim 8    # a trial without a GPU

Times are CUDA events around calls on an idle GPU, milliseconds per latent frame, after warm-up. Errors are
|fast - exact| / |exact| over the frames of the same latents, exact being the plain stream in float32 without TF32.
A variant that fails is reported and the others still run. `convolutions` times one 3x3x3 convolution per resolution
with the pass before it, for every method; the variant "best by width" uses the fastest of each.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from causalreel.codecs.fast_decode import FastDecoder, fast_decoder
from causalreel.codecs.fast_taehv import TAEHVProgram
from causalreel.codecs.fast_wan import METHODS, Arithmetic, Convolution
from causalreel.codecs.passes import Sink, Source, between
from causalreel.codecs.taehv import TAEHV, TAEHVConfig
from causalreel.codecs.wan_vae import PRESETS, CausalConv, CausalVAE, ChannelNorm, VAEConfig

LATENTS = 7
"""Latent frames over which errors are measured: the first, and two calls by 3 or six by 1."""


def randomise(codec: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights that keep activations at unit scale and most pixels inside [-1, 1]."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(1.0).add_(0.1 * torch.randn_like(parameter))
                continue
            fan = parameter[0].numel() if parameter.ndim > 1 else 0
            parameter.copy_(torch.randn_like(parameter) * (fan**-0.5 if fan else 0.1))
            if name.startswith(("decoder.head.2", "decoder.22")) or name.endswith("conv.4.weight"):
                parameter.mul_(0.3)
            if name == "decoder.22.bias":
                parameter.add_(0.5)
    return codec.requires_grad_(False).eval()


class Clock:
    """Times of calls: CUDA events on a GPU, the process clock without one."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"

    def __call__(self, work: Callable[[], Any]) -> float:
        """Milliseconds."""
        if not self.on_gpu:
            start = time.perf_counter()
            work()
            return 1000 * (time.perf_counter() - start)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


class Bench:
    """One size, one device, one set of latents, and what was found."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.clock = Clock(self.device)
        self.rows: dict[str, dict[str, Any]] = {}
        self.wan = CausalVAE(VAEConfig(dim=args.dim, latent_mean=PRESETS["wan2.1"].latent_mean)).to(self.device)
        self.taehv = TAEHV(TAEHVConfig()).to(self.device)
        randomise(self.wan)
        randomise(self.taehv)
        shape = (1, LATENTS, 16, args.height // 8, args.width // 8)
        self.latents = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.device)
        self._exact: dict[str, Tensor] = {}

    def exact(self, family: str) -> Tensor:
        """Frames of the plain stream in float32."""
        if family not in self._exact:
            torch.backends.cudnn.benchmark = False  # trying algorithms would take longer than the few calls
            stream = (self.wan if family == "wan" else self.taehv).stream()
            frames = [stream(self.latents[:, i : i + 1]).cpu() for i in range(LATENTS)]
            self._exact[family] = torch.cat(frames, 1)
            torch.backends.cudnn.benchmark = True
        return self._exact[family]

    def measure(self, family: str, make: Callable[[], Callable[[], Any]], by: int) -> dict[str, Any]:
        """make() -> a factory of streams; decode the latents by `by`, then time."""
        start = time.perf_counter()
        new = make()
        self.settle()
        built = time.perf_counter() - start
        stream = new()
        pieces = [(0, 1), *((i, i + by) for i in range(1, LATENTS, by))]
        frames = torch.cat([stream(self.latents[:, a:b]).cpu() for a, b in pieces], 1)
        wanted = self.exact(family)
        error = ((frames - wanted).double().norm() / wanted.double().norm()).item()
        first_one, first_three, steady = [], [], []
        for _ in range(3):
            stream = new()
            first_one.append(self.clock(lambda s=stream: s(self.latents[:, :1])))
            stream = new()
            first_three.append(self.clock(lambda s=stream: s(self.latents[:, :3])))
        for i in range(self.args.repeat + 2):
            a = 1 + i * by % (LATENTS - 1)
            took = self.clock(lambda s=stream, a=a: s(self.latents[:, a : a + by])) / by
            steady += [took] if i >= 2 else []
        return {
            "p50_ms": statistics.median(steady),
            "p90_ms": sorted(steady)[int(0.9 * (len(steady) - 1))],
            "first_latent_ms": min(first_one),
            "first_three_ms": min(first_three),
            "error": error,
            "build_s": built,
        }

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run(self, name: str, family: str, by: int, make: Callable[[], Callable[[], Any]]) -> None:
        """A row of the table, or why there is none."""
        if self.args.only and not any(part in name for part in self.args.only.split(",")):
            return
        gc.collect()
        if self.device.type == "cuda":
            self.exact(family)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            row = self.measure(family, make, by)
            if self.device.type == "cuda":
                row["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
                row["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        except Exception as error:  # one variant that fails must not stop the others
            traceback.print_exc()
            row = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        self.rows[f"{name}, by {by}"] = row
        print(line(f"{name}, by {by}", row), flush=True)
        self.save()

    def save(self, **more: Any) -> None:
        self.__dict__.setdefault("_more", {}).update(more)
        if self.args.out:
            found = {"conditions": conditions(self.args), "rows": self.rows, **self.__dict__["_more"]}
            partial = Path(self.args.out).with_suffix(".tmp")
            partial.write_text(json.dumps(found, indent=1), encoding="utf-8")
            os.replace(partial, self.args.out)


def line(name: str, row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"{name:44s} failed: {row['failed']}"
    keys = ("p50_ms", "p90_ms", "first_latent_ms", "first_three_ms")
    cells = [f"{row[key]:9.2f}" for key in keys] + [f"{row['error']:9.5f}", f"{row['build_s']:7.1f}"]
    cells += [f"{row.get(key, float('nan')):8.2f}" for key in ("peak_allocated_gib", "peak_reserved_gib")]
    return f"{name:44s}" + " ".join(cells)


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    on_gpu = args.device.startswith("cuda")
    return {
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": sys.version.split()[0],
        "pixels": [args.height, args.width],
        "batch": 1,
        "dim": args.dim,
        "repeat": args.repeat,
        "weights": "random",
        "cudnn.benchmark": "on, except rows that say otherwise",
        "fp32 matmul and convolution": "no TF32",
    }


def half(codec: nn.Module, dtype: torch.dtype) -> Any:
    """A copy of the codec in another dtype."""
    copied = type(codec)(codec.config)  # pyright: ignore[reportCallIssue, reportArgumentType]
    copied.load_state_dict(codec.state_dict())
    return copied.to(next(codec.parameters()).device, dtype).requires_grad_(False).eval()


def variants(bench: Bench, best: Arithmetic | None) -> Iterator[tuple[str, str, int, Callable[[], Callable[[], Any]]]]:
    """name, family, latents per call, factory."""
    height, width = bench.args.height, bench.args.width

    def fast(codec: Any, dtype: torch.dtype, by: int, **how: Any) -> Callable[[], Callable[[], Any]]:
        return lambda: fast_decoder(codec, height, width, dtype=dtype, sizes=sorted({1, by}), **how).stream

    def unbenchmarked() -> Callable[[], Any]:
        torch.backends.cudnn.benchmark = False
        return half(bench.wan, torch.bfloat16).stream

    def unfused(by: int) -> Callable[[], Callable[[], Any]]:
        def make() -> Callable[[], Any]:
            on_gpu = bench.device.type == "cuda"
            program = TAEHVProgram(bench.taehv, fp16, bench.device, "triton" if on_gpu else "torch")
            program._is_fused = False
            c, h, w = bench.latents.shape[2:]
            return FastDecoder(program, (1, c, h, w), device=bench.device, sizes=(by, 1), graphs=on_gpu).stream

        return make

    bf16, fp16 = torch.bfloat16, torch.float16
    yield "wan plain bf16", "wan", 1, lambda: half(bench.wan, bf16).stream
    for method in ("winograd", "conv3d"):
        yield f"wan fast bf16 {method}", "wan", 1, fast(bench.wan, bf16, 1, arithmetic=Arithmetic(even=method))
    if best is not None:
        yield "wan fast bf16 best by width", "wan", 1, fast(bench.wan, bf16, 1, arithmetic=best)
    for by in (1, 3):
        yield "taehv fast float16", "taehv", by, fast(bench.taehv, fp16, by)
        yield "taehv fast bfloat16", "taehv", by, fast(bench.taehv, bf16, by)
        yield "taehv fast float16, nothing fused in cuDNN", "taehv", by, unfused(by)
        yield "taehv plain float16", "taehv", by, lambda: half(bench.taehv, fp16).stream
    wide = Arithmetic(widths={bench.args.dim: "wide"})
    yield "wan fast bf16 winograd, narrowest wide", "wan", 1, fast(bench.wan, bf16, 1, arithmetic=wide)
    for method in ("stacked", "paired", "concat"):
        yield f"wan fast bf16 {method}", "wan", 1, fast(bench.wan, bf16, 1, arithmetic=Arithmetic(even=method))
    yield "wan fast bf16 winograd", "wan", 3, fast(bench.wan, bf16, 3)
    if best is not None:
        yield "wan fast bf16 best by width", "wan", 3, fast(bench.wan, bf16, 3, arithmetic=best)
    yield "wan fast fp16 winograd", "wan", 1, fast(bench.wan, fp16, 1)
    yield "wan fast bf16 winograd, no graphs", "wan", 1, fast(bench.wan, bf16, 1, graphs=False)
    yield "wan plain bf16", "wan", 3, lambda: half(bench.wan, bf16).stream
    yield "wan plain bf16, cudnn.benchmark off", "wan", 1, unbenchmarked
    yield "taehv plain bfloat16", "taehv", 1, lambda: half(bench.taehv, bf16).stream
    yield "wan fast bf16 conv3d", "wan", 3, fast(bench.wan, bf16, 3, arithmetic=Arithmetic(even="conv3d"))


def convolutions(bench: Bench) -> tuple[list[dict[str, Any]], Arithmetic]:
    """Each method at each resolution of a steady call: convolution and pass -> rows, and the fastest by width."""
    h, w, dim = bench.args.height // 8, bench.args.width // 8, bench.args.dim
    places = [(4 * dim, 1, 1), (4 * dim, 2, 2), (2 * dim, 4, 4), (dim, 8, 4)]
    rows: list[dict[str, Any]] = []
    widths: dict[int, Any] = {}
    odd: dict[Any, float] = {}
    backend = "triton" if bench.device.type == "cuda" else "torch"
    for channels, scale, frames in places:
        conv, norm = CausalConv(channels, channels).to(bench.device), ChannelNorm(channels).to(bench.device)
        shape = (1, frames, scale * h, scale * w, channels)
        flop = 2 * 27 * channels**2 * frames * scale**2 * h * w
        totals: dict[Any, float] = {}
        for method in METHODS:
            made = Convolution(conv, norm, Arithmetic(even=method), torch.bfloat16).to(bench.device)
            if made.arithmetic.method(frames, channels) != method:
                continue
            try:
                took = _one_convolution(bench, made, method, shape, backend)
            except Exception as error:  # as above
                rows.append({"shape": shape, "method": method, "failed": str(error)[:200]})
                continue
            rate = flop / took["conv_ms"] / 1e9
            rows.append({"shape": shape, "method": method, "tflops_of_direct": rate, **took})
            totals[method] = took["conv_ms"] + took["pass_ms"]
            print(f"conv {shape} {method:9s}", {key: round(value, 3) for key, value in took.items()}, f"{rate:.0f}")
        if frames % 2 == 0 and totals:
            widths[channels] = min(totals, key=lambda key: totals[key])
        if frames % 2:
            odd = {key: value for key, value in totals.items() if key in ("conv3d", "concat")}
    chosen: Any = min(odd, key=lambda key: odd[key]) if odd else "conv3d"
    return rows, Arithmetic(even="winograd", odd=chosen, widths=widths)


def _one_convolution(
    bench: Bench, conv: Convolution, method: Any, shape: tuple[int, ...], backend: Any
) -> dict[str, float]:
    b, _, h, w, c = shape
    x = torch.randn(shape, device=bench.device).bfloat16()
    kind = conv.sink(method)
    state = torch.zeros(b, 2, h, w, c, device=bench.device, dtype=torch.bfloat16)
    pending = torch.zeros_like(state) if method == "stacked" else None
    sink = Sink(kind, conv.gamma, None if kind == "frames" else state)
    _, stored = between(Source("frames", x), sink, backend=backend)
    assert stored is not None
    source = conv(stored, method, pending)

    def a_pass() -> None:
        between(source, sink, residual=x, keep=True, backend=backend)

    def convolve() -> None:
        conv(stored, method, pending)

    times = {}
    for name, work in (("pass_ms", a_pass), ("conv_ms", convolve)):
        for _ in range(3):
            work()
        times[name] = min(bench.clock(work) for _ in range(3 if bench.device.type == "cpu" else 15))
    return times


def profile(bench: Bench, best: Arithmetic | None) -> list[dict[str, Any]]:
    """Kernels of one steady call, longest first."""
    decoder = fast_decoder(bench.wan, bench.args.height, bench.args.width, arithmetic=best)
    stream = decoder.stream()
    stream(bench.latents[:, :2])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
        stream(bench.latents[:, 2:3])
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.self_device_time_total > 0]
    events.sort(key=lambda e: -e.self_device_time_total)
    rows = [{"kernel": e.key[:110], "calls": e.count, "ms": e.self_device_time_total / 1000} for e in events[:25]]
    print(f"steady call, kernels {sum(e.self_device_time_total for e in events) / 1000:.2f} ms")
    for row in rows:
        print(f"  {row['ms']:8.3f} ms {row['calls']:4d}  {row['kernel']}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--dim", type=int, default=96, help="width of the Wan VAE at full resolution")
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="comma-separated parts of variants' names")
    parser.add_argument("--seconds", type=float, default=170, help="no further variant is begun after this")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    start = time.perf_counter()
    with torch.no_grad():
        bench = Bench(args)
        print(json.dumps(conditions(args)))
        torch.backends.cudnn.benchmark = True
        best = None
        try:
            rows, best = convolutions(bench)
            bench.save(convolutions=rows, best=str(best))
            print("best by width:", best)
        except Exception:  # as above
            traceback.print_exc()
        titles = ("p50 ms", "p90 ms", "first", "first 3", "error", "build s", "GiB", "reserved")
        print(f"{'per latent frame':44s}" + " ".join(title.rjust(8 + (i < 5)) for i, title in enumerate(titles)))
        for name, family, by, make in variants(bench, best):
            torch.backends.cudnn.benchmark = True
            if time.perf_counter() - start > args.seconds:
                print(f"out of time: {name}, by {by}")
                continue
            bench.run(name, family, by, make)
        if bench.device.type == "cuda":
            bench.save(kernels=profile(bench, best))
    print(f"{time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
