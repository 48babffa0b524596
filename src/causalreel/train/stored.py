"""Teacher trajectories on disk: made part by part, known by what they were made from, never mixed.

    <out>/trajectories.safetensors           all of them
    <out>/trajectories/part-00000.safetensors  while they are made: what a stopped run has, and goes on from

Each file says what it was made from (fingerprints of data and teacher, settings, seed) and the hash of its tensors.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from causalreel.data.sources import TrajectorySource
from causalreel.fingerprint import fingerprint
from causalreel.headers import read_header
from causalreel.parallel.sharding import Team
from causalreel.types import Conditioning
from causalreel.weights.files import read_tensors, write_tensors

log = logging.getLogger("causalreel.train")

Rows = dict[str, Tensor]
"""`states` (P,S,F,C,H,W) and the conditioning by `Conditioning.named`: `text` (P,K,E) and fields."""


ON_DEVICE = 2**30
"""Bytes of trajectories that lie on the device; more are read from the mapped file, batch by batch. The 6000 of
wan/causal_ode are about 180 GB."""


@dataclass(frozen=True)
class Store:
    """The trajectories of a run's folder, which the caller has claimed."""

    out: Path
    made_from: Mapping[str, str]
    """What decides them: part -> fingerprint or setting."""
    has_begun: bool
    """Whether the run has trained on what is there, so that it may not be made again."""
    is_checked: bool = True
    """Whether contents are compared with their hash."""
    team: Team = field(default_factory=Team)
    """The processes that make them together, each some of the parts."""

    def get(self, count: int, firsts: Sequence[int], make: Callable[[int], Rows]) -> Rows:
        """The trajectories that are kept if they are of this run, else those that `make` makes of each part.

        firsts: the first row of each part. ValueError where a run has begun with others, or its file is damaged.
        """
        file = self.out / "trajectories.safetensors"
        reason = self.team.first(self._difference(file) if file.is_file() else "there are none")
        if reason is None:
            rows = self._read(file)
            if len(rows["states"]) != count:
                raise ValueError(
                    f"{file} holds {len(rows['states'])} trajectories, settings.pairs is {count}: use another out"
                )
            shutil.rmtree(self.out / "trajectories", ignore_errors=True)  # a run may have been stopped before this
            return rows
        if file.is_file():
            log.info("%s is made again: %s", file, reason)
        paths = self._make(firsts, make)
        self.team.wait()
        if self.team.is_first:
            parts = [self._part(path) for path in paths]
            self._write(file, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            shutil.rmtree(self.out / "trajectories", ignore_errors=True)
        self.team.wait()
        return self._read(file)

    def _make(self, firsts: Sequence[int], make: Callable[[int], Rows]) -> list[Path]:
        """Make this process's parts -> the files of all."""
        paths = [self.out / "trajectories" / f"part-{number:05d}.safetensors" for number in range(len(firsts))]
        mine = slice(self.team.rank, None, self.team.size)
        for path, first in zip(paths[mine], firsts[mine], strict=True):
            if not path.is_file() or self._kept(path) != dict(self.made_from):
                self._write(path, make(first))
        return paths

    def _difference(self, file: Path) -> str | None:
        """Why these are not the trajectories of this run; None if they are, or if it has begun and nobody can tell."""
        kept = self._kept(file)
        if kept is None and self.has_begun:
            log.info("%s is older than fingerprints are: what it was made from cannot be compared", file)
            return None
        if kept is None:
            return "it does not say what it was made from"
        for what, here in self.made_from.items():
            there = kept.get(what, here)
            if there != here:
                reason = f"it was made from another {what} ({there[:24]} there, {here[:24]} here)"
                if self.has_begun:
                    raise ValueError(f"{file}: {reason}; give it the same or use another out")
                return reason
        return None

    def _kept(self, file: Path) -> dict[str, str] | None:
        """What a file was made from, as it says itself."""
        try:
            return json.loads(read_header(file).metadata["made_from"])
        except KeyError:
            return None

    def _read(self, file: Path) -> Rows:
        """A mapped file, which all processes ask for; the first one reads it whole to compare it with its hash."""
        problem = self.team.first(self._damage(file) if self.team.is_first else None)
        if problem is not None:
            raise ValueError(problem)
        return read_tensors(file)

    def _part(self, file: Path) -> Rows:
        """A part, in the process that joins them."""
        if (problem := self._damage(file)) is not None:
            raise ValueError(problem)
        return read_tensors(file)

    def _damage(self, file: Path) -> str | None:
        claimed = read_header(file).metadata.get("sha256") if self.is_checked else None
        if claimed is None or claimed == fingerprint(read_tensors(file)):
            return None
        return f"{file} is damaged: its contents are not those that were written; delete it"

    def _write(self, file: Path, rows: Rows) -> None:
        facts = {"made_from": json.dumps(dict(self.made_from)), "sha256": fingerprint(rows)}
        write_tensors(file, rows, facts)


def placed(held: Mapping[str, Tensor], device: torch.device) -> TrajectorySource:
    """Stored trajectories as a source, on the device where they are few."""
    place = device if sum(value.nbytes for value in held.values()) <= ON_DEVICE else torch.device("cpu")
    return TrajectorySource(held["states"].to(place), Conditioning.from_named(held).to(place))
