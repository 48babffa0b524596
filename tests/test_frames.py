"""Chunks as pictures, H.264 units, pipes and files; scripts and typed lines; the command `stream`."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from torch import Tensor

import causalreel
from causalreel import cli
from causalreel.cli.flags import ModelFlags
from causalreel.data import colour
from causalreel.data.video_in import read_video
from causalreel.infer.commands import Close, Field, Pause, Prompt, Rate, Restart, Step, Steps, parse_line
from causalreel.infer.models import profile
from causalreel.serve.frames import H264Encoder, codec_string, pipe, stills, write_mp4
from causalreel.serve.play import Timed, Typed, play, read_script
from causalreel.serve.session import Options, Session
from causalreel.weights import export as exports
from test_infer import PROMPTS, pipeline
from test_live import TWO_STEP
from test_weights import SMALL, small_denoiser, small_export, small_family


def picture(frames: int = 6, side: int = 64) -> Tensor:
    """(frames,side,side,3) uint8: soft colours that move."""
    x = torch.linspace(0, 3, side)
    waves = [(x[None, :] + shift * x[:, None] + 0.1 * t).sin() for t in range(frames) for shift in (0.3, 1.0, -0.6)]
    return ((torch.stack(waves).view(frames, 3, side, side) + 1) * 127).to(torch.uint8).permute(0, 2, 3, 1)


def near(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert a.shape == b.shape
    assert (a.float() - b.float()).abs().mean() < tolerance


def decode(data: list[bytes]) -> Tensor:
    decoder = av.CodecContext.create("h264", "r")
    frames = [frame for unit in data for frame in decoder.decode(av.Packet(unit))] + decoder.decode(None)
    assert all(frame.colorspace == colour.BT709 and frame.color_range == colour.LIMITED for frame in frames)
    return torch.stack([torch.from_numpy(colour.to_rgb(frame)) for frame in frames])


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_stills(format: str) -> None:
    frames = picture(3)
    files = stills(frames, format, quality=90)
    back = [Image.open(io.BytesIO(data)) for data in files]
    assert [image.format for image in back] == [format.upper()] * 3
    for image, frame in zip(back, frames, strict=True):
        near(torch.tensor(list(image.convert("RGB").getdata())).view(64, 64, 3), frame, 3)
    assert len(stills(frames, format, quality=20)[0]) < len(files[0])


def test_h264_units_come_at_once_and_from_any_keyframe() -> None:
    frames, encoder = picture(12), H264Encoder(64, 64, 16)
    units = encoder.encode(frames[:5]) + encoder.encode(frames[5:], keyframe=True)
    assert len(units) == 12 and all(unit.data.startswith(b"\0\0\0\1") for unit in units)
    assert [i for i, unit in enumerate(units) if unit.is_keyframe] == [0, 5]
    near(decode([unit.data for unit in units]), frames, 5)
    near(decode([unit.data for unit in units[5:]]), frames[5:], 5)  # nothing from before is needed
    assert encoder.codec is not None and encoder.codec.startswith("avc1.42c0") and len(encoder.codec) == 11


def test_h264_keyframes_come_by_themselves() -> None:
    units = H264Encoder(64, 64, 4, keyframe_s=1).encode(picture(9))
    assert [i for i, unit in enumerate(units) if unit.is_keyframe] == [0, 4, 8]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: stills(picture(1), "png"), "format must be jpeg or webp, got 'png'"),
        (lambda: stills(picture(1), quality=0), "quality must be 1 to 100, got 0"),
        (lambda: stills(picture(1)[0]), "frames must be"),
        (lambda: H264Encoder(63, 64, 16), "even height and width, got 63 x 64"),
        (lambda: H264Encoder(64, 64, 0), "fps must be positive"),
        (lambda: H264Encoder(64, 64, 16).encode(picture(1, 32)), "frames must be"),
        (lambda: codec_string(b"\0\0\1\x68abc"), "no sequence parameter set"),
        (lambda: pipe(io.BytesIO(), [picture(1)], 16, "avi"), "format must be rgb24, y4m or mp4, got 'avi'"),
    ],
)
def test_what_cannot_be_encoded(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_pipes() -> None:
    frames = picture(6)
    file = io.BytesIO()
    assert pipe(file, [frames[:1], frames[1:]], 16, "rgb24") == 6 and file.getvalue() == frames.numpy().tobytes()
    for format, rate in (("y4m", 12.5), ("mp4", 12.5)):
        file = io.BytesIO()
        assert pipe(file, [frames[:1], frames[1:]], rate, format) == 6
        file.seek(0)
        with av.open(file) as container:
            assert float(container.streams.video[0].average_rate) == pytest.approx(rate, rel=0.01)
            decoded = list(container.decode(video=0))
        assert all(frame.color_range == colour.LIMITED for frame in decoded)
        for frame in decoded:
            assert format == "y4m" or frame.colorspace == colour.BT709
            frame.colorspace = colour.BT709  # which y4m cannot say
        near(torch.stack([torch.from_numpy(colour.to_rgb(frame)) for frame in decoded]), frames, 5)


def test_files(tmp_path: Path) -> None:
    frames = picture(5)
    assert write_mp4(tmp_path / "a.mp4", [frames[:1], frames[1:]], 16) == 5
    video, rate = read_video(tmp_path / "a.mp4")
    near((video.permute(0, 2, 3, 1) + 1) * 127.5, frames, 5)
    assert rate == 16


# ---- scripts and typed lines


def test_scripts(tmp_path: Path) -> None:
    path, small = tmp_path / "script.txt", profile("tiny/frame-1step")
    Image.new("RGB", (90, 70), "red").save(tmp_path / "a.png")
    path.write_bytes(
        b'\xef\xbb\xbf# first\n\n{"time": 1, "command": "steps", "steps": 1}\n2.5 a red circle\r\n'
        b'{"time": 3, "text": "a circle"}\n{"time": 4, "command": "image", "image": "a.png"}\n'
    )
    *found, pictured = read_script(path, small)
    assert [(timed.time_s, timed.command) for timed in found] == [
        (1.0, Steps(1)),
        (2.5, Prompt("a red circle", None, 4)),
        (3.0, Prompt("a circle", None, 4)),
    ]
    assert pictured.command.picture.shape == (64, 64, 3) and pictured.time_s == 4
    for line, message in [
        ("soon a red circle", 'expected "12.5 prompt text"'),
        ("2.5", 'expected "12.5 prompt text"'),
        ("-1 a red circle", "a time must be a number of seconds"),
        ("nan a circle", "a time must be"),
        ("1e300 a circle", "a time must be"),
        ("0.5 a circle", "0.5 s is before 1 s: a script cannot go back in time"),
        ('{"time": true, "text": "a circle"}', "a time must be"),
        ('{"time": "2", "text": "a circle"}', "a time must be"),
        ('{"command": "pause"}', "there is no time"),
        ("{", "the line is no JSON"),
        ("{" + "[" * 100_000, "the line has more than 8,192 values"),
        ("{" + "[" * 8000, "the line is n"),
        ("2 a red sqare", "unknown word 'sqare'"),
        ('{"time": 0, "command": "pause"}', "0 s is before 1 s: a script cannot go back in time"),
        ('{"time": 1, "command": "jump"}', "name must be one of prompt, pause"),
        ('{"time": 1, "command": ["pause"]}', "name must be one of"),
        ('{"time": 1, "command": "pause", "now": 1}', "pause takes no arguments; got 'now'"),
        ('{"time": 1, "command": "steps", "steps": 0}', "steps must be a whole number"),
        ('{"time": 1, "command": "restart", "prompt": "an elephant"}', "unknown word 'elephant'"),
        ('{"time": 1, "command": "image", "image": "b.png"}', r"b\.png"),
        ('{"time": 1, "command": "image", "image": "script.txt"}', "cannot be read as a picture"),
        ('{"time": 1, "command": "image", "image": 7}', "image must be a text"),
    ]:
        path.write_text(f"1 a circle\n{line}\n")
        with pytest.raises(ValueError, match=rf"script\.txt:2: .*{message}"):
            read_script(path, small)
    with pytest.raises(FileNotFoundError, match="no script at"):
        read_script(tmp_path / "other.txt", small)
    path.write_text("1 a circle\n" * 10_001)
    with pytest.raises(ValueError, match="holds 10001 commands, at most 10000"):
        read_script(path, small)


def test_typed_lines() -> None:
    assert parse_line(" a red circle \n") == Prompt("a red circle") == parse_line("/prompt a red circle")
    assert parse_line("\n") is None
    assert parse_line("/fade a red circle") == Prompt("a red circle", "fade")
    assert parse_line("/step 3") == Step(3) and parse_line("/step") == Step()
    assert parse_line("/restart 7") == Restart(7) and parse_line("/fps 7.5") == Rate(7.5)
    assert parse_line("/restart 7 a red  circle") == Restart(7, "a red  circle")
    assert parse_line("/steps 2") == Steps(2) and parse_line("/close") == Close()
    assert parse_line("/field speed [0.5, 1]") == Field("speed", [0.5, 1])
    assert parse_line('{"name": "prompt", "text": "a circle", "chunks": 9}') == Prompt("a circle", chunks=9)
    for line, message in [
        ("/pause now", "pause takes no arguments; got 'now'"),
        ("/pause name", "pause takes no arguments; got 'name'"),
        ("/step 3 chunks", "step takes chunks; got 'chunks'"),
        ("/steps two", "steps must be a whole number from 1 to 100, got 'two'"),
        ("/fps 8 9", "fps takes fps; got '9'"),
        ("/restart a red circle", "seed must be a whole number from 0 to 9007199254740991, got 'a'"),
        ("/fade", "text must be a text that is not empty, got ''"),
        ("/jump 1", "name must be one of prompt, pause, .*, got 'jump'"),
        ("{", "the line is no JSON"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_line(line)


def test_play_obeys_the_script_at_its_time_and_stops_at_the_frame() -> None:
    one = Session(pipeline(TWO_STEP), Options(PROMPTS[0], fps=4))
    script = [Timed(1.3, Prompt(PROMPTS[1]))]
    made = list(play(one, frames=12, script=script))
    assert [len(chunk.frames) for chunk in made] == [1, 4, 4, 3]
    assert [chunk.prompt for chunk in made] == [PROMPTS[0], PROMPTS[0], PROMPTS[0], PROMPTS[1]]  # frame 9 is at 2.25 s
    assert made[3].commands[0].name == "prompt"
    one = Session(pipeline(TWO_STEP), Options(PROMPTS[0]))
    with pytest.raises(ValueError, match="the script pauses the video"):
        list(play(one, frames=12, script=[Timed(0, Pause())]))


def test_play_obeys_typed_lines_and_says_what_it_does_not_understand() -> None:
    one, said = Session(pipeline(TWO_STEP), Options(PROMPTS[0])), []
    typed = Typed(io.StringIO(f"/pause\n/resume\n{PROMPTS[1]}\n/dance\n"))
    while typed._lines.qsize() < 4:
        pass
    made = next(play(one, typed=typed, say=said.append))
    assert made.prompt == PROMPTS[1] and [c.name for c in made.commands] == ["pause", "resume", "prompt"]
    assert said[0].startswith("not understood: name must be one of") and "in force at frame 0" in said[-1]


# ---- the command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(exports, "ASSETS", small_family(tmp_path / "assets"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    return tmp_path


def test_stream_writes_a_file_and_a_record(place: Path) -> None:
    (place / "script.txt").write_text("0.4 a blue square moves left\n")
    how = ["--script", "script.txt", "--record", "r.json", "--device", "cpu", "--precision", "eager"]
    assert cli.main(["stream", "a red circle", "--seconds", "1", "-o", "a.mp4", *how]) == 0
    video, _ = read_video(place / "a.mp4")
    assert len(video) == 16
    record = json.loads((place / "r.json").read_text())
    assert [entry["arguments"]["text"] for entry in record["commands"]] == ["a blue square moves left"]


def test_stream_to_a_pipe(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Out(io.StringIO):
        buffer = io.BytesIO()

    monkeypatch.setattr(sys, "stdout", Out())
    assert cli.main(["stream", "--frames", "6", "-o", "-", "--pipe", "rgb24", "--device", "cpu"]) == 0
    assert len(Out.buffer.getvalue()) == 6 * 32 * 32 * 3


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--frames", "5"], "no window here"),
        (["-o", "a.mp4"], "a file needs an end"),
        (["-o", "a.txt", "--frames", "5"], "path must end in"),
        (["-o", "a.mp4", "--frames", "5", "--seconds", "1"], "exclude each other"),
        (["-o", "a.mp4", "--frames", "0"], "frames must be at least 1, got 0"),
        (["-o", "a.mp4", "--seconds", "inf"], "--seconds must be at"),
        (["-o", "a.mp4", "--seconds", "nan"], "--seconds must be at"),
        (["-o", "a.mp4", "--seconds", "-1"], "--seconds must be at"),
        (["-o", "a.mp4", "--seconds", "1", "--fps", "1e-320"], "--fps must be"),
        (["-o", "a.mp4", "--frames", "5", "--fps", "inf"], "--fps must be at"),
        (["-o", "a.mp4", "--frames", "5", "--seed", "-1"], "--seed must be at"),
        (["-o", "a.mp4", "--frames", "5", "--record", "r.txt"], "path must end in .json"),
        (["-o", "a.mp4", "--frames", "5", "--record", "no/r.json"], "no does not exist"),
        (["-o", "a.mp4", "--frames", "5", "--image", "no.png"], "no picture at no.png"),
        (["-o", "a.mp4", "--frames", "5", "--script", "bad.txt"], "bad.txt:1: unknown word 'sqare'"),
        (["-o", "a.mp4", "--frames", "5", "--script", "pause.txt"], "pauses the video at 1 s, and nothing resumes it"),
        (["-o", "a.mp4", "--frames", "5", "--fields", "{"], "--fields is no JSON"),
        (["-o", "a.mp4", "--frames", "5", "--fields", '{"actions": "up"}'], "--fields.actions must be a number"),
        (["a purple elephant", "-o", "a.mp4", "--frames", "5"], "unknown word 'purple'"),
    ],
)
def test_stream_refuses_before_it_loads(
    place: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ModelFlags, "load", None)
    (place / "bad.txt").write_text("9 a red sqare")
    (place / "pause.txt").write_text('{"time": 1, "command": "pause"}')
    assert cli.main(["stream", *args]) == 2
    assert message in capsys.readouterr().err and not list(place.glob("a.*"))


@pytest.mark.parametrize("way", ["at once", "in the script", "restarted in the script"])
def test_stream_refuses_a_prompt_that_its_picture_contradicts_before_it_loads(
    place: Path, way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the beginning, and where a script begins again, by the prompt that is in force then."""
    monkeypatch.setattr(ModelFlags, "load", None)
    Image.new("RGB", (64, 64), "white").save(place / "light.png")
    dark = "a red circle on a dark background"
    begin = '{"time": 2, "command": "image", "image": "light.png"}\n'
    scripts = {
        "in the script": f"1 {dark}\n{begin}",
        "restarted in the script": f'{begin}{{"time": 3, "command": "restart", "prompt": "{dark}"}}\n',
    }
    (place / "script.txt").write_text(scripts.get(way, ""))
    how = ["--image", "light.png"] if way == "at once" else ["--script", "script.txt"]
    words = [
        dark if way == "at once" else "a red circle",
        "--frames",
        "50",
        "-o",
        "a.mp4",
        "--model",
        "tiny/frame-1step",
    ]
    assert cli.main(["stream", *words, *how]) == 2
    said = capsys.readouterr().err
    time = {"in the script": "script.txt: at 2 s: ", "restarted in the script": "script.txt: at 3 s: "}.get(way, "")
    assert said.count("\n") == 1 and "dark" in said and time in said and not list(place.glob("a.*")), said


def test_replay_makes_the_same_frames(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "script.txt").write_text('0.4 a blue square\n{"time": 0.8, "command": "restart", "seed": 3}\n')
    how = ["--device", "cpu", "--precision", "eager"]
    line = ["stream", "a red circle", "--frames", "24", "-o", "a.mp4", "--script", "script.txt", "--record", "r.json"]
    assert cli.main([*line, *how]) == 0
    assert cli.main(["replay", "r.json", "-o", "b.mp4", "--frames", "24", *how]) == 0
    assert "may differ" not in capsys.readouterr().err
    assert torch.equal(read_video(place / "a.mp4")[0], read_video(place / "b.mp4")[0])
    record = json.loads((place / "r.json").read_text())
    (place / "r.json").write_text(json.dumps({**record, "version": "0.0.1", "weights": "x"}))
    assert cli.main(["replay", "r.json", "-o", "c.mp4", "--until", "0.5", *how]) == 0
    said = capsys.readouterr().err
    assert f"may differ from those recorded: version was 0.0.1, is {causalreel.__version__}; the weights" in said
    assert len(read_video(place / "c.mp4")[0]) == 8


@pytest.mark.parametrize(
    ("changes", "args", "message"),
    [
        ({"format": "x"}, [], "r.json: a record must have the format"),
        ({"model": "other/one"}, [], "was recorded with 'other/one'; give --model: unknown model"),
        ({"model": ["tiny"]}, [], "r.json: model must be a text"),
        ({"chunks": 0}, [], "there is nothing to replay"),
        ({"options": {"prompt": "an elephant"}}, [], "r.json: unknown word 'elephant'"),
        ({"options": {"prompt": "a circle", "chunk": 400}}, [], "r.json: chunk must be at most"),
        ({}, ["-o", "b.txt"], "path must end in"),
        ({}, ["--frames", "0"], "frames must be at least 1"),
        ({}, ["--until", "nan"], "--until must be at"),
        ({}, ["--frames", "4", "--until", "1"], "exclude each other"),
        ({}, ["--steps", "2"], "what the replay file says"),
    ],
)
def test_replay_refuses_before_it_loads(
    place: Path,
    changes: dict,
    args: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session = Session(causalreel.load("tiny", device="cpu"), Options("a red circle"))
    session.next_chunk()
    (place / "r.json").write_text(json.dumps(session.record() | changes))
    monkeypatch.setattr(ModelFlags, "load", None)
    assert cli.main(["replay", "r.json", *args]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not list(place.glob("*.mp4"))


@pytest.mark.parametrize("existed", [False, True])
def test_an_interrupted_run_keeps_the_record_that_was_there(
    place: Path, existed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Session.next_chunk

    def interrupted(self: Session, **how: object) -> object:
        if self.sequence == 3:
            raise KeyboardInterrupt
        return made(self, **how)

    monkeypatch.setattr(Session, "next_chunk", interrupted)
    if existed:
        (place / "r.json").write_text("mine")
    line = ["stream", "a red circle", "--frames", "40", "-o", "a.mp4", "--record", "r.json", "--device", "cpu"]
    assert cli.main(line) == 130
    written = place / ("r.interrupted.json" if existed else "r.json")
    assert json.loads(written.read_text())["chunks"] == 3 and not (place / "a.mp4").exists()
    assert not existed or (place / "r.json").read_text() == "mine"


def test_a_model_with_actions_is_streamed_steered_and_replayed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steered = dataclasses.replace(SMALL, actions=3)
    network = small_denoiser(steered)
    torch.nn.init.normal_(network.model.get_parameter("action_embedding.2.weight"), std=0.5)
    exports.save_export(place / "assets/tiny/walk", network, small_export("tiny/walk", model=steered))
    how = ["--model", "assets/tiny/walk", "--device", "cpu", "--precision", "eager"]
    begin = [
        "stream",
        "a red circle on a dark background",
        "--frames",
        "13",
        "--fields",
        '{"actions": [0, 0, 0]}',
        *how,
    ]
    (place / "s.jsonl").write_text('{"time": 0.3, "command": "field", "field": "actions", "value": [0, 5, 0]}\n')
    assert cli.main([*begin, "-o", "still.mp4"]) == 0
    assert cli.main([*begin, "-o", "a.mp4", "--script", "s.jsonl", "--record", "r.json"]) == 0
    assert cli.main(["replay", "r.json", "-o", "b.mp4", *how]) == 0
    still, moved, again = (read_video(place / name)[0] for name in ("still.mp4", "a.mp4", "b.mp4"))
    assert torch.equal(moved, again) and not torch.equal(moved[5:], still[5:])
    capsys.readouterr()
    (place / "s.jsonl").write_text('{"time": 0.3, "command": "field", "field": "actions", "value": [1, 0]}\n')
    assert cli.main([*begin, "-o", "c.mp4", "--script", "s.jsonl"]) == 2
    assert "actions must have the shape (3,), as at the beginning; got (2,)" in capsys.readouterr().err
    assert cli.main(["stream", "a red circle", "--frames", "5", "-o", "c.mp4", "--fields", '{"w2c": 1}', *how]) == 2
    assert "this model has no field 'w2c'; it has actions" in capsys.readouterr().err and not Path("c.mp4").exists()
