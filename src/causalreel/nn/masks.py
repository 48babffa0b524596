"""Who sees whom: one rule over per-frame facts, for every use of the network.

A frame knows its absolute index, the chunk it belongs to and its stream: 0 for frames that serve as context for later
ones, 1 for the noisy half of teacher forcing, which nobody else sees. Bidirectional, diffusion forcing, teacher
forcing, cached and fused inference are this rule with other facts.
Causal Forcing (arXiv 2602.02214), section 2 and figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Frame:
    """What the rule knows of a frame; chunk = [chunk_start, chunk_end) in absolute latent frames."""

    index: int
    chunk_start: int
    chunk_end: int
    stream: int = 0


@dataclass(frozen=True)
class Context:
    """How much of the past a chunk sees."""

    window: int | None = None
    """Latent frames a chunk sees, its own and the sink included; None: all."""
    sink: int = 0
    """First frames of the video that stay visible for ever."""

    def __post_init__(self) -> None:
        if self.sink < 0 or (self.window is not None and self.window <= self.sink):
            raise ValueError(
                f"window must exceed sink, and sink be at least 0; got window={self.window}, sink={self.sink}"
            )

    def first_visible(self, chunk_end: int) -> int:
        """Oldest frame, beside the sink, that a chunk ending at `chunk_end` sees."""
        return 0 if self.window is None else max(0, chunk_end - (self.window - self.sink))


@dataclass(frozen=True)
class FrameMask:
    """allowed[q][k]: query frame q sees key frame k. Hashable, so that token masks are cached by value."""

    allowed: tuple[tuple[bool, ...], ...]

    @property
    def is_full(self) -> bool:
        return all(all(row) for row in self.allowed)

    def dense(self, tokens: int, device: torch.device) -> Tensor:
        """-> (Fq*tokens, Fk*tokens) bool: the mask for scaled_dot_product_attention."""
        return _dense(self, tokens, device)


def frames_of(sizes: Sequence[int], *, start: int = 0, stream: int = 0) -> tuple[Frame, ...]:
    """The facts of neighbouring chunks of these sizes, the first at absolute frame `start`."""
    found: list[Frame] = []
    for size in sizes:
        found += [Frame(i, start, start + size, stream) for i in range(start, start + size)]
        start += size
    return tuple(found)


def sees(query: Frame, key: Frame, context: Context) -> bool:
    """The rule: one's own chunk in one's own stream, and earlier context inside the window or the sink."""
    if query.stream == key.stream and query.chunk_start == key.chunk_start:
        return True
    is_past_context = key.stream == 0 and key.chunk_end <= query.chunk_start
    return is_past_context and (key.index < context.sink or key.index >= context.first_visible(query.chunk_end))


@lru_cache(maxsize=4096)
def frame_mask(queries: tuple[Frame, ...], keys: tuple[Frame, ...], context: Context) -> FrameMask | None:
    """The mask of a call; None where every query sees every key. ValueError where a chunk does not fit the window."""
    for frame in queries:
        if context.window is not None and context.sink + frame.chunk_end - frame.chunk_start > context.window:
            raise ValueError(
                f"window must hold the sink and one chunk: window={context.window}, sink={context.sink}, "
                f"chunk={frame.chunk_end - frame.chunk_start}"
            )
    mask = FrameMask(tuple(tuple(sees(q, k, context) for k in keys) for q in queries))
    return None if mask.is_full else mask


@lru_cache(maxsize=64)
def _dense(mask: FrameMask, tokens: int, device: torch.device) -> Tensor:
    allowed = torch.tensor(mask.allowed, dtype=torch.bool)  # (Fq,Fk)
    return allowed.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(device)
