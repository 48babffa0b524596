"""The metrics are perfect on real clips, forgive codec softness, and drop for every kind of fault."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from causalreel.data.world import WorldConfig, WorldState, captions, render, simulate, specs
from causalreel.eval.metrics import MetricConfig, Scores, measure
from causalreel.eval.statistics import compare, estimate, features, frechet, summarise
from causalreel.vocabulary import COLOR_RGB

COUNT = 24


@pytest.fixture(scope="module")
def state() -> WorldState:
    return simulate(COUNT, seed=11, held_out=True)


@pytest.fixture(scope="module")
def video(state: WorldState) -> Tensor:
    return render(state)


@pytest.fixture(scope="module")
def real(state: WorldState, video: Tensor) -> Scores:
    return measure(video, captions(state))


def blurred(video: Tensor, sigma: float) -> Tensor:
    taps = torch.exp(-(torch.arange(-6, 7) ** 2) / (2 * sigma * sigma))
    taps = taps / taps.sum()
    flat = F.pad(video.flatten(0, 2)[:, None], (6,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(flat, taps[None, None, :, None]), taps[None, None, None]).view(video.shape)


def mean(values: Tensor) -> float:
    return values.nanmean().item()


# -------------------------------------------------------------------------------------------------------- real clips


def test_real_clips_are_perfect(real: Scores, state: WorldState) -> None:
    for name in ("follow", "first", "present", "direction", "consistency"):
        assert mean(getattr(real, name)) >= 0.995, name
    assert mean(real.quality) > 0.98 and mean(real.fidelity) > 45
    assert mean(real.speed) < 0.03
    assert mean(real.follow_drift) == 0 and abs(mean(real.quality_drift)) < 0.01
    shown = state.present[:, None].expand_as(state.turned)
    assert mean(real.dynamic) == pytest.approx(state.velocity.norm(dim=-1)[shown].mean().item(), rel=0.1)


@given(seed=st.integers(0, 2**40))
@settings(max_examples=4, deadline=None)
def test_any_real_clip_follows_its_caption(seed: int) -> None:
    state = simulate(12, seed=seed)
    scores = measure(render(state), captions(state))
    assert scores.follow.min() >= 0.9 and mean(scores.follow) > 0.99 and mean(scores.direction) == 1


def test_codec_softness_is_forgiven_but_seen(real: Scores, video: Tensor, state: WorldState) -> None:
    generator = torch.Generator().manual_seed(0)
    soft = blurred(video, 0.6) + 0.06 * torch.randn(video.shape, generator=generator)  # 0.03 of the full range
    scores = measure(soft, captions(state))
    assert mean(scores.follow) >= 0.95 and mean(scores.direction) >= 0.97 and mean(scores.consistency) >= 0.95
    assert mean(scores.quality) < mean(real.quality) - 0.02
    assert mean(scores.fidelity) < 35 < mean(real.fidelity)


def test_quality_falls_steadily_with_blur(video: Tensor, state: WorldState) -> None:
    texts = captions(state)[:12]
    quality = [mean(measure(blurred(video[:12], s), texts).quality) for s in (0.4, 0.8, 1.2, 1.8)]
    assert all(a - b > 0.02 for a, b in itertools.pairwise(quality))


def test_open_captions_accept_any_value(video: Tensor, state: WorldState) -> None:
    bare = [
        dataclasses.replace(
            c,
            background=None,
            objects=tuple(dataclasses.replace(o, size=None, direction=None, speed=None) for o in c.objects),
        )
        for c in specs(state)
    ]
    scores = measure(video, bare)
    assert mean(scores.follow) >= 0.995
    assert scores.direction.isnan().all() and scores.speed.isnan().all()


def test_results_do_not_depend_on_batching(real: Scores, video: Tensor, state: WorldState) -> None:
    parts = [measure(video[rows], captions(state[rows]), chunk=17) for rows in (slice(0, 7), slice(7, COUNT))]
    joined = Scores.cat(parts)
    for field in dataclasses.fields(Scores):
        torch.testing.assert_close(
            getattr(joined, field.name), getattr(real, field.name), equal_nan=True, msg=field.name
        )


# ------------------------------------------------------------------------------------------------------------ faults


@pytest.mark.parametrize(("name", "classes"), [("shape", 3), ("scale", 2), ("color", 6), ("background", 3)])
def test_a_wrong_attribute_fails(state: WorldState, name: str, classes: int) -> None:
    wrong = dataclasses.replace(state, **{name: (getattr(state, name) + 1) % classes})[:16]
    assert mean(measure(render(wrong), captions(state[:16])).follow) < 0.02


def test_one_wrong_object_of_two_is_enough(state: WorldState) -> None:
    two = state[state.present[:, 1]][:10]
    shape = two.shape.clone()
    shape[:, 1] = (shape[:, 1] + 1) % 3
    assert mean(measure(render(dataclasses.replace(two, shape=shape)), captions(two)).follow) < 0.02


def test_missing_and_extra_objects_fail(state: WorldState) -> None:
    two = state[state.present[:, 1]][:10]
    one = dataclasses.replace(two, present=torch.tensor([True, False]).expand(len(two), 2))
    missing = measure(render(one), captions(two))
    assert mean(missing.follow) == 0 and mean(missing.present) == pytest.approx(0.5, abs=0.02)
    extra = measure(render(two), captions(one))
    assert mean(extra.follow) < 0.02 and mean(extra.present) == 1


def test_a_second_copy_in_the_same_colour_is_extra(state: WorldState) -> None:
    two = state[state.present[:, 1]][:10]
    twins = dataclasses.replace(two, color=two.color[:, :1].expand(-1, 2))
    one = dataclasses.replace(two, present=torch.tensor([True, False]).expand(len(two), 2))
    assert mean(measure(render(twins), captions(one)).follow) < 0.02


def test_a_patch_of_foreign_colour_is_extra(video: Tensor, state: WorldState) -> None:
    dark = state.background == 0
    patched = video[dark].clone()
    patched[..., :7, :7] = torch.tensor([1.0, 1.0, 1.0])[:, None, None]
    assert mean(measure(patched, captions(state[dark])).follow) < 0.02


def test_deformed_objects_fail(video: Tensor, state: WorldState) -> None:
    """Stretched to 1.5 times the width, halved in contrast, or with a bite taken out."""
    texts = captions(state)[:12]
    clips = video[:12]
    wide = F.interpolate(clips.flatten(0, 1), size=(64, 96), mode="bilinear").unflatten(0, clips.shape[:2])[..., 16:80]
    faint = clips.lerp(clips[..., :1, :1].expand_as(clips), 0.5)
    assert mean(measure(wide, texts).follow) < 0.1
    assert mean(measure(faint, texts).follow) < 0.3
    scores = measure(blurred(clips, 3.5), texts)
    assert mean(scores.follow) < 0.4 and mean(scores.quality) < 0.7


def test_a_square_melted_into_a_disc_fails() -> None:
    state = simulate(200, seed=1, config=WorldConfig(max_objects=1))
    squares = state[(state.shape[:, 0] == 1) & (state.scale[:, 0] == 0)][:8]
    clips = render(squares)
    back = clips[:, :1, :, :1, :1]
    color = (torch.tensor(COLOR_RGB).float() / 127.5 - 1)[squares.color[:, 0]][:, None, :, None, None]
    share = ((clips - back) / (color - back)).mean(2, keepdim=True)  # how much of a pixel the object covers
    melted = ((blurred(share, 3.0) - 0.42) * 5 + 0.5).clamp(0, 1)  # blur, then sharpen: corners are gone
    assert mean(measure(clips, captions(squares)).follow) > 0.99
    assert mean(measure(back + melted * (color - back), captions(squares)).follow) < 0.3


def test_wrong_way_and_wrong_pace(real: Scores, video: Tensor, state: WorldState) -> None:
    texts = captions(state)
    assert mean(measure(video.flip(-1).flip(-2), texts).direction) == 0
    assert mean(measure(video.transpose(-1, -2), texts).direction) == 0
    slow = measure(video[:, torch.arange(45) // 2], texts)
    assert mean(slow.speed) == pytest.approx(0.5, abs=0.1)
    assert mean(slow.dynamic) == pytest.approx(mean(real.dynamic) / 2, rel=0.15)
    still = measure(video[:, :1].expand_as(video), texts)
    assert mean(still.direction) == 0 and mean(still.dynamic) < 1e-3 and mean(still.speed) == pytest.approx(1, abs=1e-3)
    assert mean(still.follow) == 1 and mean(still.consistency) == 1


def test_jumping_and_morphing_objects_are_inconsistent(video: Tensor, state: WorldState) -> None:
    quick = (state.speed[:, 0] == 1) & ~state.present[:, 1]
    order = torch.randperm(45, generator=torch.Generator().manual_seed(0))
    assert mean(measure(video[quick][:, order], captions(state[quick])).consistency) < 0.5
    one = state[~state.present[:, 1]]
    other = render(dataclasses.replace(one, shape=(one.shape + 1) % 3))
    morphing = torch.where((torch.arange(45) // 4 % 2 == 0)[:, None, None, None], render(one), other)
    scores = measure(morphing, captions(one))
    assert mean(scores.consistency) < 0.05 and mean(scores.present) == 1


def test_drift_sees_a_bad_ending(video: Tensor, state: WorldState) -> None:
    worse = video.clone()
    worse[:, 30:] = blurred(video[:, 30:], 3.0)
    scores = measure(worse, captions(state))
    assert mean(scores.follow_drift) > 0.5 and mean(scores.quality_drift) > 0.2


def test_turns_are_counted() -> None:
    rates = []
    for probability in (0.0, 0.03, 0.1):
        state = simulate(40, seed=4, config=WorldConfig(turn_probability=probability, max_objects=1))
        rates.append(mean(measure(render(state), captions(state)).turn))
    assert rates[0] < 0.01 and 0.03 < rates[1] < 0.2 and rates[2] > rates[1] + 0.1


def test_garbage_is_scored_without_nan(state: WorldState) -> None:
    texts = captions(state)[:3]
    garbage = torch.stack(
        [torch.full((45, 3, 64, 64), float("nan")), torch.rand(45, 3, 64, 64), torch.zeros(45, 3, 64, 64)]
    )
    scores = measure(garbage, texts)
    for name in ("follow", "present", "direction", "speed", "dynamic", "consistency", "quality", "fidelity"):
        assert getattr(scores, name).isfinite().all(), name
    assert mean(scores.follow) == 0 and mean(scores.direction) == 0


def test_a_single_frame_has_no_motion_scores(video: Tensor, state: WorldState) -> None:
    scores = measure(video[:4, :1], captions(state)[:4])
    assert mean(scores.follow) == 1
    for name in ("direction", "speed", "consistency", "turn"):
        assert getattr(scores, name).isnan().all(), name


def test_bad_requests_are_refused(video: Tensor, state: WorldState) -> None:
    with pytest.raises(ValueError, match="one per clip"):
        measure(video[:2], captions(state)[:3])
    with pytest.raises(ValueError, match=r"\(B,T,3,H,W\)"):
        measure(video[0], captions(state)[:1])
    with pytest.raises(ValueError, match="differ in colour"):
        measure(video[:1], ["a red circle and a red square"])
    with pytest.raises(ValueError, match="unknown word"):
        measure(video[:1], ["a red dog"])
    with pytest.raises(ValueError, match="stride"):
        MetricConfig(stride=0)


# -------------------------------------------------------------------------------------------------------------- sets


def test_frechet_orders_sets_of_videos(video: Tensor, state: WorldState) -> None:
    seen = features(video)
    assert seen.shape == (COUNT, 64) and seen.dtype == torch.float64 and seen.isfinite().all()
    torch.testing.assert_close(seen[:5], features(video[:5], chunk=2), rtol=1e-4, atol=1e-5)
    assert frechet(video[:6], video[:6]) < 1e-6
    other = features(render(simulate(COUNT, seed=12)))
    still = features(video[:, :1].expand_as(video))
    assert frechet(seen, other) < frechet(seen, still)
    ghosts = features((video + video.roll(1, 0)) / 2)
    assert frechet(seen, other) < frechet(seen, ghosts)


def test_frechet_matches_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20000, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    b = b * torch.tensor([2.0, 1.0, 0.5]) + torch.tensor([0.0, 1.0, 0.0])  # (1-2)^2 + 1 + (1-0.5)^2
    assert frechet(a, b) == pytest.approx(2.25, abs=0.1)
    assert frechet(a[:2], b[:2]) >= 0  # singular covariances
    assert frechet(torch.ones(5, 3), torch.ones(5, 3)) == 0
    with pytest.raises(ValueError, match="at least 2 clips"):
        frechet(a[:1], b)


def test_frechet_of_broken_videos_is_finite(video: Tensor) -> None:
    assert math.isfinite(frechet(video[:4], torch.full((4, 9, 3, 64, 64), float("nan"))))


def test_estimates() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(1)) + 3
    found = estimate(values)
    assert found.mean == pytest.approx(values.mean().item(), abs=1e-6) and found.count == 400
    assert found.stderr == pytest.approx(values.std().item() / 20, rel=1e-5)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * found.stderr, rel=0.1)
    assert estimate(torch.cat([values, torch.full((9,), float("nan"))])) == found
    empty = estimate(torch.full((3,), float("nan")))
    assert empty.count == 0 and math.isnan(empty.mean)


def test_tables_and_paired_differences(real: Scores, video: Tensor, state: WorldState) -> None:
    table = summarise(real, resamples=200)
    assert list(table) == [f.name for f in dataclasses.fields(Scores)]
    assert table["follow"].mean == pytest.approx(mean(real.follow))
    soft = measure(blurred(video, 1.0), captions(state))
    difference = compare(real, soft, resamples=500)["quality"]
    assert difference.low > 0
    assert difference.stderr < estimate(soft.quality).stderr  # pairing removes what clips have in common
    assert compare(real, real, resamples=10)["dynamic"].mean == 0
    with pytest.raises(ValueError, match="equal length"):
        compare(real, real[:3])
