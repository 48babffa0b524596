"""c22: VBench's scores, file names and lists of videos, the video drift error, VisionReward's sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from causalreel.eval import vbench_names, vbench_scores
from causalreel.eval.vision_reward import vision_reward
from causalreel.eval.windows import drift_error, last_minus_first
from causalreel.foreign import read_json_list
from causalreel.verify.case import Case, Check, Findings
from causalreel.verify.words import message_of

SHOWN = {
    "camera_motion": "Video-Text Camera Motion",
    "i2v_subject": "Video-Image Subject Consistency",
    "i2v_background": "Video-Image Background Consistency",
}
"""What VBench's script of I2V calls dimensions; the others in capitals."""


def vbench(case: Case, found: Findings) -> None:
    """c22: all of it."""
    document = case.document
    for kind in vbench_scores.GROUPS:
        _tables(case, found, kind)
    for entry in document.get("cases", []):
        _scores(case, found, entry)
    for number, entry in enumerate(document.get("file_names", [])):
        _names(found, f"file_names.{number}", entry)
    if too_long := document.get("too_long_prompt"):
        prompt = too_long["prompt"]
        size, said = len(f"{prompt}-0.mp4".encode()), message_of(lambda: vbench_names.video_name(prompt, 0))
        found.add_exact("too_long_prompt: bytes", size, too_long["bytes_of_file_name"])
        is_reported = f"{size} bytes" in said and f"more than {vbench_names.LONGEST_NAME} bytes" in said
        found.add_exact("too_long_prompt: reported", is_reported, True)
    _listings(case, found)
    for number, entry in enumerate(document.get("drift", [])):
        _drift(found, f"drift.{number}", entry)
    reward = document.get("vision_reward", {})
    for number, entry in enumerate(reward.get("cases", [])):
        answers = ["yes" if letter == "y" else "no" for letter in entry["answers"]]
        _close(found, f"vision_reward.{number}", vision_reward(answers, reward["weights"]), entry["score"])


def _close(found: Findings, name: str, got: float, wanted: float | str) -> None:
    """Compare numbers of about 1; infinity is written as text."""
    wanted = float(wanted)
    error = 0.0 if got == wanted else abs(got - wanted)
    found.checks.append(Check(name, error if math.isfinite(error) else math.inf, found.case.tolerance))


def _all_close(found: Findings, name: str, got: Mapping[str, float], wanted: Mapping[str, float]) -> None:
    found.add_exact(f"{name}: names", sorted(got), sorted(wanted))
    for key in got.keys() & wanted.keys():
        _close(found, f"{name}.{key}", got[key], wanted[key])


def _tables(case: Case, found: Findings, kind: str) -> None:
    """Ranges, weights and groups are the recorded ones."""
    wanted = case.config.get(kind)
    if wanted is None:
        return
    groups, shares = vbench_scores.GROUPS[kind], vbench_scores.SHARES[kind]
    names = [name for group in groups.values() for name in group]
    found.add_exact(f"{kind}.min_max", {n: list(vbench_scores.RANGES[n]) for n in names}, wanted["min_max"])
    found.add_exact(f"{kind}.weights", {n: vbench_scores.WEIGHTS.get(n, 1) for n in names}, wanted["weights"])
    for group, members in groups.items():
        found.add_exact(f"{kind}.{group}", sorted(members), sorted(wanted[f"{group}_dimensions"]))
        found.add_exact(f"{kind}.{group}_weight", shares[group], wanted[f"{group}_weight"])


def _scores(case: Case, found: Findings, entry: Mapping[str, Any]) -> None:
    """A folder of results: what was read, normalised and summed up by both scripts."""
    label, kind = f"cases.{entry['name']}", entry["kind"]
    results = vbench_scores.read(case.folder / entry["folder"])
    scored = [name for names in vbench_scores.GROUPS[kind].values() for name in names]
    raw = {name: value for name, value in results.raw.items() if name in scored or name in entry["raw"]}
    _all_close(found, f"{label}.raw", raw, entry["raw"])
    if kind != vbench_scores.kind_of(raw):  # dimensions that both kinds have do not say which
        found.add_exact(f"{label}.kind", raw.keys() <= {*vbench_scores.QUALITY}, True)
    scores = vbench_scores.score(raw, kind)
    found.add_exact(f"{label}.missing", sorted(scores.missing), sorted(entry["missing"]))
    official = dict(entry["official"])
    weighted = {
        _shown(name, kind): vbench_scores.WEIGHTS.get(name, 1.0) * vbench_scores.normalised(name, raw.get(name, 0.0))
        for name in scored
    }
    _all_close(found, f"{label}.normalised", weighted, official.pop("normalised_times_weight"))
    _all_close(found, f"{label}.official", scores.official, official)
    _all_close(found, f"{label}.clipped", scores.present, entry["clipped_present_only"])


def _shown(name: str, kind: str) -> str:
    return name if kind == "t2v" else SHOWN.get(name) or name.replace("_", " ").title()


def _names(found: Findings, label: str, entry: Mapping[str, Any]) -> None:
    """A prompt's file names here and in rCM's scripts, or a file's name alone; the prompts read from it."""
    name = entry["file_name"]
    if "prompt" in entry:
        prompt, number = entry["prompt"], entry["index"]
        is_name = not message_of(lambda: vbench_names.video_name(prompt, number))
        found.add_exact(f"{label}: valid", is_name, entry["valid_file_name"])
        made = vbench_names.video_name(prompt, number) if is_name else None
        found.add_exact(f"{label}: name", made, name)
        found.add_exact(f"{label}: rCM's", vbench_names.rcm_name(prompt, number), entry["rcm_file_name"])
        is_found = made == vbench_names.rcm_name(prompt, number)
        found.add_exact(f"{label}: found", is_found, entry["found_by_vbench"])
    for key, is_long in (("prompt_read_back", False), ("prompt_read_back_long", True)):
        read = None if name is None else vbench_names.prompt_of(name, is_long=is_long)
        found.add_exact(f"{label}.{key}", read, entry[key])


def _listings(case: Case, found: Findings) -> None:
    """What VBench finds of the recorded list of prompts in the recorded folder, and the list as rCM writes it."""
    document = case.document
    if "full_info" not in document:
        return
    info, names = read_json_list(case.folder / document["full_info"]), document["existing_videos"]
    for key, wanted in document["listing"].items():
        if "full_info" in wanted:
            entries, missing = vbench_names.found(info, names, key.split("+"))
            found.add_exact(f"listing.{key}", entries, wanted["full_info"])
            found.add_exact(f"listing.{key}: missing", missing, wanted["missing"])
        elif "file_to_prompt" in wanted:
            made = vbench_names.custom_prompts(names, ["motion_smoothness"])
            found.add_exact(f"listing.{key}", made, wanted["file_to_prompt"])
        else:
            dimension = wanted["dimension"]
            said = message_of(lambda: vbench_names.custom_prompts(names, [dimension]))  # noqa: B023
            found.add_exact(f"listing.{key}: {wanted['expected']}", dimension in said, True)
    if "eval_info" in document:
        recorded = read_json_list(case.folder / document["eval_info"])
        folder = Path(recorded[0]["video_list"][0]).parent
        numbers = range(len(recorded[0]["video_list"]))
        made = [
            {**entry, "video_list": [str(folder / vbench_names.rcm_name(entry["prompt_en"], i)) for i in numbers]}
            for entry in info
        ]
        found.add_exact("eval_info", vbench_names.merged(made), recorded)


def _drift(found: Findings, label: str, entry: Mapping[str, Any]) -> None:
    """Curves over chunks. LV-Bench divides by the first value and not by its size: only the sign differs."""
    values = torch.tensor([entry["chunk_values"]], dtype=torch.float64)
    sign, quarter = math.copysign(1.0, entry["chunk_values"][0]), max(1, values.shape[1] // 4)
    made: dict[str, Callable[[], float]] = {
        "vde_linear": lambda: sign * drift_error(values).item(),
        "vde_log": lambda: sign * drift_error(values, weights="log").item(),
        "last_minus_first": lambda: last_minus_first(values).item(),
        "last_quarter_mean_minus_first_quarter_mean": lambda: last_minus_first(values, windows=quarter).item(),
        "quarter": lambda: quarter,
    }
    for name, make in made.items():
        if name in entry:
            _close(found, f"{label}.{name}", make(), entry[name])
