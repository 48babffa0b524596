"""Stage 2a, causal ODE: regress the end of a teacher's trajectory from its states at the few-step noise levels.

The trajectories decide what is learned: behind the true past by an AR teacher (the method), or of whole clips by a
bidirectional teacher (the Self Forcing and CausVid baseline, whose per-chunk optimum is a conditional mean).
Causal Forcing (arXiv 2602.02214), section 4, lemma 3.2 and proposition 3.3.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from causalreel.flow import sigma_grid
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.rollout import chunk_sizes
from causalreel.train.kit import EMAConfig, Viewer, causal_velocity, draw_levels, probe
from causalreel.train.losses import ode_regression_loss
from causalreel.train.stage import DataSource, StepContext, Update, of_kind, stable_seed
from causalreel.train.trajectories import causal_trajectories, integrate
from causalreel.types import Conditioning, LatentBatch, TrajectoryBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CausalODEConfig:
    """Making trajectories, and regressing their ends."""

    batch: int = 64
    """Trajectories per step."""
    chunk: int = 3
    """Latent frames per chunk."""
    trajectories: Literal["causal", "bidirectional"] = "causal"
    """Whose trajectories: an AR teacher's behind the true past, or a bidirectional teacher's."""
    forcing: Literal["teacher", "diffusion"] = "teacher"
    """What the student sees of the past: clean latents, or states of the trajectory (the baselines)."""
    pairs: int = 3072
    """Trajectories made."""
    grid: int = 48
    """Euler steps of a trajectory."""
    keep: tuple[int, ...] = (0, 12, 24, 36)
    """Grid indices of the states that are regressed from: the few-step noise levels."""
    shift: float = 5.0
    """Shift of the grid."""
    guidance: float = 6.0
    """Guidance of the teacher."""
    maker_batch: int = 256
    """Trajectories integrated at once."""
    ema: EMAConfig = EMAConfig()
    """The average that is exported."""

    @property
    def of_trajectories(self) -> dict[str, str]:
        """The settings that decide the trajectories, for comparing."""
        names = ("trajectories", "chunk", "pairs", "grid", "keep", "shift", "guidance", "maker_batch")
        return {f"settings.{name}": str(getattr(self, name)) for name in names}

    @property
    def grid_sigmas(self) -> tuple[float, ...]:
        return tuple(sigma_grid(self.grid, self.shift).tolist())

    @property
    def levels(self) -> tuple[float, ...]:
        """Noise levels of the kept states."""
        return tuple(self.grid_sigmas[i] for i in self.keep)


def parts_of(config: CausalODEConfig) -> range:
    """The first row of each part that is integrated at once."""
    return range(0, config.pairs, config.maker_batch)


def make_part(
    first: int,
    teacher: DiTDenoiser,
    source: DataSource,
    config: CausalODEConfig,
    *,
    null: Tensor,
    seed: int,
    device: torch.device,
) -> dict[str, Tensor]:
    """Trajectories of the rows from `first` on -> states (P,S+2,F,C,H,W) float16 and their conditioning, on the CPU.

    States at `keep`, then the end point, then the true clip; the conditioning by `Conditioning.named`. null (1,K,E):
    the unconditional text. A part depends on its first row alone and on no other part.
    """
    guided = Guided(teacher, Conditioning(null.to(device)), config.guidance)
    keep = (*config.keep, config.grid)
    rows = torch.arange(first, min(first + config.maker_batch, config.pairs)) % len(source)
    batch = of_kind(source.batch(rows), LatentBatch).to(device)
    clean, conditioning = batch.latents.float(), guided.prepare(batch.conditioning)
    generator = torch.Generator(device).manual_seed(stable_seed(seed, first, "trajectory noise"))
    noise = torch.randn(clean.shape, generator=generator, device=device)
    if config.trajectories == "causal":
        sizes = chunk_sizes(clean.shape[1], config.chunk)
        how = {"noise": noise, "sizes": sizes, "sigmas": config.grid_sigmas, "keep": keep}
        found = causal_trajectories(guided, clean, conditioning, **how)
    else:
        found = integrate(lambda x, s: guided(x, s, conditioning), noise, config.grid_sigmas, keep)
    log.info("trajectories: %d of %d", first + len(rows), config.pairs)
    states = torch.cat([found, clean[:, None]], dim=1).half().cpu()
    return {"states": states, **batch.conditioning.to("cpu").named()}


class CausalODE:
    """roles: student, average. Rows of its data are trajectories: latents (B,S+2,F,C,H,W)."""

    def __init__(self, config: CausalODEConfig, *, student: DiTDenoiser, viewer: Viewer) -> None:
        self.config, self.student, self.viewer = config, student, viewer
        self.roles: dict[str, nn.Module] = {"student": student}
        self.average, self.averages = config.ema.follow(student)
        self.roles["average"] = self.average

    def updates(self, step: StepContext) -> Iterator[Update]:
        batch = step.batch(self.config.batch, TrajectoryBatch)
        sizes = chunk_sizes(batch.frames, self.config.chunk)
        regress = self._behind_clean if self.config.forcing == "teacher" else self._behind_states
        yield Update("student", [lambda: (regress(step, batch, sizes), {})])

    def _behind_clean(self, step: StepContext, batch: TrajectoryBatch, sizes: Sequence[int]) -> Tensor:
        """One noise level a clip, true past: the released causal ODE."""
        states = batch.latents.float()
        sigma = draw_levels(step, "level", len(batch), [states.shape[2]], self.config.levels)  # (B,F)
        x = self._state_at(states, sigma)

        def predict(x: Tensor, sigma: Tensor) -> Tensor:
            return self.student.teacher_forced(x, sigma, batch.conditioning, clean=states[:, -1], sizes=sizes)

        return ode_regression_loss(predict, x, sigma, states[:, -2])

    def _behind_states(self, step: StepContext, batch: TrajectoryBatch, sizes: Sequence[int]) -> Tensor:
        """One noise level a chunk, the past at its own level (0 included): CausVid and Self Forcing."""
        states = batch.latents.float()
        sigma = draw_levels(step, "level", len(batch), sizes, (*self.config.levels, 0.0))
        x = self._state_at(states, sigma)

        def predict(x: Tensor, sigma: Tensor) -> Tensor:
            return self.student(x, sigma, batch.conditioning, sizes=sizes)

        return ode_regression_loss(predict, x, sigma, states[:, -2])

    def _state_at(self, states: Tensor, sigma: Tensor) -> Tensor:
        """states (B,S+2,F,...), sigma (B,F) of the kept levels or 0 -> each frame's state at its level (B,F,...)."""
        levels = torch.tensor((*self.config.levels, 0.0), device=sigma.device)
        index = (sigma[..., None] - levels).abs().argmin(-1)  # (B,F)
        index = index[:, None, :, None, None, None].expand(-1, 1, -1, *states.shape[3:])
        return states.gather(1, index)[:, 0]

    def probe(self, step: StepContext) -> dict[str, Tensor]:
        is_forced = self.config.forcing == "teacher"
        return probe(step, self.config.batch, causal_velocity(self.student, self.config.chunk, is_forced=is_forced))

    def preview(self, step: StepContext) -> Tensor:
        return self.viewer.show(self.average, step)
