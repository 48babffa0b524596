"""The worlds whose clips are rendered, by name: what each gives to whoever encodes, trains or measures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from causalreel.data import drawing, walk, walk_render, world
from causalreel.data.timed import joined


@dataclass(frozen=True)
class Clips:
    """Rendered clips."""

    video: Tensor
    """(B,T,3,H,W) float32 in [-1,1]."""
    captions: list[str]
    fields: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Fields of the conditioning, name -> (B,F,...)."""


class MakesClips(Protocol):
    """count, seed, first, device -> clips `first` .. `first + count - 1` of the training world `seed`."""

    def __call__(self, count: int, *, seed: int, first: int = 0, device: torch.device | str = "cpu") -> Clips: ...


@dataclass(frozen=True)
class World:
    """A world as a row."""

    clips: MakesClips
    facts: Mapping[str, Any]
    """What decides its clips beside the seed, as prepared folders remember it; all worlds have the same names, and None
    is what folders older than a name have."""


def flat(config: world.WorldConfig = world.WorldConfig()) -> World:
    """Objects that move on a plane (`data.world`)."""

    def clips(count: int, *, seed: int, first: int = 0, device: torch.device | str = "cpu") -> Clips:
        state = world.simulate(count, seed=seed, first=first, config=config, device=device)
        return Clips(drawing.render(state), [joined(clip) for clip in world.told(state)])

    events = f"{config.events} in {config.morph} frames, each in its place" if config.events else None
    usual = world.WorldConfig()
    if events and (config.named, config.same_background) != (usual.named, usual.same_background):
        events += f", directions named {config.named}, the same background {config.same_background}"
    rest = {"two_objects": "two objects", "crowded": "without room", "direction_alone": "a direction alone"}
    for name, words in rest.items():
        if events and getattr(config, name):
            events += f", {words} {getattr(config, name)}"
    return World(clips, {"world": None, "frames": config.frames, "size": config.size, "events": events})


def walkable(config: walk.WalkConfig = walk.WalkConfig()) -> World:
    """A place that one walks in (`data.walk`)."""

    def clips(count: int, *, seed: int, first: int = 0, device: torch.device | str = "cpu") -> Clips:
        state = walk.simulate(count, seed=seed, first=first, config=config, device=device)
        return Clips(walk_render.render(state), walk.captions(state), walk.fields(state))

    return World(clips, {"world": "walk", "frames": config.frames, "size": config.size, "events": None})


WORLDS = {"flat": flat, "walk": walkable}
"""Name -> what makes the world with its default settings."""
