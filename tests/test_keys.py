"""Keys and cameras steer a live video: by every way in, from the next chunk on, and again from its record."""

from __future__ import annotations

import copy
import io
import itertools
import json
import math
import os
import select
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import causalreel
from causalreel import config, families
from causalreel.cli import main
from causalreel.control.steering import Course, Steering
from causalreel.control.strings import latent_poses
from causalreel.foreign import holds_more
from causalreel.infer import values
from causalreel.infer.commands import parse, parse_line
from causalreel.infer.live import Live
from causalreel.infer.models import profile
from causalreel.infer.steered import Steered
from causalreel.nn.camera import ACTIONS, W2C
from causalreel.serve import records
from causalreel.serve import session as session_module
from causalreel.serve.emitted import Emitted
from causalreel.serve.keyboard import Terminal, keys_in, read_keys
from causalreel.serve.play import Typed, play, read_script
from causalreel.serve.session import Options, Session
from causalreel.weights.export import Export
from ceilings import examples
from patience import wait_until
from served import coded, opened, picture, serving, until
from steered import DEGREES, PROMPT, STEERING, STEP, painted, random_pipeline, read_view, turned
from test_session import Clock

KEYS = STEERING.names


def session(chunk: int = 1, **how: Any) -> Session:
    return Session(painted(chunk), Options(PROMPT, **how), policy="slide")


def last_view(made: Emitted) -> tuple[float, float, float]:
    return read_view(made.frames[-1].permute(2, 0, 1).float() / 127.5 - 1)


# ---- the course of a camera ------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from(KEYS), max_size=4), max_size=12))
@settings(max_examples=examples(60), deadline=None)
def test_opposite_keys_undo_each_other(frames: list[list[str]]) -> None:
    """With half a turn before the step and half behind it: a way and its opposite, backwards, lead to the start."""
    opposite = {"w": "s", "s": "w", "a": "d", "d": "a", "left": "right", "right": "left"}
    course = Course(STEERING)
    course.next(1)
    for pressed in frames:
        course.press(pressed)
        (frame,) = course.next(1)
        assert frame.keys == STEERING.counting(list(dict.fromkeys(pressed)))
    for pressed in reversed(frames):
        course.press([opposite[key] for key in dict.fromkeys(pressed)])
        course.next(1)
    assert np.abs(course.pose - np.eye(4)).max() < 1e-12


def test_the_first_frame_is_the_identity_and_a_group_counts_its_latest_key() -> None:
    steering = replace(STEERING, actions=("first", *STEERING.actions))
    course = Course(steering)
    course.press(["w", "left", "d", "w"])
    first, second = course.next(2)
    assert first.keys == () and np.array_equal(first.c2w, np.eye(4))
    assert first.actions == [1, 1, 0, 0, 0, 0, 1, 0, 0]
    assert second.keys == ("d", "left") and second.actions == [0, 0, 0, 0, 0, 1, 0, 1, 0]
    assert np.allclose(np.linalg.inv(second.c2w), second.w2c)


def test_minwm_keys_are_its_strings() -> None:
    """Keys that are held live give the poses of the trajectory string in that dialect."""
    course = Course(Steering(keys=(("w", "s"), ("a", "d"), ("j", "l"), ("i", "k"))))
    found = [frame.c2w for frame in course.next(1)]
    for key, count in (("w", 3), ("l", 4), ("a", 1)):
        course.press([key])
        found += [frame.c2w for frame in course.next(count)]
    assert np.abs(np.stack(found) - latent_poses("w*3,l*4,a*1", "minwm")).max() < 1e-12


def test_given_poses_are_followed_with_the_keys_that_they_come_nearest_to() -> None:
    course, keyed = Course(STEERING), Course(STEERING)
    keyed.press(["w", "left"])
    way = keyed.next(5)
    course.next(1)
    course.follow([frame.c2w for frame in way[1:]])
    followed = course.next(4)
    assert [frame.keys for frame in followed] == [("w", "left")] * 4
    assert all(np.array_equal(a.c2w, b.c2w) for a, b in zip(followed, way[1:], strict=True))
    still, moved = course.next(1)[0], (course.press(["w", "left"]), course.next(1)[0])[1]
    assert np.array_equal(still.c2w, way[-1].c2w) and still.keys == ()
    assert np.abs(moved.c2w - keyed.next(1)[0].c2w).max() < 1e-12


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"keys": (("w", "q"),)}, "keys must be some of w, s, "),
        ({"keys": (("w",), ("w",))}, "each once"),
        ({"step": 0}, "step must be positive"),
        ({"intrinsics": (969.0, 969.0, 960.0, 540.0)}, "intrinsics must be normalised"),
        ({"actions": ("w", "none q")}, "actions: 'none q' is neither a key"),
    ],
)
def test_what_an_export_says_of_its_keys_is_checked(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(STEERING, **changes)


def test_an_export_keeps_its_keys() -> None:
    export = random_pipeline().export
    assert config.loads(config.dump(export), Export) == export
    with pytest.raises(ValueError, match=r"control.actions must have the model's 3 columns, got 8"):
        replace(export, model=replace(export.model, actions=3))


# ---- in a session ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_key_moves_the_pixels_from_the_next_chunk_on_and_not_before(chunk: int) -> None:
    one = session(chunk)
    seen = [last_view(one.next_chunk())]
    for pressed in (["right"], ["right"], [], ["left", "w"], ["w"], []):
        one.command("keys", pressed=pressed)
        seen.append(last_view(one.next_chunk()))
    ways = [round(turned(a[0], b[0]) / DEGREES / chunk) for a, b in itertools.pairwise(seen)]
    assert ways == [1, 1, 0, -1, 0, 0]
    went = [b[2] - a[2] for a, b in itertools.pairwise(seen)]
    assert all(abs(went[place]) < 0.06 for place in (0, 1, 2, 5)) and all(w > 0.2 * chunk for w in went[3:5])


def test_a_receipt_names_the_chunk_and_the_frame() -> None:
    one = session()
    one.next_chunk()
    assert one.state()["applied"] is None
    number = one.command("keys", pressed=["w", "left"])
    assert number == 1 and one.state()["keys"] == [] and one.state()["pending"] == 1  # received
    made = one.next_chunk()
    (applied,) = made.commands
    assert (applied.number, applied.chunk, applied.frame) == (1, 1, 1) == (1, made.sequence, made.first_frame)
    assert one.state()["applied"] == {"number": 1, "name": "keys", "chunk": 1, "frame": 1}
    assert one.state()["keys"] == ["w", "left"] and made.keys == ("w", "left")
    (where,) = made.camera
    assert (round(where.yaw), where.y) == (-DEGREES, 0) and 0.9 * STEP < where.z <= STEP


def test_the_latest_state_counts_and_is_all_that_a_record_keeps() -> None:
    one = session()
    one.next_chunk()
    for pressed in (["w"], ["w", "a"], [], ["left"]):
        one.command("keys", pressed=pressed)
    one.next_chunk()
    for _ in range(50):  # said again, as a client does that sends its state over and over
        one.command("keys", pressed=["left"])
        one.next_chunk()
    record = json.loads(json.dumps(one.record()))
    assert [entry["arguments"] for entry in record["commands"]] == [{"pressed": ["left"], "tapped": ["w", "a"]}]


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_key_that_is_pressed_and_let_go_of_between_two_borders_counts_in_the_next_chunk(chunk: int) -> None:
    """Told as two states or as one that names it; once, and a key that was held before stops when it is let go of."""
    one = session(chunk)
    before = last_view(one.next_chunk())
    ways = []
    for states in (
        [{"pressed": ["right"]}, {}],
        [],
        [{"tapped": ["left"]}],
        [{}],
        [{"pressed": ["right"]}],
        [{}],
        [{"pressed": ["right"]}, {"pressed": ["right"], "tapped": ["left"]}],
        [],
        [{"pressed": ["left", "right"]}, {}],
    ):
        for state in states:
            one.command("keys", **state)
        made = one.next_chunk()
        ways.append(round(turned(before[0], last_view(made)[0]) / DEGREES / chunk))
        before = last_view(made)
    assert ways == [1, 0, -1, 0, 1, 0, -1, 1, 1]  # at last the right key went down behind the left one
    assert made.keys == ("left", "right") and one.state()["keys"] == []


def test_a_tap_before_the_first_frame_counts_in_the_second() -> None:
    """In the first frame no key does."""
    one = session()
    one.command("keys", tapped=["right"])
    seen = [last_view(one.next_chunk())[0] for _ in range(3)]
    assert [round(yaw / DEGREES) for yaw in seen] == [0, 1, 1]


messages = st.tuples(st.permutations(KEYS).map(lambda keys: keys[:2]), st.permutations(KEYS).map(lambda keys: keys[4:]))


@given(st.lists(st.lists(st.one_of(messages, st.just(None)), max_size=4), max_size=8))
@settings(max_examples=examples(150), deadline=None)
def test_what_a_course_says_of_its_keys_is_all_that_is_to_be_known(borders: list[list[Any]]) -> None:
    """One state in place of all messages of a border, and of the string between them: the same from then on."""
    one, again = Course(STEERING), Course(STEERING)
    for told in borders:
        for message in told:
            if message is None:
                one.follow([])
            else:
                one.press(*message)
        if told and told[-1] is not None:
            again.press(one.pressed, one.tapped)
        elif told:
            again.follow([])
        for course in (one, again):
            course.next(1)
        assert (one.told, one.pressed) == (again.told, again.pressed) and np.array_equal(one.pose, again.pose)


def steer(one: Session, seed: int, chunks: int) -> list[Tensor]:
    """Commands at random between chunks, with prompts and restarts between them -> the frames."""
    draw = np.random.default_rng(seed)
    shown = []
    for _ in range(chunks):
        for _ in range(draw.integers(0, 3)):
            kind = draw.integers(0, 8)
            if kind < 4:
                held = draw.permutation(list(KEYS))[: draw.integers(0, 4)].tolist()
                short = draw.permutation(list(KEYS))[: max(0, draw.integers(-3, 3))].tolist()
                one.command("keys", pressed=held, tapped=short)
            elif kind == 4:
                one.command("trajectory", dialect="minwm", text=f"{draw.choice(['w', 'j', 'd'])}*{draw.integers(1, 4)}")
            elif kind == 5:
                pose = np.eye(4)
                pose[:3, 3] = draw.uniform(-1, 1, 3)
                intrinsics = [0.6, 0.6, 0.5, 0.5] if draw.integers(0, 2) else None
                one.command("camera", poses=pose, convention=draw.choice(["c2w", "w2c"]).item(), intrinsics=intrinsics)
            elif kind == 6:
                one.command("prompt", text="a blue square moves left", mode=draw.choice(["switch", "recompute"]).item())
            else:
                one.command("restart", seed=int(draw.integers(0, 9)))
        shown.append(one.next_chunk().frames)
    return shown


@pytest.mark.parametrize("seed", range(3))
def test_a_record_makes_the_same_frames_again(seed: int) -> None:
    made = random_pipeline()
    one = Session(made, Options(PROMPT))
    shown = steer(one, seed, 12)
    record = json.loads(json.dumps(one.record()))
    again = [chunk.frames for chunk in Session.replay(made, record)]
    assert len(again) == 12 and all(torch.equal(a, b) for a, b in zip(again, shown, strict=True))
    assert not all(torch.equal(shown[0], frames) for frames in shown[1:])


def test_keys_reach_the_network_frame_by_frame() -> None:
    """A session's fields are those of a course that is steered the same way; behind a restart it begins anew."""
    made, told = random_pipeline(), []
    inner = Live.next_chunk

    def watch(self: Live, fields: dict[str, Tensor] | None = None) -> Any:
        told.append(copy.copy(fields))
        return inner(self, fields)

    one = Session(made, Options(PROMPT))
    course = Course(STEERING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Live, "next_chunk", watch)
        for turn, pressed in enumerate((["w"], ["w", "left"], [], ["d"])):
            if turn == 3:
                one.command("restart")
                course.begin()
            one.command("keys", pressed=pressed)
            course.press(pressed)
            one.next_chunk()
            (frame,) = course.next(1)
            assert np.allclose(told[-1][W2C][0, 0].numpy(), frame.w2c, atol=1e-6)
            assert told[-1][ACTIONS][0, 0].tolist() == frame.actions


def test_segments_see_the_cameras_from_their_first_frame() -> None:
    """Which changes nothing where heads see through cameras, and keeps numbers small on a long way."""
    made, poses = random_pipeline(), []
    network = made.denoiser.model
    views = network.views
    network.views = lambda fields: (poses.append(fields[W2C]), views(fields))[1]  # type: ignore[method-assign]
    near, far = Session(made, Options(PROMPT)), Session(made, Options(PROMPT))
    far_off = np.eye(4)
    far_off[:3, 3] = 500.0, 0.0, 300.0
    for one in (near, far):
        one.next_chunk()
    far.command("camera", poses=far_off)
    near.command("camera", poses=np.eye(4))
    for one in (near, far):
        one.next_chunk()
        one.command("restart")
    shown = []
    for one, start in ((near, np.eye(4)), (far, far_off)):
        one.command("camera", poses=start)
        one.command("keys", pressed=["w", "left"])
        shown.append([one.next_chunk() for _ in range(40)])
    far_seen = max(float(pose[..., :3, 3].abs().max()) for pose in poses[-40:])
    assert far_seen < 20 * STEP
    assert shown[1][-1].camera[0].x > -200


# ---- ways in, and what is refused ------------------------------------------------------------------------------------


def test_keys_are_typed_scripted_and_sent(tmp_path: Path) -> None:
    assert parse_line("/keys w left") == parse_line("/keys w+left") == parse({"name": "keys", "pressed": ["w", "left"]})
    assert parse_line("/keys").pressed == ()
    assert parse_line("/trajectory minwm w*4,l*2").text == "w*4,l*2"
    script = tmp_path / "script"
    script.write_text(
        '0.2 /keys right\n{"time": 1.0, "command": "keys", "pressed": []}\n1.5 /switch a blue square moves left\n'
    )
    known = replace(profile("tiny/frame-1step"), export=painted().export)
    one, said = session(), list[str]()
    timed = read_script(script, known)
    made = list(play(one, frames=33, script=timed, typed=Typed(io.StringIO("/keys q\n")), say=said.append))
    yaws = [last_view(chunk)[0] for chunk in made]
    assert yaws[0] == pytest.approx(0, abs=1) and yaws[5] == pytest.approx(yaws[-1], abs=1)
    assert yaws[4] == pytest.approx(3 * DEGREES, abs=1.5)  # from the border at frame 5 on
    assert made[-1].prompt == "a blue square moves left"
    assert "not understood: keys: unknown 'q', did you mean 'a'?; there are w, s, a, d, left, right" in said
    script.write_text("3 /keys jump\n")
    with pytest.raises(ValueError, match="script:1: keys: unknown 'jump'"):
        read_script(script, known)
    with pytest.raises(ValueError, match=r"script:1: tiny/frame-1step has no keys and no camera; prompts steer it"):
        read_script(script, profile("tiny/frame-1step"))


def test_timed_keys_of_a_file(tmp_path: Path) -> None:
    known = replace(profile("tiny/frame-1step"), export=painted().export)
    path = tmp_path / "keys"
    path.write_text("# a turn\n0.3 right\n\n1.0\n")
    script = read_keys(str(path), known, 16.0)
    assert [(one.time_s, one.command.pressed) for one in script] == [(0.3, ("right",)), (1.0, ())]
    made = list(play(session(), frames=33, script=script))
    yaws = [last_view(chunk)[0] for chunk in made]
    assert yaws[4] == pytest.approx(3 * DEGREES, abs=1.5) == pytest.approx(yaws[-1], abs=1.5)
    for text, words in (
        ("1 jump", "keys:1: keys: unknown 'jump'"),
        ("soon w", "keys:1: expected seconds and what is"),
        (
            "1 w\n\n0.5",
            "keys:3: 0.5 s is before 1 s: a script cannot go back in time",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_keys(str(path), known, 16.0)
    with pytest.raises(ValueError, match="has no keys and no camera; prompts steer it"):
        read_keys(str(path), profile("tiny/frame-1step"), 16.0)


@pytest.mark.parametrize("chunk", [1, 2])
def test_keys_without_a_file_lead_a_stream_where_they_lead_a_clip(chunk: int, tmp_path: Path) -> None:
    """At chunk borders, by which pieces last here; behind them the camera stays."""
    known = replace(profile("tiny/frame-1step"), export=painted().export)
    told = "left+w none*2,d*4" if chunk == 2 else "w*2 left+w*3,none d right"
    one, poses = session(chunk), []
    for _ in play(one, frames=61, script=read_keys(told, known, one.fps)):
        poses += [frame.w2c for frame in one.video.seen]
    clip = Steered(keys=told).fields(STEERING, None)["w2c"][0].double().numpy()
    np.testing.assert_allclose(poses[: len(clip)], clip, atol=1e-6)
    np.testing.assert_allclose(poses[len(clip) :], np.broadcast_to(clip[-1], (len(poses) - len(clip), 4, 4)), atol=1e-6)
    assert len(poses) > len(clip) > 6
    long = read_keys(", ".join(["w*2", "d"] * 500), known, one.fps)  # longer than a file's name can be
    assert len(long) == 1001 and long[-1].command.pressed == ()
    with pytest.raises(
        ValueError, match=r"^there is no file 'w\*2,q', and read as keys: keys: unknown 'q', did you mean"
    ):
        read_keys("w*2,q", known, one.fps)
    with pytest.raises(
        ValueError, match=r"^there is no file 'keys.txt', and read as keys: keys: cannot read 'keys.txt'"
    ):
        read_keys("keys.txt", known, one.fps)


def test_ten_thousand_prompts_full_of_commas_can_be_read_again() -> None:
    """What a JSON text is made of counts outside of its strings alone."""
    text = "a red circle" + 20 * ", " + 'it \\" moves [{ right'
    entry = {"name": "prompt", "arguments": {"text": text, "mode": "recompute", "chunks": 4}}
    commands = [{"number": 1 + at, "at": at, **entry} for at in range(records.MAX_COMMANDS)]
    kept = {"format": records.FORMAT, "model": "tiny", "policy": "renew", "options": {"prompt": text}}
    record = records.parse_record(json.dumps({**kept, "commands": commands, "chunks": 10_000}, indent=1).encode())
    assert len(record.commands) == records.MAX_COMMANDS and record.commands[-1].command.text == text


def test_keys_of_a_terminal_count_until_they_are_not_heard_any_more() -> None:
    """Letters and arrows, several at once; the space bar lets go."""
    assert keys_in("w\x1b[D\x1bOC\x1b[5~x ") == (["w", "left", "right", "x", " "], "")
    upper, lower = os.openpty()
    clock, one = Clock(), session()
    with os.fdopen(lower) as file, Terminal(file, clock=clock) as terminal:

        def heard(data: bytes, seconds: float) -> list[str]:
            os.write(upper, data)
            if data:
                wait_until(lambda: bool(select.select([lower], [], [], 0)[0]), "the keys")
            terminal.attend(one)
            clock.now += seconds
            one.next_chunk()
            return one.state()["keys"]

        assert heard(b"w", 0.3) == ["w"] and heard(b"\x1b[D", 0.2) == ["w", "left"]
        assert heard(b"", 0.3) == ["w", "left"] and heard(b"", 0.3) == ["left"]
        assert heard(b"d", 0.1) == ["d"] and heard(b" ", 0.1) == []
        for part, held in ((b"\x1b", []), (b"[", []), (b"C", ["right"]), (b"\xc3", ["right"]), (b"\xa4 ", [])):
            assert heard(part, 0.1) == held  # a sequence may come in parts
        assert heard(b"a ", 0.1) == [] and one.video.keys_told == ("a",)  # pressed and let go of between two borders
    os.close(upper)
    with pytest.raises(ValueError, match="--keys terminal needs a terminal"):
        Terminal(io.StringIO())


@pytest.mark.parametrize(
    "more, words",
    [
        (["--keys", "keys", "-o", "a.mp4", "--frames", "9"], "tiny/frame-1step has no keys and no camera"),
        (["--keys", "terminal", "--stdin"], "--keys terminal and --stdin exclude each other"),
        (["--keys", "terminal", "-o", "a.mp4", "--frames", "9"], "--keys terminal needs a window, or --realtime"),
    ],
)
def test_keys_that_cannot_be_are_refused_before_the_work(
    more: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "keys").write_text("1 w")
    assert main(["stream", "a red circle", "--model", "tiny/frame-1step", *more]) != 0
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said and not (tmp_path / "a.mp4").exists()


def test_a_server_says_which_keys_there_are_takes_them_and_tells_of_them() -> None:
    with serving(painted()) as client:
        control = client.get("/v1/model").json()["control"]
        assert control["keys"] == [["w", "s", "a", "d"], ["left", "right"]] and control["has_camera"]
        assert control["motions"]["left"] == [0, 0, 0, -1, 0] and control["latent_frames_per_s"] == 4
        id = opened(client, PROMPT)
        with client.websocket_connect(f"/v1/sessions/{id}/stream") as socket:
            until(socket, lambda m: m["type"] == "chunk")
            socket.send_json({"type": "command", "id": "a", "name": "keys", "pressed": ["w"]})
            seen = until(socket, lambda m: m["type"] == "chunk" and bool(m["commands"]))
            (ack,) = [m for m in seen if m["type"] == "ack"]
            chunk = seen[-1]
            (applied,) = chunk["commands"]
            assert ack["number"] == applied["number"] and chunk["keys"] == ["w"]
            assert (applied["chunk"], applied["frame"]) == (chunk["sequence"], chunk["first_frame"])
            x, y, z, yaw, pitch = chunk["camera"][0]
            assert (x, y, yaw, pitch) == (0, 0, 0, 0) and z == STEP
            socket.send_json({"type": "command", "id": "b", "name": "keys", "pressed": ["lefft"]})
            wrong = until(socket, lambda m: m["type"] == "error")[-1]
            assert wrong["message"].startswith(
                "keys: unknown 'lefft', did you mean 'left'?; there are w, s, a, d, left"
            )


def pose(**changes: float) -> list[list[float]]:
    made = np.eye(4)
    for place, value in changes.items():
        made[int(place[1]), int(place[2])] = value
    return made.tolist()


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "keys", "pressed": ["W"]}, "keys: unknown 'W', did you mean 'w'?; there are w, s, a, d, left, right"),
    ({"name": "keys", "pressed": "w"}, "pressed must be a list of at most 32 words, got 'w'"),
    ({"name": "keys", "pressed": ["w"] * 33}, "pressed must be a list of at most 32 words, got"),
    ({"name": "keys", "pressed": [7]}, "pressed[0] must be a name without spaces, got 7"),
    ({"name": "camera", "poses": [[1.0, 0], [0, 1.0]]}, "camera: expected numbers (N,4,4)"),
    ({"name": "camera", "poses": pose(_00=2.0)}, "camera: the upper left of pose 0 is no rotation"),
    ({"name": "camera", "poses": [pose(), pose(_33=2.0)]}, "camera: the last row of pose 1 is"),
    ({"name": "camera", "poses": pose(_03=math.nan)}, "poses must be a number, or at most 4096 in lists"),
    ({"name": "camera", "poses": pose(), "convention": "c2c"}, "convention must be one of c2w, w2c, got 'c2c'"),
    (
        {"name": "camera", "poses": pose(), "intrinsics": [969, 969, 960, 540]},
        "camera: intrinsics: got a focal length of 969 as a normalised one; it looks like pixels: divide by",
    ),
    ({"name": "trajectory", "dialect": "minvm", "text": "w*3"}, "dialect must be one of minwm, worldplay, lingbot"),
    ({"name": "trajectory", "dialect": "minwm", "text": "w*1000000"}, "trajectory: leads through 1,000,000 latent"),
    (
        {"name": "trajectory", "dialect": "lingbot", "text": "w-4008"},
        "trajectory: leads through 1,002 latent frames, at",
    ),
    ({"name": "trajectory", "dialect": "minwm", "text": "w-3"}, "trajectory: cannot read 'w-3'; expected pieces such"),
    ({"name": "trajectory", "dialect": "minwm", "text": "e*3"}, "trajectory: unknown key 'e', did you mean"),
    (
        {"name": "field", "field": "w2c", "value": pose()},
        "the field 'w2c' of this model follows the keys: tell it keys",
    ),
]


def test_what_cannot_be_is_refused_in_a_line_and_changes_nothing() -> None:
    one = session()
    for given_, words in BAD:
        with pytest.raises(ValueError) as error:
            one.command(parse(given_))
        assert str(error.value).startswith(words) and "\n" not in str(error.value)
        assert one.state()["pending"] == 0
    plain = Session(causalreel.load("tiny/frame-1step", device="cpu"), Options(PROMPT))
    for given_ in ({"name": "keys", "pressed": ["w"]}, {"name": "camera", "poses": pose()}):
        with pytest.raises(ValueError, match="tiny/frame-1step has no keys and no camera; prompts steer it"):
            plain.command(parse(given_))
    with pytest.raises(ValueError, match="the field 'actions' of this model follows the keys"):
        session(fields={"actions": [0] * 8})


def test_a_video_from_a_picture_is_steered_from_its_second_frame_on() -> None:
    with serving(painted()) as client:
        id = opened(client, PROMPT, image=coded(picture(64, 64)))
        one = client.app.state.service.handle(id).session
        assert one.video.scene.picture is not None
    one = Session(painted(), Options(PROMPT, image=torch.zeros(64, 64, 3, dtype=torch.uint8)), policy="slide")
    one.command("keys", pressed=["right"])
    assert [round(last_view(one.next_chunk())[0] / DEGREES) for _ in range(3)] == [0, 1, 2]


def test_a_family_says_which_keys_its_models_have_and_an_export_overrules_it(monkeypatch: pytest.MonkeyPatch) -> None:
    export = random_pipeline().export
    mine = replace(STEERING, degrees=9.0)
    family = replace(families.of(export), control=mine)
    monkeypatch.setitem(families.FAMILIES, export.family, family)
    assert families.steering(export) is STEERING
    assert families.steering(replace(export, control=None)) is mine
    plain = replace(export, control=None, model=replace(export.model, camera="none", actions=0))
    assert families.steering(plain) is None


def test_what_a_command_holds_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many commands a session holds: the hundredth costs what the first did."""
    counted: list[object] = []
    count = values.count
    monkeypatch.setattr(values, "count", lambda given: counted.append(given) or count(given))
    one = session()
    for number in range(100):
        one.command("keys", pressed=[KEYS[number % 2]])
        one.video.course.next(1)  # a border, at which nobody makes a chunk
        one._started += 1
        one.take_commands()
    assert len(one._log) == 100 and 100 <= len(counted) <= 2 * 100


def test_a_full_record_still_lets_go_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_COMMANDS", 3)
    monkeypatch.setattr(records, "MAX_COMMANDS", 3)
    one, shown = session(), []
    for pressed in (["left"], [], ["left"]):
        one.command("keys", pressed=pressed)
        shown.append(one.next_chunk().frames)
    with pytest.raises(ValueError, match="at most 3 commands"):
        one.command("keys", pressed=["right"])
    one.command("keys", pressed=[])
    shown.append(one.next_chunk().frames)
    assert one.state()["keys"] == [] and torch.equal(shown[-1][-1], shown[-2][-1])
    with pytest.raises(ValueError, match="at most 3 commands"):
        one.command("keys", pressed=["right"])
    again = Session.replay(painted(), json.loads(json.dumps(one.record())))
    assert all(torch.equal(made.frames, frames) for made, frames in zip(again, shown, strict=True))


def test_a_record_full_of_poses_and_keys_can_be_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth of the commands and numbers that a session takes, in a tenth of what a file may hold."""
    monkeypatch.setattr(session_module, "MAX_COMMANDS", records.MAX_COMMANDS // 10)
    monkeypatch.setattr(session_module, "MAX_ENTRIES", records.MAX_ENTRIES // 10)
    one, refused = session(), list[str]()
    one.next_chunk()
    for at in range(1100):
        poses = np.tile(np.eye(4), (20, 1, 1)).tolist()
        told = {"name": "camera", "poses": poses} if at % 50 == 0 else {"name": "keys", "pressed": KEYS[: at % 2]}
        try:
            one.command(parse(told))
        except ValueError as error:
            refused.append(str(error))
        one.video.course.next(1)  # a border, at which nobody makes a chunk
        one._started += 1
        one.take_commands()
    assert "holds at most 1000 commands, 64 with a picture, of 67108864 pixels together, 4000 numbers of" in refused[0]
    one.sequence = one._started
    data = json.dumps(one.record()).encode()
    assert not holds_more(data.decode(), records.MOST_VALUES // 10)
    record = records.parse_record(data)
    assert sum(entry.command.entries for entry in record.commands) > 3_600 and len(record.commands) > 900
