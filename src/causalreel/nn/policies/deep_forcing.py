"""Deep forcing: a deep sink, the newest frames, and between them the tokens that recent queries ask for most.

Causal-rCM (arXiv 2606.25473), its extrapolation script; the rules, not the code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from causalreel.nn.policies.selecting import Committed, Entries, SelectingPolicy, highest


@dataclass(frozen=True)
class DeepForcing(SelectingPolicy):
    """Every block chooses tokens for itself; sizes in latent frames. The chunk is at its absolute position.

    Sink and chosen tokens are moved up to the newest frames: the sink without gaps, all chosen tokens by the same
    number, so that they keep their distances and may lie beside the newest frames. That is what the released code does.
    """

    asks_queries: ClassVar[bool] = True
    policy: Literal["deep-forcing"] = "deep-forcing"
    sink: int = 10
    """First frames, which stay for ever."""
    budget: int = 16
    """Frames that stay in all."""
    recent: int = 4
    """Newest frames that stay, and whose queries choose."""
    observed: int = 0
    """Last blocks that choose by queries, the others keep the newest tokens; 0: all choose."""

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1 or self.observed < 0 or self.sink + self.recent > self.budget:
            raise ValueError(
                f"budget must hold sink and recent, and recent be at least 1; got budget={self.budget}, "
                f"sink={self.sink}, recent={self.recent}, observed={self.observed}"
            )

    def most_seen(self, chunk: int) -> int | None:
        return self.budget + chunk

    def most_held(self, chunk: int) -> int | None:
        return self.budget

    def settle(self, now: Committed) -> Iterable[Entries]:
        if now.end > now.new:  # not those of the first chunk
            asked = now.state.get("asked") or [queries[:, :0] for queries in now.queries]
            joined = [torch.cat(pair, dim=1)[:, -self.recent :] for pair in zip(asked, now.queries, strict=True)]
            now.state["asked"] = joined
        if len(now.layers[0]) <= self.budget * now.tokens:
            return now.layers
        first = now.end - self.budget + self.sink  # of the chosen tokens; what is right before it is the sink's
        shift, now.state["first"] = first - now.state.get("first", self.sink), first
        scores = [self._scores(now, layer) for layer in range(len(now.layers))]
        now.state["scores"] = scores
        return (
            self._kept(now, entries, score, first, shift) for entries, score in zip(now.layers, scores, strict=True)
        )

    def _scores(self, now: Committed, layer: int) -> Tensor:
        """-> (B,candidates): products with all recent queries and heads, 0 for tokens of the new chunk."""
        entries = now.layers[layer]
        between = entries.part(self.sink * now.tokens, len(entries) - self.recent * now.tokens)
        if self.observed and layer < len(now.layers) - self.observed:
            return torch.arange(len(between), device=entries.keys.device).float().expand(len(entries.keys), -1)
        asked = now.state["asked"][layer].float().sum(1)  # (B,N,D)
        found = torch.einsum("btnd,bnd->bt", now.turned(between).float(), asked) / asked.shape[-1] ** 0.5
        return found.masked_fill(between.frames >= now.end - now.new, 0.0)

    def _kept(self, now: Committed, entries: Entries, scores: Tensor, first: int, shift: int) -> Entries:
        sink, recent = self.sink * now.tokens, self.recent * now.tokens
        chosen = highest(scores, self.budget * now.tokens - sink - recent) + sink
        where = torch.arange(first - self.sink, first, device=scores.device).repeat_interleave(now.tokens)
        newest = entries.part(len(entries) - recent)
        return Entries.joined([entries.part(0, sink).at(where), entries.take(chosen).moved(shift), newest])
