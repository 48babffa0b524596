"""Control in the walkable world, measured exactly: did it turn and move as asked, does what it shows agree with the
true render, is it still there after turning away and back, does a prompt decide what stands where.

Pictures are those of latent frames, (B,F,3,H,W) in [-1,1]. Every number is of a clip (B,), NaN where it is undefined.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.data.walk import WalkState
from causalreel.data.walk_render import COLOR_RGB, FLOOR_RGB, SKY_RGB, paint, seen

FRAMES = (4, 8, 12, 15)
"""Latent frames at which poses are sought."""
YAW = torch.arange(-16, 17) * math.radians(1.5)
ALONG = torch.arange(-8, 9) * 0.0625
"""Offsets that are tried, in radians and in cells."""
YAW_NEAR, ALONG_NEAR = math.radians(6) + 1e-6, 0.25 + 1e-6
"""Half a key's turn and a key's step: within them counts as obeyed."""
LEAST_SEEN = 0.1
"""Share of a picture that must have been seen in the first one, for what is compared there to mean something."""
LEAST_PIXELS = 10
"""Of a colour, for it to be there."""


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """a, b (...,3,H,W) in [-1,1], mask (...,H,W) -> dB (...) over the mask, NaN where it has less than LEAST_SEEN."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean(-3) / 4
    if mask is None:
        return -10 * error.mean((-2, -1)).clamp_min(1e-6).log10()
    share = mask.float().mean((-2, -1))
    found = -10 * ((error * mask).mean((-2, -1)) / share.clamp_min(1e-9)).clamp_min(1e-6).log10()
    return found.masked_fill(share < LEAST_SEEN, torch.nan)


def agreement(pictures: Tensor, state: WalkState, wrong: WalkState) -> dict[str, Tensor]:
    """Pictures of the state's path -> PSNR where its first picture saw the scene, against the path of other keys too.

    wrong: the same scenes along other paths. `right beats wrong` is the share of frames that agree better with their
    own path, of those in which both poses differ and see enough.
    """
    right, other = (psnr(pictures, paint(s, s.yaw, s.at), seen(s, s.yaw, s.at)) for s in (state, wrong))  # (B,F)
    differs = ((state.yaw - wrong.yaw).abs() > 0.01) | ((state.at - wrong.at).norm(dim=-1) > 0.01)
    counts = differs & ~right.isnan() & ~other.isnan()
    beats = torch.where(counts, (right > other).float(), torch.nan).nanmean(1)
    found = {"psnr seen": right[:, 1:].nanmean(1), "psnr wrong": other[:, 1:].nanmean(1), "right beats wrong": beats}
    at = {f"psnr at {f}": right[:, f] for f in (1, 4, 8, 15) if f < pictures.shape[1]}
    return found | at


def pose_errors(pictures: Tensor, state: WalkState) -> dict[str, Tensor]:
    """By how much each clip's pictures are explained best by another yaw, or by a camera further ahead or aside."""
    frames = [f for f in FRAMES if f < pictures.shape[1]]
    if not frames:
        frames = [pictures.shape[1] - 1]
    shown, yaw, at = pictures[:, frames], state.yaw[:, frames], state.at[:, frames]
    c, s = yaw.cos(), yaw.sin()
    forward, right = torch.stack([s, c], -1), torch.stack([c, -s], -1)  # (B,f,2)
    own = seen(state, yaw, at)

    def best(offsets: Tensor, moved: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        errors = []
        for offset in offsets.to(yaw):
            other = moved(offset)
            mask = own & seen(state, *other)
            errors.append(-psnr(shown, paint(state, *other, samples=1), mask))
        stacked = torch.stack(errors)  # (offsets,B,f)
        chosen = torch.nan_to_num(stacked, nan=torch.inf).argmin(0)
        is_known = own.float().mean((-2, -1)) >= LEAST_SEEN
        return torch.where(is_known, offsets.to(yaw)[chosen].abs(), torch.nan)

    found: dict[str, Tensor] = {}
    turned = best(YAW, lambda offset: (yaw + offset, at))
    found["yaw error"] = torch.rad2deg(turned).nanmean(1)
    found["yaw within"] = _share(turned, YAW_NEAR)
    for name, direction in (("forward", forward), ("sideways", right)):
        moved = best(ALONG, lambda offset, d=direction: (yaw, at + offset * d))
        found[f"{name} error"] = moved.nanmean(1)
        found[f"{name} within"] = _share(moved, ALONG_NEAR)
    return found


def _share(error: Tensor, most: float) -> Tensor:
    return torch.where(error.isnan(), torch.nan, (error <= most).float()).nanmean(1)


def revisit(pictures: Tensor, state: WalkState, name: str) -> dict[str, Tensor]:
    """A path that ends where it began -> how much its last picture is like its first one, and like the true one."""
    truth = paint(state, state.yaw[:, :1], state.at[:, :1])[:, 0]
    return {f"{name} itself": psnr(pictures[:, -1], pictures[:, 0]), f"{name} truth": psnr(pictures[:, -1], truth)}


def words(pictures: Tensor, state: WalkState) -> dict[str, Tensor]:
    """Pictures made from captions alone, turning right by 60 degrees -> what is where it should be.

    ahead, right: the captioned object's colour is there in the first and in the last picture, NaN without an object.
    stray: other colours in the first picture. outlines: contrast at the object's edges, 0 if it is not there.
    """
    first, last = colors_in(pictures[:, 0]), colors_in(pictures[:, -1])  # (B,H,W)
    rows = torch.arange(len(state), device=first.device)
    found: dict[str, Tensor] = {}
    for name, where, direction in (("ahead", first, 0), ("right", last, 1)):
        is_there = (where == state.color[:, direction, None, None]).sum((1, 2)) >= LEAST_PIXELS
        found[name] = torch.where(state.present[:, direction], is_there.float(), torch.nan)
    counts = F.one_hot(first.clamp_min(0).long(), len(COLOR_RGB)) * (first >= 0)[..., None]
    strange = counts.sum((1, 2)) >= LEAST_PIXELS  # (B,6)
    strange[rows, state.color[:, 0]] &= ~state.present[:, 0]
    found["stray colours"] = strange.float().sum(1)
    object_ = (first == state.color[:, 0, None, None]) & state.present[:, 0, None, None]
    found["outlines"] = torch.where(state.present[:, 0], _outlines(pictures[:, 0], object_), torch.nan)
    picture = (pictures[:, 0].movedim(1, -1) + 1) * 127.5
    size = picture.shape[1]
    floor = picture[:, -size // 8 :].flatten(1, 2).median(1).values
    tints = torch.tensor(FLOOR_RGB, device=floor.device).float().mean(1)
    found["floor"] = ((floor[:, None] - tints).norm(dim=-1).argmin(1) == state.floor).float()
    sky = picture[:, : size // 8].flatten(1, 2).median(1).values
    tops = torch.tensor(SKY_RGB, device=sky.device).float()[:, 1]
    found["sky"] = ((sky[:, None] - tops).norm(dim=-1).argmin(1) == state.sky).float()
    return found


def colors_in(pictures: Tensor, *, tolerance: float = 45.0) -> Tensor:
    """(B,3,H,W) -> (B,H,W) the colour of an object that each pixel has in some light, or -1."""
    pixels = (pictures.movedim(1, -1).clamp(-1, 1) + 1) * 127.5
    tints = torch.tensor(COLOR_RGB, device=pixels.device).float()  # (6,3)
    light = (pixels @ tints.T / tints.square().sum(-1)).clamp(0.55, 1.05)  # (B,H,W,6)
    distance = (pixels[..., None, :] - light[..., None] * tints).norm(dim=-1)
    return torch.where(distance.min(-1).values < tolerance, distance.argmin(-1), -1)


def _outlines(picture: Tensor, mask: Tensor) -> Tensor:
    """picture (B,3,H,W), where the object is (B,H,W) -> the largest change between neighbours of each of its rows, mean
    of the channels and of the rows, as a share of the range; 0 without rows."""
    change = picture.diff(dim=-1).abs().mean(1) / 2  # (B,H,W-1)
    near = F.max_pool2d(mask.float(), (1, 5), stride=1, padding=(0, 2))[..., 1:] > 0
    rows = mask.any(-1)  # (B,H)
    steepest = (change * near).amax(-1)
    return (steepest * rows).sum(1) / rows.sum(1).clamp_min(1)
