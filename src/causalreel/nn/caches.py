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


def static_kind(policy: ContextPolicy) -> type[StaticCache]:
    """What holds such a rollout in memory that never moves, if its `fits` says so.

    Its calls can be recorded as CUDA graphs.
    """
    if policy.selects:
        return StaticTokenCache
    return StaticCache if isinstance(policy, Context) else PagedCache
