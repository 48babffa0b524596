"""Data are compared with their hashes once, and again after anything has been done to them, however hidden it is."""

# ruff: noqa: F811 - fixtures of another file

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from causalreel import cli, hashed
from causalreel.data import compared
from causalreel.data.compared import COMPARED, compare, read_compared, write_compared
from causalreel.data.manifest import Manifest, ShardEntry, write_manifest
from test_run import CD, made, place, reel, refused  # noqa: F401 - fixtures

HASH = hashed.sha256_of


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read; whatever is older than now counts as settled."""
    found: list[str] = []

    def noted(path: Path) -> str:
        found.append(path.name)
        return HASH(path)

    monkeypatch.setattr(compared, "sha256_of", noted)
    monkeypatch.setattr(compared, "SETTLED_S", -1e9)
    return found


def keep_times(path: Path, before: os.stat_result) -> None:
    """Set back what can be set back, in a later tick of the file system's clock."""
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def written_over(path: Path) -> None:
    before = path.stat()
    with path.open("r+b") as file:
        file.write(b"X")
    keep_times(path, before)


def exchanged(path: Path) -> None:
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(b"X" + path.read_bytes()[1:])
    keep_times(other, before)
    other.replace(path)


def mapped(path: Path) -> None:
    """Changed in memory, as `numpy.memmap` does."""
    import mmap

    before = path.stat()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as held:
        held[0:1] = b"X"
        held.flush()
    keep_times(path, before)


def test_what_nobody_touched_is_read_once(tmp_path: Path, read: list[str]) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 1000)
    known = compare(path, HASH(path), {})
    assert compare(path, HASH(path), known) == known and read == ["a"]
    write_compared(tmp_path, known)
    assert read_compared(tmp_path) == known
    (tmp_path / "link").symlink_to(path)
    assert compare(tmp_path / "link", HASH(path), known) == known and read == ["a"]


@pytest.mark.parametrize("change", [written_over, exchanged, mapped])
def test_what_was_touched_is_read_again(tmp_path: Path, read: list[str], change: Callable[[Path], None]) -> None:
    """Though its size and the time of its last change are what they were."""
    path = tmp_path / "a"
    path.write_bytes(b"abc" * 1000)
    told, before = HASH(path), path.stat()
    known = compare(path, told, {})
    change(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    with pytest.raises(ValueError, match=r"a is damaged \(its contents are not those that the manifest names\)"):
        compare(path, told, known)
    assert read == ["a", "a"]


def test_another_hash_is_compared(tmp_path: Path, read: list[str]) -> None:
    """Of a manifest that was written anew beside the same files."""
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    known = compare(path, HASH(path), {})
    with pytest.raises(ValueError, match="is damaged"):
        compare(path, "0" * 64, known)


def test_what_is_being_written_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what was touched a moment ago, nor what is touched while it is read."""
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    told = HASH(path)
    monkeypatch.setattr(compared, "SETTLED_S", 1e6)
    assert compare(path, told, {}) == {}

    def slow(path: Path) -> str:
        found, before = HASH(path), path.stat()
        while path.stat().st_ctime_ns == before.st_ctime_ns:
            path.touch()
        return found

    monkeypatch.setattr(compared, "SETTLED_S", -1e9)
    monkeypatch.setattr(compared, "sha256_of", slow)
    assert compare(path, told, {}) == {}


@pytest.mark.parametrize("text", ["", "[]", '{"format": 2, "files": {}}', '{"format": 1, "files": 3}', '{"format": 1}'])
def test_a_record_that_is_none_is_nothing_known(tmp_path: Path, text: str) -> None:
    assert read_compared(tmp_path) == {}
    (tmp_path / COMPARED).write_text(text)
    assert read_compared(tmp_path) == {}


def test_a_run_that_goes_on_reads_what_was_touched(
    place: Path, capsys: pytest.CaptureFixture[str], read: list[str]
) -> None:
    shard = Path("data/latents-00000.safetensors")
    entry = ShardEntry(shard.name, 6, shard.stat().st_size, HASH(shard))
    write_manifest(shard.parent, Manifest((entry,)))
    reel(*CD)
    assert read == [shard.name] and list(read_compared(Path("new"))) == [str(shard.resolve())]
    reel(*CD, "trainer.steps=3")
    assert read == [shard.name]
    shutil.move("data", "elsewhere")  # at another place it is another file
    reel(*CD, "trainer.steps=4", "data=elsewhere")
    assert read == 2 * [shard.name]
    assert cli.main([*CD, "trainer.steps=5", "data=elsewhere"]) == 0 and read == 2 * [shard.name]
    written_over(Path("elsewhere") / shard.name)
    refused(capsys, [*CD, "trainer.steps=6", "data=elsewhere"], shard.name, "damaged")
