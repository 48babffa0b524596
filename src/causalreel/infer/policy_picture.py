"""What a context policy lets every chunk see, and where: as data, and as a picture.

Policies that look at what frames hold are asked during the rollout of a small random network, so that their choices
show the rule and not a model's.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.masks import frames_of
from causalreel.nn.policies.interface import ContextPolicy, Frame, advance
from causalreel.nn.policies.registry import described
from causalreel.nn.presets import ModelConfig
from causalreel.nn.token_cache import TokenCache
from causalreel.types import Conditioning

TOKENS = 4
"""Of a frame of the random network."""


@dataclass(frozen=True)
class Sight:
    """What one chunk sees; frames below 0 are made up from others."""

    start: int
    own: tuple[int, ...]
    """Positions of its frames."""
    read: tuple[tuple[int, int, float], ...]
    """(frame, position, share of its tokens) of what it reads, in order."""


def sights(policy: ContextPolicy, frames: int, chunk: int) -> list[Sight]:
    """What each chunk of a video of so many latent frames sees; ValueError for chunks that the policy cannot have."""
    policy.check(chunk)
    starts = range(0, frames // chunk * chunk, chunk)
    if policy.selects:
        return _of_a_rollout(policy, starts, chunk)
    held: tuple[Frame, ...] = ()
    found = []
    for start in starts:
        facts = frames_of([chunk], start=start)
        view = policy.view(held, facts)
        read = zip((frame.index for frame in view.frames), view.positions, strict=True)
        found.append(Sight(start, view.own, tuple((frame, at, 1.0) for frame, at in read)))
        held = advance(policy, held, facts)
    return found


@torch.no_grad()
def _of_a_rollout(policy: ContextPolicy, starts: range, chunk: int) -> list[Sight]:
    torch.manual_seed(0)
    config = ModelConfig(dim=24, ffn_dim=24, heads=2, layers=1, text_dim=8, text_length=4, freq_dim=16, channels=4)
    net, generator = DiTDenoiser(config, context=policy), torch.Generator().manual_seed(0)
    cache, told, found = net.new_cache(), Conditioning(torch.zeros(1, 4, 8)), []
    assert isinstance(cache, TokenCache)
    for start in starts:
        first, entries, read = cache.context.first_position(start, cache.held), cache.layers[0], Counter()
        if entries is not None:
            read.update(zip(entries.frames[0].tolist(), entries.positions[0].tolist(), strict=True))
        seen = tuple((frame, at, count / TOKENS) for (frame, at), count in read.items())
        found.append(Sight(start, tuple(range(first, first + chunk)), seen))
        x = torch.randn(1, chunk, 4, 4, 4, generator=generator)
        net(x, torch.zeros(1, chunk), told, sizes=[chunk], start=start, cache=cache)
        cache.commit(chunk)
    return found


# ---- the picture

RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 201, 37))
"""Colours from the first frame to the last."""
OWN, MADE_UP, INK, GRID = (20, 20, 20), (214, 39, 40), (60, 60, 60), (232, 232, 232)
MARGIN, GAP, HEAD, FOOT = 46, 44, 40, 34


def draw(policy: ContextPolicy, frames: int, chunk: int, path: Path, *, cell: int = 6) -> list[Sight]:
    """Write a PNG: a row for each chunk, on the left which frames it sees, on the right at which positions."""
    from PIL import Image, ImageDraw

    found = sights(policy, frames, chunk)
    last = max(max((*sight.own, *(at for _, at, _ in sight.read))) for sight in found)
    left, right, height = (frames + 2) * cell, (last + 1) * cell, len(found) * cell
    width = max(2 * MARGIN + left + GAP + right, MARGIN + 7 * len(described(policy)))
    picture = Image.new("RGB", (width, HEAD + height + FOOT), "white")
    pen = ImageDraw.Draw(picture)
    x_left, x_right = MARGIN + 2 * cell, MARGIN + left + GAP

    def put(x: int, row: int, colour: tuple[int, int, int], share: float = 1.0) -> None:
        """A cell, paler for a frame of which only some tokens are seen."""
        shade = tuple(round(255 + (c - 255) * (0.25 + 0.75 * min(share, 1.0))) for c in colour)
        top = HEAD + row * cell
        pen.rectangle((x, top, x + cell - 2, top + cell - 2), fill=shade)

    for x, count in ((x_left, frames), (x_right, last + 1)):
        for tick in range(0, count, 10):
            pen.line((x + tick * cell, HEAD, x + tick * cell, HEAD + height), fill=GRID)
            pen.text((x + tick * cell, HEAD + height + 3), str(tick), fill=INK)
    for row, sight in enumerate(found):
        for frame, at, share in sight.read:
            colour = MADE_UP if frame < 0 else _ramp(frame / max(frames - 1, 1))
            put(x_left + frame * cell, row, colour, share)
            put(x_right + at * cell, row, colour, share)
        for i, at in enumerate(sight.own):
            put(x_left + (sight.start + i) * cell, row, OWN)
            put(x_right + at * cell, row, OWN)
    pen.text((MARGIN, 4), described(policy), fill=INK)
    pen.text((x_left, 20), "frames that a chunk sees", fill=INK)
    pen.text((x_right, 20), "positions where it reads them", fill=INK)
    for row in range(0, len(found), 5):
        pen.text((8, HEAD + row * cell - 3), str(row), fill=INK)
    pen.text((4, HEAD + height + 16), "rows: chunks, their own frames black", fill=INK)
    picture.save(path, optimize=True)
    return found


def _ramp(share: float) -> tuple[int, int, int]:
    at = share * (len(RAMP) - 1)
    low = min(int(at), len(RAMP) - 2)
    mixed = [round(a + (b - a) * (at - low)) for a, b in zip(RAMP[low], RAMP[low + 1], strict=True)]
    return mixed[0], mixed[1], mixed[2]
