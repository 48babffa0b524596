"""The network's pointwise work, fused: each function is a formula in torch, and a Triton kernel or two on a GPU.

The formulas are what tests compare with and what runs on a CPU. Arithmetic is float32 inside, inputs and outputs keep
their type; intermediate roundings of the layer-by-layer form fall away, so results are nearer to float32, not farther.
None of these functions carries gradient. Matrices are (R,E): R rows of tokens, those of one frame together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX = 448.0
"""Largest finite e4m3 number."""

FP8 = torch.float8_e4m3fn

E4M3_TILE, E4M3_BLOCK = 64, 128
"""Queries of a program of `attend_e4m3`, and keys that it takes at a time."""


def uses_triton(x: Tensor) -> bool:
    """Whether the Triton form runs. Tests say yes on a CPU too, where Triton's interpreter runs it."""
    return x.is_cuda


# ---------------------------------------------------------------------------------------------- norm and residual


def residual_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    eps: float,
    tokens: int,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    quantised: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x, branch (R,E); scale, shift, gate (F,E) float32, or (E) for all frames -> x + gate branch, and its LayerNorm
    times scale plus shift; with `quantised` that is e4m3 with a scale (R,1) per row, else the third is None.

    Row r belongs to frame (r / tokens) mod F. Without a branch, x itself comes back; without a gate, gate is 1.
    """
    if not uses_triton(x):
        return _residual_norm_formula(x, scale, shift, eps, tokens, branch, gate, quantised)
    rows, width = x.shape
    total = x if branch is None else torch.empty_like(x)
    out = torch.empty_like(x, dtype=FP8) if quantised else torch.empty_like(x)
    row_scale = torch.empty(rows, 1, device=x.device) if quantised else None
    frames = scale.shape[0] if scale.ndim == 2 else 1
    frames = max(frames, gate.shape[0] if gate is not None and gate.ndim == 2 else 1)
    together = next(n for n in (4, 2, 1) if tokens % n == 0 and n * width <= 2**13)
    triton_kernels().residual_norm[(rows // together,)](
        x,
        branch if branch is not None else x,
        gate if gate is not None else scale,
        scale,
        shift,
        total,
        out,
        row_scale if row_scale is not None else scale,
        width,
        tokens,
        frames,
        eps,
        width if gate is not None and gate.ndim == 2 else 0,
        width if scale.ndim == 2 else 0,
        HAS_BRANCH=branch is not None,
        HAS_GATE=gate is not None,
        QUANTISED=quantised,
        ROWS=together,
        BLOCK=power_of_two(width),
        num_warps=2 * warps(width) if together > 1 else warps(width),
    )
    return total, out, row_scale


def _residual_norm_formula(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    tokens: int,
    branch: Tensor | None,
    gate: Tensor | None,
    quantised: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    def per_row(table: Tensor) -> Tensor:
        if table.ndim == 1:
            return table
        rows = table.repeat_interleave(tokens, 0)  # (F*S,E)
        return rows.repeat(x.shape[0] // rows.shape[0], 1)

    if branch is not None:
        added = branch.float() if gate is None else branch.float() * per_row(gate)
        x = (x.float() + added).to(x.dtype)
    y = F.layer_norm(x.float(), x.shape[-1:], eps=eps) * per_row(scale) + per_row(shift)
    if quantised:
        return x, *quantise_rows(y)
    return x, y.to(x.dtype), None


# ---------------------------------------------------------------------------------------------- queries and keys


def norm_rotate(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv (B,L,3E), weights (E), cos, sin (L,D/2) float32 -> q, k, v (B,L,N,D), q and k RMS-normed and rotated.

    v is a view of qkv.
    """
    batch, length, width3 = qkv.shape
    width = width3 // 3
    v = torch.unflatten(qkv[..., 2 * width :], -1, (heads, -1))
    if not uses_triton(qkv):
        q, k = (
            normed(part, weight, eps)
            for part, weight in zip(torch.split(qkv, width, -1)[:2], (q_weight, k_weight), strict=True)
        )
        q, k = (turned(torch.unflatten(part, -1, (heads, -1)), cos, sin).to(qkv.dtype) for part in (q, k))
        return q, k, v
    q = torch.empty(batch, length, heads, width // heads, dtype=qkv.dtype, device=qkv.device)
    k = torch.empty_like(q)
    _launch_norm_rotate(qkv, q_weight, k_weight, cos, sin, q, k, k, None, heads=heads, eps=eps)
    return q, k, v


def norm_rotate_into(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    eps: float,
    copies: int = 1,
    turns_keys: bool = True,
) -> Tensor:
    """As norm_rotate, but keys and values go into rows `slots` (L) int64 of keys, values (B,capacity,N,D).

    -> queries (copies,B,L,N,D), all the same: parts of the keys are read by queries of their own. Without `turns_keys`
    keys are stored before their rotation, for `gather_turned`.
    """
    batch, length, width3 = qkv.shape
    heads = keys.shape[2]
    if not uses_triton(qkv):
        q, k, v = norm_rotate(qkv, q_weight, k_weight, cos, sin, heads=heads, eps=eps)
        if not turns_keys:
            _, k, _ = torch.split(qkv, width3 // 3, -1)
            k = torch.unflatten(normed(k, k_weight, eps), -1, (heads, -1))
        keys.index_copy_(1, slots, k.to(keys.dtype))
        values.index_copy_(1, slots, v.to(values.dtype))
        return q.expand(copies, -1, -1, -1, -1)
    q = torch.empty(copies, batch, length, heads, keys.shape[3], dtype=qkv.dtype, device=qkv.device)
    how: dict[str, Any] = {"heads": heads, "eps": eps, "turns_keys": turns_keys}
    _launch_norm_rotate(qkv, q_weight, k_weight, cos, sin, q, keys, values, slots, **how)
    return q


def gather_turned(keys: Tensor, values: Tensor, rows: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """keys, values (B,capacity,N,D), rows (L) int64, cos, sin (L,D/2) float32 -> these rows of both (B,L,N,D), of keys
    rotated; both have samples at one stride."""
    batch, _, heads, dim = keys.shape
    length, width = len(rows), heads * dim
    if not uses_triton(keys):
        found = keys.index_select(1, rows)
        return turned(found.float(), cos, sin).to(keys.dtype), values.index_select(1, rows)
    k, v = torch.empty(2, batch, length, heads, dim, dtype=keys.dtype, device=keys.device).unbind()
    triton_kernels().gather_turned[(batch * length,)](
        keys,
        values,
        rows,
        cos,
        sin,
        k,
        v,
        length,
        width,
        dim // 2,
        keys.stride(0),
        BLOCK=power_of_two(width),
        num_warps=warps(width),
    )
    return k, v


def turn_into(keys: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> Tensor:
    """keys (B,L,N,D), cos, sin (B,L,D/2) float32 -> keys rotated, in `out` (B,L,N,D), whose rows lie side by side."""
    batch, length, heads, dim = keys.shape
    if not uses_triton(keys):
        return out.copy_(turned(keys.float(), cos, sin))
    width = heads * dim
    keys = keys if keys[0].is_contiguous() else keys.contiguous()
    triton_kernels().turn_into[(batch * length,)](
        keys,
        cos,
        sin,
        out,
        length,
        width,
        dim // 2,
        keys.stride(0),
        out.stride(0),
        BLOCK=power_of_two(width),
        num_warps=warps(width),
    )
    return out


def norm_rotate_packed(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    run: int,
    eps: float,
) -> Tensor:
    """As norm_rotate, in e4m3 without a scale: keys (B,rows,N,D) get rows `slots` (L) int64, values (B,N,D,columns)
    get columns `column_of(slots)` -> queries (B,L,N,D). `run` slots at a time are neighbours; it divides L.

    e4m3 has 3 bits of precision from 2^-6 to 448 whatever the scale; larger numbers become 448.
    """
    batch, length, width3 = qkv.shape
    heads, dim = keys.shape[2:]
    if length % run:
        raise ValueError(f"run must divide the {length} tokens, got {run}")
    if not uses_triton(qkv):
        q, k, v = norm_rotate(qkv, q_weight, k_weight, cos, sin, heads=heads, eps=eps)
        store_packed(keys, values, slots, k, v)
        return to_fp8(q)
    q = torch.empty(batch, length, heads, dim, dtype=FP8, device=qkv.device)
    _launch_norm_rotate(qkv, q_weight, k_weight, cos, sin, q.unsqueeze(0), keys, None, slots, heads=heads, eps=eps)
    width, columns, channels = width3 // 3, 128, 64
    blocks = -(-(run + 15) // columns)  # a run may begin within 16 columns
    grid = length // run * blocks, -(-width // channels), batch
    sizes = length, width, values.shape[3], run, blocks
    triton_kernels().store_columns[grid](qkv, values, slots, *sizes, COLUMNS=columns, CHANNELS=channels, num_warps=4)
    return q


def column_of(row: Any) -> Any:
    """Where a row's value lies among the columns (int or tensor of ints): 16 neighbours as (4,2,2) instead of (2,4,2).

    This is the order in which a processor's threads hold the probabilities of 16 keys after a product with 8 bits a
    number, and want them for the next one: with values in that order they need not be exchanged.
    """
    return row - row % 16 + row % 8 // 2 * 4 + row % 16 // 8 * 2 + row % 2


def store_packed(keys: Tensor, values: Tensor, rows: Tensor, k: Tensor, v: Tensor) -> None:
    """k, v (B,L,N,D) into rows of keys (B,rows,N,D) e4m3 and columns of values (B,N,D,columns) e4m3."""
    for target, axis, at, given in ((keys, 1, rows, k), (values, 3, column_of(rows), v.permute(0, 2, 3, 1))):
        finite = to_fp8(given.nan_to_num(0.0))  # a masked value is multiplied by 0, and read by other rollouts
        target.view(torch.uint8).index_copy_(axis, at, finite.view(torch.uint8))


def to_fp8(x: Tensor) -> Tensor:
    """x in e4m3, without a scale."""
    return x.float().clamp(-FP8_MAX, FP8_MAX).to(FP8)


def _launch_norm_rotate(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor | None,
    slots: Tensor | None,
    *,
    heads: int,
    eps: float,
    turns_keys: bool = True,
) -> None:
    batch, length, width3 = qkv.shape
    width = width3 // 3
    triton_kernels().norm_rotate[(batch * length,)](
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        q,
        keys,
        values if values is not None else qkv,
        slots if slots is not None else qkv,
        length,
        width,
        width // heads // 2,
        eps,
        keys.stride(0),
        q.stride(0),
        COPIES=q.shape[0] if slots is not None else 1,
        HAS_SLOTS=slots is not None,
        PACKED=values is None,
        TURNS_KEYS=turns_keys,
        BLOCK=power_of_two(width),
        num_warps=warps(width),
    )


def norm_rows(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (R,E), weight (E) -> RMS-normed x."""
    if not uses_triton(x):
        return normed(x, weight, eps).to(x.dtype)
    out = torch.empty_like(x)
    rows, width = x.shape
    triton_kernels().norm_rows[(rows,)](x, weight, out, width, eps, BLOCK=power_of_two(width), num_warps=warps(width))
    return out


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (...,E), weight (E) -> RMS-normed x, float32."""
    y = x.float()
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B,L,N,D), cos, sin (L,D/2) or (B,L,D/2) -> neighbouring channels turned as pairs."""
    even, odd = torch.unflatten(x, -1, (-1, 2)).unbind(-1)  # (B,L,N,D/2)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


# -------------------------------------------------------------------------------------------- partial attentions


def attend_e4m3(
    q: Tensor, keys: Tensor, values: Tensor, tiles: Tensor, parts: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """q (L,N,D), keys (rows,N,D), values (N,D,columns) e4m3, programs (T,4) as `fp8_attention.tiles_of` makes them ->
    per part of the keys, out (P,L,N,D) of `dtype` and its log-sum-exp (P,N,L), for `merge`. Triton only."""
    length, heads, width = q.shape
    out = torch.empty(parts, length, heads, width, dtype=dtype, device=q.device)
    lse = torch.empty(parts, heads, length, device=q.device)
    found = _triton_attention()
    found.allocate_on(q.device)
    found.attend_e4m3[(len(tiles), heads, parts)](
        q,
        keys,
        values,
        tiles,
        out,
        lse,
        length,
        keys.shape[0],
        values.shape[2],
        1.4426950408889634 / width**0.5,
        HEADS=heads,
        WIDTH=width,
        TILE=E4M3_TILE,
        BLOCK=E4M3_BLOCK,
        num_warps=4,
        num_stages=3 if _shared_memory(q) >= 2**17 else 2,
    )
    return out, lse


def _shared_memory(x: Tensor) -> int:
    """Bytes a program may have; the interpreter has no limit."""
    return getattr(device_properties(x.device), "shared_memory_per_block_optin", 2**20) if x.is_cuda else 2**20


def device_properties(device: torch.device) -> Any:
    """What CUDA says of a GPU: torch gives the type to builds with CUDA alone."""
    read = cast("Callable[[torch.device], Any]", torch.cuda.get_device_properties)  # pyright: ignore[reportUnknownMemberType]
    return read(device)


def merge(parts: list[tuple[Tensor, Tensor]], out: Tensor, row_scale: Tensor | None = None) -> None:
    """Attentions of the same queries over disjoint keys, (P,L,N,D) and log-sum-exp (P,N,L) each -> out (L,N,D).

    At most two entries; P of them in each. With `row_scale` (L,1), out is e4m3 and gets a scale per row.
    """
    (first, lse), (extra, extra_lse) = parts[0], parts[-1]
    if not uses_triton(first):
        merged = _merge_formula([o for o, _ in parts], [s for _, s in parts])
        if row_scale is None:
            out.copy_(merged)
        else:
            values, scale = quantise_rows(merged.flatten(1))
            out.copy_(values.view(merged.shape))
            row_scale.copy_(scale)
        return
    _, length, heads, width = first.shape
    for part in (first, extra, out.unsqueeze(0)):
        if part.stride(3) != 1 or part.stride(2) != width:
            raise ValueError(f"results must hold a token's heads side by side, got strides {part.stride()}")
    triton_kernels().merge[(length,)](
        first,
        lse,
        extra,
        extra_lse,
        out,
        row_scale if row_scale is not None else lse,
        *(first.stride(0), first.stride(1), lse.stride(0), lse.stride(1), lse.stride(2)),
        *(extra.stride(0), extra.stride(1), extra_lse.stride(0), extra_lse.stride(1), extra_lse.stride(2)),
        PARTS=first.shape[0],
        EXTRA=extra.shape[0] if len(parts) > 1 else 0,
        HEADS=heads,
        HEAD_BLOCK=power_of_two(heads),
        WIDTH=width,
        QUANTISED=row_scale is not None,
        num_warps=warps(heads * width),
    )


def quantise_heads(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (B,L,N,D) -> e4m3 (B,L,N,D) and a scale (B*L,1) per row of all heads."""
    values, scale = quantise_rows(x.flatten(2).flatten(0, 1))
    return values.view(x.shape), scale


def _merge_formula(outs: list[Tensor], lses: list[Tensor]) -> Tensor:
    """-> (L,N,D) float32."""
    weight = torch.cat(lses).float().transpose(1, 2).softmax(0).unsqueeze(-1)  # (P,L,N,1)
    return (torch.cat(outs).float() * weight).sum(0)


# ------------------------------------------------------------------------------------------------- feed-forward


def gelu(x: Tensor, *, quantised: bool = False) -> tuple[Tensor, Tensor | None]:
    """x (R,E) -> GELU in its tanh form; with `quantised` as e4m3 with a scale (R,1) per row."""
    if not uses_triton(x):
        y = F.gelu(x.float(), approximate="tanh")
        return quantise_rows(y) if quantised else (y.to(x.dtype), None)
    rows, width = x.shape
    out = torch.empty_like(x, dtype=FP8) if quantised else torch.empty_like(x)
    row_scale = torch.empty(rows, 1, device=x.device) if quantised else None
    triton_kernels().gelu[(rows,)](
        x,
        out,
        row_scale if row_scale is not None else x,
        width,
        QUANTISED=quantised,
        BLOCK=(block := 1 << (width - 1).bit_length() - 1),  # the largest power of two below the width
        REST=power_of_two(width - block),
        num_warps=warps(width),
    )
    return out, row_scale


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (R,E) -> e4m3 values and float32 scales (R,1): x is about values times scale."""
    if x.is_cuda:
        rows, width = x.shape
        out, scale = torch.empty_like(x, dtype=FP8), torch.empty(rows, 1, device=x.device)
        triton_kernels().quantise[(rows,)](x, out, scale, width, BLOCK=power_of_two(width), num_warps=warps(width))
        return out, scale
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / FP8_MAX
    return (x.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


# ------------------------------------------------------------------------------------------------------- Triton


def power_of_two(n: int) -> int:
    """The smallest one from n on."""
    return 1 << (n - 1).bit_length()


def warps(width: int) -> int:
    """For a program that handles so many channels."""
    return 4 if width <= 2048 else 8 if width <= 8192 else 16


def _triton_attention() -> Any:
    """As `triton_kernels`, for the attention of its own."""
    triton_kernels()
    from causalreel.nn import triton_attention

    return triton_attention


def triton_kernels() -> Any:
    """The kernels; Triton comes with torch on Linux with CUDA."""
    try:
        from causalreel.nn import triton_kernels as found
    except ImportError as error:
        raise ImportError("fused kernels on a GPU need triton: pip install triton") from error
    return found
