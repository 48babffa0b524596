"""Our DiT against diffusers' WanTransformer3DModel with random weights, through the diffusers layout, both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.presets import ModelConfig
from causalreel.types import Conditioning
from causalreel.weights.build import load_denoiser, random_denoiser
from causalreel.weights.convert import convert
from causalreel.weights.files import read_tensors, write_tensors
from causalreel.weights.layouts import read_network

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install 'causalreel[dev]')")

SIZES = [
    ModelConfig(dim=48, ffn_dim=80, heads=2, layers=3, text_dim=20, text_length=7, freq_dim=32),
    ModelConfig(dim=64, ffn_dim=96, heads=4, layers=1, text_dim=16, text_length=12, freq_dim=256),
    ModelConfig(dim=24, ffn_dim=32, heads=1, layers=2, text_dim=8, text_length=3, freq_dim=16, channels=4),
]


def theirs(config: ModelConfig, seed: int = 0) -> Any:
    """A WanTransformer3DModel whose every parameter is random, norms and modulation too."""
    model = diffusers.WanTransformer3DModel(
        num_attention_heads=config.heads,
        attention_head_dim=config.dim // config.heads,
        in_channels=config.channels,
        out_channels=config.channels,
        text_dim=config.text_dim,
        freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        eps=config.eps,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + (parameter.ndim == 1))
    return model.eval()


@torch.no_grad()
def compare(ours: DiTDenoiser, model: Any, config: ModelConfig) -> float:
    """Largest difference of the velocities relative to their largest value, of two samples at two noise levels."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 3, config.channels, 6, 10, generator=generator)  # (B,F,C,H,W)
    text = torch.randn(2, config.text_length, config.text_dim, generator=generator)
    text[0, config.text_length // 2 :] = 0
    time = torch.tensor([733.0, 41.0])
    got = ours(x, (time.double() / 1000)[:, None].expand(2, 3), Conditioning(text))
    wanted: Tensor = model(x.transpose(1, 2), timestep=time, encoder_hidden_states=text, return_dict=False)[0]
    wanted = wanted.transpose(1, 2)
    assert wanted.std() > 0.1
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("config", SIZES, ids=lambda config: f"{config.dim}x{config.layers}")
def test_their_weights_in_our_network(config: ModelConfig, tmp_path: Path) -> None:
    model = theirs(config)
    model.save_pretrained(tmp_path / "theirs")
    network = read_network(tmp_path / "theirs")
    assert network.layout == "diffusers" and len(network.tensors) == len(model.state_dict())
    found = network.config()
    assert (found.dim, found.heads, found.layers, found.ffn_dim) == (
        config.dim,
        config.heads,
        config.layers,
        config.ffn_dim,
    )
    assert compare(load_denoiser(tmp_path / "theirs", config), model, config) < 2e-5


def test_their_shards_in_our_network(tmp_path: Path) -> None:
    model = theirs(SIZES[0])
    model.save_pretrained(tmp_path / "pipe" / "transformer", max_shard_size="100KB")
    assert len(list((tmp_path / "pipe" / "transformer").glob("*.safetensors"))) > 1
    assert compare(load_denoiser(tmp_path / "pipe", SIZES[0]), model, SIZES[0]) < 2e-5


@pytest.mark.parametrize("config", SIZES, ids=lambda config: f"{config.dim}x{config.layers}")
def test_our_weights_in_their_network(config: ModelConfig, tmp_path: Path) -> None:
    ours = random_denoiser(config)
    write_tensors(tmp_path / "ours.safetensors", ours.model.state_dict())
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs", "diffusers", heads=config.heads)
    folder = tmp_path / "theirs"
    model = diffusers.WanTransformer3DModel.from_config(diffusers.WanTransformer3DModel.load_config(folder))
    model.load_state_dict(read_tensors(folder / "diffusion_pytorch_model.safetensors"), strict=True)
    assert compare(ours, model.eval(), config) < 2e-5


def test_exchanged_weights_are_noticed(tmp_path: Path) -> None:
    """The comparison can fail: self-attention's and cross-attention's norms, exchanged, have the same shapes."""
    model = theirs(SIZES[0])
    model.save_pretrained(tmp_path / "theirs")
    ours = load_denoiser(tmp_path / "theirs", SIZES[0])
    block = ours.model.blocks[0]
    block.self_attn.norm_q, block.cross_attn.norm_q = block.cross_attn.norm_q, block.self_attn.norm_q
    assert compare(ours, model, SIZES[0]) > 1e-3


@pytest.mark.parametrize("layers", [("blocks.0.self_attn.q", "blocks.2.ffn.0"), ("time_projection.1", "head.head")])
def test_a_lora_is_the_same_in_diffusers(layers: tuple[str, ...], tmp_path: Path) -> None:
    """Written with its scales in the metadata, loaded by diffusers' own code, and saved by it and read here."""
    from causalreel.weights.lora import Lora, Pair, changed, read_lora
    from causalreel.weights.lora_layouts import write_lora

    config = SIZES[0]
    ours = random_denoiser(config)
    write_tensors(tmp_path / "ours.safetensors", ours.model.state_dict())
    convert(tmp_path / "ours.safetensors", tmp_path / "theirs", "diffusers", heads=config.heads)
    model = diffusers.WanTransformer3DModel.from_pretrained(tmp_path / "theirs").eval()
    generator, pairs = torch.Generator().manual_seed(1), {}
    for rank, layer in enumerate(layers, 2):
        out, into = ours.model.get_parameter(f"{layer}.weight").shape
        down, up = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
        pairs[layer] = Pair(0.2 * down, 0.2 * up, 1.5 / rank, layer)
    write_lora(Lora("drawn", "peft", pairs), tmp_path / "lora.safetensors", "diffusers")
    model.load_lora_adapter(str(tmp_path), weight_name="lora.safetensors", prefix="transformer", adapter_name="default")
    model.save_lora_adapter(str(tmp_path / "saved"))
    for place in (tmp_path / "lora.safetensors", tmp_path / "saved"):
        state = {name: value.clone() for name, value in ours.model.state_dict().items()}
        state |= dict(changed(state.__getitem__, [(read_lora(place), 1.0)]))
        merged = random_denoiser(config)
        merged.model.load_state_dict(state)
        assert compare(merged, model, config) < 2e-5, place
    assert compare(ours, model, config) > 1e-2
