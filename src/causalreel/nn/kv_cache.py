"""Keys and values of finished frames. Denoiser calls read them; only `commit` writes, and it evicts by policy.

Committed tensors are never changed in place and never carry gradient, so a cache can be copied by reference, replayed,
and used alike in training and inference. Keys are stored after norm and, unless the context policy re-indexes
positions, after rotation.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from causalreel.nn.masks import Context, Frame, Reading, finished, reading
from causalreel.nn.policies.interface import ContextPolicy, advance


@runtime_checkable
class FrameCache(Protocol):
    """What a network needs of a cache: announce a call, lend its context layer by layer, make it permanent."""

    def begin(self, queries: tuple[Frame, ...], tokens: int) -> Reading:
        """Announce a call over these frames, `tokens` each; -> what they read of [visible context, own frames]."""
        ...

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh k, v (B,L,N,D) of the announced call -> of all that the call reads, in the order of its `Reading`."""
        ...

    def commit(self, frames: int) -> None:
        """Make the first `frames` frames of the latest call permanent."""
        ...


class KVCache:
    """Context of one rollout (any batch); `context` says which frames a chunk sees, and so which stay.

    keep_all: never evict, for a whole clip's context that chunks of every age read in one call.
    """

    def __init__(self, layers: int, context: ContextPolicy, *, keep_all: bool = False) -> None:
        self.context, self.keep_all = context, keep_all
        self.frames: tuple[Frame, ...] = ()
        self.keys: list[Tensor | None] = [None] * layers  # (B, frames*S, N, D) each
        self.values: list[Tensor | None] = [None] * layers
        self._call: tuple[Frame, ...] = ()
        self._tokens = 0
        self._visible: list[slice] = []
        self._fresh: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(self, queries: tuple[Frame, ...], tokens: int) -> Reading:
        """Announce a call over these frames, `tokens` each; -> what they read of [visible context, own frames]."""
        is_next = not self.frames or queries[0].chunk_start == self.frames[-1].chunk_end
        if queries[0].stream == 0 and not is_next:
            raise ValueError(
                f"the call starts at frame {queries[0].chunk_start}, "
                f"but the cache ends at frame {self.frames[-1].chunk_end}"
            )
        self._call, self._tokens = queries, tokens
        kept = list(range(len(self.frames)))
        if isinstance(self.context, Context):
            kept = self.context.visible(self.frames, queries[0].chunk_end)
        self._visible = [slice(a * tokens, (b + 1) * tokens) for a, b in _runs(kept)]
        seen = tuple(self.frames[i] for i in kept)
        return reading(queries, seen + queries, self.context, () if self.keep_all else seen)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh k, v (B,L,N,D) of the announced call -> visible context with them behind it."""
        self._fresh[layer] = (k.detach(), v.detach())
        past_k, past_v = self.keys[layer], self.values[layer]
        if past_k is None or past_v is None or not self._visible:
            return k, v
        return (
            torch.cat([*(past_k[:, s] for s in self._visible), k], dim=1),
            torch.cat([*(past_v[:, s] for s in self._visible), v], dim=1),
        )

    def commit(self, frames: int) -> None:
        """Make the first `frames` frames of the latest call permanent; drop what no later chunk can see."""
        if not 0 < frames <= len(self._call):
            raise ValueError(f"commit takes 1 to {len(self._call)} frames of the latest call, got {frames}")
        everything = self.frames + finished(self._call[:frames])
        kept = list(range(len(everything)))
        if not self.keep_all:
            stay = advance(self.context, self.frames, everything[len(self.frames) :])
            places = {frame.index: place for place, frame in enumerate(everything)}
            kept = [places[frame.index] for frame in stay]
        spans = [slice(a * self._tokens, (b + 1) * self._tokens) for a, b in _runs(kept)]
        for layer, (k, v) in self._fresh.items():
            new = frames * self._tokens
            self.keys[layer] = _keep(self.keys[layer], k[:, :new], spans)
            self.values[layer] = _keep(self.values[layer], v[:, :new], spans)
        self.frames = tuple(everything[i] for i in kept)
        self._fresh, self._call = {}, ()

    def copy(self) -> KVCache:
        """The same context by reference: cheap, because committed tensors never change."""
        other = KVCache(len(self.keys), self.context, keep_all=self.keep_all)
        other.frames, other.keys, other.values = self.frames, list(self.keys), list(self.values)
        return other


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Sorted indices as inclusive runs: at most the sink and the recent past."""
    runs: list[tuple[int, int]] = []
    for i in indices:
        if runs and runs[-1][1] == i - 1:
            runs[-1] = (runs[-1][0], i)
        else:
            runs.append((i, i))
    return runs


def _keep(old: Tensor | None, new: Tensor, spans: list[slice]) -> Tensor:
    joined = new if old is None else torch.cat([old, new], dim=1)
    if len(spans) == 1 and spans[0] == slice(0, joined.shape[1]):
        return joined
    return torch.cat([joined[:, s] for s in spans], dim=1)
