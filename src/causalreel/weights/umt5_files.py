"""UMT5 encoders from files: Wan2.1's `models_t5_umt5-xxl-enc-bf16.pth`, or a folder or file in transformers' naming.

Files are mapped into memory and their tensors become the network's parameters as they are, so nothing is held twice:
in bfloat16 the weights on the CPU are the file itself, and the operating system may drop and read them again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from causalreel.foreign import TEXT_BYTES, number_of, read_json, shown
from causalreel.text.cache import PromptCache
from causalreel.text.umt5 import (
    LENGTH,
    NEGATIVE_PROMPT,
    Placement,
    Tokenizer,
    UMT5Sizes,
    UMT5TextEncoder,
    build,
    fill,
)
from causalreel.weights.files import read_index, read_tensors
from causalreel.weights.layouts import bare_names, guess_layout

OFFICIAL_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
"""Name of the weights in Wan2.1's own folders."""

TOKENIZER_FOLDERS = ("google/umt5-xxl", "tokenizer", "../tokenizer")
"""Where a tokenizer is looked for beside the weights: Wan2.1's own layout, then that of diffusers."""

BLOCK = {
    "norm1.weight": "layer.0.layer_norm.weight",
    "attn.q.weight": "layer.0.SelfAttention.q.weight",
    "attn.k.weight": "layer.0.SelfAttention.k.weight",
    "attn.v.weight": "layer.0.SelfAttention.v.weight",
    "attn.o.weight": "layer.0.SelfAttention.o.weight",
    "pos_embedding.embedding.weight": "layer.0.SelfAttention.relative_attention_bias.weight",
    "norm2.weight": "layer.1.layer_norm.weight",
    "ffn.gate.0.weight": "layer.1.DenseReluDense.wi_0.weight",
    "ffn.fc1.weight": "layer.1.DenseReluDense.wi_1.weight",
    "ffn.fc2.weight": "layer.1.DenseReluDense.wo.weight",
}
"""Inside a layer, Wan2.1's name -> transformers' name."""

OUTSIDE = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
"""Outside the layers; transformers knows the embedding a second time, as `encoder.embed_tokens.weight`."""

TIED = "encoder.embed_tokens.weight"

_TO_OFFICIAL_BLOCK = {theirs: ours for ours, theirs in BLOCK.items()}
_TO_OFFICIAL_OUTSIDE = {theirs: ours for ours, theirs in OUTSIDE.items()} | {TIED: "token_embedding.weight"}


def transformers_name(name: str) -> str:
    """Wan2.1's name -> transformers' name; ValueError for a name that the encoder does not have."""
    if found := _renamed(name, "blocks", "encoder.block", BLOCK, OUTSIDE):
        return found
    raise ValueError(f"'{shown(name)}' is no name of Wan2.1's text encoder")


def official_name(name: str) -> str:
    """transformers' name -> Wan2.1's name; ValueError for a name that the encoder does not have."""
    if found := _renamed(name, "encoder.block", "blocks", _TO_OFFICIAL_BLOCK, _TO_OFFICIAL_OUTSIDE):
        return found
    raise ValueError(f"'{shown(name)}' is no name of a UMT5 encoder in transformers")


def _renamed(name: str, block: str, new: str, inside: Mapping[str, str], outside: Mapping[str, str]) -> str | None:
    """A name by one layout in the other, where layers are called `new` and not `block`; None if it has none."""
    found = re.fullmatch(rf"{re.escape(block)}\.(\d+)\.(.+)", name)
    if found and found[2] in inside:
        return f"{new}.{found[1]}.{inside[found[2]]}"
    return outside.get(name)


def to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Wan2.1's names -> transformers' names, the tied embedding once."""
    return {transformers_name(name): value for name, value in tensors.items()}


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names -> Wan2.1's names; the embedding may come under either of its names, or equal under both."""
    both = [tensors[name] for name in ("shared.weight", TIED) if name in tensors]
    if len(both) == 2 and both[0] is not both[1] and not _same(*both):
        raise ValueError(f"shared.weight and {TIED} differ: in a UMT5 encoder they are one table")
    return {official_name(name): value for name, value in tensors.items()}


def read_umt5(path: str | Path) -> dict[str, Tensor]:
    """A file or folder of weights in either naming -> Wan2.1's names, mapped from disk where the format allows.

    Folders: Wan2.1's (with the official file), diffusers' (with `text_encoder`), or transformers' (one or several
    .safetensors files, the latter with their index).
    """
    files, tensors = weight_files(path), dict[str, Tensor]()
    for file in files:
        found = {name: value for name, value in read_tensors(file).items() if isinstance(value, Tensor)}
        for name, value in bare_names(found).items():
            if name in tensors:
                raise ValueError(f"{path}: {shown(name)} is in two of its files")
            tensors[name] = value
    tensors.pop("spiece_model", None)
    try:
        official = tensors if "token_embedding.weight" in tensors else to_official(tensors)
        sizes = sizes_of(official)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{path} is not a UMT5 encoder: {error}; the file looks like: {guess_layout(tensors)}"
        ) from None
    _check(official, sizes, source=str(path))
    return official


def weight_files(path: str | Path) -> list[Path]:
    """The files that hold the weights at `path`: itself, or those of a folder; missing ones are a ValueError."""
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"text encoder not found: {path}")
    if (path / OFFICIAL_FILE).is_file():
        return [path / OFFICIAL_FILE]
    if (path / "text_encoder").is_dir():
        return weight_files(path / "text_encoder")
    for index in sorted(path.glob("*.safetensors.index.json")):
        return list(read_index(index)[1].values())
    found = sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise ValueError(
            f"no text encoder in {path}: expected {OFFICIAL_FILE}, a folder text_encoder, one .safetensors file or "
            f"several with their index; it has {len(found)} .safetensors files and no index"
        )
    return found


def sizes_of(official: Mapping[str, Tensor], *, max_distance: int = UMT5Sizes.max_distance) -> UMT5Sizes:
    """Sizes from the shapes of Wan2.1-named tensors; max_distance is in no shape."""

    def sides(name: str) -> tuple[int, int]:
        shape = official[name].shape
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{name} has the shape {tuple(shape)}")
        return shape[0], shape[1]

    vocab, dim = sides("token_embedding.weight")
    buckets, heads = sides("blocks.0.pos_embedding.embedding.weight")
    return UMT5Sizes(
        vocab=vocab,
        dim=dim,
        attention_dim=sides("blocks.0.attn.q.weight")[0],
        ffn_dim=sides("blocks.0.ffn.fc1.weight")[0],
        heads=heads,
        layers=len({name.split(".")[1] for name in official if name.startswith("blocks.")}),
        buckets=buckets,
        max_distance=max_distance,
    )


def official_shapes(sizes: UMT5Sizes = UMT5Sizes()) -> dict[str, tuple[int, ...]]:
    """Every name of Wan2.1's text encoder file at these sizes, with its shape."""
    block = {
        "norm1": (sizes.dim,),
        **{f"attn.{part}": (sizes.attention_dim, sizes.dim) for part in "qkv"},
        "attn.o": (sizes.dim, sizes.attention_dim),
        "norm2": (sizes.dim,),
        "ffn.gate.0": (sizes.ffn_dim, sizes.dim),
        "ffn.fc1": (sizes.ffn_dim, sizes.dim),
        "ffn.fc2": (sizes.dim, sizes.ffn_dim),
        "pos_embedding.embedding": (sizes.buckets, sizes.heads),
    }
    shapes = {"token_embedding.weight": (sizes.vocab, sizes.dim), "norm.weight": (sizes.dim,)}
    for layer in range(sizes.layers):
        shapes |= {f"blocks.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def load_umt5(path: str | Path, *, dtype: torch.dtype = torch.bfloat16, max_distance: int | None = None) -> nn.Module:
    """A text encoder's weights as transformers' network on the CPU, in evaluation mode.

    max_distance: of relative positions; None is what the folder's config.json says, else UMT5-XXL's.
    Tensors that have the dtype already stay mapped from disk; others are converted one after another.
    """
    official = read_umt5(path)
    max_distance = stated_max_distance(path) if max_distance is None else max_distance
    model = build(sizes_of(official, max_distance=max_distance))
    fill(model, {transformers_name(name): official.pop(name).to(dtype) for name in list(official)})
    return model


def stated_max_distance(path: str | Path) -> int:
    """The reach of relative positions by a folder's config.json; ValueError if that tells another network.

    Everything else that it says is in the shapes, or fixed for UMT5. What lies beside a single file or Wan2.1's own is
    not the encoder's.
    """
    file = weight_files(path)[0]
    config = file.with_name("config.json")
    if Path(path).is_file() or file.name == OFFICIAL_FILE or not config.is_file():
        return UMT5Sizes.max_distance
    stated = read_json(config, most=TEXT_BYTES, what="config.json")
    fixed = {"model_type": "umt5", "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6}
    for name, value in fixed.items():
        if stated.get(name, value) != value:
            raise ValueError(f"{config}: {name} is {shown(stated[name])}, a UMT5 encoder has {value!r}")
    return number_of(stated, "relative_attention_max_distance", str(config)) or UMT5Sizes.max_distance


def load_text_encoder(
    weights: str | Path,
    tokenizer: str | Path | None = None,
    *,
    placement: Placement = Placement(),
    cache: str | Path | None = None,
    length: int = LENGTH,
    negative_prompt: str = NEGATIVE_PROMPT,
) -> UMT5TextEncoder:
    """A text encoder from its files, which are looked at now and loaded when the first prompt misses the cache.

    weights: see `read_umt5`. tokenizer: a folder, by default the one beside the weights. cache: folder for finished
    embeddings, or None for none.
    """
    sizes = sizes_of(read_umt5(weights))
    folder = find_tokenizer(weights) if tokenizer is None else Path(tokenizer)
    store = None if cache is None else PromptCache(cache, fingerprint(weights, folder))
    return UMT5TextEncoder(
        partial(load_umt5, weights, dtype=placement.dtype),
        Tokenizer(folder, length),
        length=length,
        width=sizes.dim,
        placement=placement,
        negative_prompt=negative_prompt,
        store=store,
    )


def find_tokenizer(weights: str | Path) -> Path:
    """The tokenizer folder that belongs to weights, by where it lies in released folders."""
    weights = Path(weights)
    beside = weights.parent if weights.is_file() else weights
    candidates = [beside / name for name in TOKENIZER_FOLDERS]
    found = next((folder for folder in candidates if folder.is_dir()), None)
    if found is None:
        raise ValueError(f"no tokenizer beside {weights}: looked for {', '.join(map(str, candidates))}")
    return found


def fingerprint(weights: str | Path, tokenizer: str | Path) -> str:
    """What tells text encoders apart without reading 11 GB: sizes and samples of the weights, the whole tokenizer.

    The last megabyte of a .pth file is among the samples: it holds the checksums of all tensors in it.
    """
    digest = hashlib.sha256()
    for file in weight_files(weights):
        for part in _samples(file):
            digest.update(part)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        file = Path(tokenizer) / name
        digest.update(name.encode() + (file.read_bytes() if file.is_file() else b""))
    return digest.hexdigest()


def _samples(file: Path, *, count: int = 64, size: int = 2**16, tail: int = 2**20) -> Iterable[bytes]:
    """A file's length, `count` pieces of it at even distances, and its end."""
    total = file.stat().st_size
    yield str(total).encode()
    with file.open("rb") as stream:
        for index in range(count):
            stream.seek(total * index // count)
            yield stream.read(size)
        stream.seek(max(total - tail, 0))
        yield stream.read(tail)


def _check(official: Mapping[str, Tensor], sizes: UMT5Sizes, *, source: str) -> None:
    """ValueError for names or shapes that are not those of an encoder of these sizes."""
    wanted = official_shapes(sizes)
    missing = [name for name in wanted if name not in official]
    unexpected = [name for name in official if name not in wanted]
    if missing or unexpected:
        raise ValueError(
            f"{source} is not a whole UMT5 encoder: "
            f"{len(missing)} names missing (first: {missing[0] if missing else '-'}), "
            f"{len(unexpected)} unexpected (first: {shown(unexpected[0]) if unexpected else '-'})"
        )
    for name, shape in wanted.items():
        if tuple(official[name].shape) != shape:
            raise ValueError(f"{source} is damaged: {name} is {tuple(official[name].shape)}, expected {shape}")
        if not official[name].is_floating_point():
            raise ValueError(f"{source}: {name} is {official[name].dtype}, expected floating point")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and (a.is_meta or torch.equal(a, b))
