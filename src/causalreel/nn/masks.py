"""Who sees whom: one rule over per-frame facts, for every use of the network.

Bidirectional, diffusion forcing, teacher forcing, cached and fused inference are one rule with other facts: a chunk
sees itself and what the context policy (`nn.policies`) leaves of the chunks before it. Where frames are read at their
own index that is a mask; else it is said chunk by chunk.
Causal Forcing (arXiv 2602.02214), section 2 and figure 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from causalreel.nn.policies.interface import ContextPolicy, Frame, advance, chunks_of
from causalreel.nn.policies.window import Context


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


def frames_of(
    sizes: Sequence[int], *, start: int = 0, stream: int = 0, cuts: Sequence[bool] = (), done: bool = False
) -> tuple[Frame, ...]:
    """The facts of neighbouring chunks of these sizes, the first at absolute frame `start`.

    cuts: of each frame whether it begins a new scene; its whole chunk then does.
    """
    found: list[Frame] = []
    for size in sizes:
        cut = any(cuts[len(found) : len(found) + size])
        found += [Frame(i, start, start + size, stream, cut, done) for i in range(start, start + size)]
        start += size
    return tuple(found)


def sees(query: Frame, key: Frame, context: Context) -> bool:
    """The rule: one's own chunk in one's own stream, and earlier context inside the window or the sink."""
    if query.stream == key.stream and query.chunk_start == key.chunk_start:
        return True
    is_past_context = key.stream == 0 and key.chunk_end <= query.chunk_start
    return is_past_context and context.keeps(key.index, query.chunk_end)


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


@dataclass(frozen=True)
class Group:
    """A chunk of queries and the keys it reads, each rotated to the position it has for this chunk."""

    rows: tuple[int, int]
    """Query frames [a, b)."""
    keys: tuple[int, ...]
    """Key frames, by their place among all keys of the call."""
    positions: tuple[int, ...]
    """Theirs."""


@dataclass(frozen=True)
class Reading:
    """What the frames of a call read of [visible context, own frames]. Hashable, so that recordings are found by it."""

    positions: tuple[int, ...]
    """Rotary position of each query frame; of its key too, where keys are stored rotated."""
    mask: FrameMask | None = None
    """None where every query sees every key."""
    groups: tuple[Group, ...] = ()
    """Where keys are stored before their rotation: chunk by chunk what is read, instead of the mask."""
    by_token: bool = False
    """The cache knows the position of every key, and turns them itself (`nn.token_cache`)."""

    @property
    def turns_keys(self) -> bool:
        """Whether keys are rotated before they are stored."""
        return not self.groups and not self.by_token


@lru_cache(maxsize=4096)
def reading(
    queries: tuple[Frame, ...], keys: tuple[Frame, ...], policy: ContextPolicy, held: tuple[Frame, ...] = ()
) -> Reading:
    """What a call over `queries` reads of `keys`, in whatever order these lie; ValueError where a chunk does not fit.

    held: those of the keys that the policy has left of earlier commits, in its order; the other context among the keys
    is taken as committed chunk by chunk.
    """
    if isinstance(policy, Context) and policy.is_absolute:
        return Reading(tuple(frame.index for frame in queries), frame_mask(queries, keys, policy))
    if policy.selects:
        raise ValueError(
            f"the context policy {policy} looks at what frames hold, so it works chunk by chunk behind its own cache "
            f"only: not in one pass over a clip, nor in calls of several chunks"
        )
    place = {(frame.stream, frame.index): i for i, frame in enumerate(keys)}
    known = {frame.index for frame in held}
    chunks = chunks_of(sorted((f for f in keys if f.stream == 0 and f.index not in known), key=lambda f: f.index))
    coming = list(chunks)
    groups: list[Group] = []
    positions: list[int] = []
    top = 0
    for chunk in chunks_of(queries):
        policy.check(chunk[0].chunk_end - chunk[0].chunk_start)
        past = [frame for one in coming if one[0].chunk_end <= chunk[0].chunk_start for frame in one]
        view = policy.view(advance(policy, held, past), chunk)
        own = tuple(place[frame.stream, frame.index] for frame in chunk)
        seen = tuple(place[0, frame.index] for frame in view.frames)
        groups.append(Group((top, top + len(chunk)), (*seen, *own), (*view.positions, *view.own)))
        positions += view.own
        top += len(chunk)
    return Reading(tuple(positions), None, tuple(groups))


def finished(frames: tuple[Frame, ...]) -> tuple[Frame, ...]:
    """Frames that a call commits, as later chunks know them: a chunk that is cut ends where it is cut."""
    end = frames[-1].index + 1
    return tuple(replace(frame, chunk_end=min(frame.chunk_end, end)) for frame in frames)


@lru_cache(maxsize=64)
def _dense(mask: FrameMask, tokens: int, device: torch.device) -> Tensor:
    allowed = torch.tensor(mask.allowed, dtype=torch.bool)  # (Fq,Fk)
    return allowed.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(device)
