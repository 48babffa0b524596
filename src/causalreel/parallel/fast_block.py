"""The products of a block for inference: projections of one input as one product, adapters merged, weights shared."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalreel.nn.camera import CameraAttention
from causalreel.nn.dit import Block
from causalreel.nn.linear import effective


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


def give_back(layer: nn.Module) -> None:
    """Take the storage of a layer's matrices, those of an adapter included."""
    for module in layer.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 2:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
