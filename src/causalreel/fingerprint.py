"""Contents by a hash: the same values have the same fingerprint wherever they are kept and however they are spelled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

_PIECE = 1 << 26  # bytes hashed at once, so that what has to be copied for it is small


def fingerprint(tensors: Mapping[str, Tensor], *texts: str) -> str:
    """SHA-256 of names, types, shapes and values of tensors on any device, and of texts."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]  # one at a time: it may be made as it is looked up
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        flat = tensor.detach().reshape(-1)
        for part in flat.split(max(1, _PIECE // tensor.element_size())):
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy().data)
    for text in texts:
        encoded = text.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
