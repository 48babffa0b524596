"""Video files: H.264, VP9 or GIF, written as frames arrive, and clips laid out on one picture. `data.video_in` reads.

A path either holds a complete file or what it held before. PyAV and Pillow are imported when they are used.
"""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from causalreel.data.colour import tag, to_yuv
from causalreel.files import replacing

CONTAINERS = {".mp4": "mp4", ".mkv": "matroska", ".mov": "mov", ".webm": "webm", ".gif": "gif"}
"""Suffix -> FFmpeg's name of the container."""
OUTPUT_SUFFIXES = tuple(CONTAINERS)
SHEET_SUFFIXES = (".png", ".jpg", ".jpeg")
VP9 = {"deadline": "good", "cpu-used": "4", "row-mt": "1", "b": "0"}


def check_target(path: str | os.PathLike[str], suffixes: Sequence[str], *, may_make_folder: bool = False) -> Path:
    """A file that can be written, as a Path, or a ValueError or OSError that says why not; writes nothing.

    may_make_folder: the file's folder need not be there, because the caller will make it and those above it.
    """
    target = Path(path)
    if "\0" in str(target):
        raise ValueError(f"path must not hold a zero byte, got {str(target)!r}")
    if target.suffix.lower() not in suffixes:
        raise ValueError(f"path must end in {', '.join(suffixes)}, got {target.name!r}")
    folder, names = target.parent, [target.name]
    while may_make_folder and not os.path.lexists(folder):
        folder, names = folder.parent, [folder.name, *names]
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.is_file() else f"directory {target.parent} does not exist"
        raise FileNotFoundError(f"cannot write {target}: {what}")
    longest = os.pathconf(folder, "PC_NAME_MAX")
    for name in names:
        if (length := len(os.fsencode(name))) > longest:
            raise ValueError(f"names have at most {longest} bytes here, got {length}: {name!r}")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory; name a file")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write {target}: directory {folder} is not writable")
    return target


def to_bytes(frames: Tensor, *, leave: bool = False) -> Tensor:
    """Frames (...,3,H,W), uint8 or float in [-1,1] -> uint8 (T,H,W,3) on the CPU; leave: where they are."""
    if frames.ndim < 3 or frames.shape[-3] != 3:
        raise ValueError(f"frames must be (T,3,H,W) or (3,H,W), got {tuple(frames.shape)}")
    frames = frames.detach().reshape(-1, *frames.shape[-3:])
    if frames.dtype != torch.uint8:
        if not frames.is_floating_point():
            raise ValueError(f"frames must be uint8 or floating point, got {frames.dtype}")
        frames = (torch.nan_to_num(frames.float(), nan=0.0).clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    frames = frames.permute(0, 2, 3, 1).contiguous()
    return frames if leave else on_host(frames)


def on_host(frames: Tensor) -> Tensor:
    """Frames on the CPU, as soon as the current stream has made them."""
    return frames.cpu()


def write_video(
    path: str | os.PathLike[str], frames: Iterable[Tensor], fps: float = 16, *, crf: int = 16, scale: int = 1
) -> int:
    """Encode frames as they come; returns how many were written.

    frames: an iterable of chunks (T,3,H,W) or single frames (3,H,W), uint8 or float in [-1,1]; a whole video tensor
    works too. The suffix decides: .mp4 .mkv .mov are H.264 and .webm is VP9, both yuv420p in BT.709, limited range,
    and tagged as that; .gif is a looping GIF. `crf` 0..51 is the quality, lower is better. `scale` repeats pixels,
    which keeps small videos sharp under 4:2:0 colour.
    Raises ValueError for a bad suffix, size or empty input, OSError if the file cannot be made. On any error, including
    one raised by the iterable, nothing is left behind.
    """
    target = check_target(path, OUTPUT_SUFFIXES)
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    pictures = _pictures(frames, scale)
    first = next(pictures, None)
    if first is None:
        raise ValueError("frames must hold at least one frame, got none")
    pictures = itertools.chain([first], pictures)
    container = CONTAINERS[target.suffix.lower()]
    with replacing(target) as temporary, temporary.open("r+b") as file:  # an open file: FFmpeg takes names for URLs
        if container == "gif":
            return _write_gif(file, pictures, fps)
        codec, options = ("libvpx-vp9", VP9) if container == "webm" else ("libx264", {})
        return encode(file, pictures, fps, container, codec=codec, options={"crf": str(crf), **options})


def encode(
    file: Any,
    pictures: Iterable[Tensor],
    fps: float,
    container: str,
    *,
    codec: str = "libx264",
    options: Mapping[str, str],
    container_options: Mapping[str, str] | None = None,
) -> int:
    """Pictures (H,W,3) uint8 of one even size -> tagged video in an open file; -> how many there were."""
    import av

    count, stream = 0, None
    with av.open(file, "w", format=container, options=dict(container_options or {})) as output:
        for count, picture in enumerate(pictures, start=1):  # noqa: B007
            if stream is None:
                height, width, _ = picture.shape
                if height % 2 or width % 2:
                    raise ValueError(f"video needs even height and width, got {height} x {width}")
                stream = output.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.options = dict(options)
                tag(stream.codec_context)
            output.mux(stream.encode(to_yuv(picture.numpy())))
        if stream is not None:
            output.mux(stream.encode())
    return count


def _write_gif(file: BinaryIO, pictures: Iterable[Tensor], fps: float) -> int:
    """Its clock has hundredths of a second: each frame begins at the nearest one, so that the rate holds on average."""
    import av

    count, stream = 0, None
    graph: Any = None
    how = {"loop": "0", "final_delay": str(max(2, round(100 / fps)))}
    with av.open(file, "w", format="gif", options=how) as output:
        for picture in pictures:
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            if stream is None:
                stream = output.add_stream("gif", rate=100)
                stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, "pal8"
                graph = _palettes(frame.width, frame.height)
            frame.pts, frame.time_base = round(100 * count / min(fps, 50)), Fraction(1, 100)
            graph.push(frame)
            output.mux(stream.encode(graph.pull()))
            count += 1
        if stream is not None:
            output.mux(stream.encode())
    return count


def _palettes(width: int, height: int) -> Any:
    """A filter that gives each frame 256 colours of its own; what has no more stays what it was. The pattern that mixes
    them where there are more stands still, unlike diffused errors."""
    import av
    from av.filter import Graph

    graph = Graph()
    first = graph.add_buffer(width=width, height=height, format=av.VideoFormat("rgb24"), time_base=Fraction(1, 100))
    split, last = graph.add("split"), graph.add("buffersink")
    palette = graph.add("palettegen", "stats_mode=single:reserve_transparent=0")
    use = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=3")
    first.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(last)
    graph.configure()
    return graph


class Spread:
    """Some frames of a clip of unknown length, evenly in time, the first and the last among them; memory is bounded.

    Frames at equal distances are kept; when there are twice as many as wanted, every second one goes.
    """

    def __init__(self, columns: int = 8) -> None:
        self.columns, self.count, self.step = columns, 0, 1
        self.kept: list[Tensor] = []
        self.last: Tensor | None = None

    def add(self, frames: Tensor) -> None:
        """Frames (t,3,H,W), in order."""
        for frame in frames:
            if self.count % self.step == 0:
                self.kept.append(frame.clone())
                if len(self.kept) > 4 * self.columns:
                    self.kept, self.step = self.kept[::2], 2 * self.step
            self.last, self.count = frame, self.count + 1

    def clip(self) -> Tensor:
        """(n,3,H,W), at most `columns` frames."""
        assert self.last is not None, "no frame was added"
        total = min(self.columns, self.count)
        places = torch.linspace(0, self.count - 1, total).tolist()
        picked = [self.kept[min(round(place / self.step), len(self.kept) - 1)] for place in places[:-1]]
        return torch.stack([*picked, self.last])


def contact_sheet(
    videos: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    columns: int = 8,
    *,
    scale: int = 1,
) -> None:
    """Videos (B,T,3,H,W), or a sequence of (T,3,H,W) -> one picture: a row per clip, `columns` frames evenly in time.

    The first and the last frame are always shown. Labels stand above the rows.
    """
    from PIL import Image, ImageDraw

    target = check_target(path, SHEET_SUFFIXES)
    if len(videos) == 0:
        raise ValueError("videos must hold at least one clip, got none")
    if labels is not None and len(labels) != len(videos):
        raise ValueError(f"labels must be one per clip: {len(videos)} clips, {len(labels)} labels")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    rows = [_strip(video, columns, scale) for video in videos]
    width = max(row.shape[1] for row in rows)
    texts = [textwrap.wrap(label, max(8, width // 6)) for label in labels] if labels is not None else [[]] * len(rows)
    height = sum(row.shape[0] + 4 + 12 * len(text) for row, text in zip(rows, texts, strict=True))
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    top = 0
    for row, text in zip(rows, texts, strict=True):
        for line in text:
            draw.text((2, top), line, fill="black")
            top += 12
        sheet.paste(Image.fromarray(row.numpy()), (0, top))
        top += row.shape[0] + 4
    with replacing(target) as temporary:
        sheet.save(temporary)


def _strip(video: Tensor, columns: int, scale: int) -> Tensor:
    """(T,3,H,W) -> (h,w,3) uint8: frames side by side with a white line of two pixels between them."""
    picked = torch.linspace(0, len(video) - 1, min(columns, len(video))).round().long()
    pictures = _repeated(to_bytes(video[picked.to(video.device)]), scale)  # (n,h,w,3)
    padded = torch.nn.functional.pad(pictures, (0, 0, 0, 2), value=255)
    return torch.cat(list(padded), dim=1)[:, :-2].contiguous()


def _pictures(frames: Iterable[Tensor], scale: int) -> Iterator[Tensor]:
    """Chunks -> single pictures (h,w,3) uint8, all of one size."""
    size = None
    for chunk in frames:
        for picture in _repeated(to_bytes(torch.as_tensor(chunk)), scale):
            size = size or picture.shape
            if picture.shape != size:
                raise ValueError(f"frames must all have one size, got {tuple(picture.shape)} after {tuple(size)}")
            yield picture


def _repeated(pictures: Tensor, scale: int) -> Tensor:
    """(T,h,w,3) -> each pixel `scale` times in both directions."""
    return pictures if scale == 1 else pictures.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
