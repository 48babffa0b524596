"""Adapters (LoRA) of Wan networks: files of every layout in circulation, read strictly, and merged into weights.

    W' = W + strength * (alpha / rank) * up @ down            (LoRA, arXiv 2106.09685, section 4.1)

alpha is the rank where a file does not say it, and alpha / sqrt(rank) is the scale only where peft's configuration says
rslora. Full differences (.diff, .diff_b, .diff_m) are multiplied by the strength too. Several adapters add. Everything
is computed in float32 from the original weights and rounded once. DoRA follows peft's rule, at strength 1 only:
W' = m / ||W + s B A|| * (W + s B A), norms over the inputs of each output.

Other loaders skip what they do not understand; here a file is used whole or refused, and the key is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.foreign import ordinary_file, shown
from causalreel.headers import NAME, read_header
from causalreel.weights.files import PICKLE_SUFFIXES, read_metadata, read_tensors
from causalreel.weights.lora_config import Scales, in_metadata, read_adapter_config
from causalreel.weights.lora_names import Key, is_adapter, understand
from causalreel.weights.strict import ANY_FLOATS, check_finite

TENSOR_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
"""What a folder of one adapter calls its tensors; the first two are peft's, beside an adapter_config.json."""

CONFIG = "adapter_config.json"

STRENGTHS = 100.0
"""Largest strength, either way; those in use are below 4."""

GENERATOR = "generator_lora"
"""Top-level key under which a .pt of DMD training with adapters keeps the generator's."""

WHOLE = (torch.int64, torch.int32)
"""Types that an alpha may have, too."""


@dataclass(frozen=True)
class Pair:
    """What an adapter does to one product: W + scale * up @ down."""

    down: Tensor
    """(R,E); of a convolution (R,E,...)."""
    up: Tensor
    """(O,R)"""
    scale: float
    """alpha / rank, or what stands for it."""
    key: str
    """Of `down` in the file, for messages."""
    bias: Tensor | None = None
    """(O): scale times it is added to the layer's bias."""
    magnitude: Tensor | None = None
    """(O): with it, the pair is a DoRA."""

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Lora:
    """An adapter under Wan2.1's names. The tensors are mapped from the file."""

    source: str
    """File or folder, for messages."""
    layout: str
    """One of lora_layouts.LAYOUTS, as far as names tell."""
    pairs: dict[str, Pair] = field(default_factory=dict)
    """Layer -> its pair."""
    differences: dict[str, Tensor] = field(default_factory=dict)
    """Parameter -> what is added to it."""
    keys: dict[str, str] = field(default_factory=dict)
    """Parameter of a difference -> the key in the file, for messages."""

    def touched(self) -> dict[str, None]:
        """The parameters that it changes, in an order."""
        names: dict[str, None] = {}
        for layer, pair in self.pairs.items():
            names[f"{layer}.weight"] = None
            if pair.bias is not None:
                names[f"{layer}.bias"] = None
        return names | dict.fromkeys(self.differences)

    @property
    def is_dora(self) -> bool:
        return any(pair.magnitude is not None for pair in self.pairs.values())


def is_lora(path: str | Path) -> bool:
    """Whether a file or folder holds an adapter, by its names alone; False for what cannot be read."""
    path = Path(path)
    try:
        if path.is_dir():
            return (path / CONFIG).is_file() or any((path / name).is_file() for name in TENSOR_FILES)
        if path.suffix in PICKLE_SUFFIXES:
            found = read_tensors(path)
            return any(str(key).endswith("_lora") for key in found) or is_adapter(list(found))
        return path.suffix == ".safetensors" and is_adapter(list(read_header(path).entries))
    except (OSError, ValueError):
        return False


def read_lora(path: str | Path, which: str | None = None) -> Lora:
    """An adapter's file or folder, of any layout; ValueError, in one line with the key's name, if a key does not fit.

    which: a top-level key of a .pt file, such as critic_lora; None is generator_lora. Nothing is checked against a
    network yet: see `check_fits`.
    """
    path = _settle(Path(path))
    config = path.parent / CONFIG
    scales = Scales()
    if path.name.startswith("adapter_model.") and config.is_file():
        scales = read_adapter_config(config)
    found = _choose(read_tensors(path), which, path)
    if path.suffix == ".safetensors" and scales.source is None:
        scales = in_metadata(read_metadata(path), str(path)) or scales
    return from_tensors(found, scales, str(path))


def from_tensors(found: Mapping[str, Tensor], scales: Scales, source: str) -> Lora:
    """Key -> tensor, as a file has them, to an adapter; the first key that does not fit is named."""
    if not found:
        raise ValueError(f"{source} holds no tensors")
    by_place: dict[tuple[str, str], tuple[Key, Tensor]] = {}
    for text, tensor in found.items():
        if not isinstance(text, str) or len(text) > NAME:
            raise ValueError(f"{source}: a key is {shown(text)}, keys are texts, at most {NAME} long")
        try:
            key = understand(text)
        except ValueError as error:
            raise ValueError(f"{source} cannot be used as a LoRA: {_why(found, error)}") from None
        is_count = key.part == "alpha" and tensor.dtype in WHOLE
        if tensor.dtype not in ANY_FLOATS and not is_count:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{source}: '{shown(text)}' is {dtype}; float32, bfloat16 and float16 are read")
        there = by_place.get((key.layer, key.part))
        if there is not None:
            raise ValueError(
                f"{source}: one layer in two namings: '{shown(there[0].text)}' and '{shown(text)}' mean the same"
            )
        by_place[key.layer, key.part] = key, tensor
    lora = _assemble(by_place, scales, source)
    if not lora.pairs and not lora.differences:
        raise ValueError(
            f"{source} holds no LoRA pair and no difference: '{shown(next(iter(found)))}' alone does nothing"
        )
    check_finite(dict(found), source=source)
    return lora


def _why(found: Mapping[str, Tensor], error: ValueError) -> str:
    """What a key that is not understood says of its file: all of it is something else, or only some layers are."""
    if any(_is_understood(str(text)) for text in found):
        return f"it has layers that the network does not have, and nothing is skipped: {error}"
    is_text = all("text_encoder" in str(name) or "lora_te" in str(name) for name in found)
    return f"only a text encoder LoRA: {error}" if is_text else str(error)


def _is_understood(text: str) -> bool:
    try:
        return bool(understand(text))
    except ValueError:
        return False


def _assemble(by_place: Mapping[tuple[str, str], tuple[Key, Tensor]], scales: Scales, source: str) -> Lora:
    lora = Lora(source, _layout([key for key, _ in by_place.values()], scales))
    for (layer, part), (key, tensor) in by_place.items():
        other = {"down": "up", "up": "down"}.get(part, "down")
        if part in ("weight", "bias", "modulation"):
            lora.differences[key.parameter] = tensor
            lora.keys[key.parameter] = key.text
        elif (layer, other) not in by_place:
            missing = "half of a pair is missing: " if part in ("up", "down") else "no LoRA pair for "
            tail = f" has no {other}" if part in ("up", "down") else ""
            raise ValueError(f"{source}: {missing}'{shown(key.text)}'{tail}")
        elif part == "down":
            rest = {name: by_place.get((layer, name)) for name in ("up", "alpha", "up_bias", "magnitude")}
            lora.pairs[layer] = _pair(key, tensor, rest, scales, source)
    return lora


def _pair(key: Key, down: Tensor, rest: Mapping[str, tuple[Key, Tensor] | None], scales: Scales, source: str) -> Pair:
    assert rest["up"] is not None
    up = rest["up"][1]
    if down.ndim < 2 or up.ndim < 2 or any(side != 1 for side in up.shape[2:]):
        raise ValueError(
            f"{source}: '{shown(key.text)}' {tuple(down.shape)} and its up {tuple(up.shape)} are no matrices"
        )
    up = up.flatten(1)
    rank = down.shape[0]
    if rank != up.shape[1]:
        raise ValueError(
            f"{source}: the ranks of down and up differ: '{shown(key.text)}' {tuple(down.shape)} has rank {rank}, "
            f"its up {tuple(up.shape)} rank {up.shape[1]}"
        )
    if rank == 0 or 0 in down.shape or 0 in up.shape:
        raise ValueError(f"{source}: '{shown(key.text)}' has rank 0 or no width: {tuple(down.shape)}")
    bias = rest["up_bias"]
    magnitude = rest["magnitude"]
    if bias is not None and bias[1].shape != up.shape[:1]:
        raise ValueError(f"{source}: '{shown(bias[0].text)}' must be ({up.shape[0]},), got {tuple(bias[1].shape)}")
    if magnitude is not None and magnitude[1].shape not in ((up.shape[0],), (up.shape[0], 1)):
        raise ValueError(
            f"{source}: '{shown(magnitude[0].text)}' must have a magnitude for each of the {up.shape[0]} outputs (DoRA "
            f"as peft has it), got {tuple(magnitude[1].shape)}"
        )
    if magnitude is None and scales.is_dora:
        raise ValueError(f"{source}: use_dora is set, and '{shown(key.text)}' has no lora_magnitude_vector")
    scale = scales.of(key.name, rank, source) if rest["alpha"] is None else _scale(*rest["alpha"], rank, source)
    return Pair(
        down,
        up,
        scale,
        key.text,
        None if bias is None else bias[1],
        None if magnitude is None else magnitude[1].flatten(),
    )


def _scale(key: Key, alpha: Tensor, rank: int, source: str) -> float:
    """alpha / rank; 0 means alpha = rank, as in the code that writes it."""
    if alpha.numel() != 1:
        raise ValueError(f"{source}: '{shown(key.text)}' must be one number, got {tuple(alpha.shape)}")
    value = float(alpha)
    if not math.isfinite(value):
        raise ValueError(f"{source}: alpha is not finite: '{shown(key.text)}' is {value}")
    return value / rank if value else 1.0


def _layout(keys: Sequence[Key], scales: Scales) -> str:
    """The layout that the names suggest; they need not agree."""
    first = keys[0]
    if first.prefix in ("lora_unet__",):
        return "videox-fun"
    if first.style == "underscored":
        return "musubi"
    if first.style == "diffusers":
        return "diffusers"
    if first.prefix.startswith("base_model.model."):
        return "longlive" if scales.source is None else "peft"
    return "comfyui" if first.prefix else "diffsynth"


def _settle(path: Path) -> Path:
    """A folder -> the file of tensors in it; a file as it is."""
    if not path.is_dir():
        return ordinary_file(path, "LoRA file")
    named = [path / name for name in TENSOR_FILES if (path / name).is_file()]
    if (path / CONFIG).is_file():
        read_adapter_config(path / CONFIG)  # another kind of adapter has other files: its kind is what to say
    files = named or sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{path} holds no single adapter ({len(files)} files of tensors); name the file")
    return files[0]


def _choose(found: Mapping[str, Any], which: str | None, path: Path) -> dict[str, Tensor]:
    """The adapter's tensors out of what a file holds."""
    nested = {str(key): value for key, value in found.items() if isinstance(value, Mapping)}
    flat = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    names = shown(", ".join(nested), 200)
    if which is not None and which not in nested:
        raise ValueError(f"{path} has nothing called {which!r}; it has {names or 'bare tensors'}")
    if not nested:
        return flat
    if which is None and GENERATOR not in nested:
        if "critic_lora" in nested:
            raise ValueError(f"{path} holds only the critic adapter (critic_lora): a critic scores videos, makes none")
        raise ValueError(f"{path} holds no {GENERATOR}; it has {names}, of which --which would take one")
    beside = next((key for key, value in flat.items() if value.ndim), None)  # one number is a counter of steps
    if beside is not None:
        raise ValueError(f"{path}: '{shown(beside)}' stands beside {names}, and nothing is skipped")
    chosen = nested[which or GENERATOR]
    odd = next((key for key, value in chosen.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ValueError(f"{path}: '{shown(odd)}' in {which or GENERATOR} is no tensor")
    return dict(chosen)


# --------------------------------------------------------------------------------------------------- into a network


def check_strength(strength: float, source: str) -> float:
    """The strength; ValueError unless it is a finite number of at most STRENGTHS."""
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not abs(strength) <= STRENGTHS:
        got = shown(strength, 40)
        raise ValueError(f"{source}: the strength must be a number from {-STRENGTHS:g} to {STRENGTHS:g}, got {got}")
    return float(strength)


def check_fits(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError, naming the key, unless every layer is the network's and fits it. shapes: of its parameters."""
    for layer, pair in lora.pairs.items():
        wanted = _wanted(f"{layer}.weight", pair.key, shapes, lora.source)
        got = (pair.up.shape[0], *pair.down.shape[1:])
        if got == wanted and (pair.bias is None or f"{layer}.bias" in shapes):
            continue
        if len(got) == 2 and len(wanted) == 2 and got[0] != wanted[0] and got[1] != wanted[1]:
            wider = "wider" if got[1] > wanted[1] else "narrower"
            raise ValueError(
                f"{lora.source} was made for a {wider} network: '{shown(pair.key)}' is for a layer of {got[1]} inputs "
                f"and {got[0]} outputs, {layer} has {wanted[1]} and {wanted[0]}{_hint(got[1])}"
            )
        raise ValueError(
            f"{lora.source}: '{shown(pair.key)}' does not fit the layer: the pair has the shape {got}, "
            f"{layer}.weight {wanted}"
        )
    for name, tensor in lora.differences.items():
        wanted = _wanted(name, lora.keys[name], shapes, lora.source)
        if tuple(tensor.shape) != wanted:
            raise ValueError(
                f"{lora.source}: '{shown(lora.keys[name])}' does not fit the layer: it has the shape "
                f"{tuple(tensor.shape)}, {name} {wanted}"
            )


def _wanted(name: str, key: str, shapes: Mapping[str, tuple[int, ...]], source: str) -> tuple[int, ...]:
    """The shape of the parameter that a key changes; ValueError if the network has none of that name."""
    if name in shapes:
        return shapes[name]
    parts = name.split(".")
    count = len({other.split(".")[1] for other in shapes if other.startswith("blocks.")})
    if parts[0] == "blocks" and int(parts[1]) >= count:
        raise ValueError(f"{source}: '{shown(key)}' is for block {parts[1]} of {count} (0 to {count - 1})")
    if "_img" in name or name.startswith("img_emb."):
        raise ValueError(
            f"{source} is an image-to-video LoRA: '{shown(key)}' is for an image layer, which does not exist here"
        )
    raise ValueError(
        f"{source}: '{shown(key)}' is for one of the layers that the network does not have, and nothing is skipped"
    )


def _hint(width: int) -> str:
    return {5120: "; it is of a 14B network", 1536: "; it is of a 1.3B network", 3072: "; it is of Wan2.2's 5B"}.get(
        width, ""
    )


@torch.no_grad()
def changed(
    weight: Callable[[str], Tensor], loras: Sequence[tuple[Lora, float]], names: Sequence[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Parameters with adapters merged into them, one after the other, in the type and on the device of the original.

    weight: name -> the original parameter, which is not changed. loras: with their strengths; those at 0 are left out.
    names: which parameters; None is all that any of them touches.
    """
    used = [(lora, strength) for lora, strength in loras if strength]
    if names is None:
        names = list({name: None for lora, _ in used for name in lora.touched()})
    for name in names:
        base = weight(name)
        value = base.detach().float()
        layer, _, leaf = name.rpartition(".")
        for lora, strength in used:
            difference, pair = lora.differences.get(name), lora.pairs.get(layer)
            if difference is not None:
                value = value + strength * difference.to(value)
            if pair is not None and leaf == "weight":
                value = _with_pair(value, pair, strength)
            elif pair is not None and leaf == "bias" and pair.bias is not None:
                value = value + strength * pair.scale * pair.bias.to(value)
        result = value.to(base.dtype)
        if not result.isfinite().all():
            told = ", ".join(f"{lora.source} at {strength:g}" for lora, strength in used)
            raise ValueError(f"{name} is not finite with {told}: the strength is too large")
        yield name, result


def _with_pair(value: Tensor, pair: Pair, strength: float) -> Tensor:
    """value (O,E...) float32 -> with the pair's product."""
    product = (pair.up.to(value) @ pair.down.to(value).flatten(1)).view_as(value)
    value = value + strength * pair.scale * product
    if pair.magnitude is None:
        return value
    norm = torch.linalg.vector_norm(value.flatten(1), dim=1)
    return (pair.magnitude.to(value) / norm).view(-1, *[1] * (value.ndim - 1)) * value


def check_together(loras: Sequence[tuple[Lora, float]]) -> None:
    """ValueError for what has no agreed meaning: a DoRA at other strengths than 0 and 1, or with others at a layer."""
    used = [(lora, strength) for lora, strength in loras if strength]
    for lora, strength in used:
        if lora.is_dora and strength != 1:
            raise ValueError(
                f"{lora.source} is a DoRA, which has a meaning at strength 1 (or 0) only, got {strength:g}"
            )
    for lora, _ in used:
        if not lora.is_dora:
            continue
        mine = {f"{layer}.weight" for layer, pair in lora.pairs.items() if pair.magnitude is not None}
        for other, _ in used:
            both = next((name for name in other.touched() if name in mine), None)
            if other is not lora and both is not None:
                raise ValueError(f"{lora.source} is a DoRA and {other.source} changes {both} too: they do not add")
