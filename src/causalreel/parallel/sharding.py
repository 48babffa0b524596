"""A training run in several processes: who has which rows, how networks are shared, what is agreed upon.

Every network is cut over `shard` processes (FSDP2: per block and root), the cuts are repeated in `replicate` groups,
and `context` neighbours share each row's tokens. Gradients are the mean over all of them, so N processes take the step
that one process takes on the same batch. One process alone has a `Team` too, which does nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.parallel.ulysses import shard_sequence

Value = TypeVar("Value")

LEAVING = timedelta(seconds=25)
"""How long processes that were interrupted wait for each other to end a checkpoint; torchrun kills after 30."""

WAIT = timedelta(days=2)
"""How long processes wait for the one that fetches weights, or for trajectories that others make; gloo's own half an
hour is over before a large file is here."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes of a launch share the work; their product is the number of processes."""

    shard: int | None = None
    """Processes that hold each network together; null: all that `replicate` and `context` leave."""
    replicate: int = 1
    """Groups with whole networks, such as nodes: only gradients pass between them."""
    context: int = 1
    """Processes that share the tokens of each row; must divide the network's heads and a latent frame's tokens."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed over processes."""

    def __post_init__(self) -> None:
        for name in ("shard", "replicate", "context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, allowed 1 or more")

    def shards(self, processes: int) -> int:
        """Processes that hold each network together, of a launch of so many; ValueError that says what to change."""
        others = self.replicate * self.context
        wanted = None if self.shard is None else self.shard * others
        if processes % others or wanted not in (None, processes):
            least = f"a multiple of {others}" if wanted is None else str(wanted)
            raise ValueError(
                f"trainer.parallel: shard {self.shard or 'null'} x replicate {self.replicate} x context {self.context} "
                f"needs {least} processes, this launch has {processes}: start as many with torchrun, or set "
                f"trainer.parallel.{self._too_large(processes)}"
            )
        return processes // others

    def _too_large(self, processes: int) -> str:
        """The key to change first, with a value that works."""
        if processes % self.context:
            return "context=1"
        return "replicate=1" if processes % (self.replicate * self.context) else "shard=null"


class Team:
    """The processes of a run; made inside `parallel.mesh.join`, or in a process that is alone.

    All of them call the same methods in the same order.
    """

    def __init__(self, config: ParallelConfig = ParallelConfig(), device: torch.device | None = None) -> None:
        self.config = config
        is_joined = dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if is_joined else (0, 1)
        shards = config.shards(self.size)
        self.part, self.parts = self.rank // config.context, self.size // config.context
        """Which rows of a batch are this process's; processes that share tokens have the same."""
        self.control: dist.ProcessGroup | None = None
        """Of the hosts, waiting for no GPU; None in a process that is alone."""
        self.saving: dist.ProcessGroup | None = None
        """The same for a thread that writes checkpoints."""
        self.leaving: dist.ProcessGroup | None = None
        """The same for processes that were interrupted, wherever that was in what they do with the others."""
        self.context: dist.ProcessGroup | None = None
        """Of the processes that share tokens with this one."""
        self._waiting: dist.ProcessGroup | None = None
        if not is_joined:
            return
        from torch.distributed.device_mesh import init_device_mesh

        self._device = device or torch.device("cpu")
        kind = self._device.type
        held, names = shards * config.context, ("replicate", "shard")
        self._mesh = init_device_mesh(kind, (config.replicate, held), mesh_dim_names=names)
        if config.replicate == 1:
            self._mesh = self._mesh["shard"]
        if config.context > 1:
            grid = init_device_mesh(kind, (self.parts, config.context), mesh_dim_names=("rows", "context"))
            self.context = grid["context"].get_group()
        self.control, self.saving, self._waiting = _hosts(), _hosts(), _hosts(WAIT)
        self.leaving = _hosts(LEAVING)

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    # ---- networks

    def share(self, network: nn.Module, *, is_on_host: bool = False) -> None:
        """Cut a network's parameters over the processes, in place; they become DTensors. Alone: nothing.

        The unit that is gathered is a block of a denoiser, and the rest. Weights are gathered in their own type, so
        that mixed precision is the same in any number of processes. Every call gives back what it gathered: weights
        may change between any two calls. is_on_host: each part waits in the host's memory until it is gathered.
        """
        if self.control is None:
            return
        if self.context is not None and isinstance(network, DiTDenoiser):
            try:
                shard_sequence(network, self.context)
            except ValueError as error:
                raise ValueError(f"trainer.parallel.context: {error}") from None
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")  # changed by nobody
        policy = MixedPrecisionPolicy(reduce_dtype=getattr(torch, self.config.reduce), cast_forward_inputs=False)
        waiting = CPUOffloadPolicy(pin_memory=self._device.type == "cuda") if is_on_host else OffloadPolicy()
        how: dict[str, Any] = {"mesh": self._mesh, "mp_policy": policy, "offload_policy": waiting}
        root: nn.Module = network
        if isinstance(network, DiTDenoiser):
            root = network.model
            for block in network.model.blocks:
                fully_shard(block, reshard_after_forward=True, **how)
        fully_shard(root, reshard_after_forward=True, **how)

    def repeat(self, network: nn.Module) -> None:
        """Hold a network whole in every process: a frozen base, which several networks may have in common, and
        adapters, whose gradients `average` makes the same everywhere. Alone: nothing."""
        if self.context is not None and isinstance(network, DiTDenoiser):
            shard_sequence(network, self.context)

    def average(self, gradients: Sequence[Tensor]) -> None:
        """Gradients of repeated networks -> their means over all processes, in place and in one message."""
        if self.control is None:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat.div_(self.size))
        torch._foreach_copy_(list(gradients), _cut(flat, gradients))  # pyright: ignore[reportPrivateImportUsage]

    def sum_at_end(self, network: nn.Module, is_end: bool) -> None:
        """Whether the next backward pass of a trained network is the last one of an update: only then gradients are
        summed over the processes."""
        root = network.model if isinstance(network, DiTDenoiser) else network
        if hasattr(root, "set_requires_gradient_sync"):
            root.set_requires_gradient_sync(is_end)  # type: ignore[operator]

    def norm(self, local: Tensor) -> Tensor:
        """Norm () of what this process holds of a network -> of the whole; nothing waits for the GPU."""
        if self.control is None:
            return local
        group = self._mesh["shard"].get_group() if self._mesh.ndim > 1 else self._mesh.get_group()
        square = local.square()
        dist.all_reduce(square, group=group)
        return square.sqrt()

    # ---- what is agreed upon

    def mean(self, numbers: Sequence[float], *, is_strict: Sequence[bool]) -> list[float]:
        """Each process's numbers -> their means: over the finite ones, but NaN where one is not and `is_strict`."""
        if self.control is None:
            return list(numbers)
        own = torch.tensor(numbers, dtype=torch.float64)
        finite = own.isfinite()
        both = torch.stack([torch.where(finite, own, 0.0), finite.double()])
        dist.all_reduce(both, group=self.control)
        means = both[0] / both[1]  # NaN where none is finite
        return torch.where(torch.tensor(is_strict) & (both[1] < self.size), torch.nan, means).tolist()

    def any(self, *facts: bool) -> tuple[bool, ...]:
        """For each fact, whether it holds in any process."""
        if self.control is None:
            return facts
        found = torch.tensor(facts, dtype=torch.int32)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return tuple(map(bool, found.tolist()))

    def gathered(self, value: Value, *, is_leaving: bool = False) -> list[Value]:
        """Everybody's value, by rank. is_leaving: of those that were interrupted; RuntimeError if some are not."""
        if self.control is None:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.leaving if is_leaving else self.control)
        return found

    def first(self, value: Value) -> Value:
        """The first process's value."""
        if self.control is None:
            return value
        held = [value]
        dist.broadcast_object_list(held, src=0, group=self.control)
        return held[0]

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """The body in the first process, then in the others."""
        if not self.is_first:
            self.wait()
        yield
        if self.is_first:
            self.wait()

    def wait(self) -> None:
        """Until all have come this far, for as long as `WAIT`; a process that dies is noticed before."""
        if self.control is not None:
            dist.barrier(group=self._waiting)


def _hosts(patience: timedelta | None = None) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=patience)
    assert isinstance(group, dist.ProcessGroup)
    return group


def _cut(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A flat tensor in pieces of these shapes."""
    pieces = flat.split([one.numel() for one in like])
    return [piece.view_as(one) for piece, one in zip(pieces, like, strict=True)]


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: the same memory, or the tensor itself where it is not shared."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that the processes share; all of them must ask. On their GPUs, even if parts wait on hosts."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    mesh, place = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    if tensor.device.type != mesh.device_type:  # what gathers is between GPUs
        from torch.distributed.tensor import DTensor

        part = local(tensor).to(mesh.device_type)
        shape = {"shape": tensor.shape, "stride": tensor.stride()}
        return DTensor.from_local(part, mesh, place, run_check=False, **shape).full_tensor()
    return tensor.full_tensor()  # type: ignore[operator]


def whole_state(tensors: Mapping[str, Tensor], *, is_kept: bool) -> dict[str, Tensor]:
    """All of tensors that the processes share, on the host; empty where not `is_kept`. All processes must ask."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())
        if is_kept:
            found[name] = full.cpu()
    return found


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy one network's parameters into another one's of the same make, each in its own type; the target may be whole
    in every process where the source is not."""
    new, own = list(source.parameters()), list(target.parameters())
    if any(hasattr(there, "to_local") and not hasattr(here, "to_local") for there, here in zip(new, own, strict=True)):
        for there, here in zip(new, own, strict=True):
            here.copy_(whole(there.to(here.dtype)))  # what passes between processes is in the target's type
    else:
        torch._foreach_copy_([local(p) for p in own], [local(p) for p in new])  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def fill(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, such as a mapped file's, into one that may be shared: each process reads its part."""
    if not hasattr(target, "to_local"):
        target.copy_(source)
        return
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)  # type: ignore[attr-defined]
    assert all(not isinstance(p, Shard) or p.dim == 0 for p in target.placements)  # type: ignore[attr-defined]
    local(target).copy_(source[offset[0] : offset[0] + shape[0]] if source.ndim else source)
