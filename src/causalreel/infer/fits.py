"""Whether a request fits on a GPU: asked before anything is loaded; the answer says what would help."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from causalreel.infer.estimate import GIB, MemoryEstimate, MemoryRequest, estimate
from causalreel.nn.policies.window import Context


def check(request: MemoryRequest, free: int, *, where: str = "the GPU") -> MemoryEstimate:
    """The estimate in the form that takes less, eager or bf16: which one will run is not known yet.

    ValueError if even that, without any reserve, is more than is free; it names changes that would help, and what each
    would take.
    """
    found = _smallest(request)
    if found.least <= free:
        return found
    helping = [f"{name} ({size / GIB:.1f} GiB)" for name, size in _savings(request, found)]
    options = f"; less is taken by {', '.join(helping)}" if helping else ""
    raise ValueError(
        f"not enough memory: {found.least / GIB:.1f} GiB are needed and {free / GIB:.1f} GiB free on {where}, "
        f"{(found.least - free) / GIB:.1f} GiB too few{options}"
    )


def _decoding(request: MemoryRequest, decoder: Any | None) -> MemoryEstimate:
    return _smallest(replace(request, decoder=decoder))


def _smallest(request: MemoryRequest) -> MemoryEstimate:
    return min((estimate(replace(request, form=form)) for form in ("eager", "bf16")), key=lambda found: found.least)


def _with(request: MemoryRequest, context: Context) -> MemoryRequest:
    if not isinstance(request.context, Context):
        raise ValueError(f"{request.context} has no window to be halved")
    return replace(request, context=context)


def _savings(request: MemoryRequest, found: MemoryEstimate) -> Iterator[tuple[str, int]]:
    """Single changes of a request that take less, and what is needed with them; the largest saving first."""
    window = request.context.most_seen(request.chunk or 1) or request.frames or 0
    half = request.context if isinstance(request.context, Context) else Context(window)  # the latter is not offered
    half = replace(half, window=max(window // 2, half.sink + (request.chunk or 0), 1))
    changes: dict[str, Callable[[], MemoryEstimate]] = {
        **{f"--decoder {name}": partial(_decoding, request, sizes) for name, sizes in request.decoders},
        "another GPU for decoding (--decode-device)": partial(_decoding, request, None),
        "the text encoder on the CPU": lambda: _smallest(replace(request, text_encoder="cpu")),
        f"a window of {half.window} latent frames": lambda: _smallest(_with(request, half)),
        "a batch of 1": lambda: _smallest(replace(request, batch=1)),
        "--precision fp8-attention": lambda: estimate(replace(request, form="fp8-attention")),
        f"{2 * request.gpus} GPUs": lambda: _smallest(replace(request, gpus=2 * request.gpus)),
    }
    needed = []
    for name, change in changes.items():
        with contextlib.suppress(ValueError):  # not possible with this model, chunk or size
            needed.append((name, change().least))
    yield from islice(sorted((one for one in needed if one[1] < found.least), key=lambda one: one[1]), 4)


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
