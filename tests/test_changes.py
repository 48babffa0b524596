"""The moment of change: the metric on the world's own changes and on spoiled ones; what a live video keeps."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from causalreel import families
from causalreel.data.drawing import BOUNDS, RADII
from causalreel.data.world import SPEED_PIXELS, WorldConfig, WorldState, render, simulate, told
from causalreel.eval import streams
from causalreel.eval.changes import Changed, clean, judge
from causalreel.eval.reading import look
from causalreel.eval.run import many_step
from causalreel.infer.commands import Options, Prompt, Restart
from causalreel.infer.live import Live
from causalreel.infer.live_video import LiveVideo
from causalreel.infer.models import load
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import Schedule
from causalreel.rollout import Chunk, KeyedNoise
from causalreel.serve.session import Session
from causalreel.types import Conditioning
from causalreel.vocabulary import COLORS, DIRECTIONS, Caption, ObjectSpec, complete, parse_caption, retold, said_of

BEFORE = "a large red circle moves right slowly and a small blue square moves up quickly on a dark background"


@pytest.fixture(scope="module")
def changes() -> list[tuple[torch.Tensor, int, Caption, Caption]]:
    """Clips of the world that change: video (T,3,H,W), the frame, both captions."""
    state = simulate(60, seed=3, config=WorldConfig(events=1.0), held_out=True)
    video, found = render(state), []
    for clip, captions in enumerate(told(state)):
        if len(captions) == 2 and _start(state, clip) <= 29:
            found.append((video[clip], _start(state, clip), *(parse_caption(text) for _, text in captions)))
    return found


def _start(state: WorldState, clip: int) -> int:
    assert state.change is not None
    return int(state.change.start[clip])


def test_the_worlds_own_changes_are_faultless(changes: list) -> None:
    found = [judge(*one, one[3]) for one in changes]
    assert len(found) > 20 and all(one.noise == 0 and one.is_shown == 1 for one in found)
    turned = [one.turned for one in found if one.turned is not None]
    assert set(turned) == {1.0} and len(turned) > 10  # what has a wall or the other one in its way is not counted
    steady = [one.steady for one in found if one.steady is not None]
    assert set(steady) == {1.0} and len(steady) > 1
    stayed = [one.stayed for one in found if one.stayed is not None]
    assert set(stayed) == {1.0} and len(stayed) > 10
    for video, start, before, after in changes[:8]:
        open_ones = Caption(tuple(dataclasses.replace(o, color="", shape="", size=None) for o in after.objects))
        found_open = judge(video, start, before, after, open_ones)
        assert found_open == Changed(0, None, found_open.turned, 1, found_open.steady, found_open.stayed)


def test_what_is_not_told_where_to_go_goes_on() -> None:
    state = simulate(40, seed=8, config=WorldConfig(frames=27, quiet=12, turn_probability=0, max_objects=1))
    said, found = [parse_caption(clip[0][1]) for clip in told(state)], []
    for video, caption in zip(render(state), said, strict=True):
        (spec,) = caption.objects
        silent = Caption((dataclasses.replace(spec, direction=None),))
        back = torch.cat([video[:14], video[1:14].flip(0)])  # it goes back from where it is
        ways = [judge(one, 14, caption, caption, silent).steady for one in (video, back)]
        ways.append(judge(video, 14, caption, caption, caption).steady)  # told
        ways.append(judge(video, 4, caption, caption, silent).steady)  # nothing says where it went
        found.append(ways)
    seen = [ways for ways in found if ways[0] is not None]
    assert len(seen) > 5 and all(ways[0] == 1 and ways[2:] == [None, None] for ways in seen)
    assert {ways[1] for ways in seen} <= {0, None} and sum(ways[1] == 0 for ways in seen) > 5  # or a wall is behind it
    assert any(ways[0] is None for ways in found)  # a wall is in the way


def test_who_goes_elsewhere_gains_no_room() -> None:
    """Told to turn back, it goes on: that counts where it had room behind it when it was told, and only there."""
    state = simulate(120, seed=8, config=WorldConfig(frames=27, quiet=12, turn_probability=0, max_objects=1, jitter=0))
    found = set()
    for clip, (video, said) in enumerate(zip(render(state), told(state), strict=True)):
        caption, move = parse_caption(said[0][1]), state.velocity[clip, 13, 0]
        axis, reach = int(move.abs().argmax()), RADII[state.scale[clip, 0]] * BOUNDS[state.shape[clip, 0]]
        beside = state.position[clip, 13, 0, 1 - axis].item()
        if bool((state.velocity[clip, 13:26, 0] != move).any()) or min(beside, 64 - beside) < reach + 2:
            continue  # it meets a wall, or goes along one
        at, forth = state.position[clip, 13, 0, axis].item(), bool(move[axis] > 0)
        back = DIRECTIONS[axis + 2 if forth else axis]
        after = Caption((dataclasses.replace(caption.objects[0], direction=back),), caption.background)
        room = (at if forth else 64 - at) - reach
        needed = 10 * SPEED_PIXELS[state.speed[clip, 0]]
        if abs(room - needed) > 3:
            turned = judge(video, 14, caption, after, after).turned
            assert turned == (0 if room > needed else None), (clip, room, needed)
            found.add(turned)
    assert found == {0, None}


def test_what_does_not_belong_there_is_found(changes: list) -> None:
    generator = torch.Generator().manual_seed(0)
    for video, start, before, after in changes[:8]:
        noisy, blob, grey = video.clone(), video.clone(), video.clone()
        noisy[start + 3] = torch.rand(3, 64, 64, generator=generator) * 2 - 1
        used = {one.color for one in (*before.objects, *after.objects)}
        other = next(color for color in COLORS if color not in used)
        blob[start + 5, :, 2:10, 2:10] = render(simulate(1, seed=0))[0, 0, :, :1, :1] * 0 + _paint(other)
        grey[start + 1] = 0.45
        for spoiled, frames in ((noisy, 1), (blob, 1), (grey, 1)):
            assert judge(spoiled, start, before, after, after).noise == pytest.approx(frames / 16), frames
        assert clean(video[start : start + 16], before, after).all()
    video, start, before, after = changes[0]
    stays = video.clone()
    stays[start:] = video[start - 1]
    assert judge(stays, start, before, after, after).is_shown in (0.0, 0.5, 1.0)
    still = judge(stays, start, before, after, after).turned
    assert still is None or still == 0
    with pytest.raises(ValueError, match="must show a frame before"):
        judge(video[: start + 5], start, before, after, after)


def _paint(color: str) -> torch.Tensor:
    from causalreel.vocabulary import COLOR_RGB

    return torch.tensor(COLOR_RGB[COLORS.index(color)])[:, None, None] / 127.5 - 1


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("a blue circle", "a small blue circle moves quickly on a dark background"),
        ("a square", "a large red square moves slowly on a dark background"),
        (
            "on a light background",
            "a large red circle moves slowly and a small blue square moves quickly on a light background",
        ),
        (
            "a green triangle and a red square moves left",
            "a large red square moves left slowly and a small green triangle moves quickly on a dark background",
        ),
        (BEFORE.replace("red", "green"), BEFORE.replace("red", "green")),
    ],
)
def test_what_a_change_leaves_open_stays(text: str, after: str) -> None:
    """By colour, then in order, and in the order in which they stood; what is not named goes; of a prompt that names no
    object all stay. Nobody knows where things go, and none is told."""
    unknown = [None, None]
    assert complete(text, 0, before=BEFORE, going=unknown) == after == complete(text, 7, before=BEFORE, going=unknown)


@pytest.mark.parametrize(
    ("text", "as_told", "as_seen"),
    [
        (
            "a blue circle",
            "a small blue circle moves up quickly on a dark background",
            "a small blue circle moves left quickly on a dark background",
        ),
        (
            "on a light background",
            "a large red circle moves right slowly and a small blue square moves up quickly on a light background",
            "a large red circle moves slowly and a small blue square moves left quickly on a light background",
        ),
        (
            "a green triangle moves down and a red square",
            "a large red square moves right slowly and a small green triangle moves down quickly on a dark background",
            "a large red square moves slowly and a small green triangle moves down quickly on a dark background",
        ),
    ],
)
def test_where_things_go_stays_as_it_was_told_or_as_it_is_seen(text: str, as_told: str, as_seen: str) -> None:
    assert complete(text, 0, before=BEFORE) == as_told
    assert complete(text, 0, before=BEFORE, going=[None, "left"]) == as_seen


def test_another_object_in_a_colour_that_stays_is_told(changes: list) -> None:
    """Two objects that exchange their colours: each looks as it was said to, and none stayed."""
    exchanged = 0
    for video, start, _, _ in changes:
        caption = _two(video[start - 1])
        if caption is None:
            continue
        still = video[start - 1].expand(start + 20, -1, -1, -1).clone()
        assert judge(still, start, caption, caption, caption).stayed == 1
        one, other = (_paint(spec.color) for spec in caption.objects)
        is_one, is_other = ((still - paint).abs().amax(1, keepdim=True) < 0.2 for paint in (one, other))
        moved = torch.where(is_one, other, torch.where(is_other, one, still))
        still[start:] = moved[start:]
        exchanged += 1
        assert judge(still, start, caption, caption, caption).stayed == 0
    assert exchanged > 3


def _two(picture: torch.Tensor) -> Caption | None:
    """A caption of the two objects that a picture (3,H,W) shows, if it shows two apart."""
    for colors in itertools.combinations(COLORS, 2):
        caption = parse_caption(f"a {colors[0]} circle and a {colors[1]} circle on a grey background")
        found = look(picture[None], caption)
        if bool(found.found.all()) and (found.centre[0, 0] - found.centre[0, 1]).norm() > 25:
            return caption
    return None


@pytest.mark.parametrize(
    ("after", "past"),
    [
        ("a red square on a grey background", BEFORE),
        (
            "a blue square on a grey background",
            "a small blue square moves up quickly and a large red circle moves right slowly on a dark background",
        ),
        ("a green square and a yellow circle on a grey background", BEFORE),
        ("a red circle and a green square on a grey background", BEFORE),
        (
            "a blue circle and a green square on a grey background",
            "a small blue square moves up quickly and a large red circle moves right slowly on a dark background",
        ),
    ],
)
def test_the_past_is_told_in_the_order_of_what_becomes_of_it(after: str, past: str) -> None:
    assert retold(BEFORE, after) == past and retold(past, after) == past


@pytest.mark.parametrize(
    ("after", "going", "now"),
    [
        ("moves right", "left", "left"),  # it has turned, and is to turn again
        ("moves right", None, "right"),  # nowhere in particular
        ("moves up", "left", "right"),  # another direction is told anyway
        ("", "left", "right"),  # nobody says, and it goes on as it is seen to go
    ],
)
def test_what_is_sent_again_where_it_was_sent_is_said_to_have_turned(after: str, going: str | None, now: str) -> None:
    ways = [going, "down"]
    told = complete(f"a red square {after} and a blue square", 0, before=BEFORE, going=ways)
    assert retold(BEFORE, told, ways) == BEFORE.replace("right", now)


@pytest.mark.parametrize(
    "text", ["a red circle", "a green square and a red circle moves left", "a red circle moves up"]
)
def test_the_one_whose_colour_is_named_stays_where_it_is(tiny: Pipeline, text: str) -> None:
    """Whether it was the first or the second, and another prompt at the same border leaves nothing behind."""
    told = "a small blue square moves up slowly and a large red circle moves down slowly on a grey background"
    session, frames = Session(tiny, Options(told, seed=4)), []
    frames += [made.frames for made in (session.next_chunk() for _ in range(6)) if made is not None]
    session.command("prompt", text="a small blue square moves left quickly on a dark background")
    session.command("prompt", text=f"{text} on a grey background")
    frames += [made.frames for made in (session.next_chunk() for _ in range(4)) if made is not None]
    shown = torch.cat(frames)[20:].movedim(-1, 1) / 127.5 - 1
    red = look(shown, parse_caption("a red circle on a grey background"))
    assert bool(red.found.all())
    assert float((red.centre[1:, 0] - red.centre[:-1, 0]).norm(dim=-1).max()) < 4
    again = Session.replay(tiny, session.record())
    assert all(torch.equal(chunk.frames, shown) for chunk, shown in zip(again, frames, strict=True))


def test_what_is_said_stands_in_the_order_of_the_completed_sentence() -> None:
    """The one who stays first, wherever the prompt names it: what is judged is the same object."""
    turned_round = 0
    for one in streams.draw(400, seed=17):
        first, second = complete(one.first, one.seed), one.second
        after, said = parse_caption(complete(second, one.seed, before=first)), said_of(second, before=first)
        turned_round += said.objects != said_of(second).objects
        for whole, spec in zip(after.objects, said.objects, strict=bool(said.objects)):
            assert all(value in ("", None, getattr(whole, name)) for name, value in vars(spec).items())
        colors = [spec.color for spec in parse_caption(first).objects]
        places = [colors.index(spec.color) for spec in after.objects if spec.color in colors]
        assert places == sorted(places)
    assert turned_round > 10


def test_what_comes_is_drawn_in_a_colour_of_its_own() -> None:
    before = "a large red circle moves right slowly on a grey background"
    found = {complete("a yellow circle and a square", seed, before=before) for seed in range(20)}
    assert len(found) > 5
    for sentence in found:
        first, second = parse_caption(sentence).objects
        assert (first.color, first.shape, first.size, first.direction) == ("yellow", "circle", "large", "right")
        assert second.shape == "square" and second.color not in ("yellow",) and second.size and second.speed
        assert second.direction
        assert sentence.endswith("on a grey background")
    said = said_of("a square moves left")
    assert said.objects[0].color == "" and said.objects[0].direction == "left" and said.background is None


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return load("tiny", device="cpu")


def test_a_live_video_keeps_what_a_prompt_leaves_open_until_it_begins_again(tiny: Pipeline) -> None:
    session = Session(tiny, Options(BEFORE, seed=3))
    assert session.video.scene.said == BEFORE
    session.command("prompt", text="a blue circle")
    session.command("prompt", text="on a light background")  # behind the first, though neither has taken effect
    session.take_commands()
    kept = "a small blue circle moves up quickly on a light background"
    assert session.video.scene.said == kept and session.prompt == "on a light background"
    assert torch.equal(session.video.text, tiny.text.encode([kept]))
    session.command("restart")
    session.take_commands()
    assert session.video.scene.said == complete("on a light background", 3)
    again = Session.replay(tiny, session.record())
    assert list(again) == []  # of no chunks
    fresh = LiveVideo(tiny, Options("a red circle", seed=5))
    assert fresh.scene.said == complete("a red circle", 5)
    scene, _ = fresh.encode(Restart(seed=6).scene(fresh.scene), begins=True)
    assert scene.said == complete("a red circle", 6)
    scene, _ = fresh.encode(Prompt("a square").scene(fresh.scene), begins=False)
    assert scene.said == complete("a square", 5, before=complete("a red circle", 5))


def test_what_nobody_tells_where_to_go_goes_on_as_it_is_seen_to_go(tiny: Pipeline) -> None:
    """It has met a wall since it was told: then it is told the way that the frames show. A direction that was told
    within the last three latent frames holds, whatever they show yet. The record makes the same frames."""
    told = "a large red circle moves right quickly on a dark background"
    session, frames, ways = Session(tiny, Options(told, seed=1)), [], set()

    def go_on(chunks: int) -> str | None:
        for _ in range(chunks):
            made = session.next_chunk()
            assert made is not None
            frames.append(made.frames)
        shown = torch.cat(frames)[-5:].movedim(-1, 1) / 127.5 - 1
        found = look(shown, parse_caption(session.video.scene.said or ""))
        move = found.centre[-1, 0] - found.centre[0, 0]
        is_sure = bool(found.found.all()) and float(move.abs().max()) > 0.95 * float(move.norm()) > 0.95
        is_sure &= bool(move @ (found.centre[-1, 0] - found.centre[-3, 0]) > 0)  # not just back from a wall
        return (("right", "down"), ("left", "up"))[int(move.sum() < 0)][int(move.abs().argmax())] if is_sure else None

    for number in range(12):
        seen = go_on(3)
        session.command("prompt", text=f"a {COLORS[number % 2]} circle")
        session.take_commands()
        said = parse_caption(session.video.scene.said or "").objects[0]
        assert seen is None or said.direction == seen
        ways.add(seen)
    assert len(ways - {None}) > 1, "nothing met a wall: the test shows nothing"
    assert torch.equal(session.video.text, tiny.text.encode([session.video.scene.said or ""]))
    session.command("prompt", text="moves up a circle")
    go_on(1)
    session.command("prompt", text="on a light background")
    session.command("prompt", text="a square")
    go_on(3)
    assert parse_caption(session.video.scene.said or "").objects[0].direction == "up"
    session.command("prompt", text="a circle moves down")
    session.command("prompt", text="on a grey background")  # behind what no frame shows yet
    session.take_commands()
    assert parse_caption(session.video.scene.said or "").objects[0].direction == "down"
    go_on(1)
    again = Session.replay(tiny, session.record())
    assert all(torch.equal(chunk.frames, shown) for chunk, shown in zip(again, frames, strict=True))


def test_what_was_seen_before_a_video_begins_again_is_forgotten(tiny: Pipeline) -> None:
    session = Session(tiny, Options("a large red circle moves left quickly on a dark background", seed=1))
    for _ in range(8):
        session.next_chunk()
    session.command("restart")
    session.next_chunk()
    session.command("prompt", text="a blue square")
    session.take_commands()
    assert session.video.scene.said == "a large blue square moves left quickly on a dark background"


def test_what_met_a_wall_is_said_to_have_turned_when_it_is_sent_there_again(
    tiny: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the very same prompt, too: the past is said to go as it does. A session tells it as the evaluation does."""
    first, pasts, as_it_is = "a large red circle moves left quickly on a dark background", [], Live.tell

    def tell(self: Live, text: torch.Tensor, *, past: torch.Tensor | None = None, **how: Any) -> None:
        pasts.append(past)
        as_it_is(self, text, past=past, **how)

    monkeypatch.setattr(Live, "tell", tell)
    list(streams.play(tiny, [streams.Told(1, first, first, at=8)]))
    session = Session(tiny, Options(first, seed=1))
    for _ in range(8):
        session.next_chunk()
    session.command("prompt", text=first)
    session.next_chunk()
    assert len(pasts) == 2
    for past in pasts:
        assert torch.equal(past, tiny.text.encode([first.replace("left", "right")]))


def test_what_is_sent_there_again_behind_a_prompt_that_no_frame_shows_is_recorded(tiny: Pipeline) -> None:
    """The record leaves out the prompt that another one supersedes at the same border."""
    first, frames = "a large red circle moves left quickly on a dark background", []
    session = Session(tiny, Options(first, seed=1))
    for number in range(11):
        if number == 8:
            session.command("prompt", text="a blue square")
            session.command("prompt", text=first)
        made = session.next_chunk()
        assert made is not None
        frames.append(made.frames)
    again = [chunk.frames for chunk in Session.replay(tiny, session.record())]
    assert len(again) == len(frames) and all(map(torch.equal, again, frames))


def test_streams_are_told_as_a_session_tells_them(tiny: Pipeline) -> None:
    """Behind a wall, of the second of two alone, and of two in the other order."""
    pair = "a small blue square moves up slowly and a large red circle moves down slowly on a grey background"
    told = [
        streams.Told(1, "a large red circle moves left quickly on a dark background", "a blue square", at=8),
        streams.Told(4, pair, "a red circle on a grey background", at=6),
        streams.Told(5, pair, "a small red circle moves left quickly and a blue square on a dark background", at=4),
    ]
    wall, second, other = (stream.result for one in told for stream in streams.play(tiny, [one]))
    assert wall.steady == 1 and second.stayed == 1
    assert other.stayed == 1 and other.turned == 1


@pytest.mark.parametrize("said", [{}, {"mode": None}, {"mode": "recompute"}])
def test_a_prompt_is_taken_as_suits_the_model_where_nobody_says(tiny: Pipeline, said: dict[str, str | None]) -> None:
    """Models trained on texts that change within a clip go on behind the last frame. A record says how it was."""
    session = Session(tiny, Options(BEFORE, seed=3))
    session.next_chunk()
    session.command("prompt", text="a blue circle", **said)
    session.next_chunk()
    assert session.record()["commands"][0]["arguments"]["mode"] == (said.get("mode") or "forget")
    assert families.FAMILIES["wan21"].text.mode == "recompute"  # as the released code does it


def test_streams_are_played_and_judged(tmp_path: Path) -> None:
    rows = streams.run(["two=tiny"], out=tmp_path, streams=2, device="cpu")
    assert set(rows) == {"two", "two, directions alone", "two, examples of the page"}
    assert all(0 <= row["noise"].mean <= 1 for row in rows.values())
    page = json.loads((tmp_path / "changes-two-page.json").read_text())["streams"]
    shown = families.FAMILIES["tiny"].text.examples  # which a server tells the page
    assert [(one["first"], one["second"]) for one in page] == [(shown[0], shown[1]), (shown[0], shown[2])]
    every = streams.of_the_page(shown, 100, seed=0)
    assert len(every) == 4 * 12 and len({(one.first, one.second) for one in every}) == 12
    steered = json.loads((tmp_path / "changes-two-directions.json").read_text())["streams"]
    assert [one["second"] for one in steered] == [one.second for one in streams.steered(2, seed=0)]
    held = json.loads((tmp_path / "changes-two.json").read_text())
    assert [one["second"] for one in held["streams"]] == [one.second for one in streams.draw(2, seed=0)]
    assert (tmp_path / "changes-two.png").stat().st_size > 1000
    assert "| two |" in (tmp_path / "changes.md").read_text() and "shown" in streams.table(rows)
    assert json.loads((tmp_path / "changes-two.json").read_text())["errors"].keys() == rows["two"].keys()
    with pytest.raises(ValueError, match="two rows would be called 'a-b', or"):
        streams.run(["a-b=tiny", "a b=tiny"], out=tmp_path, streams=2, device="cpu")


def test_prompts_that_steer_say_what_is_there_and_where_it_goes() -> None:
    """By colour and shape; one of two or both are sent, anywhere, so now and then where they were sent before."""
    drawn = streams.steered(400, seed=3)
    assert drawn[:5] == streams.steered(5, seed=3) != streams.steered(5, seed=4)
    sent, again = {1: list[int](), 2: list[int]()}, list[bool]()
    for one in drawn:
        old, new = parse_caption(one.first).objects, parse_caption(one.second).objects
        assert [ObjectSpec(o.color, o.shape) for o in old] == [dataclasses.replace(o, direction=None) for o in new]
        ways = [n for n, o in enumerate(new) if o.direction is not None]
        sent[len(new)].append(sum(1 << n for n in ways))
        again += [new[n].direction == old[n].direction for n in ways]
        assert 3 <= one.at < 15
    assert set(sent[1]) == {1} and set(sent[2]) == {1, 2, 3} and len(sent[1]) > 100 < len(sent[2])
    assert 0.15 < sum(again) / len(again) < 0.35


@pytest.mark.parametrize("model", ["tiny", "tiny/chunk-4step"])
@pytest.mark.parametrize("mode", [None, "switch"])
def test_streams_made_together_are_those_of_sessions(model: str, mode: str | None) -> None:
    """Of three that change at two moments; the seed, the noise and what stays are each one's own."""
    pipeline = load(model, device="cpu")
    told = [dataclasses.replace(one, at=at) for one, at in zip(streams.draw(3, seed=4), (3, 5, 3), strict=True)]
    made = {stream.told.seed: stream for stream in streams.play(pipeline, told, mode=mode, rows=4)}  # pyright: ignore
    assert sorted(made) == [one.seed for one in told] and list(made) != sorted(made)
    chunk = pipeline.sampling.chunk
    assert chunk is not None
    for one in told:
        session, frames = Session(pipeline, Options(one.first, one.seed)), list[torch.Tensor]()
        for _ in range(-(-one.at // chunk)):
            frames += session.next_chunk().frames
        start = len(frames)
        session.command("prompt", text=one.second, **({} if mode is None else {"mode": mode}))
        while len(frames) < start + streams.BEHIND:
            frames += session.next_chunk().frames
        shown = torch.stack(frames)[start - streams.BEFORE : start + streams.BEHIND].movedim(-1, 1)
        distance = (made[one.seed].frames.int() - shown.int()).abs()
        assert distance.max() <= 1 and distance.float().mean() < 0.01


def test_a_model_of_whole_clips_reads_the_second_prompt_from_the_change_on(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load("tiny/base", device="cpu")
    pipeline = many_step(base, steps=2, guidance=2.0)
    few = load("tiny", device="cpu")
    assert base.sampling.guidance == 3 == pipeline.sampling.guidance + 1 and pipeline.sampling.multistep == 2
    assert many_step(few, steps=9, guidance=2.0).sampling == few.sampling and many_step(base).sampling == base.sampling
    read, as_it_is = [], Pipeline.rollout

    def rollout(
        self: Pipeline, plan: Schedule, conditioning: Conditioning, noise: KeyedNoise, *, batch: int
    ) -> Iterator[Chunk]:
        read.append(conditioning)
        return as_it_is(self, plan, conditioning, noise, batch=batch)

    first, second = "a large red circle moves right slowly", "a small blue square moves up quickly"
    told = streams.Told(5, f"{first} and {second} on a dark background", "a large blue square", at=14)
    monkeypatch.setattr(Pipeline, "rollout", rollout)
    (stream,) = streams.play(pipeline, [told])
    prompts, text = read[0].prompts, read[0].text
    assert stream.told.at == 12 - 5 == list(prompts).index(1) and set(prompts) == {0, 1} and len(prompts) == 12
    unseen = torch.empty(0, 3, 64, 64)
    after = pipeline.text.complete(told.second, told.seed, before=told.first, seen=unseen)
    assert after == "a large blue square moves quickly on a dark background"
    both = f"{second} and {first} on a dark background", after  # what stays has its place in both
    assert torch.equal(text[-1].float(), pipeline.text.encode(both).float())  # the row that is not guided away from
    assert stream.frames.shape == (streams.BEFORE + streams.BEHIND, 3, 64, 64)
    with pytest.raises(ValueError, match="mode is of live videos"):
        list(streams.play(pipeline, [told], mode="switch"))


@pytest.mark.parametrize(("streams_seen", "clean", "error"), [([0.0, 0.5], 0.5, 0.5), ([0.0] * 4, 1.0, 0.0)])
def test_means_come_with_their_errors(streams_seen: list[float], clean: float, error: float) -> None:
    told = streams.Told(0, "a red circle", "a blue square", 3)
    found = [streams.Stream(told, Changed(noise, 1.0, None, 1.0), torch.zeros(0)) for noise in streams_seen]
    row = streams.numbers(found)
    assert (row["clean"].mean, row["clean"].stderr) == (clean, error) and math.isnan(row["turned"].mean)
    assert f"{clean:.3f} ± {error:.3f}" in streams.table({"two": row})


def test_models_are_compared_stream_by_stream(tmp_path: Path) -> None:
    seed = 100  # of three streams the first and the last change at the same moment, and are made together
    assert [one.at == streams.draw(3, seed=seed)[0].at for one in streams.draw(3, seed=seed)] == [True, False, True]
    rows = streams.run(
        ["one=tiny", "two=tiny/ar-frame@1", "three=tiny"], out=tmp_path, streams=3, seed=seed, device="cpu"
    )
    kinds = ("", ", directions alone", ", examples of the page")
    assert list(rows)[9:] == [f"{label} less one{kind}" for label in ("two", "three") for kind in kinds]
    assert all(rows["three less one"][name].mean == 0 for name in ("clean", "noise"))
    told = [json.loads((tmp_path / f"changes-{name}.json").read_text())["streams"] for name in ("one", "two")]
    assert [[one["seed"] for one in ones] for ones in told] == [[seed, seed + 1, seed + 2]] * 2
    more = [b["is_shown"] - a["is_shown"] for a, b in zip(*told, strict=True)]
    assert sum(more) < 0 and rows["two less one"]["shown"].mean == pytest.approx(sum(more) / 3)
    assert "| two less one | " in (tmp_path / "changes.md").read_text()


def test_numbers_of_streams_outlive_a_sheet_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_sheet(*_: object, **__: object) -> None:
        raise ImportError("no Pillow")

    unseen = Changed(noise=0.0, is_shown=None, turned=None, kept=None)
    monkeypatch.setattr(streams, "contact_sheet", no_sheet)
    monkeypatch.setattr(streams, "load", lambda *_, **__: None)
    monkeypatch.setattr(streams, "page_examples", lambda _: ["a red circle", "a blue square"])
    monkeypatch.setattr(streams, "with_steps", lambda pipeline, steps: pipeline)
    monkeypatch.setattr(streams, "many_step", lambda pipeline, guidance: pipeline)
    frames = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(streams, "play", lambda _, told, **how: (streams.Stream(t, unseen, frames) for t in told))
    streams.run(["two=tiny"], out=tmp_path, streams=2)
    held = json.loads((tmp_path / "changes-two.json").read_text(), parse_constant=pytest.fail)
    assert held["means"] == {
        "clean": 1.0,
        "noise": 0.0,
        "shown": None,
        "turned": None,
        "kept": None,
        "steady": None,
        "stayed": None,
    }
    assert held["errors"] == {
        "clean": 0.0,
        "noise": 0.0,
        "shown": None,
        "turned": None,
        "kept": None,
        "steady": None,
        "stayed": None,
    }
    assert (tmp_path / "changes.md").is_file()
