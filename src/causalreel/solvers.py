"""One move from sigma to sigma_next, given the velocity at sigma.

A solver is a function that makes the move of one chunk (types.Solver): `renoise` and `euler` keep nothing between
moves, `unipc` (second order) keeps its history in the closure. Arithmetic is float32, or float64 where the state is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from causalreel.types import Move


def _state(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def renoise() -> Move:
    """The consistency sampler: predict the clean latents, then noise them afresh to the next level.

    Few-step students are trained for this move and for no other; it is not a step of an ODE.
    Causal Forcing++ (arXiv 2605.15141), section 2.
    """

    def move(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Callable[[], Tensor]) -> Tensor:
        x = _state(x)
        x0 = x - sigma * velocity.to(x.dtype)
        return x0 if sigma_next == 0 else (1 - sigma_next) * x0 + sigma_next * noise().to(x.dtype)

    return move


def euler() -> Move:
    """x + (sigma_next - sigma) velocity: the probability-flow ODE at first order."""

    def move(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Callable[[], Tensor]) -> Tensor:
        x = _state(x)
        return x + (sigma_next - sigma) * velocity.to(x.dtype)

    return move


def unipc() -> Move:
    """UniPC of order 2 (bh2, clean-estimate form, corrector from the second move, last move of order 1).

    UniPC (arXiv 2302.04867), algorithm 5 with B(h) = expm1(-h). The released AR diffusion sampler uses it on the
    grid of `unipc_sigmas`, with latents in bfloat16 and the conditioning time cut to an integer; here both stay exact.
    """
    history: list[tuple[float, Tensor]] = []  # (half log-SNR, clean estimate) of the last two evaluations
    base: Tensor | None = None  # the state the last move started from, after correction
    last_sigma = math.nan

    def log_snr(sigma: float) -> float:
        return math.log1p(-sigma) - math.log(sigma)

    def move(x: Tensor, velocity: Tensor, sigma: float, sigma_next: float, noise: Callable[[], Tensor]) -> Tensor:
        nonlocal base, last_sigma
        x = _state(x)
        x0 = x - sigma * velocity.to(x.dtype)
        if base is not None:
            x = _correct(base, history, x0, last_sigma, sigma, log_snr(sigma))
        history.append((log_snr(sigma), x0))
        del history[:-2]
        base, last_sigma = x, sigma
        if sigma_next == 0:
            return x0
        h = log_snr(sigma_next) - history[-1][0]
        phi = math.expm1(-h)
        moved = (sigma_next / sigma) * x - (1 - sigma_next) * phi * x0
        if len(history) == 2:
            (before, x0_before), (now, _) = history
            r = (before - now) / h
            moved = moved - (1 - sigma_next) * phi * 0.5 * (x0_before - x0) / r
        return moved

    return move


def _correct(
    base: Tensor, history: list[tuple[float, Tensor]], x0_new: Tensor, sigma: float, sigma_next: float, snr_next: float
) -> Tensor:
    """Redo the move from `base` (at sigma) to sigma_next, now that the clean estimate there is known."""
    now, x0 = history[-1]
    h = snr_next - now
    phi = math.expm1(-h)
    moved = (sigma_next / sigma) * base - (1 - sigma_next) * phi * x0
    if len(history) == 1:
        return moved - (1 - sigma_next) * phi * 0.5 * (x0_new - x0)
    before, x0_before = history[0]
    r = (before - now) / h
    b1 = (phi / -h - 1) / phi
    b2 = 2 * ((phi / -h - 1) / -h - 0.5) / phi
    rho_before = (b1 - b2) / (1 - r)  # rows (1, 1) and (r, 1) of the order conditions
    rho_new = b1 - rho_before
    return moved - (1 - sigma_next) * phi * (rho_before * (x0_before - x0) / r + rho_new * (x0_new - x0))


def unipc_sigmas(steps: int, shift: float, *, sigma_max: float = 0.999) -> tuple[float, ...]:
    """-> steps + 1 noise levels, the last 0: the grid of the released many-step AR sampler (steps 50, shift 5)."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    u = torch.linspace(sigma_max, 0, steps + 1, dtype=torch.float64)[:-1]
    return (*(float(sigma) for sigma in shift * u / (1 + (shift - 1) * u)), 0.0)


SOLVERS = {"renoise": renoise, "euler": euler, "unipc": unipc}
