"""Which cache a context policy works in."""

from __future__ import annotations

from causalreel.nn.kv_cache import KVCache
from causalreel.nn.paged_cache import PagedCache
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.selecting import SelectingPolicy
from causalreel.nn.policies.window import Context
from causalreel.nn.static_cache import StaticCache
from causalreel.nn.static_tokens import StaticTokenCache
from causalreel.nn.token_cache import TokenCache


def growing_cache(policy: ContextPolicy, layers: int) -> KVCache | TokenCache:
    """An empty cache for one rollout of a network with so many blocks."""
    return TokenCache(layers, policy) if isinstance(policy, SelectingPolicy) else KVCache(layers, policy)


def static_kind(
    policy: ContextPolicy, chunk: int, frames: int | None, *, prefix: int = 0, packed: bool = False
) -> type[StaticCache] | None:
    """What holds a rollout in chunks of `chunk` over so many frames (None: without end) in memory that never moves, so
    that its calls can be recorded as CUDA graphs; None: its cache grows.

    prefix: given frames, which the first call reads. packed: keys and values in e4m3 (`nn.fp8_attention`).
    """
    kind = StaticTokenCache if policy.selects else StaticCache if isinstance(policy, Context) else PagedCache
    is_held = kind.fits(policy, chunk, frames, prefix) and not (packed and kind is not StaticCache)
    return kind if is_held else None
