"""How previews look, against the data's own clips, and against those before: motion, contrast, colour."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from causalreel.data.video_in import read_video
from causalreel.train.doctor.files import RunFiles
from causalreel.train.doctor.finding import Finding, watch, wrong
from causalreel.train.looks import looks

FRAMES, SIDE = 96, 64
"""Of a preview's file that are looked at, and what they are scaled to."""

Look = tuple[int, dict[str, float]]
"""Completed steps, and numbers of `train.looks`."""


def found(run: RunFiles, notes: list[str]) -> list[Finding]:
    """What the latest preview says; notes: what could not be looked at, and why."""
    names = ("motion", "contrast", "colour")
    steps = [step for step, _ in run.column("preview/contrast")]
    seen: Sequence[Look] = [
        (step, {n: dict(run.column(f"preview/{n}")).get(step, 0.0) for n in names}) for step in steps
    ]
    data = {name: value for name in names if (value := run.last(f"data/{name}")) is not None}
    if not seen:
        seen = _from_files(run.folder / "previews", notes)
    if not seen:
        notes.append("previews: there are none (trainer.preview_every)")
        return []
    total = run.recipe.trainer.steps if run.recipe else seen[-1][0]
    if run.recipe is not None and run.recipe.stage == "pretrain" and seen[-1][0] < total / 2:
        notes.append("previews: a network from nothing is judged by them in the second half of its run")
        return []
    return [*_against(seen[-1], data), *_since(seen)] if data else list(_since(seen))


def _from_files(folder: Path, notes: list[str]) -> Sequence[Look]:
    """The first and the latest preview that can be read."""
    files = sorted(folder.glob("step-*.mp4")) if folder.is_dir() else []
    found = []
    for path in dict.fromkeys([*files[:1], *files[-1:]]):
        number = re.fullmatch(r"step-(\d{1,12})", path.stem)
        try:
            video, _ = read_video(path, frames=FRAMES, size=(SIDE, SIDE))
        except (ValueError, OSError) as error:
            notes.append(f"previews: {error}")
            continue
        if number is not None:
            found.append((int(number[1]), {name: value.item() for name, value in looks(video[None]).items()}))
    return found


def _against(last: Look, data: dict[str, float]) -> Iterator[Finding]:
    step, now = last
    ratios = {name: now[name] / data[name] for name in data if data[name] > 0}
    if ratios.get("motion", 1) < 0.25:
        what = f"motion {ratios['motion']:.2f} times the data's in the preview of step {step}: it freezes"
        yield wrong("motion", what, "an earlier checkpoint of stage 3; fewer cycles, or a stage before that moves")
    if ratios.get("motion", 1) > 4:
        what = f"motion {ratios['motion']:.1f} times the data's in the preview of step {step}: it flickers"
        yield wrong("motion", what, "look at chunk, shift and the stage before")
    if ratios.get("contrast", 1) > 1.6 or ratios.get("colour", 1) > 2:
        what = f"contrast {ratios.get('contrast', 1):.2f} and colour {ratios.get('colour', 1):.2f} times the data's"
        yield wrong("saturation", f"{what} in the preview of step {step}", "less guidance, fewer cycles")
    if ratios.get("contrast", 1) < 0.4:
        what = f"contrast {ratios['contrast']:.2f} times the data's in the preview of step {step}: it is washed out"
        yield wrong("contrast", what, "train on; if it stays, look at codec, shift and the teacher")


def _since(seen: Sequence[Look]) -> Iterator[Finding]:
    (first, before), (last, now) = seen[0], seen[-1]
    if last > first and before["motion"] > 0 and now["motion"] < 0.4 * before["motion"]:
        yield watch(
            "motion",
            f"motion fell from {before['motion']:.3g} in step {first} to {now['motion']:.3g} in step {last}",
            "compare the previews; stage 3 loses motion when it goes on for too long",
        )
