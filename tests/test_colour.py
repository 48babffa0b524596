"""Colours survive what is written: BT.709, limited range, tagged, and read again for what a file says it is."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from causalreel.data import colour
from causalreel.data.video import write_video
from causalreel.data.video_in import read_video
from causalreel.serve.frames import H264Encoder, pipe

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255), (0, 0, 0), (255,) * 3]


def stripes(height: int, width: int, frames: int = 2) -> Tensor:
    """(frames,height,width,3) uint8: an upright stripe of each colour."""
    band = width // len(COLOURS)
    rows = torch.tensor(COLOURS, dtype=torch.uint8).repeat_interleave(band, 0)
    rows = torch.nn.functional.pad(rows, (0, 0, 0, width - len(rows)))
    return rows.expand(frames, height, width, 3).contiguous()


def worst(pictures: np.ndarray) -> int:
    """The largest difference at the middle of each stripe."""
    band = pictures.shape[2] // len(COLOURS)
    middles = pictures[:, pictures.shape[1] // 2, band // 2 :: band][:, : len(COLOURS)]
    return int(np.abs(middles.astype(int) - np.array(COLOURS)).max())


def tags(file: object) -> tuple[int, ...]:
    """Matrix, primaries, transfer and range as a file's head has them."""
    with av.open(file) as container:  # type: ignore[call-overload]
        context = container.streams.video[0].codec_context
        return context.colorspace, context.color_primaries, context.color_trc, context.color_range


@pytest.mark.parametrize("size", [(64, 64), (480, 832), (720, 1280)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm", ".gif"])
def test_saturated_colours_in_files(suffix: str, size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    write_video(path, stripes(*size).permute(0, 3, 1, 2))
    if suffix != ".gif":  # it holds RGB
        assert tags(str(path)) == (1, 1, 1, colour.LIMITED)
    video, _ = read_video(path)
    assert worst(((video + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()) <= 3


def test_saturated_colours_in_pipes_and_live() -> None:
    clip = stripes(128, 256)
    units = H264Encoder(128, 256, 16, crf=10).encode(clip)
    assert tags(io.BytesIO(b"".join(unit.data for unit in units))) == (1, 1, 1, colour.LIMITED)
    file = io.BytesIO()
    pipe(file, [clip], 16, "mp4")
    assert tags(io.BytesIO(file.getvalue())) == (1, 1, 1, colour.LIMITED)
    with av.open(io.BytesIO(file.getvalue())) as container:
        assert worst(np.stack([colour.to_rgb(frame) for frame in container.decode(video=0)])) <= 3


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("size", "matrix", "is_tagged"),
    [
        ((96, 160), Colorspace.ITU601, True),
        ((96, 160), Colorspace.ITU709, True),
        ((96, 160), 9, True),
        ((96, 160), Colorspace.ITU601, False),
        ((720, 1280), Colorspace.ITU709, False),
    ],
)
def test_files_are_read_for_what_they_are(
    size: tuple[int, int], matrix: int, is_tagged: bool, full: bool, tmp_path: Path
) -> None:
    """By their tags (9: BT.2020); without tags small ones are BT.601 and large ones BT.709."""
    if matrix not in list(Colorspace):
        pytest.skip("PyAV without BT.2020")
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv444p"
        stream.codec_context.color_range = colour.FULL if full else colour.LIMITED
        if is_tagged:
            stream.codec_context.colorspace = int(matrix)
        for picture in stripes(*size):
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            kind = ColorRange.JPEG if full else ColorRange.MPEG
            frame = frame.reformat(format="yuv444p", dst_colorspace=Colorspace(matrix), dst_color_range=kind)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video, rate = read_video(tmp_path / "a.mkv")
    assert rate == Fraction(16)
    assert worst(((video + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()) <= 4


def test_a_conversion_does_not_depend_on_those_before_it() -> None:
    """Each thread keeps its converter, whatever formats, sizes and matrices it was used for."""
    cases = [(size, matrix, format) for size in (64, 96) for matrix in (1, 5) for format in ("yuv420p", "yuv444p")]

    def there_and_back(size: int, matrix: int, format: str) -> np.ndarray:
        return colour.to_rgb(colour.to_yuv(stripes(size, size, 1)[0].numpy(), format, matrix=matrix))

    alone = []
    for case in cases:
        with ThreadPoolExecutor(1) as fresh:
            alone.append(fresh.submit(there_and_back, *case).result())
    for order in (range(len(cases)), reversed(range(len(cases)))):
        assert all(np.array_equal(there_and_back(*cases[i]), alone[i]) for i in order)
