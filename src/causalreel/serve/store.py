"""Records and files of videos: SQLite and a folder, which one server owns."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import re
import secrets
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from causalreel.serve.safety import ApiError

log = logging.getLogger(__name__)

COLUMNS = {
    "id": "TEXT PRIMARY KEY",
    "model": "TEXT NOT NULL",
    "status": "TEXT NOT NULL",
    "prompt": "TEXT NOT NULL",
    "seed": "INTEGER NOT NULL",
    "frames": "INTEGER NOT NULL",
    "fps": "REAL NOT NULL",
    "size": "TEXT NOT NULL",
    "steps": "INTEGER",
    "chunk": "INTEGER",
    "image": "BLOB",
    "created_at": "INTEGER NOT NULL",
    "started_at": "INTEGER",
    "completed_at": "INTEGER",
    "bytes": "INTEGER",
    "error_code": "TEXT",
    "error_message": "TEXT",
}
VIDEO = re.compile("video_([a-z0-9]{1,16}-)?[0-9a-f]{24}")
"""Ids of videos, which are the names of their files."""
CHECKED_BYTES = 64 << 20
"""Databases up to this size are checked whole at the start."""


class Store:
    """The records and files of videos in one folder, which one server owns."""

    def __init__(self, folder: Path | None, *, replica: str | None = None) -> None:
        """folder: None is one that lasts as long as the store; replica: a name that ids of new videos bear."""
        self.prefix = "video_" if replica is None else f"video_{replica}-"
        self.temporary = tempfile.TemporaryDirectory(prefix="causalreel-") if folder is None else None
        self.folder = Path(self.temporary.name if folder is None and self.temporary else folder or ".").absolute()
        self.lock, self.path = threading.RLock(), self.folder / "videos.sqlite"
        self.claim = _claimed(self.folder)
        is_new = not self.path.exists()
        try:
            self.database = self._open()
            self.recover(is_new=is_new)
        except (sqlite3.Error, ValueError) as error:
            self.claim.close()
            raise ValueError(f"{self.path} cannot be used: {error}; move it away or choose another folder") from error

    def _open(self) -> sqlite3.Connection:
        """The database, made if need be; sqlite3.Error or ValueError if it is not one of this server."""
        database = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None)
        try:
            database.row_factory = sqlite3.Row
            database.execute("PRAGMA locking_mode=EXCLUSIVE")  # no shared index, which a full disk has no room for
            database.execute("PRAGMA journal_mode=WAL")
            database.execute("PRAGMA synchronous=FULL")
            columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
            database.execute(f"CREATE TABLE IF NOT EXISTS videos ({columns})")
            found = {row["name"] for row in database.execute("PRAGMA table_info(videos)")}
            if missing := [name for name in COLUMNS if name not in found]:
                raise ValueError(f"it is of another version: its videos have no {', '.join(missing[:3])}")
            if self.path.stat().st_size <= CHECKED_BYTES:
                first = database.execute("PRAGMA quick_check(1)").fetchone()[0]
                if first != "ok":
                    raise ValueError(" ".join(str(first).split())[:200])
        except BaseException:
            database.close()
            raise
        return database

    def recover(self, *, is_new: bool = False) -> None:
        """Bring records and files together after a stop of any kind; files of a lost database (is_new) are left."""
        for row in self.rows("status = 'in_progress'"):
            if self.file(row["id"]).is_file():  # complete, or it would not have this name
                self.complete(row["id"])
            else:
                self.update(row["id"], status="interrupted", completed_at=int(time.time()))
        for row in self.rows("status = 'completed'"):
            if not self.file(row["id"]).is_file():
                self.fail(row["id"], "missing", "the file of this video is gone")
        known = {row["id"] for row in self.rows("status = 'completed'")}
        for file in () if is_new else self.folder.glob("video_*.mp4"):
            if VIDEO.fullmatch(file.stem) and file.stem not in known:  # its record went, or it was cancelled
                file.unlink(missing_ok=True)
        for partial in self.folder.glob(".*.partial.mp4"):
            partial.unlink(missing_ok=True)

    def file(self, video: str) -> Path:
        """Where a video is when it is finished; `video` is an id of a record, never a client's text."""
        return self.folder / f"{video}.mp4"

    def rows(self, where: str = "1", *values: Any, order: str = "created_at, rowid", limit: int = -1) -> list[dict]:
        query = f"SELECT * FROM videos WHERE {where} ORDER BY {order} LIMIT {int(limit)}"
        with self.lock:
            return [dict(row) for row in self.database.execute(query, values)]

    def get(self, video: str) -> dict[str, Any] | None:
        return next(iter(self.rows("id = ?", video)), None)

    def count(self, where: str) -> int:
        with self.lock:
            return self.database.execute(f"SELECT count(*) FROM videos WHERE {where}").fetchone()[0]

    def counts(self) -> dict[str, int]:
        with self.lock:
            return dict(tuple(row) for row in self.database.execute("SELECT status, count(*) FROM videos GROUP BY 1"))

    def add(self, fields: dict[str, Any]) -> dict[str, Any]:
        row = {name: fields.get(name) for name in COLUMNS} | {"id": self.prefix + secrets.token_hex(12)}
        row |= {"status": "queued", "created_at": int(time.time())}
        with self.lock:
            marks = ", ".join("?" * len(row))
            self.database.execute(f"INSERT INTO videos ({', '.join(row)}) VALUES ({marks})", list(row.values()))
        return row

    def update(self, video: str, *, only: str | None = None, **fields: Any) -> bool:
        """Set columns, only if the status is `only` where that is given -> whether there was such a record."""
        names = ", ".join(f"{name} = ?" for name in fields)
        guard, values = ("", []) if only is None else (" AND status = ?", [only])
        with self.lock:
            done = self.database.execute(
                f"UPDATE videos SET {names} WHERE id = ?{guard}", [*fields.values(), video, *values]
            )
            return done.rowcount > 0

    def complete(self, video: str) -> None:
        """The file is whole; if the video was cancelled meanwhile, it goes."""
        now, size = int(time.time()), self.file(video).stat().st_size
        if not self.update(video, only="in_progress", status="completed", completed_at=now, bytes=size):
            self.file(video).unlink()

    def fail(self, video: str, code: str, message: str, *, only: str | None = None) -> None:
        now = int(time.time())
        self.update(video, only=only, status="failed", completed_at=now, error_code=code, error_message=message)

    def remove(self, video: str) -> None:
        with self.lock:
            self.database.execute("DELETE FROM videos WHERE id = ?", [video])
        self.file(video).unlink(missing_ok=True)

    def close(self) -> None:
        with self.lock:
            self.database.close()
        self.claim.close()
        if self.temporary is not None:
            self.temporary.cleanup()


def _claimed(folder: Path) -> IO[str]:
    """The lock of a folder, held for as long as the file is open; ValueError for one that cannot be had."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim = open(folder / "lock", "w")  # noqa: SIM115 - held for as long as the server runs
    except OSError as error:
        raise ValueError(f"{folder} cannot be a folder of videos: {error.strerror or error}") from error
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        claim.close()
        raise ValueError(f"{folder} is used by another server; give each a data folder of its own") from error
    return claim


@contextlib.contextmanager
def disk() -> Iterator[None]:
    """Turn what the disk cannot do into an answer."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        log.error("data folder: %s", error)
        raise ApiError(507, "storage", "the server cannot write to its disk; it may be full") from error
