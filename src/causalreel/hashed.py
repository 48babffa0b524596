"""Files that are hashed while they are written, so that nothing is read a second time; and read hashed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.complex64: "C64",
}
"""Types by their names in .safetensors files."""

_PIECE = 1 << 26


class HashedFile:
    """A new file, as far as writers of streams need one; `sha256` is of what was written so far."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest = hashlib.sha256()
        self.failure: OSError | None = None
        """Why something could not be written, for callers of writers that do not pass it on."""

    def write(self, data: Any) -> int:
        """Append bytes or whatever has them."""
        self._digest.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.failure = error
            raise

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()


def write_text(path: Path, text: str) -> str:
    """-> the file's hash."""
    with HashedFile(path) as file:
        file.write(text.encode())
    return file.sha256


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """A .safetensors file, of the same bytes whenever tensors and metadata are the same -> its hash.

    Tensors that share memory, such as tied weights, are written each. ValueError for a type that the format lacks.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # aligned
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        if tensor.dtype not in _NAMES:
            raise ValueError(
                f"{name} is {str(tensor.dtype).removeprefix('torch.')}, which .safetensors files cannot hold"
            )
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            for part in tensor.detach().reshape(-1).split(_PIECE):
                file.write(part.cpu().contiguous().view(torch.uint8).numpy().data)
    return file.sha256


def write_pickle(path: Path, content: Any) -> str:
    """-> the file's hash."""
    with HashedFile(path) as file:
        try:
            torch.save(content, file)  # pyright: ignore[reportArgumentType] - it needs no more of a stream
            file.flush()
        except RuntimeError as error:  # what it makes of a full disk
            raise file.failure or error from None
    return file.sha256


def sha256_of(path: Path) -> str:
    """The hash of a file that is there."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for piece in iter(lambda: file.read(_PIECE), b""):
            digest.update(piece)
    return digest.hexdigest()
