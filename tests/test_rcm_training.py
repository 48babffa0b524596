"""Causal-rCM's ways to train: noisy context, exits in turn, continuous levels, and consistency by a derivative.

That its losses and gradients are those of the released code is tested by recorded cases (`test_golden`).
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalreel.flow import add_noise, shift_sigma
from causalreel.nn.attention import attend
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.masks import FrameMask
from causalreel.parallel.fast import accelerate
from causalreel.rollout import KeyedNoise, chunk_sizes, chunked, collect, rollout
from causalreel.train.doctor.files import RunFiles
from causalreel.train.doctor.settings import _of_export
from causalreel.train.kit import noisy_context, per_frame
from causalreel.train.losses import NoisyContext, consistency_loss, tangent_loss
from causalreel.train.recipe import resolve
from causalreel.train.self_rollout import parallel_pass, record_rollout, training_plan
from causalreel.train.stage import DataCursor, StepContext
from causalreel.train.stages.ar_diffusion import ARDiffusionConfig
from causalreel.train.stages.causal_cd import CausalCD, CausalCDConfig
from causalreel.train.stages.causal_scm import CausalSCMConfig
from causalreel.train.stages.dmd import DMD, DMDConfig
from causalreel.weights.export import Sampling
from test_laws import FOUR, SPEC, TWO, close, latents, make, told
from test_stages import NULL, SELF_ROLLOUT, STAGES, VIEWER, make_dmd, net, source

# ---- noisy context


def test_context_is_what_the_last_call_read_or_what_is_noised_to_its_level() -> None:
    def plan(exits: list[int], noisy_from: int):
        return list(training_plan([2, 2, 2], TWO, exits, first=FOUR, noisy_from=noisy_from))

    calls = [(call.parts[0].sigma, call.commit, call.grad) for call in plan([3, 1], 0)]
    assert calls == [
        *((sigma, 0, False) for sigma in FOUR[:3]),
        (FOUR[3], 2, True),
        *((TWO[0], 0, False), (TWO[1], 2, True)) * 2,
    ]
    calls = [(call.parts[0].sigma, call.commit, call.grad) for call in plan([1, 0], 1)]
    clean, noised = (0.0, 2, False), (TWO[1], 2, False)
    assert calls == [(1.0, 0, False), (FOUR[1], 0, True), clean, (1.0, 0, True), noised, (1.0, 0, True)]
    student = make()
    how = {"told": told(), "noise": KeyedNoise([1, 2], SPEC)}
    record = record_rollout(student, iter(plan([3, 1], 0)), cache=student.new_cache(), **how)
    assert record.committed_at == [FOUR[3]] * 2 + [TWO[1]] * 4
    assert torch.equal(record.committed[0], record.exits[0].x)
    record = record_rollout(student, iter(plan([1, 0], 1)), cache=student.new_cache(), **how)
    assert record.committed_at == [0.0] * 2 + [TWO[1]] * 2
    assert torch.equal(record.committed[0], record.latents[:, :2])
    fresh = KeyedNoise([1, 2], SPEC).renoise(2, 2, 1)
    close(record.committed[1], add_noise(record.latents[:, 2:4], fresh, torch.full((1, 1), TWO[1])))


def test_a_rollout_of_one_chunk_can_be_made_again() -> None:
    student = make()
    plan = training_plan([3], TWO, [1])
    how = {"told": told(), "noise": KeyedNoise([1, 2], SPEC), "cache": student.new_cache()}
    record = record_rollout(student, plan, **how)
    close(parallel_pass(student, record, told()).detach(), record.latents)


def test_rollouts_through_the_fast_form_have_the_same_noisy_context(tmp_path: Path) -> None:
    made = []
    for is_fast in (False, True):
        stage, rows = make_dmd(dataclasses.replace(SELF_ROLLOUT, exits="in_turn", noisy_from=0))
        assert isinstance(stage, DMD)
        if is_fast:
            stage.sampler = accelerate(copy.deepcopy(stage.student).requires_grad_(False))
        context = StepContext(1, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
        made.append([update.losses[0]()[0].item() for update in stage.updates(context)])
    assert made[0] == pytest.approx(made[1], rel=1e-4)


def test_what_a_stage_shows_has_the_context_that_it_trains_for() -> None:
    student, rows = net(), source()
    torch.nn.init.normal_(student.model.head.head.weight, std=0.3)
    context = StepContext(0, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
    shown = [dataclasses.replace(VIEWER, noisy_from=number).show(student, context) for number in (None, 0)]
    assert not torch.equal(*shown)
    told_of, spec = rows.conditioning[: VIEWER.clips], rows.latents.shape[2:]
    noise = KeyedNoise(range(VIEWER.clips), dataclasses.replace(SPEC, channels=spec[0], height=spec[1], width=spec[2]))
    plan = chunked(chunk_sizes(rows.latents.shape[1], VIEWER.chunk), VIEWER.sigmas, first=VIEWER.first, noisy_from=0)
    with torch.no_grad():
        made = collect(rollout(student, plan, conditioning=told_of, noise=noise, cache=student.new_cache()))
    close(shown[1], VIEWER.codec.decode(made))


# ---- exits


def test_exits_come_in_turn_and_are_the_same_for_all_as_far_as_they_go() -> None:
    config = dataclasses.replace(
        SELF_ROLLOUT, steps=(1000, 250), first_steps=(1000, 750, 500, 250), exits="in_turn", critic_updates=1
    )
    stage, rows = make_dmd(config)
    assert isinstance(stage, DMD)
    found = []
    for number in range(5):
        context = StepContext(number, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
        found.append([stage._exits(context, purpose) for purpose in ("critic 0", "student")])
    assert found == [[pair, pair] for pair in ([0, 0], [1, 1], [2, 1], [3, 1], [0, 0])]
    stage.config = dataclasses.replace(config, steps=(1000, 750, 500, 250), first_steps=None)
    assert stage._exits(StepContext(6, 0, rows, DataCursor(8, 0), torch.device("cpu")), "student") == [2]


# ---- consistency


def consistency(levels: str = "continuous", **more: object) -> CausalCD:
    config = CausalCDConfig(batch=8, chunk=2, grid=6, levels=levels, **more)  # pyright: ignore[reportArgumentType]
    return CausalCD(config, student=net(), teacher=net(2, trained=False), null=NULL, viewer=VIEWER)


def test_continuous_levels_are_a_step_of_the_grid_apart() -> None:
    stage, rows = consistency(levels_shift=3.0), source()
    drawn = []
    for number in range(40):
        context = StepContext(number, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
        drawn.append(torch.stack(stage._levels(context, 8)))
    high, low = torch.cat(drawn, dim=1)[..., 0]
    even = [sigma / (3 - 2 * sigma) for sigma in (high, low)]  # before a shift of 3
    torch.testing.assert_close(even[0] - even[1], torch.full_like(high, 1 / 6), rtol=0, atol=1e-5)
    assert low.min() >= 0 and low.min() < 0.05 and high.max() <= 1 and high.max() > 0.97
    assert len(high.unique()) > 300


def test_a_student_that_agrees_with_itself_does_not_look_at_the_target() -> None:
    rows, losses = source(), {}
    for who in ("student", "target"):
        stage = consistency(agrees_with=who)
        for is_other in (False, True):
            if is_other:
                for weight in stage.target.parameters():
                    weight.add_(0.3)
            context = StepContext(0, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
            with torch.no_grad():
                losses[who, is_other] = next(iter(stage.updates(context))).losses[0]()[0].item()
    assert losses["student", False] == losses["student", True] == losses["target", False] != losses["target", True]


class Watched:
    def __init__(self, net: DiTDenoiser) -> None:
        self.net, self.read = net, list[tuple[Tensor, Tensor | None]]()

    def teacher_forced(self, *call: Tensor, clean: Tensor, clean_sigma: Tensor | None = None, **more: object):
        self.read.append((clean, clean_sigma))
        return self.net.teacher_forced(*call, clean=clean, clean_sigma=clean_sigma, **more)  # pyright: ignore

    def derivative(self, *call: Tensor, **more: object):
        return self.net.derivative(*call, **more)  # pyright: ignore


def test_noisy_contexts_are_the_students_and_not_the_teachers() -> None:
    student, teacher, sizes = make(), make(seed=3), [2, 2, 2]
    clean, levels = latents(6), {"sigma": torch.full((2, 1), 0.7), "sigma_next": torch.full((2, 1), 0.5)}
    sigma = per_frame(torch.tensor([[0.0, 0.6, 0.6]]).expand(2, -1), sizes)
    contexts = tuple(NoisyContext(sigma, latents(6, seed=seed)) for seed in (8, 9))
    how = {"noise": latents(6, seed=2), "sizes": sizes, **levels}

    mine, theirs, guide = Watched(student), Watched(student), Watched(teacher)
    consistency_loss(mine, theirs, guide, clean, told(), noisy=contexts, **how)  # pyright: ignore
    assert torch.equal(guide.read[0][0], clean) and guide.read[0][1] is None
    for watched, context in ((mine, contexts[0]), (theirs, contexts[1])):
        ((read, at),) = watched.read
        assert at is context.sigma and torch.equal(read[:, :2], clean[:, :2])
        close(read[:, 2:], 0.4 * clean[:, 2:] + 0.6 * context.noise[:, 2:])


def test_the_tangent_losses_teacher_reads_clean_context() -> None:
    clean, noise, sizes = latents(6), latents(6, seed=2), [2, 2, 2]
    context = NoisyContext(torch.full((2, 6), 0.6), latents(6, seed=8))
    mine, guide = Watched(make()), Watched(make(seed=3))
    how = {"sigma": torch.full((2, 1), 0.7), "noise": noise, "sizes": sizes, "noisy": context}
    tangent_loss(mine, guide, clean, told(), **how)  # pyright: ignore
    assert torch.equal(guide.read[0][0], clean) and guide.read[0][1] is None
    ((read, at),) = mine.read
    assert at is context.sigma and not torch.equal(read, clean)


def test_context_is_noisy_from_the_chunk_that_is_named() -> None:
    rows = source()
    context = StepContext(0, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
    for noisy_from, levels in ((0, [0.5] * 4), (1, [0.0, 0.0, 0.5, 0.5]), (2, [0.0] * 4)):
        made = noisy_context(context, "context", rows.latents[:3], [2, 2], 0.5, noisy_from)
        assert made.sigma.tolist() == [levels] * 3 and made.noise.std() > 0.8


# ---- a derivative


@pytest.mark.parametrize("clean_sigma", [None, 0.4])
def test_the_derivative_is_that_of_small_differences(clean_sigma: float | None) -> None:
    net, clean, along = make(), latents(6, seed=5), latents(6, seed=3)
    x, sigma = latents(6), torch.full((2, 6), 0.4, dtype=torch.float64)
    context = None if clean_sigma is None else torch.full((2, 6), clean_sigma)
    how = {"clean": clean, "sizes": [2, 2, 2], "clean_sigma": context}
    found = net.derivative(x, sigma, told(), along=along, **how)

    @torch.no_grad()
    def velocity(step: float) -> Tensor:
        return net.teacher_forced(x + step * along, sigma + step, told(), **how)

    step = 3e-5
    close(found, (velocity(step) - velocity(-step)) / (2 * step), 0.02)  # float32 leaves no more of a difference
    assert not found.requires_grad and all(p.grad is None for p in net.parameters())


def test_attention_frame_by_frame_is_attention() -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, frames * 3, 2, 8, generator=generator) for frames in (4, 5, 5))
    allowed = tuple(tuple(key <= query + 1 for key in range(5)) for query in range(4))
    for mask in (None, FrameMask(allowed)):
        close(attend(q, k, v, mask, 3, backend="by frame"), attend(q, k, v, mask, 3, backend="sdpa"), 1e-5)


def test_the_tangent_loss_pulls_by_a_change_of_length_below_one() -> None:
    student, teacher, clean, noise = make(), make(seed=3), latents(6), latents(6, seed=2)
    sigma, how = torch.tensor([[0.3], [0.8]]), {"noise": noise, "sizes": [2, 2, 2]}

    def pulled(warm: float) -> Tensor:
        loss, metrics = tangent_loss(student, teacher, clean, told(), sigma=sigma, warm=warm, **how)
        loss.backward()
        found = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        student.zero_grad()
        assert 0.5 < loss.item() < 1 and metrics["tangent"] > 1
        return found

    def expected(warm: float) -> Tensor:
        x = add_noise(clean, noise, sigma)
        with torch.no_grad():
            goal = teacher.teacher_forced(x, sigma, told(), clean=clean, sizes=[2, 2, 2])
        turn = student.derivative(x, sigma, told(), along=goal, clean=clean, sizes=[2, 2, 2])
        velocity = student.teacher_forced(x, sigma, told(), clean=clean, sizes=[2, 2, 2])
        change = goal - velocity.detach() - warm * sigma[..., None, None, None] * turn
        length = change.flatten(1).norm(dim=1)[:, None, None, None, None]
        (-2 * (velocity * change / (length + 0.1)).sum() / len(clean)).backward()
        found = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
        student.zero_grad()
        return found

    for warm in (0.0, 0.25, 1.0):
        close(pulled(warm), expected(warm), 1e-4)
    assert (pulled(0.0) - pulled(1.0)).norm() > 0.1 * pulled(1.0).norm()


# ---- settings


def test_one_level_a_clip() -> None:
    stage, rows = STAGES["teacher forcing"]()
    levels: list[Tensor] = []

    class Watched(DiTDenoiser):
        def teacher_forced(self, x: Tensor, sigma: Tensor, *call: object, **more: object) -> Tensor:
            levels.append(sigma)
            return super().teacher_forced(x, sigma, *call, **more)  # pyright: ignore[reportArgumentType]

    stage.student.__class__ = Watched  # pyright: ignore[reportAttributeAccessIssue]
    for which in ("chunk", "clip"):
        stage.config = dataclasses.replace(stage.config, levels=which)  # pyright: ignore[reportAttributeAccessIssue]
        context = StepContext(0, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
        next(iter(stage.updates(context))).losses[0]()
    by_chunk, by_clip = levels
    assert (by_chunk[:, 0] != by_chunk[:, -1]).all() and (by_clip == by_clip[:, :1]).all()
    assert len(by_clip[:, 0].unique()) == len(by_clip)


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: DMDConfig(noisy_from=-1), "noisy_from must be null or at least 0"),
        (lambda: DMDConfig(noisy_from=0, samples="data"), "with samples: self_rollout"),
        (lambda: DMDConfig(noisy_from=0, rolling=0.5, student_pass="replay"), "without rolling"),
        (lambda: DMDConfig(noisy_from=0, steps=(1000,)), "noisy_from needs two steps or more"),
        (lambda: CausalCDConfig(noisy_from=-1), "noisy_from must be null or at least 0"),
        (lambda: CausalCDConfig(noisy_from=0, context_sigma=1.0), "context_sigma within 0 and 1; got 0, 1.0"),
        (lambda: CausalCDConfig(levels="continuous", include_last=True), "include_last is for levels: grid"),
        (lambda: CausalCDConfig(levels_shift=0.5), "levels_shift must be null or at least 1, got 0.5"),
        (lambda: CausalSCMConfig(noisy_from=0, context_sigma=0.0), "context_sigma within 0 and 1; got 0, 0.0"),
        (lambda: CausalSCMConfig(warm_up=0), "warm_up must be at least 1, got 0"),
    ],
)
def test_what_does_not_go_together_is_refused(make_config, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config()


def test_the_doctor_knows_what_context_a_run_was_trained_for() -> None:
    def found(changes: list[str], noisy_from: int | None, recipe: str = "tiny/dmd") -> list[str]:
        sampling = Sampling(chunk=1, steps=(1000, 500), first_steps=(1000, 750, 500, 250), noisy_from=noisy_from)
        run = RunFiles(Path(), [], resolve(recipe, changes), "tiny", [], sampling)
        return [one.check for one in _of_export(run) if "context" in one.check or "noisy" in one.check]

    assert found(["settings.noisy_from=1"], 1) == [] == found([], None)
    assert found([], 1) == ["context noise"]
    assert found(["settings.noisy_from=1"], 0) == found(["settings.noisy_from=1"], None) == ["noisy from"]


def test_recipes_have_the_published_numbers() -> None:
    ar, cd, scm, dmd = (resolve(f"wan/rcm_{name}") for name in ("ar", "cd", "scm", "dmd"))
    assert isinstance(ar.settings, ARDiffusionConfig) and ar.settings.levels == "clip" and ar.settings.batch == 256
    assert (cd.settings.levels, cd.settings.drawn_shift, cd.settings.shift) == ("continuous", 3.0, 5.0)
    assert scm.stage == "causal_scm" and scm.settings.warm_up == 1000
    assert (dmd.settings.noisy_from, dmd.settings.guidance) == (1, 5.0)
    assert dmd.settings.sigmas == pytest.approx((1.0, 0.625))
    assert dmd.settings.first_sigmas == pytest.approx((1.0, 15 / 16, 5 / 6, 5 / 8))
    assert [r.trainer.optimisers["student"].lr for r in (ar, cd, scm, dmd)] == [1e-5, 2e-6, 2e-6, 2e-6]
    assert shift_sigma(torch.tensor(0.25), 5.0).item() == pytest.approx(cd.settings.context_sigma)
