"""The Wan VAE's decoder rearranged: few passes over memory, channels-last throughout, less arithmetic.

Between two convolutions there is one pass (`codecs.passes`). A 3x3x3 causal convolution is done by one of `METHODS`.
A doubling of height and width is folded into the 2x2 convolutions that its 3x3 one amounts to. The last convolution,
to 3 channels, is one matrix product to 81 channels (a row per tap and output) and a sum of neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.codecs.passes import (
    Backend,
    Sink,
    Source,
    between,
    gather_head,
    phase_weights,
    wide_weights,
    winograd_weights,
)
from causalreel.codecs.wan_vae import (
    CausalConv,
    CausalVAE,
    ChannelNorm,
    FrameAttention,
    FrameConv,
    ResidualBlock,
    Upsample,
)

Method = Literal["conv3d", "concat", "stacked", "paired", "winograd", "wide", "alone"]
METHODS: tuple[Method, ...] = get_args(Method)[:-1]
"""conv3d    one conv3d behind a halo of two frames, which the pass before it writes
concat    one conv2d over three frames side by side, which the pass before it writes
stacked   one conv2d to three outputs a frame, summed over time by the pass after it; nothing is written twice
paired    one conv3d to two frames at once, kernel 4 and stride 2 in time: 4/3 of the arithmetic, twice the channels
winograd  four conv2d on combinations of four frames for two outputs: 2/3 of the arithmetic
wide      the same over pairs of neighbouring pixels: 8/9 of the arithmetic, twice the channels, which few of them need

The first frame of a video has only zeros before it: there a convolution is one conv2d by its last tap ("alone").
"""


@dataclass(frozen=True)
class Arithmetic:
    """How 3x3x3 convolutions are done."""

    even: Method = "winograd"
    """For an even number of frames; `stacked` serves any number."""
    odd: Method = "conv3d"
    """For an odd number of frames, where `even` needs pairs: conv3d or concat."""
    widths: Mapping[int, Method] = field(default_factory=dict)
    """Exceptions to `even`, by the convolution's output channels."""

    def __post_init__(self) -> None:
        for name, method in [("even", self.even), *((f"widths[{k}]", v) for k, v in self.widths.items())]:
            if method not in METHODS:
                raise ValueError(f"{name} must be one of {', '.join(METHODS)}; got {method!r}")
        if self.odd not in ("conv3d", "concat"):
            raise ValueError(f"odd must be conv3d or concat, got {self.odd!r}")

    def method(self, frames: int, width: int) -> Method:
        """What a convolution to `width` channels does with this many frames."""
        wanted = self.widths.get(width, self.even)
        return self.odd if frames % 2 and wanted in ("paired", "winograd", "wide") else wanted


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..,H,W,C), weight (O,C,k,k) -> (..,H',W',O), padding k // 2."""
    frames = x.flatten(0, -4).permute(0, 3, 1, 2)
    y = F.conv2d(frames, weight, bias, padding=weight.shape[-1] // 2)
    return y.permute(0, 2, 3, 1).contiguous().unflatten(0, x.shape[:-3])


def conv_pairs(x: Tensor, weight: Tensor) -> Tensor:
    """x (..,H,W+2,C) with a column of zeros on either side, weight of `wide_weights` -> (..,H,W,O)."""
    pairs = x.unflatten(-2, (-1, 2)).flatten(-2)  # (..,H,W/2+1,2*C)
    y = F.conv2d(pairs.flatten(0, -4).permute(0, 3, 1, 2), weight, padding=(1, 0)).permute(0, 2, 3, 1).contiguous()
    return y.unflatten(-1, (2, -1)).flatten(-3, -2).unflatten(0, x.shape[:-3])  # (..,H,W/2,2*O) -> (..,H,W,O)


def conv3d(x: Tensor, weight: Tensor, *, stride: int = 1) -> Tensor:
    """x (B,T,H,W,C), weight (O,C,n,k,k) -> (B,T',H,W,O), no padding in time, `stride` in time."""
    pad = weight.shape[-1] // 2
    y = F.conv3d(x.permute(0, 4, 1, 2, 3), weight, stride=(stride, 1, 1), padding=(0, pad, pad))
    return y.permute(0, 2, 3, 4, 1).contiguous()


class Convolution:
    """A causal 3x3x3 convolution with the norm and SiLU before it; its bias is left to the pass after it."""

    def __init__(self, conv: CausalConv, norm: ChannelNorm | None, arithmetic: Arithmetic, dtype: torch.dtype) -> None:
        self.weight = conv.weight.detach()  # (O,C,3,3,3), the codec's own
        self.width = self.weight.shape[0]
        self.gamma = None if norm is None else norm.gamma.detach().float().flatten().contiguous()
        assert conv.bias is not None
        self.bias = conv.bias.detach().float()
        self.arithmetic, self.dtype, self.device = arithmetic, dtype, conv.weight.device
        self._prepared: dict[Method, list[Tensor]] = {}

    def to(self, device: torch.device) -> Convolution:
        self.device, self.bias = device, self.bias.to(device)
        self.gamma = None if self.gamma is None else self.gamma.to(device)
        return self

    def sink(self, method: Method) -> Literal["frames", "halo", "taps", "winograd", "alone", "wide"]:
        """What it wants to read."""
        if method == "winograd" or method == "alone" or method == "wide":
            return method
        return "taps" if method == "concat" else "frames" if method == "stacked" else "halo"

    def __call__(self, x: Tensor, method: Method, pending: Tensor | None) -> Source:
        """x as its sink stores it."""
        weights = self._weights(method)
        if method == "winograd" or method == "wide":
            convolve = conv2d if method == "winograd" else conv_pairs
            first, *more = (convolve(part, weight) for part, weight in zip(x, weights, strict=True))
            return Source("winograd", first, self.bias, more=tuple(more))
        if method == "paired":
            return Source("pairs", conv3d(x, weights[0], stride=2), self.bias)
        if method == "conv3d":
            return Source("frames", conv3d(x, weights[0]), self.bias)
        if method == "stacked":
            return Source("stacked", conv2d(x, weights[0]), self.bias, pending)
        return Source("frames", conv2d(x, weights[0]), self.bias)

    def _weights(self, method: Method) -> list[Tensor]:
        if method not in self._prepared:
            kernels = self._kernels(method, self.weight.to(self.device).float())
            self._prepared[method] = [dense(kernel.to(self.dtype)) for kernel in kernels]
        return self._prepared[method]

    def _kernels(self, method: Method, weight: Tensor) -> list[Tensor]:
        if method == "winograd":
            return list(winograd_weights(weight))
        if method == "wide":
            return [wide_weights(kernel) for kernel in winograd_weights(weight)]
        if method == "paired":
            early, late = F.pad(weight, (0, 0, 0, 0, 0, 1)), F.pad(weight, (0, 0, 0, 0, 1, 0))
            return [torch.cat([early, late])]  # (2*O,C,4,3,3)
        if method == "conv3d":
            return [weight]
        if method == "alone":
            return [weight[:, :, 2]]  # (O,C,3,3)
        if method == "stacked":  # the oldest tap belongs to the output two frames later
            return [weight.movedim(2, 0).flatten(0, 1)]  # (3*O,C,3,3)
        return [weight.transpose(1, 2).flatten(1, 2)]  # (O,3*C,3,3)


def dense(weight: Tensor) -> Tensor:
    """A convolution's kernel, channels last in memory."""
    return weight.contiguous(memory_format=torch.channels_last_3d if weight.ndim == 5 else torch.channels_last)


@dataclass
class Flow:
    """Where a call is: what the last convolution left, and what is to be added to it."""

    source: Source
    residual: Tensor | None
    fresh: bool


class WanProgram:
    """The decoder of a CausalVAE: latents (B,F,C,h,w) -> frames (B,T,3,H,W) in [-1, 1], float32."""

    def __init__(
        self, codec: CausalVAE, dtype: torch.dtype, device: torch.device, backend: Backend, arithmetic: Arithmetic
    ) -> None:
        self.states: dict[object, Tensor] = {}
        self._dtype, self._device, self._arithmetic = dtype, device, arithmetic
        self._backend: Backend = backend
        self._mean, self._std = codec.latent_mean.float().to(device), codec.latent_std.float().to(device)
        self._enter = self._linear(codec.conv2.weight, codec.conv2.bias)
        decoder = codec.decoder
        self._first = Convolution(decoder.conv1, None, Arithmetic(even="concat", odd="concat"), dtype).to(device)
        self._layers = [self._prepared(layer) for layer in [*decoder.middle, *decoder.upsamples]]
        norm, last = decoder.head["0"], decoder.head["2"]
        assert isinstance(norm, ChannelNorm) and isinstance(last, CausalConv) and last.bias is not None
        self._head_gamma = norm.gamma.detach().float().flatten().to(device)
        rows = last.weight.detach().permute(2, 3, 4, 0, 1).flatten(0, 3)  # (81,C)
        self._head = F.pad(rows, (0, 0, 0, -len(rows) % 8)).to(device, dtype)
        self._head_bias = last.bias.detach().float().to(device)

    def __call__(self, latents: Tensor, fresh: bool) -> Tensor:
        z = latents.movedim(2, -1).float() * self._std + self._mean  # (B,F,h,w,C)
        flow = Flow(Source("frames", F.linear(z.to(self._dtype), *self._enter).contiguous()), None, fresh)
        self._convolve(flow, self._first)
        for layer in self._layers:
            layer(flow)
        sink = Sink("frames", self._head_gamma)
        _, x = between(flow.source, sink, residual=flow.residual, fresh=fresh, backend=self._backend)
        assert x is not None
        b, t, h, w, c = x.shape
        parts = self._head @ x.view(-1, c).t()  # (88,B*T*H*W)
        pending = self._state("head", (b, 2, self._head_bias.numel(), h, w), torch.float32)
        return gather_head(
            parts, self._head_bias, (b, t, h, w), times=3, pending=pending, fresh=fresh, backend=self._backend
        )

    def _state(self, key: object, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        if key not in self.states:
            self.states[key] = torch.zeros(shape, dtype=dtype or self._dtype, device=self._device)
        return self.states[key]

    def _linear(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """A 1x1 convolution for F.linear."""
        assert bias is not None
        return tuple(t.detach().to(self._device, self._dtype) for t in (weight.flatten(1), bias))  # pyright: ignore

    def _convolve(self, flow: Flow, conv: Convolution, *, keep: bool = False) -> Tensor | None:
        """Norm, SiLU and convolution; -> what came in, if `keep`."""
        b, t, h, w, c = flow.source.shape
        method = conv.arithmetic.method(t, conv.width)
        if flow.fresh and t == 1 and method != "stacked":  # which makes its parts of the next two frames at once
            method = "alone"
        if method == "wide" and w % 2:
            method = "winograd"
        kind = conv.sink(method)
        state = None if kind == "frames" else self._state(conv, (b, 2, h, w, c))
        sink = Sink(kind, conv.gamma, state)
        kept, x = between(flow.source, sink, residual=flow.residual, keep=keep, fresh=flow.fresh, backend=self._backend)
        assert x is not None
        pending = self._state(conv, (b, 2, h, w, conv.width)) if method == "stacked" else None
        flow.source, flow.residual = conv(x, method, pending), None
        return kept

    def _frames(self, flow: Flow) -> Tensor:
        """What is so far, as frames (B,T,H,W,C)."""
        kept, _ = between(flow.source, None, residual=flow.residual, keep=True, fresh=flow.fresh, backend=self._backend)
        assert kept is not None
        return kept

    def _prepared(self, layer: torch.nn.Module) -> Step:
        if isinstance(layer, ResidualBlock):
            return _Residual(self, layer)
        if isinstance(layer, FrameAttention):
            return _Attention(self, layer)
        assert isinstance(layer, Upsample)
        return _Doubling(self, layer)


class _Residual:
    """A residual block, its sum left to the pass that follows."""

    def __init__(self, program: WanProgram, block: ResidualBlock) -> None:
        self._program = program
        self._convs: list[Convolution] = []
        for norm, conv in (("0", "2"), ("3", "6")):
            modules = block.residual[norm], block.residual[conv]
            assert isinstance(modules[0], ChannelNorm) and isinstance(modules[1], CausalConv)
            made = Convolution(modules[1], modules[0], program._arithmetic, program._dtype)
            self._convs.append(made.to(program._device))
        shortcut = block.shortcut
        self._shortcut = None if shortcut is None else program._linear(shortcut.weight, shortcut.bias)

    def __call__(self, flow: Flow) -> None:
        x = self._program._convolve(flow, self._convs[0], keep=True)
        assert x is not None
        self._program._convolve(flow, self._convs[1])
        flow.residual = x if self._shortcut is None else F.linear(x, *self._shortcut)


class _Attention:
    """Attention among the positions of a frame, as two matrix products: its one head is wider than fused kernels do."""

    def __init__(self, program: WanProgram, layer: FrameAttention) -> None:
        self._program = program
        self._gamma = layer.norm.gamma.detach().flatten().to(program._device, program._dtype)
        self._qkv = program._linear(layer.to_qkv.weight, layer.to_qkv.bias)
        self._proj = program._linear(layer.proj.weight, layer.proj.bias)

    def __call__(self, flow: Flow) -> None:
        x = self._program._frames(flow)
        b, t, h, w, c = x.shape
        tokens = F.rms_norm(x.view(b * t, h * w, c), (c,), self._gamma, eps=1e-12)
        q, k, v = F.linear(tokens, *self._qkv).chunk(3, -1)  # (B*T,H*W,C) each
        weights = torch.softmax((q * c**-0.5) @ k.transpose(1, 2), -1)  # float32 inside, stored as q is
        y = F.linear(weights @ v, *self._proj).view(x.shape)
        flow.source, flow.residual = Source("frames", y), x


class _Doubling:
    """Doubling of height and width, and of time from the second latent frame on."""

    def __init__(self, program: WanProgram, layer: Upsample) -> None:
        self._program = program
        conv, time = layer.resample["1"], layer.time_conv
        assert isinstance(conv, FrameConv) and conv.bias is not None
        self._weight = dense(phase_weights(conv.weight.detach().float()).to(program._device, program._dtype))
        self._bias = conv.bias.detach().float().to(program._device)
        self._halves: list[tuple[Tensor, Tensor]] | None = None
        if time is not None:
            assert time.bias is not None
            taps, bias = time.taps().flatten(1), time.bias  # (2*C,3*C): first half makes the earlier frame
            self._halves = [program._linear(*pair) for pair in zip(taps.chunk(2), bias.chunk(2), strict=True)]

    def __call__(self, flow: Flow) -> None:
        if self._halves is None:
            x = self._program._frames(flow)
        else:
            x = self._double_time(flow, self._halves)
        flow.source, flow.residual = Source("phases", conv2d(x, self._weight), self._bias), None

    def _double_time(self, flow: Flow, halves: list[tuple[Tensor, Tensor]]) -> Tensor:
        b, _, h, w, c = flow.source.shape
        state = self._program._state(self, (b, 2, h, w, c))
        if flow.fresh:  # the first latent frame passes, and is not what the next one looks back at
            state.zero_()
            return self._program._frames(flow)
        sink = Sink("taps", None, state)
        _, taps = between(flow.source, sink, residual=flow.residual, backend=self._program._backend)
        assert taps is not None
        return torch.stack([F.linear(taps, *half) for half in halves], 2).flatten(1, 2)  # (B,2*T,H,W,C)


Step = _Residual | _Attention | _Doubling
