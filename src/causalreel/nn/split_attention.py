"""Attention of inference, cut so that it fills the GPU: unmasked rectangles, keys in parts, merged by log-sum-exp.

Two things make plain attention slow here. One latent frame at 480x832 is 156 tiles of 128 queries on 132 processors: it
pays for two waves and uses little more than one; keys cut into parts that run side by side fill the waves. And the mask
of a fused call (`rollout.fuse`) is a few rectangles, each of which needs no mask at all.
No gradient. On a CPU and on GPUs without cuDNN's kernel the same code runs over other kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.nn import kernels
from causalreel.nn.masks import FrameMask

TILE = 128
"""Queries that one processor works on at a time."""

WAVE_US, MERGE_US, PART_US = 427 / 32760, 8.0, 8.0 / 1560
"""What a choice of parts costs, in microseconds: a wave of tiles per key; a merge; a part per query. Fitted to cuDNN on
an H200 with 12 heads of width 128; only the proportions matter."""

MAX_PARTS = 6


@dataclass(frozen=True)
class Rectangle:
    """Query frames [top, bottom) see all key frames [left, right)."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.bottom - self.top, self.right - self.left


@lru_cache(maxsize=4096)
def rectangles(mask: FrameMask) -> tuple[Rectangle, ...]:
    """The mask as disjoint rectangles: those of all queries first, then those of neighbours that see alike."""
    rows, count = mask.allowed, len(mask.allowed)
    common = tuple(all(column) for column in zip(*rows, strict=True))
    found = [Rectangle(0, count, a, b) for a, b in _runs(common)]
    top = 0
    while top < count:
        bottom = top + 1
        while bottom < count and rows[bottom] == rows[top]:
            bottom += 1
        own = tuple(sees and not shared for sees, shared in zip(rows[top], common, strict=True))
        found += [Rectangle(top, bottom, a, b) for a, b in _runs(own)]
        top = bottom
    return tuple(found)


def _runs(flags: tuple[bool, ...]) -> list[tuple[int, int]]:
    edges = [i for i in range(len(flags) + 1) if (flags[i] if i < len(flags) else False) != (i > 0 and flags[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@lru_cache(maxsize=4096)
def parts_of(queries: int, heads: int, keys: int, processors: int) -> int:
    """Into how many equal parts to cut `keys` keys, for `queries` queries of all `heads` heads, batch 1."""
    tiles = -(-queries // TILE) * heads

    def cost(parts: int) -> float:
        waves = -(-tiles * parts // processors) / parts
        return waves * keys * WAVE_US + (MERGE_US + parts * queries * PART_US if parts > 1 else 0)

    return min((p for p in range(1, MAX_PARTS + 1) if keys % p == 0), key=cost)


def attend_split(
    q: Tensor, k: Tensor, v: Tensor, mask: FrameMask | None, tokens: int, *, quantised: bool = False
) -> tuple[Tensor, Tensor | None]:
    """q (B,Lq,N,D), k, v (B,Lk,N,D), frame mask, tokens per frame -> (B,Lq,N,D); e4m3 and row scales if `quantised`."""
    whole = Rectangle(0, q.shape[1] // tokens, 0, k.shape[1] // tokens)
    cut = (whole,) if mask is None else rectangles(mask)
    processors = _processors(q.device)
    if len(cut) == 1 and (q.shape[0] > 1 or parts_of(q.shape[1], q.shape[2], k.shape[1], processors) == 1):
        out = attend_plain(q, k, v)
        return kernels.quantise_heads(out) if quantised else (out, None)
    samples = []
    for b in range(q.shape[0]):  # every sample's tiles fill the processors by themselves
        row = slice(b, b + 1)
        samples.append(_sample(q[row], k[row], v[row], cut, tokens, processors, quantised))
    outs, scales = zip(*samples, strict=True)
    return (outs[0] if len(outs) == 1 else torch.cat(outs)), (None if scales[0] is None else torch.cat(scales))


def _sample(
    q: Tensor, k: Tensor, v: Tensor, cut: tuple[Rectangle, ...], tokens: int, processors: int, quantised: bool
) -> tuple[Tensor, Tensor | None]:
    """One sample: (1,Lq,N,D) -> (1,Lq,N,D)."""
    frames = q.shape[1] // tokens
    full = [r for r in cut if r.shape[0] == frames]
    rest = [r for r in cut if r.shape[0] < frames]
    if len(full) != 1 or len(rest) > 2 or (len(rest) == 2 and not _halves(rest, frames)):
        return _general(q, k, v, cut, tokens, quantised)
    aside = _Aside(q.device)
    with aside:  # small, and it fills what the last wave of the large ones leaves idle
        extra = _pair(q, k, v, rest[0], rest[1], tokens) if len(rest) == 2 else None
        if len(rest) == 1:
            rows, keys = (slice(a * tokens, b * tokens) for a, b in _sides(rest[0]))
            extra = _in_parts(q[:, rows], k[:, keys], v[:, keys], 1)
    parts: list[tuple[Tensor, Tensor]] = []
    for r in full:
        keys = slice(r.left * tokens, r.right * tokens)
        count = parts_of(q.shape[1], q.shape[2], (r.right - r.left) * tokens, processors)
        parts.append(_in_parts(q, k[:, keys], v[:, keys], count))
    aside.join()
    result = _Result(q, quantised)
    if extra is None or len(rest) == 2:
        result.write(slice(None), parts if extra is None else [*parts, extra])
        return result.whole()
    for top, bottom in ((0, rest[0].top), (rest[0].top, rest[0].bottom), (rest[0].bottom, frames)):
        if top < bottom:
            rows = slice(top * tokens, bottom * tokens)
            here = [(out[:, rows], lse[:, :, rows]) for out, lse in parts]
            result.write(rows, [*here, extra] if top == rest[0].top else here)
    return result.whole()


class _Result:
    """Where partial results of one sample's queries q (1,Lq,N,D) come together; e4m3 with row scales if `quantised`."""

    def __init__(self, q: Tensor, quantised: bool) -> None:
        self.out = torch.empty(q.shape[1:], dtype=kernels.FP8 if quantised else q.dtype, device=q.device)
        self.scale = torch.empty(q.shape[1], 1, device=q.device) if quantised else None

    def write(self, rows: slice, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Merge (P,L,N,D), (P,N,L) of these rows."""
        kernels.merge(parts, self.out[rows], None if self.scale is None else self.scale[rows])

    def whole(self) -> tuple[Tensor, Tensor | None]:
        return self.out.unsqueeze(0), self.scale


def _halves(rest: list[Rectangle], frames: int) -> bool:
    """Whether two rectangles of one shape lie one below the other and take up all rows."""
    first, second = rest
    covers = first.top == 0 and first.bottom == second.top and second.bottom == frames
    return covers and first.shape == second.shape


def _sides(r: Rectangle) -> tuple[tuple[int, int], tuple[int, int]]:
    return (r.top, r.bottom), (r.left, r.right)


class _Aside:
    """A branch beside the work that follows; `join` waits for it. On a CPU it is simply done at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = _side_stream(device) if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
            self._context = torch.cuda.stream(self.stream)
            self._context.__enter__()

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            self._context.__exit__(*error)

    def join(self) -> None:
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _general(
    q: Tensor, k: Tensor, v: Tensor, cut: tuple[Rectangle, ...], tokens: int, quantised: bool
) -> tuple[Tensor, Tensor | None]:
    """Any mask: query frames that see alike, one after the other, over their gathered keys."""
    pieces = []
    for frame in range(q.shape[1] // tokens):
        seen = [r for r in cut if r.top <= frame < r.bottom]
        rows = slice(frame * tokens, (frame + 1) * tokens)
        keys, values = (torch.cat([x[:, r.left * tokens : r.right * tokens] for r in seen], 1) for x in (k, v))
        pieces.append(attend_plain(q[:, rows], keys, values))
    out = torch.cat(pieces, 1)
    return kernels.quantise_heads(out) if quantised else (out, None)


def _in_parts(q: Tensor, k: Tensor, v: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """q (1,Lq,N,D), k, v (1,Lk,N,D) -> per part of the keys: out (P,Lq,N,D), log-sum-exp (P,N,Lq)."""
    keys, values = (x[0].unflatten(0, (count, -1)) for x in (k, v))  # (P,Lk/P,N,D)
    return attend_with_sum(q.expand(count, -1, -1, -1).contiguous(), keys, values)


def _pair(q: Tensor, k: Tensor, v: Tensor, a: Rectangle, b: Rectangle, tokens: int) -> tuple[Tensor, Tensor]:
    """Two rectangles of one shape, one below the other, as one batch of two -> (1,rows of both,N,D), (1,N,rows)."""
    rows, keys = (length * tokens for length in a.shape)
    queries = _two(q, a.top * tokens, b.top * tokens, rows)
    lent = (_two(x, a.left * tokens, b.left * tokens, keys) for x in (k, v))
    out, lse = attend_with_sum(queries, *lent)  # (2,rows,N,D), (2,N,rows)
    return out.flatten(0, 1).unsqueeze(0), lse.transpose(0, 1).flatten(1).unsqueeze(0)


def _two(x: Tensor, first: int, second: int, length: int) -> Tensor:
    """Rows [first, +length) and [second, +length) of x (1,L,N,D) as a view (2,length,N,D)."""
    low, high = min(first, second), max(first, second)
    step = x.stride(1)
    size, stride = (2, length, *x.shape[2:]), ((high - low) * step, *x.stride()[1:])
    view = x.as_strided(size, stride, x.storage_offset() + low * step)
    return view if first < second else view.flip(0)


# ------------------------------------------------------------------------------------------------------ kernels


def attend_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B,Lq,N,D), k, v (B,Lk,N,D) -> (B,Lq,N,D), no mask, by the fastest kernel there is."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,N,L,D)
    if not _has_cudnn_attention(q):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0].transpose(1, 2)


def attend_with_sum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q (B,Lq,N,D), k, v (B,Lk,N,D) -> out (B,Lq,N,D) and the natural log-sum-exp (B,N,Lq) of its scores."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,N,L,D)
    ops = torch.ops.aten
    if _has_cudnn_attention(q):
        out, lse = ops._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        lse = lse.view(lse.shape[:3])
    elif q.is_cuda:
        out, lse = ops._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    return out.transpose(1, 2), lse


def _has_cudnn_attention(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and _is_hopper_or_later(q.device)


@lru_cache(maxsize=16)
def _is_hopper_or_later(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9 and torch.backends.cudnn.is_available()


@lru_cache(maxsize=16)
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
