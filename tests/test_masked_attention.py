"""Masked attention as dense pieces: every visible pair once, the same results and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalreel.nn.attention import attend
from causalreel.nn.masked_attention import Cut, attend_cut, best_cut, cut_of
from causalreel.nn.masks import Context, FrameMask, frame_mask, frames_of

TOKENS = 5

BUNDLES = [(), (2,), (3,), (6,), (6, 2), (4, 2), (6, 3), (12, 4)]


def teacher_forcing(chunk: int, chunks: int, context: Context = Context()) -> FrameMask:
    sizes = [chunk] * chunks
    both = frames_of(sizes) + frames_of(sizes, stream=1)
    mask = frame_mask(both, both, context)
    assert mask is not None
    return mask


def behind(chunk: int, chunks: int) -> FrameMask:
    """Noisy chunks behind a clip's context."""
    sizes = [chunk] * chunks
    noisy = frames_of(sizes, stream=1)
    mask = frame_mask(noisy, frames_of(sizes) + noisy, Context())
    assert mask is not None
    return mask


def causal(chunk: int, chunks: int) -> FrameMask:
    frames = frames_of([chunk] * chunks)
    mask = frame_mask(frames, frames, Context())
    assert mask is not None
    return mask


MASKS = {
    "teacher forcing, chunks": teacher_forcing(3, 4),
    "teacher forcing, frames": teacher_forcing(1, 7),
    "teacher forcing, window": teacher_forcing(2, 6, Context(window=5, sink=1)),
    "behind, chunks": behind(3, 4),
    "behind, frames": behind(1, 7),
    "causal": causal(2, 5),
}


def covered(cut: Cut, mask: FrameMask) -> list[list[int]]:
    """How often each pair is in a piece."""
    counts = [[0] * len(mask.allowed[0]) for _ in mask.allowed]
    for level in cut.levels:
        rows = [row for piece in level for entry in piece.rows for row in entry]
        assert len(rows) == len(set(rows)), "a frame twice in a level"
        for piece in level:
            for places, keys in zip(piece.rows, piece.keys, strict=True):
                for place in places:
                    for key in keys:
                        counts[cut.order[place]][key] += 1
    return counts


def results(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor, mask: FrameMask | None, cut: Cut | None) -> list[Tensor]:
    """Attention and the gradients of its inputs; by the reference without a cut."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out = attend(q, k, v, mask, TOKENS, backend="sdpa") if cut is None else attend_cut(q, k, v, cut, TOKENS)
    out.backward(gradient)
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


def inputs(mask: FrameMask, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows, columns = len(mask.allowed) * TOKENS, len(mask.allowed[0]) * TOKENS
    return [
        torch.randn(batch, length, 2, 8, generator=generator, dtype=torch.float32).to(dtype)
        for length in (rows, columns, columns, rows)
    ]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("bundles", BUNDLES)
@pytest.mark.parametrize("name", MASKS)
def test_pieces_are_attention_with_its_gradient(name: str, bundles: tuple[int, ...]) -> None:
    mask = MASKS[name]
    cut = cut_of(mask, bundles)
    assert covered(cut, mask) == [[int(seen) for seen in row] for row in mask.allowed]
    given_ = inputs(mask)
    assert distance(results(*given_, mask, cut), results(*given_, mask, None)) < 2e-6


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5).filter(any), min_size=2, max_size=7),
    bundles=st.sampled_from(BUNDLES),
)
def test_any_mask_can_be_cut(rows: list[list[bool]], bundles: tuple[int, ...]) -> None:
    mask = FrameMask(tuple(map(tuple, rows)))
    cut = cut_of(mask, bundles)
    assert covered(cut, mask) == [[int(seen) for seen in row] for row in rows]
    given_ = inputs(mask, batch=1)
    assert distance(results(*given_, mask, cut), results(*given_, mask, None)) < 2e-6


def test_without_a_mask_it_is_one_piece_and_the_keys_may_be_constant() -> None:
    q, k, v, gradient = inputs(MASKS["causal"])
    found = []
    for backend in ("pieces", "sdpa"):
        x = q.clone().requires_grad_()
        out = attend(x, k, v, None, TOKENS, backend=backend)
        out.backward(gradient)
        assert x.grad is not None
        found.append([out.detach(), x.grad])
    assert distance(*found) < 2e-6


def test_what_the_cuts_of_the_real_size_are() -> None:
    """1560 tokens, 12 heads, 132 processors: bundles of six frames over the past, what is their own in few calls."""
    for chunk, levels in ((3, 2), (1, 3)):
        cut = best_cut(teacher_forcing(chunk, 21 // chunk), 1560, 12, 132)
        past, *rest = cut.levels
        assert len(cut.levels) == levels
        assert [len(piece.keys[0]) for piece in past] == [3, 6, 9, 12, 15, 18]
        assert all(len(piece.rows) == 1 and len(piece.rows[0]) == 6 for piece in past)
        assert sum(map(len, rest)) <= 4
    chunkwise = best_cut(teacher_forcing(3, 7), 1560, 12, 132)
    assert {cut_rows for piece in chunkwise.levels[1] for cut_rows in map(len, piece.rows)} == {3}
    assert chunkwise.order[:6] == (0, 1, 2, 21, 22, 23)


def test_only_what_attention_keeps_is_kept() -> None:
    """Queries, keys, values, the result and its log-sum-exp: nothing twice."""
    mask, sizes = MASKS["teacher forcing, frames"], []
    q, k, v, _ = (x.requires_grad_() for x in inputs(mask))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        attend_cut(q, k, v, cut_of(mask, (6, 2)), TOKENS)
    assert sizes == [q.numel()] * 4 + [q.numel() // q.shape[-1]]
