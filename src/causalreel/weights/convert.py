"""From any layout to any other: `causalreel convert`. Values and types stay as they are unless a type is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from causalreel.files import replacing_folder, write_text
from causalreel.nn.presets import ModelConfig
from causalreel.weights.build import empty_denoiser, moved
from causalreel.weights.diffusers import diffusers_config, wan_config
from causalreel.weights.files import write_pickle, write_tensors
from causalreel.weights.identify import preset_of
from causalreel.weights.layouts import LAYOUTS, Network, read_network, to_layout
from causalreel.weights.lora import Lora, changed, check_together, is_lora, read_lora
from causalreel.weights.lora import check_fits as check_lora_fits
from causalreel.weights.lora_layouts import LAYOUTS as LORA_LAYOUTS
from causalreel.weights.lora_layouts import check_target as check_lora_target
from causalreel.weights.lora_layouts import write_lora
from causalreel.weights.strict import check_finite, check_fits

SHARD_BYTES = 5 * 10**9
"""Folders hold files of at most this many bytes, as the hub's do."""

STEM = "diffusion_pytorch_model"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def convert(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    which: str | None = None,
    dtype: str | None = None,
    heads: int | None = None,
    loras: Sequence[tuple[Lora, float]] = (),
) -> Path:
    """Write the network in `source` (any layout, strictly checked) as layout `to` -> where it is.

    A source that is an adapter (LoRA) is written as an adapter: `to` is one of `lora_layouts.LAYOUTS` then. loras:
    adapters and their strengths to be merged into a network.

    target: a .pt file for official; a .safetensors file for comfyui; a .safetensors file or a folder (with config.json,
    in shards if it is large) for wan and diffusers. It is written whole or not at all, and nothing is overwritten.
    which: see `layouts.read_network`; it also names the top-level key of an official file (default: generator).
    dtype: float32, bfloat16 or float16; None keeps each tensor's. heads: attention heads for config.json, where neither
    the source nor a preset tells them.
    """
    target = Path(target)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    if is_lora(source):
        if heads is not None or loras:
            raise ValueError(f"{source} is a LoRA, which has no heads and takes no other: leave --heads and --lora out")
        check_lora_target(target, to)
        return write_lora(read_lora(source, which), target, to, dtype=None if dtype is None else DTYPES[dtype])
    _check_target(target, to)
    network = read_network(source, which)
    config = network.config()
    if heads is not None:
        network.facts["num_heads"] = heads
        config = network.config()
    is_folder = target.suffix == ""
    told = network.facts.get("num_heads") or network.facts.get("num_attention_heads")
    if is_folder and not told and preset_of(config) is None:
        raise ValueError(f"{source} does not say how many attention heads it has, and config.json needs it: --heads N")
    check_fits(empty_denoiser(config).model, network.tensors, source=network.source)
    check_finite(network.tensors, source=network.source)
    tensors, kind = to_layout(_merged(network, loras), to), None if dtype is None else DTYPES[dtype]
    if is_folder:
        write_folder(target, tensors, config, to, dtype=kind)
    elif to == "official":
        write_pickle(target, {which or network.which or "generator": moved(tensors, "cpu", kind)})
    else:
        write_tensors(target, moved(tensors, "cpu", kind), {"format": "pt"})
    return target


def _merged(network: Network, loras: Sequence[tuple[Lora, float]]) -> dict[str, Tensor]:
    """The network's tensors, with adapters in them."""
    for lora, _ in loras:
        check_lora_fits(lora, network.shapes)
    check_together(loras)
    return network.tensors | dict(changed(network.tensors.__getitem__, loras))


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    layout: str,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Weights in one file or in shards with their index, and config.json: a new folder, whole or not there."""
    with replacing_folder(folder) as partial:
        try:
            _write_parts(partial, tensors, dtype, shard_bytes)
            facts = diffusers_config(config) if layout == "diffusers" else wan_config(config)
            write_text(partial / "config.json", json.dumps(facts, indent=2) + "\n")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error


def _write_parts(folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, most: int) -> None:
    parts = split(tensors, most, dtype)
    if len(parts) == 1:
        write_tensors(folder / f"{STEM}.safetensors", moved(parts[0], "cpu", dtype), {"format": "pt"})
        return
    where: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"{STEM}-{number:05d}-of-{len(parts):05d}.safetensors"
        write_tensors(folder / name, moved(part, "cpu", dtype), {"format": "pt"})  # one part in memory at a time
        where |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": sum(size_of(t, dtype) for t in tensors.values())}, "weight_map": where}
    write_text(folder / f"{STEM}.safetensors.index.json", json.dumps(index, indent=1, sort_keys=True) + "\n")


def split(tensors: Mapping[str, Tensor], most: int, dtype: torch.dtype | None = None) -> list[dict[str, Tensor]]:
    """Consecutive parts of at most `most` bytes (as `dtype`); a tensor larger than that is a part of its own."""
    parts: list[dict[str, Tensor]] = [{}]
    room = most
    for name, tensor in tensors.items():
        if parts[-1] and size_of(tensor, dtype) > room:
            parts.append({})
            room = most
        parts[-1][name] = tensor
        room -= size_of(tensor, dtype)
    return parts


def size_of(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    """Bytes of a tensor's values, in another type if given."""
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _check_target(target: Path, to: str) -> None:
    if to not in LAYOUTS:
        is_for_lora = f"; {to} is for a LoRA, and the source is none" if to in LORA_LAYOUTS else ""
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {to!r}{is_for_lora}")
    allowed = {
        "official": (".pt", ".pth"),
        "comfyui": (".safetensors",),
        "wan": (".safetensors", ""),
        "diffusers": (".safetensors", ""),
    }[to]
    if target.suffix not in allowed:
        named = " or ".join(suffix or "a folder" for suffix in allowed)
        raise ValueError(f"target must be {named} for the layout {to}, got {target}")
    if target.exists() and (target.is_file() or any(target.iterdir())):
        raise ValueError(f"{target} is already there; it is not overwritten")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"cannot write {target}: directory {target.parent} does not exist")
