"""A pipeline's fast form: the inference network, recorded calls, and a decoder that keeps up. The same videos."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

from causalreel.codecs.codec import Codec
from causalreel.codecs.fast_decode import FastDecoder, fast_decoder
from causalreel.codecs.kinds import kind_of
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.released import TwoCodecs
from causalreel.parallel import fast
from causalreel.types import DecodeStream

log = logging.getLogger(__name__)


def accelerate(pipeline: Pipeline, *, precision: str = "bf16", graphs: bool = True) -> Pipeline:
    """-> the pipeline with `parallel.fast.FastDiT` behind its denoiser, weights in the type they are computed in, and
    on a GPU `codecs.fast_decode` for its pixels.

    precision: bf16, fp8 (e4m3 products) or fp8-attention (self-attention and its cache too); the last two change the
    numerics, which is logged. graphs: record the network's calls
    (CUDA only), which takes a few seconds for each number of frames and pays from the second clip on.
    """
    denoiser, is_cuda = pipeline.denoiser, pipeline.device.type == "cuda"
    fast.check_precision(precision, pipeline.device)
    if denoiser.compute is not None:
        denoiser = denoiser.to(denoiser.compute)
    fast.accelerate(denoiser, precision=precision, graphs=graphs and is_cuda)
    if precision in fast.NEEDS:
        assert isinstance(denoiser.run, fast.FastDiT)
        denoiser.run.release_originals()
        what = "products" if precision == "fp8" else "products, attention and its cache"
        log.info("%s: %s in fp8 (e4m3); videos differ slightly from those in bf16", pipeline.export.name, what)
    return dataclasses.replace(pipeline, denoiser=denoiser, decoder=_fast_decoders(pipeline) if is_cuda else None)


def _fast_decoders(pipeline: Pipeline) -> Callable[[int], DecodeStream] | None:
    """What opens fast streams, one decoder per number of clips; None for codecs that have no fast form."""
    codec = pipeline.codec.decoder if isinstance(pipeline.codec, TwoCodecs) else pipeline.codec
    if not isinstance(codec, Codec) or (kind := kind_of(codec.config)).program is None:
        return None
    chunk = pipeline.sampling.chunk or 1
    sizes = (chunk, 1) if kind.joins and chunk > 1 else (1,)
    made: dict[int, FastDecoder] = {}

    def open_stream(clips: int) -> DecodeStream:
        if clips not in made:
            made[clips] = fast_decoder(codec, *pipeline.size, batch=clips, device=pipeline.device, sizes=sizes)
        return made[clips].stream()

    return open_stream
