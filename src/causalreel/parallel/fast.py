"""A DiT for inference: the same function in fewer, larger kernels, and recorded as CUDA graphs.

`FastDiT` stands in for the network of a denoiser (`DiTDenoiser.run`) in calls without gradient. What depends only on
the noise level (modulation), the prompt (text keys) or the shape (rotation, masks) is computed once; projections of one
input are one product; pointwise work is `nn.kernels`; attention is `nn.split_attention`. With a `StaticCache` on a GPU
each kind of call is recorded once and replayed. Everything else works as well, on a CPU too, only without a recording.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from causalreel.nn import kernels
from causalreel.nn.caches import growing_cache, static_kind
from causalreel.nn.camera import CameraAttention
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.dit import Block, DiT
from causalreel.nn.fp8_attention import PackedMemory
from causalreel.nn.kv_cache import FrameCache
from causalreel.nn.linear import Adapted, effective
from causalreel.nn.masks import Reading
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.split_attention import attend_plain
from causalreel.nn.static_cache import CacheMemory, StaticCache
from causalreel.nn.static_tokens import StaticTokenCache, TokenMemory
from causalreel.nn.texts import CallText, read_text
from causalreel.parallel.fast_attention import FastAttention, Gather
from causalreel.parallel.fast_block import PRODUCTS, TWINS, Bf16Linear, FastBlock, give_back
from causalreel.parallel.quantise import Fp8Linear
from causalreel.parallel.recordings import Levels, Recordings, TextOfBlocks
from causalreel.types import Conditioning

log = logging.getLogger(__name__)

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
        self.attention = FastAttention(model, quantised=self.quantised)
        self.graphs = Recordings(self.evaluate) if graphs else None
        self._levels: dict[tuple[float, ...], Levels] = {}
        self._is_released = False
        self._memories: dict[tuple[int, int, int, int, bool], CacheMemory] = {}
        """Per size: places, batch, rows and columns of a frame; and whether tokens are held one by one."""

    @property
    def records(self) -> bool:
        """Whether calls are recorded where they can be: if that was asked for, and no processes share them. Replays of
        shared calls once stopped for ever on four H200s (docs/performance.md)."""
        return self.graphs is not None and self.model.exchange is None

    def release_originals(self) -> None:
        """Give back the weights of which there are fp8 copies; calls with gradient are no longer possible then."""
        if not self.quantised:
            raise ValueError("only fp8 products are copies; in bf16 they share the network's weights")
        for block in self.model.blocks:
            attn, cross = block.self_attn, block.cross_attn
            twins = [attn.prope_o] if isinstance(attn, CameraAttention) else []
            for layer in (attn.q, attn.k, attn.v, attn.o, *twins, cross.q, cross.o, block.ffn[0], block.ffn[2]):
                give_back(layer)
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
        is_packed = self.precision == "fp8-attention"
        kind = static_kind(context, chunk, frames, prefix=prefix, packed=is_packed)
        if kind is None or (kind is StaticTokenCache and exchange is not None):
            if is_packed:
                log.warning("%s and chunks of %d fit no static cache: attention in bfloat16", context, chunk)
            return growing_cache(context, config.layers)
        rows, columns = (side // config.patch for side in size)
        sizes: dict[str, Any] = {
            "layers": config.layers,
            "heads": config.attention_heads if exchange is None else config.attention_heads // exchange.size,
            "head_dim": config.dim // config.heads,
            "tokens": rows * columns,
            "frames": kind.places(context, chunk, frames),
            "batch": batch,
            "dtype": self.model.dtype,
            "device": self.model.device,
        }
        holds_tokens = kind is StaticTokenCache
        key = (sizes["frames"], batch, rows, columns, holds_tokens)
        if key not in self._memories:
            if holds_tokens:
                self._memories[key] = TokenMemory(size=(rows, columns), twins=config.camera == "prope", **sizes)
            else:
                self._memories[key] = (PackedMemory if is_packed else CacheMemory)(**sizes)
        return kind(context, chunk=chunk, frames=frames, memory=self._memories[key])

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
        gathers = self.attention.gathers_of(reading, cache, size)
        with torch.cuda.device_of(x):  # Triton starts kernels on the current device
            if self.records and Recordings.fit(x, cache) and (reading.turns_keys or gathers):
                assert isinstance(cache, StaticCache) and self.graphs is not None
                return self.graphs(x, levels, rotation, text, fields, reading, cache, gathers)
            return self.evaluate(x, levels, rotation, text, fields, reading, cache, gathers)

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

    def evaluate(
        self,
        x: Tensor,
        levels: Levels,
        rotation: tuple[Tensor, Tensor],
        text: TextOfBlocks,
        fields: Mapping[str, Tensor],
        reading: Reading,
        cache: FrameCache | None,
        gathers: tuple[Gather, ...] = (),
    ) -> Tensor:
        """One evaluation, kernel by kernel: x (B,F,C,H,W) -> velocity (B,F,C,H,W)."""
        model, eps = self.model, self.model.config.eps
        y = model.tokens(x, fields).contiguous()  # (B,F,S,E)
        shape, tokens = y.shape, y.shape[2]
        quantised = self.quantised
        call = self.attention.call_of(x, fields, rotation, reading, cache, gathers)
        y = y.flatten(0, 2)
        first = levels.blocks[0]
        _, z, scale = kernels.residual_norm(y, first[1], first[0], eps=eps, tokens=tokens, quantised=quantised)
        for layer, block in enumerate(self.blocks):
            attended, scale = self.attention(layer, block, z, scale, shape, call)
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
