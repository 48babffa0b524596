"""A network that waits in the host's memory and comes to the GPU block by block, while it is called.

For networks that no optimiser changes: a frozen teacher, an average. While a block computes, the next one is copied
from pinned memory, so that at most two are on the GPU, and none between calls. What is outside the blocks (embeddings,
head) stays there. In several processes `fully_shard` does the same with each process's part (`parallel.sharding`).
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from causalreel.nn.denoiser import DiTDenoiser


def host_blocks(denoiser: DiTDenoiser, device: torch.device) -> DiTDenoiser:
    """Put the blocks on the host and the rest on the device, in place; -> the same denoiser.

    Numbers, names and types stay as they are; parameters are the host's but within a block's call. Blocks without
    storage get some. The network must be frozen: a backward pass through it would not find what it has computed with.
    """
    blocks = cast("nn.ModuleList", denoiser.model.blocks)
    is_empty = any(parameter.is_meta for parameter in denoiser.parameters())
    setattr(denoiser.model, "blocks", nn.ModuleList())  # noqa: B010
    denoiser.to_empty(device=device) if is_empty else denoiser.to(device)
    setattr(denoiser.model, "blocks", blocks)  # noqa: B010
    blocks.to_empty(device="cpu") if is_empty else blocks.to("cpu")
    if device.type == "cuda":
        for tensor in _tensors(blocks):
            tensor.data = tensor.data.pin_memory()
    visit = _Visit(blocks, device)
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(visit.begin, number))
        block.register_forward_hook(partial(visit.end, number), always_call=True)
    return denoiser


class _Visit:
    """Brings blocks to the device and lets them go again."""

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        self.held = [_tensors(block) for block in blocks]
        self.there = [[tensor.data for tensor in tensors] for tensors in self.held]
        self.here: dict[int, list[Tensor]] = {}
        self.copying = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, number: int, *_: object) -> None:
        """Before a block computes: it is here, and the next one on its way."""
        if torch.is_grad_enabled():
            raise RuntimeError("a network whose blocks wait on the host was called with gradient")
        if number == 0:
            self.here.clear()  # what a call that failed had on its way, and may have changed since
        self._fetch(number)
        if self.copying is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.copying)
        for tensor, here in zip(self.held[number], self.here[number], strict=True):
            tensor.data = here
        if number + 1 < len(self.held):
            self._fetch(number + 1)

    def end(self, number: int, *_: object) -> None:
        """After it, even if it failed: memory here is free for the blocks that follow."""
        for tensor, there in zip(self.held[number], self.there[number], strict=True):
            tensor.data = there
        del self.here[number]

    def _fetch(self, number: int) -> None:
        if number in self.here:
            return
        self.here[number] = [torch.empty_like(there, device=self.device) for there in self.there[number]]
        if self.copying is None:
            self._copy(number)
            return
        # What had this memory before was asked of the GPU earlier in its own stream.
        self.copying.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.copying):
            self._copy(number)

    def _copy(self, number: int) -> None:
        for here, there in zip(self.here[number], self.there[number], strict=True):
            here.copy_(there, non_blocking=True)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
