"""What frames of the tiny world show of what is captioned, from pixels alone.

Each frame is explained as "background + alpha * (palette colour - background)", pixel by pixel. The mass of a captioned
colour gives the object's centre; the best of the six ideal templates (three shapes, two sizes) drawn at that centre
says what it is and how cleanly it is drawn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.data.drawing import RADII, coverage
from causalreel.vocabulary import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOR_RGB,
    COLORS,
    DIRECTIONS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    SPEEDS,
    Caption,
    ObjectSpec,
    parse_caption,
)

TEMPLATES = [(shape, size) for shape in range(len(SHAPES)) for size in range(len(SIZES))]
"""Shape and size of each, as indices."""
_REACH = 16  # half width of the window around an object; the largest object reaches 14 pixels from its centre
ANY = -1
"""What a caption leaves open."""


@dataclass(frozen=True)
class MetricConfig:
    """How frames are read. The defaults accept codec softness and reject a wrong, missing or deformed object."""

    stride: int = 4
    """Evaluate every `stride`-th frame; 4 is one per latent frame."""
    quiet: int = 8
    """Frames from which the first heading is read: the world's quiet frames."""
    overlap: float = 0.75
    """Least intersection over union with the best template."""
    mass: int = 50
    """Pixels that an object must cover at least; the smallest has 107."""
    extra: int = 20
    """Pixels of anything that is not a captioned object, above which a frame has something extra."""
    foreign: float = 0.3
    """RGB distance (0..sqrt 3) from every mixture of background and palette colour that makes a pixel foreign."""
    background: float = 0.1
    """Largest root-mean-square distance of the background from the captioned one, in units of the full range."""
    turn_degrees: float = 40.0
    """Change of heading between steps that counts as a turn."""

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"stride must be at least 1, got {self.stride}")


@dataclass(frozen=True)
class Captions:
    """Captions as class numbers (B,N), -1 where open; `named` (B,N) bool; background (B,)."""

    named: Tensor
    color: Tensor
    shape: Tensor
    size: Tensor
    direction: Tensor
    speed: Tensor
    background: Tensor

    @staticmethod
    def of(captions: Sequence[str | Caption], device: torch.device) -> Captions:
        parsed = [parse_caption(c) if isinstance(c, str) else c for c in captions]
        for caption in parsed:
            if len({spec.color for spec in caption.objects}) < len(caption.objects):
                raise ValueError(f"captioned objects must differ in colour to be told apart, got {caption}")

        def table(words: tuple[str, ...], slot: str) -> Tensor:
            rows = [[_index(words, spec and getattr(spec, slot)) for spec in _padded(c)] for c in parsed]
            return torch.tensor(rows, device=device)

        color = table(COLORS, "color")
        return Captions(
            named=color != ANY,
            color=color,
            shape=table(SHAPES, "shape"),
            size=table(SIZES, "size"),
            direction=table(DIRECTIONS, "direction"),
            speed=table(SPEEDS, "speed"),
            background=torch.tensor([_index(BACKGROUNDS, c.background) for c in parsed], device=device),
        )

    def __getitem__(self, rows: Tensor) -> Captions:
        return Captions(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})


def _padded(caption: Caption) -> list[ObjectSpec | None]:
    return [*caption.objects, *[None] * (MAX_OBJECTS - len(caption.objects))]


def _index(words: tuple[str, ...], word: str | None) -> int:
    return ANY if word is None else words.index(word)


@dataclass(frozen=True)
class Reading:
    """What M frames show of the captioned colours: (M,N,...) per object, (M,) per frame."""

    found: Tensor  # (M,N) bool
    centre: Tensor  # (M,N,2) x, y
    template: Tensor  # (M,N) index into TEMPLATES
    overlap: Tensor  # (M,N) sharpened, so that soft edges cost little
    quality: Tensor  # (M,N) unsharpened
    good: Tensor  # (M,N) bool: shape and size as captioned
    clean: Tensor  # (M,) bool: nothing extra, background as captioned
    error: Tensor  # (M,) mean squared error against the ideal drawing, in units of the full range


def read(frames: Tensor, want: Captions, config: MetricConfig) -> Reading:
    """frames (M,3,H,W) in [-1,1], one request row per frame."""
    picture = (torch.nan_to_num(frames.float(), nan=0.0).clamp(-1, 1) + 1) / 2
    background = median(picture[:, :, ::2, ::2].flatten(2))  # (M,3)
    label, alpha, foreign = _segment(picture, background, config)  # (M,H,W) each
    solid = alpha > 0.5
    extra = foreign.flatten(1).sum(1) + (solid & ~foreign).flatten(1).sum(1)  # every drawn pixel, less the objects' own
    columns: list[tuple[Tensor, ...]] = []
    ideal = background[:, :, None, None].expand_as(picture)
    for i in range(MAX_OBJECTS):
        named = want.named[:, i]
        mask = alpha * (named[:, None, None] & (label == want.color[:, i, None, None]) & ~foreign)  # (M,H,W)
        centre, mass = _locate(mask)
        overlaps, qualities = _match(mask, centre)  # (M,6)
        found = named & (mass >= config.mass)
        extra = extra - torch.where(found, mass, 0)
        allowed = _allowed(want.shape[:, i], want.size[:, i])  # (M,6) bool
        overlap, template = overlaps.max(dim=1)
        good = found & (overlap >= config.overlap) & allowed.gather(1, template[:, None])[:, 0]
        columns.append((found, centre, template, overlap, qualities.gather(1, template[:, None])[:, 0], good))
        ideal = _draw(ideal, found, centre, template, want.color[:, i])
    close = _background_close(background, want.background, config)
    stacked = [torch.stack(column, dim=1) for column in zip(*columns, strict=True)]
    error = (picture - ideal).square().flatten(1).mean(1)
    return Reading(*stacked, clean=(extra <= config.extra) & close, error=error)


def _segment(picture: Tensor, background: Tensor, config: MetricConfig) -> tuple[Tensor, Tensor, Tensor]:
    """picture (M,3,H,W), background (M,3) -> best colour, its share alpha in [0,1], and whether none fits (M,H,W)."""
    palette = torch.tensor(COLOR_RGB, device=picture.device) / 255
    towards = palette - background[:, None]  # (M,6,3)
    offset = (picture - background[:, :, None, None]).flatten(2)  # (M,3,P)
    dot = towards @ offset  # (M,6,P)
    length = towards.square().sum(-1, keepdim=True).clamp_min(1e-4)  # (M,6,1)
    share = (dot / length).clamp(0, 1)
    misfit, label = (share * (share * length - 2 * dot)).min(dim=1)  # (M,P), squared residual less |offset|^2
    alpha = share.gather(1, label[:, None])[:, 0]
    foreign = misfit + offset.square().sum(1) > config.foreign**2
    shape = (picture.shape[0], *picture.shape[2:])
    return label.view(shape), (alpha * (alpha > 0.2)).view(shape), foreign.view(shape)


def _locate(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask (M,H,W) -> centre x, y (M,2) of its heaviest blob, and the pixels (M,) that this blob covers."""
    height, width = mask.shape[1:]
    rows = F.avg_pool2d(mask, (1, 21), stride=1, padding=(0, 10))  # a box filter in two passes
    blob = F.avg_pool2d(rows, (21, 1), stride=1, padding=(10, 0))  # (M,H,W)
    peak = blob.flatten(1).argmax(dim=1)
    x, y = (torch.arange(n, device=mask.device) + 0.5 for n in (width, height))
    centre = torch.stack([x[peak % width], y[torch.div(peak, width, rounding_mode="floor")]], dim=1)
    local = mask
    for _ in range(2):  # the second pass is centred well enough to hold the whole object
        near_x = (x - centre[:, :1]).abs() <= _REACH  # (M,W)
        near_y = (y - centre[:, 1:]).abs() <= _REACH  # (M,H)
        local = mask * (near_x[:, None] & near_y[:, :, None])
        total = local.flatten(1).sum(1).clamp_min(1e-6)
        centre = torch.stack([(local.sum(1) * x).sum(1), (local.sum(2) * y).sum(1)], dim=1) / total[:, None]
    return centre, (local > 0.5).flatten(1).sum(1)


def _match(mask: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """mask (M,H,W), centre (M,2) -> intersection over union with each template (M,6): sharpened, and as it is."""
    span = torch.arange(-_REACH, _REACH + 1, device=mask.device)
    corner = centre.floor().long()  # pixel that holds the centre
    padded = F.pad(mask, (_REACH,) * 4)
    columns, rows = (corner[:, i, None] + span + _REACH for i in (0, 1))  # (M,33)
    columns, rows = columns.clamp(0, padded.shape[2] - 1), rows.clamp(0, padded.shape[1] - 1)
    batch = torch.arange(len(mask), device=mask.device)[:, None, None]
    window = padded[batch, rows[:, :, None], columns[:, None, :]][:, None]  # (M,1,33,33)
    fraction = centre - corner - 0.5  # (M,2)
    dx, dy = (span - fraction[:, i, None] for i in (0, 1))  # (M,33)
    shape = torch.tensor([t[0] for t in TEMPLATES], device=mask.device)[:, None, None]
    radius = torch.tensor([RADII[t[1]] for t in TEMPLATES], device=mask.device)[:, None, None]
    ideal = coverage(dx[:, None, None, :], dy[:, None, :, None], shape, radius)  # (M,6,33,33)
    return _overlap(_sharpen(window), _sharpen(ideal)), _overlap(window, ideal)


def _sharpen(mask: Tensor) -> Tensor:
    return (2 * mask - 0.5).clamp(0, 1)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Soft intersection over union over the last two dimensions; min + max = a + b."""
    common = torch.minimum(a, b).sum((-2, -1))
    return common / (a.sum((-2, -1)) + b.sum((-2, -1)) - common).clamp_min(1e-6)


def _allowed(shape: Tensor, size: Tensor) -> Tensor:
    """Captioned shape and size (M,), -1 open -> which templates satisfy them (M,6)."""
    templates = torch.tensor(TEMPLATES, device=shape.device)
    right_shape = (shape[:, None] == ANY) | (shape[:, None] == templates[:, 0])
    return right_shape & ((size[:, None] == ANY) | (size[:, None] == templates[:, 1]))


def _draw(picture: Tensor, found: Tensor, centre: Tensor, template: Tensor, color: Tensor) -> Tensor:
    """picture (M,3,H,W) plus the ideal object where one was found."""
    x, y = (torch.arange(n, device=picture.device) + 0.5 for n in (picture.shape[3], picture.shape[2]))
    kinds = torch.tensor(TEMPLATES, device=picture.device)[template]  # (M,2)
    radius = torch.tensor(RADII, device=picture.device)[kinds[:, 1]]
    dx, dy = x - centre[:, :1], y - centre[:, 1:]
    alpha = coverage(dx[:, None, :], dy[:, :, None], kinds[:, 0, None, None], radius[:, None, None])
    paint = (torch.tensor(COLOR_RGB, device=picture.device) / 255)[color.clamp_min(0)][:, :, None, None]
    return torch.lerp(picture, paint.expand_as(picture), (alpha * found[:, None, None])[:, None].expand_as(picture))


def _background_close(background: Tensor, want: Tensor, config: MetricConfig) -> Tensor:
    """Measured (M,3) against captioned class (M,), -1 open: any of the world's backgrounds will do then."""
    known = torch.tensor(BACKGROUND_RGB, device=background.device) / 255
    distance = (background[:, None] - known).square().mean(-1).sqrt()  # (M,3)
    named = distance.gather(1, want.clamp_min(0)[:, None])[:, 0]
    return torch.where(want == ANY, distance.min(dim=1).values, named) <= config.background


@dataclass(frozen=True)
class Sight:
    """What T frames show of a caption's N objects."""

    found: Tensor
    """(T,N) bool: something in its colour."""
    centre: Tensor
    """(T,N,2) x, y."""
    shape: Tensor
    """(T,N) long, the best of the templates, as `size`."""
    size: Tensor
    background: Tensor
    """(T,) long: the nearest."""


@torch.no_grad()
def look(frames: Tensor, caption: Caption, *, config: MetricConfig = MetricConfig()) -> Sight:
    """frames (T,3,H,W) in [-1,1] -> where the objects of one caption are, and what they look like, in each of them."""
    want = Captions.of([caption], frames.device)
    seen = read(frames, want[torch.zeros(len(frames), dtype=torch.long, device=frames.device)], config)
    kinds = torch.tensor(TEMPLATES, device=frames.device)[seen.template]  # (T,N,2)
    known = torch.tensor(BACKGROUND_RGB, device=frames.device) / 255
    middle = median((frames.float().clamp(-1, 1)[:, :, ::2, ::2].flatten(2) + 1) / 2)  # (T,3)
    nearest = (middle[:, None] - known).square().sum(-1).argmin(1)
    count = len(caption.objects)
    shape, size = kinds[:, :count, 0], kinds[:, :count, 1]
    return Sight(seen.found[:, :count], seen.centre[:, :count], shape, size, nearest)


def median(values: Tensor) -> Tensor:
    """Lower median over the last dimension, without NaN; by sorting, which is deterministic on every device."""
    count = (~values.isnan()).sum(-1, keepdim=True)
    return values.sort(dim=-1).values.gather(-1, ((count - 1) // 2).clamp_min(0))[..., 0]
