"""How much memory a computation holds at once, found by running it on the meta device: shapes and types, no numbers.

The real code runs, so what is counted is what it allocates; nothing has to be kept in step with it by hand. Attention
is the exception: on the meta device torch would take the form that writes all scores down, so a form with an output and
a log-sum-exp, as the fused kernels have, stands in. What libraries take for themselves (cuDNN's and cuBLAS's
workspaces) is not seen.
"""

from __future__ import annotations

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

from causalreel.nn import attention
from causalreel.nn.masks import FrameMask

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


@contextmanager
def outlined() -> Iterator[Held]:
    """Inside, attention on the meta device is the stand-in, and what is held on that device is counted."""
    attention.BACKENDS[BACKEND] = attention.Backend(_attend, lambda mask, dtype, device: True)
    try:
        with _Fused(), Held() as held, torch.no_grad():
            yield held
    finally:
        del attention.BACKENDS[BACKEND]
