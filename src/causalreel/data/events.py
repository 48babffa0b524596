"""What changes in a clip of the tiny world when its caption does: one event at the border of a latent frame.

The rule. From pixel frame `start` on the new caption holds. Within `morph` frames, in equal parts, colours (the
background's too), outlines, sizes and velocities go over from old to new; an object that comes grows from nothing, one
that goes shrinks to it. What the caption does not name stays as it is: an object without a direction word keeps its
heading, at the speed that is captioned. Which object is which: one that is named in a colour that is there is that
one, the others follow in their order. For `QUIET` frames nothing turns by itself.

An event that has no room (two objects would touch, a new one does not fit) does not happen, and a direction is one in
which there is room to move. A crowded event needs no room between objects: they are pushed apart while it happens, and
bounce off each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from causalreel.vocabulary import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, SIZES, SPEEDS

if TYPE_CHECKING:
    from causalreel.data.world import WorldConfig

QUIET = 12
"""Frames from an event's start in which nothing turns by itself."""
ROOM = 10
"""Frames of straight movement for which a named direction has room."""
ANEW = 0.5
"""Share of events in which the whole caption is drawn anew; in the others every word changes with chance `SOME`."""
SOME = 0.3
CHUNK = 3
"""Half of the events begin at a multiple of so many latent frames, the others at any."""
DRAWS = 64
"""Random numbers of an event."""


@dataclass(frozen=True)
class Change:
    """The second caption of B clips, by slot as the fields of `WorldState`; where nothing happens, as the first."""

    start: Tensor
    """(B,) long: pixel frame from which the new caption holds; the number of frames where there is none."""
    shape: Tensor
    """(B,N) long."""
    color: Tensor
    scale: Tensor
    direction: Tensor
    speed: Tensor
    present: Tensor
    """(B,N) bool."""
    background: Tensor
    """(B,) long."""
    named: Tensor
    """(B,N) bool: the direction is said."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Change:
        return Change(**{f.name: change(getattr(self, f.name)) for f in fields(self)})

    def where(self, rows: Tensor, other: Change) -> Change:
        """`other` in these rows (B) bool."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Change(
            **{name: torch.where(rows.view(-1, *[1] * (old.ndim - 1)), new, old) for name, (old, new) in pairs.items()}
        )

    def put(self, rows: Tensor, other: Change) -> Change:
        """`other` (n,...) in these rows (n,)."""
        return Change(
            **{f.name: getattr(self, f.name).index_copy(0, rows, getattr(other, f.name)) for f in fields(self)}
        )

    def progress(self, frames: int, morph: int) -> Tensor:
        """(B,T) float32: how much of the change has happened in each frame, 0 to 1."""
        done = torch.arange(frames, device=self.start.device) - self.start[:, None] + 1
        return (done / morph).clamp(0, 1)


def nothing(classes: dict[str, Tensor], background: Tensor, present: Tensor, frames: int) -> Change:
    """No event in any of the clips."""
    said = torch.ones_like(present)
    return Change(
        start=torch.full_like(background, frames),
        background=background,
        present=present,
        named=said,
        **classes,
    )


def wanted_events(first: Change, uniform: Tensor, config: WorldConfig) -> Change:
    """Clips as they begin, uniform (B,DRAWS) -> the events that are wanted, whether or not there is room for them."""
    number = iter(uniform.unbind(1))
    happens = next(number) < config.events
    latents = (config.frames - 1) // config.latent + 1
    any_frame = 1 + (next(number) * (latents - 1)).long()
    borders = max((latents - 1) // CHUNK, 1)
    border = (CHUNK * (1 + (next(number) * borders).long())).clamp(max=latents - 1)
    at = torch.where(next(number) < 0.5, border, any_frame)
    start = torch.where(happens, 1 + config.latent * (at - 1), config.frames)
    anew = next(number) < ANEW

    def changed(old: Tensor, size: int, chance: float = SOME) -> Tensor:
        """(B,): drawn anew, or another one with this chance."""
        other = (old + 1 + (next(number) * (size - 1)).long()) % size
        small = torch.where(next(number) < chance, other, old)
        return torch.where(anew, (next(number) * size).long(), small)

    columns: dict[str, list[Tensor]] = {name: [] for name in ("shape", "scale", "direction", "speed", "named")}
    count = first.shape.shape[1]
    for i in range(count):
        columns["shape"].append(changed(first.shape[:, i], len(SHAPES)))
        columns["scale"].append(changed(first.scale[:, i], len(SIZES)))
        columns["speed"].append(changed(first.speed[:, i], len(SPEEDS)))
        columns["direction"].append((next(number) * len(DIRECTIONS)).long())
        columns["named"].append(next(number) < config.named)
    background = changed(first.background, len(BACKGROUNDS), SOME / 2)
    if config.same_background:
        background = torch.where(next(number) < config.same_background, first.background, background)
    color = _colors(first.color, anew, [next(number) for _ in range(3 * count)])
    table = {name: torch.stack(column, dim=1) for name, column in columns.items()}
    present = first.present.clone()
    if count > 1:
        alone = next(number)
        other = torch.where(anew, alone < 0.5, (alone < SOME / 2) ^ present[:, 1])
        still = next(number) < 0.5
        if config.two_objects:
            other |= next(number) < config.two_objects
        stays = present[:, 1] & ~other & ~anew & still  # the second one, alone
        table = {name: torch.where(stays[:, None], column.flip(1), column) for name, column in table.items()}
        color = torch.where(stays[:, None], color.flip(1), color)
        present[:, 1] = other
    wanted = Change(
        start=start,
        color=color,
        present=present,
        background=background,
        **table,
    )
    if count > 1:
        wanted = _matched(first, wanted)
    if config.direction_alone:
        steered = _steered(first, start, [next(number) for _ in range(count + 1)])
        wanted = wanted.where(next(number) < config.direction_alone, steered)
    return first.where(happens, wanted)


def _steered(first: Change, start: Tensor, number: list[Tensor]) -> Change:
    """All stays as it is, but one object or both are told another direction."""
    others = len(DIRECTIONS) - 1
    turns = torch.stack([1 + (one * others).long() for one in number[:-1]], dim=1)  # (B,N)
    named = torch.ones_like(first.present)
    if named.shape[1] > 1:  # the first one, the second one, both
        which = (number[-1] * 3).long()[:, None]
        named = (torch.arange(2) == which) | (which == 2) | ~first.present.all(1, keepdim=True)
    return replace(first, start=start, direction=(first.direction + turns) % len(DIRECTIONS), named=named)


def _colors(old: Tensor, anew: Tensor, number: list[Tensor]) -> Tensor:
    """(B,N): colours that differ from each other; of small changes also from all that were there."""
    size, first = len(COLORS), old[:, 0]
    if old.shape[1] == 1:
        other = (first + 1 + (number[0] * (size - 1)).long()) % size
        return torch.where(anew, (number[1] * size).long(), torch.where(number[2] < SOME, other, first))[:, None]
    free = torch.stack([(old != c).all(1) for c in range(size)], dim=1).int()  # (B,colours)
    ranks = free.cumsum(1) * free  # 1, 2, ... of those free
    picks = [1 + (number[i] * 4).long() for i in (0, 1)]
    picks[1] = torch.where(picks[1] == picks[0], picks[0] % 4 + 1, picks[1])
    small = [
        torch.where(number[2 + i] < SOME, (ranks == pick[:, None]).int().argmax(1), old[:, i])
        for i, pick in enumerate(picks)
    ]
    whole = (number[4] * size).long()
    second = (whole + 1 + (number[5] * (size - 1)).long()) % size
    return torch.stack([torch.where(anew, whole, small[0]), torch.where(anew, second, small[1])], dim=1)


def _matched(first: Change, wanted: Change) -> Change:
    """The wanted caption's objects in the slots of those that they are, by colour and then in their order.

    wanted lists its objects in the order of the caption, one or two of them.
    """
    there, two = first.present, wanted.present[:, 1]
    same = (wanted.color[:, :, None] == first.color[:, None, :]) & there[:, None, :]  # (B, named, slots)
    crossed = same[:, 0, 1] | (two & same[:, 1, 0])
    flip = crossed[:, None]

    def placed(values: Tensor) -> Tensor:
        return torch.where(flip, values.flip(1), values)

    return replace(
        wanted,
        shape=placed(wanted.shape),
        color=placed(wanted.color),
        scale=placed(wanted.scale),
        direction=placed(wanted.direction),
        speed=placed(wanted.speed),
        named=placed(wanted.named) | ~there,
        present=placed(wanted.present),
    )


def gone_as_before(first: Change, change: Change) -> Change:
    """Objects that go, and such as never were there, look to the end as they did."""
    keep = ~change.present & first.present

    def of(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(keep, old, new)

    names = ("shape", "color", "scale", "direction", "speed")
    return replace(change, **{name: of(getattr(first, name), getattr(change, name)) for name in names})
