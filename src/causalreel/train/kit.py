"""What stages share beside their losses: random draws per sample and chunk, previews, and probes of what is learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from causalreel.flow import add_noise, shift_sigma
from causalreel.nn.lora import twin
from causalreel.rollout import KeyedNoise, StreamNoise, chunk_sizes, chunked, collect, rollout
from causalreel.solvers import SOLVERS
from causalreel.train.losses import NoisyContext, velocity_loss
from causalreel.train.stage import Average, StepContext
from causalreel.types import ClipBatch, Conditioning, Denoiser, LatentSpec, TrajectoryBatch, VideoCodec

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
    noisy_from: int | None = None
    """See `rollout.chunked`."""
    clips: int = 8

    @torch.no_grad()
    def show(self, denoise: Denoiser, step: StepContext, *, cached: bool = True) -> Tensor:
        """-> video (B,T,3,H,W) of the first prompts of the data, the same noise every time."""
        rows = step.rows(range(min(self.clips, len(step.source))), ClipBatch)
        noise = KeyedNoise(range(len(rows)), rows.spec, step.device)
        sizes = chunk_sizes(rows.frames, self.chunk if cached else rows.frames)
        chunks = rollout(
            denoise,
            chunked(sizes, self.sigmas, first=self.first, noisy_from=self.noisy_from),
            conditioning=rows.conditioning,
            noise=noise,
            solver=SOLVERS[self.solver],
            cache=denoise.new_cache() if cached else None,
        )
        return self.codec.decode(collect(chunks))

    @torch.no_grad()
    def data(self, step: StepContext) -> Tensor | None:
        """-> video (B,T,3,H,W) of the data's own clips to these prompts; None where the data hold only prompts."""
        clean = _clean(step.rows(range(min(self.clips, len(step.source))), ClipBatch))
        return self.codec.decode(clean) if clean.any() else None


# ---- probes

PROBED = 16
"""Clips of the data that a probe looks at, at least: the first ones."""

PROBE_SIGMAS = (0.25, 0.6, 0.9)
"""Noise levels of a probe; the one in the middle is that of its text."""

Velocity = Callable[[Tensor, Tensor, Tensor, Conditioning], Tensor]
"""x (B,F,C,H,W), sigma (B,F), the true clip (B,F,C,H,W), conditioning -> velocity (B,F,C,H,W)."""


def probe(step: StepContext, batch: int, velocity: Velocity) -> dict[str, Tensor]:
    """How well a network knows some clips of the data, always the same behind the same noise -> scalars () by name.

    For each of `PROBE_SIGMAS`: the mean square error of the velocity at that noise level. text: by which share the one
    in the middle grows where each clip gets the next one's text; about 0 says that the network does not use the text,
    or was taught with that of other clips. NaN where the data hold only prompts. batch: clips of a training batch; as
    many as a process takes of it go in at a time, so that nothing is compiled anew.
    """
    each, middle = max(1, batch // step.parts), PROBE_SIGMAS[1]
    calls, sums = -(-PROBED // each), dict.fromkeys((*PROBE_SIGMAS, "other"), torch.zeros((), device=step.device))
    for call in range(calls):
        rows, others = (
            step.rows([row % len(step.source) for row in range(first, first + each)], ClipBatch)
            for first in (call * each, call * each + 1)
        )
        clean = _clean(rows)
        is_there = torch.where(clean.any(), 1.0, torch.nan)
        noise = torch.randn(clean.shape, generator=step.generator(f"probe {call}", step=0), device=step.device)
        mixed = replace(rows.conditioning, text=others.conditioning.text)
        for name in sums:
            level = torch.full(clean.shape[:2], name if isinstance(name, float) else middle, device=step.device)
            told = mixed if name == "other" else rows.conditioning
            error = velocity_loss(
                velocity(add_noise(clean, noise, level), level, clean, told), clean, noise, torch.ones_like(level)
            )
            sums[name] = sums[name] + error.detach() * is_there / calls
    text = sums.pop("other") / sums[middle] - 1
    return {**{f"{level:g}": value for level, value in sums.items()}, "text": text}


def causal_velocity(student: Denoiser, chunk: int, *, is_forced: bool = True) -> Velocity:
    """Noisy chunks behind clean ones, in one pass; behind noisy ones where not `is_forced`."""

    def velocity(x: Tensor, sigma: Tensor, clean: Tensor, told: Conditioning) -> Tensor:
        sizes = chunk_sizes(x.shape[1], chunk)
        if is_forced:
            return student.teacher_forced(x, sigma, told, clean=clean, sizes=sizes)
        return student(x, sigma, told, sizes=sizes)

    return velocity


def _clean(batch: ClipBatch) -> Tensor:
    """The true clips (B,F,C,H,W) float32 of a batch."""
    return (batch.latents[:, -1] if isinstance(batch, TrajectoryBatch) else batch.latents).float()


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


def check_noisy(noisy_from: int | None, level: float) -> None:
    """ValueError unless stages of consistency can make such a context; see `noisy_context`."""
    if noisy_from is not None and not (noisy_from >= 0 and 0 < level < 1):
        raise ValueError(
            f"noisy_from must be null or at least 0, with context_sigma within 0 and 1; got {noisy_from}, {level}"
        )


def noisy_context(
    step: StepContext, purpose: str, x0: Tensor, sizes: Sequence[int], level: float, noisy_from: int
) -> NoisyContext:
    """Context of clean latents (B,F,C,H,W) at this noise level, from chunk number `noisy_from` on."""
    chunks = torch.arange(len(sizes), device=x0.device).expand(len(x0), -1) >= noisy_from
    return NoisyContext(per_frame(chunks.float() * level, sizes), randn(step, purpose, x0))


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


def given_first(step: StepContext, batch: int, frames: int, share: float) -> Tensor:
    """-> (B,F) bool: true at frame 0 of that share of the clips, which are to continue a given picture."""
    rows = uniform(step, "given", batch, 1) <= share
    return rows & (torch.arange(frames, device=rows.device) == 0)


def drop_text(step: StepContext, conditioning: Conditioning, probability: float) -> Conditioning:
    """Blank the text of some rows, so that the network also learns the unconditional velocity."""
    if probability == 0:
        return conditioning
    return conditioning.without_text(uniform(step, "text dropout", len(conditioning)) <= probability)
