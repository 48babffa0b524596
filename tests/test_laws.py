"""The laws of the core: identities that tie training, inference, masks, caches and plans together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causalreel.flow import add_noise, velocity_to_x0, warp_steps
from causalreel.nn.attention import BACKENDS, attend
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.nn.linear import effective_state
from causalreel.nn.lora import LoRAConfig, adapters, add_lora
from causalreel.nn.masks import Context, frame_mask, frames_of
from causalreel.nn.presets import ModelConfig
from causalreel.rollout import KeyedNoise, StreamNoise, chunk_sizes, chunked, collect, fuse, rollout
from causalreel.solvers import euler, unipc, unipc_sigmas
from causalreel.train.losses import consistency_loss, surrogate_loss
from causalreel.train.self_rollout import parallel_pass, record_rollout, replay_passes, training_plan
from causalreel.train.trajectories import cached_causal_trajectories, causal_trajectories
from causalreel.types import Conditioning, LatentSpec

SPEC = LatentSpec(4, 4, 6)
CONFIG = ModelConfig(dim=32, ffn_dim=48, heads=2, layers=2, text_dim=8, text_length=5, freq_dim=16, channels=4)
FOUR, TWO = warp_steps([1000, 750, 500, 250], 5.0), warp_steps([1000, 500], 5.0)


def make(context: Context = Context(), seed: int = 0) -> DiTDenoiser:
    torch.manual_seed(seed)
    net = DiTDenoiser(CONFIG, context=context)
    torch.nn.init.normal_(net.model.head.head.weight, std=0.2)
    return net


def told(batch: int = 2) -> Conditioning:
    return Conditioning(torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(9)))


def latents(frames: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randn(batch, frames, *SPEC.shape, generator=torch.Generator().manual_seed(seed))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    error = ((a - b).abs().max() / b.abs().max()).item()
    assert error < tolerance, f"relative error {error:.2e}"


@pytest.mark.parametrize(
    "context", [Context(), Context(window=3), Context(window=4, sink=1), Context(window=5, sink=2)]
)
@pytest.mark.parametrize("chunk", [1, 3])
@torch.no_grad()
def test_teacher_forcing_in_one_pass_is_cached_chunk_by_chunk(chunk: int, context: Context) -> None:
    """Laws 1 and 2: the mask with its window is the cache with its eviction."""
    if context.window is not None and context.window < context.sink + chunk:
        pytest.skip("the chunk does not fit the window")
    net, clean, noise = make(context), latents(6), latents(6, seed=2)
    sigma = torch.rand(2, 6 // chunk, generator=torch.Generator().manual_seed(3)).repeat_interleave(chunk, 1)
    x, sizes = add_noise(clean, noise, sigma), chunk_sizes(6, chunk)
    whole = net.teacher_forced(x, sigma, told(), clean=clean, sizes=sizes)
    cache, parts = net.new_cache(), []
    for start in range(0, 6, chunk):
        here = slice(start, start + chunk)
        parts.append(net(x[:, here], sigma[:, here], told(), sizes=(chunk,), start=start, cache=cache))
        net(clean[:, here], torch.zeros(2, chunk), told(), sizes=(chunk,), start=start, cache=cache)
        cache.commit(chunk)
    close(torch.cat(parts, 1), whole)
    if context.window is not None:
        assert len(cache.frames) == context.window  # and the context really is evicted
        unlimited = make().teacher_forced(x, sigma, told(), clean=clean, sizes=sizes)
        assert (unlimited - whole).abs().max() > 1e-3


@pytest.mark.parametrize("context", [Context(), Context(window=4, sink=1)])
@torch.no_grad()
def test_behind_a_clips_context_is_teacher_forcing(context: Context) -> None:
    net, clean, x, sigma = make(context), latents(6), latents(6, seed=2), torch.full((2, 1), 0.6)
    whole = net.teacher_forced(x, sigma, told(), clean=clean, sizes=[2] * 3)
    close(net.behind(net.context_of(clean, told(), sizes=[2] * 3), x, sigma, told(), sizes=[2] * 3), whole)


@torch.no_grad()
def test_one_chunk_is_bidirectional() -> None:
    """Law 3, for diffusion forcing, for an empty cache and for teacher forcing."""
    net, x, sigma = make(), latents(4), torch.full((2, 4), 0.7)
    both = net(x, sigma, told())
    close(net(x, sigma, told(), sizes=(4,)), both)
    close(net(x, sigma, told(), sizes=(4,), cache=net.new_cache()), both)
    close(net.teacher_forced(x, sigma, told(), clean=latents(4, seed=5), sizes=(4,)), both)


@torch.no_grad()
def test_a_lora_merged_is_the_lora_attached() -> None:
    """Whole clips and cached rollouts, with adapters around every product of the blocks or in the weights."""
    attached, merged = make(), make()
    add_lora(attached.model, LoRAConfig(rank=3, alpha=5.0))
    for _, layer in adapters(attached.model):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    merged.load_state_dict(effective_state(attached))
    x, sigma = latents(4), torch.full((2, 4), 0.6)
    one, other = (net(x, sigma, told(), sizes=(2, 2)) for net in (attached, merged))
    close(one, other, 1e-6)
    plan, how = list(chunked([2, 2, 2], TWO)), {"conditioning": told(), "noise": KeyedNoise([1, 2], SPEC)}
    close(*(collect(rollout(net, plan, cache=net.new_cache(), **how)) for net in (attached, merged)), 1e-5)
    assert not torch.allclose(one, make()(x, sigma, told(), sizes=(2, 2)), rtol=0.01)


@torch.no_grad()
def test_later_chunks_never_reach_earlier_ones() -> None:
    net, x, sigma = make(), latents(6), torch.full((2, 6), 0.5)
    changed = torch.cat([x[:, :4], latents(2, seed=8)], 1)
    a, b = (net(y, sigma, told(), sizes=(2, 2, 2)) for y in (x, changed))
    assert torch.equal(a[:, :4], b[:, :4]) and not torch.equal(a[:, 4:], b[:, 4:])


@pytest.mark.parametrize("noisy_from", [None, 0, 1])
@pytest.mark.parametrize(("chunk", "sigmas", "first"), [(3, FOUR, None), (1, TWO, FOUR), (1, FOUR[:1], FOUR)])
@torch.no_grad()
def test_training_rollout_that_never_exits_early_is_inference(
    chunk: int, sigmas: tuple, first: tuple | None, noisy_from: int | None
) -> None:
    """Law 4, bit for bit with the same noise."""
    net, sizes, noise = make(), chunk_sizes(6, chunk), KeyedNoise([4, 5], SPEC)
    plan = chunked(sizes, sigmas, first=first, noisy_from=noisy_from)
    inference = collect(rollout(net, plan, conditioning=told(), noise=noise, cache=net.new_cache()))
    exits = [len(first or sigmas) - 1, len(sigmas) - 1]
    plan = training_plan(sizes, sigmas, exits, first=first, noisy_from=noisy_from)
    record = record_rollout(net, plan, told=told(), noise=noise, cache=net.new_cache())
    assert torch.equal(record.latents, inference)


@pytest.mark.parametrize("context", [Context(), Context(window=4, sink=1)])
@pytest.mark.parametrize(
    ("chunk", "context_sigma", "noisy_from", "exits"),
    [
        (1, 0.0, None, (2, 1)),
        (3, 0.0, None, (2, 1)),
        (1, 0.1, None, (2, 1)),
        (1, 0.0, 0, (3, 1)),  # every chunk's last call writes its context
        (1, 0.0, 1, (2, 0)),  # each but the first leaves early and is noised
        (3, 0.0, 0, (2, 1)),
    ],
)
def test_replayed_and_parallel_gradients_are_the_full_graphs(
    chunk: int, context_sigma: float, noisy_from: int | None, exits: tuple, context: Context
) -> None:
    """Law 5: three ways to the same parameter gradient."""
    net, sizes, first = make(context), chunk_sizes(6, chunk), FOUR
    gradient = latents(6, seed=7)

    def plan():
        return training_plan(sizes, TWO, exits, first=first, context_sigma=context_sigma, noisy_from=noisy_from)

    def grads() -> torch.Tensor:
        found = torch.cat([p.grad.flatten() for p in net.parameters()])
        net.zero_grad()
        return found

    noise = KeyedNoise([1, 2], SPEC)
    full = collect(rollout(net, plan(), conditioning=told(), noise=noise, cache=net.new_cache()))
    surrogate_loss(full, gradient).backward()
    reference = grads()
    record = record_rollout(net, plan(), told=told(), noise=noise, cache=net.new_cache(), keep_caches=True)
    close(record.latents, full.detach())

    again = parallel_pass(net, record, told())
    close(again.detach(), full.detach())
    surrogate_loss(again, gradient).backward()
    close(grads(), reference)

    fused = record_rollout(net, fuse(plan()), told=told(), noise=noise, cache=net.new_cache())
    surrogate_loss(parallel_pass(net, fused, told()), gradient).backward()
    close(grads(), reference)

    for part, goal in zip(replay_passes(net, record, told()), gradient.split(chunk, 1), strict=True):
        (surrogate_loss(part(), goal) * goal.numel() / gradient.numel()).backward()
    close(grads(), reference)


@pytest.mark.parametrize("context", [Context(), Context(window=6, sink=1)])
@pytest.mark.parametrize(("chunk", "sigmas", "first"), [(3, FOUR, None), (1, TWO, FOUR), (1, FOUR[:1], FOUR)])
@torch.no_grad()
def test_fused_plan_is_the_plain_plan(chunk: int, sigmas: tuple, first: tuple | None, context: Context) -> None:
    net, noise = make(context), KeyedNoise([4, 5], SPEC)
    given = latents(3, seed=6)

    def run(change) -> tuple[torch.Tensor, int]:
        calls = list(change(chunked(chunk_sizes(9, chunk), sigmas, first=first, prefix=chunk_sizes(3, chunk))))
        chunks = rollout(net, calls, conditioning=told(), noise=noise, cache=net.new_cache(), prefix=given)
        return collect(chunks), len(calls)

    (plain, plain_calls), (fused, fused_calls) = run(iter), run(fuse)
    close(fused, plain)
    assert fused_calls < plain_calls


@torch.no_grad()
def test_guided_cache_is_two_rollouts() -> None:
    """One call over both rows and one cache give what two calls and two caches give."""
    net, sigmas, negative = make(), unipc_sigmas(5, 5.0), Conditioning(torch.zeros(1, 5, 8))
    guided, noise = Guided(net, negative, 3.0), KeyedNoise([1, 2], SPEC)
    caches = net.new_cache(), net.new_cache()

    class Pair:
        def commit(self, frames: int) -> None:
            for cache in caches:
                cache.commit(frames)

    def two_calls(x, sigma, cond, **call):
        call.pop("cache")
        a, b = (
            net(x, sigma, cond, cache=caches[0], **call),
            net(x, sigma, Conditioning(torch.zeros(2, 5, 8)), cache=caches[1], **call),
        )
        return b + 3 * (a - b)

    def run(denoise, cache) -> torch.Tensor:
        plan = chunked([1, 1, 1], sigmas[:-1])
        return collect(rollout(denoise, plan, conditioning=told(), noise=noise, solver=unipc, cache=cache))

    close(run(guided, guided.new_cache()), run(two_calls, Pair()))


@pytest.mark.parametrize("chunk", [1, 2])
def test_cached_trajectories_are_the_parallel_ones(chunk: int) -> None:
    net, clean, noise = make(), latents(4), latents(4, seed=2)
    sigmas, keep = (1.0, 0.9, 0.5, 0.2, 0.0), (0, 2, 4)
    how = {"noise": noise, "sizes": chunk_sizes(4, chunk), "sigmas": sigmas, "keep": keep}
    a, b = causal_trajectories(net, clean, told(), **how), cached_causal_trajectories(net, clean, told(), **how)
    assert a.shape == (2, 3, 4, *SPEC.shape)
    close(a, b)
    assert torch.equal(a[:, 0], noise)


@torch.no_grad()
def test_prepared_text_gives_the_same_velocity() -> None:
    net, x, sigma = make(), latents(3), torch.full((2, 1), 0.4)
    assert torch.equal(net(x, sigma, net.prepare(told())), net(x, sigma, told()))


@torch.no_grad()
def test_short_text_is_padded_with_zeros() -> None:
    net, x, sigma = make(), latents(2), torch.full((2, 1), 0.4)
    padded = torch.cat([told().text[:, :3], torch.zeros(2, 2, 8)], 1)
    assert torch.equal(net(x, sigma, Conditioning(told().text[:, :3])), net(x, sigma, Conditioning(padded)))


@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "sdpa"])
@pytest.mark.parametrize("case", ["teacher forcing", "window", "full"])
@torch.no_grad()
def test_attention_backends_agree_with_sdpa(name: str, case: str) -> None:
    """Law 7."""
    sizes, context = (2, 1, 3), Context(window=4) if case == "window" else Context()
    facts = frames_of(sizes) + (frames_of(sizes, stream=1) if case == "teacher forcing" else ())
    mask = None if case == "full" else frame_mask(facts, facts, context)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, len(facts) * 6, 2, 16, generator=generator) for _ in range(3))
    close(attend(q, k, v, mask, 6, backend=name), attend(q, k, v, mask, 6, backend="sdpa"), 1e-5)


@settings(max_examples=60, deadline=None)
@given(
    chunk=st.integers(1, 4),
    chunks=st.integers(1, 6),
    window=st.one_of(st.none(), st.integers(1, 12)),
    sink=st.integers(0, 3),
)
def test_window_counts_the_sink_and_the_chunk(chunk: int, chunks: int, window: int | None, sink: int) -> None:
    """No frame ever sees more than `window` frames, and always its own chunk and the sink."""
    if window is not None and window < sink + chunk:
        return
    context = Context(window, sink if window is not None else 0)
    facts = frames_of([chunk] * chunks)
    mask = frame_mask(facts, facts, context)
    for q, frame in enumerate(facts):
        seen = {k for k in range(len(facts)) if mask is None or mask.allowed[q][k]}
        assert seen >= set(range(frame.chunk_start, frame.chunk_end))
        assert seen >= {k for k in range(context.sink) if k < frame.chunk_start}
        assert max(seen) < frame.chunk_end
        if window is not None:
            assert len(seen) == min(window, frame.chunk_end)


def test_documented_window_example() -> None:
    """Window 4 with sink 1, frame-wise: frame 7 sees frames 0, 5, 6 and 7."""
    facts = frames_of([1] * 8)
    mask = frame_mask(facts, facts, Context(4, 1))
    assert mask is not None
    assert [k for k in range(8) if mask.allowed[7][k]] == [0, 5, 6, 7]


def test_keyed_noise_depends_on_the_seed_alone() -> None:
    one, many = KeyedNoise([7], SPEC), KeyedNoise([3, 7], SPEC)
    assert torch.equal(one.initial(2, 3)[0], many.initial(2, 3)[1])
    assert torch.equal(one.initial(0, 4)[:, 2:3], one.initial(2, 1))
    assert not torch.equal(one.initial(0, 1), one.renoise(0, 1, 1))


def test_rollout_on_a_toy_function() -> None:
    """A denoiser that knows the answer brings every solver to it, whatever the plan."""
    goal = latents(4)

    def denoise(x, sigma, cond, *, sizes, start, cache):
        return (x - goal[:, start : start + x.shape[1]]) / sigma[..., None, None, None]

    for solver, sigmas in ((euler, FOUR), (unipc, unipc_sigmas(4, 5.0)[:-1])):
        chunks = rollout(
            denoise, chunked([2, 2], sigmas), conditioning=told(), noise=KeyedNoise([1, 2], SPEC), solver=solver
        )
        close(collect(chunks), goal, 1e-4)
    stream = StreamNoise(2, SPEC, torch.Generator().manual_seed(1))
    chunks = list(rollout(denoise, chunked([1] * 4, TWO), conditioning=told(), noise=stream))
    assert [c.start for c in chunks] == [0, 1, 2, 3]
    close(collect(chunks), goal, 1e-4)


def test_endless_rollout_is_lazy_and_flat() -> None:
    """Conditioning is read chunk by chunk, and finished frames are forgotten."""
    from itertools import islice, repeat

    net, asked = make(Context(window=3)), []

    def live(call) -> Conditioning:
        asked.append(call.start)
        return told(1)

    cache = net.new_cache()
    run = rollout(net, chunked(repeat(1), TWO), conditioning=live, noise=KeyedNoise([1], SPEC), cache=cache)
    with torch.no_grad():
        assert [c.start for c in islice(run, 9)] == list(range(9))
    assert asked[-1] == 8 and len(cache.frames) == 3
    frames = run.gi_frame.f_locals["frames"]
    assert len(frames) <= 2


def test_context_never_carries_gradient() -> None:
    """Also when the call that is committed does: a later chunk sends nothing into an earlier one."""
    net = make()
    cache = net.new_cache()
    x = latents(1).requires_grad_()
    net(x, torch.full((2, 1), 0.5), told(), sizes=(1,), cache=cache)
    cache.commit(1)
    assert not any(t.requires_grad for t in (*cache.keys, *cache.values) if t is not None)
    net(
        latents(1, seed=2), torch.full((2, 1), 0.5), told(), sizes=(1,), start=1, cache=cache
    ).square().mean().backward()
    assert x.grad is None


def test_consistency_target_is_one_teacher_step_nearer_to_the_data() -> None:
    """With a teacher that knows the noise, the target is asked at exactly that noise's next level."""
    x0, noise, asked = latents(4), latents(4, seed=2), []

    class Knowing:
        def teacher_forced(self, x, sigma, told, *, clean, sizes):
            asked.append(x)
            return noise - x0

    sigma, sigma_next = torch.full((2, 1), 0.8), torch.full((2, 1), 0.6)
    knowing, how = Knowing(), {"noise": noise, "sizes": [2, 2]}
    loss = consistency_loss(knowing, knowing, knowing, x0, told(), sigma=sigma, sigma_next=sigma_next, **how)
    close(asked[0], add_noise(x0, noise, sigma))  # teacher
    close(asked[1], add_noise(x0, noise, sigma_next))  # target
    assert loss < 1e-10


def test_a_call_must_continue_the_cache() -> None:
    net, cache = make(), make().new_cache()
    net(latents(1), torch.zeros(2, 1), told(), sizes=(1,), cache=cache)
    cache.commit(1)
    with pytest.raises(ValueError, match="starts at frame 3, but the cache ends at frame 1"):
        net(latents(1), torch.zeros(2, 1), told(), sizes=(1,), start=3, cache=cache)


def test_frames_must_be_a_multiple_of_the_chunk() -> None:
    with pytest.raises(ValueError, match=r"multiple of the chunk size 3, got 11 \(nearest: 9 or 12\)"):
        chunk_sizes(11, 3)


def test_velocity_and_clean_estimate_are_inverse() -> None:
    x0, noise, sigma = latents(3), latents(3, seed=2), torch.rand(2, 3) * 0.9 + 0.1
    close(velocity_to_x0(add_noise(x0, noise, sigma), noise - x0, sigma), x0, 1e-5)
