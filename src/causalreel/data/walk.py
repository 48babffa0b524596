"""The walkable world: scenes around a start, keys held in each latent frame, and the exact poses that they lead to.

A floor without end, a sky, and up to six objects in directions 60 degrees apart. Lengths are in cells of the floor;
poses and the cameras that networks get are in units of `CELL`, so that a step is minWM's 0.08. Camera axes are
OpenCV's. A key acts for a whole latent frame: half the turn, the move, half the turn, so that opposite keys undo each
other exactly. Between two latent frames the camera goes straight. `data.walk_render` draws what it sees.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causalreel.data.draws import keys_of, uniform
from causalreel.scenery import COLORS, DIRECTIONS, FLOORS, KEYS, SHAPES, SKIES, Scene, compose

CELL = 0.32
"""Units of poses in a cell of the floor."""
STEP = 0.25
"""Cells that a key moves in a latent frame."""
TURN = math.radians(12)
"""Angle that a key turns in a latent frame."""
EYE = 0.5
"""Height of the camera."""
FOCAL = 0.6
"""Focal length, of the picture's width: 79.6 degrees are seen."""
TEMPORAL = 4
"""Pixel frames of a latent frame after the first."""

RADIUS, HEIGHTS = (0.24, 0.42), (1.5, 0.85)
"""Of a pillar, and half the side and the height of a block."""
_CLEAR = 0.25
"""Room that the camera always has to an object."""
_HOLD, _RETURNS = 0.68, 0.35
"""Chance that keys stay held for another frame, and that a path goes back as it came."""
_MOVES = ((0.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0), (1.0, 0.0))
"""None, w, a, s, d: to the right and forward, in steps."""
_MOVE_SHARES = (0.2, 0.4, 0.1, 0.2, 0.1)
_TURN_SHARES = (0.4, 0.3, 0.3)
_SCENE, _PATH = 0, 64
"""Numbers of the draws of scenes and of paths."""


@dataclass(frozen=True)
class WalkConfig:
    """The world's picture and how long its clips are."""

    size: int = 64
    """Height and width in pixels."""
    latents: int = 16
    """Latent frames of a clip."""

    def __post_init__(self) -> None:
        if self.size < 16 or self.size % 8:
            raise ValueError(f"size must be a multiple of 8 and at least 16, got {self.size}")
        if not 1 <= self.latents <= 1024:
            raise ValueError(f"latents must be 1 to 1024, got {self.latents}")

    @property
    def frames(self) -> int:
        """Pixel frames."""
        return 1 + TEMPORAL * (self.latents - 1)


@dataclass(frozen=True)
class WalkState:
    """Everything about B clips: classes index the tables of `causalreel.scenery`. Indexing selects clips."""

    present: Tensor
    """(B,6) bool, an object for each direction."""
    shape: Tensor
    """(B,6) long."""
    color: Tensor
    """(B,6) long; all differ."""
    scale: Tensor
    """(B,6) float32, of radius and height."""
    place: Tensor
    """(B,6,2) float32 x, z in cells; the camera starts at 0 and looks along z."""
    floor: Tensor
    """(B,) long."""
    sky: Tensor
    """(B,) long."""
    keys: Tensor
    """(B,F,6) bool: what is held on the way to each latent frame, nothing in the first. Columns as `scenery.KEYS`."""
    yaw: Tensor
    """(B,F) float64 radians to the right, of each latent frame."""
    at: Tensor
    """(B,F,2) float64 x, z in cells."""
    config: WalkConfig = WalkConfig()

    def __len__(self) -> int:
        return self.present.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> WalkState:
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> WalkState:
        """The same state on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> WalkState:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: change(v) for k, v in values.items() if isinstance(v, Tensor)})

    def walking(self, keys: Tensor) -> WalkState:
        """The same scenes with other keys (B,F,6) bool from the start: objects stop nobody here."""
        yaw, at = walk(keys)
        return dataclasses.replace(self, keys=keys, yaw=yaw, at=at)


# ---- keys to poses ---------------------------------------------------------------------------------------------------


def walk(keys: Tensor) -> tuple[Tensor, Tensor]:
    """keys (B,F,6) -> yaw (B,F) and places (B,F,2), float64, the first 0; keys of the first frame do nothing."""
    held = keys.double()
    w, a, s, d, left, right = held.unbind(-1)
    turn = (right - left) * TURN  # (B,F)
    turn = torch.cat([torch.zeros_like(turn[:, :1]), turn[:, 1:]], dim=1)
    yaw = turn.cumsum(1)
    middle = yaw - turn / 2
    forward, aside = (w - s) * STEP, (d - a) * STEP
    moves = torch.stack(_turned(aside, forward, middle), dim=-1)  # (B,F,2)
    moves[:, 0] = 0
    return yaw, moves.cumsum(1)


def _turned(aside: Tensor, forward: Tensor, yaw: Tensor) -> tuple[Tensor, Tensor]:
    """A camera's right and forward -> x, z of the world."""
    c, s = yaw.cos(), yaw.sin()
    return c * aside + s * forward, c * forward - s * aside


def opposite(keys: Tensor) -> Tensor:
    """keys (...,6) -> w for s, a for d, left for right, and the other way round."""
    order = [KEYS.index(key) for key in ("s", "d", "w", "a", "right", "left")]
    return keys[..., order]


def there_and_back(keys: Tensor) -> Tensor:
    """keys (B,F,6) of which the first frame holds nothing -> (B,2F-1,6) that ends where it began."""
    return torch.cat([keys, opposite(keys[:, 1:]).flip(1)], dim=1)


def held(*names: Sequence[str]) -> Tensor:
    """For each frame the names of its keys -> (F,6) bool."""
    return torch.tensor([[key in frame for key in KEYS] for frame in names], dtype=torch.bool)


def cameras(yaw: Tensor, at: Tensor) -> Tensor:
    """yaw (...), places (...,2) -> w2c (...,4,4) float32, translations in units of `CELL`."""
    c, s, zero, one = yaw.cos(), yaw.sin(), torch.zeros_like(yaw), torch.ones_like(yaw)
    x, z = (CELL * at).unbind(-1)
    rows = [
        torch.stack([c, zero, -s, s * z - c * x], -1),
        torch.stack([zero, one, zero, zero], -1),
        torch.stack([s, zero, c, -s * x - c * z], -1),
        torch.stack([zero, zero, zero, one], -1),
    ]
    return torch.stack(rows, dim=-2).float()


def from_cameras(w2c: Tensor) -> tuple[Tensor, Tensor]:
    """w2c (...,4,4) of an upright camera -> yaw (...) and places (...,2) in cells, as `cameras` took them; float64."""
    w2c = w2c.double()
    rotation, offset = w2c[..., :3, :3], w2c[..., :3, 3:]
    place = -(rotation.mT @ offset)[..., 0] / CELL
    return torch.atan2(rotation[..., 2, 0], rotation[..., 0, 0]), place[..., [0, 2]]


def fields(state: WalkState) -> dict[str, Tensor]:
    """State -> the fields of the conditioning: w2c (B,F,4,4), intrinsics (B,F,4), actions (B,F,6), float32."""
    lens = torch.tensor([FOCAL, FOCAL, 0.5, 0.5], device=state.yaw.device)
    return {
        "w2c": cameras(state.yaw, state.at),
        "intrinsics": lens.expand(*state.yaw.shape, 4).clone(),
        "actions": state.keys.float(),
    }


def between(values: Tensor) -> Tensor:
    """Values of latent frames (B,F,...) -> of pixel frames (B,1+4(F-1),...), on straight lines between them."""
    share = torch.arange(1, TEMPORAL + 1, device=values.device, dtype=values.dtype) / TEMPORAL
    share = share.view(1, 1, TEMPORAL, *[1] * (values.ndim - 2))
    before, after = values[:, :-1].unsqueeze(2), values[:, 1:].unsqueeze(2)
    return torch.cat([values[:, :1], (before + share * (after - before)).flatten(1, 2)], dim=1)


# ---- random scenes and paths -----------------------------------------------------------------------------------------


def simulate(
    count: int,
    *,
    seed: int,
    config: WalkConfig = WalkConfig(),
    device: torch.device | str = "cpu",
    first: int = 0,
    held_out: bool = False,
) -> WalkState:
    """Clips `first` .. `first + count - 1` of the world `seed`; computed on the CPU, then moved to `device`.

    A clip depends on (seed, its index, config) alone, bit for bit. `held_out` worlds share no clip with training ones.
    """
    clips = keys_of(seed ^ 0x57A1C, first, count, held_out)
    scene = _scenes(clips, config)
    keys = _paths(clips, scene)
    return scene.walking(keys).to(device)


def _scenes(clips: Tensor, config: WalkConfig) -> WalkState:
    count, n = len(clips), len(DIRECTIONS)
    draw = uniform(clips, _SCENE, 7 * n + 2)
    there, shape, order, size, far, aside, most = draw[:, : 7 * n].view(count, 7, n).unbind(1)
    least = most.argsort(1).argsort(1) < 3  # three that are there in any case
    bearing = torch.arange(n) * (math.pi / 3) + (aside * 2 - 1) * math.radians(22)
    distance = 1.8 + 2.7 * far
    return WalkState(
        present=(there < 0.75) | (least & ((there < 0.75).sum(1, keepdim=True) < 3)),
        shape=(shape * len(SHAPES)).long(),
        color=order.argsort(1),
        scale=(0.9 + 0.2 * size).float(),
        place=(torch.stack([bearing.sin(), bearing.cos()], -1) * distance[..., None]).float(),
        floor=(draw[:, -2] * len(FLOORS)).long(),
        sky=(draw[:, -1] * len(SKIES)).long(),
        keys=torch.zeros(count, config.latents, len(KEYS), dtype=torch.bool),
        yaw=torch.zeros(count, config.latents, dtype=torch.float64),
        at=torch.zeros(count, config.latents, 2, dtype=torch.float64),
        config=config,
    )


def _paths(clips: Tensor, scene: WalkState) -> Tensor:
    """-> keys (B,F,6): held for a while, never into an object, some back as they came."""
    count, frames = len(clips), scene.config.latents
    draw = uniform(clips, _PATH, 2 + 4 * frames)
    returns = draw[:, 0] < _RETURNS
    turning = 3 + (draw[:, 1] * max(1, (frames - 1) // 2 - 2)).long()  # frames there, of a path that returns
    move, turn = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.long)
    yaw, at = torch.zeros(count, dtype=torch.float64), torch.zeros(count, 2, dtype=torch.float64)
    table, rows = torch.tensor(_MOVES, dtype=torch.float64), torch.arange(count)
    found = torch.zeros(count, frames, len(KEYS), dtype=torch.bool)
    for f in range(1, frames):
        fresh = draw[:, 2 + 4 * f] >= _HOLD if f > 1 else torch.ones(count, dtype=torch.bool)
        move = torch.where(fresh, _chosen(draw[:, 3 + 4 * f], _MOVE_SHARES), move)
        turn = torch.where(fresh, _chosen(draw[:, 4 + 4 * f], _TURN_SHARES), turn)
        angle = (turn == 2).double() * TURN - (turn == 1).double() * TURN
        step = torch.stack(_turned(*(table[move] * STEP).unbind(-1), yaw + angle / 2), dim=-1)
        hits = _hits(at + step, scene)
        side = 1 + (draw[:, 5 + 4 * f] < 0.5).long()  # a turn in place of a move that would end in an object
        turn = torch.where(hits & (turn == 0), side, turn)
        move = move.masked_fill(hits, 0)
        keys = torch.zeros(count, len(KEYS), dtype=torch.bool)
        keys[rows[move > 0], move[move > 0] - 1] = True
        keys[rows[turn > 0], 3 + turn[turn > 0]] = True
        back = returns & (f > turning) & (f <= 2 * turning)
        mirror = found[rows, (2 * turning + 1 - f).clamp(0, frames - 1)]
        keys = torch.where(back[:, None], opposite(mirror), keys)
        found[:, f] = keys
        w, a, s, d, left, right = keys.double().unbind(-1)
        angle = (right - left) * TURN
        at = at + torch.stack(_turned((d - a) * STEP, (w - s) * STEP, yaw + angle / 2), dim=-1)
        yaw = yaw + angle
    return found


def _chosen(u: Tensor, shares: Sequence[float]) -> Tensor:
    """u (B,) in [0,1) -> an index (B,) with these chances."""
    return torch.bucketize(u.contiguous(), torch.tensor(shares, dtype=torch.float64).cumsum(0)[:-1], right=True)


def is_free(state: WalkState) -> Tensor:
    """(B,) bool: no frame's camera is nearer to an object than paths of the world come."""
    hits = torch.stack([_hits(at, state) for at in state.at.unbind(1)])
    return ~hits.any(0)


def reach(scene: WalkState) -> Tensor:
    """(B,6) float64: how far from each object's middle it ends at most; 0 where there is none."""
    outer = torch.tensor((RADIUS[0], RADIUS[1] * math.sqrt(2)), dtype=torch.float64, device=scene.shape.device)
    return outer[scene.shape] * scene.scale * scene.present


def _hits(at: Tensor, scene: WalkState) -> Tensor:
    """places (B,2) -> (B,) whether an object is nearer than the room that the camera has."""
    distance = (scene.place.double() - at[:, None]).norm(dim=-1)
    return ((distance < reach(scene) + _CLEAR) & scene.present).any(1)


# ---- captions --------------------------------------------------------------------------------------------------------


def scenes(state: WalkState) -> list[Scene]:
    """State -> what each clip's caption says: all of it."""
    columns = (
        state.present.tolist(),
        state.color.tolist(),
        state.shape.tolist(),
        state.floor.tolist(),
        state.sky.tolist(),
    )
    found = []
    for present, color, shape, floor, sky in zip(*columns, strict=True):
        there = zip(DIRECTIONS, present, color, shape, strict=True)
        objects = {name: (COLORS[c], SHAPES[s]) if is_there else None for name, is_there, c, s in there}
        found.append(Scene(objects, FLOORS[floor], SKIES[sky]))
    return found


def captions(state: WalkState) -> list[str]:
    """State -> one full sentence per clip, as used in training. Directions are those of the start."""
    return [compose(scene) for scene in scenes(state)]
