"""The tiny world's text encoder: a fixed code for each word, nothing learned, the same bits on every machine.

A token is the sum of two rows of a 64x64 Hadamard matrix, one for the word and one for its place (slot and object), so
the codes of different words and of different places are exactly orthogonal. What words exist and how a prompt splits
into them is `vocabulary`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.vocabulary import (
    BACKGROUND_INDEX,
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOR_RGB,
    COLORS,
    DIRECTIONS,
    SLOTS,
    WORDS,
    background_of,
    complete,
    parse_caption,
    retold,
    tokenize,
)

LENGTH = 16
WIDTH = 64
NEAR = 45.0
"""Levels of 255 by which a background or an object's colour may differ from the world's and still be taken for it."""
WATCHED = 5
"""Frames that show where things go."""
LEAST = 50
"""Pixels that an object shows at least; the smallest has 107."""
WAYS = ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0))
"""x and y of each word of DIRECTIONS."""
PLACES = [(slot, index) for slot in SLOTS for index in range(BACKGROUND_INDEX + 1)]


def code_table() -> Tensor:
    """Row 0 is zero (no token), rows 1.. are distinct rows of the Hadamard matrix: (WIDTH,WIDTH), int8, entries +-1."""
    table = [[-1 if (i & j).bit_count() % 2 else 1 for j in range(WIDTH)] for i in range(WIDTH)]
    table[0] = [0] * WIDTH
    return torch.tensor(table, dtype=torch.int8)


def background_in(picture: Tensor) -> str | None:
    """(3,H,W) in [-1,1] -> the tiny world's word for what most of its border shows; None: nothing of that world."""
    shown = (picture.detach().float().cpu() + 1) * 127.5
    edges = [shown[:, :2].flatten(1), shown[:, -2:].flatten(1), shown[:, :, :2].flatten(1), shown[:, :, -2:].flatten(1)]
    border = torch.cat(edges, dim=1)  # (3,n)
    levels = torch.tensor(BACKGROUND_RGB).float()  # (backgrounds,3)
    middle = border.median(1).values
    is_even = ((border - middle[:, None]).abs().amax(0) < NEAR).float().mean() > 0.6
    distance = (levels - middle).abs().amax(1)
    return BACKGROUNDS[int(distance.argmin())] if is_even and distance.min() < NEAR else None


def directions_in(frames: Tensor, colors: Sequence[str]) -> list[str | None]:
    """(T,3,H,W) in [-1,1] -> the tiny world's words for where what has each of these colours goes in the last frames;
    None: it is not there in all of them, or goes nowhere in particular."""
    shown = (frames[-WATCHED:].detach().float().cpu() + 1) * 127.5
    if len(shown) < WATCHED:
        return [None] * len(colors)
    y, x = torch.meshgrid(*(torch.arange(float(side)) for side in shown.shape[-2:]), indexing="ij")
    ground = shown.flatten(2).median(-1).values[..., None, None]  # (T,3,1,1)

    def direction(color: str) -> str | None:
        paint = torch.tensor(COLOR_RGB[COLORS.index(color)]).float()[:, None, None]
        distance = (shown - paint).abs().amax(1)  # (T,H,W)
        mask = distance < NEAR
        if not bool((mask.sum((1, 2)) >= LEAST).all()):
            return None
        edged = F.max_pool2d(mask.float(), 3, stride=1, padding=1)
        mask = edged * (1 - distance / (ground - paint).abs().amax(1)).clamp(0, 1)  # what it covers of each pixel
        mass = mask.sum((1, 2))
        at = torch.stack([(mask * one).sum((1, 2)) / mass for one in (x, y)], dim=1)  # (T,2)
        move, late = at[-1] - at[0], at[-1] - at[WATCHED // 2]
        ways = torch.tensor(WAYS)
        along = ways @ move
        best = int(along.argmax())
        is_sure = along[best] > max(1.0, 0.9 * float(move.norm())) and ways[best] @ late > 0
        return DIRECTIONS[best] if is_sure else None

    return [direction(color) for color in colors]


def told_anew(before: str, after: str, seen: Tensor | None) -> str:
    """What held before a change as it is told anew, given the last frames (T,3,H,W); see `vocabulary.retold`."""
    going = None if seen is None else directions_in(seen, [one.color for one in parse_caption(before).objects])
    return retold(before, after, going)


class TinyTextEncoder:
    """Implements `types.TextEncoder` for the tiny world's vocabulary; its entries have unit variance.

    `encode` raises ValueError for unknown words, prompts that describe nothing and whatever else `tokenize` refuses.
    """

    length = LENGTH
    width = WIDTH

    def __init__(self, device: torch.device | str = "cpu") -> None:
        rows = iter(range(1, WIDTH))
        self._word_row = {word: next(rows) for word in WORDS}
        self._place_row = {place: next(rows) for place in PLACES}
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
        """The prompt as a full sentence of the tiny world; see `vocabulary.complete`.

        A picture (3,H,W) settles a background that the prompt leaves open. ValueError if the prompt names another one
        than the picture shows: a video begins as its prompt says. Where things go that are there already is what is
        `seen` of it, if there is something to be seen: they may have met a wall since they were told.
        """
        shown = None if picture is None else background_in(picture)
        named = background_of(prompt) if shown is not None else None
        if named not in (None, shown):
            raise ValueError(
                f"the prompt asks for a {named} background, but the picture that the video begins with has a {shown} "
                f"one: {prompt!r}"
            )
        going = None
        if before is not None and seen is not None:
            going = directions_in(seen, [one.color for one in parse_caption(before).objects])
        return complete(prompt, seed, background=shown, before=before, going=going)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text (B,length,width) float32, one row a describing word, zero rows after the last."""
        if isinstance(prompts, str):
            raise TypeError("prompts is one string, expected a sequence of strings")
        words, places = zip(*map(self._rows, prompts), strict=True) if prompts else ((), ())
        device = self._codes.device
        index = torch.tensor([words, places], dtype=torch.long, device=device).view(2, -1, LENGTH)
        return self._codes[index].sum(0)  # (2,B,K,E) -> (B,K,E)

    def null(self, batch: int) -> Tensor:
        """The unconditional input: zeros (batch,length,width)."""
        return self._codes.new_zeros(batch, LENGTH, WIDTH)

    def _rows(self, prompt: str) -> tuple[list[int], list[int]]:
        """Table rows of a prompt's words and of their places, `length` of each, 0 after the last."""
        tokens = tokenize(prompt)
        if len(tokens) > LENGTH:
            raise ValueError(f"prompt has {len(tokens)} describing words, at most {LENGTH} are allowed: {prompt!r}")
        padding = [0] * (LENGTH - len(tokens))
        words = [self._word_row[token.word] for token in tokens]
        places = [self._place_row[token.slot, token.object_index] for token in tokens]
        return words + padding, places + padding
