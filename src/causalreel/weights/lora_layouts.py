"""Adapters into files, in every layout: what one program trained, another loads. See `weights.lora` for reading.

    peft        a folder: adapter_model.safetensors and adapter_config.json, Wan2.1's names
    diffusers   one file, diffusers' names, the scales in its metadata
    comfyui     one file, diffusion_model. before Wan2.1's names, an alpha for every layer; also holds full differences
    musubi      one file, lora_unet_ and underscores (kohya), an alpha for every layer
    videox-fun  as musubi with two underscores
    diffsynth   one file, bare names; alpha is always the rank
    longlive    a .pt with generator_lora; alpha is always the rank

Where a layout has no place for alpha, `up` is multiplied by the scale. What a layout cannot hold is refused by name.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.files import replacing_folder, write_text
from causalreel.weights.files import write_pickle, write_tensors
from causalreel.weights.lora import CONFIG, GENERATOR, Lora, Pair
from causalreel.weights.lora_config import METADATA
from causalreel.weights.lora_names import diffusers_name
from causalreel.weights.strict import check_range

LAYOUTS = ("peft", "diffusers", "comfyui", "musubi", "videox-fun", "diffsynth", "longlive")

SUFFIXES = {"peft": ("",), "longlive": (".pt",)}
"""What the target's name ends with, where it is not .safetensors."""

HOLDS_DORA = ("peft", "comfyui")

PREFIX = {
    "peft": "base_model.model.",
    "longlive": "base_model.model.",
    "diffusers": "transformer.",
    "comfyui": "diffusion_model.",
    "musubi": "lora_unet_",
    "videox-fun": "lora_unet__",
    "diffsynth": "",
}


def check_target(target: Path, to: str) -> None:
    """ValueError unless an adapter of this layout can be written there; nothing is overwritten."""
    if to not in LAYOUTS:
        raise ValueError(f"the layout of a LoRA must be one of {', '.join(LAYOUTS)}; got {to!r}")
    allowed = SUFFIXES.get(to, (".safetensors",))
    if target.suffix not in allowed:
        raise ValueError(f"target must be {allowed[0] or 'a folder'} for the LoRA layout {to}, got {target}")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ValueError(f"{target} is already there; it is not overwritten")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: directory {target.parent} does not exist")


def write_lora(
    lora: Lora, target: str | Path, to: str, *, dtype: torch.dtype | None = None, note: Mapping[str, str] | None = None
) -> Path:
    """Write an adapter as layout `to`, whole or not at all -> where it is. note: text metadata of its file."""
    target = Path(target)
    check_target(target, to)
    tensors, scales = to_layout(lora, to, dtype)
    metadata = {"format": "pt", **(note or {})}
    if to == "peft":
        with replacing_folder(target) as partial:
            write_tensors(partial / "adapter_model.safetensors", tensors, metadata)
            write_text(partial / CONFIG, json.dumps(scales, indent=1, sort_keys=True) + "\n")
    elif to == "longlive":
        write_pickle(target, {GENERATOR: tensors})
    else:
        if to == "diffusers":
            inside = {f"transformer.{key}": value for key, value in scales.items()}
            metadata[METADATA] = json.dumps(inside, sort_keys=True)
        write_tensors(target, tensors, metadata)
    return target


def to_layout(lora: Lora, to: str, dtype: torch.dtype | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """-> key -> tensor as the layout has them, and peft's configuration for them, under the layout's names."""
    if lora.differences and to != "comfyui":
        key = next(iter(lora.keys.values()))
        raise ValueError(
            f"{lora.source}: '{key}' is a full difference, which only the layout comfyui can hold, not {to}"
        )
    tensors: dict[str, Tensor] = {}
    for layer, pair in lora.pairs.items():
        tensors |= _pair(layer, pair, to, dtype, lora.source)
    for name, value in lora.differences.items():
        layer, _, leaf = name.rpartition(".")
        suffix = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[leaf]
        key = f"{PREFIX[to]}{layer}.{suffix}"
        value = value + tensors[key] if key in tensors else value
        tensors[key] = _as_type(key, value, dtype)
    return tensors, config_of(lora, _name(to)) if to in ("peft", "diffusers") else {}


def _name(to: str) -> Any:
    """What the layout calls a layer."""
    if to == "diffusers":
        return diffusers_name
    return (lambda layer: layer.replace(".", "_")) if to in ("musubi", "videox-fun") else (lambda layer: layer)


def _pair(layer: str, pair: Pair, to: str, dtype: torch.dtype | None, source: str) -> dict[str, Tensor]:
    stem = PREFIX[to] + _name(to)(layer)
    if pair.magnitude is not None and to not in HOLDS_DORA:
        raise ValueError(f"{source} is a DoRA, which the layouts {' and '.join(HOLDS_DORA)} can hold, not {to}")
    if pair.bias is not None and to not in ("peft", "diffusers", "comfyui"):
        raise ValueError(f"{source}: {layer} has a bias of its own, which {to} cannot hold; peft can")
    has_alpha = to in ("comfyui", "musubi", "videox-fun")
    names = ("lora_down", "lora_up") if has_alpha else ("lora_A", "lora_B")
    middle = ".default" if to == "diffsynth" else ""
    up = pair.up.view(*pair.up.shape, *[1] * (pair.down.ndim - 2))
    if to in ("diffsynth", "longlive") and pair.scale != 1:
        up = (up.float() * pair.scale).to(up.dtype)
    made = {f"{stem}.{names[0]}{middle}.weight": pair.down, f"{stem}.{names[1]}{middle}.weight": up}
    if pair.magnitude is not None:
        is_peft = to == "peft"
        suffix, value = (
            ("lora_magnitude_vector", pair.magnitude) if is_peft else ("dora_scale", pair.magnitude[:, None])
        )
        made[f"{stem}.{suffix}"] = value
    if pair.bias is not None:
        made |= {f"{stem}.diff_b": pair.scale * pair.bias.float()} if has_alpha else {f"{stem}.lora_B.bias": pair.bias}
    made = {key: _as_type(key, value, dtype) for key, value in made.items()}
    if has_alpha:
        made[f"{stem}.alpha"] = torch.tensor(pair.scale * pair.rank)
    return made


def _as_type(key: str, value: Tensor, dtype: torch.dtype | None) -> Tensor:
    cast = value if dtype is None else value.to(dtype)
    check_range(key, value, cast)
    return cast


def config_of(lora: Lora, name: Any = lambda layer: layer) -> dict[str, Any]:
    """peft's configuration of an adapter: the commonest rank and alpha, and patterns for the layers with others."""
    rank = Counter(pair.rank for pair in lora.pairs.values()).most_common(1)[0][0]
    alphas = {layer: _whole(pair.scale * pair.rank) for layer, pair in lora.pairs.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "lora_bias": any(pair.bias is not None for pair in lora.pairs.values()),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name(layer): pair.rank for layer, pair in lora.pairs.items() if pair.rank != rank},
        "alpha_pattern": {name(layer): value for layer, value in alphas.items() if value != alpha},
        "target_modules": sorted(name(layer) for layer in lora.pairs),
        "use_dora": lora.is_dora,
        "use_rslora": False,
    }


def _whole(alpha: float) -> float:
    """Without the last bits that a division left."""
    return float(round(alpha)) if math.isclose(alpha, round(alpha), rel_tol=1e-12) else alpha
