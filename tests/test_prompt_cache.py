"""The cache of prompt embeddings: found, not found, damaged, shared."""

from __future__ import annotations

import logging
import multiprocessing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from causalreel.text.cache import PromptCache, PromptEntry, PromptKey
from causalreel.weights.files import read_tensors, write_tensors

KEY = PromptKey("a cat walks", 16, 8, torch.bfloat16)


def entry(seed: int = 0, rows: int = 3, dtype: torch.dtype = torch.bfloat16) -> PromptEntry:
    generator = torch.Generator().manual_seed(seed)
    return PromptEntry(torch.randn(rows, 8, generator=generator).to(dtype), rows)


def test_what_was_put_is_found(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path / "prompts", "encoder")
    assert cache.get(KEY) is None
    cache.put(KEY, PromptEntry(entry().rows, 40))
    found = PromptCache(tmp_path / "prompts", "encoder").get(KEY)
    assert found is not None and torch.equal(found.rows, entry().rows) and found.tokens == 40
    assert found.rows.dtype == torch.bfloat16
    assert [path.suffix for path in (tmp_path / "prompts").rglob("*") if path.is_file()] == [".safetensors"]


def test_everything_that_the_numbers_depend_on_is_in_the_key(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "encoder")
    cache.put(KEY, entry())
    for change in ({"prompt": "a cat walk"}, {"length": 17}, {"width": 9}, {"dtype": torch.float32}):
        other = replace(KEY, **change)
        assert cache.get(other) is None and cache.path(other) != cache.path(KEY)
    assert PromptCache(tmp_path, "another encoder").get(KEY) is None


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "cut":
        path.write_bytes(content[:-5])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(b"not a file of tensors")
    elif how == "one bit":
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    else:
        kept = read_tensors(path)
        changes = {
            "other tensor": {"rows": torch.zeros(3, 8, dtype=torch.bfloat16)},
            "other name": {"row": entry().rows},
            "other width": {"rows": entry().rows[:, :4]},
            "no rows": {"rows": entry().rows[:0]},
            "too many rows": {"rows": entry(rows=17).rows},
        }
        del kept["rows"]
        write_tensors(path, kept | changes[how])


@pytest.mark.parametrize(
    "how",
    ["cut", "empty", "garbage", "one bit", "other tensor", "other name", "other width", "no rows", "too many rows"],
)
def test_a_damaged_file_is_a_logged_miss_and_is_replaced(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = PromptCache(tmp_path, "encoder")
    cache.put(KEY, entry())
    damage(cache.path(KEY), how)
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEY) is None
    assert [str(cache.path(KEY)) in record.getMessage() for record in caplog.records] == [True]
    cache.put(KEY, entry())
    found = cache.get(KEY)
    assert found is not None and torch.equal(found.rows, entry().rows)


def test_a_checksum_covers_the_prompt_and_its_tokens(tmp_path: Path) -> None:
    cache = PromptCache(tmp_path, "encoder")
    cache.put(KEY, entry())
    path, other = cache.path(KEY), replace(KEY, prompt="a dog walks")
    cache.path(other).parent.mkdir(exist_ok=True)
    cache.path(other).write_bytes(path.read_bytes())
    assert cache.get(KEY) is not None and cache.get(other) is None
    found = read_tensors(path)
    write_tensors(path, found | {"tokens": found["tokens"] + 1})
    assert cache.get(KEY) is None


def test_a_folder_that_cannot_be_written_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    cache = PromptCache(tmp_path / "file" / "below", "encoder")
    with caplog.at_level(logging.WARNING):
        cache.put(KEY, entry())
    assert "cannot write" in caplog.text and cache.get(KEY) is None


def hammer(folder: str, seed: int, rounds: int) -> int:
    """Write and read one entry again and again; -> how often what was read was not something that someone wrote."""
    cache, wrong = PromptCache(folder, "encoder"), 0
    possible = [entry(other, rows=other + 2).rows for other in range(4)]
    for _ in range(rounds):
        cache.put(KEY, entry(seed, rows=seed + 2))
        found = cache.get(KEY)
        wrong += found is None or not any(torch.equal(found.rows, rows) for rows in possible)
    return wrong


def test_processes_may_share_a_folder(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        wrong = pool.starmap(hammer, [(str(tmp_path), seed, 60) for seed in range(4)])
    assert wrong == [0, 0, 0, 0]
    assert not list(tmp_path.rglob("*.tmp"))


def test_writers_do_not_share_temporary_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts with one folder may have equal process numbers, and threads always do."""
    names: list[str] = []
    write = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda path, data: (names.append(path.name), write(path, data))[1])
    cache = PromptCache(tmp_path, "encoder")
    for _ in range(2):
        cache.put(KEY, entry())
    assert len(set(names)) == 2
