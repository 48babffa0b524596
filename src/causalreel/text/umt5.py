"""UMT5-XXL as Wan2.1's text encoder: cleaned prompt -> 512 embeddings, zero after the prompt's last token.

The network is the one of transformers; `weights.umt5_files` knows the names of foreign files, and puts a file, a
tokenizer and a cache together (`load_text_encoder`). Nothing is loaded before a prompt has to be encoded.

Two departures from released code, neither of which changes more than rounding. Each prompt is encoded by itself, so
that its embedding depends neither on a batch around it nor on what a cache holds already. And only the prompt's own
tokens go through the network: padded keys are masked and padded rows become zero, so they contribute nothing.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from causalreel.text.cache import PromptEntry, PromptKey
from causalreel.text.cleaning import clean

log = logging.getLogger(__name__)

LENGTH = 512
"""Tokens of Wan2.1's text input."""

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"  # noqa: RUF001
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"  # noqa: RUF001
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
"""What Wan2.1 and every stage of Causal Forcing guide away from."""

Offload = Literal["keep", "cpu", "release", "host"]

SPARE_BYTES = 256 * 2**20
"""Device memory left alone when it is judged whether the weights fit: library workspaces, fragments."""


@dataclass(frozen=True)
class Placement:
    """Where prompts are encoded and where the weights wait (11.4 GB in bfloat16 at full size)."""

    device: torch.device | str = "cpu"
    """Where embeddings are delivered, and where they are computed if the weights fit."""
    offload: Offload = "cpu"
    """After encoding: `keep` leaves the weights on the device, `cpu` frees the device's copy, `release` forgets them
    everywhere; `host` computes on the CPU always. With `cpu` and `release` a device without room is not an error: that
    encoding happens on the CPU, which is logged."""
    dtype: torch.dtype = torch.bfloat16
    """Of weights, computation and embeddings: bfloat16, or float32 with twice the memory."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "device", torch.device(self.device))
        if self.offload not in get_args(Offload):
            raise ValueError(f"offload must be one of {', '.join(get_args(Offload))}; got {self.offload!r}")
        if self.dtype not in (torch.bfloat16, torch.float32):
            raise ValueError(f"dtype must be bfloat16 or float32 (float16 overflows in this network), got {self.dtype}")


@dataclass(frozen=True)
class UMT5Sizes:
    """Sizes of the encoder; the defaults are those of UMT5-XXL."""

    vocab: int = 256384
    dim: int = 4096
    attention_dim: int = 4096
    ffn_dim: int = 10240
    heads: int = 64
    layers: int = 24
    buckets: int = 32
    """Of relative positions; each layer has a table of its own."""
    max_distance: int = 128
    """Beyond it all distances share the last bucket."""

    @property
    def bytes(self) -> int:
        """Of the encoder in bfloat16."""
        block = 4 * self.dim * self.attention_dim + 3 * self.dim * self.ffn_dim
        block += self.buckets * self.heads + 2 * self.dim  # positions, norms
        return 2 * (self.vocab * self.dim + self.layers * block + self.dim)


def build(sizes: UMT5Sizes = UMT5Sizes()) -> nn.Module:
    """The network without storage (on the meta device), in evaluation mode; to be filled by assignment.

    Attention is transformers' eager one: scores are rounded to the dtype before softmax as in released code.
    """
    transformers = import_transformers()
    config = transformers.UMT5Config(
        vocab_size=sizes.vocab,
        d_model=sizes.dim,
        d_kv=sizes.attention_dim // sizes.heads,
        d_ff=sizes.ffn_dim,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        relative_attention_num_buckets=sizes.buckets,
        relative_attention_max_distance=sizes.max_distance,
        layer_norm_epsilon=1e-6,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        attn_implementation="eager",
    )
    with torch.device("meta"):
        return transformers.UMT5EncoderModel(config).requires_grad_(False).eval()


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give the network these tensors under its own names, without a copy; the embedding stays one tensor."""
    tied = dict(tensors)
    tied.setdefault("encoder.embed_tokens.weight", tied["shared.weight"])
    model.load_state_dict(tied, strict=True, assign=True)
    model.set_input_embeddings(model.get_input_embeddings())  # type: ignore[operator] - methods of transformers
    model.requires_grad_(False)


@dataclass(frozen=True)
class Tokens:
    """ids: a prompt's tokens, end token included, at most `length`; total: how many it had before truncation."""

    ids: tuple[int, ...]
    total: int


class Tokenizer:
    """A tokenizer folder (layout of google/umt5-xxl), read at the first prompt.

    Its `tokenizer.json` is followed to the letter. transformers 5's AutoTokenizer would, by the class name in the
    configuration beside it, build T5's stock pipeline around the vocabulary and lose what differs from that: the
    file's own normaliser, and bytes for characters outside the vocabulary. `spiece.model` alone ends the same way, so
    it is not enough.
    """

    def __init__(self, folder: str | Path, length: int = LENGTH) -> None:
        self.folder, self.length = Path(folder), length
        self._found: Any = None

    def __call__(self, text: str) -> Tokens:
        """Cleaned text -> its tokens, cut to `length` with the end token last."""
        self._found = self._found or self._load()
        ids = self._found(text, truncation=True, max_length=self.length, add_special_tokens=True)["input_ids"]
        total = len(ids)
        if total == self.length:
            total = len(self._found(text, truncation=False, add_special_tokens=True, verbose=False)["input_ids"])
        return Tokens(tuple(ids), total)

    def _load(self) -> Any:
        transformers = import_transformers()
        if not (self.folder / "tokenizer.json").is_file():
            raise ValueError(f"no tokenizer in {self.folder}: expected a file tokenizer.json, as in google/umt5-xxl")
        try:
            found = transformers.PreTrainedTokenizerFast.from_pretrained(str(self.folder), local_files_only=True)
        except Exception as error:  # many types for a damaged file; all mean the same to the user
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"the tokenizer in {self.folder} cannot be read: {reason}") from error
        if len(found("", add_special_tokens=True)["input_ids"]) != 1:
            raise ValueError(f"the tokenizer in {self.folder} does not end prompts with one end token: it is not T5's")
        return found


class PromptStore(Protocol):
    """Where finished embeddings are kept; see `cache.PromptCache`."""

    def get(self, key: PromptKey) -> PromptEntry | None: ...

    def put(self, key: PromptKey, entry: PromptEntry) -> None: ...


class UMT5TextEncoder:
    """Implements `types.TextEncoder` for free text.

    load: gives the network on the CPU in the placement's dtype; called when a prompt misses the store, and not before.
    tokenize: cleaned text -> Tokens of at most `length`. store: finished embeddings, or None.
    negative_prompt: what `null` encodes, the released default unless given; "" is the plain unconditional input.
    One object may serve several threads.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        tokenize: Callable[[str], Tokens],
        *,
        length: int = LENGTH,
        width: int = UMT5Sizes.dim,
        placement: Placement = Placement(),
        negative_prompt: str = NEGATIVE_PROMPT,
        store: PromptStore | None = None,
    ) -> None:
        self.length, self.width, self.placement = length, width, placement
        self.negative_prompt = negative_prompt
        self._load, self._tokenize, self._store = load, tokenize, store
        self._model: nn.Module | None = None
        self._null: Tensor | None = None
        self._told: set[str] = set()
        self._lock = threading.RLock()

    @property
    def is_loaded(self) -> bool:
        """Whether the weights are in memory or mapped into it."""
        return self._model is not None

    def complete(
        self,
        prompt: str,
        seed: int,
        picture: Tensor | None = None,
        *,
        before: str | None = None,
        seen: Tensor | None = None,
    ) -> str:
        """The prompt unchanged: it is free text."""
        return prompt

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text (B,length,width) in the placement's dtype on its device, zero rows after the last token."""
        if isinstance(prompts, str):
            raise TypeError("prompts is one string, expected a sequence of strings")
        texts = [clean(prompt) for prompt in prompts]
        with self._lock:
            rows = self._rows(list(dict.fromkeys(texts)))
        text = torch.zeros(len(texts), self.length, self.width, dtype=self.placement.dtype)
        for row, key in zip(text, texts, strict=True):
            row[: len(rows[key])] = rows[key]
        return text.to(self.placement.device)

    def null(self, batch: int) -> Tensor:
        """The unconditional input (batch,length,width): the negative prompt's embedding, encoded once."""
        with self._lock:
            if self._null is None:
                self._null = self.encode([self.negative_prompt])
            return self._null.repeat(batch, 1, 1)

    def release(self) -> None:
        """Forget the weights; the next prompt that misses the store loads them again."""
        with self._lock:
            had_device = self._model is not None and next(self._model.parameters()).device.type == "cuda"
            self._model = None
            if had_device:
                torch.cuda.empty_cache()

    def _rows(self, texts: list[str]) -> dict[str, Tensor]:
        """Cleaned texts -> each one's embeddings (n,width) on the CPU, from the store or newly computed."""
        keys = {text: PromptKey(text, self.length, self.width, self.placement.dtype) for text in texts}
        found = {text: self._store.get(key) if self._store else None for text, key in keys.items()}
        tokens = {text: self._tokenize(text) for text, entry in found.items() if entry is None}
        for text, entry in found.items():
            self._tell_truncation(text, tokens[text].total if entry is None else entry.tokens)
        entries = {text: entry for text, entry in found.items() if entry is not None}
        if tokens:
            with self._network() as run:
                for text, told in tokens.items():
                    entries[text] = PromptEntry(run(told.ids).cpu(), told.total)
        for text in tokens:
            if self._store:
                self._store.put(keys[text], entries[text])
        return {text: entry.rows for text, entry in entries.items()}

    def _tell_truncation(self, text: str, total: int) -> None:
        if total > self.length and text not in self._told:
            self._told.add(text)
            beginning = text if len(text) <= 60 else f"{text[:60]}..."
            log.warning("prompt has %d tokens, only the first %d count: %r", total, self.length, beginning)

    @contextlib.contextmanager
    def _network(self) -> Iterator[Callable[[Sequence[int]], Tensor]]:
        """Token ids (n) -> embeddings (n,width), with the weights where the placement wants them, and put away after.

        A copy for the device exists inside this block only, whatever happens in it; the model itself stays where it is.
        """
        model = self._model = self._load() if self._model is None else self._model
        check_fits(model, self.width)
        device, offload = self._choose(model), self.placement.offload
        if offload == "keep" and device.type != "cpu":
            model.to(device)
        weights: dict[str, Tensor] = {}
        try:
            if next(model.parameters()).device.type != device.type:
                weights.update((name, value.to(device)) for name, value in model.named_parameters())
            yield lambda ids: embed(model, ids, device, weights)
        finally:
            had_copy = bool(weights)
            weights.clear()
            if offload == "release":
                self._model = None
            if had_copy and device.type == "cuda":
                torch.cuda.empty_cache()

    def _choose(self, model: nn.Module) -> torch.device:
        """The device to compute on: the placement's, or the CPU where that cannot hold or compute it."""
        device, offload = torch.device(self.placement.device), self.placement.offload
        if offload == "host":
            return torch.device("cpu")
        if device.type != "cuda" or next(model.parameters()).device.type == "cuda":
            return device
        obstacle = _obstacle(device, self.placement.dtype, needed_bytes(model, self.length))
        if obstacle is None:
            return device
        if offload == "keep":
            raise ValueError(
                f"{obstacle}; offload='cpu' encodes there only where there is room, offload='host' always on the CPU"
            )
        log.warning("%s: encoding on the CPU, which takes longer", obstacle)
        return torch.device("cpu")


def _obstacle(device: torch.device, dtype: torch.dtype, needed: int) -> str | None:
    """Why this CUDA device cannot encode, in words."""
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"the GPU {device} has no bfloat16, which the text encoder computes in"
    free = free_bytes(device)
    if needed <= free:
        return None
    return (
        f"the text encoder needs {needed / 2**30:.1f} GiB on {device} and {free / 2**30:.1f} GiB are free, "
        f"{(needed - free) / 2**30:.1f} GiB too little"
    )


def embed(
    model: nn.Module, ids: Sequence[int], device: torch.device, weights: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Token ids (n) -> embeddings (n,E). weights: used instead of the model's own where given, by name."""
    vocab = int(model.config.vocab_size)  # type: ignore[union-attr]
    if max(ids) >= vocab:
        raise ValueError(f"the tokenizer gave token {max(ids)}, the encoder knows {vocab}: they do not belong together")
    tokens = torch.tensor([ids], dtype=torch.long, device=device)  # (1,n)
    told = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with torch.no_grad():  # the embedding is one module under two names: tied once more, its weights would stay swapped
        found = functional_call(model, dict(weights or {}), (), told, tie_weights=False)
    return found.last_hidden_state[0]  # (1,n,E) -> (n,E)


def check_fits(model: nn.Module, width: int) -> None:
    """ValueError if the network's embeddings are of another width."""
    got = int(model.config.d_model)  # type: ignore[union-attr]
    if got != width:
        raise ValueError(f"the text encoder's embeddings have width {got}, expected {width}")


def needed_bytes(model: nn.Module, tokens: int) -> int:
    """Device memory that encoding one prompt of this many tokens takes: weights, the widest layer's results, spare."""
    config: Any = model.config
    weights = sum(value.numel() * value.element_size() for value in model.parameters())
    size = next(model.parameters()).element_size()
    linear = tokens * (4 * config.d_ff + 8 * config.d_model) * size
    attention = config.num_heads * tokens * tokens * (4 * size + 8)  # scores, bias, their sum, weights; positions
    return weights + linear + attention + SPARE_BYTES


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation on this CUDA device can have: the driver's free part and what PyTorch holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def import_transformers() -> Any:
    """The transformers package, or an ImportError that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("the UMT5 text encoder needs transformers: pip install 'causalreel[wan]'") from error
    return transformers
