"""Attention in e4m3 over a cache in e4m3: half the memory, and on an H200 about 0.7 of the time.

Queries, keys and values are e4m3 without a scale: the type's precision is the same from 2^-6 to 448, queries and keys
are RMS-normed, and what is larger becomes 448. Probabilities are e4m3 too, as p 2^8 against the largest score met so
far; what is below 2^-18 of it becomes 0, but counts in the sum that is divided by. Blocks of keys are added in float32,
the keys of a block as a GPU's 8-bit product does it. Such a product wants both factors with the summed index innermost:
keys lie as they do elsewhere, values as columns (`nn.kernels.column_of`). The released code has no such arithmetic: it
is a change of numerics, never a default. docs/performance.md has its error and its times.

No gradient. On a CPU, and for masks that are no runs, what was stored is unpacked and attended to as usual.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from causalreel.nn import kernels
from causalreel.nn.kernels import E4M3_BLOCK, E4M3_TILE
from causalreel.nn.masks import FrameMask
from causalreel.nn.split_attention import Rectangle, attend_split, groups_of, processors_of
from causalreel.nn.static_cache import CacheMemory

RESIDENT = 2
"""Programs that a processor holds: what fits an H200 at a width of 128."""

WAVE_US, MERGE_US, PART_US = 292 / 32760, 8.0, 6.0 / 1560
"""What a choice of parts costs, in microseconds: a wave of programs per key; a merge; a part per query. Fitted on an
H200 with 12 heads of width 128; only the proportions matter."""

MAX_PARTS = 6


class PackedMemory(CacheMemory):
    """A cache memory in e4m3: keys (B,rows,N,D) and values (B,N,D,columns), columns by `kernels.column_of`."""

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> None:
        layers, batch, rows, heads, head_dim = shape
        columns = -(-rows // E4M3_BLOCK) * E4M3_BLOCK
        self.dtype = dtype
        self._keys = torch.zeros(shape, dtype=torch.uint8, device=device)
        self._values = torch.zeros(layers, batch, heads, head_dim, columns, dtype=torch.uint8, device=device)
        self._columns = kernels.column_of(torch.arange(columns, device=device))
        self._tiles: dict[tuple[tuple[Rectangle, ...], int], Tensor] = {}

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self._keys, self._values, self._columns, self.places, self.slots

    def keys(self, layer: int) -> Tensor:
        return self._keys[layer].view(kernels.FP8)

    def values(self, layer: int) -> Tensor:
        """All places of a layer's values (B,N,D,columns)."""
        return self._values[layer].view(kernels.FP8)

    def store(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        kernels.store_packed(self.keys(layer), self.values(layer), rows, k, v)

    def view(self, layer: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Copies, in the type the memory was made for."""
        values = self._values[layer][..., self._columns[rows]].view(kernels.FP8)
        return self.keys(layer)[:, rows].to(self.dtype), values.permute(0, 3, 1, 2).to(self.dtype).contiguous()

    def copy(self, source: int, target: int, length: int) -> None:
        """As the base class; at 480x832 a frame's rows begin within sixteen, and its values are looked up in pairs."""
        self._keys[:, :, target : target + length].copy_(self._keys[:, :, source : source + length])
        if (target - source) % 16 == 0 and source % 16 == 0 and length % 16 == 0:
            self._values[..., target : target + length].copy_(self._values[..., source : source + length])
            return
        size = 2 if source % 2 == target % 2 == length % 2 == 0 else 1  # two neighbours always lie side by side
        values = self._values.view(torch.int16) if size == 2 else self._values
        old, new = (self._columns[at : at + length : size] // size for at in (source, target))
        values.index_copy_(-1, new, values[..., old])

    def save(self, rows: slice, into: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
        away = into or (torch.empty_like(self._keys), torch.empty_like(self._values))
        self._move(rows, (self._keys, self._values), away)
        return away

    def restore(self, rows: slice, away: tuple[Tensor, ...]) -> None:
        self._move(rows, away, (self._keys, self._values))

    def tiles(self, groups: tuple[Rectangle, ...], first: int) -> Tensor:
        """`tiles_of` these groups; kept as long as the memory, because recordings read it."""
        if (groups, first) not in self._tiles:
            self._tiles[groups, first] = tiles_of(groups, self.tokens, first, self.places.device)
        return self._tiles[groups, first]

    @staticmethod
    def _move(rows: slice, source: tuple[Tensor, ...], target: tuple[Tensor, ...]) -> None:
        columns = slice(rows.start // 16 * 16, -(-rows.stop // 16) * 16)  # whole groups: all of it is one rollout's
        target[0][:, :, rows].copy_(source[0][:, :, rows])
        target[1][..., columns].copy_(source[1][..., columns])


def attend_packed(
    q: Tensor,
    memory: PackedMemory,
    layer: int,
    rows: slice,
    mask: FrameMask | None,
    tokens: int,
    *,
    quantised: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """q (B,Lq,N,D) e4m3 over the rows of a layer, frame mask, tokens per frame -> (B,Lq,N,D) in the memory's type.

    With `quantised` e4m3 and row scales (B*Lq,1).
    """
    frames = q.shape[1] // tokens, (rows.stop - rows.start) // tokens
    groups = [Rectangle(0, frames[0], 0, frames[1])] if mask is None else groups_of(mask)
    if not (kernels.uses_triton(q) and groups and q.shape[3] in (32, 64, 128)):
        k, v = memory.view(layer, rows)
        return attend_split(q.to(memory.dtype).unsqueeze(0), k, v, mask, tokens, quantised=quantised)
    heads = q.shape[2]
    parts = parts_of(tuple(groups), tokens, heads, processors_of(q.device))
    tiles = memory.tiles(tuple(groups), rows.start)
    out = torch.empty_like(q, dtype=kernels.FP8 if quantised else memory.dtype)
    scale = torch.empty(q.shape[0] * q.shape[1], 1, device=q.device) if quantised else None
    for b in range(q.shape[0]):
        sample = q[b], memory.keys(layer)[b], memory.values(layer)[b]
        piece = kernels.attend_e4m3(*sample, tiles, parts, memory.dtype)
        row_scale = None if scale is None else scale[b * q.shape[1] : (b + 1) * q.shape[1]]
        kernels.merge([piece], out[b], row_scale)
    return out, scale


def tiles_of(groups: tuple[Rectangle, ...], tokens: int, first: int, device: torch.device) -> Tensor:
    """What each program does (T,4) int32: queries [a, b), keys [c, d), which lie from row `first` on."""
    found = [
        (top, r.bottom * tokens, first + r.left * tokens, first + r.right * tokens)
        for r in groups
        for top in range(r.top * tokens, r.bottom * tokens, E4M3_TILE)
    ]
    return torch.tensor(found, dtype=torch.int32, device=device)


@lru_cache(maxsize=4096)
def parts_of(groups: tuple[Rectangle, ...], tokens: int, heads: int, processors: int) -> int:
    """Into how many parts to cut every program's keys; each has a block of keys at least."""
    least = min(r.shape[1] * tokens for r in groups) // E4M3_BLOCK
    possible = range(1, max(1, min(MAX_PARTS, least)) + 1)
    return min(possible, key=lambda parts: _cost(groups, tokens, heads, parts, processors))


def _cost(groups: tuple[Rectangle, ...], tokens: int, heads: int, parts: int, processors: int) -> float:
    """Microseconds, about."""
    counts = [-(-r.shape[0] * tokens // E4M3_TILE) * heads for r in groups]
    keys = sum(n * r.shape[1] * tokens for n, r in zip(counts, groups, strict=True)) / sum(counts)
    waves = -(-sum(counts) * parts // (RESIDENT * processors)) / parts
    queries = sum(r.shape[0] for r in groups) * tokens
    return waves * keys * WAVE_US + (MERGE_US + parts * queries * PART_US if parts > 1 else 0)
