"""Prompt embeddings on disk: what was encoded once is read, and the encoder is not even loaded.

One safetensors file an entry, named by a hash of everything that the numbers depend on, with a checksum of its tensor.
Files appear whole or not at all, under temporary names that no other writer shares, so that processes and hosts may
use one folder. A file that cannot be trusted is a miss; the next write replaces it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from causalreel.files import write_bytes

log = logging.getLogger(__name__)

VERSION = 1
"""Of how prompts become numbers; to be raised with every change of that."""


HEAD_BYTES = 4096
"""Of an entry beside its rows, at most."""


@dataclass(frozen=True)
class PromptKey:
    """What one entry stands for, besides the encoder."""

    prompt: str
    """The cleaned prompt."""
    length: int
    """Tokens at most."""
    width: int
    """Width of an embedding."""
    dtype: torch.dtype
    """Of computation and result."""


@dataclass(frozen=True)
class PromptEntry:
    """rows (n,E): the embeddings of the prompt's own tokens, on the CPU; tokens: how many it had before truncation."""

    rows: Tensor
    tokens: int


class PromptCache:
    """Entries of one encoder in a folder. identity: what tells encoders apart, see `weights.umt5_files.fingerprint`."""

    def __init__(self, folder: str | Path, identity: str) -> None:
        self.folder, self.identity = Path(folder), identity

    def path(self, key: PromptKey) -> Path:
        """Where the entry is, if it is there."""
        facts = [VERSION, self.identity, key.prompt, key.length, key.width, str(key.dtype)]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def get(self, key: PromptKey) -> PromptEntry | None:
        """The entry, or None; a damaged file is logged and is None as well."""
        path = self.path(key)
        if not path.is_file():
            return None
        most = key.length * key.width * key.dtype.itemsize + HEAD_BYTES
        try:
            with path.open("rb") as file:  # read in one piece: another process may replace the file meanwhile
                data = file.read(most + 1)
            if len(data) > most:
                raise ValueError(f"more than {most:,} bytes")
            found = load(data)
            rows, tokens, checksum = found["rows"], int(found["tokens"]), found["checksum"]
        except (SafetensorError, OSError, KeyError, RuntimeError, ValueError, OverflowError) as error:
            log.warning("prompt cache: %s is damaged and will be written again (%s)", path, error)
            return None
        fits = rows.dtype == key.dtype and rows.ndim == 2 and rows.shape[1] == key.width
        if not fits or not 0 < len(rows) <= key.length or not torch.equal(checksum, _checksum(path, rows, tokens)):
            log.warning("prompt cache: %s does not hold what it should and will be written again", path)
            return None
        return PromptEntry(rows, tokens)

    def put(self, key: PromptKey, entry: PromptEntry) -> None:
        """Write the entry. A folder that cannot be written is logged: it costs time later, not the result now."""
        path = self.path(key)
        rows = entry.rows.detach().cpu().contiguous()
        facts = {"tokens": torch.tensor(entry.tokens), "checksum": _checksum(path, rows, entry.tokens)}
        try:
            write_bytes(path, save({"rows": rows, **facts}))
        except OSError as error:
            log.warning("prompt cache: cannot write %s (%s)", path, error)


def _checksum(path: Path, rows: Tensor, tokens: int) -> Tensor:
    """Of an entry and of what it stands for, 32 bytes."""
    digest = hashlib.sha256(f"{path.stem} {tokens} {tuple(rows.shape)} ".encode())
    digest.update(rows.contiguous().view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)
