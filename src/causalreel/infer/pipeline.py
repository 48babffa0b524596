"""Prompts to pixels: text encoder, rollout, streaming decoder. One loop serves whole clips and streams.

What a clip shows depends on its prompt and seed alone, not on the batch it is in, on fused calls or on the device
(up to rounding): noise is drawn frame by frame from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from causalreel.infer.loras import Loras
from causalreel.infer.schedule import Schedule, adapt, schedule
from causalreel.infer.wording import full_prompt
from causalreel.nn.caches import growing_cache
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.parallel.fast import FastDiT
from causalreel.rollout import Call, KeyedNoise, rollout
from causalreel.solvers import SOLVERS
from causalreel.types import Cache, Chunk, Conditioning, DecodeStream, NoiseSource, TextEncoder, VideoCodec
from causalreel.weights.export import Export, Sampling


@dataclass(frozen=True)
class Pipeline:
    """A model ready to generate; `causalreel.load` makes one. `sampling` may differ from the export's."""

    denoiser: DiTDenoiser
    export: Export
    sampling: Sampling
    codec: VideoCodec
    text: TextEncoder
    device: torch.device
    decoder: Callable[[int], DecodeStream] | None = None
    """What opens a stream of pixels for so many clips; None: the codec's own."""
    loras: Loras | None = None
    """What is merged into the denoiser's weights."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its videos, in pixels."""
        return self.codec.geometry.size_of(self.export.latent)

    @property
    def fields(self) -> frozenset[str]:
        """The fields of the conditioning that its network takes."""
        return self.denoiser.model.fields

    def set_loras(self, strengths: Mapping[str, float]) -> None:
        """Other strengths of LoRAs that the pipeline was loaded with, by name, from the next call on.

        All streams of the pipeline share its weights. `infer.live.Live` changes them between two chunks.
        """
        if self.loras is None:
            raise ValueError(f"{self.export.name} was loaded without a LoRA, so that none can be set")
        self.loras.set(strengths)

    def schedule(
        self,
        *,
        frames: int | None = None,
        steps: int | Sequence[float] | None = None,
        chunk: int | None = None,
        prefix: int = 0,
    ) -> Schedule:
        """How a clip of `frames` pixel frames would be made, behind `prefix` latent frames; ValueError if it cannot."""
        sampling = adapt(self.sampling, steps=steps, chunk=chunk)
        how: dict[str, Any] = {"trained": self.export.frames, "context": self.export.context}
        return schedule(sampling, self.codec.geometry, **how, frames=frames, prefix=prefix)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        frames: int | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | Sequence[float] | None = None,
        chunk: int | None = None,
        prefix: Tensor | None = None,
        fused: bool = True,
    ) -> Tensor:
        """-> video (B,T,3,H,W) float32 in [-1,1], one clip per prompt. Arguments as for `stream`."""
        parts = self.stream(prompts, frames=frames, seed=seed, steps=steps, chunk=chunk, prefix=prefix, fused=fused)
        return torch.cat(list(parts), dim=1)

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        frames: int | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | Sequence[float] | None = None,
        chunk: int | None = None,
        prefix: Tensor | None = None,
        fused: bool = True,
        ahead: bool = True,
    ) -> Iterator[Tensor]:
        """Yield pixel frames (B,t,3,H,W) float32 in [-1,1], chunk by chunk as they are made.

        frames: pixel frames of the clip, of n latent frames with n a multiple of the chunk; None: as long as a training
        clip. A longer clip streams on with a window of the training clip's length, so its cost per chunk stays flat.
        seed: of the first prompt, the others count up from it; or one for each prompt. It also decides what a prompt
        leaves open (see `TextEncoder.complete`).
        steps: a number (4: 1000, 750, 500, 250) or a list; chunk: latent frames made together; None: the model's own.
        prefix: the clip's first frames, (3,H,W), (T,3,H,W) or (B,T,3,H,W) in [-1,1]: one picture is image-to-video,
        more is continuation. It is encoded, decoded again and yielded first, and counts in `frames`.
        fused: fewer, larger denoiser calls with the same result. ahead: on a GPU, the next chunk is being made while
        one is decoded and looked at.
        Everything is checked here, before the first frame is asked for; raises ValueError.
        """
        request = self._request(prompts, frames=frames, seed=seed, steps=steps, chunk=chunk, prefix=prefix)
        return self._stream(request, fused, ahead)

    def latents(
        self,
        prompts: str | Sequence[str],
        *,
        frames: int | None = None,
        seed: int | Sequence[int] = 0,
        steps: int | Sequence[float] | None = None,
        chunk: int | None = None,
        fused: bool = True,
    ) -> Iterator[Chunk]:
        """Yield chunks of latents (B,F,C,H,W) float32, not decoded. Arguments as for `stream`."""
        return self._chunks(self._request(prompts, frames=frames, seed=seed, steps=steps, chunk=chunk), None, fused)

    def _request(
        self,
        prompts: str | Sequence[str],
        *,
        frames: int | None,
        seed: int | Sequence[int],
        steps: int | Sequence[float] | None,
        chunk: int | None,
        prefix: Tensor | None = None,
    ) -> _Request:
        """Check everything, encode the text."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            raise ValueError("prompts must hold at least one prompt, got none")
        seeds = _seeds(seed, len(prompts))
        given = None if prefix is None else _as_batch(prefix, len(prompts))
        if given is not None and tuple(given.shape[-2:]) != self.size:
            raise ValueError(f"the prefix must be {_by(self.size)} pixels, got {_by(given.shape[-2:])}")
        length = 0 if given is None else self.codec.geometry.latents_of(given.shape[1], name="the prefix")
        plan = self.schedule(frames=frames, steps=steps, chunk=chunk, prefix=length)
        pictures = [None] * len(prompts) if given is None else given[:, -1]
        words = zip(prompts, seeds, pictures, strict=True)
        full = [full_prompt(self.text, prompt, seed, picture) for prompt, seed, picture in words]
        conditioning = Conditioning(self.text.encode(full)).to(self.device)
        return _Request(conditioning, KeyedNoise(seeds, self.export.latent, self.device), plan, given)

    def _stream(self, request: _Request, fused: bool, ahead: bool) -> Iterator[Tensor]:
        decode = self.codec.stream() if self.decoder is None else self.decoder(len(request.conditioning))
        prefix = None
        if request.given is not None:
            with torch.no_grad():
                prefix = self.codec.encode(request.given.to(self.device))  # (B,P,C,h,w)
                shown = decode(prefix)
            yield shown
        source = _Ahead(self._chunks(request, prefix, fused), self.device, ahead)
        while True:
            with torch.no_grad():  # around the work and never around a yield
                chunk = source.take()
                if chunk is None:
                    return
                shown = decode(chunk.latents)
                source.start_next()
            yield shown

    def _chunks(self, request: _Request, prefix: Tensor | None, fused: bool) -> Iterator[Chunk]:
        denoise = self.denoiser_for(request.plan.sampling)
        conditioning = denoise.prepare(request.conditioning)
        batch = len(request.conditioning)
        return self.rollout(request.plan, conditioning, request.noise, batch=batch, prefix=prefix, fused=fused)

    def denoiser_for(self, sampling: Sampling) -> DiTDenoiser | Guided:
        """The denoiser, guided if `sampling` says so; its `prepare` makes the conditioning for `rollout`."""
        if sampling.guidance == 1:
            return self.denoiser
        negative = self.text.null(1).to(self.device)
        return Guided(self.denoiser, Conditioning(negative), sampling.guidance)

    def rollout(
        self,
        plan: Schedule,
        conditioning: Conditioning | Callable[[Call], Conditioning],
        noise: NoiseSource,
        *,
        batch: int = 1,
        prefix: Tensor | None = None,
        fused: bool = True,
    ) -> Iterator[Chunk]:
        """Yield chunks of latents (B,F,C,H,W) float32 of a planned clip; the prefix (B,P,C,H,W) is not among them.

        conditioning: prepared (see `denoiser_for`), or a function that is asked before every call.
        """
        sampling = plan.sampling
        rows = batch if sampling.guidance == 1 else 2 * batch
        return rollout(
            self.denoiser_for(sampling),
            plan.plan(fused=fused),
            conditioning=conditioning,
            noise=noise,
            solver=SOLVERS[sampling.solver],
            cache=None if sampling.chunk is None else self._new_cache(plan, sampling.chunk, rows),
            prefix=prefix,
        )

    def _new_cache(self, plan: Schedule, chunk: int, batch: int) -> Cache:
        fast, latent = self.denoiser.run, self.export.latent
        if not isinstance(fast, FastDiT):
            return growing_cache(plan.context, self.export.model.layers)
        size = (latent.height, latent.width)
        how = {"chunk": chunk, "frames": plan.frames, "prefix": plan.prefix, "batch": batch}
        return fast.new_cache(plan.context, size=size, **how)


@dataclass(frozen=True)
class _Request:
    """What a checked request comes to."""

    conditioning: Conditioning
    noise: KeyedNoise
    plan: Schedule
    given: Tensor | None
    """Pixels (B,T,3,H,W) that the clip begins with."""


class _Ahead:
    """Chunks of a rollout; on a GPU the next one is made on a stream of its own while the caller uses the last."""

    def __init__(self, chunks: Iterator[Chunk], device: torch.device, ahead: bool) -> None:
        self.chunks, self.ready = chunks, None
        self.side = _side_stream(device) if ahead and device.type == "cuda" else None
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream(device))

    def start_next(self) -> None:
        """Have the GPU begin with the next chunk, if chunks are made ahead."""
        if self.side is not None:
            with torch.cuda.stream(self.side):
                self.ready = next(self.chunks, None), self.side.record_event()

    def take(self) -> Chunk | None:
        """The next chunk, ready for the caller's stream."""
        if self.side is None:
            return next(self.chunks, None)
        if self.ready is None:
            self.start_next()
        assert self.ready is not None
        (chunk, event), self.ready = self.ready, None
        if chunk is not None:
            here = torch.cuda.current_stream(chunk.latents.device)
            here.wait_event(event)
            chunk.latents.record_stream(here)
        return chunk


@lru_cache(maxsize=16)
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all clips of a device: they share caches and recordings, so their chunks are made in turn."""
    return torch.cuda.Stream(device)


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    if len(seed) != count:
        raise ValueError(f"seed must be one number or one for each of the {count} prompts, got {len(seed)}")
    return list(seed)


def _as_batch(prefix: Tensor, count: int) -> Tensor:
    """(3,H,W), (T,3,H,W) or (B,T,3,H,W) -> (count,T,3,H,W)."""
    if prefix.ndim not in (3, 4, 5) or prefix.shape[-3] != 3:
        raise ValueError(f"the prefix must be (3,H,W), (T,3,H,W) or (B,T,3,H,W), got {tuple(prefix.shape)}")
    if not prefix.is_floating_point():
        raise ValueError(f"the prefix must be floating point in [-1, 1], got {prefix.dtype}")
    batch = prefix[(None,) * (5 - prefix.ndim)]  # (1 or B,T,3,H,W)
    if batch.shape[0] not in (1, count):
        raise ValueError(f"the prefix must be one clip or one for each of the {count} prompts, got {batch.shape[0]}")
    return batch.expand(count, -1, -1, -1, -1)


def _by(size: Sequence[int]) -> str:
    return "x".join(str(side) for side in size)
