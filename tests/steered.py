"""A world that is steered by keys, made by hand: what the camera sees is painted from its pose and nothing else.

The network's place is taken by a painter that writes each frame's pose into its latents; the codec draws from them a
panorama of stripes that moves with the camera's direction, and a bar as long as the way it went forward. So a test can
read off the pixels which way a camera looks and how far it went, exactly, whoever made them.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from causalreel.codecs.tiny import tiny_codec
from causalreel.control.steering import Steering
from causalreel.infer.pipeline import Pipeline
from causalreel.nn.camera import W2C
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.masks import Context
from causalreel.nn.presets import ModelConfig
from causalreel.text.tiny import TinyTextEncoder
from causalreel.types import Conditioning, Geometry, LatentSpec
from causalreel.weights.export import Export, Sampling

STEP, DEGREES = 0.25, 12.0
STEERING = Steering(
    step=STEP,
    degrees=DEGREES,
    halves_turn=True,
    actions=("none w", "w", "s", "a", "d", "none left", "left", "right"),
)
CONFIG = ModelConfig(
    dim=48,
    ffn_dim=64,
    heads=3,
    layers=2,
    text_dim=64,
    text_length=16,
    freq_dim=32,
    camera="prope",
    actions=len(STEERING.actions),
)
AROUND = 90
"""Degrees after which the panorama begins again."""
SIZE = 64
"""Pixels of a side."""
PROMPT = "a large red circle moves right"


class Painter:
    """Stands in for a network: its clean estimate holds the frame's yaw (degrees), x and z in the first channels."""

    def __call__(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, **how: Any) -> Tensor:
        if (cache := how.get("cache")) is not None:
            for layer in range(CONFIG.layers):
                cache.extend(layer, *torch.zeros(2, 1, x.shape[1] * (SIZE // 16) ** 2, CONFIG.attention_heads, 16))
        c2w = torch.linalg.inv(conditioning.fields[W2C].double())
        yaw = torch.rad2deg(torch.atan2(c2w[..., 0, 2], c2w[..., 2, 2]))
        clean = torch.zeros_like(x)
        for channel, value in enumerate((yaw, c2w[..., 0, 3], c2w[..., 2, 3])):
            clean[:, :, channel] = value[..., None, None].to(x)
        return (x - clean) / sigma.expand(x.shape[:2])[..., None, None, None].clamp(min=1e-3)


class Panorama:
    """A codec whose latents are poses."""

    geometry = Geometry(channels=16, spatial=8, temporal=4)

    def encode(self, video: Tensor) -> Tensor:
        return torch.zeros(len(video), 1, 16, SIZE // 8, SIZE // 8)

    def decode(self, latents: Tensor) -> Tensor:
        return self.stream()(latents)

    def stream(self) -> _Stream:
        return _Stream()


class _Stream:
    def __init__(self) -> None:
        self.before: Tensor | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        shown = []
        for pose in latents[0, :, :3, 0, 0].double():
            if self.before is None:
                shown.append(view(*pose.tolist()))
            else:
                shown += [view(*(self.before + (pose - self.before) * part / 4).tolist()) for part in (1, 2, 3, 4)]
            self.before = pose
        return torch.stack(shown)[None]


def view(yaw: float, x: float, z: float) -> Tensor:
    """(3,H,W) in [-1,1]: a red stripe where the first direction lies, a blue bar as long as the way forward."""
    picture = torch.full((3, SIZE, SIZE), -0.5)
    middle = SIZE / 2 - yaw * SIZE / AROUND  # what is ahead goes left when the camera turns right
    columns = torch.arange(SIZE) + 0.5
    away = (columns - middle + SIZE / 2) % SIZE - SIZE / 2
    picture[0, : SIZE // 2] = 2 * torch.exp(-((away / 3) ** 2)) - 1
    bar = SIZE / 2 + z * 4
    picture[2, SIZE // 2 : 3 * SIZE // 4] = 2 * torch.sigmoid((bar - columns) * 4) - 1
    side = SIZE / 2 + x * 4
    picture[1, 3 * SIZE // 4 :] = 2 * torch.sigmoid((side - columns) * 4) - 1
    return picture


def read_view(frame: Tensor) -> tuple[float, float, float]:
    """(3,H,W) in [-1,1] -> yaw from -45 to 45, x and z, as `view` was given them; within a degree and 0.03."""
    angles = (torch.arange(SIZE) + 0.5 - SIZE / 2) * 2 * math.pi / SIZE
    stripe = (frame[0, : SIZE // 2].mean(0).double() + 1).clamp(min=0) / 2
    stripe = torch.where(stripe > 0.1, stripe, 0.0)
    middle = math.atan2(float((stripe * angles.sin()).sum()), float((stripe * angles.cos()).sum()))
    bars = [float((frame[c, rows].mean(0).double() + 1).sum() / 2) for c, rows in ((2, BLUE), (1, GREEN))]
    return -middle * AROUND / (2 * math.pi), (bars[1] - SIZE / 2) / 4, (bars[0] - SIZE / 2) / 4


def turned(before: float, after: float) -> float:
    """Degrees to the right from one yaw to another."""
    return (after - before + AROUND / 2) % AROUND - AROUND / 2


BLUE, GREEN = slice(SIZE // 2, 3 * SIZE // 4), slice(3 * SIZE // 4, SIZE)


def painted(chunk: int = 1, **changes: Any) -> Pipeline:
    """The world by hand, as a pipeline."""
    made = random_pipeline(chunk)
    made.denoiser.run = Painter()
    return dataclasses.replace(made, codec=Panorama(), **changes)  # type: ignore[arg-type]


def random_pipeline(chunk: int = 1, config: ModelConfig = CONFIG, frames: int = 16) -> Pipeline:
    """A network of random weights with cameras and keys, and the tiny codec's sizes."""
    torch.manual_seed(0)
    context = Context(window=12)
    denoiser = DiTDenoiser(config, context=context).requires_grad_(False).eval()
    for name, weight in denoiser.named_parameters():
        if name.endswith(("prope_o.weight", "action_embedding.2.weight", "head.head.weight")):
            torch.nn.init.normal_(weight, std=0.2)
    export = Export(
        name="world",
        model=config,
        sampling=Sampling(chunk=chunk, steps=(1000.0,)),
        context=context,
        frames=frames,
        fps=16.0,
        latent=LatentSpec(16, SIZE // 8, SIZE // 8),
        control=STEERING,
    )
    codec = tiny_codec().requires_grad_(False).eval()
    return Pipeline(denoiser, export, export.sampling, codec, TinyTextEncoder(), torch.device("cpu"))
