"""How much device memory a request takes, before anything is loaded.

Weights, caches and text keys are arithmetic; activations and the decoder's state and workspace come from running the
plain code on the meta device (`infer.outline`). Masks of fused calls, where attention needs them as tensors, and
workspaces of libraries beyond cuBLAS's are not counted.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from itertools import dropwhile
from typing import Any, Literal

import torch
from torch import Tensor

from causalreel.codecs.wan_vae import CausalVAE, ChannelNorm, VAEConfig, vae_config
from causalreel.infer.outline import BACKEND, Held, outlined
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.dit import DiT, TextKeys
from causalreel.nn.kv_cache import KVCache
from causalreel.nn.masks import Context, frames_of
from causalreel.nn.presets import ModelConfig
from causalreel.nn.rope import rope_table
from causalreel.rollout import Call, chunked, fuse, rollout
from causalreel.types import Conditioning, LatentSpec

GIB = 2**30
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.bfloat16,
    "fp8-attention": torch.bfloat16,
}
"""Name of the weights' type -> type of the arithmetic."""
CUBLAS_WORKSPACE = 32 * 2**20
"""What torch gives cuBLAS on a GPU of compute capability 9 (its default of CUBLAS_WORKSPACE_CONFIG)."""
FEW = 4
"""Blocks of the larger of the two networks that are run for shapes; from two on, every further one adds the same."""
UMT5_XXL = {"vocabulary": 256384, "width": 4096, "hidden": 10240, "layers": 24, "heads": 64, "buckets": 32}
"""Sizes of Wan2.1's text encoder; its heads are as wide together as the encoder."""


@dataclass(frozen=True)
class Request:
    """What memory depends on."""

    model: ModelConfig
    """The network."""
    latent: LatentSpec
    """Shape of one latent frame."""
    chunk: int = 3
    """Latent frames made together."""
    window: int | None = None
    """Latent frames that a chunk sees, itself included; None: all."""
    frames: int | None = 21
    """Latent frames of a clip; None: endless, which needs a window."""
    batch: int = 1
    """Clips made together."""
    guided: bool = False
    """Classifier-free guidance: two rows for each clip."""
    fused: bool = True
    """Commits join the next chunk's first step."""
    dtype: Literal["float32", "bfloat16", "float16", "fp8", "fp8-attention"] = "bfloat16"
    """Type of the network's weights; fp8 means the blocks' linear layers, computing in bfloat16; fp8-attention the
    same, with a cache in fp8 where the pipeline is accelerated."""
    gpus: int = 1
    """GPUs that share the stream; the estimate is for the first, which decodes."""
    decoder: Literal["wan", "taehv", "none"] | VAEConfig = "wan"
    """What makes pixels; none: another device does."""
    decoder_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of its weights and arithmetic."""
    overlap: bool = False
    """Decoding runs beside the network and not after it, so both workspaces are held at once."""
    text_encoder: Literal["cpu", "gpu", "none"] = "cpu"
    """Where UMT5-XXL (bfloat16) stays; none: the model has another, small one."""

    def __post_init__(self) -> None:
        for name in ("chunk", "batch", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.window is not None and self.window < self.chunk:
            raise ValueError(f"window must hold the chunk's {self.chunk} frames, got {self.window}")
        if self.frames is None and self.window is None:
            raise ValueError("an endless clip needs a window, got neither frames nor window")
        if self.frames is not None and (self.frames < self.chunk or self.frames % self.chunk):
            raise ValueError(f"frames must be a multiple of the chunk's {self.chunk}, got {self.frames} latent frames")
        if self.latent.height % self.model.patch or self.latent.width % self.model.patch:
            raise ValueError(
                f"latents must have sides that the patch of {self.model.patch} divides, "
                f"got {self.latent.height}x{self.latent.width}"
            )
        if self.model.heads % self.gpus or self.tokens % self.gpus:
            raise ValueError(
                f"gpus must divide the {self.model.heads} heads and the {self.tokens} tokens of a latent frame, "
                f"got {self.gpus}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of one latent frame."""
        return self.latent.height * self.latent.width // self.model.patch**2

    @property
    def rows(self) -> int:
        """Rows of a call."""
        return self.batch * (2 if self.guided else 1)

    @property
    def chunks(self) -> int:
        """Chunks of the clip; where it does not end, as many as it takes until nothing changes any more."""
        enough = (self.window or 0) // self.chunk + 4
        count = enough if self.frames is None else self.frames // self.chunk
        return count if self.window is None else min(count, enough)

    @property
    def fresh(self) -> int:
        """Latent frames of the largest call."""
        return self.chunk * (2 if self.fused and self.chunks > 1 else 1)

    @property
    def kept(self) -> int:
        """Latent frames in the cache during the last call."""
        committed = self.chunks * self.chunk - self.fresh
        return committed if self.window is None else min(committed, self.window)


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device."""

    weights: int
    """The network."""
    cache: int
    """Keys and values of committed frames, when they are most."""
    fresh: int
    """Keys and values of the call under way, which the cache holds until it commits them."""
    text_keys: int
    """Keys and values of the prompt, for every block."""
    activations: int
    """The rest of what a call holds at its widest point."""
    tables: int
    """Rotary tables that stay for calls at the same positions."""
    decoder_weights: int
    """The codec, its encoder included."""
    decoder_state: int
    """What a decode stream remembers between calls."""
    decoder_workspace: int
    """The rest of what decoding one chunk holds at its widest point, its pixels included."""
    text_encoder: int
    """UMT5-XXL, if it stays on the GPU."""
    libraries: int
    """cuBLAS's workspace."""
    overlap: bool
    """See Request."""
    recorded: bool = False
    """Calls are recorded: what they work in stays with the recordings, where torch does not count it as tensors."""

    @property
    def peak(self) -> int:
        """Most bytes held at once while a stream runs: what must be free."""
        passing = (self.activations, self.decoder_workspace)
        return self._standing + (sum(passing) if self.overlap else max(passing))

    @property
    def tensors(self) -> int:
        """`peak` as `torch.cuda.max_memory_allocated` counts: recorded calls only while they are being recorded, the
        decoder's first, before there is a cache."""
        if not self.recorded:
            return self.peak
        decoder = self.decoder_weights + self.decoder_state + self.decoder_workspace
        return max(self._standing + self.activations, self.weights + self.text_encoder + self.libraries + decoder)

    @property
    def _standing(self) -> int:
        return sum(size for _, size in self.parts()) - self.activations - self.decoder_workspace

    def parts(self) -> list[tuple[str, int]]:
        """Name and bytes of every part."""
        return [(f.name, getattr(self, f.name)) for f in fields(self) if f.name not in ("overlap", "recorded")]


def estimate(request: Request) -> Estimate:
    """Every part of the memory of `request`, on the first GPU."""
    decoder_weights, decoder_state, decoder_workspace = decoder_bytes(request)
    return Estimate(
        weights=weight_bytes(request.model, request.dtype),
        cache=cache_bytes(request, request.kept),
        fresh=cache_bytes(request, request.fresh),
        text_keys=text_bytes(request),
        activations=activation_bytes(request),
        tables=table_bytes(request),
        decoder_weights=decoder_weights,
        decoder_state=decoder_state,
        decoder_workspace=decoder_workspace,
        text_encoder=umt5_bytes() if request.text_encoder == "gpu" else 0,
        libraries=CUBLAS_WORKSPACE,
        overlap=request.overlap,
    )


@lru_cache(maxsize=64)
def weight_bytes(model: ModelConfig, dtype: str = "bfloat16") -> int:
    """The network's parameters; every GPU holds all of them."""
    with torch.device("meta"):
        net = DiT(model)
    wide = DTYPES[dtype].itemsize

    def width(name: str, parameter: Tensor) -> int:
        return 1 if dtype.startswith("fp8") and name.startswith("blocks.") and parameter.ndim == 2 else wide

    return sum(parameter.numel() * width(name, parameter) for name, parameter in net.named_parameters())


def cache_bytes(request: Request, frames: int) -> int:
    """Keys and values of so many latent frames, in all blocks, of this GPU's heads."""
    model = request.model
    each = request.rows * frames * request.tokens * model.dim // request.gpus
    return 2 * model.layers * each * DTYPES[request.dtype].itemsize


def replace_layers(request: Request, layers: int) -> Request:
    """The same request of a network with so many blocks."""
    return replace(request, model=replace(request.model, layers=layers))


def text_bytes(request: Request) -> int:
    """Text keys and values of all heads, in all blocks."""
    model = request.model
    return 2 * model.layers * request.rows * model.text_length * model.dim * DTYPES[request.dtype].itemsize


def activation_bytes(request: Request) -> int:
    """What a rollout holds at its widest point, beside weights, text keys, cache and fresh keys.

    From rollouts of networks with few blocks: what is held in the calls grows by the same with every further block, and
    so does what is held while a chunk is committed, which is more keys and no activations.
    """
    few, fewer = (_rollout_peaks(replace_layers(request, n)) for n in (FEW, FEW - 1))
    further = request.model.layers - FEW
    peak = max(at + further * (at - before) for at, before in zip(few, fewer, strict=True))
    return peak - cache_bytes(request, request.kept) - cache_bytes(request, request.fresh)


@lru_cache(maxsize=64)
def _rollout_peaks(request: Request) -> tuple[int, int]:
    """Most bytes that the last chunks of a clip hold in their calls, and while they are committed.

    Weights and text keys are not in it.
    """
    dtype, model, chunk = DTYPES[request.dtype], request.model, request.chunk
    with torch.device("meta"):
        net = DiTDenoiser(model, context=Context(window=request.window), backend=BACKEND).to(dtype)
        keys = torch.empty(request.rows, model.text_length, model.heads, model.dim // model.heads, dtype=dtype)
        text = torch.empty(request.rows, 1, model.text_dim)
        told = Conditioning(text, TextKeys(text, [(keys, keys)] * model.layers))
    net.requires_grad_(False).model.exchange = PretendExchange(request.gpus) if request.gpus > 1 else None
    done = max(0, request.chunks - 3)  # finished chunks; the last of them is yet to be committed
    plan = chunked([chunk] * request.chunks, (1.0, 0.5))
    plan = fuse(plan) if request.fused else plan
    late = list(dropwhile(lambda call: done and (call.start < (done - 1) * chunk or not call.commit), plan))
    sides = request.latent.height // model.patch, request.latent.width // model.patch
    for call in late:  # tables stay in a cache of their own and are counted apart
        rope_table(_positions(call), *sides, model.dim // model.heads, torch.device("meta"))
    with outlined() as held:
        noise, cache = Nothing(request.rows, request.latent), _WatchedCache(model.layers, net.context, held)
        if done > 1:
            _fill(cache, request, done - 1)
        given = noise.initial(0, done * chunk) if done else None
        for _ in rollout(net, late, conditioning=told, noise=noise, cache=cache, prefix=given):
            pass
    return max(cache.in_calls, held.peak), cache.in_commits


def table_bytes(request: Request) -> int:
    """Rotary tables, float32, for every set of positions that calls have, as many as their cache keeps."""
    model = request.model
    plan = chunked([request.chunk] * request.chunks, (1.0, 0.5))
    each = [len(found) for found in {_positions(call) for call in (fuse(plan) if request.fused else plan)}]
    room = rope_table.cache_parameters()["maxsize"]
    if request.frames is None:
        each = [max(each), request.chunk] * room
    return sum(each[:room]) * request.tokens * (model.dim // model.heads) * 4


def _positions(call: Call) -> tuple[int, ...]:
    return tuple(range(call.start, call.start + call.frames))


class _WatchedCache(KVCache):
    """A cache that notes the most bytes held between commits and in them."""

    def __init__(self, layers: int, context: Context, held: Held) -> None:
        super().__init__(layers, context)
        self.held, self.in_calls, self.in_commits = held, 0, 0

    def commit(self, frames: int) -> None:
        self.in_calls = max(self.in_calls, self.held.peak)
        self.held.peak = self.held.now
        super().commit(frames)
        self.in_commits = max(self.in_commits, self.held.peak)
        self.held.peak = self.held.now


def _fill(cache: KVCache, request: Request, chunks: int) -> None:
    """Put the committed frames of so many chunks into an empty cache, as far as its window keeps them."""
    model, end = request.model, chunks * request.chunk
    kept = frames_of([request.chunk] * chunks)[max(0, end - (request.window or end)) :]
    shape = (request.rows, len(kept) * request.tokens, model.heads // request.gpus, model.dim // model.heads)
    cache.frames = kept
    for held in (cache.keys, cache.values):
        held[:] = [torch.empty(shape, dtype=DTYPES[request.dtype], device="meta") for _ in held]


class Nothing:
    """Noise without numbers."""

    def __init__(self, rows: int, latent: LatentSpec) -> None:
        self.shape, self.rows = latent.shape, rows

    def initial(self, start: int, frames: int) -> Tensor:
        return torch.empty(self.rows, frames, *self.shape, device="meta")

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        return self.initial(start, frames)


class PretendExchange:
    """Implements `nn.dit.TokenExchange` with the tensors of `parallel.ulysses.Ulysses` and no other processes."""

    def __init__(self, size: int) -> None:
        self.size = size

    def split(self, y: Tensor) -> Tensor:
        return y.unflatten(2, (self.size, -1))[:, :, 0]

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        sent = q.new_empty(3, q.numel())
        got = torch.empty_like(sent)
        batch, length, heads, width = q.shape
        shape = (batch, length * self.size, heads // self.size, width)
        q, k, v = (part.clone().view(shape) for part in got)
        del sent, got
        return q, k, v

    def to_tokens(self, x: Tensor, frames: int) -> Tensor:
        batch, length, heads, width = x.shape
        sent = x.clone()
        got = torch.empty_like(sent)
        return got.clone().view(batch, length // self.size, heads * self.size, width)

    def join(self, y: Tensor) -> Tensor:
        parts = y.new_empty(self.size, *y.shape)
        return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


# ---- what is not the network -----------------------------------------------------------------------------------------


def decoder_bytes(request: Request) -> tuple[int, int, int]:
    """Weights, state between calls, and the rest at the widest point of decoding a chunk with its pixels."""
    if request.decoder == "none":
        return 0, 0, 0
    shape = (request.batch, request.chunk, *request.latent.shape)
    return _decoder_bytes(request.decoder, DTYPES[request.decoder_dtype], shape)


@lru_cache(maxsize=64)
def _decoder_bytes(decoder: str | VAEConfig, dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[int, int, int]:
    codec = codec_of(decoder).to(dtype).requires_grad_(False)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in (*codec.parameters(), *codec.buffers()))
    for module in codec.modules():
        if isinstance(module, ChannelNorm):
            module.forward = lambda x: torch.empty_like(
                x
            )  # as the fused kernel holds it; the meta device takes it apart
    with outlined() as held:
        stream, state, peak = codec.stream(), 0, 0
        for _ in range(3):  # the first call is another one than the later ones
            held.peak = held.now
            pixels = stream(torch.empty(shape, device="meta"))
            peak = max(peak, held.peak)
            del pixels
            state = max(state, held.now)
    return weights, state, peak - state


def codec_of(decoder: str | VAEConfig) -> CausalVAE:
    """The codec on the meta device, where it is called under it."""
    with torch.device("meta"):
        if isinstance(decoder, VAEConfig):
            return CausalVAE(decoder)
        if decoder == "wan":
            return CausalVAE(vae_config("wan2.1"))
        if decoder == "taehv":
            return _taehv()
    raise ValueError(f"decoder must be wan, taehv or none, got {decoder!r}")


def _taehv() -> Any:
    """The tiny decoder, which has the methods of the causal VAE that are needed here."""
    try:
        module = importlib.import_module("causalreel.codecs.taehv")
    except ImportError:
        raise ValueError("decoder 'taehv' is not part of this installation; use wan or none") from None
    return module.TAEHV()


def umt5_bytes() -> int:
    """UMT5-XXL's encoder in bfloat16."""
    n = UMT5_XXL
    block = 4 * n["width"] ** 2 + 3 * n["width"] * n["hidden"] + n["buckets"] * n["heads"] + 2 * n["width"]
    return 2 * (n["vocabulary"] * n["width"] + n["layers"] * block + n["width"])


def table(found: Estimate) -> str:
    """The parts, one a line in GiB, the peak, and how much of it torch counts where that is less."""
    rows = [(name.replace("_", " "), size) for name, size in found.parts() if size] + [("peak", found.peak)]
    if found.tensors != found.peak:
        rows.append(("of it in tensors", found.tensors))
    note = "" if found.overlap or not found.decoder_workspace else "\n(activations and decoder workspace share memory)"
    return "\n".join(f"{name:18}{size / GIB:9.3f} GiB" for name, size in rows) + note
