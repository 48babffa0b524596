"""AdamW for one role: its parameters, its learning rate by step, and gradient clipping that never waits for the GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from causalreel.parallel.sharding import fill, local


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW and its schedule, for one role."""

    lr: float
    """Learning rate after the warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running means of the gradient and of its square, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of the mean square gradient."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as a share of the weights per unit of learning rate."""
    clip: float = 1.0
    """Largest gradient norm of the role, `.inf` for none."""
    warmup_steps: int = 0
    """Trainer steps over which the learning rate rises linearly to `lr`."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate from the warm-up to the last step."""
    final_lr_ratio: float = 0.0
    """Where the cosine ends, as a share of `lr`."""

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "weight_decay", "warmup_steps", "final_lr_ratio"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed 0 or more")
        if not self.clip > 0:
            raise ValueError(f"clip: got {self.clip}, allowed above 0 (.inf for no clipping)")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: got {self.betas}, each allowed from 0 to below 1")


def learning_rate(config: OptimiserConfig, step: int, steps: int) -> float:
    """The learning rate of 0-based trainer step `step` of `steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min(1.0, (step - config.warmup_steps) / max(1, steps - config.warmup_steps))
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


class RoleOptimiser:
    """The optimiser of one trained role. Parameters with `requires_grad=False` are left alone.

    norm: the norm () of this process's part of the gradients -> of all, where several processes share the role.
    average: makes gradients those of all processes, in place, where each of these holds the whole role.
    """

    def __init__(
        self,
        role: str,
        module: nn.Module,
        config: OptimiserConfig,
        norm: Callable[[Tensor], Tensor] = lambda own: own,
        average: Callable[[list[Tensor]], None] = lambda own: None,
    ) -> None:
        self.role, self.config, self._norm, self._average = role, config, norm, average
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError(f"role {role!r} has an optimiser but no parameter that requires a gradient")
        for name, parameter in named:
            if parameter.dtype != torch.float32:
                raise ValueError(f"role {role!r}: {name} is {parameter.dtype}; trained weights must be torch.float32")
        self.parameters = [parameter for _, parameter in named]
        self.names = [name for name, _ in named]
        options = {"betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
        self.adamw = torch.optim.AdamW(self.parameters, lr=config.lr, fused=True, **options)

    def step(self, lr: float) -> Tensor:
        """Clip the gradients and update the weights -> gradient norm () before clipping."""
        gradients = [local(p.grad) for p in self.parameters if p.grad is not None]
        if not gradients:
            raise ValueError(f"role {self.role!r}: the losses of its update reach none of its parameters")
        self._average(gradients)
        norm = clip_gradients(gradients, self.config.clip, self._norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        return norm

    def moments(self) -> dict[str, Tensor]:
        """What AdamW holds of each parameter, by "parameter/kind"."""
        held = zip(self.names, self.parameters, strict=True)
        return {f"{name}/{kind}": value for name, p in held for kind, value in self.adamw.state.get(p, {}).items()}

    def take(self, state: dict[str, Any]) -> None:
        """Take over `AdamW.state_dict()` of one process, also where several share the parameters."""
        if not any(hasattr(parameter, "to_local") for parameter in self.parameters):
            self.adamw.load_state_dict(state)
            return
        found = {
            f"{self.names[place]}/{kind}": value
            for place, held in state["state"].items()
            for kind, value in held.items()
        }
        for name, tensor in self.make_moments(found).items():
            fill(tensor, found[name])

    def make_moments(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Room for these of them, by the names of `moments`, to be filled; ValueError for another parameter's."""
        places = dict(zip(self.names, self.parameters, strict=True))
        for name, kind in (whole.rsplit("/", 1) for whole in names):
            if name not in places:
                raise ValueError(f"role {self.role!r}: there is no trained parameter {name!r}")
            p = places[name]
            made = torch.zeros((), device=p.device) if kind == "step" else torch.zeros_like(p, requires_grad=False)
            self.adamw.state[p][kind] = made
        return self.moments()

    def clear(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


def clip_gradients(
    gradients: list[Tensor], limit: float, whole: Callable[[Tensor], Tensor] = lambda own: own
) -> Tensor:
    """Scale gradients in place so that their joint norm is at most `limit` -> the norm () before that.

    whole: the norm of these gradients -> the joint norm with those that other processes hold.
    """
    norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
    norm = whole(torch.linalg.vector_norm(torch.stack(norms)))
    if limit < math.inf:
        scale = (limit / (norm + 1e-6)).clamp_(max=1.0)
        torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateImportUsage, reportCallIssue, reportArgumentType]
    return norm
