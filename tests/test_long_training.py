"""Training for length: rollouts longer than what is scored, rolling ones, and policies in both."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from causalreel.codecs.wan_vae import CausalVAE
from causalreel.nn.policies.infinity_rope import InfinityRope
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.memrope import MemRope
from causalreel.nn.policies.rolling_forcing import RollingForcing
from causalreel.nn.policies.window import Context
from causalreel.rollout import KeyedNoise, chunk_sizes, collect, fuse, rolling, rollout
from causalreel.train.losses import surrogate_loss
from causalreel.train.operations import Clip, step_work
from causalreel.train.self_rollout import (
    as_clip,
    parallel_pass,
    record_rollout,
    replay_passes,
    rolling_training_plan,
    training_plan,
)
from causalreel.train.stage import DataCursor, StepContext
from causalreel.train.stages.dmd import DMD, DMDConfig
from test_laws import FOUR, SPEC, TWO, close, latents, make, told
from test_stages import NULL, ROLLING, SELF_ROLLOUT, VIEWER, make_dmd, net, source
from test_weights import SMALL_CODEC

NOISE = KeyedNoise([1, 2], SPEC)


def gradients(model) -> Tensor:
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return found


SEEN = [Context(), Context(4, 1), Context(4, 1, 5), InfinityRope(cache_chunks=3, last_position=5)]


@pytest.mark.parametrize("context", SEEN, ids=str)
def test_only_the_end_is_made_again(context: ContextPolicy) -> None:
    """In one pass and replayed: the frames behind `first`, with the gradient of a loss on these alone."""
    model, sizes, first = make(context), chunk_sizes(8, 2), 4
    goal = torch.cat([torch.zeros(2, first, *SPEC.shape), latents(4, seed=7)], 1)

    def plan():
        return training_plan(sizes, TWO, [1, 0])

    whole = record_rollout(model, plan(), told=told(), noise=NOISE, cache=model.new_cache())
    surrogate_loss(parallel_pass(model, whole, told()), goal).backward()
    reference = 2 * gradients(model)  # a mean over twice as many frames
    end = record_rollout(model, fuse(plan()), told=told(), noise=NOISE, cache=model.new_cache(), first=first)
    close(end.latents, whole.latents)
    again = parallel_pass(model, end, told())
    close(again.detach(), whole.latents[:, first:])
    surrogate_loss(again, goal[:, first:]).backward()
    close(gradients(model), reference)
    kept = {"noise": NOISE, "cache": model.new_cache(), "keep_caches": True, "first": first}
    pieces = replay_passes(model, record_rollout(model, plan(), told=told(), **kept), told())
    assert [(piece.start, piece.frames) for piece in pieces] == [(4, 2), (6, 2)]
    for piece in pieces:
        made = piece()
        close(made.detach(), whole.latents[:, piece.start : piece.start + 2])
        (surrogate_loss(made, goal[:, piece.start : piece.start + 2]) / 2).backward()
    close(gradients(model), reference)


@pytest.mark.parametrize("context", [Context(), RollingForcing(window=10, sink=2, cache=8), Context(10, 2, 9)], ids=str)
@torch.no_grad()
def test_a_rolling_training_rollout_is_inference(context: ContextPolicy) -> None:
    """Windows of a turn are made again as they were; in its last window a chunk is what inference makes."""
    model, sizes = make(context), chunk_sizes(12, 2)
    plan = rolling(sizes, FOUR)
    made = collect(rollout(model, plan, conditioning=told(), noise=NOISE, cache=model.new_cache()))
    final = torch.zeros(12, dtype=torch.bool)
    for turn in range(4):
        kept = {"noise": NOISE, "cache": model.new_cache(), "keep_caches": True, "first": 4}
        record = record_rollout(model, rolling_training_plan(sizes, FOUR, turn), told=told(), **kept)
        assert record.latents.shape == made.shape and record.sizes == sizes
        pieces = replay_passes(model, record, told())
        covered = [f for piece in pieces for f in range(piece.start, piece.start + piece.frames)]
        assert covered == list(range(4, 12))  # every frame in one window
        for piece in pieces:
            close(piece(), record.latents[:, piece.start : piece.start + piece.frames])
        for chunk in range(6):
            here = slice(2 * chunk, 2 * chunk + 2)
            if (chunk + 3) % 4 == turn:  # the window in which it is at the last level
                close(record.latents[:, here], made[:, here])
                final[here] = True
            else:
                assert (record.latents[:, here] - made[:, here]).abs().max() > 1e-3
    assert final.all()
    with pytest.raises(ValueError, match="replay it"):
        parallel_pass(model, record, told())


def test_gradient_of_a_rolling_rollout_is_the_full_graphs() -> None:
    model, sizes, goal = make(RollingForcing(window=8, sink=2, cache=8)), chunk_sizes(8, 2), latents(8, seed=7)
    plan = lambda: rolling_training_plan(sizes, TWO, 1)  # noqa: E731
    found: dict[int, Tensor] = {}

    def observe(call, x, velocity) -> None:
        if call.grad:
            sigma = torch.tensor([part.sigma for part in call.parts for _ in range(part.frames)])
            x0 = x - sigma[None, :, None, None, None] * velocity
            found.update(zip(range(call.start, call.start + call.frames), x0.split(1, 1), strict=True))

    how = {"conditioning": told(), "noise": NOISE, "cache": model.new_cache(), "observe": observe}
    # Between windows states are constants, as the released code detaches them.
    for _ in rollout(_detached(model), plan(), **how):
        pass
    surrogate_loss(torch.cat([found[f] for f in range(8)], 1), goal).backward()
    reference = gradients(model)
    record = record_rollout(model, plan(), told=told(), noise=NOISE, cache=model.new_cache(), keep_caches=True)
    for piece in replay_passes(model, record, told()):
        part = goal[:, piece.start : piece.start + piece.frames]
        (surrogate_loss(piece(), part) * piece.frames / 8).backward()
    close(gradients(model), reference)


def _detached(model):
    return lambda x, sigma, conditioning, **call: model(x.detach(), sigma, conditioning, **call)


def test_the_end_of_a_rollout_is_a_clip_that_begins_with_a_picture() -> None:
    torch.manual_seed(0)
    codec = CausalVAE(SMALL_CODEC).requires_grad_(False)
    made = torch.randn(2, 9, 16, 4, 4)
    clip = as_clip(codec, made, 4)
    assert clip.shape == (2, 5, 16, 4, 4) and torch.equal(clip[:, 1:], made[:, 5:])
    picture = codec.decode(made[:, :5])[:, -1:]  # the last picture of all before the second frame of the clip
    torch.testing.assert_close(clip[:, :1], codec.encode(picture), atol=1e-4, rtol=1e-4)
    assert as_clip(codec, made, 0) is made


def context_of(stage, rows, step: int = 0) -> StepContext:
    return StepContext(step, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))


def test_lengths_are_drawn_and_the_first_chunk_is_not_counted() -> None:
    config = dataclasses.replace(SELF_ROLLOUT, chunk=2, longest=10, first_steps=None)
    stage, rows = make_dmd(config)
    assert isinstance(stage, DMD)
    seen = set()
    for step in range(40):
        context = context_of(stage, rows, step)
        made = stage._make(context, context.batch(3, type(rows.batch(torch.tensor([0])))), "student")
        assert made.latents.shape[1] == 4
        pieces = [(piece.start, piece.frames) for piece in made.again()]
        seen.add(tuple(pieces))
    assert seen == {
        ((0, 4),),
        ((2, 2),),
    }  # a clip of the data's length whole, the end of a longer one without its first
    longer = {stage._length(context_of(stage, rows, step), rows.batch(torch.arange(3)), "x") for step in range(60)}
    assert longer == {4, 6, 8, 10}


def test_rolling_and_plain_rollouts_are_mixed() -> None:
    stage, rows = make_dmd(dataclasses.replace(ROLLING, steps=(1000, 750, 500, 250)))
    assert isinstance(stage, DMD)
    joint = [any(c.joint for c in stage._plan(context_of(stage, rows, step), [1] * 6, "x")) for step in range(40)]
    assert 8 < sum(joint) < 32


@pytest.mark.parametrize(
    ("policy", "change"),
    [
        (MemRope(sink=1, local=2), {}),
        (RollingForcing(window=8, sink=1, cache=8), {"rolling": 1.0}),
        (Context(3, 1, 3), {}),
    ],
    ids=str,
)
def test_every_kind_of_policy_trains_for_length(policy: ContextPolicy, change: dict) -> None:
    config = dataclasses.replace(SELF_ROLLOUT, longest=8, student_pass="replay", critic_updates=1, **change)
    student = net()
    student.context = policy
    stage = DMD(config, student=student, critic=net(1), teacher=net(2, trained=False), null=NULL, viewer=VIEWER)
    assert stage.roles["average"].context == policy
    rows = source()
    for update in stage.updates(context_of(stage, rows)):
        for loss in update.losses:
            loss()[0].backward()
    assert all(p.grad is not None for p in student.model.blocks[0].self_attn.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rolling": 1.5}, "rolling must be from 0 to 1, got 1.5"),
        ({"rolling": 0.5}, "rolling needs student_pass: replay"),
        ({"longest": 7, "chunk": 2}, "longest must be a multiple of the chunk's 2 frames, got 7"),
        ({"longest": 6, "samples": "data"}, "for samples: self_rollout, got data"),
    ],
)
def test_settings_that_cannot_be_are_one_line(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DMDConfig(**changes)


def test_policies_that_one_pass_cannot_train_are_named() -> None:
    student = net()
    student.context = MemRope(sink=1, local=2)
    roles = {"critic": net(1), "teacher": net(2, trained=False), "null": NULL, "viewer": VIEWER}
    with pytest.raises(ValueError, match="student_pass must be replay with the policy memrope"):
        DMD(SELF_ROLLOUT, student=student, **roles)
    with pytest.raises(ValueError, match="rolling has no rule for the policy memrope"):
        DMD(ROLLING, student=student, **roles)
    stage, rows = make_dmd(dataclasses.replace(SELF_ROLLOUT, longest=2))
    with pytest.raises(ValueError, match="at least the 4 frames of the data's clips, got 2"):
        stage._length(context_of(stage, rows), rows.batch(torch.arange(3)), "x")  # type: ignore[attr-defined]


def test_a_plan_counts_what_is_longer() -> None:
    """Operations of rollouts beyond a clip."""
    model, clip = make().config, Clip(12, SPEC)
    plain = DMDConfig(batch=4, chunk=3)

    def flop(**changes) -> float:
        roles = dict.fromkeys(("student", "critic", "teacher"), model)
        work = step_work(dataclasses.replace(plain, **changes), roles, clip)
        assert work is not None
        return work.flop

    assert flop() == flop(longest=12) < flop(longest=24) < flop(longest=36)
    assert flop(longest=24) < flop(longest=24, rolling=0.5, student_pass="replay")  # which denoise at every level
