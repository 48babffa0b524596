"""Video files: what is written is read back, frames are encoded as they come, and failures leave nothing behind."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from causalreel.data.video import Spread, contact_sheet, to_bytes, write_video
from causalreel.data.video_in import read_video
from causalreel.data.world import WorldConfig, render, simulate

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("av")


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """(13,3,64,64)."""
    return render(simulate(1, seed=1, config=WorldConfig(frames=13)))[0]


def psnr(a: Tensor, b: Tensor) -> float:
    return (-10 * torch.log10(((a - b) / 2).square().mean())).item()


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_h264_round_trip(clip: Tensor, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    assert write_video(path, clip.split(4), 16, scale=4) == 13
    video, fps = read_video(path)
    assert video.shape == (13, 3, 256, 256) and fps == pytest.approx(16)
    assert psnr(video[:, :, 2::4, 2::4], clip) > 35
    assert list(tmp_path.iterdir()) == [path]
    assert read_video(path, frames=5)[0].shape[0] == 5


def test_gif_round_trip(clip: Tensor, tmp_path: Path) -> None:
    assert write_video(tmp_path / "clip.gif", clip, 10) == 13
    video, fps = read_video(tmp_path / "clip.gif")
    assert fps == pytest.approx(10) and psnr(video[[0, -1]], clip[[0, -1]]) > 30


def test_chunks_of_every_kind_are_the_same_video(clip: Tensor, tmp_path: Path) -> None:
    kinds = [clip, list(clip), clip.split(5), [clip[None]], [to_bytes(clip).permute(0, 3, 1, 2)]]
    videos = []
    for i, frames in enumerate(kinds):
        assert write_video(tmp_path / f"{i}.mp4", frames) == 13
        videos.append(read_video(tmp_path / f"{i}.mp4")[0])
    assert all(torch.equal(video, videos[0]) for video in videos)


def test_fractional_rates(clip: Tensor, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", clip, 29.97)
    assert read_video(tmp_path / "a.mp4")[1] == pytest.approx(29.97, abs=0.01)


def test_frames_are_encoded_as_they_come(clip: Tensor, tmp_path: Path) -> None:
    """The temporary file exists while the source is still producing, and the target does not."""
    seen = []

    def source() -> Iterator[Tensor]:
        for frame in clip.repeat(12, 1, 1, 1):  # longer than the encoder looks ahead
            seen.append(sorted(p.name for p in tmp_path.iterdir()))
            yield frame

    write_video(tmp_path / "a.mp4", source())
    assert seen[0] == [] and len(seen[-1]) == 1 and "partial" in seen[-1][0]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_an_error_half_way_leaves_the_old_file(clip: Tensor, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(b"before")

    def source() -> Iterator[Tensor]:
        yield clip[:5]
        raise RuntimeError("the model broke")

    with pytest.raises(RuntimeError, match="the model broke"):
        write_video(path, source())
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("name", [None, "source.mp4"])
def test_an_error_of_the_disk_names_a_file(clip: Tensor, tmp_path: Path, suffix: str, name: str | None) -> None:
    """Encoders do not say which file it was: then it is the one that is written."""
    path = tmp_path / f"a{suffix}"

    def source() -> Iterator[Tensor]:
        yield clip[:5]
        raise OSError(errno.ENOSPC, "a full disk", name)

    with pytest.raises(OSError, match="a full disk") as found:
        write_video(path, source())
    assert found.value.filename == (str(path) if name is None else name) and found.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


def test_bad_requests_are_refused_and_leave_nothing(clip: Tensor, tmp_path: Path) -> None:
    cases = [
        (ValueError, "must end in .mp4", lambda: write_video(tmp_path / "a.avi", clip)),
        (ValueError, "at least one frame", lambda: write_video(tmp_path / "a.mp4", [])),
        (ValueError, "fps", lambda: write_video(tmp_path / "a.mp4", clip, 0)),
        (ValueError, "even height and width, got 63 x 64", lambda: write_video(tmp_path / "a.mp4", clip[:, :, 1:])),
        (ValueError, "one size", lambda: write_video(tmp_path / "a.mp4", [clip, clip[..., :32]])),
        (ValueError, r"\(T,3,H,W\)", lambda: write_video(tmp_path / "a.mp4", [torch.zeros(2, 1, 8, 8)])),
        (ValueError, "uint8 or floating", lambda: write_video(tmp_path / "a.mp4", [clip.long()])),
        (FileNotFoundError, "does not exist", lambda: write_video(tmp_path / "none" / "a.mp4", clip)),
        (FileNotFoundError, "no video file", lambda: read_video(tmp_path / "a.mp4")),
        (ValueError, "one per clip", lambda: contact_sheet(clip[None], tmp_path / "a.png", ["x", "y"])),
        (ValueError, "must end in .png", lambda: contact_sheet(clip[None], tmp_path / "a.mp4")),
        (ValueError, "at least one clip", lambda: contact_sheet([], tmp_path / "a.png")),
    ]
    for kind, said, call in cases:
        with pytest.raises(kind, match=said):
            call()
    (tmp_path / "dir.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match="name a file"):
        write_video(tmp_path / "dir.mp4", clip)
    assert [p.name for p in tmp_path.iterdir()] == ["dir.mp4"]


def test_an_unwritable_directory_is_named(clip: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(PermissionError, match="is not writable"):
        write_video(tmp_path / "a.mp4", clip)


def test_a_file_that_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not a video at all")
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_video(tmp_path / "a.mp4")


def test_extreme_values_are_clipped_and_nan_is_grey() -> None:
    frame = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0, float("nan")]).view(1, 1, 6).expand(3, 1, 6)
    assert to_bytes(frame)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255, 128]


def test_contact_sheet_shows_first_to_last_frame(tmp_path: Path) -> None:
    shades = torch.linspace(-1, 1, 9).view(1, 9, 1, 1, 1).expand(2, 9, 3, 16, 20)
    contact_sheet(shades, tmp_path / "a.png", columns=3)
    sheet = torch.from_numpy(numpy.array(Image.open(tmp_path / "a.png")))
    assert sheet.shape == (2 * 20, 3 * 20 + 2 * 2, 3)
    assert [sheet[5, x, 0].item() for x in (5, 27, 49)] == [0, 128, 255]


def test_contact_sheet_labels_take_room_and_ink(clip: Tensor, tmp_path: Path) -> None:
    contact_sheet([clip, clip[:5]], tmp_path / "a.png", ["a red circle", "a blue square " * 20], columns=4, scale=2)
    contact_sheet([clip, clip[:5]], tmp_path / "b.png", columns=4, scale=2)
    labelled, plain = Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")
    assert labelled.width == plain.width and labelled.height > plain.height + 24
    assert min(labelled.crop((0, 0, labelled.width, 12)).convert("L").tobytes()) < 100


def test_frames_of_a_gif_keep_the_rate(clip: Tensor, tmp_path: Path) -> None:
    """Its clock counts hundredths of a second, of which 1/16 s is no whole number."""
    write_video(tmp_path / "a.gif", clip.repeat(3, 1, 1, 1)[:33], 16)
    with Image.open(tmp_path / "a.gif") as picture:
        total = 0
        for number in range(picture.n_frames):
            picture.seek(number)
            total += picture.info["duration"]
    assert abs(total / 1000 - 33 / 16) <= 0.01


@pytest.mark.parametrize("count", [1, 5, 33, 500])
def test_a_sheet_of_a_long_clip_holds_few_frames(count: int) -> None:
    spread = Spread(columns=8)
    for start in range(0, count, 4):
        shades = torch.arange(start, min(start + 4, count), dtype=torch.float32)
        spread.add(shades.view(-1, 1, 1, 1).expand(-1, 3, 4, 4))
        assert len(spread.kept) <= 32
    shades = spread.clip()[:, 0, 0, 0]
    assert len(shades) == min(8, count) and shades[0] == 0 and shades[-1] == count - 1
    assert (shades - torch.linspace(0, count - 1, len(shades))).abs().max() <= spread.step / 2 + 0.5
