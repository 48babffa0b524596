"""The inference path: other arithmetic order, other memory, same function."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from causalreel.nn import split_attention
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.nn.kv_cache import FrameCache, KVCache
from causalreel.nn.masks import Context, FrameMask, frame_mask, frames_of
from causalreel.nn.presets import ModelConfig
from causalreel.nn.split_attention import Work, attend_split, fills, parts_of, rectangles, work_of
from causalreel.nn.static_cache import CacheMemory, StaticCache
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.rollout import KeyedNoise, chunked, collect, fuse, rollout
from causalreel.types import Chunk, Conditioning, LatentSpec

CONFIG = ModelConfig(dim=48, ffn_dim=80, heads=3, layers=2, text_dim=8, text_length=4, freq_dim=32, channels=4)
SPEC = LatentSpec(4, 4, 6)
TOKENS = 6

# window, sink, chunk, frames, prefix
ROLLOUTS = [
    (None, 0, 1, 6, 0),
    (None, 0, 3, 9, 3),
    (4, 0, 1, 11, 0),
    (5, 1, 1, 12, 2),
    (3, 1, 1, 9, 0),
    (2, 0, 1, 7, 0),
    (9, 0, 3, 21, 0),
    (12, 3, 3, 24, 3),
    (6, 0, 1, 6, 0),
    (6, 0, 2, 14, 0),
]


def denoiser() -> DiTDenoiser:
    torch.manual_seed(0)
    net = DiTDenoiser(CONFIG)
    for name, parameter in net.named_parameters():
        if "norm" in name or "head.head" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return net.requires_grad_(False)


def run(net, cache, plan: str, case: tuple, *, batch: int = 1) -> torch.Tensor:
    _, _, chunk, frames, prefix = case
    calls = chunked(
        [chunk] * ((frames - prefix) // chunk), (1.0, 0.6), first=(1.0, 0.8, 0.5), prefix=[chunk] * (prefix // chunk)
    )
    generator = torch.Generator().manual_seed(1)
    given_frames = torch.randn(batch, prefix, 4, 4, 6, generator=generator) if prefix else None
    told = Conditioning(torch.randn(batch, 4, 8, generator=generator))
    noise = KeyedNoise(range(batch), SPEC)
    with torch.no_grad():
        return collect(
            rollout(
                net,
                fuse(calls) if plan == "fused" else calls,
                conditioning=net.prepare(told),
                noise=noise,
                cache=cache,
                prefix=given_frames,
            )
        )


def static(context: Context, chunk: int, frames: int | None) -> StaticCache:
    places = StaticCache.places(context, chunk, frames)
    memory = CacheMemory(
        layers=2, heads=3, head_dim=16, tokens=TOKENS, frames=places, batch=1, dtype=torch.float32, device="cpu"
    )
    memory.buffer.fill_(float("nan"))  # what nobody wrote must not be read
    return StaticCache(context, chunk=chunk, frames=frames, memory=memory)


@pytest.mark.parametrize("plan", ["plain", "fused"])
@pytest.mark.parametrize("case", ROLLOUTS, ids=str)
def test_a_static_cache_shows_what_a_growing_one_shows(case: tuple, plan: str) -> None:
    window, sink, chunk, frames, _ = case
    net, context = denoiser(), Context(window=window, sink=sink)
    net.context = context
    expected = run(net, KVCache(2, context), plan, case)
    assert torch.allclose(run(net, static(context, chunk, frames), plan, case), expected, atol=1e-5)


@pytest.mark.parametrize("plan", ["plain", "fused"])
@pytest.mark.parametrize("case", ROLLOUTS, ids=str)
def test_the_fast_network_is_the_network(case: tuple, plan: str) -> None:
    window, sink, chunk, frames, _ = case
    net, context = denoiser(), Context(window=window, sink=sink)
    net.context = context
    expected = run(net, KVCache(2, context), plan, case)
    fast = accelerate(denoiser())
    assert isinstance(fast.run, FastDiT)
    cache = fast.run.new_cache(context, chunk=chunk, frames=frames, batch=1, size=(4, 6))
    assert isinstance(cache, StaticCache)
    assert torch.allclose(run(fast, cache, plan, case), expected, atol=2e-5)


def test_the_fast_network_serves_guidance_batches_and_calls_without_a_cache() -> None:
    net, fast = denoiser(), accelerate(denoiser())
    case = (None, 0, 1, 4, 0)
    pair = [Guided(d, Conditioning(torch.ones(1, 4, 8)), 2.5) for d in (net, fast)]
    assert isinstance(fast.run, FastDiT)
    cache = fast.run.new_cache(Context(), chunk=1, frames=4, batch=4, size=(4, 6))
    caches = (KVCache(2, Context()), cache)
    a, b = (run(d, c, "fused", case, batch=2) for d, c in zip(pair, caches, strict=True))
    assert torch.allclose(a, b, atol=2e-5)
    x, sigma = torch.randn(2, 3, 4, 4, 6), torch.tensor([[0.3, 0.7, 1.0]])
    told = Conditioning(torch.randn(2, 4, 8))
    with torch.no_grad():
        for how in ({}, {"sizes": (1, 2)}):
            assert torch.allclose(net(x, sigma, told, **how), fast(x, sigma, told, **how), atol=1e-5)
        rows = torch.tensor([[0.3], [0.9]])  # other noise levels in other rows go to the network itself
        assert torch.allclose(net(x, rows, told), fast(x, rows, told), atol=1e-5)


def test_gradients_do_not_take_the_fast_path() -> None:
    net = accelerate(denoiser())
    x = torch.randn(1, 2, 4, 4, 6, requires_grad=True)
    net(x, torch.tensor([[0.5]]), Conditioning(torch.randn(1, 4, 8))).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_fp8_is_near_and_is_not_the_default() -> None:
    net, fast, fp8 = denoiser(), accelerate(denoiser()), accelerate(denoiser(), precision="fp8")
    x, sigma, told = torch.randn(1, 3, 4, 4, 6), torch.tensor([[0.5]]), Conditioning(torch.randn(1, 4, 8))
    with torch.no_grad():
        exact, plain, coarse = (d(x, sigma, told) for d in (net, fast, fp8))
    assert (plain - exact).norm() < 1e-5 * exact.norm()
    assert 1e-3 < (coarse - exact).norm() / exact.norm() < 0.1  # e4m3 was used, and is e4m3
    with pytest.raises(ValueError, match="one of bf16, fp8, fp8-attention, got 'fp4'"):
        accelerate(denoiser(), precision="fp4")


def test_fp8_can_give_back_the_original_weights() -> None:
    fast = accelerate(denoiser(), precision="fp8")
    x, sigma, told = torch.randn(1, 3, 4, 4, 6), torch.tensor([[0.5]]), Conditioning(torch.randn(1, 4, 8))
    assert isinstance(fast.run, FastDiT)
    with torch.no_grad():
        before = fast(x, sigma, told)
        fast.run.release_originals()
        assert torch.equal(fast(x, sigma, fast.prepare(told)), before)
    assert fast.model.blocks[0].ffn[0].weight.is_meta and not fast.model.head.head.weight.is_meta
    with pytest.raises(ValueError, match="only its fp8 products"):
        fast(x, sigma, told)
    plain = accelerate(denoiser()).run
    assert isinstance(plain, FastDiT)
    with pytest.raises(ValueError, match="share the network's weights"):
        plain.release_originals()


def test_fp8_products_follow_weights_that_were_changed_in_place() -> None:
    fast, new = accelerate(denoiser(), precision="fp8"), denoiser()
    x, sigma, told = torch.randn(1, 3, 4, 4, 6), torch.tensor([[0.5]]), Conditioning(torch.randn(1, 4, 8))
    assert isinstance(fast.run, FastDiT)
    with torch.no_grad():
        fast(x, sigma, told)
        for own, other in zip(fast.parameters(), new.parameters(), strict=True):
            other.add_(0.1 * torch.randn_like(other))
            own.copy_(other)
        fast.run.refresh()
        got, expected = fast(x, sigma, told), accelerate(new, precision="fp8")(x, sigma, told)
        assert torch.equal(got, expected)
        fast.run.release_originals()
        with pytest.raises(ValueError, match="load it again"):
            fast.run.refresh()


def test_sharing_weights_keeps_the_network_and_its_names() -> None:
    net = denoiser()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    size = sum(p.untyped_storage().nbytes() for p in {p.data_ptr(): p for p in net.parameters()}.values())
    accelerate(net)
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    stores = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in net.parameters()}
    assert sum(stores.values()) <= size


@pytest.mark.parametrize("plan", ["plain", "fused"])
@pytest.mark.parametrize("case", ROLLOUTS, ids=str)
def test_rollouts_take_turns_in_one_memory(case: tuple, plan: str) -> None:
    """Chunk by chunk, three at once, of which one begins late and one ends early: each makes what it makes alone."""
    window, sink, chunk, frames, _ = case
    context, fast = Context(window=window, sink=sink), accelerate(denoiser())
    run_, total = fast.run, frames
    assert isinstance(run_, FastDiT)

    def begin(seed: int) -> Iterator[Chunk]:
        told = fast.prepare(Conditioning(torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed))))
        calls = chunked([chunk] * (total // chunk), (1.0, 0.6))
        cache = run_.new_cache(context, chunk=chunk, frames=frames, batch=1, size=(4, 6))
        how: dict = {"conditioning": told, "noise": KeyedNoise([seed], SPEC), "cache": cache}
        return rollout(fast, fuse(calls) if plan == "fused" else calls, **how)

    with torch.no_grad():
        alone = [collect(begin(seed)) for seed in range(3)]
        (memory,) = run_._memories.values()
        memory.buffer.fill_(float("nan"))  # what nobody wrote must not be read
        live, made = {seed: begin(seed) for seed in range(2)}, {seed: [] for seed in range(3)}
        for turn in range(total // chunk + 1):
            if turn == 1:
                live[2] = begin(2)
            if turn == 2:
                del live[1]
            for seed, rolling in live.items():
                made[seed] += [part for part in [next(rolling, None)] if part is not None]
    assert list(run_._memories.values()) == [memory]
    assert torch.equal(collect(made[0]), alone[0]) and torch.equal(collect(made[2]), alone[2])
    assert len(made[1]) == 2 and torch.equal(collect(made[1]), alone[1][:, : 2 * chunk])


def test_a_memory_is_let_go_of_and_never_used_by_two_calls_at_once() -> None:
    fast = FastDiT(denoiser().model)

    def new(context: Context = Context(window=4)) -> FrameCache:
        return fast.new_cache(context, chunk=1, frames=None, batch=1, size=(4, 6))

    first, second = new(), new()
    assert isinstance(first, StaticCache) and isinstance(second, StaticCache)
    assert first.memory is second.memory and first.memory.guest is None
    first.begin(frames_of((1,)), TOKENS)
    second.begin(frames_of((1,)), TOKENS)
    for late in (lambda: first.commit(1), lambda: first.slots):
        with pytest.raises(RuntimeError, match="another rollout has begun a call"):
            late()
    memory = second.memory
    assert memory.guest is second
    del second
    gc.collect()
    assert memory.guest is None
    assert isinstance(new(Context()), KVCache)


def test_recordings_that_are_given_up_give_their_pool_up() -> None:
    recordings = FastDiT(denoiser().model).graphs
    assert recordings is not None
    recordings.pool = (0, 1)  # torch forgets it with its last graph
    recordings.release()
    assert recordings.pool is None


def test_a_static_cache_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ValueError, match="finite window or length"):
        static(Context(window=5), 3, None)
    cache = static(Context(window=4), 1, None)
    with pytest.raises(ValueError, match="where the cache does not end"):
        cache.begin(frames_of((1,), start=2), TOKENS)
    with pytest.raises(ValueError, match="chunks of 1 frames"):
        cache.begin(frames_of((2,)), TOKENS)
    with pytest.raises(ValueError, match="6 tokens a frame, the call has 7"):
        cache.begin(frames_of((1,)), 7)
    cache.begin(frames_of((1, 1)), TOKENS)
    with pytest.raises(ValueError, match="commit takes 1, 2 frames"):
        cache.commit(3)


# ------------------------------------------------------------------------------------------------ split attention


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_rectangles_cover_the_mask_once(rows: list[list[bool]]) -> None:
    covered = torch.zeros(len(rows), 5, dtype=torch.int)
    for r in rectangles(FrameMask(tuple(map(tuple, rows)))):
        covered[r.top : r.bottom, r.left : r.right] += 1
    assert torch.equal(covered, torch.tensor(rows).int())


@pytest.mark.parametrize("processors", [1, 132])
@pytest.mark.parametrize(
    "mask",
    [
        None,
        frame_mask(frames_of((1, 1), start=3), frames_of((1,) * 5), Context()),  # fused
        frame_mask(frames_of((1, 1), start=4), frames_of((1,) * 6), Context(window=4)),  # fused, full window
        frame_mask(frames_of((1,) * 4), frames_of((1,) * 4), Context()),  # a long prefix
        FrameMask(((True, False, True), (False, True, True), (True, True, True))),
        FrameMask(((True, False, True, False), (False, True, False, True))),
    ],
)
def test_split_attention_is_attention(mask: FrameMask | None, processors: int, monkeypatch) -> None:
    monkeypatch.setattr("causalreel.nn.split_attention.processors_of", lambda device: processors)
    torch.manual_seed(0)
    tokens = 6
    rows, columns = (2, 5) if mask is None else (len(mask.allowed), len(mask.allowed[0]))
    q = torch.randn(2, rows * tokens, 3, 16)
    k, v = torch.randn(2, 2, columns * tokens, 3, 16)
    bias = None if mask is None else mask.dense(tokens, q.device)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias).transpose(1, 2)
    for samples in (1, 2):
        got, _ = attend_split(q[None, :samples], k[:samples], v[:samples], mask, tokens)
        assert torch.allclose(got, expected[:samples], atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(
    "way", [lambda mask: list(rectangles(mask)), split_attention.groups_of], ids=["shared", "groups"]
)
def test_every_way_to_cut_a_fused_call_is_attention(way, parts: int) -> None:
    torch.manual_seed(0)
    tokens = 6
    for mask in (
        frame_mask(frames_of((2, 2), start=2), frames_of((2, 2, 2)), Context()),
        frame_mask(frames_of((1, 1), start=4), frames_of((1,) * 6), Context(window=5)),
    ):
        assert mask is not None
        q = torch.randn(1, len(mask.allowed) * tokens, 3, 16)
        k, v = torch.randn(2, 1, 6 * tokens, 3, 16)
        work = Work(tuple((r, parts) for r in way(mask)))
        found, _ = split_attention._sample(q.expand(3, -1, -1, -1), k, v, work, tokens, False)
        plain = (x.transpose(1, 2) for x in (q, k, v))
        expected = F.scaled_dot_product_attention(*plain, attn_mask=mask.dense(tokens, q.device)).transpose(1, 2)
        assert torch.allclose(found, expected, atol=1e-5)


def test_single_frames_share_keys_and_chunks_of_three_do_not() -> None:
    """Which way is cheaper at full size; both were measured on an H200."""
    for chunk, frames, pieces in ((1, 21, 2), (1, 11, 2), (3, 21, 2)):
        keys = frames_of((chunk,) * (frames // chunk))
        mask = frame_mask(frames_of((chunk, chunk), start=frames - 2 * chunk), keys, Context())
        work = work_of(mask, (2 * chunk, frames), 1560, 12, 132)
        assert work is not None and len(work.pieces) == pieces
        heights = [r.shape[0] for r, _ in work.pieces]
        assert heights == ([2, 1] if chunk == 1 else [3, 3])


def test_keys_are_cut_where_waves_are_empty() -> None:
    """Frames of 1560 tokens, 12 heads, 132 processors: the choices that measured best on an H200."""
    one, two, three = 1560, 3120, 4680
    best = {
        (one, 1): 1,
        (one, 6): 5,
        (one, 21): 5,
        (two, 3): 1,
        (two, 11): 3,
        (two, 21): 3,
        (three, 11): 2,
    }
    assert {(q, n): parts_of(q, 12, n * one, 132) for q, n in best} == best
    assert parts_of(100, 2, 101, 132) == 1  # a prime number of keys


def test_what_fills_a_gpu() -> None:
    """Then training rolls out through the inference path: one frame of Wan2.1 at 480x832 does, a tiny one does not."""
    assert fills(1560, 12, 132) and not fills(3 * 16, 4, 132)
