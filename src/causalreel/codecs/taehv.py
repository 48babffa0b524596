"""TAEHV, the tiny autoencoder for the Wan latent space: fast decoding with memory of one frame per block.

Latents are the normalised ones of the Wan VAE, pixels are in [-1, 1]. The network gives `temporal` frames for
every latent frame; the first `temporal - 1` frames of a video are dropped, so that F latents give
1 + temporal * (F - 1) frames, as with the Wan VAE. Activations are channels-last, (B,T,H,W,C). Parameter names
are those of the released taew2_1 files; reading files is not done here. A memory block sees the frame before it and
nothing else, so keeping one frame per block makes a stream equal to the whole decode. The official demo instead decodes
three old latents again with every call, which is dearer and, from the third call on, inexact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalreel.codecs.codec import Codec, History
from causalreel.codecs.wan_vae import FrameConv
from causalreel.types import Geometry


@dataclass(frozen=True)
class TAEHVConfig:
    """Sizes of the network, and how much of its growth in time and space is used."""

    channels: int = 16
    """Latent channels."""
    encoder_width: int = 64
    """Channels in the encoder."""
    decoder_widths: tuple[int, ...] = (256, 128, 64, 64)
    """Channels of the decoder's resolutions, and of its last layer."""
    growth: tuple[int, ...] = (1, 2, 2)
    """Frames that the decoder makes of one, at each resolution."""
    upsample: tuple[bool, ...] = (True, True, True)
    """Which resolutions of the decoder end in a doubling of height and width; False gives a smaller preview."""
    pooling: tuple[int, ...] = (2, 2, 1)
    """Frames that the encoder makes one of, before each of its spatial halvings."""
    blocks: int = 3
    """Memory blocks per resolution."""

    def __post_init__(self) -> None:
        levels = len(self.decoder_widths) - 1
        if len(self.growth) != levels or len(self.upsample) != levels:
            raise ValueError(
                f"growth and upsample need {levels} entries each for {levels + 1} decoder_widths; "
                f"got {self.growth} and {self.upsample}"
            )
        if min(self.growth) < 1 or min(self.pooling) < 1:
            raise ValueError(f"growth and pooling must be at least 1, got {self.growth} and {self.pooling}")

    @property
    def geometry(self) -> Geometry:
        """What its latents stand for when they are decoded; a preview's are fewer or smaller frames."""
        return Geometry(self.channels, 2 ** sum(self.upsample), math.prod(self.growth))


class Squash(nn.Module):
    """3 tanh(x/3): latents far out are brought in."""

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        return torch.tanh(x / 3) * 3


class Rectify(nn.Module):
    """ReLU."""

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        return F.relu(x)


class PlainConv(FrameConv):
    """A 3x3 convolution of each frame."""

    def __init__(self, inputs: int, outputs: int, *, stride: int = 1, bias: bool = True) -> None:
        super().__init__(inputs, outputs, 3, stride=stride, padding=1, bias=bias)

    def forward(self, input: Tensor, history: History | None = None) -> Tensor:
        return super().forward(input)


class MemoryBlock(nn.Module):
    """relu(x + three convolutions of x beside the frame before it): (B,T,H,W,C) -> the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.ModuleDict(
            {"0": PlainConv(2 * width, width), "2": PlainConv(width, width), "4": PlainConv(width, width)}
        )

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        before = None if history is None else history.get(self)
        before = torch.zeros_like(x[:, :1]) if before is None else before
        past = torch.cat([before, x[:, :-1]], 1)  # (B,T,H,W,C)
        if history is not None:
            history[self] = x[:, -1:].clone()
        y = F.relu(self.conv["0"](torch.cat([x, past], -1)))
        return F.relu(self.conv["4"](F.relu(self.conv["2"](y))) + x)


class Enlarge(nn.Module):
    """Nearest-neighbour doubling of height and width, or nothing."""

    def __init__(self, *, is_used: bool) -> None:
        super().__init__()
        self.is_used = is_used

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        if not self.is_used:
            return x
        b, t, h, w, c = x.shape
        return x[:, :, :, None, :, None].expand(b, t, h, 2, w, 2, c).reshape(b, t, 2 * h, 2 * w, c)


class Grow(nn.Module):
    """One frame becomes `times`: (B,T,H,W,C) -> (B,times*T,H,W,C)."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(width, times * width, 1, bias=False)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        y = F.linear(x, self.conv.weight.flatten(1))  # (B,T,H,W,times*C)
        return y.unflatten(-1, (self.times, -1)).movedim(-2, 2).flatten(1, 2)  # (B,T*times,H,W,C)


class Pool(nn.Module):
    """`times` frames become one: (B,times*T,H,W,C) -> (B,T,H,W,C), earlier frames first in the weight."""

    def __init__(self, width: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(times * width, width, 1, bias=False)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        groups = x.unflatten(1, (-1, self.times)).movedim(2, -2).flatten(-2)  # (B,T,H,W,times*C)
        return F.linear(groups, self.conv.weight.flatten(1))


def encoder(config: TAEHVConfig) -> nn.ModuleList:
    """Pixels in [0, 1] (B,T,H,W,3) -> latents (B,F,h,w,C)."""
    width = config.encoder_width
    layers: list[nn.Module] = [PlainConv(3, width), Rectify()]
    for times in config.pooling:
        layers += [Pool(width, times), PlainConv(width, width, stride=2, bias=False)]
        layers += [MemoryBlock(width) for _ in range(config.blocks)]
    return nn.ModuleList([*layers, PlainConv(width, config.channels)])


def decoder(config: TAEHVConfig) -> nn.ModuleList:
    """Latents (B,F,h,w,C) -> pixels in [0, 1] (B,T,H,W,3), all frames."""
    widths = config.decoder_widths
    layers: list[nn.Module] = [Squash(), PlainConv(config.channels, widths[0]), Rectify()]
    for level, times in enumerate(config.growth):
        layers += [MemoryBlock(widths[level]) for _ in range(config.blocks)]
        layers += [Enlarge(is_used=config.upsample[level]), Grow(widths[level], times)]
        layers += [PlainConv(widths[level], widths[level + 1], bias=False)]
    return nn.ModuleList([*layers, Rectify(), PlainConv(widths[-1], 3)])


class TAEHV(Codec):
    """Video (B,T,3,H,W) in [-1, 1] <-> normalised Wan latents (B,F,C,h,w); implements `types.VideoCodec`.

    Networks with less growth than `pooling`, or without all doublings, decode to previews: fewer or smaller frames.
    """

    config: TAEHVConfig

    def __init__(self, config: TAEHVConfig = TAEHVConfig()) -> None:
        super().__init__(config, config.geometry)
        self.encoder = encoder(config)
        self.decoder = decoder(config)

    @property
    def dropped(self) -> int:
        """Frames at the beginning of what the decoder gives that are not part of the video."""
        return self.geometry.temporal - 1

    def all_pixels(self, latents: Tensor, history: History | None = None) -> Tensor:
        """Latents (B,F,C,h,w) -> all frames (B,F*temporal,3,H,W), nominally in [0, 1], none dropped."""
        x = latents.to(self._dtype).movedim(2, -1).contiguous()  # (B,F,h,w,C)
        for layer in self.decoder:
            x = layer(x, history)
        return x.movedim(-1, 2).float()

    def all_latents(self, video: Tensor) -> Tensor:
        """Pixels in [0, 1] (B,T,3,H,W), as many frames as a multiple of the pooling -> latents (B,F,C,h,w)."""
        x = video.to(self._dtype).movedim(2, -1).contiguous()  # (B,T,H,W,3)
        for layer in self.encoder:
            x = layer(x)
        return x.movedim(-1, 2).float()

    def encode(self, video: Tensor) -> Tensor:
        """Video (B,T,3,H,W) in [-1, 1], T = 1 + 4 (F-1) -> latents (B,F,C,h,w), float32.

        The first frame is repeated in front, which puts every latent over the frames that decoding it gives. The
        released code leaves the number of frames, and so this choice, to its caller.
        """
        times, size = math.prod(self.config.pooling), 2 ** len(self.config.pooling)
        self.check_video(video, Geometry(self.config.channels, size, times))  # a preview's encoder is the whole one
        whole = torch.cat([video[:, :1].expand(-1, times - 1, -1, -1, -1), video], 1)
        return self.all_latents((whole + 1) / 2)

    def frames(self, latents: Tensor, history: History | None) -> Tensor:
        dropped = 0 if history else self.dropped  # of the beginning alone
        return shown(self.all_pixels(latents, history)[:, dropped:])

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype


def shown(pixels: Tensor) -> Tensor:
    """Pixels of any shape, nominally in [0, 1] -> [-1, 1], clamped."""
    return (pixels * 2 - 1).clamp(-1, 1)
