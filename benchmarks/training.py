"""Training steps at full size, with random weights: milliseconds, memory, tokens a second and MFU, stage by stage.

    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True python benchmarks/training.py --out run/training.json    one GPU
    python benchmarks/training.py --tiny                           a rehearsal on a CPU

480x832, 21 latent frames (16x60x104 each), batch 1, a fixed random text embedding: forward, backward, clipping, AdamW
on float32 masters and the averages, as the trainer does them; medians of --runs steps after --warmup. Sections:

- tf: AR diffusion with teacher forcing, chunks of 3 and of 1
- cd: causal consistency distillation (guided teacher, target, student)
- scm: the same in continuous time, with a derivative in forward mode
- dmd: one cycle of asymmetric DMD, five critic updates and one of the student, all networks of one size, and its parts
- attention: the ways to cut masked attention that `nn.masked_attention` chooses from, and its alternatives

MFU is the operations of `train.operations` over time over --peak (default: the datasheet's 989 TFLOP/s of an H100 or
H200); what is computed again does not count.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from causalreel.infer.bench import device_name, gpu_facts, matmul_ceiling
from causalreel.nn.attention import attend
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.masked_attention import attend_cut, best_cut, cut_of
from causalreel.nn.masks import Context, Frame, FrameMask, frame_mask, frames_of
from causalreel.nn.presets import ModelConfig, preset
from causalreel.nn.split_attention import processors_of
from causalreel.parallel.compile import compile_blocks
from causalreel.parallel.fast import PRECISIONS, accelerate
from causalreel.parallel.recompute import recompute_blocks
from causalreel.rollout import chunk_sizes
from causalreel.train.average import Follower
from causalreel.train.kit import Viewer
from causalreel.train.operations import Clip, Work, step_work
from causalreel.train.optim import OptimiserConfig, RoleOptimiser
from causalreel.train.stage import DataCursor, Stage, StepContext
from causalreel.train.stages.ar_diffusion import ARDiffusion, ARDiffusionConfig
from causalreel.train.stages.causal_cd import CausalCD, CausalCDConfig
from causalreel.train.stages.causal_scm import CausalSCM, CausalSCMConfig
from causalreel.train.stages.dmd import DMD, DMDConfig
from causalreel.types import Conditioning, LatentBatch, LatentSpec

SECTIONS = ("tf", "cd", "scm", "dmd", "attention")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LEARNING = OptimiserConfig(lr=2e-6, betas=(0.0, 0.999), weight_decay=0.01, clip=10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=["tf", "cd", "dmd"])
    parser.add_argument("--chunks", nargs="+", type=int, default=[3, 1], help="latent frames per chunk")
    parser.add_argument("--preset", default="wan-1.3b")
    parser.add_argument("--frames", type=int, default=21, help="latent frames")
    parser.add_argument("--size", nargs=2, type=int, default=[60, 104], help="height and width of latents")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="selective")
    parser.add_argument("--attention", default="auto", help="attention backend of the trained networks")
    parser.add_argument("--plain", action="store_true", help="compile nothing")
    parser.add_argument("--critic-repeats", type=int, default=1, help="critic updates on the same samples")
    parser.add_argument("--student-samples", choices=["fresh", "critic"], default="fresh", help="of a DMD cycle")
    parser.add_argument("--noisy-from", type=int, help="`settings.noisy_from` of cd, scm and dmd")
    parser.add_argument("--rollout-precision", choices=PRECISIONS, default="bf16", help="of a DMD cycle's rollouts")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s that MFU is a share of")
    parser.add_argument("--profile", type=Path, help="folder for a table of kernels of each step")
    parser.add_argument("--tiny", action="store_true", help="small networks and clips, nothing compiled")
    parser.add_argument("--out", type=Path, help="file for the numbers, which are printed too")
    args = parser.parse_args()
    if args.tiny:
        args.preset, args.frames, args.size, args.plain, args.warmup = "tiny-smoke", 6, [8, 8], True, 0
    torch.set_float32_matmul_precision("high")
    result = Bench(args).run()
    text = json.dumps(result, indent=1)
    print(text)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


# ------------------------------------------------------------------------------------------------- measuring


class Clips:
    """One random clip and its text, whatever rows are asked for."""

    def __init__(self, frames: int, size: list[int], config: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(1, frames, config.channels, *size, generator=generator).to(DEVICE)
        self.text = torch.randn(1, config.text_length, config.text_dim, generator=generator).to(DEVICE)

    def __len__(self) -> int:
        return 1024

    def batch(self, indices: Tensor) -> LatentBatch:
        rows = len(indices)
        return LatentBatch(Conditioning(self.text.expand(rows, -1, -1)), self.latents.expand(rows, -1, -1, -1, -1))


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.config = args, preset(args.preset)
        self.tokens = args.size[0] * args.size[1] // self.config.patch**2
        self.data = Clips(args.frames, args.size, self.config)
        self.null = torch.zeros_like(self.data.text)
        self.numbers: dict[str, Any] = {}

    def run(self) -> dict[str, Any]:
        conditions = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.args).items()}
        conditions |= {"device": device_name(DEVICE), "torch": str(torch.__version__), **gpu_facts(DEVICE)}
        if DEVICE.type == "cuda":
            conditions["bf16_product_tflops"] = matmul_ceiling(DEVICE)
        for section in self.args.sections:
            for chunk in self.args.chunks:
                getattr(self, section)(chunk)
                gc.collect()  # recordings and their network hold each other
                if DEVICE.type == "cuda":
                    torch.cuda.empty_cache()
        return {"conditions": conditions, **self.numbers}

    # ---- networks

    def network(self, *, is_trained: bool = True, seed: int = 0) -> DiTDenoiser:
        """Random weights: float32 masters computed in bfloat16, or frozen in bfloat16."""
        on_gpu = DEVICE.type == "cuda"
        with torch.device("meta"):
            net = DiTDenoiser(self.config, backend=self.args.attention, compute=torch.bfloat16 if on_gpu else None)
        net = net.to(torch.float32 if is_trained or not on_gpu else torch.bfloat16).to_empty(device=DEVICE)
        generator = torch.Generator(DEVICE).manual_seed(seed)
        for name, parameter in net.named_parameters():
            if "norm" in name and name.endswith("weight"):
                nn.init.ones_(parameter)
            else:
                deviation = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.02
                nn.init.normal_(parameter, std=deviation, generator=generator)
        return net.requires_grad_(is_trained)

    def prepare(self, stage: Stage, trained: list[str]) -> None:
        """What the trainer's run does to networks on a GPU."""
        for role, net in stage.roles.items():
            net = cast(DiTDenoiser, net)
            if role in trained:
                recompute_blocks(net, self.args.recompute)
            if not self.args.plain:
                compile_blocks(net)

    # ---- steps

    def steps(self, name: str, stage: Stage, settings: object, trained: list[str]) -> None:
        """Time whole trainer steps and their parts."""
        sizes: dict[str, ModelConfig] = dict.fromkeys(("student", "critic", "teacher"), self.config)
        work = step_work(settings, sizes, Clip(self.args.frames, LatentSpec(self.config.channels, *self.args.size)))
        assert work is not None
        optimisers = {role: RoleOptimiser(role, stage.roles[role], LEARNING) for role in trained}
        followers = {role: [Follower(a, stage.roles) for a in stage.averages if a.source == role] for role in trained}
        cursor = DataCursor(len(self.data), 0)
        whole, parts = [], {}
        for step in range(self.args.warmup + self.args.runs):
            if step == self.args.warmup and DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = self._step(StepContext(step, 0, self.data, cursor, DEVICE), stage, optimisers, followers)
            if step >= self.args.warmup:
                whole.append(sum(value for values in seconds.values() for value in values))
                for part, values in seconds.items():
                    parts.setdefault(part, []).append(values)
        self.numbers[name] = self.row(whole, work) | {"parts_ms": summary(parts)}
        print(name, json.dumps(self.numbers[name]), flush=True)
        if self.args.profile is not None:
            context = StepContext(self.args.warmup + self.args.runs, 0, self.data, cursor, DEVICE)
            self.profiled(name, lambda: self._step(context, stage, optimisers, followers))

    def _step(self, context: StepContext, stage: Stage, optimisers: dict, followers: dict) -> dict[str, list[float]]:
        """One trainer step -> seconds by part: "before" an update is what the stage does to yield it."""
        seconds: dict[str, list[float]] = {}
        clock = Clock()
        for update in stage.updates(context):
            seconds.setdefault(f"before {update.role}", []).append(clock.lap())
            for compute in update.losses:
                loss, _ = compute()
                (loss / len(update.losses)).backward()
            seconds.setdefault(f"{update.role} pass", []).append(clock.lap())
            optimisers[update.role].step(LEARNING.lr)
            for optimiser in optimisers.values():
                optimiser.clear()
            for follower in followers[update.role]:
                follower.follow(context.step)
            seconds.setdefault(f"{update.role} optimiser", []).append(clock.lap())
        return seconds

    def row(self, seconds: list[float], work: Work) -> dict[str, Any]:
        """The numbers of one kind of step."""
        median = statistics.median(seconds)
        found = {
            "ms": round(1000 * median, 1),
            "all_ms": [round(1000 * value, 1) for value in seconds],
            "tokens": work.tokens,
            "tokens_per_second": round(work.tokens / median),
            "tflop": round(work.flop / 1e12, 1),
            "tflops": round(work.flop / median / 1e12, 1),
            "mfu": round(work.flop / median / 1e12 / self.args.peak, 3),
        }
        if DEVICE.type == "cuda":
            found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
            found["reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 1)
        return found

    def profiled(self, name: str, run: Callable[[], object]) -> None:
        """Kernels of one step by time, as a table in the folder that was asked for."""
        kinds = [torch.profiler.ProfilerActivity.CPU]
        if DEVICE.type == "cuda":
            kinds = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=kinds) as profile:
            run()
            synchronise()
        by = "self_cuda_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
        table = profile.key_averages().table(sort_by=by, row_limit=40, max_name_column_width=90)
        self.args.profile.mkdir(parents=True, exist_ok=True)
        (self.args.profile / f"{name.replace(',', '').replace(' ', '-')}.txt").write_text(table)

    # ---- sections

    def masks(self, chunk: int) -> dict[str, tuple[tuple[Frame, ...], tuple[Frame, ...]]]:
        """Queries and keys of the passes of training."""
        sizes = chunk_sizes(self.args.frames, chunk)
        clean, noisy = frames_of(sizes), frames_of(sizes, stream=1)
        both = clean + noisy
        return {"teacher forced": (both, both), "behind": (noisy, both), "context": (clean, clean)}

    def viewer(self) -> Viewer:
        return Viewer(cast(Any, None), (1.0,), 1)  # nothing is shown

    def tf(self, chunk: int) -> None:
        settings = ARDiffusionConfig(batch=1, chunk=chunk)
        stage = ARDiffusion(settings, student=self.network(), viewer=self.viewer())
        del stage.roles["average"]  # it does not follow; its weights stay beside the others
        stage.averages = []
        self.prepare(stage, ["student"])
        self.steps(f"teacher forcing, chunk {chunk}", stage, settings, ["student"])

    def cd(self, chunk: int) -> None:
        settings = CausalCDConfig(batch=1, chunk=chunk, noisy_from=self.args.noisy_from)
        student, teacher = self.network(), self.network(is_trained=False, seed=1)
        stage = CausalCD(settings, student=student, teacher=teacher, null=self.null, viewer=self.viewer())
        self.prepare(stage, ["student"])
        self.steps(f"causal CD, chunk {chunk}", stage, settings, ["student"])

    def scm(self, chunk: int) -> None:
        settings = CausalSCMConfig(batch=1, chunk=chunk, noisy_from=self.args.noisy_from)
        student, teacher = self.network(), self.network(is_trained=False, seed=1)
        stage = CausalSCM(settings, student=student, teacher=teacher, null=self.null, viewer=self.viewer())
        self.prepare(stage, ["student"])
        self.steps(f"causal sCM, chunk {chunk}", stage, settings, ["student"])

    def dmd(self, chunk: int) -> None:
        nets = {"student": self.network(), "critic": self.network(seed=1)}
        shared = {"critic_repeats": self.args.critic_repeats, "student_samples": self.args.student_samples}
        shared["rollout_precision"] = self.args.rollout_precision
        settings = DMDConfig(batch=1, chunk=chunk, noisy_from=self.args.noisy_from, **shared)
        teacher = self.network(is_trained=False, seed=2)
        stage = DMD(settings, **nets, teacher=teacher, null=self.null, viewer=self.viewer())
        if stage.sampler is not stage.student and not self.args.plain:
            accelerate(stage.sampler, precision=self.args.rollout_precision)
        self.prepare(stage, ["student", "critic"])
        self.steps(f"DMD cycle, chunk {chunk}", stage, settings, ["student", "critic"])

    def attention(self, chunk: int) -> None:
        """Every way to cut each mask, FlexAttention, and plain attention where there is no mask."""
        sizes = chunk_sizes(self.args.frames, chunk)
        masks = {name: frame_mask(*sides, Context()) for name, sides in self.masks(chunk).items()}
        if chunk == self.args.chunks[0]:
            whole = frames_of([sum(sizes)])
            masks["no mask"] = frame_mask(whole, whole, Context())
        for name, mask in masks.items():
            rows = self.args.frames if mask is None else len(mask.allowed)
            columns = self.args.frames if mask is None else len(mask.allowed[0])
            found = {label: self._attention(attends, rows, columns) for label, attends in self.ways(mask).items()}
            self.numbers[f"attention, {name}, chunk {chunk}"] = found
            print(name, chunk, json.dumps(found), flush=True)

    def ways(self, mask: FrameMask | None) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        tokens = self.tokens
        ways: dict[str, Any] = {
            backend: (lambda q, k, v, b=backend: attend(q, k, v, mask, tokens, backend=b))
            for backend in (["pieces", "sdpa"] if mask is None else ["flex"] if DEVICE.type == "cuda" else [])
        }
        if mask is not None:
            for way in ((), (2,), (3,), (6,), (12,), (4, 2), (6, 2), (6, 3), (8, 2), (12, 2), (12, 3), (12, 6)):
                cut = cut_of(mask, way)
                ways[f"bundles {way}"] = lambda q, k, v, c=cut: attend_cut(q, k, v, c, tokens)
            chosen = best_cut(mask, tokens, self.config.heads, processors_of(DEVICE))
            ways["chosen"] = lambda q, k, v: attend_cut(q, k, v, chosen, tokens)
        return ways

    def _attention(self, attends: Callable[[Tensor, Tensor, Tensor], Tensor], rows: int, columns: int) -> list[float]:
        """Milliseconds of the forward and of the backward pass."""
        config, dtype = self.config, torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
        shape = (config.heads, config.dim // config.heads)
        q, k, v = (
            torch.randn(1, count * self.tokens, *shape, device=DEVICE, dtype=dtype).requires_grad_()
            for count in (rows, columns, columns)
        )
        gradient, times = torch.randn_like(q), []
        for run in range(1 + self.args.runs):
            clock = Clock()
            out = attends(q, k, v)
            forward = clock.lap()
            out.backward(gradient)
            if run:
                times.append((forward, clock.lap()))
            q.grad = k.grad = v.grad = None
        return [round(1000 * statistics.median(part), 2) for part in zip(*times, strict=True)]


class Clock:
    """Wall clock around what the GPU was given."""

    def __init__(self) -> None:
        synchronise()
        self.began = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        synchronise()
        now = time.perf_counter()
        self.began, seconds = now, now - self.began
        return seconds


def synchronise() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def summary(parts: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Milliseconds of each part of a step: the mean of one, and how many there are in a step."""
    found = {}
    for part, steps in parts.items():
        values = [value for step in steps for value in step]
        found[part] = {"ms": round(1000 * statistics.mean(values), 1), "times": len(steps[0])}
    return found


if __name__ == "__main__":
    main()
