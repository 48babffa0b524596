"""How the tiny models drift under every context policy, up to a hundred times the length of a training clip.

    python benchmarks/drift.py --out runs/drift                    every policy, two models, 3 seeds: for a GPU
    python benchmarks/drift.py --out runs/drift-smoke --smoke      the same in miniature, in minutes on a CPU
    python benchmarks/drift.py --out runs/drift --models long=runs/tiny/long/export --ways renew memrope

A model under a policy is a unit, in a process of its own, `--jobs` of them at a time; a unit that is done is not made
again, so the same command goes on where it was interrupted. All units have the same prompts and, clip for clip, the
same noise. `drift.json` (every window), `table.md` and `drift.png` are written anew after each unit, beside a sheet of
its frames. With a budget no unit is begun past it, and those that run then end with the windows they have: their column
100x stays empty, and the next run makes them whole.

Ways: context policies; `full`, which sees everything, up to ten lengths; `renew`, segments as live streams make them;
`rolling-plan`, Rolling Forcing. A column such as 100x is the mean over the last fifth of the windows up to there.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from causalreel.data.video import contact_sheet
from causalreel.data.world import prompts as world_prompts
from causalreel.eval.curve_picture import draw
from causalreel.eval.long import RENEW, of_model, record
from causalreel.eval.run import parse_model
from causalreel.eval.statistics import estimate
from causalreel.eval.windows import EXACT, Long, ending
from causalreel.files import replacing, write_text
from causalreel.infer.accelerate import accelerate
from causalreel.infer.manner import Manner
from causalreel.infer.models import load, profile
from causalreel.weights.files import read_tensors, write_tensors

log = logging.getLogger("drift")

MODELS = ("frame-2step=tiny/frame-2step", "chunk-4step=tiny/chunk-4step")
POLICIES = ("memrope", "infinity-rope", "window", "rolling-sink", "re-indexed", "relax-forcing", "deep-forcing", "sink")
WAYS = (RENEW, *POLICIES, "rolling-forcing", "full")
"""In this order, both models of each, so that what matters most is there if time runs out."""
CUT = "cut"
"""In the names of files of units that ended before their time."""
FULL = 10
"""Training lengths up to which everything is kept: its memory and time grow with the length."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/drift"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="LABEL=MODEL")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--lengths", type=int, default=100, help="training lengths of a clip")
    parser.add_argument("--clips", type=int, default=32, help="clips of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=0, help="clips made together; 0: all, or 8 on a CPU")
    parser.add_argument("--jobs", type=int, default=8, help="units at a time")
    parser.add_argument("--budget", type=float, default=0, help="seconds that it may take, about; 0: any")
    parser.add_argument("--smoke", action="store_true", help="2 lengths, 2 clips of 1 seed, 2 at a time")
    parser.add_argument("--until", type=float, default=math.inf, help=argparse.SUPPRESS)
    parser.add_argument("--unit", nargs=2, metavar=("LABEL=MODEL", "WAY"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.lengths, args.clips, args.seeds, args.jobs = 2, 2, args.seeds[:1], min(args.jobs, 2)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    if args.unit:
        make(args, *args.unit)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    check_alike(args)
    failed = work(args)
    if tell(args.out):
        print((args.out / "table.md").read_text())
    if failed:
        sys.exit(f"{len(failed)} units failed, see their .log in {args.out}: {', '.join(failed)}")


def check_alike(args: argparse.Namespace) -> None:
    """End where units that are there are of other clips: they would stand beside new ones as if alike."""
    for path in sorted(args.out.glob("*.safetensors")):
        facts = json.loads(path.with_suffix(".json").read_text())
        for key in ("lengths", "clips", "seeds"):
            if facts.get(key, getattr(args, key)) != getattr(args, key):
                sys.exit(f"--{key}: got {getattr(args, key)}, but {path} has {facts[key]}; take another --out")


def work(args: argparse.Namespace) -> list[str]:
    """Make every unit that is not there; -> those that failed."""
    units = [(model, way) for way in args.ways for model in args.models]
    waiting = [unit for unit in units if not (args.out / f"{name(*unit)}.safetensors").exists()]
    began, running, failed = time.monotonic(), dict[str, subprocess.Popen](), []
    until = began + args.budget if args.budget else math.inf
    while waiting or running:
        ended = [key for key, process in running.items() if process.poll() is not None]
        for key in ended:
            code = running.pop(key).returncode
            told = f"FAILED ({code})" if code else "done" if (args.out / f"{key}.safetensors").exists() else "cut short"
            failed += [key] if code else []
            print(f"{time.monotonic() - began:6.0f} s  {key}: {told}", flush=True)
        if time.monotonic() > until and waiting:
            print(f"not begun within {args.budget:g} s: {', '.join(name(*unit) for unit in waiting)}", flush=True)
            waiting = []
        while waiting and len(running) < args.jobs:
            unit = waiting.pop(0)
            running[name(*unit)] = begin(args, unit, until)
        if ended and (waiting or running):
            with suppress(ValueError, OSError):  # told again at the end, and then aloud
                tell(args.out)
        time.sleep(0.2)
    return failed


def begin(args: argparse.Namespace, unit: tuple[str, str], until: float) -> subprocess.Popen:
    numbers = {"--out": args.out, "--lengths": args.lengths, "--clips": args.clips, "--batch": args.batch}
    command = [sys.executable, __file__, *(str(part) for pair in numbers.items() for part in pair)]
    command += ["--seeds", *map(str, args.seeds), "--until", str(until), "--unit", *unit]
    with (args.out / f"{name(*unit)}.log").open("w") as log_file:
        environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
        return subprocess.Popen(command, stdout=log_file, stderr=subprocess.STDOUT, env=environment)


def name(model: str, way: str) -> str:
    return f"{parse_model(model)[0]}.{way}".replace("/", "-").replace(":", "-")


def make(args: argparse.Namespace, spec: str, way: str) -> None:
    """One unit: clips of all seeds together, their numbers, and a sheet to look at."""
    label, model, _ = parse_model(spec)
    lengths = min(args.lengths, FULL) if way == "full" else args.lengths
    pipeline = load(model, manner=manner(model, way, lengths))
    is_gpu = pipeline.device.type == "cuda"
    if is_gpu:
        pipeline = accelerate(pipeline, graphs=way != "full")  # which would record a call for every length
    prompts = [prompt for seed in args.seeds for prompt in world_prompts(args.clips, seed=seed)]
    seeds = [10_000 * seed + i for seed in args.seeds for i in range(args.clips)]
    chunk = pipeline.sampling.chunk or 1
    every, kept = max(1, lengths * pipeline.export.frames // chunk // 10), []

    def watch(number: int, part: torch.Tensor) -> None:
        if number % every == 0 or number == lengths * pipeline.export.frames // chunk - 1:
            kept.append(part[:4, -1:].cpu())

    batch = args.batch or (len(prompts) if is_gpu else 8)
    how: dict[str, Any] = {"lengths": lengths, "batch": batch, "watch": watch}
    row = of_model(pipeline, f"{label}, {way}", way=way, prompts=prompts, seeds=seeds, until=args.until, **how)
    memory = torch.cuda.max_memory_allocated() if is_gpu else 0
    shown = torch.cat(kept, dim=1)
    contact_sheet(shown, args.out / f"{name(spec, way)}.png", prompts[:4], columns=min(11, shown.shape[1]))
    facts = {"label": row.label, "seconds": row.seconds, "gpu_mib": memory >> 20, "clips": args.clips, "batch": batch}
    facts |= {"device": torch.cuda.get_device_name() if is_gpu else "cpu", "torch": str(torch.__version__)}
    stem = args.out / (name(spec, way) if row.count >= lengths else f"{name(spec, way)}.{CUT}")
    write_text(stem.with_name(f"{stem.name}.json"), json.dumps(facts | {"seeds": args.seeds, "lengths": args.lengths}))
    tensors = {metric: values.contiguous() for metric, values in row.curves.items()}
    with replacing(stem.with_name(f"{stem.name}.safetensors")) as path:
        write_tensors(path, tensors)  # last of all: a unit is done when it is there


def manner(model: str, way: str, lengths: int) -> Manner:
    known = profile(model)
    if way == RENEW:
        return Manner()
    if way == "full":
        return Manner(f"window:window={lengths * known.export.frames}")
    if way == "rolling-plan" and known.sampling.plan == "rolling":
        return Manner()
    if way == "rolling-plan":  # room for a window of every level, the sink, and as much again
        chunk, joint = known.sampling.chunk or 1, (known.sampling.chunk or 1) * len(known.sampling.steps)
        room = joint + 2 * chunk
        return Manner(f"rolling-forcing:window={room},sink={chunk},cache={room}", plan="rolling", any_plan=True)
    return Manner(way)


def tell(out: Path) -> bool:
    """Write tables and pictures of the units that are there; whether there are any."""
    rows = gather(out)
    if rows:
        summarise(out, rows)
    return bool(rows)


def gather(out: Path) -> list[tuple[Long, dict[str, Any]]]:
    rows = []
    for path in sorted(out.glob("*.safetensors")):
        whole = path.with_name(path.name.replace(f".{CUT}.", "."))
        if whole != path and whole.exists():
            continue
        facts = json.loads(path.with_suffix(".json").read_text())
        rows.append((Long(facts["label"], read_tensors(path), facts["seconds"]), facts))
    order = {way: i for i, way in enumerate(WAYS)}
    return sorted(
        rows, key=lambda row: (row[0].label.partition(", ")[0], order.get(row[0].label.partition(", ")[2], 99))
    )


def summarise(out: Path, rows: list[tuple[Long, dict[str, Any]]]) -> None:
    most = max(row.count for row, _ in rows)
    lengths = [n for n in (1, 10, 100) if n <= most] or [1]
    if most not in lengths:
        lengths.append(most)
    heads = [f"{metric} {n}x" for metric in EXACT for n in lengths]
    lines = ["| model | way | " + " | ".join(heads) + " | s | MiB |", "|" + "---|" * (len(heads) + 4)]
    told = {}
    for row, facts in rows:
        model, _, way = row.label.partition(", ")
        cells, numbers = [], {}
        for metric in EXACT:
            for n in lengths:
                if n > row.count:
                    cells.append("")
                    continue
                values = ending(row.curves[metric], n)
                one = estimate(values)
                by_seed = [v.nanmean().item() for v in values.split(facts["clips"])]
                numbers[f"{metric} {n}x"] = {"mean": one.mean, "stderr": one.stderr, "low": one.low, "high": one.high}
                numbers[f"{metric} {n}x"]["by_seed"] = by_seed
                cells.append(f"{one.mean:.3f} ± {one.stderr:.3f}")
        told[row.label] = {"facts": facts, "summary": numbers, "windows": record(row)}
        lines.append(f"| {model} | {way} | {' | '.join(cells)} | {row.seconds:.0f} | {facts['gpu_mib']} |")
    write_text(out / "table.md", "\n".join(lines) + "\n")
    write_text(out / "drift.json", json.dumps(told, indent=1).replace("NaN", "null"))
    for model in dict.fromkeys(row.label.partition(", ")[0] for row, _ in rows):
        mine = [row for row, _ in rows if row.label.partition(", ")[0] == model]
        draw(mine, (*EXACT, "saturation", "contrast", "sharpness", "motion"), out / f"drift-{model}.png")


if __name__ == "__main__":
    main()
