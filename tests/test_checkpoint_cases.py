"""The check of recorded checkpoint layouts can fail: other weights, a broken file that loads, a reason not given."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from causalreel.verify import CaseResult
from causalreel.verify.runner import PASS, run_case

FOLDER = Path(os.environ.get("CAUSALREEL_GOLDEN", Path(__file__).parents[1] / ".." / "shared" / "golden"))


def find(what: str) -> Path:
    """The first case of checkpoints whose JSON has this key, in its config or itself."""
    for path in sorted(FOLDER.glob("c14_*.json")) if FOLDER.is_dir() else ():
        described = json.loads(path.read_text(encoding="utf-8"))
        if what in described or what in described["config"]:
            return path
    pytest.skip(f"no such case in {FOLDER} (set CAUSALREEL_GOLDEN)")


class Copy:
    """A case of layouts in a folder of its own, to be changed."""

    def __init__(self, folder: Path) -> None:
        path = find("files")
        self.path = folder / path.name
        shutil.copyfile(path.with_suffix(".safetensors"), self.path.with_suffix(".safetensors"))
        self.described: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        self.files = folder / self.described["config"]["folder"]
        shutil.copytree(path.parent / self.described["config"]["folder"], self.files)

    def entry(self, *, loads: bool, reason: str = "", layout: str = "") -> dict[str, Any]:
        """The first file that loads, or is refused for this reason."""
        for entry in self.described["config"]["files"]:
            expected = entry["expected"]
            fits = (expected["status"] == "loads") == loads and layout in entry["layout"]
            if fits and reason in expected.get("reason", ""):
                return entry
        pytest.skip("the case has no such file")

    def verdict(self) -> CaseResult:
        self.path.write_text(json.dumps(self.described), encoding="utf-8")
        return run_case(self.path)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path)


def test_an_unchanged_copy_passes(copy: Copy) -> None:
    result = copy.verdict()
    assert result.status == PASS and not result.detail, result


def test_another_weight_fails(copy: Copy) -> None:
    entry = next(e for e in copy.described["config"]["files"] if e["top_level_keys"] == ["generator"])
    path = copy.files / entry["file"]
    found = torch.load(path, weights_only=True)
    name = next(name for name in found["generator"] if name.endswith("ffn.2.weight"))
    found["generator"][name] += 1e-3
    torch.save(found, path)
    assert copy.verdict().status == "fail"


def test_another_network_than_expected_fails(copy: Copy) -> None:
    entry = copy.entry(loads=True, layout="bare")
    entry["expected"]["network"] = "generator_ema"
    assert copy.verdict().status == "fail"


def test_a_file_that_must_be_refused_and_loads_fails(copy: Copy) -> None:
    good = copy.entry(loads=True, layout="{'generator'")
    bad = copy.entry(loads=False, reason="missing key")
    shutil.copyfile(copy.files / good["file"], copy.files / bad["file"])
    assert copy.verdict().status == "fail"


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("missing key", {"key": "blocks.0.norm3.weight"}),
        ("wrong shape", {"found": [5, 7]}),
        ("missing key", {"reason": "two names map to one parameter", "key": None}),
        ("zip directory missing", {"reason": "not finite"}),
    ],
)
def test_a_reason_that_is_not_given_fails(reason: str, change: dict[str, Any], copy: Copy) -> None:
    entry = copy.entry(loads=False, reason=reason)
    entry["expected"] |= change
    assert copy.verdict().status == "fail"


def test_another_key_map_fails(copy: Copy) -> None:
    rows = copy.described["config"].get("key_map_official_to_diffusers") or pytest.skip("the case has no key map")
    rows[-1][1] = "proj_in.*"
    assert copy.verdict().status == "fail"


@pytest.mark.parametrize("change", ["name", "shape", "count"])
def test_other_names_and_shapes_fail(change: str, tmp_path: Path) -> None:
    described = json.loads(find("shapes").read_text(encoding="utf-8"))
    label = next(label for label, sizes in described["config"].items() if "text_len" in sizes)
    for part in ("shapes", "config", "counts"):  # the DiT alone
        described[part] = {label: described[part][label]}
    path = tmp_path / "c14_names.json"
    path.write_text(json.dumps(described))
    assert run_case(path).status == PASS
    shapes = described["shapes"][label]
    if change == "name":
        shapes["head.extra"] = shapes.pop("head.modulation")
    if change == "shape":
        shapes["head.modulation"] = [1, 3, *shapes["head.modulation"][2:]]
    if change == "count":
        described["counts"][label]["parameters"] += 1
    path.write_text(json.dumps(described))
    assert run_case(path).status == "fail"
