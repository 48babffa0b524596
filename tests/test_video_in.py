"""One decoder of videos: frames by their time, upright and in shape, and no more than is wanted of any file."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch import Tensor

from causalreel.data.video import write_video
from causalreel.data.video_in import read_video
from ceilings import examples, work_within

TICKS = 6000
"""Of the clock of the test's files in a second."""


def written(
    path: Path,
    times: Sequence[float],
    *,
    codec: str = "libx264",
    format: str = "yuv420p",
    size: tuple[int, int] = (64, 96),
    aspect: Fraction | None = None,
    rate: int = 30,
) -> Path:
    """A file whose frames, at these times in seconds, are as bright as they are late: 0 to 240 in three seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, format
        stream.codec_context.time_base = stream.time_base = Fraction(1, TICKS)
        stream.options = {"crf": "10", "bf": "0"} if codec == "libx264" else {}
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        for time in times:
            picture = np.full((*size, 3), min(255, round(80 * (time - times[0]))), np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=format)
            frame.pts, frame.time_base = round(TICKS * time), Fraction(1, TICKS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def brightness(video: Tensor) -> list[float]:
    return ((video.mean((1, 2, 3)) + 1) * 127.5).tolist()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_title_that_is_not_text(suffix: str, tmp_path: Path) -> None:
    """PyAV decodes metadata as it opens a file, each version in its own way."""
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "AN OLD TITLE"
        stream = container.add_stream("mpeg4", rate=16)
        stream.width = stream.height = 64
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 200, np.uint8))))
        container.mux(stream.encode())
    known = path.read_bytes()
    assert b"AN OLD TITLE" in known
    path.write_bytes(known.replace(b"AN OLD TITLE", b"\xff\xfe\xe9 \x80\xc3(TLE!!"[:12]))
    video, _ = read_video(path)
    assert video.shape == (4, 3, 64, 64) and abs(sum(brightness(video)) / 4 - 200) < 3


@pytest.mark.parametrize("rate", [12, 16, 24, 25, 30, 60, 120])
@pytest.mark.parametrize("start", [0.0, 1.4])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_frames_are_picked_by_their_time(rate: int, start: float, suffix: str, tmp_path: Path) -> None:
    """Three seconds are three seconds, and each frame is the one shown then."""
    path = written(tmp_path / f"a{suffix}", [start + i / rate for i in range(3 * rate)], rate=rate)
    video, fps = read_video(path, fps=16)
    assert fps == 16 and abs(len(video) - 48) <= (suffix == ".mkv")  # whose last frame may have no length
    expected = [80 * (int(i / 16 * rate + 0.05 * rate / 16) / rate) for i in range(len(video))]
    assert np.abs(np.array(brightness(video)) - expected).max() < 4
    assert len(read_video(path)[0]) == 3 * rate


def test_uneven_times(tmp_path: Path) -> None:
    """A frame is held until the next is due, however long that takes; frames in haste are passed over."""
    times = [0, 0.01, 0.02, 0.5, 2.0, 2.01, 2.75]
    video, _ = read_video(written(tmp_path / "a.mp4", times), fps=4)
    assert (
        np.abs(
            np.array(brightness(video)[:12]) - 80 * np.array([0] + [0.02] + [0.5] * 6 + [2] + [2.01] * 2 + [2.75])
        ).max()
        < 3
    )


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize("is_mirrored", [False, True])
def test_videos_stand_upright(quarter: int, is_mirrored: bool, tmp_path: Path) -> None:
    """The matrix of an mp4's track turns and mirrors: what comes out is what went in."""
    upright = torch.full((3, 64, 96), -1.0)
    upright[0, :32], upright[2, 32:], upright[1, :32, :48] = 1, 1, 1  # yellow and red above blue
    stored = torch.rot90(upright, quarter, (1, 2))
    stored = stored.flip(2) if is_mirrored else stored
    path = tmp_path / "a.mp4"
    write_video(path, stored.expand(9, -1, -1, -1))
    turn = np.round(
        [
            [np.cos(np.pi / 2 * quarter), np.sin(np.pi / 2 * quarter)],
            [-np.sin(np.pi / 2 * quarter), np.cos(np.pi / 2 * quarter)],
        ]
    )
    mirror = np.diag([-1 if is_mirrored else 1, 1])
    (a, b), (c, d) = (mirror @ turn).astype(int) * 65536
    data, identity = path.read_bytes(), struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))
    path.write_bytes(data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :])
    for video in (read_video(path)[0], read_video(path, size=(64, 96))[0]):
        assert (video[3] - upright).abs().mean() < 0.1


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", [0, 0.1], size=(64, 48), aspect=Fraction(2))
    assert read_video(path)[0].shape == (2, 3, 64, 96)
    white = written(tmp_path / "b.mp4", [0, 3], size=(64, 48), aspect=Fraction(2))
    padded = read_video(white, size=(96, 96), how="pad")[0][1]
    assert (padded[0] > 0).any(1).sum() == 64 and (padded[0] > 0).any(0).sum() == 96


@pytest.fixture
def as_scheduled() -> Iterator[None]:
    """SVT-AV1 gives the process that encodes with it real-time priority if root runs it; its children inherit that, and
    on a single core nothing else runs any more."""
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    yield
    os.sched_setscheduler(0, *before)


@pytest.mark.usefixtures("as_scheduled")
@pytest.mark.parametrize(
    ("name", "codec", "format", "size"),
    [
        ("a.mp4", "libx264", "yuv420p10le", (64, 96)),
        ("a.mkv", "libx264", "yuv444p", (63, 95)),
        ("a.webm", "libvpx-vp9", "yuv420p", (63, 95)),
        ("a.webm", "libvpx-vp9", "yuva420p", (64, 96)),
        ("a.mkv", "libsvtav1", "yuv420p10le", (64, 96)),
        ("a.avi", "mjpeg", "yuvj422p", (64, 96)),
        ("a.avi", "mpeg4", "yuv420p", (64, 96)),
        ("a.mkv", "ffv1", "gray", (64, 96)),
        ("a.gif", "gif", "rgb8", (64, 96)),
        ("a.apng", "apng", "rgba", (64, 96)),
        ("a.ts", "libx264", "yuv420p", (64, 96)),
        ("a.mov", "prores_ks", "yuva444p10le", (64, 96)),
    ],
)
def test_other_codecs(name: str, codec: str, format: str, size: tuple[int, int], tmp_path: Path) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV without {codec}")
    video, _ = read_video(
        written(tmp_path / name, [i / 30 for i in range(60)], codec=codec, format=format, size=size), fps=16
    )
    assert video.shape[1:] == (3, *size) and 31 <= len(video) <= 33
    assert np.abs(np.array(brightness(video)[:30]) - 5 * np.arange(30)).max() < (25 if codec == "gif" else 8)


def test_no_more_is_decoded_than_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from causalreel.data import video_in

    path = written(tmp_path / "a.mp4", [i / 30 for i in range(90)])
    decoded = []
    frames = video_in._frames
    monkeypatch.setattr(video_in, "_frames", lambda *given: (decoded.append(1) or each for each in frames(*given)))
    assert len(read_video(path, fps=16, frames=16)[0]) == 16
    assert len(decoded) <= 31


def test_large_frames_fits_in_little_memory(tmp_path: Path) -> None:
    setup = """
import torch
from causalreel.data.video import write_video
from causalreel.data.video_in import read_video
path = arguments[0]
write_video(path, (torch.zeros(3, 1080, 1920, dtype=torch.uint8) for _ in range(120)), crf=40)
read_video(path, frames=2, fps=16, size=(64, 64))
"""
    cost = work_within(
        400, "print(len(read_video(arguments[0], fps=16, size=(64, 64))[0]))", str(tmp_path / "a.mp4"), setup=setup
    )
    assert cost.output == "120\n" and cost.peak_mib < 100


def test_what_cannot_be_read_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = written(tmp_path / "whole.mkv", [i / 30 for i in range(90)]).read_bytes()
    sound = tmp_path / "sound.mkv"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    cases = [
        ("empty.mp4", b"", "cannot be read as a video"),
        ("text.mp4", b"words " * 100, "cannot be read as a video"),
        ("head.mkv", whole[:900], "cannot be read as a video|holds no"),
        ("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nwhole.mkv\n#EXT-X-ENDLIST\n", "cannot be read"),
        ("list.mp4", b"ffconcat version 1.0\nfile whole.mkv\n", "cannot be read"),
        ("sound.mkv", sound.read_bytes(), "holds no video stream, only audio"),
    ]
    for name, data, message in cases:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as found:
            read_video(tmp_path / name, fps=16)
        assert "\n" not in str(found.value) and name in str(found.value)
    with pytest.raises(FileNotFoundError, match="no video file at"):
        read_video(tmp_path / "none.mp4")
    assert not caplog.records


def test_a_file_that_was_cut_off_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = written(tmp_path / "a.mkv", [i / 30 for i in range(90)], codec="mjpeg", format="yuvj420p")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    video, _ = read_video(path, fps=16)
    assert 8 < len(video) < 30
    assert "a.mkv is damaged or was cut off" in caplog.text


def test_a_frame_of_absurd_size_and_frames_in_absurd_haste_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from causalreel.data import video_in

    monkeypatch.setattr(video_in, "PIXELS", 6000)
    path = written(tmp_path / "a.mp4", [0, 0.1])
    with pytest.raises(ValueError, match="at most 6000 pixels, got 96x64"):
        read_video(path)
    monkeypatch.undo()
    monkeypatch.setattr(video_in, "RATE", 100)
    path = written(tmp_path / "b.mp4", [i / TICKS for i in range(200)])
    with pytest.raises(ValueError, match="more than 100 frames in a second"):
        read_video(path, fps=16)
    video, _ = read_video(written(tmp_path / "c.mp4", [0, 0.1, 30_000]), fps=16, frames=20)  # held for hours
    assert len(video) == 20


def test_names_that_look_like_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [
        "12:30.mp4",
        "concat:a|b.mp4",
        "%03d.mp4",
        "-x.mp4",
        "http:x.mkv",
        "a b\u2028.mov",
        "pipe:.gif",
        "ü" * 125 + ".webm",
    ]
    for name in names:
        write_video(name, torch.zeros(2, 3, 16, 16))
        assert read_video(name)[0].shape[0] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    with pytest.raises(ValueError, match="names have at most 255 bytes here, got 256"):
        write_video("x" * 252 + ".mp4", torch.zeros(2, 3, 16, 16))


def test_damaged_videos_raise_nothing_but_value_errors(tmp_path: Path) -> None:
    """Bytes of each kind changed and cut at random: what comes out is frames, or one line."""
    kinds = [("a.mp4", "libx264", "yuv420p"), ("a.mkv", "libx264", "yuv420p"), ("a.webm", "libvpx-vp9", "yuv420p")]
    kinds += [("a.avi", "mjpeg", "yuvj422p"), ("a.gif", "gif", "rgb8"), ("a.ts", "libx264", "yuv420p")]
    times = [i / 30 for i in range(12)]
    files = [written(tmp_path / n, times, codec=codec, format=form).read_bytes() for n, codec, form in kinds]
    chance = random.Random(7)
    for number in range(examples(150)):
        data = bytearray(files[number % len(files)])
        for _ in range(chance.choice((1, 3, 30, 200))):
            data[chance.randrange(min(len(data), chance.choice((128, 1024, len(data)))))] = chance.randrange(256)
        data = data[: chance.randrange(len(data))] if chance.random() < 0.2 else data
        (tmp_path / "x.mp4").write_bytes(data)
        try:
            assert len(read_video(tmp_path / "x.mp4", fps=16, size=(16, 16), frames=9)[0]) <= 9
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
