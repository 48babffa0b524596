"""The pointwise work around heads that see through cameras, fused: formulas in torch, a Triton kernel each on a GPU.

As `nn.kernels`: arithmetic is float32 inside, inputs and outputs keep their type, nothing carries gradient. Head and
twin lie in turn, as `nn.camera` has them: (B,L,2N,D).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from causalreel.nn import kernels


def norm_see(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    project: Tensor,
    lift: Tensor,
    *,
    heads: int,
    eps: float,
    turns_keys: bool = True,
    copies: int = 1,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B,L,3E), weights (E), cos, sin (L,D/2) float32, cameras P and their inverses (B,F,4,4) float32 ->
    q (copies,B,L,2N,D), k, v (B,L,2N,D): heads RMS-normed and rotated (keys only if `turns_keys`), behind each its
    twin, normed and seen through the camera of its frame: P^T q, P^-1 k, P^-1 v.

    into: keys, values (B,rows,2N,D) and the rows (L) int64 that k and v are written to; they come back whole.
    """
    batch, length, width3 = qkv.shape
    width = width3 // 3
    if not kernels.uses_triton(qkv):
        q, k, v = _norm_see_formula(qkv, (q_weight, k_weight), cos, sin, (project, lift), heads, eps, turns_keys)
        q = q.expand(copies, -1, -1, -1, -1)
        if into is None:
            return q, k, v
        keys, values, slots = into
        keys.index_copy_(1, slots, k.to(keys.dtype))
        values.index_copy_(1, slots, v.to(values.dtype))
        return q, keys, values
    shape = batch, length, 2 * heads, width // heads
    q = torch.empty(copies, *shape, dtype=qkv.dtype, device=qkv.device)
    keys, values = (
        (torch.empty(shape, dtype=qkv.dtype, device=qkv.device) for _ in range(2)) if into is None else into[:2]
    )
    _triton().norm_see[(batch * length,)](
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        project.contiguous(),
        lift.contiguous(),
        q,
        keys,
        values,
        qkv if into is None else into[2],
        length,
        length // project.shape[1],
        width,
        eps,
        keys.stride(0),
        q.stride(0),
        DIM=width // heads,
        COPIES=copies,
        HAS_SLOTS=into is not None,
        TURNS_KEYS=turns_keys,
        BLOCK=kernels.power_of_two(width),
        num_warps=kernels.warps(width),
    )
    return q, keys, values


def _norm_see_formula(
    qkv: Tensor,
    weights: tuple[Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    views: tuple[Tensor, Tensor],
    heads: int,
    eps: float,
    turns_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    project, lift = views
    parts = [torch.unflatten(part, -1, (heads, -1)) for part in torch.chunk(qkv, 3, -1)]
    still = torch.ones_like(cos), torch.zeros_like(sin)
    q, k = (
        kernels.normed(part.flatten(2), weight, eps).view(part.shape)
        for part, weight in zip(parts, weights, strict=False)
    )
    turned = kernels.turned(q, cos, sin), kernels.turned(k, *((cos, sin) if turns_keys else still)), parts[2].float()
    seen = times(q, project.mT), times(k, lift), times(parts[2], lift)
    q, k, v = (torch.stack(pair, 3).flatten(2, 3).to(qkv.dtype) for pair in zip(turned, seen, strict=True))
    return q, k, v


def times(x: Tensor, matrices: Tensor) -> Tensor:
    """x (B,F*S,N,D), matrices (B,F,4,4) float32 -> every group of 4 neighbouring channels times its frame's matrix."""
    batch, frames = matrices.shape[:2]
    grouped = x.float().reshape(batch * frames, -1, 4)  # a frame's tokens lie together
    return torch.bmm(grouped, matrices.flatten(0, 1).mT).view(x.shape)


def see_out(attended: Tensor, project: Tensor) -> Tensor:
    """attended (B,L,2N,D), cameras P (B,F,4,4) float32 -> rows (B*L,2E): all heads, then all twins seen through P."""
    batch, length, heads2, dim = attended.shape
    width = heads2 // 2 * dim
    if not kernels.uses_triton(attended):
        plain, camera = torch.unflatten(attended, 2, (-1, 2)).unbind(3)
        seen = times(camera, project).to(attended.dtype)
        return torch.cat([plain.flatten(2), seen.flatten(2)], -1).flatten(0, 1)
    attended = attended.contiguous()
    out = torch.empty(batch * length, 2 * width, dtype=attended.dtype, device=attended.device)
    _triton().see_out[(batch * length,)](
        attended,
        project.contiguous(),
        out,
        length,
        length // project.shape[1],
        width,
        project.shape[1],
        DIM=dim,
        BLOCK=kernels.power_of_two(width),
        num_warps=kernels.warps(width),
    )
    return out


def _triton() -> Any:
    kernels.triton_kernels()  # says what is missing
    from causalreel.nn import triton_camera

    return triton_camera
