"""`causalreel convert`: law 8 through files, and one line for what cannot be converted."""

from __future__ import annotations

import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from causalreel import cli
from causalreel.nn.dit import DiT
from causalreel.nn.presets import ModelConfig
from causalreel.weights import convert as conversion
from causalreel.weights.convert import convert, split, write_folder
from causalreel.weights.files import write_tensors
from causalreel.weights.layouts import read_network

CONFIG = ModelConfig(dim=16, ffn_dim=24, heads=2, layers=2, text_dim=8, text_length=4, freq_dim=16, channels=2)

NAMES = {"wan": "w.safetensors", "official": "o.pt", "diffusers": "d", "comfyui": "c.safetensors"}
"""A place for each layout; diffusers as a folder."""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def state() -> dict[str, Tensor]:
    """A small network's tensors, one of them in another type: files mix them."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = dict(DiT(CONFIG).state_dict())
        torch.nn.init.normal_(found["head.head.weight"])
    found["blocks.1.modulation"] = found["blocks.1.modulation"].double()
    return found


def same(state: dict[str, Tensor], path: str) -> bool:
    """Bit for bit, type for type."""
    found = read_network(path).tensors
    return set(found) == set(state) and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in state.items()
    )


@pytest.mark.parametrize(("there", "back"), list(itertools.product(NAMES, repeat=2)))
def test_there_and_back_is_the_identity(there: str, back: str, state: dict[str, Tensor]) -> None:
    write_tensors("source.safetensors", state)
    convert("source.safetensors", NAMES[there], there, heads=2)
    Path("back").mkdir()
    convert(NAMES[there], f"back/{NAMES[back]}", back, heads=None if there == "diffusers" else 2)
    assert read_network(NAMES[there]).layout == there and read_network(f"back/{NAMES[back]}").layout == back
    assert same(state, NAMES[there]) and same(state, f"back/{NAMES[back]}")


def test_names_are_those_of_the_layouts(state: dict[str, Tensor]) -> None:
    write_tensors("source.safetensors", state)
    convert("source.safetensors", "o.pt", "official")
    convert("source.safetensors", "c.safetensors", "comfyui")
    convert("source.safetensors", "d.safetensors", "diffusers")
    official = torch.load("o.pt", weights_only=True)
    assert list(official) == ["generator"] and set(official["generator"]) == {f"model.{name}" for name in state}
    from safetensors import safe_open

    with safe_open("c.safetensors", "pt") as file:
        assert set(file.keys()) == {f"model.diffusion_model.{name}" for name in state}
    with safe_open("d.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"blocks.0.norm2.weight", "scale_shift_table", "blocks.1.scale_shift_table", "proj_out.bias"} <= names
    assert not any("modulation" in name or "self_attn" in name or "head" in name for name in names)


def test_weights_inside_a_file_are_chosen_and_kept_by_name(state: dict[str, Tensor]) -> None:
    other = {f"model.{name}": value + 1 for name, value in state.items()}
    torch.save({"generator": {f"model.{n}": v for n, v in state.items()}, "generator_ema": other}, "both.pt")
    convert("both.pt", "raw.safetensors", "wan")
    convert("both.pt", "ema.pt", "official", which="generator_ema")
    assert same(state, "raw.safetensors")
    assert list(torch.load("ema.pt", weights_only=True)) == ["generator_ema"]
    assert same({name: value + 1 for name, value in state.items()}, "ema.pt")
    assert Path("ema.pt").stat().st_size < 0.7 * Path("both.pt").stat().st_size


def test_views_do_not_bring_their_storage_along(state: dict[str, Tensor]) -> None:
    """torch.save writes whole storages; tensors cut from a large one are written at their own size."""
    wide = {name: torch.stack([value] * 9)[4] for name, value in state.items()}
    torch.save({"generator": wide}, "wide.pt")
    convert("wide.pt", "narrow.pt", "official")
    assert same(state, "narrow.pt")
    assert Path("narrow.pt").stat().st_size < 0.4 * Path("wide.pt").stat().st_size


def test_types_change_only_on_request(state: dict[str, Tensor]) -> None:
    write_tensors("source.safetensors", state)
    convert("source.safetensors", "half.pt", "official", dtype="bfloat16")
    assert same({name: value.bfloat16() for name, value in state.items()}, "half.pt")
    convert("half.pt", "half", "wan", heads=2)
    assert same({name: value.bfloat16() for name, value in state.items()}, "half")
    convert("half.pt", "wide", "diffusers", dtype="float32", heads=2)
    assert same({name: value.bfloat16().float() for name, value in state.items()}, "wide")


def test_values_beyond_float16_are_named_and_nothing_is_written(state: dict[str, Tensor]) -> None:
    state["head.head.bias"][0] = 1e6
    write_tensors("large.safetensors", state)
    for target in ("x.safetensors", "x"):
        with pytest.raises(ValueError, match=r"head.head.bias has values beyond float16"):
            convert("large.safetensors", target, "wan", dtype="float16", heads=1)
        assert not Path(target).exists()
    convert("large.safetensors", "x.safetensors", "wan", dtype="bfloat16")


def test_folders_say_their_sizes_and_come_in_shards(state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "SHARD_BYTES", 12_000)
    write_tensors("source.safetensors", state)
    convert("source.safetensors", "d", "diffusers", heads=2)
    write_folder(Path("w"), read_network("d").tensors, CONFIG, "wan", shard_bytes=9_000)
    for folder, limit in (("d", 5 * 10**9), ("w", 9_000)):
        assert same(state, folder)
        assert all(file.stat().st_size < limit + 6_000 for file in Path(folder).glob("*.safetensors"))
    index = json.loads(Path("w/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(state)
    assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in state.values())
    wan, diffusers = (json.loads(Path(name, "config.json").read_text()) for name in ("w", "d"))
    assert (wan["num_heads"], wan["text_len"], wan["model_type"], wan["num_layers"]) == (2, 4, "t2v", 2)
    assert (diffusers["num_attention_heads"], diffusers["attention_head_dim"], diffusers["num_layers"]) == (2, 8, 2)


def test_shards_are_cut_between_tensors() -> None:
    tensors = {str(i): torch.zeros(n) for i, n in enumerate((2, 2, 9, 1, 1))}
    assert [list(part) for part in split(tensors, 16)] == [["0", "1"], ["2"], ["3", "4"]]
    assert [list(part) for part in split(tensors, 16, torch.float16)] == [["0", "1"], ["2"], ["3", "4"]]
    assert [list(part) for part in split(tensors, 30, torch.float16)] == [["0", "1", "2", "3", "4"]]
    assert split({}, 1) == [{}]


def test_heads_come_from_a_known_size() -> None:
    """No shape shows them: a preset does, another size needs them said."""
    from causalreel.nn.presets import PRESETS
    from causalreel.weights.build import random_denoiser

    known = random_denoiser(PRESETS["tiny-smoke"]).model.state_dict()
    write_tensors("known.safetensors", known)
    convert("known.safetensors", "known", "wan")
    assert json.loads(Path("known/config.json").read_text())["num_heads"] == PRESETS["tiny-smoke"].heads
    wide = ModelConfig(dim=128, ffn_dim=8, heads=2, layers=1, text_dim=8, text_length=4, freq_dim=16)
    write_tensors("wide.safetensors", random_denoiser(wide).model.state_dict())
    with pytest.raises(ValueError, match="attention heads"):
        convert("wide.safetensors", "wide", "wan")
    with pytest.raises(ValueError, match="heads=3"):
        convert("wide.safetensors", "wide", "wan", heads=3)


def run(*arguments: str) -> int:
    return cli.main(["convert", *arguments])


def test_the_command_converts(state: dict[str, Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"generator_ema": {f"model._fsdp_wrapped_module.{n}": v for n, v in state.items()}}, "ema.pt")
    assert run("ema.pt", "out", "--to", "diffusers", "--heads", "2", "--which", "generator_ema") == 0
    assert capsys.readouterr().out == "out\n"
    assert same(state, "out") and sorted(os.listdir()) == ["ema.pt", "out"]
    assert sorted(os.listdir("out")) == ["config.json", "diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["none.pt", "x.safetensors", "--to", "wan"], ["weights file not found: none.pt"]),
        (["good.pt", "x.pt", "--to", "wan"], ["target must be .safetensors or a folder", "x.pt"]),
        (["good.pt", "x.safetensors", "--to", "official"], ["target must be .pt or .pth"]),
        (["good.pt", "good.pt", "--to", "official"], ["good.pt is already there"]),
        (["good.pt", "full", "--to", "wan"], ["full is already there"]),
        (["good.pt", "no/such", "--to", "wan", "--heads", "2"], ["directory no does not exist"]),
        (["good.pt", "x", "--to", "wan"], ["attention heads", "--heads"]),
        (["good.pt", "x.safetensors", "--to", "wan", "--which", "generator_ema"], ["no weights called", "--which"]),
        (["bad.pt", "x.safetensors", "--to", "wan"], ["1 names missing (first: blocks.1.ffn.0.bias)"]),
        (["nan.pt", "x.safetensors", "--to", "wan"], ["not finite: head.head.bias"]),
        (["vae.safetensors", "x.safetensors", "--to", "wan"], ["no Wan network", "Wan VAE"]),
        (["cut.pt", "x.safetensors", "--to", "wan"], ["zip directory"]),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    arguments: list[str], parts: list[str], state: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"generator": state}, "good.pt")
    torch.save({"generator": {n: v for n, v in state.items() if n != "blocks.1.ffn.0.bias"}}, "bad.pt")
    torch.save({"generator": state | {"head.head.bias": state["head.head.bias"] * float("nan")}}, "nan.pt")
    Path("cut.pt").write_bytes(Path("good.pt").read_bytes()[:9000])
    write_tensors("vae.safetensors", {"decoder.upsamples.0.residual.0.gamma": torch.ones(2)})
    Path("full").mkdir()
    Path("full/file").write_text("")
    before = {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()}
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"causalreel: error: [^\n]+\n", captured.err) and captured.out == "", captured
    for part in parts:
        assert part in captured.err
    assert {path: path.read_bytes() for path in sorted(Path().rglob("*")) if path.is_file()} == before


@pytest.mark.parametrize(("target", "to"), [("x", "diffusers"), ("x.pt", "official"), ("x.safetensors", "comfyui")])
def test_a_full_disk_leaves_nothing(
    target: str, to: str, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*content_and_path: Any) -> None:
        next(one for one in content_and_path if isinstance(one, Path)).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    write_tensors("source.safetensors", state)
    monkeypatch.setattr("causalreel.hashed.write_tensors", full)
    monkeypatch.setattr("causalreel.weights.files.torch.save", full)
    with pytest.raises(OSError):
        convert("source.safetensors", target, to, heads=2)
    assert os.listdir() == ["source.safetensors"]
