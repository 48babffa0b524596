"""Triton kernels behind `nn.kernels`, which says what they compute. A program handles a few rows of tokens at most."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row_to_fp8(y, out, row_scale, row, width, at, inside):
    """Write one row as e4m3 and its scale."""
    scale = tl.maximum(tl.max(tl.where(inside, tl.abs(y), 0.0), 0), 1e-12) / 448.0
    tl.store(row_scale + row, scale)
    tl.store(out + row * width + at, (y * (1.0 / scale)).to(tl.float8e4nv), mask=inside)


@triton.jit
def residual_norm(
    x,
    branch,
    gate,
    scale,
    shift,
    total,
    out,
    row_scale,
    width,
    tokens,
    frames,
    eps,
    gate_stride,
    scale_stride,
    HAS_BRANCH: tl.constexpr,
    HAS_GATE: tl.constexpr,
    QUANTISED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program handles ROWS rows of one frame, so that modulation, longer than a row in float32, is read once."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    frame = (first // tokens) % frames
    channel = tl.arange(0, BLOCK)
    inside = (channel < width)[None, :]
    row = first + tl.arange(0, ROWS)
    at = row[:, None] * width + channel[None, :]
    y = tl.load(x + at, mask=inside, other=0.0)
    if HAS_BRANCH:
        added = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            added *= tl.load(gate + frame * gate_stride + channel, mask=channel < width, other=0.0)[None, :]
        y = (y.to(tl.float32) + added).to(y.dtype)
        tl.store(total + at, y, mask=inside)
    y = y.to(tl.float32)
    mean = tl.sum(y, 1) / width
    y = tl.where(inside, y - mean[:, None], 0.0)
    y *= tl.rsqrt(tl.sum(y * y, 1) / width + eps)[:, None]
    y *= tl.load(scale + frame * scale_stride + channel, mask=channel < width, other=0.0).to(tl.float32)[None, :]
    y += tl.load(shift + frame * scale_stride + channel, mask=channel < width, other=0.0).to(tl.float32)[None, :]
    if QUANTISED:
        top = tl.maximum(tl.max(tl.where(inside, tl.abs(y), 0.0), 1), 1e-12) / 448.0
        tl.store(row_scale + row, top)
        y *= (1.0 / top)[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _normed_and_rotated(x, weight, cosine, sine, width, eps, at, inside, BLOCK: tl.constexpr):
    """One row: RMS norm over the full width, then neighbouring channels turned as pairs."""
    y = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 0) / width + eps)
    y *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(y, [BLOCK // 2, 2]))
    return tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [BLOCK])


@triton.jit
def norm_rotate(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    q,
    keys,
    values,
    slots,
    length,
    width,
    pairs,
    eps,
    batch_stride,
    copy_stride,
    COPIES: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    PACKED: tl.constexpr,
    TURNS_KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // length, row % length
    at = tl.arange(0, BLOCK)
    inside = at < width
    pair = tl.arange(0, BLOCK // 2) % pairs
    cosine, sine = tl.load(cos + token * pairs + pair), tl.load(sin + token * pairs + pair)
    start = qkv + row * 3 * width
    turned = _normed_and_rotated(start, q_weight, cosine, sine, width, eps, at, inside, BLOCK)
    if PACKED:
        turned = tl.clamp(turned, -448.0, 448.0)
    for p in tl.static_range(COPIES):
        there = p * copy_stride + row * width + at
        tl.store(q + there, turned.to(q.dtype.element_ty), mask=inside)
    if not TURNS_KEYS:
        cosine, sine = cosine * 0.0 + 1.0, sine * 0.0
    turned = _normed_and_rotated(start + width, k_weight, cosine, sine, width, eps, at, inside, BLOCK)
    if HAS_SLOTS:
        there = sample * batch_stride + tl.load(slots + token) * width + at
        if PACKED:  # values go elsewhere, by store_columns
            turned = tl.clamp(turned, -448.0, 448.0)
        else:
            value = tl.load(start + 2 * width + at, mask=inside, other=0.0)
            tl.store(values + there, value.to(values.dtype.element_ty), mask=inside)
    else:
        there = row * width + at
    tl.store(keys + there, turned.to(keys.dtype.element_ty), mask=inside)


@triton.jit
def gather_turned(
    keys, values, rows, cos, sin, out_keys, out_values, length, width, pairs, batch_stride, BLOCK: tl.constexpr
):
    """Row `rows[i]` of keys (B,rows,E), neighbouring channels turned, and of values as row i of the results."""
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // length, row % length
    at = tl.arange(0, BLOCK)
    inside = at < width
    source = sample * batch_stride + tl.load(rows + token) * width + at
    tl.store(out_values + row * width + at, tl.load(values + source, mask=inside, other=0.0), mask=inside)
    pair = tl.arange(0, BLOCK // 2) % pairs
    cosine, sine = tl.load(cos + token * pairs + pair), tl.load(sin + token * pairs + pair)
    even, odd = tl.split(tl.reshape(tl.load(keys + source, mask=inside, other=0.0).to(tl.float32), [BLOCK // 2, 2]))
    turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [BLOCK])
    tl.store(out_keys + row * width + at, turned.to(out_keys.dtype.element_ty), mask=inside)


@triton.jit
def turn_into(keys, cos, sin, out, length, width, pairs, keys_stride, out_stride, BLOCK: tl.constexpr):
    """Rows of keys (B,L,E), neighbouring channels turned by the row's own angles, as the same rows of out."""
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // length, row % length
    at = tl.arange(0, BLOCK)
    inside = at < width
    given = tl.load(keys + sample * keys_stride + token * width + at, mask=inside, other=0.0).to(tl.float32)
    pair = tl.arange(0, BLOCK // 2) % pairs
    cosine, sine = tl.load(cos + row * pairs + pair), tl.load(sin + row * pairs + pair)
    even, odd = tl.split(tl.reshape(given, [BLOCK // 2, 2]))
    turned = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), [BLOCK])
    tl.store(out + sample * out_stride + token * width + at, turned.to(out.dtype.element_ty), mask=inside)


@triton.jit
def store_columns(
    qkv,
    values,
    slots,
    length,
    width,
    columns,
    run,
    blocks,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The last third of rows (B,L,3E) as columns of values (B,E,columns), in e4m3; see kernels.column_of.

    `run` tokens at a time lie side by side. A program looks up, for neighbouring columns, whose value they take.
    """
    sample = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0) // blocks * run
    slot = tl.load(slots + first)
    start = tl.multiple_of(slot - slot % 16 + tl.program_id(0) % blocks * COLUMNS, 16)
    column = start + tl.arange(0, COLUMNS)
    row = column - column % 16 + column % 4 // 2 * 8 + column % 16 // 4 * 2 + column % 2 - slot
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    is_row, is_channel = (row >= 0) & (row < run), channel < width
    at = qkv + (sample * length + first + row)[:, None] * (3 * width) + (2 * width + channel)[None, :]
    value = tl.load(at, mask=is_row[:, None] & is_channel[None, :], other=0.0).to(tl.float32)
    value = tl.trans(tl.clamp(value, -448.0, 448.0)).to(values.dtype.element_ty)
    there = values + (sample * width + channel)[:, None] * columns + column[None, :]
    if (start >= slot) & (start + COLUMNS <= slot + run):  # no mask along the columns, so that 16 are stored at once
        tl.store(there, value, mask=is_channel[:, None])
    else:
        tl.store(there, value, mask=is_channel[:, None] & is_row[None, :])


@triton.jit
def norm_rows(x, weight, out, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    y = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 0) / width + eps)
    y *= tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def merge(
    out,
    lse,
    extra,
    extra_lse,
    result,
    row_scale,
    out_p,
    out_l,
    lse_p,
    lse_n,
    lse_l,
    extra_p,
    extra_l,
    extra_lse_p,
    extra_lse_n,
    extra_lse_l,
    PARTS: tl.constexpr,
    EXTRA: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    QUANTISED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_BLOCK)
    is_head = head < HEADS
    at = head[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    inside = is_head[:, None] & (at >= 0)
    top = tl.full([HEAD_BLOCK], float("-inf"), tl.float32)
    for p in tl.static_range(PARTS):
        top = tl.maximum(top, tl.load(lse + p * lse_p + head * lse_n + row * lse_l, mask=is_head, other=0.0))
    for p in tl.static_range(EXTRA):
        there = extra_lse + p * extra_lse_p + head * extra_lse_n + row * extra_lse_l
        top = tl.maximum(top, tl.load(there, mask=is_head, other=0.0))
    total = tl.zeros([HEAD_BLOCK], tl.float32)
    y = tl.zeros([HEAD_BLOCK, WIDTH], tl.float32)
    for p in tl.static_range(PARTS):
        weight = tl.exp(tl.load(lse + p * lse_p + head * lse_n + row * lse_l, mask=is_head, other=0.0) - top)
        y += weight[:, None] * tl.load(out + p * out_p + row * out_l + at, mask=inside, other=0.0).to(tl.float32)
        total += weight
    for p in tl.static_range(EXTRA):
        there = extra_lse + p * extra_lse_p + head * extra_lse_n + row * extra_lse_l
        weight = tl.exp(tl.load(there, mask=is_head, other=0.0) - top)
        y += weight[:, None] * tl.load(extra + p * extra_p + row * extra_l + at, mask=inside, other=0.0).to(tl.float32)
        total += weight
    y /= total[:, None]
    if QUANTISED:
        scale = tl.maximum(tl.max(tl.max(tl.where(inside, tl.abs(y), 0.0), 1), 0), 1e-12) / 448.0
        tl.store(row_scale + row, scale)
        y *= 1.0 / scale
    tl.store(result + row * HEADS * WIDTH + at, y.to(result.dtype.element_ty), mask=inside)


@triton.jit
def _gelu(x, row, width, at):
    y = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))  # 0.5 (1 + tanh z) = sigmoid(2 z)


@triton.jit
def gelu(x, out, row_scale, width, QUANTISED: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr):
    """A row in two pieces, of BLOCK and of REST, so that few threads are idle."""
    row = tl.program_id(0).to(tl.int64)
    at, rest = tl.arange(0, BLOCK), BLOCK + tl.arange(0, REST)
    y, z = _gelu(x, row, width, at), _gelu(x, row, width, rest)
    if QUANTISED:
        top = tl.maximum(tl.max(tl.abs(y), 0), tl.max(tl.abs(z), 0))  # what is not inside is 0
        scale = tl.maximum(top, 1e-12) / 448.0
        tl.store(row_scale + row, scale)
        y *= 1.0 / scale
        z *= 1.0 / scale
    tl.store(out + row * width + at, y.to(out.dtype.element_ty), mask=at < width)
    tl.store(out + row * width + rest, z.to(out.dtype.element_ty), mask=rest < width)


@triton.jit
def quantise(x, out, row_scale, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    y = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    _row_to_fp8(y, out, row_scale, row, width, at, inside)
