"""Random numbers keyed by seed, clip and purpose: a clip is the same whatever is made beside it, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor


def _mix(x: Tensor) -> Tensor:
    """int64 -> int64, the finaliser of SplitMix64 (Steele, Lea and Flood 2014) in wrapping arithmetic."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def uniform(keys: Tensor, purpose: int, count: int = 1) -> Tensor:
    """keys (B,) int64 -> (B,count) float64 in [0, 1): draws number purpose, purpose+1, ... of each clip."""
    number = torch.arange(purpose + 1, purpose + 1 + count, dtype=torch.int64)
    bits = _mix(keys[:, None] + number * -0x61C8864680B583EB)  # (B,count)
    return ((bits >> 11) & ((1 << 53) - 1)).double() / (1 << 53)


def keys_of(seed: int, first: int, count: int, held_out: bool) -> Tensor:
    """(count,) int64: one well mixed number per clip. ValueError for no clip, or a seed beyond its range."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not 0 <= seed < 1 << 62:
        raise ValueError(f"seed must be 0 to 2**62 - 1, got {seed}")
    base = _mix(torch.tensor([2 * seed + int(held_out)], dtype=torch.int64) ^ 0x5851F42D4C957F2D)
    return _mix(base + _mix(torch.arange(first, first + count, dtype=torch.int64)))
