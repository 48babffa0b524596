"""What a training stage is: networks by role, and losses over them. The trainer does everything else.

A stage computes losses; it never steps an optimiser, clips, averages, saves or logs. Its randomness comes from
`StepContext.generator`, which is keyed by (seed, step, purpose) and therefore has no state to save.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

from causalreel.types import AnyBatch, Batch, ClipBatch, LatentBatch, TrajectoryBatch, VideoBatch

Loss: TypeAlias = tuple[Tensor, dict[str, Tensor]]
"""A scalar float32 loss and detached scalar metrics, all of them tensors: no `.item()` in a loss.

A metric that is NaN in some step (an empty bin) is left out of the average that is logged.
"""


@dataclass(frozen=True)
class Update:
    """One optimiser step on one role: the gradient is the mean over `losses`, one micro-batch each."""

    role: str
    losses: Sequence[Callable[[], Loss]]


@dataclass(frozen=True)
class Average:
    """`role` follows `source` after each optimiser step on it: role <- decay * role + (1 - decay) * source.

    It starts as a copy and stays one up to trainer step `from_step`. Both roles must be float32.
    """

    role: str
    source: str
    decay: float
    from_step: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(f"decay of average {self.role!r}: got {self.decay}, allowed 0 to 1")


class DataSource(Protocol):
    """Rows by index. The trainer decides the order."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> Batch:
        """Rows at indices (B,) int64 on the CPU. On any device; `StepContext.batch` moves them to the trainer's."""
        ...


@runtime_checkable
class ReadsAhead(DataSource, Protocol):
    """A source that reads rows before they are asked for."""

    def expect(self, indices: Tensor) -> None:
        """Rows (n,) that will be asked for soon, the soonest first."""
        ...


class Stage(Protocol):
    """Losses over roles.

    `derived`, if a stage has it: networks that are made of roles and are no state, such as a copy in another type;
    `whole`: such networks that every process holds whole.
    `Probes` and `ShowsData` are what else it may have.
    Roles with an optimiser in the trainer's config are trained, roles named by `averages` follow, all others are
    frozen. Nothing else may change a role's weights.
    """

    @property
    def roles(self) -> dict[str, nn.Module]: ...

    @property
    def averages(self) -> Sequence[Average]: ...

    def updates(self, step: StepContext) -> Iterator[Update]:
        """The updates of one trainer step, in order. Each is applied before the next one is asked for."""
        ...

    def preview(self, step: StepContext) -> Tensor | None:
        """A video (B,T,3,H,W) in [-1, 1] that shows progress, or None. Called without gradient."""
        ...


@runtime_checkable
class Probes(Protocol):
    """A stage that can say how well its student knows the data."""

    def probe(self, step: StepContext) -> dict[str, Tensor]:
        """-> scalars (), as `kit.probe`. Nothing that a step computes depends on it."""
        ...


class DataViewer(Protocol):
    def data(self, step: StepContext) -> Tensor | None:
        """A video (B,T,3,H,W) in [-1, 1] of the data's own clips, None where there are none."""
        ...


@runtime_checkable
class ShowsData(Protocol):
    """A stage whose previews can be compared with the data's own clips."""

    @property
    def viewer(self) -> DataViewer: ...


class DataCursor:
    """Endless pass over `rows` rows: a permutation per epoch, keyed by (seed, epoch). Its only state is `position`."""

    def __init__(self, rows: int, seed: int, position: int = 0) -> None:
        if rows < 1:
            raise ValueError(f"data source: got {rows} rows, at least 1 is needed")
        self.rows, self.seed, self.position = rows, seed, position
        self._orders: dict[int, Tensor] = {}

    def copy(self) -> DataCursor:
        """Another one at the same position."""
        other = DataCursor(self.rows, self.seed, self.position)
        other._orders = self._orders
        return other

    def take(self, size: int) -> Tensor:
        """The next `size` row indices (size,), continuing into the next epoch; advances the position."""
        found = self.peek(size)
        self.position += size
        return found

    def peek(self, size: int) -> Tensor:
        """What `take` would give, the position stays."""
        if size < 1:
            raise ValueError(f"batch size: got {size}, at least 1 is needed")
        parts, position = [], self.position
        while size > 0:
            epoch, start = divmod(position, self.rows)
            part = self._permutation(epoch)[start : start + size]
            parts.append(part)
            position += len(part)
            size -= len(part)
        return torch.cat(parts)

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            generator = torch.Generator().manual_seed(stable_seed(self.seed, epoch, "data order"))
            kept = {last: order for last, order in self._orders.items() if last == epoch - 1}  # peeked at from there
            self._orders = kept | {epoch: torch.randperm(self.rows, generator=generator)}
        return self._orders[epoch]


@dataclass(frozen=True)
class StepContext:
    """What a stage gets in each step: the 0-based step number, random generators and data.

    A batch may be cut into equal parts, which other processes have or which follow each other in this one: then a stage
    sees one part and draws for it what the whole batch would get, so that the cut changes no number.
    """

    step: int
    seed: int
    source: DataSource
    cursor: DataCursor
    device: torch.device
    part: int = 0
    """Which part of every batch this is."""
    parts: int = 1
    """Parts of every batch."""
    waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around the wait for data."""

    def generator(
        self, purpose: str, *, device: torch.device | str | None = None, step: int | None = None
    ) -> torch.Generator:
        """A new generator seeded by (seed, step, purpose), on the trainer's device unless another is given.

        The same purpose in the same step gives the same numbers: put what differs (update, micro-batch, rank) in it.
        `step` replaces the current step, for noise that is the same in every preview.
        """
        seed = stable_seed(self.seed, self.step if step is None else step, purpose)
        return torch.Generator(self.device if device is None else device).manual_seed(seed)

    def mine(self, rows: Tensor) -> Tensor:
        """Rows of a whole batch (B,...) -> those of this part (B/parts,...): every `parts`-th of them."""
        return rows[self.part :: self.parts]

    def batch(self, size: int, kind: type[AnyBatch]) -> AnyBatch:
        """This part of the next `size` rows, on the trainer's device; ValueError if of another kind."""
        if size % self.parts:
            raise ValueError(
                f"batch: got {size}, which cannot be cut into {self.parts} equal parts (processes with rows of their "
                f"own, times trainer.accumulate); allowed are multiples of {self.parts}"
            )
        indices = self.mine(self.cursor.take(size))
        if isinstance(self.source, ReadsAhead):
            self.source.expect(torch.cat([indices, self.mine(self.cursor.peek(size))]))
        with self.waiting():
            rows = self.source.batch(indices)
        return of_kind(rows, kind).to(self.device)

    def rows(self, rows: Sequence[int], kind: type[AnyBatch]) -> AnyBatch:
        """These rows of the data, as `batch`; the data position stays."""
        return of_kind(self.source.batch(torch.tensor(rows)), kind).to(self.device)


HOLDS = {
    ClipBatch: "latents",
    LatentBatch: "latents",
    TrajectoryBatch: "trajectories",
    VideoBatch: "video",
    Batch: "only prompts",
}
"""Kind of batch -> what it holds, for messages."""


def of_kind(batch: Batch, kind: type[AnyBatch]) -> AnyBatch:
    """The batch, if it is of that kind; else a ValueError that says what is needed and what is there."""
    if not isinstance(batch, kind):
        raise ValueError(f"this stage needs {HOLDS[kind]}, the data source has {HOLDS[type(batch)]}")
    return batch


def stable_seed(seed: int, step: int, purpose: str) -> int:
    """A 63-bit seed from (seed, step, purpose) that is the same on every machine and Python."""
    digest = hashlib.blake2b(f"{seed}/{step}/{purpose}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
