"""How much device memory the accelerated pipeline takes (`infer.accelerate`), part by part.

Keys and values lie in a memory of fixed size; recordings hold their inputs and results and share working memory that
nothing else uses; the fast decoder has weights, state and working memory of its own. All of it by running the real code
on the meta device. docs/memory.md has it beside a GPU's; what torch holds in reserve comes on top.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from causalreel.codecs.fast_decode import fast_decoder
from causalreel.codecs.taehv import TAEHV
from causalreel.infer.estimate import (
    CUBLAS_WORKSPACE,
    DTYPES,
    FEW,
    Estimate,
    Nothing,
    PretendExchange,
    Request,
    codec_of,
    replace_layers,
    text_bytes,
    umt5_bytes,
    weight_bytes,
)
from causalreel.infer.outline import outlined
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.dit import TextKeys
from causalreel.nn.masks import Context
from causalreel.nn.static_cache import StaticCache
from causalreel.parallel.fast import FastDiT
from causalreel.rollout import chunked, fuse, rollout
from causalreel.types import Conditioning

STREAMS = 3
"""Streams with a workspace of cuBLAS: where chunks are made, where calls are recorded, where pixels are made."""


def estimate_fast(request: Request) -> Estimate:
    """Every part of the memory of `request`, accelerated and recorded, on the first GPU."""
    few, fewer = (_network(replace_layers(request, n)) for n in (FEW, FEW - 1))
    cache, activations, recordings = (
        at + (request.model.layers - FEW) * (at - before) for at, before in zip(few, fewer, strict=True)
    )
    codec, state, workspace = (0, 0, 0) if request.decoder == "none" else _decoder(request)
    return Estimate(
        weights=weight_bytes(request.model, request.dtype),
        cache=cache,
        fresh=0,
        text_keys=2 * text_bytes(request),  # the prompt's, and those that recordings read
        activations=activations,
        tables=recordings,
        decoder_weights=codec,
        decoder_state=state,
        decoder_workspace=workspace,
        text_encoder=umt5_bytes() if request.text_encoder == "gpu" else 0,
        libraries=STREAMS * CUBLAS_WORKSPACE,
        overlap=True,  # each set of recordings keeps its working memory to itself
        recorded=True,
    )


@lru_cache(maxsize=64)
def _network(request: Request) -> tuple[int, int, int]:
    """Bytes of the cache's memory, of a call at its widest point, and of what recordings hold between calls."""
    model, chunk = request.model, request.chunk
    context = Context(window=request.window)
    with torch.device("meta"):
        net = DiTDenoiser(model, context=context).to(DTYPES[request.dtype]).requires_grad_(False)
        keys = torch.empty(
            request.rows, model.text_length, model.heads, model.dim // model.heads, dtype=net.model.dtype
        )
        text = torch.empty(request.rows, 1, model.text_dim)
        told = Conditioning(text, TextKeys(text, [(keys, keys)] * model.layers))
    net.model.exchange = PretendExchange(request.gpus) if request.gpus > 1 else None
    net.run = network = _Recorded(FastDiT(net.model, graphs=False, precision=_precision(request)))
    size = request.latent.height, request.latent.width
    plan = chunked([chunk] * request.chunks, (1.0, 0.5))
    calls = list(fuse(plan) if request.fused else plan)

    def roll() -> tuple[int, int]:
        """Bytes at the widest point, and of the cache's memory."""
        cache = network.fast.new_cache(context, chunk=chunk, frames=request.frames, batch=request.rows, size=size)
        if not isinstance(cache, StaticCache):
            raise ValueError(
                f"a window of {request.window} with chunks of {chunk} does not fit a cache of fixed size; "
                f"estimate the plain code (--precision eager)"
            )
        with outlined() as held:
            noise = Nothing(request.rows, request.latent)
            for _ in rollout(net, calls, conditioning=told, noise=noise, cache=cache):
                pass
        return held.peak, _bytes(cache.memory.tensors)

    roll()  # tables are made in the first rollout and only read in the second
    peak, memory = roll()
    levels = sum(_bytes((found.blocks, found.head)) for found in network.fast._levels.values())
    return memory, peak, sum(network.kinds.values()) + levels


class _Recorded:
    """A FastDiT that notes what each kind of call would have a recording hold."""

    def __init__(self, fast: FastDiT) -> None:
        self.fast, self.kinds = fast, {}

    def __call__(self, x: Tensor, sigma: Tensor, text: object, **how: object) -> Tensor:
        cache, positions = how["cache"], how["positions"]
        velocity = self.fast(x, sigma, text, **how)  # type: ignore[arg-type]
        assert isinstance(cache, StaticCache) and isinstance(positions, tuple)
        levels = self.fast.levels(tuple(sigma.expand(-1, x.shape[1])[0].tolist()))
        config = self.fast.model.config
        tokens = x.shape[1] * x.shape[3] * x.shape[4] // config.patch**2
        rotation = 2 * tokens * (config.dim // config.heads // 2) * 4
        kind = (x.shape, how["mask"], cache.call)
        self.kinds[kind] = _bytes((x, velocity, levels.blocks, levels.head)) + rotation
        return velocity


def _precision(request: Request) -> str:
    return request.dtype if request.dtype.startswith("fp8") else "bf16"


def _decoder(request: Request) -> tuple[int, int, int]:
    """Weights (the codec's own and the fast form's), state, and the rest at the widest point of a call.

    Where Triton is not installed, its passes are counted in their torch form, which holds more.
    """
    backend = "torch" if importlib.util.find_spec("triton") is None else "triton"
    with torch.device("meta"):
        codec = codec_of(request.decoder).to(DTYPES[request.decoder_dtype]).requires_grad_(False)
    own = _bytes((*codec.parameters(), *codec.buffers()))
    size = (request.latent.height * codec.spatial_factor, request.latent.width * codec.spatial_factor)
    frames = request.chunk if isinstance(codec, TAEHV) else 1
    with outlined() as held:
        sizes = tuple({frames, 1})
        decoder = fast_decoder(codec, *size, batch=request.batch, graphs=False, backend=backend, sizes=sizes)
        stream, results = decoder.stream(), 0
        for count in (1, frames, frames):
            latents = torch.empty(request.batch, count, *request.latent.shape, device="meta")
            results += _bytes((stream(latents),))  # each recording holds its own
        state = decoder.state_bytes
        peak = held.peak
        fast_weights = held.now - state
    return own + fast_weights, state, peak - fast_weights - state + results


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
