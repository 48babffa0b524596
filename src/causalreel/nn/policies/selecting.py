"""Policies that look at what frames hold, and the hook by which they are asked.

After every commit a cache of single tokens (`nn.token_cache`, `nn.static_tokens`) hands `settle` a `Committed`: keys
and values of each block, the new chunk's at the end, with the frame, token and position of every entry. It answers what
stays, in which order and where it is read from now on; blocks and samples may differ, and entries may be made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from causalreel.nn.policies.interface import ContextPolicy


@dataclass(frozen=True)
class Entries:
    """What one block keeps of the past (T entries), in order."""

    keys: Tensor
    """(B,T,N,D), before rotation."""
    values: Tensor
    """(B,T,N,D)."""
    frames: Tensor
    """(B,T) int64: the latent frame that an entry comes from; below 0 if from none."""
    tokens: Tensor
    """(B,T) int64: its place in the frame, row by row."""
    positions: Tensor
    """(B,T) int64: the rotary position at which it is read."""

    def __len__(self) -> int:
        return self.keys.shape[1]

    def take(self, places: Tensor) -> Entries:
        """The entries at `places` (B,T'), in that order."""
        if len(places) == 1:  # whole rows, at the speed of the memory
            return self._each(lambda x: x.index_select(1, places[0]))
        return self._each(
            lambda x: x.gather(1, places.view(*places.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
        )

    def part(self, start: int, stop: int | None = None) -> Entries:
        return self._each(lambda x: x[:, start:stop])

    def at(self, positions: Tensor) -> Entries:
        """The same at other positions (B,T), or (T) for all samples."""
        return replace(self, positions=positions.expand_as(self.positions))

    def moved(self, by: int) -> Entries:
        return replace(self, positions=self.positions + by)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Entries:
        return Entries(*(change(getattr(self, name)) for name in ("keys", "values", "frames", "tokens", "positions")))

    @staticmethod
    def joined(parts: list[Entries]) -> Entries:
        names = ("keys", "values", "frames", "tokens", "positions")
        return Entries(*(torch.cat([getattr(part, name) for part in parts], dim=1) for name in names))


@dataclass
class Committed:
    """What a policy may look at after a commit."""

    layers: list[Entries]
    """Of every block: what it held, and the new chunk behind it."""
    new: int
    """Frames of the new chunk."""
    end: int
    """The absolute frame behind it."""
    tokens: int
    """Tokens of a frame (S)."""
    queries: list[Tensor]
    """Of every block, if `asks_queries`: the commit's rotated queries, summed over each frame's tokens (B,F,N,D)."""
    turned: Callable[[Entries], Tensor]
    """Keys (B,T,N,D) as they are read, rotated to their positions."""
    state: dict[Any, Any]
    """The policy's own, empty at first; values are replaced, never changed in place, so that caches can be copied."""


def highest(scores: Tensor, count: int) -> Tensor:
    """scores (B,N) -> places (B,count) of the highest ones, in order; of equal ones the first."""
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


class SelectingPolicy(ContextPolicy):
    """A policy that is asked after every commit. It needs calls of one chunk."""

    selects: ClassVar[bool] = True
    asks_queries: ClassVar[bool] = False

    def settle(self, now: Committed) -> Iterable[Entries]:
        """What every block keeps, block by block: what one holds may be gone when the next one is asked for."""
        raise NotImplementedError

    def first_position(self, start: int, held: int) -> int:
        """Position of the first frame of the chunk that starts at `start`, behind so many frames held."""
        return start
