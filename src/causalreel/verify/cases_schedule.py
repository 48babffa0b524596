"""c6: grids, step lists, weights, conversions and the multistep solver, without a network."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from causalreel.flow import add_noise, bell_weight, sigma_grid, velocity_to_x0, x0_to_velocity
from causalreel.solvers import euler, unipc, unipc_sigmas
from causalreel.verify.case import Case, Findings
from causalreel.verify.cases_rollout import warped
from causalreel.verify.reference import Table, score_time


def schedules(case: Case, found: Findings) -> None:
    """Everything is decided from the outputs' names: grid<K>_shift<s>, warped_shift<s>.<list>, unipc<K>, ..."""
    for name in [name for name in case.tensors if name.startswith("out.")]:
        if match := re.fullmatch(r"out\.(?:grid|euler_)(\d+)_shift([\d.]+?)\.(\w+)", name):
            _grid(found, name, int(match[1]), float(match[2]), match[3])
        elif match := re.fullmatch(r"out\.unipc_(\d+)_shift([\d.]+?)\.(\w+)", name):
            _unipc_grid(found, name, int(match[1]), float(match[2]), match[3])
        elif match := re.fullmatch(r"out\.warped_shift([\d.]+?)\.([\d_]+)", name):
            found.add(name, warped([float(step) for step in match[2].split("_")], float(match[1])))
        elif name == "out.dmd_score_timestep_from_uniform_int":
            found.add(name, score_time(torch.arange(len(case.tensors[name])), case.shift))
    if "in.t" in case.tensors:
        _conversions(case, found)
    for name in [name for name in case.tensors if re.fullmatch(r"in\.unipc\d+\.x_init", name)]:
        _unipc(case, found, name.split(".")[1])


def _grid(found: Findings, name: str, steps: int, shift: float, kind: str) -> None:
    sigmas = sigma_grid(steps, shift)[:-1]
    times = (1000 * sigmas).bfloat16()
    known = {
        "sigmas": lambda: sigmas,
        "timesteps": lambda: 1000 * sigmas,
        "training_weights": lambda: bell_weight(sigmas, shift),
        "timesteps_bf16": lambda: times.float(),
        "dt_bf16": lambda: (times[:-1] - times[1:]).float(),
    }
    if kind in known and (kind != "training_weights" or steps == 1000):
        found.add(name, known[kind])


def _unipc_grid(found: Findings, name: str, steps: int, shift: float, kind: str) -> None:
    sigmas = torch.tensor(unipc_sigmas(steps, shift))
    if kind in ("sigmas", "timesteps"):
        found.add(name, sigmas if kind == "sigmas" else (1000 * sigmas[:-1]).long())


def _conversions(case: Case, found: Findings) -> None:
    """The core's formulas at the levels that the released table gives for times between its entries."""
    time, x0, noise, velocity = (case.tensors[f"in.{name}"] for name in ("t", "x0", "noise", "velocity"))
    table = Table(case.shift)
    index = table.nearest(time)
    sigma = table.sigmas[index]
    found.add("out.add_noise", add_noise(x0, noise, sigma))
    found.add("out.training_weight", bell_weight(sigma, case.shift))
    found.add("out.training_target", noise - x0)
    found.add("out.velocity_to_x0", velocity_to_x0(noise, velocity, sigma))
    found.add("out.x0_to_velocity", lambda: x0_to_velocity(noise, x0, sigma))
    # The released Euler step ends at 0 for all rows as soon as one row is at the table's end.
    is_last = index + 1 == len(table.sigmas)
    after = torch.cat([table.sigmas, torch.zeros(1)])[index + 1] * ~is_last.any()
    rows = zip(x0, velocity, sigma.tolist(), after.tolist(), strict=True)
    found.add("out.euler_step", torch.stack([euler()(x, v, now, later, lambda x=x: x) for x, v, now, later in rows]))


def _unipc(case: Case, found: Findings, key: str) -> None:
    """A trajectory under a known velocity field, and again under the recorded velocities."""
    sigmas = unipc_sigmas(int(key.removeprefix("unipc")), case.shift)
    times = (1000 * torch.tensor(sigmas[:-1])).long()
    start, matrix = case.tensors[f"in.{key}.x_init"], case.tensors[f"in.{key}.matrix"]
    recorded = case.tensors.get(f"out.{key}.velocities")

    def field(x: Tensor, step: int) -> Tensor:  # channels mixed and squashed, and the input in proportion to the time
        return torch.einsum("ij,bfjhw->bfihw", matrix, x).tanh() + times[step] / 1000 * x

    states, velocities = _integrate(start, sigmas, field)
    found.add(f"out.{key}.sigmas", torch.tensor(sigmas))
    found.add(f"out.{key}.timesteps", times)
    found.add(f"out.{key}.velocities", velocities)
    found.add(f"out.{key}.states", states)
    if recorded is not None:
        states, _ = _integrate(start, sigmas, lambda x, step: recorded[step])
        found.add(f"out.{key}.states", states, via="recorded velocities")


def _integrate(x: Tensor, sigmas: Sequence[float], field: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, Tensor]:
    """UniPC from x (B,F,C,H,W) -> states after each move, and velocities, both (K,B,F,C,H,W)."""
    move, states, velocities = unipc(), [], []
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        velocities.append(field(x, step))
        x = move(x, velocities[-1], sigma, sigma_next, lambda x=x: x)
        states.append(x)
    return torch.stack(states), torch.stack(velocities)
