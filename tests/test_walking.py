"""Measures of control: the true render passes them all, and each finds what it is there to find."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalreel.data.walk import WalkConfig, WalkState, held, simulate
from causalreel.data.walk_render import paint
from causalreel.eval import walking
from causalreel.eval.control import agreement, colors_in, pose_errors, psnr, revisit, words
from causalreel.eval.walking import ControlRow, Task, evaluate, table, tasks, truth
from causalreel.families import FAMILIES
from causalreel.infer.pipeline import Pipeline
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.masks import Context
from causalreel.nn.presets import PRESETS
from causalreel.types import LatentSpec
from causalreel.weights.export import Export, Sampling, load_codec

CONFIG = WalkConfig(size=32, latents=9)


@pytest.fixture(scope="module")
def asked() -> list[Task]:
    return tasks(8, seed=0, config=CONFIG)


def shown(task: Task, change: object = None) -> Tensor:
    state = task.state if change is None else change
    assert isinstance(state, WalkState)
    return paint(state, state.yaw, state.at)


def test_the_true_render_passes(asked: list[Task]) -> None:
    found: dict[str, Tensor] = {}
    for task in asked:
        found |= task.measure(truth(task))
    assert (found["psnr seen"] > 59).all()
    assert found["right beats wrong"].nanmean() > 0.97
    for name in ("yaw", "forward", "sideways"):
        assert found[f"{name} within"].nanmean() == 1
    for name in ("turn back itself", "turn back truth", "walk back itself", "walk back truth"):
        assert (found[name] > 59).all()
    assert found["floor"].mean() == found["sky"].mean() == 1
    assert found["outlines"].nanmean() > 0.1


def test_parts_give_the_numbers_of_the_whole(asked: list[Task]) -> None:
    for task in asked:
        whole, parts = (task.measure(truth(task), at_once=size) for size in (8, 3))
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=0, atol=1e-6, equal_nan=True)


def test_another_path_is_found_out(asked: list[Task]) -> None:
    """A camera that turns twice as far, and one that goes aside of where it should."""
    state = asked[0].state
    twice = replace(state, yaw=state.yaw + math.radians(15))
    assert pose_errors(shown(asked[0], twice), state)["yaw error"].nanmean() == pytest.approx(15, abs=1)
    aside = replace(state, at=state.at + 0.25 * torch.stack([state.yaw.cos(), -state.yaw.sin()], -1))
    errors = pose_errors(shown(asked[0], aside), state)
    assert errors["sideways error"].nanmean() == pytest.approx(0.25, abs=0.04)
    assert errors["yaw error"].nanmean() < 6
    still = state.walking(torch.zeros_like(state.keys))
    wrong = agreement(shown(asked[0], still), state, still)
    assert wrong["right beats wrong"].nanmean() < 0.1 and (wrong["psnr wrong"] > 59).all()


def test_what_changed_on_the_way_back_counts(asked: list[Task]) -> None:
    turn = asked[1]
    pictures = shown(turn).clone()
    pictures[:, -1] = 0
    found = revisit(pictures, turn.state, "back")
    assert (found["back itself"] < 20).all() and (found["back truth"] < 20).all()
    assert torch.equal(turn.state.at[:, -1], turn.state.at[:, 0])
    back = asked[2].state
    assert back.at[:, 5].norm(dim=-1).min() == pytest.approx(1.25) and back.at[:, -1].abs().max() < 1e-9


def test_words_are_looked_for_where_they_belong() -> None:
    state = simulate(64, seed=2, config=WalkConfig(size=64))
    text = state.walking(held([], *[["right"]] * 5).expand(64, -1, -1))
    pictures = shown(Task("text", text, False, dict))
    found = words(pictures, text)
    assert found["ahead"].nanmean() == 1 and found["right"].nanmean() > 0.97 and found["stray colours"].mean() < 0.8
    behind = replace(text, yaw=text.yaw + math.pi)  # another look: what is named is elsewhere
    elsewhere = words(shown(Task("text", behind, False, dict)), text)
    assert elsewhere["ahead"].nanmean() < 0.2
    noise = words(torch.rand(64, 6, 3, 64, 64) * 2 - 1, text)
    assert noise["stray colours"].mean() > 2
    blurred = torch.nn.functional.avg_pool2d(pictures.flatten(0, 1), 9, 1, 4).unflatten(0, (64, -1))
    assert words(blurred, text)["outlines"].nanmean() < 0.5 * found["outlines"].nanmean()
    assert set(colors_in(pictures[:, 0]).unique().tolist()) <= {-1, 0, 1, 2, 3, 4, 5}


def test_psnr_is_over_the_mask() -> None:
    a, b = torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    b[0, :, :4] = 1.0
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    mask[0, :4] = False
    mask[1, 1:] = False
    assert psnr(a, b)[0] < 10 and psnr(a, b, mask)[0] == 60
    assert psnr(a, b, mask[:, :1] & mask.all(1, keepdim=True))[1].isnan() or mask[1].float().mean() >= 0.1


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Pipeline]:
    """Untrained ones, at which only the plumbing can be seen."""
    codec, family = load_codec("tiny"), FAMILIES["walk"]
    found = {}
    for label, sampling in {
        "whole": Sampling(chunk=None, solver="euler", multistep=2, guidance=1.5),
        "frames": Sampling(chunk=1, steps=(1000.0,)),
    }.items():
        torch.manual_seed(0)
        net = DiTDenoiser(PRESETS["walk-smoke"], context=Context() if label == "whole" else Context(window=12))
        export = Export(
            name=label,
            model=net.config,
            sampling=sampling,
            context=net.context,
            frames=16,
            fps=16.0,
            latent=LatentSpec(16, 8, 8),
            text="walk",
            family="walk",
        )
        found[label] = Pipeline(net.eval(), export, sampling, codec, family.encoder(), torch.device("cpu"))
    return found


def test_models_are_asked_alike(
    pipelines: dict[str, Pipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(walking, "BACK", 1)
    asked = tasks(2, seed=0, config=WalkConfig(latents=3))
    rows, pictures = evaluate(pipelines, asked, seed=0, batch=2)
    assert [row.label for row in rows] == ["true render", "codec", "whole", "frames"]
    assert all(not row.clips["psnr seen"].isnan().any() for row in rows)
    first = asked[0].state
    coded = pipelines["whole"].codec
    given = coded.decode(coded.encode(paint(first, first.yaw[:, :1], first.at[:, :1])))
    for label in pipelines:  # the given frame is what all of them begin with
        torch.testing.assert_close(pictures[label][0][:, 0], given[:, 0].clamp(-1, 1), rtol=0, atol=1e-4)
    told = table(rows)
    assert told.startswith("| | true render | codec | whole | frames |") and "| yaw within |" in told
    walking._save(tmp_path, rows, pictures, asked, {"clips": 2})
    record = json.loads((tmp_path / "control.json").read_text())
    assert record["models"]["true render"]["psnr seen"]["mean"] == pytest.approx(60, abs=1)
    assert (tmp_path / "whole.png").is_file() and (tmp_path / "control.md").read_text().startswith("| |")


def test_numbers_that_are_not_known_are_left_out() -> None:
    told = table([ControlRow("x", {"psnr seen": torch.tensor([float("nan"), float("nan")])}, 0.0)])
    assert "| psnr seen | n/a |" in told and "| ahead | n/a |" in told


def test_models_without_cameras_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tiny takes no cameras"):
        walking.run(["tiny"], out=tmp_path, clips=2, device="cpu")
