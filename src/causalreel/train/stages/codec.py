"""Train the tiny codec to reconstruct rendered clips.

Rows of this stage are pixels. The loss is a weighted squared error, later joined by absolute and gradient errors that
sharpen edges, and a weak KL term. The absolute error must not come first: its optimum for small objects on a plain
background is the background alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalreel.codecs.wan_vae import CausalVAE
from causalreel.data.patterns import pattern_clips
from causalreel.train.kit import gaussian, integers, uniform
from causalreel.train.stage import Average, Loss, StepContext, Update
from causalreel.types import VideoBatch


@dataclass(frozen=True)
class CodecConfig:
    """Losses and batches of the codec stage."""

    batch: int = 32
    """Clips per step."""
    frames: int = 17
    """Pixel frames per clip, cut at a random place; 1 + a multiple of the codec's temporal factor."""
    rendered: int | None = None
    """Pixel frames of the clips of the flat world that are cut; null: 45. With as many as `frames`, 86 of 100 cuts show
    a change (`events: 1`), which begins with a latent frame, as models make it; of longer clips' cuts 10 of 100."""
    events: float = 0.0
    """Share of the rendered clips in which something changes, as `causalreel encode --events`."""
    squared: float = 10.0
    """Weight of the squared error."""
    absolute: float = 0.5
    """Weight of the absolute error once it has joined."""
    gradient: float = 0.25
    """Weight of the absolute error of horizontal and vertical differences once it has joined."""
    sharpen_from: int = 400
    """Step at which the absolute and gradient errors begin to join."""
    sharpen_over: int = 200
    """Steps over which they grow to their full weight."""
    kl: float = 3e-5
    """Weight of the KL divergence from a unit Gaussian, mean over latent elements."""
    edge_weight: float = 3.0
    """How much more pixels near edges count than flat ones: 1 + edge_weight to 1, before each clip's mean is made 1."""
    edge_reach: int = 2
    """Distance in pixels up to which a pixel is near an edge."""
    decoder_only: bool = False
    """Leave the encoder and the channel statistics as they are: models made behind this codec keep their latents."""
    latent_error: float = 0.0
    """Largest standard deviation of what is added to each latent frame, in units of normalised latents. A decoder that
    has seen it shows latents that a denoiser got a little wrong as what they are nearest to."""
    patterns: float = 0.0
    """Share of a batch's clips that show moving patterns in place of the world (`data.patterns`): a decoder that sees
    latents with errors, and no such clips, takes the colours from pictures that are not of the world."""

    def __post_init__(self) -> None:
        if not 0 <= self.latent_error < float("inf"):
            raise ValueError(f"latent_error must be 0 or more, got {self.latent_error}")
        if self.rendered is not None and self.rendered < self.frames:
            raise ValueError(f"rendered must be at least the {self.frames} frames of a cut, got {self.rendered}")
        if not 0 <= self.patterns <= 1:
            raise ValueError(f"patterns must be 0 to 1, got {self.patterns}")


def near_edges(video: Tensor, reach: int, *, threshold: float = 0.1) -> Tensor:
    """1 where a pixel of video (B,T,3,H,W) lies within `reach` pixels of a change in colour, else 0: (B,T,1,H,W)."""
    change = F.pad(video.diff(dim=-1).abs().amax(2, keepdim=True), (0, 1))
    change = torch.maximum(change, F.pad(video.diff(dim=-2).abs().amax(2, keepdim=True), (0, 0, 0, 1)))
    near = F.max_pool2d((change > threshold).float().flatten(0, 1), 2 * reach + 1, stride=1, padding=reach)
    return near.unflatten(0, video.shape[:2])


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of videos in [-1, 1], over all elements."""
    return -10 * torch.log10(F.mse_loss(a, b).clamp(min=1e-10) / 4)


def kl_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence of a diagonal Gaussian from the unit Gaussian, mean over elements."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def latent_error(step: StepContext, *shape: int, largest: float) -> Tensor:
    """What is added to latents (B,F,h,w,z): a standard deviation of 0 to `largest` for each frame, of which a share
    that is drawn too is smooth over the frame, as a veil is, and the rest without neighbours, as a speck is."""
    clips, frames, height, width, channels = shape
    level, smooth = (uniform(step, f"codec {name}", clips, frames)[..., None, None, None] for name in ("level", "veil"))
    coarse = gaussian(step, "codec veils", clips, frames, channels, 3, 3).flatten(0, 1)
    veil = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)
    veil = veil.unflatten(0, (clips, frames)).movedim(2, -1)
    specks = gaussian(step, "codec specks", *shape)
    return largest * level * (smooth.sqrt() * veil + (1 - smooth).sqrt() * specks)


class CodecStage:
    """Implements `train.stage.Stage` with the single role "codec"."""

    averages: Sequence[Average] = ()

    def __init__(self, codec: CausalVAE, config: CodecConfig | None = None) -> None:
        self.config = config or CodecConfig()
        factor = codec.geometry.temporal
        if self.config.frames < 1 or self.config.frames % factor != 1 % factor:
            raise ValueError(f"frames is {self.config.frames}, expected 1 + {factor}n")
        if self.config.decoder_only:
            for part in (codec.encoder, codec.conv1):
                part.requires_grad_(False)
        self.roles: dict[str, nn.Module] = {"codec": codec}
        self._geometry = codec.geometry

    def updates(self, step: StepContext) -> Iterator[Update]:
        """One update on a batch of random crops in time."""
        video = self._with_patterns(step, self._crop(step))
        yield Update("codec", [lambda: self.loss(step, video)])

    def loss(self, step: StepContext, video: Tensor) -> Loss:
        """Video (B,T,3,H,W) -> loss and metrics of reconstructing it from sampled latents."""
        config = self.config
        noise = gaussian(step, "codec posterior", *self._latent_shape(video))
        error = latent_error(step, *noise.shape, largest=config.latent_error) if config.latent_error else None
        reconstruction, mean, log_variance = self.roles["codec"](video, noise, error)
        with torch.autocast(video.device.type, enabled=False):
            difference = reconstruction.float() - video
            weight = 1 + config.edge_weight * near_edges(video, config.edge_reach)
            weight = weight / weight.mean((1, 2, 3, 4), keepdim=True)  # of each clip: parts of a batch know no others
            squared = (weight * difference.square()).mean()
            absolute = (weight * difference.abs()).mean()
            gradient = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
            kl = kl_divergence(mean.float(), log_variance.float())
            sharpen = min(max((step.step - config.sharpen_from) / max(config.sharpen_over, 1), 0.0), 1.0)
            loss = config.squared * squared + config.kl * kl
            loss = loss + sharpen * (config.absolute * absolute + config.gradient * gradient)
        metrics = {"psnr": psnr(reconstruction.float().clamp(-1, 1), video), "squared": squared, "absolute": absolute}
        metrics |= {"kl": kl, "latent_std": mean.std(), "noise_std": torch.exp(0.5 * log_variance).mean()}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def preview(self, step: StepContext) -> Tensor:
        """Four clips beside their reconstructions: (4,T,3,H,2*W). Always the same rows; the data position stays."""
        video = step.rows(range(min(4, len(step.source))), VideoBatch).video[:, : self.config.frames]
        reconstruction = self.roles["codec"](video)[0].float().clamp(-1, 1)
        return torch.cat([video, reconstruction], -1)

    def _crop(self, step: StepContext) -> Tensor:
        """The next batch, each clip cut to `frames` frames at a random place of its own."""
        video = step.batch(self.config.batch, VideoBatch).video
        clips, frames = video.shape[:2]
        if frames < self.config.frames:
            raise ValueError(f"clips have {frames} frames, but config.frames is {self.config.frames}")
        spare = frames - self.config.frames + 1
        first = integers(step, "codec crop", spare, clips, 1)
        index = first + torch.arange(self.config.frames, device=video.device)  # (B,T)
        return video[torch.arange(clips, device=video.device)[:, None], index]

    def _with_patterns(self, step: StepContext, video: Tensor) -> Tensor:
        """The first clips of the whole batch replaced by patterns."""
        count = round(self.config.patterns * self.config.batch)
        if not count:
            return video
        frames, (height, width) = video.shape[1], video.shape[-2:]
        patterns = step.mine(pattern_clips(count, frames, height, width, step.generator("codec patterns")))
        return torch.cat([patterns, video[len(patterns) :]])

    def _latent_shape(self, video: Tensor) -> tuple[int, ...]:
        clips, frames, _, height, width = video.shape
        latent = self._geometry.latent_of(height, width)
        return clips, self._geometry.latents_of(frames), latent.height, latent.width, latent.channels
