"""What all video codecs share: sizes, geometry, and checks of what goes in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from causalreel.types import DecodeStream, Geometry

History = dict[nn.Module, Tensor]
"""What a stream remembers: for each layer that looks back, its last input frames. None instead is a whole clip."""


class Codec(nn.Module):
    """A network that implements `types.VideoCodec`. `encode` and `decode` follow the caller's grad mode, streams take
    no gradient, and a stream gives what the whole clip gives, whatever its split over calls."""

    config: Any
    """Its sizes: a frozen dataclass that a `CodecKind` names."""

    def __init__(self, config: Any, geometry: Geometry) -> None:
        super().__init__()
        self.config, self.geometry = config, geometry

    def encode(self, video: Tensor) -> Tensor:
        """Video (B,T,3,H,W) in [-1, 1] -> latents (B,F,C,h,w), float32."""
        raise NotImplementedError

    def frames(self, latents: Tensor, history: History | None) -> Tensor:
        """Latents (B,F,C,h,w) -> their frames (B,T,3,H,W) in [-1, 1], float32; history: see `History`."""
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B,F,C,h,w) -> video (B,T,3,H,W) in [-1, 1], float32, the whole clip at once."""
        self.check_latents(latents)
        return self.frames(latents, None)

    def stream(self) -> DecodeStream:
        """A new video to be decoded piece by piece."""
        return Decoding(self)

    def check_video(self, video: Tensor, geometry: Geometry | None = None, *, has_begun: bool = False) -> None:
        """ValueError unless the video (B,T,3,H,W) is whole latents; has_begun: it goes on with one. geometry: of the
        encoder, where it is another than the decoder's."""
        geometry = geometry or self.geometry
        if video.ndim != 5 or video.shape[2] != 3:
            raise ValueError(f"video has shape {tuple(video.shape)}, expected (B,T,3,H,W)")
        frames, temporal = video.shape[1], geometry.temporal
        if not has_begun:
            geometry.latents_of(frames)
        elif frames < 1 or frames % temporal:
            raise ValueError(
                f"video has {frames} frames, expected a multiple of {temporal}, because the stream has begun"
            )
        geometry.latent_of(*video.shape[-2:])

    def check_latents(self, latents: Tensor) -> None:
        """ValueError unless latents are (B,F,C,h,w) with this codec's channels."""
        channels = self.geometry.channels
        if latents.ndim != 5 or latents.shape[1] < 1 or latents.shape[2] != channels:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected (B,F,{channels},h,w), F >= 1")


class Decoding:
    """One video being decoded; implements `types.DecodeStream`."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._history: History = {}

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        self._codec.check_latents(latents)
        return self._codec.frames(latents, self._history)


class Program(Protocol):
    """A decoder rearranged: latents (B,F,C,h,w) -> frames (B,T,3,H,W) in [-1, 1]; fresh: F is 1, a new video begins.

    Reads and replaces `states`, tensors that stay where they are once a call has made them.
    """

    states: dict[object, Tensor]

    def __call__(self, latents: Tensor, fresh: bool) -> Tensor: ...


@dataclass(frozen=True)
class DecoderMemory:
    """Bytes that decoding takes."""

    weights: float
    """Of the codec, its encoder included, and of copies that its fast form makes."""
    state: float
    """For each latent position (B,h,w): what a stream remembers between calls."""
    workspace: float
    """For each latent position: what else a call holds at its widest."""


@dataclass(frozen=True)
class CodecKind:
    """A kind of codec: all there is to know of its class."""

    name: str
    """What codec.yaml calls it."""
    sizes: type
    """A frozen dataclass, with the property `geometry`."""
    build: Callable[[Any], Codec]
    """Sizes -> the network, with random weights."""
    differs: Callable[[Any, dict[str, tuple[int, ...]]], str | None]
    """Sizes, and the shapes of a file's tensors -> how they plainly differ, if they do. Asked before anything is built:
    a stranger's sizes could ask for any memory."""
    memory: Callable[..., DecoderMemory]
    """(sizes, frames=latent frames of a call, width=bytes of a number, is_fast=) -> what decoding takes."""
    program: Callable[..., Program] | None = None
    """(codec, dtype, device, backend, arithmetic or None) -> its fast form (`codecs.fast_decode`), if there is one."""
    joins: bool = False
    """The fast form decodes the latents of a chunk in one call; else one after the other."""
