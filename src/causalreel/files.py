"""Files and folders that are whole or not there: written beside the target, flushed to the disk, then renamed; and text
that people have written.

Temporary names are short, so that a target's name may be as long as the file system allows, and say which process
made them: whoever writes next in the same folder removes those of processes that are gone.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

TEXT_BYTES = 64 << 20
"""Longest text file that is read whole."""

_OWN: set[Path] = set()
"""Temporary paths that this process is writing."""

_TEMPORARY = re.compile(r"\.causalreel-(?P<where>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.partial(\.\w{1,16})?")
_STALE_S = 24 * 3600.0
"""After so long without a change, what a process of another machine was writing counts as left behind."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path, an empty file with the target's suffix, that takes the target's place when the block ends well.

    Whatever happens in the block, Ctrl-C included, the target is whole or what it was, and the temporary file is gone.
    A target that could not be replaced (its name too long, a folder, a device, no folder to hold it) is an OSError
    before the block; an OSError that names no file, or the temporary one, comes out naming the target.
    """
    target = Path(path)
    if os.path.lexists(target) and not (target.is_file() or target.is_symlink()):
        what = "is a folder" if target.is_dir() else "is no ordinary file"
        raise OSError(errno.EISDIR if target.is_dir() else errno.EINVAL, f"{what} and is not replaced", str(target))
    with _temporary(target) as temporary:
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        mode = temporary.stat().st_mode  # some writers would leave a file that only its owner can read
        yield temporary
        temporary.chmod(mode & 0o7777)


@contextlib.contextmanager
def replacing_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """As `replacing`, for a folder: yields a new one; the target must not be there, or be an empty folder."""
    target = Path(path)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise FileExistsError(errno.EEXIST, "is already there and is not replaced", str(target))
    with _temporary(target) as temporary:
        temporary.mkdir()
        yield temporary


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file, whole or not at all; its folder is made if need be."""
    write_bytes(path, text.encode())


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file, whole or not at all; its folder is made if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_lines(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a UTF-8 text file, stripped, with empty ones; ValueError says what another file looks like.

    A byte-order mark is no text, and only a line feed ends a line: Unicode has other separators, which JSON may hold.
    """
    with open(path, "rb") as file:
        data = file.read(TEXT_BYTES + 1)
    if len(data) > TEXT_BYTES:
        raise ValueError(f"{path} is too long: text files have at most {TEXT_BYTES >> 20} MiB")
    if looks := _looks_like(data):
        raise ValueError(f"{path} is not UTF-8 text but looks like {looks}; save it as UTF-8")
    return [line.strip().strip("\ufeff").strip() for line in data.decode("utf-8-sig").split("\n")]


def _looks_like(data: bytes) -> str | None:
    """What bytes that are no UTF-8 text are taken for; None: they are."""
    if data.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if b"\0" in data:
        halves = [half.count(0) for half in (data[:1000:2], data[1:1000:2])]
        return "UTF-16" if max(halves) > 0.4 * len(data[:1000:2]) and min(halves) < 5 else "a binary file"
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return f"an older encoding, such as Windows-1252 or GBK (byte {error.start} is 0x{data[error.start]:02x})"
    return None


def append_text(path: str | os.PathLike[str], text: str) -> None:
    """Add UTF-8 text to the end of a file, which is made if need be; what could not be added whole is taken back."""
    with open(path, "ab", buffering=0) as file:
        size, rest = file.seek(0, os.SEEK_END), memoryview(text.encode())
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except BaseException:
            file.truncate(size)
            raise


def remove_folder(path: str | os.PathLike[str]) -> None:
    """Delete a folder that stops being one of its name first, so that a kill leaves it whole or not there."""
    doomed = _beside(Path(path))
    os.replace(path, doomed)
    _remove(doomed)


def remove_leftovers(folder: str | os.PathLike[str], *, is_alone: bool = False) -> list[Path]:
    """Delete the temporary files and folders of processes that are gone; -> those deleted.

    is_alone: nobody else can be writing there (the caller has claimed it), so that all but this process's own are.
    """
    removed = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if (match := _TEMPORARY.fullmatch(entry.name)) is None:
                continue
            path = Path(entry.path)
            if path.absolute() not in _OWN if is_alone else _is_left(path, match):
                _remove(path)
                removed.append(path)
    return removed


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A temporary path beside the target, renamed at the end; removed and forgotten in any case."""
    with contextlib.suppress(FileNotFoundError):
        target.lstat()  # a name that is too long fails here, not after the work
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, f"cannot be written, there is no folder {target.parent}", str(target))
    temporary = _beside(target)
    remove_leftovers(temporary.parent)
    _OWN.add(temporary)
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
        _flush(temporary.parent, children=False)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary), temporary):
            raise
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        _remove(temporary)
        _OWN.discard(temporary)


def _beside(target: Path) -> Path:
    """A new temporary path in the target's folder, with its suffix."""
    suffix = target.suffix if re.fullmatch(r"\.\w{1,16}", target.suffix) else ""
    name = f".causalreel-{_where()}-{os.getpid()}-{secrets.token_hex(4)}.partial{suffix}"
    return target.absolute().parent / name


def _flush(path: Path, *, children: bool = True) -> None:
    """Have the disk hold a file, or a folder with what is in it; file systems that cannot are left alone."""
    if children and path.is_dir():
        for child in path.iterdir():
            _flush(child)
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # folders cannot be opened everywhere
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _is_left(path: Path, match: re.Match[str]) -> bool:
    """Whether the process that made this temporary path is gone."""
    if match["where"] == _where():
        pid = int(match["pid"])
        return path.absolute() not in _OWN if pid == os.getpid() else not _is_alive(pid)
    newest = max(entry.stat().st_mtime for entry in (path, *(path.iterdir() if path.is_dir() else ())))
    return time.time() - newest > _STALE_S


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # there is no harmless signal
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _where() -> str:
    """What tells apart machines, and containers on one, whose processes have the same numbers."""
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return hashlib.sha256(f"{platform.node()} {space}".encode()).hexdigest()[:8]
