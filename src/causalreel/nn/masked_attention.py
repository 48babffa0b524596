"""Masked attention with gradient as dense calls: rectangles without a mask inside, joined by their log-sum-exp.

A mask of frames is a few rectangles of tokens, and dense kernels run at a higher rate than those that ask for every
block whether it counts. Which rectangles: query frames in the order of what they see, cut into bundles; a bundle reads
the keys that all of it sees in one call, what is left of it in smaller bundles, and at the end each frame what only it
and its like see. In teacher forcing clean chunk j and noisy chunk j read the clean chunks before them together.

Nothing is kept for the backward pass but what any attention keeps: queries, keys, values, the result and its
log-sum-exp. With the joint result and sum every rectangle's backward kernel gives its share of the gradient (as in ring
attention, arXiv 2310.01889). Shares are added in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from causalreel.nn import kernels
from causalreel.nn.masks import FrameMask
from causalreel.nn.split_attention import TILE, attend_with_sum, gradients_with_sum, processors_of

FORWARD_US, BACKWARD_US, ROW_US, KEY_US, CALL_US = 0.0173, 0.0403, 0.0127, 0.0276, 196.0
"""What a cut costs, forward and backward together, in microseconds: a wave of query tiles per key, a wave of key tiles
per query, a query that is merged with other levels, a key that is copied, a call. Fitted to 72 cuts of six masks on an
H200 with cuDNN, 12 heads of width 128 and frames of 1560 tokens, to 2 % (`benchmarks/training.py --sections
attention`); only the proportions matter."""

Frames = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Rectangles of one shape in one call: entry i reads key frames `keys[i]` with query frames `rows[i]`."""

    rows: tuple[Frames, ...]
    """Places in `Cut.order`."""
    keys: tuple[Frames, ...]


@dataclass(frozen=True)
class Cut:
    """A mask as rectangles that cover what is visible once. In one level a query frame is in one rectangle at most."""

    order: Frames
    """Query frames as pieces count them."""
    levels: tuple[tuple[Piece, ...], ...]


@lru_cache(maxsize=4096)
def cut_of(mask: FrameMask, bundles: tuple[int, ...]) -> Cut:
    """bundles: query frames that share a call, level by level, falling; like frames share one after the last level."""
    rows, count = mask.allowed, len(mask.allowed[0])
    sees = [frozenset(k for k in range(count) if row[k]) for row in rows]
    order = sorted(range(len(rows)), key=lambda row: (len(sees[row]), sorted(sees[row]), row))
    left = [sees[row] for row in order]
    levels: list[list[tuple[Frames, Frames]]] = []
    for size in bundles:
        found: list[tuple[Frames, Frames]] = []
        for top in range(0, len(order), size):
            here = range(top, min(top + size, len(order)))
            shared = frozenset[int].intersection(*(left[row] for row in here))
            if shared and len(here) > 1:
                found.append((tuple(here), tuple(sorted(shared))))
                for row in here:
                    left[row] -= shared
        levels.append(found)
    alike = groupby(range(len(order)), key=lambda row: left[row])
    levels.append([(tuple(here), tuple(sorted(shared))) for shared, here in alike if shared])
    return Cut(tuple(order), tuple(_pieces(found, count) for found in levels if found))


def _pieces(found: Sequence[tuple[Frames, Frames]], count: int) -> tuple[Piece, ...]:
    """Rectangles of one shape share a call, unless their keys together are more than there are: a copy is made."""
    shapes: dict[tuple[int, int], list[tuple[Frames, Frames]]] = {}
    for rows, keys in found:
        shapes.setdefault((len(rows), len(keys)), []).append((rows, keys))
    pieces: list[Piece] = []
    for (_, width), entries in shapes.items():
        groups = [entries] if len(entries) * width <= count else [[entry] for entry in entries]
        pieces += [Piece(*(tuple(side) for side in zip(*group, strict=True))) for group in groups]
    return tuple(pieces)


@lru_cache(maxsize=4096)
def best_cut(mask: FrameMask, tokens: int, heads: int, processors: int) -> Cut:
    """The cheapest of the cuts that are tried, for so many tokens a frame and heads of all samples."""
    sizes = [size for size in (12, 8, 6, 4, 3, 2) if size <= len(mask.allowed)]
    ways: list[tuple[int, ...]] = [()]
    for size in sizes:
        ways += [(*way, size) for way in ways if not way or (size < way[-1] and way[-1] % size == 0)]
    return min((cut_of(mask, way) for way in ways), key=lambda cut: _cost(cut, tokens, heads, processors))


def _cost(cut: Cut, tokens: int, heads: int, processors: int) -> float:
    """Microseconds, about."""
    total = 0.0
    for piece in (piece for level in cut.levels for piece in level):
        entries, queries, keys = len(piece.rows), len(piece.rows[0]) * tokens, len(piece.keys[0]) * tokens
        waves, waves_back = (-(-(-(-side // TILE) * heads * entries) // processors) for side in (queries, keys))
        total += CALL_US + waves * keys * FORWARD_US + waves_back * queries * BACKWARD_US
        if len(cut.levels) > 1:
            total += entries * queries * ROW_US
        if _step(piece.keys) is None:
            total += entries * keys * KEY_US
    return total


def attend_pieces(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask | None, tokens: int) -> Tensor:
    """q (B,Lq,N,D), k, v (B,Lk,N,D), frame mask, tokens per frame -> (B,Lq,N,D)."""
    if mask is None:
        rows, keys = (tuple(range(x.shape[1] // tokens)) for x in (q, k))
        cut = Cut(rows, ((Piece((rows,), (keys,)),),))
    else:
        cut = best_cut(mask, tokens, q.shape[0] * q.shape[2], processors_of(q.device))
    return attend_cut(q, k, v, cut, tokens)


def attend_cut(q: Tensor, k: Tensor, v: Tensor, cut: Cut, tokens: int) -> Tensor:
    """As attend_pieces, for a mask that is cut already."""
    run = cast("Callable[..., Tensor]", _Pieces.apply)  # pyright: ignore[reportUnknownMemberType] - torch leaves it untyped
    return run(q, k, v, cut, tokens)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cut: Cut, tokens: int) -> Tensor:
        q = _take(q, (cut.order,), tokens)
        outs = q.new_zeros(len(cut.levels), *q.shape) if len(cut.levels) > 1 else q.new_empty(1, *q.shape)
        sums = q.new_full((len(cut.levels), q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=torch.float32)
        for level, out, lse in zip(cut.levels, outs, sums, strict=True):
            for piece in level:
                part, part_lse = attend_with_sum(*(_take(x, e, tokens) for x, e in _operands(piece, q, k, v)))
                _put(out, piece.rows, part, tokens)
                _put(lse.transpose(1, 2), piece.rows, part_lse.transpose(1, 2), tokens)
        if len(cut.levels) == 1:
            out, lse = outs[0], sums[0]
        else:
            out, lse = torch.empty_like(q), sums.logsumexp(0)
            for row in range(len(q)):
                kernels.merge([(outs[:, row], sums[:, row])], out[row])
        out = _take(out, (_inverse(cut.order),), tokens)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.cut, ctx.tokens = cut, tokens
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        cut, tokens = ctx.cut, ctx.tokens
        gradient, out = (_take(x, (cut.order,), tokens) for x in (gradient, out))
        dq = torch.zeros_like(q).expand(len(cut.levels), *q.shape).contiguous()
        dk, dv = _Sum(k, tokens), _Sum(v, tokens)
        for level, share in reversed([*zip(cut.levels, dq, strict=True)]):  # what covers all keys comes first
            for piece in level:
                lent = (_take(x, e, tokens) for x, e in _operands(piece, q, k, v, gradient, out))
                part_lse = _take(lse.transpose(1, 2), piece.rows, tokens).transpose(1, 2).contiguous()
                part_q, part_k, part_v = gradients_with_sum(*lent, lse=part_lse)
                _put(share, piece.rows, part_q, tokens)
                dk.add(piece.keys, part_k)
                dv.add(piece.keys, part_v)
        whole = _take(dq.sum(0), (_inverse(cut.order),), tokens)
        return whole, dk.whole(), dv.whole(), None, None


def _operands(
    piece: Piece, q: Tensor, k: Tensor, v: Tensor, *like_q: Tensor
) -> list[tuple[Tensor, tuple[Frames, ...]]]:
    """Tensors with the entries that a piece takes of them."""
    return [(q, piece.rows), (k, piece.keys), (v, piece.keys), *((x, piece.rows) for x in like_q)]


class _Sum:
    """Gradient of keys or values, which pieces add to frame by frame, in float32."""

    def __init__(self, like: Tensor, tokens: int) -> None:
        self.like, self.tokens = like, tokens
        self.total: Tensor | None = None

    def add(self, entries: tuple[Frames, ...], part: Tensor) -> None:
        """part (B*E,f*S,N,D) of entries of f frames."""
        tokens, frames = self.tokens, self.like.shape[1] // self.tokens
        places = tuple(frame for entry in entries for frame in entry)
        part = torch.unflatten(part, 0, (-1, len(entries))).flatten(1, 2)  # (B,E*f*S,N,D)
        if self.total is None and len(set(places)) == len(places) == frames:
            self.total = _take(part, (_inverse(places),), tokens).float()
            return
        if self.total is None:
            self.total = torch.zeros_like(self.like, dtype=torch.float32)
        if _is_run(places):
            self.total[:, places[0] * tokens : (places[-1] + 1) * tokens] += part
        else:
            parts = torch.unflatten(part.float(), 1, (-1, tokens))
            torch.unflatten(self.total, 1, (-1, tokens)).index_add_(1, _index(places, part.device), parts)

    def whole(self) -> Tensor:
        return torch.zeros_like(self.like) if self.total is None else self.total.to(self.like.dtype)


# ------------------------------------------------------------------------------------------------------ frames


def _take(x: Tensor, entries: tuple[Frames, ...], tokens: int) -> Tensor:
    """Frames of x (B,F*S,...), entry by entry -> (B*E,f*S,...): a view where entries lie at regular distances."""
    view = _regular(x, entries, tokens)
    if view is None:
        places = tuple(frame for entry in entries for frame in entry)
        view = torch.unflatten(x, 1, (-1, tokens)).index_select(1, _index(places, x.device))
        view = torch.unflatten(view, 1, (len(entries), -1))  # (B,E,f,S,...)
    return view.flatten(2, 3).flatten(0, 1)


def _put(x: Tensor, entries: tuple[Frames, ...], part: Tensor, tokens: int) -> None:
    """Write part (B*E,f*S,...) to these frames of x (B,F*S,...)."""
    part = torch.unflatten(torch.unflatten(part, 0, (-1, len(entries))), 2, (-1, tokens))  # (B,E,f,S,...)
    view = _regular(x, entries, tokens)
    if view is not None:
        view.copy_(part)
    else:
        places = tuple(frame for entry in entries for frame in entry)
        torch.unflatten(x, 1, (-1, tokens)).index_copy_(1, _index(places, x.device), part.flatten(1, 2))


def _regular(x: Tensor, entries: tuple[Frames, ...], tokens: int) -> Tensor | None:
    """A view (B,E,f,S,...) of runs of frames at equal distances; None for other entries."""
    step, first, size = _step(entries), entries[0][0], len(entries[0])
    if step is None:
        return None
    here = torch.unflatten(x, 1, (-1, tokens))[:, first : entries[-1][0] + size]
    return here.unfold(1, size, step).movedim(-1, 2)


@lru_cache(maxsize=4096)
def _step(entries: tuple[Frames, ...]) -> int | None:
    """The distance at which runs of frames follow each other; None for other entries."""
    starts, size = [entry[0] for entry in entries], len(entries[0])
    step = starts[1] - starts[0] if len(starts) > 1 else size
    is_even = step > 0 and starts == [*range(starts[0], starts[-1] + 1, step)]
    return step if is_even and all(map(_is_run, entries)) else None


def _is_run(frames: Frames) -> bool:
    return frames == tuple(range(frames[0], frames[-1] + 1))


@lru_cache(maxsize=4096)
def _inverse(order: Frames) -> Frames:
    return tuple(sorted(range(len(order)), key=lambda place: order[place]))


@lru_cache(maxsize=1024)
def _index(places: Frames, device: torch.device) -> Tensor:
    return torch.tensor(places, device=device)
