"""Relax forcing: a sink, the newest frames, and between them those that resemble the newest and not one another.

Causal-rCM (arXiv 2606.25473), its extrapolation script; the rules, not the code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.nn.policies.selecting import Committed, Entries, SelectingPolicy, highest


@dataclass(frozen=True)
class RelaxForcing(SelectingPolicy):
    """Frames are chosen by the first block's keys, for all blocks; sizes in latent frames.

    What stays is read without gaps right before the chunk, which is at its absolute position.
    """

    policy: Literal["relax-forcing"] = "relax-forcing"
    sink: int = 4
    """First frames, which stay for ever."""
    budget: int = 16
    """Frames that stay in all."""
    recent: int = 4
    """Newest frames that stay."""
    alignment: float = 0.5
    """Weight of resembling the newest frames, from 0 to 1; the rest is for differing from the other candidates."""

    def __post_init__(self) -> None:
        if self.sink < 0 or self.recent < 1 or self.sink + self.recent > self.budget:
            raise ValueError(
                f"budget must hold sink and recent, and recent be at least 1; got budget={self.budget}, "
                f"sink={self.sink}, recent={self.recent}"
            )
        if not 0 <= self.alignment <= 1:
            raise ValueError(f"alignment must be from 0 to 1, got {self.alignment}")

    def most_seen(self, chunk: int) -> int | None:
        return self.budget + chunk

    def most_held(self, chunk: int) -> int | None:
        return self.budget

    def settle(self, now: Committed) -> Iterable[Entries]:
        held = len(now.layers[0]) // now.tokens
        if held <= self.budget:
            return now.layers
        scores = self._scores(now)
        now.state["scores"] = [scores]
        count = self.budget - self.sink - self.recent
        chosen = highest(scores, count) + self.sink  # (B,count)
        ends = torch.arange(held, device=scores.device).expand(len(scores), -1)
        frames = torch.cat([ends[:, : self.sink], chosen, ends[:, held - self.recent :]], dim=1)
        inside = torch.arange(now.tokens, device=scores.device)
        places = (frames[..., None] * now.tokens + inside).flatten(1)  # (B,budget*S)
        where = torch.arange(now.end - self.budget, now.end, device=scores.device).repeat_interleave(now.tokens)
        return (entries.take(places).at(where) for entries in now.layers)

    def _scores(self, now: Committed) -> Tensor:
        """-> (B,candidates)."""
        keys = now.turned(now.layers[0]).float().flatten(2)
        keys = torch.unflatten(keys, 1, (-1, now.tokens)).mean(2)  # (B,frames,N*D)
        tail = F.normalize(keys[:, -self.recent :].mean(1, keepdim=True), dim=-1)
        candidates = F.normalize(keys[:, self.sink : -self.recent], dim=-1)
        likeness = candidates @ candidates.mT  # (B,C,C)
        count = candidates.shape[1]
        others = (likeness.sum(-1) - likeness.diagonal(dim1=1, dim2=2)) / max(count - 1, 1)
        return self.alignment * (candidates @ tail.mT).squeeze(-1) + (1 - self.alignment) * (1 - others)
