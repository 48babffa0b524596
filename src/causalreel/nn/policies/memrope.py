"""MemRoPE: a sink, the newest frames, and between them two frames that average everything which has left.

Causal-rCM (arXiv 2606.25473), its extrapolation script; the rules, not the code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch

from causalreel.nn.policies.selecting import Committed, Entries, SelectingPolicy


@dataclass(frozen=True)
class MemRope(SelectingPolicy):
    """Positions count what is kept: 0, 1, 2 ..., the chunk behind it, so they never grow; sizes in latent frames.

    A memory is one key and value of each head, the same for all tokens of its frame: a moving average, kept in float32,
    of the mean over all tokens that leave, the old memory frames included.
    """

    policy: Literal["memrope"] = "memrope"
    sink: int = 3
    """First frames, which stay for ever."""
    local: int = 4
    """Newest frames that stay."""
    alpha_long: float = 0.01
    """Share of what has just left in the long memory, from 0 to 1."""
    alpha_short: float = 0.1
    """As alpha_long, in the short memory."""

    def __post_init__(self) -> None:
        if self.sink < 0 or self.local < 1:
            raise ValueError(f"sink must be at least 0 and local at least 1, got {self.sink} and {self.local}")
        for name in ("alpha_long", "alpha_short"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")

    @property
    def is_endless(self) -> bool:
        return True

    def most_seen(self, chunk: int) -> int | None:
        return self.sink + 2 + self.local + chunk

    def most_held(self, chunk: int) -> int | None:
        return self.sink + 2 + self.local

    def first_position(self, start: int, held: int) -> int:
        return held

    def settle(self, now: Committed) -> Iterable[Entries]:
        if len(now.layers[0]) > (self.sink + 2 + self.local) * now.tokens:
            return (self._compact(now, layer, entries) for layer, entries in enumerate(now.layers))
        return now.layers

    def _compact(self, now: Committed, layer: int, entries: Entries) -> Entries:
        sink, local = self.sink * now.tokens, len(entries) - self.local * now.tokens
        leaving, parts = entries.part(sink, local), [entries.part(0, sink)]
        for index, (name, alpha) in enumerate((("long", self.alpha_long), ("short", self.alpha_short))):
            mean = torch.stack([leaving.keys.float().mean(1), leaving.values.float().mean(1)])  # (2,B,N,D)
            before = now.state.get((name, layer))
            memory = mean if before is None else (1 - alpha) * before + alpha * mean
            now.state[name, layer] = memory
            keys, values = memory.to(entries.keys.dtype).unsqueeze(2).expand(-1, -1, now.tokens, -1, -1)
            frames = torch.full_like(entries.frames[:, : now.tokens], -1 - index)
            tokens = torch.arange(now.tokens, device=frames.device).expand_as(frames)
            parts.append(Entries(keys, values, frames, tokens, frames))
        kept = Entries.joined([*parts, entries.part(local)])
        return kept.at(
            torch.arange(len(kept) // now.tokens, device=kept.positions.device).repeat_interleave(now.tokens)
        )
