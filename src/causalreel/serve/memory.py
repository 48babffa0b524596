"""How much memory a session holds and how much there is, measured and not estimated."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from types import FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn


def held_bytes(root: object, *, without: tuple[object, ...] = ()) -> int:
    """Bytes of all tensors that `root` leads to, each storage counted once; nothing behind modules and `without`."""
    seen = {id(other) for other in without}
    storages: dict[int, int] = {}
    stack: list[Any] = [root]
    while stack:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, FunctionType):
            stack += [cell.cell_contents for cell in thing.__closure__ or () if _is_filled(cell)]
        elif not isinstance(thing, nn.Module | ModuleType | FrameType | type | str | bytes | int | float):
            stack += gc.get_referents(thing)
    return sum(storages.values())


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def free_bytes(device: torch.device) -> int:
    """Memory that could still be had on a device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available, left = _psutil().virtual_memory().available, _cgroup_left()
    return available if left is None else min(available, left)


def steady_heap() -> bool:
    """Have the C library keep what it has got from the system, for programs that work the same way for ever.

    By default glibc gives freed pages back and asks for them again, many times a second in a decoder: resident memory
    wanders by a few percent. Set once at the start of a program, never by a library. -> whether it could be set.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # of malloc.h
    wanted = {arena_max: 1, mmap_threshold: 1 << 25, trim_threshold: 1 << 30}
    return all(mallopt(name, value) for name, value in wanted.items())


def process_bytes() -> int:
    """Resident memory of this process."""
    return _psutil().Process().memory_info().rss


def _psutil() -> ModuleType:
    try:
        import psutil
    except ImportError as error:
        raise ImportError("serving needs psutil; install it with: pip install 'causalreel[serve]'") from error
    return psutil


def _cgroup_left() -> int | None:
    """What the container may still take (cgroup v2)."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return None
    return None if limit == "max" else max(int(limit) - int(used), 0)
