"""Attention of inference, cut so that it fills the GPU: unmasked rectangles, keys in parts, merged by log-sum-exp.

Two things make plain attention slow here. One latent frame at 480x832 is 156 tiles of 128 queries on 132 processors: it
pays for two waves and uses little more than one; keys cut into parts that run side by side fill the waves. And the mask
of a fused call (`rollout.fuse`) is a few rectangles, each of which needs no mask at all.
No gradient. On a CPU and on GPUs without cuDNN's kernel the same code runs over other kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.nn import kernels
from causalreel.nn.masks import FrameMask

TILE = 128
"""Queries that one processor works on at a time."""

WAVE_US, MERGE_US, PART_US = 427 / 32760, 8.0, 6.0 / 1560
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
    possible = (p for p in range(1, MAX_PARTS + 1) if keys % p == 0)
    return min(possible, key=lambda parts: _cost(queries, heads, keys, parts, processors))


def _cost(queries: int, heads: int, keys: int, parts: int, processors: int) -> float:
    """Microseconds, about."""
    waves = -(-_tiles(queries, heads) * parts // processors) / parts
    return waves * keys * WAVE_US + (MERGE_US + parts * queries * PART_US if parts > 1 else 0)


def fills(queries: int, heads: int, processors: int) -> bool:
    """Whether so many queries of one sample keep all processors busy: samples may then come one after the other."""
    return _tiles(queries, heads) >= processors


def _tiles(queries: int, heads: int) -> int:
    return -(-queries // TILE) * heads


@dataclass(frozen=True)
class Work:
    """How a call is cut: rectangles of neighbouring queries, each over one run of keys that is cut into parts.

    Rectangles that share queries are merged; those behind the first run beside it.
    """

    pieces: tuple[tuple[Rectangle, int], ...]

    @property
    def copies(self) -> int:
        """Copies of the queries that lie side by side, one for each part of the keys."""
        return max(parts for _, parts in self.pieces)

    @property
    def is_plain(self) -> bool:
        return len(self.pieces) == 1 and self.copies == 1


@lru_cache(maxsize=4096)
def work_of(mask: FrameMask | None, frames: tuple[int, int], tokens: int, heads: int, processors: int) -> Work | None:
    """How to cut a call with `frames` query and key frames; None for masks that fit neither way.

    Groups of queries that see alike, each over its own run of keys, if each group fills the processors twice; otherwise
    all queries over the keys they share, and small rectangles for the rest. On an H200 at 480x832 a fused call over 21
    frames took 1058 us the second way for single frames and 3152 us for chunks of three; the first way was not timed as
    a whole, the calls it consists of add up to about 1120 and 2940.
    """
    rows, columns = frames
    shared = [Rectangle(0, rows, 0, columns)] if mask is None else list(rectangles(mask))
    groups = [] if mask is None else groups_of(mask)
    is_filled = all(_tiles(r.shape[0] * tokens, heads) >= 2 * processors for r in groups)
    ways = [way for way in ([groups, shared] if is_filled else [shared, groups]) if way and _fits(way, rows)]
    if not ways:
        return None
    cut = ((r, parts_of(r.shape[0] * tokens, heads, r.shape[1] * tokens, processors)) for r in ways[0])
    return Work(tuple(cut))


def copies_for(mask: FrameMask | None, frames: tuple[int, int], tokens: int, heads: int, device: torch.device) -> int:
    """Copies of the queries that `attend_split` would make; whoever writes queries can write as many at once."""
    work = work_of(mask, frames, tokens, heads, processors_of(device))
    return 1 if work is None else work.copies


def groups_of(mask: FrameMask) -> list[Rectangle]:
    """Neighbouring queries that see alike with the run of keys they see; nothing where that is no run."""
    found: list[Rectangle] = []
    top, rows = 0, mask.allowed
    while top < len(rows):
        bottom = top + 1
        while bottom < len(rows) and rows[bottom] == rows[top]:
            bottom += 1
        runs = _runs(rows[top])
        if len(runs) != 1:
            return []
        found.append(Rectangle(top, bottom, *runs[0]))
        top = bottom
    return found


def _fits(way: list[Rectangle], rows: int) -> bool:
    """Whether every query's results are those of one rectangle, or of a full one and one more."""
    full = [r for r in way if r.shape[0] == rows]
    rest = sorted((r for r in way if r.shape[0] < rows), key=lambda r: r.top)
    apart = all(a.bottom <= b.top for a, b in pairwise(rest))
    covers = bool(full) or (
        rest[0].top == 0 and rest[-1].bottom == rows and all(a.bottom == b.top for a, b in pairwise(rest))
    )
    return len(full) <= 1 and apart and covers


def attend_split(
    queries: Tensor, k: Tensor, v: Tensor, mask: FrameMask | None, tokens: int, *, quantised: bool = False
) -> tuple[Tensor, Tensor | None]:
    """queries (P,B,Lq,N,D), all alike, k, v (B,Lk,N,D), frame mask, tokens per frame -> (B,Lq,N,D).

    With `quantised` e4m3 and row scales (B*Lq,1). P: `Work.copies`; with fewer, copies are made here.
    """
    q = queries[0]
    frames = q.shape[1] // tokens, k.shape[1] // tokens
    work = work_of(mask, frames, tokens, q.shape[2], processors_of(q.device))
    if work is None or (work.is_plain or (mask is None and q.shape[0] > 1)):
        out = attend_plain(q, k, v) if mask is None or work is not None else _general(q, k, v, mask, tokens)
        return kernels.quantise_heads(out) if quantised else (out, None)
    if len(queries) < work.copies:
        queries = q.expand(work.copies, -1, -1, -1, -1).contiguous()
    samples = [  # every sample's tiles fill the processors by themselves
        _sample(queries[:, b], k[b : b + 1], v[b : b + 1], work, tokens, quantised) for b in range(q.shape[0])
    ]
    outs, scales = zip(*samples, strict=True)
    return (outs[0] if len(outs) == 1 else torch.cat(outs)), (None if scales[0] is None else torch.cat(scales))


def _sample(
    queries: Tensor, k: Tensor, v: Tensor, work: Work, tokens: int, quantised: bool
) -> tuple[Tensor, Tensor | None]:
    """One sample: queries (P,Lq,N,D), k, v (1,Lk,N,D) -> (1,Lq,N,D)."""
    frames = queries.shape[1] // tokens
    aside = _Aside(queries.device)
    with aside:  # they fill what the last wave of the first leaves idle
        small = [_piece(queries, k, v, r, parts, tokens) for r, parts in work.pieces[1:]]
    first = _piece(queries, k, v, *work.pieces[0], tokens)
    aside.join()
    done = [(r, *part) for (r, _), part in zip(work.pieces, [first, *small], strict=True)]
    result = _Result(queries, quantised)
    edges = sorted({0, frames, *(r.top for r, _, _ in done), *(r.bottom for r, _, _ in done)})
    for top, bottom in pairwise(edges):
        parts: list[tuple[Tensor, Tensor]] = []
        for r, out, lse in done:
            if r.top <= top and bottom <= r.bottom:
                rows = slice((top - r.top) * tokens, (bottom - r.top) * tokens)
                parts.append((out[:, rows], lse[:, :, rows]))
        result.write(slice(top * tokens, bottom * tokens), parts)
    return result.whole()


def _piece(queries: Tensor, k: Tensor, v: Tensor, r: Rectangle, parts: int, tokens: int) -> tuple[Tensor, Tensor]:
    """One rectangle: per part of its keys, out (parts,rows,N,D) and log-sum-exp (parts,N,rows)."""
    rows, keys = slice(r.top * tokens, r.bottom * tokens), slice(r.left * tokens, r.right * tokens)
    lent = (torch.unflatten(x[0, keys], 0, (parts, -1)) for x in (k, v))  # (parts,Lk/parts,N,D)
    return attend_with_sum(queries[:parts, rows], *lent)


def _general(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask, tokens: int) -> Tensor:
    """Any mask: query frames one after the other, over their gathered keys."""
    pieces: list[Tensor] = []
    for frame, sees in enumerate(mask.allowed):
        runs = [slice(a * tokens, b * tokens) for a, b in _runs(sees)]
        keys, values = (torch.cat([x[:, run] for run in runs], 1) for x in (k, v))
        pieces.append(attend_plain(q[:, frame * tokens : (frame + 1) * tokens], keys, values))
    return torch.cat(pieces, 1)


class _Result:
    """Where partial results of one sample's queries (P,Lq,N,D) come together; e4m3 with row scales if `quantised`."""

    def __init__(self, q: Tensor, quantised: bool) -> None:
        self.out = torch.empty(q.shape[1:], dtype=kernels.FP8 if quantised else q.dtype, device=q.device)
        self.scale = torch.empty(q.shape[1], 1, device=q.device) if quantised else None

    def write(self, rows: slice, parts: list[tuple[Tensor, Tensor]]) -> None:
        """Merge (P,L,N,D), (P,N,L) of these rows."""
        kernels.merge(parts, self.out[rows], None if self.scale is None else self.scale[rows])

    def whole(self) -> tuple[Tensor, Tensor | None]:
        return self.out.unsqueeze(0), self.scale


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


# ------------------------------------------------------------------------------------------------------ kernels


def attend_plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B,Lq,N,D), k, v (B,Lk,N,D) -> (B,Lq,N,D), no mask, by the fastest kernel there is."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,N,L,D)
    if not has_cudnn_attention(q):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, False)[0].transpose(1, 2)


def attend_with_sum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q (B,Lq,N,D), k, v (B,Lk,N,D) -> out (B,Lq,N,D) and the natural log-sum-exp (B,N,Lq) of its scores."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B,N,L,D)
    ops = torch.ops.aten
    if has_cudnn_attention(q):
        out, lse = ops._scaled_dot_product_cudnn_attention(q, k, v, None, True)[:2]
        lse = lse.view(lse.shape[:3])
    elif q.is_cuda:
        out, lse = ops._scaled_dot_product_flash_attention(q, k, v)[:2]
    else:
        out, lse = ops._scaled_dot_product_flash_attention_for_cpu(q, k, v)[:2]
    return out.transpose(1, 2), lse


def gradients_with_sum(
    q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, all (B,L,N,D), for that of `out` (B,Lq,N,D), by the kernels of `attend_with_sum`.

    These may be some of the keys that `out` and `lse` (B,N,Lq) were made of: then the gradients are their share.
    """
    q, k, v, gradient, out = (x.transpose(1, 2) for x in (q, k, v, gradient, out))  # (B,N,L,D)
    ops, lengths = torch.ops.aten, (q.shape[2], k.shape[2])
    if has_cudnn_attention(q):
        seed = torch.empty((), dtype=torch.long, device=q.device)  # of dropout, which there is none of
        shares = ops._scaled_dot_product_cudnn_attention_backward(
            *(gradient, q, k, v, out, lse.unsqueeze(-1), seed, seed), *(None, None, None), *lengths, 0.0, False
        )
    elif q.is_cuda:
        seed = torch.empty(2, dtype=torch.uint64, device=q.device)
        shares = ops._scaled_dot_product_flash_attention_backward(
            *(gradient, q, k, v, out, lse, None, None), *lengths, 0.0, False, seed, seed
        )
    else:
        shares = ops._scaled_dot_product_flash_attention_for_cpu_backward(gradient, q, k, v, out, lse, 0.0, False)
    q, k, v = (x.transpose(1, 2) for x in shares)
    return q, k, v


def has_cudnn_attention(q: Tensor) -> bool:
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and _is_hopper_or_later(q.device)


@lru_cache(maxsize=16)
def _is_hopper_or_later(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device)[0] >= 9 and torch.backends.cudnn.is_available()


@lru_cache(maxsize=16)
def processors_of(device: torch.device) -> int:
    return kernels.device_properties(device).multi_processor_count if device.type == "cuda" else 1
