"""A DiT for inference: the same function in fewer, larger kernels, and recorded as CUDA graphs.

`FastDiT` stands in for the network of a denoiser (`DiTDenoiser.run`) in calls without gradient. What depends only on
the noise level (modulation), the prompt (text keys) or the shape (rotation, masks) is computed once; projections of one
input are one product; pointwise work is `nn.kernels`; attention is `nn.split_attention`. With a `StaticCache` on a GPU
each kind of call is recorded once and replayed. Everything else works as well, on a CPU too, only without a recording.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalreel.nn import kernels
from causalreel.nn.caches import growing_cache, static_kind
from causalreel.nn.camera import CameraAttention, Views
from causalreel.nn.camera_kernels import norm_see, see_out
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.dit import Block, CallText, DiT, KeyValue, SelfAttention, TextRun, read_text
from causalreel.nn.fp8_attention import PackedMemory, attend_packed
from causalreel.nn.kv_cache import FrameCache
from causalreel.nn.linear import Adapted, effective
from causalreel.nn.masks import FrameMask, Reading
from causalreel.nn.paged_cache import PagedCache
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.rope import rotate
from causalreel.nn.split_attention import attend_plain, attend_split, copies_for
from causalreel.nn.static_cache import CacheMemory, StaticCache
from causalreel.parallel.mesh import release_first
from causalreel.parallel.quantise import Fp8Linear
from causalreel.types import Conditioning

log = logging.getLogger(__name__)

WARMUP = 2
"""Runs before a recording, in which kernels are compiled and libraries choose theirs."""


PRECISIONS = ("bf16", "fp8", "fp8-attention")
"""What a FastDiT computes in."""

NEEDS = {"fp8": (8, 9), "fp8-attention": (9, 0)}
"""The compute capability from which a GPU has the products."""


def check_precision(precision: str, device: torch.device) -> None:
    """ValueError for a device that does not compute in one of PRECISIONS at speed."""
    least = NEEDS.get(precision)
    if least is not None and (device.type != "cuda" or torch.cuda.get_device_capability(device) < least):
        raise ValueError(
            f"precision {precision} needs a GPU of compute capability {'.'.join(map(str, least))} or later; "
            f"the device is {device}"
        )


class Bf16Linear:
    """A product in the weights' own type."""

    quantised = False

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def renew(self, weight: Tensor, first: int) -> None:
        """Weights (O,E) of the outputs from `first` on; they may be shared with the network, which has them then."""
        self.weight.data[first : first + len(weight)].copy_(weight)

    def __call__(self, x: Tensor, row_scale: Tensor | None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def with_gelu(self, x: Tensor, row_scale: Tensor | None = None) -> tuple[Tensor, None]:
        """The product's GELU (tanh form); on a GPU the library adds it as the product leaves the registers."""
        if x.is_cuda:
            return torch.ops.aten._addmm_activation(self.bias, x, self.weight.t(), use_gelu=True), None
        return F.gelu(self(x), approximate="tanh"), None


class FastBlock:
    """The products of one block; weights are shared with the block, not copied, but for layers with an adapter.

    With heads that see through cameras, `o` takes what all heads and then all their twins read (2E).
    """

    def __init__(self, block: Block, linear: type) -> None:
        attn, cross = block.self_attn, block.cross_attn
        self.qkv = linear(*_as_one([attn.q, attn.k, attn.v]))
        rest = (cross.q, cross.o, block.ffn[0], block.ffn[2])
        self.cross_q, self.cross_o, self.up, self.down = (linear(*effective(layer)) for layer in rest)
        self.twin_bias: Tensor | None = None
        """What `o` adds for the twins whatever they read."""
        if isinstance(attn, CameraAttention):
            self.o, self.twin_bias = linear(*_side_by_side(attn.o, attn.prope_o)), attn.prope_o.bias
        else:
            self.o = linear(*effective(attn.o))
        self.q_norm, self.k_norm, self.cross_norm = attn.norm_q.weight, attn.norm_k.weight, cross.norm_q.weight
        self.norm3 = block.norm3.weight.float(), block.norm3.bias.float()


TWINS = "self_attn.prope_o"

PRODUCTS = {
    "self_attn.q": ("qkv", 0),
    "self_attn.k": ("qkv", 1),
    "self_attn.v": ("qkv", 2),
    "self_attn.o": ("o", 0),
    TWINS: ("o", 1),
    "cross_attn.q": ("cross_q", 0),
    "cross_attn.o": ("cross_o", 0),
    "ffn.0": ("up", 0),
    "ffn.2": ("down", 0),
}
"""Layer of a block -> the product of FastBlock that it is in, and which of its parts."""


def _as_one(layers: Sequence[nn.Module]) -> tuple[Tensor, Tensor]:
    """Weights (3E,E) and bias (3E) of neighbouring products; the layers become views of them."""
    weight, bias = (torch.cat([part.detach() for part in parts]) for parts in zip(*map(effective, layers), strict=True))
    for layer, w, b in zip(layers, weight.chunk(len(layers)), bias.chunk(len(layers)), strict=True):
        if isinstance(layer, nn.Linear):
            layer.weight.data, layer.bias.data = w, b
    return weight, bias


def _side_by_side(left: nn.Module, right: nn.Module) -> tuple[Tensor, Tensor]:
    """Weights (E,2E) of two layers whose products are added, and the sum of their bias; the layers become views."""
    parts = [effective(layer) for layer in (left, right)]
    weight = torch.cat([part.detach() for part, _ in parts], dim=1)
    for layer, own in zip((left, right), weight.chunk(2, dim=1), strict=True):
        if isinstance(layer, nn.Linear):
            layer.weight.data = own
    return weight, parts[0][1].detach() + parts[1][1].detach()


def _give_back(layer: nn.Module) -> None:
    """Take the storage of a layer's matrices, those of an adapter included."""
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))


@dataclass(frozen=True)
class _Call:
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


@dataclass(frozen=True)
class Levels:
    """Modulation of one tuple of noise levels, float32: scales already hold the 1 that is added to them."""

    blocks: Tensor
    """(layers,6,F,E): shift, scale, gate of attention; the same of the feed-forward. With fields B*F instead of F."""
    head: Tensor
    """(2,F,E): shift and scale."""


TextOfBlocks = list[list[TextRun]]
"""For every block what the frames of a call read: the same runs of frames everywhere."""

NO_FIELDS: Mapping[str, Tensor] = {}


class FastDiT:
    """x, sigma, text -> velocity, as the DiT it is made of. precision: one of PRECISIONS.

    bf16 is the weights' own type. With fp8 the products of the blocks are e4m3 with a scale per token and per output
    channel; attention, embeddings and the head stay as they are. fp8-attention also has self-attention and its cache in
    e4m3 (`nn.fp8_attention`), where the cache is static. The released code has no such modes: they are changes of
    numerics, never a default.
    """

    def __init__(self, model: DiT, *, precision: str = "bf16", graphs: bool = True) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.model, self.precision, self.quantised = model, precision, precision != "bf16"
        self.blocks = [FastBlock(block, Fp8Linear if self.quantised else Bf16Linear) for block in model.blocks]
        self.graphs = Recordings(self) if graphs else None
        self._levels: dict[tuple[float, ...], Levels] = {}
        self._is_released = False
        self._memories: dict[tuple[int, int, int], CacheMemory] = {}
        """Per size: places, batch, tokens a frame."""

    def release_originals(self) -> None:
        """Give back the weights of which there are fp8 copies; calls with gradient are no longer possible then."""
        if not self.quantised:
            raise ValueError("only fp8 products are copies; in bf16 they share the network's weights")
        for block in self.model.blocks:
            attn, cross = block.self_attn, block.cross_attn
            twins = [attn.prope_o] if isinstance(attn, CameraAttention) else []
            for layer in (attn.q, attn.k, attn.v, attn.o, *twins, cross.q, cross.o, block.ffn[0], block.ffn[2]):
                _give_back(layer)
        self._is_released = True

    @torch.no_grad()
    def renew(self, name: str, value: Tensor) -> None:
        """A parameter of the network has another value: the same here, in place, so that recordings stay good.

        Modulation that is kept for levels seen before is stale until `forget_levels`.
        """
        block, _, inside = name.removeprefix("blocks.").partition(".")
        if inside == name or not block.isdecimal():
            return
        layer, _, leaf = inside.rpartition(".")
        fast = self.blocks[int(block)]
        if layer == "norm3":
            fast.norm3[leaf == "bias"].copy_(value)
        elif layer in PRODUCTS and leaf == "weight":
            product, part = PRODUCTS[layer]
            self._renew(fast, self.model.blocks[int(block)], product, part, value)

    def _renew(self, fast: FastBlock, block: Block, product: str, part: int, value: Tensor) -> None:
        """Other weights for a part of a product; `o` of heads and twins has its parts side by side."""
        held, attn = getattr(fast, product), block.self_attn
        if product != "o" or not isinstance(attn, CameraAttention):
            held.renew(value, part * len(value))
            return
        halves = [value if place == part else effective(layer)[0] for place, layer in enumerate((attn.o, attn.prope_o))]
        if any(half.is_meta for half in halves):
            raise ValueError("output products of heads with cameras cannot change in fp8: load the model in bf16")
        held.renew(torch.cat(halves, dim=1), 0)

    @torch.no_grad()
    def refresh(self) -> None:
        """All weights of the network were changed in place: what was made of them is made again, where it is.

        Recordings stay good. ValueError after `release_originals`, when there is nothing to make it of.
        """
        if self._is_released:
            raise ValueError("the network keeps only fp8 copies of the weights as they were: load it again")
        for fast, block in zip(self.blocks, self.model.blocks, strict=True):
            for held, now in zip(fast.norm3, (block.norm3.weight, block.norm3.bias), strict=True):
                held.copy_(now)
            if isinstance(block.self_attn, CameraAttention):
                fast.o.bias.copy_(effective(block.self_attn.o)[1] + effective(block.self_attn.prope_o)[1])
            for name, (product, part) in PRODUCTS.items():
                if name == TWINS and fast.twin_bias is None:
                    continue
                layer = block.get_submodule(name)
                if self.quantised or isinstance(layer, Adapted):
                    self._renew(fast, block, product, part, effective(layer)[0])
        self.forget_levels()

    def forget_levels(self) -> None:
        """Compute modulation anew: its weights have changed."""
        self._levels.clear()

    def new_cache(
        self,
        context: ContextPolicy,
        *,
        chunk: int,
        frames: int | None,
        batch: int,
        size: tuple[int, int],
        prefix: int = 0,
    ) -> FrameCache:
        """A cache for a rollout over latents of `size` (H,W): static where that works, else one that grows.

        Rollouts of one size share a memory, and with it the recordings of their calls. prefix: given frames among
        `frames`, which the first call reads.
        """
        config, exchange = self.model.config, self.model.exchange
        static, is_packed = static_kind(context), self.precision == "fp8-attention"
        if static is None or not static.fits(context, chunk, frames, prefix) or (is_packed and static is PagedCache):
            if is_packed:
                log.warning("%s and chunks of %d fit no static cache: attention in bfloat16", context, chunk)
            return growing_cache(context, config.layers)
        tokens = size[0] * size[1] // config.patch**2
        key = (static.places(context, chunk, frames), batch, tokens)
        if key not in self._memories:
            kind = PackedMemory if is_packed else CacheMemory
            self._memories[key] = kind(
                layers=config.layers,
                heads=config.attention_heads if exchange is None else config.attention_heads // exchange.size,
                head_dim=config.dim // config.heads,
                tokens=tokens,
                frames=key[0],
                batch=batch,
                dtype=self.model.dtype,
                device=self.model.device,
            )
        return static(context, chunk=chunk, frames=frames, memory=self._memories[key])

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        reading: Reading,
        cache: FrameCache | None = None,
        outputs: int | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """As DiT.forward. Calls with gradient, or with other noise levels in other rows, go to the DiT itself."""
        sigmas = sigma.expand(-1, x.shape[1]).tolist()
        if torch.is_grad_enabled() or outputs is not None or any(row != sigmas[0] for row in sigmas):
            if self._is_released:
                raise ValueError("a network that keeps only its fp8 products cannot do this call: load it in bf16")
            how: dict[str, Any] = {"reading": reading, "cache": cache, "outputs": outputs}
            return self.model(x, sigma, conditioning, backend=backend, **how)
        self.model.check_fields(conditioning, x.shape[1])
        fields, text = conditioning.fields, self.text_keys(conditioning, x.shape[1])
        levels = self.levels(tuple(sigmas[0]), fields)
        size = x.shape[3] // self.model.config.patch, x.shape[4] // self.model.config.patch
        cos, sin = self.model.rotation(reading.positions, *size, x.device)  # (L,1,D/2)
        rotation = cos.squeeze(1), sin.squeeze(1)
        with torch.cuda.device_of(x):  # Triton starts kernels on the current device
            if self.graphs is not None and x.is_cuda and isinstance(cache, StaticCache) and reading.turns_keys:
                return self.graphs(x, levels, rotation, text, fields, reading, cache)
            return self.evaluate(x, levels, rotation, text, fields, reading, cache)

    def text_keys(self, conditioning: Conditioning, frames: int) -> TextOfBlocks:
        """What every block reads; the same keys as long as the conditioning keeps them."""
        text = CallText.of(conditioning, frames)
        text.embed(self.model.embed_text, len(self.blocks))
        return [text.of_block(block.layer, block.cross_attn.key_value) for block in self.model.blocks]

    def levels(self, sigmas: tuple[float, ...], fields: Mapping[str, Tensor] = NO_FIELDS) -> Levels:
        """Modulation of a call's noise levels, one a frame; kept without fields, because rollouts use few."""
        if fields:
            return self._modulation(sigmas, fields)
        if sigmas not in self._levels:
            if len(self._levels) >= 256:
                self._levels.clear()
            self._levels[sigmas] = self._modulation(sigmas, fields)
        return self._levels[sigmas]

    def _modulation(self, sigmas: tuple[float, ...], fields: Mapping[str, Tensor]) -> Levels:
        model = self.model
        sigma = torch.tensor([sigmas], device=model.device)
        time, time6 = (part.float().flatten(0, 1) for part in model.time_levels(sigma, fields))  # with fields (B*F,..)
        blocks = torch.stack([block.modulation.float() + time6 for block in model.blocks])  # (layers,F,6,E)
        blocks[:, :, [1, 4]] += 1
        head = model.head.modulation.float() + time.unsqueeze(1)  # (F,2,E)
        head[:, 1] += 1
        return Levels(blocks.transpose(1, 2).contiguous(), head.transpose(0, 1).contiguous())

    def _call_of(
        self,
        x: Tensor,
        fields: Mapping[str, Tensor],
        rotation: tuple[Tensor, Tensor],
        reading: Reading,
        cache: FrameCache | None,
    ) -> _Call:
        """What self-attention needs to know of a call."""
        size = x.shape[3] // self.model.config.patch, x.shape[4] // self.model.config.patch
        if self.model.config.camera != "prope":
            return _Call(rotation, reading, cache, size)
        views = self.model.views(fields)
        if isinstance(views, Views):
            return _Call(rotation, reading, cache, size, (views.project, views.lift))
        blind = torch.zeros(*x.shape[:2], 4, 4, device=x.device)  # twins that see nothing add nothing
        return _Call(rotation, reading, cache, size, (blind, blind), is_blind=True)

    def evaluate(
        self,
        x: Tensor,
        levels: Levels,
        rotation: tuple[Tensor, Tensor],
        text: TextOfBlocks,
        fields: Mapping[str, Tensor],
        reading: Reading,
        cache: FrameCache | None,
    ) -> Tensor:
        """One evaluation, kernel by kernel: x (B,F,C,H,W) -> velocity (B,F,C,H,W)."""
        model, eps = self.model, self.model.config.eps
        y = model.tokens(x, fields).contiguous()  # (B,F,S,E)
        shape, tokens = y.shape, y.shape[2]
        quantised = self.quantised
        call = self._call_of(x, fields, rotation, reading, cache)
        y = y.flatten(0, 2)
        first = levels.blocks[0]
        _, z, scale = kernels.residual_norm(y, first[1], first[0], eps=eps, tokens=tokens, quantised=quantised)
        for layer, block in enumerate(self.blocks):
            attended, scale = self._self_attention(layer, block, z, scale, shape, call)
            here, norm3 = levels.blocks[layer], block.norm3
            how: dict[str, Any] = {"eps": eps, "tokens": tokens, "quantised": quantised}
            branch = block.o(attended, scale)
            if call.is_blind and block.twin_bias is not None:
                branch = branch - block.twin_bias
            y, z, scale = kernels.residual_norm(y, *norm3, branch=branch, gate=here[2], **how)
            q = kernels.norm_rows(block.cross_q(z, scale), block.cross_norm, eps)
            heads = q.view(shape[0], -1, model.config.heads, q.shape[-1] // model.config.heads)
            read = read_text(attend_plain, heads, text[layer]).flatten(2).flatten(0, 1)
            read, scale = kernels.quantise_rows(read) if quantised else (read, None)
            y, z, scale = kernels.residual_norm(y, here[4], here[3], branch=block.cross_o(read, scale), **how)
            hidden, scale = block.up.with_gelu(z, scale)
            branch = block.down(hidden, scale)
            if layer + 1 < len(self.blocks):
                after = levels.blocks[layer + 1]
                y, z, scale = kernels.residual_norm(y, after[1], after[0], branch=branch, gate=here[5], **how)
            else:
                how["quantised"] = False
                shift, widen = levels.head
                y, z, scale = kernels.residual_norm(y, widen, shift, branch=branch, gate=here[5], **how)
        z = model.head.head(z).view(*shape[:3], -1)
        return model.unpatch(z, x.shape[3], x.shape[4]).float()

    def _self_attention(
        self, layer: int, block: FastBlock, z: Tensor, scale: Tensor | None, shape: torch.Size, call: _Call
    ) -> tuple[Tensor, Tensor | None]:
        """z (B*F*S,E) -> what it reads (B*F*S,E), before the output projection; e4m3 with row scales for fp8.

        With heads that see through cameras (B*F*S,2E): all heads, then all twins.
        """
        exchange, frames, cache = self.model.exchange, shape[1], call.cache
        tokens = call.size[0] * call.size[1]
        qkv = block.qkv(z, scale).view(shape[0], frames * shape[2], -1)
        if call.views is not None:
            out = see_out(self._twin_attention(layer, qkv, block, call, call.views, frames), call.views[0])
            return kernels.quantise_rows(out) if self.quantised else (out, None)
        weights, mask = (block.q_norm, block.k_norm, *call.rotation), call.reading.mask
        if not call.reading.turns_keys:
            out = self._by_groups(layer, qkv, block, call)
            return kernels.quantise_rows(out) if self.quantised else (out, None)
        if isinstance(cache, StaticCache) and isinstance(cache.memory, PackedMemory):
            out, scale = self._packed_attention(layer, qkv, weights, frames, mask, cache, cache.memory, tokens)
        else:
            queries, k, v = self._queries(layer, qkv, weights, frames, mask, cache, tokens)
            out, scale = attend_split(queries, k, v, mask, tokens, quantised=self.quantised and exchange is None)
        if exchange is None:
            return out.flatten(2).flatten(0, 1), scale
        out = exchange.to_tokens(out, frames).flatten(2).flatten(0, 1)
        return kernels.quantise_rows(out) if self.quantised else (out, None)

    def _twin_attention(
        self, layer: int, qkv: Tensor, block: FastBlock, call: _Call, views: tuple[Tensor, Tensor], frames: int
    ) -> Tensor:
        """qkv (B,L,3E) -> what heads and their twins read (B,L,2N,D)."""
        config, exchange, cache, mask = self.model.config, self.model.exchange, call.cache, call.reading.mask
        tokens = call.size[0] * call.size[1]
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

    def _by_groups(self, layer: int, qkv: Tensor, block: FastBlock, call: _Call) -> Tensor:
        """qkv (B,L,3E) -> what it reads (B*L,E), where keys are stored before their rotation: as the plain network."""
        config, rotation = self.model.config, call.rotation
        still = torch.ones_like(rotation[0]), torch.zeros_like(rotation[1])  # turned by nothing
        q, k, v = kernels.norm_rotate(qkv, block.q_norm, block.k_norm, *still, heads=config.heads, eps=config.eps)
        cos, sin = (part.unsqueeze(1) for part in rotation)
        attention = SelfAttention(cos, sin, call.reading, call.cache, call.size, self.model.exchange, "auto")
        return attention(layer, rotate(q, cos, sin), k, v).flatten(2).flatten(0, 1)

    def _queries(
        self,
        layer: int,
        qkv: Tensor,
        weights: tuple[Tensor, ...],
        frames: int,
        mask: FrameMask | None,
        cache: FrameCache | None,
        tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """qkv (B,L,3E) -> queries (P,B,L,N,D), and the keys and values they may see, the cache's included."""
        config, exchange = self.model.config, self.model.exchange
        if exchange is None and isinstance(cache, StaticCache):
            keys, values = cache.memory.keys(layer), cache.memory.values(layer)
            k, v = cache.memory.view(layer, cache.rows)
            copies = copies_for(mask, (frames, k.shape[1] // tokens), tokens, config.heads, qkv.device)
            where = {"keys": keys, "values": values, "slots": cache.slots}
            return kernels.norm_rotate_into(qkv, *weights, eps=config.eps, copies=copies, **where), k, v
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
        weights: tuple[Tensor, ...],
        frames: int,
        mask: FrameMask | None,
        cache: StaticCache,
        memory: PackedMemory,
        tokens: int,
    ) -> tuple[Tensor, Tensor | None]:
        """qkv (B,L,3E) -> what it reads (B,L,N,D); e4m3 with row scales, unless it still has to be exchanged."""
        config, exchange = self.model.config, self.model.exchange
        if exchange is None:
            where = {"keys": memory.keys(layer), "values": memory.values(layer), "slots": cache.slots}
            q = kernels.norm_rotate_packed(qkv, *weights, run=cache.chunk * tokens, eps=config.eps, **where)
        else:
            turned = kernels.norm_rotate(qkv, *weights, heads=config.heads, eps=config.eps)
            q, k, v = exchange.to_heads(*turned, frames)
            memory.store(layer, cache.slots, k, v)
            q = kernels.to_fp8(q)
        return attend_packed(q, memory, layer, cache.rows, mask, tokens, quantised=exchange is None)


class _Recording:
    """One kind of call as a CUDA graph, with the tensors it reads and writes."""

    def __init__(self, inputs: list[Tensor], run: Callable[[], Tensor], pool: Any, side: torch.cuda.Stream) -> None:
        self.inputs = inputs
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self.result = run()

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for held, given in zip(self.inputs, inputs, strict=True):
            if held is not given:
                held.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.result.clone()


class Recordings:
    """CUDA graphs of a FastDiT's calls: one per shape, visible length and cache; memory is shared between them."""

    def __init__(self, fast: FastDiT) -> None:
        self.fast = fast
        self.graphs: dict[tuple[Any, ...], _Recording] = {}
        self.text: dict[tuple[torch.Size, int], tuple[list[KeyValue], list[Tensor]]] = {}
        """Per shape of text keys and run of frames: those in use, and the tensors that graphs read."""
        self.pool: Any = None
        self.side: torch.cuda.Stream | None = None
        """Where all recordings are made: every stream has workspaces of its own, tens of MB each."""
        self.last: torch.Event | None = None
        """When the latest call is over."""
        release_first(self)

    def release(self) -> None:
        """Give all recordings up; the next call of each kind records it again."""
        for recording in self.graphs.values():
            recording.graph.reset()
        self.graphs.clear()
        self.pool = None  # torch forgets a pool with its last graph; another one needs another pool

    def __call__(
        self,
        x: Tensor,
        levels: Levels,
        rotation: tuple[Tensor, Tensor],
        text: TextOfBlocks,
        fields: Mapping[str, Tensor],
        reading: Reading,
        cache: StaticCache,
    ) -> Tensor:
        here = torch.cuda.current_stream(x.device)
        if self.last is not None:  # recordings share memory: one call after the other, whatever streams they come from
            here.wait_event(self.last)
        text, names = self._place_text(text), sorted(fields)
        inputs = [x, levels.blocks, levels.head, *rotation, *(fields[name] for name in names)]
        shapes = tuple((part.shape, part.dtype) for part in (x, levels.blocks, *inputs[5:]))
        reads = tuple((frames, k.shape) for frames, k, _ in text[0])
        kind = (shapes, tuple(names), reads, reading.mask, cache.call, cache.chunk, id(cache.memory))
        if kind not in self.graphs:
            held = [part.clone() for part in inputs]

            def run() -> Tensor:
                own = Levels(held[1], held[2])
                given = dict(zip(names, held[5:], strict=True))
                return self.fast.evaluate(held[0], own, (held[3], held[4]), text, given, reading, cache)

            self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.side = self.side or torch.cuda.Stream(x.device)
            self.graphs[kind] = _Recording(held, run, self.pool, self.side)
        velocity = self.graphs[kind](inputs)
        self.last = here.record_event()
        return velocity

    def _place_text(self, text: TextOfBlocks) -> TextOfBlocks:
        """The text keys, copied into the tensors that graphs read if they are not there yet."""
        placed = []
        for run, (frames, first, _) in enumerate(text[0]):
            pairs = [block[run][1:] for block in text]
            where = first.shape, run
            if where not in self.text:
                self.text[where] = pairs, [torch.stack(pair) for pair in pairs]
            known, held = self.text[where]
            if known[0][0] is not first:
                for mine, pair in zip(held, pairs, strict=True):
                    mine[0].copy_(pair[0])
                    mine[1].copy_(pair[1])
                self.text[where] = pairs, held
            placed.append([(frames, pair[0], pair[1]) for pair in held])
        return [list(block) for block in zip(*placed, strict=True)]


def accelerate(denoiser: DiTDenoiser, *, precision: str = "bf16", graphs: bool = True) -> DiTDenoiser:
    """Use a FastDiT for this denoiser's calls without gradient from now on; the same denoiser is returned.

    The network must hold its weights in the type it computes in. fp8 copies stand beside the original weights until
    `FastDiT.release_originals`.
    """
    if denoiser.compute is not None and denoiser.compute != denoiser.model.dtype:
        raise ValueError(
            f"accelerate needs weights in the type of the arithmetic; they are {denoiser.model.dtype}, "
            f"computed in {denoiser.compute}: call denoiser.to({denoiser.compute}) first"
        )
    denoiser.run = FastDiT(denoiser.model, precision=precision, graphs=graphs)
    return denoiser
