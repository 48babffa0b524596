"""Copies of a run in a folder elsewhere, its remote: any URL that fsspec knows, such as s3://bucket/run.

    <url>/checkpoints/step-00001000/  the checkpoint's files, manifest.json last
    <url>/metrics.jsonl, config.yaml  before the manifest of each checkpoint
    <url>/export/, lora/              at the end of the run

Object stores rename nothing: a checkpoint counts there once its manifest is there and with it every file that it names,
as long as it says. A thread copies, one checkpoint at a time and file by file, while the training goes on; in memory is
what the file system's `put` holds of one file, and the records. The first process of a launch has the remote alone.
What comes back is a stranger's: names, sizes and hashes are checked before the run's folder has it.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from causalreel.config import defaults, fixed
from causalreel.files import replacing, replacing_folder
from causalreel.folders import LOCK
from causalreel.foreign import JSON_BYTES, parse_json, shown, text_of
from causalreel.hashed import sha256_of
from causalreel.train import checkpoint
from causalreel.train.elsewhere import Place, named

if TYPE_CHECKING:
    from causalreel.train.trainer import TrainerConfig

MANIFEST = "manifest.json"
ENTRIES, TRIED = 100_000, 100
"""Files of a checkpoint; checkpoints of a remote that are looked at, from the newest on."""
RECORDS_BYTES = 1 << 28
"""Of a metrics file that is fetched."""
TELL_S = 10.0
"""Between two lines that say how far copying is."""

log = logging.getLogger("causalreel.train")


class Damaged(ValueError):
    """A checkpoint of the remote that does not count."""


class Remote:
    """The remote of a run, in its first process."""

    def __init__(self, url: str, out: Path, *, keep: int) -> None:
        self.out, self.directory, self.keep, self.place = out, out / "checkpoints", keep, Place(url)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waiting: Path | None = None
        self._copying: Path | None = None
        self._bytes = 0, 0  # copied and in all, of the folder that is being copied
        self._failure: Exception | None = None
        self._there: tuple[str, Mapping[str, str]] = "", {}
        """The newest checkpoint that is there, and the hashes of its files."""

    # ---- there

    @property
    def held(self) -> set[Path]:
        """Checkpoints that must stay here until they are copied."""
        with self._lock:
            return {path for path in (self._copying, self._waiting) if path is not None}

    def send(self, path: Path) -> None:
        """Have a checkpoint copied once the one before is; one that is still waiting then gives way to it."""
        with self._lock:
            self._waiting = path
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="remote", daemon=True)
                self._thread.start()

    def wait(self) -> None:
        """Until nothing is being copied; says how far it is."""
        patience = TELL_S / 10
        while (thread := self._thread) is not None:
            thread.join(patience)
            if thread.is_alive():
                (done, total), now = self._bytes, self.place.callback.value
                log.info("copying to %s: %.3f of %.3f GB", self.place.url, min(done + now, total) / 1e9, total / 1e9)
            patience = TELL_S

    def finish(self, *folders: str) -> None:
        """At the end: wait, copy the newest checkpoint if it is not there, and these folders of the run.

        OSError if something could not be copied; the checkpoints that were held for it go.
        """
        self.wait()
        newest = checkpoint.latest(self.directory)
        if newest is not None and newest.name != self._there[0]:
            self.send(newest)
            self.wait()
        checkpoint.prune(self.directory, self.keep)
        problem = self._failure
        try:
            for name in folders if problem is None else ():
                if (self.out / name).is_dir():
                    self._put_folder(self.out / name, name)
                    log.info("copied %s to %s", self.out / name, self.place.url)
        except OSError as error:
            problem = error
        if problem is not None:
            told = f"{problem}; {self.out} has all of it: run the same command again to copy it"
            raise OSError(f"trainer.remote: {told}")

    def _work(self) -> None:
        while True:
            with self._lock:
                self._copying, self._waiting = self._waiting, None
                if self._copying is None:
                    self._thread = None
                    return
            path, began = self._copying, time.monotonic()
            try:
                self._copy(path)
                self._failure = None
                log.info("copied %s to %s: %.1f s", path.name, self.place.url, time.monotonic() - began)
            except Exception as error:  # the training goes on; `finish` raises it
                self._failure = error
                told = "%s was not copied to the remote (%s); it is whole in %s, and the next one is tried"
                log.warning(told, path.name, error, path.parent)

    def _copy(self, path: Path) -> None:
        for name in ("config.yaml", "metrics.jsonl"):
            if (file := self.out / name).is_file():
                self.place.write(name, file.read_bytes())
        self._put_folder(path, f"checkpoints/{path.name}")
        self._there = path.name, checkpoint.hashes_of(path)
        try:
            self._prune(path)
        except OSError as error:
            log.warning("older checkpoints of the remote stay: %s", error)

    def _put_folder(self, folder: Path, name: str) -> None:
        """Copy a folder, last what says what is in it. Files that the newest checkpoint has too are copied there."""
        found = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != LOCK)
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
        telling = [MANIFEST] if MANIFEST in sizes else [file for file in sizes if file.endswith((".yaml", ".json"))]
        hashes = checkpoint.hashes_of(folder) if MANIFEST in sizes else {}
        self._bytes = 0, sum(sizes.values())
        for file in telling:
            self.place.remove(f"{name}/{file}")
        for files in (sizes.keys() - telling, telling):
            for file in sorted(files):
                self._put(folder / file, f"{name}/{file}", hashes.get(file))
            there = self.place.sizes(name)
            for file in files:
                if there.get(file) != sizes[file]:
                    told = f"has {there.get(file, 0)} bytes instead of {sizes[file]}"
                    raise OSError(f"{self.place.url}/{name}/{file} {told}")

    def _put(self, file: Path, name: str, sha256: str | None) -> None:
        step, known = self._there
        inner = name.split("/", 2)[-1]
        is_there = sha256 is not None and known.get(inner) == sha256
        if not (is_there and self.place.copy(f"checkpoints/{step}/{inner}", name)):
            self.place.put(file, name)
        self._bytes = self._bytes[0] + file.stat().st_size, self._bytes[1]
        self.place.callback.absolute_update(0)

    def _prune(self, newest: Path) -> None:
        """Keep so many checkpoints, up to this one; later ones were passed over, ones without a manifest are halves."""
        kept = 1
        for path in self._steps():
            folder = str(path)
            is_older = checkpoint.step_of(path) < checkpoint.step_of(newest)
            if is_older and kept < self.keep and MANIFEST in self.place.names(folder):
                kept += 1
            elif path.name != newest.name:
                self.place.remove(f"{folder}/{MANIFEST}")
                self.place.remove_folder(folder)

    def _steps(self) -> list[PurePosixPath]:
        """Where checkpoints are, whole or not, from the newest on."""
        found = {PurePosixPath("checkpoints", name) for name in self.place.names("checkpoints")}
        return sorted(filter(checkpoint.is_named, found), key=checkpoint.step_of, reverse=True)

    # ---- back

    def probe(self) -> None:
        """OSError unless a file can be written there, read and deleted."""
        name, text = f".causalreel-{secrets.token_hex(4)}", b"written to see whether it can be; delete it"
        self.place.write(name, text)
        if self.place.read(name, len(text) + 1) != text:
            raise OSError(f"{self.place.url}/{name} reads otherwise than it was written")
        self.place.remove(name)

    def fetch(self, check: Callable[[Mapping[str, Any], str], None]) -> None:
        """Have the newest whole checkpoint here, unless there is one of as many steps, and its records with it.

        check: gets the manifest of the newest one, wherever it is copied from, and what to call it; raises a ValueError
        if it is of another run.
        """
        here = checkpoint.latest(self.directory)
        done = -1 if here is None else checkpoint.step_of(here)
        for path in self._steps()[:TRIED]:
            step, place = checkpoint.step_of(path), f"{self.place.url}/{path}"
            try:
                manifest, text = self._manifest(path)
                check(manifest, place)
                if step > done:
                    log.info("fetching %s: %.3f GB", place, sum(manifest["bytes"].values()) / 1e9)
                    self._download(path, manifest, text)
            except Damaged as error:
                if step > done:
                    log.warning("%s is passed over: %s", place, error)
                continue
            if here is None or step != done or checkpoint.hashes_of(here) == manifest["sha256"]:
                self._there = path.name, manifest["sha256"]
            return

    def _manifest(self, path: PurePosixPath) -> tuple[dict[str, Any], bytes]:
        """The manifest of a checkpoint that counts, and its text; Damaged for others."""
        try:
            text = self.place.read(f"{path}/{MANIFEST}", JSON_BYTES + 1)
            if len(text) > JSON_BYTES:
                raise ValueError(f"it has more than {JSON_BYTES:,} bytes")
            manifest = parse_json(text.decode(), "it")
            _check_manifest(manifest, checkpoint.step_of(path))
        except FileNotFoundError:
            raise Damaged("it has no manifest, so that it was copied in part") from None
        except ValueError as error:
            raise Damaged(f"its manifest cannot be used: {error}") from None
        there = self.place.sizes(str(path))
        for file, size in manifest["bytes"].items():
            if there.get(file) != size:
                raise Damaged(f"{shown(file)} has {there.get(file, 0)} bytes instead of {size}")
        return manifest, text

    def _download(self, path: PurePosixPath, manifest: Mapping[str, Any], text: bytes) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        with replacing_folder(self.directory / path.name) as temporary:
            for file, size in manifest["bytes"].items():
                target = temporary / file
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    self.place.get(f"{path}/{file}", target)
                except FileNotFoundError as error:
                    raise Damaged(str(error)) from None
                expected = manifest["sha256"].get(file)
                if target.stat().st_size != size or expected not in (None, sha256_of(target)):
                    raise Damaged(f"{file} is not what was written")
            (temporary / MANIFEST).write_bytes(text)
            self._fetch_records()  # before the checkpoint is there, with which the run would go on without them

    def _fetch_records(self) -> None:
        size = self.place.size("metrics.jsonl")
        if size is None:
            return
        if size > RECORDS_BYTES:
            log.warning("%s/metrics.jsonl is not fetched: it has %d bytes", self.place.url, size)
            return
        with replacing(self.out / "metrics.jsonl") as temporary:
            self.place.get("metrics.jsonl", temporary)


def _check_manifest(manifest: Mapping[str, Any], step: int) -> None:
    """ValueError for a manifest that is not one of this step, or whose names lead out of its folder."""
    parts = {"bytes": dict, "sha256": dict, "fixed": dict, "contents": dict, "roles": list}
    if not all(isinstance(manifest.get(part), kind) for part, kind in parts.items()) or manifest.get("step") != step:
        raise ValueError(f"it is not of a checkpoint of step {step}")
    checkpoint.check_seal(manifest)
    text_of(manifest, "contents", "it")
    sizes = manifest["bytes"]
    if len(sizes) > ENTRIES or not all(type(size) is int and size >= 0 for size in sizes.values()):
        raise ValueError("it does not say how long each file is")
    for name in (*sizes, *manifest["sha256"], *manifest["roles"]):
        if not isinstance(name, str) or not _is_plain(name) or name == MANIFEST:
            raise ValueError(f"it names {shown(name)!r}, which is no file of a checkpoint")


def _is_plain(name: str) -> bool:
    """Whether a name is of a file below a folder, on every system."""
    is_short = len(name.encode(errors="replace")) <= 500
    parts = name.split("/")
    return is_short and name.isprintable() and not set(name) & set('\\:*?"<>|') and not {"", ".", ".."} & set(parts)


@contextlib.contextmanager
def attached(config: TrainerConfig, recipe: Any) -> Iterator[Remote | None]:
    """The remote of a run whose folder the caller has claimed, after the newest checkpoint was fetched; None if it has
    none. Errors of the body wait for what is being copied.
    """
    if config.remote is None:
        yield None
        return

    def check(manifest: Mapping[str, Any], place: str) -> None:
        how: dict[str, Any] = {"before": partial(defaults, recipe), "other": "trainer.remote"}
        checkpoint.check_manifest(manifest, f"checkpoint {place}", fixed(recipe), **how)

    with named():
        remote = Remote(config.remote, Path(config.out), keep=config.keep)
        remote.probe()
        remote.fetch(check)
    try:
        yield remote
    except Exception:
        remote.wait()
        raise
