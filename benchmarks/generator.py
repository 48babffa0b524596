"""The generator alone at full size, with random weights: times, errors against float32, and where the time goes.

    python benchmarks/generator.py --preset wan-1.3b --out runs/bench/generator.json

480x832, 21 latent frames, batch 1, a fixed random text embedding; text encoder and decoder excluded. Times of whole
rollouts are wall clock around a synchronised GPU, median of --runs after one to warm up; blocks are synchronised one by
one in a rollout of their own. Sections: errors, attention, settings (the fast network, fused calls), plain (calls not
fused, and the plain network), profile, long, fp8, cameras (minWM's setting, and one frame in 2 steps, with heads that
see through cameras beside the network without: --sections cameras alone).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
import traceback
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from causalreel.control.strings import latent_poses, view_matrices
from causalreel.flow import warp_steps
from causalreel.nn import kernels
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.fp8_attention import PackedMemory, attend_packed
from causalreel.nn.kv_cache import KVCache
from causalreel.nn.masks import Context, frame_mask, frames_of
from causalreel.nn.presets import Camera, preset
from causalreel.nn.split_attention import attend_plain, attend_split, attend_with_sum, parts_of
from causalreel.parallel.fast import PRECISIONS, FastDiT, accelerate
from causalreel.rollout import KeyedNoise, chunked, collect, fuse, rollout
from causalreel.types import Conditioning, LatentSpec

FOUR, TWO, ONE = (1000, 750, 500, 250), (1000, 500), (1000,)
SETTINGS = {
    "chunkwise-4step": (3, FOUR, None),
    "framewise-4step": (1, FOUR, None),
    "framewise-2step": (1, TWO, FOUR),
    "framewise-1step": (1, ONE, FOUR),
}

CAMERA_SETTINGS = {"minwm-4step": (4, FOUR, None), "framewise-2step": (1, TWO, FOUR)}
"""minWM's: 20 frames in chunks of 4."""

SECTIONS = ("errors", "attention", "settings", "plain", "fp8", "profile", "long", "cameras")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""A CPU only rehearses: sections errors, settings and long, at sizes given on the command line."""


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def random_denoiser(name: str, *, layers: int | None = None, camera: Camera = "none") -> DiTDenoiser:
    """Wan's sizes with random weights, made on the GPU in bfloat16."""
    config = type(preset(name))(**{**vars(preset(name)), "camera": camera})
    if layers is not None:
        config = type(config)(**{**vars(config), "layers": layers})
    with torch.device("meta"):
        net = DiTDenoiser(config)
    net = net.to(torch.bfloat16).to_empty(device=DEVICE).requires_grad_(False).eval()
    generator = torch.Generator(DEVICE).manual_seed(0)
    for key, parameter in net.named_parameters():
        if "norm" in key and key.endswith("weight"):
            parameter.fill_(1.0)
        elif key.endswith("bias"):
            parameter.normal_(0, 0.02, generator=generator)
        else:
            parameter.normal_(0, parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02, generator=generator)
    return net


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.net = random_denoiser(args.preset, layers=args.layers)
        self.spec = LatentSpec(16, args.height // 8, args.width // 8)
        config = self.net.config
        text = torch.randn(1, config.text_length, config.text_dim, generator=torch.Generator().manual_seed(1)).to(
            DEVICE
        )
        self.told = Conditioning(text)
        self.result: dict[str, Any] = {"conditions": conditions(args)}

    def rollout(self, net: DiTDenoiser, setting: str, *, frames: int, plan: str, context: Context, sync: bool = False):
        chunk, steps, first = (SETTINGS | CAMERA_SETTINGS)[setting]
        sigmas = warp_steps(steps, 5.0)
        calls = chunked([chunk] * (frames // chunk), sigmas, first=None if first is None else warp_steps(first, 5.0))
        if isinstance(net.run, FastDiT):
            size = (self.spec.height, self.spec.width)
            cache = net.run.new_cache(context, chunk=chunk, frames=frames, batch=1, size=size)
        else:
            cache = KVCache(net.config.layers, context)
        noise = KeyedNoise([0], self.spec, DEVICE)
        times, chunks = [time.perf_counter()], []
        with torch.no_grad():
            told = net.prepare(Conditioning(self.told.text, walk(frames) if net.config.camera == "prope" else {}))
            synchronise()
            times[0] = time.perf_counter()
            for part in rollout(
                net, fuse(calls) if plan == "fused" else calls, conditioning=told, noise=noise, cache=cache
            ):
                chunks.append(part)
                if sync:
                    synchronise()
                    times.append(time.perf_counter())
            synchronise()
            times.append(time.perf_counter())
        return collect(chunks), times

    def setting(self, net: DiTDenoiser, label: str, setting: str, plan: str) -> None:
        args, context = self.args, Context(window=21)
        how: dict[str, Any] = {"frames": args.frames, "plan": plan, "context": context}
        began = time.perf_counter()
        self.rollout(net, setting, **how)
        warm = time.perf_counter() - began
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        totals = []
        for _ in range(args.runs):
            _, times = self.rollout(net, setting, **how)
            totals.append(1000 * (times[-1] - times[0]))
        _, times = self.rollout(net, setting, **how, sync=True)
        blocks = [1000 * (b - a) for a, b in pairwise(times[:-1])]
        row = {
            "total_ms": statistics.median(totals),
            "all_ms": totals,
            "first_ms": blocks[0],
            "second_ms": blocks[1],
            "last_ms": blocks[-1],
            "fps": (4 * args.frames - 3) / statistics.median(totals) * 1000,
            "warm_up_s": warm,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0,
        }
        self.result.setdefault("settings", {})[f"{setting}, {plan}, {label}"] = row
        print(
            f"{setting:16s} {plan:6s} {label:10s} {row['total_ms']:8.1f} ms  ({row['fps']:5.1f} FPS)  "
            f"blocks {row['first_ms']:.1f} / {row['second_ms']:.1f} / {row['last_ms']:.1f}  "
            f"spread {min(totals):.1f}-{max(totals):.1f}  peak {row['peak_gib']:.2f} GiB  warm-up {warm:.1f} s",
            flush=True,
        )

    def cameras(self) -> None:
        """The network with heads that see through cameras and without, in chunks of minWM's 4 frames and one by one."""
        self.args.frames, self.net = 20, None  # type: ignore[assignment] - its memory
        for camera in ("none", "prope"):
            for precision in ("bf16", "fp8-attention", "eager"):
                net = None  # its memory goes before the next one's comes
                if DEVICE == "cuda":
                    torch.cuda.empty_cache()
                net = random_denoiser(self.args.preset, layers=self.args.layers, camera=camera)
                if precision != "eager":
                    net = accelerate(net, precision=precision)
                if precision == "fp8-attention" and isinstance(net.run, FastDiT):
                    net.run.release_originals()
                for name in CAMERA_SETTINGS if precision != "eager" else ("minwm-4step",):
                    self.setting(
                        net, f"{precision}, camera {camera}", name, "plain" if precision == "eager" else "fused"
                    )

    def long(self, net: DiTDenoiser, setting: str) -> None:
        """Past the window: is a block as fast after minutes as it was when the window had just filled?"""
        chunk = SETTINGS[setting][0]
        frames = self.args.long_frames // chunk * chunk
        how: dict[str, Any] = {"plan": "fused", "context": Context(window=21)}
        self.rollout(net, setting, frames=30, **how)
        _, times = self.rollout(net, setting, frames=frames, **how, sync=True)
        blocks = [1000 * (b - a) for a, b in pairwise(times[:-1])]
        full = 21 // chunk + 1
        first, last = statistics.median(blocks[full : full + 20]), statistics.median(blocks[-20:])
        row = {"frames": frames, "first_full_ms": first, "last_ms": last, "ratio": last / first}
        self.result.setdefault("long", {})[setting] = row
        print(
            f"long {setting}: {frames} latent frames, block {first:.2f} -> {last:.2f} ms, {last / first:.4f}",
            flush=True,
        )

    def errors(self) -> None:
        """Latents of short rollouts against the network in float32, kernel by kernel, on the same noise."""
        frames, context = 6, Context(window=21)
        exact = copy.deepcopy(self.net).float()
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        for setting in ("chunkwise-4step", "framewise-2step"):
            how: dict[str, Any] = {"frames": frames, "context": context}
            expected, _ = self.rollout(exact, setting, plan="plain", **how)
            plain, _ = self.rollout(self.net, setting, plan="plain", **how)
            row = {"plain bf16": relative(plain, expected)}
            for precision in PRECISIONS:
                fast = accelerate(copy.deepcopy(self.net), precision=precision)
                for plan in ("plain", "fused"):
                    for _ in range(2):  # the second one replays
                        found, _ = self.rollout(fast, setting, plan=plan, **how)
                    row[f"{precision} {plan}, graphs"] = relative(found, expected)
                del fast
            self.result.setdefault("errors", {})[setting] = row
            print(f"errors {setting}: " + ", ".join(f"{k} {v:.2e}" for k, v in row.items()), flush=True)
        del exact
        torch.cuda.empty_cache()

    def profile(self, net: DiTDenoiser, setting: str) -> None:
        """Kernel time of the last blocks, by kind."""
        from torch.profiler import ProfilerActivity, profile

        how: dict[str, Any] = {"frames": self.args.frames, "plan": "fused", "context": Context(window=21)}
        self.rollout(net, setting, **how)
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            self.rollout(net, setting, **how)
        rows = sorted(recorded.key_averages(), key=lambda e: -e.self_device_time_total)[:18]
        self.result.setdefault("profile", {})[setting] = [
            (e.key[:90], e.self_device_time_total / 1000, e.count) for e in rows
        ]
        print(f"profile {setting}, ms of the whole rollout:")
        for e in rows:
            print(f"  {e.self_device_time_total / 1000:8.2f} ms {e.count:6d} x  {e.key[:100]}", flush=True)

    def attention(self) -> None:
        """Microseconds by visible frames, for each number of parts; what is chosen; the fused mask."""
        config, frame = self.net.config, self.args.height * self.args.width // 256
        heads, width = config.heads, config.dim // config.heads
        kv = torch.randn(2, 1, 24 * frame, heads, width, device=DEVICE, dtype=torch.bfloat16)
        for rows in (1, 2, 3, 6):
            q = torch.randn(1, rows * frame, heads, width, device=DEVICE, dtype=torch.bfloat16)
            for n in (1, 3, 6, 11, 16, 21):
                k, v = kv[0, :, : n * frame], kv[1, :, : n * frame]
                line = {"plain": micros(partial(attend_plain, q, k, v))}
                for parts in (2, 3, 4, 5, 6):
                    if k.shape[1] % parts == 0:
                        line[str(parts)] = micros(partial(merged, q, k, v, parts))
                chosen = parts_of(q.shape[1], heads, k.shape[1], 132)
                self.result.setdefault("attention", {})[f"{rows}x{n}"] = line | {"chosen": chosen}
                print(
                    f"attention q={rows} n={n}: chosen {chosen}  " + "  ".join(f"{k} {v:.0f}" for k, v in line.items())
                )
        for chunk, n in ((1, 2), (1, 11), (1, 21), (3, 6), (3, 21)):
            mask = frame_mask(
                frames_of((chunk, chunk), start=n - 2 * chunk), frames_of((chunk,) * (n // chunk)), Context()
            )
            q = torch.randn(1, 2 * chunk * frame, heads, width, device=DEVICE, dtype=torch.bfloat16)
            k, v = kv[0, :, : n // chunk * chunk * frame], kv[1, :, : n // chunk * chunk * frame]
            found = micros(partial(attend_split, q.unsqueeze(0), k, v, mask, frame))
            self.result["attention"][f"fused {chunk}x{n}"] = found
            print(f"attention fused chunk={chunk} n={n}: {found:.0f} us", flush=True)
        for rows in (1, 2, 3, 6):
            for n in (1, 3, 6, 11, 21):
                found, share = self.attention_e4m3(rows, n, frame, heads, width)
                self.result["attention"][f"e4m3 {rows}x{n}"] = found, share
                print(f"attention e4m3 q={rows} n={n}: {found:.0f} us, sums {share:.4f} of the exact ones", flush=True)

    def attention_e4m3(self, rows: int, n: int, frame: int, heads: int, width: int) -> tuple[float, float]:
        """Microseconds, merging included, and how large results are beside float32 ones of the same e4m3 numbers.

        Values have a mean, so that sums which lose something are seen.
        """
        size: dict[str, Any] = {"layers": 1, "heads": heads, "head_dim": width, "frames": n, "batch": 1}
        memory = PackedMemory(**size, tokens=frame, dtype=torch.bfloat16, device=DEVICE)
        k, v = torch.randn(2, 1, n * frame, heads, width, device=DEVICE)
        memory.store(0, memory.places, k, v + torch.randn(heads, width, device=DEVICE))
        q = kernels.to_fp8(torch.randn(1, rows * frame, heads, width, device=DEVICE))
        run = partial(attend_packed, q, memory, 0, slice(0, n * frame), None, frame)
        k, v = memory.view(0, slice(0, n * frame))
        some = (x.float().transpose(1, 2) for x in (q[:, :256], k, v))
        exact = torch.nn.functional.scaled_dot_product_attention(*some).transpose(1, 2)
        found = run()[0][:, :256].float()
        return micros(run), ((found * exact).sum() / exact.square().sum()).item()


def walk(frames: int) -> dict[str, torch.Tensor]:
    """Cameras of a walk forwards that turns left."""
    w2c = torch.from_numpy(view_matrices(latent_poses("w*5,j*99", "minwm", latents=frames))).float()
    intrinsics = torch.tensor([0.505, 0.898, 0.5, 0.5]).expand(1, frames, 4)
    return {"w2c": w2c[None].to(DEVICE), "intrinsics": intrinsics.to(DEVICE)}


def merged(q, k, v, parts):
    out = torch.empty_like(q[0])
    lent = (x[0].unflatten(0, (parts, -1)) for x in (k, v))
    kernels.merge([attend_with_sum(q.expand(parts, -1, -1, -1).contiguous(), *lent)], out)
    return out


def micros(run) -> float:
    for _ in range(3):
        run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(5):
            run()
    graph.replay()
    synchronise()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        synchronise()
        times.append(start.elapsed_time(end) * 1000 / 5)
    return statistics.median(times)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else "none",
        "torch": str(torch.__version__),
        "cudnn": torch.backends.cudnn.version(),
        "preset": args.preset,
        "pixels": [args.height, args.width],
        "frames": args.frames,
        "weights": "random",
        "bf16_matmul_tflops": ceiling() if DEVICE == "cuda" else None,
    }


def ceiling() -> float:
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / micros(lambda: a @ b) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="wan-1.3b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--frames", type=int, default=21)
    parser.add_argument("--long-frames", type=int, default=90)
    parser.add_argument("--long-settings", nargs="*", default=["framewise-1step", "chunkwise-4step"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    print(json.dumps(bench.result["conditions"]), flush=True)

    def guarded(name: str, run) -> None:
        if name not in args.sections:
            return
        try:
            run()
        except Exception as error:
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
            traceback.print_exc()
        if args.out is not None:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(bench.result, indent=1))

    guarded("errors", bench.errors)
    guarded("attention", bench.attention)

    def fast(precision: str = "bf16") -> DiTDenoiser:
        torch.cuda.empty_cache()
        return accelerate(copy.deepcopy(bench.net), precision=precision)

    def settings() -> None:
        net = fast()
        for name in SETTINGS:
            bench.setting(net, "fast", name, "fused")

    def plain() -> None:
        net = fast()
        bench.setting(net, "fast", "framewise-1step", "plain")
        bench.setting(net, "fast", "chunkwise-4step", "plain")
        bench.setting(bench.net, "eager", "framewise-1step", "plain")

    def fp8() -> None:
        net = None
        for precision in PRECISIONS[1:]:
            net = None  # its memory goes before the next one's comes
            net = fast(precision)
            for name in SETTINGS:
                bench.setting(net, precision, name, "fused")
        if DEVICE == "cuda" and net is not None:
            bench.profile(net, "framewise-1step")

    def each(run: Callable[[DiTDenoiser, str], None], settings: list[str]) -> None:
        net = fast()
        for name in settings:
            run(net, name)

    guarded("settings", settings)
    guarded("plain", plain)
    guarded("profile", lambda: each(bench.profile, ["framewise-1step", "chunkwise-4step"]))
    guarded("long", lambda: each(bench.long, args.long_settings))
    guarded("fp8", fp8)
    guarded("cameras", bench.cameras)


if __name__ == "__main__":
    main()
