"""c7: the losses and gradients of the stages before distribution matching, and the trajectories one learns from."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from causalreel.flow import bell_weight, sigma_grid
from causalreel.nn.denoiser import Guided
from causalreel.nn.masks import Context
from causalreel.train.losses import consistency_loss, diffusion_forcing_loss, ode_regression_loss, teacher_forcing_loss
from causalreel.train.trajectories import cached_causal_trajectories, causal_trajectories
from causalreel.verify.case import Case, Findings
from causalreel.verify.cases_distillation import distribution_matching
from causalreel.verify.reference import Released, Table, relabel


def handler(case: Case) -> Callable[[Case, Findings], None] | None:
    """Which stage a case is about, from what it holds; None for one that is unknown."""
    names = case.tensors
    if any(name.startswith("gen_draw.") for name in names):
        return distribution_matching
    if "out.latents_trajectory" in names:
        return trajectories
    if "in.ode_latents" in names:
        return ode_regression
    if "in.clean" not in names:
        return None
    return consistency if "in.negative_prompt_embeds" in names else flow_matching


def flow_matching(case: Case, found: Findings) -> None:
    """Stage 1: teacher forcing, perhaps with light noise on the context, or diffusion forcing."""
    clean, table, drawn = case.tensors["in.clean"], Table(case.shift), case.draws()
    sizes = case.sizes(clean.shape[1])
    noise = next(draw for kind, draw in drawn if kind.startswith("randn"))
    sigma, *light = (_per_chunk(table.sigmas[draw], sizes) for kind, draw in drawn if kind == "randint")
    is_behind_noise = case.get("teacher_forcing") is False or bool(
        re.search("diffusion.forcing", f"{case.name} {case.description}", re.IGNORECASE)
    )
    # The released mask of teacher forcing has no window.
    net = case.network(context=case.context(sink=False) if is_behind_noise else Context())
    student = Released(net, tell=relabel(table.sigmas.tolist(), table.times.tolist()), table=table)
    how = {"sigma": sigma, "noise": noise, "weight": bell_weight(sigma, case.shift), "sizes": sizes}
    if is_behind_noise:
        loss = diffusion_forcing_loss(student, clean, case.conditioning(), **how)
    else:
        loss = teacher_forcing_loss(student, clean, case.conditioning(), clean_sigma=light[0] if light else None, **how)
    loss.backward()
    (log,) = student.log
    found.add("out.loss", loss)
    found.add("out.timestep", log.time)
    found.add("out.noisy", log.x)
    found.add("out.flow_pred", log.velocity)
    found.add("out.x0_pred", log.x0)
    if light:
        found.add("out.aug_timestep", table.times[table.nearest(1000 * light[0])])
        found.add("out.clean_aug", lambda: log.clean)
    found.add_gradients("out.grad", "grad", net.model)


def ode_regression(case: Case, found: Findings) -> None:
    """Stage 2a: entries of a stored trajectory are its states at the steps, its end, and the true clip."""
    stored, table = case.tensors["in.ode_latents"], Table(case.shift)  # (B,S,F,C,H,W)
    steps = case.steps(default=[1000, 750, 500, 250])
    times = table.released_times(steps or [], warp=case.get("warp_denoising_step", default=True))
    ((_, draw),) = case.draws()
    index = draw.expand(-1, stored.shape[2])  # (B,F)
    x = stored[torch.arange(len(stored))[:, None], index, torch.arange(stored.shape[2])]
    sizes, end, clean = case.sizes(stored.shape[2]), stored[:, -2], stored[:, -1]
    levels = table.levels(times)
    net = case.network()
    student = Released(net, tell=relabel(levels, times), table=table)

    def predict(x: Tensor, sigma: Tensor) -> Tensor:
        return student.teacher_forced(x, sigma, case.conditioning(), clean=clean, sizes=sizes)

    loss = ode_regression_loss(predict, x, torch.tensor(levels)[index], end)
    loss.backward()
    (log,) = student.log
    found.add("out.loss", loss)
    found.add("out.selected_noisy", log.x)
    found.add("out.x0_pred", log.x0)
    found.add("out.timestep", log.time)
    found.add("out.timestep_mean", log.time.mean(1))
    found.add_gradients("out.grad", "grad", net.model)


def consistency(case: Case, found: Findings) -> None:
    """Stage 2b: noise levels of a short grid, converted with the table of 1000."""
    clean, table, drawn = case.tensors["in.clean"], Table(case.shift), case.draws()
    index = next(draw for kind, draw in drawn if kind in ("randrange", "randint")).reshape(-1, 1)
    noise = next(draw for kind, draw in drawn if kind.startswith("randn"))
    grid = Table(case.shift, _grid_steps(case))
    levels, times = [*grid.sigmas.tolist(), 0.0], [*grid.times.tolist(), 0.0]
    sizes, tell = case.sizes(clean.shape[1]), relabel(levels, times)

    net, guidance = case.network(), float(case.get("guidance_scale", default=1.0))
    student = Released(net, tell=tell, table=table)
    target = Released(case.network("critic"), tell=tell, table=table)
    both_rows = Released(case.network("teacher"), tell=tell)
    teacher = Guided(both_rows, case.conditioning("in.negative_prompt_embeds"), guidance)
    sigma, sigma_next = (torch.tensor(levels)[i].expand(len(clean), clean.shape[1]) for i in (index, index + 1))
    loss = consistency_loss(
        student,
        target,
        teacher,
        clean,
        case.conditioning(),
        sigma=sigma,
        sigma_next=sigma_next,
        noise=noise,
        sizes=sizes,
    )
    loss.backward()

    (guess,), (goal,), (teaching,) = student.log, target.log, both_rows.log
    cond, uncond = teaching.velocity.chunk(2)
    found.add("out.loss", loss)
    found.add("out.loss_per_sample", (guess.x0 - goal.x0).square().mean((1, 2, 3, 4)))
    for name, log in (("", guess), ("_next", goal)):
        found.add(f"out.t{name}", log.time)
        found.add(f"out.latent_t{name}", log.x)
    found.add("out.student_x0", guess.x0)
    found.add("out.target_x0", goal.x0)
    found.add("out.teacher_flow_cond", cond)
    found.add("out.teacher_flow_uncond", uncond)
    found.add_gradients("out.grad", "grad", net.model)


def trajectories(case: Case, found: Findings) -> None:
    """Guided Euler behind the true past: all chunks at once and chunk by chunk must both meet the recorded states."""
    clean, noise = case.tensors["in.clean"], case.tensors["in.noise"]
    steps = int(case.get("steps", default=48))
    sigmas, sizes = sigma_grid(steps, case.shift), case.sizes(clean.shape[1])
    times = Table(case.shift, steps).times.tolist()
    kept = case.extra.get("kept_indices") or [*range(0, steps, max(steps // 4, 1)), steps, "clean"]
    teacher = Guided(
        case.network(), case.conditioning("in.negative_prompt_embeds"), float(case.get("guidance_scale", default=1.0))
    )
    tell = relabel(sigmas[:-1].tolist(), times)
    found.add("out.timesteps", 1000 * sigmas[:-1])
    for way, integrate in (("full", causal_trajectories), ("cached", cached_causal_trajectories)):
        states = integrate(
            Released(teacher, tell=tell),
            clean,
            case.conditioning(),
            noise=noise,
            sizes=sizes,
            sigmas=sigmas.tolist(),
            keep=[index for index in kept if index != "clean"],
        )
        entries = [*states.unbind(1), *[clean] * kept.count("clean")]
        found.add("out.latents_trajectory", torch.stack(entries, dim=1), via=way)


def _per_chunk(levels: Tensor, sizes: list[int]) -> Tensor:
    """Levels drawn frame by frame (B,F) -> each chunk's first, for all its frames."""
    if levels.shape[1] == 1:
        return levels.expand(-1, sum(sizes))
    starts = torch.tensor([sum(sizes[:i]) for i in range(len(sizes))])
    return levels[:, starts].repeat_interleave(torch.tensor(sizes), dim=1)


def _grid_steps(case: Case) -> int:
    """Steps of the consistency grid: a setting, or the description's "48-step grid"."""
    stated = case.get("discrete_cd_N", "grid_steps", "steps")
    said = re.search(r"(\d+)-step grid", case.description)
    return int(stated or (said[1] if said else 48))
