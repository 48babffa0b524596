"""Flow matching in a dozen functions: noise levels, the interpolant, and what a velocity says about the clean latents.

The noise level `sigma` in [0, 1] is the only time variable: x = (1 - sigma) x0 + sigma noise, velocity = noise - x0.
All arithmetic here is float32. Source: Causal Forcing (arXiv 2602.02214), section 2; Wan2.1 for the shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

SCORE_SIGMA_RANGE = (0.02, 0.98)
"""Noise levels at which distribution matching asks the scores; outside they say little (released code: 20 to 980)."""


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """u in [0,1], any shape -> sigma = shift u / (1 + (shift - 1) u): more of the unit interval at high noise."""
    return shift * u / (1 + (shift - 1) * u)


def unshift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """The inverse of `shift_sigma`."""
    return sigma / (shift - (shift - 1) * sigma)


def sigma_grid(steps: int, shift: float) -> Tensor:
    """-> (steps + 1,) float32, from 1 down to 0: the grid of trajectories and of consistency distillation."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift_sigma(u, shift).float()


def warp_steps(steps: Sequence[float], shift: float) -> tuple[float, ...]:
    """A released step list such as (1000, 750, 500, 250) -> noise levels (1, 0.9375, 0.8333, 0.625) at shift 5."""
    if not steps or any(not 0 < s <= 1000 for s in steps) or any(a <= b for a, b in pairwise(steps)):
        raise ValueError(f"steps must fall strictly and lie in (0, 1000], got {list(steps)}")
    return tuple(float(sigma) for sigma in shift_sigma(torch.tensor(steps, dtype=torch.float64) / 1000, shift))


def expand(sigma: Tensor, like: Tensor) -> Tensor:
    """sigma (B,F) -> (B,F,1,1,1) float32, ready to multiply latents."""
    return sigma.float().reshape(*sigma.shape, *[1] * (like.ndim - sigma.ndim))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x0, noise (B,F,C,H,W), sigma (B,F) or (B,1) -> x at sigma, float32."""
    s = expand(sigma, x0)
    return (1 - s) * x0.float() + s * noise.float()


def velocity_to_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """x, velocity (B,F,C,H,W), sigma (B,F) -> clean estimate, float32.

    The released code converts in float64 with the nearest entry of a 1000-entry table; this is the closed form.
    """
    return x.float() - expand(sigma, x) * velocity.float()


def x0_to_velocity(x: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """x, x0 (B,F,C,H,W), sigma (B,F) > 0 -> velocity, float32."""
    return (x.float() - x0.float()) / expand(sigma, x)


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: uncond + scale (cond - uncond); scale 1 is none. The only place that computes it."""
    return uncond + scale * (cond - uncond)


def bell_weight(sigma: Tensor, shift: float) -> Tensor:
    """sigma, any shape -> training weight exp(-2 (sigma - 1/2)^2), less its minimum, mean 1 over the 1000-step grid.

    The weight of stage 1 in the released code. It is 0 at sigma 1, where a one-step student starts: `uniform_weight`
    is the alternative.
    """
    grid = shift_sigma(1 - torch.arange(1000, dtype=torch.float64) / 1000, shift)
    bell = torch.exp(-2 * (grid - 0.5) ** 2)
    scale = 1000 / (bell - bell.min()).sum()
    return (torch.exp(-2 * (sigma.float() - 0.5) ** 2) - bell.min().item()) * scale.item()


def uniform_weight(sigma: Tensor, shift: float) -> Tensor:
    """sigma, any shape -> ones."""
    del shift
    return torch.ones_like(sigma, dtype=torch.float32)
