"""What torch.save wrote, read as data: tensors, numbers, texts and containers of them, never code.

torch's unpickler for weights alone refuses code. In front of it the archive is checked, so that nothing unpacks to more
than the file holds; behind it the tensors, so that none claims more than is there.
"""

from __future__ import annotations

import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.foreign import ordinary_file, shown
from causalreel.headers import refuse_other

PICKLE_BYTES = 64 << 20
"""Of the instructions in an archive; the values of tensors lie beside them."""

RECORDS = 200_000
"""Of an archive."""

DEPTH = 32
"""Of containers in each other."""


def read_pickle(path: str | Path, *, mmap: bool = True, device: str = "cpu") -> Any:
    """The content of a .pt, .pth, .ckpt or .bin file; ValueError, in one line, if it is damaged or more than data.

    mmap: leave tensors on disk until they are used; files of before PyTorch 1.6 cannot.
    """
    path = ordinary_file(path, "weights file")
    with path.open("rb") as file:
        first = file.read(72)
    refuse_other(path, first)
    is_zip = first.startswith(b"PK\x03\x04")
    if is_zip:
        _check_archive(path)
    elif not first.startswith(b"\x80"):
        raise ValueError(f"{path} is not a checkpoint: it begins with {first[:24]!r}, neither a zip nor a pickle")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other protocols and old storages
            found = torch.load(path, map_location=device, weights_only=True, mmap=mmap and is_zip)
    except Exception as error:  # torch raises many types for a bad pickle or archive; all mean the same to the user
        raise ValueError(f"{path} {_reason(error, path, is_zip)}") from None
    room = path.stat().st_size
    total = 0
    for name, tensor in _tensors(found, path):
        _check_tensor(name, tensor, path)
        total += tensor.nbytes
        if total > 16 * room + (1 << 20):  # tied weights share storage, but not that often
            raise ValueError(f"{path} is damaged: its tensors claim more than 16 times the file's {room:,} bytes")
    return found


def _reason(error: Exception, path: Path, is_zip: bool) -> str:
    """What torch's refusal comes to. Its own text advises to switch the safety off."""
    text = str(error)
    named = re.search(r"GLOBAL ([\w.]+)", text)
    culprit = named[1] if named else next(_foreign_names(path, is_zip), None)
    if culprit is not None or re.search(r"Unsupported (operand|class)|Can only (build|create|call)|Trying to", text):
        what = f": {shown(culprit)}" if culprit else ""
        return f"holds code or objects other than tensors{what}; refused by tensors-only unpickling"
    lines = [line for line in text.splitlines() if line.strip() and "weights_only" not in line]
    return f"is damaged, cut off, or holds more than tensors: {shown(lines[0] if lines else type(error).__name__, 200)}"


def _foreign_names(path: Path, is_zip: bool) -> Iterator[str]:
    """module.name of what a pickle asks for beside torch's own and plain containers; nothing is run."""
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        else:
            with path.open("rb") as file:
                data = file.read(PICKLE_BYTES)
        texts: list[str] = []
        for instruction, argument, _ in pickletools.genops(data):
            if instruction.name in ("GLOBAL", "INST"):
                found = str(argument).replace(" ", ".", 1)
            elif instruction.name == "STACK_GLOBAL" and len(texts) > 1:
                found = f"{texts[-2]}.{texts[-1]}"
            else:
                texts = [*texts[-1:], argument] if isinstance(argument, str) else texts
                continue
            if found.partition(".")[0] not in ("torch", "collections"):
                yield found
    except Exception:  # whatever a damaged file makes of itself: it is damaged
        return


def _check_archive(path: Path) -> None:
    """ValueError unless the zip is whole and stores its records as they are, as PyTorch does: then none is a bomb."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 66_000))
        tail = file.read()
        at = tail.rfind(b"PK\x05\x06")
        if at < 0 or len(tail) - at < 22:
            raise ValueError(
                f"{path} is damaged or was cut off: the zip directory at its end is missing "
                f"(truncated: a download that did not finish? run it again, it resumes)"
            )
        records, length = struct.unpack_from("<HI", tail, at + 10)
        if tail[at - 20 : at - 16] == b"PK\x06\x07":
            file.seek(min(struct.unpack_from("<Q", tail, at - 12)[0], size))
            wide = file.read(56)
            if len(wide) < 56 or not wide.startswith(b"PK\x06\x06"):
                raise ValueError(f"{path} is damaged: its zip directory cannot be read")
            records, length = struct.unpack_from("<QQ", wide, 32)
    if records > RECORDS or length > 512 * RECORDS:
        raise ValueError(f"{path} is damaged: a zip directory of {records:,} records and {length:,} bytes")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError, struct.error) as error:
        raise ValueError(f"{path} is damaged: its zip directory cannot be read ({shown(str(error))})") from None
    if any("/code/" in entry.filename or entry.filename.endswith("constants.pkl") for entry in entries):
        raise ValueError(
            f"{path} is a TorchScript archive, a program with its weights; refused: save the state_dict alone"
        )
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise ValueError(
                f"{path}: '{shown(entry.filename)}' in it is compressed, which checkpoints are not; refused"
            )
        if entry.filename.endswith("data.pkl") and entry.file_size > PICKLE_BYTES:
            raise ValueError(f"{path}: instructions of {entry.file_size:,} bytes, at most {PICKLE_BYTES:,} are read")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError(f"{path} is damaged: the records of its zip directory share bytes")


def _tensors(found: Any, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in containers, each container once, with the names that lead to it."""
    waiting, seen = [("", found, 0)], set()
    while waiting:
        name, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, (Mapping, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            if depth >= DEPTH:
                raise ValueError(f"{path} is nested more than {DEPTH} deep")
            pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
            waiting += [(f"{name}.{shown(key, 200)}" if name else shown(key, 200), v, depth + 1) for key, v in pairs]


def _check_tensor(name: str, tensor: Tensor, path: Path) -> None:
    """ValueError unless the tensor is plain: in memory or mapped, and as many values as it says."""
    kinds = {
        "a sparse tensor": tensor.layout != torch.strided,
        "a quantised tensor": tensor.is_quantized,
        "a tensor without values (meta)": tensor.is_meta,
        "a nested tensor": tensor.is_nested,
        f"a {type(tensor).__name__}": type(tensor) not in (Tensor, torch.nn.Parameter, torch.nn.Buffer),
    }
    odd = next((kind for kind, holds in kinds.items() if holds), None)
    if odd is not None:
        raise ValueError(f"{path}: '{shown(name)}' is {odd}, which is not read; plain tensors are")
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise ValueError(
            f"{path}: '{shown(name)}' claims {tensor.nbytes:,} bytes, the file has "
            f"{tensor.untyped_storage().nbytes():,} for it"
        )
