"""`causalreel eval --vbench-results`: what VBench measured, as Quality, Semantic (or I2V) and Total.

By two scripts, which agree where all dimensions are there and in range: VBench's own (scripts/cal_final_score.py and
cal_i2v_final_score.py at 45e79ec) takes values as they come and a missing one as raw 0; rCM's clips to 0..1 and leaves
missing ones out. A result is a table and `vbench.json`, `vbench.md`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from causalreel.files import write_text
from causalreel.folders import claim
from causalreel.foreign import read_json, shown
from causalreel.spelling import nearest

RANGES = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
    "dynamic_degree": (0.0, 1.0),
    "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0),
    "human_action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
    "i2v_subject": (0.1462, 1.0),
    "i2v_background": (0.2615, 1.0),
    "camera_motion": (0.0, 1.0),
}
"""Dimension -> the raw values that are 0 and 1 when normalised, the same in T2V and I2V."""

WEIGHTS = {"dynamic_degree": 0.5, "camera_motion": 0.1}
"""In the mean of a group; all others have 1."""

I2V = ("i2v_subject", "i2v_background", "camera_motion")
QUALITY, SEMANTIC = tuple(RANGES)[:7], tuple(RANGES)[7:16]

GROUPS = {
    "t2v": {"quality": QUALITY, "semantic": SEMANTIC},
    "i2v": {"quality": tuple(name for name in QUALITY if name != "temporal_flickering"), "i2v": I2V},
}
"""Kind of an evaluation -> its groups. I2V lists temporal_flickering too, and does not score it."""

SHARES = {"t2v": {"quality": 4, "semantic": 1}, "i2v": {"quality": 1, "i2v": 1}}
"""Of the groups in the total."""

MARK = "†"
"""Behind what is not a mean over all dimensions."""

RESULTS = "_eval_results.json"
"""How a file of results ends; `*_full_info.json` beside it holds no score."""
MOST_BYTES, MOST_FILES = 64 << 20, 256
"""Of a file, which lists every video, and of a folder."""
MOST = 1e6
"""What a mean is below; measured ones are about 1."""


@dataclass(frozen=True)
class Results:
    """What VBench measured."""

    raw: dict[str, float]
    """Dimension -> the mean over its videos, about 0..1."""
    videos: dict[str, int] = field(default_factory=dict)
    """Dimension -> how many are listed; VBench-Long lists clips."""


@dataclass(frozen=True)
class Scores:
    """What they come to, 0..1."""

    kind: str
    """t2v or i2v."""
    missing: tuple[str, ...]
    """Dimensions that were not measured: the totals are then of something else."""
    official: dict[str, float]
    """quality, semantic or i2v, and total, by VBench's script: missing dimensions are raw 0, nothing is clipped."""
    present: dict[str, float]
    """The same by rCM's: clipped, over the dimensions that are there; 0 for a group without any."""


def read(folder: str | Path) -> Results:
    """The `*_eval_results.json` of a folder, one for each dimension or one for all.

    ValueError for a folder without them, a dimension that is unknown, that has two values or one that is no number, and
    for dimensions of T2V beside those of I2V.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder of VBench's results not found: {shown(str(folder), 400)}")
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(RESULTS) and path.name[0] != ".")
    if not 0 < len(paths) <= MOST_FILES:
        raise ValueError(f"{folder} must hold 1 to {MOST_FILES} files that end in {RESULTS}, got {len(paths)}")
    raw, videos, places = dict[str, float](), dict[str, int](), dict[str, Path]()
    for path in paths:
        for key, value in read_json(path, most=MOST_BYTES, what="file of VBench's results").items():
            name = _dimension(key, path)
            mean, count = _measured(value, name, path)
            if name in raw and mean != raw[name]:
                twice = f"{raw[name]:.12g} in {places[name].name} and {mean:.12g} in {path.name}"
                raise ValueError(f"{folder}: {name} has two values, {twice}; leave one of them")
            raw[name], videos[name], places[name] = mean, max(count, videos.get(name, 0)), path
    if not raw:
        raise ValueError(f"{paths[0]} holds no dimension, expected such as {', '.join(list(RANGES)[:3])}")
    kind_of(raw)
    return Results(raw, videos)


def _dimension(key: str, path: Path) -> str:
    name = key.replace(" ", "_")
    if name not in RANGES:
        near = nearest(name, RANGES)
        hint = f"did you mean {near!r}?" if near else f"the dimensions are {', '.join(RANGES)}"
        raise ValueError(f"{path}: VBench has no dimension {shown(key, 60)!r}; {hint}")
    return name


def _measured(value: Any, name: str, path: Path) -> tuple[float, int]:
    """[mean, [videos], ...], or a mean alone -> mean and the number of videos, 0 if none are listed."""
    mean = value[0] if isinstance(value, list) and value else value
    if isinstance(mean, bool) or not isinstance(mean, (int, float)) or not -MOST < mean < MOST:
        raise ValueError(f"{path}: {name} must be a number, the mean over its videos, got {shown(mean, 60)}")
    listed = value[1] if isinstance(value, list) and len(value) > 1 else []
    return float(mean), len(listed) if isinstance(listed, list) else 0


def kind_of(dimensions: Iterable[str]) -> str:
    """i2v if a dimension of I2V's alone is there, else t2v; ValueError if both have one."""
    names = set(dimensions)
    of_i2v, of_t2v = names & {*I2V}, names & {*SEMANTIC}
    if of_i2v and of_t2v:
        told = f"{min(of_i2v)} is of I2V and {min(of_t2v)} of T2V"
        raise ValueError(f"results of one evaluation are expected, {told}: give each its own folder")
    return "i2v" if of_i2v else "t2v"


def normalised(name: str, raw: float) -> float:
    """A raw mean -> 0..1 within the dimension's range, beyond them outside of it."""
    least, most = RANGES[name]
    return (raw - least) / (most - least)


def score(raw: Mapping[str, float], kind: str | None = None) -> Scores:
    """Raw means by dimension -> groups and totals by both scripts. kind: t2v or i2v; None: what `kind_of` says."""
    kind = kind_of(raw) if kind is None else kind
    scored = [name for names in GROUPS[kind].values() for name in names]
    as_they_come = {name: normalised(name, raw.get(name, 0.0)) for name in scored}
    clipped = {name: _clipped(as_they_come[name]) for name in scored if name in raw}
    missing = tuple(name for name in scored if name not in raw)
    return Scores(kind, missing, _means(as_they_come, kind), _means(clipped, kind))


def _clipped(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _means(values: Mapping[str, float], kind: str) -> dict[str, float]:
    """Normalised values -> the weighted means of the groups, 0 for one without any, and their total."""
    found = {}
    for group, names in GROUPS[kind].items():
        weights = {name: WEIGHTS.get(name, 1.0) for name in names if name in values}
        whole = sum(weight * values[name] for name, weight in weights.items())
        found[group] = whole / sum(weights.values()) if weights else 0.0
    shares = SHARES[kind]
    return found | {"total": sum(shares[group] * found[group] for group in shares) / sum(shares.values())}


# ---- results


def table(results: Results, scores: Scores) -> str:
    """Markdown, times 100 as published tables are; what lacks a dimension is marked, and below it is said which."""
    lines = [
        f"| {scores.kind.upper()}, x 100 | videos | raw | normalised (VBench) | clipped (rCM) |",
        "|---|---|---|---|---|",
    ]
    for group, names in GROUPS[scores.kind].items():
        lines += [_row(name, results) for name in names]
        lines.append(_mean_row(group, scores, is_whole=not {*names} & {*scores.missing}))
    lines.append(_mean_row("total", scores, is_whole=not scores.missing))
    beside = [name for name in results.raw if all(name not in names for names in GROUPS[scores.kind].values())]
    lines += [f"| {name} | {_count(name, results)} | {_percent(results.raw[name])} | not scored | |" for name in beside]
    if scores.missing:
        told, count = ", ".join(scores.missing), sum(map(len, GROUPS[scores.kind].values()))
        lines.append(
            f"\n{MARK} Incomplete, {len(scores.missing)} of {count} dimensions are missing: {told}. "
            "VBench's script takes raw 0 for each, which can be far below 0 normalised; rCM's leaves them out. Neither "
            "compares with a score of all dimensions."
        )
    return "\n".join(lines)


def _row(name: str, results: Results) -> str:
    if name not in results.raw:
        return f"| {name} | | missing | {_percent(normalised(name, 0.0))} {MARK} | |"
    value = normalised(name, results.raw[name])
    numbers = (results.raw[name], value, _clipped(value))
    return f"| {name} | {_count(name, results)} | {' | '.join(map(_percent, numbers))} |"


def _mean_row(name: str, scores: Scores, *, is_whole: bool) -> str:
    mark = "" if is_whole else f" {MARK}"
    official, present = (f"{_percent(one[name])}{mark}" for one in (scores.official, scores.present))
    return f"| **{name}**{mark} | | | {official} | {present} |"


def _count(name: str, results: Results) -> str:
    return str(results.videos.get(name) or "")


def _percent(value: float) -> str:
    return f"{100 * value:.2f}"


def record(results: Results, scores: Scores) -> dict[str, Any]:
    """What `vbench.json` holds, 0..1."""
    dimensions = {
        name: {"raw": raw, "normalised": (value := normalised(name, raw)), "clipped": _clipped(value)}
        | {"videos": results.videos.get(name) or None}
        for name, raw in results.raw.items()
    }
    told = {"kind": scores.kind, "complete": not scores.missing, "missing": list(scores.missing)}
    return told | {"dimensions": dimensions, "official": scores.official, "clipped_present_only": scores.present}


def run(folder: str | Path, *, out: str | Path) -> tuple[Results, Scores]:
    """`causalreel eval --vbench-results`: read, score and write the folder."""
    results = read(folder)
    scores = score(results.raw)
    with claim(out, "evaluation"):
        told = {"facts": {"results": str(folder)}} | record(results, scores)
        write_text(Path(out) / "vbench.json", json.dumps(told, indent=1, allow_nan=False))
        write_text(Path(out) / "vbench.md", table(results, scores) + "\n")
    return results, scores
