"""Shards packed, read back row by row, checked; a training that reads its text as it was stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from causalreel.data import compared
from causalreel.data.manifest import MANIFEST, Manifest, ShardEntry, read_manifest, write_manifest
from causalreel.data.packing import Row, pack, without_zeros, write_null
from causalreel.data.shards import read_captions, read_shard
from causalreel.data.streaming import ShardSource, open_set
from causalreel.train.stage import DataCursor, StepContext
from causalreel.types import Batch, LatentBatch, TrajectoryBatch
from ceilings import work_within


def row(number: int, *, tokens: int = 3, states: int = 0, kind: torch.dtype = torch.float16) -> Row:
    make = torch.Generator().manual_seed(number)
    shape = (states, 2, 4, 2, 3) if states else (2, 4, 2, 3)
    text = torch.zeros(8, 5)
    text[:tokens] = torch.randn(tokens, 5, generator=make)
    return Row(
        f"caption {number}\nwith two lines ", f"v.mp4@{number}", torch.randn(shape, generator=make).to(kind), text
    )


def packed(folder: Path, *sizes: int, states: int = 0) -> tuple[list[Row], Manifest]:
    """A set of shards of these sizes; texts have 0, 1, 2 ... 8 tokens."""
    rows = [row(number, tokens=number % 9, states=states) for number in range(sum(sizes))]
    entries, at = [], 0
    for number, size in enumerate(sizes):
        entries.append(pack(folder / f"latents-{number:05d}.safetensors", rows[at : at + size]))
        at += size
    manifest = Manifest(tuple(entries), {"codec": "x"}, {}, write_null(folder, torch.zeros(8, 5)))
    write_manifest(folder, manifest)
    return rows, manifest


def test_any_rows_in_any_order_come_as_they_were_packed(tmp_path: Path) -> None:
    rows, manifest = packed(tmp_path, 3, 1, 9)
    source = ShardSource(open_set(tmp_path), length=8)
    assert len(source) == manifest.clips == 13
    for wanted in ([0], [12, 3, 4, 2], [5, 5, 0], list(range(13))):
        batch = source.batch(torch.tensor(wanted))
        assert isinstance(batch, LatentBatch) and batch.latents.dtype == torch.float16
        assert torch.equal(batch.latents, torch.stack([rows[n].clip for n in wanted]))
        assert torch.equal(batch.conditioning.text, torch.stack([rows[n].text for n in wanted]))
    assert [text for n in range(3) for text in read_captions(tmp_path / f"latents-{n:05d}.safetensors", 0)] == [
        each.caption for each in rows
    ]
    assert open_set(tmp_path).captions(4) == [each.caption for each in rows[:4]]
    assert not load_file(tmp_path / "null.safetensors")["text"].numel()
    source.close()


def test_trajectories_and_prompts_alone(tmp_path: Path) -> None:
    rows, _ = packed(tmp_path / "t", 2, 2, states=4)
    batch = ShardSource(open_set(tmp_path / "t"), length=8).batch(torch.tensor([3]))
    assert isinstance(batch, TrajectoryBatch) and torch.equal(batch.latents[0], rows[3].clip)
    prompts = [Row(each.caption, each.source, None, each.text) for each in rows]
    pack(tmp_path / "p" / "latents-0.safetensors", prompts)
    batch = ShardSource(open_set(tmp_path / "p"), length=8).batch(torch.tensor([1, 2]))
    assert type(batch) is Batch and torch.equal(batch.conditioning.text[1], rows[2].text)


def test_rows_that_are_expected_are_read_ahead_and_others_forgotten(tmp_path: Path) -> None:
    rows, _ = packed(tmp_path, 6)
    source = ShardSource(open_set(tmp_path), length=8)
    source.expect(torch.tensor([4, 1]))
    assert set(source._ahead) == {4, 1}
    source.expect(torch.tensor([1, 2]))
    assert set(source._ahead) == {1, 2}
    assert torch.equal(source.batch(torch.tensor([2, 5])).latents[1], rows[5].clip)  # type: ignore[attr-defined]
    assert set(source._ahead) == {1}


def test_a_step_has_the_next_rows_read_while_it_computes(tmp_path: Path) -> None:
    packed(tmp_path, 7)
    source, cursor = ShardSource(open_set(tmp_path), length=8), DataCursor(7, 0)
    step = StepContext(0, 0, source, cursor, torch.device("cpu"))
    step.batch(3, LatentBatch)
    assert sorted(source._ahead) == sorted(set(cursor.peek(3).tolist())) and cursor.position == 3
    taken = torch.cat([DataCursor(5, 0, p).take(1) for p in range(9)])
    assert torch.equal(DataCursor(5, 0, 1).take(8), taken[1:]) and torch.equal(DataCursor(5, 0, 1).peek(8), taken[1:])


def test_a_set_larger_than_the_memory_is_streamed(tmp_path: Path) -> None:
    clip = torch.ones(4, 16, 64, 128, dtype=torch.float16)  # 1 MiB
    entries = []
    for number in range(8):
        rows = [Row("a", f"{n}", clip * n, torch.ones(4, 8)) for n in range(40)]
        entries.append(pack(tmp_path / f"latents-{number}.safetensors", rows))
    write_manifest(tmp_path, Manifest(tuple(entries)))
    work = """
source = ShardSource(open_set(arguments[0]), length=16)
cursor = DataCursor(len(source), 0)
step = StepContext(0, 0, source, cursor, torch.device("cpu"))
print(sum(float(step.batch(8, LatentBatch).latents[:, 0, 0, 0, 0].sum()) for _ in range(40)))
"""
    setup = """
import torch
from causalreel.data.streaming import ShardSource, open_set
from causalreel.train.stage import DataCursor, StepContext
from causalreel.types import LatentBatch
torch.ones(9, 9) @ torch.ones(9, 9)
"""
    cost = work_within(160, work, str(tmp_path), setup=setup)  # of 320 MiB
    assert float(cost.output) == 8 * sum(range(40)) and cost.peak_mib < 100


def test_texts_longer_than_the_network_takes_and_rows_that_are_not_there(tmp_path: Path) -> None:
    packed(tmp_path, 9)
    with pytest.raises(ValueError, match="texts of 8 tokens, the network takes 7"):
        ShardSource(open_set(tmp_path), length=7)
    with pytest.raises(IndexError, match="has 9 clips, row 9"):
        ShardSource(open_set(tmp_path), length=8).batch(torch.tensor([9]))
    with pytest.raises(ValueError, match="has 9 clips, 10 were asked for"):
        open_set(tmp_path, rows=10)
    assert len(ShardSource(open_set(tmp_path, rows=2), length=8)) == 2


@pytest.mark.parametrize("name", ["latents", "text"])
def test_numbers_that_are_none_in_a_shard(tmp_path: Path, name: str) -> None:
    packed(tmp_path, 4)
    path = tmp_path / "latents-00000.safetensors"
    tensors = load_file(path)
    tensors[name][2] = float("nan")  # the third row of text too is of the third clip: they have 0, 1, 2 ... rows
    save_file(tensors, path)
    (tmp_path / MANIFEST).unlink()
    source = ShardSource(open_set(tmp_path), length=8)
    source.batch(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=rf"{path.name}: clip 2 has values of {name} that are not finite"):
        source.batch(torch.tensor([1, 2]))


@pytest.mark.parametrize("name", ["latents-00000", "latents-00001", "null"])
def test_a_bit_that_has_turned_is_found_by_the_process_whose_it_is(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [row(number) for number in range(8)]
    entries = tuple(pack(tmp_path / f"latents-{n:05d}.safetensors", rows[4 * n : 4 * n + 4]) for n in range(2))
    write_manifest(tmp_path, Manifest(entries, {}, {}, write_null(tmp_path, torch.ones(8, 5))))
    data = open_set(tmp_path)
    data.verify()
    path = tmp_path / f"{name}.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path} is damaged \(its contents are not those that the manifest names\)"):
        data.verify()
    other = 1 if name != "latents-00001" else 0
    data.verify(other, 2)
    with pytest.raises(ValueError, match=path.name):
        data.verify(1 - other, 2)
    if name != "null":
        monkeypatch.setattr("causalreel.data.streaming.HASHED", 100)  # too much to read
        caplog.set_level("INFO", "causalreel")
        data.verify()
        assert "are not compared with their hashes; `causalreel prepare --check` does that" in caplog.text


def test_processes_agree_on_whether_shards_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(number) for number in range(8)]
    parts = [pack(tmp_path / f"latents-{n:05d}.safetensors", part) for n, part in enumerate((rows[:7], rows[7:]))]
    write_manifest(tmp_path, Manifest(tuple(parts), {}, {}, write_null(tmp_path, torch.ones(8, 5))))
    data, small = open_set(tmp_path), tmp_path / "latents-00001.safetensors"
    small.write_bytes(small.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(ValueError, match=small.name):
        data.verify(1, 2)
    monkeypatch.setattr("causalreel.data.streaming.HASHED", parts[0].bytes - 1)
    data.verify(0, 2)
    data.verify(1, 2)


def test_each_process_reads_its_share_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are; a second launch reads nothing, and one of another size nothing either."""
    packed(tmp_path, 4, 4, 4)
    read: list[str] = []
    hashed = compared.sha256_of
    monkeypatch.setattr(compared, "sha256_of", lambda path: read.append(path.name) or hashed(path))
    monkeypatch.setattr(compared, "SETTLED_S", -1e9)
    data, known = open_set(tmp_path), {}
    for rank in range(2):
        known |= data.verify(rank, 2)
    assert sorted(read) == [*(f"latents-{number:05d}.safetensors" for number in range(3)), "null.safetensors"]
    assert len(known) == len(read)
    assert {**data.verify(0, 2, known), **data.verify(1, 2, known)} == data.verify(known=known) == known
    assert len(read) == 4


def test_unconditional_text_that_is_none(tmp_path: Path) -> None:
    packed(tmp_path, 4)
    path = tmp_path / "null.safetensors"
    save_file({"text": torch.full((2, 5), float("inf"))}, path)
    with pytest.raises(
        ValueError, match=r"null.safetensors is damaged \(the unconditional text has values that are not"
    ):
        open_set(tmp_path).null()


def test_a_shard_cut_off_lost_or_exchanged(tmp_path: Path) -> None:
    packed(tmp_path, 4, 4)
    path = tmp_path / "latents-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"latents-00001.*damaged or was cut off.*causalreel prepare"):
        open_set(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard latents-00001.safetensors of its manifest is missing"):
        open_set(tmp_path)
    pack(path, [row(n) for n in range(5)])
    with pytest.raises(ValueError, match=r"latents-00001.*not the shard that the manifest names"):
        open_set(tmp_path)
    path.write_bytes(whole)
    source = ShardSource(open_set(tmp_path), length=8)
    path.write_bytes(whole[: read_shard(path).start + 10])
    with pytest.raises(ValueError, match=r"latents-00001.*it became shorter while it was read"):
        source.batch(torch.arange(8))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("text_rows"), r"'text_rows' nothing"),
        (lambda t: t.update(text_rows=t["text_rows"].int()), r"in I32, expected \(4,\) in I64"),
        (lambda t: t.update(text_rows=t["text_rows"][:3]), r"\(3,\) in I64"),
        (lambda t: t.update(text_rows=-t["text_rows"]), "does not add up"),
        (lambda t: t.update(text=t["text"][:, :, None]), "expected 2 dimensions"),
        (lambda t: t.update(captions=t["captions"].short()), "'captions'"),
        (lambda t: t.update(latents=t["latents"].double()), "in F64"),
    ],
)
def test_shards_that_do_not_fit_themselves(tmp_path: Path, change, said: str) -> None:
    packed(tmp_path, 4)
    path = tmp_path / "latents-00000.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ValueError, match=said) as error:
        ShardSource(open_set(tmp_path), length=8)
    assert path.name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"shards": 3},
        {"shards": [{"file": "../x", "clips": 1, "bytes": 1, "sha256": ""}]},
        {"shards": [{"file": "x", "clips": "1", "bytes": 1, "sha256": ""}]},
        {"shards": [{"file": "x", "clips": 0, "bytes": 1, "sha256": ""}]},
        {"shards": [{"file": "x", "clips": 1, "bytes": 1, "sha256": ""}] * 2},
        {"made": 3},
        {"null": 3},
    ],
)
def test_manifests_that_are_none(tmp_path: Path, change: dict) -> None:
    packed(tmp_path, 2)
    path = tmp_path / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=r"manifest\.json"):
        open_set(tmp_path)


def test_the_fingerprint_knows_every_row_and_their_order(tmp_path: Path) -> None:
    _, first = packed(tmp_path / "a", 3, 2)
    _, again = packed(tmp_path / "b", 3, 2)
    assert first.fingerprint == again.fingerprint and read_manifest(tmp_path / "a") == first
    turned = Manifest(first.shards[::-1], null=first.null)
    other = Manifest((first.shards[0], ShardEntry("latents-00001.safetensors", 2, 9, "0")), null=first.null)
    assert len({first.fingerprint, turned.fingerprint, other.fingerprint, Manifest(first.shards).fingerprint}) == 4


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (Row("b", "b", torch.zeros(3, 4, 2, 3, dtype=torch.float16), torch.zeros(8, 5)), "same frames"),
        (Row("b", "b", torch.zeros(2, 4, 2, 3), torch.zeros(8, 5)), "torch.float32"),
        (Row("b", "b", torch.zeros(2, 4, 2, 3, dtype=torch.float16), torch.zeros(8, 6)), "text"),
        (Row("b", "b", torch.zeros(2, 4, 2, 3, dtype=torch.float16)), "b has no text"),
        (Row("b", "b", None, torch.zeros(8, 5)), "b has no latents"),
        (Row("b", "b", torch.full((2, 4, 2, 3), torch.inf, dtype=torch.float16), torch.zeros(8, 5)), "not finite"),
    ],
)
def test_rows_that_do_not_fit_each_other_are_not_written(tmp_path: Path, second: Row, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        pack(tmp_path / "latents-0.safetensors", [row(0), second])
    assert not list(tmp_path.iterdir())


def test_zero_rows_are_left_out_at_the_end_only() -> None:
    text = torch.tensor([[1.0, 0], [0, 0], [0, 2], [0, 0], [0, 0]])
    assert torch.equal(without_zeros(text), text[:3]) and without_zeros(text[3:]).shape == (0, 2)
