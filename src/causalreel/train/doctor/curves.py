"""Metrics against those of healthy runs: bands, which come from recorded runs of several seeds.

A band holds at the steps of its runs. What a record means over (from the step of the one before to its own) is compared
with the mean of the band over the same steps, so that it does not matter how often a run records. Later steps of the
base and of AR diffusion, whose losses fall, are held against the end of the band from above alone.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance
from typing import Any

from causalreel.foreign import read_json
from causalreel.train.doctor.files import RunFiles, start_of
from causalreel.train.doctor.finding import Finding
from causalreel.train.initial import RANDOM
from causalreel.train.recipe import Recipe

SHIPPED = Path(__file__).with_name("curves.json")
"""Curves of the tiny recipes, as `runs/doctor.py` makes them."""

FALLING = ("pretrain", "ar_diffusion")
"""Stages whose losses fall to the end. Those of distillation need not: a few-step student is no longer the mean."""

MARKS = ("chunk", "samples", "forcing", "trajectories", "steps")
"""Settings that make a run another kind, beside its stage and size. No setting that may be wrong."""


@dataclass(frozen=True)
class Metric:
    """A metric that is compared."""

    margin: float
    """What is allowed on each side beside four standard deviations: a share, as a logarithm."""
    level: str
    check: str
    above: str
    """What it means and what helps, where it is too high."""
    below: str
    is_mean: bool = True
    """Whether a record holds its mean over the steps since the one before, or its value in the last one."""
    is_bound: bool = False
    """Whether it may not be above the band's end later either, in the stages of `FALLING`."""


_LEARNING = "look at the learning rate, the captions, the codec and what the networks start from"
_EASY = "the task is easier than it should be: look at shift, weight and chunk, and whether clips repeat"
_SPEED = "look at the learning rate and its schedule, and at the type of the weights"

METRICS: dict[str, Metric] = {
    "student/loss": Metric(0.10, "wrong", "loss", _LEARNING, _EASY, is_bound=True),
    "critic/loss": Metric(0.15, "wrong", "critic", "the critic does not follow: more updates, a slower student", _EASY),
    "student/grad_norm": Metric(0.5, "watch", "gradient norm", _LEARNING, _EASY),
    "critic/grad_norm": Metric(0.5, "watch", "gradient norm", _LEARNING, _EASY),
    "student/update_ratio": Metric(0.25, "wrong", "movement", _SPEED, _SPEED, is_mean=False),
    "critic/update_ratio": Metric(0.25, "wrong", "movement", _SPEED, _SPEED, is_mean=False),
    "average/distance": Metric(
        0.5, "watch", "average", "it lags: look at its decay", "look at its decay", is_mean=False
    ),
    "target/distance": Metric(
        0.5, "watch", "average", "it lags: look at its decay", "look at its decay", is_mean=False
    ),
    "student/gradient_size": Metric(
        0.25, "watch", "scores", "teacher and critic disagree more", "teacher and critic agree"
    ),
    "student/latent_std": Metric(
        0.10, "wrong", "saturation", "less guidance, fewer cycles", "look at the stage before"
    ),
    "probe/0.25": Metric(0.15, "wrong", "known clips", _LEARNING, _EASY, is_mean=False, is_bound=True),
    "probe/0.6": Metric(0.15, "wrong", "known clips", _LEARNING, _EASY, is_mean=False, is_bound=True),
    "probe/0.9": Metric(0.15, "wrong", "known clips", _LEARNING, _EASY, is_mean=False, is_bound=True),
    "probe/text": Metric(
        0.25,
        "wrong",
        "text",
        "it leans on the text more than healthy runs do: look at the context",
        "it hardly uses the text: look at whether captions belong to their clips, at text dropout and at guidance",
        is_mean=False,
    ),
}


@dataclass(frozen=True)
class Band:
    """Where a metric of healthy runs is, at the steps of their records."""

    steps: Sequence[int]
    low: Sequence[float]
    high: Sequence[float]

    def over(self, first: int, last: int, *, is_mean: bool) -> tuple[float, float] | None:
        """Its ends for a record of the steps after `first` to `last`; None outside of the band's steps."""
        if last > self.steps[-1] or last < self.steps[0]:
            return None
        if is_mean:
            inside = slice(bisect_right(self.steps, first), bisect_right(self.steps, last))
            if self.low[inside]:
                return mean(self.low[inside]), mean(self.high[inside])
        place = bisect_right(self.steps, last) - 1
        return self.low[place], self.high[place]


@dataclass(frozen=True)
class Curves:
    """The bands of one kind of run."""

    name: str
    marks: Mapping[str, Any]
    batch: int
    begins: str | None
    """What the student begins with, see `beginning`; None: not known."""
    bands: Mapping[str, Band]


def marks_of(recipe: Recipe, size: str | None) -> dict[str, Any]:
    """What kind of run it is."""
    settings = {mark: getattr(recipe.settings, mark) for mark in MARKS if hasattr(recipe.settings, mark)}
    return json.loads(json.dumps({"stage": recipe.stage, "size": size, **settings}))


def beginning(recipe: Recipe) -> str | None:
    """What the student begins with: random weights, or the stage that made its export; None where that is not known."""
    if str(recipe.init.get("student", RANDOM)).startswith(RANDOM):
        return "random weights"
    start = start_of(recipe, "student")
    made = None if start is None else start.provenance.get("recipe")
    stage = made.get("stage") if isinstance(made, Mapping) else None
    return None if stage is None else str(stage)


def read_curves(path: Path = SHIPPED) -> list[Curves]:
    """ValueError for a file that holds no curves; none where the package's own file is not there."""
    if path == SHIPPED and not path.is_file():
        return []
    content = read_json(path, what="file of curves")
    try:
        return [
            Curves(
                name,
                dict(one["marks"]),
                int(one["batch"]),
                None if one.get("begins") is None else str(one["begins"]),
                {
                    metric: Band(list(map(int, band["steps"])), *([float(v) for v in band[k]] for k in ("low", "high")))
                    for metric, band in one["bands"].items()
                    if metric in METRICS and len(band["steps"]) == len(band["low"]) == len(band["high"]) > 0
                },
            )
            for name, one in content["curves"].items()
        ]
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is no file of curves: {error}") from None


def of_run(run: RunFiles, curves: Sequence[Curves], notes: list[str]) -> Curves | None:
    """The curves that a run can be compared with; else None, and a note that says why."""
    if run.recipe is None:
        return None
    marks = marks_of(run.recipe, run.size)
    for one in curves:
        if one.marks == marks:
            batch = getattr(run.recipe.settings, "batch", one.batch)
            if batch * 2 < one.batch:
                notes.append(
                    f"curves: {one.name} has batches of {one.batch}, this run of {batch}: too noisy to compare"
                )
                return None
            begins = beginning(run.recipe)
            if begins is not None and one.begins is not None and begins != one.begins:
                notes.append(f"curves: runs of {one.name} begin with {one.begins}, this one with {begins}")
                return None
            return one
    told = ", ".join(f"{name} {value}" for name, value in marks.items() if value is not None)
    notes.append(f"curves: there are none of this kind of run ({told}); what does not need them was looked at")
    return None


def found(run: RunFiles, curves: Curves) -> list[Finding]:
    """What is outside of its band."""
    return [f for name, band in curves.bands.items() if (f := _of_metric(run, name, band, curves.name)) is not None]


def _of_metric(run: RunFiles, name: str, band: Band, reference: str) -> Finding | None:
    metric, seen = METRICS[name], list(_compared(run, name, band))
    high = [place for place in seen if place[1] > place[3]]
    low = [place for place in seen if place[1] < place[2]]
    outside = max(high, low, key=len)
    is_bound = metric.is_bound and run.recipe is not None and run.recipe.stage in FALLING
    later = _later(run, name, band) if is_bound else None
    if not outside or (len(outside) <= len(seen) / 3 and outside[-1] is not seen[-1]):
        outside = []
    if len(outside) == 1 and len(seen) > 2:
        outside = []
    if outside:
        step, value, least, most = outside[-1]
        side = "above" if outside is high else "below"
        place = (
            f"{len(outside)} of {len(seen)} records to step {step}, there {value:.3g} against {least:.3g} to {most:.3g}"
        )
    elif later is not None:
        side, place = "above", later
    else:
        return None
    what = f"{name} is {side} that of healthy runs of {reference}: {place}"
    return Finding(
        metric.check,
        "wrong" if metric.level == "wrong" else "watch",
        "measured",
        what,
        metric.above if side == "above" else metric.below,
    )


def _compared(run: RunFiles, name: str, band: Band) -> Iterator[tuple[int, float, float, float]]:
    """Step, value and the band's ends of every record that has the metric within the band's steps."""
    before = 0
    for record in run.records:
        step = int(record["step"])
        if name in record and (ends := band.over(before, step, is_mean=METRICS[name].is_mean)) is not None:
            yield step, record[name], *ends
        before = step


def _later(run: RunFiles, name: str, band: Band) -> str | None:
    values = [value for step, value in run.column(name) if step > band.steps[-1]][-3:]
    most = max(band.high[-3:])
    if not values or mean(values) <= most:
        return None
    return f"{mean(values):.3g} in the last records, {most:.3g} at most at step {band.steps[-1]}"


# ---- how bands are made


def make_curves(name: str, runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Healthy runs of one kind, at least two seeds -> what a file of curves holds of them."""
    recipe = runs[0].recipe
    assert recipe is not None
    bands = {}
    for metric in METRICS:
        columns = [dict(run.column(metric)) for run in runs]
        steps = sorted(set.intersection(*map(set, columns)))
        if steps:
            bands[metric] = _band(steps, [[column[step] for column in columns] for step in steps], metric)
    marks = marks_of(recipe, runs[0].size)
    told = {"name": name, "marks": marks, "batch": recipe.settings.batch, "begins": beginning(recipe)}
    return {**told, "bands": bands}


def _band(steps: Sequence[int], values: Sequence[Sequence[float]], metric: str) -> dict[str, Any]:
    """values: at each step those of all seeds. The spread is that of all steps together."""
    forward, back = (math.log1p, math.expm1) if metric == "probe/text" else (math.log, math.exp)
    least = -0.99 if metric == "probe/text" else 1e-12
    scaled = [[forward(max(value, least)) for value in each] for each in values]
    spread = 4 * math.sqrt(mean(variance(each) for each in scaled)) + METRICS[metric].margin
    centres = [mean(each) for each in scaled]
    return {
        "steps": list(steps),
        "low": [_short(back(centre - spread)) for centre in centres],
        "high": [_short(back(centre + spread)) for centre in centres],
    }


def _short(value: float) -> float:
    return float(f"{value:.3g}")
