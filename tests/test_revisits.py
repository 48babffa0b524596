"""Finished videos with a manifest: what comes back is found from the trajectory, and compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from causalreel import cli
from causalreel.control.benchmarks import Item, manifest
from causalreel.control.strings import latent_poses
from causalreel.data.video import write_video
from causalreel.eval.revisits import Result, measure, read_manifest, returns, revisited

TRAJECTORIES = {"back": "w*2,s*2", "away": "w*4", "turn": "l*2,j*2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("results")
    items = [Item(name, "a place", trajectory) for name, trajectory in TRAJECTORIES.items()]
    (place / "manifest.json").write_text(json.dumps(manifest(items, [0, 1, 2])))
    for seed, item in enumerate(items):
        generator = torch.Generator().manual_seed(seed)
        video = (torch.rand(1, 3, 8, 8, generator=generator) * 2 - 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
        video = video.expand(17, -1, -1, -1).clone()
        if item.id == "turn":
            video[-1] = -video[-1]
        write_video(place / f"{item.id}.mp4", video, fps=16)
    return place


def test_a_path_longer_than_any_video_is_refused_before_it_is_compared() -> None:
    with pytest.raises(ValueError, match=r"long.mp4: trajectory: leads through 20,001 latent frames, at most 2,500 "):
        revisited(Result("long", Path("long.mp4"), "w*20000"), "minwm")


def test_paths_that_come_back_are_known() -> None:
    assert returns(latent_poses("w*2,s*2", "minwm")) == [(0, 4), (1, 3)]
    assert returns(latent_poses("w*4", "minwm")) == []
    assert returns(latent_poses("w*3,s*6", "minwm"))[0] == (0, 6)
    assert (0, 120) in returns(latent_poses("l*120", "minwm"))  # all the way round


def test_what_is_there_again_is_measured(folder: Path) -> None:
    found = measure(folder, "minwm")
    back, away, turn = found["revisit psnr"].tolist()
    assert back > 30 and away != away and turn < back - 15
    assert found["revisits"].tolist() == [2, 0, 2]


def test_it_is_a_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--control", "--videos", str(folder), "--dialect", "minwm"]) == 0
    assert f"| {folder} | 2 |" in capsys.readouterr().out
    assert cli.main(["eval", "--control", "--videos", str(folder)]) == 2
    assert "--dialect" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"items": []}, "expected a list of videos"),
        ({"items": [{"id": 3}]}, "id must be text"),
        ({"items": [{"id": "a", "video": "../a.mp4"}]}, "a file's name in the folder"),
        ({"items": [{"id": "gone"}]}, "is missing"),
        ({"items": [{"id": "back", "trajectory": "w*9,s*9"}]}, "has 17 frames"),
    ],
)
def test_what_cannot_be_measured_is_one_line(folder: Path, tmp_path: Path, change: dict, told: str) -> None:
    (tmp_path / "back.mp4").write_bytes((folder / "back.mp4").read_bytes())
    (tmp_path / "manifest.json").write_text(json.dumps(change))
    with pytest.raises(ValueError, match=told) as error:
        measure(tmp_path, "minwm")
    assert "\n" not in str(error.value)
    assert len(read_manifest(folder)) == 3
