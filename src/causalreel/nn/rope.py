"""Rotary positions over (frame, row, column), as Wan2.1 splits the head width between them.

Tables are computed in float64 once per argument and kept in float32; the rotation is float32 and returns the input's
type. The released code multiplies complex128 in every layer; the difference is below float32 rounding.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def rope_table(
    positions: tuple[int, ...], height: int, width: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Absolute frame positions (F), token rows and columns -> cos, sin (F*height*width, 1, head_dim / 2) float32."""
    pairs = head_dim // 2
    spatial = head_dim // 6  # pairs for rows and for columns; the rest goes to frames
    sides = (
        (torch.tensor(positions), pairs - 2 * spatial),
        (torch.arange(height), spatial),
        (torch.arange(width), spatial),
    )
    turns = [_angles(*side) for side in sides]
    grid = (len(positions), height, width, -1)
    tables: list[Tensor] = []
    for function in (torch.cos, torch.sin):  # of few numbers on the CPU; the grid is filled where it is used
        frame, row, column = (_to(function(turn).float(), device) for turn in turns)
        whole = [frame[:, None, None].expand(grid), row[None, :, None].expand(grid), column[None, None].expand(grid)]
        tables.append(torch.cat(whole, dim=-1).reshape(-1, 1, pairs))  # (L, 1, D/2)
    return tables[0], tables[1]


def _angles(positions: Tensor, pairs: int) -> Tensor:
    frequency = 10000.0 ** (-torch.arange(pairs, dtype=torch.float64, device=positions.device) / max(pairs, 1))
    return positions.double()[..., None] * frequency


def _to(x: Tensor, device: torch.device) -> Tensor:
    """Without waiting for what the GPU is doing."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B,L,N,D), cos, sin (L,1,D/2) -> x with neighbouring channels rotated as pairs."""
    even, odd = torch.unflatten(x.float(), -1, (-1, 2)).unbind(-1)  # (B,L,N,D/2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def rotate_keys(keys: Tensor, table: tuple[Tensor, Tensor], *, twins: bool) -> Tensor:
    """As `rotate`; twins: each head has one behind it, which sees through cameras, knows no position and stays."""
    if not twins:
        return rotate(keys, *table)
    plain, camera = torch.unflatten(keys, 2, (-1, 2)).unbind(3)
    return torch.stack([rotate(plain, *table), camera], dim=3).flatten(2, 3)


def token_table(positions: Tensor, tokens: Tensor, size: tuple[int, int], head_dim: int) -> tuple[Tensor, Tensor]:
    """positions, tokens (B,L) of single tokens, rows and columns of a frame -> cos, sin (B,L,1,D/2) float32.

    The rows of `rope_table` for entries that come from anywhere.
    """
    pairs, spatial = head_dim // 2, head_dim // 6
    sides = ((positions, pairs - 2 * spatial), (tokens // size[1], spatial), (tokens % size[1], spatial))
    turns = torch.cat([_angles(*side) for side in sides], dim=-1).unsqueeze(2)
    return turns.cos().float(), turns.sin().float()
