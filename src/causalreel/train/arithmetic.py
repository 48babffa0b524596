"""How a process computes while it trains, and as before once it has."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def arithmetic(device: torch.device) -> Iterator[None]:
    """Within it a CPU flushes denormal numbers to zero and a GPU may multiply float32 in TF32.

    Torch's generators may be seeded within it. All of it belongs to the process and is given back as it was found.
    """
    flushed, precision = flushes_denormals(), torch.get_float32_matmul_precision()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            if device.type == "cpu":
                torch.set_flush_denormal(True)  # denormal activations slow a CPU down several times
            torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
            yield
        finally:
            torch.set_flush_denormal(flushed)
            torch.set_float32_matmul_precision(precision)


def flushes_denormals() -> bool:
    """Whether this thread takes denormal numbers for zero; torch sets it and does not tell."""
    return sys.float_info.min / 2 == 0
