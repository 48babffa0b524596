"""Stage 2b, causal consistency distillation: no stored trajectories, one teacher step per training step.

Causal Forcing++ (arXiv 2605.15141), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from causalreel.flow import sigma_grid
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.nn.lora import twin
from causalreel.rollout import chunk_sizes
from causalreel.train.kit import Viewer, causal_velocity, integers, per_frame, probe, randn
from causalreel.train.losses import consistency_loss
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
    shift: float = 5.0
    """Shift of the grid."""
    guidance: float = 3.0
    """Guidance of the teacher's step."""
    target_decay: float = 0.99
    """Decay of the target, the average of the student that it must agree with; also what is exported."""
    include_last: bool = False
    """Also train the last interval, down to sigma 0, which the released code never draws."""


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
        self.grid = sigma_grid(config.grid, config.shift)

    def updates(self, step: StepContext) -> Iterator[Update]:
        batch = step.batch(self.config.batch, LatentBatch)
        sizes = chunk_sizes(batch.frames, self.config.chunk)

        def loss() -> Loss:
            x0 = batch.latents.float()
            last = self.config.grid if self.config.include_last else self.config.grid - 1
            index = integers(step, "interval", last, len(batch), 1)
            grid = self.grid.to(step.device)
            return consistency_loss(
                self.student,
                self.target,
                self.teacher,
                x0,
                batch.conditioning,
                sigma=per_frame(grid[index], [batch.frames]),
                sigma_next=per_frame(grid[index + 1], [batch.frames]),
                noise=randn(step, "noise", x0),
                sizes=sizes,
            ), {}

        yield Update("student", [loss])

    def probe(self, step: StepContext) -> dict[str, Tensor]:
        return probe(step, self.config.batch, causal_velocity(self.student, self.config.chunk))

    def preview(self, step: StepContext) -> Tensor:
        return self.viewer.show(self.target, step)
