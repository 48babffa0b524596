"""`causalreel eval --control`: models of the walkable world on held-out scenes and paths, and what is measured there.

Every model gets the same scenes, paths and noise: random walks, turns of 60 degrees and back, five steps and back, all
behind a true first frame; and captions alone, turning right. The result is a folder: `control.json` (means, standard
errors, intervals), `control.md`, and of each model a contact sheet and pictures (B,F,h,w,3).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from causalreel.data.video import contact_sheet, to_bytes
from causalreel.data.walk import (
    TEMPORAL,
    WalkConfig,
    WalkState,
    captions,
    fields,
    held,
    is_free,
    opposite,
    simulate,
    there_and_back,
)
from causalreel.data.walk_render import paint, render
from causalreel.eval.control import agreement, pose_errors, revisit, words
from causalreel.eval.run import file_name, known, load_models, many_step
from causalreel.eval.statistics import Estimate, summarise
from causalreel.files import write_text
from causalreel.folders import claim
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import noise_levels
from causalreel.rollout import KeyedNoise, chunked, collect, rollout
from causalreel.solvers import SOLVERS
from causalreel.types import Conditioning, Denoise
from causalreel.weights.files import write_tensors

log = logging.getLogger(__name__)

BACK = 5
"""Keys there, and as many back."""

COLUMNS = (
    *("psnr seen", "psnr at 1", "psnr at 4", "psnr at 8", "psnr at 15", "psnr wrong", "right beats wrong"),
    *("yaw error", "yaw within", "forward error", "forward within", "sideways within"),
    *("turn back itself", "turn back truth", "walk back itself", "walk back truth"),
    *("ahead", "right", "stray colours", "outlines", "floor", "sky"),
)
"""Of the table: dB, degrees, cells, shares, and numbers of colours."""


@dataclass(frozen=True)
class Task:
    """Scenes with paths, and how the videos of these paths are measured."""

    name: str
    state: WalkState
    is_given: bool
    """Whether the first latent frame is the true one."""
    metrics: Callable[[Tensor, slice], dict[str, Tensor]]
    """Pictures of latent frames (b,F,3,H,W) of some of its clips, and which these are -> numbers of clips (b,)."""

    def measure(self, pictures: Tensor, *, at_once: int = 16) -> dict[str, Tensor]:
        """Pictures of latent frames (B,F,3,H,W) -> numbers of clips (B,), in parts: renders take 25 MiB a clip."""
        rows = [slice(i, i + at_once) for i in range(0, len(pictures), at_once)]
        parts = [self.metrics(pictures[some], some) for some in rows]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class ControlRow:
    """One line of the table."""

    label: str
    clips: dict[str, Tensor]
    seconds: float
    """Wall time of generating."""


def tasks(
    clips: int, *, seed: int, config: WalkConfig = WalkConfig(), device: torch.device | str = "cpu"
) -> list[Task]:
    """What is asked of every model: `clips` random walks and captions, half as many turns and walks and back."""
    state = simulate(clips, seed=seed, config=config, device=device, held_out=True)
    some = state[: max(1, clips // 2)]
    right, none = held(["right"]), held([])

    def path(*steps: Tensor) -> Tensor:
        return torch.stack([none[0], *(step[0] for step in steps)])[None].to(state.keys.device)

    turn = some.walking(there_and_back(path(*[right] * BACK)).expand(len(some), -1, -1))
    ways = torch.stack([path(*[held([key])] * BACK)[0] for key in "wsad"])  # (4,F,6)
    free = torch.stack([is_free(some.walking(way.expand(len(some), -1, -1))) for way in ways], dim=1)  # (B,4)
    walks = some.walking(there_and_back(ways[free.int().argmax(1)]))
    text = state.walking(path(*[right] * BACK).expand(len(state), -1, -1))
    wrong = state.walking(opposite(state.keys))
    return [
        Task("walk", state, True, lambda seen, i: agreement(seen, state[i], wrong[i]) | pose_errors(seen, state[i])),
        Task("turn back", turn, True, lambda seen, i: revisit(seen, turn[i], "turn back")),
        Task("walk back", walks, True, lambda seen, i: revisit(seen, walks[i], "walk back")),
        Task("text", text, False, lambda seen, i: words(seen, text[i])),
    ]


def truth(task: Task) -> Tensor:
    """The true pictures of latent frames (B,F,3,H,W)."""
    return torch.cat([paint(part, part.yaw, part.at) for part in _parts(task.state, 64)])


def _parts(state: WalkState, size: int) -> list[WalkState]:
    return [state[i : i + size] for i in range(0, len(state), size)]


# ---- generating ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def walked(pipeline: Pipeline, task: Task, *, seed: int, batch: int) -> Tensor:
    """-> pictures of latent frames (B,F,3,H,W) that a model makes of a task's captions, cameras and keys."""
    parts = []
    for number, state in enumerate(_parts(task.state, batch)):
        seeds = list(range(seed + number * batch, seed + number * batch + len(state)))
        told, given = captions(state), paint(state, state.yaw[:, :1], state.at[:, :1]) if task.is_given else None
        taken = {name: value for name, value in fields(state).items() if name in pipeline.fields}
        if pipeline.sampling.chunk is None:
            video = _whole(pipeline, told, taken, given, seeds)
        else:
            frames = 1 + TEMPORAL * (state.yaw.shape[1] - 1)
            video = pipeline.generate(told, seed=seeds, prefix=given, fields=taken, frames=frames)
        parts.append(video[:, ::TEMPORAL])
    return torch.cat(parts).clamp(-1, 1)


def _whole(
    pipeline: Pipeline, told: Sequence[str], taken: Mapping[str, Tensor], given: Tensor | None, seeds: Sequence[int]
) -> Tensor:
    """Clips of a bidirectional model, behind a given first frame (B,1,3,H,W) if there is one."""
    device, sampling = pipeline.device, pipeline.sampling
    conditioning = Conditioning(pipeline.text.encode(told), taken).to(device)
    frames = next(iter(taken.values())).shape[1]
    denoise: Denoise = pipeline.denoiser_for(sampling)
    first = None if given is None else pipeline.codec.encode(given.to(device))
    chunks = rollout(
        denoise if first is None else _pinned(denoise, first),
        chunked([frames], noise_levels(sampling)),
        conditioning=pipeline.denoiser_for(sampling).prepare(conditioning),
        noise=KeyedNoise(seeds, pipeline.export.latent, device),
        solver=SOLVERS[sampling.solver],
    )
    latents = collect(chunks)
    if first is not None:
        latents = torch.cat([first, latents[:, first.shape[1] :]], dim=1)
    return pipeline.codec.decode(latents)


def _pinned(denoise: Denoise, first: Tensor) -> Denoise:
    """A denoiser of whole clips whose leading frames are always these clean ones, at noise level 0."""
    count = first.shape[1]

    def call(x: Tensor, sigma: Tensor, conditioning: Conditioning, **how: object) -> Tensor:
        x = torch.cat([first.to(x), x[:, count:]], dim=1)
        sigma = sigma.to(x).expand(-1, x.shape[1]) * (torch.arange(x.shape[1], device=x.device) >= count)
        return denoise(x, sigma, conditioning, **how)  # type: ignore[arg-type]

    return call  # type: ignore[return-value]


# ---- the table -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    pipelines: Mapping[str, Pipeline], asked: Sequence[Task], *, seed: int, batch: int
) -> tuple[list[ControlRow], dict[str, list[Tensor]]]:
    """-> a row for the true render, the codec and each model, and the pictures of each task by label."""
    first = next(iter(pipelines.values()))
    rows: list[ControlRow] = []
    shown: dict[str, list[Tensor]] = {}

    def add(label: str, made: Callable[[Task], Tensor]) -> None:
        began, found, pictures = time.perf_counter(), {}, []
        for task in asked:
            pictures.append(made(task).to(task.state.yaw.device))
        seconds = time.perf_counter() - began
        for task, seen in zip(asked, pictures, strict=True):
            found |= {name: value.cpu() for name, value in task.measure(seen).items()}
        rows.append(ControlRow(label, found, seconds))
        shown[label] = [seen[:8].cpu() for seen in pictures]
        log.info("%s", _line(rows[-1]))

    def through_codec(task: Task) -> Tensor:
        videos = [first.codec.decode(first.codec.encode(render(part))) for part in _parts(task.state, 32)]
        return torch.cat(videos)[:, ::TEMPORAL].clamp(-1, 1)

    add("true render", truth)
    add("codec", through_codec)
    for label, pipeline in pipelines.items():
        add(label, lambda task, p=pipeline: walked(p, task, seed=seed, batch=batch))
    return rows, shown


def _line(row: ControlRow) -> str:
    found = summarise(row.clips, resamples=10)
    return f"{row.label}: " + ", ".join(f"{name} {found[name].mean:.3f}" for name in COLUMNS if name in found)


def table(rows: Sequence[ControlRow]) -> str:
    """A Markdown table with a line a number, a column a model: means and standard errors."""
    found = {row.label: summarise(row.clips, resamples=100) for row in rows}
    lines = ["| | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for name in COLUMNS:
        lines.append(f"| {name} | " + " | ".join(_cell(one.get(name)) for one in found.values()) + " |")
    lines.append("| seconds | " + " | ".join(f"{row.seconds:.1f}" for row in rows) + " |")
    return "\n".join(lines)


def _cell(estimate: Estimate | None) -> str:
    if estimate is None or not estimate.count:
        return "n/a"
    digits = 1 if abs(estimate.mean) >= 10 else 3
    return f"{estimate.mean:.{digits}f}" + ("" if estimate.count < 2 else f" ± {estimate.stderr:.{digits + 1}f}")


def run(
    models: Sequence[str],
    *,
    out: str | Path,
    clips: int = 256,
    seed: int = 0,
    batch: int | None = None,
    device: str | None = None,
    steps: int = 24,
    guidance: float = 1.5,
) -> list[ControlRow]:
    """Evaluate and write the folder -> the rows of the table.

    steps, guidance: of many-step models; few-step ones are sampled as they were trained, or as `@steps` says.
    """
    with claim(out, "evaluation"):
        loaded = load_models(models, device=device)
        pipelines = {label: many_step(p, steps=steps, guidance=guidance) for label, p in loaded.items()}
        for label, pipeline in pipelines.items():
            if "w2c" not in pipeline.fields:
                raise ValueError(f"--control needs models of the walkable world; {label} takes no cameras")
        first = next(iter(pipelines.values()))
        asked = tasks(clips, seed=seed, device=first.device)
        is_on_cpu = first.device.type == "cpu"
        rows, shown = evaluate(pipelines, asked, seed=seed, batch=batch or (8 if is_on_cpu else 256))
        _save(Path(out), rows, shown, asked, {"clips": clips, "seed": seed, "steps": steps, "guidance": guidance})
    return rows


def _save(
    out: Path, rows: Sequence[ControlRow], shown: Mapping[str, list[Tensor]], asked: Sequence[Task], facts: dict
) -> None:
    record = {
        row.label: {name: known(dataclasses.asdict(estimate)) for name, estimate in summarise(row.clips).items()}
        | {"seconds": row.seconds}
        for row in rows
    }
    write_text(out / "control.json", json.dumps({"facts": facts, "models": record}, indent=1, allow_nan=False))
    write_text(out / "control.md", table(rows) + "\n")
    true = shown["true render"]
    for label, pictures in shown.items():
        name = file_name(label)
        kept = {
            task.name: to_bytes(made).unflatten(0, made.shape[:2]) for task, made in zip(asked, pictures, strict=True)
        }
        write_tensors(out / f"{name}.safetensors", {task: made.contiguous() for task, made in kept.items()})
        clips, told = [], []
        for task, real, made in zip(asked, true, pictures, strict=True):
            count = min(4 if task.name in ("walk", "text") else 2, len(made))
            for number, caption in enumerate(captions(task.state[:count])):
                clips += [real[number], made[number]]
                told += [f"{task.name}, true: {caption}", f"{label}"]
        try:
            contact_sheet(clips, out / f"{name}.png", told, columns=16)
        except ImportError as error:  # the numbers took minutes
            log.warning("no contact sheet of %s, its pictures are in %s.safetensors: %s", label, name, error)
