"""Activations on the host: what a block keeps for its backward pass waits in the host's memory, not in the GPU's.

Copies follow the computation one after the other and are not hidden behind it. With `recompute: full` only the input of
each block is kept, and so copied. Call it after `recompute_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.dit import SelfAttention
from causalreel.nn.texts import CallText


def offload_activations(denoiser: DiTDenoiser) -> DiTDenoiser:
    """Change where the blocks keep activations, in place; -> the same denoiser. Numbers and names stay as they are."""
    for block in denoiser.model.blocks:
        block.forward = partial(_on_host, block.forward)
    return denoiser


def _on_host(
    forward: Callable[..., Tensor], x: Tensor, time: Tensor, text: CallText, attention: SelfAttention
) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(x, time, text, attention)
    with save_on_cpu(pin_memory=x.is_cuda):
        return forward(x, time, text, attention)
