"""Chunks as pictures, H.264 units, pipes and files; scripts and typed lines; the command `stream`."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import av
import pytest
import torch
from PIL import Image
from torch import Tensor

from causalreel import cli
from causalreel.data import colour
from causalreel.data.video_in import read_video
from causalreel.serve.frames import H264Encoder, codec_string, pipe, stills, write_mp4
from causalreel.serve.play import Timed, Typed, parse_line, play, read_script
from causalreel.serve.session import Options, Session
from causalreel.weights import export as exports
from test_infer import PROMPTS, pipeline
from test_live import TWO_STEP
from test_weights import small_family


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
    path = tmp_path / "script.txt"
    path.write_text(
        '# first\n\n2.5 a red circle\n{"time": 1, "command": "steps", "steps": 1}\n{"time": 3, "text": "x"}\n'
    )
    assert read_script(path) == [
        Timed(1.0, "steps", {"steps": 1}),
        Timed(2.5, "prompt", {"text": "a red circle"}),
        Timed(3.0, "prompt", {"text": "x"}),
    ]
    for line in ("soon a red circle", "2.5", "-1 a red circle", '{"command": "pause"}', "{", "nan a circle"):
        path.write_text(f"1 a circle\n{line}\n")
        with pytest.raises(ValueError, match=r"script\.txt:2: expected"):
            read_script(path)


def test_typed_lines() -> None:
    assert parse_line(" a red circle \n") == ("prompt", {"text": "a red circle"})
    assert parse_line("\n") is None
    assert parse_line("/fade a red circle") == ("prompt", {"text": "a red circle", "mode": "fade"})
    assert parse_line("/step 3") == ("step", {"chunks": 3}) and parse_line("/step") == ("step", {})
    assert parse_line("/restart 7") == ("restart", {"seed": 7}) and parse_line("/fps 7.5") == ("fps", {"fps": 7.5})
    assert parse_line("/steps 2") == ("steps", {"steps": 2}) and parse_line("/close") == ("close", {})
    for line in ("/pause now", "/steps two"):
        with pytest.raises(ValueError):
            parse_line(line)


def test_play_obeys_the_script_at_its_time_and_stops_at_the_frame() -> None:
    one = Session(pipeline(TWO_STEP), Options(PROMPTS[0], fps=4))
    script = [Timed(1.3, "prompt", {"text": PROMPTS[1]})]
    made = list(play(one, frames=12, script=script))
    assert [len(chunk.frames) for chunk in made] == [1, 4, 4, 3]
    assert [chunk.prompt for chunk in made] == [PROMPTS[0], PROMPTS[0], PROMPTS[0], PROMPTS[1]]  # frame 9 is at 2.25 s
    assert made[3].commands[0].name == "prompt"
    one = Session(pipeline(TWO_STEP), Options(PROMPTS[0]))
    with pytest.raises(ValueError, match="the script pauses the video"):
        list(play(one, frames=12, script=[Timed(0, "pause")]))


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
    ],
)
def test_stream_refuses(place: Path, args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stream", *args]) == 2
    assert message in capsys.readouterr().err and not list(place.glob("a.*"))
