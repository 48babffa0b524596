"""The tiny world: procedural 64x64 videos of one or two coloured shapes that move, bounce and sometimes turn.

It exists so that every stage can be trained and *measured* in minutes: each clip has a caption, the caption can be
checked exactly from the pixels (`eval.metrics`), and random turns make the future uncertain given the past, which is
what separates the training methods. Nothing happens in the first `quiet` frames, so that the captioned direction is
always visible; objects never touch each other or leave the picture, so that every object can always be measured.

In worlds with events the caption of some clips changes once, and what it describes with it (`data.events`).

`simulate` makes states (where everything is), `data.drawing.render` turns states into pixels on any device, `captions`
describes them, `told` with every change. Every random number is a hash of (seed, clip index, purpose): clip i is the
same whatever the batch around it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from causalreel.data.drawing import BOUNDS, RADII, SQUARE, TRIANGLE, coverage, render
from causalreel.data.draws import keys_of, uniform
from causalreel.data.events import DRAWS, QUIET, ROOM, Change, gone_as_before, nothing, wanted_events
from causalreel.vocabulary import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    SPEEDS,
    Caption,
    ObjectSpec,
    compose,
    parse_caption,
)

__all__ = [
    "WorldConfig",
    "WorldState",
    "captions",
    "coverage",
    "parse_caption",
    "prompts",
    "render",
    "simulate",
    "specs",
    "told",
]

SPEED_PIXELS = (0.5, 1.5)
"""Pixels per frame for each word of SPEEDS."""

_REACH_LOW = ((1.0, 1.0), (SQUARE, SQUARE), (TRIANGLE * math.sqrt(3) / 2, TRIANGLE))  # to the left, to the top
_REACH_HIGH = ((1.0, 1.0), (SQUARE, SQUARE), (TRIANGLE * math.sqrt(3) / 2, TRIANGLE / 2))  # right, bottom

_HEADINGS = 4096
_HEADING_TABLE = [
    (math.cos(2 * math.pi * i / _HEADINGS), math.sin(2 * math.pi * i / _HEADINGS)) for i in range(_HEADINGS)
]  # a table, so that no result depends on how a sine is vectorised

_PLACEMENTS = 24  # tries at placing two objects apart
_ATTRIBUTE, _EVENT, _PLACEMENT, _ARRIVAL, _FRAME = 0, 64, 1 << 8, 1 << 9, 1 << 16  # first number of each kind of draw


@dataclass(frozen=True)
class WorldConfig:
    """What the world looks like and how uncertain it is."""

    size: int = 64
    """Height and width in pixels, at least 64."""
    frames: int = 45
    """Frames per clip; a shorter clip is the beginning of a longer one."""
    fps: int = 16
    """Frames per second, for writing files only."""
    max_objects: int = 2
    """1 or 2; with 2, half of the clips have two objects."""
    turn_probability: float = 0.03
    """Chance, per object and frame after the quiet frames, of a new random heading."""
    quiet: int = 8
    """Leading frames without turn or bounce, so that the captioned direction shows."""
    jitter: float = 20.0
    """Largest deviation of the first heading from its direction, in degrees, below 45."""
    gap: float = 2.0
    """Pixels that always remain free between two objects' bounding circles."""
    events: float = 0.0
    """Share of clips whose caption changes once (a few less, where there is no room); see `data.events`."""
    morph: int = 4
    """Frames in which a change happens, 4 to 8."""
    latent: int = 4
    """Frames of a latent frame behind the first one; a caption changes where one begins."""

    def __post_init__(self) -> None:
        if self.size < 64:
            raise ValueError(f"size must be at least 64, got {self.size}")
        if self.frames < 1:
            raise ValueError(f"frames must be at least 1, got {self.frames}")
        if not 1 <= self.max_objects <= MAX_OBJECTS:
            raise ValueError(f"max_objects must be 1 to {MAX_OBJECTS}, got {self.max_objects}")
        if not 0 <= self.turn_probability <= 1:
            raise ValueError(f"turn_probability must be 0 to 1, got {self.turn_probability}")
        if not 0 <= self.jitter < 45:
            raise ValueError(f"jitter must be 0 to below 45 degrees, got {self.jitter}")
        if not 0 <= self.quiet <= 12:
            raise ValueError(f"quiet must be 0 to 12 frames (the room for a straight start), got {self.quiet}")
        if not 0 <= self.gap <= 4:
            raise ValueError(f"gap must be 0 to 4 pixels, got {self.gap}")
        if not 0 <= self.events <= 1:
            raise ValueError(f"events must be 0 to 1, got {self.events}")
        if not 4 <= self.morph <= 8:
            raise ValueError(f"morph must be 4 to 8 frames, got {self.morph}")
        if self.latent < 1 or (self.events and self.frames < 1 + self.latent):
            raise ValueError(
                f"latent must be at least 1, and with events smaller than frames; got {self.latent} of {self.frames}"
            )


@dataclass(frozen=True)
class WorldState:
    """Everything about B clips: classes index the tables of `causalreel.vocabulary`. Indexing selects clips."""

    shape: Tensor
    """(B,N) long."""
    color: Tensor
    """(B,N) long; the objects of a clip differ."""
    scale: Tensor
    """(B,N) long, index into SIZES."""
    present: Tensor
    """(B,N) bool; the first object always is."""
    background: Tensor
    """(B,) long."""
    direction: Tensor
    """(B,N) long, direction of the first heading."""
    speed: Tensor
    """(B,N) long."""
    position: Tensor
    """(B,T,N,2) float32 x, y in pixels from the top left corner."""
    velocity: Tensor
    """(B,T,N,2) float32, the move from this frame to the next."""
    turned: Tensor
    """(B,T,N) bool: took a new random heading on leaving this frame."""
    bounced: Tensor
    """(B,T,N) bool: was reflected by a wall or the other object on leaving this frame."""
    config: WorldConfig = WorldConfig()
    change: Change | None = None
    """What becomes of them, in worlds with events."""

    def __len__(self) -> int:
        return self.shape.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> WorldState:
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> WorldState:
        """The same state on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> WorldState:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {k: change(v) for k, v in values.items() if isinstance(v, Tensor)}
        return dataclasses.replace(self, **changed, change=None if self.change is None else self.change.map(change))


# ---------------------------------------------------------------------------------------------------------- random


def _heading(index: Tensor) -> Tensor:
    """(...) long -> (...,2) unit vector."""
    return torch.tensor(_HEADING_TABLE, dtype=torch.float64)[index % _HEADINGS]


# ------------------------------------------------------------------------------------------------------ simulation


def simulate(
    count: int,
    *,
    seed: int,
    config: WorldConfig = WorldConfig(),
    device: torch.device | str = "cpu",
    first: int = 0,
    held_out: bool = False,
) -> WorldState:
    """Clips `first` .. `first + count - 1` of the world `seed`; computed on the CPU, then moved to `device`.

    A clip depends on (seed, its index, config) alone, bit for bit. `held_out` worlds share no clip with training ones.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    keys = keys_of(seed, first, count, held_out)
    n = config.max_objects
    draw = uniform(keys, _ATTRIBUTE, 32)  # (B,32)

    def classes(column: int, size: int) -> Tensor:
        return (draw[:, column : column + n] * size).long()  # (B,N)

    shape, scale = classes(0, len(SHAPES)), classes(2, len(SIZES))
    direction, speed = classes(4, len(DIRECTIONS)), classes(6, len(SPEEDS))
    color = classes(8, len(COLORS))
    if n > 1:  # the second colour is one of the five others
        color[:, 1] = (color[:, 0] + 1 + (draw[:, 9] * (len(COLORS) - 1)).long()) % len(COLORS)
    background = (draw[:, 10] * len(BACKGROUNDS)).long()
    present = torch.ones(count, n, dtype=torch.bool)
    if n > 1:
        present[:, 1] = draw[:, 11] < 0.5

    jitter = ((draw[:, 12 : 12 + n] * 2 - 1) * config.jitter / 360 * _HEADINGS).round().long()
    pace = torch.tensor(SPEED_PIXELS, dtype=torch.float64)[speed]  # (B,N)
    velocity = _heading(direction * (_HEADINGS // 4) + jitter) * pace[..., None]  # (B,N,2)

    body = _Body.of(shape, scale, config)
    position, apart = _place(keys, velocity, body, config)
    if n > 1:
        present[:, 1] &= apart
    events = None
    if config.events:
        looks = {"shape": shape, "color": color, "scale": scale, "direction": direction, "speed": speed}
        now = nothing(looks, background, present, config.frames)
        events = _Events(keys, now, wanted_events(now, uniform(keys, _EVENT, DRAWS), config), body, config)
    path = _run(keys, position, velocity, pace, present, body, config, events)
    happened = None if events is None else events.happened
    state = WorldState(
        shape, color, scale, present, background, direction, speed, *path, config=config, change=happened
    )
    return state.to(device)


@dataclass(frozen=True)
class _Body:
    """Where centres may be: low, high (B,N,2) from the walls, `distance` (B,) between two objects."""

    low: Tensor
    high: Tensor
    distance: Tensor

    @staticmethod
    def of(shape: Tensor, scale: Tensor, config: WorldConfig) -> _Body:
        radius = torch.tensor(RADII, dtype=torch.float64)[scale]  # (B,N)
        low = 1 + torch.tensor(_REACH_LOW, dtype=torch.float64)[shape] * radius[..., None]
        high = config.size - 1 - torch.tensor(_REACH_HIGH, dtype=torch.float64)[shape] * radius[..., None]
        bound = torch.tensor(BOUNDS, dtype=torch.float64)[shape] * radius
        return _Body(low, high, bound[:, 0] + bound[:, -1] + config.gap)

    def rows(self, rows: Tensor) -> _Body:
        return _Body(self.low[rows], self.high[rows], self.distance[rows])

    def put(self, rows: Tensor, other: _Body) -> _Body:
        """With others (n,...) in these rows (n,)."""
        low, high, distance = self.low.clone(), self.high.clone(), self.distance.clone()
        low[rows], high[rows], distance[rows] = other.low, other.high, other.distance
        return _Body(low, high, distance)

    def joined(self, other: _Body) -> _Body:
        """Where both may be."""
        low, high = torch.maximum(self.low, other.low), torch.minimum(self.high, other.high)
        return _Body(low, high, torch.maximum(self.distance, other.distance))


def _place(keys: Tensor, velocity: Tensor, body: _Body, config: WorldConfig) -> tuple[Tensor, Tensor]:
    """-> first positions (B,N,2), and whether two objects fit (B,): straight through the quiet frames, apart."""
    count, n, _ = velocity.shape
    travel = velocity * config.quiet
    low = torch.maximum(body.low, body.low - travel)[:, None]  # (B,1,N,2)
    high = torch.minimum(body.high, body.high - travel)[:, None]
    draws = uniform(keys, _PLACEMENT, _PLACEMENTS * MAX_OBJECTS * 2).view(count, _PLACEMENTS, MAX_OBJECTS, 2)[:, :, :n]
    tries = low + draws * (high - low)  # (B,tries,N,2)
    if n == 1:
        return tries[:, 0], torch.ones(count, dtype=torch.bool)
    offset = tries[:, :, 1] - tries[:, :, 0]  # (B,tries,2)
    drift = (travel[:, 1] - travel[:, 0])[:, None]  # (B,1,2)
    closest = (-(offset * drift).sum(-1) / (drift * drift).sum(-1).clamp_min(1e-9)).clamp(0, 1)  # (B,tries)
    apart = (offset + closest[..., None] * drift).norm(dim=-1) >= body.distance[:, None] + 1e-6
    choice = apart.int().argmax(dim=1)  # the first try that works
    return tries[torch.arange(count), choice], apart.any(dim=1)


def _run(
    keys: Tensor,
    position: Tensor,
    velocity: Tensor,
    pace: Tensor,
    present: Tensor,
    body: _Body,
    config: WorldConfig,
    events: _Events | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First positions and velocities (B,N,2) -> position, velocity (B,T,N,2), turned, bounced (B,T,N)."""
    n = velocity.shape[1]
    both = present.all(dim=1) if n > 1 else None
    frames: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for t in range(config.frames):
        if events is not None:
            position, velocity, pace, body = events.begin(t, position, velocity, pace)
            both = events.there.all(dim=1) if n > 1 else None
        turned = torch.zeros_like(present)
        if t >= config.quiet:
            draw = uniform(keys, _FRAME + 2 * MAX_OBJECTS * t, 2 * MAX_OBJECTS)  # (B,4)
            turned = draw[:, :n] < config.turn_probability
            if events is not None:
                turned &= ~events.is_quiet(t)[:, None]
            heading = _heading((draw[:, MAX_OBJECTS : MAX_OBJECTS + n] * _HEADINGS).long())
            velocity = torch.where(turned[..., None], heading * pace[..., None], velocity)
        before = velocity
        velocity = _off_walls(position, velocity, body)
        blocked = torch.zeros_like(present)
        if both is not None:
            velocity = _off_each_other(position, velocity, both, body)
            velocity = _off_walls(position, velocity, body)
            blocked = (both & _too_close(position + velocity, body))[:, None].expand_as(present)
        move = velocity.masked_fill(blocked[..., None], 0.0)  # caught between a wall and the other: wait one frame
        bounced = (velocity != before).any(dim=-1)
        if events is not None:
            move = events.pushed(t, position, move)
            events.reflect(bounced, velocity)
        frames.append((position, move, turned, bounced))
        position = position + move
    positions, moves, turns, bounces = (torch.stack(column, dim=1) for column in zip(*frames, strict=True))
    return positions.float(), moves.float(), turns, bounces


class _Events:
    """The events of a batch while it is simulated: which of those wanted happen, and what they do to the movement."""

    def __init__(self, keys: Tensor, first: Change, wanted: Change, body: _Body, config: WorldConfig) -> None:
        self.keys, self.first, self.wanted, self.body, self.config = keys, first, wanted, body, config
        self.happened = first
        self.there = first.present.clone()
        """(B,N): what is in the picture, however small."""
        self.goal = torch.zeros(*first.present.shape, 2, dtype=torch.float64)
        """Velocities to which changes lead."""

    def is_quiet(self, t: int) -> Tensor:
        """(B,): an event has just happened."""
        return (t >= self.happened.start) & (t < self.happened.start + QUIET)

    def _left(self, t: int) -> Tensor:
        """(B,): frames of the change that are left, this one included; 0 where there is none."""
        end = self.happened.start + self.config.morph
        return torch.where(t >= self.happened.start, end - t, 0).clamp_min(0)

    def begin(self, t: int, position: Tensor, velocity: Tensor, pace: Tensor) -> tuple[Tensor, Tensor, Tensor, _Body]:
        """Before frame t moves on: events begin, and those that have begun go on."""
        due = torch.nonzero(self.wanted.start == t)[:, 0]
        if len(due):
            position, velocity, pace = self._settle(due, position, velocity, pace)
        left = self._left(t)[:, None, None]
        velocity = torch.where(left > 0, velocity + (self.goal - velocity) / left.clamp_min(1), velocity)
        over = (t >= self.happened.start + self.config.morph)[:, None]
        self.there = torch.where(over, self.happened.present, self.there)
        return position, velocity, pace, self.body

    def _settle(self, due: Tensor, position: Tensor, velocity: Tensor, pace: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find room for the events of the clips `due` (n,), and begin those that have it."""
        config, first = self.config, self.first.map(lambda x: x[due])
        new = gone_as_before(first, self.wanted.map(lambda x: x[due]))
        fresh, body = _Body.of(new.shape, new.scale, config), self.body.rows(due)
        body = body.joined(fresh)
        speed = torch.tensor(SPEED_PIXELS, dtype=torch.float64)[new.speed]
        kept = velocity[due] * (speed / pace[due])[..., None]
        there, comes = first.present | new.present, new.present & ~first.present
        both, count = there.all(1), there.shape[1]
        draws = uniform(self.keys[due], _ARRIVAL, _PLACEMENTS * 3 * MAX_OBJECTS).view(len(due), _PLACEMENTS, 3, -1)
        done = torch.zeros_like(both)
        place, goal, direction = position[due], kept, new.direction
        for attempt in range(_PLACEMENTS):
            column = draws[:, attempt, :, :count]  # (n,3,N)
            turn = torch.tensor([attempt, attempt // 4][:count])
            way = torch.where(new.named, (new.direction + turn) % len(DIRECTIONS), new.direction)
            jitter = ((column[:, 2] * 2 - 1) * config.jitter / 360 * _HEADINGS).round().long()
            heading = _heading(way * (_HEADINGS // 4) + jitter) * speed[..., None]
            aim = torch.where((new.named & there)[..., None], heading, kept)
            some = fresh.low + column[:, :2].transpose(1, 2) * (fresh.high - fresh.low)
            at = torch.where(comes[..., None], some, position[due])
            end = torch.minimum(torch.maximum(at, fresh.low), fresh.high) + aim * ROOM
            fits = ((end >= fresh.low) & (end <= fresh.high)).all(-1) | ~(new.named & new.present)
            if count > 1:
                inside = ((at >= body.low) & (at <= body.high)).all(-1).all(-1)
                fits &= (~both | (inside & _stays_apart(at, aim * QUIET, body)))[:, None]
            now = fits.all(-1) & ~done
            place, goal = torch.where(now[:, None, None], at, place), torch.where(now[:, None, None], aim, goal)
            direction = torch.where(now[:, None], way, direction)
            done |= now
            if done.all():
                break
        happens, rows = due[done], torch.nonzero(done)[:, 0]
        begun = dataclasses.replace(new, direction=direction)
        self.happened = self.happened.put(happens, begun.map(lambda x: x[rows]))
        self.goal[happens], self.there[happens] = goal[rows], there[rows]
        self.body = self.body.put(happens, fresh.rows(rows))
        position, velocity, pace = position.clone(), velocity.clone(), pace.clone()
        position[happens], pace[happens] = place[rows], torch.where(new.present, speed, pace[due])[rows]
        velocity[happens] = torch.where(comes[..., None], goal, velocity[due])[rows]
        return position, velocity, pace

    def pushed(self, t: int, position: Tensor, move: Tensor) -> Tensor:
        """Moves (B,N,2) of what has grown beyond a wall: inside again by the change's last frame."""
        target, left = position + move, self._left(t)[:, None, None]
        outside = (self.body.low - target).clamp_min(0) - (target - self.body.high).clamp_min(0)
        return torch.where(left > 0, move + outside / (left - 1).clamp_min(1), move)

    def reflect(self, bounced: Tensor, velocity: Tensor) -> None:
        """What bounces (B,N) while it changes, and has no direction to go to, goes on from there."""
        size = velocity.norm(dim=-1, keepdim=True).clamp_min(1e-9)
        away = velocity * self.goal.norm(dim=-1, keepdim=True) / size
        self.goal = torch.where((bounced & ~self.happened.named)[..., None], away, self.goal)


def _stays_apart(position: Tensor, travel: Tensor, body: _Body) -> Tensor:
    """Positions and straight moves (B,2,2) -> whether two objects keep their distance (B,)."""
    if position.shape[1] == 1:
        return torch.ones(len(position), dtype=torch.bool)
    offset, drift = position[:, 1] - position[:, 0], travel[:, 1] - travel[:, 0]
    closest = (-(offset * drift).sum(-1) / (drift * drift).sum(-1).clamp_min(1e-9)).clamp(0, 1)
    return (offset + closest[:, None] * drift).norm(dim=-1) >= body.distance + 1e-6


def _off_walls(position: Tensor, velocity: Tensor, body: _Body) -> Tensor:
    """Turn back the components (B,N,2) that would leave the picture."""
    target = position + velocity
    velocity = torch.where(target < body.low, velocity.abs(), velocity)
    return torch.where(target > body.high, -velocity.abs(), velocity)


def _off_each_other(position: Tensor, velocity: Tensor, both: Tensor, body: _Body) -> Tensor:
    """Reflect whoever approaches the other on the line between them; speeds stay as captioned (B,2,2)."""
    meet = both & _too_close(position + velocity, body)
    offset = position[:, 1] - position[:, 0]
    normal = offset / offset.norm(dim=-1, keepdim=True).clamp_min(1e-9)  # (B,2)
    towards = (velocity * normal[:, None]).sum(-1)  # (B,2)
    towards = torch.stack([towards[:, 0].clamp_min(0), towards[:, 1].clamp_max(0)], dim=1)
    return torch.where(meet[:, None, None], velocity - 2 * towards[..., None] * normal[:, None], velocity)


def _too_close(position: Tensor, body: _Body) -> Tensor:
    """(B,2,2) -> (B,) bool."""
    return (position[:, 1] - position[:, 0]).norm(dim=-1) < body.distance


# -------------------------------------------------------------------------------------------------------- captions


def specs(state: WorldState) -> list[Caption]:
    """State -> what each clip shows, with every attribute named."""
    names = (COLORS, SHAPES, SIZES, DIRECTIONS, SPEEDS)
    columns = [getattr(state, name).tolist() for name in ("color", "shape", "scale", "direction", "speed")]
    found = []
    for clip, (shown, background) in enumerate(zip(state.present.tolist(), state.background.tolist(), strict=True)):
        objects = tuple(
            ObjectSpec(*(words[column[clip][i]] for words, column in zip(names, columns, strict=True)))
            for i, visible in enumerate(shown)
            if visible
        )
        found.append(Caption(objects, BACKGROUNDS[background]))
    return found


def captions(state: WorldState) -> list[str]:
    """State -> one full sentence per clip, as used in training: the first one, where it changes."""
    return [compose(caption) for caption in specs(state)]


def told(state: WorldState) -> list[tuple[tuple[int, str], ...]]:
    """State -> for every clip its captions, each with the latent frame from which it holds: (0, ...), (6, ...)."""
    firsts = captions(state)
    change = state.change
    if change is None:
        return [((0, text),) for text in firsts]
    config, found = state.config, []
    later = specs(dataclasses.replace(state, **{f: getattr(change, f) for f in _CLASSES}))
    rows = zip(
        firsts,
        later,
        change.start.tolist(),
        change.swapped.tolist(),
        _said(change),
        change.present.tolist(),
        strict=True,
    )
    for text, new, start, is_swapped, said, present in rows:
        if start >= config.frames:
            found.append(((0, text),))
            continue
        kept = [is_said for is_said, is_there in zip(said, present, strict=True) if is_there]
        objects = [o if s else dataclasses.replace(o, direction=None) for o, s in zip(new.objects, kept, strict=True)]
        objects = objects[::-1] if is_swapped else objects
        latent = (start - 1) // config.latent + 1
        found.append(((0, text), (latent, compose(Caption(tuple(objects), new.background)))))
    return found


_CLASSES = ("shape", "color", "scale", "present", "background", "direction", "speed")


def _said(change: Change) -> list[list[bool]]:
    return change.named.tolist()


def prompts(count: int, *, seed: int = 0, config: WorldConfig = WorldConfig()) -> list[str]:
    """Captions for evaluation; their clips are `simulate(count, seed=seed, config=config, held_out=True)`."""
    still = dataclasses.replace(config, frames=1)
    return captions(simulate(count, seed=seed, config=still, held_out=True))
