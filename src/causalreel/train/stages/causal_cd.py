"""Stage 2b, causal consistency distillation: no stored trajectories, one teacher step per training step.

Causal Forcing++ (arXiv 2605.15141), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from causalreel.flow import shift_sigma, sigma_grid
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.nn.lora import twin
from causalreel.rollout import chunk_sizes
from causalreel.train.kit import (
    Viewer,
    causal_velocity,
    check_noisy,
    integers,
    noisy_context,
    per_frame,
    probe,
    randn,
    uniform,
)
from causalreel.train.losses import NoisyContext, consistency_loss
from causalreel.train.stage import Average, Loss, StepContext, Update
from causalreel.types import Conditioning, LatentBatch


@dataclass(frozen=True)
class CausalCDConfig:
    """Consistency distillation behind the true past."""

    batch: int = 64
    """Clips per step."""
    chunk: int = 3
    """Latent frames per chunk."""
    grid: int = 48
    """Noise levels of the consistency grid."""
    levels: Literal["grid", "continuous"] = "grid"
    """Levels are drawn from the grid, or from all that are a step of it above 0 or more (Causal-rCM): in the unit
    interval before the shift, where the steps of the grid are even."""
    shift: float = 5.0
    """Shift of the grid, and of the steps with which the student is sampled."""
    levels_shift: float | None = None
    """Shift of the grid alone, or of continuous levels, where sampling has another (Causal-rCM: 3)."""
    guidance: float = 3.0
    """Guidance of the teacher's step."""
    target_decay: float = 0.99
    """Decay of the target, the average of the student that it must agree with; also what is exported."""
    agrees_with: Literal["target", "student"] = "target"
    """What the student must agree with: the target (released), or itself as it is (Causal-rCM)."""
    include_last: bool = False
    """Also train the last interval, down to sigma 0, which the released code never draws."""
    noisy_from: int | None = None
    """Chunks from this number on are read as noisy context by what comes behind them, for students that are sampled so
    (`DMDConfig.noisy_from`); the teacher reads clean ones. null: all are clean."""
    context_sigma: float = 0.625
    """Noise level of that context: the last of sampling's, 0.625 for step 250 at shift 5."""

    @property
    def drawn_shift(self) -> float:
        return self.shift if self.levels_shift is None else self.levels_shift

    def __post_init__(self) -> None:
        if self.levels_shift is not None and not self.levels_shift >= 1:
            raise ValueError(f"levels_shift must be null or at least 1, got {self.levels_shift}")
        if self.levels == "continuous" and self.include_last:
            raise ValueError("include_last is for levels: grid; continuous ones come as near to 0 as one likes")
        check_noisy(self.noisy_from, self.context_sigma)


class CausalCD:
    """roles: student, target, teacher."""

    def __init__(
        self, config: CausalCDConfig, *, student: DiTDenoiser, teacher: DiTDenoiser, null: Tensor, viewer: Viewer
    ) -> None:
        self.config, self.student, self.viewer = config, student, viewer
        target = twin(student).requires_grad_(False)
        self.target = target
        self.teacher = Guided(teacher, Conditioning(null), config.guidance)
        self.roles: dict[str, nn.Module] = {"student": student, "target": target, "teacher": teacher}
        self.averages = [Average("target", "student", config.target_decay)]
        self.grid = sigma_grid(config.grid, config.drawn_shift)

    def updates(self, step: StepContext) -> Iterator[Update]:
        batch = step.batch(self.config.batch, LatentBatch)
        sizes = chunk_sizes(batch.frames, self.config.chunk)

        def loss() -> Loss:
            x0 = batch.latents.float()
            sigma, sigma_next = self._levels(step, len(batch))
            return consistency_loss(
                self.student,
                self.target if self.config.agrees_with == "target" else self.student,
                self.teacher,
                x0,
                batch.conditioning,
                sigma=per_frame(sigma, [batch.frames]),
                sigma_next=per_frame(sigma_next, [batch.frames]),
                noise=randn(step, "noise", x0),
                sizes=sizes,
                noisy=self._contexts(step, x0, sizes),
            ), {}

        yield Update("student", [loss])

    def _levels(self, step: StepContext, batch: int) -> tuple[Tensor, Tensor]:
        """Noise levels (B,1) of the student and of the target."""
        config = self.config
        if config.levels == "continuous":
            u = uniform(step, "level", batch, 1) * (1 - 1 / config.grid)  # how far it is from noise
            u_next = (u + 1 / config.grid).clamp_max(1)
            return shift_sigma(1 - u, config.drawn_shift), shift_sigma(1 - u_next, config.drawn_shift)
        index = integers(step, "interval", config.grid if config.include_last else config.grid - 1, batch, 1)
        grid = self.grid.to(step.device)
        return grid[index], grid[index + 1]

    def _contexts(self, step: StepContext, x0: Tensor, sizes: list[int]) -> tuple[NoisyContext, NoisyContext] | None:
        config = self.config
        if config.noisy_from is None:
            return None
        how = (x0, sizes, config.context_sigma, config.noisy_from)
        return noisy_context(step, "context", *how), noisy_context(step, "target's context", *how)

    def probe(self, step: StepContext) -> dict[str, Tensor]:
        return probe(step, self.config.batch, causal_velocity(self.student, self.config.chunk))

    def preview(self, step: StepContext) -> Tensor:
        return self.viewer.show(self.target, step)
