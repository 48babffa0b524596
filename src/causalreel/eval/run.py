"""Evaluation: models against fixed prompts and seeds, beside real clips and the codec's reconstructions of them.

Every model gets the same held-out prompts and, clip for clip, the same noise, so that differences are paired. The
result is a folder: `scores.json` (means, standard errors, intervals), `table.md`, `scores.safetensors` (every clip's
numbers), and a contact sheet.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.data.prepare import held_out
from causalreel.data.video import contact_sheet
from causalreel.eval import registry
from causalreel.eval.registry import METRICS, clip_scores
from causalreel.eval.statistics import FRECHET_CLIPS, features, frechet, summarise
from causalreel.files import write_text
from causalreel.folders import claim
from causalreel.infer.models import load
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import in_few_steps
from causalreel.weights.files import write_tensors

log = logging.getLogger(__name__)

COLUMNS = ("follow", "first", "direction", "speed", "dynamic", "consistency", "turn", "quality", "follow_drift")
"""The tiny world's metrics of the printed table; the files hold all of them."""

REFERENCES = ("real clips", "codec reconstruction")
"""Rows above the models'."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    label: str
    clips: dict[str, Tensor]
    """Metric -> a number of every clip (B,)."""
    frechet: float | None
    """None: there are too few clips for it."""
    seconds: float
    """Wall time of generating (denoiser and codec), 0 for references."""


def parse_model(spec: str) -> tuple[str, str, int | None]:
    """`[label=]model[@steps]` -> label, model, steps: `cd=runs/tiny/cd-frame/export@2`."""
    label, _, rest = spec.rpartition("=")
    model, _, steps = rest.rpartition("@") if rest.rpartition("@")[2].isdigit() else (rest, "", "")
    return label or rest, model, int(steps) if steps else None


def with_steps(pipeline: Pipeline, steps: int | None) -> Pipeline:
    """The same model in few steps, as `infer.schedule.in_few_steps`; None: as it is."""
    return pipeline if steps is None else dataclasses.replace(pipeline, sampling=in_few_steps(pipeline.sampling, steps))


def many_step(pipeline: Pipeline, *, steps: int | None = None, guidance: float | None = None) -> Pipeline:
    """A model of many steps with so many and this guidance; None: its own. Few-step models stay as they are."""
    sampling = pipeline.sampling
    if sampling.multistep is None:
        return pipeline
    other = {name: value for name, value in (("multistep", steps), ("guidance", guidance)) if value is not None}
    return dataclasses.replace(pipeline, sampling=dataclasses.replace(sampling, **other))


@torch.no_grad()
def sample(pipeline: Pipeline, prompts: Sequence[str], *, seed: int, batch: int) -> Tensor:
    """-> video (B,T,3,H,W) in [-1,1] on the CPU as uint8 steps would show it; clip i has noise seed + i."""
    parts = []
    for first in range(0, len(prompts), batch):
        some = prompts[first : first + batch]
        parts.append(pipeline.generate(some, seed=list(range(seed + first, seed + first + len(some)))))
    return torch.cat(parts)


def load_models(models: Sequence[str], *, device: str | None) -> dict[str, Pipeline]:
    """Label -> pipeline of each `[label=]model[@steps]`."""
    pipelines: dict[str, Pipeline] = {}
    for spec in models:
        label, model, steps = parse_model(spec)
        if label in (*pipelines, *REFERENCES):
            raise ValueError(f"two rows would be called {label!r}: name one of them, label=model")
        pipelines[label] = with_steps(load(model, device=device), steps)
    return pipelines


def evaluate(
    pipelines: Mapping[str, Pipeline], *, clips: int, seed: int, batch: int
) -> tuple[list[Row], dict[str, Tensor], list[str]]:
    """-> a row per reference and model, and the first clips of each for looking at, with their prompts."""
    first = next(iter(pipelines.values()))
    real, prompts = held_out(clips, seed=seed, device=first.device)
    reference = features(held_out(clips, seed=seed + 1, device=first.device)[0])  # other clips than the real row's
    if is_few := clips < FRECHET_CLIPS:
        log.warning("frechet: n/a, its covariances need at least %d clips; there are %d", FRECHET_CLIPS, clips)
    rows, shown = [], {}

    def add(label: str, video: Tensor, seconds: float) -> None:
        scores = clip_scores(video, prompts)
        distance = None if is_few else frechet(reference, features(video))
        rows.append(Row(label, scores, distance, seconds))
        shown[label] = video[:8].cpu()
        log.info("%s: %s", label, ", ".join(f"{k} {v}" for k, v in cells(rows[-1]).items()))

    add(REFERENCES[0], real, 0.0)
    with torch.no_grad():
        again = [first.codec.decode(first.codec.encode(real[i : i + batch])) for i in range(0, clips, batch)]
    add(REFERENCES[1], torch.cat(again), 0.0)
    for label, pipeline in pipelines.items():
        began = time.perf_counter()
        video = sample(pipeline, prompts, seed=seed, batch=batch)
        add(label, video, time.perf_counter() - began)
    return rows, shown, list(prompts[:8])


def columns() -> tuple[str, ...]:
    """Metrics of the printed table, the set's distance left out."""
    return (*COLUMNS, *(name for name, one in METRICS.items() if one.in_table))


def cells(row: Row) -> dict[str, str]:
    """Column -> what the table prints."""
    found = summarise(row.clips)
    return {name: f"{found[name].mean:.3f}" for name in columns()} | {
        "frechet": "n/a" if row.frechet is None else f"{row.frechet:.2f}"
    }


def table(rows: Sequence[Row]) -> str:
    """A Markdown table; the standard error of `follow` and `direction` beside their means."""
    names = ("model", *columns(), "frechet")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        found, shown = summarise(row.clips), cells(row)
        for name in ("follow", "direction"):
            shown[name] += f" ± {found[name].stderr:.3f}"
        lines.append(f"| {row.label} | " + " | ".join(shown.values()) + " |")
    return "\n".join(lines)


def known(numbers: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are not known (NaN) as None: JSON has no other word for them."""
    return {name: None if value != value else value for name, value in numbers.items()}


def file_name(label: str) -> str:
    """A model's label as a part of files' names."""
    return "".join(c if c.isalnum() else "-" for c in label)


def save(
    out: Path, rows: Sequence[Row], shown: dict[str, Tensor], prompts: Sequence[str], facts: dict[str, Any]
) -> None:
    """Write the folder, which must be there."""
    record = {
        row.label: {name: known(dataclasses.asdict(e)) for name, e in summarise(row.clips).items()}
        | known({"frechet": row.frechet, "seconds": row.seconds})
        for row in rows
    }
    write_text(out / "scores.json", json.dumps({"facts": facts, "models": record}, indent=1, allow_nan=False))
    write_text(out / "table.md", table(rows) + "\n")
    clips = {f"{row.label}/{name}": v.float().contiguous() for row in rows for name, v in row.clips.items()}
    write_tensors(out / "scores.safetensors", clips)
    for label, videos in shown.items():
        contact_sheet(videos, out / f"{file_name(label)}.png", prompts, columns=10)


def run(
    models: Sequence[str],
    *,
    out: str | Path,
    clips: int = 512,
    seed: int = 0,
    batch: int | None = None,
    device: str | None = None,
    metrics: Path | None = None,
) -> list[Row]:
    """`causalreel eval`: evaluate and write the folder -> the rows of the table.

    metrics: a Python file of further ones, see `eval.registry`. batch: clips made together; None: 128 on a GPU, 8 on a
    CPU, where larger ones only leave its caches.
    """
    if not models:
        raise ValueError("name at least one model: an embedded one such as tiny, or an export folder")
    if metrics is not None:
        registry.read(metrics)
    with claim(out, "evaluation"):  # before the work and not after it
        pipelines = load_models(models, device=device)
        is_on_cpu = next(iter(pipelines.values())).device.type == "cpu"
        batch = batch or (8 if is_on_cpu else 128)
        rows, shown, prompts = evaluate(pipelines, clips=clips, seed=seed, batch=batch)
        facts = {"clips": clips, "seed": seed, "models": list(models), "torch": str(torch.__version__)}
        save(Path(out), rows, shown, prompts, facts)
    return rows
