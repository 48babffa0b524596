"""Prepared data read back: what shards made by hand may be like, and one line for each that training could not use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from causalreel.data.prepare import _write_latents
from causalreel.data.shards import caption_place, load_prepared

RED = "a large red circle moves right"


def shard(folder: Path, name: str, latents: torch.Tensor, captions: bytes | None = None) -> Path:
    path = folder / f"latents-{name}.safetensors"
    save_file({"latents": latents}, path)
    path.with_suffix(".txt").write_bytes((RED + "\n").encode() * len(latents) if captions is None else captions)
    return path


def clips(count: int = 2, *rest: int, kind: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.ones(count, *(rest or (3, 16, 8, 8)), dtype=kind)


@pytest.mark.parametrize(
    ("latents", "parts"),
    [
        (clips(2, 16, 8, 8), ["(2, 16, 8, 8) in F16", "(clips,frames,channels,height,width)"]),
        (clips(2, 3, 16, 8, 8, 1), ["(2, 3, 16, 8, 8, 1)", "expected 'latents'"]),
        (clips(0), ["(0, 3, 16, 8, 8)", "1 or more"]),
        (clips(2, 0, 16, 8, 8), ["(2, 0, 16, 8, 8)", "1 or more"]),
        (clips(kind=torch.int8), ["in I8", "float16, bfloat16 or float32"]),
        (clips(kind=torch.bool), ["in BOOL"]),
        (clips(kind=torch.float64), ["in F64"]),
        (clips(2, 4, 16, 8, 8), ["(4, 16, 8, 8) in float16", "latents-0.safetensors of (3, 16, 8, 8)", "the same"]),
        (clips(2, 3, 16, 8, 4), ["(3, 16, 8, 4)"]),
        (clips(kind=torch.float32), ["in float32", "in float16"]),
        (clips() * float("nan"), ["clip 0", "not finite"]),
        (torch.cat([clips(3000), clips(1) * float("inf"), clips(3)]), ["clip 3000", "not finite"]),
    ],
)
def test_latents_that_training_cannot_use(tmp_path: Path, latents: torch.Tensor, parts: list[str]) -> None:
    shard(tmp_path, "0", clips())
    path = shard(tmp_path, "1", latents)
    with pytest.raises(ValueError, match=path.name) as error:
        load_prepared(tmp_path)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (b"", ["2 latents but 0 captions"]),
        (b"a\n", ["2 latents but 1 captions"]),
        (b"a\n\n", ["line 2 is blank"]),
        (b"a\n \t\r\n", ["line 2 is blank"]),
        (b"\nb\n", ["line 1 is blank"]),
        (b"a\nb\n\n", ["2 latents but 3 captions", "line 3 is blank"]),
        (b"a\rb\r", ["2 latents but 1 captions"]),
        ("a\u2028b".encode(), ["2 latents but 1 captions"]),
        ("a\nb\n".encode("utf-16"), ["is not UTF-8 text"]),
        (b"a\nb\xff\n", ["is not UTF-8 text", "byte 3 is 0xff"]),
    ],
)
def test_captions_that_training_cannot_use(tmp_path: Path, text: bytes, parts: list[str]) -> None:
    shard(tmp_path, "0", clips(), text)
    with pytest.raises(ValueError, match=r"latents-0\.txt") as error:
        load_prepared(tmp_path)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"a\nb\n", ["a", "b"]),
        (b"a\nb", ["a", "b"]),
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"\xef\xbb\xbfa\nb\n", ["a", "b"]),
        ("a\u2028x\nb\x0b\x85\n".encode(), ["a\u2028x", "b\x0b\x85"]),
    ],
)
def test_captions_end_at_line_feeds_only(tmp_path: Path, text: bytes, told: list[str]) -> None:
    shard(tmp_path, "0", clips(), text)
    assert load_prepared(tmp_path).captions == told


def test_files_that_are_not_there_or_are_others(tmp_path: Path) -> None:
    path = shard(tmp_path, "0", clips())
    path.with_suffix(".txt").unlink()
    with pytest.raises(ValueError, match=r"latents-0.txt is missing: a caption a line for each of the 2 clips"):
        load_prepared(tmp_path)
    save_file({"video": clips()}, path)
    with pytest.raises(ValueError, match=r"latents-0.safetensors holds video, expected 'latents'"):
        load_prepared(tmp_path)
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(ValueError, match=r"latents-0.safetensors is damaged"):
        load_prepared(tmp_path)


def test_rows_and_where_their_captions_are(tmp_path: Path) -> None:
    for name, count in (("0", 2), ("1", 3)):
        shard(tmp_path, name, clips(count), b"".join(b"%d\n" % n for n in range(count)))
    assert load_prepared(tmp_path, rows=3).captions == ["0", "1", "0"]
    assert caption_place(tmp_path, 3).endswith("latents-1.txt, line 2")
    with pytest.raises(ValueError, match="has 5 clips, 6 were asked for"):
        load_prepared(tmp_path, rows=6)


def test_a_flipped_bit_in_a_prepared_shard(tmp_path: Path) -> None:
    path = shard(tmp_path, "0", clips())
    _write_latents(path, {"latents": clips()})
    contents = bytearray(path.read_bytes())
    load_prepared(tmp_path)
    contents[-7] ^= 1
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"damaged \(its latents are not those that were written\)"):
        load_prepared(tmp_path)
