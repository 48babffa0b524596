"""How much memory a computation holds at once, found by running it on the meta device: shapes and types, no numbers.

The real code runs, so what is counted is what it allocates; nothing has to be kept in step with it by hand. Attention
is the exception: on the meta device torch would take the form that writes all scores down, so a form with an output and
a log-sum-exp, as the fused kernels have, stands in. Triton kernels are not launched. What libraries take for themselves
(cuDNN's and cuBLAS's workspaces) is not seen.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from causalreel.nn import attention, fp8_attention, kernels, split_attention
from causalreel.nn.masks import FrameMask
from causalreel.parallel import fast

BACKEND = "outline"
"""Name of the stand-in among the attention backends while `outlined` lasts."""


class Held(TorchDispatchMode):
    """Counts bytes of tensors made on one kind of device while it is entered: those alive now, and the most ever."""

    def __init__(self, device: str = "meta") -> None:
        super().__init__()
        self.device, self.now, self.peak = device, 0, 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device:
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self._known:
                    self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _Fused(TorchFunctionMode):
    """Attention as fused kernels hold it: q (...,L,D) -> (...,L,D), and (...,L) float32 for a moment."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _attended(args[0], args[2] if len(args) > 2 else (kwargs or {})["value"])
        return func(*args, **(kwargs or {}))


def _attended(q: Tensor, v: Tensor) -> Tensor:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    q.new_empty(q.shape[:-1], dtype=torch.float32)
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: FrameMask | None, tokens: int) -> Tensor:
    """As `nn.attention.Attend`; no mask is written down."""
    return _attended(q, v)


class _Silent:
    """A Triton kernel, or a module of them, that does nothing: what it writes to was made before."""

    def __getattr__(self, name: str) -> _Silent:
        return self

    def __getitem__(self, grid: Any) -> _Silent:
        return self

    def __call__(self, *args: Any, **how: Any) -> None:
        pass


def _attended_with_sum(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


PROCESSORS = 132
"""Of the GPU that attention is cut for."""


def _replacements() -> list[tuple[Any, str, Any]]:
    """Where fused kernels stand in modules, and what stands there on the meta device."""
    found: list[tuple[Any, str, Any]] = [
        (kernels, "uses_triton", lambda x: True),
        (kernels, "_triton", _Silent),
        (kernels, "_triton_attention", _Silent),
        (split_attention, "attend_plain", lambda q, k, v: torch.empty_like(q)),
        (split_attention, "attend_with_sum", _attended_with_sum),
        (split_attention, "processors_of", lambda device: PROCESSORS),
        (fp8_attention, "processors_of", lambda device: PROCESSORS),
        (fast, "attend_plain", lambda q, k, v: torch.empty_like(q)),
    ]
    if importlib.util.find_spec("triton") is not None:
        from causalreel.codecs import kernels as passes

        found += [(passes, name, _Silent()) for name in ("_between", "_gather_head", "_spread_phases")]
    return found


@contextmanager
def outlined() -> Iterator[Held]:
    """Inside, attention and fused kernels on the meta device only make their results, and what is held is counted."""
    attention.BACKENDS[BACKEND] = attention.Backend(_attend, lambda mask, dtype, device: True)
    replaced = [(module, name, getattr(module, name), stand_in) for module, name, stand_in in _replacements()]
    try:
        for module, name, _, stand_in in replaced:
            setattr(module, name, stand_in)
        with _Fused(), Held() as held, torch.no_grad():
            yield held
    finally:
        for module, name, original, _ in replaced:
            setattr(module, name, original)
        del attention.BACKENDS[BACKEND]
