"""One decoder of pictures: every kind comes out as a viewer shows it, or is refused in one line at a small price."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from causalreel.data.pictures import decode_picture, fit, scanned_pixels
from ceilings import examples, work_within
from jpegs import of_scans

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)
TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90"}
TURNS |= {7: "TRANSVERSE", 8: "ROTATE_270"}
"""Orientation -> how an upright picture is stored with it."""


def saved(picture: Image.Image, kind: str, **how) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **how)
    return file.getvalue()


def shown(data: bytes, size: tuple[int, int] | None = None, **how) -> np.ndarray:
    """(H,W,3) integers."""
    frames = decode_picture(data, size, **how)
    assert frames.shape[:2] == (1, 3)
    return ((frames[0].permute(1, 2, 0) + 1) * 127.5).round().int().numpy()


def corners() -> Image.Image:
    """40x80 (width, height): red above blue, with a green corner above on the left."""
    picture = Image.new("RGB", (40, 80), RED)
    picture.paste(BLUE, (0, 40, 40, 80))
    picture.paste((0, 255, 0), (0, 0, 20, 20))
    return picture


def is_upright(pixels: np.ndarray) -> bool:
    height, width, _ = pixels.shape
    points = [(height // 16, width // 8), (height // 16, 7 * width // 8), (15 * height // 16, width // 2)]
    found = [pixels[point].argmax() for point in points]
    return found == [1, 0, 2]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(kind: str, orientation: int) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    picture = corners()
    if orientation > 1:
        picture = picture.transpose(Image.Transpose[TURNS[orientation]])
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture, kind, exif=exif)
    assert shown(data).shape == (80, 40, 3) and is_upright(shown(data))
    assert is_upright(shown(data, (32, 16))) and is_upright(shown(data, (16, 8)))
    padded = shown(data, (32, 64), how="pad")
    assert is_upright(padded[:, 24:40]) and not padded[:, :23].any()


def transparent(mode: str) -> bytes:
    """A green square in the middle of what cannot be seen, and is red underneath."""
    picture = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    picture.paste((0, 255, 0, 255), (8, 8, 24, 24))
    if mode == "P":
        picture = picture.convert("RGB").quantize(4)
        red = picture.getpixel((0, 0))
        return saved(picture, "PNG", transparency=red)
    if mode == "key":
        return saved(picture.convert("RGB"), "PNG", transparency=(255, 0, 0))
    if mode == "premultiplied":
        stored = Image.frombytes("RGBA", picture.size, picture.convert("RGBa").tobytes())
        return saved(stored, "TIFF", tiffinfo={338: 1})  # alpha that the colours were multiplied by
    if mode == "LA":
        return saved(picture.convert("LA"), "PNG")
    return saved(picture, mode, lossless=True) if mode == "WEBP" else saved(picture, mode)


@pytest.mark.parametrize("mode", ["PNG", "WEBP", "TIFF", "P", "key", "LA", "premultiplied"])
def test_transparent_parts_are_white(mode: str) -> None:
    for pixels in (shown(transparent(mode)), shown(transparent(mode), (32, 32))):
        assert (pixels[:7] == 255).all() and pixels[16, 16].tolist() == ([150] * 3 if mode == "LA" else [0, 255, 0])
    half = Image.new("RGBA", (8, 8), (0, 0, 0, 128))
    assert shown(saved(half, "PNG"))[0, 0].tolist() == [127] * 3


RAMP = np.linspace(0, 1, 64, dtype=np.float32)[None].repeat(8, 0)


def png16(colour: int) -> bytes:
    """A 16-bit PNG of a ramp, of colour type 0 (grey), 2 (RGB), 4 (grey, alpha) or 6; Pillow writes grey alone."""
    bands = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    values = np.repeat((RAMP * 65535).round().astype(">u2")[..., None], bands, 2)
    if colour in (4, 6):
        values[..., -1] = 65535
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    head = struct.pack(">IIBBBBB", 64, 8, 16, colour, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    packed = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


DEEP: dict[str, Callable[[], bytes]] = {
    "grey PNG": lambda: png16(0),
    "RGB PNG": lambda: png16(2),
    "grey and alpha PNG": lambda: png16(4),
    "RGBA PNG": lambda: png16(6),
    "16-bit TIFF": lambda: saved(Image.fromarray((RAMP * 65535).round().astype(np.uint16)), "TIFF"),
    "16-bit PGM": lambda: b"P5 64 8 65535\n" + (RAMP * 65535).round().astype(">u2").tobytes(),
    "float TIFF": lambda: saved(Image.fromarray(RAMP), "TIFF"),
    "float TIFF to 255": lambda: saved(Image.fromarray(RAMP * 255), "TIFF"),
    "32-bit TIFF": lambda: saved(Image.fromarray((RAMP * 65535).round().astype(np.int32)), "TIFF"),
}


@pytest.mark.parametrize("kind", DEEP)
def test_deep_pictures_are_scaled_by_their_range(kind: str) -> None:
    pixels = shown(DEEP[kind]())
    assert np.abs(pixels - (RAMP * 255)[..., None]).max() <= 1
    assert shown(DEEP[kind](), (8, 64)).shape == (8, 64, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), np.nan, np.float32), "not finite"),
        (np.array([[0, np.inf]], np.float32), "not finite"),
        (np.array([[-3, 1]], np.float32), "floats from -3 to 1; floats must be 0 to 1, or 0 to 255"),
        (np.array([[0, 1e6]], np.float32), "floats from 0 to 1e\\+06"),
        (np.array([[-1, 70000]], np.int32), "integers from -1 to 70000"),
    ],
)
def test_numbers_without_a_range_are_refused(values: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=f"^a.tiff holds .*{message}"):
        decode_picture(saved(Image.fromarray(values), "TIFF"), name="a.tiff")


def test_other_modes() -> None:
    assert shown(saved(Image.new("1", (8, 8), 1), "PNG"), (4, 4)).min() == 255
    assert shown(saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"))[0, 0].tolist() == [255, 0, 0]
    assert shown(saved(Image.new("CMYK", (64, 64), (0, 255, 255, 0)), "JPEG"), (8, 16), how="pad")[4, 0].max() == 0
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    for kind in ("GIF", "PNG", "WEBP"):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
        assert shown(data)[4, 4, 0] > 250 > 5 > shown(data)[4, 4, 2]


def test_profiles_lead_to_srgb() -> None:
    """Of a profile whose red is our blue; an sRGB one changes nothing, nor do a damaged one and one of another kind."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"----", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"----", b"bXYZ", 1)
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "RGBx".encode("utf-16-be"))
    picture = Image.new("RGB", (8, 8), (200, 100, 50))
    for profile in (srgb, b"no profile", ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()):
        assert shown(saved(picture, "PNG", icc_profile=profile))[0, 0].tolist() == [200, 100, 50]
    for mode in ("RGB", "RGBA"):
        data = saved(picture.convert(mode), "PNG", icc_profile=swapped)
        assert np.abs(shown(data, (4, 4))[0, 0] - [50, 100, 200]).max() <= 2


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (saved(Image.new("1", (5000, 5000)), "PNG"), "at most 1000000 pixels, got 5000x5000"),
        (saved(Image.new("1", (20000, 20000)), "PNG"), "at most 1000000 pixels"),
        (saved(Image.new("1", (1, 60000)), "PNG"), "at most 100 times as long as wide, got 1x60000"),
        (saved(Image.new("1", (60000, 1)), "PNG"), "at most 100 times as long as wide, got 60000x1"),
        (saved(Image.new("RGB", (64, 64), RED), "PNG")[:-30], "cannot be read as a picture"),
        (b"", "cannot be read as a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read as a picture"),
    ],
)
def test_what_is_refused_is_refused_by_its_head(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"^x.png .*{message}[^\n]*$"):
        decode_picture(data, (64, 64), name="x.png", pixels=1_000_000)


def test_a_jpeg_of_thousands_of_scans_is_not_decoded() -> None:
    """A scan of a few bytes takes as long as the picture; a common progressive one has ten."""
    data = saved(Image.new("RGB", (64, 64), RED), "JPEG", progressive=True)
    last = data[data.rindex(b"\xff\xda") : -2]
    assert shown(data[:-2] + 50 * last + data[-2:])[9, 9, 0] > 250
    end, hidden = data[-2:], b"\xff\xfe\x00\x04\xff\xd9" + b"\xff\xbf\xff\xff"  # an end in a comment, and no part
    for between in (b"", hidden, 70_000 * b"\xff"):
        with pytest.raises(ValueError, match=r"^x.jpg must have at most 64 scans, got more$"):
            decode_picture(data[:-2] + between + 5000 * last + end, (64, 64), name="x.jpg")


def test_pixels_count_once_for_each_scan() -> None:
    """That many are refused before one is decoded: all of it but the heads is missing."""
    data = of_scans(1000, 800, 10)
    assert scanned_pixels(data) == 8_000_000 and scanned_pixels(saved(Image.new("1", (70, 30)), "PNG")) == 2100
    assert scanned_pixels(saved(Image.new("RGB", (70, 30)), "JPEG")) == 2100
    said = r"^x.jpg must have at most 7999999 pixels, counted once for each scan; got 1000x800 in 10 scans$"
    with pytest.raises(ValueError, match=said):
        decode_picture(data, (8, 8), name="x.jpg", scanned=7_999_999)
    assert decode_picture(data, (8, 8), scanned=8_000_000).shape == (1, 3, 8, 8)
    with pytest.raises(ValueError, match="at most 7000 pixels, got 1000x800"):
        scanned_pixels(data, pixels=7000)


@pytest.mark.parametrize("head", [0xC9, 0xCA])
def test_arithmetic_coding_is_refused(head: int) -> None:
    """Sequential and progressive; Pillow decodes it, and a scan of three bytes takes ten times as long as others do."""
    with pytest.raises(
        ValueError, match=r"^x.jpg must be coded by Huffman's method; it is coded arithmetically, [^\n]*$"
    ):
        decode_picture(of_scans(64, 64, 3, head=head), (8, 8), name="x.jpg")


def test_what_a_jpeg_carries_is_no_scan_of_it() -> None:
    """A phone's picture has others in its head, and a video behind its end."""
    data = saved(Image.new("RGB", (64, 64), RED), "JPEG")
    head = b"\xff\xe5" + struct.pack(">H", 60_002) + 30_000 * b"\xff\xda"
    assert shown(data[:2] + 5 * head + data[2:] + 1000 * b"\xff\xda\x00\x02")[9, 9, 0] > 250


def test_what_stands_behind_a_jpeg_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "long.jpg"
    path.write_bytes(saved(Image.new("RGB", (64, 64), RED), "JPEG"))
    os.truncate(path, 1 << 32)
    work_within(
        200,
        "read_picture(arguments[0], (64, 64))",
        str(path),
        setup="from PIL import Image; from causalreel.data.pictures import read_picture",
    )


@pytest.mark.parametrize("size", [(1, 100), (100, 1), (3, 2), (2, 3)])
@pytest.mark.parametrize("how", ["crop", "pad"])
def test_extreme_shapes_fit(size: tuple[int, int], how: str) -> None:
    assert shown(saved(Image.new("RGB", size, WHITE), "PNG"), (48, 80), how=how).max() == 255
    assert fit(torch.ones(1, 3, *size), (48, 80), how).shape == (1, 3, 48, 80)  # type: ignore[arg-type]


def test_the_middle_is_kept() -> None:
    """Cropping takes equal parts from both sides, though it is done before resizing."""
    wide = Image.new("RGB", (90, 30), BLUE)
    wide.paste(RED, (30, 0, 60, 30))
    assert (shown(saved(wide, "PNG"), (60, 60))[30, [1, 30, 58], 0] > 250).all()


def test_decoding_costs_little() -> None:
    """A long strip, and sixteen million pixels of which few are wanted."""
    setup = """
import io, torch
from PIL import Image
from causalreel.data.pictures import decode_picture, fit
def saved(picture, kind):
    file = io.BytesIO(); picture.save(file, kind); return file.getvalue()
long, large = saved(Image.new("RGB", (600, 60000)), "PNG"), saved(Image.new("RGBA", (4000, 4000)), "PNG")
photograph = saved(Image.effect_mandelbrot((8000, 6000), (-2, -1, 1, 1), 8).convert("RGB"), "JPEG")
decode_picture(saved(Image.new("RGB", (8, 8)), "PNG"), (8, 8))
strip = torch.zeros(1, 3, 60000, 1)
"""
    work_within(120, "fit(strip, (480, 832)); decode_picture(photograph, (480, 832))", setup=setup)
    work_within(300, "for one in (long, large): decode_picture(one, (480, 832))", setup=setup)


def test_damaged_pictures_raise_nothing_but_value_errors() -> None:
    """Bytes of each kind changed, cut and swapped at random."""
    chance = random.Random(5)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [saved(corners(), kind, exif=exif) for kind in ("PNG", "JPEG", "WEBP", "TIFF")]
    kinds += [saved(corners(), kind) for kind in ("BMP", "GIF", "PPM", "TGA", "ICO")] + [
        make() for make in DEEP.values()
    ]
    for number in range(examples(300)):
        data = bytearray(kinds[number % len(kinds)])
        for _ in range(chance.choice((1, 3, 30))):
            data[chance.randrange(min(len(data), chance.choice((64, 10**9))))] = chance.randrange(256)
        data = data[: chance.randrange(len(data))] if chance.random() < 0.3 else data
        try:
            assert decode_picture(bytes(data), (16, 16)).shape == (1, 3, 16, 16)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
