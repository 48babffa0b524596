"""Tensors to and from files: safetensors and PyTorch pickles (weights only), atomically written, clearly refused.

Reading is lazy where the format allows it: tensors are views of the mapped file, so that a model needs its size in
memory once, where it goes, and not a second time on the way.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from causalreel.files import replacing

PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")

NOT_WEIGHTS = (
    (b"version https://git-lfs", "a Git LFS pointer: the data itself was not downloaded"),
    (b"<!DOCTYPE", "a web page: the download went wrong"),
    (b"<html", "a web page: the download went wrong"),
    (b"{", "JSON text"),
)
"""How files begin that are often taken for weights, and what they are."""


def read_tensors(path: str | Path, *, mmap: bool = True) -> dict[str, Any]:
    """A .safetensors file as name -> tensor, or a .pt/.pth file as what was saved (loaded with weights_only=True).

    mmap: leave the tensors of a .pt/.pth file on disk until they are used (files of before PyTorch 1.6 cannot); those
    of .safetensors files always are. Raises ValueError, in one line, for a file that is missing, cut off, no
    checkpoint, or more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"weights file not found: {path}")
    if path.suffix == ".safetensors":
        check_header(path)
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or was cut off while it was written: {error}") from error
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path, mmap)
    raise ValueError(f"{path}: weights are read from .safetensors, .pt, .pth, .ckpt or .bin files, not {path.suffix!r}")


def check_header(path: str | Path) -> dict[str, Any]:
    """The header of a .safetensors file, name -> dtype, shape, data_offsets; ValueError if the file does not fit it."""
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = int.from_bytes(first, "little") if len(first) == 8 else -1
        if not 0 < length <= size - 8:
            _refuse_other(path, first + file.read(64))
            raise ValueError(f"{path} is damaged or was cut off while it was written: its header is not whole")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: its header cannot be read ({error})") from None
    if size < 8 + length + end:
        raise ValueError(
            f"{path} is damaged or was cut off while it was written: it is shorter than its header says, "
            f"{size} of {8 + length + end} bytes (truncated: a download that did not finish? run it again, it resumes)"
        )
    return entries


def _read_pickle(path: Path, mmap: bool) -> dict[str, Any]:
    with path.open("rb") as file:
        first = file.read(72)
    _refuse_other(path, first)
    is_zip = first.startswith(b"PK\x03\x04")
    if is_zip and not _has_zip_directory(path):
        raise ValueError(
            f"{path} is damaged or was cut off: the zip directory at its end is missing "
            f"(truncated: a download that did not finish? run it again, it resumes)"
        )
    if not is_zip and not first.startswith(b"\x80"):
        raise ValueError(f"{path} is not a checkpoint: it begins with {first[:24]!r}, neither a zip nor a pickle")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except Exception as error:  # torch raises many types for a bad pickle or archive; all mean the same to the user
        text = str(error)
        if "Unsupported" in text:  # an instruction or a class that tensors do not need
            raise ValueError(
                f"{path} cannot be loaded with tensors-only unpickling: it holds a Python object besides tensors"
                f"{_culprit(text)}, which would be run and not just read"
            ) from None
        reason = text.splitlines()[0] if text else type(error).__name__
        raise ValueError(f"{path} is damaged, cut off, or holds more than tensors: {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, not a dictionary of tensors")
    return found


def _refuse_other(path: Path, first: bytes) -> None:
    """ValueError if a file that begins with these bytes is known to be no weights."""
    for start, what in NOT_WEIGHTS:
        if first.startswith(start):
            raise ValueError(f"{path} is not a checkpoint but {what}")
    if not first:
        raise ValueError(f"{path} is damaged or was cut off: it is empty, which is not a checkpoint")


def _has_zip_directory(path: Path) -> bool:
    """Whether the end-of-directory record is there, in the last 64 KiB and a comment's room."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 66_000))
        return b"PK\x05\x06" in file.read()


def _culprit(text: str) -> str:
    """The class that torch names in its refusal, if it does."""
    named = re.search(r"GLOBAL ([\w.]+)", text)
    return f" ({named[1]})" if named else ""


def read_metadata(path: str | Path) -> dict[str, str]:
    """The text metadata of a .safetensors file."""
    with safe_open(Path(path), framework="pt") as file:
        return dict(file.metadata() or {})


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a .safetensors file, whole or not at all; its folder is made if need be. OSError, naming it, if not."""
    ready = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        try:
            save_file(ready, partial, dict(metadata or {}))
        except SafetensorError as error:  # what it makes of a full disk
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
