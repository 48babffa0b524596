"""TAEHV's decoder rearranged: growth in time, doubling and convolution folded into one, bias and ReLU in cuDNN.

At the end of a resolution nothing nonlinear stands between the doubling, the 1x1 growth and the 3x3 convolution, so
they are one convolution with four phases (`codecs.passes.phase_weights`). The last convolution, to 3 channels, is one
matrix product to 27 channels and a sum of neighbours. Each memory block keeps the last frame of its input.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.codecs.passes import Backend, gather_head, phase_weights, spread_phases
from causalreel.codecs.taehv import TAEHV, Enlarge, Grow, MemoryBlock, PlainConv

Weights = tuple[Tensor, Tensor]


class TAEHVProgram:
    """The decoder of a TAEHV: latents (B,F,C,h,w) -> frames (B,T,3,H,W) in [-1, 1], float32."""

    def __init__(self, codec: TAEHV, dtype: torch.dtype, device: torch.device, backend: Backend) -> None:
        self.states: dict[object, Tensor] = {}
        self._dtype, self._device = dtype, device
        self._backend: Backend = backend
        self._is_fused = device.type == "cuda"
        self._dropped = codec.dropped
        layers = list(codec.decoder)
        first, last = layers[1], layers[-1]
        assert isinstance(first, PlainConv) and isinstance(last, PlainConv) and last.bias is not None
        self._first = self._conv(first)
        self._blocks: list[list[list[Weights]]] = [[]]
        self._ends: list[tuple[Tensor, int, bool]] = []
        for place, layer in enumerate(layers):
            if isinstance(layer, MemoryBlock):
                self._blocks[-1].append([self._conv(layer.conv[name]) for name in ("0", "2", "4")])
            if isinstance(layer, Grow):
                doubling, conv = layers[place - 1], layers[place + 1]
                assert isinstance(doubling, Enlarge) and isinstance(conv, PlainConv)
                self._ends.append(self._end(layer, conv, is_doubled=doubling.is_used))
                self._blocks.append([])
        rows = last.weight.detach().permute(2, 3, 0, 1).flatten(0, 2)  # (27,C)
        self._head = F.pad(rows, (0, 0, 0, -len(rows) % 8)).to(device, dtype)
        self._head_bias = last.bias.detach().float().to(device)

    def __call__(self, latents: Tensor, fresh: bool) -> Tensor:
        if fresh:
            for state in self.states.values():
                state.zero_()
        x = (torch.tanh(latents.movedim(2, -1).float() / 3) * 3).to(self._dtype).contiguous()  # (B,F,h,w,C)
        x = self._convolve(x, self._first)
        for level, (weight, times, is_doubled) in enumerate(self._ends):
            for place, block in enumerate(self._blocks[level]):
                x = self._remember((level, place), x, block)
            is_last = level == len(self._ends) - 1
            x = self._grow(x, weight, times, is_doubled=is_doubled, rectify=is_last)
        b, t, h, w, c = x.shape
        parts = self._head @ x.view(-1, c).t()  # (32,B*T*H*W)
        shape, backend = (b, t, h, w), self._backend
        video = gather_head(parts, self._head_bias, shape, times=1, scale=2.0, shift=-1.0, backend=backend)
        return video[:, self._dropped :] if fresh else video

    def _conv(self, conv: torch.nn.Module) -> Weights:
        assert isinstance(conv, PlainConv) and conv.bias is not None
        weight = conv.weight.detach().to(self._device, self._dtype).contiguous(memory_format=torch.channels_last)
        return weight, conv.bias.detach().to(self._device, self._dtype)

    def _end(self, grow: Grow, conv: PlainConv, *, is_doubled: bool) -> tuple[Tensor, int, bool]:
        """Growth and convolution as one kernel, outputs ordered (phases, frame, channel)."""
        growth = grow.conv.weight.detach().double().flatten(1).unflatten(0, (grow.times, -1))  # (times,C,C)
        weight = torch.einsum("omyx,kmc->kocyx", conv.weight.detach().double(), growth).flatten(0, 1)
        weight = phase_weights(weight) if is_doubled else weight
        weight = weight.to(self._device, self._dtype).contiguous(memory_format=torch.channels_last)
        return weight, grow.times, is_doubled

    def _convolve(self, x: Tensor, weights: Weights, residual: Tensor | None = None) -> Tensor:
        """relu(convolution + bias + residual): x (B,T,H,W,C) -> (B,T,H,W,O)."""
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)
        added = None if residual is None else residual.flatten(0, 1).permute(0, 3, 1, 2)
        y = self._fused(frames, weights, added) if self._is_fused else None
        if y is None:
            y = F.conv2d(frames, *weights, padding=1)
            y = F.relu(y if added is None else y + added)
        return y.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])

    def _fused(self, frames: Tensor, weights: Weights, added: Tensor | None) -> Tensor | None:
        """By cuDNN in one kernel, or None where it has none for these tensors."""
        weight, bias = weights
        ones = [1, 1]
        try:
            if added is None:
                return torch.cudnn_convolution_relu(frames, weight, bias, ones, ones, ones, 1)
            return torch.cudnn_convolution_add_relu(frames, weight, added, 1.0, bias, ones, ones, ones, 1)
        except RuntimeError:
            self._is_fused = False
            return None

    def _remember(self, key: object, x: Tensor, block: list[Weights]) -> Tensor:
        b, t, h, w, c = x.shape
        if key not in self.states:
            self.states[key] = torch.zeros(b, 1, h, w, c, dtype=self._dtype, device=self._device)
        state = self.states[key]
        both = x.new_empty(b, t, h, w, 2 * c)
        both[..., :c].copy_(x)
        both[:, :1, ..., c:].copy_(state)
        if t > 1:
            both[:, 1:, ..., c:].copy_(x[:, :-1])
        state.copy_(x[:, -1:])
        y = self._convolve(self._convolve(both, block[0]), block[1])
        return self._convolve(y, block[2], x)

    def _grow(self, x: Tensor, weight: Tensor, times: int, *, is_doubled: bool, rectify: bool) -> Tensor:
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)
        y = F.conv2d(frames, weight, padding=1).permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:2])
        if is_doubled:
            return spread_phases(y, times, rectify=rectify, backend=self._backend)
        y = y.unflatten(-1, (times, -1)).movedim(-2, 2).flatten(1, 2)  # (B,T*times,H,W,C)
        return (F.relu(y) if rectify else y).contiguous()
