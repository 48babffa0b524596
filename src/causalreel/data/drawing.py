"""The tiny world's pictures: what is where, painted with exact edges.

`data.world` decides what is where; the metrics compare with the same outlines.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from causalreel.data.events import Change
from causalreel.vocabulary import BACKGROUND_RGB, COLOR_RGB

if TYPE_CHECKING:
    from causalreel.data.world import WorldState

RADII = (6.5, 10.0)
"""Pixels, for each word of SIZES: a circle's radius; squares have the same area, triangles are a little smaller."""

SQUARE, TRIANGLE = math.sqrt(math.pi) / 2, 1.4  # half side and circumradius, in radii
BOUNDS = (1.0, SQUARE * math.sqrt(2), TRIANGLE)  # bounding circle of each shape, in radii


def coverage(dx: Tensor, dy: Tensor, shape: Tensor, radius: Tensor) -> Tensor:
    """Offsets from an object's centre, its shape class and radius (all broadcast) -> how much of a pixel it covers.

    Anti-aliasing is half a pixel on either side of the signed distance; corners are mitred.
    """
    return (0.5 - outline(dx, dy, shape, radius)).clamp(0, 1)


def outline(dx: Tensor, dy: Tensor, shape: Tensor, radius: Tensor) -> Tensor:
    """As for `coverage` -> the signed distance to the object's edge, negative inside."""
    circle = torch.sqrt(dx * dx + dy * dy + 1e-12) - radius
    square = torch.maximum(dx.abs(), dy.abs()) - SQUARE * radius
    slope = dx.abs() * (math.sqrt(3) / 2) - dy * 0.5
    triangle = torch.maximum(slope, dy) - 0.5 * TRIANGLE * radius
    return torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))


def render(state: WorldState, *, chunk: int = 32) -> Tensor:
    """State -> video (B,T,3,H,W) float32 in [-1,1], on the state's device; `chunk` clips at a time to bound memory."""
    size, device = state.config.size, state.position.device
    count, frames, _, _ = state.position.shape
    video = torch.empty(count, frames, 3, size, size, device=device)
    for start in range(0, count, chunk):
        video[start : start + chunk] = _paint(state[start : start + chunk], size)
    return video


def _paint(state: WorldState, size: int) -> Tensor:
    device = state.position.device
    colors = torch.tensor(COLOR_RGB, device=device).float() / 127.5 - 1
    backgrounds = torch.tensor(BACKGROUND_RGB, device=device).float() / 127.5 - 1
    radii = torch.tensor(RADII, device=device)
    pixel = torch.arange(size, device=device) + 0.5
    if state.change is not None:
        return _paint_change(state, state.change, size)
    picture = backgrounds[state.background][:, None, :, None, None]  # (B,1,3,1,1)
    for i in range(state.shape.shape[1]):
        x, y = state.position[:, :, i, 0], state.position[:, :, i, 1]  # (B,T)
        dx, dy = pixel - x[..., None, None], pixel[:, None] - y[..., None, None]  # (B,T,1,W) (B,T,H,1)
        shape, radius = state.shape[:, i, None, None, None], radii[state.scale[:, i, None, None, None]]
        alpha = coverage(dx, dy, shape, radius) * state.present[:, i, None, None, None]  # (B,T,H,W)
        picture = torch.lerp(
            picture.expand(*alpha.shape[:2], 3, size, size),
            colors[state.color[:, i]][:, None, :, None, None],
            alpha[:, :, None],
        )
    return picture


def _paint_change(state: WorldState, change: Change, size: int) -> Tensor:
    """As `_paint`, with what changes between old and new by its progress."""
    device, frames = state.position.device, state.position.shape[1]
    colors = torch.tensor(COLOR_RGB, device=device).float() / 127.5 - 1
    backgrounds = torch.tensor(BACKGROUND_RGB, device=device).float() / 127.5 - 1
    radii = torch.tensor(RADII, device=device)
    pixel = torch.arange(size, device=device) + 0.5
    done = change.progress(frames, state.config.morph)[:, :, None, None]  # (B,T,1,1)

    def between(old: Tensor, new: Tensor) -> Tensor:
        """(B,3) each -> (B,T,3,1,1)."""
        return torch.lerp(old[:, None, :, None], new[:, None, :, None], done)[..., None]

    picture = between(backgrounds[state.background], backgrounds[change.background])
    for i in range(state.shape.shape[1]):
        x, y = state.position[:, :, i, 0], state.position[:, :, i, 1]  # (B,T)
        dx, dy = pixel - x[..., None, None], pixel[:, None] - y[..., None, None]  # (B,T,1,W) (B,T,H,1)
        old, new = (
            outline(dx, dy, of.shape[:, i, None, None, None], _radius(of, i, other, radii)[:, None, None, None])
            for of, other in ((state, change), (change, state))
        )
        alpha = (0.5 - torch.lerp(old, new, done)).clamp(0, 1)  # (B,T,H,W)
        is_there = (state.present[:, i] | change.present[:, i])[:, None, None, None]
        after, before = is_there & (done > 0) | state.present[:, i, None, None, None], done < 1
        alpha = alpha * (after & (before | change.present[:, i, None, None, None]))
        shown = [
            torch.where(of.present[:, i, None], colors[of.color[:, i]], colors[other.color[:, i]])
            for of, other in ((state, change), (change, state))
        ]
        picture = torch.lerp(picture.expand(*alpha.shape[:2], 3, size, size), between(*shown), alpha[:, :, None])
    return picture


def _radius(of: WorldState | Change, i: int, other: WorldState | Change, radii: Tensor) -> Tensor:
    """(B,): of object i, as small as nothing where it is not there."""
    return torch.where(of.present[:, i], radii[of.scale[:, i]], 0.0 * radii[other.scale[:, i]])
