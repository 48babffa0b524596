"""The Wan VAE against diffusers' AutoencoderKLWan with the same random weights, through the loaders of both layouts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalreel.codecs.wan_vae import WAN21_MEAN, WAN21_STD, CausalVAE, VAEConfig
from causalreel.families.wan21.codec_files import load_wan_vae, vae_from_diffusers, vae_to_diffusers
from causalreel.weights.files import write_tensors

SIZES = {
    "wan's build": VAEConfig(dim=6, res_blocks=2, z=16, latent_mean=WAN21_MEAN, latent_std=WAN21_STD),
    "another": VAEConfig(dim=4, multipliers=(1, 3, 2, 2), res_blocks=1, z=16, temporal_down=(True, False, True)),
}


def randomised(config: VAEConfig) -> CausalVAE:
    torch.manual_seed(7)
    codec = CausalVAE(config)
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn_like(parameter) * (fan**-0.5 if parameter.ndim > 1 else 0.2))
            if name.endswith("gamma"):
                parameter.add_(1.0 - parameter * 0.7)
    return codec.requires_grad_(False).eval()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=SIZES)
def pair(request: pytest.FixtureRequest) -> tuple[CausalVAE, torch.nn.Module]:
    """Our codec and the oracle, which loads our weights under its own names, strictly."""
    models = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    ours = randomised(SIZES[request.param])
    config = ours.config
    oracle = models.AutoencoderKLWan(
        base_dim=config.dim,
        z_dim=config.z,
        dim_mult=list(config.multipliers),
        num_res_blocks=config.res_blocks,
        temperal_downsample=list(config.temporal_down),
        latents_mean=[0.0] * config.z,
        latents_std=[1.0] * config.z,
    )
    oracle.load_state_dict(vae_to_diffusers(ours.state_dict()), strict=True)
    return ours, oracle.eval().requires_grad_(False)


@pytest.mark.parametrize("shape", [(1, 3, 16, 24), (5, 3, 24, 8), (9, 3, 40, 56)])
def test_encoding(pair: tuple[CausalVAE, torch.nn.Module], shape: tuple[int, ...]) -> None:
    ours, oracle = pair
    video = noise(2, *shape).clamp(-1, 1)
    wanted = oracle.encode(video.transpose(1, 2)).latent_dist
    mean, log_variance = ours.posterior(video)
    torch.testing.assert_close(mean.movedim(-1, 1), wanted.mean, atol=3e-5, rtol=0)
    torch.testing.assert_close(log_variance.movedim(-1, 1), wanted.parameters.chunk(2, 1)[1], atol=3e-5, rtol=0)
    scaled = (wanted.mean.transpose(1, 2) - ours.latent_mean.view(-1, 1, 1)) / ours.latent_std.view(-1, 1, 1)
    torch.testing.assert_close(ours.encode(video), scaled, atol=3e-5, rtol=0)


@pytest.mark.parametrize("split", [(1, 1, 1, 1), (3, 1), (4,), (1, 3)])
@pytest.mark.parametrize("size", [(2, 3), (3, 5)])
def test_decoding_whole_and_streamed(
    pair: tuple[CausalVAE, torch.nn.Module], split: tuple[int, ...], size: tuple[int, int]
) -> None:
    ours, oracle = pair
    latents = noise(1, 4, 16, *size)
    raw = latents * ours.latent_std.view(-1, 1, 1) + ours.latent_mean.view(-1, 1, 1)
    wanted = oracle.decode(raw.transpose(1, 2)).sample.transpose(1, 2)
    assert wanted.abs().max() == 1  # clamped
    torch.testing.assert_close(ours.decode(latents), wanted, atol=5e-5, rtol=0)
    stream = ours.stream()
    streamed = torch.cat([stream(piece) for piece in latents.split(split, 1)], 1)
    torch.testing.assert_close(streamed, wanted, atol=5e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_names_go_there_and_back(size: str) -> None:
    tensors = randomised(SIZES[size]).state_dict()
    theirs = vae_to_diffusers(tensors)
    assert len(theirs) == len(tensors) and not set(theirs) & {name for name in tensors if ".middle." in name}
    back = vae_from_diffusers(theirs)
    assert back.keys() == tensors.keys() and all(back[name] is tensors[name] for name in tensors)


@pytest.mark.parametrize("layout", ["Wan2.1_VAE.pth", "vae/diffusion_pytorch_model.safetensors"])
@pytest.mark.parametrize("size", SIZES)
def test_files_load_with_their_own_sizes(size: str, layout: str, tmp_path: Path) -> None:
    codec = randomised(SIZES[size])
    path = tmp_path / layout
    if layout.endswith(".pth"):
        torch.save(codec.state_dict(), path)
    else:
        write_tensors(path, vae_to_diffusers(codec.state_dict()))
    state = torch.random.get_rng_state()
    for place in (path, tmp_path):
        loaded = load_wan_vae(place)
        assert loaded.config == copy.copy(codec.config) or loaded.config.latent_mean == WAN21_MEAN
        assert (loaded.config.dim, loaded.config.multipliers) == (codec.config.dim, codec.config.multipliers)
        assert (loaded.config.res_blocks, loaded.config.temporal_down) == (
            codec.config.res_blocks,
            codec.config.temporal_down,
        )
        assert loaded.latent_std[2] == pytest.approx(2.3275) and not loaded.training
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), codec.parameters(), strict=True))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_wrong_files_say_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    cases = {
        "TAEHV": {"decoder.3.conv.0.weight": torch.ones(2), "decoder.1.weight": torch.ones(2)},
        "umT5 text encoder": {"token_embedding.weight": torch.ones(2)},
        "a diffusers VAE": {"post_quant_conv.weight": torch.ones(2)},
    }
    for looks, tensors in cases.items():
        write_tensors(path, tensors)
        with pytest.raises(ValueError, match=rf"looks like: {looks}\) is not a Wan VAE"):
            load_wan_vae(path)
    tensors = randomised(SIZES["wan's build"]).state_dict()
    write_tensors(path, {name: t for name, t in tensors.items() if name != "decoder.middle.1.proj.bias"})
    with pytest.raises(ValueError, match=r"1 names missing \(first: decoder.middle.1.proj.bias\).*Wan VAE"):
        load_wan_vae(path)
    write_tensors(path, {**tensors, "decoder.head.2.weight": torch.ones(4, 6, 3, 3, 3)})
    with pytest.raises(ValueError, match=r"another model size: decoder.head.2.weight"):
        load_wan_vae(path)
    with pytest.raises(ValueError, match=r"none of Wan2.1_VAE.pth"):
        load_wan_vae(tmp_path)
