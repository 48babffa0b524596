"""Sessions: commands at chunk borders, what is refused, and replays that are the same bits."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import causalreel
from causalreel import families
from causalreel.data.video import to_bytes
from causalreel.infer.commands import Command, Field, Keys, Prompt
from causalreel.infer.live import Live, PolicyKind, encode_prompt
from causalreel.nn.policies.registry import POLICIES, described, policy_from
from causalreel.serve import begun
from causalreel.serve import session as module
from causalreel.serve.emitted import Timings
from causalreel.serve.records import Recorded, checked_record, parse_record, read_record
from causalreel.serve.session import Options, Session
from causalreel.vocabulary import retold
from causalreel.weights.export import Sampling
from ceilings import examples, work_within
from test_infer import PROMPTS, pipeline
from test_live import TWO_STEP


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def session(sampling: Sampling = TWO_STEP, policy: PolicyKind | None = None, **options: object) -> Session:
    return Session(pipeline(sampling), Options(PROMPTS[0], **options), policy=policy)


def apart(a: Tensor, b: Tensor) -> int:
    """The largest difference of two videos in bytes."""
    return int((a.int() - b.int()).abs().max())


def pictures(one: Session, chunks: int) -> list[Tensor]:
    made = [one.next_chunk() for _ in range(chunks)]
    assert all(chunk is not None for chunk in made)
    return [chunk.frames for chunk in made]


def test_the_beginning_is_a_clip() -> None:
    clip = to_bytes(pipeline(TWO_STEP).generate(PROMPTS[0], seed=5)[0])
    renewed = session(seed=5, policy="renew")
    assert torch.equal(torch.cat(pictures(renewed, 4)), clip)
    one = session(seed=5)  # reads keys at other positions the same distances apart: rotations are rounded otherwise
    made = [one.next_chunk() for _ in range(4)]
    assert apart(torch.cat([chunk.frames for chunk in made]), clip) <= 1
    assert made[0].frames.dtype == torch.uint8 and made[0].frames.shape == (1, 32, 32, 3)
    assert [chunk.sequence for chunk in made] == [0, 1, 2, 3]
    assert [chunk.first_frame for chunk in made] == [0, 1, 5, 9]
    assert one.state()["frames"] == 13 and one.state()["sequence"] == 4
    json.dumps(one.state())


def test_a_command_takes_effect_at_the_next_border_and_says_when() -> None:
    clock = Clock()
    one = Session(pipeline(TWO_STEP), Options(PROMPTS[0]), clock=clock)
    first = one.next_chunk()
    assert first.prompt == PROMPTS[0] and first.commands == ()
    assert one.command("prompt", text=PROMPTS[1], mode="fade", chunks=2) == 1
    clock.now += 1.5
    assert one.command("fps", fps=8) == 2
    assert one.prompt == PROMPTS[0] and one.state()["pending"] == 2  # not yet
    clock.now += 0.5
    second = one.next_chunk()
    assert second.prompt == PROMPTS[1] and one.fps == 8
    told, rate = second.commands
    assert (told.number, told.name, told.latency_s) == (1, "prompt", 2.0)
    assert told.arguments == {"text": PROMPTS[1], "mode": "fade", "chunks": 2}
    assert (rate.number, rate.name, rate.latency_s) == (2, "fps", 0.5)
    assert one.next_chunk().commands == ()


@pytest.mark.parametrize("mode", ["switch", "recompute", "fade", "forget"])
def test_modes_reach_the_stream(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(Live, "tell", lambda self, text, **how: told.append((text, how)))
    one = session()
    one.next_chunk()
    one.command("prompt", text=PROMPTS[1], mode=mode, chunks=3)
    one.next_chunk()
    ((text, how),) = told
    past, encode = how.pop("past"), one.pipeline.text.encode
    assert how == {"mode": mode, "chunks": 3} and torch.equal(text, encode([PROMPTS[1]]))
    assert torch.equal(past, encode([retold(PROMPTS[0], PROMPTS[1])]))


def test_pause_step_resume() -> None:
    one, free = session(), session()
    expected = pictures(free, 5)
    got = pictures(one, 1)
    one.command("pause")
    assert one.next_chunk() is None and one.state()["paused"] and not one.can_run
    one.command("step", chunks=2)
    got += pictures(one, 2)
    assert one.next_chunk() is None
    one.command("step")
    one.command("resume")  # what was left to step does not count any more
    got += pictures(one, 2)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_command_in_a_pause_is_taken_at_once() -> None:
    one = session()
    one.command("pause")
    one.command("prompt", text=PROMPTS[1])
    assert one.next_chunk() is None and one.prompt == PROMPTS[1] and one.state()["pending"] == 0
    one.command("resume")
    assert [command.number for command in one.next_chunk().commands] == [1, 2, 3]


def test_restart() -> None:
    one = session(seed=1)
    begun = pictures(one, 3)
    one.command("restart")
    again = pictures(one, 3)
    assert all(torch.equal(a, b) for a, b in zip(begun, again, strict=True))
    one.command("restart", seed=2, prompt=PROMPTS[1])
    other = pictures(one, 3)
    expected = pictures(Session(pipeline(TWO_STEP), Options(PROMPTS[1], seed=2)), 3)
    assert all(torch.equal(a, b) for a, b in zip(other, expected, strict=True))
    assert one.state()["seed"] == 2 and one.state()["frames"] == 27  # frames go on counting


def test_a_short_prompt_is_completed_by_the_seed_that_is_to_come() -> None:
    one, prompt = session(seed=1), "a red circle"
    assert not torch.equal(*(encode_prompt(one.pipeline, prompt, seed) for seed in (1, 3)))
    one.command("prompt", text=prompt)
    one.command("restart", seed=3)
    expected = pictures(Session(pipeline(TWO_STEP), Options(prompt, seed=3)), 2)
    assert all(torch.equal(a, b) for a, b in zip(pictures(one, 2), expected, strict=True))
    assert one.prompt == prompt


def test_steps_frame_rate_and_size() -> None:
    one = session(steps=1)
    assert one.state()["steps"] == 1 and one.state()["fps"] == 16.0
    assert (one.state()["height"], one.state()["width"]) == (32, 32)
    pictures(one, 1)
    one.command("steps", steps=3)
    pictures(one, 1)
    assert one.state()["steps"] == 3 and one.video.live.sampling.steps == pytest.approx((1000, 2000 / 3, 1000 / 3))
    exact = session(Sampling(1, levels=((0.99, 0.9, 0.7), (0.99, 0.7))))
    assert exact.state()["steps"] == 2
    exact.command("steps", steps=1)
    pictures(exact, 1)
    assert exact.state()["steps"] == 1
    two = session(Sampling(2))
    assert [len(frames) for frames in pictures(two, 3)] == [5, 8, 8]


def test_a_picture_and_its_prompt_agree_on_the_background() -> None:
    """When a session begins, and when it begins again; what it is told on the way is its own affair."""
    light, dark = torch.full((3, 32, 32), 0.9), torch.full((3, 32, 32), -0.9)
    prompt = "a large red circle moves right slowly on a dark background"
    with pytest.raises(ValueError, match=r"asks for a dark background, but the picture .* has a light one"):
        Session(pipeline(TWO_STEP), Options(prompt, image=light))
    one = Session(pipeline(TWO_STEP), Options(prompt, image=dark))
    with pytest.raises(ValueError, match="has a light one"):
        one.command("image", image=light)
    with pytest.raises(ValueError, match="has a dark one"):
        one.command("restart", prompt=prompt.replace("dark", "light"))
    one.command("prompt", text=prompt.replace("dark", "light"))
    with pytest.raises(ValueError, match="has a dark one"):
        one.command("restart")
    one.command("image", image=light)
    one.command("restart")


def test_a_picture_comes_first_and_a_restart_keeps_it() -> None:
    picture = torch.rand(3, 32, 32) * 2 - 1
    one = session(policy="renew", image=picture)
    rounded = (to_bytes(picture)[0].permute(2, 0, 1).float() / 127.5) - 1
    clip = to_bytes(pipeline(TWO_STEP).generate(PROMPTS[0], prefix=rounded)[0])
    assert torch.equal(torch.cat(pictures(one, 4)), clip)
    one.command("restart")
    assert torch.equal(torch.cat(pictures(one, 4)), clip) and one.state()["has_image"]
    one.command("image", image=None)
    assert torch.equal(torch.cat(pictures(one, 2)), torch.cat(pictures(session(policy="renew"), 2)))
    one.command("image", image=picture)
    made = one.next_chunk()
    assert torch.equal(made.frames, clip[:1]) and made.commands[0].arguments == {"image": "32 x 32 pixels"}


def test_close() -> None:
    one = session()
    pictures(one, 1)
    one.command("close")
    one.command("prompt", text=PROMPTS[1])
    assert one.next_chunk() is None and one.closed and one.video.live is None and one.prompt == PROMPTS[0]
    with pytest.raises(ValueError, match="is closed"):
        one.command("pause")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("jump", {}, "name must be one of prompt, pause, .*, got 'jump'"),
        ("pause", {"now": 1}, "pause takes no arguments; got 'now'"),
        ("prompt", {}, "text must be a text that is not empty, got None"),
        ("prompt", {"text": "  "}, "text must be a text"),
        ("prompt", {"text": "a flying elephant"}, "unknown word 'flying'"),
        (
            "prompt",
            {"text": PROMPTS[1], "mode": "cut"},
            "mode must be one of switch, recompute, fade, forget, got 'cut'",
        ),
        ("prompt", {"text": PROMPTS[1], "mode": ["fade"]}, "mode must be one of"),
        ("prompt", {"text": PROMPTS[1], "chunks": 0}, "chunks must be a whole number from 1 to 1000, got 0"),
        ("step", {"chunks": True}, "chunks must be a whole number from 1 to 1000, got True"),
        ("restart", {"seed": -1}, "seed must be a whole number from 0"),
        ("restart", {"seed": "7"}, "seed must be a whole number from 0"),
        ("restart", {"prompt": 7}, "prompt must be a text"),
        ("steps", {}, "steps must be a whole number from 1 to 100, got None"),
        ("steps", {"steps": 2.5}, "steps must be a whole number"),
        ("fps", {"fps": float("nan")}, "fps must be a number from 0.1 to 240, got nan"),
        ("fps", {"fps": 1e-300}, "fps must be a number from 0.1 to 240, got 1e-300"),
        ("fps", {"fps": 1e308}, "fps must be a number from"),
        ("fps", {"fps": -1}, "fps must be a number from"),
        ("fps", {"fps": 0}, "fps must be a number from 0.1"),
        ("fps", {"fps": 10**5000}, "got a number of 16610 bits"),
        ("steps", {"steps": 10**5000}, "got a number of 16610 bits"),
        (["fps"], {}, "name must be one of"),
        ("image", {}, "image needs the argument image"),
        (
            "image",
            {"image": torch.zeros(3, 8, 8)},
            r"image must be a tensor \(3, 32, 32\) in \[-1,1\], got \(3, 8, 8\)",
        ),
        ("image", {"image": "cat.png"}, "got str"),
    ],
)
def test_bad_commands_are_refused_at_once(name: str, arguments: dict, message: str) -> None:
    one = session()
    with pytest.raises(ValueError, match=message):
        one.command(name, **arguments)
    assert one.state()["pending"] == 0 and one.command("pause") == 1  # a refused one has no number


def test_bad_options() -> None:
    made = pipeline(Sampling(2))
    for options, message in [
        (Options(""), "prompt must be a text"),
        (Options(PROMPTS[0], seed=-1), "seed must be"),
        (Options(PROMPTS[0], steps=0), "steps must be"),
        (Options(PROMPTS[0], chunk=3), "chunk must be at most 2"),
        (Options(PROMPTS[0], fps=1e9), "fps must be"),
        (Options(PROMPTS[0], image=torch.zeros(3, 32, 32)), "needs a frame-wise model"),
    ]:
        with pytest.raises(ValueError, match=message):
            Session(made, options)
    with pytest.raises(ValueError, match="needs a frame-wise model"):
        Session(made, Options(PROMPTS[0])).command("image", image=torch.zeros(3, 32, 32))


def test_a_record_has_room_for_so_many_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond them a session still pauses, goes on and closes, and what it has made can be made again."""
    monkeypatch.setattr(module, "MAX_COMMANDS", 6)
    monkeypatch.setattr(module, "MAX_PICTURES", 1)
    one, shown = session(), []
    one.command("image", image=torch.zeros(3, 32, 32))
    with pytest.raises(ValueError, match="at most 6 commands, 1 with a picture"):
        one.command("image", image=torch.zeros(3, 32, 32))
    for seed in range(5):
        for name, arguments in (("pause", {}), ("resume", {}), ("restart", {"seed": seed})):
            one.command(name, **arguments)
        shown.append(one.next_chunk().frames)
    with pytest.raises(ValueError, match="pause, resume, step, close go on"):
        one.command("fps", fps=20)
    one.command("pause")
    assert one.next_chunk() is None
    one.command("step")
    shown.append(one.next_chunk().frames)
    one.command("resume")
    shown.append(one.next_chunk().frames)
    assert [entry["name"] for entry in one.record()["commands"]] == ["image"] + ["restart"] * 5
    again = [made.frames for made in Session.replay(pipeline(TWO_STEP), json.loads(json.dumps(one.record())))]
    assert all(torch.equal(a, b) for a, b in zip(shown, again, strict=True))
    one.command("close")
    assert one.next_chunk() is None and one.closed


@pytest.mark.parametrize(
    "command",
    [Prompt("a red circle" + ', "[{' * 60), Field("speed", [[[[1.0]]]] * 4), Keys((), ("w", "a", "s", "d"))],
    ids=lambda command: command.name,
)
def test_whatever_a_session_takes_can_be_read_again(command: Command) -> None:
    """As many of a kind as it takes, with all the punctuation that they may hold."""
    one = session()
    one._log = [Recorded(number, command, number) for number in range(module.MAX_COMMANDS)]
    one.sequence = one._started = module.MAX_COMMANDS
    with pytest.raises(ValueError, match="a session's record holds at most 10000 commands"):
        one.command("fps", fps=20)
    assert command.entries * module.MAX_COMMANDS <= module.MAX_ENTRIES
    assert command.letters * module.MAX_COMMANDS <= module.MAX_LETTERS
    record = json.loads(json.dumps(one.record()))
    assert len(parse_record(json.dumps(record, indent=1).encode()).commands) == module.MAX_COMMANDS


def test_a_record_has_room_for_so_many_letters_and_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than a replay file may hold is refused when it is told."""
    monkeypatch.setattr(module, "MAX_LETTERS", 200)
    monkeypatch.setattr(module, "MOST_PIXELS", 2 * 32 * 32)
    one = session()
    for name, told in (("restart", {"prompt": PROMPTS[0]}), ("image", {"image": torch.zeros(3, 32, 32)})):
        with pytest.raises(ValueError, match=r"2048 pixels together, 40000 numbers of .*, and 200 letters"):
            for _ in range(10):
                one.command(name, **told)
                one.take_commands()
                one._started += 1


def test_ten_thousand_commands_fold() -> None:
    """They stand for what a slider and an impatient hand send while one chunk is made, or none."""
    one = session()
    for number in range(2500):
        one.command("fps", fps=1 + number % 100)
        one.command("steps", steps=1 + number % 3)
        one.command("pause" if number % 2 else "resume")
        one.command("prompt", text=PROMPTS[number % 2], mode=("switch", "fade", "recompute", "forget")[number % 4])
        if number % 10 == 0:
            one.take_commands()
    one.command("pause")
    one.command("resume")
    made = one.next_chunk()
    assert made is not None and made.commands[-1].number == 10_002 and len(made.commands) == module.MAX_TOLD
    assert len(one.record()["commands"]) <= 6
    one.command("close")
    assert one.next_chunk() is None


PICTURES = [torch.full((3, 32, 32), shade) for shade in (-0.5, 0.5)]
TOLD = st.one_of(
    st.builds(
        lambda text, mode, chunks: ("prompt", {"text": text, "mode": mode, "chunks": chunks}),
        st.sampled_from(PROMPTS), st.sampled_from(["switch", "recompute", "fade", "forget"]), st.integers(1, 3),
    ),
    st.sampled_from([("pause", {}), ("resume", {}), ("step", {"chunks": 1}), ("restart", {})]),
    st.sampled_from([("steps", {"steps": 1}), ("steps", {"steps": 2}), ("fps", {"fps": 9})]),
    st.sampled_from([("restart", {"seed": 3}), ("image", {"image": None})]),
    st.sampled_from([("restart", {"prompt": PROMPTS[1]})] + [("image", {"image": picture}) for picture in PICTURES]),
)  # fmt: skip


@settings(max_examples=examples(25))
@given(st.lists(st.lists(st.tuples(TOLD, st.booleans()), max_size=7), min_size=2, max_size=5))
def test_what_is_folded_makes_the_same_frames(borders: list[list[tuple[tuple[str, dict], bool]]]) -> None:
    """Whatever is told between two chunks, taken at once or together: the record is short and replays bit for bit."""
    one, shown = session(seed=2), []
    for told in borders:
        for (name, arguments), is_taken in told:
            one.command(name, **arguments)
            if is_taken:
                one.take_commands()
        made = one.next_chunk()
        if made is None:
            one.command("resume")
            made = one.next_chunk()
        shown.append(made.frames)
    record = json.loads(json.dumps(one.record()))
    again = [made.frames for made in Session.replay(pipeline(TWO_STEP), record)]
    assert all(torch.equal(a, b) for a, b in zip(shown, again, strict=True))
    names = [(entry["at"], entry["name"]) for entry in record["commands"]]
    assert all(a != b for a, b in pairwise(names) if a[1] != "prompt")


def test_prompts_that_leave_things_open_replay_as_they_were_filled() -> None:
    """The second of two at one border is filled from the first, which no chunk shows: then the record keeps both."""
    one = session(seed=2)
    shown = pictures(one, 1)
    one.command("prompt", text="a small green triangle moves left slowly on a light background")
    one.command("prompt", text="a circle")
    shown += pictures(one, 1)
    said = one.video.scene.said
    assert said == "a small green circle moves left slowly on a light background"
    for text in ("a blue triangle moves up", PROMPTS[0], PROMPTS[1]):  # what says all needs no other
        one.command("prompt", text=text)
    one.command("restart", seed=7)
    one.command("prompt", text="a square", mode="switch")
    shown += pictures(one, 2)
    record = json.loads(json.dumps(one.record()))
    texts = [entry["arguments"].get("text", entry["name"]) for entry in record["commands"]]
    assert texts[1:] == ["a circle", PROMPTS[1], "restart", "a square"]
    again = Session.of(pipeline(TWO_STEP), checked_record(record))
    made = list(again.replayed())
    assert all(torch.equal(chunk.frames, frames) for chunk, frames in zip(made, shown, strict=True))
    assert again.video.scene.said == one.video.scene.said


def test_a_paused_video_holds_one_text_for_frames_to_come() -> None:
    one = session()
    pictures(one, 2)
    one.command("pause")
    for number in range(9):
        one.command("prompt", text=PROMPTS[number % 2], mode="switch")
        one.take_commands()
    assert one.video.live is not None and [at for at, _ in one.video.live._spans] == [0, 2]


# ---- records


def told() -> tuple[Session, list[Tensor]]:
    """A session with every command in it, and what it showed."""
    one, shown = session(seed=9, image=torch.rand(3, 32, 32) * 2 - 1), []
    script = {
        1: [("prompt", {"text": PROMPTS[1]})],
        3: [("prompt", {"text": PROMPTS[0], "mode": "fade", "chunks": 3}), ("fps", {"fps": 12})],
        6: [("steps", {"steps": 1}), ("prompt", {"text": "a green square", "mode": "switch"})],
        8: [("pause", {}), ("step", {"chunks": 2})],
        11: [("restart", {"seed": 4, "prompt": PROMPTS[1]})],
        13: [("image", {"image": torch.rand(3, 32, 32) * 2 - 1})],
    }
    while one.sequence < 16:
        for name, arguments in script.pop(one.sequence, []):
            one.command(name, **arguments)
        made = one.next_chunk()
        if made is None:
            one.command("resume")
            continue
        shown.append(made.frames)
    return one, shown


def test_a_record_replays_bit_for_bit() -> None:
    one, shown = told()
    record = json.loads(json.dumps(one.record()))
    again = list(Session.replay(pipeline(TWO_STEP), record))
    assert [chunk.sequence for chunk in again] == list(range(16))
    assert all(torch.equal(chunk.frames, frames) for chunk, frames in zip(again, shown, strict=True))
    assert [entry["at"] for entry in record["commands"]] == [1, 3, 3, 6, 6, 8, 8, 10, 11, 13]
    assert not any(torch.equal(a, b) for a, b in zip(shown[2:], pictures(session(seed=9), 16)[2:], strict=True))


def test_bad_records() -> None:
    record = json.loads(json.dumps(told()[0].record()))
    made = pipeline(TWO_STEP)

    def refused(message: str, **changes: object) -> None:
        with pytest.raises(ValueError, match=message):
            list(Session.replay(made, copy.deepcopy(record) | changes))

    refused("must have the format causalreel-session/1, got 'x'", format="x")
    refused("was made with the model 'other', this is 'small'", model="other")

    def refused_command(message: str, **changes: object) -> None:
        refused(f"command 1: .*{message}", commands=[{"at": 0, "name": "pause", "arguments": {}} | changes])

    refused("options holds 'colour', which is not known", options={"prompt": PROMPTS[0], "colour": 1})
    refused("options is not complete: prompt is missing", options={"seed": 1})
    refused("options must be an object, got 7", options=7)
    refused("prompt must be a text", options={"prompt": None})
    refused("seed must be a whole number", options={"prompt": PROMPTS[0], "seed": 0.5})
    refused("the record holds 'more', which is not known", more=1)
    refused("policy must be one of renew, slide", policy="roll")
    refused("model must be a text", model=["small"])
    refused("weights must be a text", weights={})
    refused("commands must be a list of at most 10000", commands={})
    refused("commands must be a list of at most 10000", commands=[0] * 10_002)
    refused("command 1: it must be an object, got None", commands=[None])
    refused("command 1: it is not complete: arguments is missing", commands=[{"at": 1}])
    refused("chunks must be a whole number", chunks="many")
    refused("chunks must be a whole number from 0 to 134217728", chunks=1 << 40)
    refused_command("closes the session at chunk 0 of 16", name="close")
    refused_command("name must be one of", name="rm")
    refused_command("name must be one of", name=["pause"])
    refused_command("at must be a whole number from 0 to 16, got 17", at=17)
    refused_command("arguments must be an object", arguments=[])
    refused_command("text must be a text", name="prompt", arguments={"text": "x" * 10_001})
    refused_command("a picture must be an object", name="image", arguments={"image": "cat.png"})
    order = [{"at": at, "name": "pause", "arguments": {}} for at in (3, 2)]
    refused("command 2: at must be a whole number from 3 to 16, got 2", commands=order)
    image = record["options"]["image"]
    refused("must have 300000 bytes", options=record["options"] | {"image": image | {"height": 1000, "width": 100}})
    refused("cannot be read", options=record["options"] | {"image": image | {"zlib": "AAAA"}})
    refused("cannot be read", options=record["options"] | {"image": image | {"zlib": 7}})
    refused("together", options=record["options"] | {"image": image | {"height": 16384, "width": 16384}})
    other = image | {"height": 16, "width": 64}
    refused("pictures are 64x16 pixels, the model's videos 32x32", options=record["options"] | {"image": other})
    with pytest.raises(ValueError, match="must have the format"):
        Session.replay(made, [1])  # type: ignore[arg-type] - at once, before the first chunk


def test_files_that_are_no_records(tmp_path: Path) -> None:
    record = json.dumps(told()[0].record())
    path = tmp_path / "a.json"
    path.write_bytes(b"\xef\xbb\xbf" + record.encode())
    assert read_record(path).chunks == 16
    for data, message in [
        (b"", "it is not JSON"),
        (b"\x89PNG\r\n\xff", "it is not a text file in UTF-8"),
        (b'{"chunks": 1' + b"0" * 5000 + b"}", "it is not JSON"),
        (b"[" * 100_000, "it is not JSON"),
        (b"[[],[]," * 100_000, "more than 340010 values"),
        (b'{"format": "comfy"}', "must have the format causalreel-session/1, got 'comfy'"),
        (b'{"format": ["causalreel-session/1"]}', "must have the format"),
        (record.encode()[:-5], "it is not JSON"),
    ]:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            read_record(path)
        assert str(error.value).startswith(f"{path}: ") and len(str(error.value)) < 400
    with pytest.raises(FileNotFoundError, match="no replay file at"):
        read_record(tmp_path / "b.json")


HOSTILE = """
import base64, json, zlib
from causalreel.serve.records import parse_record

def record(pictures=(), **more):
    commands = [{"at": 0, "name": "image", "arguments": {"image": one}} for one in pictures]
    return json.dumps({"format": "causalreel-session/1", "model": "tiny", "policy": "renew", "options": {"prompt": "x"},
        "commands": commands, "chunks": 1} | more).encode()

def picture(height, width, size=None):
    stream, size = zlib.compressobj(), size or height * width * 3
    data = b"".join(stream.compress(bytes(1 << 20)) for _ in range(-(-size >> 20))) + stream.flush()
    return {"height": height, "width": width, "zlib": base64.b64encode(data).decode()}

files = {
    "one large picture": record([picture(8192, 8191)]),
    "many": record([picture(1000, 1000)] * 64),
    "more in it than it says": record([picture(64, 64, 1 << 30)]),
    "too large": record([picture(8193, 8193, 1)]),
    "values": b"[" + b"0," * 10_000_000 + b"0]",
    "nested": record(more=0)[:-1] + b', "x": ' + b"[" * 190_000 + b"]" * 190_000 + b"}",
    "a long prompt": record(options={"prompt": "x" * (20 << 20)}),
    "a long key": record(**{"k" * (20 << 20): 1}),
    "a long number": record(chunks=1)[:-2] + b"1" * (20 << 20) + b"}",
}
"""
READ = """
for name, data in files.items():
    try:
        print(name, len(parse_record(data).commands), sep=": ")
    except ValueError as error:
        assert len(str(error)) < 400, name
        print(name, str(error)[:160], sep=": ")
"""


def test_a_replay_file_takes_no_more_memory_than_its_pictures_may(tmp_path: Path) -> None:
    """192 MiB are the pixels of all pictures together; none of the rest is held more than a few times."""
    said = work_within(192 + 160, READ, setup=HOSTILE).output
    lines = dict(line.split(": ", 1) for line in said.splitlines())
    assert len(lines) == 9 and lines["one large picture"] == "1" and lines["many"] == "64"
    assert lines["more in it than it says"] == "1"  # what is beyond its size is never made
    assert "together" in lines["too large"] and "more than 340010 values" in lines["values"]


def test_what_the_frames_depend_on_is_recorded() -> None:
    made = pipeline(TWO_STEP)
    record = checked_record(json.loads(json.dumps(session().record())))
    assert record.differences(made) == []
    with torch.no_grad():
        next(made.denoiser.parameters()).add_(1)
    assert record.differences(made) == ["the weights are others"]
    slower = dataclasses.replace(
        made, sampling=dataclasses.replace(TWO_STEP, first_steps=(1000.0, 750.0, 500.0, 250.0))
    )
    (told,) = [said for said in record.differences(slower) if said.startswith("sampling")]
    was, now = told.removeprefix("sampling was ").split(", is ")
    assert was == "steps (1000 500), first_steps (1000 750 500)" and now == f"{was[:-1]} 250)"
    old = dataclasses.replace(record, model="other", made_by={"version": "0.0.1"})
    assert old.differences(pipeline(TWO_STEP)) == [
        "model was other, is small",
        f"version was 0.0.1, is {causalreel.__version__}",
    ]


def test_what_was_recorded_is_told_whole_and_in_one_line_however_long() -> None:
    made = pipeline(TWO_STEP)
    record = checked_record(json.loads(json.dumps(session().record())))
    for name in POLICIES:
        recorded = described(policy_from(name, frames=1_000_000, chunk=1))
        other = dataclasses.replace(record, made_by={**record.made_by, "context": recorded})
        (told,) = other.differences(made)
        assert told == f"context was {recorded}, is {record.made_by['context']}"
    for text in ("sink\n" * 2000, "sink\u202e" * 2000):
        other = dataclasses.replace(record, made_by={**record.made_by, "context": text})
        (told,) = other.differences(made)
        assert told.isprintable() and len(told) < 2000 and told.endswith(f", is {record.made_by['context']}")


def test_a_record_of_an_earlier_version_may_name_the_same_context_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The export's own, which keeps everything, where a window of whole chunks comes of it, or the family's policy."""
    made = pipeline(TWO_STEP)
    made = dataclasses.replace(made, export=dataclasses.replace(made.export, frames=5))
    tiny = families.FAMILIES["tiny"]
    for longer, differences in ((None, []), ("infinity-rope", ["context was full, is infinity-rope"])):
        monkeypatch.setitem(families.FAMILIES, "tiny", dataclasses.replace(tiny, longer=longer))
        record = checked_record(Session(made, Options(PROMPTS[0], chunk=2)).record())
        assert record.differences(made) == []
        old = dataclasses.replace(record, made_by={**record.made_by, "context": "full"})
        assert [said.partition(":")[0] for said in old.differences(made)] == differences
    renewed = checked_record(Session(made, Options(PROMPTS[0], chunk=2), policy="renew").record())
    assert renewed.made_by["context"] == "full" and renewed.differences(made) == []


def test_a_replay_pauses_at_its_end_and_goes_on_where_somebody_takes_over() -> None:
    one, shown = told()
    record = checked_record(one.record())
    again = Session.of(pipeline(TWO_STEP), record)
    made = [again.next_chunk() for _ in range(16)]
    assert all(torch.equal(a.frames, b) for a, b in zip(made, shown, strict=True))
    assert again.next_chunk() is None and again.paused and again.state()["replaying"] == 16
    again.command("resume")
    assert again.next_chunk().prompt == one.prompt and again.state()["replaying"] is None
    again = Session.of(pipeline(TWO_STEP), record)
    again.next_chunk()
    again.command("pause")
    assert again.next_chunk() is None and again.state()["replaying"] == 16
    again.command("resume")
    assert torch.equal(again.next_chunk().frames, shown[1])
    again.command("prompt", text="a green square")
    assert {again.next_chunk().prompt for _ in range(16)} == {"a green square"} and not again.paused
    assert [entry["name"] for entry in again.record()["commands"]] == ["resume", "prompt", "prompt"]


# ---- the next chunk is begun while one is decoded --------------------------------------------------------------------


def tell(one: Session, chunk: int) -> None:
    """Commands between two chunks: of every kind, and some that end in a pause."""
    if chunk % 5 == 1:
        one.command("prompt", text=PROMPTS[chunk % 2], mode=("switch", "recompute", "fade", "forget")[chunk % 4])
    if chunk % 7 == 3:
        one.command("steps", steps=1 + chunk % 2)
    if chunk % 11 == 6:
        one.command("restart", seed=chunk)


@pytest.mark.parametrize("seed", range(3))
def test_chunks_begun_ahead_are_those_made_in_turn(seed: int) -> None:
    """The record says before which chunk each command took effect; played in turn it makes the same bits."""
    one, shown, draw = session(seed=seed), [], torch.Generator().manual_seed(seed)
    for chunk in range(24):
        before = one._count
        tell(one, chunk)
        is_ahead = bool(torch.randint(0, 2, (), generator=draw))
        begun = one._begun is not None
        made = one.next_chunk(ahead=lambda is_ahead=is_ahead: is_ahead)
        assert made.sequence == chunk and made.first_frame == sum(len(other.frames) for other in shown)
        told_for_it = [command.number for command in made.commands]
        assert max(told_for_it, default=0) <= (before if begun else one._count)
        shown.append(made)
    record = json.loads(json.dumps(one.record()))
    assert record["chunks"] == 24
    again = list(Session.replay(pipeline(TWO_STEP), record))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(again, shown, strict=True))
    numbers = [command.number for made in shown for command in made.commands]
    assert numbers == sorted(numbers) and len(set(numbers)) == len(numbers)
    ahead = Session.of(pipeline(TWO_STEP), checked_record(record))
    early = [ahead.next_chunk(ahead=lambda: True) for _ in range(24)]
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(early, shown, strict=True))
    assert ahead.next_chunk(ahead=lambda: True) is None and ahead.paused  # and nothing was begun beyond its end


def test_a_pause_holds_back_what_is_begun_and_a_close_drops_it() -> None:
    one, free = session(), session()
    expected = pictures(free, 5)
    got = [one.next_chunk(ahead=lambda: True).frames]
    one.command("pause")
    assert one.next_chunk(ahead=lambda: True) is None and one.state()["sequence"] == 1
    one.command("step")
    got.append(one.next_chunk(ahead=lambda: True).frames)
    assert one.next_chunk(ahead=lambda: True) is None
    one.command("resume")
    got += [one.next_chunk(ahead=lambda: True).frames for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert one._begun is not None
    one.command("close")
    assert one.next_chunk(ahead=lambda: True) is None and one._begun is None and one.closed


def test_a_restart_lets_the_begun_chunk_be_shown_before_it() -> None:
    one, free = session(seed=1), session(seed=1)
    expected = pictures(free, 3)
    got = [one.next_chunk(ahead=lambda: True) for _ in range(2)]
    one.command("restart")
    got += [one.next_chunk(ahead=lambda: True) for _ in range(2)]
    assert torch.equal(got[2].frames, expected[2]) and got[2].commands == ()
    assert torch.equal(got[3].frames, expected[0]) and [c.name for c in got[3].commands] == ["restart"]


def test_a_chunk_that_fails_ahead_fails_in_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    one = session()
    inner = Live.next_chunk

    def fail(self: Live, fields: object = None) -> object:
        if self.frame == 2:
            raise RuntimeError("no more")
        return inner(self, fields)

    monkeypatch.setattr(Live, "next_chunk", fail)
    shut = session()
    for _ in range(2):
        shut.next_chunk(ahead=lambda: True)
    assert shut._failure is not None  # nobody has been told yet
    shut.close()
    assert shut._failure is None and shut.next_chunk() is None
    assert len([one.next_chunk(ahead=lambda: True) for _ in range(2)]) == 2
    with pytest.raises(RuntimeError, match="no more"):
        one.next_chunk(ahead=lambda: True)


class _Event:
    """Stands in for a GPU's."""

    def elapsed_time(self, end: object) -> float:
        return 1500.0


class _Stream:
    def __init__(self, said: list[str], name: str) -> None:
        self.said, self.name = said, name

    def wait_event(self, event: object) -> None:
        self.said.append(f"{self.name} waits for latents")

    def wait_stream(self, other: object) -> None:
        self.said.append(f"{self.name} waits for the other")


def test_streams_wait_for_each_other_where_they_have_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps that a GPU's streams go through, told by stand-ins: what is begun early waits for no pixels."""
    said: list[str] = []
    here, side = _Stream(said, "pixels"), _Stream(said, "latents")
    one = session()
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: here)
    monkeypatch.setattr(begun, "side_stream", lambda device: side)
    monkeypatch.setattr(begun, "aside", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(begun, "_mark", lambda device, clock: _Event())
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: said.append(f"latents stay for {stream.name}"))
    monkeypatch.setattr(begun, "is_gpu", lambda device: True)
    made = [one.next_chunk(ahead=lambda: True), one.next_chunk()]
    assert [chunk.sequence for chunk in made] == [0, 1] and made[0].timings == Timings(1.5, 1.5)
    decoded = ["pixels waits for latents", "latents stay for pixels"]
    assert said == ["latents waits for the other", *decoded, *decoded]
