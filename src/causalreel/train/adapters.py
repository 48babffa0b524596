"""Training with adapters (LoRA): networks that share a frozen base, what a checkpoint holds, and the file that leaves.

Roles that start from one folder share its weights, which nobody trains then: student, critic and teacher of DMD are
one network with adapters of their own, or none. Averages follow adapters alone. Checkpoints hold adapters alone; the
base is known by the fingerprint of its contents, so that a run does not go on with another.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from causalreel.foreign import shown
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.lora import LoRAConfig, adapter_state, adapters, add_lora, twin
from causalreel.train.stage import stable_seed
from causalreel.weights.lora import Lora, Pair, read_lora


def share_bases(
    roles: dict[str, DiTDenoiser],
    places: Mapping[str, object],
    whole: Collection[str],
    fill: Callable[[str], None],
) -> None:
    """Give networks their weights, and those that start from one place the same tensors, which are read once.

    whole: roles that are trained whole, which have their own. fill: reads a role's weights into its network.
    """
    first: dict[object, DiTDenoiser] = {}
    for role, place in places.items():
        net = roles[role]
        base = None if role in whole else first.get(place)
        if base is None:
            fill(role)
            if role not in whole:
                first[place] = net.requires_grad_(False)
            continue
        roles[role] = twin(base)
        for name in ("context", "backend", "compute"):
            setattr(roles[role], name, getattr(net, name))


def adapt(role: str, net: DiTDenoiser, config: LoRAConfig, seed: int, begins_as: Lora | None = None) -> None:
    """Freeze a role's network and put adapters into it, the same for the same seed; begins_as: what they begin as."""
    generator = torch.Generator().manual_seed(stable_seed(seed, 0, f"adapters of {role}"))
    try:
        add_lora(net.model, config, generator)
    except ValueError as error:
        raise ValueError(f"lora.{role}: {error}") from None
    if begins_as is not None:
        _begin_as(role, net, begins_as)


@torch.no_grad()
def _begin_as(role: str, net: DiTDenoiser, lora: Lora) -> None:
    layers = dict(adapters(net.model))
    for name in lora.touched():
        layer, _, leaf = name.rpartition(".")
        if leaf != "weight" or layer not in lora.pairs or layer not in layers:
            raise ValueError(f"lora_init.{role}: {lora.source} changes {shown(name)}, which lora.{role} does not adapt")
    for name, pair in lora.pairs.items():
        layer = layers[name]
        if pair.down.shape != layer.lora_A.shape or pair.up.shape != layer.lora_B.shape or pair.magnitude is not None:
            kind = "a DoRA" if pair.magnitude is not None else f"of rank {pair.rank} and shapes {_shapes(pair)}"
            raise ValueError(
                f"lora_init.{role}: '{shown(pair.key)}' of {lora.source} is {kind}, the adapter of {name} has rank "
                f"{layer.rank} and shapes {tuple(layer.lora_A.shape)}, {tuple(layer.lora_B.shape)}"
            )
        layer.lora_A.copy_(pair.down)
        layer.lora_B.copy_(pair.up.float() * (pair.scale / layer.scale))


def _shapes(pair: Pair) -> str:
    return f"{tuple(pair.down.shape)}, {tuple(pair.up.shape)}"


def read_beginnings(places: Mapping[str, Path]) -> dict[str, Lora]:
    """Role -> the adapter that its own begin as; ValueError for a file that is none."""
    found = {}
    for role, place in places.items():
        try:
            found[role] = read_lora(place)
        except ValueError as error:
            raise ValueError(f"lora_init.{role}: {error}") from None
    return found


def tensors_of(lora: Lora) -> dict[str, Tensor]:
    """Everything that decides an adapter, by name: for its fingerprint."""
    found: dict[str, Tensor] = dict(lora.differences)
    for layer, pair in lora.pairs.items():
        found |= {f"{layer}.down": pair.down, f"{layer}.up": pair.up, f"{layer}.scale": torch.tensor(pair.scale)}
    return found


def kept(roles: Mapping[str, nn.Module], frozen: Collection[str]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Role -> what a checkpoint holds of it: everything; in a run with adapters only what can change.

    frozen: roles that nothing changes.
    """
    has_adapters = {role: bool(adapter_state(module)) for role, module in roles.items()}
    is_adapted = any(has_adapters.values())
    for role, module in roles.items():
        if is_adapted and role in frozen:
            yield role, {}
        else:
            yield role, adapter_state(module) if has_adapters[role] else dict(module.state_dict())


def lora_of(net: DiTDenoiser, name: str) -> Lora:
    """A network's adapters, as a file has them."""
    pairs = {
        layer: Pair(adapter.lora_A.detach(), adapter.lora_B.detach(), adapter.scale, f"{layer}.lora_A")
        for layer, adapter in adapters(net.model)
    }
    return Lora(name, "peft", pairs)
