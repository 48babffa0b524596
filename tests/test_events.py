"""Events of the tiny world: what changes, when, exactly how, and what stays as it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from causalreel.codecs.tiny import tiny_codec
from causalreel.data.drawing import BOUNDS, RADII
from causalreel.data.events import QUIET
from causalreel.data.prepare import prepare
from causalreel.data.shards import load_prepared
from causalreel.data.sources import LatentSource
from causalreel.data.timed import joined, readings, timed
from causalreel.data.walk import WalkConfig
from causalreel.data.world import SPEED_PIXELS, WorldConfig, WorldState, captions, render, simulate, told
from causalreel.data.worlds import flat, walkable
from causalreel.eval.changes import LOOKED_AT, judge
from causalreel.types import Conditioning
from causalreel.vocabulary import BACKGROUND_RGB, DIRECTIONS, complete, parse_caption, retold

EVENTS = WorldConfig(events=1.0)
IN_PLACE = "1.0 in 4 frames, each in its place"
CLASSES = ("shape", "color", "scale", "present", "background", "direction", "speed")


@pytest.fixture(scope="module")
def world() -> WorldState:
    """Clips in which something changes."""
    state = simulate(400, seed=5, config=EVENTS)
    assert state.change is not None
    happens = state.change.start < EVENTS.frames
    assert 0.75 < happens.float().mean() < 0.95  # the others had no room
    return state[happens]


def change_of(state: WorldState):
    assert state.change is not None
    return state.change


def test_until_an_event_a_clip_is_the_one_without(world: WorldState) -> None:
    plain, with_events = simulate(64, seed=5), simulate(64, seed=5, config=EVENTS)
    assert captions(plain) == captions(with_events)
    for clip, start in enumerate(change_of(with_events).start.tolist()):
        assert torch.equal(with_events.position[clip, : start + 1, 0], plain.position[clip, : start + 1, 0])
    some = simulate(64, seed=5, config=WorldConfig(events=0.5))
    here = (change_of(some).start < EVENTS.frames).float().mean()
    assert 0.25 < here < 0.55
    pictures = render(plain[:16]), render(with_events[:16])
    for clip, start in enumerate(change_of(with_events[:16]).start.tolist()):
        assert torch.equal(pictures[0][clip, :start], pictures[1][clip, :start])


def test_events_may_leave_the_background_and_name_directions_more_often() -> None:
    def shares(config: WorldConfig) -> tuple[float, float]:
        """Of clips with a change: that it leaves the background, and that it names the first object's direction."""
        state = simulate(400, seed=5, config=config)
        state = state[change_of(state).start < config.frames]
        change = change_of(state)
        same = change.background == state.background
        return same.float().mean().item(), change.named[:, 0].float().mean().item()

    usual = shares(EVENTS)
    other = shares(dataclasses.replace(EVENTS, named=1.0, same_background=0.9))
    assert usual[0] < 0.7 < 0.9 < other[0] < 1 and usual[1] < 0.9 and other[1] == 1.0
    assert shares(dataclasses.replace(EVENTS, same_background=1.0))[0] == 1.0
    facts = [flat(dataclasses.replace(EVENTS, same_background=share)).facts["events"] for share in (0.0, 0.9)]
    assert facts == [IN_PLACE, f"{IN_PLACE}, directions named 0.75, the same background 0.9"]


def test_events_may_end_with_two_objects_more_often() -> None:
    def ends(config: WorldConfig) -> float:
        state = simulate(400, seed=5, config=config)
        change = change_of(state)
        return change.present[change.start < config.frames, 1].float().mean().item()

    shares = [ends(dataclasses.replace(EVENTS, two_objects=share)) for share in (0.0, 0.5, 1.0)]
    assert shares[0] < 0.5 < 0.6 < shares[1] < 0.9 and shares[2] == 1.0
    assert flat(dataclasses.replace(EVENTS, two_objects=0.5)).facts["events"] == f"{IN_PLACE}, two objects 0.5"


def test_events_may_say_nothing_but_another_direction() -> None:
    """Of one object or of both; the caption of an object that is told none has no direction word."""
    config = dataclasses.replace(EVENTS, direction_alone=1.0, two_objects=1.0, crowded=1.0)
    state = simulate(600, seed=5, config=config)
    change = change_of(state)
    state = state[change.start < config.frames]
    change, two = change_of(state), state.present.all(1)
    for name in ("shape", "color", "scale", "speed", "present", "background"):
        assert torch.equal(getattr(change, name), getattr(state, name)), name
    assert change.named[~two].all() and 0.3 < two.float().mean() < 0.7
    kinds, counts = change.named[two].unique(dim=0, return_counts=True)
    assert kinds.tolist() == [[False, True], [True, False], [True, True]]
    assert (counts / counts.sum() - 1 / 3).abs().max() < 0.1
    asked = change.named & state.present
    assert (change.direction != state.direction)[asked].float().mean() > 0.9  # the others had no room
    for clip in torch.nonzero(two)[:20, 0].tolist():
        captions_of = told(state)[clip]
        before, behind = (parse_caption(said).objects for _, said in captions_of)
        ways = [one.direction is not None for one in behind]
        assert ways == change.named[clip].tolist()
        assert [dataclasses.replace(one, direction=None) for one in before] == [
            dataclasses.replace(one, direction=None) for one in behind
        ]
    usual = simulate(400, seed=5, config=EVENTS)
    some = simulate(400, seed=5, config=dataclasses.replace(EVENTS, direction_alone=0.5))
    same = [a == b for a, b in zip(told(usual), told(some), strict=True)]
    assert 0.4 < sum(same) / len(same) < 0.7
    assert (
        flat(dataclasses.replace(EVENTS, direction_alone=0.5)).facts["events"] == f"{IN_PLACE}, a direction alone 0.5"
    )


def test_a_clip_with_an_event_depends_on_its_index_alone() -> None:
    whole, part = simulate(12, seed=1, config=EVENTS), simulate(3, seed=1, first=7, config=EVENTS)
    assert torch.equal(whole.position[7:10], part.position)
    assert told(whole)[7:10] == told(part)
    assert torch.equal(render(whole[7:10]), render(part))


@pytest.mark.parametrize("morph", [4, 8])
def test_behind_a_change_the_picture_is_the_new_captions(morph: int) -> None:
    state = simulate(48, seed=2, config=WorldConfig(events=1.0, morph=morph))
    change = change_of(state)
    new = dataclasses.replace(state, change=None, **{name: getattr(change, name) for name in CLASSES})
    shown, expected, old = render(state), render(new), render(dataclasses.replace(state, change=None))
    for clip, start in enumerate(change.start.tolist()):
        assert torch.equal(shown[clip, :start], old[clip, :start])
        assert torch.equal(shown[clip, start + morph - 1 :], expected[clip, start + morph - 1 :])


def test_a_change_goes_in_equal_parts(world: WorldState) -> None:
    """The background on its line from old to new; what comes and goes by its radius."""
    change, levels = change_of(world), torch.tensor(BACKGROUND_RGB).float() / 127.5 - 1
    other = (change.background != world.background) & (change.start < 37)
    clips = torch.nonzero(other)[:6, 0]
    shown = render(world[clips])
    for row, clip in enumerate(clips.tolist()):
        start = int(change.start[clip])
        for step in range(4):
            expected = torch.lerp(levels[world.background[clip]], levels[change.background[clip]], (step + 1) / 4)
            assert (shown[row, start + step].flatten(1).median(1).values - expected).abs().max() < 1e-6
    goes = torch.nonzero(~change.present[:, 1] & world.present[:, 1] & (change.start < 37) & ~other)[:4, 0]
    plain = dataclasses.replace(world, change=None, present=world.present & torch.tensor([True, False]))
    for clip in goes.tolist():
        start, radius = int(change.start[clip]), RADII[int(world.scale[clip, 1])]
        at = world.position[clip, start, 1]
        near = (torch.arange(64) + 0.5 - at[:1]).abs() < radius
        assert near.any() and not torch.equal(render(world[clip : clip + 1])[0, start], render(plain)[clip, start])
    assert len(clips) and len(goes)


def test_what_is_not_named_stays(world: WorldState) -> None:
    """An object without a direction word keeps its heading, at the captioned speed, unless it meets a wall."""
    change, checked = change_of(world), 0
    pace = torch.tensor(SPEED_PIXELS)[change.speed]
    for clip, start in enumerate(change.start.tolist()):
        if start + 5 >= EVENTS.frames:
            continue
        for i in (0, 1):
            stays = bool(world.present[clip, i] & change.present[clip, i] & ~change.named[clip, i])
            moves = world.velocity[clip, start - 1 : start + 5, i]
            straight = not world.bounced[clip, start - 1 : start + 5, i].any() and moves.norm(dim=-1).min() > 0.1
            if not stays or not straight or world.turned[clip, start - 1, i]:
                continue
            before, after = moves[0], moves[5]
            grew = change.scale[clip, i] > world.scale[clip, i] or change.shape[clip, i] != world.shape[clip, i]
            if not grew:
                assert torch.allclose(after / after.norm(), before / before.norm(), atol=1e-5)
            assert abs(after.norm() - pace[clip, i]) < 1e-5
            checked += 1
    assert checked > 50


def test_a_named_direction_is_taken(world: WorldState) -> None:
    change, checked = change_of(world), 0
    ways = torch.tensor([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)])
    obeyed = []
    for clip, start in enumerate(change.start.tolist()):
        if start + QUIET >= EVENTS.frames:
            continue
        for i in (0, 1):
            if not (change.present[clip, i] and change.named[clip, i]):
                continue
            move = world.position[clip, start + QUIET, i] - world.position[clip, start + 4, i]
            obeyed.append((move @ ways[change.direction[clip, i]] > 0.7071 * move.norm()).item())
            checked += 1
    assert checked > 100 and sum(obeyed) / checked > 0.98


def test_objects_never_touch_and_end_within_the_picture(world: WorldState) -> None:
    change = change_of(world)
    frames = torch.arange(EVENTS.frames)
    over = frames >= change.start[:, None] + EVENTS.morph - 1  # (B,T)
    radius = torch.tensor(RADII)[change.scale] * 0.88  # the least reach of any shape, to a side of it
    reach = radius[:, None].expand(-1, EVENTS.frames, -1)
    inside = (world.position.amin(-1) > reach * 0.79 - 0.1) & (world.position.amax(-1) < 64 - reach * 0.79 + 0.1)
    assert (inside | ~change.present[:, None] | ~over[..., None]).all()
    both = change.present.all(1)
    apart = (world.position[:, :, 0] - world.position[:, :, 1]).norm(dim=-1)
    assert (apart[both[:, None] & over] > 2 * 6.5).all()
    shown = render(world[:32])
    assert shown.isfinite().all() and shown.abs().max() <= 1


def test_crowded_events_all_happen_and_what_touches_parts() -> None:
    crowded = simulate(192, seed=11, config=dataclasses.replace(EVENTS, crowded=1.0, two_objects=1.0))
    usual = simulate(192, seed=11, config=dataclasses.replace(EVENTS, two_objects=1.0))
    change = change_of(crowded)
    assert (change.start < EVENTS.frames).all() and (change_of(usual).start >= EVENTS.frames).float().mean() > 0.1
    frames = torch.arange(EVENTS.frames)
    reach = (torch.tensor(BOUNDS)[change.shape] * torch.tensor(RADII)[change.scale]).sum(1)
    apart = (crowded.position[:, :, 0] - crowded.position[:, :, 1]).norm(dim=-1) - reach[:, None]
    late = (frames >= change.start[:, None] + 3 * EVENTS.morph) & change.present.all(1)[:, None]
    assert late.sum() > 1000 and (apart[late] > 0).float().mean() > 0.99  # but between a wall and the other
    now = (frames == change.start[:, None]) & change.present.all(1)[:, None]
    assert (apart[now] < 0).any()  # what comes or grows had no room
    before = (frames < change.start[:, None]) & crowded.present.all(1)[:, None]
    centres = (crowded.position[:, :, 0] - crowded.position[:, :, 1]).norm(dim=-1)
    assert (centres[before] > 2 * 6.5).all()
    radius = torch.tensor(RADII)[change.scale][:, None] * 0.88 * 0.79 - 0.1
    over = frames >= change.start[:, None] + EVENTS.morph - 1
    inside = (crowded.position.amin(-1) > radius) & (crowded.position.amax(-1) < 64 - radius)
    assert (inside | ~change.present[:, None] | ~over[..., None]).all()
    some = simulate(192, seed=11, config=dataclasses.replace(EVENTS, crowded=0.5, two_objects=1.0))
    same = [torch.equal(some.position[i], crowded.position[i]) for i in range(192)]
    assert 0.3 < sum(same) / 192 < 0.8


def test_changes_without_room_are_clean_and_what_can_turn_does() -> None:
    state = simulate(96, seed=12, config=dataclasses.replace(EVENTS, crowded=1.0, two_objects=1.0))
    video, said, judged = render(state), told(state), []
    for clip, start in enumerate(change_of(state).start.tolist()):
        if start <= EVENTS.frames - LOOKED_AT:
            before, after = (parse_caption(text) for _, text in said[clip])
            judged.append(judge(video[clip], start, before, after, after))
    turned = [one.turned for one in judged if one.turned is not None]
    assert len(judged) > 40 and not any(one.noise for one in judged)
    assert len(turned) > 20 and sum(turned) / len(turned) > 0.95  # what has the other one in its way is not counted


def test_captions_name_what_is_there_and_objects_in_one_order(world: WorldState) -> None:
    said, change = told(world), change_of(world)
    assert {(start - 1) % 4 for start in change.start.tolist()} == {0}
    kinds = set()
    for clip, ((zero, first), (latent, later)) in enumerate(said):
        old, new = parse_caption(first), parse_caption(later)
        assert zero == 0 and latent == (int(change.start[clip]) - 1) // 4 + 1
        assert len({one.color for one in new.objects}) == len(new.objects)
        assert all(one.size and one.speed for one in new.objects) and new.background
        kinds.add((len(old.objects), len(new.objects)))
        slots = [i for i in (0, 1) if change.present[clip, i]]
        for spec, slot in zip(new.objects, slots, strict=True):
            assert spec.direction == (DIRECTIONS[change.direction[clip, slot]] if change.named[clip, slot] else None)
        assert retold(first, later) == first  # as sessions tell what was, and what is
        assert complete(later, 0, before=first, going=[None] * len(old.objects)) == later
    assert kinds == {(1, 1), (1, 2), (2, 1), (2, 2)}
    assert (~change.present[:, 0]).any()  # the first object goes, too


def test_a_caption_that_changes_is_a_line() -> None:
    clip = ((0, "a red circle"), (3, "a blue circle"), (9, "a blue square"))
    assert joined(clip) == "a red circle\t@3\ta blue circle\t@9\ta blue square" and timed(joined(clip)) == clip
    for line in ("a red circle", "a red\tcircle", "a\t@3", "a\t@5\tb\t@5\tc", "a\t@0\tb", "a\t@x\tb"):
        assert timed(line) == ((0, line),)
    with pytest.raises(ValueError, match="clip 1: its caption changes at latent frame 9, and it has 6"):
        readings([((0, "a cyan square"),), clip], 6)
    texts, reads = readings([clip, ((0, "a cyan square"),)], 10)
    assert texts == ["a red circle", "a blue circle", "a blue square", "a cyan square"]
    assert reads.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 2], [3] * 10]


def test_data_keep_the_text_of_every_frame(tmp_path: Path) -> None:
    config = WorldConfig(events=1.0, frames=17, max_objects=1)
    folder = prepare(tmp_path, tiny_codec(0), codec_id="x", clips=3, seed=0, world=flat(config), batch=3)
    found = load_prepared(folder)
    latents, lines = found.latents, found.captions
    assert [timed(line) for line in lines] == told(simulate(3, seed=0, config=config))
    with pytest.raises(ValueError, match="events"):
        prepare(tmp_path, tiny_codec(0), codec_id="x", clips=3, seed=0, world=flat(WorldConfig(frames=17)))
    worlds = {"walk": walkable(WalkConfig(latents=5)), "flat": flat(WorldConfig(frames=17))}  # as long as each other
    for one, other in (("walk", "flat"), ("flat", "walk")):
        prepare(tmp_path / one, tiny_codec(0), codec_id="x", clips=1, seed=0, world=worlds[one])
        with pytest.raises(ValueError, match="holds data with world="):
            prepare(tmp_path / one, tiny_codec(0), codec_id="x", clips=2, seed=0, world=worlds[other])
    texts, reads = readings([timed(line) for line in lines], latents.shape[1])
    codes = torch.arange(len(texts)).float().view(-1, 1, 1)
    cameras = torch.randn(3, 5, 4, 4)
    source = LatentSource(latents, Conditioning(codes, {"w2c": cameras}), reads)
    batch = source.batch(torch.tensor([2, 0]))
    assert torch.equal(batch.conditioning.fields["w2c"], cameras[[2, 0]])
    assert batch.conditioning.prompts == tuple(range(5))
    assert torch.equal(batch.conditioning.text[..., 0, 0].long(), reads[[2, 0]])
    with pytest.raises(ValueError, match="as many rows"):
        LatentSource(latents, Conditioning(codes), reads[:2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"events": 1.5},
        {"named": -0.1},
        {"same_background": 2},
        {"two_objects": -0.5},
        {"crowded": 1.5},
        {"direction_alone": -1},
        {"morph": 3},
        {"morph": 9},
        {"latent": 0},
        {"events": 1, "frames": 3},
    ],
)
def test_impossible_events_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if "frames" not in wrong else "frames"):
        WorldConfig(**wrong)
