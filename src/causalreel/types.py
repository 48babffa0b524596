"""The nouns that every layer shares: conditioning, batches, chunks, and the protocols of exchangeable parts.

Letters, one meaning each: B batch, F latent frames, T pixel frames, C channels, H W height and width of what the
tensor is (latents or pixels), K text tokens, E text width. Nothing here computes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """What a denoiser is told besides the latents: text (B,K,E), zero rows after the prompt's last token.

    `prepared` is private to the denoiser that made it (its text keys and values); it travels with the text so that a
    prompt is projected once and not once a call.
    """

    text: Tensor
    prepared: Any = None

    def __len__(self) -> int:
        return self.text.shape[0]

    def __getitem__(self, rows: slice) -> Conditioning:
        """Rows of the batch, without what a denoiser prepared for the whole of it."""
        return Conditioning(self.text[rows])

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditioning on another device."""
        return Conditioning(self.text.to(device))


@dataclass(frozen=True)
class LatentSpec:
    """The shape of one latent frame."""

    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class Chunk:
    """Finished frames that leave a rollout together: latents (B,F,C,H,W), first of them at absolute frame `start`."""

    start: int
    latents: Tensor


@dataclass(frozen=True)
class Batch:
    """Training rows: latents (B,F,C,H,W), or None where a stage needs only prompts; and their conditioning."""

    conditioning: Conditioning
    latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.conditioning)

    def __getitem__(self, rows: slice) -> Batch:
        return Batch(self.conditioning[rows], None if self.latents is None else self.latents[rows])


@runtime_checkable
class Denoiser(Protocol):
    """x (B,F,C,H,W), sigma (B,F) or (B,1), conditioning -> velocity (B,F,C,H,W).

    `sizes` cuts the F frames into chunks: each sees itself and the chunks before it. Without a cache and without sizes
    all frames see each other. With a cache the frames start at absolute frame `start` and see the cached frames too.
    """

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        sizes: Sequence[int] | None = None,
        start: int = 0,
        cache: Cache | None = None,
    ) -> Tensor: ...


@runtime_checkable
class Cache(Protocol):
    """Finished context. Calls read it; only `commit` writes it."""

    def commit(self, frames: int) -> None:
        """Make the first `frames` frames of the latest call permanent, then evict by policy."""
        ...


class DecodeStream(Protocol):
    """One video being decoded: feed latents (B,F,C,H,W) in order, get pixel frames (B,T,3,H,W) in [-1, 1].

    The first latent frame of the stream gives 1 pixel frame, every later one `temporal_factor`.
    """

    def __call__(self, latents: Tensor) -> Tensor: ...


@runtime_checkable
class VideoCodec(Protocol):
    """Video (B,T,3,H,W) in [-1, 1] <-> latents (B,F,C,h,w) with unit scale; T = 1 + temporal_factor * (F - 1)."""

    channels: int
    spatial_factor: int
    temporal_factor: int

    def encode(self, video: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def stream(self) -> DecodeStream: ...


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts -> text (B,K,E), zero rows after the last token; `null` is the unconditional input."""

    length: int
    width: int

    def complete(self, prompt: str, seed: int) -> str:
        """The prompt in the wording the model was trained on; encoders of free text return it unchanged."""
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor: ...

    def null(self, batch: int) -> Tensor: ...


class NoiseSource(Protocol):
    """Where a rollout's randomness comes from; see `rollout.KeyedNoise`."""

    def initial(self, start: int, frames: int) -> Tensor:
        """Pure noise (B,F,C,H,W) for new frames."""
        ...

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        """The `draw`-th further noise (B,F,C,H,W) for these frames."""
        ...


Move = Callable[[Tensor, Tensor, float, float, Callable[[], Tensor]], Tensor]
"""One move of a solver: x, velocity, sigma, sigma_next, fresh noise -> x at sigma_next."""

Solver = Callable[[], Move]
"""Makes the move for one chunk; multistep solvers keep their history in it."""
