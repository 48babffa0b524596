"""The one way of weights into a module: every name, shape, type and value must be what the module expects."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from causalreel.codecs.codec import Codec
from causalreel.codecs.kinds import build
from causalreel.foreign import shown
from causalreel.weights.identify import config_of, describe, size_in_words

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Types that exported weights may have; files of others may be float64 as well."""
ANY_FLOATS = (*FLOATS, torch.float64)


def load_strictly(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str,
    assign: bool = False,
    types: Sequence[torch.dtype] = ANY_FLOATS,
) -> None:
    """Put the tensors into the module; ValueError for names, shapes, types and values that do not fit: which, and what
    the file looks like. The module stays as it was then.

    assign: the tensors become the parameters, with their type and device, and nothing is copied.
    """
    check_fits(module, tensors, source=source)
    check_types(tensors, source=source, types=types)
    check_finite(tensors, source=source)
    module.load_state_dict(dict(tensors), strict=True, assign=assign)


def check_types(tensors: Mapping[str, Tensor], *, source: str, types: Sequence[torch.dtype] = FLOATS) -> None:
    """ValueError naming the first tensor of another type."""
    for name, value in tensors.items():
        if value.dtype not in types:
            kind, *allowed = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, *types))
            raise ValueError(f"{source}: {shown(name)} is {kind}, weights are {', '.join(allowed)}")


def filled_codec(
    sizes: Any, tensors: Mapping[str, Tensor], *, source: str, types: Sequence[torch.dtype] = ANY_FLOATS
) -> Codec:
    """A codec of any kind with these weights, in float32 on the CPU, in evaluation mode, without gradient."""
    with without_initialisation():
        codec = build(sizes)
    load_strictly(codec, tensors, source=source, types=types)
    return codec.requires_grad_(False).eval()


def check_fits(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """ValueError, in one line, if names or shapes differ from the module's: which, and what the file looks like."""
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in tensors.items()}
    missing = [name for name in wanted if name not in shapes]
    unexpected = [name for name in shapes if name not in wanted]
    wrong = [name for name in wanted if name in shapes and wanted[name] != shapes[name]]
    if not (missing or unexpected or wrong):
        return
    config, size = config_of(shapes), config_of(wanted)
    is_other_size = config is not None and size is not None and size_in_words(config) != size_in_words(size)
    told = [f"{len(missing)} names missing (first: {_few(missing)})"] if missing else []
    told += [f"{len(unexpected)} unexpected (first: {_few(unexpected)})"] if unexpected else []
    if wrong:
        wants = f" ({size_in_words(size)})" if is_other_size and size is not None else ""
        shape = f"{wrong[0]} has the wrong shape {shapes[wrong[0]]}, the network{wants} has {wanted[wrong[0]]}"
        told = [shape, *told] if is_other_size else [*told, shape]
    verdict = "does not fit the network"
    if is_other_size or not (missing or unexpected):
        verdict = "is of another model size" if is_other_size else "does not fit, or is of another model size"
    raise ValueError(f"{source} {verdict}: {', '.join(told)}; {describe(shapes)}")


def _few(names: list[str]) -> str:
    return ", ".join(shown(name) for name in names[:3])


def check_finite(tensors: Mapping[str, Tensor], *, source: str) -> None:
    """ValueError naming the first tensor with a value that is not finite. Reads everything once."""
    real = {name: value for name, value in tensors.items() if value.device.type != "meta"}
    totals = torch.zeros(len(real), device=next(iter(real.values())).device) if real else torch.zeros(0)
    for i, value in enumerate(real.values()):  # into one tensor: one wait for a GPU, and a heap without holes
        totals[i] = value.sum(dtype=torch.float32)
    if totals.isfinite().all():
        return
    for (name, value), total in zip(
        real.items(), totals.tolist(), strict=True
    ):  # finite values may have a sum that is not
        if not math.isfinite(total) and not (good := value.isfinite()).all():
            count = good.numel() - int(good.sum())
            raise ValueError(f"{source}: not finite: {shown(name)} has {count} values that are NaN or infinite")


def check_range(name: str, before: Tensor, after: Tensor) -> None:
    """ValueError, naming the tensor, if values became infinite in another type; float16 ends at 65,504."""
    is_rounded = after.dtype == torch.float16 != before.dtype and not after.is_meta
    if is_rounded and after.isinf().any() and not before.isinf().any():
        raise ValueError(f"{shown(name)} has values beyond float16, which ends at 65,504; bfloat16 holds them")


class _Unfilled(TorchFunctionMode):
    """Random fills leave tensors as they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func in (Tensor.uniform_, Tensor.normal_) else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_initialisation() -> Iterator[None]:
    """For networks that are loaded at once: no time spent on random weights, and the caller's generator stays.

    A meta device would do as well, but its first arithmetic imports torch's compiler, which takes a second.
    """
    with torch.random.fork_rng(devices=[]), _Unfilled():
        yield
