"""The kernel behind `kernels.attend_e4m3`: forward attention in e4m3, for Hopper's 8-bit products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SHIFT = tl.constexpr(8)
"""Probabilities are multiplied by 2^SHIFT, to use e4m3's range: it ends at 448."""


def allocate_on(device: torch.device) -> None:
    """Give Triton, in this thread, the memory in which a kernel writes its descriptors."""
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))


@triton.jit
def _step(
    acc,
    total,
    top,
    query,
    key_at,
    value_at,
    start,
    left,
    right,
    score,
    channel,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block of keys. `top`: the largest score so far in base 2, less SHIFT."""
    s = tl.dot(query, key_at.load([start, channel]).T)
    if MASKED:
        row = start + tl.arange(0, BLOCK)
        s = tl.where(((row >= left) & (row < right))[None, :], s, float("-inf"))
    new = tl.maximum(top, tl.max(s, 1) * score - SHIFT)
    p = tl.math.exp2(s * score - new[:, None])
    alpha = tl.math.exp2(top - new)
    total = total * alpha + tl.sum(p, 1)
    value = value_at.load([channel, start])
    p = p.to(value.dtype)
    p = tl.reshape(tl.permute(tl.reshape(p, (p.shape[0], BLOCK // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (p.shape[0], BLOCK))
    # added here in float32: a product with 8 bits a number adds with about 14 bits, and always rounds towards zero
    return acc * alpha[:, None] + tl.dot(p, value.T), total, new


@triton.jit
def attend_e4m3(
    q,
    keys,
    values,
    tiles,
    out,
    lse,
    length,
    rows,
    columns,
    score,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a tile of queries, a head, a part of the keys the tile sees.

    Blocks begin at multiples of 16, because values lie in groups of 16; keys outside [left, right) are masked, which
    can be in the first and the last block only. These two come last: their order does not matter.
    """
    head, part, parts = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
    tile = tiles + 4 * tl.program_id(0)
    first_row, end, left, right = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    row = first_row + tl.arange(0, TILE)
    inside = row < end
    at = row[:, None] * (HEADS * WIDTH) + (head * WIDTH + tl.arange(0, WIDTH))[None, :]
    query = tl.load(q + at, mask=inside[:, None], other=0.0)
    key_at = tl.make_tensor_descriptor(
        keys, shape=[rows, HEADS * WIDTH], strides=[HEADS * WIDTH, 1], block_shape=[BLOCK, WIDTH]
    )
    value_at = tl.make_tensor_descriptor(
        values, shape=[HEADS * WIDTH, columns], strides=[columns, 1], block_shape=[WIDTH, BLOCK]
    )
    acc = tl.zeros([TILE, WIDTH], dtype=tl.float32)
    total = tl.zeros([TILE], dtype=tl.float32)
    top = tl.full([TILE], float("-inf"), dtype=tl.float32)
    begin = left - left % 16
    blocks = tl.cdiv(right - begin, BLOCK)
    first, last = blocks * part // parts, blocks * (part + 1) // parts
    full = first + ((first == 0) & (begin < left)).to(tl.int32)
    full_end = tl.maximum(tl.minimum(last, (right - begin) // BLOCK), full)
    channel = head * WIDTH
    for block in tl.range(full, full_end):
        start = begin + block * BLOCK
        acc, total, top = _step(
            acc, total, top, query, key_at, value_at, start, left, right, score, channel, BLOCK, False
        )
    partial = (full - first) + (last - full_end)
    for i in tl.range(0, partial, num_stages=1):
        block = tl.where(i < full - first, first, full_end + i - (full - first))
        start = begin + block * BLOCK
        acc, total, top = _step(
            acc, total, top, query, key_at, value_at, start, left, right, score, channel, BLOCK, True
        )
    there = part.to(tl.int64) * length * (HEADS * WIDTH) + at
    tl.store(out + there, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    where = (part * HEADS + head) * length + row
    tl.store(lse + where, (top + tl.math.log2(total)) * 0.6931471805599453, mask=inside)
