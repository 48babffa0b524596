"""Minutes of video from the generator, under every context policy: is a chunk as fast, and memory as large, at the end?

    python benchmarks/long_speed.py --out runs/long_speed.json                            for a GPU, random 1.3B weights
    python benchmarks/long_speed.py --out x.json --model tiny/frame-1step --weights "" --decoder "" \\
        --noisy-models tiny/frame-1step tiny/frame-2step --minutes 0.5 --clips 45 --runs 1       in miniature, on a CPU

policies: one rollout of --minutes for each policy, every chunk of it made and waited for, latents dropped. For each
minute the chunks that end it: median and 95th percentile of their time, memory, and the GPU's clock just behind them,
which moves by some percent. The first minute is ten windows of a model trained on 21 latent frames, so `flat` is the
last minute over the first. What the policy's cache allows is said: recorded (CUDA graphs), or growing (kernel by
kernel) where chunks do not fit it.
noisy: pixels a second, decoder and all, of clips whose chunks become context as their last call read them, beside the
committed forms: by a call more (plain), and by one that shares the next chunk's first call (fused).

The file is written anew after every minute, so that nothing is lost by stopping.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from causalreel.files import write_text
from causalreel.infer.accelerate import accelerate
from causalreel.infer.bench import device_name, gpu_facts
from causalreel.infer.manner import Manner
from causalreel.infer.models import load, profile
from causalreel.infer.pipeline import Pipeline
from causalreel.nn.caches import static_kind
from causalreel.nn.policies.registry import described
from causalreel.parallel.fast import FastDiT

POLICIES = ("sink", "infinity-rope", "memrope", "rolling-sink", "re-indexed", "window", "deep-forcing", "relax-forcing")
"""Those that hold ever as much, one of each kind of cache first; rolling forcing is a plan of its own."""

NOISY = ("causal-rcm/framewise-1step", "causal-rcm/framewise-2step")
FORMS = ("committed, fused", "committed, plain", "noisy context")
PROMPT = "a large red circle moves right"
IS_GPU = torch.cuda.is_available()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/long_speed.json"))
    parser.add_argument("--model", default="causal-forcing/framewise-1step")
    parser.add_argument("--noisy-models", nargs="+", default=NOISY, help="their schedules, on the same weights")
    parser.add_argument("--weights", default="random", help="'': the model's own")
    parser.add_argument("--decoder", default="taehv", help="'': the model's own")
    parser.add_argument("--sections", nargs="+", default=["noisy", "policies"], choices=("noisy", "policies"))
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--minutes", type=float, default=5, help="of video")
    parser.add_argument("--looked-at", type=int, default=30, help="chunks at the end of each minute")
    parser.add_argument("--clips", type=int, nargs="+", default=[81, 161], help="noisy: pixel frames of a clip")
    parser.add_argument("--runs", type=int, default=3, help="noisy: clips of each kind")
    parser.add_argument("--budget", type=float, default=0, help="seconds after which nothing new is begun; 0: none")
    Bench(parser.parse_args()).run()


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.monotonic()
        given = {name: getattr(args, name) for name in ("weights", "decoder") if getattr(args, name)}
        self.base = load(args.model, **given)
        facts = gpu_facts(self.base.device) | {"device": device_name(self.base.device)}
        facts |= {"torch": str(torch.__version__), "pixels": "x".join(map(str, self.base.size))}
        told = {name: str(value) for name, value in vars(args).items()}
        self.result: dict[str, Any] = {"conditions": facts, "args": told, "policies": {}, "noisy": {}}

    def run(self) -> None:
        sections: dict[str, Callable[[], Iterator[tuple[str, Callable[[], None]]]]]
        sections = {"policies": self.policies, "noisy": self.noisy}
        left = []
        for section in self.args.sections:
            for name, unit in sections[section]():
                if self.args.budget and time.monotonic() - self.began > self.args.budget:
                    left.append(name)
                    continue
                try:
                    unit()
                except Exception as error:  # the other units are worth having
                    self.result.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
                    print(f"{name}: FAILED, {type(error).__name__}: {error}", flush=True)
                self.save()
        if left:
            self.result["not_begun"] = left
            print(f"not begun within {self.args.budget:g} s: {', '.join(left)}", flush=True)
        self.save()

    def save(self) -> None:
        self.result["seconds"] = time.monotonic() - self.began
        self.args.out.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.args.out, json.dumps(self.result, indent=1))

    def made(self, export: Any, sampling: Any) -> Pipeline:
        """The network under another policy or schedule, with recordings of its own; those before are given up."""
        run = self.base.denoiser.run
        if isinstance(run, FastDiT) and run.graphs is not None:
            run.graphs.release()
        self.base.denoiser.run = run = None
        gc.collect()
        if IS_GPU:
            torch.cuda.empty_cache()
        self.base.denoiser.context = export.context
        return accelerate(dataclasses.replace(self.base, export=export, sampling=sampling))

    # ---- minutes under a policy ----

    def policies(self) -> Iterator[tuple[str, Callable[[], None]]]:
        for policy in self.args.policies:
            yield policy, lambda policy=policy: self.policy(policy)

    def policy(self, policy: str) -> None:
        base = self.base
        pipeline = self.made(*Manner(policy).of(base.export, base.sampling))
        chunk, latents = base.sampling.chunk or 1, base.export.fps / base.geometry.temporal
        minute = max(round(60 * latents) // chunk, 1)
        count = max(round(60 * latents * self.args.minutes) // chunk, self.args.looked_at)
        ends = sorted({*range(minute, count, minute), count})
        frames = base.geometry.frames_of(count * chunk)
        context = pipeline.schedule(frames).context
        row: dict[str, Any] = {"policy": described(context), "cache": kind_of(pipeline, count), "minutes": []}
        self.result["policies"][policy] = row
        times: list[float] = []
        wait()
        memory()  # its peak from here on
        began = before = time.perf_counter()
        rollout = pipeline.latents([PROMPT], frames=frames)
        for number in range(1, count + 1):
            next(rollout)
            wait()
            now = time.perf_counter()
            times.append(1000 * (now - before))
            if number in ends:
                row["minutes"].append(summary(times[-self.args.looked_at :]) | memory() | clock() | {"chunks": number})
                self.save()
            before = time.perf_counter()
        row["seconds"] = time.perf_counter() - began
        row["first_chunks_ms"] = times[: min(len(times), 30)]
        first, last = row["minutes"][0], row["minutes"][-1]
        row["flat"] = last["p50_ms"] / first["p50_ms"]
        row["memory_grew_mib"] = {key: last[key] - first[key] for key in first if key.endswith("_mib")}
        print(
            f"{policy:14s} {row['cache']:9s} {row['seconds']:6.1f} s   chunk p50 "
            + " ".join(f"{part['p50_ms']:.2f}" for part in row["minutes"])
            + f" ms   p95 {last['p95_ms']:.2f}   last/first {row['flat']:.4f}   memory "
            + ", ".join(f"{key} {last[key]:.0f} ({grew:+.0f})" for key, grew in row["memory_grew_mib"].items()),
            flush=True,
        )

    # ---- noisy context ----

    def noisy(self) -> Iterator[tuple[str, Callable[[], None]]]:
        for frames in self.args.clips:
            for model in self.args.noisy_models:
                for form in FORMS:
                    name = f"{model}, {form}, {frames} frames"
                    yield name, lambda name=name, model=model, form=form, n=frames: self.clip(name, model, form, n)

    def clip(self, name: str, model: str, form: str, frames: int) -> None:
        known = profile(model, manner=Manner(noisy_context=1) if form == FORMS[2] else Manner())
        pipeline = self.made(known.export, known.sampling)
        how: dict[str, Any] = {"frames": frames, "fused": form == FORMS[0]}

        def seconds(make: Callable[..., Iterator[Any]]) -> float:
            wait()
            began = time.perf_counter()
            for _ in make([PROMPT], **how):
                pass
            wait()
            return time.perf_counter() - began

        warm = [seconds(pipeline.stream), seconds(pipeline.latents)]
        whole = [seconds(pipeline.stream) for _ in range(self.args.runs)]
        latents = [seconds(pipeline.latents) for _ in range(self.args.runs)]
        row = {
            "fps": frames / statistics.median(whole),
            "fps_without_decoding": frames / statistics.median(latents),
            "calls": len(list(pipeline.schedule(frames).plan(fused=how["fused"]))),
            "seconds": whole,
            "seconds_without_decoding": latents,
            "warm_up_s": warm,
        }
        self.result["noisy"][name] = row | memory() | clock()
        print(
            f"{name:60s} {row['calls']:4d} calls  {row['fps']:6.1f} frames/s, "
            f"{row['fps_without_decoding']:6.1f} without decoding   warm-up {sum(warm):.1f} s",
            flush=True,
        )


def kind_of(pipeline: Pipeline, chunks: int) -> str:
    """What the policy's rollouts can be, on a GPU."""
    context, chunk = pipeline.export.context.bounded(pipeline.export.frames), pipeline.sampling.chunk or 1
    return "growing" if static_kind(context, chunk, chunks * chunk) is None else "recorded"


def wait() -> None:
    if IS_GPU:
        torch.cuda.synchronize()


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"p50_ms": statistics.median(ordered), "p95_ms": ordered[int(0.95 * (len(ordered) - 1))]}


def memory() -> dict[str, float]:
    """MiB, the most since it was last asked for, and what torch holds; without a GPU the process's pages."""
    if not IS_GPU:
        pages = Path("/proc/self/statm")
        return {"resident_mib": int(pages.read_text().split()[1]) / 256} if pages.exists() else {}
    numbers = {
        "tensors_mib": torch.cuda.memory_allocated(),
        "peak_mib": torch.cuda.max_memory_allocated(),
        "reserved_mib": torch.cuda.memory_reserved(),
    }
    torch.cuda.reset_peak_memory_stats()
    return {key: value / 2**20 for key, value in numbers.items()}


def clock() -> dict[str, str]:
    """MHz, degrees and watts as the driver tells them."""
    if not IS_GPU:
        return {}
    command = ["nvidia-smi", "--query-gpu=clocks.sm,temperature.gpu,power.draw", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"gpu": "; ".join(told.split("\n")).strip("; ")}


if __name__ == "__main__":
    main()
