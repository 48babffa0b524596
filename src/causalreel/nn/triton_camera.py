"""Triton kernels behind `nn.camera_kernels`, which says what they compute. A program handles one token."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _seen(x, weight, inverse_norm, matrix, group, lane, inside, TRANSPOSED: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """The matrix times each group of four neighbouring channels of a row; with a weight of what is normed."""
    total = tl.zeros_like(inverse_norm + group.to(tl.float32))
    for j in tl.static_range(4):
        y = tl.load(x + group + j, mask=inside, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            y *= inverse_norm * tl.load(weight + group + j, mask=inside, other=0.0).to(tl.float32)
        if TRANSPOSED:
            entry = tl.load(matrix + j * 4 + lane)
        else:
            entry = tl.load(matrix + lane * 4 + j)
        total += entry * y
    return total


@triton.jit
def _turned(x, weight, inverse_norm, cosine, sine, at, inside):
    """The normed row with neighbouring channels turned as pairs."""
    own = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    own *= inverse_norm * tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    partner = at + 1 - 2 * (at % 2)
    other = tl.load(x + partner, mask=inside, other=0.0).to(tl.float32)
    other *= inverse_norm * tl.load(weight + partner, mask=inside, other=0.0).to(tl.float32)
    return own * cosine + tl.where(at % 2 == 0, -other, other) * sine


@triton.jit
def _inverse_norm(x, at, inside, width, eps):
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(y * y, 0) / width + eps)


@triton.jit
def norm_see(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    project,
    lift,
    q,
    keys,
    values,
    slots,
    length,
    tokens,
    width,
    eps,
    batch_stride,
    copy_stride,
    DIM: tl.constexpr,
    COPIES: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    TURNS_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // length, row % length
    at = tl.arange(0, BLOCK)
    inside = at < width
    group, lane = at // 4 * 4, at % 4
    pair = token * (DIM // 2) + at % DIM // 2
    cosine, sine = tl.load(cos + pair), tl.load(sin + pair)
    camera = (row // tokens) * 16  # frames of all samples lie one behind the other, and so do their cameras
    project, lift = project + camera, lift + camera
    place = at // DIM * (2 * DIM) + at % DIM  # of a head; its twin lies DIM behind
    start = qkv + row * 3 * width

    norm = _inverse_norm(start, at, inside, width, eps)
    turned = _turned(start, q_weight, norm, cosine, sine, at, inside)
    seen = _seen(start, q_weight, norm, project, group, lane, inside, TRANSPOSED=True, HAS_WEIGHT=True)
    for p in tl.static_range(COPIES):
        there = q + p * copy_stride + row * 2 * width + place
        tl.store(there, turned.to(q.dtype.element_ty), mask=inside)
        tl.store(there + DIM, seen.to(q.dtype.element_ty), mask=inside)

    if HAS_SLOTS:
        there = sample * batch_stride + tl.load(slots + token) * 2 * width + place
    else:
        there = row * 2 * width + place
    start += width
    norm = _inverse_norm(start, at, inside, width, eps)
    if TURNS_KEYS:
        turned = _turned(start, k_weight, norm, cosine, sine, at, inside)
    else:
        turned = tl.load(start + at, mask=inside, other=0.0).to(tl.float32)
        turned *= norm * tl.load(k_weight + at, mask=inside, other=0.0).to(tl.float32)
    seen = _seen(start, k_weight, norm, lift, group, lane, inside, TRANSPOSED=False, HAS_WEIGHT=True)
    tl.store(keys + there, turned.to(keys.dtype.element_ty), mask=inside)
    tl.store(keys + there + DIM, seen.to(keys.dtype.element_ty), mask=inside)

    start += width
    value = tl.load(start + at, mask=inside, other=0.0)
    seen = _seen(start, k_weight, norm, lift, group, lane, inside, TRANSPOSED=False, HAS_WEIGHT=False)
    tl.store(values + there, value.to(values.dtype.element_ty), mask=inside)
    tl.store(values + there + DIM, seen.to(values.dtype.element_ty), mask=inside)


@triton.jit
def see_out(attended, project, out, length, tokens, width, frames, DIM: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    place = at // DIM * (2 * DIM) + at % DIM
    start = attended + row * 2 * width
    plain = tl.load(start + place, mask=inside, other=0.0)
    tl.store(out + row * 2 * width + at, plain, mask=inside)
    matrix = project + row // tokens * 16
    group, lane = place // 4 * 4, at % 4  # DIM is a multiple of 4
    total = tl.zeros_like(plain.to(tl.float32))
    for j in tl.static_range(4):
        y = tl.load(start + DIM + group + j, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(matrix + lane * 4 + j) * y
    tl.store(out + row * 2 * width + width + at, total.to(out.dtype.element_ty), mask=inside)
