"""Attention and cache in e4m3: what is stored comes back, and rollouts see what they see with another cache."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from causalreel.nn import kernels
from causalreel.nn.fp8_attention import PackedMemory, attend_packed, parts_of, tiles_of
from causalreel.nn.masks import Context, frame_mask, frames_of
from causalreel.nn.split_attention import Rectangle
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.rollout import KeyedNoise, chunked, collect, rollout
from causalreel.types import Conditioning
from test_fast import ROLLOUTS, SPEC, TOKENS, denoiser, run


def memory(frames: int = 7, tokens: int = 6, layers: int = 2) -> PackedMemory:
    size = {"heads": 2, "head_dim": 32, "batch": 2}
    return PackedMemory(layers=layers, tokens=tokens, frames=frames, dtype=torch.float32, device="cpu", **size)


def coarse(*shape: int) -> torch.Tensor:
    return kernels.to_fp8(torch.randn(*shape)).float()


def test_columns_are_rows_in_another_order_within_sixteen() -> None:
    found = [kernels.column_of(row) for row in range(48)]
    assert found[:16] == [0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15]
    assert found[16:] == [16 + column for column in found[:32]]
    assert kernels.column_of(torch.arange(48)).tolist() == found


def test_what_is_stored_comes_back_and_nothing_else_changes() -> None:
    torch.manual_seed(0)
    held, rows = memory(), torch.tensor([3, 41, 17, 0, 16, 8])
    before = coarse(2, 42, 2, 32), coarse(2, 42, 2, 32)
    held.store(1, torch.arange(42), *before)
    k, v = coarse(2, 6, 2, 32), coarse(2, 6, 2, 32)
    held.store(1, rows, k, v)
    for found, old, new in zip(held.view(1, slice(0, 42)), before, (k, v), strict=True):
        expected = old.clone()
        expected[:, rows] = new
        assert torch.equal(found, expected)
    assert all((part == 0).all() for part in held.view(0, slice(0, 42)))
    held.store(0, rows[:1], torch.full((2, 1, 2, 32), 1e6), torch.full((2, 1, 2, 32), -1e6))
    assert (held.view(0, slice(3, 4))[0] == 448).all() and (held.view(0, slice(3, 4))[1] == -448).all()


@pytest.mark.parametrize("tokens", [5, 6, 8, 16])
def test_frames_are_copied_from_any_place_to_any_place(tokens: int) -> None:
    torch.manual_seed(0)
    held = memory(tokens=tokens)
    count = 7 * tokens
    for layer in range(2):
        held.store(layer, torch.arange(count), coarse(2, count, 2, 32), coarse(2, count, 2, 32))
    expected = [[part.clone() for part in held.view(layer, slice(0, count))] for layer in range(2)]
    for source, target, frames in ((0, 5, 2), (3, 0, 1), (6, 1, 1), (1, 3, 2), (0, 2, 1), (2, 4, 1)):
        held.copy(source * tokens, target * tokens, frames * tokens)
        a, b, length = source * tokens, target * tokens, frames * tokens
        for parts in expected:
            for part in parts:
                part[:, b : b + length] = part[:, a : a + length].clone()
    for layer in range(2):
        for found, part in zip(held.view(layer, slice(0, count)), expected[layer], strict=True):
            assert torch.equal(found, part)


def test_what_is_saved_is_restored() -> None:
    torch.manual_seed(0)
    held, rows = memory(), slice(6, 36)
    for layer in range(2):
        held.store(layer, torch.arange(42), coarse(2, 42, 2, 32), coarse(2, 42, 2, 32))
    expected = [held.view(layer, rows) for layer in range(2)]
    away = held.save(rows, None)
    for layer in range(2):
        held.store(layer, torch.arange(42), coarse(2, 42, 2, 32), coarse(2, 42, 2, 32))
    assert held.save(slice(0, 0), away) is away
    held.restore(rows, away)
    for layer in range(2):
        for found, part in zip(held.view(layer, rows), expected[layer], strict=True):
            assert torch.equal(found, part)


@pytest.mark.parametrize("plan", ["plain", "fused"])
@pytest.mark.parametrize("case", ROLLOUTS, ids=str)
def test_rollouts_see_in_e4m3_what_they_see_with_another_cache(
    case: tuple, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against fp8 products over a plain cache whose contents, and queries, were rounded before they were stored."""
    window, sink, chunk, frames, _ = case
    context = Context(window=window, sink=sink)

    def made(precision: str) -> torch.Tensor:
        net = accelerate(denoiser(), precision=precision)
        assert isinstance(net.run, FastDiT)
        cache = net.run.new_cache(context, chunk=chunk, frames=frames, batch=1, size=(4, 6))
        return run(net, cache, plan, case)

    write: Callable = kernels.norm_rotate_packed

    def written(*args, slots, run, **how):
        assert run == chunk * TOKENS and (slots.view(-1, run).diff(dim=1) == 1).all()
        return write(*args, slots=slots, run=run, **how)

    monkeypatch.setattr(kernels, "norm_rotate_packed", written)
    packed = made("fp8-attention")
    plain = made("fp8")
    exact: Callable = kernels.norm_rotate
    monkeypatch.setattr(
        kernels, "norm_rotate", lambda *a, **k: tuple(kernels.to_fp8(part).float() for part in exact(*a, **k))
    )
    rounded = made("fp8")
    cost = (rounded - plain).norm()
    # A sum in another order may be rounded the other way, by 2^-4 of a number, and moves all that follows: then the two
    # are as far apart as two draws of e4m3's cost, sqrt(2) of it, and otherwise equal.
    assert 0.003 < cost / plain.norm() < 0.2 and 0.5 * cost < (packed - plain).norm() < 1.5 * cost
    assert (packed - rounded).norm() < 1.5 * cost


def test_rollouts_in_e4m3_take_turns() -> None:
    fast = accelerate(denoiser(), precision="fp8-attention")
    net = fast.run
    assert isinstance(net, FastDiT)

    def begin(seed: int):
        told = fast.prepare(Conditioning(torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed))))
        cache = net.new_cache(Context(window=4), chunk=1, frames=None, batch=1, size=(4, 6))
        calls = chunked([1] * 8, (1.0, 0.6))
        return rollout(fast, calls, conditioning=told, noise=KeyedNoise([seed], SPEC), cache=cache)

    with torch.no_grad():
        alone = [collect(begin(seed)) for seed in range(2)]
        both = list(zip(begin(0), begin(1), strict=True))
    (held,) = net._memories.values()
    assert isinstance(held, PackedMemory)
    for seed in range(2):
        assert torch.equal(collect(pair[seed] for pair in both), alone[seed])


def test_what_fits_no_static_cache_is_said(caplog: pytest.LogCaptureFixture) -> None:
    net = FastDiT(denoiser().model, precision="fp8-attention", graphs=False)
    with caplog.at_level("WARNING"):
        net.new_cache(Context(window=5), chunk=3, frames=None, batch=1, size=(4, 6))
    assert "attention in bfloat16" in caplog.text
    with pytest.raises(ValueError, match="run must divide the 4 tokens, got 3"):
        held = memory()
        into = {"keys": held.keys(0), "values": held.values(0), "slots": torch.arange(4), "run": 3, "eps": 1e-6}
        kernels.norm_rotate_packed(torch.zeros(2, 4, 192), *torch.ones(2, 64), *torch.ones(2, 4, 16), **into)


def test_every_query_is_in_one_tile_with_what_it_sees() -> None:
    groups = (Rectangle(0, 2, 1, 5), Rectangle(2, 3, 0, 6))
    tiles = tiles_of(groups, 100, 40, torch.device("cpu")).tolist()
    seen = {}
    for top, bottom, left, right in tiles:
        for query in range(top, min(top + 64, bottom)):
            assert query not in seen
            seen[query] = (left, right)
    assert seen == {q: (140, 540) if q < 200 else (40, 640) for q in range(300)}


def test_parts_fill_the_processors_and_never_outnumber_the_blocks() -> None:
    one, three = (Rectangle(0, 1, 0, 21),), (Rectangle(0, 3, 0, 21),)
    assert parts_of(one, 1560, 12, 132) >= 4 and parts_of(three, 1560, 12, 132) <= 2
    assert parts_of((Rectangle(0, 1, 0, 1),), 300, 12, 132) <= 2
    assert parts_of((Rectangle(0, 1, 0, 1),), 6, 3, 132) == 1


def test_a_mask_with_holes_is_attended_to_all_the_same() -> None:
    torch.manual_seed(0)
    mask = frame_mask(frames_of((1,), start=6), frames_of((1,) * 7), Context(window=3, sink=1))
    held = memory(tokens=TOKENS, layers=1)
    k, v, q = coarse(2, 42, 2, 32), coarse(2, 42, 2, 32), coarse(2, TOKENS, 2, 32)
    held.store(0, torch.arange(42), k, v)
    found, scale = attend_packed(kernels.to_fp8(q), held, 0, slice(0, 42), mask, TOKENS)
    rows = torch.tensor([*range(6), *range(30, 42)])
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k[:, rows], v[:, rows]))
    ).transpose(1, 2)
    assert scale is None and torch.allclose(found, expected, atol=1e-5)
