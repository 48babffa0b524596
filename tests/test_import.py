"""Sets of other projects: what their own libraries write is read exactly, what is damaged is refused in a line."""

from __future__ import annotations

import io
import random
import re
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from causalreel.cli import main
from causalreel.data.manifest import read_manifest
from causalreel.data.streaming import ShardSource, open_set
from causalreel.types import Batch
from causalreel.weights.sets import Wanted, find_rows
from causalreel.weights.sets.importing import import_set
from causalreel.weights.sets.pages import Pages
from ceilings import examples, work_within

TOLD = ["A cat walks.", "Caf\u00e9  \u201cna\u00efve\u201d \U0001f409\nsecond line, trailing space ", "\u957f" * 3000]


def noise(number: int, *shape: int, kind: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(kind)


def refusal(path: Path, wanted: Wanted = Wanted()) -> str:
    with pytest.raises(ValueError) as error:
        for each in find_rows(path, wanted):
            each.read()
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- LMDBs


def lmdb_of(folder: Path, rows: dict[str, torch.Tensor], **entries: bytes) -> Path:
    """As the scripts of Causal Forcing write it: in several transactions, with values replaced on the way."""
    lmdb = pytest.importorskip("lmdb")
    folder.mkdir(parents=True)
    first = next(iter(rows.values()))
    shape = " ".join(map(str, (len(rows), *first.shape)))
    told = {"latents_shape": shape.encode(), "prompts_shape": str(len(rows)).encode()} | entries
    with lmdb.open(str(folder), map_size=1 << 26) as env:
        for number, (prompt, latents) in enumerate(rows.items()):
            with env.begin(write=True) as change:
                change.put(f"latents_{number}_data".encode(), b"first this " * number)
                change.put(f"prompts_{number}_data".encode(), prompt.encode())
            with env.begin(write=True) as change:
                change.put(f"latents_{number}_data".encode(), latents.numpy().tobytes())
        with env.begin(write=True) as change:
            for name, value in told.items():
                change.put(name.encode(), value)
    return folder


def test_an_lmdb_as_clips_and_as_trajectories(tmp_path: Path) -> None:
    rows = {text: noise(n, 4, 3, 16, 4, 6) for n, text in enumerate(TOLD)}
    path = lmdb_of(tmp_path / "set", rows)
    for wanted, last in ((Wanted(trajectories=True), slice(None)), (Wanted(), -1)):
        found = [each.read() for each in find_rows(path, wanted)]
        assert [each.caption for each in found] == TOLD
        assert all(torch.equal(row.clip, clip[last]) for row, clip in zip(found, rows.values(), strict=True))
    cut = [each.read() for each in find_rows(path, Wanted(frames=2))]
    assert torch.equal(cut[0].clip, rows[TOLD[0]][-1, :2])
    assert "at least 4 are wanted" in refusal(path, Wanted(frames=4))


def test_a_tree_of_many_pages_and_folders_of_lmdbs(tmp_path: Path) -> None:
    for shard in range(2):
        rows = {f"{shard} {n} {'x' * (n % 700)}": noise(n, 1, 16, 1, 2 + 200 * shard) for n in range(400)}
        lmdb_of(tmp_path / f"shard_{shard}", rows)
    with Pages(tmp_path / "shard_0" / "data.mdb") as pages:
        assert pages.entries == 802 and pages.get(b"latents", most=9) is None and pages.get(b"\xff", most=9) is None
        with pytest.raises(ValueError, match="at most 5 are expected"):
            pages.get(b"latents_7_data", most=5)
    found = [each.read() for each in find_rows(tmp_path)]
    assert len(found) == 800 and found[411].caption.startswith("1 11 x") and found[399].caption.startswith("0 399")
    assert torch.equal(found[411].clip, noise(11, 1, 16, 1, 202))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"latents_shape": b"2"}, "row shape is not recorded"),
        ({"latents_shape": b"2 3 48 2 2"}, "48 channels: those of the Wan 2.2 5B VAE"),
        ({"latents_shape": b"2 3 16 2 4"}, "384 bytes of latents"),
        ({"latents_shape": b"1 3 16 2 2"}, "2 prompts"),
        ({"latents_shape": b"3 3 16 2 2", "prompts_shape": b"3"}, "row 2 has no latents"),
        ({"latents_shape": b"1 3 16 2 2", "prompts_shape": b"1"}, "there is a row 1"),
        ({"latents_shape": b"2 16 2 2"}, "channels"),
        ({"latents_shape": b"99999999999 3 16 2 2"}, "99,999,999,999 rows"),
        ({"latents_shape": b"2 999999 999999 16 999999 2"}, "is expected"),
        ({"latents_shape": b"-2 3 16 2 2"}, "numbers are expected"),
        ({"prompts_0_data": b"\xff\xfe"}, "not UTF-8"),
        ({"latents_0_data": b"\0\x7e" * 192}, "not finite"),
    ],
)
def test_lmdbs_that_say_something_else(tmp_path: Path, entries: dict[str, bytes], said: str) -> None:
    path = lmdb_of(tmp_path / "set", {"a": noise(0, 3, 16, 2, 2), "b": noise(1, 3, 16, 2, 2)}, **entries)
    assert said in refusal(path)


def test_lmdbs_that_are_files_of_any_name(tmp_path: Path) -> None:
    """As `lmdb.open(name, subdir=False)` makes them, alone or beside each other with their locks."""
    rows = {text: noise(n, 3, 16, 4, 6) for n, text in enumerate(TOLD)}
    made = lmdb_of(tmp_path / "set", rows) / "data.mdb"
    (tmp_path / "many").mkdir()
    for name in ("one.lmdb", "two.mdb", "bare"):
        shutil.copy(made, tmp_path / "many" / name)
        (tmp_path / "many" / f"{name}-lock").write_bytes(b"x" * 8192)
        found = [(each.source, each.read().caption) for each in find_rows(tmp_path / "many" / name)]
        assert [told for _, told in found] == TOLD and found[0][0] == f"{name}, row 0"
    assert [each.source.split(",")[0] for each in find_rows(tmp_path / "many")][:: len(TOLD)] == ["one.lmdb", "two.mdb"]


def test_a_shape_from_outside(tmp_path: Path) -> None:
    path = lmdb_of(tmp_path / "set", {"a": noise(0, 3, 16, 2, 2)}, latents_shape=b"1")
    assert torch.equal(next(find_rows(path, Wanted(shape=(3, 16, 2, 2)))).read().clip, noise(0, 3, 16, 2, 2))
    whole = lmdb_of(tmp_path / "whole", {"a": noise(0, 3, 16, 2, 2)})
    assert "the shape that was given" in refusal(whole, Wanted(shape=(2, 16, 2, 2)))


def test_damaged_lmdbs_are_refused_and_end_nothing(tmp_path: Path) -> None:
    rows = {f"prompt {n}": noise(n, 2, 16, 2, 2) for n in range(60)}
    path = lmdb_of(tmp_path / "set", rows) / "data.mdb"
    whole, draw = path.read_bytes(), random.Random(0)
    for size in (0, 1, 100, 4096, 8192, len(whole) - 4096):
        path.write_bytes(whole[:size])
        assert "data.mdb" in refusal(path)
    read = 0
    for _ in range(examples(150)):
        changed = bytearray(whole)
        for _ in range(draw.choice((1, 3, 40))):
            changed[draw.randrange(len(whole))] = draw.choice((0, 1, 255, draw.randrange(256)))
        path.write_bytes(changed)
        try:
            read += sum(each.read().clip is not None for each in find_rows(path))
        except ValueError as error:
            assert "\n" not in str(error)
    assert read


def test_an_lmdb_that_claims_much_costs_little(tmp_path: Path) -> None:
    path = lmdb_of(tmp_path / "set", {"a": noise(0, 3, 16, 2, 2)}) / "data.mdb"
    data = bytearray(path.read_bytes())
    for found in re.finditer(rb"latents_0_data", bytes(data)):  # in pages of before too
        data[found.start() - 8 : found.start() - 4] = b"\xff\xff\xff\x7f"  # a value of 2 GiB
    path.write_bytes(data)
    work = """
try:
    [each.read() for each in find_rows(Path(arguments[0]))]
except ValueError as error:
    print(error)
"""
    setup = "from pathlib import Path\nfrom causalreel.weights.sets import find_rows, lmdb"
    assert "data.mdb is damaged" in work_within(64, work, str(path), setup=setup).output


# ---- tars


def tar_of(path: Path, members: list[tuple[str, bytes]], kind: str = "w") -> Path:
    with tarfile.open(path, kind) as archive:  # type: ignore[call-overload]
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def saved(value: object) -> bytes:
    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def sample(key: str, number: int = 0, *, latents: object = None, **parts: bytes) -> list[tuple[str, bytes]]:
    text = torch.zeros(9, 8, dtype=torch.bfloat16)
    text[: 2 + number] = noise(number, 2 + number, 8, kind=torch.bfloat16)
    clip = noise(number, 16, 3, 4, 6, kind=torch.bfloat16) if latents is None else latents
    found = {"latent.pt": saved(clip), "embed.pt": saved(text), "prompt.txt": f"prompt {number}\n".encode()}
    found |= {name.replace("_", "."): value for name, value in parts.items()}
    return [(f"{key}.{name}", value) for name, value in found.items() if value]


def test_tars_are_read_as_they_were_written(tmp_path: Path) -> None:
    members = [*sample("000000000", 0), ("000000000.json", b"{}"), *sample("sub/000000001", 1)[::-1]]
    tar_of(tmp_path / "a.tar", members)
    tar_of(tmp_path / "b.tar", sample("x" * 300, 2, latents=noise(7, 4, 16, 3, 4, 6)))
    manifest = import_set(tmp_path, tmp_path / "out", wanted=Wanted(dtype=torch.float32), shard=2)
    batch = ShardSource(open_set(tmp_path / "out"), length=9).batch(torch.arange(3))
    assert manifest.clips == 3 and open_set(tmp_path / "out").captions() == [f"prompt {n}\n" for n in range(3)]
    for number in range(2):
        assert torch.equal(
            batch.latents[number], noise(number, 16, 3, 4, 6, kind=torch.bfloat16).float().transpose(0, 1)
        )  # type: ignore[attr-defined]
        text = batch.conditioning.text[number]
        assert torch.equal(text[: 2 + number], noise(number, 2 + number, 8, kind=torch.bfloat16).float())
        assert not text[2 + number :].any()
    assert torch.equal(batch.latents[2], noise(7, 4, 16, 3, 4, 6).float()[0].transpose(0, 1))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("members", "said"),
    [
        (sample("a", embed_pt=b""), "without embeddings"),
        (sample("a", prompt_txt=b""), "without a prompt"),
        (sample("a", latents=noise(0, 3, 4, 6)), "rank 3"),
        (sample("a", latents=noise(0, 48, 3, 4, 6)), "48 channels"),
        (sample("a", latents=noise(0, 16, 3, 4, 6) * torch.nan), "not finite"),
        (sample("a", latents={"x": noise(0, 16, 3, 4, 6)}), "a tensor is expected"),
        (sample("a", latents=io.BytesIO), "code or objects"),
        (sample("a", latents=torch.ones(16, 3, 4, 6, dtype=torch.int32)), "torch.int32"),
        (sample("a", latents=torch.ones(16, 3, 4, 6).to(torch.float8_e4m3fn)), "torch.float8_e4m3fn"),
        (sample("a", latents=torch.ones(0, 16, 3, 4, 6)), "(0, 16, 3, 4, 6)"),
        (sample("a", embed_pt=saved(torch.ones(2, 3).to(torch.float8_e4m3fn))), "torch.float8_e4m3fn"),
        (sample("a", prompt_txt=b"x" * (1 << 20 | 1)), "at most 1,048,576 are read"),
        (sample("a", prompt_txt=b"\xff\xfe"), "not UTF-8"),
        (sample("a", embed_pt=saved(noise(0, 2, 3, 4))), "(tokens,width) is expected"),
        (sample("a", embed_pt=saved(noise(0, 2, 3) * torch.inf)), "not finite"),
        (sample("a", latent_pt=b"PK\x03\x04 and more"), "damaged"),
        ([*sample("a"), *sample("a")], "is in it twice"),
        ([("readme.md", b"x")], "holds no samples"),
        ([], "holds no samples"),
    ],
)
def test_tars_that_are_refused(tmp_path: Path, members: list[tuple[str, bytes]], said: str) -> None:
    assert said in refusal(tar_of(tmp_path / "a.tar", members))


def test_embeddings_of_a_batch_of_one(tmp_path: Path) -> None:
    told = noise(0, 2, 3)
    tar_of(tmp_path / "a.tar", sample("a", embed_pt=saved(told[None])))
    (text,) = [each.read().text for each in find_rows(tmp_path / "a.tar")]
    assert text is not None and torch.equal(text, told)


@pytest.mark.parametrize(("kind", "ending"), [("gz", "tar"), ("gz", "tgz"), ("bz2", "tar.bz2"), ("xz", "tar.xz")])
def test_compressed_tars_are_named(tmp_path: Path, kind: str, ending: str) -> None:
    said = refusal(tar_of(tmp_path / f"a.{ending}", sample("a"), f"w:{kind}"))
    assert "no tar but compressed with" in said and "unpack it to a .tar" in said


def test_float64_becomes_float32_where_no_value_changes(tmp_path: Path) -> None:
    exact = torch.nn.Parameter(noise(0, 16, 3, 4, 6).double())
    tar_of(tmp_path / "a.tar", sample("a", latents=exact, embed_pt=saved(torch.ones(2, 3).double())))
    import_set(tmp_path / "a.tar", tmp_path / "out")
    shard = open_set(tmp_path / "out").shards[0]
    assert shard.dtype == torch.float32 and torch.equal(shard.clip(0), exact.detach().float().transpose(0, 1))
    tar_of(tmp_path / "b.tar", sample("b", latents=exact.detach() + 1e-12))
    with pytest.raises(ValueError, match=r"b.tar, b: latents in float64, the set's are in float32"):
        import_set(tmp_path / "b.tar", tmp_path / "none")
    import_set(tmp_path / "b.tar", tmp_path / "asked", wanted=Wanted(dtype=torch.float32))


def test_a_tar_cut_off_anywhere(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "a.tar", [*sample("a", 0), *sample("b", 1)])
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        ends = [member.offset for member in archive.getmembers()]
        last = archive.getmembers()[-1]
    for size in (*ends[1:], ends[3] + 512, last.offset_data + 512, last.offset_data + 1024, 100, 700, ends[4] + 20):
        path.write_bytes(whole[:size])
        said = refusal(path)
        assert "a.tar" in said and ("cut off" in said or "no tar" in said), said
    path.write_bytes(whole + whole)
    assert "behind its end mark" in refusal(path)
    for start, said in (
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
        (b"x" * 2000, "no tar"),
    ):
        path.write_bytes(start)
        assert said in refusal(path)
    assert "no tar" in refusal(tar_of(path, sample("a"), "w:gz"))


def test_a_header_that_claims_much_costs_little(tmp_path: Path) -> None:
    member = tarfile.TarInfo("big")
    member.size, member.type = 1 << 33, tarfile.XHDTYPE
    path = tmp_path / "a.tar"
    path.write_bytes(member.tobuf())
    with path.open("r+b") as file:
        file.truncate(1 << 34)
    assert "header" in refusal(path)


# ---- parquet


def parquet_of(path: Path, *, rows: int = 2, **columns: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = {"id": "v", "caption": "a prompt", "num_frames": 3}
    for name, value in (("vae_latent", noise(0, 16, 3, 4, 6).float()), ("text_embedding", noise(1, 4, 8).float())):
        row |= {
            f"{name}_bytes": value.numpy().tobytes(),
            f"{name}_shape": list(value.shape),
            f"{name}_dtype": "float32",
        }
    row = {name: value for name, value in (row | columns).items() if value is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist([row] * rows), path)
    return path


def test_parquet_is_normalised(tmp_path: Path) -> None:
    from causalreel.codecs.wan_vae import WAN21_MEAN, WAN21_STD

    parquet_of(tmp_path / "a" / "0.parquet")
    rows = [each.read() for each in find_rows(tmp_path)]
    mean, std = (torch.tensor(values)[:, None, None] for values in (WAN21_MEAN, WAN21_STD))
    wanted = (noise(0, 16, 3, 4, 6).float().transpose(0, 1) - mean) / std
    assert len(rows) == 2 and torch.equal(rows[1].clip, wanted) and rows[0].caption == "a prompt"
    assert torch.equal(rows[0].text, noise(1, 4, 8).float())
    parquet_of(tmp_path / "b" / "0.parquet", rows=1)  # FastVideo calls files the same in every worker's folder
    assert [Path(found.source) for found in find_rows(tmp_path)][1:] == [
        Path("a/0.parquet, row 1"),
        Path("b/0.parquet, row 0"),
    ]


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"vae_latent_dtype": "float16"}, "says float16"),
        ({"text_embedding_dtype": "bfloat16"}, "says bfloat16"),
        ({"vae_latent_bytes": b"1234"}, "4 bytes, fewer or more"),
        ({"vae_latent_shape": [48, 1, 4, 6]}, "48 channels"),
        ({"vae_latent_shape": [3, 16, 4, 6]}, "3 channels"),
        ({"vae_latent_shape": [-16, -3, 4, 6]}, "no shape"),
        ({"vae_latent_bytes": None}, "no column vae_latent_bytes"),
        ({"caption": None}, "no column caption"),
    ],
)
def test_parquet_that_is_refused(tmp_path: Path, columns: dict[str, object], said: str) -> None:
    assert said in refusal(parquet_of(tmp_path / "a.parquet", **columns))


def test_parquet_without_rows_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.parquet has no rows"):
        import_set(_without_rows(parquet_of(tmp_path / "a.parquet")), tmp_path / "out")


def _without_rows(path: Path) -> Path:
    from pyarrow import parquet

    parquet.write_table(parquet.read_table(path).slice(0, 0), path)
    return path


def test_parquet_cut_off(tmp_path: Path) -> None:
    path = parquet_of(tmp_path / "a.parquet")
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "a.parquet" in refusal(path)


# ---- musubi


def cached(
    folder: Path, stem: str = "clip_a.v2", *, key: str | None = None, kind: str = "wan", **metadata: str
) -> Path:
    latents = noise(0, 16, 3, 4, 6, kind=torch.bfloat16)
    told = {"architecture": "wan", "frame_count": "9"} | metadata
    path = folder / f"{stem}_00004-009_0048x0032_{kind}.safetensors"
    save_file({key or "latents_3x4x6_bfloat16": latents}, path, told)
    text = {"architecture": "wan", "caption1": "caf\u00e9"}
    save_file({"varlen_t5_bfloat16": noise(1, 5, 8, kind=torch.bfloat16)}, folder / f"{stem}_wan_te.safetensors", text)
    return path


def test_a_cache_of_musubi(tmp_path: Path) -> None:
    cached(tmp_path)
    save_file(
        {"latents_1x4x6_float32": noise(2, 16, 1, 4, 6).float()},
        tmp_path / "clip_a.v2_0048x0032_wan.safetensors",
        {"architecture": "wan"},
    )
    rows = {each.source: each.read() for each in find_rows(tmp_path)}
    row = rows["clip_a.v2_00004-009_0048x0032_wan.safetensors"]
    assert len(rows) == 2 and row.caption == "caf\u00e9"
    assert torch.equal(row.clip, noise(0, 16, 3, 4, 6, kind=torch.bfloat16).transpose(0, 1))
    assert torch.equal(row.text, noise(1, 5, 8, kind=torch.bfloat16))
    with pytest.raises(ValueError, match="same frames"):
        import_set(tmp_path, tmp_path / "out", wanted=Wanted(dtype=torch.float32))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"kind": "hv"}, "another architecture"),
        ({"architecture": "hunyuan_video"}, "another architecture"),
        ({"frame_count": "13"}, "frame_count is 13"),
        ({"key": "latents_4x4x6_bfloat16"}, "has the shape"),
        ({"key": "other"}, "0 tensors named latents_"),
    ],
)
def test_caches_that_are_refused(tmp_path: Path, how: dict[str, str], said: str) -> None:
    assert said in refusal(cached(tmp_path, **how))  # type: ignore[arg-type]


def test_a_window_without_text(tmp_path: Path) -> None:
    path = cached(tmp_path)
    (tmp_path / "clip_a.v2_wan_te.safetensors").unlink()
    assert "no text embeddings" in refusal(path)


# ---- the whole


def test_prompts_become_rows_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "a large red circle moves right\n\na small blue square moves left \na large red circle moves right\n"
    (tmp_path / "p.txt").write_text(told)
    out = tmp_path / "out"
    assert main(["import", str(tmp_path / "p.txt"), "--out", str(out), "--model", "tiny"]) == 0
    assert "1 of 3 prompts are repeated" in capsys.readouterr().err
    source = ShardSource(open_set(out), length=16)
    batch = source.batch(torch.tensor([1]))
    from causalreel.text.tiny import TinyTextEncoder

    wanted = TinyTextEncoder().encode(["a small blue square moves left"])
    assert type(batch) is Batch and torch.equal(batch.conditioning.text, wanted)
    assert main(["import", str(tmp_path / "p.txt"), "--out", str(tmp_path / "b")]) == 2
    assert "need a model whose text encoder" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("a large red dog\n")
    assert main(["import", str(tmp_path / "p.txt"), "--out", str(tmp_path / "b"), "--model", "tiny"]) == 2
    assert "p.txt, prompt 0: " in capsys.readouterr().err and not (tmp_path / "b").exists()


def test_an_import_goes_on_where_it_stopped(tmp_path: Path) -> None:
    source = tar_of(tmp_path / "a.tar", [part for n in range(7) for part in sample(f"{n:09d}", n)])
    whole = import_set(source, tmp_path / "whole", shard=3)
    import_set(source, tmp_path / "again", shard=3)
    (tmp_path / "again" / "manifest.json").unlink()
    (tmp_path / "again" / "latents-00002.safetensors").unlink()
    kept = (tmp_path / "again" / "latents-00001.safetensors").stat().st_mtime_ns
    again = import_set(source, tmp_path / "again", shard=3)
    assert again == whole == read_manifest(tmp_path / "again")
    assert (tmp_path / "again" / "latents-00001.safetensors").stat().st_mtime_ns == kept
    with pytest.raises(ValueError, match="use another folder"):
        import_set(source, tmp_path / "again", shard=4)
    (tmp_path / "again" / "manifest.json").unlink()
    shutil.copy(tar_of(tmp_path / "b.tar", sample("x")), source)
    with pytest.raises(ValueError, match="use another folder"):
        import_set(source, tmp_path / "again", shard=3)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no data at nowhere"),
        (["."], "no data of a known format"),
        (["a.tar", "--trajectories"], "from LMDBs only"),
        (["a.tar", "--shape", "1,16,2,2"], "for LMDBs only"),
        (["a.tar", "--shape", "1,x"], "--shape must be"),
        (["a.tar", "--random-weights"], "need --model"),
        (["a.tar", "--model", "tinny"], "did you mean"),
        (["a.tar", "--shard", "0"], "--shard must be at least 1"),
    ],
)
def test_what_cannot_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if words[0] != ".":
        tar_of(tmp_path / "a.tar", sample("a"))
    assert main(["import", *words, "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
