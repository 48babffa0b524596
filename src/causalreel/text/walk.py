"""The walkable world's text encoder: fixed codes, nothing learned, a token for each direction, floor and sky."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from causalreel.scenery import COLORS, DIRECTIONS, FLOORS, NOTHING, SHAPES, SKIES, Scene, complete, compose, parse
from causalreel.text.tiny import WIDTH, code_table

LENGTH = len(DIRECTIONS) + 2
_PLACES = (*DIRECTIONS, "floor", "sky")
_ROWS = {word: row for row, word in enumerate((*_PLACES, *COLORS, *SHAPES, NOTHING, *FLOORS, *SKIES), 1)}


class WalkTextEncoder:
    """Implements `types.TextEncoder`; a token is the sum of the codes of its place and of what is there, which are
    orthogonal. `encode` raises ValueError for what `scenery.parse` refuses; what a prompt leaves open has no token."""

    length = LENGTH
    width = WIDTH

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._codes = code_table().to(device, torch.float32) * 0.5**0.5

    def complete(
        self,
        prompt: str,
        seed: int,
        picture: Tensor | None = None,
        *,
        before: str | None = None,
        seen: Tensor | None = None,
    ) -> str:
        """The prompt with everything that it leaves open as it was `before`, or else drawn. A picture says what is
        ahead better than words: only the rest is told then."""
        del picture, seen
        scene = parse(prompt)
        if before is not None:
            was = parse(before)
            scene = replace(
                scene,
                objects={**was.objects, **scene.objects},
                floor=scene.floor or was.floor,
                sky=scene.sky or was.sky,
            )
        return compose(complete(scene, seed))

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text (B,length,width) float32, zero rows after the last token."""
        if isinstance(prompts, str):
            raise TypeError("prompts is one string, expected a sequence of strings")
        index = torch.tensor([_rows(prompt) for prompt in prompts], dtype=torch.long, device=self._codes.device)
        return self._codes[index.view(-1, LENGTH, 3)].sum(2)  # row 0 is zero

    def null(self, batch: int) -> Tensor:
        """The unconditional input: zeros (batch,length,width)."""
        return self._codes.new_zeros(batch, LENGTH, WIDTH)


def _rows(prompt: str) -> list[int]:
    """Rows of the table, three for each of `LENGTH` tokens, 0 where there is none."""
    rows = [_ROWS[word] if word else 0 for token in _tokens(parse(prompt)) for word in (*token, "")[:3]]
    return rows + [0] * (3 * LENGTH - len(rows))


def _tokens(scene: Scene) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for direction in DIRECTIONS:
        if direction in scene.objects:
            there = scene.objects[direction]
            found.append((direction, NOTHING) if there is None else (direction, *there))
    found += [("floor", scene.floor)] if scene.floor else []
    found += [("sky", scene.sky)] if scene.sky else []
    return found
