"""Products in fp8: e4m3 weights with a scale per output channel, e4m3 inputs with a scale per row.

On an H200 the products of a rollout took 160 ms instead of 243 (docs/performance.md). Most inputs are quantised where
they are made (`nn.kernels`), which is not free: finding a row's scale slows these kernels down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from causalreel.nn import kernels
from causalreel.nn.kernels import FP8, quantise_rows


class Fp8Linear:
    """x (R,E) e4m3 with row scales (R,1) -> x W^T + bias (R,O), in the type of the bias."""

    quantised = True

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        values, scale = quantise_rows(weight.detach())
        self.weight, self.scale = values, scale.t().contiguous()  # (O,E), (1,O)
        self.bias = bias.detach()

    def renew(self, weight: Tensor, first: int) -> None:
        """Weights (O,E) of the outputs from `first` on, quantised anew in place."""
        values, scale = quantise_rows(weight.to(self.bias.dtype))
        self.weight[first : first + len(weight)] = values
        self.scale[:, first : first + len(weight)] = scale.t()

    def __call__(self, x: Tensor, row_scale: Tensor | None = None) -> Tensor:
        assert row_scale is not None and x.dtype == FP8
        if x.is_cuda:
            return torch.ops.aten._scaled_mm(
                x,
                self.weight.t(),
                row_scale,
                self.scale,
                bias=self.bias,
                out_dtype=self.bias.dtype,
                use_fast_accum=True,
            )
        product = (x.float() * row_scale) @ (self.weight.float() * self.scale.t()).t()
        return (product + self.bias.float()).to(self.bias.dtype)

    def with_gelu(self, x: Tensor, row_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The product's GELU (tanh form), e4m3 with row scales."""
        return kernels.gelu(self(x, row_scale), quantised=True)
