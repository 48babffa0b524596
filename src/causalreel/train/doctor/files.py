"""A run's folder, read within bounds: records, recipe, checkpoints, export. The run may be going on meanwhile."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from causalreel import config as configs
from causalreel.foreign import ordinary_file, parse_json, shown
from causalreel.nn.presets import preset
from causalreel.train import checkpoint
from causalreel.train.initial import size_of
from causalreel.train.recipe import Recipe
from causalreel.weights.export import Export, Sampling, read_export
from causalreel.weights.identify import preset_of

LINE, RECORDS, NAMES = 1 << 16, 200_000, 500
"""Bytes of a record, records of a file, numbers of a record."""

Record = Mapping[str, float]


@dataclass(frozen=True)
class RunFiles:
    """What a run has left so far."""

    folder: Path
    records: Sequence[Record]
    """By rising step."""
    recipe: Recipe | None
    size: str | None
    """Preset of the student, where its files are there."""
    checkpoints: Sequence[Path]
    """Complete ones, oldest first."""
    sampling: Sampling | None
    """How its export is sampled, if there is one."""
    notes: Sequence[str] = ()
    """What could not be read, and why."""

    @property
    def step(self) -> int:
        """Steps that are known to be done."""
        done = [int(self.records[-1]["step"])] if self.records else []
        return max([0, *done, *map(checkpoint.step_of, self.checkpoints)])

    def column(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of every record that has the metric."""
        return [(int(record["step"]), record[name]) for record in self.records if name in record]

    def last(self, name: str) -> float | None:
        """The latest value of a metric."""
        return next((record[name] for record in reversed(self.records) if name in record), None)


def read_run(folder: Path) -> RunFiles:
    """ValueError, in one line, for a folder that is of no run or whose records cannot be read."""
    metrics, directory = folder / "metrics.jsonl", folder / "checkpoints"
    if not folder.is_dir():
        raise ValueError(
            f"{shown(str(folder), 400)} is no folder of a run: {'a file' if folder.exists() else 'not there'}"
        )
    if not metrics.exists() and not directory.is_dir():
        raise ValueError(f"{folder} is no folder of a run: it has neither metrics.jsonl nor checkpoints")
    notes: list[str] = []
    records = read_records(metrics, notes) if metrics.exists() else []
    try:
        checkpoints = checkpoint.complete(directory)
    except OSError as error:
        checkpoints, told = [], error.strerror or error
        notes.append(f"{directory} cannot be read: {told}")
    recipe = _recipe([*[path / "config.yaml" for path in reversed(checkpoints)], folder / "config.yaml"], notes)
    return RunFiles(folder, records, recipe, _size(recipe), checkpoints, _sampling(folder, notes), notes)


def read_records(path: Path, notes: list[str]) -> list[Record]:
    """The records of a metrics file by rising step, the later one of two of a step; lines that are none are left out.

    ValueError if it has lines and none of them is a record.
    """
    found: dict[int, Record] = {}
    bad = lines = 0
    with ordinary_file(path, "metrics file").open("rb") as file:
        while line := file.readline(LINE + 1):
            lines += 1
            if lines > RECORDS:
                notes.append(f"{path} has more than {RECORDS:,} lines; the rest was not read")
                break
            record = _record(line, path)
            if record is None:
                bad += 1
                continue
            found[int(record["step"])] = record
    if bad and not found:
        raise ValueError(f"{path} holds no records: none of its {lines:,} lines is a JSON object with a step")
    if bad > 1:  # one is torn where a run is going on
        notes.append(f"{path}: {bad} lines are no records and were left out")
    return [found[step] for step in sorted(found)]


def _record(line: bytes, path: Path) -> Record | None:
    if len(line) > LINE:
        return None
    try:
        content = parse_json(line.decode("utf-8"), str(path), items=NAMES)
    except ValueError:
        return None
    numbers = {
        shown(name, 80): float(value)
        for name, value in content.items()
        if type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)
    }
    step = content.get("step")
    return numbers if type(step) is int and 0 <= step < 1 << 53 else None


def _recipe(places: Sequence[Path], notes: list[str]) -> Recipe | None:
    problem = "no checkpoint and no config.yaml yet"
    for path in places:
        if path.is_file():
            try:
                return configs.load(path, Recipe, alone=True)
            except (ValueError, OSError) as error:
                problem = str(error)
    notes.append(f"settings are not known: {shown(problem, 300)}")
    return None


def _size(recipe: Recipe | None) -> str | None:
    if recipe is None or recipe.stage == "codec":
        return None
    try:
        place = recipe.init.get("student")
        return preset_of(preset(recipe.model) if place is None else size_of(place))
    except (ValueError, OSError, ImportError):
        return None


def _sampling(folder: Path, notes: list[str]) -> Sampling | None:
    if not (folder / "export" / "config.yaml").is_file():
        return None
    try:
        return read_export(folder / "export").sampling
    except (ValueError, OSError) as error:
        notes.append(f"the export cannot be read: {shown(str(error), 300)}")
        return None


def start_of(recipe: Recipe, role: str) -> Export | None:
    """The export that a role begins with; None where it begins otherwise, or that is there no more."""
    with contextlib.suppress(ValueError, OSError):
        return read_export(recipe.init[role])
    return None
