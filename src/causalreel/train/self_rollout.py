"""The student's own rollout in training, and three ways to send a gradient back through it.

Every chunk leaves at its exit step; only that call carries gradient, and past chunks are constants (the released code
lets gradient leak into them through its cache). The rollout itself therefore needs no gradient: it is recorded, the
loss is taken on what it generated, and the exit calls are evaluated once more with gradient.

- `parallel_pass`: all exit calls in one pass, each behind its part of the recorded context. Fastest; activations of the
  whole clip. The default.
- `replay_passes`: one exit call after the other behind the recorded cache. Activations of one chunk: for models whose
  clip does not fit.
- the full graph (rollout with gradient enabled): the definition that both are tested against.
Self Forcing (arXiv 2506.08009), algorithm 1; Causal-rCM for replayed back-propagation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from causalreel.flow import velocity_to_x0
from causalreel.rollout import Call, Plan, chunked, collect, rollout, truncate
from causalreel.types import Conditioning, Denoise, Denoiser, NoiseSource, ReplayCache


@dataclass
class Record:
    """What a training rollout left: enough to evaluate its exit calls again."""

    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    """What was generated (B,F,C,H,W)."""
    exit_inputs: list[Tensor] = field(default_factory=list)
    """Input of each chunk's exit call."""
    exit_sigmas: list[float] = field(default_factory=list)
    committed: list[Tensor] = field(default_factory=list)
    """Latents as they were written to the cache; equal to what was generated if the context sigma is 0."""
    context_sigma: float = 0.0
    caches: list[ReplayCache] = field(default_factory=list)
    """The context that each exit call read; kept only where asked for."""
    sizes: list[int] = field(default_factory=list)


def training_plan(
    sizes: Sequence[int],
    sigmas: Sequence[float],
    exits: Sequence[int],
    *,
    first: Sequence[float] | None = None,
    context_sigma: float = 0.0,
    commit_last: bool = False,
) -> Plan:
    """The inference plan cut off at the exit steps; `exits[0]` is the first chunk's, the last entry everyone else's."""
    plan = chunked(sizes, sigmas, first=first, context_sigma=context_sigma, commit_last=commit_last)
    return truncate(plan, exits)


def record_rollout(
    student: Denoise,
    plan: Plan,
    *,
    told: Conditioning,
    noise: NoiseSource,
    cache: ReplayCache,
    keep_caches: bool = False,
) -> Record:
    """Run a training plan without gradient and remember its exit calls; `told` is the clip's conditioning."""
    record = Record()

    def observe(call: Call, x: Tensor, velocity: Tensor) -> None:
        if call.grad:
            record.exit_inputs.append(x)
            record.exit_sigmas.append(call.parts[0].sigma)
            record.sizes.append(call.frames)
            if keep_caches:
                record.caches.append(cache.copy())
        elif call.commit:
            record.committed.append(x[:, : call.commit])
            record.context_sigma = call.parts[0].sigma

    with torch.no_grad():
        chunks = rollout(student, plan, conditioning=told, noise=noise, cache=cache, observe=observe)
        record.latents = collect(chunks)
    return record


def parallel_pass(student: Denoiser, record: Record, conditioning: Conditioning) -> Tensor:
    """-> the generated latents (B,F,C,H,W) again, with gradient to the student, from one pass."""
    x = torch.cat(record.exit_inputs, dim=1)
    sigma = _per_frame(record, x)
    # The last chunk's context is read by nobody: any latents will do where it was not committed.
    past = torch.cat(record.committed, dim=1)
    clean = torch.cat([past, record.latents[:, past.shape[1] :]], dim=1)
    clean_sigma = torch.full_like(sigma, record.context_sigma)
    context = student.context_of(clean, conditioning, sizes=record.sizes, clean_sigma=clean_sigma)
    velocity = student.behind(context, x, sigma, conditioning, sizes=record.sizes)
    return velocity_to_x0(x, velocity, sigma)


def replay_passes(student: Denoiser, record: Record, conditioning: Conditioning) -> list[Callable[[], Tensor]]:
    """-> one function per chunk, each giving that chunk's latents (B,k,C,H,W) again with gradient to the student."""
    if not record.caches:
        raise ValueError("replay needs a rollout recorded with keep_caches=True")

    def one(chunk: int, start: int) -> Tensor:
        x = record.exit_inputs[chunk]
        sigma = torch.full(x.shape[:2], record.exit_sigmas[chunk], device=x.device)
        here, cache = conditioning.frames(start, start + x.shape[1]), record.caches[chunk].copy()
        velocity = student(x, sigma, here, sizes=(x.shape[1],), start=start, cache=cache)
        return velocity_to_x0(x, velocity, sigma)

    starts = [sum(record.sizes[:i]) for i in range(len(record.sizes))]
    return [lambda chunk=chunk, start=start: one(chunk, start) for chunk, start in enumerate(starts)]


def _per_frame(record: Record, x: Tensor) -> Tensor:
    levels = [s for s, size in zip(record.exit_sigmas, record.sizes, strict=True) for _ in range(size)]
    return torch.tensor(levels, device=x.device).expand(x.shape[0], -1)  # (B,F)
