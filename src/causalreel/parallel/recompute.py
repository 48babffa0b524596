"""Activations that are computed again in the backward pass instead of being kept.

Teacher forcing of 21 frames at 480x832 makes 23 tensors of 190 MiB in a block of the 1.3B network: 30 blocks fit no
card. Self-attention takes most of the time and makes a fifth of that. So `selective` keeps what it reads and gives, and
of the rest of a block only the results of products with more channels in than out (the second one of the feed-forward:
a third of the work of all products, one tensor); everything else is computed again.

Call it before `compile_blocks`: a compiled half then has this choice in its graph and computes again only what its
backward pass reads. `fully_shard` goes around blocks before or after.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.dit import Block, SelfAttention
from causalreel.nn.lora import adapters
from causalreel.nn.texts import CallText

Recompute = Literal["none", "selective", "full"]
"""What is computed again: nothing, the halves of each block around its self-attention, or whole blocks."""


def recompute_blocks(denoiser: DiTDenoiser, mode: Recompute) -> DiTDenoiser:
    """Change how the blocks keep activations, in place; -> the same denoiser. Numbers and names stay as they are.

    ValueError for an unknown mode.
    """
    if mode not in get_args(Recompute):
        raise ValueError(f"recompute must be one of {', '.join(get_args(Recompute))}; got {mode!r}")
    is_random = any(adapter.dropout for _, adapter in adapters(denoiser.model))
    for block in denoiser.model.blocks:
        if mode == "selective":
            block.before_attention = _again(block.before_attention, is_random)
            block.after_attention = _again(block.after_attention, is_random)
        elif mode == "full":
            block.forward = partial(_whole, block, block.forward, is_random)
    return denoiser


def _again(function: Callable[..., Any], is_random: bool) -> Callable[..., Any]:
    """The function, whose intermediates are computed again but for those that `_is_kept` names.

    is_random: it draws (dropout of adapters), and must draw the same again.
    """

    def run(*call: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*call)
        return checkpoint(function, *call, use_reentrant=False, preserve_rng_state=is_random, context_fn=_contexts)

    return run


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_is_kept)


def _is_kept(context: Any, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    """Products with more channels in than out: dear to compute again, cheap to keep."""
    ops = torch.ops.aten
    if operation in (ops.mm.default, ops.addmm.default) and inputs[-1].shape[0] > inputs[-1].shape[1]:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


def _whole(
    block: Block,
    plain: Callable[..., Tensor],
    is_random: bool,
    x: Tensor,
    time: Tensor,
    text: CallText,
    attention: SelfAttention,
) -> Tensor:
    """The block, of which only the input is kept. Behind a cache, which may have moved on by then, as `selective`;
    there, of blocks that see through cameras, everything is kept: their halves are others."""
    if not torch.is_grad_enabled() or (attention.cache is not None and attention.views is not None):
        return plain(x, time, text, attention)
    if attention.cache is None:
        return checkpoint(plain, x, time, text, attention, use_reentrant=False, preserve_rng_state=is_random)
    cos, sin, turns_keys = attention.cos, attention.sin, attention.reading.turns_keys
    attended = attention(block.layer, *_again(block.before_attention, is_random)(x, time, cos, sin, turns_keys))
    return _again(block.after_attention, is_random)(
        x, attended, time, text.of_block(block.layer, block.cross_attn.key_value)
    )
