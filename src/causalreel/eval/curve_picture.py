"""Drift as a picture: a panel for each metric, a line with its standard error for each model, from window to window.

What frames look like differs more between clips than it drifts, so of those metrics each clip's first window is taken
away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from causalreel.eval.frames import STATISTICS
from causalreel.eval.windows import Long
from causalreel.files import replacing

COLOURS = (
    *((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75)),
    *((227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207), (0, 0, 0), (90, 60, 160)),
)
WIDTH, HEIGHT, LEFT, TOP, GAP, LINE, COLUMNS = 360, 190, 52, 26, 34, 15, 2
INK, GRID = (60, 60, 60), (230, 230, 230)


def draw(rows: Sequence[Long], metrics: Sequence[str], path: Path) -> None:
    """Write a PNG, whole or not at all. A row without a metric has no line in its panel."""
    from PIL import Image, ImageDraw, ImageFont

    font, columns = ImageFont.load_default(11), min(COLUMNS, len(metrics))
    down = -(-len(metrics) // columns)
    names = -(-len(rows) // columns)
    size = (columns * (LEFT + WIDTH + GAP), down * (TOP + HEIGHT + GAP) + names * LINE + GAP)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture, "RGBA")
    for number, metric in enumerate(metrics):
        left = LEFT + number % columns * (LEFT + WIDTH + GAP)
        top = TOP + number // columns * (TOP + HEIGHT + GAP)
        _panel(pen, font, rows, metric, (left, top))
    for number, row in enumerate(rows):
        x = LEFT + number % columns * (LEFT + WIDTH + GAP)
        y = down * (TOP + HEIGHT + GAP) + number // columns * LINE
        pen.line((x, y + 6, x + 22, y + 6), fill=COLOURS[number % len(COLOURS)], width=3)
        pen.text((x + 28, y), row.label[:60], fill=INK, font=font)
    with replacing(path) as partial:
        picture.save(partial, "PNG", optimize=True)


def _panel(pen, font, rows: Sequence[Long], metric: str, corner: tuple[int, int]) -> None:  # noqa: ANN001
    left, top = corner
    lines = [_line(row, metric) for row in rows]
    levels = [v for line in lines for mean, error in line for v in (mean - error, mean + error) if math.isfinite(v)]
    low, high = (min(levels), max(levels)) if levels else (0.0, 1.0)
    if high - low < 1e-6:
        low, high = low - 0.5, high + 0.5
    last = max((len(line) for line in lines), default=1)

    def at(window: int, value: float) -> tuple[float, float]:
        x = left + WIDTH * (window / max(last - 1, 1))
        return x, top + HEIGHT * (1 - (min(max(value, low), high) - low) / (high - low))

    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        y = at(0, value)[1]
        pen.line((left, y, left + WIDTH, y), fill=GRID)
        pen.text((left - 6, y), f"{value:.3g}", fill=INK, font=font, anchor="rm")
    for window in sorted({0, *(round(share * (last - 1)) for share in (0.25, 0.5, 0.75, 1.0))}):
        pen.text((at(window, low)[0], top + HEIGHT + 4), str(window + 1), fill=INK, font=font, anchor="mt")
    pen.text(
        (left, top - 16), f"{metric}, less the first window's" if metric in STATISTICS else metric, fill=INK, font=font
    )
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        known = [(i, mean, error) for i, (mean, error) in enumerate(line) if math.isfinite(mean)]
        if not known:
            continue
        above = [at(i, mean + error) for i, mean, error in known]
        below = [at(i, mean - error) for i, mean, error in reversed(known)]
        if len(known) > 1:
            pen.polygon([*above, *below], fill=(*colour, 28))
            pen.line([at(i, mean) for i, mean, _ in known], fill=colour, width=2)
        else:
            x, y = at(*known[0][:2])
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)


def _line(row: Long, metric: str) -> list[tuple[float, float]]:
    """Mean and standard error of every window; none for a metric that the row lacks."""
    if metric not in row.curves:
        return []
    values = row.curves[metric].double()
    values = values - values[:, :1] if metric in STATISTICS else values
    count = (~values.isnan()).sum(0)
    mean = values.nanmean(0)
    error = (values - mean).square().nansum(0) / (count - 1).clamp_min(1) / count.clamp_min(1)
    error = torch.where(count > 1, error.sqrt(), torch.zeros_like(error))
    return list(zip(mean.tolist(), error.tolist(), strict=True))
