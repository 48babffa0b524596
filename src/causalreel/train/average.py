"""Roles that follow another role: exponential moving averages and the targets of consistency distillation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from causalreel.parallel.sharding import local
from causalreel.train.stage import Average


class Follower:
    """Moves the weights of one averaged role towards its source, all tensors at once, in float32."""

    def __init__(self, average: Average, roles: dict[str, nn.Module]) -> None:
        self.average = average
        target, source = _tensors(roles[average.role]), _tensors(roles[average.source])
        shared = [name for name in target if name in source and target[name].data_ptr() == source[name].data_ptr()]
        for name in shared:  # a frozen base of adapters, which is one for both
            del target[name], source[name]
        if (
            differing := {k: v.shape for k, v in target.items()}.items()
            ^ {k: v.shape for k, v in source.items()}.items()
        ):
            name = min(key for key, _ in differing)
            raise ValueError(
                f"average {average.role!r}: {name} differs in name or shape from that of {average.source!r}"
            )
        for role, tensors in ((average.role, target), (average.source, source)):
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and tensor.dtype != torch.float32:
                    raise ValueError(f"average {average.role!r}: {role}'s {name} is {tensor.dtype}, not torch.float32")
        moving = [name for name, tensor in target.items() if tensor.is_floating_point()]
        self._target, self._source = [target[n] for n in moving], [source[n] for n in moving]
        self._copied = [(target[n], source[n]) for n in target if n not in set(moving)]

    @torch.no_grad()
    def copy(self) -> None:
        """Make the role equal to its source."""
        torch._foreach_copy_(self._target, self._source)  # pyright: ignore[reportPrivateImportUsage]
        self._copy_integers()

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take one step towards the source, after an optimiser step on it in trainer step `step`."""
        if step < self.average.from_step:
            self.copy()
            return
        torch._foreach_lerp_(self._target, self._source, 1 - self.average.decay)  # pyright: ignore[reportPrivateImportUsage]
        self._copy_integers()

    def _copy_integers(self) -> None:
        for target, source in self._copied:
            target.copy_(source)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: local(tensor.detach()) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
