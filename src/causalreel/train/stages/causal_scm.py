"""Stage 2c, causal continuous-time consistency distillation: as stage 2b, with a derivative in place of a step.

sCM (arXiv 2410.11081), made causal in Causal-rCM (arXiv 2606.25473), which prefers discrete steps (stage 2b).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.rollout import chunk_sizes
from causalreel.train.kit import (
    EMAConfig,
    Viewer,
    causal_velocity,
    check_noisy,
    gaussian,
    noisy_context,
    per_frame,
    probe,
    randn,
)
from causalreel.train.losses import tangent_loss
from causalreel.train.stage import Loss, StepContext, Update
from causalreel.types import Conditioning, LatentBatch


@dataclass(frozen=True)
class CausalSCMConfig:
    """Continuous-time consistency distillation behind the true past."""

    batch: int = 64
    """Clips per step."""
    chunk: int = 3
    """Latent frames per chunk."""
    shift: float = 5.0
    """Shift of the step list with which the student is shown and exported; training has none."""
    log_mean: float = -0.8
    """Of log(sigma / (1 - sigma)), which is normal: one level a clip."""
    log_std: float = 1.6
    """Its standard deviation."""
    guidance: float = 3.0
    """Guidance of the teacher."""
    warm_up: int = 1000
    """Steps over which the derivative comes to count in full."""
    noisy_from: int | None = None
    """As in stage 2b (`CausalCDConfig`)."""
    context_sigma: float = 0.625
    """As in stage 2b."""
    ema: EMAConfig = EMAConfig()
    """The average that is exported."""

    def __post_init__(self) -> None:
        if self.warm_up < 1:
            raise ValueError(f"warm_up must be at least 1, got {self.warm_up}")
        check_noisy(self.noisy_from, self.context_sigma)


class CausalSCM:
    """roles: student, average, teacher."""

    def __init__(
        self, config: CausalSCMConfig, *, student: DiTDenoiser, teacher: DiTDenoiser, null: Tensor, viewer: Viewer
    ) -> None:
        self.config, self.student, self.viewer = config, student, viewer
        self.teacher = Guided(teacher, Conditioning(null), config.guidance)
        self.roles: dict[str, nn.Module] = {"student": student, "teacher": teacher}
        self.average, self.averages = config.ema.follow(student)
        self.roles["average"] = self.average

    def updates(self, step: StepContext) -> Iterator[Update]:
        config = self.config
        batch = step.batch(config.batch, LatentBatch)
        sizes = chunk_sizes(batch.frames, config.chunk)

        def loss() -> Loss:
            x0, noisy = batch.latents.float(), None
            if config.noisy_from is not None:
                noisy = noisy_context(step, "context", x0, sizes, config.context_sigma, config.noisy_from)
            drawn = config.log_mean + config.log_std * gaussian(step, "level", len(batch), 1)
            return tangent_loss(
                self.student,
                self.teacher,
                x0,
                batch.conditioning,
                sigma=per_frame(torch.sigmoid(drawn), [batch.frames]),
                noise=randn(step, "noise", x0),
                sizes=sizes,
                warm=min(1.0, step.step / config.warm_up),
                noisy=noisy,
            )

        yield Update("student", [loss])

    def probe(self, step: StepContext) -> dict[str, Tensor]:
        return probe(step, self.config.batch, causal_velocity(self.student, self.config.chunk))

    def preview(self, step: StepContext) -> Tensor:
        return self.viewer.show(self.average, step)
