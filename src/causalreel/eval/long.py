"""`causalreel eval --long`: how what a model makes changes beyond the length of its training clips.

Models are run for many training lengths, under the context policies that are asked for, all with the same held-out
prompts and, clip for clip, the same noise; video files are measured as they are. The result is a folder: `drift.json`
(of every metric mean and standard error window by window, and with intervals last minus first and VDE), `drift.md`,
`drift.png`, and `drift.safetensors` (every clip's numbers).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.data.video_in import open_video
from causalreel.data.world import prompts as world_prompts
from causalreel.eval.curve_picture import draw
from causalreel.eval.frames import STATISTICS
from causalreel.eval.run import parse_model, with_steps
from causalreel.eval.statistics import estimate
from causalreel.eval.vbench import SAMPLES, export, videos
from causalreel.eval.windows import EXACT, Long, Windows, curves, drift_error, last_minus_first
from causalreel.files import read_lines, write_text
from causalreel.folders import claim
from causalreel.infer.live import Live, Policy
from causalreel.infer.models import load
from causalreel.infer.pipeline import Pipeline
from causalreel.weights.files import write_tensors

log = logging.getLogger(__name__)

RENEW = "renew"
"""Not a context policy: segments of a training clip's length, each behind the end of the one before, as live streams
are made of (`infer.live.Policy`)."""
WINDOW_S = 3.0
"""Seconds of a window of a file, unless asked otherwise."""
SIDE = 256
"""Files are measured at this height, so that those of different sizes compare."""


def windows_of(pipeline: Pipeline) -> Windows:
    """A training clip, and as many latent frames again."""
    chunk, geometry = pipeline.sampling.chunk or 1, pipeline.geometry
    latent = pipeline.export.frames // chunk * chunk
    return Windows(geometry.frames_of(latent), geometry.temporal * latent)


def stream(
    pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], lengths: int, way: str
) -> Iterator[Tensor]:
    """Parts (B,t,3,H,W) of clips of so many training lengths. way: `RENEW`, or a policy that the pipeline has."""
    chunk = pipeline.sampling.chunk
    if chunk is None:
        raise ValueError(f"a long video needs an autoregressive model; {pipeline.export.name} generates whole clips")
    latent = lengths * (pipeline.export.frames // chunk * chunk)
    if way != RENEW:
        yield from pipeline.stream(list(prompts), frames=pipeline.geometry.frames_of(latent), seed=list(seeds))
        return
    told = pipeline.text.encode([pipeline.text.complete(*one) for one in zip(prompts, seeds, strict=True)])
    live = Live(pipeline, told, seed=list(seeds), policy=Policy.of(pipeline.export, pipeline.sampling, "renew"))
    decode = pipeline.codec.stream() if pipeline.decoder is None else pipeline.decoder(len(prompts))
    for _ in range(latent // chunk):
        with torch.no_grad():
            shown = decode(live.next_chunk().latents)
        yield shown


def of_model(
    pipeline: Pipeline,
    label: str,
    *,
    way: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    lengths: int,
    batch: int,
    is_world: bool = True,
    watch: Callable[[int, Tensor], None] | None = None,
    until: float = math.inf,
) -> Long:
    """Make long clips and measure them as they come. is_world: the prompts are of the tiny world, whose exact metrics
    are read too. watch: called with the number of each part, and the part, of the first batch. until: `time.monotonic`
    at which a batch ends as long as it is, a window at least; there are as many windows as all batches have."""
    began, parts = time.perf_counter(), []
    for first in range(0, len(prompts), batch):
        some, noise = prompts[first : first + batch], seeds[first : first + batch]
        made = _in_time(stream(pipeline, some, noise, lengths, way), until, windows_of(pipeline).first)
        shown = _watched(made, watch) if watch is not None and first == 0 else made
        told, at_a_time = some if is_world else None, 2048 if pipeline.device.type == "cuda" else 128
        parts.append(curves(shown, windows_of(pipeline), told, at_a_time=at_a_time))
    count = min(numbers.shape[1] for part in parts for numbers in part.values())
    joined = {name: torch.cat([part[name][:, :count] for part in parts]) for name in parts[0]}
    return Long(label, joined, time.perf_counter() - began)


def _in_time(parts: Iterator[Tensor], until: float, least: int) -> Iterator[Tensor]:
    """The first `least` frames, and all that are there in time."""
    made = 0
    for part in parts:
        yield part
        made += part.shape[1]
        if made >= least and time.monotonic() > until:
            return


def _watched(parts: Iterator[Tensor], watch: Callable[[int, Tensor], None]) -> Iterator[Tensor]:
    for number, part in enumerate(parts):
        watch(number, part)
        yield part


def of_file(path: Path, *, window_s: float = WINDOW_S, fps: float = 16.0) -> Long:
    """A video file's windows, at a rate of its own for all files so that motion compares."""
    frames = max(2, round(window_s * fps))
    with open_video(path, fps=fps, size=(SIDE, SIDE), how="pad") as reel:
        height, width = reel.size
    size = (SIDE, max(2, round(SIDE * width / height)))
    began = time.perf_counter()
    with open_video(path, fps=fps, size=size) as reel:
        pictures = (torch.from_numpy(picture).permute(2, 0, 1)[None, None] / 127.5 - 1 for picture in reel.frames)
        found = curves(pictures, Windows(frames, frames))
    return Long(path.name, found, time.perf_counter() - began)


def for_vbench(
    models: Sequence[str],
    prompt_file: Path,
    folder: Path,
    *,
    policies: Sequence[str] = (),
    lengths: int = 10,
    samples: int = SAMPLES,
    seed: int = 0,
    device: str | None = None,
) -> Iterator[Path]:
    """Make the videos of a list of prompts for VBench-Long (see `eval.vbench`); yields each that was not there."""
    if len(models) != 1 or len(policies) > 1:
        raise ValueError(f"vbench takes one model and at most one policy, got {len(models)} and {len(policies)}")
    wanted = videos([line for line in read_lines(prompt_file) if line.strip()], samples=samples, seed=seed)
    _, model, steps = parse_model(models[0])
    way = policies[0] if policies else ""
    pipeline = with_steps(load(model, device=device, policy=None if way in ("", RENEW) else way), steps)
    for prompt in dict.fromkeys(video.prompt for video in wanted):
        pipeline.text.encode([pipeline.text.complete(prompt, seed)])  # understood before the first is made
    facts: dict[str, object] = {"model": models[0], "policy": way, "lengths": lengths, "samples": samples, "seed": seed}
    how = {"fps": pipeline.export.fps, "facts": facts}
    yield from export(wanted, folder, lambda one: stream(pipeline, [one.prompt], [one.seed], lengths, way), **how)


# ---- results


def record(row: Long) -> dict[str, Any]:
    """What `drift.json` holds of a row; numbers that are not known, or infinite, are null."""
    metrics = {}
    for name, values in row.curves.items():
        windows = [estimate(values[:, i], resamples=2) for i in range(row.count)]
        metrics[name] = {
            "mean": [_known(one.mean) for one in windows],
            "stderr": [_known(one.stderr) for one in windows],
            "last_minus_first": _told(last_minus_first(values)),
            "vde": _told(drift_error(values)),
            "vde_log": _told(drift_error(values, weights="log")),
        }
    return {"windows": row.count, "clips": len(next(iter(row.curves.values()))), "seconds": row.seconds} | {
        "metrics": metrics
    }


def _told(values: Tensor) -> dict[str, float | int | None]:
    return {name: _known(value) for name, value in dataclasses.asdict(estimate(values)).items()}


def _known(value: float) -> float | None:
    return value if abs(value) < float("inf") else None


def table(rows: Sequence[Long]) -> str:
    """Markdown: of every row and metric the first and the last window, what changed, and VDE; ± one standard error."""
    lines = ["| video | metric | first | last | last - first | VDE |", "|---|---|---|---|---|---|"]
    for row in rows:
        for name, values in row.curves.items():
            cells = [estimate(v) for v in (values[:, 0], values[:, -1], last_minus_first(values), drift_error(values))]
            shown = [f"{c.mean:.3g}" + (f" ± {c.stderr:.2g}" if c.stderr == c.stderr else "") for c in cells]
            lines.append(f"| {row.label} | {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def save(out: Path, rows: Sequence[Long], facts: dict[str, Any]) -> None:
    """Write the folder, which must be there."""
    told = {"facts": facts, "rows": {row.label: record(row) for row in rows}}
    write_text(out / "drift.json", json.dumps(told, indent=1, allow_nan=False))
    write_text(out / "drift.md", table(rows) + "\n")
    clips = {f"{row.label}/{name}": v.float().contiguous() for row in rows for name, v in row.curves.items()}
    write_tensors(out / "drift.safetensors", clips)
    names = [name for name in (*EXACT, *STATISTICS) if any(name in row.curves for row in rows)]
    draw(rows, names, out / "drift.png")


def run(
    models: Sequence[str],
    *,
    out: str | Path,
    lengths: int = 10,
    policies: Sequence[str] = (),
    files: Sequence[Path] = (),
    clips: int = 32,
    seed: int = 0,
    batch: int | None = None,
    device: str | None = None,
    window_s: float = WINDOW_S,
) -> list[Long]:
    """`causalreel eval --long`: measure and write the folder -> its rows.

    policies: context policies, or renew, each of which every model is run under; none: the model's own.
    """
    if not models and not files:
        raise ValueError("name at least one model or one video file")
    ways: list[str | None] = list(policies) or [None]
    specs = [(*parse_model(spec), way) for spec in models for way in ways]
    labels = [label if way is None else f"{label}, {way}" for label, _, _, way in specs]
    labels += [path.name for path in files]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"two rows would be called {label!r}: name one of them, label=model")
    rows: list[Long] = []
    with claim(out, "evaluation"):  # before the work and not after it
        for label, (_, model, steps, way) in zip(labels, specs, strict=False):
            pipeline = with_steps(load(model, device=device, policy=None if way in (None, RENEW) else way), steps)
            is_world = pipeline.export.text == "tiny"
            if not is_world:
                raise ValueError(f"{label}: prompts of the tiny world mean nothing to it; measure its videos as files")
            how: dict[str, Any] = {"prompts": world_prompts(clips, seed=seed), "seeds": range(seed, seed + clips)}
            at_once = batch or (8 if pipeline.device.type == "cpu" else 128)
            rows.append(of_model(pipeline, label, way=way or "", lengths=lengths, batch=at_once, **how))
            log.info("%s: %.0f s", label, rows[-1].seconds)
        rows += [of_file(path, window_s=window_s) for path in files]
        facts = {"models": list(models), "policies": list(policies), "videos": [str(path) for path in files]}
        facts |= {"lengths": lengths, "clips": clips, "seed": seed, "torch": str(torch.__version__)}
        save(Path(out), rows, facts)
    return rows
