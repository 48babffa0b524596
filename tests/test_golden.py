"""Recorded numbers of the released code: every case is met, and the check of them can fail."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from causalreel.verify import CaseResult, format_table, passed, run
from causalreel.verify.runner import NOT_COVERED, PASS, run_case
from causalreel.weights.files import read_tensors, write_tensors

FOLDER = Path(os.environ.get("CAUSALREEL_GOLDEN", Path(__file__).parents[1] / ".." / "shared" / "golden"))
CASES = sorted(FOLDER.glob("*.json")) if FOLDER.is_dir() else []

needs_cases = pytest.mark.skipif(not CASES, reason=f"no recorded cases in {FOLDER} (set CAUSALREEL_GOLDEN)")


@needs_cases
@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_recorded_case(path: Path) -> None:
    result = run_case(path)
    if result.status == NOT_COVERED:
        pytest.skip("not covered yet")
    assert result.status == PASS, format_table([result])
    assert "not checked" not in result.detail, result.detail


def first_case(fits: Callable[[str, dict], bool]) -> Path:
    """The first case whose name and configuration fit."""
    for path in CASES:
        found = json.loads(path.read_text())
        if isinstance(found, dict) and fits(path.stem, found.get("config") or {}):
            return path
    pytest.skip("the folder has no such case")


def copy_case(path: Path, folder: Path, *, config: dict | None = None) -> Path:
    """A case and all network weights into another folder, its configuration changed."""
    for weights in path.parent.glob("weights_[a-z].safetensors"):
        shutil.copyfile(weights, folder / weights.name)
    shutil.copyfile(path.with_suffix(".safetensors"), folder / f"{path.stem}.safetensors")
    described = json.loads(path.read_text())
    described["config"].update(config or {})
    (folder / path.name).write_text(json.dumps(described))
    return folder


def verdict(folder: Path, **how: object) -> CaseResult:
    (result,) = run(folder, **how)
    return result


@needs_cases
def test_an_unchanged_copy_passes(tmp_path: Path) -> None:
    result = verdict(copy_case(first_case(lambda name, config: name.startswith("c1_")), tmp_path))
    assert result.status == PASS and passed([result]) and 0 < result.error < result.tolerance


@needs_cases
@pytest.mark.parametrize("family", ["c1_", "c3_", "c4_", "c5_", "c7_loss", "c7_dmd"])
def test_another_weight_fails(family: str, tmp_path: Path) -> None:
    folder = copy_case(first_case(lambda name, config: name.startswith(family)), tmp_path)
    for path in folder.glob("weights_*.safetensors"):
        weights = {name: value.clone() for name, value in read_tensors(path).items()}
        name = next(name for name in weights if name.endswith("blocks.1.self_attn.v.weight"))
        weights[name][0] += 1e-2
        write_tensors(path, weights)
    result = verdict(folder)
    assert result.status == "fail" and not passed([result], allow_uncovered=True)
    assert result.error > result.tolerance and result.worst and "checks missed" in result.detail


@needs_cases
@pytest.mark.parametrize("family", ["c2_", "c4_"])
def test_another_window_fails(family: str, tmp_path: Path) -> None:
    path = first_case(lambda name, config: name.startswith(family) and config.get("local_attn_size", -1) > 1)
    window = json.loads(path.read_text())["config"]["local_attn_size"]
    assert verdict(copy_case(path, tmp_path, config={"local_attn_size": window + 1})).status == "fail"


@needs_cases
def test_a_missing_sink_fails(tmp_path: Path) -> None:
    path = first_case(lambda name, config: name.startswith("c4_") and config.get("sink_size", 0) > 0)
    assert verdict(copy_case(path, tmp_path, config={"sink_size": 0})).status == "fail"


@needs_cases
def test_another_chunk_size_fails(tmp_path: Path) -> None:
    path = first_case(lambda name, config: name.startswith("c3_") and config.get("frames_per_chunk", 1) > 1)
    assert verdict(copy_case(path, tmp_path, config={"frames_per_chunk": 1})).status == "fail"


@needs_cases
@pytest.mark.parametrize("change", ["steps", "shift", "fewer steps"])
def test_other_steps_fail(change: str, tmp_path: Path) -> None:
    path = first_case(lambda name, config: name.startswith("c4_") and len(config.get("steps", [])) > 1)
    steps = json.loads(path.read_text())["config"]["steps"]
    changed = {
        "steps": {"steps": [*steps[:-1], steps[-1] - 50]},
        "shift": {"shift": 6},
        "fewer steps": {"steps": steps[:-1]},
    }
    result = verdict(copy_case(path, tmp_path, config=changed[change]))
    assert result.status == ("error" if change == "fewer steps" else "fail"), result


@needs_cases
def test_a_missing_output_file_is_an_error(tmp_path: Path) -> None:
    folder = copy_case(first_case(lambda name, config: name.startswith("c1_")), tmp_path)
    next(folder.glob("c1_*.safetensors")).unlink()
    result = verdict(folder)
    assert result.status == "error" and "not found" in result.detail and not passed([result], allow_uncovered=True)


@needs_cases
def test_an_output_that_nothing_meets_is_named(tmp_path: Path) -> None:
    folder = copy_case(first_case(lambda name, config: name.startswith("c1_")), tmp_path)
    path = next(folder.glob("c1_*.safetensors"))
    write_tensors(path, read_tensors(path) | {"out.something_else": torch.ones(2)})
    assert "not checked: out.something_else" in verdict(folder).detail


def test_an_unknown_case_fails_unless_allowed(tmp_path: Path) -> None:
    (tmp_path / "c99_unheard_of.json").write_text(json.dumps({"case": "c99_unheard_of"}))
    (tmp_path / "shapes.json").write_text(json.dumps({"blocks.0": [1, 2]}))
    results = run(tmp_path, allow_uncovered=True)
    assert [result.status for result in results] == [NOT_COVERED] * 2 and all(math.isnan(r.error) for r in results)
    assert not passed(results) and passed(results, allow_uncovered=True)
    assert "2 not covered" in format_table(results)


def test_a_folder_without_cases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no cases"):
        run(tmp_path)
    with pytest.raises(ValueError, match="not found"):
        run(tmp_path / "nowhere")
    (tmp_path / "c99_x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no case in .* fits 'c1_\*'"):
        run(tmp_path, pattern="c1_*")
    assert not passed([])
