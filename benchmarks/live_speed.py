"""A live session beside `causalreel bench`: frames a second of both, and from a key to its first changed pixels.

    python benchmarks/live_speed.py --model causal-forcing/framewise-2step --decoder taehv --weights random
    python benchmarks/live_speed.py --model tiny/frame-2step --frames 45          on a CPU

Both make the same clip from its first frame on, in turn, --runs times: `bench` as `causalreel bench` measures it
(pixels on the device), the session through a scheduler at pace max, its frames read on the host. Then the same network
with heads that see through cameras (random where the file has none) is steered: a key is pressed or released every
--every seconds, and the time counts from the command to the first pixels made with it, on the host.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from causalreel.control.steering import Steering
from causalreel.infer import bench
from causalreel.infer.accelerate import accelerate
from causalreel.infer.live import hints
from causalreel.infer.models import load
from causalreel.infer.pipeline import Pipeline
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.parallel.fast import PRECISIONS
from causalreel.serve.handle import Ended, Handle, Limits
from causalreel.serve.scheduler import Scheduler
from causalreel.serve.session import Options


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny/frame-2step")
    parser.add_argument("--weights")
    parser.add_argument("--decoder")
    parser.add_argument("--precision", default="bf16", choices=PRECISIONS)
    parser.add_argument("--frames", type=int, default=81, help="pixel frames of a clip")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=20, help="of steering")
    parser.add_argument("--every", type=float, default=0.7, help="seconds between keys, about")
    parser.add_argument("--out", type=Path, help="folder for live_speed.json")
    args = parser.parse_args()
    given = {name: getattr(args, name) for name in ("weights", "decoder") if getattr(args, name) is not None}
    pipeline = load(args.model, **given)
    found: dict[str, Any] = {"args": {key: str(value) for key, value in vars(args).items()}}
    for name, made in (("without cameras", pipeline), ("with cameras", with_cameras(pipeline))):
        made = accelerate(made, precision=args.precision) if made.device.type == "cuda" else made
        found[name] = compare(made, args)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / "live_speed.json").write_text(json.dumps(found, indent=1))
        del made


def with_cameras(pipeline: Pipeline) -> Pipeline:
    """The pipeline with twin heads that see through cameras, and keys; those it has stay."""
    if pipeline.control is not None:
        return pipeline
    old = pipeline.denoiser
    config = dataclasses.replace(old.config, camera="prope")
    with torch.device("meta"):
        made = DiTDenoiser(config, context=old.context, backend=old.backend, compute=old.compute)
    made = made.to(old.model.dtype).to_empty(device=pipeline.device).requires_grad_(False).eval()
    for name, weight in made.model.named_parameters():
        if "prope_o" in name:
            weight.normal_(0, 0.02)
    made.model.load_state_dict(old.model.state_dict(), strict=False)  # all but the twins
    export = dataclasses.replace(pipeline.export, model=config, control=Steering())
    return dataclasses.replace(pipeline, denoiser=made, export=export, decoder=None)


def compare(pipeline: Pipeline, args: argparse.Namespace) -> dict[str, Any]:
    prompt = hints(pipeline.export)["examples"][0]
    found: dict[str, Any] = {}
    if pipeline.control is None:  # bench gives a network no cameras
        found["bench"] = bench.measure(pipeline, [prompt], frames=args.frames, runs=args.runs).throughput
    ahead = 2 if pipeline.control is None else 1  # as `causalreel serve` does
    scheduler = Scheduler(pipeline, Limits(sessions=2, buffer_chunks=ahead), warm=prompt)
    scheduler.start()
    while not scheduler.is_ready:
        time.sleep(0.05)
    try:
        played = [play(scheduler.open(Options(prompt, seed=run), pace="max"), args.frames) for run in range(args.runs)]
        found["live"] = statistics.median(rate for rate, _ in played)
        found["first pixels s"] = statistics.median(first for _, first in played)
        if "bench" in found:
            found["share"] = found["live"] / found["bench"]
        if pipeline.control is not None:
            found["keys"] = {
                pace: steer(scheduler.open(Options(prompt), pace=pace), args) for pace in ("max", "realtime")
            }
    finally:
        scheduler.close()
    if pipeline.device.type == "cuda":
        found["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return found


def play(handle: Handle, frames: int) -> tuple[float, float]:
    """Frames a second from the opening to the last of so many frames, and seconds to the first."""
    begun, count, first, after = time.perf_counter(), 0, 0.0, -1
    while count < frames:
        made = handle.pull(after, 60)
        assert made is not None and not isinstance(made, Ended), made
        first = first or time.perf_counter() - begun
        count, after = count + len(made.frames), made.sequence
    rate = count / (time.perf_counter() - begun)
    handle.close()
    return rate, first


def steer(handle: Handle, args: argparse.Namespace) -> dict[str, float]:
    """Press and release keys at random times -> from a key to its first pixels, p50 and p95 in seconds."""
    draw, told, latencies = random.Random(0), dict[int, float](), list[float]()
    begun, after, frames = time.perf_counter(), -1, 0
    due, is_held = begun + args.every, False
    while time.perf_counter() - begun < args.seconds:
        if time.perf_counter() >= due and handle.newest > 1:
            is_held, due = not is_held, time.perf_counter() + args.every * (0.5 + draw.random())
            told[handle.command("keys", pressed=["w", "left"] if is_held else [])] = time.perf_counter()
        made = handle.pull(after, 0.002)
        if made is None:
            continue
        assert not isinstance(made, Ended), made
        after, frames = made.sequence, frames + len(made.frames)
        latencies += [time.perf_counter() - told.pop(one.number) for one in made.commands if one.number in told]
    rate = frames / (time.perf_counter() - begun)
    handle.close()
    ordered = sorted(latencies) or [float("nan")]
    return {
        "p50": ordered[len(ordered) // 2],
        "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
        "count": len(latencies),
        "frames/s": rate,
    }


if __name__ == "__main__":
    main()
