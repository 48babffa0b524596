"""What records say of the weights themselves: how far a step moves them, and where their averages are.

A few thousand weights of each role stand for all, so that a record costs some small copies and no wait. What is wrong
shows here before it shows in a loss: weights that an optimiser never reaches, weights kept in bfloat16, whose steps are
too coarse for small learning rates, an average that is a copy. `causalreel doctor` reads these.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from causalreel.parallel.sharding import local
from causalreel.train.stage import Average

SAMPLE = 16_384
"""Weights of a role that are looked at, about; spread over all its tensors."""

LOW_BITS = 0xFFFF
"""Of a float32: those that bfloat16 does not have."""


class Watch:
    """The weights of a run's trained roles and of their averages, before and after a step.

    roles: all of the stage. trained: role -> its trained parameters.
    """

    def __init__(
        self, roles: Mapping[str, nn.Module], trained: Mapping[str, Sequence[Tensor]], averages: Iterable[Average]
    ) -> None:
        self._tensors: dict[str, Sequence[Tensor]] = dict(trained)
        self._averages = []
        for average in averages:
            names = {id(p): name for name, p in roles[average.source].named_parameters()}
            followers = dict(roles[average.role].named_parameters())
            found = [followers[names[id(p)]] for p in self._tensors.get(average.source, ())]
            if found:
                self._tensors[average.role] = found
                self._averages.append(average)
        self._device = next((local(t).device for tensors in trained.values() for t in tensors), torch.device("cpu"))
        self._before: dict[str, Tensor] = {}

    def before(self) -> None:
        """Remember the weights, ahead of the last step of a record."""
        self._before = {role: self._sample(role) for role in self._tensors}

    @torch.no_grad()
    def after(self) -> dict[str, Tensor]:
        """The step since `before` -> scalars () by "role/what", on the device.

        update_ratio: norm of what changed, over the norm of the weights. still: share of the weights that did not
        change at all. coarse: share of those that are not 0 whose value fits in bfloat16. distance: of an average from
        its source, over the norm of the source. NaN for a role of which this process holds nothing.
        """
        found, now = {}, {role: self._sample(role) for role in self._before}
        for role, weights in now.items():
            change = weights - self._before[role]
            found[f"{role}/update_ratio"] = change.norm() / weights.norm()
            found[f"{role}/still"] = (change == 0).float().mean()
            is_coarse = (weights.view(torch.int32) & LOW_BITS) == 0
            found[f"{role}/coarse"] = (is_coarse & (weights != 0)).sum() / (weights != 0).sum()
        for average in self._averages:
            if average.role in now:
                source = now[average.source]
                found[f"{average.role}/distance"] = (now[average.role] - source).norm() / source.norm()
        self._before = {}
        return found

    @torch.no_grad()
    def _sample(self, role: str) -> Tensor:
        """Some weights (n,) float32 of a role, or of this process's part of it: the same ones each time."""
        tensors = self._tensors[role]
        each = -(-SAMPLE // len(tensors))
        flat = [local(tensor.detach()).reshape(-1) for tensor in tensors]
        some = [values[:: max(1, len(values) // each)][:each].float() for values in flat]
        return torch.cat([values.to(self._device) for values in some])  # averages may wait on the host
