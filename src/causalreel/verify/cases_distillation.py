"""c7: distribution matching on the student's own rollout, three ways to its gradient, and the critic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.rollout import Plan, collect, rollout
from causalreel.train.losses import critic_loss, distribution_matching_gradient, surrogate_loss
from causalreel.train.self_rollout import Record, parallel_pass, record_rollout, replay_passes, training_plan
from causalreel.types import Conditioning, Denoiser
from causalreel.verify.case import Case, Findings
from causalreel.verify.reference import SCORE_SHIFT, RecordedNoise, Released, Table, always, relabel, score_time


@dataclass(frozen=True)
class Draws:
    """Recorded draws of one pass: a rollout's noise and exit steps, then the scores' time and noise."""

    initial: Tensor
    renoise: list[Tensor]
    exits: list[Tensor]
    score: Tensor
    score_noise: Tensor

    @classmethod
    def read(cls, case: Case, prefix: str) -> Draws:
        """Order: number of chunks, initial noise, exit steps, a draw a move, score time (B,1), score noise."""
        drawn = case.draws(prefix)
        first = next(i for i, (kind, _) in enumerate(drawn) if kind.startswith("randn"))
        rest = drawn[first + 1 :]
        whole = [draw for kind, draw in rest if kind == "randint"]
        noise = [draw for kind, draw in rest if kind.startswith("randn")]
        return cls(drawn[first][1], noise[:-1], whole[:-1], whole[-1], noise[-1])


class SelfRollout:
    """The released training rollout: context is noised with the table's last entry, and the network conditioning 0."""

    def __init__(self, case: Case, draws: Draws) -> None:
        self.case, self.draws, self.table = case, draws, Table(case.shift)
        warp = case.get("warp_denoising_step", default=True)
        times = self.table.released_times(case.steps() or [], warp=warp)
        first = case.steps("first_chunk_steps")
        first_times = None if first is None else self.table.released_times(first, warp=warp)
        context_time = float(case.get("context_noise", default=0))
        (self.context_level,) = self.table.levels([context_time])
        self.levels = self.table.levels(times)
        self.first = None if first_times is None else self.table.levels(first_times)
        everything = [*times, *(first_times or [])]
        self.tell = relabel((*self.table.levels(everything), self.context_level), (*everything, context_time))

    def student(self, net: DiTDenoiser) -> Released:
        return Released(net, tell=self.tell, table=self.table)

    def noise(self) -> RecordedNoise:
        return RecordedNoise(self.draws.initial, self.draws.renoise)

    def plan(self) -> Plan:
        """Exit steps were drawn per chunk, but the first of a list holds for all, unless the case says otherwise."""
        same = self.case.get("same_step_across_blocks", default=True)
        exits = [int(step) for drawn in self.draws.exits for step in (drawn[:1] if same else drawn)]
        sizes = self.case.sizes(self.draws.initial.shape[1])
        return training_plan(
            sizes, self.levels, exits, first=self.first, context_sigma=self.context_level, commit_last=True
        )

    def record(self, student: Released, conditioning: Conditioning, *, keep_caches: bool = False) -> Record:
        noise = self.noise()
        record = record_rollout(
            student, self.plan(), told=conditioning, noise=noise, cache=student.new_cache(), keep_caches=keep_caches
        )
        noise.finish()
        return record

    def scores_at(self) -> tuple[Tensor, Tensor]:
        """-> time (B,1) conditioning to the scores, and the noise level (B,1) of their input."""
        time = score_time(self.draws.score, self.case.shift).reshape(-1, 1)
        return time, self.table.sigma_at(time)


def distribution_matching(case: Case, found: Findings) -> None:
    """Stage 3: generator update, then critic update, each with its own draws."""
    # The released gradient leaks between chunks through its cache; ours is that of constant context.
    found.left_out = ("out.grad_reference_as_is.",)
    _generator(case, found)
    _critic(case, found)


def _generator(case: Case, found: Findings) -> None:
    run, conditioning = SelfRollout(case, Draws.read(case, "gen_draw")), case.conditioning()
    net = case.network(context=case.context(sink=True))
    student = run.student(net)
    record = run.record(student, conditioning, keep_caches=True)
    calls = list(run.plan())
    found.add("out.calls.timestep", torch.stack([log.time[0, 0] for log in student.log]))
    found.add("out.calls.start_frame", torch.tensor([call.start for call in calls]))
    found.add("out.calls.with_grad", torch.tensor([call.grad for call in calls]))

    gradient = _score_gradient(case, found, run, record.latents)
    generated = record.latents.clone().requires_grad_()
    loss = surrogate_loss(generated, gradient)
    loss.backward()
    found.add("out.generator_loss", loss)
    found.add("out.generated_grad", lambda: generated.grad)

    def full_graph() -> Tensor:
        chunks = rollout(student, run.plan(), conditioning=conditioning, noise=run.noise(), cache=student.new_cache())
        return collect(chunks)

    ways: dict[str, Callable[[], Tensor]] = {
        "full graph": full_graph,
        "parallel pass": lambda: parallel_pass(student, record, conditioning),
    }
    for way, again in ways.items():
        latents = again()
        found.add("out.generated", latents, via=way)
        surrogate_loss(latents, gradient).backward()
        _add_gradients(found, net, way)
    parts = []
    for part, goal in zip(
        replay_passes(student, record, conditioning), gradient.split(record.sizes, dim=1), strict=True
    ):
        latents = part()
        (surrogate_loss(latents, goal) * (goal.numel() / gradient.numel())).backward()
        parts.append(latents.detach())
    found.add("out.generated", torch.cat(parts, dim=1), via="replay")
    _add_gradients(found, net, "replay")


def _add_gradients(found: Findings, net: DiTDenoiser, way: str) -> None:
    found.add_gradients("out.grad_detached_context", "grad_detached_context", net.model, via=way)


def _score_gradient(case: Case, found: Findings, run: SelfRollout, generated: Tensor) -> Tensor:
    """-> what the generated latents should lose (B,F,C,H,W)."""
    time, sigma = run.scores_at()
    table, tell = Table(float(case.get("score_shift", default=SCORE_SHIFT))), always(time)
    real = _guided(case, "teacher", float(case.get("real_guidance_scale", "guidance_scale", default=0.0)))
    fake = _guided(case, "critic", float(case.get("fake_guidance_scale", default=0.0)))
    real, fake = Released(real, tell=tell, table=table), Released(fake, tell=tell, table=table)
    gradient = distribution_matching_gradient(
        generated, real, fake, case.conditioning(), sigma=sigma, noise=run.draws.score_noise
    )
    found.add("out.score_timestep", time.expand(generated.shape[:2]))
    found.add("out.score_noisy", fake.log[0].x)
    found.add("out.dmd_gradient", gradient)
    found.add("out.dmd_gradient_abs_mean", gradient.abs().mean())
    return gradient


def _guided(case: Case, role: str, scale: float) -> Denoiser:
    """The released scale of a score is cond + scale (cond - uncond): one less than ours."""
    net = case.network(role)
    return net if scale == 0 else Guided(net, case.conditioning("in.negative_prompt_embeds"), 1 + scale)


def _critic(case: Case, found: Findings) -> None:
    if not case.draws("critic_draw"):
        return
    run, conditioning = SelfRollout(case, Draws.read(case, "critic_draw")), case.conditioning()
    net = case.network(context=case.context(sink=True))
    generated = run.record(run.student(net), conditioning).latents
    time, sigma = run.scores_at()
    table = Table(float(case.get("score_shift", default=SCORE_SHIFT)))
    critic = case.network("critic")
    loss = critic_loss(
        Released(critic, tell=always(time), table=table),
        generated,
        conditioning,
        sigma=sigma,
        noise=run.draws.score_noise,
    )
    loss.backward()
    found.add("out.critic_generated", generated)
    found.add("out.critic_timestep", time.expand(generated.shape[:2]))
    found.add("out.critic_loss", loss)
    found.add_gradients("out.critic_grad", "critic_grad", critic.model)
