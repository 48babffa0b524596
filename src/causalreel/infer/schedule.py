"""From a request to a rollout: which noise levels, which chunks, how many frames, and whether the request is possible.

Knows no network and no codec beyond its geometry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import repeat

from causalreel.flow import sigma_grid, warp_steps
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.window import Context
from causalreel.rollout import Plan, chunked, fuse, rolling
from causalreel.solvers import unipc_sigmas
from causalreel.types import Geometry
from causalreel.weights.export import Sampling


@dataclass(frozen=True)
class Schedule:
    """One clip: latent frames, the given ones (`prefix`) included, and how they are made."""

    frames: int
    prefix: int
    sampling: Sampling
    context: ContextPolicy = Context()
    """The context policy."""
    strength: float | None = None
    """Noise level at which chunks begin, where they are made of a given video; None: they are made of noise."""

    def plan(self, *, fused: bool = True) -> Plan:
        """The calls of the rollout; `fused` says the same in fewer of them."""
        chunk = self.sampling.chunk or self.frames
        sizes, prefix = repeat(chunk, (self.frames - self.prefix) // chunk), [chunk] * (self.prefix // chunk)
        if self.sampling.plan == "rolling":
            return rolling(sizes, noise_levels(self.sampling), prefix=prefix)
        first = first_noise_levels(self.sampling)
        levels = self.sampling.levels or (noise_levels(self.sampling),)
        if self.strength is not None:
            levels = tuple(below(one, self.strength) for one in levels)
            first = None if first is None else below(first, self.strength)
        plan = chunked(
            sizes,
            levels,
            first=first,
            prefix=prefix,
            noisy_from=self.sampling.noisy_from,
        )
        return fuse(plan) if fused and self.context.fuses else plan


def below(levels: Sequence[float], strength: float) -> tuple[float, ...]:
    """Noise levels of a chunk that begins at `strength`: that, and those of the model's own that are below it."""
    return (strength, *(level for level in levels if level < strength))


def even_steps(count: int) -> tuple[float, ...]:
    """The usual list of `count` steps: 4 -> (1000, 750, 500, 250), 2 -> (1000, 500), 1 -> (1000)."""
    if count < 1:
        raise ValueError(f"steps must be at least 1, got {count}")
    return tuple(1000 * (count - i) / count for i in range(count))


def adapt(sampling: Sampling, *, steps: int | Sequence[float] | None = None, chunk: int | None = None) -> Sampling:
    """`sampling` with another number or list of steps, and another chunk size.

    The model's own number of steps is its own list, even or not. Steps that differ from the model's hold for every
    chunk, the first included. A many-step model takes a number only.
    """
    if chunk is not None and chunk != sampling.chunk:
        if sampling.chunk is None:
            raise ValueError(f"chunk cannot be {chunk}: the model generates whole clips, it is not autoregressive")
        sampling = replace(sampling, chunk=chunk)
    if steps is None:
        return sampling
    if isinstance(steps, int) and steps > 1000:
        raise ValueError(f"steps must be at most 1000, the length of the released scale; got {steps}")
    if sampling.multistep is not None:
        if not isinstance(steps, int):
            raise ValueError(f"steps of a many-step model must be a number, got {list(steps)}")
        return replace(sampling, multistep=steps)
    if not sampling.levels and steps == len(sampling.steps):
        return sampling
    levels = even_steps(steps) if isinstance(steps, int) else tuple(float(s) for s in steps)
    if sampling.levels:  # the first chunk's, and the others' with as many as are asked for
        begin = sampling.levels[0][0]
        further = (begin, *(level for level in warp_steps(levels, sampling.shift) if level < begin))
        return replace(sampling, levels=tuple(dict.fromkeys((sampling.levels[0], further))))
    return sampling if levels == sampling.steps else replace(sampling, steps=levels, first_steps=None)


def in_few_steps(sampling: Sampling, steps: int) -> Sampling:
    """A model in 1, 2 or 4 steps; frame-wise with 4 for the first frame, as it is meant to be used."""
    first = even_steps(4) if steps < 4 and sampling.chunk == 1 else None
    return replace(sampling, steps=even_steps(steps), first_steps=first, solver="renoise", multistep=None, guidance=1.0)


def with_first_steps(sampling: Sampling, steps: int) -> Sampling:
    """The first chunk in so many steps. ValueError for a model of many steps, or of whole clips."""
    _check_few_steps(sampling, "first_steps")
    return replace(sampling, first_steps=even_steps(steps))


def with_step_list(sampling: Sampling, steps: Sequence[float]) -> Sampling:
    """Chunks in these steps; a first one with its own keeps them. ValueError as of `with_first_steps`, `Sampling`."""
    _check_few_steps(sampling, "step_list")
    return replace(sampling, steps=tuple(float(step) for step in steps))


def _check_few_steps(sampling: Sampling, name: str) -> None:
    if sampling.chunk is None or sampling.multistep is not None or sampling.levels:
        raise ValueError(f"{name} is of a few-step model that makes clips chunk by chunk, which this one is not")


def noise_levels(sampling: Sampling) -> tuple[float, ...]:
    """Sigmas at which a chunk is denoised, falling, without the final 0; not the first, where that has others."""
    if sampling.levels:
        return sampling.levels[-1]
    if sampling.multistep is None:
        return warp_steps(sampling.steps, sampling.shift)
    if sampling.solver == "unipc":
        return unipc_sigmas(sampling.multistep, sampling.shift)[:-1]
    return tuple(sigma_grid(sampling.multistep, sampling.shift)[:-1].tolist())


def step_count(sampling: Sampling) -> int:
    """Denoising steps of a chunk; not of the first, where that has others."""
    return sampling.multistep or len(sampling.levels[-1] if sampling.levels else sampling.steps)


def first_noise_levels(sampling: Sampling) -> tuple[float, ...] | None:
    """Those of the first generated chunk, if they differ."""
    if sampling.multistep is not None or sampling.first_steps is None or sampling.levels:
        return None
    return warp_steps(sampling.first_steps, sampling.shift)


def schedule(
    sampling: Sampling,
    geometry: Geometry,
    *,
    trained: int,
    frames: int | None = None,
    prefix: int = 0,
    context: ContextPolicy = Context(),
    longer: ContextPolicy | None = None,
) -> Schedule:
    """Check a request for `frames` pixel frames (None: a training clip's) behind `prefix` given latent frames.

    trained: latent frames of a training clip. context: the model's; a clip longer than those of training gets `longer`,
    or a window of their length. Raises ValueError naming the nearest numbers of frames that are possible.
    """
    chunk = sampling.chunk
    if chunk is None:
        if prefix:
            raise ValueError("a prefix needs an autoregressive model; this one generates whole clips")
        longest = geometry.frames_of(trained)
        if frames is not None and frames > longest:
            raise ValueError(f"frames must be at most {longest} for a model that generates whole clips, got {frames}")
    elif chunk > trained:
        raise ValueError(f"chunk must be at most {trained}, the latent frames of a training clip; got {chunk}")
    elif prefix % chunk:
        raise ValueError(
            f"the prefix must have a multiple of the chunk's {chunk} latent frames, got {prefix}; "
            f"a frame-wise model (chunk 1) takes any prefix"
        )
    unit = chunk or 1
    context.check(unit * step_count(sampling) if sampling.plan == "rolling" else unit)
    if frames is None:
        wanted = max(trained // unit * unit, prefix + unit)
        return Schedule(wanted, prefix, sampling, context)
    wanted = geometry.latents_in(frames)
    if wanted > prefix and wanted % unit == 0 and geometry.frames_of(wanted) == frames:
        if wanted > trained:
            context = context.bounded(trained) if longer is None else longer
        return Schedule(wanted, prefix, sampling, context)
    below = max(wanted // unit * unit, prefix + unit)
    above = below + unit if geometry.frames_of(below) < frames else below
    nearest = " or ".join(str(geometry.frames_of(n)) for n in dict.fromkeys((below, above)))
    behind = f" behind a prefix of {geometry.frames_of(prefix)}" if prefix else ""
    rule = f"{geometry.first} + {geometry.temporal} (n - 1)" + (
        f" with n a multiple of the chunk size {unit}" if unit > 1 else ""
    )
    raise ValueError(f"frames must be {rule}{behind}, got {frames}; nearest: {nearest}")
