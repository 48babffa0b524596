"""torch.compile over the pointwise-heavy halves of each block, attention and cache left outside.

The halves see only (batch, frames) change in shape, so a rollout whose context grows does not recompile.
"""

from __future__ import annotations

import torch

from causalreel.nn.denoiser import DiTDenoiser

HALVES = ("before_attention", "after_attention", "before_cameras", "seen_again")
"""Methods of blocks, the last two of those that see through cameras."""


def compile_blocks(denoiser: DiTDenoiser) -> DiTDenoiser:
    """Compile in place and return the same denoiser; parameters and their names stay as they are."""
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
    for block in denoiser.model.blocks:
        for name in HALVES:
            if hasattr(block, name):
                setattr(block, name, torch.compile(getattr(block, name), dynamic=False))
    return denoiser
