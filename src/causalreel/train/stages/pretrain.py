"""The bidirectional base: flow matching on whole clips. Teacher of distribution matching, start of everything else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from causalreel.flow import shift_sigma, uniform_weight
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.train.kit import EMAConfig, Viewer, drop_text, given_first, probe, randn, uniform
from causalreel.train.losses import bidirectional_loss
from causalreel.train.stage import Loss, StepContext, Update
from causalreel.types import LatentBatch


@dataclass(frozen=True)
class PretrainConfig:
    """Flow matching of whole clips."""

    batch: int = 64
    """Clips per step."""
    shift: float = 5.0
    """Shift of the uniform noise levels."""
    text_dropout: float = 0.1
    """Share of clips trained without text, for guidance."""
    given: float = 0.0
    """Share of clips whose first latent frame is given, clean and at noise level 0: image to video."""
    ema: EMAConfig = EMAConfig(decay=0.999)
    """The average that becomes the base."""

    def __post_init__(self) -> None:
        if not 0 <= self.given <= 1:
            raise ValueError(f"given must be 0 to 1, a share of the clips; got {self.given}")


class Pretrain:
    """roles: student, average."""

    def __init__(self, config: PretrainConfig, *, student: DiTDenoiser, viewer: Viewer) -> None:
        self.config, self.student, self.viewer = config, student, viewer
        self.roles: dict[str, nn.Module] = {"student": student}
        self.average, self.averages = config.ema.follow(student)
        self.roles["average"] = self.average

    def updates(self, step: StepContext) -> Iterator[Update]:
        batch = step.batch(self.config.batch, LatentBatch)

        def loss() -> Loss:
            x0 = batch.latents.float()
            sigma = shift_sigma(uniform(step, "sigma", len(batch), 1), self.config.shift)
            conditioning = drop_text(step, batch.conditioning, self.config.text_dropout)
            weight = uniform_weight(sigma, self.config.shift)
            if self.config.given:
                given = given_first(step, len(batch), batch.frames, self.config.given)
                sigma, weight = sigma.masked_fill(given, 0.0), weight.masked_fill(given, 0.0)  # (B,F)
            noise = randn(step, "noise", x0)
            return bidirectional_loss(self.student, x0, conditioning, sigma=sigma, noise=noise, weight=weight), {}

        yield Update("student", [loss])

    def probe(self, step: StepContext) -> dict[str, Tensor]:
        each = None if self.config.given else 1  # noise levels of a clip, as in training
        return probe(step, self.config.batch, lambda x, sigma, _, told: self.student(x, sigma[:, :each], told))

    def preview(self, step: StepContext) -> Tensor:
        return self.viewer.show(self.average, step, cached=False)
