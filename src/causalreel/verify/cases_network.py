"""c1 to c3: single evaluations, whole clips, behind masks of every kind."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from causalreel.nn.masks import Context, Frame, frame_mask, frames_of
from causalreel.types import Conditioning
from causalreel.verify.case import Case, Findings
from causalreel.verify.reference import Released, Table


@torch.no_grad()
def bidirectional(case: Case, found: Findings) -> None:
    """c1: all frames see each other; one time per sample or per frame; text of full length and shorter."""
    x, sigma = case.tensors["in.noisy"], _sigma(case.tensors["in.timestep"])
    net = Released(case.network())
    found.add("out.flow_pred", net(x, sigma, case.conditioning()))
    _clean_estimates(case, found, net)
    found.add("out.flow_pred_without_camera", lambda: net(x, sigma, Conditioning(case.conditioning().text)))
    for name in [name for name in case.tensors if name.startswith("in.prompt_embeds_")]:
        suffix = name.removeprefix("in.prompt_embeds_")
        velocity = net(x, sigma, case.conditioning(name))
        found.add(f"out.flow_pred_{suffix}_context", velocity)
        found.add(f"out.flow_pred_{suffix}", velocity)


@torch.no_grad()
def diffusion_forcing(case: Case, found: Findings) -> None:
    """c2: chunks see themselves and the chunks before them, within a window counted from the chunk's end."""
    x, sigma = case.tensors["in.noisy"], _sigma(case.tensors["in.timestep"])
    context, sizes = case.context(sink=False), case.sizes(x.shape[1])
    net = Released(case.network(context=context))
    found.add("out.flow_pred", net(x, sigma, case.conditioning(), sizes=sizes))
    _clean_estimates(case, found, net)
    found.add("out.frame_mask_fraction", lambda: _fraction(frames_of(sizes), context))


@torch.no_grad()
def teacher_forcing(case: Case, found: Findings) -> None:
    """c3: noisy chunks behind clean ones. The released mask has no window here, whatever the case's window."""
    x, sigma = case.tensors["in.noisy"], _sigma(case.tensors["in.timestep"])
    sizes, light = case.sizes(x.shape[1]), case.tensors.get("in.aug_timestep")
    net = Released(case.network())
    velocity = net.teacher_forced(
        x,
        sigma,
        case.conditioning(),
        clean=case.tensors["in.clean"],
        sizes=sizes,
        clean_sigma=None if light is None else _sigma(light),
    )
    found.add("out.flow_pred", velocity)
    _clean_estimates(case, found, net)
    both = frames_of(sizes, stream=0) + frames_of(sizes, stream=1)
    found.add("out.frame_mask_fraction", lambda: _fraction(both, Context()))


def _sigma(time: Tensor) -> Tensor:
    """Times (B,) or (B,F) -> levels (B,1) or (B,F), float64 so that the network's time input is the recorded one."""
    return (time if time.ndim == 2 else time[:, None]).double() / 1000


def _clean_estimates(case: Case, found: Findings, net: Released) -> None:
    """`out.pred_x0` and `out.pred_x0_shift<s>`, from the latest evaluation."""
    for name in [name for name in case.tensors if name.startswith("out.pred_x0")]:
        match = re.fullmatch(r"out\.pred_x0(?:_shift([\d.]+))?", name)
        if match:
            table, latest = Table(float(match[1] or case.shift)), net.log[-1]
            used = table.sigma_at(latest.time).double()[..., None, None, None]
            found.add(name, (latest.x.double() - used * latest.velocity.double()).float())


def _fraction(frames: tuple[Frame, ...], context: Context) -> Tensor:
    """The frame mask of a call as numbers (F,F)."""
    mask = frame_mask(frames, frames, context)
    return torch.ones(len(frames), len(frames)) if mask is None else torch.tensor(mask.allowed).float()
