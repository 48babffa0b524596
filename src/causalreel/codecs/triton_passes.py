"""Triton kernels of `codecs.passes`, for CUDA (and, for tests, Triton's interpreter)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from causalreel.codecs.passes import EPS, Sink, Source

SOURCES = {"frames": 0, "pairs": 1, "winograd": 2, "stacked": 3, "phases": 4}
SINKS = {"none": 0, "frames": 1, "halo": 2, "taps": 3, "winograd": 4, "alone": 5, "wide": 6}


@triton.jit(do_not_specialize=["pixels", "width"])
def _between(
    data,
    product1,
    product2,
    product3,
    bias,
    pending,
    residual,
    kept,
    gamma,
    sink,
    state,
    pixels,
    width,
    T: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    UNROLL: tl.constexpr,
    SOURCE: tl.constexpr,
    SINK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KEEP: tl.constexpr,
    NORM: tl.constexpr,
    FRESH: tl.constexpr,
    EPSILON: tl.constexpr,
) -> None:
    """One program: ROWS pixels of one sample, all channels and all frames."""
    b = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, LANES)[None, :]
    inside = (pixel < pixels) & (c < C)
    place = pixel * C + c  # in one frame
    frame = tl.cast(pixels, tl.int64) * C
    zero = tl.zeros([ROWS, LANES], tl.float32)

    shift = zero
    if HAS_BIAS:
        shift += tl.load(bias + c, mask=c < C, other=0.0)
    gain = zero
    if NORM:
        gain += tl.load(gamma + c, mask=c < C, other=0.0)

    begun, begun_next = zero, zero
    if SOURCE == 3 and not FRESH:
        begun = tl.load(pending + 2 * b * frame + place, mask=inside, other=0.0).to(tl.float32)
        begun_next = tl.load(pending + (2 * b + 1) * frame + place, mask=inside, other=0.0).to(tl.float32)

    oldest, older, newer = zero, zero, zero
    if SINK >= 2 and not FRESH:
        older = tl.load(state + 2 * b * frame + place, mask=inside, other=0.0).to(tl.float32)
        newer = tl.load(state + (2 * b + 1) * frame + place, mask=inside, other=0.0).to(tl.float32)
    if SINK == 2:
        tl.store(sink + b * (T + 2) * frame + place, older.to(sink.dtype.element_ty), mask=inside)
        tl.store(sink + (b * (T + 2) + 1) * frame + place, newer.to(sink.dtype.element_ty), mask=inside)

    second = zero
    for group in range(T // UNROLL):
        for step in tl.static_range(UNROLL):
            t = group * UNROLL + step
            x = zero
            if SOURCE == 0:
                x = tl.load(data + (b * T + t) * frame + place, mask=inside, other=0.0).to(tl.float32)
            if SOURCE == 1:
                half = (b * (T // 2) + t // 2) * frame * 2
                x = tl.load(data + half + pixel * (2 * C) + (step % 2) * C + c, mask=inside, other=0.0).to(tl.float32)
            if SOURCE == 2:
                if step % 2 == 0:
                    pair = (b * (T // 2) + t // 2) * frame
                    m0 = tl.load(data + pair + place, mask=inside, other=0.0).to(tl.float32)
                    m1 = tl.load(product1 + pair + place, mask=inside, other=0.0).to(tl.float32)
                    m2 = tl.load(product2 + pair + place, mask=inside, other=0.0).to(tl.float32)
                    m3 = tl.load(product3 + pair + place, mask=inside, other=0.0).to(tl.float32)
                    x = m0 + m1 + m2
                    second = m1 - m2 - m3
                else:
                    x = second
            if SOURCE == 3:
                three = data + (b * T + t) * frame * 3 + pixel * (3 * C) + c
                x = tl.load(three + 2 * C, mask=inside, other=0.0).to(tl.float32) + begun
                begun = tl.load(three + C, mask=inside, other=0.0).to(tl.float32) + begun_next
                begun_next = tl.load(three, mask=inside, other=0.0).to(tl.float32)
            if SOURCE == 4:
                row, column = pixel // width, pixel % width
                across = width // 2 + 1
                down = pixels // width // 2 + 1
                where = (row // 2 + row % 2) * across + column // 2 + column % 2
                four = (b * T + t) * (tl.cast(down, tl.int64) * across * (4 * C))
                offset = where * (4 * C) + ((row % 2) * 2 + column % 2) * C + c
                x = tl.load(data + four + offset, mask=inside, other=0.0).to(tl.float32)
            x += shift
            if HAS_RESIDUAL:
                x += tl.load(residual + (b * T + t) * frame + place, mask=inside, other=0.0).to(tl.float32)
            if KEEP:
                tl.store(kept + (b * T + t) * frame + place, x.to(kept.dtype.element_ty), mask=inside)
            if SINK >= 1:
                y = x
                if NORM:
                    x = tl.where(inside, x, 0.0)
                    mean = tl.sum(x * x, 1) / C
                    y = x * (1.0 / tl.sqrt(mean + EPSILON))[:, None] * gain
                    y = y / (1.0 + tl.exp(-y))
                stored = y.to(sink.dtype.element_ty)
                if SINK == 1 or SINK == 5:
                    tl.store(sink + (b * T + t) * frame + place, stored, mask=inside)
                if SINK == 2:
                    tl.store(sink + (b * (T + 2) + 2 + t) * frame + place, stored, mask=inside)
                if SINK == 3:
                    taps = sink + (b * T + t) * frame * 3 + pixel * (3 * C) + c
                    tl.store(taps, older.to(sink.dtype.element_ty), mask=inside)
                    tl.store(taps + C, newer.to(sink.dtype.element_ty), mask=inside)
                    tl.store(taps + 2 * C, stored, mask=inside)
                if (SINK == 4 or SINK == 6) and step % 2 == 1:  # the pair's four frames are oldest, older, newer, y
                    large = frame
                    there = place
                    if SINK == 6:  # a column of zeros on either side
                        large = frame + tl.cast(pixels // width, tl.int64) * (2 * C)
                        there = place + (2 * (pixel // width) + 1) * C
                    far = tl.num_programs(1).to(tl.int64) * (T // 2) * large
                    v = sink + (b * (T // 2) + t // 2) * large + there
                    tl.store(v, (oldest - newer).to(sink.dtype.element_ty), mask=inside)
                    tl.store(v + far, (older + newer).to(sink.dtype.element_ty), mask=inside)
                    tl.store(v + 2 * far, (newer - older).to(sink.dtype.element_ty), mask=inside)
                    tl.store(v + 3 * far, (older - y).to(sink.dtype.element_ty), mask=inside)
                    if SINK == 6:
                        nothing = zero.to(sink.dtype.element_ty)
                        left = inside & (pixel % width == 0)
                        right = inside & (pixel % width == width - 1)
                        for k in tl.static_range(4):
                            tl.store(v + k * far - C, nothing, mask=left)
                            tl.store(v + k * far + C, nothing, mask=right)
                oldest = older
                older = newer
                newer = y
    if SOURCE == 3:
        tl.store(pending + 2 * b * frame + place, begun.to(pending.dtype.element_ty), mask=inside)
        tl.store(pending + (2 * b + 1) * frame + place, begun_next.to(pending.dtype.element_ty), mask=inside)
    if SINK >= 2:
        tl.store(state + 2 * b * frame + place, older.to(state.dtype.element_ty), mask=inside)
        tl.store(state + (2 * b + 1) * frame + place, newer.to(state.dtype.element_ty), mask=inside)


def between(
    source: Source, sink: Sink | None, *, residual: Tensor | None, keep: bool, fresh: bool
) -> tuple[Tensor | None, Tensor | None]:
    """See `passes.between`."""
    shape = source.shape
    b, t, h, w, c = shape
    data = source.data
    kept = data.new_empty(shape) if keep else None
    out = None if sink is None else data.new_empty(sink.stored(shape))
    gamma, state = (None, None) if sink is None else (sink.gamma, sink.state)
    for tensor in (data, *source.more, residual, state, source.pending):
        assert tensor is None or tensor.is_contiguous(), "passes read dense channels-last tensors"
    lanes = triton.next_power_of_2(c)
    rows = max(1, 1024 // lanes)
    _between[(triton.cdiv(h * w, rows), b)](
        data,
        *(source.more or (data, data, data)),
        *(data if tensor is None else tensor for tensor in (source.bias, source.pending, residual, kept, gamma)),
        *(data if tensor is None else tensor for tensor in (out, state)),
        h * w,
        w,
        T=t,
        C=c,
        LANES=lanes,
        ROWS=rows,
        UNROLL=next(n for n in (t if t <= 4 else 4, 2, 1) if t % n == 0),
        SOURCE=SOURCES[source.kind],
        SINK=SINKS[sink.kind if sink is not None else "none"],
        HAS_BIAS=source.bias is not None,
        HAS_RESIDUAL=residual is not None,
        KEEP=keep,
        NORM=gamma is not None,
        FRESH=fresh,
        EPSILON=EPS,
        num_warps=4,
    )
    return kept, out


@triton.jit(do_not_specialize=["pixels", "width", "columns"])
def _gather_head(
    parts,
    bias,
    pending,
    video,
    pixels,
    width,
    columns,
    scale,
    shift,
    T: tl.constexpr,
    TIMES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    PIXELS: tl.constexpr,
    FRESH: tl.constexpr,
) -> None:
    """One program: PIXELS pixels of one output channel of one sample, all frames."""
    output, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < pixels
    row, column = pixel // width, pixel % width
    height = pixels // width
    zero = tl.zeros([PIXELS], tl.float32)
    far = tl.cast(columns, tl.int64)  # from one row of parts to the next
    frame = tl.cast(pixels, tl.int64)
    begun, begun_next = zero, zero
    held = pending + (b * 2 * OUTPUTS + output) * frame + pixel
    if TIMES == 3 and not FRESH:
        begun = tl.load(held, mask=inside, other=0.0)
        begun_next = tl.load(held + OUTPUTS * frame, mask=inside, other=0.0)
    offset = tl.load(bias + output)
    for t in range(T):
        first, middle, last = zero, zero, zero
        at = parts + (b * T + t) * frame + pixel
        for i in tl.static_range(3):
            for j in tl.static_range(3):
                near = inside & (row + i >= 1) & (row + i <= height) & (column + j >= 1) & (column + j <= width)
                there = at + (i - 1) * width + (j - 1) + ((i * 3 + j) * OUTPUTS + output) * far
                last += tl.load(there + (TIMES - 1) * 9 * OUTPUTS * far, mask=near, other=0.0).to(tl.float32)
                if TIMES == 3:
                    middle += tl.load(there + 9 * OUTPUTS * far, mask=near, other=0.0).to(tl.float32)
                    first += tl.load(there, mask=near, other=0.0).to(tl.float32)
        total = (last + begun + offset) * scale + shift
        begun = begun_next + middle
        begun_next = first
        total = tl.minimum(tl.maximum(total, -1.0), 1.0)
        tl.store(video + ((b * T + t) * OUTPUTS + output) * frame + pixel, total, mask=inside)
    if TIMES == 3:
        tl.store(held, begun, mask=inside)
        tl.store(held + OUTPUTS * frame, begun_next, mask=inside)


def gather_head(
    parts: Tensor,
    bias: Tensor,
    shape: tuple[int, int, int, int],
    *,
    pending: Tensor | None,
    fresh: bool,
    scale: float,
    shift: float,
) -> Tensor:
    """See `passes.gather_head`."""
    (b, t, h, w), outputs = shape, bias.numel()
    video = parts.new_empty((b, t, outputs, h, w), dtype=torch.float32)
    assert parts.is_contiguous() and (pending is None or pending.is_contiguous())
    _gather_head[(triton.cdiv(h * w, 256), outputs, b)](
        parts,
        bias,
        video if pending is None else pending,
        video,
        h * w,
        w,
        parts.shape[1],
        scale,
        shift,
        T=t,
        TIMES=1 if pending is None else 3,
        OUTPUTS=outputs,
        PIXELS=256,
        FRESH=fresh,
        num_warps=4,
    )
    return video


@triton.jit(do_not_specialize=["pixels", "width"])
def _spread_phases(
    data,
    frames,
    pixels,
    width,
    TIMES: tl.constexpr,
    C: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    RECTIFY: tl.constexpr,
) -> None:
    """One program: ROWS output pixels of the frames that one frame becomes."""
    frame = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, LANES)[None, :]
    inside = (pixel < pixels) & (c < C)
    row, column = pixel // width, pixel % width
    across = width // 2 + 1
    down = pixels // width // 2 + 1
    where = (row // 2 + row % 2) * across + column // 2 + column % 2
    source = data + frame * (tl.cast(down, tl.int64) * across * (4 * TIMES * C))
    source += where * (4 * TIMES * C) + ((row % 2) * 2 + column % 2) * (TIMES * C) + c
    target = frames + frame * TIMES * (tl.cast(pixels, tl.int64) * C) + pixel * C + c
    for k in tl.static_range(TIMES):
        x = tl.load(source + k * C, mask=inside, other=0.0)
        if RECTIFY:
            x = tl.maximum(x, 0.0).to(x.dtype)
        tl.store(target + k * (tl.cast(pixels, tl.int64) * C), x, mask=inside)


def spread_phases(data: Tensor, times: int, *, rectify: bool) -> Tensor:
    """See `passes.spread_phases`."""
    b, t, down, across, channels = data.shape
    h, w, c = 2 * (down - 1), 2 * (across - 1), channels // (4 * times)
    frames = data.new_empty(b, t * times, h, w, c)
    assert data.is_contiguous()
    lanes = triton.next_power_of_2(c)
    rows = max(1, 2048 // lanes)
    _spread_phases[(triton.cdiv(h * w, rows), b * t)](
        data, frames, h * w, w, TIMES=times, C=c, LANES=lanes, ROWS=rows, RECTIFY=rectify, num_warps=4
    )
    return frames
