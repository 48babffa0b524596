"""How much memory of a GPU a request takes: arithmetic over sizes, before anything is loaded.

What stays is counted: weights, caches, text keys, tables. What passes is the widest moment of the code, counted in
tensors of one shape: for the network `unit`, a token's width for every token of a call; for a decoder one activation at
full resolution. Every such count stands beside the names of the tensors that are alive at that moment, and the tests
compare it with what torch's allocator records. What torch keeps in reserve beyond all this is a margin, measured.

R rows, S tokens of a latent frame, E width of the network, H width of its feed-forward; bytes throughout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from causalreel.codecs.kinds import kind_of
from causalreel.codecs.wan_vae import vae_config
from causalreel.nn.attention import LONG_TOKENS
from causalreel.nn.caches import static_kind
from causalreel.nn.camera import POSE_NUMBERS
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.window import Context
from causalreel.nn.presets import ModelConfig
from causalreel.nn.rope import rope_table
from causalreel.nn.split_attention import parts_of
from causalreel.text.umt5 import UMT5Sizes
from causalreel.types import LatentSpec

GIB = 2**30
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""
CUBLAS_WORKSPACE = 32 * 2**20
"""What torch gives cuBLAS for each stream on a GPU of compute capability 9 (default of CUBLAS_WORKSPACE_CONFIG)."""
PROCESSORS = 132
"""Of the GPU that attention is cut for (H100, H200)."""
MARGINS = {"bf16": (0.02, 0.19), "fp8-attention": (0.07, 0.32)}
"""Form -> two shares, measured on an H200 (docs/memory.md): tensors that nothing here counts (kernels' scratch,
workspaces of libraries), of those that are; and what torch holds beyond all parts (fragments, recordings' pools), of
them. eager takes those of bf16, fp8 those of fp8-attention."""
LARGEST = 10**6
"""Of every size that can be asked for: far beyond any GPU."""

Form = Literal["eager", "bf16", "fp8", "fp8-attention"]
Part = tuple[str, int, str]
"""Name, bytes, what it is."""


@dataclass(frozen=True)
class MemoryRequest:
    """What memory depends on. ValueError for what cannot be."""

    model: ModelConfig
    """The network."""
    latent: LatentSpec
    """Shape of one latent frame."""
    chunk: int | None = 3
    """Latent frames made together; None: the whole clip at once, without a cache."""
    context: ContextPolicy = Context()
    """What a chunk sees."""
    frames: int | None = 21
    """Latent frames of a clip; None: endless, which needs a window."""
    steps: int = 4
    """Denoising steps of a chunk."""
    joint: int = 1
    """Chunks that are denoised together: as many as steps in a rolling plan."""
    batch: int = 1
    """Clips made together."""
    guided: bool = False
    """Classifier-free guidance: two rows for each clip."""
    form: Form = "bf16"
    """eager: the plain network and decoder; bf16: fused kernels, recorded calls, a fast decoder; fp8: and products in
    e4m3; fp8-attention: and attention and its cache in e4m3."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of weights, cache and arithmetic, where it is not e4m3."""
    gpus: int = 1
    """GPUs that share the stream; the estimate is for the first, which decodes."""
    decoder: Any | None = field(default_factory=lambda: vae_config("wan2.1"))
    """Sizes of the codec that makes pixels, of any kind (`codecs.kinds`); None: another device does."""
    decoders: tuple[tuple[str, Any], ...] = field(default=(), compare=False)
    """What else could make them: its name, and its sizes."""
    text_encoder: Literal["cpu", "gpu", "none"] = "cpu"
    """Where the text encoder stays; none: the model has one without weights."""
    text_encoder_bytes: int = UMT5Sizes().bytes
    """Of its weights."""

    def __post_init__(self) -> None:
        latent, window = self.latent, self.context.most_seen(self.chunk or 1)
        sizes = {"chunk": self.chunk, "window": window, "latent frames": self.frames, "steps": self.steps}
        sizes |= {"batch": self.batch, "gpus": self.gpus, "latent height": latent.height, "latent width": latent.width}
        for name, size in sizes.items():
            if size is not None and not 1 <= size <= LARGEST:
                raise ValueError(f"{name} must be from 1 to {LARGEST}, got {size}")
        if self.form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}, got {self.form!r}")
        if self.dtype not in WIDTHS:
            raise ValueError(f"dtype must be one of {', '.join(WIDTHS)}, got {self.dtype!r}")
        if self.decoder is not None:
            kind_of(self.decoder)
        if self.chunk is None and (window is not None or self.frames is None):
            raise ValueError("a model that makes whole clips has no window and no endless clips")
        if self.frames is None and window is None:
            raise ValueError("an endless clip needs a window, got neither frames nor window")
        if self.chunk is not None:
            self.context.check(self.chunk)
            if self.frames is not None and self.frames % self.chunk:
                raise ValueError(
                    f"frames must be a multiple of the chunk's {self.chunk}, got {self.frames} latent frames"
                )
        if latent.height % self.model.patch or latent.width % self.model.patch:
            raise ValueError(
                f"latents must have sides that the patch of {self.model.patch} divides, "
                f"got {latent.height}x{latent.width}"
            )
        if self.model.heads % self.gpus or self.tokens % self.gpus:
            raise ValueError(
                f"gpus must divide the {self.model.heads} heads and the {self.tokens} tokens of a latent frame, "
                f"got {self.gpus}"
            )

    @property
    def tokens(self) -> int:
        """Tokens of one latent frame (S)."""
        return self.latent.height * self.latent.width // self.model.patch**2

    @property
    def rows(self) -> int:
        """Rows of a call (R)."""
        return self.batch * (2 if self.guided else 1)

    @property
    def window(self) -> int:
        """Latent frames that the last chunk sees, its own included."""
        return self.context.span(self.frames, self.chunk or 1) or 0

    @property
    def fresh(self) -> int:
        """Latent frames of the largest call: two chunks, because a commit travels with the next chunk's first step, for
        which policies that look at what frames hold do not wait; or all that a rolling plan denoises together."""
        is_fused = self.chunk is not None and self.frames != self.chunk
        together = max(1 if self.context.selects else 2, self.joint) * (self.chunk or 0)
        return min(together, self.frames or together) if is_fused else self.chunk or self.window

    @property
    def kept(self) -> int:
        """Latent frames in a growing cache during that call."""
        held = self.context.most_held(self.chunk or 1) or self.window
        return held if self.frames is None else min(self.frames - self.fresh, held)

    @property
    def read(self) -> int:
        """Latent frames that it sees, its own included."""
        return min(self.kept + self.fresh, self.window + (self.chunk or 0))

    @property
    def mask_rows(self) -> int:
        """Queries of its mask where attention gets one as a tensor: in short calls of two chunks, eagerly."""
        queries = self.fresh * self.tokens
        is_dense = self.form == "eager" and self.chunk not in (None, self.fresh) and queries < LONG_TOKENS
        return queries if is_dense else 0

    @property
    def places(self) -> int | None:
        """Latent frames in a cache of fixed size; None where the cache grows, and calls are not recorded."""
        if self.form == "eager" or self.chunk is None:
            return None
        frames = None if self.frames is not None and self.frames > self.window else self.frames
        kind = static_kind(self.context, self.chunk, frames, packed=self.form == "fp8-attention")
        return None if kind is None else kind.places(self.context, self.chunk, frames)

    @property
    def gathers(self) -> int:
        """Chunks of a call that gather what they read of a cache of fixed size; those denoised together are one."""
        if self.chunk is None or self.context.is_absolute or self.context.selects:
            return 0
        return 1 if self.joint > 1 else self.fresh // self.chunk

    @property
    def width(self) -> int:
        """Bytes of a number."""
        return WIDTHS[self.dtype]

    @property
    def narrow(self) -> int:
        """Bytes of a number that goes into a product."""
        return 1 if self.form.startswith("fp8") else self.width

    @property
    def unit(self) -> int:
        """One activation of a call: E numbers for each of this GPU's tokens."""
        return self.rows * self.fresh * self.tokens * self.model.dim * self.width // self.gpus


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    parts: tuple[Part, ...]
    """All that is held while a stream runs; the network and the decoder work beside each other."""
    loading: int
    """What is held while the model is loaded, before the stream runs."""
    margins: Literal["bf16", "fp8-attention"]
    """The form whose measured margins hold, a key of MARGINS."""
    is_recorded: bool
    """Calls are recorded: what they work in stays with the recordings."""

    def __getitem__(self, name: str) -> int:
        return next(size for part, size, _ in self.parts if part == name)

    @property
    def least(self) -> int:
        """What must be free at the very least: no part can be given back while the stream runs."""
        return max(self._total, self.loading)

    @property
    def needed(self) -> int:
        """What torch will hold, its reserve included."""
        return max(round(self._total * (1 + MARGINS[self.margins][1])), self.loading)

    @property
    def tensors(self) -> int:
        """What `torch.cuda.max_memory_allocated` will say. Network and decoder take turns at allocating; when calls are
        recorded each does so once, the decoder before there is a cache."""
        network, decoder = self["activations"], self["decoder workspace"]
        if self.is_recorded:
            later = network + self["cache"] + self["text keys"] + self["tables"] + self["recordings"]
            held = self._total - min(decoder, later)
        else:
            held = self._total - min(network, decoder)
        return round(held * (1 + MARGINS[self.margins][0]))

    @property
    def _total(self) -> int:
        return sum(size for _, size, _ in self.parts)

    def table(self) -> str:
        """Lines for a terminal: every part in GiB and what it is, then what they come to."""
        rows = [part for part in self.parts if part[1]]
        if self.loading > self._total:
            rows.append(("loading", self.loading - self._total, "more than that, while weights are converted"))
        share = MARGINS[self.margins][1]
        rows.append(("margin", self.needed - self.least, f"torch's reserve, {share:.0%} as measured in {self.margins}"))
        rows.append(("needed", self.needed, "all of the above: what should be free"))
        rows.append(("in tensors", self.tensors, "of it, as torch.cuda.max_memory_allocated counts"))
        return "\n".join(f"{name:18}{size / GIB:9.3f} GiB  {what}" for name, size, what in rows)


def estimate(request: MemoryRequest) -> MemoryEstimate:
    """Every part of the memory of `request`, on the first GPU."""
    weights = weight_bytes(request.model, request.dtype, request.form)
    original = weight_bytes(request.model, request.dtype) if request.narrow < request.width else 0
    return MemoryEstimate(
        (*_network_parts(request, weights), *_decoder_parts(request)),
        loading=original + weights,
        margins="fp8-attention" if request.narrow < request.width else "bf16",
        is_recorded=request.places is not None,
    )


# ----------------------------------------------------------------------------------------------------------- network


def _network_parts(request: MemoryRequest, weights: int) -> Iterator[Part]:
    model, places = request.model, request.places
    kind = f"{request.dtype}, and e4m3 in the blocks" if request.narrow < request.width else request.dtype
    yield "weights", weights, f"the network's parameters, {kind}"
    if places is not None:
        held = cache_bytes(request, places, packed=request.form == "fp8-attention")
        turned = held // 2 if request.context.selects else 0
        twice = "; keys twice, as stored and as read" if turned else ""
        yield "cache", held + turned, f"keys and values of {places} latent frames, {model.layers} blocks{twice}"
    elif request.chunk is not None:
        held = cache_bytes(request, request.kept) + cache_bytes(request, request.fresh)
        turned = cache_bytes(request, request.kept) // 2 if request.context.selects else 0
        twice = "; the finished ones' keys twice, as stored and as read" if turned else ""
        what = f"keys and values of {request.kept} finished latent frames and {request.fresh} in work{twice}"
        yield "cache", held + turned, what
    else:
        yield "cache", 0, "none: the clip is made at once"
    copies = 1 if places is None else 2
    twice = "" if places is None else ", twice: as given, and for recordings"
    yield "text keys", copies * text_bytes(request), f"keys and values of the prompt in every block{twice}"
    yield "activations", activation_bytes(request), f"the rest of a call of {request.fresh} latent frames at its widest"
    yield "tables", table_bytes(request), "rotary positions and attention masks that are kept"
    yield "recordings", recording_bytes(request), "inputs and results of recorded calls"
    if request.text_encoder == "gpu":
        yield "text encoder", request.text_encoder_bytes, "the text encoder's weights"
    streams = 1 if request.form == "eager" else 3  # chunks are made in one, recorded in another, pixels in a third
    yield "libraries", streams * CUBLAS_WORKSPACE, "cuBLAS's workspaces"


def weight_bytes(model: ModelConfig, dtype: str = "bfloat16", form: Form = "eager") -> int:
    """The network's parameters; every GPU holds all of them. fp8: a byte for each of a block's weights."""
    dim, hidden, patch = model.dim, model.ffn_dim, model.patch**2 * model.channels
    products = 8 * dim**2 + 2 * dim * hidden  # two attentions of q, k, v, o; feed-forward up and down
    rest = 9 * dim + hidden + 4 * dim + 2 * dim + 6 * dim  # biases, RMS norms, LayerNorm, modulation
    embeddings = patch * dim + (model.text_dim + dim) * dim + (model.freq_dim + dim) * dim + 6 * dim**2
    ends = embeddings + 5 * dim + 6 * dim + dim * patch + patch + 2 * dim  # their biases; head and its modulation
    if model.camera == "prope":
        products, rest = products + dim**2, rest + dim  # what the heads that see through cameras come to
    told = [POSE_NUMBERS] if model.camera == "embedded" else []
    ends += sum((given + dim + 2) * dim for given in [*told, *([model.actions] if model.actions else [])])
    width = WIDTHS[dtype]
    return model.layers * (products * (1 if form.startswith("fp8") else width) + rest * width) + ends * width


def cache_bytes(request: MemoryRequest, frames: int, *, packed: bool = False) -> int:
    """Keys and values of so many latent frames in all blocks, of this GPU's heads; packed: in e4m3, values as columns
    in blocks of 128."""
    rows = frames * request.tokens
    both, width = (rows + -(-rows // 128) * 128, 1) if packed else (2 * rows, request.width)
    width *= request.model.attention_heads // request.model.heads  # a head that sees through cameras beside each
    return request.model.layers * request.rows * both * request.model.dim // request.gpus * width


def text_bytes(request: MemoryRequest) -> int:
    """Text keys and values of all heads, in all blocks."""
    model = request.model
    return 2 * model.layers * request.rows * model.text_length * model.dim * request.width


def activation_bytes(request: MemoryRequest) -> int:
    """What a call holds at its widest moment, beside weights, text keys, and keys and values that the cache holds."""
    if request.chunk is None:
        lent = 2 * request.unit  # the call's own keys and values
    elif request.places is None and request.kept:
        lent = cache_bytes(request, request.read) // request.model.layers  # one block's, gathered for its attention
    else:
        lent = 0  # they are in the cache
    call = _eager_call(request, lent) if request.form == "eager" else lent + _fast_call(request)
    if request.context.selects and request.places is None:  # gathered anew; the keys as they were read are gone by then
        return max(call, cache_bytes(request, request.kept) // 2)
    if request.context.selects:  # block by block: what is there, what stays, and its keys in float32 to be judged
        return max(call, 4 * cache_bytes(request, request.places or 0) // request.model.layers)
    return call


def _eager_call(request: MemoryRequest, lent: int) -> int:
    """`nn.dit.Block`, or the commit behind it."""
    unit = request.unit
    hidden = unit * request.model.ffn_dim // request.model.dim
    ffn = 6 * unit + 2 * hidden  # y, attended, x, text query, what it read, modulated x; product, its GELU
    mask = request.mask_rows * request.read * request.tokens * (request.width + 1)  # as what is added, and its negation
    attention = lent + 3 * unit + mask + (9 * unit if request.gpus > 1 else 0)  # y, q, result; q, k, v exchanged
    commit = 0
    if request.chunk is not None:  # what is made permanent is copied, and the call's own is held till the end
        is_bounded = request.context.most_seen(request.chunk) is not None
        stays = not is_bounded or request.kept + request.chunk <= request.window
        commit = cache_bytes(request, request.chunk) if stays else lent
    return max(ffn, attention, commit)


def _fast_call(request: MemoryRequest) -> int:
    """`parallel.fast.FastDiT.evaluate`: its names stay bound from one block to the next."""
    model, wide, narrow = request.model, request.width, request.narrow
    tokens, dim = request.rows * request.fresh * request.tokens // request.gpus, model.dim
    between = dim * (3 * wide + 3 * narrow)  # y, branch, q; z, attended, read, which go into products
    new = wide + (narrow if narrow < wide else 0)  # a product, and its e4m3 form
    ffn = model.ffn_dim * (new + narrow)  # and the one of the block before
    keys, heads = request.window * request.tokens, model.heads // request.gpus
    queries = {n * request.tokens for n in (request.chunk or request.fresh, request.fresh)}
    parts = max(parts_of(n, heads, keys, PROCESSORS) for n in queries)  # of the keys, each with queries of its own
    copies = 1 if request.form == "fp8-attention" and request.places is not None else parts * wide
    attention = dim * (3 * wide + copies + parts * wide + narrow)  # qkv, queries, parts' results, what they come to
    gathered = 2 * request.gathers * request.rows * keys * dim * wide // request.gpus  # keys and values of each chunk
    return tokens * (between + max(ffn, model.ffn_dim * narrow + attention)) + gathered


def table_bytes(request: MemoryRequest) -> int:
    """Rotary tables, float32, one for every set of positions; and masks, a byte for each pair of tokens."""
    model, chunk, room = request.model, request.chunk or request.fresh, rope_table.cache_parameters()["maxsize"]
    chunks = room if request.frames is None else request.frames // chunk
    each = chunk + (request.fresh if request.fresh > chunk else 0)  # of a plain call and a fused one
    rotary = min(chunks, room // 2) * each * request.tokens * (model.dim // model.heads) * 4
    last = request.read // chunk  # fused calls read 2, 3 ... chunks, until the window is full
    return rotary + request.mask_rows * (last * (last + 1) // 2 - 1) * chunk * request.tokens


def recording_bytes(request: MemoryRequest) -> int:
    """What recordings of calls hold between them: latents in and out, modulation, rotation; modulations kept; and where
    positions move, once for all of them, which rows each chunk gathers and how their keys are rotated."""
    if request.places is None or request.chunk is None:
        return 0
    model, latent, kinds = request.model, request.latent, -(-request.window // request.chunk)  # until it is full
    levels = (model.layers * 6 + 2) * model.dim * 4  # of one frame
    rotation = request.tokens // request.gpus * (model.dim // model.heads) * 4
    ends = 2 * request.rows * latent.channels * latent.height * latent.width * 4
    frames = request.fresh + (request.chunk if request.steps > 1 else 0)  # of the kinds of call that a chunk has
    gathers = request.gathers * request.places * request.tokens * (8 + model.dim // model.heads * 4)
    return kinds * frames * (levels + rotation + ends) + (request.steps + 1) * request.fresh * levels + gathers


# ----------------------------------------------------------------------------------------------------------- decoder


def _decoder_parts(request: MemoryRequest) -> Iterator[Part]:
    weights = state = workspace = 0
    if request.decoder is not None:
        kind, is_fast, geometry = kind_of(request.decoder), request.form != "eager", request.decoder.geometry
        is_fast = is_fast and kind.program is not None
        frames = request.chunk or request.window
        frames = 1 if is_fast and not kind.joins else frames  # latent ones in a call
        takes = kind.memory(request.decoder, frames=frames, width=request.width, is_fast=is_fast)
        latents = request.batch * request.latent.height * request.latent.width
        weights, state, workspace = round(takes.weights), round(latents * takes.state), round(latents * takes.workspace)
        if is_fast:  # each recording keeps its result: a first latent's, one's, a chunk's; float32, three colours
            calls = geometry.first + geometry.temporal * (1 + (frames if frames > 1 else 0))
            workspace += 12 * latents * geometry.spatial**2 * calls
    yield "decoder weights", weights, "the codec, its encoder included, and its kernels rearranged where it is fast"
    yield "decoder state", state, "what a decode stream remembers between calls"
    yield "decoder workspace", workspace, "the rest of a call of the decoder at its widest"
