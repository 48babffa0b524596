"""Files of Causal-rCM: networks side by side under prefixes, a linear patch embedding, folders of torch's distributed
checkpoints. Read as data, within bounds: the folder's index is unpickled with inert stand-ins for torch's classes.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.foreign import file_in, shown
from causalreel.headers import NAME
from causalreel.weights.pickles import PICKLE_BYTES

NETWORKS = ("net_ema", "net", "net_fake_score")
"""Prefixes of the networks in a training checkpoint: the averaged student, the student, the critic."""

PATCH = "patch_embedding.weight"

INDEX = ".metadata"


def by_network(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """Flat tensors of several networks -> prefix -> name -> tensor; what has one network is left as it is."""
    prefixes = {str(name).partition(".")[0] for name in found}
    if not prefixes & {"net_ema", "net_fake_score"}:
        return found
    parts = {prefix: {} for prefix in NETWORKS if prefix in prefixes}
    for name, value in found.items():
        prefix, _, bare = str(name).partition(".")
        if prefix in parts:
            parts[prefix][bare] = value
    return parts


def with_convolution(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The patch embedding as a convolution (E,C,1,2,2): there it is linear, its columns in the order C, time, y, x."""
    patch = tensors.get(PATCH)
    if patch is None or patch.ndim != 2 or patch.shape[1] % 4:
        return tensors
    return tensors | {PATCH: patch.unflatten(1, (-1, 1, 2, 2))}


# ---- folders


def folder_of(path: Path) -> Path | None:
    """The folder of a distributed checkpoint that a folder is, or has as `model`; None if there is none, and for those
    of this package's training, whose networks are no longer alone."""
    if (path / "manifest.json").is_file() and (path / "trainer.pt").is_file():
        return None
    for folder in (path, path / "model"):
        if (folder / INDEX).is_file() or any(folder.glob("*.distcp")):
            return folder
    return None


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Name -> tensor of a folder with `.metadata` and `.distcp` files; ValueError, in one line, for what is wrong."""
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} is not a checkpoint folder: it has .distcp files and no {INDEX} that names them")
    size = (folder / INDEX).stat().st_size
    if size > PICKLE_BYTES:
        raise ValueError(f"{folder / INDEX} has {size:,} bytes, at most {PICKLE_BYTES:,} are read")
    try:
        index = _Inert(io.BytesIO((folder / INDEX).read_bytes())).load()
        shapes = {
            _text(name): (_numbers(told.size), [(_numbers(c.offsets), _numbers(c.sizes)) for c in told.chunks])
            for name, told in index.state_dict_metadata.items()
            if hasattr(told, "chunks")
        }
        places = {
            (_text(key.fqn), _numbers(key.offset)): (_text(at.relative_path), int(at.offset), int(at.length))
            for key, at in index.storage_data.items()
            if getattr(key, "offset", None) is not None  # what is no tensor has none
        }
    except ValueError as error:
        raise ValueError(f"{folder / INDEX}: {error}") from None
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise ValueError(
            f"{folder / INDEX} of a distributed checkpoint is damaged: {shown(str(error), 120) or type(error).__name__}"
        ) from None
    names = _wanted(list(shapes))
    wanted = set(names)
    places = {key: place for key, place in places.items() if key[0] in wanted}
    files = {place[0] for place in places.values()}
    absent = sorted(file for file in files if not file_in(folder, file, INDEX).is_file())
    if absent:
        raise ValueError(f"{folder}: the data file {shown(absent[0])} is missing, which {INDEX} names; copy it too")
    room, claimed = sum((folder / file).stat().st_size for file in files), sum(max(0, at[2]) for at in places.values())
    if claimed > room:
        raise ValueError(
            f"{folder}: files are cut off, or {INDEX} names places twice: tensors of {claimed:,} bytes in {room:,}"
        )
    return {name: _tensor(folder, name, *shapes[name], places) for name in names}


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"a name is a {type(value).__name__}, texts are expected; it is damaged")
    return value


def _numbers(value: Any) -> tuple[int, ...]:
    if type(value) is not list or len(value) > 16 or any(type(number) is not int for number in value):
        raise ValueError("a shape or place is none: whole numbers are expected; it is damaged")
    return tuple(value)


def _wanted(names: list[str]) -> list[str]:
    """Networks alone, and of them the averaged student where there is one: the others are not read."""
    for prefix in NETWORKS:
        found = [name for name in names if name.startswith(f"{prefix}.") and len(name) <= NAME]
        if found:
            return found
    return [name for name in names if len(name) <= NAME]


def _tensor(
    folder: Path,
    name: str,
    size: tuple[int, ...],
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]],
    places: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]],
) -> Tensor:
    """A tensor from the pieces that its ranks have written."""
    where, pieces = f"{folder}: '{shown(name)}'", []
    for offsets, sizes in chunks:
        place = places.get((name, offsets))
        if place is None:
            raise ValueError(f"{where} has a piece at {offsets} that no file holds")
        piece = _piece(file_in(folder, place[0], INDEX), *place[1:], where)
        ends = [offset + length for offset, length in zip(offsets, sizes, strict=True)]
        inside = len(ends) == len(size) and min((0, *offsets)) >= 0
        inside = inside and all(end <= most for end, most in zip(ends, size, strict=True))
        if tuple(piece.shape) != sizes or not inside:
            told = f"a piece {tuple(piece.shape)} for {sizes} at {offsets} of {size}"
            raise ValueError(f"{where} has the wrong shape: {told}")
        pieces.append((offsets, piece))
    types = {str(piece.dtype).removeprefix("torch.") for _, piece in pieces}
    if len(types) != 1 or sum(piece.numel() for _, piece in pieces) != math.prod(size):
        told = f" and types {', '.join(sorted(types))}" if len(types) > 1 else ""
        raise ValueError(f"{where}: its pieces do not make up the shape {size}{told}")
    if len(pieces) == 1:
        return pieces[0][1]
    whole, filled = torch.empty(size, dtype=pieces[0][1].dtype), torch.zeros(size, dtype=torch.bool)
    for offsets, piece in pieces:
        place = tuple(slice(o, o + s) for o, s in zip(offsets, piece.shape, strict=True))
        if filled[place].any():
            raise ValueError(f"{where}: its pieces overlap at {offsets}, so that others are missing")
        whole[place], filled[place] = piece, True
    return whole


def _piece(file: Path, offset: int, length: int, where: str) -> Tensor:
    """What torch.save wrote into a part of a file."""
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise ValueError(f"{where}: {file.name} is cut off, it has no {length:,} bytes at {offset:,}")
    with file.open("rb") as opened:
        opened.seek(offset)
        data = io.BytesIO(opened.read(length))
    try:
        with zipfile.ZipFile(data) as archive:
            entries = archive.infolist()
        if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or sum(e.file_size for e in entries) > length:
            raise ValueError("it is compressed, which checkpoints are not")
        data.seek(0)
        found = torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types; all mean the same to the user
        raise ValueError(f"{where}: {file.name} is damaged there: {shown(str(error).splitlines()[0], 120)}") from None
    if type(found) is not Tensor or found.layout != torch.strided or found.nbytes > length:
        raise ValueError(f"{where}: {file.name} holds no plain tensor there")
    return found


class _Stand:
    """In place of torch's classes: it keeps what it is given, and does nothing."""

    def __new__(cls, *given: Any) -> _Stand:
        return super().__new__(cls)

    def __init__(self, *given: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


_InPython: Any = pickle._Unpickler
"""The unpickler that is written in Python, whose steps can be replaced."""


class _Inert(_InPython):
    """Reads the index of a distributed checkpoint; everything that it names is a stand-in.

    Tuples become lists, which are no keys: a pair of one pair of one pair, forty times over, takes hours to be hashed.
    """

    dispatch = dict(_InPython.dispatch)  # noqa: RUF012 - as there
    del dispatch[pickle.BYTEARRAY8[0]], dispatch[pickle.FROZENSET[0]]  # no index has any, and they can cost as much

    def _list(self, count: int) -> None:
        self.stack[-count:] = [self.stack[-count:]]

    def _list_from_mark(self) -> None:
        items = self.pop_mark()  # after which `append` is another
        self.append(items)

    dispatch[pickle.EMPTY_TUPLE[0]] = lambda self: self.append([])
    dispatch[pickle.TUPLE[0]] = _list_from_mark
    dispatch[pickle.TUPLE1[0]] = lambda self: self._list(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self._list(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self._list(3)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return list
        is_path = module in ("pathlib", "pathlib._local") and name.endswith("Path")
        is_layout = (module, name) == ("torch.serialization", "_get_layout")
        is_member = (module, name) == ("builtins", "getattr")  # of an enumeration, where it is written by name
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if module.startswith("torch.distributed.checkpoint.") or is_path or is_layout or is_member or is_type:
            return _Stand
        raise ValueError(f"it names {shown(f'{module}.{name}', 80)}, which no index of a checkpoint does; refused")
