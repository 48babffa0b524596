"""Checkpoints of several processes: each writes what it holds (torch.distributed.checkpoint), any number reads it back.

    step-00001000/  __<rank>_<n>.distcp ...  .metadata  frozen/  trainer.pt  config.yaml  manifest.json

The directory appears once all of it is there, as that of one process does (`train.checkpoint`), and its manifest holds
the same hashes. All processes must see the same file system. `frozen/` holds the roles that never change: later
checkpoints link to its files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from causalreel.files import replacing_folder
from causalreel.hashed import sha256_of
from causalreel.parallel.sharding import Team
from causalreel.train import checkpoint
from causalreel.train.checkpoint import State

Result = TypeVar("Result")

FROZEN = "frozen"

log = logging.getLogger("causalreel.train")


@dataclass
class _Pending:
    """A checkpoint that is being written."""

    step: int
    state: State
    folder: Path
    written: Future[Any] | None
    """None where writing has ended already."""
    finish: ExitStack
    """In the first process: gives the folder its name, or removes it."""


class Saver:
    """Writes the checkpoints of a run; all processes of its team call the same methods in the same order.

    whole: what is done in the first process with a checkpoint that is there, such as deleting older ones.
    is_behind: `save` returns once tensors are copied to the host, and the checkpoint appears some steps later.
    """

    def __init__(
        self,
        directory: Path,
        team: Team,
        *,
        whole: Callable[[Path], None],
        is_hashed: bool,
        is_behind: bool = False,
    ) -> None:
        self.directory, self.team, self.whole = directory, team, whole
        self.is_hashed, self.is_behind = is_hashed, is_behind
        self._pending: _Pending | None = None

    def save(self, step: int, state: State) -> Path:
        """Begin the checkpoint of `step` completed steps, and end it too unless `is_behind`. -> where it is or will be.

        OSError in all processes if one of them cannot write; what was there stays.
        """
        self.finish()
        final, finish = self.directory / f"step-{step:08}", ExitStack()

        def begin() -> Path:
            self.directory.mkdir(parents=True, exist_ok=True)
            return finish.enter_context(replacing_folder(final))

        def write() -> Future[Any] | None:
            tensors, frozen = _parts(state)
            if not self._link_frozen(folder, sorted(frozen)):
                self._write(frozen, folder / FROZEN)
            if self.is_behind:
                how = {"storage_writer": FileSystemWriter(folder), "process_group": self.team.saving}
                return async_save(tensors, **how)  # type: ignore[return-value]
            self._write(tensors, folder)
            return None

        try:
            folder = Path(self._together(lambda: str(begin()) if self.team.is_first else "")[0])
            written = self._together(write)[self.team.rank]
        except OSError as error:
            self._abandon(finish, final, error)
        self._pending = _Pending(step, state, folder, written, finish)
        if not self.is_behind:
            self.finish()
        return final

    def poll(self) -> None:
        """End the checkpoint that is being written, if all processes have written their part."""
        if self.is_behind and self._pending is not None:
            written = self._pending.written
            if not self.team.any(written is not None and not written.done())[0]:
                self.finish()

    def rescue(self) -> None:
        """In a process that was interrupted anywhere: end the checkpoint that is being written, if all others do."""
        if self._pending is None:
            return
        log.warning("a checkpoint is still being written and is ended first; once more to drop it")
        with suppress(OSError, RuntimeError):  # a disk, or processes that were not interrupted: what was there stays
            self.finish(is_leaving=True)

    def finish(self, *, is_leaving: bool = False) -> None:
        """Wait for the checkpoint that is being written: then it is there, and the older ones go."""
        pending = self._pending
        if pending is None:
            return
        final = self.directory / f"step-{pending.step:08}"

        def hashes() -> dict[str, str]:
            if pending.written is not None:
                pending.written.result()
            return self._hashes(pending.folder) if self.is_hashed else {}

        def end(found: Mapping[str, str]) -> None:
            checkpoint.seal(pending.folder, pending.step, pending.state, found)
            pending.finish.close()
            self.whole(final)

        try:
            parts = together(self.team, hashes, is_leaving=is_leaving)
            found = {name: value for part in parts for name, value in part.items()}
            together(self.team, lambda: end(found) if self.team.is_first else None, is_leaving=is_leaving)
            self._pending = None
        except OSError as error:
            self._pending = None
            self._abandon(pending.finish, final, error)

    def _write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        if tensors:
            save(tensors, storage_writer=FileSystemWriter(folder), process_group=self.team.control)

    def _link_frozen(self, folder: Path, names: list[str]) -> bool:
        """Link to the former checkpoint's frozen roles -> whether it has the same ones and they are linked."""

        def link() -> bool:
            former = checkpoint.latest(self.directory)
            if former is None or not names or not (former / FROZEN).is_dir() or _names(former / FROZEN) != names:
                return False
            with suppress(OSError):
                (folder / FROZEN).mkdir()
                return all(checkpoint.link(file, folder / FROZEN / file.name) for file in (former / FROZEN).iterdir())
            return False

        return self.team.first(link() if self.team.is_first else False)

    def _hashes(self, folder: Path) -> dict[str, str]:
        """Each process takes the files that it has written, and those of ranks that there are no more: a folder with
        frozen roles may be of more processes. The first has the rest. Linked ones keep theirs."""
        former = checkpoint.latest(self.directory)
        known = checkpoint.hashes_of(former) if former else {}
        found = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            owner = path.name.split("_")[2] if path.name.startswith("__") else "0"
            name = path.relative_to(folder).as_posix()
            if int(owner) % self.team.size == self.team.rank:
                is_linked = path.stat().st_nlink > 1 and name in known
                found[name] = known[name] if is_linked else sha256_of(path)
        return found

    def _together(self, work: Callable[[], Result]) -> list[Result]:
        """Everybody's result; OSError in all if one process had one."""
        return together(self.team, work)

    def _abandon(self, finish: ExitStack, final: Path, error: OSError) -> NoReturn:
        """Remove what was written so far and say what is left."""
        if self.team.is_first:
            with suppress(OSError):  # the same error, which comes out of the folder's own clean-up again
                finish.__exit__(type(error), error, None)
        raise checkpoint.not_written(final, error) from error


def together(team: Team, work: Callable[[], Result], *, is_leaving: bool = False) -> list[Result]:
    """Do something in every process -> all results, by rank; if it fails in one, its OSError or ValueError in all.

    is_leaving: see `Team.gathered`.
    """
    result: Any = None
    failure: OSError | ValueError | None = None
    try:
        result = work()
    except (OSError, ValueError) as error:
        failure = error
    except CheckpointException as error:
        failure = _first_failure(error)
    shown = None if isinstance(result, Future) else result
    found = team.gathered((shown, failure and _plain(failure)), is_leaving=is_leaving)
    for _, problem in found:
        if problem is not None:
            raise problem
    results: list[Any] = [part for part, _ in found]
    results[team.rank] = result
    return results


def _first_failure(error: CheckpointException) -> OSError | ValueError:
    cause = next(iter(error.failures.values()))[0]
    return cause if isinstance(cause, (OSError, ValueError)) else OSError(str(cause))


def _plain(error: OSError | ValueError) -> OSError | ValueError:
    """The error as it can be sent."""
    if isinstance(error, OSError):
        return OSError(error.errno, error.strerror, error.filename) if error.errno else OSError(str(error))
    return ValueError(str(error))


def _parts(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors by "role/name": those that change, and those of frozen roles."""
    moving, frozen = {}, {}
    for role, tensors in state.roles.items():
        part = frozen if role in state.frozen else moving
        part.update({f"{role}/{name}": tensor for name, tensor in tensors.items()})
    return {**moving, **state.moments}, frozen


# ---- back


def _names(folder: Path) -> list[str]:
    return sorted(FileSystemReader(folder).read_metadata().state_dict_metadata)


def is_sharded(path: Path) -> bool:
    """Whether several processes wrote this checkpoint."""
    return (path / ".metadata").is_file()


def moments_in(path: Path) -> list[str]:
    """The names "role.adamw/parameter/kind" that a checkpoint has."""
    return [name for name in _names(path) if ".adamw/" in name]


def read_into(path: Path, tensors: Mapping[str, Tensor], team: Team) -> None:
    """Fill these tensors, shared or not, with those of the same names; ValueError for a name or shape that differs."""
    there: dict[str, Any] = {}
    places = [folder for folder in (path, path / FROZEN) if (folder / ".metadata").is_file()]
    for folder in places:
        for name, facts in FileSystemReader(folder).read_metadata().state_dict_metadata.items():
            there[name] = folder, facts
    for problem, keys in (("missing", tensors.keys() - there.keys()), ("unexpected", there.keys() - tensors.keys())):
        if keys:
            raise ValueError(f"checkpoint {path}: {len(keys)} {problem} keys, first {min(keys)!r}")
    for name, tensor in tensors.items():
        facts = there[name][1]
        assert isinstance(facts, TensorStorageMetadata)
        if (facts.size, facts.properties.dtype) != (tensor.shape, tensor.dtype):
            got, expected = (tuple(facts.size), facts.properties.dtype), (tuple(tensor.shape), tensor.dtype)
            raise ValueError(f"checkpoint {path}: {name} is {got}, expected {expected}")
    for folder in places:
        part: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if there[name][0] == folder}
        how: dict[str, Any] = {"storage_reader": FileSystemReader(folder), "process_group": team.control}
        together(team, lambda part=part, how=how: load(part, no_dist=team.control is None, **how))


def verify(path: Path, team: Team) -> None:
    """Compare the files with their hashes, each process some of them; ValueError in all if one differs."""
    hashes = sorted(checkpoint.hashes_of(path).items())
    together(team, lambda: checkpoint.verify(path, dict(hashes[team.rank :: team.size])))
