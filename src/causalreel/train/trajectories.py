"""Teacher trajectories for ODE regression: states of the probability-flow ODE on the way from noise to a clip.

Causal trajectories integrate an AR teacher behind the *true* past, so each chunk's map from noise to latents is
injective; bidirectional ones integrate whole clips and are not, chunk by chunk.
Causal Forcing (arXiv 2602.02214), stage 2 and proposition 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from causalreel.solvers import euler
from causalreel.types import Conditioning, Denoiser


@torch.no_grad()
def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Sequence[float], keep: Sequence[int]
) -> Tensor:
    """Euler from noise (B,F,C,H,W) over the grid `sigmas` (falling to 0) -> states (B,S,F,C,H,W) at indices `keep`.

    velocity: (x, sigma (B,1)) -> velocity, with context, guidance and mask already bound.
    """
    if sorted(keep) != list(keep) or not keep or keep[-1] >= len(sigmas):
        raise ValueError(f"keep must rise within the grid's 0..{len(sigmas) - 1}, got {list(keep)}")
    move, x, states = euler(), noise.float(), []
    for index, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        if index in keep:
            states.append(x)
        level = torch.full((x.shape[0], 1), sigma, device=x.device)
        x = move(x, velocity(x, level), sigma, sigma_next, lambda x=x: x)
    if len(sigmas) - 1 in keep:
        states.append(x)
    return torch.stack(states, dim=1)


def causal_trajectories(
    teacher: Denoiser,
    clean: Tensor,
    conditioning: Conditioning,
    *,
    noise: Tensor,
    sizes: Sequence[int],
    sigmas: Sequence[float],
    keep: Sequence[int],
) -> Tensor:
    """All chunks at once, each behind its true past, whose keys are computed once -> (B,S,F,C,H,W)."""
    context = teacher.context_of(clean, conditioning, sizes=sizes)

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return teacher.behind(context, x, sigma, conditioning, sizes=sizes)

    return integrate(velocity, noise, sigmas, keep)


@torch.no_grad()
def cached_causal_trajectories(
    teacher: Denoiser,
    clean: Tensor,
    conditioning: Conditioning,
    *,
    noise: Tensor,
    sizes: Sequence[int],
    sigmas: Sequence[float],
    keep: Sequence[int],
) -> Tensor:
    """The same states chunk by chunk behind a cache of true frames: cheaper where context is long -> (B,S,F,C,H,W)."""
    cache, start, found = teacher.new_cache(), 0, []
    for size in sizes:
        here = slice(start, start + size)
        own = conditioning.frames(start, start + size)

        velocity = partial(teacher, conditioning=own, sizes=(size,), start=start, cache=cache)
        found.append(integrate(velocity, noise[:, here], sigmas, keep))
        velocity(clean[:, here], torch.zeros_like(clean[:, here, 0, 0, 0]))
        cache.commit(size)
        start += size
    return torch.cat(found, dim=2)
