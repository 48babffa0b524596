"""Plans beside the plain one: rolling, noisy context, step lists for each chunk, exact levels; and asking for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from by_hand import frames_at, from_scratch
from causalreel import config
from causalreel.families import MODELS
from causalreel.infer.manner import Manner
from causalreel.infer.models import load, profile
from causalreel.infer.schedule import Schedule, adapt, schedule
from causalreel.nn.kv_cache import KVCache
from causalreel.nn.masks import frames_of
from causalreel.nn.policies.rolling_forcing import RollingForcing
from causalreel.nn.policies.rolling_sink import RollingSink
from causalreel.nn.policies.window import Context
from causalreel.nn.rope import rope_table, rotate
from causalreel.rollout import Call, Part, chunked, collect, fuse, rolling, rollout, truncate
from causalreel.types import Geometry
from causalreel.weights.export import Export, Sampling
from test_policies import CONFIG, SIGMAS, SPEC, close, denoiser, given, noise


def parts(plan) -> list[tuple]:
    return [(call.start, [p.sigma for p in call.parts], call.parts[-1].sigma_next, call.commit) for call in plan]


# ---- rolling


def test_a_rolling_plan_moves_a_window_of_rising_noise() -> None:
    plan = parts(rolling([2] * 4, (1.0, 0.8, 0.4)))
    assert plan == [
        (0, [1.0], 0.8, 0),
        (0, [0.8, 1.0], 0.8, 0),
        (0, [0.4, 0.8, 1.0], 0.8, 0),
        (0, [0.0], None, 2),
        (2, [0.4, 0.8, 1.0], 0.8, 0),
        (2, [0.0], None, 2),
        (4, [0.4, 0.8], 0.4, 0),
        (4, [0.0], None, 2),
        (6, [0.4], 0.0, 0),
    ]
    assert [call.joint for call in rolling([2] * 2, (1.0,))] == [True, False, True]
    assert next(iter(rolling([1, 1], (1.0, 0.5), prefix=[1]))) == Call((Part(0, 1, 0.0, None),), commit=1)


def seen(policy: RollingForcing, held: int, start: int, frames: int, done: bool) -> tuple[list[int], list[int]]:
    facts = frames_of([2] * (held // 2)) if held <= policy.cache else ()
    view = policy.view(facts, frames_of([frames], start=start, done=done))
    return [frame.index for frame in view.frames], list(view.positions)


def test_the_sink_of_rolling_forcing_follows_the_window() -> None:
    policy = RollingForcing(window=10, sink=2, cache=12)
    assert seen(policy, 0, 0, 6, False) == ([], [])
    assert seen(policy, 4, 4, 6, False) == ([0, 1, 2, 3], [0, 1, 2, 3])
    assert seen(policy, 8, 8, 6, False) == ([0, 1, 6, 7], [4, 5, 6, 7])
    assert seen(policy, 8, 8, 2, False) == ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7])
    assert seen(policy, 10, 10, 2, True) == ([2, 3, 4, 5, 6, 7, 8, 9], [2, 3, 4, 5, 6, 7, 8, 9])
    assert seen(policy, 8, 8, 2, True) == ([0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7])
    held = frames_of([2] * 6)
    assert [f.index for f in policy.after(held, frames_of([2], start=12))] == [0, 1, *range(4, 14)]
    assert policy.after(held[:4], held[4:6]) == held[:6]


@torch.no_grad()
def test_rolling_reads_finished_frames_where_the_policy_says() -> None:
    """One call of the window by hand: what the committed keys are does not matter, only where they are read."""
    policy = RollingForcing(window=10, sink=2, cache=12)
    net, calls, caches = denoiser(policy), [], []

    def observe(call, x: Tensor, velocity: Tensor) -> None:
        calls.append((call, x, velocity))
        caches.append(cache.copy())

    cache = net.new_cache()
    assert isinstance(cache, KVCache)
    made = collect(
        rollout(
            net, rolling([2] * 8, (1.0, 0.8, 0.4)), conditioning=given(), noise=noise(), cache=cache, observe=observe
        )
    )
    assert made.shape[1] == 16 and len(calls) == 8 + 2 + 7
    call, x, velocity = next(one for one in calls if one[0].start == 8 and one[0].joint)
    kept = caches[[one[0] is call for one in calls].index(True)]
    # the same with keys that lie at the positions where the window sees them: an absolute window over moved frames
    moved = KVCache(CONFIG.layers, Context())
    moved.frames = frames_of([2, 2], start=4)
    at = [f.index for f in kept.frames]
    places = [at.index(f) * 4 + t for f in (0, 1, 6, 7) for t in range(4)]
    for layer in range(CONFIG.layers):
        keys, values = kept.keys[layer], kept.values[layer]
        assert keys is not None and values is not None
        moved.keys[layer] = rotate(keys[:, places], *rope_table((4, 5, 6, 7), 2, 2, 16, keys.device))
        moved.values[layer] = values[:, places]
    plain = denoiser(Context())
    sigma = torch.tensor([p.sigma for p in call.parts for _ in range(2)]).expand(2, -1)
    close(plain(x, sigma, given(), sizes=[6], start=8, cache=moved), velocity)


# ---- noisy context and step lists


@torch.no_grad()
def test_noisy_context_is_the_last_denoising_call() -> None:
    lists = ((1.0, 0.8, 0.4), (1.0, 0.6))
    plan = list(chunked([2] * 3, lists, noisy_from=1))
    assert parts(plan) == [
        (0, [1.0], 0.8, 0),
        (0, [0.8], 0.4, 0),
        (0, [0.4], 0.0, 0),
        (0, [0.0], None, 2),
        (2, [1.0], 0.6, 0),
        (2, [0.6], 0.0, 2),
        (4, [1.0], 0.6, 0),
        (4, [0.6], 0.0, 2),
    ]
    net, inputs = denoiser(Context(6, 2)), []
    caches = [net.new_cache(), net.new_cache()]
    how = {"conditioning": given(), "noise": noise()}
    watch = lambda call, x, velocity: inputs.append((call, x))  # noqa: E731
    made = collect(rollout(net, plan, cache=caches[0], observe=watch, **how))
    close(collect(rollout(net, fuse(plan), cache=caches[1], **how)), made)
    again = net.new_cache()
    for call, x in inputs:  # by hand: only what is committed, each as it was read
        if call.commit:
            levels = torch.full((2, 2), call.parts[0].sigma)
            net(x, levels, given(), sizes=[2], start=call.start, cache=again)
            again.commit(2)
    for layer in range(CONFIG.layers):
        close(again.keys[layer], caches[0].keys[layer])
        close(again.keys[layer], caches[1].keys[layer])
    assert parts(truncate(plan, [0])) == [  # what leaves early is noised to the level, but for the last chunk
        (0, [1.0], 0.0, 0),
        (0, [0.0], None, 2),
        (2, [1.0], 0.0, 0),
        (2, [0.6], None, 2),
        (4, [1.0], 0.0, 0),
    ]


def test_a_noisy_prefix_is_written_at_the_first_lists_last_level() -> None:
    plan = list(chunked([1] * 2, ((1.0, 0.5), (1.0,)), prefix=[1, 1], noisy_from=1))
    assert [(call.start, call.parts[0].sigma, call.commit) for call in plan[:2]] == [(0, 0.0, 1), (1, 0.5, 1)]
    assert [call.parts[0].sigma for call in plan[2:]] == [1.0, 0.5, 1.0]
    assert parts(chunked([1], (1.0, 0.5), first=(1.0,)))[0] == (0, [1.0], 0.0, 0)


@torch.no_grad()
def test_exact_states_are_float64_between_calls_and_float32_outside() -> None:
    net, levels = denoiser(Context()), (1600 / 1601, 15 / 16, 5 / 8)
    seen_types = []

    def denoise(x, sigma, conditioning, **call):
        seen_types.append((x.dtype, sigma.dtype, sigma[0, 0].item()))
        return net(x, sigma, conditioning, **call)

    how = {"conditioning": given(), "noise": noise(), "cache": net.new_cache()}
    exact = collect(rollout(denoise, chunked([2] * 2, levels), exact=True, **how))
    assert exact.dtype == torch.float32
    assert seen_types[:3] == [(torch.float32, torch.float64, level) for level in levels]
    rounded = collect(rollout(net, chunked([2] * 2, levels), **how | {"cache": net.new_cache()}))
    assert 0 < (exact - rounded).abs().max() < 1e-3 * exact.abs().max()


@torch.no_grad()
def test_plain_lists_and_by_hand_agree() -> None:
    net = denoiser(Context())
    read = lambda layer, start: frames_at(list(range(start)), list(range(start)), [start, start + 1])  # noqa: E731
    expected = from_scratch(net, given(), noise(), chunk=2, frames=6, sigmas=SIGMAS, read=read)
    how = {"conditioning": given(), "noise": noise()}
    for lists in (SIGMAS, (SIGMAS,), (SIGMAS, SIGMAS)):
        close(collect(rollout(net, chunked([2] * 3, lists), cache=net.new_cache(), **how)), expected)


# ---- asking for them

CARD = Export("plans", CONFIG, Sampling(chunk=2), Context(), 8, 16.0, SPEC)
RCM = Sampling(chunk=1, levels=((1600 / 1601, 15 / 16, 5 / 6, 5 / 8), (1600 / 1601, 5 / 8)), noisy_from=1)


def test_a_manner_changes_policy_plan_and_context() -> None:
    assert Manner().of(CARD, CARD.sampling) == (CARD, CARD.sampling)
    export, sampling = Manner("rolling-sink:sink_chunks=2").of(CARD, CARD.sampling)
    assert export.context == RollingSink(sink_chunks=2) and sampling == CARD.sampling
    export, sampling = Manner(plan="rolling", any_plan=True).of(CARD, replace(CARD.sampling, first_steps=(1000.0,)))
    assert export.context == RollingForcing(window=8, sink=2, cache=10)
    calls = list(Schedule(8, 0, sampling, export.context).plan())
    assert sampling.plan == "rolling" and calls == list(rolling([2] * 4, (1.0, 5 / 6)))
    for policy in ("rolling-sink", "infinity-rope", "memrope", "deep-forcing", "relax-forcing"):
        with pytest.raises(ValueError, match=f"plan rolling reads .* the policy {policy}.* has no rule"):
            Manner(policy, "rolling", any_plan=True).of(CARD, CARD.sampling)
    with pytest.raises(ValueError, match="window must hold the sink and a call's 8 frames"):  # before anything is made
        schedule(replace(sampling, steps=(1000, 750, 500, 250)), Geometry(4, 8, 4), trained=8, context=export.context)
    assert Manner(noisy_context=2).of(CARD, CARD.sampling)[1].noisy_from == 2
    with pytest.raises(ValueError, match=r"plans was not trained for it but for chunked.*--any-plan allows it"):
        Manner(plan="rolling").of(CARD, CARD.sampling)
    with pytest.raises(ValueError, match="need an autoregressive model"):
        Manner("full").of(CARD, replace(CARD.sampling, chunk=None))
    family, row = MODELS["causal-forcing/longvideo"]
    longvideo = family.export(row)
    assert longvideo.context == RollingForcing() and longvideo.sampling.plan == "rolling"
    with pytest.raises(ValueError, match="was not trained for it but for rolling"):
        Manner(plan="chunked").of(longvideo, longvideo.sampling)


def test_levels_in_exports_and_with_other_steps() -> None:
    card = replace(CARD, sampling=RCM, frames=8)
    assert config.loads(config.dump(card), Export) == card
    calls = list(Schedule(4, 0, RCM).plan(fused=False))
    assert [call.parts[0].sigma for call in calls] == [*RCM.levels[0], 0.0, *RCM.levels[1] * 3]
    one, two = adapt(RCM, steps=1), adapt(RCM, steps=2)
    assert one.levels == (RCM.levels[0], (1600 / 1601,)) and two.levels[1] == pytest.approx((1600 / 1601, 5 / 6))
    for wrong, message in (
        ({"levels": ((0.5, 0.6),)}, "fall strictly"),
        ({"levels": ((1.0, 0.5), (0.9,))}, "begin alike"),
        ({"levels": ((),)}, "fall strictly"),
        ({"noisy_from": -1}, "noisy_from"),
        ({"plan": "rolling", "noisy_from": 1}, "noisy_from"),
        ({"plan": "rolling", "first_steps": (1000.0,)}, "rolling plan needs"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling(**wrong)


def test_a_model_is_loaded_with_another_manner() -> None:
    prompt = "a large red circle moves right slowly on a dark background"
    usual, other = load("tiny"), load("tiny", policy="infinity-rope:cache_chunks=3", manner=Manner(noisy_context=1))
    assert other.denoiser.context == other.export.context != usual.export.context
    assert profile("tiny", manner=Manner("memrope")).export.context.most_seen(1) == usual.export.frames
    one, two = (torch.cat([c.latents for c in pipe.latents(prompt)], 1) for pipe in (usual, other))
    assert one.shape == two.shape and torch.isfinite(two).all() and not torch.equal(one, two)
    rolled = load("tiny", manner=Manner(plan="rolling", any_plan=True))
    assert torch.cat([c.latents for c in rolled.latents(prompt)], 1).shape == one.shape
    exact = replace(usual, sampling=replace(RCM, times="bfloat16"))
    assert torch.cat([c.latents for c in exact.latents(prompt)], 1).dtype == torch.float32
    with pytest.raises(ValueError, match="policy must be one of"):
        load("tiny", policy="nope")
