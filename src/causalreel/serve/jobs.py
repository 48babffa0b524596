"""Videos made in the background: jobs in SQLite, files beside it, one thread that makes one after the other.

A video is a session at full pace whose first frames are written to a file, so jobs and live sessions share the model
fairly. What a restart finds: finished videos are there (the file is complete before its record says so), running ones
are marked interrupted, waiting ones are made.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from causalreel.data.video import write_video
from causalreel.serve.emitted import Emitted
from causalreel.serve.handle import Ended, Handle
from causalreel.serve.safety import ApiError
from causalreel.serve.scheduler import Busy, Scheduler
from causalreel.serve.session import Options
from causalreel.serve.store import Store, disk

if TYPE_CHECKING:
    from causalreel.serve.counters import Counters

log = logging.getLogger(__name__)

RETRY_S = 0.2
"""How often a job asks again for room."""
LEAST_WAIT_S, MOST_WAIT_S = 1.0, 16.0
"""Between two tries of a disk that takes nothing."""


class Cancelled(Exception):
    """The job is to stop: its reader does not want it, or the server ends."""


class Failed(Exception):
    """The video cannot be made; the message is for whoever asked for it."""


@dataclass(frozen=True)
class VideoLimits:
    """Jobs that may wait or run, and videos that are kept."""

    queued: int = 16
    kept: int = 1000


class Jobs:
    """The queue and the thread that works it off."""

    def __init__(
        self, scheduler: Scheduler, store: Store, limits: VideoLimits, counters: Counters | None = None
    ) -> None:
        self.scheduler, self.store, self.limits, self.counters = scheduler, store, limits, counters
        self.progress: dict[str, int] = {}
        """Percent of the video being made; not worth a write to disk each."""
        self.outcomes: dict[str, dict[str, Any]] = {}
        """How videos went, where the record does not say so yet."""
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
        with disk():
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
        with disk():
            rows = self.store.rows(where, *values, order=f"rowid {way[0]}", limit=limit + 1)
        return [self._seen(row) for row in rows]

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
        if row["status"] == "in_progress":
            row = row | self.outcomes.get(row["id"], {})
        percent = 100 if row["status"] == "completed" else self.progress.get(row["id"], 0)
        return {name: value for name, value in row.items() if name != "image"} | {"progress": percent}

    def _work(self) -> None:
        wait = LEAST_WAIT_S
        while not self.stopping.is_set():
            try:
                self._record()
                row = next(iter(self.store.rows("status = 'queued'", limit=1)), None)
                if row is None:
                    self.wake.wait(5)
                    self.wake.clear()
                else:
                    self._run(row)
                wait = LEAST_WAIT_S
            except Exception as error:  # the thread stays, and tries again more and more rarely
                is_disk = isinstance(error, (sqlite3.Error, OSError))
                if wait == LEAST_WAIT_S:
                    log.error("the queue of videos: %s", error, exc_info=None if is_disk else error)
                self.stopping.wait(wait)
                wait = min(2 * wait, MOST_WAIT_S)

    def _run(self, row: dict[str, Any]) -> None:
        """Make one video and record how it went."""
        video = row["id"]
        handle = self._open(row)
        if handle is None:
            return
        try:
            if not self.store.update(video, only="queued", status="in_progress", started_at=int(time.time())):
                return
            try:
                self._write(row, handle)
                self.outcomes[video] = {"status": "completed", "bytes": self.store.file(video).stat().st_size}
            except Cancelled:
                self.outcomes[video] = {"status": "interrupted"}
            except Exception as error:
                code, message = _told(error, video)
                self.outcomes[video] = {"status": "failed", "error_code": code, "error_message": message}
            self.outcomes[video]["completed_at"] = int(time.time())
            self._record()
        finally:
            handle.close("video is done")
            self.progress.pop(video, None)
            self.unwanted.discard(video)

    def _record(self) -> None:
        """Write down how videos went; what the disk does not take is kept, shown, and tried again."""
        for video, outcome in list(self.outcomes.items()):
            is_kept = self.store.update(video, only="in_progress", **outcome)  # or it was cancelled meanwhile
            del self.outcomes[video]
            if not is_kept or outcome["status"] != "completed":
                self.store.file(video).unlink(missing_ok=True)
            self._count(video)

    def _count(self, video: str) -> None:
        row = self.store.get(video)
        if row is not None:
            log.info("video %s %s", video, row["status"])
            if self.counters is not None:
                self.counters.videos.labels(row["status"]).inc()

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
            if self.counters is not None:
                self.counters.given(pulled, "video")
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


def _told(error: Exception, video: str) -> tuple[str, str]:
    """What whoever asked for a video may know of an error: no path, no trace."""
    if isinstance(error, (Failed, ValueError)):
        return "generation", str(error)
    if isinstance(error, OSError):
        log.error("video %s: %s", video, error)
        return "storage", f"the file could not be written: {error.strerror or 'unknown reason'}"
    log.error("video %s", video, exc_info=error)
    return "internal", "internal error; the server's log has more under the id of this video"
