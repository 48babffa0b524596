"""Law 10: what shares the rows of a batch changes no number, for every stage."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from causalreel.codecs.tiny import tiny_codec
from causalreel.data.sources import ClipSource
from causalreel.parallel.sharding import whole
from causalreel.train.stage import DataSource, Stage
from causalreel.train.stages.codec import CodecConfig, CodecStage
from causalreel.train.trainer import TrainerConfig, train
from test_stages import OPTIMISER, SELF_ROLLOUT, STAGES, make_dmd

DMD = dataclasses.replace(SELF_ROLLOUT, batch=4)


def clips() -> tuple[Stage, DataSource]:
    """The codec, on pictures of noise."""
    rows = torch.randint(256, (8, 9, 3, 16, 16), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return CodecStage(tiny_codec(0), CodecConfig(batch=4, frames=5, sharpen_from=0)), ClipSource(rows)


CASES: dict[str, Callable[[], tuple[Stage, DataSource]]] = {
    **{name: make for name, make in STAGES.items() if "DMD" not in name and "Caus" not in name and "score" not in name},
    "codec": clips,
    "DMD": lambda: make_dmd(DMD),
    "DMD, replayed": lambda: make_dmd(dataclasses.replace(DMD, student_pass="replay", critic_rollouts=1)),
    "CausVid": lambda: make_dmd(dataclasses.replace(DMD, samples="data")),
    "causal score distillation": lambda: make_dmd(dataclasses.replace(DMD, samples="teacher_forced")),
}
STEPS = 3


def run(name: str, out: Path, **changes: object) -> dict[str, object]:
    """Three steps of a stage -> the records and all roles' weights, whole."""
    torch.manual_seed(0)
    stage, rows = CASES[name]()
    trained = {role: OPTIMISER for role in ("student", "critic", "codec") if role in stage.roles}
    how = {"device": "cpu", "log_every": 1, "save_every": STEPS, **changes}
    train(stage, rows, TrainerConfig(out=out, steps=STEPS, optimisers=trained, **how))
    found = {f"{r}.{n}": whole(t).clone() for r, m in stage.roles.items() for n, t in m.state_dict().items()}
    return {
        "weights": found,
        "records": [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()],
    }


def assert_close(one: dict, other: dict, name: str) -> None:
    """Losses to 1e-6 and weights to 1e-5, relative."""
    for a, b in zip(one["records"], other["records"], strict=True):
        for key in a:
            if key.endswith("/loss"):
                assert a[key] == pytest.approx(b[key], rel=1e-6), (name, key, a["step"])
    for role in dict.fromkeys(key.split(".")[0] for key in one["weights"]):
        # Of a role as a whole: where the gradient is 0, as of the keys' bias, Adam divides rounding by rounding.
        mine, theirs = (
            torch.cat([v.flatten().float() for k, v in run["weights"].items() if k.startswith(f"{role}.")])
            for run in (one, other)
        )
        assert (mine - theirs).norm() < 1e-5 * mine.norm(), (name, role)


@pytest.mark.parametrize("name", CASES)
def test_two_parts_one_after_the_other_are_the_batch(name: str, tmp_path: Path) -> None:
    alone, parts = (run(name, tmp_path / str(count), accumulate=count) for count in (1, 2))
    assert_close(alone, parts, name)


def test_a_batch_that_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch: got 8, .*allowed are multiples of 3"):
        run("teacher forcing", tmp_path, accumulate=3)
