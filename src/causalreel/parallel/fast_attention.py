"""Self-attention of a network for inference: what a call sees, in whatever cache, type and processes its keys are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from causalreel.nn import kernels
from causalreel.nn.camera import Views
from causalreel.nn.camera_kernels import norm_see, see_out
from causalreel.nn.dit import DiT, SelfAttention
from causalreel.nn.fp8_attention import PackedMemory, attend_packed
from causalreel.nn.kv_cache import FrameCache
from causalreel.nn.masks import Reading
from causalreel.nn.rope import rotate
from causalreel.nn.split_attention import attend_split, copies_for
from causalreel.nn.static_cache import StaticCache
from causalreel.parallel.fast_block import FastBlock


@dataclass(frozen=True)
class Gather:
    """What a chunk reads of a cache in which frames lie anywhere, in tensors: calls of one shape differ in nothing
    else."""

    queries: tuple[int, int]
    """Query frames [a,b)."""
    rows: Tensor
    """(Lk) int64, of the cache's memory."""
    cos: Tensor
    """(Lk,D/2) float32, with `sin` the rotation of these keys."""
    sin: Tensor


@dataclass(frozen=True)
class AttentionCall:
    """What self-attention is told of a call."""

    rotation: tuple[Tensor, Tensor]
    reading: Reading
    cache: FrameCache | None
    size: tuple[int, int]
    """Rows and columns of a frame's tokens."""
    views: tuple[Tensor, Tensor] | None = None
    """Cameras P and their inverses (B,F,4,4), of networks whose heads see through them."""
    is_blind: bool = False
    """No cameras were given to such a network."""
    gathers: tuple[Gather, ...] = ()
    """Chunk by chunk what is read, where keys lie in a static cache as they were before their rotation."""

    @property
    def tokens(self) -> int:
        """Of a frame."""
        return self.size[0] * self.size[1]


class FastAttention:
    """Self-attention of every block of a network. quantised: outputs are e4m3 with row scales."""

    def __init__(self, model: DiT, *, quantised: bool) -> None:
        self.model, self.quantised = model, quantised

    def call_of(
        self,
        x: Tensor,
        fields: Mapping[str, Tensor],
        rotation: tuple[Tensor, Tensor],
        reading: Reading,
        cache: FrameCache | None,
        gathers: tuple[Gather, ...] = (),
    ) -> AttentionCall:
        """What self-attention needs to know of a call."""
        size = x.shape[3] // self.model.config.patch, x.shape[4] // self.model.config.patch
        if self.model.config.camera != "prope":
            return AttentionCall(rotation, reading, cache, size, gathers=gathers)
        views = self.model.views(fields)
        if isinstance(views, Views):
            return AttentionCall(rotation, reading, cache, size, (views.project, views.lift))
        blind = torch.zeros(*x.shape[:2], 4, 4, device=x.device)  # twins that see nothing add nothing
        return AttentionCall(rotation, reading, cache, size, (blind, blind), is_blind=True)

    def gathers_of(self, reading: Reading, cache: FrameCache | None, size: tuple[int, int]) -> tuple[Gather, ...]:
        """What the chunks of a call gather from a static cache; nothing where keys are read as they lie, are in e4m3 or
        several processes', or see through cameras (`_by_groups`)."""
        model = self.model
        if not isinstance(cache, StaticCache) or isinstance(cache.memory, PackedMemory):
            return ()
        if model.exchange is not None or model.config.camera == "prope":
            return ()
        assert cache.call is not None
        gathers: list[Gather] = []
        for group in reading.groups:
            rows = _rows_of(cache.call.reads[0], group.keys, size[0] * size[1], model.device)
            cos, sin = model.rotation(group.positions, *size, model.device)
            gathers.append(Gather(group.rows, rows, cos.squeeze(1), sin.squeeze(1)))
        return tuple(gathers)

    def __call__(
        self, layer: int, block: FastBlock, z: Tensor, scale: Tensor | None, shape: torch.Size, call: AttentionCall
    ) -> tuple[Tensor, Tensor | None]:
        """z (B*F*S,E) -> what it reads (B*F*S,E), before the output projection; e4m3 with row scales for fp8.

        With heads that see through cameras (B*F*S,2E): all heads, then all twins.
        """
        exchange, frames, cache, mask = self.model.exchange, shape[1], call.cache, call.reading.mask
        qkv = block.qkv(z, scale).view(shape[0], frames * shape[2], -1)
        if call.views is not None:
            out = see_out(self._twin_attention(layer, qkv, block, call, call.views, frames), call.views[0])
            return kernels.quantise_rows(out) if self.quantised else (out, None)
        if not call.reading.turns_keys:
            out = self._gathered(layer, qkv, block, call) if call.gathers else self._by_groups(layer, qkv, block, call)
            return kernels.quantise_rows(out) if self.quantised else (out, None)
        if isinstance(cache, StaticCache) and isinstance(cache.memory, PackedMemory):
            out, scale = self._packed_attention(layer, qkv, block, call, frames, cache, cache.memory)
        else:
            queries, k, v = self._queries(layer, qkv, block, call, frames)
            out, scale = attend_split(queries, k, v, mask, call.tokens, quantised=self.quantised and exchange is None)
        if exchange is None:
            return out.flatten(2).flatten(0, 1), scale
        out = exchange.to_tokens(out, frames).flatten(2).flatten(0, 1)
        return kernels.quantise_rows(out) if self.quantised else (out, None)

    def _twin_attention(
        self, layer: int, qkv: Tensor, block: FastBlock, call: AttentionCall, views: tuple[Tensor, Tensor], frames: int
    ) -> Tensor:
        """qkv (B,L,3E) -> what heads and their twins read (B,L,2N,D)."""
        config, exchange, cache, mask = self.model.config, self.model.exchange, call.cache, call.reading.mask
        tokens = call.tokens
        see = partial(
            norm_see, qkv, block.q_norm, block.k_norm, *call.rotation, *views, heads=config.heads, eps=config.eps
        )
        if not call.reading.turns_keys:
            q, k, v = see(turns_keys=False)
            cos, sin = (part.unsqueeze(1) for part in call.rotation)
            return SelfAttention(cos, sin, call.reading, cache, call.size, exchange, "auto", views)(layer, q[0], k, v)
        memory = cache.memory if isinstance(cache, StaticCache) else None
        if exchange is None and isinstance(cache, StaticCache) and not isinstance(memory, PackedMemory):
            k, v = cache.memory.view(layer, cache.rows)
            seen = frames, k.shape[1] // tokens
            copies = copies_for(mask, seen, tokens, config.attention_heads, qkv.device)
            q, _, _ = see(copies=copies, into=(cache.memory.keys(layer), cache.memory.values(layer), cache.slots))
            cache.hear(layer, q[0])
            return attend_split(q, k, v, mask, tokens)[0]
        (q,), k, v = see()
        if exchange is not None:
            q, k, v = exchange.to_heads(q, k, v, frames)
        if isinstance(cache, StaticCache) and isinstance(memory, PackedMemory):
            memory.store(layer, cache.slots, k, v)
            out, _ = attend_packed(kernels.to_fp8(q), memory, layer, cache.rows, mask, tokens)
        else:
            k, v = (k, v) if cache is None else cache.extend(layer, k, v)
            out, _ = attend_split(q.unsqueeze(0), k, v, mask, tokens)
        return out if exchange is None else exchange.to_tokens(out, frames)

    def _gathered(self, layer: int, qkv: Tensor, block: FastBlock, call: AttentionCall) -> Tensor:
        """As `_by_groups`, of a static cache, with all that changes from call to call in `call.gathers`."""
        cache, tokens = call.cache, call.tokens
        assert isinstance(cache, StaticCache)
        keys, values = cache.memory.keys(layer), cache.memory.values(layer)
        where: dict[str, Any] = {"keys": keys, "values": values, "slots": cache.slots}
        weights, eps = (block.q_norm, block.k_norm, *call.rotation), self.model.config.eps
        queries = kernels.norm_rotate_into(qkv, *weights, eps=eps, turns_keys=False, **where)
        parts: list[Tensor] = []
        for gather in call.gathers:
            k, v = kernels.gather_turned(keys, values, gather.rows, gather.cos, gather.sin)
            rows = slice(gather.queries[0] * tokens, gather.queries[1] * tokens)
            parts.append(attend_split(queries[:, :, rows], k, v, None, tokens)[0])
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).flatten(2).flatten(0, 1)

    def _by_groups(self, layer: int, qkv: Tensor, block: FastBlock, call: AttentionCall) -> Tensor:
        """qkv (B,L,3E) -> what it reads (B*L,E), where keys are stored before their rotation: as the plain network."""
        config, rotation = self.model.config, call.rotation
        still = torch.ones_like(rotation[0]), torch.zeros_like(rotation[1])  # turned by nothing
        q, k, v = kernels.norm_rotate(qkv, block.q_norm, block.k_norm, *still, heads=config.heads, eps=config.eps)
        cos, sin = (part.unsqueeze(1) for part in rotation)
        attention = SelfAttention(cos, sin, call.reading, call.cache, call.size, self.model.exchange, "auto")
        return attention(layer, rotate(q, cos, sin), k, v).flatten(2).flatten(0, 1)

    def _queries(
        self, layer: int, qkv: Tensor, block: FastBlock, call: AttentionCall, frames: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (B,L,3E) -> queries (P,B,L,N,D), and the keys and values they may see, the cache's included."""
        config, exchange, cache = self.model.config, self.model.exchange, call.cache
        weights = block.q_norm, block.k_norm, *call.rotation
        if exchange is None and isinstance(cache, StaticCache):
            keys, values = cache.memory.keys(layer), cache.memory.values(layer)
            k, v = cache.memory.view(layer, cache.rows)
            seen = frames, k.shape[1] // call.tokens
            copies = copies_for(call.reading.mask, seen, call.tokens, config.heads, qkv.device)
            where: dict[str, Any] = {"keys": keys, "values": values, "slots": cache.slots}
            queries = kernels.norm_rotate_into(qkv, *weights, eps=config.eps, copies=copies, **where)
            cache.hear(layer, queries[0])
            return queries, k, v
        q, k, v = kernels.norm_rotate(qkv, *weights, heads=config.heads, eps=config.eps)
        if exchange is not None:
            q, k, v = exchange.to_heads(q, k, v, frames)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        return q.unsqueeze(0), k, v

    def _packed_attention(
        self,
        layer: int,
        qkv: Tensor,
        block: FastBlock,
        call: AttentionCall,
        frames: int,
        cache: StaticCache,
        memory: PackedMemory,
    ) -> tuple[Tensor, Tensor | None]:
        """qkv (B,L,3E) -> what it reads (B,L,N,D); e4m3 with row scales, unless it still has to be exchanged."""
        config, exchange, tokens = self.model.config, self.model.exchange, call.tokens
        weights = block.q_norm, block.k_norm, *call.rotation
        if exchange is None:
            where = {"keys": memory.keys(layer), "values": memory.values(layer), "slots": cache.slots}
            q = kernels.norm_rotate_packed(qkv, *weights, run=cache.chunk * tokens, eps=config.eps, **where)
        else:
            turned = kernels.norm_rotate(qkv, *weights, heads=config.heads, eps=config.eps)
            q, k, v = exchange.to_heads(*turned, frames)
            memory.store(layer, cache.slots, k, v)
            q = kernels.to_fp8(q)
        return attend_packed(q, memory, layer, cache.rows, call.reading.mask, tokens, quantised=exchange is None)


@lru_cache(maxsize=256)
def _rows_of(first: int, frames: tuple[int, ...], tokens: int, device: torch.device) -> Tensor:
    """Frames by their place behind the `first` one -> the rows of their tokens (L) int64."""
    rows = ((torch.tensor(frames) + first)[:, None] * tokens + torch.arange(tokens)).flatten()
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows
