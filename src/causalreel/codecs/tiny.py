"""The tiny codec: the causal VAE at its smallest size, started where training succeeds in a minute or two.

From default weights the best first answer to small objects on a plain background is the background alone, and training
stays there for long. Here the untrained codec already transports the picture, averaged over 8x8 pixels and 4 frames:
wide layers hold copies of a few channels with alternating sign, so that SiLU(x) - SiLU(-x) = x carries them through
the heads, and residual branches and everything beside that path start weak.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from causalreel.codecs.wan_vae import (
    CausalConv,
    CausalVAE,
    Decoder,
    Downsample,
    Encoder,
    ResidualBlock,
    Upsample,
    vae_config,
)

WEAK = 0.1
"""Scale of residual branches and of weights beside the transport."""
BIAS = 0.1
"""Spread of biases. Without them a mid-grey picture is 0 in every layer, where norms have no finite gradient."""
LOG_VARIANCE = -5.0
"""Log-variance of the latents at the start."""
CENTRE = (..., slice(2, 3), slice(1, 2), slice(1, 2))
"""Of a 3x3x3 kernel, the tap at the output's own place and time."""


def tiny_codec(seed: int = 0) -> CausalVAE:
    """An untrained tiny codec (2.6 M parameters, 8x in space, 4x in time, 16 channels), ready for training."""
    codec = CausalVAE(vae_config("tiny"))
    start(codec, torch.Generator().manual_seed(seed))
    return codec


@torch.no_grad()
def start(codec: CausalVAE, generator: torch.Generator) -> None:
    """Set all weights of `codec` (on the CPU) to values from which training is short."""
    for module in codec.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            _randomise(module, generator)
    _start_path(codec.encoder, codec.encoder.downsamples, base=codec.config.dim)
    _start_path(codec.decoder, codec.decoder.upsamples, base=codec.config.dim // 2)
    _carry(codec.conv1.weight, codec.config.dim)
    codec.conv1.weight[codec.config.z :].mul_(WEAK)
    codec.get_parameter("conv1.bias")[codec.config.z :] = LOG_VARIANCE
    _carry(codec.conv2.weight, codec.config.z)


def _randomise(conv: nn.Conv2d | nn.Conv3d, generator: torch.Generator) -> None:
    """Variance-preserving Gaussian on the last time tap, little on earlier ones."""
    is_causal = isinstance(conv, CausalConv)
    fan_in = conv.weight[0, :, -1].numel() if is_causal else conv.weight[0].numel()
    nn.init.normal_(conv.weight, std=fan_in**-0.5, generator=generator)
    if is_causal:
        conv.weight[:, :, :-1].mul_(WEAK)
    nn.init.normal_(conv.get_parameter("bias"), std=BIAS, generator=generator)


def _start_path(part: Encoder | Decoder, layers: nn.ModuleList, *, base: int) -> None:
    """The transport of `base` channels through an encoder or decoder."""
    features = part.conv1.weight[part.conv1.in_channels :].clone()
    _carry(part.conv1.weight, base, CENTRE)
    if isinstance(part, Encoder):
        part.conv1.weight[part.conv1.in_channels :] = features  # beside the colours, edges of all kinds
    _carry(part.get_parameter("head.2.weight"), base, CENTRE)
    for name in ("middle.1.proj.weight", "middle.1.proj.bias"):
        part.get_parameter(name).mul_(WEAK)
    for layer in [*layers, *part.middle]:
        if isinstance(layer, ResidualBlock):
            layer.get_parameter("residual.6.weight").mul_(WEAK)
            layer.get_parameter("residual.6.bias").mul_(WEAK)
            if layer.shortcut is not None:
                _carry(layer.shortcut.weight, base)
        elif isinstance(layer, Downsample):  # the mean of 2x2 pixels, and of the last two of three frames
            _carry(layer.get_parameter("resample.1.weight"), base, (..., slice(0, 2), slice(0, 2)))
            if layer.time_conv is not None:
                _carry(layer.time_conv.weight, base, (..., slice(1, 3), slice(None), slice(None)))
        elif isinstance(layer, Upsample):  # copies of the pixel, and of the frame
            _carry(layer.get_parameter("resample.1.weight"), base, (..., slice(1, 2), slice(1, 2)))
            if layer.time_conv is not None:
                for copy in layer.time_conv.weight.chunk(2):
                    _carry(copy, base, (..., slice(2, 3), slice(None), slice(None)))


def _carry(weight: Tensor, base: int, taps: Any = ...) -> None:
    """Weaken a kernel (outputs, inputs, ...) and add the transport, shared equally by `taps` of it.

    Channel c holds signal c % base, with a minus sign if c // base is odd.
    """
    weight.mul_(WEAK)
    outputs, inputs = weight.shape[:2]
    o, i = torch.arange(outputs)[:, None], torch.arange(inputs)[None]
    sign = 1 - 2.0 * ((o // base + i // base) % 2)
    path = (o % base == i % base) * sign * min(base / inputs, 1.0)  # (outputs, inputs)
    chosen = weight[taps]
    chosen += path.view(outputs, inputs, *[1] * (weight.ndim - 2)) / chosen[0, 0].numel()
