"""How things move in the tiny world: straight on, off walls and each other, turning now and then, and changing.

Positions are float64 and every random number is a hash, so that a clip is the same on every machine.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from causalreel.data.drawing import BOUNDS, RADII, SQUARE, TRIANGLE
from causalreel.data.draws import uniform
from causalreel.data.events import QUIET, ROOM, Change, gone_as_before
from causalreel.vocabulary import DIRECTIONS, MAX_OBJECTS

if TYPE_CHECKING:
    from causalreel.data.world import WorldConfig

SPEED_PIXELS = (0.5, 1.5)
"""Pixels per frame for each word of SPEEDS."""

_REACH_LOW = ((1.0, 1.0), (SQUARE, SQUARE), (TRIANGLE * math.sqrt(3) / 2, TRIANGLE))  # to the left, to the top
_REACH_HIGH = ((1.0, 1.0), (SQUARE, SQUARE), (TRIANGLE * math.sqrt(3) / 2, TRIANGLE / 2))  # right, bottom

HEADINGS = 4096
_HEADING_TABLE = [
    (math.cos(2 * math.pi * i / HEADINGS), math.sin(2 * math.pi * i / HEADINGS)) for i in range(HEADINGS)
]  # a table, so that no result depends on how a sine is vectorised

_PLACEMENTS = 24  # tries at placing two objects apart
# first number of each kind of draw
ATTRIBUTE, EVENT, _PLACEMENT, _ARRIVAL, _CROWD, _FRAME = 0, 64, 1 << 8, 1 << 9, 1 << 10, 1 << 16


def heading_of(index: Tensor) -> Tensor:
    """(...) long -> (...,2) unit vector."""
    return torch.tensor(_HEADING_TABLE, dtype=torch.float64)[index % HEADINGS]


@dataclass(frozen=True)
class Body:
    """Where centres may be: low, high (B,N,2) from the walls, `distance` (B,) between two objects."""

    low: Tensor
    high: Tensor
    distance: Tensor

    @staticmethod
    def of(shape: Tensor, scale: Tensor, config: WorldConfig) -> Body:
        radius = torch.tensor(RADII, dtype=torch.float64)[scale]  # (B,N)
        low = 1 + torch.tensor(_REACH_LOW, dtype=torch.float64)[shape] * radius[..., None]
        high = config.size - 1 - torch.tensor(_REACH_HIGH, dtype=torch.float64)[shape] * radius[..., None]
        bound = torch.tensor(BOUNDS, dtype=torch.float64)[shape] * radius
        return Body(low, high, bound[:, 0] + bound[:, -1] + config.gap)

    def rows(self, rows: Tensor) -> Body:
        return Body(self.low[rows], self.high[rows], self.distance[rows])

    def put(self, rows: Tensor, other: Body) -> Body:
        """With others (n,...) in these rows (n,)."""
        low, high, distance = self.low.clone(), self.high.clone(), self.distance.clone()
        low[rows], high[rows], distance[rows] = other.low, other.high, other.distance
        return Body(low, high, distance)

    def joined(self, other: Body) -> Body:
        """Where both may be."""
        low, high = torch.maximum(self.low, other.low), torch.minimum(self.high, other.high)
        return Body(low, high, torch.maximum(self.distance, other.distance))


def place(keys: Tensor, velocity: Tensor, body: Body, config: WorldConfig) -> tuple[Tensor, Tensor]:
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


def run(
    keys: Tensor,
    position: Tensor,
    velocity: Tensor,
    pace: Tensor,
    present: Tensor,
    body: Body,
    config: WorldConfig,
    events: Events | None,
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
            heading = heading_of((draw[:, MAX_OBJECTS : MAX_OBJECTS + n] * HEADINGS).long())
            velocity = torch.where(turned[..., None], heading * pace[..., None], velocity)
        before = velocity
        velocity = _off_walls(position, velocity, body)
        blocked = torch.zeros_like(present)
        if both is not None:
            velocity = _off_each_other(position, velocity, both, body)
            velocity = _off_walls(position, velocity, body)
            nearer = _distance(position + velocity) <= _distance(position)
            blocked = (both & nearer & _too_close(position + velocity, body))[:, None].expand_as(present)
        move = velocity.masked_fill(blocked[..., None], 0.0)  # caught between a wall and the other: wait one frame
        bounced = (velocity != before).any(dim=-1)
        if events is not None:
            move = events.pushed(t, position, move)
            events.reflect(bounced, velocity)
        frames.append((position, move, turned, bounced))
        position = position + move
    positions, moves, turns, bounces = (torch.stack(column, dim=1) for column in zip(*frames, strict=True))
    return positions.float(), moves.float(), turns, bounces


class Events:
    """The events of a batch while it is simulated: which of those wanted happen, and what they do to the movement."""

    def __init__(self, keys: Tensor, first: Change, wanted: Change, body: Body, config: WorldConfig) -> None:
        self.keys, self.first, self.wanted, self.body, self.config = keys, first, wanted, body, config
        self.happened = first
        self.there = first.present.clone()
        """(B,N): what is in the picture, however small."""
        self.goal = torch.zeros(*first.present.shape, 2, dtype=torch.float64)
        """Velocities to which changes lead."""
        self.crowded = uniform(keys, _CROWD, 1)[:, 0] < config.crowded
        """(B,): the event happens whether or not the objects have room."""

    def is_quiet(self, t: int) -> Tensor:
        """(B,): an event has just happened."""
        return (t >= self.happened.start) & (t < self.happened.start + QUIET)

    def _left(self, t: int) -> Tensor:
        """(B,): frames of the change that are left, this one included; 0 where there is none."""
        end = self.happened.start + self.config.morph
        return torch.where(t >= self.happened.start, end - t, 0).clamp_min(0)

    def begin(self, t: int, position: Tensor, velocity: Tensor, pace: Tensor) -> tuple[Tensor, Tensor, Tensor, Body]:
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
        fresh, body = Body.of(new.shape, new.scale, config), self.body.rows(due)
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
            jitter = ((column[:, 2] * 2 - 1) * config.jitter / 360 * HEADINGS).round().long()
            heading = heading_of(way * (HEADINGS // 4) + jitter) * speed[..., None]
            aim = torch.where((new.named & there)[..., None], heading, kept)
            some = fresh.low + column[:, :2].transpose(1, 2) * (fresh.high - fresh.low)
            at = torch.where(comes[..., None], some, position[due])
            end = torch.minimum(torch.maximum(at, fresh.low), fresh.high) + aim * ROOM
            fits = ((end >= fresh.low) & (end <= fresh.high)).all(-1) | ~(new.named & new.present)
            if count > 1:
                inside = ((at >= body.low) & (at <= body.high)).all(-1).all(-1)
                has_room = self.crowded[due] | (inside & _stays_apart(at, aim * QUIET, body))
                fits &= (~both | has_room)[:, None]
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
        """Moves (B,N,2) of what has grown beyond a wall, or into the other: free again by the change's last frame."""
        left = self._left(t)[:, None, None]
        if position.shape[1] > 1:
            short = (self.body.distance + 1e-6 - _distance(position + move)).clamp_min(0)
            short = torch.where(self.crowded & self.there.all(dim=1), short / 2, 0)[:, None, None]
            away = _normal(position)[:, None] * torch.tensor([[-1.0], [1.0]])  # (B,2,2)
            move = torch.where(left > 0, move + away * short / left.clamp_min(1), move)
        target = position + move
        outside = (self.body.low - target).clamp_min(0) - (target - self.body.high).clamp_min(0)
        return torch.where(left > 0, move + outside / (left - 1).clamp_min(1), move)

    def reflect(self, bounced: Tensor, velocity: Tensor) -> None:
        """What bounces (B,N) while it changes, and has no direction to go to, goes on from there."""
        size = velocity.norm(dim=-1, keepdim=True).clamp_min(1e-9)
        away = velocity * self.goal.norm(dim=-1, keepdim=True) / size
        self.goal = torch.where((bounced & ~self.happened.named)[..., None], away, self.goal)


def _stays_apart(position: Tensor, travel: Tensor, body: Body) -> Tensor:
    """Positions and straight moves (B,2,2) -> whether two objects keep their distance (B,)."""
    if position.shape[1] == 1:
        return torch.ones(len(position), dtype=torch.bool)
    offset, drift = position[:, 1] - position[:, 0], travel[:, 1] - travel[:, 0]
    closest = (-(offset * drift).sum(-1) / (drift * drift).sum(-1).clamp_min(1e-9)).clamp(0, 1)
    return (offset + closest[:, None] * drift).norm(dim=-1) >= body.distance + 1e-6


def _off_walls(position: Tensor, velocity: Tensor, body: Body) -> Tensor:
    """Turn back the components (B,N,2) that would leave the picture."""
    target = position + velocity
    velocity = torch.where(target < body.low, velocity.abs(), velocity)
    return torch.where(target > body.high, -velocity.abs(), velocity)


def _off_each_other(position: Tensor, velocity: Tensor, both: Tensor, body: Body) -> Tensor:
    """Reflect whoever approaches the other on the line between them; speeds stay as captioned (B,2,2)."""
    meet = both & _too_close(position + velocity, body)
    normal = _normal(position)
    towards = (velocity * normal[:, None]).sum(-1)  # (B,2)
    towards = torch.stack([towards[:, 0].clamp_min(0), towards[:, 1].clamp_max(0)], dim=1)
    return torch.where(meet[:, None, None], velocity - 2 * towards[..., None] * normal[:, None], velocity)


def _too_close(position: Tensor, body: Body) -> Tensor:
    """(B,2,2) -> (B,) bool."""
    return _distance(position) < body.distance


def _distance(position: Tensor) -> Tensor:
    """(B,2,2) -> (B,)."""
    return (position[:, 1] - position[:, 0]).norm(dim=-1)


def _normal(position: Tensor) -> Tensor:
    """(B,2,2) -> (B,2): from the first object to the second, of length 1."""
    offset = position[:, 1] - position[:, 0]
    return offset / offset.norm(dim=-1, keepdim=True).clamp_min(1e-9)
