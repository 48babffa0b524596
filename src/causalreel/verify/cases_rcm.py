"""c19: the training losses of Causal-rCM. It sums over samples and frames where we take means."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from causalreel.flow import expand, guide, shift_sigma
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.train.losses import (
    STEADY,
    NoisyContext,
    consistency_loss,
    critic_loss,
    distribution_matching_gradient,
    surrogate_loss,
    tangent_loss,
    teacher_forcing_loss,
)
from causalreel.train.self_rollout import Record, parallel_pass, record_rollout, replay_passes, training_plan
from causalreel.verify.case import Case, Findings
from causalreel.verify.reference import RecordedNoise, Released, in_float32


def handler(case: Case) -> Callable[[Case, Findings], None] | None:
    """Which loss a case is about; None for one that is unknown."""
    losses = {"tf": flow_matching, "tf_dcm": consistency, "tf_scm": tangents, "sf_dmd": distribution_matching}
    return losses.get(str(case.get("loss")))


class Clip:
    """What the three losses behind a clip share: sizes, networks, draws, and what becomes of our numbers."""

    def __init__(self, case: Case, found: Findings) -> None:
        self.case, self.found = case, found
        self.clean = case.tensors["in.clean"]
        self.sizes, self.drawn = case.sizes(self.clean.shape[1]), case.draws()
        self.net = case.network()
        self.student = Released(self.net, tell=in_float32)
        self.scale = float(case.get("loss_scale", default=100.0))

    def draw(self, kind: str) -> Tensor:
        """The first draw of this kind."""
        return next(value for name, value in self.drawn if name == kind)

    def teacher(self) -> tuple[Guided, Released]:
        """The guided teacher, and what it is made of, which logs both rows of its calls."""
        rows = Released(self.case.network("teacher"), tell=in_float32)
        return Guided(rows, self.case.conditioning("in.negative_prompt_embeds"), _guidance(self.case)), rows

    def contexts(self) -> list[NoisyContext]:
        """Noisy contexts in the order of their draws; none where the context is clean."""
        if not self.case.get("context_from_last_step", default=False):
            return []
        level = float(self.case.get("context_sigma", default=0.0))
        noisy_from = int(self.case.get("context_from_last_step_start_chunk", default=0))
        levels = [level if chunk >= noisy_from else 0.0 for chunk, size in enumerate(self.sizes) for _ in range(size)]
        sigma = torch.tensor(levels).expand(len(self.clean), -1)
        return [NoisyContext(sigma, noise) for kind, noise in self.drawn if kind == "randn_like"]

    def summed(self, loss: Tensor) -> Tensor:
        """The loss as it is reported there, of ours, a mean over samples and frames; with the gradients of it."""
        total = self.scale * self.clean.shape[0] * self.clean.shape[1] * loss
        total.backward()
        self.report(total)
        return total

    def report(self, total: Tensor) -> None:
        found, (log, *_), contexts = self.found, self.student.log, self.contexts()
        sigma = contexts[0].sigma if contexts else torch.zeros(self.clean.shape[:2])
        found.add("out.loss", total)
        found.add("out.student_velocity", log.velocity)
        found.add("out.timestep", log.time[:, 0])
        found.add("out.noisy_input", log.x)
        found.add("out.context_input", lambda: log.clean)
        found.add("out.context_timestep", (1000 * sigma.double()).float())
        found.add_gradients("out.grad", "grad", self.net.model)

    def report_teacher(self, rows: Released) -> Tensor:
        """-> its guided velocity."""
        velocity = _guided(rows, self.case)
        self.found.add("out.teacher_velocity", velocity)
        return velocity


def _guidance(case: Case) -> float:
    return float(case.get("guidance_scale", default=1.0))


def _guided(rows: Released, case: Case) -> Tensor:
    """The guided velocity of the first call, which was made of both rows."""
    cond, uncond = rows.log[0].velocity.chunk(2)
    return guide(cond, uncond, _guidance(case))


def _squares(guess: Tensor, goal: Tensor) -> Tensor:
    """(B,F,C,H,W) -> each sample's sum over frames of the mean square (B,)."""
    return (guess - goal).square().mean((2, 3, 4)).sum(1)


def flow_matching(case: Case, found: Findings) -> None:
    """Stage 1, one noise level for all of a clip; the bell there begins at 0 and has no mean of its own."""
    clip = Clip(case, found)
    sigma, noise = shift_sigma(clip.draw("rand").double(), case.shift).expand(clip.clean.shape[:2]), clip.draw("randn")
    weight = torch.exp(-2 * (sigma - 0.5) ** 2) - math.exp(-0.5)
    loss = teacher_forcing_loss(
        clip.student, clip.clean, case.conditioning(), sigma=sigma, noise=noise, weight=weight, sizes=clip.sizes
    )
    clip.summed(loss)
    each = _squares(clip.student.log[0].velocity, noise - clip.clean)
    found.add("out.loss_per_sample", clip.scale * weight[:, 0] * each)


def consistency(case: Case, found: Findings) -> None:
    """Stage 2b with levels of a continuous range, against the student itself."""
    clip = Clip(case, found)
    step = int(case.get("skipping_interval_steps", default=1)) / int(case.get("total_steps", default=48))
    u = clip.draw("rand") * (1 - step)  # in float32, unlike the levels of the other losses
    levels = (shift_sigma(s, case.shift) for s in (1 - u, (1 - (u + step)).clamp_min(0)))
    sigma, sigma_next = (level.expand(clip.clean.shape[:2]) for level in levels)
    target, (teacher, rows), contexts = Released(clip.net, tell=in_float32), clip.teacher(), clip.contexts()
    loss = consistency_loss(
        clip.student,
        target,
        teacher,
        clip.clean,
        case.conditioning(),
        sigma=sigma,
        sigma_next=sigma_next,
        noise=clip.draw("randn"),
        sizes=clip.sizes,
        noisy=(contexts[0], contexts[1]) if contexts else None,
    )
    clip.summed(loss)
    (goal,) = target.log
    found.add("out.loss_per_sample", clip.scale * _squares(clip.student.log[0].x0, goal.x0))
    found.add("out.target_velocity", goal.velocity)
    found.add("out.timestep_next", goal.time[:, 0])
    found.add("out.noisy_input_next", goal.x)
    clip.report_teacher(rows)


def tangents(case: Case, found: Findings) -> None:
    """Stage 2c. Ours is a mean over samples of sums over all else, theirs a sum of both."""
    clip = Clip(case, found)
    level, noise = (value.double() for kind, value in clip.drawn if kind == "randn")
    drawn = float(case.get("p_mean", default=-0.8)) + float(case.get("p_std", default=1.6)) * level
    (teacher, rows), contexts = clip.teacher(), clip.contexts()
    turns: list[Tensor] = []

    class Watched(Released):
        def derivative(self, x: Tensor, sigma: Tensor, conditioning: Any, **how: Any) -> Tensor:
            turns.append(super().derivative(x, sigma, conditioning, **how))
            return turns[-1]

    clip.student = Watched(clip.net, tell=in_float32)
    sigma = (drawn.exp() / (1 + drawn.exp())).expand(clip.clean.shape[:2])
    warm = float(case.get("warmup_ratio", default=1.0))
    loss, _ = tangent_loss(
        clip.student,
        teacher,
        clip.clean,
        case.conditioning(),
        sigma=sigma,
        noise=noise,
        sizes=clip.sizes,
        warm=warm,
        noisy=contexts[0] if contexts else None,
    )
    total = clip.scale * len(clip.clean) * loss
    total.backward()
    clip.report(total)
    found.add("out.student_jvp", turns[0])
    goal = clip.report_teacher(rows)
    change = (goal - clip.student.log[0].velocity).double() - warm * expand(sigma, goal) * turns[0].double()
    length = change.flatten(1).norm(dim=1)
    found.add("out.loss_per_sample", clip.scale * (length / (length + STEADY)).square().float())


# ---- stage 3


class Rolled:
    """A rollout of recorded draws: whole clips of noise, a step's each, then that of contexts that are noised."""

    def __init__(self, case: Case, prefix: str) -> None:
        draws = [value for _, value in case.draws(prefix)]
        self.counts = [int(count) for count in case.config["steps_this_iteration"]]
        most = [int(count) for count in case.config["max_steps_per_chunk"]]
        lists = [(1.0, *(float(s) for s in levels)) for levels in case.config["mid_t_schedules"]]
        self.lists = [levels[:count] for levels, count in zip(lists, most, strict=True)]
        self.sizes = case.sizes(draws[0].shape[1])
        is_noisy = bool(case.get("context_from_last_step", default=False))
        self.noisy_from = int(case.get("context_from_last_step_start_chunk", default=0)) if is_noisy else None
        *drawn, self.score, self.score_noise = draws
        self.steps, self.contexts = drawn[: max(self.counts)], drawn[max(self.counts) :]

    def noise(self) -> RecordedNoise:
        """Draws in our order: chunk by chunk, its steps' and then its context's."""
        pieces, contexts, start = list[Tensor](), list(self.contexts), 0
        for chunk, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            pieces += [noise[:, start : start + size] for noise in self.steps[1:count]]
            is_last, is_noisy = chunk + 1 == len(self.sizes), self.noisy_from is not None and chunk >= self.noisy_from
            if is_noisy and count < len(self.lists[min(chunk, len(self.lists) - 1)]) and contexts:
                drawn = contexts.pop(0)
                pieces += [] if is_last else [drawn]  # nobody reads the last one
            start += size
        return RecordedNoise(self.steps[0], pieces)

    def record(self, student: Released, case: Case, *, keep_caches: bool = False) -> Record:
        exits = [count - 1 for count in self.counts]
        plan = training_plan(self.sizes, self.lists, exits, noisy_from=self.noisy_from)
        noise = self.noise()
        how: dict[str, Any] = {"told": case.conditioning(), "noise": noise, "cache": student.new_cache()}
        record = record_rollout(student, plan, keep_caches=keep_caches, **how)
        noise.finish()
        return record


def distribution_matching(case: Case, found: Findings) -> None:
    """Stage 3: as many steps as this iteration's, and the sum of squares in place of half their mean."""
    run, net = Rolled(case, "gen_draw"), case.network()
    student = Released(net, tell=in_float32)
    record = run.record(student, case, keep_caches=True)
    shift = float(case.get("shift_D", default=5.0))
    sigma = shift_sigma(run.score.double(), shift)
    rows = Released(case.network("teacher"), tell=in_float32)
    real = Guided(rows, case.conditioning("in.negative_prompt_embeds"), _guidance(case))
    fake = Released(case.network("critic"), tell=in_float32)
    gradient = distribution_matching_gradient(
        record.latents, real, fake, case.conditioning(), sigma=sigma, noise=run.score_noise
    )
    found.add("out.real_velocity", _guided(rows, case))
    ways: dict[str, Callable[[], Tensor]] = {
        "parallel pass": lambda: parallel_pass(student, record, case.conditioning()),
        "replay": lambda: _replayed(student, record, case),
    }
    for way, again in ways.items():
        latents = again()
        loss = 2 * latents.numel() * surrogate_loss(latents, gradient)
        loss.backward()
        found.add("out.generated", latents, via=way)
        found.add("out.loss", loss, via=way)
        found.add_gradients("out.grad", "grad", net.model, via=way)
    _critic(case, found, net, shift)


def _replayed(student: Released, record: Record, case: Case) -> Tensor:
    pieces: Sequence[Callable[[], Tensor]] = replay_passes(student, record, case.conditioning())
    return torch.cat([piece() for piece in pieces], dim=1)


def _critic(case: Case, found: Findings, net: DiTDenoiser, shift: float) -> None:
    run, critic = Rolled(case, "critic_draw"), case.network("critic")
    generated = run.record(Released(net, tell=in_float32), case).latents
    loss = critic_loss(
        Released(critic, tell=in_float32),
        generated,
        case.conditioning(),
        sigma=shift_sigma(run.score.double(), shift),
        noise=run.score_noise,
    )
    loss.backward()
    found.add("out.critic_generated", generated)
    found.add("out.critic_loss", loss)
    found.add_gradients("out.critic_grad", "critic_grad", critic.model)
