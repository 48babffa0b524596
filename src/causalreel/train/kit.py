"""What stages share beside their losses: random draws per sample and chunk, and previews."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from causalreel.flow import shift_sigma
from causalreel.nn.lora import twin
from causalreel.rollout import KeyedNoise, StreamNoise, chunk_sizes, chunked, collect, rollout
from causalreel.solvers import SOLVERS
from causalreel.train.stage import Average, StepContext
from causalreel.types import ClipBatch, Conditioning, Denoiser, LatentSpec, VideoCodec

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class EMAConfig:
    """The average of the student that is shown, evaluated and exported."""

    decay: float = 0.99
    """Share of the old average kept at each student update."""
    from_step: int = 0
    """Trainer step until which the average is a plain copy."""

    def follow(self, student: Network) -> tuple[Network, list[Average]]:
        """-> a copy of the student for the role `average`, and that it follows the role `student`."""
        average = twin(student).requires_grad_(False)
        return average, [Average("average", "student", self.decay, self.from_step)]


@dataclass(frozen=True)
class Viewer:
    """How a stage shows what its student makes: a sampler's plan and a codec."""

    codec: VideoCodec
    sigmas: tuple[float, ...]
    """Noise levels, falling, without the final 0."""
    chunk: int
    solver: str = "renoise"
    first: tuple[float, ...] | None = None
    clips: int = 8

    @torch.no_grad()
    def show(self, denoise: Denoiser, step: StepContext, *, cached: bool = True) -> Tensor:
        """-> video (B,T,3,H,W) of the first prompts of the data, the same noise every time."""
        rows = step.rows(range(min(self.clips, len(step.source))), ClipBatch)
        noise = KeyedNoise(range(len(rows)), rows.spec, step.device)
        sizes = chunk_sizes(rows.frames, self.chunk if cached else rows.frames)
        chunks = rollout(
            denoise,
            chunked(sizes, self.sigmas, first=self.first),
            conditioning=rows.conditioning,
            noise=noise,
            solver=SOLVERS[self.solver],
            cache=denoise.new_cache() if cached else None,
        )
        return self.codec.decode(collect(chunks))


# Every draw is that of the whole batch, of which this part takes its rows: see `StepContext`.


def gaussian(step: StepContext, purpose: str, rows: int, *shape: int) -> Tensor:
    """Gaussian noise (rows,...) float32, on the trainer's device."""
    whole = (rows * step.parts, *shape)
    return step.mine(torch.randn(whole, generator=step.generator(purpose), device=step.device))


def randn(step: StepContext, purpose: str, like: Tensor) -> Tensor:
    """Gaussian noise like `like`, float32."""
    return gaussian(step, purpose, *like.shape)


def uniform(step: StepContext, purpose: str, rows: int, *shape: int) -> Tensor:
    """Uniform numbers (rows,...) in (0, 1], on the trainer's device."""
    whole = (rows * step.parts, *shape)
    return step.mine(1 - torch.rand(whole, generator=step.generator(purpose), device=step.device))


def integers(step: StepContext, purpose: str, below: int, rows: int, *shape: int) -> Tensor:
    """Whole numbers (rows,...) below `below`, on the trainer's device."""
    whole = (rows * step.parts, *shape)
    return step.mine(torch.randint(below, whole, generator=step.generator(purpose), device=step.device))


class RolloutNoise:
    """`rollout.StreamNoise` of the rows of a part; see types.NoiseSource."""

    def __init__(self, step: StepContext, purpose: str, rows: int, spec: LatentSpec) -> None:
        self._step, self._whole = step, StreamNoise(rows * step.parts, spec, step.generator(purpose))

    def initial(self, start: int, frames: int) -> Tensor:
        return self._step.mine(self._whole.initial(start, frames))

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        return self._step.mine(self._whole.renoise(start, frames, draw))


def draw_sigmas(step: StepContext, purpose: str, batch: int, sizes: Sequence[int], shift: float) -> Tensor:
    """-> (B,F): one shifted-uniform noise level per sample and chunk. The released code draws from 1000 levels."""
    return per_frame(shift_sigma(uniform(step, purpose, batch, len(sizes)), shift), sizes)


def draw_levels(step: StepContext, purpose: str, batch: int, sizes: Sequence[int], levels: Sequence[float]) -> Tensor:
    """-> (B,F): one of `levels` per sample and chunk."""
    index = integers(step, purpose, len(levels), batch, len(sizes))
    return per_frame(torch.tensor(levels, device=step.device)[index], sizes)


def draw_index(step: StepContext, purpose: str, count: int) -> int:
    """A whole number below `count`, drawn on the CPU: for choices that shape the computation."""
    return int(torch.randint(count, (), generator=step.generator(purpose, device="cpu")))


def per_frame(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """values (B, chunks) -> (B,F)."""
    return values.repeat_interleave(torch.tensor(sizes, device=values.device), dim=1, output_size=sum(sizes))


def drop_text(step: StepContext, conditioning: Conditioning, probability: float) -> Conditioning:
    """Blank the text of some rows, so that the network also learns the unconditional velocity."""
    if probability == 0:
        return conditioning
    return conditioning.without_text(uniform(step, "text dropout", len(conditioning)) <= probability)
