"""Memory in the walkable world: paths that look away and come back, and what their last pictures are measured by."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from benchmarks import walk_memory

from causalreel.data.walk import is_free
from causalreel.data.walk_render import paint, seen
from causalreel.eval.control import psnr


@pytest.mark.parametrize("frames", [16, 32, 160])
def test_paths_lose_sight_of_the_first_picture_and_come_back(frames: int) -> None:
    scene = walk_memory.scenes(6, 0)
    assert len(scene) == 6
    path = walk_memory.turned(scene, frames)
    paths = [path] if frames == 16 else [path, walk_memory.walked_off(scene, frames)]
    for path in paths:
        assert path.yaw.shape[1] in (frames, frames - 1)
        assert path.yaw[:, -1].abs().max() < 1e-9 and path.at[:, -1].abs().max() < 1e-9
        middle = slice(walk_memory.AWAY, path.yaw.shape[1] - walk_memory.AWAY)
        share = seen(path, path.yaw[:, middle][:, ::7], path.at[:, middle][:, ::7]).float().mean((2, 3))
        assert share[:, 0].max() == 0 and share.max() < 0.1  # walking shows a strip of its floor
    far, glance = (walk_memory.glanced(scene, turns) for turns in (0, 5))
    assert torch.equal(far.yaw, glance.yaw[:, :-10]) and torch.allclose(far.yaw[:, -1], glance.yaw[:, -1])
    assert is_free(paths[-1]).float().mean() > 0.5
    first = walk_memory.first_picture(scene)
    assert (psnr(first, walk_memory.first_picture(walk_memory.without_objects(scene))) < 25).all()
    assert torch.equal(first, paint(scene, scene.yaw[:, :1], scene.at[:, :1]))


def test_it_runs_in_miniature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["x", "--out", str(tmp_path), "--clips", "1", "--lengths", "1", "--policies", "memrope"]
    monkeypatch.setattr(sys, "argv", command)
    walk_memory.main()
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    assert list(rows) == ["codec", "floor and sky", "words alone", "memrope"]
    assert rows["codec"]["first"]["psnr"]["mean"] > 30 and rows["floor and sky"]["first"]["remembers"]["mean"] == 0
    assert rows["memrope"]["turn, 1x"]["psnr"]["mean"] > 10
    assert set(rows["memrope"]["glance"]) == {"psnr"} and rows["memrope"]["glance"]["psnr"]["mean"] > 10
    assert (tmp_path / "turn-1x.png").exists() and "| memrope | turn, 1x |" in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(walk_memory, "made", lambda pipeline, paths, args, **how: pytest.fail("made again"))
    monkeypatch.setattr(walk_memory, "words", lambda *args: torch.zeros(1, 1, 3, 64, 64))
    walk_memory.main()
    made = []
    monkeypatch.setattr(walk_memory, "made", lambda pipeline, paths, args, **how: made.append(1) or {})
    monkeypatch.setattr(walk_memory, "tell", lambda *args: None)
    monkeypatch.setattr(sys, "argv", [*command, "--seed", "1"])
    walk_memory.main()
    assert made  # pictures of another seed are others
