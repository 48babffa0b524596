"""The cache of policies that look at what frames hold: every entry with its own position, in every block.

It grows and shrinks with what the policy keeps, for networks as they are trained; `nn.static_tokens` is its form in
memory that never moves. Keys are stored before rotation, and turned once a chunk, not once a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from causalreel.nn.masks import Frame, Reading
from causalreel.nn.policies.selecting import Committed, Entries, SelectingPolicy
from causalreel.nn.rope import rotate_keys, token_table


def check_call(context: SelectingPolicy, queries: tuple[Frame, ...], end: int) -> None:
    """ValueError for a call that is not one chunk behind a cache which ends at frame `end`."""
    if queries[0].chunk_start != queries[-1].chunk_start or queries[0].stream != 0:
        raise ValueError(f"{context.__class__.__name__} needs calls of one chunk: give fused=False")
    if queries[0].index != end:
        raise ValueError(f"the call starts at frame {queries[0].index}, but the cache ends at frame {end}")


class TokenCache:
    """Context of one rollout (any batch). Committed tensors are never changed in place and never carry gradient."""

    def __init__(self, layers: int, context: SelectingPolicy) -> None:
        self.context, self.end = context, 0
        self.layers: list[Entries | None] = [None] * layers
        self.state: dict[Any, Any] = {}
        self._call: tuple[Frame, ...] = ()
        self._tokens, self._own = 0, 0
        self._size, self._twins = (1, 1), False
        self._fresh: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._turned: dict[int, Tensor] = {}

    @property
    def held(self) -> int:
        """Frames' worth of entries of each block."""
        return 0 if self.layers[0] is None or not self._tokens else len(self.layers[0]) // self._tokens

    def begin(self, queries: tuple[Frame, ...], tokens: int) -> Reading:
        """As FrameCache.begin; one chunk a call."""
        check_call(self.context, queries, self.end)
        self._call, self._tokens = queries, tokens
        self._own = self.context.first_position(self.end, self.held)
        return Reading(tuple(range(self._own, self._own + len(queries))), by_token=True)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Not for this cache: see `read`."""
        raise NotImplementedError

    def read(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int], *, twins: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Rotated q, fresh k before rotation, v (B,L,N,D), rows and columns of a frame -> all that is read, rotated.

        twins: as in `rope.rotate_keys`, the same in all calls.
        """
        self._size, self._twins = size, twins
        frames = len(self._call)
        asked = q[:, :0].detach()
        if self.context.asks_queries:
            asked = torch.unflatten(q.detach().float(), 1, (frames, -1)).sum(2)
        self._fresh[layer] = (k.detach(), v.detach(), asked)
        own = self._entries(k, v)
        turned = self._turn(own)
        held = self.layers[layer]
        if held is None:
            return turned, v
        if layer not in self._turned:
            self._turned[layer] = self._turn(held)
        return torch.cat([self._turned[layer], turned], dim=1), torch.cat([held.values, v], dim=1)

    def commit(self, frames: int) -> None:
        """As FrameCache.commit; then the policy says what stays."""
        if not 0 < frames <= len(self._call):
            raise ValueError(f"commit takes 1 to {len(self._call)} frames of the latest call, got {frames}")
        self._turned = {}
        layers: list[Entries] = []
        count = frames * self._tokens
        for layer, (k, v, _) in sorted(self._fresh.items()):
            held, new = self.layers[layer], self._entries(k, v).part(0, count)
            layers.append(new if held is None else Entries.joined([held, new]))
            self.layers[layer] = layers[-1]  # so that no more than one block is there twice
        asked = [queries[:, :frames] for _, (_, _, queries) in sorted(self._fresh.items())]
        self.end, self.state = self.end + frames, dict(self.state)
        now = Committed(layers, frames, self.end, self._tokens, asked, self._turn, self.state)
        self.layers = list(self.context.settle(now))
        self._fresh, self._call = {}, ()

    def copy(self) -> TokenCache:
        """The same context by reference."""
        other = TokenCache(len(self.layers), self.context)
        other.end, other.layers, other.state = self.end, list(self.layers), dict(self.state)
        other._tokens, other._size, other._twins = self._tokens, self._size, self._twins
        return other

    def _entries(self, k: Tensor, v: Tensor) -> Entries:
        """Those of the call's frames, in order."""
        frame = torch.arange(k.shape[1], device=k.device).expand(len(k), -1) // self._tokens
        token = torch.arange(k.shape[1], device=k.device).expand(len(k), -1) % self._tokens
        return Entries(k, v, frame + self.end, token, frame + self._own)

    def _turn(self, entries: Entries) -> Tensor:
        table = token_table(entries.positions, entries.tokens, self._size, entries.keys.shape[-1])
        return rotate_keys(entries.keys, table, twins=self._twins)
