"""The tiny world: procedural 64x64 videos of one or two coloured shapes that move, bounce and sometimes turn.

It exists so that every stage can be trained and *measured* in minutes: each clip has a caption, the caption can be
checked exactly from the pixels (`eval.metrics`), and random turns make the future uncertain given the past, which is
what separates the training methods. Nothing happens in the first `quiet` frames, so that the captioned direction is
always visible; objects never touch each other or leave the picture, so that every object can always be measured.

`simulate` makes states (where everything is), `render` turns states into pixels on any device, `captions` describes
them. Every random number is a hash of (seed, clip index, purpose): clip i is the same whatever the batch around it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from causalreel.vocabulary import (
    BACKGROUND_RGB,
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
]

COLOR_RGB = ((230, 38, 38), (38, 184, 64), (44, 84, 240), (250, 216, 40), (226, 50, 200), (40, 212, 228))
"""Colours 0..255 of each word of COLORS."""

RADII = (6.5, 10.0)
"""Pixels, for each word of SIZES: a circle's radius; squares have the same area, triangles are a little smaller."""

SPEED_PIXELS = (0.5, 1.5)
"""Pixels per frame for each word of SPEEDS."""

_SQUARE, _TRIANGLE = math.sqrt(math.pi) / 2, 1.4  # half side and circumradius, in radii
BOUNDS = (1.0, _SQUARE * math.sqrt(2), _TRIANGLE)  # bounding circle of each shape, in radii
_REACH_LOW = ((1.0, 1.0), (_SQUARE, _SQUARE), (_TRIANGLE * math.sqrt(3) / 2, _TRIANGLE))  # to the left, to the top
_REACH_HIGH = ((1.0, 1.0), (_SQUARE, _SQUARE), (_TRIANGLE * math.sqrt(3) / 2, _TRIANGLE / 2))  # right, bottom

_HEADINGS = 4096
_HEADING_TABLE = [
    (math.cos(2 * math.pi * i / _HEADINGS), math.sin(2 * math.pi * i / _HEADINGS)) for i in range(_HEADINGS)
]  # a table, so that no result depends on how a sine is vectorised

_PLACEMENTS = 24  # tries at placing two objects apart
_ATTRIBUTE, _PLACEMENT, _FRAME = 0, 1 << 8, 1 << 16  # first purpose number of each kind of random draw


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

    def __len__(self) -> int:
        return self.shape.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> WorldState:
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> WorldState:
        """The same state on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> WorldState:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: change(v) for k, v in values.items() if isinstance(v, Tensor)})


# ---------------------------------------------------------------------------------------------------------- random


def _mix(x: Tensor) -> Tensor:
    """int64 -> int64, the finaliser of SplitMix64 (Steele, Lea and Flood 2014) in wrapping arithmetic."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _uniform(keys: Tensor, purpose: int, count: int = 1) -> Tensor:
    """keys (B,) int64 -> (B,count) float64 in [0, 1): draws number purpose, purpose+1, ... of each clip."""
    number = torch.arange(purpose + 1, purpose + 1 + count, dtype=torch.int64)
    bits = _mix(keys[:, None] + number * -0x61C8864680B583EB)  # (B,count)
    return ((bits >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def _keys(seed: int, first: int, count: int, held_out: bool) -> Tensor:
    """(count,) int64: one well mixed number per clip."""
    if not 0 <= seed < 1 << 62:
        raise ValueError(f"seed must be 0 to 2**62 - 1, got {seed}")
    base = _mix(torch.tensor([2 * seed + int(held_out)], dtype=torch.int64) ^ 0x5851F42D4C957F2D)
    return _mix(base + _mix(torch.arange(first, first + count, dtype=torch.int64)))


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
    keys = _keys(seed, first, count, held_out)
    n = config.max_objects
    draw = _uniform(keys, _ATTRIBUTE, 32)  # (B,32)

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
    path = _run(keys, position, velocity, pace, present, body, config)
    state = WorldState(shape, color, scale, present, background, direction, speed, *path, config=config)
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


def _place(keys: Tensor, velocity: Tensor, body: _Body, config: WorldConfig) -> tuple[Tensor, Tensor]:
    """-> first positions (B,N,2), and whether two objects fit (B,): straight through the quiet frames, apart."""
    count, n, _ = velocity.shape
    travel = velocity * config.quiet
    low = torch.maximum(body.low, body.low - travel)[:, None]  # (B,1,N,2)
    high = torch.minimum(body.high, body.high - travel)[:, None]
    draws = _uniform(keys, _PLACEMENT, _PLACEMENTS * MAX_OBJECTS * 2).view(count, _PLACEMENTS, MAX_OBJECTS, 2)[:, :, :n]
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
    keys: Tensor, position: Tensor, velocity: Tensor, pace: Tensor, present: Tensor, body: _Body, config: WorldConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First positions and velocities (B,N,2) -> position, velocity (B,T,N,2), turned, bounced (B,T,N)."""
    n = velocity.shape[1]
    both = present.all(dim=1) if n > 1 else None
    frames: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for t in range(config.frames):
        turned = torch.zeros_like(present)
        if t >= config.quiet:
            draw = _uniform(keys, _FRAME + 2 * MAX_OBJECTS * t, 2 * MAX_OBJECTS)  # (B,4)
            turned = draw[:, :n] < config.turn_probability
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
        frames.append((position, move, turned, (velocity != before).any(dim=-1)))
        position = position + move
    positions, moves, turns, bounces = (torch.stack(column, dim=1) for column in zip(*frames, strict=True))
    return positions.float(), moves.float(), turns, bounces


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


# ------------------------------------------------------------------------------------------------------- rendering


def coverage(dx: Tensor, dy: Tensor, shape: Tensor, radius: Tensor) -> Tensor:
    """Offsets from an object's centre, its shape class and radius (all broadcast) -> how much of a pixel it covers.

    Anti-aliasing is half a pixel on either side of the signed distance; corners are mitred.
    """
    circle = torch.sqrt(dx * dx + dy * dy + 1e-12) - radius
    square = torch.maximum(dx.abs(), dy.abs()) - _SQUARE * radius
    slope = dx.abs() * (math.sqrt(3) / 2) - dy * 0.5
    triangle = torch.maximum(slope, dy) - 0.5 * _TRIANGLE * radius
    distance = torch.where(shape == 0, circle, torch.where(shape == 1, square, triangle))
    return (0.5 - distance).clamp(0, 1)


def render(state: WorldState, *, chunk: int = 32) -> Tensor:
    """State -> video (B,T,3,H,W) float32 in [-1,1], on the state's device; `chunk` clips at a time to bound memory."""
    size, device = state.config.size, state.position.device
    count, frames, _, _ = state.position.shape
    video = torch.empty(count, frames, 3, size, size, device=device)
    for start in range(0, count, chunk):
        video[start : start + chunk] = _paint(state[start : start + chunk], size)
    return video


def _paint(state: WorldState, size: int) -> Tensor:
    device = state.position.device
    colors = torch.tensor(COLOR_RGB, device=device).float() / 127.5 - 1
    backgrounds = torch.tensor(BACKGROUND_RGB, device=device).float() / 127.5 - 1
    radii = torch.tensor(RADII, device=device)
    pixel = torch.arange(size, device=device) + 0.5
    picture = backgrounds[state.background][:, None, :, None, None]  # (B,1,3,1,1)
    for i in range(state.shape.shape[1]):
        x, y = state.position[:, :, i, 0], state.position[:, :, i, 1]  # (B,T)
        dx, dy = pixel - x[..., None, None], pixel[:, None] - y[..., None, None]  # (B,T,1,W) (B,T,H,1)
        shape, radius = state.shape[:, i, None, None, None], radii[state.scale[:, i, None, None, None]]
        alpha = coverage(dx, dy, shape, radius) * state.present[:, i, None, None, None]  # (B,T,H,W)
        picture = torch.lerp(
            picture.expand(*alpha.shape[:2], 3, size, size),
            colors[state.color[:, i]][:, None, :, None, None],
            alpha[:, :, None],
        )
    return picture


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
    """State -> one full sentence per clip, as used in training."""
    return [compose(caption) for caption in specs(state)]


def prompts(count: int, *, seed: int = 0, config: WorldConfig = WorldConfig()) -> list[str]:
    """Captions for evaluation; their clips are `simulate(count, seed=seed, config=config, held_out=True)`."""
    still = dataclasses.replace(config, frames=1)
    return captions(simulate(count, seed=seed, config=still, held_out=True))
