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
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from causalreel.data.drawing import coverage, render
from causalreel.data.draws import keys_of, uniform
from causalreel.data.events import DRAWS, Change, nothing, wanted_events
from causalreel.data.movement import ATTRIBUTE, EVENT, HEADINGS, SPEED_PIXELS, Body, Events, heading_of, place, run
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
    "SPEED_PIXELS",
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


KINDS = ("named", "same_background", "two_objects", "crowded", "direction_alone")
"""The chances of `WorldConfig` that are of events."""


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
    named: float = 0.75
    """Chance that an event names an object's direction; one that comes has its direction named always."""
    same_background: float = 0.0
    """Chance that an event leaves the background as it is, whatever it draws: what models obey least is a direction
    where nothing but the objects changes."""
    two_objects: float = 0.0
    """Chance that an event ends with two objects, whatever it draws: of a change to two, models show most that does
    not belong there."""
    crowded: float = 0.0
    """Chance that an event happens whether or not two objects have room, as with people's prompts."""
    direction_alone: float = 0.0
    """Chance that an event says nothing but another direction, of one object or of both: what people ask for most who
    steer, and what events drawn word by word hardly ever are."""
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
        for name in KINDS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {getattr(self, name)}")
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
    keys = keys_of(seed, first, count, held_out)
    n = config.max_objects
    draw = uniform(keys, ATTRIBUTE, 32)  # (B,32)

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

    jitter = ((draw[:, 12 : 12 + n] * 2 - 1) * config.jitter / 360 * HEADINGS).round().long()
    pace = torch.tensor(SPEED_PIXELS, dtype=torch.float64)[speed]  # (B,N)
    velocity = heading_of(direction * (HEADINGS // 4) + jitter) * pace[..., None]  # (B,N,2)

    body = Body.of(shape, scale, config)
    position, apart = place(keys, velocity, body, config)
    if n > 1:
        present[:, 1] &= apart
    events = None
    if config.events:
        looks = {"shape": shape, "color": color, "scale": scale, "direction": direction, "speed": speed}
        now = nothing(looks, background, present, config.frames)
        events = Events(keys, now, wanted_events(now, uniform(keys, EVENT, DRAWS), config), body, config)
    path = run(keys, position, velocity, pace, present, body, config, events)
    happened = None if events is None else events.happened
    state = WorldState(
        shape, color, scale, present, background, direction, speed, *path, config=config, change=happened
    )
    return state.to(device)


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
    """State -> for every clip its captions, each with the latent frame from which it holds: (0, ...), (6, ...).

    An object has one place in both, as in what sessions tell a model (`vocabulary.complete`, `vocabulary.retold`): of
    two of which the second stays alone, the first caption names that one first.
    """
    firsts = specs(state)
    change = state.change
    if change is None:
        return [((0, compose(first)),) for first in firsts]
    config, found = state.config, []
    later = specs(dataclasses.replace(state, **{f: getattr(change, f) for f in _CLASSES}))
    rows = zip(firsts, later, change.start.tolist(), change.named.tolist(), change.present.tolist(), strict=True)
    for first, new, start, said, present in rows:
        if start >= config.frames:
            found.append(((0, compose(first)),))
            continue
        if not present[0]:  # the first one goes: the one that stays has its place in both
            first = Caption(first.objects[::-1], first.background)
        kept = [is_said for is_said, is_there in zip(said, present, strict=True) if is_there]
        objects = [o if s else dataclasses.replace(o, direction=None) for o, s in zip(new.objects, kept, strict=True)]
        latent = (start - 1) // config.latent + 1
        found.append(((0, compose(first)), (latent, compose(Caption(tuple(objects), new.background)))))
    return found


_CLASSES = ("shape", "color", "scale", "present", "background", "direction", "speed")


def prompts(count: int, *, seed: int = 0, config: WorldConfig = WorldConfig()) -> list[str]:
    """Captions for evaluation; their clips are `simulate(count, seed=seed, config=config, held_out=True)`."""
    still = dataclasses.replace(config, frames=1)
    return captions(simulate(count, seed=seed, config=still, held_out=True))
