"""The moment of change: what a tiny-world video shows around the frame from which another caption holds, by pixels.

A frame is clean if it shows the background, the objects, what they turn into on the straight way there, and nothing
else. How the world itself changes is `data.events`; the same code scores rendered clips, reconstructions and live
videos (`eval.streams`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.data.drawing import BOUNDS, RADII
from causalreel.data.events import ROOM
from causalreel.data.world import SPEED_PIXELS, WorldConfig
from causalreel.eval.reading import Sight, look
from causalreel.vocabulary import (
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOR_RGB,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    Caption,
    ObjectSpec,
    matched,
)

LOOKED_AT = 16
"""Frames from a change that are looked at."""
SHOWN_BY, TURNED_BY = 8, 12
"""Frames from a change by which what is named shows, and is where it is told to go."""
MIDDLE = TURNED_BY - 6
"""Frame from which movement is measured."""
BLEND = 0.25
"""Distance of a pixel (RGB 0..1) from the straight way between background and objects, above which it is foreign."""
DRAWN = 0.2
"""Distance from the background above which a pixel is drawn on."""
HEADED = 5
"""Frames before a change that show where things went."""
STAYS = 4
"""Pixels by which a centre may be off while its object changes, beside its movement."""
NEAR = 12
"""Pixels between two objects that may bounce off each other at once."""
REACH = 16
"""Half width of the window around an object."""
SPOTS = 24
"""Pixels of anything else that a frame may have: soft edges."""
GAP = WorldConfig().gap
"""Pixels that two objects leave between them: they bounce off there."""
LARGEST = 420
"""Pixels that one object may cover while it changes; the largest has 315."""


@dataclass(frozen=True)
class Changed:
    """How one change went; None where there is nothing to be seen of it."""

    noise: float
    """Share of the frames from the change on that show something else."""
    is_shown: float | None
    """Share of objects whose colour and shape are the new ones within 8 frames."""
    turned: float | None
    """Share of objects told where to go, with room to go there, that do so within 12 frames."""
    kept: float | None
    """Share of what the new caption does not name (colour, shape, size, background) that is as before."""
    steady: float | None = None
    """Share of objects not told where to go, with room to go on, that go on as they went."""
    stayed: float | None = None
    """Share of objects in a colour that stays that are where they were, and not another one in their colour."""


def judge(video: Tensor, start: int, before: Caption, after: Caption, said: Caption) -> Changed:
    """video (T,3,H,W) in [-1,1] with at least 13 frames from `start` on; the captions that hold before and from there
    on; and the later one with what was said alone, object by object."""
    if start < 1 or len(video) < start + TURNED_BY + 1:
        raise ValueError(
            f"video must show a frame before {start} and {TURNED_BY + 1} from there on, got {len(video)} frames"
        )
    behind = video[start : start + LOOKED_AT]
    new = look(video[start : start + TURNED_BY + 1], after)
    return Changed(
        noise=1 - _mean(clean(behind, before, after).tolist(), 0.0),
        is_shown=_mean(_shown(new, after, said)) if after.objects else None,
        turned=_mean(_turned(video[start - 1 : start], new, before, after, said)),
        kept=_mean(_kept(new, after, said)),
        steady=None if start < HEADED else _mean(_steady(video, start, new, before, after, said)),
        stayed=_mean(_stayed(video[start - 1 : start], new, before, after)),
    )


def _mean(values: Iterable[bool], empty: Any = None) -> Any:
    found = list(values)
    return sum(found) / len(found) if found else empty


@torch.no_grad()
def clean(frames: Tensor, before: Caption, after: Caption) -> Tensor:
    """frames (T,3,H,W) in [-1,1] from a change on -> which of them show only what belongs there (T,) bool."""
    picture = ((frames.float().nan_to_num(0.0).clamp(-1, 1) + 1) / 2).flatten(2)  # (T,3,P)
    old, new = _backgrounds(before), _backgrounds(after)
    ground = torch.stack([_median(channel) for channel in picture.unbind(1)], dim=1)  # (T,3)
    way = torch.linspace(0, 1, 9)[:, None]
    between = torch.lerp(old, new, way)  # (9,3)
    is_ground = (ground[:, None] - between).norm(dim=-1).amin(1) < 2 * 0.1
    paint = torch.cat([torch.lerp(a, b, way) for a, b in _paints(before, after)])  # (n,3)
    offset = picture - ground[..., None]  # (T,3,P)
    towards = paint - ground[:, None]  # (T,n,3)
    share = ((towards @ offset) / towards.square().sum(-1, keepdim=True).clamp_min(1e-4)).clamp(0, 1)  # (T,n,P)
    rest = (offset[:, None] - share[:, :, None] * towards[..., None]).norm(dim=2).amin(1)  # (T,P)
    foreign = (rest > BLEND).sum(1)
    drawn = (offset.norm(dim=1) > DRAWN).float().view(len(frames), *frames.shape[-2:])  # (T,H,W)
    stray, mass = _stray(drawn, max(len(before.objects), len(after.objects)))
    return is_ground & (foreign <= SPOTS) & (mass <= LARGEST) & (stray <= SPOTS)


def _median(values: Tensor) -> Tensor:
    return values.median(dim=-1).values


def _backgrounds(caption: Caption) -> Tensor:
    assert caption.background is not None
    return torch.tensor(BACKGROUND_RGB[BACKGROUNDS.index(caption.background)]) / 255


def _paints(before: Caption, after: Caption) -> list[tuple[Tensor, Tensor]]:
    """Colours that objects may go over from and to: any old one to any new one."""
    old, new = ([torch.tensor(COLOR_RGB[COLORS.index(o.color)]) / 255 for o in c.objects] for c in (before, after))
    return [(a, b) for a in old for b in new]


def _stray(drawn: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(T,H,W) -> pixels (T,) that are far from the `count` places where most are drawn, and those of the fullest."""
    height, width = drawn.shape[1:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack([x, y], dim=-1).flatten(0, 1).float()  # (P,2)
    solid = (F.avg_pool2d(drawn[:, None], 3, stride=1, padding=1)[:, 0] > 0.7).flatten(1)  # (T,P), no lone pixels
    weight = drawn.flatten(1)
    centre = (weight[..., None] * at).sum(1) / weight.sum(1, keepdim=True).clamp_min(1)  # (T,2)
    centres = centre[:, None]  # (T,1,2)
    if count > 1:
        for _ in range(2):  # the pixel farthest from the middle, then the one farthest from that
            distance = (at - centres[:, :1]).norm(dim=-1) * solid
            centres = torch.cat([at[distance.argmax(1)][:, None], centres[:, :1]], dim=1)
        centres = torch.cat([centres[:, :1], centres[:, 1:2]], dim=1)
    mass = weight.sum(1, keepdim=True)
    for _ in range(5):
        nearest = (at - centres[:, :, None]).norm(dim=-1).argmin(1)  # (T,P)
        share = torch.stack([weight * (nearest == i) for i in range(centres.shape[1])], dim=1)  # (T,count,P)
        mass = share.sum(-1)
        moved = (share @ at) / mass.clamp_min(1)[..., None]
        centres = torch.where(mass[..., None] > 0, moved, centres)
    reach = (at - centres[:, :, None]).abs().amax(-1).amin(1)  # (T,P)
    return (weight * (reach > REACH)).sum(1), mass.amax(1)


def _shown(sight: Sight, after: Caption, said: Caption) -> Iterable[bool]:
    """Of each object whose colour or shape was said: whether it is there, as said, by `SHOWN_BY`."""
    for i, (whole, spec) in enumerate(zip(after.objects, said.objects, strict=True)):
        if spec.color or spec.shape:
            is_shape = spec.shape is None or SHAPES.index(whole.shape) == int(sight.shape[SHOWN_BY, i])
            yield bool(sight.found[SHOWN_BY, i]) and is_shape


def _kept(sight: Sight, after: Caption, said: Caption) -> Iterable[bool]:
    """Of everything that was not said, as far as the new caption has it from the old one: whether it is so."""
    at = SHOWN_BY
    if said.background is None and after.background is not None:
        yield BACKGROUNDS.index(after.background) == int(sight.background[at])
    for i, (whole, spec) in enumerate(zip(after.objects, said.objects, strict=True)):
        found = bool(sight.found[at, i])
        if not spec.color:
            yield found
        if not spec.shape:
            yield found and SHAPES.index(whole.shape) == int(sight.shape[at, i])
        if spec.size is None and whole.size is not None:
            yield found and SIZES.index(whole.size) == int(sight.size[at, i])


def _stayed(last: Tensor, sight: Sight, before: Caption, after: Caption) -> Iterable[bool]:
    """Of each object in a colour that both captions name: whether that colour goes on from where it was in the last
    frame (1,3,H,W), from frame to frame until `SHOWN_BY`."""
    old, colors = look(last, before), [one.color for one in after.objects]
    for was, spec in enumerate(before.objects):
        if spec.color in colors and bool(old.found[0, was]):
            i, number = colors.index(spec.color), torch.arange(1, SHOWN_BY + 2)
            away = (sight.centre[: SHOWN_BY + 1, i] - old.centre[0, was]).norm(dim=-1)
            is_near = away <= max(SPEED_PIXELS) * number + STAYS
            yield bool((sight.found[: SHOWN_BY + 1, i] & is_near).all())


def _turned(last: Tensor, sight: Sight, before: Caption, after: Caption, said: Caption) -> Iterable[bool]:
    """Of each object that was told where to go and has room to go there, as the world's own have, from where it is in
    the last frame (1,3,H,W) before it was told: whether it does. What only gains room by going elsewhere has none."""
    ways = torch.tensor([(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0)])
    old, size = look(last, before), last.shape[-2:]
    became = matched([one.color for one in before.objects], [one.color for one in after.objects])
    for i, (spec, was) in enumerate(zip(said.objects, became, strict=True)):
        if spec.direction is None:
            continue
        way = ways[DIRECTIONS.index(spec.direction)]
        if was is not None and bool(old.found[0, was]):
            goal = old.centre[0, was] + way * _pace(after.objects[i]) * ROOM
            if not _inside(goal, _reach(after.objects[i]), size):
                continue
        if _has_room(sight, after, i, way, size):
            yield _goes(sight, i, way)


def _steady(video: Tensor, start: int, sight: Sight, before: Caption, after: Caption, said: Caption) -> Iterable[bool]:
    """Of each object that was there, was not told where to go and has room to go on: whether it does."""
    old = look(video[start - HEADED : start], before)
    if len(before.objects) > 1:  # one that goes is in the way, too, while it does
        apart = (old.centre[:, 0] - old.centre[:, 1]).norm(dim=-1).amin()
        if apart < sum(_reach(spec) for spec in before.objects) + GAP + NEAR:
            return
    for i, was in enumerate(matched([one.color for one in before.objects], [one.color for one in after.objects])):
        whole, spec = after.objects[i], said.objects[i]
        if spec.direction is not None or was is None or not bool(old.found[:, was].all()):
            continue
        halves = old.centre[[2, 4], was] - old.centre[[0, 2], was]  # (2,2): of two frames each
        move = halves.sum(0)
        if move.norm() < 1 or (halves - move / 2).norm(dim=-1).amax() > 0.5:  # it stood or turned
            continue
        way = move / move.norm()
        reach = max(_reach(whole), _reach(before.objects[was])) + 2
        goal = old.centre[-1, was] + way * _pace(whole) * (TURNED_BY + 1)
        if _inside(goal, reach, video.shape[-2:]) and _has_room(sight, after, i, way, video.shape[-2:]):
            yield _goes(sight, i, way)


def _goes(sight: Sight, i: int, way: Tensor) -> bool:
    """Whether object i moves that way (2,) in the last frames until `TURNED_BY`."""
    is_seen = bool(sight.found[TURNED_BY, i] & sight.found[MIDDLE, i])
    move = sight.centre[TURNED_BY, i] - sight.centre[MIDDLE, i]
    along = (move @ way).item()
    return is_seen and along > 0.7071 * move.norm().item() and along >= 0.5


def _has_room(sight: Sight, after: Caption, i: int, way: Tensor, size: Sequence[int]) -> bool:
    """Whether object i can move that way (2,) in these frames: not where a wall is, where the other one is on its way,
    or where the two have just met. Things bounce."""
    if not bool(sight.found[MIDDLE, i]):  # what is not there is not excused
        return True
    begin, reach = sight.centre[MIDDLE, i], _reach(after.objects[i])
    path = begin + way * _pace(after.objects[i]) * torch.arange(TURNED_BY - MIDDLE + 1)[:, None]  # (7,2)
    return _inside(path[-1], reach + 1, size) and not _meets(sight, after, i, path)


def _inside(at: Tensor, reach: float, size: Sequence[int]) -> bool:
    """Whether a circle around x and y (2,) lies in a picture of H and W."""
    room = torch.tensor([size[1], size[0]]) - reach
    return bool(((at >= reach) & (at <= room)).all())


def _meets(sight: Sight, after: Caption, i: int, path: Tensor) -> bool:
    """Whether the other object is where object i goes by its path (7,2), or the two were about to touch before it."""
    if len(after.objects) < 2:
        return False
    apart = sum(_reach(spec) for spec in after.objects) + GAP
    seen = sight.found[: TURNED_BY + 1].all(1)  # (T,)
    far = (sight.centre[: MIDDLE + 1, 0] - sight.centre[: MIDDLE + 1, 1]).norm(dim=-1)
    just_met = (far < apart + 2 * max(SPEED_PIXELS)) & seen[: MIDDLE + 1]
    other = sight.centre[MIDDLE : TURNED_BY + 1, 1 - i]
    in_the_way = ((path - other).norm(dim=-1) < apart) & seen[MIDDLE:]
    return bool(just_met.any() or in_the_way.any())


def _pace(spec: ObjectSpec) -> float:
    """Pixels per frame; of the fastest where its speed is open."""
    return SPEED_PIXELS[SPEEDS.index(spec.speed)] if spec.speed else max(SPEED_PIXELS)


def _reach(spec: ObjectSpec) -> float:
    """Radius in pixels of the circle around an object; of the largest where its size is open."""
    return BOUNDS[SHAPES.index(spec.shape)] * RADII[SIZES.index(spec.size)] if spec.size else 14.0
