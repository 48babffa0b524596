"""Pictures from files and from clients: one decoder for all of them, and how a picture is brought to a video's shape.

What comes out is what a viewer shows: upright (EXIF), in sRGB, 8 bits a colour, on white where it is transparent. Size
and shape are read from the head of a file and refused before any pixel is made. Of a moving picture the first frame
is taken. Needs Pillow, which is imported when it is used.
"""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, get_args

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

Fit = Literal["crop", "pad"]
"""How a picture of another shape is brought to the video's: its longer side cropped, or black bars added."""

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "JPEG2000", "PPM", "TGA", "ICO", "QOI", "MPO")
"""Pillow's names of the formats that are read: those that hold pixels and start no other program."""
PIXELS = 100_000_000
"""Most pixels of a picture."""
ASPECT = 100
"""Most that one side may be of the other."""
SCANS = 64
"""Most scans of a JPEG: a progressive one has about ten, and each takes as long as the whole picture does."""
MARKER = re.compile(rb"\xff[\xc0-\xcf\xd8-\xfe]")
"""What begins a part of a JPEG; other pairs stand among coded pixels, and no decoder takes a part behind them."""
SCAN, END = 0xDA, 0xD9
ARITHMETIC = (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
"""Heads of JPEGs whose pixels are coded arithmetically: a scan of a few bytes then takes ten times as long."""
BLOCK = 1 << 16
ORIENTATION = 0x0112
"""EXIF: how the stored picture has to be turned."""


def suffixes() -> frozenset[str]:
    """Of the names of files that hold pictures, lower case, as far as the Pillow that is installed reads them."""
    from PIL import Image

    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in FORMATS)


def read_picture(path: str | os.PathLike[str], size: tuple[int, int] | None = None, how: Fit = "crop") -> Tensor:
    """A picture file -> (1,3,H,W) in [-1,1] of `size` (height, width), or as large as it is."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no picture at {path}")
    with open(path, "rb") as file:
        return decode_picture(file, size, how, name=str(path))


def decode_picture(
    source: bytes | BinaryIO,
    size: tuple[int, int] | None = None,
    how: Fit = "crop",
    *,
    name: str = "image",
    formats: tuple[str, ...] = FORMATS,
    pixels: int = PIXELS,
    scanned: int = PIXELS * SCANS,
) -> Tensor:
    """A picture's bytes -> (1,3,H,W) in [-1,1] of `size` (height, width), or as large as it is.

    name: what messages call it. formats: those of `FORMATS` that are tried. pixels: most that it may have. scanned:
    most that its scans may go over, see `scanned_pixels`. Raises ValueError, in one line.
    """
    with _opened(source, name, formats, pixels) as (picture, scans):
        if picture.width * picture.height * scans > scanned:
            what = f"{picture.width}x{picture.height} in {scans} scans"
            raise _Refused(f"{name} must have at most {scanned} pixels, counted once for each scan; got {what}")
        shown = _upright(picture, size, how, name)
    return torch.from_numpy(shown).permute(2, 0, 1)[None].float() / 127.5 - 1


def scanned_pixels(
    source: bytes | BinaryIO, *, name: str = "image", formats: tuple[str, ...] = FORMATS, pixels: int = PIXELS
) -> int:
    """Pixels that decoding a picture goes over, a JPEG's once in each scan, from its head and before any is decoded.

    The arguments, and ValueError for what is refused by its head, as of `decode_picture`.
    """
    with _opened(source, name, formats, pixels) as (picture, scans):
        return picture.width * picture.height * scans


@contextmanager
def _opened(source: bytes | BinaryIO, name: str, formats: tuple[str, ...], pixels: int) -> Iterator[tuple[Image, int]]:
    """A picture whose head is fine, and its scans; whatever goes wrong with it is a ValueError."""
    from PIL import Image

    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of size, which is looked at here, and of odd metadata
            with Image.open(file, formats=formats) as picture:
                _check_head(picture, name, pixels)
                yield picture, _scans(picture, file, name)
    except _Refused as error:
        raise ValueError(str(error)) from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name} must have at most {pixels} pixels") from None
    except Exception as error:  # decoders of foreign bytes raise whatever they like
        kinds = ", ".join(formats)
        raise ValueError(f"{name} cannot be read as a picture ({kinds}): {_in_a_line(error)}") from error


class _Refused(Exception):
    """A picture that could be decoded and is not taken."""


def _in_a_line(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if isinstance(error, UnidentifiedImageError):
        return "unknown or damaged"
    return " ".join(str(error).split())[:200] or type(error).__name__


def _check_head(picture: Image, name: str, pixels: int) -> None:
    width, height = picture.size
    if width * height > pixels:
        raise _Refused(f"{name} must have at most {pixels} pixels, got {width}x{height}")
    if max(width, height) > ASPECT * min(width, height):
        raise _Refused(f"{name} must be at most {ASPECT} times as long as wide, got {width}x{height}")


def _scans(picture: Image, file: BinaryIO, name: str) -> int:
    """How often decoding goes over the picture; refuses a JPEG of too many scans, or of slow ones."""
    if picture.format not in ("JPEG", "MPO"):
        return 1
    here = file.tell()
    scans, is_arithmetic = _parts(file)
    file.seek(here)
    if scans > SCANS:
        raise _Refused(f"{name} must have at most {SCANS} scans, got more")
    if is_arithmetic:
        raise _Refused(
            f"{name} must be coded by Huffman's method; it is coded arithmetically, which browsers do not show"
        )
    return scans


def _parts(file: BinaryIO) -> tuple[int, bool]:
    """Scans of a JPEG, counted to one more than `SCANS`, and whether it is coded arithmetically. As its decoder goes:
    from part to part, past what they hold, such as another picture, and to the picture's end, behind which phones put a
    video."""
    is_arithmetic = False
    scans, at, start, block = 0, 2, 0, b""
    while scans <= SCANS:
        found = MARKER.search(block, at - start)
        if found is None or found.end() + 2 > len(block):
            at = max(at, start + (len(block) - 1 if found is None else found.start()))
            file.seek(at)
            start, block = at, file.read(BLOCK)
            if len(block) < 4:
                break
            continue
        kind, behind = block[found.end() - 1], found.end()
        if kind == END:
            break
        scans += kind == SCAN
        is_arithmetic |= kind in ARITHMETIC
        at = start + behind + int.from_bytes(block[behind : behind + 2], "big")
    return scans, is_arithmetic


def _upright(picture: Image, size: tuple[int, int] | None, how: Fit, name: str) -> np.ndarray:
    """An open picture -> (H,W,3) uint8. It is cropped and resized first, so that all else is done on few pixels."""
    from PIL import Image

    is_turned = _orientation(picture) > 4
    wanted = (size[1], size[0]) if size and is_turned else size
    if wanted is not None and picture.format in ("JPEG", "MPO"):
        scale = _scale(picture.size, wanted, how)
        picture.draft(None, (int(picture.width * scale), int(picture.height * scale)))  # decodes a smaller one
    profile = picture.info.get("icc_profile")
    picture.load()
    turn = _orientation(picture)  # TIFF turns while it loads
    wanted = (size[1], size[0]) if size and turn > 4 else size
    shown = _eight_bits(picture, name)
    if wanted is not None:
        shown = _resized(shown, wanted, how)
    if profile:
        shown = _to_srgb(shown, profile, name)
    shown = _on_white(shown)
    if wanted is not None:
        shown = _framed(shown, wanted)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return np.array(shown if turn == 1 else shown.transpose(turns[turn]))


def _orientation(picture: Image) -> int:
    try:
        found = picture.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF is none: viewers show the picture as it is stored
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _eight_bits(picture: Image, name: str) -> Image:
    """-> RGB, RGBA, L or CMYK, of any other mode; numbers of more bits are scaled by their range."""
    from PIL import Image

    mode = picture.mode
    if mode in ("LA", "La", "PA", "RGBa") or (mode in ("1", "L", "P", "RGB") and "transparency" in picture.info):
        return picture.convert("RGBA")
    if mode in ("RGB", "RGBA", "L", "CMYK"):
        return picture
    if mode.startswith("I;16") or mode in ("I", "F"):
        return Image.fromarray(_scaled(picture, name))
    return picture.convert("L" if mode == "1" else "RGB")


def _scaled(picture: Image, name: str) -> np.ndarray:
    """Numbers of 16 or 32 bits, or floats -> uint8. 16 bits by their range; floats are 0 to 1, or 0 to 255."""
    values = np.asarray(picture)
    if picture.mode == "F":
        if not np.isfinite(values).all():
            raise _Refused(f"{name} holds numbers that are not finite")
        low, high = float(values.min()), float(values.max())
        if low < 0 or high > 255:
            raise _Refused(f"{name} holds floats from {low:g} to {high:g}; floats must be 0 to 1, or 0 to 255")
        return (values * (255 if high <= 1 else 1) + 0.5).astype(np.uint8)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise _Refused(f"{name} holds integers from {low} to {high}; integers must have 8 or 16 bits")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _to_srgb(picture: Image, profile: bytes, name: str) -> Image:
    """Colours by the profile that the file carries -> sRGB; a damaged one, or one of another kind, counts as none."""
    from PIL import Image, ImageCms

    alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
    colours = picture.convert("RGB") if alpha is not None else picture
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(source).lower():
            return picture
        done = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        log.warning("%s: its colour profile is not used: %s", name, _in_a_line(error))
        return picture
    assert isinstance(done, Image.Image)
    if alpha is not None:
        done.putalpha(alpha)
    return done


def _on_white(picture: Image) -> Image:
    from PIL import Image

    if picture.mode != "RGBA":
        return picture.convert("RGB")
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB")


# ---- shape -----------------------------------------------------------------------------------------------------------


def fit(frames: Tensor, size: tuple[int, int], how: Fit = "crop") -> Tensor:
    """(T,3,h,w) -> (T,3,H,W) in [-1,1], as `fit_image`. The released code stretches instead, which distorts."""
    from PIL import Image

    if tuple(frames.shape[-2:]) == tuple(size) and how in get_args(Fit):
        return frames.clamp(-1, 1).contiguous()
    planes = [Image.fromarray(plane.numpy()) for plane in frames.detach().float().cpu().flatten(0, 1)]
    fitted = [torch.from_numpy(np.array(fit_image(plane, size, how))) for plane in planes]
    return torch.stack(fitted).view(*frames.shape[:2], *size).clamp(-1, 1).to(frames.device)


def fit_image(picture: Image, size: tuple[int, int], how: Fit = "crop", *, aspect: float = 1.0) -> Image:
    """A picture in `size` (height, width), its shape kept: cropped around the centre to the shape of `size` and then
    resized, or resized to lie within it between black bars. aspect: width of a pixel by its height."""
    return _framed(_resized(picture, size, how, aspect), size)


def _resized(picture: Image, size: tuple[int, int], how: Fit, aspect: float = 1.0) -> Image:
    """`fit_image` without the bars."""
    from PIL import Image

    if how not in get_args(Fit):
        raise ValueError(f"fit must be crop or pad, got {how!r}")
    height, width = size
    scale = _scale(picture.size, size, how, aspect)  # of the rows; columns are scaled by `scale * aspect`
    if how == "pad":
        width = min(width, max(1, round(picture.width * scale * aspect)))
        height = min(height, max(1, round(picture.height * scale)))
        box = (0.0, 0.0, float(picture.width), float(picture.height))
    else:
        across, down = min(picture.width, width / scale / aspect), min(picture.height, height / scale)
        left, top = (picture.width - across) / 2, (picture.height - down) / 2
        box = (left, top, left + across, top + down)
    if (width, height) == picture.size and box == (0, 0, width, height):
        return picture
    return picture.resize((width, height), Image.Resampling.BILINEAR, box=box)


def _framed(picture: Image, size: tuple[int, int]) -> Image:
    """In the middle of black of `size`; of floats -1 is black."""
    from PIL import Image

    height, width = size
    if picture.size == (width, height):
        return picture
    framed = Image.new(picture.mode, (width, height), -1.0 if picture.mode == "F" else 0)
    framed.paste(picture, ((width - picture.width) // 2, (height - picture.height) // 2))
    return framed


def _scale(picture: tuple[int, int], size: tuple[int, int], how: Fit, aspect: float = 1.0) -> float:
    """By how much rows are enlarged so that a picture (width, height) covers `size` (height, width), or lies in it."""
    choose = max if how == "crop" else min
    return choose(size[0] / picture[1], size[1] / picture[0] / aspect)
