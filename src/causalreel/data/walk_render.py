"""What a camera in the walkable world sees, exactly: pictures, what each pixel shows, and what was seen before.

Objects stand upright and the camera looks level, so a picture's column meets each object at one depth: the ray through
it is cut with circles and squares in the plane, and rows only ask whether the object reaches there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from causalreel.data.walk import EYE, FOCAL, HEIGHTS, RADIUS, WalkState, between

COLOR_RGB = ((224, 48, 40), (40, 176, 64), (48, 88, 232), (240, 208, 40), (216, 56, 208), (40, 200, 216))
"""Of the colours of objects, 0..255, seen face on."""
FLOOR_RGB = (
    ((206, 178, 130), (168, 138, 96)),
    ((124, 132, 144), (86, 94, 106)),
    ((126, 156, 92), (88, 118, 62)),
    ((176, 122, 96), (134, 86, 66)),
)
"""The two tints of each floor."""
SKY_RGB = (
    ((204, 226, 246), (104, 164, 232)),
    ((250, 190, 140), (116, 84, 148)),
    ((46, 54, 96), (10, 12, 34)),
)
"""Each sky at the horizon and above."""
NEAR = 1e-3
SKY, FLOOR = -2, -1
"""What a pixel shows beside objects 0..5."""


@dataclass(frozen=True)
class Columns:
    """Where the rays of columns meet objects: (...,6)."""

    depth: Tensor
    """In cells along the camera's axis; infinite where there is nothing."""
    light: Tensor
    """How bright the object is there."""


def meet(state: WalkState, yaw: Tensor, at: Tensor, u: Tensor) -> Columns:
    """Cameras yaw (B,T), at (B,T,2), and slopes to the right u (B,T,N) -> where the rays meet the objects (B,T,N,6)."""
    yaw, at, u = yaw.float(), at.float(), u.float()
    c, s = yaw.cos()[..., None], yaw.sin()[..., None]
    dx, dz = (c * u + s)[..., None], (c - s * u)[..., None]  # (B,T,N,1), of a ray that goes 1 forward
    offset = state.place[:, None] - at[:, :, None]  # (B,T,6,2)
    ox, oz = (part[:, :, None] for part in offset.unbind(-1))  # (B,T,1,6)
    size = torch.tensor(RADIUS, device=u.device)[state.shape] * state.scale
    size = size[:, None, None]  # (B,1,1,6)
    # pillars: |t d - o| = r
    square, along = dx * dx + dz * dz, dx * ox + dz * oz
    below = along * along - square * (ox * ox + oz * oz - size * size)
    depth = (along - below.clamp_min(0).sqrt()) / square
    nx, nz = (depth * dx - ox) / size, (depth * dz - oz) / size
    light = 0.62 + 0.38 * (-(nx * dx + nz * dz) / square.sqrt()).clamp(0, 1)
    depth = depth.masked_fill((below < 0) | (depth < NEAR), torch.inf)
    # blocks, a face towards the start: axes along (ax, az) and across
    ax, az = (state.place / state.place.norm(dim=-1, keepdim=True).clamp_min(1e-6))[:, None, None].unbind(-1)
    first, light_first = _slab(dx * ax + dz * az, ox * ax + oz * az, size)
    other, light_other = _slab(dz * ax - dx * az, oz * ax - ox * az, size)
    near, far = torch.maximum(first, other), torch.minimum(light_first, light_other)
    block = near.masked_fill((near > far) | (near < NEAR), torch.inf)
    is_block = (state.shape == 1)[:, None, None]
    depth = torch.where(is_block, block, depth)
    light = torch.where(is_block, torch.where(first >= other, 1.0, 0.72), light)
    return Columns(depth.masked_fill(~state.present[:, None, None], torch.inf), light)


def _slab(direction: Tensor, middle: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Depths at which a ray enters and leaves |x - middle| <= half."""
    safe = torch.where(direction.abs() < 1e-9, torch.full_like(direction, 1e-9), direction)
    a, b = (middle - half) / safe, (middle + half) / safe
    return torch.minimum(a, b), torch.maximum(a, b)


def shown(state: WalkState, depth: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Depths (B,T,N,6) and slopes down v (M,) or (B,T,N,M) -> what is there (B,T,M,N), or (B,T,N,M) for the latter:
    an object's number, FLOOR or SKY; and its depth, infinite for the sky."""
    is_grid = v.ndim == 1
    v = v[:, None] if is_grid else v  # rows before columns
    what = torch.where(v > 0, FLOOR, SKY)
    far = torch.where(v > 0, EYE / v.clamp_min(1e-9), torch.inf)
    whole = (*depth.shape[:2], v.shape[0], depth.shape[2]) if is_grid else v.shape
    what, far = what.expand(whole).to(torch.int8), far.expand(whole)
    top = EYE - torch.tensor(HEIGHTS, device=depth.device)[state.shape] * state.scale  # (B,6), negative: above the eye
    for number in range(depth.shape[-1]):
        t = depth[..., number]
        t = t[:, :, None] if is_grid else t[..., None]
        y = v * t  # NaN where 0 times infinite: no comparison holds
        is_here = (y >= top[:, number, None, None, None]) & (y <= EYE) & (t < far)
        what, far = torch.where(is_here, number, what).to(torch.int8), torch.where(is_here, t, far)
    return what, far


def slopes(size: int, samples: int, device: torch.device) -> Tensor:
    """(size*samples,) slope of the ray through each sample of a row of pixels: to the right, or down."""
    return ((torch.arange(size * samples, device=device) + 0.5) / (size * samples) - 0.5) / FOCAL


def paint(state: WalkState, yaw: Tensor, at: Tensor, *, samples: int = 2) -> Tensor:
    """Cameras yaw (B,T), at (B,T,2) -> pictures (B,T,3,H,W) float32 in [-1,1], samples x samples rays a pixel."""
    size, device = state.config.size, state.place.device
    u = slopes(size, samples, device)
    columns = meet(state, yaw, at, u.expand(*yaw.shape, -1))
    what, _ = shown(state, columns.depth, u)  # (B,T,M,N)
    ground = _ground(state, yaw.float(), at.float(), u)  # (B,T,M,N,3)
    tints = torch.tensor(COLOR_RGB, device=device).float()[state.color]  # (B,6,3)
    colors = tints[:, None, None] * columns.light[..., None]  # (B,T,N,6,3)
    index = what.clamp_min(0).long()[..., None, None].expand(*what.shape, 1, 3)
    chosen = colors[:, :, None].expand(-1, -1, len(u), -1, -1, -1).gather(4, index).squeeze(4)
    picture = torch.where((what >= 0)[..., None], chosen, ground)
    picture = picture.unflatten(3, (size, samples)).unflatten(2, (size, samples)).mean((3, 5))  # (B,T,H,W,3)
    return (picture / 127.5 - 1).movedim(-1, 2).contiguous()


def _ground(state: WalkState, yaw: Tensor, at: Tensor, u: Tensor) -> Tensor:
    """Floor and sky of every ray, 0..255: (B,T,M,N,3)."""
    device, half = u.device, len(u) // 2
    low, high = torch.tensor(SKY_RGB, device=device).float()[state.sky].unbind(1)  # (B,3)
    rise = (-u[:half] * FOCAL * 2).clamp(0, 1)[:, None]  # (M/2,1): 0 at the horizon, 1 at the top
    sky = torch.lerp(low[:, None], high[:, None], rise)  # (B,M/2,3)
    sky = sky[:, None, :, None].expand(-1, yaw.shape[1], -1, len(u), -1)
    depth = EYE / u[half:]  # (M/2,)
    c, s = yaw.cos()[..., None, None], yaw.sin()[..., None, None]
    x = at[..., 0, None, None] + depth[:, None] * (c * u + s)  # (B,T,M/2,N)
    z = at[..., 1, None, None] + depth[:, None] * (c - s * u)
    checker = (6 * (torch.pi * x).sin() * (torch.pi * z).sin()).tanh()
    fade = torch.exp(-depth / 4)[:, None]
    light, dark = torch.tensor(FLOOR_RGB, device=device).float()[state.floor].unbind(1)
    share = (0.5 + 0.5 * checker * fade)[..., None]
    floor = torch.lerp(dark[:, None, None, None], light[:, None, None, None], share)
    return torch.cat([sky, floor], dim=2)


def render(state: WalkState, *, chunk: int = 16) -> Tensor:
    """State -> video (B,T,3,H,W) float32 in [-1,1] of its pixel frames, `chunk` clips at a time to bound memory."""
    parts = []
    for start in range(0, len(state), chunk):
        some = state[start : start + chunk]
        parts.append(paint(some, between(some.yaw), between(some.at)))
    return torch.cat(parts)


def seen(state: WalkState, yaw: Tensor, at: Tensor) -> Tensor:
    """Cameras yaw (B,T), at (B,T,2) -> (B,T,H,W) bool: the point in the pixel's middle shows in the picture of the
    first camera, yaw 0 at 0, too. Sky counts where the first picture shows sky in that direction."""
    size, device = state.config.size, state.place.device
    u = slopes(size, 1, device)
    columns = meet(state, yaw, at, u.expand(*yaw.shape, -1))
    what, depth = shown(state, columns.depth, u)  # (B,T,H,W)
    yaw, at = yaw.float()[..., None, None], at.float()
    c, s = yaw.cos(), yaw.sin()
    x, z = c * u + s, c - s * u  # directions (B,T,1,W)
    is_sky = what == SKY
    t = torch.where(is_sky, 1.0, depth)
    here = torch.where(is_sky, 0.0, 1.0)
    x = here * at[..., 0, None, None] + t * x
    z = here * at[..., 1, None, None] + t * z  # where it is, from the first camera
    y = t * u[:, None]
    is_ahead = z > NEAR
    u0, v0 = x / z.clamp_min(NEAR), y / z.clamp_min(NEAR)
    edge = 0.5 / FOCAL
    is_inside = is_ahead & (u0.abs() < edge) & (v0.abs() < edge)
    start = torch.zeros(len(state), 1, device=device)
    rays = u0.flatten(1)[:, None]  # (B,1,T*H*W)
    first = meet(state, start, torch.zeros(len(state), 1, 2, device=device), rays)
    there, far = shown(state, first.depth, v0.flatten(1)[:, None, :, None])  # (B,1,N,1)
    there, far = there[:, 0, :, 0].view_as(what), far[:, 0, :, 0].view_as(depth)
    is_same = torch.where(is_sky, there == SKY, (there == what) & ((far - z).abs() < 0.02 * (1 + z)))
    return is_inside & is_same
