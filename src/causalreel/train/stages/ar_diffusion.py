"""Stage 1, AR diffusion: make the bidirectional network causal, still with many denoising steps.

Teacher forcing is the method (noisy chunks behind clean ones, as in inference); diffusion forcing is the baseline.
Causal Forcing (arXiv 2602.02214), section 4 and table 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from causalreel.flow import bell_weight, shift_sigma, uniform_weight, unshift_sigma
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.rollout import chunk_sizes
from causalreel.train.kit import (
    EMAConfig,
    Viewer,
    causal_velocity,
    draw_sigmas,
    drop_text,
    per_frame,
    probe,
    randn,
    uniform,
)
from causalreel.train.losses import diffusion_forcing_loss, teacher_forcing_loss
from causalreel.train.stage import Loss, StepContext, Update
from causalreel.types import LatentBatch

WEIGHTS = {"bell": bell_weight, "uniform": uniform_weight}


@dataclass(frozen=True)
class ARDiffusionConfig:
    """Flow matching, chunk by chunk."""

    batch: int = 64
    """Clips per step."""
    chunk: int = 3
    """Latent frames per chunk."""
    shift: float = 5.0
    """Shift of the uniform noise levels."""
    levels: Literal["chunk", "clip"] = "chunk"
    """A noise level for every chunk (released), or one for all of a clip (Causal-rCM)."""
    forcing: Literal["teacher", "diffusion"] = "teacher"
    """What a noisy chunk sees of the past: clean chunks (teacher) or equally noisy training (diffusion)."""
    weight: Literal["bell", "uniform"] = "bell"
    """Weight over noise levels; bell is the released one, 0 at sigma 1."""
    text_dropout: float = 0.0
    """Share of clips trained without text; 0 where guidance uses a negative prompt."""
    context_noise: float = 0.0
    """Largest noise level put on the clean context, 0 for none; teacher forcing only."""
    policy: str | None = None
    """What a chunk sees, where it is not as in what the student starts from, such as window:window=12."""
    ema: EMAConfig = EMAConfig()
    """The average that becomes the AR teacher."""

    def __post_init__(self) -> None:
        if self.context_noise and self.forcing != "teacher":
            raise ValueError("context_noise needs forcing: teacher; diffusion forcing has no clean context")


class ARDiffusion:
    """roles: student, average."""

    def __init__(self, config: ARDiffusionConfig, *, student: DiTDenoiser, viewer: Viewer) -> None:
        self.config, self.student, self.viewer = config, student, viewer
        self.roles: dict[str, nn.Module] = {"student": student}
        self.average, self.averages = config.ema.follow(student)
        self.roles["average"] = self.average

    def updates(self, step: StepContext) -> Iterator[Update]:
        config = self.config
        batch = step.batch(config.batch, LatentBatch)
        sizes = chunk_sizes(batch.frames, config.chunk)

        def loss() -> Loss:
            x0 = batch.latents.float()
            conditioning = drop_text(step, batch.conditioning, config.text_dropout)
            alike = sizes if config.levels == "chunk" else [batch.frames]
            sigma = draw_sigmas(step, "sigma", len(batch), alike, config.shift)
            weight = WEIGHTS[config.weight](sigma, config.shift)
            noise = randn(step, "noise", x0)
            if config.forcing == "diffusion":
                return diffusion_forcing_loss(
                    self.student, x0, conditioning, sigma=sigma, noise=noise, weight=weight, sizes=sizes
                ), {}
            context = self._context_sigma(step, len(batch), sizes)
            return teacher_forcing_loss(
                self.student,
                x0,
                conditioning,
                sigma=sigma,
                noise=noise,
                weight=weight,
                sizes=sizes,
                clean_sigma=context,
            ), {}

        yield Update("student", [loss])

    def _context_sigma(self, step: StepContext, batch: int, sizes: list[int]) -> Tensor | None:
        if not self.config.context_noise:
            return None
        highest = unshift_sigma(torch.tensor(self.config.context_noise), self.config.shift).item()
        u = uniform(step, "context sigma", batch, len(sizes)) * highest
        return per_frame(shift_sigma(u, self.config.shift), sizes)

    def probe(self, step: StepContext) -> dict[str, Tensor]:
        is_forced = self.config.forcing == "teacher"
        return probe(step, self.config.batch, causal_velocity(self.student, self.config.chunk, is_forced=is_forced))

    def preview(self, step: StepContext) -> Tensor:
        return self.viewer.show(self.average, step)
