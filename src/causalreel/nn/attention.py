"""Attention backends in one table. `sdpa` is always there and is the reference; the others must agree with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.nn.masked_attention import attend_pieces
from causalreel.nn.masks import FrameMask
from causalreel.nn.split_attention import attend_split, has_cudnn_attention

log = logging.getLogger(__name__)

Attend = Callable[[Tensor, Tensor, Tensor, FrameMask | None, int], Tensor]
"""q (B,Lq,N,D), k, v (B,Lk,N,D), frame mask, tokens per frame -> (B,Lq,N,D)."""

LONG_TOKENS = 4096
"""Below this many queries a dense mask is cheap and sparsity saves nothing."""


@dataclass(frozen=True)
class Backend:
    """One way to compute attention, and where it works."""

    attend: Attend
    supports: Callable[[FrameMask | None, torch.dtype, torch.device], bool]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask | None, tokens: int) -> Tensor:
    bias = None if mask is None else mask.dense(tokens, q.device)
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=bias)
    return out.transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask | None, tokens: int) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    block_mask = None if mask is None else _block_mask(mask, tokens, q.device)
    run = _compiled_flex() if q.is_cuda else flex_attention
    return run(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), block_mask=block_mask).transpose(1, 2)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # pyright: ignore[reportUnknownMemberType] - torch's `backend`


@lru_cache(maxsize=64)
def _block_mask(mask: FrameMask, tokens: int, device: torch.device):  # noqa: ANN202 - private torch type
    from torch.nn.attention.flex_attention import create_block_mask

    allowed = torch.tensor(mask.allowed, dtype=torch.bool, device=device)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return allowed[q // tokens, k // tokens]

    queries, keys = len(mask.allowed) * tokens, len(mask.allowed[0]) * tokens
    return create_block_mask(mask_mod, None, None, queries, keys, device=str(device))


def _split(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask | None, tokens: int) -> Tensor:
    return attend_split(q.unsqueeze(0), k, v, mask, tokens)[0]


def _by_frame(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask | None, tokens: int) -> Tensor:
    """sdpa, one query frame after the other: in the memory of one, where a kernel writes scores out."""
    keys, values = (torch.unflatten(x, 1, (-1, tokens)) for x in (k, v))  # (B,F,S,N,D)
    everything = (True,) * keys.shape[1]
    outs: list[Tensor] = []
    for row, query in enumerate(torch.split(q, tokens, dim=1)):
        seen = [i for i, sees in enumerate(mask.allowed[row] if mask else everything) if sees]
        outs.append(_sdpa(query, keys[:, seen].flatten(1, 2), values[:, seen].flatten(1, 2), None, tokens))
    return torch.cat(outs, dim=1)


BACKENDS: dict[str, Backend] = {
    "sdpa": Backend(_sdpa, lambda mask, dtype, device: True),
    "by frame": Backend(_by_frame, lambda mask, dtype, device: True),
    # no gradient; see nn.split_attention
    "split": Backend(_split, lambda mask, dtype, device: not torch.is_grad_enabled()),
    # float16, bfloat16, on the CPU float32 too; see nn.masked_attention
    "pieces": Backend(attend_pieces, lambda mask, dtype, device: dtype.itemsize <= (2 if device.type == "cuda" else 4)),
    # flex_attention has no backward on the CPU; there it is for comparison without gradient only.
    "flex": Backend(_flex, lambda mask, dtype, device: device.type == "cuda" or not torch.is_grad_enabled()),
}


@lru_cache(maxsize=8)
def _announce(name: str, device: str) -> None:
    log.info("attention: %s on %s", name, device)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask | None, tokens: int, *, backend: str = "auto") -> Tensor:
    """q (B,Lq,N,D), k, v (B,Lk,N,D) -> (B,Lq,N,D).

    `auto`: sdpa, but for long masked sequences on CUDA `pieces` where cuDNN's kernel runs, else `flex`.
    """
    if backend == "auto":
        is_long = mask is not None and q.is_cuda and q.shape[1] >= LONG_TOKENS
        backend = "sdpa" if not is_long else "pieces" if has_cudnn_attention(q) else "flex"
        _announce(backend, q.device.type)
    elif backend not in BACKENDS:
        raise ValueError(f"attention backend must be auto or one of {', '.join(BACKENDS)}; got {backend!r}")
    elif not BACKENDS[backend].supports(mask, q.dtype, q.device):
        raise ValueError(f"attention backend {backend!r} does not work on {q.device.type} here; use sdpa or auto")
    return BACKENDS[backend].attend(q, k, v, mask, tokens)
