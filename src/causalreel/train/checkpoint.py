"""Checkpoints: the full state of a run in a directory that appears at once or not at all.

    step-00001000/  <role>.safetensors ...  trainer.pt  config.yaml  manifest.json

A directory is written under a temporary name, flushed to the disk and renamed; the older ones go after that. Frozen
roles are hard links to the file of the previous checkpoint, so they take room once.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_NAME = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".incomplete-"


@dataclass(frozen=True)
class State:
    """What a checkpoint holds: weights by role, everything else the trainer needs, and the resolved config."""

    roles: Mapping[str, Mapping[str, Tensor]]
    trainer: dict[str, Any]
    config: str
    """YAML text."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """The settings that a resumed run must share, as {"dotted.key": value}."""
    frozen: frozenset[str] = frozenset()
    """Roles that are the same as in the directory's previous checkpoint."""


def save(directory: Path, step: int, state: State, *, keep: int | None = None) -> Path:
    """Write the checkpoint of `step` completed steps, then delete all but the newest `keep`."""
    final = directory / f"step-{step:08}"
    temporary = directory / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    previous = _complete(directory)
    if final in previous:
        raise ValueError(f"checkpoint: {final} exists already")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, step, state, previous[-1] if previous else None)
        os.replace(temporary, final)
        _flush(directory)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        rest = f"{previous[-1]} is intact" if previous else "there is no earlier one"
        raise OSError(f"checkpoint {final} could not be written ({error}); {rest}") from error
    if keep is not None:
        for old in _complete(directory)[:-keep]:
            _remove(old)
    return final


def clean(directory: Path) -> None:
    """Remove what killed runs left half written or half deleted; only for who has claimed the run's folder."""
    for leftover in directory.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def latest(directory: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    complete = _complete(directory)
    return complete[-1] if complete else None


def load(path: Path, *, device: str = "cpu") -> State:
    """Read a checkpoint, all of it checked against its manifest."""
    manifest = _manifest(path)
    files = {role: path / f"{role}.safetensors" for role in manifest["roles"]}
    try:
        trainer = torch.load(path / "trainer.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint: {path / 'trainer.pt'} is corrupt: {error}") from error
    return State(
        roles={role: _load_tensors(file, device) for role, file in files.items()},
        trainer=trainer,
        config=(path / "config.yaml").read_text(encoding="utf-8"),
        fixed=manifest["fixed"],
    )


def check_config(path: Path, fixed: Mapping[str, Any]) -> None:
    """Raise a ValueError naming the settings of this run that differ from those of the checkpoint."""
    saved, missing = _manifest(path)["fixed"], "absent"
    here = json.loads(json.dumps(fixed))
    differing = [k for k in dict.fromkeys((*saved, *here)) if saved.get(k, missing) != here.get(k, missing)]
    if differing:
        shown = ", ".join(
            f"{k} ({saved.get(k, missing)!r} there, {here.get(k, missing)!r} here)" for k in differing[:8]
        )
        more = f" and {len(differing) - 8} more" if len(differing) > 8 else ""
        raise ValueError(
            f"checkpoint {path} is of another config: {shown}{more}; resume with its config or use another out"
        )


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load weights into a module, naming the first key that is missing, unexpected or of another shape."""
    wanted = module.state_dict()
    for problem, keys in (("missing", wanted.keys() - tensors.keys()), ("unexpected", tensors.keys() - wanted.keys())):
        if keys:
            raise ValueError(f"{name}: {len(keys)} {problem} keys, first {min(keys)!r}")
    for key, tensor in wanted.items():
        if (tensor.shape, tensor.dtype) != (tensors[key].shape, tensors[key].dtype):
            got, expected = ((tuple(t.shape), t.dtype) for t in (tensors[key], tensor))
            raise ValueError(f"{name}: {key} is {got}, expected {expected}")
    module.load_state_dict(dict(tensors), strict=True)


def _write(directory: Path, step: int, state: State, previous: Path | None) -> None:
    for role, tensors in state.roles.items():
        file = directory / f"{role}.safetensors"
        if not (role in state.frozen and previous and _link(previous / file.name, file)):
            _save_tensors(tensors, file)
    try:
        torch.save(state.trainer, directory / "trainer.pt")
    except RuntimeError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error
    (directory / "config.yaml").write_text(state.config, encoding="utf-8")
    sizes = {file.name: file.stat().st_size for file in sorted(directory.iterdir())}
    manifest = {"step": step, "roles": list(state.roles), "fixed": dict(state.fixed), "bytes": sizes}
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for file in directory.iterdir():
        _flush(file)
    _flush(directory)


def _save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors; those that share memory, such as tied weights, are written each."""
    seen: set[int] = set()
    contents = {}
    for name, tensor in tensors.items():
        content = tensor.detach().to("cpu").contiguous()
        memory = content.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() != content.nbytes:
            content = content.clone()
        seen.add(memory.data_ptr())
        contents[name] = content
    try:
        save_file(contents, file)
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(str(error)) from error


def _load_tensors(file: Path, device: str) -> dict[str, Tensor]:
    try:
        return load_file(file, device=device)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {file} is corrupt: {error}") from error


def _link(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links, or the previous run did not have the role
        return False
    return True


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest, after checking that each file is there and as long as it was."""
    file = path / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        sizes = manifest["bytes"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: {file} is missing or corrupt: {error}") from error
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise ValueError(f"checkpoint: {path / name} {state}; delete {path} to go on from an earlier one")
    return manifest


def _complete(directory: Path) -> list[Path]:
    """The complete checkpoints, oldest first."""
    found: Iterable[Path] = directory.iterdir() if directory.is_dir() else ()
    steps = {path: int(match[1]) for path in found if (match := _NAME.fullmatch(path.name)) and path.is_dir()}
    return sorted(steps, key=steps.__getitem__)


def _remove(path: Path) -> None:
    """Delete a checkpoint; it stops being a complete one first."""
    doomed = path.with_name(f"{_TEMPORARY}{path.name}-old")
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
