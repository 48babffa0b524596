"""Low-rank adapters (LoRA) around linear layers: what is trained in the place of a network's weights.

    W x + scale * B A x,        scale = alpha / rank, or alpha / sqrt(rank)

Hu et al. (arXiv 2106.09685), section 4.1; the root is rsLoRA (arXiv 2312.03732). A and B are float32 masters and
compute in the type of the layer's input; the layer itself is frozen and may be shared by several networks. B begins at
zero, so that an adapted network begins as the one it adapts. Files are not its business: see `weights.lora`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalreel.nn.linear import named_layers

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers are adapted, and how much an adapter may change."""

    rank: int = 32
    """Inner width of an adapter: its size and what it can express."""
    alpha: float | None = None
    """How much an adapter counts: alpha / rank times; null for the rank, which is 1 times."""
    rslora: bool = False
    """Count alpha / sqrt(rank) times instead, so that large ranks learn as fast as small ones."""
    dropout: float = 0.0
    """Share of the adapters' inputs that is left out in calls with gradient."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")
    """Linear layers by the end of their names, as peft has them: q is every `...attn.q`; `blocks.0.ffn.0` is one."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: got {self.rank}, allowed 1 or more")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha: got {self.alpha}, allowed above 0, or null for the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, allowed from 0 to below 1")
        if not self.targets:
            raise ValueError("targets: got none, at least one layer must be adapted")

    @property
    def scale(self) -> float:
        """What the product of an adapter is multiplied by."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRALinear(nn.Module):
    """A linear layer (E to O) with an adapter; implements `nn.linear.Adapted`. The layer is frozen."""

    def __init__(self, base: nn.Linear, config: LoRAConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        if config.rank > min(base.in_features, base.out_features):
            raise ValueError(
                f"rank: got {config.rank}, allowed at most {min(base.in_features, base.out_features)} for a layer of "
                f"{base.in_features} inputs and {base.out_features} outputs"
            )
        self.base = base.requires_grad_(False)
        self.scale, self.dropout = config.scale, config.dropout
        down = torch.empty(config.rank, base.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)  # as peft and the paper's own code
        device = base.weight.device
        self.lora_A = nn.Parameter(down.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, config.rank, device=device))

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x (...,E) -> (...,O)."""
        y = self.base(x)
        inside = F.dropout(x, self.dropout) if self.dropout and self.training and torch.is_grad_enabled() else x
        down, up = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return y + self.scale * F.linear(F.linear(inside, down), up)

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor]:
        """Weight (O,E) and bias (O) of the product, summed in float32 and rounded once to the layer's type."""
        weight = self.base.weight.float() + self.scale * (self.lora_B.float() @ self.lora_A.float())
        return weight.to(self.base.weight.dtype), self.base.bias


def add_lora(module: nn.Module, config: LoRAConfig, generator: torch.Generator | None = None) -> list[str]:
    """Freeze the module and put adapters around its linear layers -> their names.

    ValueError for a target that is no linear layer of it. generator: on the CPU; it draws the beginning of every A.
    """
    module.requires_grad_(False)
    linear = [name for name, layer in named_layers(module) if isinstance(layer, nn.Linear)]
    chosen: dict[str, None] = {}
    for target in config.targets:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not found:
            ends = sorted({".".join(name.split(".")[-2:]) for name in linear})
            raise ValueError(f"targets: there is no linear layer {target!r}; there are such as {', '.join(ends[:12])}")
        chosen |= dict.fromkeys(found)
    for name in [name for name in linear if name in chosen]:  # in the network's order, whatever that of the targets
        above, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(above), leaf, LoRALinear(module.get_submodule(name), config, generator))  # type: ignore[arg-type]
    return list(chosen)


def adapters(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """Every adapted layer under the name it has without its adapter."""
    yield from ((name, layer) for name, layer in named_layers(module) if isinstance(layer, LoRALinear))


def adapter_state(module: nn.Module) -> dict[str, Tensor]:
    """The adapters' parameters alone, under the names that the module's own state has for them."""
    state = module.state_dict(keep_vars=True)
    names = [f"{name}.{leaf}" for name, _ in adapters(module) for leaf in ("lora_A", "lora_B")]
    return {name: state[name].detach() for name in names}


def twin(module: Module) -> Module:
    """A copy whose frozen parameters are the original's own: they never change, and take no memory twice."""
    frozen = {id(parameter): parameter for parameter in module.parameters() if not parameter.requires_grad}
    return copy.deepcopy(module, frozen)
