"""The losses of every stage, as functions of networks, latents and noise that was drawn elsewhere.

Stages draw, these compute; `causalreel verify` calls them with recorded draws. All losses are float32. Conditioning
and noise levels are per sample; `sizes` are the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from causalreel.flow import add_noise, expand, velocity_to_x0
from causalreel.types import Conditioning, Denoise, Denoiser, Differentiable

STEADY = 0.1
"""Added to the length by which `tangent_loss` divides."""


@dataclass(frozen=True)
class NoisyContext:
    """Noise of what a network reads as its context, and its level of every frame: sigma (B,F), noise (B,F,C,H,W)."""

    sigma: Tensor
    noise: Tensor

    def of(self, x0: Tensor) -> dict[str, Tensor]:
        """The arguments of `teacher_forced` for the context that clean latents (B,F,C,H,W) make."""
        return {"clean": add_noise(x0, self.noise, self.sigma), "clean_sigma": self.sigma}


def velocity_loss(velocity: Tensor, x0: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """velocity, x0, noise (B,F,C,H,W), weight (B,F) -> scalar: weighted mean square of velocity - (noise - x0)."""
    error = (velocity.float() - (noise - x0).float()).square().mean((2, 3, 4))  # (B,F)
    return (weight * error).mean()


def bidirectional_loss(
    student: Denoise, x0: Tensor, conditioning: Conditioning, *, sigma: Tensor, noise: Tensor, weight: Tensor
) -> Tensor:
    """Flow matching of whole clips: x0 (B,F,C,H,W), noise levels sigma (B,1) or (B,F), weight as sigma.

    A frame that is given is clean, at level 0, where the velocity to learn would be noise: it needs weight 0.
    """
    velocity = student(add_noise(x0, noise, sigma), sigma, conditioning)
    return velocity_loss(velocity, x0, noise, weight.expand(x0.shape[:2]))


def teacher_forcing_loss(
    student: Denoiser,
    x0: Tensor,
    conditioning: Conditioning,
    *,
    sigma: Tensor,
    noise: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
    clean_sigma: Tensor | None = None,
) -> Tensor:
    """AR diffusion, noisy chunks behind clean ones: x0 (B,F,C,H,W), sigma (B,F) constant in a chunk.

    clean_sigma (B,F): light noise on the context, made of the same noise as in the released code.
    Causal Forcing (arXiv 2602.02214), stage 1; its proposition 3.4 says why not diffusion forcing.
    """
    clean = x0 if clean_sigma is None else add_noise(x0, noise, clean_sigma)
    velocity = student.teacher_forced(
        add_noise(x0, noise, sigma), sigma, conditioning, clean=clean, sizes=sizes, clean_sigma=clean_sigma
    )
    return velocity_loss(velocity, x0, noise, weight)


def diffusion_forcing_loss(
    student: Denoise,
    x0: Tensor,
    conditioning: Conditioning,
    *,
    sigma: Tensor,
    noise: Tensor,
    weight: Tensor,
    sizes: Sequence[int],
) -> Tensor:
    """AR diffusion, noisy chunks behind noisy ones (CausVid, arXiv 2412.07772): the baseline of stage 1."""
    return velocity_loss(student(add_noise(x0, noise, sigma), sigma, conditioning, sizes=sizes), x0, noise, weight)


def ode_regression_loss(predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    """Mean square between the clean estimate at a trajectory's state x (B,F,C,H,W), sigma (B,F), and its end.

    predict: (x, sigma) -> velocity, with context and mask already bound. Causal Forcing (arXiv 2602.02214), stage 2.
    """
    return (velocity_to_x0(x, predict(x, sigma), sigma) - end.float()).square().mean()


def consistency_loss(
    student: Denoiser,
    target: Denoiser,
    teacher: Denoiser,
    x0: Tensor,
    conditioning: Conditioning,
    *,
    sigma: Tensor,
    sigma_next: Tensor,
    noise: Tensor,
    sizes: Sequence[int],
    noisy: tuple[NoisyContext, NoisyContext] | None = None,
) -> Tensor:
    """Causal CD: the student at sigma agrees with the target one teacher step nearer to the data.

    sigma, sigma_next (B,F) or (B,1), neighbours on a grid; sigma_next 0 asks for the teacher's end point itself. The
    context is the true past. Causal Forcing++ (arXiv 2605.15141), eq. 6, with weight 1 and squared distance as
    released. The released code takes the step length from bfloat16 times, up to 64 % off; here it is exact.
    noisy: contexts of the student and of the target, of students that are sampled with noisy context (Causal-rCM, arXiv
    2606.25473); the teacher's is clean.
    """
    x = add_noise(x0, noise, sigma)
    mine, theirs = [{"clean": x0}] * 2 if noisy is None else [context.of(x0) for context in noisy]
    with torch.no_grad():
        velocity = teacher.teacher_forced(x, sigma, conditioning, clean=x0, sizes=sizes)
        x_next = x + expand(sigma_next - sigma, x) * velocity
        goal = velocity_to_x0(
            x_next, target.teacher_forced(x_next, sigma_next, conditioning, sizes=sizes, **theirs), sigma_next
        )
    guess = velocity_to_x0(x, student.teacher_forced(x, sigma, conditioning, sizes=sizes, **mine), sigma)
    return (guess - goal).square().mean()


def tangent_loss(
    student: Differentiable,
    teacher: Denoiser,
    x0: Tensor,
    conditioning: Conditioning,
    *,
    sigma: Tensor,
    noise: Tensor,
    sizes: Sequence[int],
    warm: float = 1.0,
    noisy: NoisyContext | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Causal continuous-time consistency: the student's clean estimate stays along the teacher's path (sCM, arXiv
    2410.11081, as Causal-rCM has it, arXiv 2606.25473) -> the mean over samples of what the velocity should change,
    squared, and metrics.

    sigma (B,F) or (B,1). The change is -(student - teacher + warm sigma d student / d sigma along the path), scaled to
    a length below 1 for every sample, in float64. So the loss is nearly 1 whatever has been learnt: look at `tangent`,
    the change's length before. warm: 0 to 1, how much the derivative counts yet. noisy: the student's context, for
    students that are sampled so. Causal-rCM has 100 times the loss, and leaves out samples that are not finite.
    """
    x = add_noise(x0, noise, sigma)
    how: dict[str, Any] = {"sizes": sizes, **({"clean": x0} if noisy is None else noisy.of(x0))}
    with torch.no_grad():
        goal = teacher.teacher_forced(x, sigma, conditioning, clean=x0, sizes=sizes)
        turn = student.derivative(x, sigma, conditioning, along=goal, **how)
    velocity = student.teacher_forced(x, sigma, conditioning, **how)
    with torch.no_grad():
        change = -(velocity - goal).double() - warm * expand(sigma, x).double() * turn.double()
        length = change.square().sum((1, 2, 3, 4), keepdim=True).sqrt()
        wanted = velocity + (change / (length + STEADY)).float()
    return (velocity - wanted).square().sum((1, 2, 3, 4)).mean(), {"tangent": length.mean()}


def distribution_matching_gradient(
    generated: Tensor,
    real: Denoise,
    fake: Denoise,
    conditioning: Conditioning,
    *,
    sigma: Tensor,
    noise: Tensor,
    given: int = 0,
) -> Tensor:
    """generated (B,F,C,H,W), sigma (B,1) or (B,F) -> what the generated latents should lose, (B,F,C,H,W) float32.

    (fake - real) clean estimates, per sample divided by the mean distance |generated - real|, as in DMD
    (arXiv 2311.18828), eq. 7-8. `real` is guided (scale 4 here is the released `guidance_scale: 3`).
    given: leading frames that the student was given, at level 0: nothing to lose, and no part of the mean.
    """
    with torch.no_grad():
        x = add_noise(generated, noise, sigma)
        fake_x0 = velocity_to_x0(x, fake(x, sigma, conditioning), sigma)
        real_x0 = velocity_to_x0(x, real(x, sigma, conditioning), sigma)
        scale = (generated - real_x0)[:, given:].abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-8)
        return (fake_x0 - real_x0) / scale


def surrogate_loss(generated: Tensor, gradient: Tensor) -> Tensor:
    """A scalar with d/d generated = gradient / numel: half the mean square of what must change."""
    return 0.5 * (generated.float() - (generated.detach().float() - gradient)).square().mean()


def critic_loss(
    critic: Denoise,
    generated: Tensor,
    conditioning: Conditioning,
    *,
    sigma: Tensor,
    noise: Tensor,
    given: int = 0,
) -> Tensor:
    """Flow matching of the critic on generated latents (B,F,C,H,W), sigma (B,1) or (B,F), unweighted.

    given: leading frames that the student was given, at level 0: not learnt.

    The velocity is regressed directly; the released code goes through a clean estimate and two different tables.
    """
    velocity = critic(add_noise(generated, noise, sigma), sigma, conditioning)
    return (velocity - (noise - generated).float())[:, given:].square().mean()
