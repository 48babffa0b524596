"""Checkpoints: the full state of a run in a directory that appears at once or not at all.

    step-00001000/  <role>.safetensors ...  trainer.pt  config.yaml  manifest.json

The older ones go once a new one is there. Frozen roles are hard links to the file of the previous checkpoint, so they
take room once. The manifest holds each file's SHA-256, made while the file is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from causalreel.files import remove_folder, replacing_folder
from causalreel.foreign import read_json
from causalreel.hashed import sha256_of, write_pickle, write_tensors, write_text
from causalreel.parallel.sharding import fill
from causalreel.train.contents import Content, compare
from causalreel.weights.files import read_tensors
from causalreel.weights.pickles import read_pickle

_NAME = re.compile(r"step-\d{8,18}", re.ASCII)
_PLACES = ("data", "init.", "compute")
"""Settings that older checkpoints compare; now their contents are compared."""


@dataclass(frozen=True)
class State:
    """What a checkpoint holds: weights by role, everything else the trainer needs, and the resolved config."""

    roles: Mapping[str, Mapping[str, Tensor]]
    trainer: dict[str, Any]
    config: str
    """YAML text."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """The settings that a resumed run must share, as {"dotted.key": value}."""
    contents: Mapping[str, str] = field(default_factory=dict)
    """What the run is made from, part -> fingerprint; empty in older checkpoints."""
    frozen: frozenset[str] = frozenset()
    """Roles that are the same as in the directory's previous checkpoint."""
    moments: Mapping[str, Tensor] = field(default_factory=dict)
    """What optimisers hold of each parameter, by "role.adamw/parameter/kind", where processes share it; else it is in
    `trainer`."""


def save(directory: Path, step: int, state: State, *, keep: int | None = None) -> Path:
    """Write the checkpoint of `step` completed steps, then delete all but the newest `keep`."""
    final, previous = directory / f"step-{step:08}", complete(directory)
    if final in previous:
        raise ValueError(f"checkpoint: {final} exists already")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing_folder(final) as temporary:
            _write(temporary, step, state, previous[-1] if previous else None)
    except OSError as error:
        raise not_written(final, error) from error
    if keep is not None:
        prune(directory, keep)
    return final


def prune(directory: Path, keep: int, held: Collection[Path] = ()) -> None:
    """Delete all complete checkpoints but the newest `keep` and those that are held."""
    for old in complete(directory)[:-keep]:
        if old not in held:
            remove_folder(old)


def not_written(final: Path, error: OSError) -> OSError:
    """The error for a checkpoint that could not be written: which, why, and what there is instead."""
    former = latest(final.parent)
    rest = f"{former} is intact" if former else "there is no earlier one"
    return OSError(f"checkpoint {final} could not be written ({error.strerror or error}); {rest}")


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    found = complete(directory)
    return found[-1] if found else None


def load(path: Path, *, device: str = "cpu", is_checked: bool = True) -> State:
    """Read a checkpoint, its files compared with their hashes unless `is_checked` is false; ValueError if one differs.

    Checkpoints older than hashes are compared by size alone.
    """
    manifest = _manifest(path)
    if is_checked:
        verify(path, manifest.get("sha256", {}))
    files = {role: path / f"{role}.safetensors" for role in manifest["roles"]}
    return State(
        roles={role: _load_tensors(file, device) for role, file in files.items()},
        trainer=load_trainer(path),
        config=(path / "config.yaml").read_text(encoding="utf-8"),
        fixed=manifest["fixed"],
        contents=manifest.get("contents", {}),
    )


def load_trainer(path: Path) -> dict[str, Any]:
    """Of a checkpoint, what is no role."""
    try:
        return read_pickle(path / "trainer.pt", mmap=False)
    except ValueError as error:
        raise _spoiled(path, str(error)) from error


def contents_of(path: Path) -> dict[str, str]:
    """What a checkpoint was made from."""
    return _manifest(path).get("contents", {})


def check_same(
    path: Path,
    fixed: Mapping[str, Any],
    contents: Sequence[Content] = (),
    *,
    before: Callable[[Iterable[str]], Mapping[str, Any]] | None = None,
) -> None:
    """Raise a ValueError naming what differs between this run and the checkpoint: settings, then contents.

    before: the keys that a checkpoint has -> the defaults of settings, which are its own where it is older than one.
    """
    check_manifest(_manifest(path), f"checkpoint {path}", fixed, contents, before=before)


def check_manifest(
    manifest: Mapping[str, Any],
    place: str,
    fixed: Mapping[str, Any],
    contents: Sequence[Content] = (),
    *,
    before: Callable[[Iterable[str]], Mapping[str, Any]] | None = None,
    other: str = "out",
) -> None:
    """`check_same`, of a manifest; other: the setting to change for another run."""
    saved, missing = manifest["fixed"], "absent"
    if "contents" not in manifest:  # places were compared instead
        saved = {name: value for name, value in saved.items() if not name.startswith(_PLACES) or name in fixed}
    here = json.loads(json.dumps(fixed))
    defaults = {} if before is None else json.loads(json.dumps(before(saved)))
    saved = {key: value for key, value in defaults.items() if key in here} | saved
    differing = [k for k in dict.fromkeys((*saved, *here)) if saved.get(k, missing) != here.get(k, missing)]
    if differing:
        shown = ", ".join(
            f"{k} ({saved.get(k, missing)!r} there, {here.get(k, missing)!r} here)" for k in differing[:8]
        )
        more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise ValueError(f"{place} is of another config: {shown}{more}; resume with its config or use another {other}")
    compare(contents, manifest.get("contents", {}), place)


def load_strict(wanted: Mapping[str, Tensor], tensors: Mapping[str, Tensor], name: str) -> None:
    """Load weights into a role's tensors, whole or this process's part of them.

    ValueError naming the first key that is missing, unexpected or of another shape.
    """
    for problem, keys in (("missing", wanted.keys() - tensors.keys()), ("unexpected", tensors.keys() - wanted.keys())):
        if keys:
            raise ValueError(f"{name}: {len(keys)} {problem} keys, first {min(keys)!r}")
    for key, tensor in wanted.items():
        if (tensor.shape, tensor.dtype) != (tensors[key].shape, tensors[key].dtype):
            got, expected = ((tuple(t.shape), t.dtype) for t in (tensors[key], tensor))
            raise ValueError(f"{name}: {key} is {got}, expected {expected}")
    for key, tensor in wanted.items():
        fill(tensor, tensors[key])


def _write(directory: Path, step: int, state: State, previous: Path | None) -> None:
    hashes: dict[str, str] = {}
    before = hashes_of(previous) if previous else {}
    for role, tensors in state.roles.items():
        file = directory / f"{role}.safetensors"
        known = before.get(file.name) if role in state.frozen else None
        if known and previous and link(previous / file.name, file):
            hashes[file.name] = known
        else:
            hashes[file.name] = write_tensors(file, tensors)
    seal(directory, step, state, hashes)


def seal(directory: Path, step: int, state: State, hashes: Mapping[str, str]) -> None:
    """Write what is no tensor of a role, and the manifest of all files; hashes: of the files that are there."""
    hashes = {
        **hashes,
        "trainer.pt": write_pickle(directory / "trainer.pt", state.trainer),
        "config.yaml": write_text(directory / "config.yaml", state.config),
    }
    files = [path for path in directory.rglob("*") if path.is_file()]
    manifest = {
        "step": step,
        "roles": list(state.roles),
        "fixed": dict(state.fixed),
        "contents": dict(state.contents),
        "bytes": {path.relative_to(directory).as_posix(): path.stat().st_size for path in files},
        "sha256": hashes,
    }
    sealed = {**manifest, "seal": _seal(manifest)}
    write_text(directory / "manifest.json", json.dumps(sealed, indent=1))


def _seal(manifest: Mapping[str, Any]) -> str:
    """A hash of the manifest, which holds the hashes of the other files."""
    facts = {name: value for name, value in manifest.items() if name != "seal"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_seal(manifest: Mapping[str, Any]) -> None:
    """ValueError for a manifest that is not as it was written; one older than hashes is taken as it is."""
    if manifest.keys() & {"sha256", "seal"} and manifest.get("seal") != _seal(manifest):
        raise ValueError("it was changed after it was written")


def hashes_of(path: Path) -> dict[str, str]:
    """The hashes of a checkpoint's files; none where it is damaged or older than hashes are."""
    try:
        return _manifest(path).get("sha256", {})
    except ValueError:
        return {}


def _load_tensors(file: Path, device: str) -> dict[str, Tensor]:
    try:
        return {name: tensor.to(device) for name, tensor in read_tensors(file).items()}
    except ValueError as error:
        raise _spoiled(file.parent, str(error)) from error


def link(source: Path, target: Path) -> bool:
    """A hard link to a file -> whether there is one now."""
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or the previous run did not have the role
        return False
    return True


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, after checking that it is whole and that each file is there and as long as it was."""
    file = path / "manifest.json"
    try:
        manifest = read_json(file, what="manifest of a checkpoint")
        sizes, step = manifest["bytes"], manifest["step"]
        check_seal(manifest)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _spoiled(path, f"{file} is missing or corrupt: {error}") from error
    if is_named(path) and step != step_of(path):
        raise _spoiled(path, f"{path} holds a checkpoint of step {step}")
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise _spoiled(path, f"{path / name} {state}")
    return manifest


def verify(path: Path, hashes: Mapping[str, str]) -> None:
    """ValueError naming the first file whose contents are not those that were written."""
    for name, expected in hashes.items():
        if sha256_of(path / name) != expected:
            raise _spoiled(path, f"{path / name} is damaged: its contents are not those that were written")


def _spoiled(path: Path, what: str) -> ValueError:
    """The error for a damaged checkpoint: what is wrong, and how to go on without it."""
    earlier = [other for other in complete(path.parent) if step_of(other) < step_of(path)] if is_named(path) else []
    rest = f"go on from {earlier[-1].name}" if earlier else "start again"
    return ValueError(f"checkpoint: {what}; delete {path} to {rest}")


def is_named(path: PurePath) -> bool:
    """Whether a folder has a checkpoint's name."""
    return _NAME.fullmatch(path.name) is not None


def step_of(path: PurePath) -> int:
    """Completed steps, by the name."""
    return int(path.name.removeprefix("step-"))


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found: Iterable[Path] = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in found if is_named(path) and path.is_dir()), key=step_of)
