"""Several processes for one call: sequence parallelism by exchanging tokens for heads around self-attention.

Every frame's tokens are cut into n equal shares, in their natural order; process r computes share r of everything but
self-attention. Before attention one all-to-all turns "my tokens, all heads" into "all tokens, my heads", for queries,
keys and values together; afterwards another turns the result back. So each process attends with N/n heads, and a cache
behind it holds N/n heads of every frame. Weights, text keys and noise are the same everywhere.
DeepSpeed Ulysses (arXiv 2309.14509), section 3.

Buffers are fresh and nothing waits for the host. Calls could be captured into CUDA graphs with NCCL, if the group has
been used once before (`parallel.mesh.join` does that), but are not: see `parallel.fast.FastDiT.records`.

In training every process computes the whole loss of the whole result, and its weights get the gradient of its own
tokens, times n: the mean over the processes, which sharded networks take (`parallel.sharding`), is the gradient of one
process. The latents that go in must need no gradient, because each process would know a part of it only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from causalreel.nn.denoiser import DiTDenoiser


class Ulysses:
    """Implements `nn.dit.TokenExchange` over a process group; None is torch's default group.

    All processes make the same calls in the same order.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def split(self, y: Tensor) -> Tensor:
        """Tokens of all (B,F,S,E) -> of this process (B,F,S/n,E)."""
        if y.shape[2] % self.size:  # before anything is exchanged
            raise ValueError(
                f"{self.size} processes cannot share the {y.shape[2]} tokens of a latent frame equally; "
                f"the number of processes must divide them"
            )
        return y.unflatten(2, (self.size, -1))[:, :, self.rank]

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of this process, all heads (B,F*S/n,N,D) -> all tokens, heads of this process (B,F*S,N/n,D)."""
        batch, length, heads, width = q.shape
        cut = (batch, frames, length // frames, self.size, heads // self.size, width)
        # For each process its heads of my tokens (n,3,B,F,S/n,N/n,D)
        sent = torch.stack([part.reshape(cut).permute(3, 0, 1, 2, 4, 5) for part in (q, k, v)], dim=1)
        got = self._exchange(sent)  # from each process its tokens with my heads
        q, k, v = (got[:, i].permute(1, 2, 0, 3, 4, 5).flatten(1, 3) for i in range(3))  # (B,F,n,S/n,N/n,D) -> ...
        return q, k, v

    def to_tokens(self, x: Tensor, frames: int) -> Tensor:
        """The way back: (B,F*S,N/n,D) -> (B,F*S/n,N,D)."""
        cut = x.unflatten(1, (frames, self.size, -1))  # (B,F,n,S/n,N/n,D)
        got = self._exchange(cut.permute(2, 0, 1, 3, 4, 5).contiguous())  # from each process its heads of my tokens
        return got.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)

    def join(self, y: Tensor) -> Tensor:
        """Tokens of this process (B,F,S/n,C) -> of all (B,F,S,C), on every process."""
        parts: Tensor = _Gather.apply(y.contiguous(), self)  # pyright: ignore[reportAssignmentType]
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)

    def _exchange(self, sent: Tensor) -> Tensor:
        """Row r of `sent` goes to process r -> row r of the result comes from process r."""
        return _Exchange.apply(sent, self.group)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    """All-to-all of rows (n,...), which is its own way back."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group = group
        return _all_to_all(sent, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(gradients[0].contiguous(), ctx.group), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _all_to_all(tangents[0].contiguous(), ctx.group)


def _all_to_all(sent: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=group)
    return got


class _Gather(torch.autograd.Function):
    """(...) of each process -> (n,...) of all. All know the gradient of the whole, so each takes its row, times n."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, exchange: Ulysses) -> Tensor:
        ctx.exchange = exchange
        return _all_gather(own, exchange)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0][ctx.exchange.rank] * ctx.exchange.size, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _all_gather(tangents[0].contiguous(), ctx.exchange)


def _all_gather(own: Tensor, exchange: Ulysses) -> Tensor:
    parts = own.new_empty(exchange.size, *own.shape)
    dist.all_gather(list(parts.unbind(0)), own, group=exchange.group)
    return parts


def allowed_sizes(heads: int, tokens: int | None = None) -> list[int]:
    """How many processes can share a network with so many heads, and so many tokens per latent frame if given."""
    return [n for n in range(1, heads + 1) if heads % n == 0 and (tokens is None or tokens % n == 0)]


def shard_sequence(
    denoiser: DiTDenoiser, group: dist.ProcessGroup | None = None, *, tokens: int | None = None
) -> DiTDenoiser:
    """Share every call of this denoiser among the processes of `group`, from now on; -> the same denoiser.

    group: None is torch's default group.
    tokens: tokens of a latent frame, if known: then a number of processes that cannot share them is refused here and
    not in the first call. Each process must hold the same weights, and make the same calls with the same inputs; each
    gets the whole result. Raises ValueError naming the possible numbers of processes.
    """
    count, heads = dist.get_world_size(group), denoiser.config.heads
    if count not in allowed_sizes(heads, tokens):
        frame = "" if tokens is None else f" and {tokens} tokens per latent frame"
        possible = ", ".join(map(str, allowed_sizes(heads, tokens)))
        raise ValueError(
            f"{count} processes cannot share a network with {heads} attention heads{frame}; "
            f"the number of processes must be one of {possible}"
        )
    denoiser.model.exchange = Ulysses(group) if count > 1 else None
    return denoiser
