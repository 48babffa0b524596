"""Linear layers and what may stand in their place: one function reads the product that either computes.

An adapter (LoRA and the like) goes around a linear layer under the layer's own name. It is trained and evaluated as a
module; whoever needs the weights themselves, as faster forms and exports do, reads them here, adapters included.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, cast, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Adapted(Protocol):
    """A module that computes one product, x W^T + bias, from more than one weight."""

    def merged(self) -> tuple[Tensor, Tensor]:
        """The weight (O,E) and the bias (O) of that product, in the type of the layer that it adapts."""
        ...


def effective(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """The weight (O,E) and the bias (O) of the product that a linear layer, or what stands in its place, computes."""
    if isinstance(layer, Adapted):
        return layer.merged()
    if not isinstance(layer, nn.Linear):
        raise TypeError(
            f"{type(layer).__name__} stands in the place of a linear layer, but has no `merged()` that gives the "
            f"weight and bias of its product"
        )
    return layer.weight, layer.bias


def named_layers(module: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Every module in it, itself included, under its name; torch leaves the method without a type."""
    return cast("Iterable[tuple[str, nn.Module]]", module.named_modules())


def effective_state(module: nn.Module) -> dict[str, Tensor]:
    """A module's state under the names it has without adapters, each layer with the weights it computes with."""
    state = module.state_dict()
    for name, layer in named_layers(module):
        if isinstance(layer, Adapted):
            weight, bias = layer.merged()
            state = {key: value for key, value in state.items() if not key.startswith(f"{name}.")}
            state |= {f"{name}.weight": weight.detach(), f"{name}.bias": bias.detach()}
    return state
