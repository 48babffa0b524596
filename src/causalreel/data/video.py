"""Video files: write H.264 or GIF as frames arrive, read them back, and lay clips out on one picture.

Every writer works on a temporary name beside the target and renames it at the end, so that a path either holds a
complete file or what it held before. Needs PyAV for video files, Pillow for GIF and pictures; both are imported when
used.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

VIDEO_SUFFIXES = (".mp4", ".mkv", ".mov")
GIF_SUFFIX = ".gif"
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg")


def check_target(path: str | os.PathLike[str], suffixes: Sequence[str], *, may_make_folder: bool = False) -> Path:
    """A file that can be written, as a Path, or a ValueError or OSError that says why not; writes nothing.

    may_make_folder: the file's folder need not be there if the folder above it is, because the caller will make it.
    """
    target = Path(path)
    if target.suffix.lower() not in suffixes:
        raise ValueError(f"path must end in {', '.join(suffixes)}, got {target.name!r}")
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a directory; name a file")
    folder = target.parent
    if may_make_folder and not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"cannot write {target}: directory {target.parent} does not exist")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"cannot write {target}: directory {folder} is not writable")
    return target


def to_bytes(frames: Tensor) -> Tensor:
    """Frames (...,3,H,W), uint8 or float in [-1,1] -> uint8 (T,H,W,3) on the CPU."""
    if frames.ndim < 3 or frames.shape[-3] != 3:
        raise ValueError(f"frames must be (T,3,H,W) or (3,H,W), got {tuple(frames.shape)}")
    frames = frames.detach().reshape(-1, *frames.shape[-3:])
    if frames.dtype != torch.uint8:
        if not frames.is_floating_point():
            raise ValueError(f"frames must be uint8 or floating point, got {frames.dtype}")
        frames = (torch.nan_to_num(frames.float(), nan=0.0).clamp(-1, 1) + 1).mul(127.5).round().to(torch.uint8)
    return frames.permute(0, 2, 3, 1).contiguous().cpu()


def write_video(
    path: str | os.PathLike[str], frames: Iterable[Tensor], fps: float = 16, *, crf: int = 16, scale: int = 1
) -> int:
    """Encode frames as they come; returns how many were written.

    frames: an iterable of chunks (T,3,H,W) or single frames (3,H,W), uint8 or float in [-1,1]; a whole video tensor
    works too. The suffix decides: .mp4 .mkv .mov are H.264 (yuv420p), .gif is a looping GIF. `crf` 0..51 is the H.264
    quality, lower is better. `scale` repeats pixels, which keeps small videos sharp under 4:2:0 colour.
    Raises ValueError for a bad suffix, size or empty input, OSError if the file cannot be made. On any error, including
    one raised by the iterable, nothing is left behind.
    """
    target = check_target(path, (*VIDEO_SUFFIXES, GIF_SUFFIX))
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}")
    pictures = _pictures(frames, scale)
    first = next(pictures, None)
    if first is None:
        raise ValueError("frames must hold at least one frame, got none")
    pictures = itertools.chain([first], pictures)
    with _replacing(target) as temporary:
        if target.suffix.lower() == GIF_SUFFIX:
            return _write_gif(temporary, pictures, fps)
        return _write_h264(temporary, pictures, fps, crf)


def read_video(path: str | os.PathLike[str], *, frames: int | None = None) -> tuple[Tensor, float]:
    """File -> video (T,3,H,W) float32 in [-1,1], at most the first `frames` frames; and its frames per second."""
    av = _need("av", "PyAV")
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"no video file at {source}")
    try:
        with av.open(str(source)) as container:
            stream = next(iter(container.streams.video), None)
            if stream is None:
                raise ValueError(f"{source} holds no video stream")
            rate = float(stream.average_rate or 0)
            decoded = [frame.to_ndarray(format="rgb24") for frame in itertools.islice(container.decode(stream), frames)]
    except av.FFmpegError as error:
        raise ValueError(f"{source} cannot be read as a video: {error.strerror}") from error
    if not decoded:
        raise ValueError(f"{source} holds no frames")
    video = torch.stack([torch.from_numpy(picture) for picture in decoded])  # (T,H,W,3)
    return video.permute(0, 3, 1, 2).float() / 127.5 - 1, rate


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
    image_module, draw_module = _need("PIL.Image", "Pillow"), _need("PIL.ImageDraw", "Pillow")
    target = check_target(path, PICTURE_SUFFIXES)
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
    sheet = image_module.new("RGB", (width, height), "white")
    draw = draw_module.Draw(sheet)
    top = 0
    for row, text in zip(rows, texts, strict=True):
        for line in text:
            draw.text((2, top), line, fill="black")
            top += 12
        sheet.paste(image_module.fromarray(row.numpy()), (0, top))
        top += row.shape[0] + 4
    with _replacing(target) as temporary:
        sheet.save(temporary)


def _strip(video: Tensor, columns: int, scale: int) -> Tensor:
    """(T,3,H,W) -> (h,w,3) uint8: frames side by side with a white line of two pixels between them."""
    picked = torch.linspace(0, len(video) - 1, min(columns, len(video))).round().long()
    pictures = _repeat(to_bytes(video[picked.to(video.device)]), scale)  # (n,h,w,3)
    padded = torch.nn.functional.pad(pictures, (0, 0, 0, 2), value=255)
    return torch.cat(list(padded), dim=1)[:, :-2].contiguous()


def _repeat(pictures: Tensor, scale: int) -> Tensor:
    return pictures if scale == 1 else pictures.repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def _pictures(frames: Iterable[Tensor], scale: int) -> Iterator[Tensor]:
    """Chunks -> single pictures (h,w,3) uint8, all of one size."""
    size = None
    for chunk in frames:
        for picture in _repeat(to_bytes(torch.as_tensor(chunk)), scale):
            size = size or picture.shape
            if picture.shape != size:
                raise ValueError(f"frames must all have one size, got {tuple(picture.shape)} after {tuple(size)}")
            yield picture


def _write_h264(path: Path, pictures: Iterator[Tensor], fps: float, crf: int) -> int:
    av = _need("av", "PyAV")
    count = 0
    with av.open(str(path), "w") as container:
        stream = None
        for picture in pictures:
            if stream is None:
                height, width, _ = picture.shape
                if height % 2 or width % 2:
                    raise ValueError(f"H.264 needs even height and width, got {height} x {width}")
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.options = {"crf": str(crf)}
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")))
            count += 1
        if stream is not None:
            container.mux(stream.encode())
    return count


def _write_gif(path: Path, pictures: Iterator[Tensor], fps: float) -> int:
    image_module = _need("PIL.Image", "Pillow")
    count = 0

    def images() -> Iterator[Any]:
        nonlocal count
        for picture in pictures:
            count += 1
            yield image_module.fromarray(picture.numpy())

    stream = images()
    first = next(stream)
    first.save(path, save_all=True, append_images=stream, duration=max(20, round(1000 / fps)), loop=0)
    return count


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary path beside the target that takes its place at the end, or vanishes on any error; an OSError that
    names no file, as those of encoders, comes out as one that names the target."""
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.filename or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _need(name: str, product: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"PyAV": "av", "Pillow": "pillow"}[product]
        raise ImportError(f"this needs {product}; install it with: pip install {package}") from error
