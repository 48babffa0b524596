"""How the released code differs from ours on purpose, as adapters around our networks: never as flags in the core.

- It converts and noises with the nearest entry of a 1000-entry table of noise levels, ours with the level itself.
- It tells a network another time than the level of its input: 0 for slightly noised context, whole numbers in the
  many-step sampler.
- Scores convert with the table of another shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from causalreel.flow import SCORE_SIGMA_RANGE, expand, shift_sigma
from causalreel.types import Conditioning

SCORE_SHIFT = 8.0
"""Shift of the table with which the released code converts the predictions of both scores."""

Tell = Callable[[Tensor], Tensor]
"""Noise level (B,F) -> what the network reads instead, float64, same shape."""


class Table:
    """The released grid of one shift: float32 noise levels and times, falling, without an entry at 0."""

    def __init__(self, shift: float, steps: int = 1000) -> None:
        self.sigmas = shift_sigma(torch.linspace(1, 0, steps + 1)[:-1], shift)
        self.times = self.sigmas * 1000

    def nearest(self, time: Tensor) -> Tensor:
        """time in 0..1000, any shape -> index of the nearest entry, the first of two."""
        return (self.times.double() - time.double()[..., None]).abs().argmin(-1)

    def sigma_at(self, time: Tensor) -> Tensor:
        """time in 0..1000, any shape -> noise level of the nearest entry, float32."""
        return self.sigmas[self.nearest(time)]

    def released_times(self, steps: Sequence[float], *, warp: bool = True) -> list[float]:
        """A step list -> float32 times: entries of this table (warped), or the numbers themselves."""
        steps = [step for step in steps if step > 0]
        if not warp:
            return [float(step) for step in steps]
        return self.times[[round(1000 - step) for step in steps]].tolist()

    def levels(self, times: Sequence[float]) -> tuple[float, ...]:
        """Times -> the noise levels that the released code uses at them."""
        return tuple(self.sigma_at(torch.tensor(times)).tolist())


def relabel(levels: Sequence[float], times: Sequence[float]) -> Tell:
    """Tell the network `times[i]` for noise level `levels[i]`, and 0 for 0 unless listed."""
    known = torch.tensor([*levels, 0.0], dtype=torch.float64)
    reads = torch.tensor([*times, 0.0], dtype=torch.float64) / 1000
    return lambda sigma: reads[(sigma.double()[..., None] - known).abs().argmin(-1)]


def in_float32(sigma: Tensor) -> Tensor:
    """Tell the network 1000 sigma, rounded to float32 once."""
    return (1000 * sigma.double()).float().double() / 1000


def always(time: Tensor) -> Tell:
    """Tell the network `time` (B,1) in 0..1000, whatever the level of its input."""
    return lambda sigma: (time.double() / 1000).expand(sigma.shape)


@dataclass(frozen=True)
class Logged:
    """One evaluation: input and clean estimate (B,F,C,H,W), the network's velocity, and the time that it read (B,F)."""

    x: Tensor
    velocity: Tensor
    x0: Tensor
    time: Tensor
    start: int
    clean: Tensor | None = None
    """Clean context, in teacher forcing."""


class Released:
    """A denoiser whose x - sigma velocity is the released code's clean estimate, and which logs what it evaluates.

    tell: what the network reads (default: the level itself). table: where the conversion's noise level comes from
    (default: the level itself). Wraps a DiTDenoiser or Guided, and has the methods of both.
    """

    def __init__(self, denoise: Any, *, tell: Tell | None = None, table: Table | None = None) -> None:
        self.denoise, self.table = denoise, table
        self.tell: Tell = tell or torch.Tensor.double
        self.log: list[Logged] = []

    def new_cache(self) -> Any:
        return self.denoise.new_cache()

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        return self.denoise.prepare(conditioning)

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, **call: Any) -> Tensor:
        return self._run(self.denoise, x, sigma, conditioning, **call)

    def teacher_forced(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, *, clean_sigma: Tensor | None = None, **call: Any
    ) -> Tensor:
        if clean_sigma is not None:
            call["clean_sigma"] = self.tell(clean_sigma)
        return self._run(self.denoise.teacher_forced, x, sigma, conditioning, **call)

    def derivative(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, *, clean_sigma: Tensor | None = None, **call: Any
    ) -> Tensor:
        if clean_sigma is not None:
            call["clean_sigma"] = self.tell(clean_sigma)
        return self.denoise.derivative(x, self.tell(sigma), conditioning, **call)

    def context_of(
        self, clean: Tensor, conditioning: Conditioning, *, clean_sigma: Tensor | None = None, **call: Any
    ) -> Any:
        if clean_sigma is not None:
            call["clean_sigma"] = self.tell(clean_sigma)
        return self.denoise.context_of(clean, conditioning, **call)

    def behind(self, context: Any, x: Tensor, sigma: Tensor, conditioning: Conditioning, **call: Any) -> Tensor:
        def run(x: Tensor, sigma: Tensor, conditioning: Conditioning, **how: Any) -> Tensor:
            return self.denoise.behind(context, x, sigma, conditioning, **how)

        return self._run(run, x, sigma, conditioning, **call)

    def _run(self, run: Any, x: Tensor, sigma: Tensor, conditioning: Conditioning, **call: Any) -> Tensor:
        level = self.tell(sigma)
        velocity = run(x, level, conditioning, **call)
        used = sigma if self.table is None else self.table.sigma_at(1000 * level)
        x0 = (x.double() - expand(used, x).double() * velocity.double()).float()
        time = (1000 * level).float()
        self.log.append(
            Logged(x.detach(), velocity.detach(), x0.detach(), time, call.get("start", 0), call.get("clean"))
        )
        if self.table is None:
            return velocity
        is_noise = sigma > 0
        ratio = torch.where(is_noise, used.double() / torch.where(is_noise, sigma, 1).double(), 1)
        return velocity * expand(ratio, x)


class RecordedNoise:
    """A NoiseSource that hands out recorded draws: initial noise (B,F,C,H,W) by frame, the others in order of use.

    renoise: each (B*k,C,H,W) or (B,k,C,H,W). offset: absolute frame of the first initial noise.
    """

    def __init__(self, initial: Tensor, renoise: Sequence[Tensor], *, offset: int = 0) -> None:
        self.noise, self.offset, self.rest = initial, offset, list(renoise)

    def initial(self, start: int, frames: int) -> Tensor:
        return self.noise[:, start - self.offset : start - self.offset + frames]

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        if not self.rest:
            raise ValueError(
                f"the recorded draws are used up at frame {start}: the plan makes more moves than recorded"
            )
        return self.rest.pop(0).reshape(self.noise.shape[0], frames, *self.noise.shape[2:])

    def finish(self) -> None:
        """ValueError if draws are left over: the plan made fewer moves than were recorded."""
        if self.rest:
            raise ValueError(f"{len(self.rest)} recorded draws were not used: the plan makes fewer moves than recorded")


class Scaled:
    """A NoiseSource whose initial noise is multiplied: the input of a sampler that begins below noise level 1."""

    def __init__(self, noise: RecordedNoise, scale: float) -> None:
        self.noise, self.scale = noise, scale
        self.renoise = noise.renoise

    def initial(self, start: int, frames: int) -> Tensor:
        return self.noise.initial(start, frames).double() * self.scale


def score_time(draw: Tensor, shift: float) -> Tensor:
    """Integers 0..999 -> the times at which the scores are asked, clamped, float32."""
    low, high = (1000 * sigma for sigma in SCORE_SIGMA_RANGE)
    return (1000 * shift_sigma(draw.float() / 1000, shift)).clamp(low, high)
