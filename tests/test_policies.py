"""Context policies: a rollout equals one from scratch over keys positioned by hand, in every cache and in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from by_hand import Past, Read, frames_at, from_scratch
from causalreel import config
from causalreel.infer.estimate import MemoryRequest, estimate
from causalreel.infer.live import Live, encode_prompt
from causalreel.infer.live import Policy as LivePolicy
from causalreel.infer.manner import Manner
from causalreel.infer.models import load, request_for
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.kv_cache import KVCache
from causalreel.nn.masks import frames_of
from causalreel.nn.policies.deep_forcing import DeepForcing
from causalreel.nn.policies.infinity_rope import InfinityRope
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.memrope import MemRope
from causalreel.nn.policies.registry import POLICIES, described, policy_from
from causalreel.nn.policies.relax_forcing import RelaxForcing
from causalreel.nn.policies.rolling_forcing import RollingForcing
from causalreel.nn.policies.rolling_sink import RollingSink
from causalreel.nn.policies.window import Context
from causalreel.nn.presets import ModelConfig
from causalreel.nn.static_cache import StaticCache
from causalreel.nn.static_tokens import StaticTokenCache
from causalreel.nn.token_cache import TokenCache
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.rollout import KeyedNoise, chunked, collect, fuse, rolling, rollout
from causalreel.train.self_rollout import parallel_pass, record_rollout, replay_passes, training_plan
from causalreel.types import Conditioning, LatentSpec
from causalreel.weights.export import Export, Sampling

CONFIG = ModelConfig(dim=48, ffn_dim=80, heads=3, layers=2, text_dim=64, text_length=16, freq_dim=32, channels=16)
SPEC, SIGMAS = LatentSpec(16, 4, 4), (1.0, 0.6)


def denoiser(policy: ContextPolicy) -> DiTDenoiser:
    torch.manual_seed(0)
    net = DiTDenoiser(CONFIG, context=policy)
    nn.init.normal_(net.model.head.head.weight, std=0.2)
    return net.requires_grad_(False)


def given(cuts: tuple[bool, ...] | None = None) -> Conditioning:
    return Conditioning(torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(5)), cuts=cuts)


def noise() -> KeyedNoise:
    return KeyedNoise([1, 2], SPEC)


def close(a: Tensor, b: Tensor) -> None:
    """What is left is rounding: sums of a few dozen numbers in another order, 3e-7 as measured, in float32."""
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


@torch.no_grad()
def run(net: DiTDenoiser, cache, chunk: int, frames: int, *, change=iter, cuts=None) -> Tensor:
    plan, told = change(chunked([chunk] * (frames // chunk), SIGMAS)), net.prepare(given(cuts))
    return collect(rollout(net, plan, conditioning=told, noise=noise(), cache=cache))


# ---- what a chunk of two frames sees, said by hand: its first frame -> the context, in order

ROLLING = {0: [], 2: [0, 1], 4: [0, 1, 2, 3], 6: [0, 1, 2, 3, 4, 5], 8: [2, 3, 4, 5, 6, 7], 10: [4, 5, 0, 1, 8, 9]}
ROLLING |= {12: [5, 4, 3, 2, 10, 11], 14: [3, 2, 1, 0, 12, 13], 16: [1, 0, 5, 4, 14, 15], 18: [0, 1, 2, 3, 16, 17]}
"""A bank of three chunks, of which two are read, one further each time; then backwards, then forwards again."""

FLUSHED = {0: [], 2: [0, 1], 4: [0, 1, 2, 3], 6: [0, 1, 2, 3, 4, 5], 8: [0, 1, 6, 7], 10: [0, 1, 6, 7, 8, 9]}
FLUSHED |= {12: [0, 1, 10, 11], 14: [0, 1, 10, 11, 12, 13], 16: [0, 1, 14, 15]}
"""A cache of three chunks, one of them the sink; every fourth chunk flushes, and a scene begins at frame 10."""


def rolling_sink(layer: int, start: int) -> Read:
    frames = ROLLING[start]
    return frames_at(frames, list(range(start - len(frames), start)), [start, start + 1])


def infinity_rope(layer: int, start: int) -> Read:
    frames, moved = FLUSHED[start], 9 if start == 10 else 0
    return frames_at(frames, [max(0, p) for p in range(4 - len(frames), 4)], [4 + moved, 5 + moved])


def re_indexed(layer: int, start: int) -> Read:
    frames = [f for f in range(start) if f < 2 or f >= start - 4]
    return frames_at(frames, [max(0, p) for p in range(5 - len(frames), 5)], [5, 6])


def sink(layer: int, start: int) -> Read:
    frames = [f for f in range(start) if f < 2 or f >= start - 4]
    return frames_at(frames, frames, [start, start + 1])


def full(layer: int, start: int) -> Read:
    return frames_at(list(range(start)), list(range(start)), [start, start + 1])


CASES: dict[str, tuple[ContextPolicy, Callable[[int, int], Read], int, tuple[bool, ...] | None]] = {
    "full": (Context(), full, 12, None),
    "sink": (Context(8, 2), sink, 14, None),
    "re-indexed": (Context(8, 2, 6), re_indexed, 14, None),
    "rolling-sink": (RollingSink(sink_chunks=2, recent_chunks=1), rolling_sink, 20, None),
    "infinity-rope": (
        InfinityRope(cache_chunks=3, sink_chunks=1, last_position=5, flush_every=4, cut_shift=9),
        infinity_rope,
        18,
        tuple(frame in (10, 11) for frame in range(18)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rollout_is_the_one_by_hand_in_every_cache(name: str) -> None:
    policy, read, frames, cuts = CASES[name]
    net, fast = denoiser(policy), accelerate(denoiser(policy))
    expected = from_scratch(net, given(), noise(), chunk=2, frames=frames, sigmas=SIGMAS, read=read)
    assert isinstance(fast.run, FastDiT)
    for change in (iter, fuse):
        for one in (net, fast):
            close(run(one, one.new_cache(), 2, frames, change=change, cuts=cuts), expected)
            length = frames if policy.most_seen(2) is None else None
            cache = fast.run.new_cache(policy, chunk=2, frames=length, batch=2, size=(4, 4))
            assert isinstance(cache, StaticCache)
            close(run(one, cache, 2, frames, change=change, cuts=cuts), expected)


@pytest.mark.parametrize("name", CASES)
def test_training_sees_what_inference_sees(name: str) -> None:
    policy, _, frames, cuts = CASES[name]
    net, sizes = denoiser(policy), [2] * (frames // 2)
    expected = run(net, net.new_cache(), 2, frames, cuts=cuts)
    plan = list(training_plan(sizes, SIGMAS, [1, 1]))
    record = record_rollout(net, plan, told=given(cuts), noise=noise(), cache=net.new_cache(), keep_caches=True)
    close(record.latents, expected)
    with torch.no_grad():
        close(torch.cat([one() for one in replay_passes(net, record, given(cuts))], 1), expected)
        close(parallel_pass(net, record, given(cuts)), expected)


def test_rolling_forcing_in_chunks_is_the_one_by_hand() -> None:
    """A finished chunk that is read for the cache sees the newest frames where they are, the sink while it is one."""

    def read(layer: int, start: int) -> Read:
        sink, working = [f for f in (0, 1) if f < start], [f for f in range(2, start) if f >= start - 4]
        first = start - len(working) - len(sink)
        return frames_at(sink + working, [*range(first, first + len(sink)), *working], [start, start + 1])

    def read_done(layer: int, start: int) -> Read:
        held = [f for f in range(start) if f < 2 or f >= start - 6]
        return frames_at(held[-6:], held[-6:], [start, start + 1])

    policy = RollingForcing(window=8, sink=2, cache=8)
    net, fast = denoiser(policy), accelerate(denoiser(policy))
    how = {"chunk": 2, "frames": 18, "sigmas": SIGMAS, "read": read, "read_done": read_done}
    expected = from_scratch(net, given(), noise(), **how)
    assert isinstance(fast.run, FastDiT)
    for one in (net, fast):
        close(run(one, one.new_cache(), 2, 18), expected)
        cache = fast.run.new_cache(policy, chunk=2, frames=None, batch=2, size=(4, 4))
        assert isinstance(cache, StaticCache)
        close(run(one, cache, 2, 18), expected)
    record = record_rollout(
        net,
        training_plan([2] * 9, SIGMAS, [1, 1]),
        told=given(),
        noise=noise(),
        cache=net.new_cache(),
        keep_caches=True,
    )
    with torch.no_grad():
        close(torch.cat([one() for one in replay_passes(net, record, given())], 1), expected)
    windows, how = list(rolling([2] * 9, SIGMAS)), {"conditioning": net.prepare(given()), "noise": noise()}
    with torch.no_grad():
        expected = collect(rollout(net, windows, cache=net.new_cache(), **how))
        for one in (net, fast):  # two chunks together, then the finished one for the cache
            cache = fast.run.new_cache(policy, chunk=2, frames=None, batch=2, size=(4, 4))
            close(collect(rollout(one, windows, cache=cache, **how)), expected)
    pipeline = load("tiny/chunk-4step", policy="rolling-forcing:window=12,sink=3,cache=12", device="cpu")
    calls = list(pipeline.schedule(93).plan())
    assert all(len(call.parts) == 1 for call in calls)  # a fused commit would not be known as one


# ---- policies that look at what frames hold

SELECTING = {
    "deep-forcing": DeepForcing(sink=2, budget=8, recent=3),
    "deep-forcing-last-block": DeepForcing(sink=1, budget=6, recent=1, observed=1),
    "relax-forcing": RelaxForcing(sink=2, budget=8, recent=2, alignment=0.7),
    "memrope": MemRope(sink=2, local=3, alpha_long=0.2, alpha_short=0.6),
}


class Averages:
    """The two memories of a block by hand: of what lies between two sink frames and the three newest ones."""

    def __init__(self) -> None:
        self.kept: dict[int, list] = {}

    def __call__(self, past: Past, start: int) -> None:
        layer = id(past)
        frames = self.kept.setdefault(layer, [])
        frames += [start - 2, start - 1]
        if len(frames) <= 7:
            return
        leaving = frames[2:-3]
        for frame, alpha in ((-1, 0.2), (-2, 0.6)):
            pairs = [past[f, t] for f in leaving for t in range(4)]
            mean = [torch.stack([pair[i] for pair in pairs]).mean(0) for i in (0, 1)]
            old = self.kept.get((layer, frame), mean)
            self.kept[layer, frame] = [(1 - alpha) * o + alpha * m for o, m in zip(old, mean, strict=True)]
        for frame in (-1, -2):
            past |= {(frame, t): tuple(self.kept[layer, frame]) for t in range(4)}
        self.kept[layer] = [*frames[:2], -1, -2, *frames[-3:]]


@torch.no_grad()
def watched(net: DiTDenoiser, frames: int) -> tuple[Tensor, dict[tuple[int, int], Read], list[TokenCache]]:
    """A rollout of two samples; what each chunk of the first one saw, as the cache says it; and the caches."""
    cache, seen, caches = net.new_cache(), {}, []
    assert isinstance(cache, TokenCache)

    def observe(call, x, velocity) -> None:
        if (0, call.start) not in seen:
            caches.append(cache.copy())
            first = cache.context.first_position(call.start, cache.held)
            for layer, entries in enumerate(cache.layers):
                columns = [] if entries is None else [entries.frames[0], entries.tokens[0], entries.positions[0]]
                rows = list(zip(*(column.tolist() for column in columns), strict=True))
                seen[layer, call.start] = Read(rows, [first, first + 1])

    told, plan = net.prepare(given()), chunked([2] * (frames // 2), SIGMAS)
    made = collect(rollout(net, plan, conditioning=told, noise=noise(), cache=cache, observe=observe))
    return made, seen, caches


@pytest.mark.parametrize("name", SELECTING)
def test_a_selecting_rollout_is_the_one_by_hand(name: str) -> None:
    """The choice is taken from the cache; keys, values, memories and positions are not."""
    net, frames = denoiser(SELECTING[name]), 24
    made, seen, _ = watched(net, frames)
    read = lambda layer, start: seen[layer, start]  # noqa: E731
    how = {"chunk": 2, "frames": frames, "sigmas": SIGMAS, "read": read}
    remember = Averages() if name == "memrope" else lambda past, start: None
    expected = from_scratch(net, given()[:1], KeyedNoise([1], SPEC), remember=remember, **how)
    close(made[:1], expected)
    fast = accelerate(denoiser(SELECTING[name]))
    assert isinstance(fast.run, FastDiT)
    for one in (net, fast):
        cache = fast.run.new_cache(SELECTING[name], chunk=2, frames=None, batch=2, size=(4, 4))
        assert isinstance(cache, StaticTokenCache)
        close(run(one, cache, 2, frames), made)
    alone = collect(
        rollout(
            net,
            chunked([2] * (frames // 2), SIGMAS),
            conditioning=given()[1:],
            noise=KeyedNoise([2], SPEC),
            cache=net.new_cache(),
        )
    )
    close(made[1:], alone)  # each sample chooses for itself


@pytest.mark.parametrize("name", SELECTING)
def test_a_selecting_policy_trains_by_replay(name: str) -> None:
    net, sizes = denoiser(SELECTING[name]), [2] * 8
    expected = run(net, net.new_cache(), 2, 16)
    plan = list(training_plan(sizes, SIGMAS, [1, 1]))
    record = record_rollout(net, plan, told=given(), noise=noise(), cache=net.new_cache(), keep_caches=True)
    close(record.latents, expected)
    net.requires_grad_(True)
    parts = [one() for one in replay_passes(net, record, given())]
    close(torch.cat(parts, 1), expected)
    sum(part.square().mean() for part in parts).backward()
    assert all(p.grad is not None for p in net.model.blocks[0].self_attn.parameters())
    with pytest.raises(ValueError, match="chunk by chunk behind its own cache only"):
        parallel_pass(net, record, given())
    with pytest.raises(ValueError, match="needs calls of one chunk"):
        run(net, net.new_cache(), 2, 8, change=fuse)


@pytest.mark.parametrize("name", SELECTING)
def test_a_selection_keeps_what_it_must_and_stays_flat(name: str) -> None:
    policy = SELECTING[name]
    _, _, caches = watched(denoiser(policy), 100)  # more than ten windows
    most = policy.most_held(2)
    assert [cache.held for cache in caches[10:]] == [most] * len(caches[10:])
    for cache in caches[10:]:
        for entries in cache.layers:
            assert entries is not None and entries.keys.shape[1] == len(entries) == 4 * (most or 0)
            sink, newest = entries.frames[:, : 4 * policy.sink], entries.frames[:, -4:]
            assert set(sink.flatten().tolist()) == set(range(policy.sink)) and (newest == cache.end - 1).all()
            assert (entries.positions >= 0).all() and entries.positions.max() < max(cache.end, most or 0) + 2
            if policy.is_endless:
                assert entries.positions[0].tolist() == [p for p in range(most or 0) for _ in range(4)]


FLAT = [policy for policy, *_ in CASES.values() if policy != Context()] + [RollingForcing(window=8, sink=2, cache=10)]


@pytest.mark.parametrize("policy", FLAT, ids=str)
def test_what_is_held_is_flat(policy: ContextPolicy) -> None:
    """After ten windows as much as after two, and as much as the policy says."""
    cache, held = KVCache(2, policy), []
    for start in range(0, 200, 2):
        read = cache.begin(frames_of([2], start=start), 1)
        assert not policy.is_endless or max(read.positions) < 50
        for layer in range(2):
            cache.extend(layer, torch.zeros(1, 2, 1, 2), torch.zeros(1, 2, 1, 2))
        cache.commit(2)
        held.append(sum(keys.shape[1] for keys in cache.keys if keys is not None) // 2)
    most = policy.most_held(2)
    assert most is not None and max(held[100 - 20 :]) == max(held[:20]) <= most


# ---- names, numbers, files


def test_a_policy_is_read_from_its_name_and_numbers() -> None:
    assert policy_from("full") == Context()
    assert policy_from("rolling-sink:sink_chunks=3, recent_chunks=2") == RollingSink(sink_chunks=3, recent_chunks=2)
    assert policy_from("infinity-rope:shifts_single_frames=false", frames=9).last_position == 8
    assert policy_from("sink", frames=12, chunk=2) == Context(12, 2)
    for name in POLICIES:
        for frames, chunk in ((21, 3), (6, 1), (12, 3)):
            policy = policy_from(name, frames=frames, chunk=chunk)
            assert policy_from(described(policy), frames=frames, chunk=chunk) == policy
            seen = policy.most_seen(chunk)
            assert seen is None or seen <= max(frames, 3 * chunk)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rollingsink", "policy must be one of .* got 'rollingsink'; did you mean 'rolling-sink'"),
        ("", "policy must be one of"),
        ("window:size=4", "policy window takes window=..., sink=.*; got 'size=4'"),
        ("window:window=x", "window must be a whole number, got 'x'"),
        ("sink:window=3,sink=3", "window must exceed sink"),
        ("sink:window=4,sink=2", "window must hold the sink and the chunk's 3 frames"),
        ("rolling-sink:sink_chunks=0", "at least 1"),
        ("infinity-rope:cache_chunks=1", "cache_chunks must exceed sink_chunks"),
        ("infinity-rope:flush_every=-2", "flush_every must be at least 0, got -2"),
        ("infinity-rope:last_position=1", "room for a chunk of 3 frames"),
        ("infinity-rope:shifts_single_frames=2", "must be true or false"),
        ("deep-forcing:budget=3,sink=2,recent=2", "budget must hold sink and recent"),
        ("relax-forcing:alignment=1.5", "alignment must be from 0 to 1"),
        ("memrope:alpha_long=-1", "alpha_long must be from 0 to 1"),
        ("sink:window=9,sink=3,window=12", "policy sink: window is given twice"),
    ],
)
def test_a_wrong_policy_is_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        policy_from(text)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


@pytest.mark.parametrize("policy", [*(case[0] for case in CASES.values()), *SELECTING.values()], ids=str)
def test_exports_name_the_policy_and_its_numbers(policy: ContextPolicy) -> None:
    card = Export("policies", CONFIG, Sampling(chunk=2), policy, 6, 16.0, SPEC)  # type: ignore[arg-type]
    written = config.dump(card)
    assert config.loads(written, Export) == card
    if isinstance(policy, Context):
        assert config.dump(policy).split() == [
            *("window:", str(policy.window or "null"), "sink:", str(policy.sink), "last_position:"),
            str(policy.last_position or "null"),
        ]
    else:
        assert f"policy: {described(policy).partition(':')[0]}" in written
        wrong = written.replace("policy: ", "policy: x")
        with pytest.raises(ValueError, match="context: one key must choose the variant: policy: 'rolling-sink'"):
            config.loads(wrong, Export)
    assert all(field.default is not dataclasses.MISSING for field in dataclasses.fields(policy))  # type: ignore[arg-type]


def test_a_rolling_window_has_room_for_all_that_is_denoised_together() -> None:
    """Also where a training clip is shorter; numbers that are named are taken as they are."""
    sampling = Sampling(steps=(1000, 800, 600, 400, 200), chunk=3)
    card = Export("short", CONFIG, sampling, Context(), 6, 16.0, SPEC)  # type: ignore[arg-type]
    for policy in (None, "rolling-forcing"):
        export, asked = Manner(policy, plan="rolling", any_plan=True).of(card, sampling)
        export.context.check(3 * len(asked.steps))
        assert (export.context.window, export.context.sink) == (18, 3)  # type: ignore[union-attr]
    export, _ = Manner("rolling-forcing:window=7", plan="rolling", any_plan=True).of(card, sampling)
    assert export.context.window == 7  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SELECTING)
def test_estimates_count_keys_as_stored_and_as_read(name: str) -> None:
    net = denoiser(SELECTING[name])
    cache, held = net.new_cache(), list[int]()
    assert isinstance(cache, TokenCache)

    def count(*_: object) -> None:
        stored = [x for entries in cache.layers if entries is not None for x in (entries.keys, entries.values)]
        tensors = [*stored, *cache._turned.values(), *(x for k, v, _ in cache._fresh.values() for x in (k, v))]
        held.append(sum(x.nbytes for x in tensors))

    plan = chunked([2] * 12, SIGMAS)
    collect(rollout(net, plan, conditioning=given(), noise=noise(), cache=cache, observe=count))
    request = MemoryRequest(
        CONFIG, SPEC, 2, SELECTING[name], None, dtype="float32", form="eager", batch=len(given()), decoder=None
    )
    assert 0.8 * estimate(request)["cache"] <= max(held) <= estimate(request)["cache"]


# ---- streams


@pytest.mark.parametrize("asked", ["memrope", "rolling-sink", "infinity-rope", "deep-forcing", "rolling"])
def test_a_live_stream_goes_on_with_every_policy(asked: str) -> None:
    manner = Manner(plan="rolling", any_plan=True) if asked == "rolling" else Manner(asked)
    pipeline = load("tiny", manner=manner)
    red, blue = (encode_prompt(pipeline, f"a large {colour} square moves left") for colour in ("red", "blue"))
    live = Live(pipeline, red, seed=1, policy=LivePolicy.of(pipeline.export, pipeline.sampling, "slide"))
    with torch.no_grad():
        starts = [live.next_chunk().start for _ in range(20)]
        live.tell(blue, mode="switch")
        starts.append(live.next_chunk().start)
        live.tell(red, mode="recompute")
        last = live.next_chunk()
    assert starts == list(range(21)) and last.start == 21 and torch.isfinite(last.latents).all() and live.segments == 2


def test_estimates_know_what_is_held() -> None:
    """A rolling plan denoises four chunks together; policies hold what they say, in growing and fixed caches."""
    rolling = request_for("causal-forcing/longvideo", frames=0)
    assert (rolling.fresh, rolling.kept, rolling.places) == (12, 24, 42)
    how = {"chunk": 3, "frames": None}
    for policy, kept, places in (
        (RollingSink(sink_chunks=3, recent_chunks=2), 21, 27),
        (InfinityRope(cache_chunks=5), 15, 21),
        (MemRope(), 9, 12),
        (DeepForcing(), 16, 19),
    ):
        asked = dataclasses.replace(rolling, context=policy, joint=1, **how)
        assert (asked.kept, asked.places) == (kept, places) and estimate(asked).least > 0
        assert dataclasses.replace(asked, form="fp8-attention").places is None  # their caches are never in e4m3
