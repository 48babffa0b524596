"""A contact sheet: first, middle and last frame of clips with their captions, as one picture to look at."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from causalreel.files import replacing

FRAMES = 3
SIDE = 160
"""Pixels of a frame's longer side."""
LINES, LINE, GAP, EDGE, COLUMNS = 3, 13, 8, 2, 3


@dataclass(frozen=True)
class Tile:
    """A clip on the sheet: its frames (FRAMES,h,w,3) uint8."""

    frames: np.ndarray
    caption: str


def thumbnail(clip: np.ndarray) -> np.ndarray:
    """clip (T,H,W,3) uint8 -> (FRAMES,h,w,3) uint8: first, middle and last frame, the longer side `SIDE` pixels."""
    from PIL import Image

    height, width = clip.shape[1:3]
    scale = SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    chosen = [clip[at] for at in (0, len(clip) // 2, len(clip) - 1)]
    how = Image.Resampling.BILINEAR if scale < 1 else Image.Resampling.NEAREST
    return np.stack([np.array(Image.fromarray(np.ascontiguousarray(frame)).resize(size, how)) for frame in chosen])


def write_sheet(path: Path, tiles: Sequence[Tile]) -> None:
    """A PNG of all tiles, whole or not at all."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = tiles[0].frames.shape[1:3]
    across, down = FRAMES * (width + EDGE) + GAP, height + LINES * LINE + GAP
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * across + GAP, rows * down + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for number, tile in enumerate(tiles):
        left, top = GAP + number % columns * across, GAP + number // columns * down
        for at, frame in enumerate(tile.frames):
            sheet.paste(Image.fromarray(frame), (left + at * (width + EDGE), top))
        lines = textwrap.wrap(tile.caption, max(16, FRAMES * width // 6), max_lines=LINES, placeholder=" ...")
        for at, line in enumerate(lines):
            draw.text((left, top + height + at * LINE), line, "black", font)
    with replacing(path) as partial:
        sheet.save(partial, "PNG")
