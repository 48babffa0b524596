"""VBench's results as scores by two scripts, its file names and lists, VisionReward's sum, the modes of `eval`."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from causalreel import cli
from causalreel.cli.measuring import MODES
from causalreel.eval import vbench_names
from causalreel.eval.vbench_names import custom_prompts, found, merged, prompt_of, video_name
from causalreel.eval.vbench_scores import (
    GROUPS,
    I2V,
    MARK,
    QUALITY,
    RANGES,
    SEMANTIC,
    kind_of,
    normalised,
    read,
    score,
    table,
)
from causalreel.eval.vision_reward import vision_reward
from causalreel.eval.windows import last_minus_first
from causalreel.verify.runner import run_case

GOLDEN = Path(os.environ.get("CAUSALREEL_GOLDEN", Path(__file__).parents[1] / ".." / "shared" / "golden"))
CASES = sorted(GOLDEN.glob("c22_*.json")) if GOLDEN.is_dir() else []

needs_case = pytest.mark.skipif(not CASES, reason=f"no recorded scores in {GOLDEN} (set CAUSALREEL_GOLDEN)")

BEST = {name: most for name, (_, most) in RANGES.items()}
"""Raw values that are 1 when normalised."""


def results(folder: Path, raw: dict[str, Any], *, apart: bool = True) -> Path:
    """A folder as VBench leaves it: a file for each dimension, or one for all; two videos are listed."""
    folder.mkdir(parents=True, exist_ok=True)
    told = {
        name: [mean, [{"video_path": f"v/a-{i}.mp4", "video_results": mean} for i in (0, 1)]]
        for name, mean in raw.items()
    }
    for name in told if apart else ["all"]:
        some = {name: told[name]} if apart else told
        (folder / f"{name}_eval_results.json").write_text(json.dumps(some))
        (folder / f"{name}_full_info.json").write_text(json.dumps([{"prompt_en": "a", "dimension": [name]}]))
    return folder


# ---- scores


def test_scores_are_those_by_hand() -> None:
    raw = {name: BEST[name] for name in (*QUALITY, *SEMANTIC)}
    assert score(raw).official == pytest.approx({"quality": 1, "semantic": 1, "total": 1})
    raw |= {"dynamic_degree": 0.0, "scene": 0.4111, "motion_smoothness": 1.0}
    smooth = 0.294 / 0.2915  # above the range
    quality, semantic = (5 + smooth + 0) / 6.5, 8.5 / 9
    found_here = score(raw)
    assert found_here.kind == "t2v" and found_here.missing == ()
    assert found_here.official == pytest.approx(
        {"quality": quality, "semantic": semantic, "total": (4 * quality + semantic) / 5}
    )
    assert found_here.present == pytest.approx(
        {"quality": 6 / 6.5, "semantic": semantic, "total": (24 / 6.5 + semantic) / 5}
    )


def test_a_missing_dimension_is_raw_0_by_one_script_and_left_out_by_the_other() -> None:
    raw = {name: BEST[name] for name in (*QUALITY, *SEMANTIC) if name not in ("temporal_flickering", "color")}
    scores = score(raw)
    assert scores.missing == ("temporal_flickering", "color")
    flicker = -0.6293 / 0.3707
    assert scores.official == pytest.approx(
        {"quality": (5.5 + flicker) / 6.5, "semantic": 8 / 9, "total": (4 * (5.5 + flicker) / 6.5 + 8 / 9) / 5}
    )
    assert scores.present == pytest.approx({"quality": 1, "semantic": 1, "total": 1})
    assert score({"color": 1.0}).present == {"quality": 0.0, "semantic": 1.0, "total": 0.2}


def test_i2v_has_its_own_groups_and_leaves_flicker_out(tmp_path: Path) -> None:
    raw = {name: BEST[name] for name in (*QUALITY, *I2V)} | {"camera_motion": 0.5, "dynamic_degree": 0.5}
    scores = score(raw)
    assert scores.kind == "i2v" and scores.missing == ()  # VBench-I2V lists flicker, and does not score it
    assert scores.official == pytest.approx(
        {"quality": 5.25 / 5.5, "i2v": 2.05 / 2.1, "total": (5.25 / 5.5 + 2.05 / 2.1) / 2}
    )
    assert "| temporal_flickering | 2 | 100.00 | not scored | |" in table(read(results(tmp_path, raw)), scores)


@needs_case
@pytest.mark.parametrize("path", CASES, ids=[path.stem for path in CASES])
def test_recorded_folders_give_the_recorded_scores(path: Path) -> None:
    entries = json.loads(path.read_text())["cases"]
    assert {entry["kind"] for entry in entries} == {"t2v", "i2v"} and any(entry["missing"] for entry in entries)
    for entry in entries:
        raw = read(GOLDEN / entry["folder"]).raw
        scores = score(raw)
        assert raw == pytest.approx(entry["raw"], abs=1e-9) and {*scores.missing} == {*entry["missing"]}
        groups = (*GROUPS[entry["kind"]], "total")
        assert scores.official == pytest.approx({name: entry["official"][name] for name in groups}, abs=1e-9)
        assert scores.present == pytest.approx(entry["clipped_present_only"], abs=1e-9)


def first_name(document: dict) -> None:
    document["file_names"][0]["prompt_read_back_long"] += "-0"


def another_found(document: dict) -> None:
    next(iter(document["listing"].values()))["missing"].append("a-0.mp4")


CHANGES: list[Callable[[dict], object]] = [
    lambda document: document["config"]["t2v"]["weights"].update(scene=2),
    lambda document: document["cases"][0]["official"].update(quality=0.5),
    lambda document: document["cases"][0]["official"]["normalised_times_weight"].update(color=0.5),
    lambda document: document["cases"][-1]["clipped_present_only"].update(total=0.5),
    lambda document: document["cases"][0].update(missing=["color"]),
    first_name,
    another_found,
    lambda document: document["drift"][1].update(vde_log=1.0),
    lambda document: document["vision_reward"]["cases"][0].update(score=0.0),
    lambda document: document["too_long_prompt"].update(bytes_of_file_name=1),
]


@needs_case
@pytest.mark.parametrize("change", [None, *CHANGES])
def test_a_recorded_case_that_says_anything_else_fails(change: Callable[[dict], object] | None, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "c22_vbench", tmp_path / "c22_vbench")
    document = json.loads(CASES[0].read_text())
    if change is not None:
        change(document)
    (tmp_path / CASES[0].name).write_text(json.dumps(document))
    assert run_case(tmp_path / CASES[0].name).status == ("pass" if change is None else "fail")


# ---- files


def test_files_of_all_or_of_one_dimension_are_read(tmp_path: Path) -> None:
    raw = dict.fromkeys(QUALITY, 0.5)
    apart, whole = results(tmp_path / "apart", raw), results(tmp_path / "whole", raw, apart=False)
    assert read(apart) == read(whole) and read(apart).raw == raw and set(read(apart).videos.values()) == {2}
    (apart / "again_eval_results.json").write_text(json.dumps({"dynamic degree": [0.5, []]}))  # the same once more
    (apart / "._x_eval_results.json").write_text("resource fork")
    assert read(apart).raw == raw and read(apart).videos["dynamic_degree"] == 2
    (whole / "all_eval_results.json").write_text(json.dumps({"color": 0.25}))  # a mean alone
    assert read(whole).raw == {"color": 0.25} and read(whole).videos == {"color": 0}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x_full_info.json": "[]"}, r"must hold 1 to 256 files that end in _eval_results\.json, got 0"),
        ({"a": {"color": 0.5}, "b": {"color": 0.6}}, r"color has two values, 0\.5 in a_.* and 0\.6 in b_.*; leave one"),
        ({"a": {"colour": 0.5}}, "no dimension 'colour'; did you mean 'color'"),
        ({"a": {"zzzzzzzz": 0.5}}, "no dimension 'zzzzzzzz'; the dimensions are subject_consistency, "),
        ({"a": '{"color": [NaN, []]}'}, "a_eval_results.json: NaN is no JSON"),
        ({"a": '{"color": [1e999, []]}'}, "color must be a number, the mean over its videos, got inf"),
        ({"a": '{"color": [1' + "0" * 400 + ", []]}"}, "color must be a number"),
        ({"a": {"color": ["0.5", []]}}, "color must be a number, the mean over its videos, got 0.5"),
        ({"a": {"color": [None, []]}}, "color must be a number"),
        ({"a": {"color": []}}, "color must be a number"),
        ({"a": {"color": True}}, "color must be a number"),
        ({"a": {"color": 0.5, "i2v_subject": 0.5}}, "i2v_subject is of I2V and color of T2V: give each its own folder"),
        ({"a": "[]"}, "a JSON object is expected"),
        ({"a": "{"}, "is no JSON"),
        ({"a": {}}, "holds no dimension"),
    ],
)
def test_results_that_cannot_be_are_one_line_and_nothing_is_written(
    files: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in files.items():
        path = tmp_path / "in" / (name if name.endswith(".json") else f"{name}_eval_results.json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=message) as refusal:
        read(tmp_path / "in")
    assert "\n" not in str(refusal.value)
    assert cli.main(["eval", "--vbench-results", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_file_of_results_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = results(tmp_path, {"color": 0.5})
    monkeypatch.setattr("causalreel.eval.vbench_scores.MOST_BYTES", 100)
    with pytest.raises(ValueError, match="too large for a file of VBench's results"):
        read(folder)


def test_kinds_are_told_by_what_only_one_has() -> None:
    assert kind_of(QUALITY) == "t2v" and kind_of(["camera_motion"]) == "i2v"
    assert normalised("scene", 0.4111) == 0.5


# ---- the command


def test_the_command_prints_and_writes_the_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results(tmp_path / "in", {name: BEST[name] for name in (*QUALITY, *SEMANTIC)})
    assert cli.main(["eval", "--vbench-results", str(folder), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "| scene | 2 | 82.22 | 100.00 | 100.00 |" in shown and "| **total** | | | 100.00 | 100.00 |" in shown
    assert MARK not in shown and (tmp_path / "out" / "vbench.md").read_text() == shown
    told = json.loads((tmp_path / "out" / "vbench.json").read_text())
    assert told["complete"] and told["official"]["total"] == pytest.approx(1) and told["kind"] == "t2v"
    assert told["dimensions"]["scene"] == {"raw": 0.8222, "normalised": 1.0, "clipped": 1.0, "videos": 2}


def test_an_incomplete_total_is_never_shown_without_its_mark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = results(tmp_path / "in", {name: BEST[name] for name in (*QUALITY, *SEMANTIC) if name != "color"})
    assert cli.main(["eval", "--vbench-results", str(folder), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert f"| **total** {MARK} | | | 97.78 {MARK} | 100.00 {MARK} |" in shown
    assert "| **quality** | | | 100.00 | 100.00 |" in shown  # which is whole
    assert f"| color | | missing | 0.00 {MARK} | |" in shown
    assert f"{MARK} Incomplete, 1 of 16 dimensions are missing: color. VBench's script takes raw 0" in shown
    told = json.loads((tmp_path / "out" / "vbench.json").read_text())
    assert not told["complete"] and told["missing"] == ["color"]


@pytest.mark.parametrize("modes", list(itertools.combinations(MODES, 2)))
def test_one_mode_never_wins_over_another(
    modes: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"control": [], "long": [], "changes": ["3"], "vbench_results": [str(tmp_path)]}
    words = [word for name in modes for word in (f"--{name.replace('_', '-')}", *flags[name])]
    assert cli.main(["eval", "tiny", *words, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    first, second = (f"--{name.replace('_', '-')}" for name in modes)
    assert told == f"causalreel: error: {first} and {second} measure different things: give one of them\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["tiny"], "models"),
        (["--seed", "3"], "--seed"),
        (["--videos", "a.mp4"], "--videos"),
        (["--metrics", "m.py"], "--metrics"),
    ],
)
def test_what_says_nothing_to_results_is_refused(
    words: list[str], named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = results(tmp_path / "in", {"color": 0.5})
    assert cli.main(["eval", *words, "--vbench-results", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert f"--vbench-results only reads what VBench has measured: leave out {named}" in capsys.readouterr().err


# ---- names


@pytest.mark.parametrize(
    ("name", "prompt", "of_long"),
    [
        ("a cat-0.mp4", "a cat", "a cat"),
        ("videos/a cat-12.gif", "a cat", "a cat"),
        ("route-66.mp4", "route", "route"),  # the trap: no number of a sample
        ("route-66-0.mp4", "route-66", "route-66"),
        ("a cat-0_003.mp4", "a cat-0_003", "a cat"),
        ("a cat-1-Scene-002_001.mp4", "a cat-1-Scene-002_001", "a cat"),
        ("a cat-.mp4", "a cat-", "a cat-"),
    ],
)
def test_prompts_are_read_from_names(name: str, prompt: str, of_long: str) -> None:
    assert prompt_of(name) == prompt and prompt_of(name, is_long=True) == of_long


def test_names_that_cannot_be_are_refused() -> None:
    assert video_name("x" * 249, 0) == vbench_names.rcm_name("x" * 249, 0) == f"{'x' * 249}-0.mp4"
    with pytest.raises(ValueError, match="its file name has 256 bytes, more than 255 bytes"):
        video_name("x" * 250, 0)
    with pytest.raises(ValueError, match="has 290 bytes"):
        video_name("猫" * 94 + "xx", 0)  # bytes, not letters
    with pytest.raises(ValueError, match="no file name has a /"):
        video_name("A/B", 0)
    assert vbench_names.rcm_name("A/B\nC", 0) == "A-B C-0.mp4"


INFO = [
    {"prompt_en": "a kettle", "dimension": ["color"], "auxiliary_info": {"color": {"color": "red"}}},
    {"prompt_en": "a fox", "dimension": ["scene"]},
    {"prompt_en": "a kettle", "dimension": ["human_action", "color"], "auxiliary_info": {"human_action": {}}},
]


def test_a_folder_is_what_vbench_makes_of_it() -> None:
    names = ["a kettle-0.mp4", "a kettle-4.mp4", "a kettle-5.mp4", "a fox-0.mp4"]
    entries, missing = found(INFO, names, ["scene", "human_action"])
    assert [entry["prompt_en"] for entry in entries] == ["a fox", "a kettle"]
    assert entries[1]["video_list"] == ["a kettle-0.mp4", "a kettle-4.mp4"]
    assert missing == [f"a fox-{i}.mp4" for i in (1, 2, 3, 4)] + [f"a kettle-{i}.mp4" for i in (1, 2, 3)]
    assert "video_list" not in INFO[1]
    none, lost = found(INFO, ["a.json", *names], ["scene"])  # the trap: the first file tells the ending of all
    assert none[0]["video_list"] == [] and lost == [f"a fox-{i}.json" for i in range(5)]
    with pytest.raises(ValueError, match="it is empty"):
        found(INFO, [], ["scene"])


def test_custom_input_reads_prompts_and_refuses_what_names_do_not_say() -> None:
    assert custom_prompts(["a-1.MP4", "b.png", "c.json"], ["motion_smoothness"]) == {"a-1.MP4": "a", "b.png": "b"}
    with pytest.raises(ValueError, match="custom input does not measure scene"):
        custom_prompts(["a-1.mp4"], ["motion_smoothness", "scene"])


def test_prompts_that_stand_twice_are_one_entry() -> None:
    one, other = merged([{**entry, "video_list": [f"{entry['prompt_en']}-0.mp4"]} for entry in INFO])
    assert one["dimension"] == ["color", "human_action"] and one["video_list"] == ["a kettle-0.mp4"]
    assert one["auxiliary_info"] == {"color": {"color": "red"}, "human_action": {}}
    assert other == {"prompt_en": "a fox", "dimension": ["scene"], "video_list": ["a fox-0.mp4"]}


# ---- beside VBench


def test_vision_reward_is_a_mean_of_signed_weights() -> None:
    assert vision_reward(["yes", "No.", " Yes, it is"], [0.5, 0.25, 1.0]) == pytest.approx(1.25 / 3)
    with pytest.raises(ValueError, match="must be as many, got 1 and 2"):
        vision_reward(["yes"], [1.0, 1.0])


def test_last_minus_first_over_several_windows() -> None:
    values = torch.tensor([[1.0, 3.0, 9.0, 4.0, 8.0]])
    assert last_minus_first(values).item() == 7.0 and last_minus_first(values, windows=2).item() == 4.0
