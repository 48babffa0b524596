"""Prompts to pixels: text encoder, rollout, streaming decoder. One loop serves whole clips and streams.

What a clip shows depends on its prompt and seed alone, not on the batch it is in, on fused calls or on the device
(up to rounding): noise is drawn frame by frame from the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from causalreel import families
from causalreel.control.steering import Steering
from causalreel.infer.clips import CheckedClips, ClipRequest
from causalreel.infer.restyle import Encoded, Over
from causalreel.infer.schedule import Schedule
from causalreel.nn.caches import growing_cache
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.parallel.fast import FastDiT
from causalreel.rollout import Call, KeyedNoise, rollout
from causalreel.solvers import SOLVERS
from causalreel.types import (
    Cache,
    Chunk,
    Conditioning,
    DecodeStream,
    Denoise,
    Geometry,
    NoiseSource,
    TextEncoder,
    VideoCodec,
)
from causalreel.weights.export import Export, Sampling

if TYPE_CHECKING:
    from causalreel.infer.loras import Loras


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
    def geometry(self) -> Geometry:
        """What its latents stand for."""
        return self.codec.geometry

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its videos, in pixels."""
        return self.codec.geometry.size_of(self.export.latent)

    @property
    def fields(self) -> frozenset[str]:
        """The fields of the conditioning that its network takes."""
        return self.denoiser.model.fields

    @property
    def control(self) -> Steering | None:
        """The keys that steer it; None: prompts alone do."""
        return families.steering(self.export)

    def set_loras(self, strengths: Mapping[str, float]) -> None:
        """Other strengths of LoRAs that the pipeline was loaded with, by name, from the next call on.

        All streams of the pipeline share its weights. `infer.live.Live` changes them between two chunks.
        """
        if self.loras is None:
            raise ValueError(f"{self.export.name} was loaded without a LoRA, so that none can be set")
        self.loras.set(strengths)

    def schedule(self, frames: int | None = None) -> Schedule:
        """How a clip of `frames` pixel frames would be made; ValueError if it cannot."""
        return ClipRequest("", frames).check(self, None).plan

    def generate(self, prompts: ClipRequest | str | Sequence[str], **request: Any) -> Tensor:
        """-> video (B,T,3,H,W) float32 in [-1,1], one clip per prompt. Arguments as for `stream`."""
        return torch.cat(list(self.stream(prompts, **request)), dim=1)

    def stream(self, prompts: ClipRequest | str | Sequence[str], **request: Any) -> Iterator[Tensor]:
        """Yield pixel frames (B,t,3,H,W) float32 in [-1,1], chunk by chunk as they are made.

        prompts: a `ClipRequest`, or its prompts with its other fields by name: frames, seed, steps, chunk, prefix,
        video and strength, fields, fused, ahead. Everything is checked here, before the first frame is asked for;
        raises ValueError.
        """
        wanted = ClipRequest.of(prompts, **request)
        return self._stream(wanted, *self._checked(wanted))

    def latents(self, prompts: ClipRequest | str | Sequence[str], **request: Any) -> Iterator[Chunk]:
        """Yield chunks of latents (B,F,C,H,W) float32, not decoded. Arguments as for `stream`, without a prefix."""
        wanted = ClipRequest.of(prompts, **request)
        if wanted.prefix is not None:
            raise ValueError("prefix must be None for latents, which begin with the first chunk that is made")
        return self._chunks(wanted, *self._checked(wanted), None)

    def _checked(self, request: ClipRequest) -> tuple[CheckedClips, Conditioning]:
        checked = request.check(self, self.text)
        fields = request.fields_for(checked.plan.frames)
        conditioning, spread = Conditioning(self.text.encode(checked.prompts), fields), checked.spread
        if spread is not None:
            conditioning = Conditioning(conditioning.text.unsqueeze(0), fields, spread.prompts, spread.cuts)
        conditioning = conditioning.to(self.device)
        self.denoiser.model.check_fields(conditioning, checked.plan.frames)
        return checked, conditioning

    def _stream(self, request: ClipRequest, checked: CheckedClips, conditioning: Conditioning) -> Iterator[Tensor]:
        decode = self.codec.stream() if self.decoder is None else self.decoder(len(conditioning))
        prefix = None
        if checked.prefix is not None:
            with torch.no_grad():
                prefix = self.codec.encode(checked.prefix.to(self.device))  # (B,P,C,h,w)
                shown = decode(prefix)
            yield shown
        source = _Ahead(self._chunks(request, checked, conditioning, prefix), self.device, request.ahead)
        while True:
            with torch.no_grad():  # around the work and never around a yield
                chunk = source.take()
                if chunk is None:
                    return
                shown = decode(chunk.latents)
                source.start_next()
            yield shown

    def _chunks(
        self, request: ClipRequest, checked: CheckedClips, conditioning: Conditioning, prefix: Tensor | None
    ) -> Iterator[Chunk]:
        noise = KeyedNoise(checked.seeds, self.export.latent, self.device)
        prepared = self.denoiser_for(checked.plan.sampling).prepare(conditioning)
        how: dict[str, Any] = {"batch": len(conditioning), "prefix": prefix, "fused": request.fused}
        strength = checked.plan.strength
        if checked.video is None or strength is None:
            yield from self.rollout(checked.plan, prepared, noise, **how)
            return
        with closing(Encoded(self.codec, checked.video, self.device)) as given:
            yield from self.rollout(checked.plan, prepared, Over(noise, given, strength), **how)

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
        denoise: Denoise = self.denoiser_for(sampling)
        if sampling.levels and plan.strength is None:
            noise = _Below(noise, sampling.levels[0][0])
        return rollout(
            denoise if sampling.times == "exact" else partial(_told_in_bfloat16, denoise),
            plan.plan(fused=fused),
            conditioning=conditioning,
            noise=noise,
            solver=SOLVERS[sampling.solver],
            cache=None if sampling.chunk is None else self._new_cache(plan, sampling.chunk, rows),
            prefix=prefix,
            exact=bool(sampling.levels),
        )

    def _new_cache(self, plan: Schedule, chunk: int, batch: int) -> Cache:
        fast, latent = self.denoiser.run, self.export.latent
        if not isinstance(fast, FastDiT):
            return growing_cache(plan.context, self.export.model.layers)
        size = (latent.height, latent.width)
        how = {"chunk": chunk, "frames": plan.frames, "prefix": plan.prefix, "batch": batch}
        return fast.new_cache(plan.context, size=size, **how)


class _Below:
    """Noise of a sampler that begins below noise level 1: its first input is noise times that level."""

    def __init__(self, noise: NoiseSource, level: float) -> None:
        self.noise, self.level = noise, level

    def initial(self, start: int, frames: int) -> Tensor:
        return self.noise.initial(start, frames).double() * self.level

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        return self.noise.renoise(start, frames, draw)


def _told_in_bfloat16(denoise: Denoise, x: Tensor, sigma: Tensor, conditioning: Conditioning, **call: Any) -> Tensor:
    """As `denoise`, with times as Causal-rCM's networks were trained: 1000 sigma rounded to bfloat16."""
    return denoise(x, (1000 * sigma.double()).bfloat16().double() / 1000, conditioning, **call)


class _Ahead:
    """Chunks of a rollout; on a GPU the next one is made on a stream of its own while the caller uses the last."""

    def __init__(self, chunks: Iterator[Chunk], device: torch.device, ahead: bool) -> None:
        self.chunks, self.ready = chunks, None
        self.side = side_stream(device) if ahead and device.type == "cuda" else None
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
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where latents are made: one for all clips and sessions of a device, which share caches and recordings, so that
    their chunks are made in turn."""
    return torch.cuda.Stream(device)
