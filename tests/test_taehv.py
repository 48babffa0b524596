"""TAEHV: streams equal the whole decode, frames dropped once, memory, files and their growth, refusals."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalreel.codecs.taehv import TAEHV, TAEHVConfig
from causalreel.families.wan21.codec_files import load_taehv
from causalreel.types import Geometry, VideoCodec
from causalreel.verify import run
from causalreel.weights.files import read_tensors, write_tensors

GOLDEN = Path(os.environ.get("CAUSALREEL_GOLDEN", Path(__file__).parents[1] / "../shared/golden")).resolve()

SMALL = TAEHVConfig(channels=5, encoder_width=6, decoder_widths=(12, 10, 8, 6))


def randomised(config: TAEHVConfig = SMALL) -> TAEHV:
    torch.manual_seed(3)
    codec = TAEHV(config)
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 else 1
            gain = 0.5 if name.endswith("conv.4.weight") else 1.3
            parameter.copy_(torch.randn_like(parameter) * (gain * fan**-0.5 if parameter.ndim > 1 else 0.1))
    return codec.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def codec() -> TAEHV:
    return randomised()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("split", [(1,) * 9, (3, 3, 3), (2, 1, 5, 1), (9,), (1, 8)])
def test_every_split_equals_the_whole_decode(codec: TAEHV, split: tuple[int, ...]) -> None:
    latents = noise(2, 9, 5, 2, 3)
    stream = codec.stream()
    pieces = [stream(piece) for piece in latents.split(split, 1)]
    assert [piece.shape[1] for piece in pieces] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
    torch.testing.assert_close(torch.cat(pieces, 1), codec.decode(latents), atol=1e-5, rtol=0)


def test_streams_keep_their_own_memory(codec: TAEHV) -> None:
    a, b = noise(1, 3, 5, 2, 2, seed=1), noise(1, 3, 5, 2, 2, seed=2)
    first, second, out = codec.stream(), codec.stream(), []
    for i in range(3):
        out.append(first(a[:, i : i + 1]))
        second(b[:, i : i + 1])
    torch.testing.assert_close(torch.cat(out, 1), codec.decode(a), atol=1e-5, rtol=0)


def test_memory_reaches_back_and_never_forward(codec: TAEHV) -> None:
    latents = noise(1, 5, 5, 2, 2)
    whole = codec.decode(latents)
    for changed in range(5):
        other = latents.clone()
        other[:, changed] += 1
        moved = (codec.decode(other) - whole).abs().amax((0, 2, 3, 4))
        first = max(0, 4 * changed - 3)  # the frames of latent n are 4n-3 .. 4n
        assert not moved[:first].any() and moved[first:].any()
    assert moved[13:].min() > 0


def test_range_shapes_and_protocol(codec: TAEHV) -> None:
    assert isinstance(codec, VideoCodec)
    assert codec.geometry == Geometry(5, 8, 4)
    video = codec.decode(noise(1, 3, 5, 2, 3) * 9)
    assert video.shape == (1, 9, 3, 16, 24) and video.dtype == torch.float32 and video.abs().max() <= 1
    loud = randomised()
    loud.decoder[-1].weight.mul_(30)
    assert loud.decode(noise(1, 2, 5, 2, 3)).abs().max() == 1
    torch.testing.assert_close(codec.decode(noise(1, 1, 5, 2, 2) * 1e4), codec.decode(noise(1, 1, 5, 2, 2) * 1e5))


@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encoding_repeats_the_first_frame(codec: TAEHV, frames: int) -> None:
    video = noise(2, frames, 3, 16, 24).clamp(-1, 1)
    latents = codec.encode(video)
    assert latents.shape == (2, (frames - 1) // 4 + 1, 5, 2, 3)
    padded = torch.cat([video[:, :1]] * 3 + [video], 1)
    torch.testing.assert_close(latents, codec.all_latents(padded / 2 + 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_near(dtype: torch.dtype) -> None:
    latents = noise(1, 3, 5, 2, 3)
    exact, near = randomised().decode(latents), randomised().to(dtype).decode(latents)
    assert near.dtype == torch.float32
    assert 0 < (near - exact).norm() / exact.norm() < (0.01 if dtype == torch.float16 else 0.06)


def test_bad_input_is_refused(codec: TAEHV) -> None:
    for shape in [(1, 0, 5, 2, 2), (1, 2, 4, 2, 2), (2, 5, 2, 2)]:
        for decode in (codec.decode, codec.stream()):
            with pytest.raises(ValueError, match="latents have shape"):
                decode(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"1 \+ 4 n frames, got 4"):
        codec.encode(torch.zeros(1, 4, 3, 8, 8))
    with pytest.raises(ValueError, match="multiples of 8, got height 12"):
        codec.encode(torch.zeros(1, 1, 3, 12, 8))
    with pytest.raises(ValueError, match="growth and upsample need 3 entries"):
        TAEHVConfig(growth=(1, 2))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_sizes_come_from_the_file(codec: TAEHV, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"taew2_1{suffix}"
    write_tensors(path, codec.state_dict()) if suffix == ".safetensors" else torch.save(codec.state_dict(), path)
    for place in (path, tmp_path):
        loaded = load_taehv(place)
        assert loaded.config == SMALL and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(loaded.decode(noise(1, 2, 5, 2, 2)), codec.decode(noise(1, 2, 5, 2, 2)))


def test_more_growth_in_a_file_is_cut_to_the_last_channels(tmp_path: Path) -> None:
    large = randomised(dataclasses.replace(SMALL, growth=(2, 2, 2)))
    write_tensors(tmp_path / "large.safetensors", large.state_dict())
    cut = load_taehv(tmp_path / "large.safetensors")
    assert cut.config.growth == (1, 2, 2)
    assert torch.equal(cut.decoder[7].conv.weight, large.decoder[7].conv.weight[-12:])
    preview = load_taehv(tmp_path / "large.safetensors", growth=(1, 1, 2), upsample=(True, False, True))
    assert torch.equal(preview.decoder[13].conv.weight, large.decoder[13].conv.weight[-10:])
    assert (preview.geometry.temporal, preview.geometry.spatial, preview.dropped) == (2, 4, 1)
    assert preview.decode(noise(1, 3, 5, 2, 2)).shape == (1, 5, 3, 8, 8)


def test_wrong_files_say_what_they_look_like(codec: TAEHV, tmp_path: Path) -> None:
    cases = {
        "Wan VAE": {"encoder.downsamples.0.residual.0.gamma": torch.ones(2)},
        "Wan2.1 / Causal Forcing": {"blocks.0.ffn.0.weight": torch.ones(2)},
        "unknown": {"something": torch.ones(2)},
    }
    for looks, tensors in cases.items():
        write_tensors(tmp_path / "x.safetensors", tensors)
        with pytest.raises(ValueError, match=f"not TAEHV.*looks like: {looks}"):
            load_taehv(tmp_path / "x.safetensors")
    names = dict(codec.state_dict())
    del names["decoder.4.conv.2.bias"]
    write_tensors(tmp_path / "x.safetensors", names)
    with pytest.raises(ValueError, match=r"1 names missing \(first: decoder.4.conv.2.bias\)"):
        load_taehv(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"none of taew2_1.safetensors, taew2_1.pth"):
        load_taehv(tmp_path)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"no recorded cases in {GOLDEN} (set CAUSALREEL_GOLDEN)")
@pytest.mark.parametrize(
    ("case", "weights", "name"),
    [
        ("c10_vae", "weights_vae", "decoder.upsamples.2.time_conv.weight"),
        ("c10_vae", "weights_vae", "encoder.middle.1.proj.bias"),
        ("c11_taehv", "weights_taehv", "decoder.13.conv.weight"),
        ("c11_taehv", "weights_taehv", "encoder.16.conv.4.bias"),
    ],
)
def test_recorded_cases_notice_another_weight(case: str, weights: str, name: str, tmp_path: Path) -> None:
    for file in (f"{case}.json", f"{case}.safetensors"):
        shutil.copyfile(GOLDEN / file, tmp_path / file)
    tensors = {key: value.clone() for key, value in read_tensors(GOLDEN / f"{weights}.safetensors").items()}
    write_tensors(tmp_path / f"{weights}.safetensors", tensors)
    (result,) = run(tmp_path, pattern=case)
    assert result.status == "pass" and "not checked" not in result.detail
    tensors[name][-1] += 1e-2
    write_tensors(tmp_path / f"{weights}.safetensors", tensors)
    (result,) = run(tmp_path, pattern=case)
    assert result.status == "fail", result
