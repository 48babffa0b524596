"""Videos made in the background: jobs in SQLite, files beside it, one thread that makes one after the other.

A video is a session at full pace whose first frames are written to a file, so jobs and live sessions share the model
fairly. What a restart finds: finished videos are there (the file is complete before its record says so), running ones
are marked interrupted, waiting ones are made.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import secrets
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from causalreel.data.video import write_video
from causalreel.files import remove_leftovers
from causalreel.serve.safety import ApiError
from causalreel.serve.scheduler import Busy, Ended, Handle, Scheduler
from causalreel.serve.session import Emitted, Options

if TYPE_CHECKING:
    from causalreel.serve.metrics import Metrics

log = logging.getLogger(__name__)

UNFINISHED = ("queued", "in_progress")
RETRY_S = 0.2
"""How often a job asks again for room."""
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


class Cancelled(Exception):
    """The job is to stop: its reader does not want it, or the server ends."""


class Failed(Exception):
    """The video cannot be made; the message is for whoever asked for it."""


class Store:
    """The records and files of videos in one folder, which one server owns."""

    def __init__(self, folder: Path | None, *, replica: str | None = None) -> None:
        """folder: None is one that lasts as long as the store; replica: a name that ids of new videos bear."""
        self.prefix = "video_" if replica is None else f"video_{replica}-"
        self.temporary = tempfile.TemporaryDirectory(prefix="causalreel-") if folder is None else None
        self.folder = Path(self.temporary.name) if self.temporary is not None else Path(folder or ".")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.claim = open(self.folder / "lock", "w")  # noqa: SIM115 - held for as long as the server runs
        try:
            fcntl.flock(self.claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.claim.close()
            raise ValueError(f"{self.folder} is used by another server; give each a data folder of its own") from error
        self.lock = threading.RLock()
        self.database = sqlite3.connect(self.folder / "videos.sqlite", check_same_thread=False, isolation_level=None)
        self.database.row_factory = sqlite3.Row
        self.database.execute("PRAGMA journal_mode=WAL")
        self.database.execute("PRAGMA synchronous=FULL")
        columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
        self.database.execute(f"CREATE TABLE IF NOT EXISTS videos ({columns})")
        self.recover()

    def recover(self) -> None:
        """Bring records and files together after a stop of any kind."""
        for row in self.rows("status = 'in_progress'"):
            if self.file(row["id"]).is_file():  # complete, or it would not have this name
                self.complete(row["id"])
            else:
                self.update(row["id"], status="interrupted", completed_at=int(time.time()))
        for row in self.rows("status = 'completed'"):
            if not self.file(row["id"]).is_file():
                self.fail(row["id"], "missing", "the file of this video is gone")
        remove_leftovers(self.folder)

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


@dataclass(frozen=True)
class Limits:
    """Jobs that may wait or run, and videos that are kept."""

    queued: int = 16
    kept: int = 1000


class Jobs:
    """The queue and the thread that works it off."""

    def __init__(self, scheduler: Scheduler, store: Store, limits: Limits, metrics: Metrics | None = None) -> None:
        self.scheduler, self.store, self.limits, self.metrics = scheduler, store, limits, metrics
        self.progress: dict[str, int] = {}
        """Percent of the video being made; not worth a write to disk each."""
        self.unwanted: set[str] = set()
        self.wake, self.stopping = threading.Event(), threading.Event()
        self.adding = threading.Lock()
        self.thread = threading.Thread(target=self._work, name="videos", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def close(self) -> None:
        """Stop; the video being made becomes interrupted, waiting ones stay in the queue."""
        self.stopping.set()
        self.wake.set()
        if self.thread.is_alive():
            self.thread.join(30)
        self.store.close()

    def counts(self) -> dict[str, int]:
        return self.store.counts()

    def create(self, fields: dict[str, Any]) -> dict[str, Any]:
        """Queue a video of checked fields -> its record; ApiError when there is no room."""
        with self.adding, disk():
            if self.store.count("status IN ('queued', 'in_progress')") >= self.limits.queued:
                raise ApiError(429, "queue_full", "too many videos wait already", {"retry-after": "10"})
            if self.store.count("1") >= self.limits.kept:
                raise ApiError(507, "store_full", f"{self.limits.kept} videos are kept; delete some")
            row = self.store.add(fields)
        self.wake.set()
        return row

    def get(self, video: str) -> dict[str, Any]:
        """A record with its progress; ApiError 404."""
        row = self.store.get(video)
        if row is None:
            raise ApiError(404, "no_video", "there is no video of that id")
        return self._seen(row)

    def list(self, *, after: str | None, limit: int, newest_first: bool) -> list[dict[str, Any]]:
        """Records behind `after`, one more than `limit` if there are more."""
        way = ("DESC", "<") if newest_first else ("ASC", ">")
        where, values = "1", []
        if after is not None:
            self.get(after)
            where, values = f"rowid {way[1]} (SELECT rowid FROM videos WHERE id = ?)", [after]
        return [self._seen(row) for row in self.store.rows(where, *values, order=f"rowid {way[0]}", limit=limit + 1)]

    def delete(self, video: str) -> dict[str, Any] | None:
        """Cancel an unfinished video -> its record; remove a finished one -> None."""
        with disk():
            self.get(video)
            if self.store.update(video, only="queued", status="cancelled", completed_at=int(time.time())):
                return self.get(video)
            self.unwanted.add(video)
            if self.store.update(video, only="in_progress", status="cancelled", completed_at=int(time.time())):
                return self.get(video)
            self.unwanted.discard(video)
            self.store.remove(video)
            return None

    def _seen(self, row: dict[str, Any]) -> dict[str, Any]:
        percent = 100 if row["status"] == "completed" else self.progress.get(row["id"], 0)
        return {name: value for name, value in row.items() if name != "image"} | {"progress": percent}

    def _work(self) -> None:
        while not self.stopping.is_set():
            try:
                row = next(iter(self.store.rows("status = 'queued'", limit=1)), None)
                if row is None:
                    self.wake.wait(5)
                    self.wake.clear()
                else:
                    self._run(row)
            except Exception:  # such as a disk that is full: said in the log, tried again; the thread stays
                log.exception("the queue of videos")
                self.stopping.wait(1)

    def _run(self, row: dict[str, Any]) -> None:
        """Make one video and record how it went."""
        video = row["id"]
        handle = self._open(row)
        if handle is None:
            return
        try:
            if not self.store.update(video, only="queued", status="in_progress", started_at=int(time.time())):
                return
            self._write(row, handle)
            self.store.complete(video)
        except Cancelled:
            self.store.file(video).unlink(missing_ok=True)
            self.store.update(video, only="in_progress", status="interrupted", completed_at=int(time.time()))
        except Exception as error:
            self.store.fail(video, *_told(error, video), only="in_progress")
        finally:
            handle.close("video is done")
            self.progress.pop(video, None)
            self.unwanted.discard(video)
            self._count(video)

    def _count(self, video: str) -> None:
        row = self.store.get(video)
        if row is not None:
            log.info("video %s %s", video, row["status"])
            if self.metrics is not None:
                self.metrics.videos.labels(row["status"]).inc()

    def _open(self, row: dict[str, Any]) -> Handle | None:
        """A session for the video as soon as there is room; None if it is not wanted any more or cannot be."""
        video = row["id"]
        while not self.stopping.is_set():
            current = self.store.get(video)
            if current is None or current["status"] != "queued":
                return None
            try:
                return self.scheduler.open(options_of(row), pace="max")
            except Busy:
                self.stopping.wait(RETRY_S)
            except Exception as error:
                self.store.fail(video, *_told(error, video))
                self._count(video)
                return None
        return None

    def _write(self, row: dict[str, Any], handle: Handle) -> None:
        side = min(int(part) for part in row["size"].split("x"))
        parts = self._frames(row, handle)
        write_video(self.store.file(row["id"]), parts, row["fps"], scale=4 if side < 128 else 1)

    def _frames(self, row: dict[str, Any], handle: Handle) -> Iterator[Tensor]:
        """The video's frames (t,3,H,W) uint8 as they are made."""
        after, left = -1, row["frames"]
        while left > 0:
            if self.stopping.is_set() or row["id"] in self.unwanted:
                raise Cancelled
            pulled = handle.pull(after, RETRY_S)
            if isinstance(pulled, Ended):
                raise Cancelled if self.stopping.is_set() else Failed(pulled.reason)
            if not isinstance(pulled, Emitted):
                continue
            after = pulled.sequence
            frames = pulled.frames[:left].permute(0, 3, 1, 2)  # (t,H,W,3) -> (t,3,H,W)
            left -= len(frames)
            self.progress[row["id"]] = min(99, 100 * (row["frames"] - left) // row["frames"])
            if self.metrics is not None:
                self.metrics.given(pulled, "video")
            yield frames


def options_of(row: dict[str, Any]) -> Options:
    """A record -> the session that makes its frames."""
    image = None if row["image"] is None else unpack_image(row["image"], row["size"])
    how = {name: row[name] for name in ("prompt", "seed", "steps", "chunk", "fps")}
    return Options(**how, image=image)


def pack_image(image: Tensor) -> bytes:
    """(3,H,W) in [-1,1] -> float32 bytes for the record."""
    return image.float().contiguous().numpy().tobytes()


def unpack_image(data: bytes, size: str) -> Tensor:
    """Bytes of `pack_image` and the size WxH -> (3,H,W)."""
    import torch

    width, height = (int(part) for part in size.split("x"))
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(3, height, width)


@contextlib.contextmanager
def disk() -> Iterator[None]:
    """Turn what the disk cannot do into an answer."""
    try:
        yield
    except (sqlite3.OperationalError, OSError) as error:
        log.error("data folder: %s", error)
        raise ApiError(507, "storage", "the server cannot write to its disk; it may be full") from error


def _told(error: Exception, video: str) -> tuple[str, str]:
    """What whoever asked for a video may know of an error: no path, no trace."""
    if isinstance(error, (Failed, ValueError)):
        return "generation", str(error)
    if isinstance(error, OSError):
        log.error("video %s: %s", video, error)
        return "storage", f"the file could not be written: {error.strerror or 'unknown reason'}"
    log.error("video %s", video, exc_info=error)
    return "internal", "internal error; the server's log has more under the id of this video"
