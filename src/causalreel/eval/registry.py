"""Metrics of clips that an evaluation computes beside those of the tiny world (`eval.metrics`): one function each.

@metric("brightness")
def brightness(video: Tensor, prompts: Sequence[str]) -> Tensor:
    return video.mean((1, 2, 3, 4))
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from causalreel.eval.metrics import Scores, measure
from causalreel.eval.statistics import by_name

Measure = Callable[[Tensor, Sequence[str]], Tensor]
"""video (B,T,3,H,W) in [-1,1], a prompt for each clip -> a number for each clip (B,), NaN where it is undefined."""

TAKEN = {*(field.name for field in dataclasses.fields(Scores)), "frechet", "seconds", "model"}


@dataclass(frozen=True)
class Metric:
    """A number of every clip."""

    measure: Measure
    in_table: bool
    """A column of the printed table; the files hold all."""


METRICS: dict[str, Metric] = {}
"""Name -> metric."""


def metric(name: str, *, in_table: bool = True) -> Callable[[Measure], Measure]:
    """Enter a function as the metric `name`; ValueError for a name that is taken or no plain word."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name):
        raise ValueError(f"a metric's name must be of at most 40 small letters, digits and _, got {name!r}")
    if name in TAKEN or name in METRICS:
        raise ValueError(f"there is a metric called {name!r} already")

    def enter(function: Measure) -> Measure:
        METRICS[name] = Metric(function, in_table)
        return function

    return enter


def clip_scores(video: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
    """video (B,T,3,H,W) in [-1,1], a prompt for each clip -> every metric's numbers (B,) by its name."""
    found = dict(by_name(measure(video, prompts)))
    for name, one in METRICS.items():
        with torch.no_grad():
            values = one.measure(video, prompts)
        if not isinstance(values, Tensor) or values.shape != (len(video),):
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"the metric {name} must give a tensor ({len(video)},), a number for each clip; got {got}")
        found[name] = values.float()
    return found


def read(path: Path) -> None:
    """Run a Python file that enters metrics; ValueError, naming it, if it is not there, stops or enters none."""
    spec = importlib.util.spec_from_file_location(f"causalreel_metrics_{path.stem}", path)
    if path.suffix != ".py" or not path.is_file() or spec is None or spec.loader is None:
        raise ValueError(f"metrics must be a Python file, got {path}")
    before = set(METRICS)
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except Exception as error:  # whatever somebody's own code raises
        raise ValueError(f"{path} stopped: {type(error).__name__}: {error}") from error
    if set(METRICS) == before:
        raise ValueError(f"{path} enters no metric; see causalreel.eval.registry.metric")
