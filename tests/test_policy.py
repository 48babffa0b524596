"""The context policy is one object: a sink and re-indexed positions give the same numbers in every cache and pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from by_hand import Read, frames_at, from_scratch
from causalreel import config
from causalreel.codecs.tiny import tiny_codec
from causalreel.data.video import to_bytes
from causalreel.infer.commands import Options
from causalreel.infer.live import ENDLESS, Live, Policy, encode_prompt
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import Schedule
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.nn.masks import Context, Frame, frames_of, reading
from causalreel.nn.policies.interface import ContextPolicy, View, right_before
from causalreel.nn.presets import ModelConfig
from causalreel.nn.static_cache import StaticCache
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.rollout import Call, KeyedNoise, Part, chunked, collect, fuse, rollout
from causalreel.serve.session import Session
from causalreel.text.tiny import TinyTextEncoder
from causalreel.train.losses import surrogate_loss
from causalreel.train.self_rollout import parallel_pass, record_rollout, replay_passes, training_plan
from causalreel.types import Conditioning, LatentSpec
from causalreel.weights.export import Export, Sampling

CONFIG = ModelConfig(dim=48, ffn_dim=80, heads=3, layers=2, text_dim=64, text_length=16, freq_dim=32, channels=16)
SPEC, FRAMES, SIGMAS = LatentSpec(16, 4, 4), 12, (1.0, 0.6)
POLICIES = {1: Context(window=4, sink=1, last_position=6), 2: Context(window=8, sink=2, last_position=5)}
"""By chunk; the second reads its oldest frames at position 0."""


def denoiser(context: ContextPolicy, layers: int = 2) -> DiTDenoiser:
    torch.manual_seed(0)
    net = DiTDenoiser(replace(CONFIG, layers=layers), context=context)
    nn.init.normal_(net.model.head.head.weight, std=0.2)
    return net


def given(batch: int = 2) -> Conditioning:
    return Conditioning(torch.randn(batch, 7, 64, generator=torch.Generator().manual_seed(5)))


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() < 5e-5 * b.abs().max()


@torch.no_grad()
def run(net, cache, chunk: int, *, change=iter, inner: DiTDenoiser | None = None) -> Tensor:
    """A rollout; `change` of its plan."""
    plan, noise = change(chunked([chunk] * (FRAMES // chunk), SIGMAS)), KeyedNoise([1, 2], SPEC)
    return collect(rollout(net, plan, conditioning=net.prepare(given()), noise=noise, cache=cache))


# ---- from scratch


def by_hand(net: DiTDenoiser, chunk: int) -> Tensor:
    """The same video: unrotated keys of all finished frames, read at positions counted here."""
    policy = net.context
    assert isinstance(policy, Context) and policy.window is not None and policy.last_position is not None
    first, recent, sink = policy.last_position + 1 - chunk, policy.window - policy.sink - chunk, policy.sink

    def read(layer: int, start: int) -> Read:
        frames = [f for f in range(start) if f < sink or f >= start - recent]
        positions = [max(0, first - len(frames) + i) for i in range(len(frames))]
        return frames_at(frames, positions, list(range(first, first + chunk)))

    noise = KeyedNoise([1, 2], SPEC)
    return from_scratch(net, given(), noise, chunk=chunk, frames=FRAMES, sigmas=SIGMAS, read=read)


@pytest.mark.parametrize("chunk", POLICIES)
def test_re_indexed_positions_are_those_counted_by_hand_in_every_cache(chunk: int) -> None:
    policy = POLICIES[chunk]
    net, fast = denoiser(policy), accelerate(denoiser(policy).requires_grad_(False))
    expected = by_hand(net, chunk)
    assert isinstance(fast.run, FastDiT)
    for change in (iter, fuse):
        close(run(net, net.new_cache(), chunk, change=change), expected)
        for one in (net, fast):
            cache = fast.run.new_cache(policy, chunk=chunk, frames=None, batch=2, size=(4, 4))
            assert isinstance(cache, StaticCache)
            close(run(one, cache, chunk, change=change), expected)
            close(run(one, one.new_cache(), chunk, change=change), expected)
    coarse = accelerate(denoiser(policy).requires_grad_(False), precision="fp8-attention")
    assert isinstance(coarse.run, FastDiT)
    cache = coarse.run.new_cache(policy, chunk=chunk, frames=None, batch=2, size=(4, 4))
    assert (run(coarse, cache, chunk, change=fuse) - expected).norm() < 0.2 * expected.norm()
    absolute = denoiser(replace(policy, last_position=None))
    assert (run(absolute, absolute.new_cache(), chunk) - expected).norm() > 0.003 * expected.norm()
    guided = Guided(net, Conditioning(torch.zeros(1, 7, 64)), 2.0)
    close(run(guided, net.new_cache(), chunk, change=fuse), run(guided, net.new_cache(), chunk))


@pytest.mark.parametrize("chunk", POLICIES)
def test_training_goes_through_re_indexed_positions(chunk: int) -> None:
    """Teacher forcing in one pass is cached chunk by chunk; the gradient three ways is the same."""
    net, sizes = denoiser(POLICIES[chunk]), [chunk] * (FRAMES // chunk)
    generator = torch.Generator().manual_seed(2)
    clean, x = (torch.randn(2, FRAMES, *SPEC.shape, generator=generator) for _ in range(2))
    sigma = torch.full((2, FRAMES), 0.6)
    with torch.no_grad():
        whole = net.teacher_forced(x, sigma, given(), clean=clean, sizes=sizes)
        cache, parts = net.new_cache(), []
        for start in range(0, FRAMES, chunk):
            here = slice(start, start + chunk)
            parts.append(net(x[:, here], sigma[:, here], given(), sizes=(chunk,), start=start, cache=cache))
            net(clean[:, here], torch.zeros(2, chunk), given(), sizes=(chunk,), start=start, cache=cache)
            cache.commit(chunk)
        close(torch.cat(parts, 1), whole)
        close(net.behind(net.context_of(clean, given(), sizes=sizes), x, sigma, given(), sizes=sizes), whole)

    gradient = torch.randn(2, FRAMES, *SPEC.shape, generator=generator)
    plan, noise = list(training_plan(sizes, SIGMAS, [1, 1])), KeyedNoise([1, 2], SPEC)
    found = []
    record = record_rollout(net, plan, told=given(), noise=noise, cache=net.new_cache(), keep_caches=True)
    close(record.latents, run(net, net.new_cache(), chunk))
    full = collect(rollout(net, plan, conditioning=given(), noise=noise, cache=net.new_cache()))
    for way in (lambda: [full], lambda: [parallel_pass(net, record, given())], None):
        parts = way() if way else (part() for part in replay_passes(net, record, given()))
        start = 0
        for part in parts:
            goal = gradient[:, start : start + part.shape[1]]
            (surrogate_loss(part, goal) * goal.numel() / gradient.numel()).backward()
            start += part.shape[1]
        found.append(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
        net.zero_grad()
    close(found[1], found[0])
    close(found[2], found[0])


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_live_stream_goes_on_for_ever_at_re_indexed_positions(is_fast: bool) -> None:
    """One segment without end, equal to a rollout of the same length."""
    policy, text = POLICIES[1], TinyTextEncoder()
    net = denoiser(policy).requires_grad_(False).eval()
    card = Export("policy", CONFIG, Sampling(chunk=1), policy, 6, 16.0, SPEC)
    pipe = Pipeline(accelerate(net) if is_fast else net, card, card.sampling, tiny_codec(0), text, torch.device("cpu"))
    prompt = encode_prompt(pipe, "a large red square moves right slowly on a dark background")
    with torch.no_grad():
        live = Live(pipe, prompt, seed=3, policy=Policy.of(card, card.sampling, "slide"))
        assert live.policy.kind == "slide" and live.policy.length == ENDLESS
        shown = torch.cat([live.next_chunk().latents for _ in range(20)], 1)
        assert live.segments == 1
        plan = Schedule(20, 0, card.sampling, policy)
        again = collect(pipe.rollout(plan, Conditioning(prompt), KeyedNoise([3], SPEC)))
    assert torch.equal(shown, again)


# ---- a policy of one's own, entered nowhere


@dataclass(frozen=True)
class Pinned(ContextPolicy):
    """The first two frames and the newest three, at positions that never grow: every chunk ends at 6."""

    policy: Literal["pinned"] = "pinned"

    @property
    def is_endless(self) -> bool:
        return True

    def after(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> tuple[Frame, ...]:
        newest = chunk[-1].chunk_end - 3
        return tuple(frame for frame in held + chunk if frame.index < 2 or frame.index >= newest)

    def view(self, held: tuple[Frame, ...], chunk: tuple[Frame, ...]) -> View:
        first = 7 - len(chunk)
        return View(held, right_before(first, held), tuple(range(first, 7)))

    def most_seen(self, chunk: int) -> int:
        return 5 + chunk

    def most_held(self, chunk: int) -> int:
        return 5


def test_a_policy_of_ones_own_works_everywhere() -> None:
    """From scratch, in both caches, plain and fused, in training replay and in a session."""

    def read(layer: int, start: int) -> Read:
        frames = [f for f in range(start) if f < 2 or f >= start - 3]
        return frames_at(frames, [max(0, 6 - len(frames) + i) for i in range(len(frames))], [6])

    net, fast = denoiser(Pinned()), accelerate(denoiser(Pinned()).requires_grad_(False).eval())
    expected = from_scratch(net, given(), KeyedNoise([1, 2], SPEC), chunk=1, frames=FRAMES, sigmas=SIGMAS, read=read)
    assert isinstance(fast.run, FastDiT)
    for change in (iter, fuse):
        for one in (net, fast):
            close(run(one, one.new_cache(), 1, change=change), expected)
            fixed = fast.run.new_cache(Pinned(), chunk=1, frames=None, batch=2, size=(4, 4))
            assert isinstance(fixed, StaticCache)
            close(run(one, fixed, 1, change=change), expected)
    plan, noise = list(training_plan([1] * FRAMES, SIGMAS, [1, 1])), KeyedNoise([1, 2], SPEC)
    record = record_rollout(net, plan, told=given(), noise=noise, cache=net.new_cache(), keep_caches=True)
    close(record.latents, expected)
    close(torch.cat([part().detach() for part in replay_passes(net, record, given())], 1), expected)
    card = Export("pinned", CONFIG, Sampling(chunk=1), Pinned(), 6, 16.0, SPEC)  # type: ignore[arg-type]
    pipe = Pipeline(fast, card, card.sampling, tiny_codec(0), TinyTextEncoder(), torch.device("cpu"))
    words = "a large red square moves right slowly on a dark background"
    session, text = Session(pipe, Options(words, seed=3), policy="slide"), Conditioning(encode_prompt(pipe, words))
    shown = [session.next_chunk() for _ in range(FRAMES)]
    clip = collect(pipe.rollout(Schedule(FRAMES, 0, card.sampling, Pinned()), text, KeyedNoise([3], SPEC)))
    stream = pipe.codec.stream()
    pixels = [to_bytes(stream(clip[:, i : i + 1])[0]) for i in range(FRAMES)]
    assert torch.equal(torch.cat([made.frames for made in shown if made is not None]), torch.cat(pixels))


# ---- the arithmetic


def test_a_policy_says_what_is_read_and_where() -> None:
    """Window 5 with sink 1 and last position 3: cache of 4 behind each frame, the oldest clamped at 0."""
    policy = Context(window=5, sink=1, last_position=3)
    facts = frames_of([1] * 7)
    for frame, seen, positions in (
        (0, (), ()),
        (1, (0,), (2,)),
        (4, (0, 1, 2, 3), (0, 0, 1, 2)),
        (6, (0, 3, 4, 5), (0, 0, 1, 2)),
    ):
        (group,) = reading(facts[frame : frame + 1], facts[: frame + 1], policy).groups
        assert group.keys == (*seen, frame) and group.positions == (*positions, 3)
    backwards = reading(facts[6:], facts[::-1], policy)
    assert backwards.groups[0].keys == tuple(6 - f for f in (0, 3, 4, 5, 6)) and backwards.positions == (3,)
    assert reading(facts[6:], facts, Context(window=5, sink=1)).positions == (6,)
    assert policy.bounded(9) == policy and Context(sink=1).bounded(9) == Context(9, 1)
    assert (policy.span(3), policy.span(None), Context().span(None)) == (3, 5, None)
    with pytest.raises(ValueError, match="last_position must leave room for a chunk of 3 frames, got 1"):
        reading(frames_of([3]), frames_of([3]), Context(last_position=1))
    with pytest.raises(ValueError, match="last_position must be at least 0"):
        Context(last_position=-1)


def test_exports_name_plan_and_policy_and_old_ones_are_read() -> None:
    card = Export("policy", CONFIG, Sampling(chunk=1), POLICIES[1], 6, 16.0, SPEC)
    written = config.dump(card)
    assert "plan: chunked" in written and "last_position: 6" in written
    old = "\n".join(line for line in written.splitlines() if "plan:" not in line and "last_position" not in line)
    assert config.loads(old, Export) == replace(card, context=replace(card.context, last_position=None))


# ---- joint calls


@pytest.mark.parametrize("context", [Context(), Context(window=6, sink=1), Context(6, 1, 7)], ids=str)
@torch.no_grad()
def test_a_joint_call_may_commit_its_leading_frames(context: Context) -> None:
    """A window of three frames at rising noise, the first of which is finished and committed by the same call. With one
    layer, what is committed depends on the frame alone: the last call from scratch reads the inputs of those before."""
    net, inputs = denoiser(context, layers=1), []

    def rolling():
        for start in range(6):
            parts = (Part(start, 1, 0.3, 0.0), Part(start + 1, 1, 0.6, 0.3), Part(start + 2, 1, 1.0, 0.6))
            yield Call(parts, commit=1, joint=True)

    def observe(call: Call, x: Tensor, velocity: Tensor) -> None:
        inputs.append((x, velocity))

    cache, noise = net.new_cache(), KeyedNoise([1, 2], SPEC)
    chunks = list(rollout(net, rolling(), conditioning=given(), noise=noise, cache=cache, observe=observe))
    assert [chunk.start for chunk in chunks] == list(range(6))
    x = torch.cat([*(x[:, :1] for x, _ in inputs[:-1]), inputs[-1][0]], 1)
    sigma = torch.tensor([[0.3] * 6 + [0.6, 1.0]])
    whole = net(x, sigma, given(), sizes=[1] * 5 + [3])
    close(inputs[-1][1], whole[:, -3:])
    if context.window is not None:
        assert [frame.index for frame in cache.frames] == [0, *range(1, 6)]
