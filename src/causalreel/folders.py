"""Folders that one process works in at a time.

A claim is the operating system's lock on `<folder>/.lock`. The lock dies with its process, however that ends, so a file
that was left behind means nothing; it does not pass to forked children either.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

log = logging.getLogger(__name__)

LOCK = ".lock"

_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}

_guard = threading.Lock()
_owners: dict[Path, tuple[int, bool]] = {}  # claimed folder -> thread, whether it is locked
_handles: set[int] = set()


@contextlib.contextmanager
def claim(folder: str | Path, purpose: str) -> Iterator[bool]:
    """Keep all others out of `folder`, which is made if need be; ValueError that says who is in it.

    Within it the same thread may claim the folder again. Yields whether nobody else can be in the folder: False on a
    file system without locks, after a warning. An empty folder that the claim has made goes with it.
    """
    folder, process = Path(folder), os.getpid()
    key, thread = folder.resolve(), threading.get_ident()
    with _guard:
        owner, is_locked = _owners.get(key, (0, False))
    if owner == thread:
        yield is_locked
        return
    made = make(folder)
    handle = None
    try:
        handle = _lock(folder, purpose)
        with _guard:
            _owners[key] = thread, handle is not None
            if handle is not None:
                _handles.add(handle)
        yield handle is not None
    finally:
        if os.getpid() == process:  # a forked child that ends here owns nothing
            with _guard:
                if _owners.get(key, (0, False))[0] == thread:
                    del _owners[key]
            if handle is not None:
                _handles.discard(handle)
                with contextlib.suppress(FileNotFoundError):  # the folder may be gone
                    (folder / LOCK).unlink()
                os.close(handle)
            unmake(made)


def make(folder: Path) -> list[Path]:
    """Make the folder and its parents -> those that were not there, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def unmake(made: Sequence[Path]) -> None:
    """Remove folders that `make` made, as far as nothing is in them."""
    with contextlib.suppress(OSError):  # the first that is not empty ends it
        for path in made:
            path.rmdir()


def _lock(folder: Path, purpose: str) -> int | None:
    """A locked handle of the folder's lock file; None where there are no locks."""
    path = folder / LOCK
    while fcntl is not None:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # its last owner has just removed the folder
            folder.mkdir(parents=True, exist_ok=True)
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                with contextlib.suppress(OSError):  # a full disk: the lock holds without its owner's name
                    os.write(handle, f"process {os.getpid()} on {socket.gethostname()} ({purpose})".encode())
                return handle
        except BlockingIOError:
            owner = os.read(handle, 200).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise ValueError(
                f"{folder} is in use by {owner}: wait until that has ended or use another folder"
            ) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in _WITHOUT_LOCKS:
                raise
            with contextlib.suppress(OSError):
                path.unlink()
            break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its last owner has deleted the file in the meantime
    log.warning("%s is on a file system without locks: do not start a second process in it", folder)
    return None


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one that the path names."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _forget() -> None:
    """In a forked child: let go of the parent's locks, or they would outlive it."""
    for handle in _handles:
        os.close(handle)
    _handles.clear()
    _owners.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
