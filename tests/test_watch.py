"""What a record says of weights, of previews, and of how well a student knows the data."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from causalreel.train.looks import looks
from causalreel.train.stage import Average, DataCursor, Probes, StepContext
from causalreel.train.stages.pretrain import Pretrain, PretrainConfig
from causalreel.train.trainer import train
from causalreel.train.watch import Watch
from causalreel.types import Conditioning
from test_stages import OPTIMISER, STAGES, VIEWER, net, source
from test_trainer import Rows, Toy, metrics, toy_config, weights


def pair() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    roles: dict[str, nn.Module] = {"student": nn.Linear(40, 30), "average": nn.Linear(40, 30)}
    roles["average"].load_state_dict(roles["student"].state_dict())
    return roles


def watched(roles: dict[str, nn.Module]) -> Watch:
    return Watch(roles, {"student": list(roles["student"].parameters())}, [Average("average", "student", 0.9)])


@torch.no_grad()
def test_a_step_is_measured_as_by_hand() -> None:
    """Small networks are looked at whole."""
    roles = pair()
    watch, before = watched(roles), nn.utils.parameters_to_vector(roles["student"].parameters())
    watch.before()
    roles["student"].weight.add_(0.01 * torch.randn(30, 40))  # type: ignore[union-attr, operator]
    found = watch.after()
    after = nn.utils.parameters_to_vector(roles["student"].parameters())
    torch.testing.assert_close(found["student/update_ratio"], (after - before).norm() / after.norm())
    assert found["student/still"] == pytest.approx(30 / 1230)  # the bias
    assert found["student/coarse"] < 0.01
    torch.testing.assert_close(found["average/distance"], (after - before).norm() / after.norm())
    assert found["average/still"] == 1 and found["average/update_ratio"] == 0


@torch.no_grad()
def test_bfloat16_masters_are_seen() -> None:
    roles = pair()
    for parameter in roles["student"].parameters():
        parameter.copy_(parameter.bfloat16())
    watch = watched(roles)
    watch.before()
    for parameter in roles["student"].parameters():
        parameter.copy_((parameter + 1e-5).bfloat16())
    found = watch.after()
    assert found["student/coarse"] == 1 and found["student/still"] > 0.9
    assert found["average/coarse"] < 0.01


def test_records_hold_the_last_step(tmp_path: Path) -> None:
    """Of a run that stops and goes on between records as of one that does not: see test_resume.py."""
    train(Toy(), Rows(), toy_config(tmp_path))
    records = metrics(tmp_path)
    for role in ("student", "critic", "average", "target"):
        assert all(0 < record[f"{role}/update_ratio"] < 1 for record in records), role
    assert records[0]["average/distance"] == 0 < records[-1]["average/distance"]  # a copy up to step 3


def test_looks() -> None:
    still = torch.zeros(2, 5, 3, 8, 8)
    assert looks(still) == {"motion": 0, "contrast": 0, "colour": 0}
    halves = still.clone()
    halves[..., 4:] = 1
    assert looks(halves)["contrast"] == pytest.approx(0.25) and looks(halves)["motion"] == 0
    flicker = still.clone()
    flicker[:, ::2] = 1
    assert looks(flicker)["motion"] == pytest.approx(0.5) and looks(flicker)["contrast"] == 0
    red = still.clone()
    red[:, :, 0] = 1
    assert looks(red)["colour"] > 0.1
    assert looks(still[:, :1])["motion"].isnan()


PROBED = [name for name in STAGES if name not in ("codec",)]


@pytest.mark.parametrize("name", PROBED)
def test_every_stage_can_be_probed(name: str) -> None:
    """Always the same numbers, whatever the batch is cut into and the step is."""
    stage, rows = STAGES[name]()
    assert isinstance(stage, Probes)
    found = []
    for step, parts in ((0, 1), (7, 1), (0, 1)):
        context = StepContext(step, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"), parts=parts)
        with torch.no_grad():
            found.append(stage.probe(context))
    assert found[0].keys() == {"0.25", "0.6", "0.9", "text"}
    for other in found[1:]:
        assert all(torch.equal(value, other[key]) for key, value in found[0].items())
    assert all(value.isfinite() for value in found[0].values())


def test_prompts_alone_have_no_probe() -> None:
    rows = source()
    blank = dataclasses.replace(rows, latents=torch.zeros_like(rows.latents))
    stage = Pretrain(PretrainConfig(batch=4), student=net(), viewer=VIEWER)
    context = StepContext(0, 0, blank, DataCursor(24, 0), torch.device("cpu"))
    assert all(value.isnan() for value in stage.probe(context).values())
    assert VIEWER.data(context) is None


def test_a_probe_leaves_no_trace_and_tells_whose_text_it_is(tmp_path: Path) -> None:
    """Of students that learned with their own clips' text, and with another's."""
    learned = {}
    for name, every in (("with", 60), ("without", 0), ("mixed", 60)):
        stage, rows = Pretrain(PretrainConfig(batch=12, text_dropout=0.0), student=net(), viewer=VIEWER), source()
        if name == "mixed":
            rows = dataclasses.replace(rows, conditioning=Conditioning(rows.conditioning.text.roll(5, 0)))
        optimiser = dataclasses.replace(OPTIMISER, lr=1e-2)
        config = toy_config(tmp_path / name, 60, optimisers={"student": optimiser}, probe_every=every, log_every=20)
        train(stage, rows, config)
        learned[name] = weights(stage)  # type: ignore[arg-type]
    assert all(torch.equal(value, learned["without"][key]) for key, value in learned["with"].items())
    own = metrics(tmp_path / "with")[-1]["probe/text"]
    assert own > 0.02, own
    assert "probe/text" not in metrics(tmp_path / "without")[-1] and "probe/text" not in metrics(tmp_path / "with")[0]
