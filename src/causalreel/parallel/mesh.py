"""The processes of one launch: the launcher's rank variables, this process's device, the process group. Only this file
touches any of them. `torchrun --nproc_per_node=N` sets the variables; without them there is one process.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import TCPStore

PATIENCE = timedelta(minutes=10)
"""How long processes wait for each other before a collective fails."""


class Holder(Protocol):
    """What may hold the group's communicators, as CUDA graphs do in which a collective was captured."""

    def release(self) -> None: ...


_holders: weakref.WeakSet[Holder] = weakref.WeakSet()


def release_first(holder: Holder) -> None:
    """`holder.release()` is called before this process leaves its group: NCCL's leaving waits for it, for ever if need
    be."""
    _holders.add(holder)


@dataclass(frozen=True)
class Launch:
    """What the launcher says: this process's number, of how many; the same on this machine alone."""

    rank: int
    size: int
    local_rank: int
    local_size: int


@dataclass(frozen=True)
class Mesh:
    """This process in the launch's process group, which is torch's default group while it lasts, and its device.

    It does not hold the group: who does keeps its threads alive until Python ends, where they may abort the process.
    """

    rank: int
    size: int
    device: torch.device


def launch() -> Launch | None:
    """The launcher's variables; None in a process that is alone. Imports nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    return Launch(rank, size, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", size)))


@lru_cache(maxsize=1)
def store() -> TCPStore:
    """What all processes of the launch can write to and read, before and beside any process group."""
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed.rendezvous import rendezvous

    found, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    assert isinstance(found, TCPStore)
    return found


def another_store() -> TCPStore:
    """The same store through a connection of its own, for use in another thread."""
    from torch._C._distributed_c10d import TCPStore

    return TCPStore(store().host, store().port, is_master=False, timeout=PATIENCE)


def device_of(where: Launch, wanted: str | None) -> torch.device:
    """This process's device: the GPU of its local rank, or the CPU if that is wanted or there is no GPU."""
    import torch

    kind = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"each of the {where.size} processes takes its own device: cpu or cuda, not {kind!r}")
    if kind == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device 'cuda': there is no CUDA here, use cpu")
    if where.local_size > torch.cuda.device_count():
        raise ValueError(
            f"{where.local_size} processes were started on a machine with {torch.cuda.device_count()} GPUs; "
            f"start at most one for each: torchrun --nproc_per_node={max(1, torch.cuda.device_count())}"
        )
    return torch.device("cuda", where.local_rank)


@contextmanager
def join(where: Launch, device: str | None = None) -> Iterator[Mesh]:
    """Join the launch's process group (NCCL on GPUs, gloo on CPUs) and leave it at the end.

    The group is used once, so that what is wrong with it shows here and that CUDA graphs may be captured behind it.
    After an error it is not left in good order, because that would wait for processes that may be gone or stuck.
    """
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    place = device_of(where, device)
    is_cuda = place.type == "cuda"
    if is_cuda:
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        store=PrefixStore("mesh", store()),
        rank=where.rank,
        world_size=where.size,
        timeout=PATIENCE,
        device_id=place if is_cuda else None,
    )
    ready = torch.ones(where.size, device=place)
    dist.all_to_all_single(torch.empty_like(ready), ready)
    dist.all_reduce(ready)
    if is_cuda:
        torch.cuda.synchronize(place)
    yield Mesh(where.rank, where.size, place)
    for holder in list(_holders):
        holder.release()
    if is_cuda:
        torch.cuda.synchronize(place)
    dist.destroy_process_group()
