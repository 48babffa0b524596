"""Full-size networks in memory once: built without storage, then filled from a file, or with random weights.

A 14B network in bfloat16 is 28 GB; building it the ordinary way would first make 57 GB of random float32 numbers. Here
the network is built on the meta device and each tensor goes from the mapped file straight to where it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.window import Context
from causalreel.nn.presets import ModelConfig
from causalreel.weights.layouts import Network, check_heads, read_network
from causalreel.weights.strict import check_fits, check_range, load_strictly


def empty_denoiser(config: ModelConfig, *, context: ContextPolicy = Context(), backend: str = "auto") -> DiTDenoiser:
    """A denoiser whose parameters have shapes and no storage (meta device)."""
    with torch.device("meta"):
        return DiTDenoiser(config, context=context, backend=backend)


def load_denoiser(
    source: str | Path | Network,
    config: ModelConfig,
    *,
    which: str | None = None,
    context: ContextPolicy = Context(),
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
) -> DiTDenoiser:
    """A weights file or folder of any known layout as a denoiser on `device`, in evaluation mode, without gradient.

    which: see `layouts.read_network`. dtype: of the parameters; None keeps the file's. On a CPU and with the file's
    type the parameters are the mapped file itself: nothing is copied, pages are read when they are used.
    """
    network = source if isinstance(source, Network) else read_network(source, which)
    denoiser = empty_denoiser(config, context=context, backend=backend)
    check_heads(denoiser.model, network)
    check_fits(denoiser.model, network.tensors, source=network.source)
    tensors = moved(network.tensors, device, dtype)
    load_strictly(denoiser.model, tensors, source=network.source, assign=True)
    return denoiser.requires_grad_(False).eval()


def random_denoiser(
    config: ModelConfig,
    *,
    context: ContextPolicy = Context(),
    backend: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> DiTDenoiser:
    """A denoiser with random weights, drawn on `device` in `dtype`: for measuring speed and memory.

    Unlike `DiT.initialise` nothing is zero, so that all outputs depend on all inputs.
    """
    denoiser = empty_denoiser(config, context=context, backend=backend).to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    fill_randomly(denoiser.model, generator)
    return denoiser.requires_grad_(False).eval()


@torch.no_grad()
def fill_randomly(module: nn.Module, generator: torch.Generator) -> None:
    """Xavier for matrices and kernels, ones for norms, zeros for biases, small numbers for modulation; in place."""
    for name, parameter in module.named_parameters():
        draw(name, parameter, generator)


@torch.no_grad()
def draw(name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """As `fill_randomly`, the parameter called `name`."""
    if name.endswith("modulation"):
        parameter.normal_(std=parameter.shape[-1] ** -0.5, generator=generator)
    elif parameter.ndim > 1 and name.endswith("weight"):
        nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
    else:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def moved(
    tensors: Mapping[str, Tensor], device: torch.device | str, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The same tensors elsewhere or in another type, one after the other, so that no second copy of all is made."""
    to: dict[str, Any] = {"device": device} | ({"dtype": dtype} if dtype is not None else {})
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.to(**to)
        check_range(name, tensor, found[name])
    return found
