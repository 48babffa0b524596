"""The trainer on a toy stage: learning, frozen roles, averages, clipping, failures and interruption."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from causalreel.train import checkpoint, state
from causalreel.train.arithmetic import arithmetic, flushes_denormals
from causalreel.train.log import NonFiniteError, Window, open_jsonl
from causalreel.train.optim import OptimiserConfig, clip_gradients, learning_rate
from causalreel.train.stage import Average, DataCursor, Loss, StepContext, Update, stable_seed
from causalreel.train.trainer import TrainerConfig, train
from causalreel.types import Conditioning, LatentBatch

OPTIMISERS = {"student": OptimiserConfig(3e-2, warmup_steps=4, schedule="cosine"), "critic": OptimiserConfig(1e-2)}


class Rows:
    """64 rows of two numbers, each with its number as text."""

    def __init__(self, rows: int = 64) -> None:
        self.latents = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, indices: Tensor) -> LatentBatch:
        return LatentBatch(Conditioning(indices[:, None, None].float()), self.latents[indices])


def mlp(seed: int) -> nn.Module:
    """Two numbers -> two numbers, with dropout so that the global random state matters, and an integer buffer."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 2))
    module.register_buffer("calls", torch.zeros((), dtype=torch.long))
    return module


class Toy:
    """Three critic updates, then one of the student, as in DMD: the critic fits the teacher, the student the critic."""

    def __init__(self, on_step: Callable[[int], None] | None = None) -> None:
        self.roles = {
            role: mlp(seed) for seed, role in enumerate(["student", "critic", "teacher", "average", "target"])
        }
        self.averages = [Average("average", "student", 0.9, from_step=3), Average("target", "critic", 0.8)]
        self.on_step = on_step

    def updates(self, step: StepContext) -> Iterator[Update]:
        if self.on_step:
            self.on_step(step.step)
        for number in range(3):
            yield Update("critic", [self.loss(step, "critic", "teacher", f"critic {number}")])
        yield Update("student", [self.loss(step, "student", "critic", f"student {half}") for half in range(2)])

    def loss(self, step: StepContext, role: str, goal: str, purpose: str) -> Callable[[], Loss]:
        def compute() -> Loss:
            x = step.batch(6, LatentBatch).latents
            x = x + 0.1 * torch.randn(x.shape, generator=step.generator(purpose))
            with torch.no_grad():
                wanted = self.roles[goal](x)
            self.roles[role].calls += 1
            error = (self.roles[role](x) - wanted).square().mean()
            return error, {"root": error.detach().sqrt(), "empty": torch.tensor(math.nan)}

        return compute

    def preview(self, step: StepContext) -> Tensor | None:
        torch.rand(3)
        return step.batch(2, LatentBatch).latents[:, None, :1, None, None].expand(2, 5, 3, 4, 4)


def toy_config(out: Path, steps: int = 12, **changes: object) -> TrainerConfig:
    defaults = {"log_every": 3, "save_every": 100, "device": "cpu", "optimisers": OPTIMISERS}
    return TrainerConfig(out=out, steps=steps, **{**defaults, **changes})


def weights(stage: Toy) -> dict[str, Tensor]:
    return {f"{role}.{k}": v.clone() for role, module in stage.roles.items() for k, v in module.state_dict().items()}


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_it_learns_and_reports(tmp_path: Path) -> None:
    result = train(Toy(), Rows(), toy_config(tmp_path, 60))
    records = metrics(tmp_path)
    assert result.step == 60 and result.exit_code == 0
    assert [record["step"] for record in records] == list(range(3, 61, 3))
    assert records[-1]["critic/loss"] < 0.3 * records[0]["critic/loss"]
    assert records[-1]["student/loss"] < 0.3 * records[0]["student/loss"]
    assert {"seconds", "steps_per_second", "student/grad_norm", "student/lr", "student/root"} <= records[0].keys()
    assert "student/empty" not in records[0]
    assert records[0]["student/lr"] == pytest.approx(0.75 * 3e-2)


def test_frozen_roles_never_change(tmp_path: Path) -> None:
    stage = Toy()
    before = weights(stage)
    train(stage, Rows(), toy_config(tmp_path))
    after = weights(stage)
    assert all(torch.equal(before[key], after[key]) for key in before if key.startswith("teacher"))
    assert not any(torch.equal(before[key], after[key]) for key in before if not key.startswith("teacher"))
    assert not any(p.requires_grad for role in ("teacher", "average", "target") for p in stage.roles[role].parameters())


def test_averages_follow_their_source(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    stage = Toy(lambda step: seen.append(weights(stage)))
    train(stage, Rows(), toy_config(tmp_path, 5))
    seen.append(weights(stage))
    key = "0.weight"
    assert all(torch.equal(seen[step][f"average.{key}"], seen[step][f"student.{key}"]) for step in range(1, 4))
    for step in (3, 4):
        expected = 0.9 * seen[step][f"average.{key}"] + 0.1 * seen[step + 1][f"student.{key}"]
        torch.testing.assert_close(seen[step + 1][f"average.{key}"], expected)
    assert torch.equal(seen[0][f"target.{key}"], seen[0][f"critic.{key}"])
    assert seen[-1]["average.calls"] == seen[-1]["student.calls"] == 10


class Halves:
    """One role; one batch of eight rows, as `parts` micro-batches."""

    averages: tuple[Average, ...] = ()

    def __init__(self, parts: int) -> None:
        self.roles, self.parts = {"student": nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))}, parts
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            self.roles["student"].apply(lambda m: m.reset_parameters() if isinstance(m, nn.Linear) else None)

    def updates(self, step: StepContext) -> Iterator[Update]:
        batch = step.batch(8, LatentBatch)
        size = 8 // self.parts
        rows = [batch[start : start + size].latents for start in range(0, 8, size)]
        yield Update("student", [lambda x=x: (10 * (self.roles["student"](x) - 1).square().mean(), {}) for x in rows])

    def preview(self, step: StepContext) -> None:
        return None


@pytest.mark.parametrize("clip", [0.5, math.inf])
def test_two_micro_batches_are_one_batch_of_both(tmp_path: Path, clip: float) -> None:
    optimisers = {"student": OptimiserConfig(1e-2, clip=clip)}
    stages = {parts: Halves(parts) for parts in (1, 2)}
    for parts, stage in stages.items():
        train(stage, Rows(), toy_config(tmp_path / str(parts), 6, optimisers=optimisers))
    for one, two in zip(stages[1].roles["student"].parameters(), stages[2].roles["student"].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
    assert metrics(tmp_path / "1")[0]["student/grad_norm"] == pytest.approx(
        metrics(tmp_path / "2")[0]["student/grad_norm"], rel=1e-4
    )


def test_clipping_is_that_of_torch() -> None:
    gradients = [torch.randn(5, 3), torch.randn(7)]
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    expected = nn.utils.clip_grad_norm_(parameters, 0.7)
    assert torch.allclose(clip_gradients(gradients, 0.7), expected)
    assert all(torch.allclose(p.grad, g) for p, g in zip(parameters, gradients, strict=True))


def test_learning_rate_schedule() -> None:
    config = OptimiserConfig(1.0, warmup_steps=4, schedule="cosine", final_lr_ratio=0.1)
    rates = [learning_rate(config, step, 24) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.55) and rates[24] == pytest.approx(0.1)
    assert learning_rate(replace(config, schedule="constant"), 20, 24) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimisers": {"studnet": OptimiserConfig(1.0)}}, "no role 'studnet'; allowed: student, critic"),
        ({"optimisers": {"student": OptimiserConfig(1.0)}}, "role 'critic' has no optimiser; allowed: student"),
        ({"optimisers": {"average": OptimiserConfig(1.0)}}, "role 'average' also has an optimiser"),
    ],
)
def test_wrong_roles_are_errors(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(Toy(), Rows(), toy_config(tmp_path, **changes))


def test_trained_weights_must_be_float32(tmp_path: Path) -> None:
    stage = Toy()
    stage.roles["student"].to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"role 'student': 0.weight is torch.bfloat16"):
        train(stage, Rows(), toy_config(tmp_path))


@pytest.mark.parametrize("field", [{"steps": 0}, {"keep": 0}, {"optimisers": {}}])
def test_trainer_config_is_checked(tmp_path: Path, field: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        toy_config(tmp_path, **field)


def test_a_non_finite_loss_stops_and_saves_nothing(tmp_path: Path) -> None:
    stage = Toy(lambda step: stage.roles["student"][0].bias.data.fill_(math.nan) if step == 7 else None)
    with pytest.raises(NonFiniteError, match=r"step 8, role 'student': the loss is nan.* saved nothing.*step-00000006"):
        train(stage, Rows(), toy_config(tmp_path, save_every=2, log_every=100))
    assert checkpoint.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000006"
    assert train(Toy(), Rows(), toy_config(tmp_path)).step == 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_saves_after_the_step(tmp_path: Path, number: int) -> None:
    before = signal.getsignal(number)
    stage = Toy(lambda step: os.kill(os.getpid(), number) if step == 4 else None)
    result = train(stage, Rows(), toy_config(tmp_path))
    assert result.step == 5 and result.exit_code == 130
    assert checkpoint.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "step-00000005"
    assert signal.getsignal(number) is before


def test_a_second_interrupt_aborts(tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        for _ in range(2 if step == 4 else 0):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(Toy(interrupt), Rows(), toy_config(tmp_path))
    assert checkpoint.latest(tmp_path / "checkpoints") is None


def test_previews_leave_no_trace(tmp_path: Path) -> None:
    shown: list[tuple[int, tuple[int, ...]]] = []
    stages = [Toy(), Toy()]
    train(
        stages[0],
        Rows(),
        toy_config(tmp_path / "with", preview_every=5),
        write_preview=lambda v, d, s: shown.append((s, tuple(v.shape))),
    )
    train(stages[1], Rows(), toy_config(tmp_path / "without"))
    assert shown == [(step, (2, 5, 3, 4, 4)) for step in (0, 5, 10)]
    assert all(torch.equal(a, b) for a, b in zip(weights(stages[0]).values(), weights(stages[1]).values(), strict=True))


class SlowClock:
    """Seconds that pass only while something is shown or saved, and one for each step."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def test_previews_and_saves_are_named_and_do_not_count_as_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = SlowClock()

    def pass_by(seconds: float) -> None:
        clock.now += seconds

    def save(*args: Any, **kwargs: Any) -> Path:
        pass_by(50)
        return real(*args, **kwargs)

    real = checkpoint.save
    monkeypatch.setattr(state, "time", clock)
    monkeypatch.setattr(checkpoint, "save", save)
    config = toy_config(tmp_path, preview_every=4, save_every=5)
    with caplog.at_level(logging.INFO):
        train(Toy(lambda step: pass_by(1)), Rows(), config, write_preview=lambda *_: pass_by(100))
    assert [record["steps_per_second"] for record in metrics(tmp_path)] == [1.0] * 4
    assert metrics(tmp_path)[-1]["seconds"] == 12 + 3 * 100 + 2 * 50  # the last ones come after the last record
    told = [record.getMessage() for record in caplog.records]
    assert f"preview of step 8 in {tmp_path / 'previews'}: 100.0 s" in told
    assert f"saved {tmp_path / 'checkpoints' / 'step-00000010'}: 50.0 s" in told


def test_data_order_is_a_permutation_per_epoch() -> None:
    cursor = DataCursor(10, seed=3)
    taken = torch.cat([cursor.take(size) for size in (4, 13, 3)])
    assert cursor.position == 20
    assert sorted(taken[:10].tolist()) == sorted(taken[10:].tolist()) == list(range(10))
    assert taken[:10].tolist() != taken[10:].tolist()
    assert torch.equal(DataCursor(10, 3, position=4).take(13), taken[4:17])


def test_seeds_are_the_same_everywhere() -> None:
    assert stable_seed(0, 0, "noise") == 7012560265599635137
    assert len({stable_seed(seed, step, p) for seed in range(3) for step in range(3) for p in ("a", "b")}) == 18


def test_what_a_window_has_given_stays_as_it_was() -> None:
    """A checkpoint that is written while training goes on holds it until then."""
    window = Window()
    window.add(0, {"student/loss": torch.tensor(1.0)})
    given = window.fetch()
    window.add(1, {"student/loss": torch.tensor(2.0)})
    assert len(window.fetch()) == 2 and given == [(0, "student/loss", 1.0)]


def test_metrics_past_the_resumed_step_and_torn_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    open_jsonl(path, step=4)({"step": 5, "loss": 0.5})
    assert metrics(tmp_path) == [{"step": 2}, {"step": 4}, {"step": 5, "loss": 0.5}]


@pytest.mark.parametrize("flushed", [False, True])
def test_arithmetic_is_given_back_as_it_was_found(flushed: bool) -> None:
    """Also after an error, and whatever the program that trains had chosen itself."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_flush_denormal(flushed)
        torch.set_float32_matmul_precision("medium")
        state = torch.get_rng_state()
        with pytest.raises(ValueError), arithmetic(torch.device("cpu")):
            assert flushes_denormals() and torch.get_float32_matmul_precision() == "highest"
            assert (torch.full((1,), 1e-39) * 1).item() == 0
            torch.manual_seed(5)
            raise ValueError
        assert flushes_denormals() == flushed and torch.get_float32_matmul_precision() == "medium"
        assert ((torch.full((1,), 1e-39) * 1).item() == 0) == flushed
        assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_flush_denormal(False)
        torch.set_float32_matmul_precision(before)
