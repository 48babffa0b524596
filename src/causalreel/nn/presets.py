"""Sizes are data: one row per model. No code asks which one it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Camera: TypeAlias = Literal["none", "prope", "embedded"]


@dataclass(frozen=True)
class ModelConfig:
    """A Wan2.1-style DiT."""

    dim: int
    """Width of the residual stream (E)."""
    ffn_dim: int
    """Hidden width of the feed-forward network."""
    heads: int
    """Attention heads (N); dim / heads is the head width (D)."""
    layers: int
    """Transformer blocks."""
    text_dim: int
    """Width of the text encoder's output."""
    text_length: int
    """Text tokens a prompt is padded to; padding is attended."""
    freq_dim: int = 256
    """Width of the sinusoidal embedding of the noise level."""
    channels: int = 16
    """Latent channels, in and out."""
    patch: int = 2
    """Height and width of the latent patch that makes one token."""
    eps: float = 1e-6
    """Epsilon of every norm."""
    camera: Camera = "none"
    """How cameras enter: by heads that see through them (PRoPE), or added to the noise level's embedding."""
    actions: int = 0
    """Numbers that say what is pressed in a frame, added to the noise level's embedding; 0: it takes none."""

    @property
    def attention_heads(self) -> int:
        """Heads that attend and are cached: with PRoPE each has a twin."""
        return self.heads * (2 if self.camera == "prope" else 1)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("camera", "actions") and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim / heads must be an even whole number, got dim={self.dim}, heads={self.heads}")
        if self.camera not in get_args(Camera):
            raise ValueError(f"camera must be one of {', '.join(get_args(Camera))}, got {self.camera!r}")
        if self.camera == "prope" and self.dim // self.heads % 4:
            raise ValueError(f"with PRoPE dim / heads must be a multiple of 4, got {self.dim // self.heads}")
        if not 0 <= self.actions <= 4096:
            raise ValueError(f"actions must be 0 to 4096, got {self.actions}")


PRESETS = {
    "tiny": ModelConfig(dim=256, ffn_dim=768, heads=4, layers=6, text_dim=64, text_length=16),
    "tiny-smoke": ModelConfig(dim=64, ffn_dim=128, heads=2, layers=2, text_dim=64, text_length=16, freq_dim=64),
    "wan-1.3b": ModelConfig(dim=1536, ffn_dim=8960, heads=12, layers=30, text_dim=4096, text_length=512),
    "wan-14b": ModelConfig(dim=5120, ffn_dim=13824, heads=40, layers=40, text_dim=4096, text_length=512),
}


def preset(name: str) -> ModelConfig:
    """The row called `name`; ValueError names the rows there are."""
    if name not in PRESETS:
        raise ValueError(f"unknown model preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
