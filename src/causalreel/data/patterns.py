"""Clips of moving patterns, which belong to no world: plain colours, textures and shapes.

A codec that is trained on them too shows pictures that people bring as they are. Textures have the spectrum of
photographs, an amplitude that falls with a power of the frequency; shapes lie over each other as leaves do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SHAPES = 6
"""Shapes of a clip at most."""
FASTEST = 3.0
"""Pixels that anything moves in a frame at most."""
PLAIN = 1 / 3
"""Share of the clips without a texture."""


def pattern_clips(count: int, frames: int, height: int, width: int, generator: torch.Generator) -> Tensor:
    """-> (count,T,3,H,W) float32 in [-1, 1], on the generator's device."""
    time = torch.arange(frames, device=generator.device)

    def draw(*shape: int) -> Tensor:
        return torch.rand((count, *shape), generator=generator, device=generator.device)

    contrast = (draw(1, 1, 1, 1) - PLAIN).clamp(min=0)
    texture = contrast * _texture(count, time, height, width, generator)
    first, last = (2 * draw(1, 3, 1, 1) - 1 for _ in range(2))
    fades = draw(1, 1, 1, 1) < 0.25
    video = torch.where(fades, torch.lerp(first, last, (time / frames).view(-1, 1, 1, 1)), first) + texture
    crowd = draw(1, 1, 1, 1)
    for _ in range(SHAPES):
        inside = _shape(draw(8), time, height, width) * (draw(1, 1, 1, 1) < crowd)
        video = torch.lerp(video, 2 * draw(1, 3, 1, 1) - 1 + texture.flip(-1), inside)
    return video.clamp(-1, 1)


def _texture(count: int, time: Tensor, height: int, width: int, generator: torch.Generator) -> Tensor:
    """(count,T,3,H,W), standard deviation 1 over each clip: moves as a whole, in its own colours."""
    y, x = (f(n, device=time.device) for f, n in ((torch.fft.fftfreq, height), (torch.fft.rfftfreq, width)))

    def draw(*shape: int) -> Tensor:
        return torch.rand((count, *shape), generator=generator, device=time.device)

    white = torch.randn((count, 1, 3, height, len(x), 2), generator=generator, device=time.device)
    grey = white.mean(2, keepdim=True) * math.sqrt(3)
    spectrum = torch.view_as_complex(torch.lerp(white, grey, draw(1, 1, 1, 1, 1)))
    frequency = torch.hypot(y[:, None], x).clamp(min=1 / max(height, width))
    moved = FASTEST * (2 * draw(2) - 1) * (draw(1) < 0.75)  # (count,2)
    way = moved[:, :1, None] * y[:, None] + moved[:, 1:, None] * x  # (count,H,W/2+1)
    phase = torch.exp(-2j * torch.pi * way[:, None] * time[:, None, None])
    made = torch.fft.irfft2(spectrum * phase[:, :, None] * frequency ** -(0.5 + 2 * draw(1, 1, 1, 1)), (height, width))
    return (made - made.mean((1, 2, 3, 4), keepdim=True)) / made.std((1, 2, 3, 4), keepdim=True).clamp(min=1e-6)


def _shape(number: Tensor, time: Tensor, height: int, width: int) -> Tensor:
    """number (B,8) in [0, 1] -> how much of each pixel a shape covers (B,T,1,H,W): an ellipse or rectangle, turned."""
    y, x, down, right, size, aspect, angle, kind = number[:, :, None, None, None].unbind(1)  # (B,1,1,1)
    step = time[:, None, None]
    rows, columns = (torch.arange(n, device=time.device) for n in (height, width))
    off_y = rows[:, None] - y * height - FASTEST * (2 * down - 1) * step
    off_x = columns - x * width - FASTEST * (2 * right - 1) * step
    turn = torch.pi * angle
    along, across = off_x * turn.cos() + off_y * turn.sin(), off_y * turn.cos() - off_x * turn.sin()
    radius = min(height, width) * (0.05 + 0.35 * size)
    along, across = along.abs() / radius, across.abs() / (radius * (0.4 + 0.6 * aspect))
    distance = torch.where(kind < 0.5, torch.hypot(along, across), torch.maximum(along, across))
    return ((1 - distance) * radius + 0.5).clamp(0, 1)[:, :, None]
