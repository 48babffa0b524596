"""Every stage on a miniature network: it trains what it should, leaves the rest alone, and resumes bit for bit."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from causalreel.data.sources import LatentSource, TrajectorySource
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.presets import ModelConfig
from causalreel.parallel.fast import accelerate
from causalreel.train.checkpoint import latest
from causalreel.train.kit import EMAConfig, Viewer
from causalreel.train.optim import OptimiserConfig
from causalreel.train.stage import DataCursor, Stage, StepContext
from causalreel.train.stages.ar_diffusion import ARDiffusion, ARDiffusionConfig
from causalreel.train.stages.causal_cd import CausalCD, CausalCDConfig
from causalreel.train.stages.causal_ode import CausalODE, CausalODEConfig, make_part, parts_of
from causalreel.train.stages.causal_scm import CausalSCM, CausalSCMConfig
from causalreel.train.stages.dmd import DMD, DMDConfig
from causalreel.train.stages.pretrain import Pretrain, PretrainConfig
from causalreel.train.trainer import TrainerConfig, train
from causalreel.types import Batch, Conditioning, Geometry, LatentBatch

CONFIG = ModelConfig(dim=16, ffn_dim=24, heads=2, layers=1, text_dim=8, text_length=4, freq_dim=16, channels=2)
FRAMES, NULL = 4, torch.zeros(1, 4, 8)
OPTIMISER = OptimiserConfig(lr=3e-3, betas=(0.0, 0.99))


class Pixels:
    """A codec that shows latents as they are."""

    geometry = Geometry(2, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        return latents[:, :, :1].expand(-1, -1, 3, -1, -1).clamp(-1, 1)

    def encode(self, video: Tensor) -> Tensor:
        return video[:, :, :2]

    def stream(self):
        return self.decode


VIEWER = Viewer(Pixels(), (1.0, 0.5), chunk=2, clips=2)  # type: ignore[arg-type]


def net(seed: int = 0, *, trained: bool = True) -> DiTDenoiser:
    torch.manual_seed(seed)
    made = DiTDenoiser(CONFIG)
    nn.init.normal_(made.model.head.head.weight, std=0.1)
    return made.requires_grad_(trained)


def source(rows: int = 24) -> LatentSource:
    """Clips that a text vector decides: something to learn."""
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(rows, 4, 8, generator=generator)
    shape = text[:, 0, :2, None, None].expand(-1, -1, 4, 4)
    drift = torch.linspace(0.5, 1.5, FRAMES)[None, :, None, None, None]
    return LatentSource(shape[:, None] * drift, Conditioning(text))


def trajectories(config: CausalODEConfig) -> TrajectorySource:
    teacher, how = net(3, trained=False), {"null": NULL, "seed": 0, "device": torch.device("cpu")}
    parts = [make_part(first, teacher, source(), config, **how) for first in parts_of(config)]
    held = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return TrajectorySource(held["states"], Conditioning.from_named(held))


ODE = CausalODEConfig(batch=8, chunk=2, pairs=12, grid=8, keep=(0, 2, 4, 6), maker_batch=5, guidance=2.0)
BASELINE = dataclasses.replace(ODE, trajectories="bidirectional", forcing="diffusion")
SELF_ROLLOUT = DMDConfig(batch=3, chunk=1, steps=(1000, 500), first_steps=(1000, 750, 500, 250), critic_updates=2)
ROLLING = dataclasses.replace(SELF_ROLLOUT, rolling=0.5, longest=6, student_pass="replay", critic_rollouts=1)


def make_dmd(config: DMDConfig) -> tuple[Stage, LatentSource]:
    stage = DMD(config, student=net(), critic=net(1), teacher=net(2, trained=False), null=NULL, viewer=VIEWER)
    return stage, source()


def make_scm(config: CausalSCMConfig) -> tuple[Stage, LatentSource]:
    how = {"student": net(), "teacher": net(2, trained=False), "null": NULL, "viewer": VIEWER}
    return CausalSCM(config, **how), source()


STAGES = {
    "pretrain": lambda: (Pretrain(PretrainConfig(batch=8), student=net(), viewer=VIEWER), source()),
    "teacher forcing": lambda: (
        ARDiffusion(ARDiffusionConfig(batch=8, chunk=2), student=net(), viewer=VIEWER),
        source(),
    ),
    "noisy context": lambda: (
        ARDiffusion(ARDiffusionConfig(batch=8, chunk=2, context_noise=0.1), student=net(), viewer=VIEWER),
        source(),
    ),
    "diffusion forcing": lambda: (
        ARDiffusion(ARDiffusionConfig(batch=8, chunk=1, forcing="diffusion"), student=net(), viewer=VIEWER),
        source(),
    ),
    "causal ODE": lambda: (CausalODE(ODE, student=net(), viewer=VIEWER), trajectories(ODE)),
    "Self Forcing ODE": lambda: (CausalODE(BASELINE, student=net(), viewer=VIEWER), trajectories(BASELINE)),
    "causal CD": lambda: (
        CausalCD(
            CausalCDConfig(batch=8, chunk=2, grid=6),
            student=net(),
            teacher=net(2, trained=False),
            null=NULL,
            viewer=VIEWER,
        ),
        source(),
    ),
    "causal dCM, noisy context": lambda: (
        CausalCD(
            CausalCDConfig(batch=8, chunk=2, levels="continuous", agrees_with="student", noisy_from=1),
            student=net(),
            teacher=net(2, trained=False),
            null=NULL,
            viewer=VIEWER,
        ),
        source(),
    ),
    "causal sCM": lambda: make_scm(CausalSCMConfig(batch=8, chunk=2, warm_up=4)),
    "causal sCM, noisy context": lambda: make_scm(CausalSCMConfig(batch=8, chunk=2, warm_up=4, noisy_from=0)),
    "DMD": lambda: make_dmd(SELF_ROLLOUT),
    "DMD, replayed": lambda: make_dmd(dataclasses.replace(SELF_ROLLOUT, student_pass="replay", critic_rollouts=1)),
    "DMD, repeated samples": lambda: make_dmd(
        dataclasses.replace(SELF_ROLLOUT, critic_repeats=2, student_samples="critic")
    ),
    "DMD, shared exits": lambda: make_dmd(dataclasses.replace(SELF_ROLLOUT, exits="shared")),
    "DMD, last exits": lambda: make_dmd(dataclasses.replace(SELF_ROLLOUT, exits="last")),
    "DMD, exits in turn, noisy context": lambda: make_dmd(
        dataclasses.replace(SELF_ROLLOUT, exits="in_turn", noisy_from=1)
    ),
    "DMD, long": lambda: make_dmd(dataclasses.replace(SELF_ROLLOUT, longest=7)),
    "DMD, rolling": lambda: make_dmd(ROLLING),
    "CausVid": lambda: make_dmd(dataclasses.replace(SELF_ROLLOUT, samples="data")),
    "causal score distillation": lambda: make_dmd(dataclasses.replace(SELF_ROLLOUT, samples="teacher_forced")),
}


def trainer_config(stage: Stage, out: Path, steps: int, **changes: object) -> TrainerConfig:
    trained = {role: OPTIMISER for role in ("student", "critic") if role in stage.roles}
    return TrainerConfig(out=out, steps=steps, optimisers=trained, device="cpu", save_every=3, log_every=2, **changes)


def weights(stage: Stage) -> dict[str, Tensor]:
    return {f"{r}.{n}": t.clone() for r, m in stage.roles.items() for n, t in m.state_dict().items()}


@pytest.mark.parametrize("name", STAGES)
def test_stage_trains_its_roles_and_no_others(name: str, tmp_path: Path) -> None:
    """Law 11, and that every role that should move moves."""
    stage, rows = STAGES[name]()
    before = weights(stage)
    train(
        stage, rows, trainer_config(stage, tmp_path, 2, preview_every=2), write_preview=lambda video, path, step: None
    )
    moved = {key.split(".")[0] for key, value in weights(stage).items() if not torch.equal(value, before[key])}
    assert moved == set(stage.roles) - {"teacher"}


@pytest.mark.parametrize("name", STAGES)
def test_resumed_is_uninterrupted_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Law 9."""
    whole, rows = STAGES[name]()
    train(whole, rows, trainer_config(whole, tmp_path / "whole", 6))
    first, _ = STAGES[name]()
    train(first, rows, trainer_config(first, tmp_path / "parts", 3))
    second, _ = STAGES[name]()
    train(second, rows, trainer_config(second, tmp_path / "parts", 6))
    for key, value in weights(whole).items():
        assert torch.equal(weights(second)[key], value), key
    logs = [(tmp_path / part / "metrics.jsonl").read_text() for part in ("whole", "parts")]
    assert latest(tmp_path / "parts" / "checkpoints") is not None
    assert len(logs[0].splitlines()) >= 3


def one_loss(stage: Stage, rows: LatentSource, step: int = 0) -> float:
    context = StepContext(step, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
    with torch.no_grad():
        update = next(iter(stage.updates(context)))
        return float(update.losses[0]()[0])


@pytest.mark.parametrize("name", ["pretrain", "teacher forcing", "diffusion forcing", "causal ODE", "Self Forcing ODE"])
def test_stage_learns(name: str, tmp_path: Path) -> None:
    stage, rows = STAGES[name]()
    before = sum(one_loss(stage, rows, step) for step in range(8))
    train(stage, rows, trainer_config(stage, tmp_path, 60))
    after = sum(one_loss(stage, rows, step) for step in range(8))
    assert after < 0.7 * before


def test_student_updates_are_the_same_in_one_pass_and_replayed(tmp_path: Path) -> None:
    found = []
    for student_pass in ("parallel", "replay"):
        stage, rows = make_dmd(dataclasses.replace(SELF_ROLLOUT, student_pass=student_pass))
        train(stage, rows, trainer_config(stage, tmp_path / student_pass, 1))
        found.append(weights(stage))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-5)


def test_rollouts_through_the_fast_form_follow_the_student(tmp_path: Path) -> None:
    """Its weights are refreshed where they are: after three updates the student is what plain rollouts make of it."""
    found, config = [], dataclasses.replace(SELF_ROLLOUT, ema=EMAConfig(0.5))
    for is_fast in (False, True):
        stage, rows = make_dmd(config)
        assert isinstance(stage, DMD)
        if is_fast:
            nn.init.normal_(stage.student.model.blocks[0].norm3.bias)
            stage.sampler = accelerate(copy.deepcopy(stage.student).requires_grad_(False))
            nn.init.zeros_(stage.student.model.blocks[0].norm3.bias)  # as it is in the other one
        train(stage, rows, trainer_config(stage, tmp_path / str(is_fast), 3))
        found.append(weights(stage))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-5)


def test_rollouts_in_fp8_are_of_the_weights_as_they_are() -> None:
    made = []
    for precision in ("bf16", "fp8"):
        stage, rows = make_dmd(SELF_ROLLOUT)
        assert isinstance(stage, DMD)
        stage.sampler = accelerate(copy.deepcopy(stage.student).requires_grad_(False), precision=precision)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for weight in stage.student.parameters():
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
        context = StepContext(0, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
        made.append(stage._make(context, context.batch(8, LatentBatch), "student").latents)
    error = ((made[1] - made[0]).norm() / made[0].norm()).item()
    assert 1e-3 < error < 0.1, error  # e4m3, and no more: of older weights it would be far


def test_critic_updates_may_repeat_samples() -> None:
    made: list[str] = []
    config = dataclasses.replace(SELF_ROLLOUT, critic_updates=5, critic_repeats=2)
    stage, rows = make_dmd(config)
    assert isinstance(stage, DMD)
    roll_out = stage._make
    stage._make = lambda step, batch, purpose: made.append(purpose) or roll_out(step, batch, purpose)
    context = StepContext(0, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
    losses = [update.losses[0]()[0].item() for update in stage.updates(context) if update.role == "critic"]
    assert len(set(losses)) == len(losses) == 5  # each with noise of its own
    assert made == ["critic 0", "critic 1", "critic 2", "student"]
    made.clear()
    stage.config = dataclasses.replace(config, critic_repeats=5, student_samples="critic")
    assert [update.role for update in stage.updates(context)] == ["critic"] * 5 + ["student"]
    assert made == ["critic 0"]
    with pytest.raises(ValueError, match="student_samples: critic needs critic_rollouts: null"):
        dataclasses.replace(config, critic_repeats=1, critic_rollouts=2, student_samples="critic")
    with pytest.raises(ValueError, match="critic_repeats must be 1 to 5, got 6"):
        dataclasses.replace(config, critic_repeats=6)
    with pytest.raises(ValueError, match="critic_rollouts must be 1 to 3, got 4"):
        dataclasses.replace(config, critic_rollouts=4)


def test_dmd_moves_the_student_towards_the_teacher(tmp_path: Path) -> None:
    """A teacher that always points to one clip draws the student's samples to it."""

    class Pointing(DiTDenoiser):
        def forward(self, x, sigma, conditioning, **call):
            return (x - 0.8) / sigma.expand(-1, x.shape[1])[..., None, None, None]

    teacher = Pointing(CONFIG).requires_grad_(False)
    config = dataclasses.replace(SELF_ROLLOUT, batch=8, ema=EMAConfig(0.5))
    stage = DMD(config, student=net(), critic=net(1), teacher=teacher, null=NULL, viewer=VIEWER)

    def distance() -> float:
        return float((stage.viewer.show(stage.roles["student"], context) - 0.8).abs().mean())

    rows = source()
    context = StepContext(0, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
    before = distance()
    train(stage, rows, trainer_config(stage, tmp_path, 60))
    assert distance() < 0.5 * before


def test_causal_trajectories_start_at_noise_and_end_near_the_teachers_clips() -> None:
    made = trajectories(ODE)
    assert made.latents.shape == (12, 6, FRAMES, 2, 4, 4) and made.latents.dtype == torch.float16
    torch.testing.assert_close(made.latents[:, -1].float(), source().latents[:12], rtol=1e-3, atol=1e-3)


class Prompts:
    """A data source without latents."""

    def __len__(self) -> int:
        return 24

    def batch(self, indices: Tensor) -> Batch:
        return Batch(Conditioning(torch.zeros(len(indices), 4, 8)))


@pytest.mark.parametrize("name", STAGES)
def test_prompt_only_data_is_refused(name: str, tmp_path: Path) -> None:
    stage, _ = STAGES[name]()
    before = weights(stage)
    with pytest.raises(ValueError, match=r"this stage needs (latents|trajectories), the data source has only prompts"):
        train(stage, Prompts(), trainer_config(stage, tmp_path, 2))
    assert all(torch.equal(value, before[key]) for key, value in weights(stage).items())
    assert latest(tmp_path / "checkpoints") is None


def test_trajectories_need_latents() -> None:
    with pytest.raises(ValueError, match="this stage needs latents"):
        make_part(0, net(), Prompts(), ODE, null=NULL, seed=0, device=torch.device("cpu"))
