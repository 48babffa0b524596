"""Whether a request fits on a GPU: asked before anything is loaded; the answer says what would help."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice

import torch

from causalreel.infer.estimate import GIB, Estimate, Request, estimate
from causalreel.infer.estimate_fast import estimate_fast


def check(request: Request, free: int, *, where: str = "the GPU") -> Estimate:
    """The estimate, or ValueError that says how much memory is missing and what would help, with what it would take."""
    found = estimate(request)
    if found.peak <= free:
        return found
    with contextlib.suppress(ValueError):  # the accelerated form may take less, and is what most people run
        found = min(found, estimate_fast(request), key=lambda one: one.peak)
    if found.peak <= free:
        return found
    helping = [f"{name} ({size / GIB:.1f} GiB)" for name, size in _savings(request, found)]
    options = f"; less is taken by {', '.join(helping)}" if helping else ""
    raise ValueError(
        f"not enough memory: {found.peak / GIB:.1f} GiB are needed and {free / GIB:.1f} GiB free on {where}, "
        f"{(found.peak - free) / GIB:.1f} GiB too few{options}"
    )


def _savings(request: Request, found: Estimate) -> Iterator[tuple[str, int]]:
    """Single changes of a request that take less, and the peak with them; the largest saving first."""
    half = (request.window or request.frames or 0) // 2
    changes: dict[str, Callable[[], Request]] = {
        "--decoder taehv": lambda: replace(request, decoder="taehv"),
        "another GPU for decoding (--decode-device)": lambda: replace(request, decoder="none"),
        "the text encoder on the CPU": lambda: replace(request, text_encoder="cpu"),
        f"a window of {half} latent frames": lambda: replace(request, window=half),
        "a batch of 1": lambda: replace(request, batch=1),
        "fp8 weights": lambda: replace(request, dtype="fp8"),
        "2 GPUs": lambda: replace(request, gpus=2 * request.gpus),
    }
    peaks = []
    for name, change in changes.items():
        try:
            peak = estimate(change()).peak
        except ValueError:
            continue  # not possible with this model, chunk or installation
        if peak < found.peak:
            peaks.append((name, peak))
    yield from islice(sorted(peaks, key=lambda item: item[1]), 4)


def require_bfloat16(device: torch.device) -> None:
    """ValueError for a GPU that does not compute in bfloat16: compute capability below 8."""
    if device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) has no bfloat16; "
            f"a GPU of capability 8.0 or later is needed, or --device cpu"
        )
