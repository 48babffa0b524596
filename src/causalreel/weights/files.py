"""Tensors to and from files: safetensors and PyTorch pickles (weights only), atomically written, clearly refused."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def read_tensors(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """A .safetensors file as name -> tensor, or a .pt/.pth file as what was saved (loaded with weights_only=True).

    mmap: leave the tensors of a .pt/.pth file on disk until they are read (files of before PyTorch 1.6 cannot).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights file not found: {path}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or was cut off while it was written: {error}") from error
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        try:
            mapped = mmap and zipfile.is_zipfile(path)
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # torch raises many types for a bad pickle or archive; all mean the same to the user
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is damaged, cut off, or holds more than tensors: {reason}") from error
        if not isinstance(found, dict):
            raise ValueError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors")
        return found
    raise ValueError(f"{path}: weights are read from .safetensors, .pt, .pth, .ckpt or .bin files, not {path.suffix!r}")


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a .safetensors file."""
    with safe_open(Path(path), framework="pt") as file:
        return dict(file.metadata() or {})


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file under a temporary name, then rename it: it is whole or it is not there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, partial, dict(metadata or {}))
        partial.chmod(0o666 & ~_umask())  # safetensors makes files that only their owner can read
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
