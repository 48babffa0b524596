"""A text encoder without weights: every prompt has the same random embedding. For measuring speed and memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class FixedTextEncoder:
    """Implements `types.TextEncoder` at any size; what it says of a prompt is nothing.

    tokens: rows that are not zero, as of a prompt of that length.
    """

    def __init__(self, length: int, width: int, device: torch.device | str = "cpu", *, tokens: int = 64) -> None:
        self.length, self.width = length, width
        draws = torch.randn(2, length, width, generator=torch.Generator().manual_seed(0))  # the same on every device
        draws[:, min(tokens, length) :] = 0
        self._rows = draws.to(device)

    def complete(
        self,
        prompt: str,
        seed: int,
        picture: Tensor | None = None,
        *,
        before: str | None = None,
        seen: Tensor | None = None,
    ) -> str:
        """The prompt unchanged."""
        return prompt

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text (B,length,width) float32, the same for each."""
        return self._rows[:1].repeat(len(prompts), 1, 1)

    def null(self, batch: int) -> Tensor:
        """The unconditional input (batch,length,width), another one."""
        return self._rows[1:].repeat(batch, 1, 1)
