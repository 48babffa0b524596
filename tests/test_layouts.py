"""Foreign layouts of weights: what is read, and in which words the rest is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalreel.nn.dit import DiT
from causalreel.nn.presets import PRESETS, ModelConfig
from causalreel.weights.files import read_tensors, write_tensors
from causalreel.weights.layouts import bare_names, guess_layout, load_file_into, load_strictly, select

CONFIG = ModelConfig(dim=16, ffn_dim=24, heads=2, layers=2, text_dim=8, text_length=4, freq_dim=16, channels=2)


def network(seed: int) -> DiT:
    torch.manual_seed(seed)
    return DiT(CONFIG)


def named(prefix: str, seed: int = 1) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in network(seed).state_dict().items()}


def same(net: DiT, seed: int = 1) -> bool:
    return all(torch.equal(value, net.state_dict()[name]) for name, value in network(seed).state_dict().items())


@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "net.", "model._fsdp_wrapped_module.", "module.model.", "_orig_mod.model._fsdp_wrapped_module."],
)
@pytest.mark.parametrize("top", [None, "generator", "generator_ema", "model"])
def test_released_layouts_load_strictly(prefix: str, top: str | None, tmp_path: Path) -> None:
    """Law 8: whatever wraps the names, the same tensors arrive."""
    path, net = tmp_path / "weights.pt", network(0)
    torch.save(named(prefix) if top is None else {top: named(prefix)}, path)
    load_file_into(net, str(path))
    assert same(net)


def test_wrappers_inside_names_are_removed(tmp_path: Path) -> None:
    path, net = tmp_path / "weights.pt", network(0)
    inside = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): t for name, t in named("model.").items()
    }
    torch.save({"generator": inside}, path)
    load_file_into(net, str(path))
    assert same(net)


def test_averaged_weights_are_preferred_and_raw_ones_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(
        {"generator": named("model.", 1), "generator_ema": named("model.", 2), "critic": named("model.", 3)}, path
    )
    for which, seed in ((None, 2), ("generator", 1), ("generator_ema", 2), ("critic", 3)):
        net = network(0)
        load_file_into(net, str(path), which=which)
        assert same(net, seed)
    with pytest.raises(ValueError, match="no weights called 'average'; it has generator, generator_ema, critic"):
        select(read_tensors(path), "average")


def test_there_and_back_is_the_identity(tmp_path: Path) -> None:
    path, net = tmp_path / "model.safetensors", network(0)
    write_tensors(path, network(1).state_dict())
    load_file_into(net, str(path))
    assert same(net)
    assert path.stat().st_mode & 0o044  # others can read what was installed


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    tensors = named("")
    value = tensors.pop("blocks.1.ffn.0.weight")
    with pytest.raises(
        ValueError, match=r"1 names missing \(first: blocks.1.ffn.0.weight\), 1 unexpected \(first: extra\)"
    ):
        load_strictly(network(0), tensors | {"extra": value}, source="weights.pt")
    tensors["blocks.1.ffn.0.weight"] = value[:-1]
    with pytest.raises(ValueError, match=r"another model size: blocks\.1\.ffn\.0\.weight"):
        load_strictly(network(0), tensors, source="weights.pt")


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("condition_embedder.time_proj.weight", "diffusers"),
        ("model.diffusion_model.blocks.0.modulation", "ComfyUI"),
        ("decoder.upsamples.0.residual.0.gamma", "Wan VAE"),
        ("blocks.0.attn.q.lora_A.weight", "LoRA"),
        ("blocks.0.modulation", "Wan2.1"),
    ],
)
def test_layouts_are_guessed(name: str, layout: str) -> None:
    assert layout in guess_layout({name: None})


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.pt", tmp_path / "cut.pt"
    torch.save({"generator": named("model.")}, whole)
    cut.write_bytes(whole.read_bytes()[:2000])
    evil = tmp_path / "evil.pt"
    torch.save({"generator": Path}, evil)
    for path in (cut, evil):
        with pytest.raises(ValueError, match="damaged, cut off, or holds more than tensors"):
            read_tensors(path)
    with pytest.raises(ValueError, match="not found"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"not '\.zip'"):
        (tmp_path / "weights.zip").write_bytes(b"")
        read_tensors(tmp_path / "weights.zip")
    with pytest.raises(ValueError, match="come to the same name"):
        bare_names({"a.weight": torch.ones(1), "module.a.weight": torch.ones(1)})


@pytest.mark.parametrize(
    ("name", "tensors", "numbers"), [("wan-1.3b", 825, 1_418_996_800), ("wan-14b", 1095, 14_288_491_584)]
)
def test_full_sizes_have_the_released_parameters(name: str, tensors: int, numbers: int) -> None:
    with torch.device("meta"):
        state = DiT(PRESETS[name]).state_dict()
    assert (len(state), sum(t.numel() for t in state.values())) == (tensors, numbers)
