"""The causal video VAE: Wan 2.1's structure and parameter names at any size, for whole clips and for streams.

Activations are channels-last, (B,T,H,W,C), and every 3x3x3 convolution is one 2D convolution over three time-shifted
copies of its input, which is the same function as a causal conv3d and faster at these sizes. A layer that looks back in
time gets a `History`: None means "this is the whole clip" (zeros before it), a dict keeps the layer's last inputs
between calls, so a stream and a whole clip give the same frames. Training losses and file formats live elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalreel.codecs.codec import Codec, History
from causalreel.types import Geometry

WAN21_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
WAN21_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of the VAE and the scale of its latents."""

    dim: int = 96
    """Channels at full resolution."""
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    """Channels of each resolution, as multiples of `dim`; each but the last is followed by a spatial halving."""
    res_blocks: int = 2
    """Residual blocks per resolution in the encoder; the decoder has one more."""
    z: int = 16
    """Latent channels."""
    temporal_down: tuple[bool, ...] = (False, True, True)
    """Which spatial halvings of the encoder halve time as well."""
    latent_mean: tuple[float, ...] | None = None
    """Mean of each latent channel before normalisation; None is 0."""
    latent_std: tuple[float, ...] | None = None
    """Standard deviation of each latent channel before normalisation; None is 1."""

    def __post_init__(self) -> None:
        if len(self.temporal_down) != len(self.multipliers) - 1:
            raise ValueError(
                f"temporal_down has {len(self.temporal_down)} entries, "
                f"but {len(self.multipliers)} multipliers need {len(self.multipliers) - 1}"
            )
        for name in ("latent_mean", "latent_std"):
            values = getattr(self, name)
            if values is not None and len(values) != self.z:
                raise ValueError(f"{name} has {len(values)} entries, expected one for each of z={self.z} channels")
        if self.latent_std is not None and min(self.latent_std) <= 0:
            raise ValueError(f"latent_std must be positive, got {min(self.latent_std)}")

    @property
    def geometry(self) -> Geometry:
        """What its latents stand for."""
        return Geometry(self.z, 2 ** len(self.temporal_down), 2 ** sum(self.temporal_down))


PRESETS: dict[str, VAEConfig] = {
    "wan2.1": VAEConfig(latent_mean=WAN21_MEAN, latent_std=WAN21_STD),
    "tiny": VAEConfig(dim=16, res_blocks=1),
}
"""Known sizes. "tiny" becomes usable by training; its latent statistics are measured afterwards."""


def vae_config(preset: str) -> VAEConfig:
    """The configuration called `preset`, a key of `PRESETS`."""
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}, expected one of {', '.join(sorted(PRESETS))}")
    return PRESETS[preset]


def conv_frames(x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int = 1, padding: int = 0) -> Tensor:
    """2D convolution of each frame: x (B,T,H,W,C), weight (O,C,k,k) -> (B,T,h,w,O)."""
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)  # (B*T,C,H,W), channels last in memory
    y = F.conv2d(frames, weight.contiguous(memory_format=torch.channels_last), bias, stride=stride, padding=padding)
    return y.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])  # (B,T,h,w,O)


def with_past(x: Tensor, layer: nn.Module, history: History | None) -> Tensor:
    """Put the two frames that `layer` saw before x (B,T,H,W,C), or zeros, in front: (B,2+T,H,W,C)."""
    past = None if history is None else history.get(layer)
    padded = F.pad(x, (0, 0, 0, 0, 0, 0, 2, 0)) if past is None else torch.cat([past, x], 1)
    if history is not None:
        history[layer] = padded[:, -2:].clone()
    return padded


def three_taps(padded: Tensor) -> Tensor:
    """Each frame beside the two before it: (B,2+T,H,W,C) -> (B,T,H,W,3*C), oldest first."""
    return torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], -1)


class CausalConv(nn.Conv3d):
    """Convolution over (time, height, width) that sees no later frame; kernel (3,3,3) or (3,1,1)."""

    def __init__(self, inputs: int, outputs: int, *, spatial: int = 3) -> None:
        super().__init__(inputs, outputs, (3, spatial, spatial))

    def taps(self) -> Tensor:
        """The kernel as one over 3*C channels: (O,3*C,k,k)."""
        return self.weight.transpose(1, 2).flatten(1, 2)

    def forward(self, input: Tensor, history: History | None = None) -> Tensor:
        """input (B,T,H,W,C) -> (B,T,H,W,O)."""
        frames = three_taps(with_past(input, self, history))
        return conv_frames(frames, self.taps(), self.bias, padding=self.kernel_size[1] // 2)


class FrameConv(nn.Conv2d):
    """2D convolution of each frame: (B,T,H,W,C) -> (B,T,h,w,O)."""

    def forward(self, input: Tensor) -> Tensor:
        return conv_frames(input, self.weight, self.bias, stride=self.stride[0], padding=int(self.padding[0]))


class Pointwise(nn.Conv3d):
    """1x1x1 convolution: (B,T,H,W,C) -> (B,T,H,W,O)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.flatten(1), self.bias)


class ChannelNorm(nn.Module):
    """RMS normalisation over channels with a learned gain, in the dtype of its input."""

    def __init__(self, channels: int, *, trailing: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * trailing))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, (x.shape[-1],), self.gamma.flatten().to(x.dtype), eps=1e-12)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a 1x1x1 shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layers = {"0": ChannelNorm(inputs), "2": CausalConv(inputs, outputs)}
        layers |= {"3": ChannelNorm(outputs), "6": CausalConv(outputs, outputs)}
        self.residual = nn.ModuleDict(layers)
        self.shortcut = Pointwise(inputs, outputs) if inputs != outputs else None

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        y = self.residual["2"](F.silu(self.residual["0"](x)), history)
        y = self.residual["6"](F.silu(self.residual["3"](y)), history)
        return y + (x if self.shortcut is None else self.shortcut(x))


class FrameAttention(nn.Module):
    """Single-head attention among the positions of one frame, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, trailing=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        tokens = self.norm(x).flatten(0, 1).flatten(1, 2)  # (B*T,H*W,C)
        qkv = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, -1))  # (B*T,1,H*W,C) each
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        return x + F.linear(y, self.proj.weight.flatten(1), self.proj.bias).view(x.shape)


class Downsample(nn.Module):
    """Halve height and width, and time too if `temporal`: T = 1+2n frames become 1+n."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": FrameConv(channels, channels, 3, stride=2)})
        self.time_conv = CausalConv(channels, channels, spatial=1) if temporal else None

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        y = self.resample["1"](F.pad(x, (0, 0, 0, 1, 0, 1)))
        return y if self.time_conv is None else self._halve_time(y, self.time_conv, history)

    def _halve_time(self, x: Tensor, conv: CausalConv, history: History | None) -> Tensor:
        """The clip's first frame is kept as it is; each later pair is convolved with the frame before it."""
        last = None if history is None else history.get(self)
        if history is not None:
            history[self] = x[:, -1:].clone()
        frames = x if last is None else torch.cat([last, x], 1)  # (B,1+2n,H,W,C)
        taps = torch.cat([frames[:, :-2:2], frames[:, 1:-1:2], frames[:, 2::2]], -1)  # (B,n,H,W,3*C)
        y = F.linear(taps, conv.taps().flatten(1), conv.bias)
        return torch.cat([x[:, :1].to(y.dtype), y], 1) if last is None else y


class Upsample(nn.Module):
    """Double height and width and halve the channels; if `temporal`, every frame but the clip's first becomes two."""

    def __init__(self, channels: int, *, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": FrameConv(channels, channels // 2, 3, padding=1)})
        self.time_conv = CausalConv(channels, 2 * channels, spatial=1) if temporal else None

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        if self.time_conv is not None:
            x = self._double_time(x, self.time_conv, history)
        b, t, h, w, c = x.shape
        x = x[:, :, :, None, :, None].expand(b, t, h, 2, w, 2, c).reshape(b, t, 2 * h, 2 * w, c)
        return self.resample["1"](x)

    def _double_time(self, x: Tensor, conv: CausalConv, history: History | None) -> Tensor:
        """The clip's first frame passes unchanged and is not part of what the convolution sees before the second."""
        is_first = history is None or self not in history
        if history is not None:
            history[self] = x.new_empty(0)  # the stream has begun
        head, rest = (x[:, :1], x[:, 1:]) if is_first else (x[:, :0], x)
        if rest.shape[1] == 0:
            return head
        taps = three_taps(with_past(rest, conv, history))
        y = F.linear(taps, conv.taps().flatten(1), conv.bias)  # (B,n,H,W,2*C)
        y = y.unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2)  # (B,2n,H,W,C)
        return torch.cat([head.to(y.dtype), y], 1)


def middle(channels: int) -> nn.ModuleList:
    """The blocks at the lowest resolution."""
    return nn.ModuleList(
        [ResidualBlock(channels, channels), FrameAttention(channels), ResidualBlock(channels, channels)]
    )


def head(inputs: int, outputs: int) -> nn.ModuleDict:
    """Norm and last convolution, with SiLU between."""
    return nn.ModuleDict({"0": ChannelNorm(inputs), "2": CausalConv(inputs, outputs)})


class Encoder(nn.Module):
    """Pixels (B,T,H,W,3) -> mean and log-variance before `conv1`, (B,F,h,w,2*z)."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in config.multipliers]
        self.conv1 = CausalConv(3, widths[0])
        layers: list[nn.Module] = []
        for level, (inputs, outputs) in enumerate(zip(widths[:1] + widths[:-1], widths, strict=True)):
            layers += [ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(config.res_blocks)]
            if level < len(config.temporal_down):
                layers.append(Downsample(outputs, temporal=config.temporal_down[level]))
        self.downsamples = nn.ModuleList(layers)
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * config.z)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        x = self.conv1(x, history)
        for layer in [*self.downsamples, *self.middle]:
            x = layer(x, history)
        return self.head["2"](F.silu(self.head["0"](x)), history)


class Decoder(nn.Module):
    """Latents after `conv2` (B,F,h,w,z) -> pixels (B,T,H,W,3), not clamped."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = [config.dim * m for m in reversed(config.multipliers)]
        self.conv1 = CausalConv(config.z, widths[0])
        self.middle = middle(widths[0])
        temporal_up = config.temporal_down[::-1]
        layers: list[nn.Module] = []
        inputs = widths[0]
        for level, outputs in enumerate(widths):
            layers += [ResidualBlock(inputs if i == 0 else outputs, outputs) for i in range(config.res_blocks + 1)]
            inputs = outputs // 2
            if level < len(temporal_up):
                layers.append(Upsample(outputs, temporal=temporal_up[level]))
        self.upsamples = nn.ModuleList(layers)
        self.head = head(widths[-1], 3)

    def forward(self, x: Tensor, history: History | None = None) -> Tensor:
        x = self.conv1(x, history)
        for layer in [*self.middle, *self.upsamples]:
            x = layer(x, history)
        return self.head["2"](F.silu(self.head["0"](x)), history)


class CausalVAE(Codec):
    """Video (B,T,3,H,W) in [-1, 1] <-> normalised latents (B,F,C,h,w), T = 1 + temporal * (F-1)."""

    config: VAEConfig
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__(config, config.geometry)
        self.encoder = Encoder(config)
        self.conv1 = Pointwise(2 * config.z, 2 * config.z)
        self.conv2 = Pointwise(config.z, config.z)
        self.decoder = Decoder(config)
        self.register_buffer("latent_mean", torch.zeros(config.z), persistent=False)
        self.register_buffer("latent_std", torch.ones(config.z), persistent=False)
        self.set_statistics(config.latent_mean, config.latent_std)

    def set_statistics(self, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        """Use these channel statistics from now on: one number per latent channel; None is 0 (mean) or 1 (std)."""
        self.config = replace(
            self.config,
            latent_mean=None if mean is None else tuple(map(float, mean)),
            latent_std=None if std is None else tuple(map(float, std)),
        )
        self.latent_mean.copy_(torch.tensor(self.config.latent_mean or [0.0] * self.config.z))
        self.latent_std.copy_(torch.tensor(self.config.latent_std or [1.0] * self.config.z))

    def posterior(self, video: Tensor, history: History | None = None) -> tuple[Tensor, Tensor]:
        """Video (B,T,3,H,W) -> mean and log-variance (B,F,h,w,z) of the latents, channels last, not normalised."""
        x = video.to(self.conv1.weight.dtype).movedim(2, -1).contiguous()  # (B,T,H,W,3)
        mean, log_variance = self.conv1(self.encoder(x, history)).float().chunk(2, -1)
        return mean, log_variance

    def pixels(self, z: Tensor, history: History | None = None) -> Tensor:
        """Latents (B,F,h,w,z), channels last and not normalised -> video (B,T,3,H,W), not clamped."""
        x = self.conv2(z.to(self.conv2.weight.dtype))
        return self.decoder(x, history).movedim(-1, 2).float()

    def forward(
        self, video: Tensor, noise: Tensor | None = None, error: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Reconstruct a whole clip: video (B,T,3,H,W) -> its reconstruction, not clamped, and the latents' mean and
        log-variance (B,F,h,w,z). With `noise` (B,F,h,w,z) the latents are a sample, without it their mean. `error`
        (B,F,h,w,z) is added to them in units of normalised latents."""
        self.check_video(video)
        mean, log_variance = self.posterior(video)
        z = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        if error is not None:
            z = z + error * self.latent_std.float()
        return self.pixels(z), mean, log_variance

    def encode(self, video: Tensor) -> Tensor:
        """Video (B,T,3,H,W) in [-1, 1] -> latents (B,F,C,h,w), the normalised posterior mean, float32."""
        self.check_video(video)
        return self._normalised(self.posterior(video)[0])

    def frames(self, latents: Tensor, history: History | None) -> Tensor:
        return self.pixels(self._raw(latents), history).clamp(-1, 1)

    def encode_stream(self) -> EncodeStream:
        """A new video to be encoded piece by piece."""
        return EncodeStream(self)

    def _normalised(self, mean: Tensor) -> Tensor:
        return ((mean - self.latent_mean.float()) / self.latent_std.float()).movedim(-1, 2)  # (B,F,z,h,w)

    def _raw(self, latents: Tensor) -> Tensor:
        return latents.movedim(2, -1).float() * self.latent_std.float() + self.latent_mean.float()  # (B,F,h,w,z)


class EncodeStream:
    """One video being encoded: first 1 + temporal*n frames, then multiples of temporal per call."""

    def __init__(self, codec: CausalVAE) -> None:
        self._codec = codec
        self._history: History = {}

    @torch.no_grad()
    def __call__(self, video: Tensor) -> Tensor:
        self._codec.check_video(video, has_begun=bool(self._history))
        return self._codec._normalised(self._codec.posterior(video, self._history)[0])


@torch.no_grad()
def latent_statistics(codec: CausalVAE, videos: Iterable[Tensor]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of every latent channel over batches of videos (B,T,3,H,W), before normalisation.

    `codec.set_statistics(*latent_statistics(codec, videos))` gives latents of mean 0 and standard deviation 1.
    """
    count, total, squares = 0, torch.zeros(codec.config.z).double(), torch.zeros(codec.config.z).double()
    for video in videos:
        codec.check_video(video)
        mean = codec.posterior(video)[0].flatten(0, -2).double()  # (B*F*h*w,z)
        count += mean.shape[0]
        total, squares = total + mean.sum(0).cpu(), squares + mean.square().sum(0).cpu()
    if count == 0:
        raise ValueError("videos is empty, expected at least one batch")
    average = total / count
    std = (squares / count - average.square()).clamp(min=1e-12).sqrt()
    return tuple(average.tolist()), tuple(std.tolist())
