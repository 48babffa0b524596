"""torch.compile over the pointwise-heavy halves of each block, attention and cache left outside.

The halves see only (batch, frames) change in shape, so a rollout whose context grows does not recompile.
"""

from __future__ import annotations

import torch

from causalreel.nn.denoiser import DiTDenoiser


def compile_blocks(denoiser: DiTDenoiser) -> DiTDenoiser:
    """Compile in place and return the same denoiser; parameters and their names stay as they are."""
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for block in denoiser.model.blocks:
        block.before_attention = torch.compile(block.before_attention, dynamic=False)
        block.after_attention = torch.compile(block.after_attention, dynamic=False)
    return denoiser
