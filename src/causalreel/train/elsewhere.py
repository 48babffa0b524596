"""A folder on any file system that fsspec knows, by its URL, such as s3://bucket/run.

Whatever such a file system raises comes out as an OSError in one line, without the URL's password.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, overload
from urllib.parse import unquote

from causalreel.foreign import shown
from causalreel.spelling import nearest

T = TypeVar("T")


@overload
def masked(url: str) -> str: ...
@overload
def masked(url: None) -> None: ...
def masked(url: str | None) -> str | None:
    """A URL without its password, for messages and files."""
    return None if url is None else re.sub(r"(://[^/:@]*:).*@", r"\1***@", url, flags=re.DOTALL)


def check_url(url: str) -> None:
    """ValueError for what is no URL of a folder; asks nobody."""
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s?]+", url) or "::" in url or not url.isprintable():
        raise ValueError(
            f"remote: got {shown(masked(url))!r}, the URL of a folder is expected, such as s3://bucket/folder or "
            "file:///mnt/folder"
        )


class Place:
    """A folder elsewhere; names of its files and folders are relative to it.

    callback: counts the bytes of the file that is put, as far as the file system tells.
    """

    def __init__(self, url: str) -> None:
        from fsspec.callbacks import Callback
        from fsspec.core import url_to_fs

        self.url, self.callback = masked(url).rstrip("/"), Callback()
        if ":***@" in url:
            raise ValueError(f"{self.url} has a password that was masked when it was written: give the URL again")
        password = re.search(r"://[^/:@]*:(.*)@", url)
        self._secrets = {password[1], unquote(password[1])} - {""} if password else set[str]()
        try:
            self._fs, root = url_to_fs(url)
        except Exception as error:  # of whichever library
            raise _kind(error)(f"{self.url} could not be opened ({self._why(error)}{_hint(url, error)})") from None
        self._root = root.rstrip("/")
        if not self._root:
            raise ValueError(f"{self.url} names no folder")

    def put(self, file: Path, name: str) -> None:
        """Copy a file there, as a stream."""
        self._make_above(name)
        self._do("written", name, lambda path: self._fs.put_file(str(file), path, callback=self.callback))

    def write(self, name: str, data: bytes) -> None:
        self._make_above(name)
        self._do("written", name, lambda path: self._fs.pipe_file(path, data))

    def get(self, name: str, file: Path) -> None:
        """Copy a file from there, as a stream."""
        self._do("read", name, lambda path: self._fs.get_file(path, str(file)))

    def read(self, name: str, most: int) -> bytes:
        """The first `most` bytes of a file."""

        def first(path: str) -> bytes:
            with self._fs.open(path, "rb") as file:
                return file.read(most)

        return self._do("read", name, first)

    def copy(self, name: str, other: str) -> bool:
        """Let the file system copy a file of its own -> whether it did."""
        self._make_above(other)
        try:
            self._do("copied", name, lambda path: self._fs.cp_file(path, f"{self._root}/{other}"))
        except OSError:  # many cannot
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """What is in a folder; nothing in one that is not there."""
        with contextlib.suppress(FileNotFoundError):
            found = self._do("listed", folder, lambda path: self._fs.ls(path, detail=False))
            return [str(entry).rstrip("/").rpartition("/")[2] for entry in found]
        return []

    def sizes(self, folder: str) -> dict[str, Any]:
        """File -> bytes, of all below a folder."""
        with contextlib.suppress(FileNotFoundError):
            found = self._do("listed", folder, lambda path: self._fs.find(path, detail=True))
            return {name.rpartition(f"/{folder}/")[2]: facts.get("size") for name, facts in found.items()}
        return {}

    def size(self, name: str) -> int | None:
        """Bytes of a file; None if it is not there."""
        with contextlib.suppress(FileNotFoundError):
            return self._do("found", name, lambda path: self._fs.info(path)["size"])
        return None

    def remove(self, name: str) -> None:
        """A file, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._do("deleted", name, self._fs.rm_file)

    def remove_folder(self, name: str) -> None:
        self._do("deleted", name, lambda path: self._fs.rm(path, recursive=True))

    def _make_above(self, name: str) -> None:
        """The folders of a file, where there are any: stores of objects have none, and would make a bucket."""
        if self._root.startswith("/"):
            above = name.rpartition("/")[0]
            self._do("made", above, lambda path: self._fs.makedirs(path, exist_ok=True))

    def _do(self, what: str, name: str, work: Callable[[str], T]) -> T:
        try:
            self._fs.invalidate_cache()  # of listings
            return work(f"{self._root}/{name}".rstrip("/"))
        except Exception as error:  # of whichever library
            kind = _kind(error) if isinstance(error, OSError) else OSError
            place = f"{self.url}/{shown(name, 300)}".rstrip("/")
            raise kind(f"{place} could not be {what} ({self._why(error)})") from None

    def _why(self, error: Exception) -> str:
        text = " ".join(str(error).split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        kind = "" if isinstance(error, ImportError) else type(error).__name__
        return shown(": ".join(part for part in (kind, text) if part), 300)


def _kind(error: Exception) -> type[Exception]:
    """The plain type of an error: libraries derive some of their own, made of other arguments."""
    kinds = (FileNotFoundError, PermissionError, ValueError, ImportError)
    return next((kind for kind in kinds if isinstance(error, kind)), OSError)


def _hint(url: str, error: Exception) -> str:
    """What might help with a URL that could not be opened."""
    from fsspec.registry import known_implementations

    protocol = url.partition("://")[0]
    if protocol not in known_implementations:
        near = nearest(protocol, known_implementations)
        return f"; did you mean {near}://?" if near else ""
    package = known_implementations[protocol]["class"].partition(".")[0]
    return f"; pip install {package}" if isinstance(error, ImportError) and package != "fsspec" else ""


@contextlib.contextmanager
def named() -> Iterator[None]:
    """Within it errors are said to be of the setting."""
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        raise _kind(error)(f"trainer.remote: {error}") from None


def openable(url: str) -> None:
    """ValueError, ImportError or OSError, in one line, for a URL that could not be a remote; writes nothing."""
    with named():
        Place(url).names("checkpoints")
