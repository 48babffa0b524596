"""Which files have been compared with their hashes, so that what nobody has touched since is not read once more.

A file is known by its place and its state: inode, size, and the times of its last change of contents and of anything
else. Whatever is done to it through a POSIX file system changes one of these, the last one even where the time of its
contents is set back. A bit that turns on the disk beneath changes none of them, and file systems that imitate another
storage may keep no such time: `causalreel prepare --check` reads everything. What was touched shortly before it was
read is not remembered, for a further change might not show.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from causalreel.data.shards import damaged
from causalreel.files import write_text
from causalreel.foreign import read_json
from causalreel.hashed import sha256_of

COMPARED = "compared.json"
FORMAT = 1
BYTES = 128 << 20
"""Of the record: one of 300,000 files takes half as much."""
SETTLED_S = 60.0
"""How long nothing must have happened to a file: longer than a file system's tick, and than a page that was changed
through a memory map may stay in memory, where a second change of it leaves no trace."""
DIFFERS = "its contents are not those that the manifest names"


def compare(path: Path, sha256: str, known: Mapping[str, str]) -> dict[str, str]:
    """Compare a file with its hash, unless `known` says that it has been and is as it was; ValueError if it differs.

    -> what to know of it from now on: its place, with its hash and state; nothing of one that was touched just now.
    """
    key, before, began = str(path.resolve()), path.stat(), time.time()
    entry = _entry(sha256, before)
    if known.get(key) == entry:
        return {key: entry}
    if sha256_of(path) != sha256:
        raise damaged(path, DIFFERS)
    is_settled = max(before.st_mtime, before.st_ctime) + SETTLED_S < began
    return {key: entry} if is_settled and _entry(sha256, path.stat()) == entry else {}


def read_compared(folder: Path) -> dict[str, str]:
    """What is known in a folder; nothing where the record is missing or is none."""
    try:
        found = read_json(folder / COMPARED, most=BYTES, what="record of compared files")
    except (OSError, ValueError):
        return {}
    files = found.get("files")
    return files if found.get("format") == FORMAT and isinstance(files, dict) else {}


def write_compared(folder: Path, known: Mapping[str, str]) -> None:
    write_text(folder / COMPARED, json.dumps({"format": FORMAT, "files": dict(known)}, indent=1) + "\n")


def _entry(sha256: str, state: os.stat_result) -> str:
    return f"{sha256} {state.st_ino} {state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}"
