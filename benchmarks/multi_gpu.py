"""Chunk latency of one stream on several GPUs, and how far its latents are from those of one GPU. Random weights.

    torchrun --standalone --nproc_per_node=1 benchmarks/multi_gpu.py --out run/multi     # first: the others compare
    torchrun --standalone --nproc_per_node=2 benchmarks/multi_gpu.py --out run/multi
    torchrun --standalone --nproc_per_node=4 benchmarks/multi_gpu.py --out run/multi

480x832, batch 1, chunks of 3 latent frames, 4 steps, commits in calls of their own (not fused), window 21. Each run
writes MODEL-N.json (numbers and conditions) and MODEL-N.pt (latents), and prints a line for each model. The network is
`parallel.fast.FastDiT`, with recorded calls on one GPU, or with --network plain the plain one, called eagerly.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from causalreel.flow import warp_steps
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.masks import Context
from causalreel.nn.presets import ModelConfig, preset
from causalreel.parallel.fast import PRECISIONS, FastDiT, accelerate
from causalreel.parallel.mesh import Mesh, join, launch
from causalreel.parallel.ulysses import shard_sequence
from causalreel.rollout import KeyedNoise, chunked, fuse, rollout
from causalreel.types import Cache, Conditioning, LatentSpec

CHUNK, WINDOW, STEPS = 3, 21, warp_steps((1000.0, 750.0, 500.0, 250.0), 5.0)
PRIORITY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
NOISE_FRAMES = 6
"""Latent frames of the float32 rollout that says how large bfloat16 noise is."""


def build(config: ModelConfig, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> DiTDenoiser:
    """A network with the same random weights in every process, made on the device in its final type."""
    with torch.device("meta"):
        net = DiTDenoiser(config, context=Context(window=WINDOW))
    net = net.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in net.named_parameters():
        if "modulation" in name:
            parameter.normal_(0, config.dim**-0.5, generator=generator)
        elif parameter.ndim > 1:
            parameter.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        else:
            parameter.fill_(float("norm" in name and name.endswith("weight")))
    return net


def run(net: DiTDenoiser, latent: LatentSpec, frames: int, *, fused: bool) -> tuple[Tensor, list[float]]:
    """One rollout -> latents (1,F,C,H,W), and milliseconds of every chunk."""
    device = net.model.device
    text = torch.randn(1, net.config.text_length, net.config.text_dim, generator=torch.Generator().manual_seed(1))
    told = net.prepare(Conditioning(text.to(device)))
    plan = chunked([CHUNK] * (frames // CHUNK), STEPS)
    noise = _Drawn(KeyedNoise([0], latent), frames, device)
    made, times = [], []
    _synchronise(device)
    last = time.perf_counter()
    cache: Cache = net.new_cache()
    if isinstance(net.run, FastDiT):
        size = (latent.height, latent.width)
        cache = net.run.new_cache(net.context, chunk=CHUNK, frames=frames, batch=1, size=size)
    chunks = rollout(net, fuse(plan) if fused else plan, conditioning=told, noise=noise, cache=cache)
    for chunk in chunks:
        made.append(chunk.latents)
        _synchronise(device)
        now = time.perf_counter()
        times.append(1000 * (now - last))
        last = now
    return torch.cat(made, 1), times


class _Drawn:
    """The noise of a rollout, drawn and moved to the device before the clock starts."""

    def __init__(self, noise: KeyedNoise, frames: int, device: torch.device) -> None:
        starts = range(0, frames, CHUNK)
        self.drawn = {
            (start, draw): noise.renoise(start, CHUNK, draw).to(device)
            for start in starts
            for draw in range(len(STEPS))
        }

    def initial(self, start: int, frames: int) -> Tensor:
        return self.drawn[start, 0]

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        return self.drawn[start, draw]


def measure(name: str, args: argparse.Namespace, mesh: Mesh | None, device: torch.device) -> None:
    config = preset(name)
    config = config if args.layers is None else dataclasses.replace(config, layers=args.layers)
    latent = LatentSpec(config.channels, args.height // 8, args.width // 8)
    net = build(config, device)
    tokens = latent.height * latent.width // config.patch**2
    if mesh is not None:
        shard_sequence(net, tokens=tokens)
    frames = max(WINDOW, args.long)
    if args.network == "fast":
        accelerate(net, precision=args.precision, graphs=device.type == "cuda")
        run(net, latent, frames, fused=args.fused)  # records every kind of call
    else:
        run(net, latent, 2 * CHUNK, fused=args.fused)  # warm-up: libraries, plans, the allocator
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rollouts = [run(net, latent, frames, fused=args.fused) for _ in range(args.runs)]
    latents, full = rollouts[0][0], WINDOW // CHUNK - 1  # from chunk `full` on every chunk sees a full window
    count = 1 if mesh is None else mesh.size
    found: dict[str, Any] = {
        "model": name,
        "layers": config.layers,
        "gpus": count,
        "size": [args.height, args.width],
        "frames": frames,
        "fused": args.fused,
        "network": args.network,
        "precision": args.precision,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "torch": torch.__version__,
        "clip_ms": statistics.median(sum(times[: WINDOW // CHUNK]) for _, times in rollouts),
        "first_chunk_ms": summary([times[0] for _, times in rollouts]),
        "second_chunk_ms": summary([times[1] for _, times in rollouts]),
        "full_window_chunk_ms": summary([t for _, times in rollouts for t in times[full:]]),
        "chunks_ms": [[round(t, 2) for t in times] for _, times in rollouts],
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }
    if mesh is None and name in args.noise:
        found["bf16_error"] = bf16_error(net, latents, latent)
    if mesh is None or mesh.rank == 0:
        save(Path(args.out), f"{name}-{count}", found, latents, reference=Path(args.out) / f"{name}-1.pt")


def bf16_error(net: DiTDenoiser, latents: Tensor, latent: LatentSpec) -> float:
    """How far the first chunks of a bfloat16 rollout are from a float32 one with the same weights, relatively."""
    exact = build(net.config, net.model.device, torch.float32)
    exact.load_state_dict({key: value.float() for key, value in net.state_dict().items()})
    return relative(latents[:, :NOISE_FRAMES], run(exact, latent, NOISE_FRAMES, fused=False)[0])


def relative(x: Tensor, reference: Tensor) -> float:
    x, reference = x.double().cpu(), reference.double().cpu()
    return ((x - reference).norm() / reference.norm()).item()


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {"p50": statistics.median(ordered), "p90": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))]}


def save(folder: Path, name: str, found: dict[str, Any], latents: Tensor, *, reference: Path) -> None:
    if found["gpus"] > 1 and reference.is_file():
        one = torch.load(reference, weights_only=True)
        if one["latents"].shape == latents.shape:
            found["difference_to_one_gpu"] = relative(latents, one["latents"])
            found["difference_of_first_chunks"] = relative(latents[:, :NOISE_FRAMES], one["latents"][:, :NOISE_FRAMES])
            found["bf16_error"] = one["bf16_error"]
            found["speedup_full_window"] = one["full_window_ms"] / found["full_window_chunk_ms"]["p50"]
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"bf16_error": found.get("bf16_error"), "full_window_ms": found["full_window_chunk_ms"]["p50"]}
    torch.save({"latents": latents.cpu(), **kept}, folder / f"{name}.pt")
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    shown = {key: value for key, value in found.items() if key != "chunks_ms"}
    print(json.dumps(shown), flush=True)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["wan-1.3b", "wan-14b"])
    parser.add_argument("--layers", type=int, help="so many blocks and not all of them")
    parser.add_argument("--runs", type=int, default=1, help="measured rollouts")
    parser.add_argument("--long", type=int, default=30, help="latent frames of a rollout, at least the window's 21")
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--network", choices=("fast", "plain"), default="fast")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the fast network")
    parser.add_argument("--fused", action="store_true", help="join each commit with the next chunk's first step")
    parser.add_argument("--noise", nargs="*", default=["wan-1.3b"], help="models whose bfloat16 error is measured too")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: CUDA if there is one")
    parser.add_argument("--out", default="run/multi_gpu")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args, where = arguments(), launch()
    torch.backends.cuda.matmul.allow_tf32 = False
    with contextlib.nullcontext() if where is None else join(where, args.device) as mesh:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        device = device if mesh is None else mesh.device
        for name in args.models:
            with sdpa_kernel(PRIORITY, set_priority=True):
                measure(name, args, mesh, device)
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
