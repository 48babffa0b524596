"""Tensors to and from files: safetensors and PyTorch pickles (weights only), atomically written, clearly refused.

Reading is lazy where the format allows it: tensors are views of the mapped file, so that a model needs its size in
memory once, where it goes, and not a second time on the way.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalreel import hashed
from causalreel.files import replacing
from causalreel.foreign import file_in, ordinary_file, read_json, shown, text_of
from causalreel.headers import read_header
from causalreel.weights.identify import SUFFIXES
from causalreel.weights.pickles import read_pickle

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def read_tensors(path: str | Path, *, mmap: bool = True) -> dict[str, Any]:
    """A .safetensors file as name -> tensor, or a .pt/.pth file as what was saved (loaded with weights_only=True).

    mmap: leave the tensors of a .pt/.pth file on disk until they are used (files of before PyTorch 1.6 cannot); those
    of .safetensors files always are. Raises ValueError, in one line, for a file that is missing, cut off, no
    checkpoint, or more than tensors.
    """
    path = ordinary_file(path, "weights file")
    if path.suffix == ".safetensors":
        read_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, KeyError, RuntimeError, AttributeError) as error:  # a type that torch does not have
            raise ValueError(f"{path} cannot be read: {shown(str(error), 200)}") from error
    if path.suffix in PICKLE_SUFFIXES:
        found = read_pickle(path, mmap=mmap)
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors")
        return found
    what = f", which is {SUFFIXES[path.suffix]}" if path.suffix in SUFFIXES else ""
    raise ValueError(
        f"{path}: weights are read from .safetensors, .pt, .pth, .ckpt or .bin files, not '{shown(path.suffix)}'{what}"
    )


def read_index(index: Path) -> tuple[Mapping[str, str], dict[str, Path]]:
    """An index of shards -> parameter to shard, and shard to its place; ValueError if a shard is not there."""
    told = text_of(read_json(index, what="index of shards"), "weight_map", f"{index} is no index of shards")
    places = {name: file_in(index.parent, name, str(index)) for name in sorted(set(told.values()))}
    absent = [name for name, place in places.items() if not place.is_file()]
    if absent:
        raise ValueError(
            f"{index.parent} lacks {len(absent)} of the {len(places)} shards that {index.name} names "
            f"(missing: {shown(', '.join(absent), 300)}); download again"
        )
    return told, places


def read_shards(index: Path) -> dict[str, Tensor]:
    """All tensors of a sharded set; ValueError if a shard is missing, cut off, or not what the index says."""
    told, places = read_index(index)
    tensors: dict[str, Tensor] = {}
    for name, place in places.items():
        has = set(read_header(place).entries)
        wanted = {key for key, shard in told.items() if shard == name}
        if has != wanted:
            odd = sorted(has ^ wanted)[0]
            where = "in the shard but not in the index" if odd in has else "in the index but not in the shard"
            raise ValueError(f"{place} is not the shard that {index.name} describes: {shown(odd)} is {where}")
        tensors |= read_tensors(place)
    return tensors


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a .safetensors file."""
    return read_header(path).metadata


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all; its folder is made if need be. OSError, naming it, if not."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        hashed.write_tensors(partial, tensors, metadata)


def write_pickle(path: str | Path, content: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a .pt file of tensors under top-level keys, whole or not at all. OSError, naming it, on a full disk."""
    ready = {key: {name: _compact(value) for name, value in part.items()} for key, part in content.items()}
    with replacing(path) as partial:
        try:
            torch.save(ready, partial)
        except RuntimeError as error:  # what it makes of a full disk
            reason = f"could not be written whole, is the disk full? ({error})"
            raise OSError(errno.ENOSPC, reason, str(path)) from error


def _compact(tensor: Tensor) -> Tensor:
    """A tensor whose storage is its own: torch.save writes whole storages, and a view may be of a much larger one."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
