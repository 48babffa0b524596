"""Fast decoders: the plain stream's frames for every method, split and number of streams; refusals."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalreel.codecs.fast_decode import fast_decoder, fast_stream
from causalreel.codecs.fast_wan import METHODS, Arithmetic, Method
from causalreel.codecs.taehv import TAEHV, TAEHVConfig
from causalreel.codecs.wan_vae import CausalVAE, VAEConfig

WAN = VAEConfig(dim=4, res_blocks=1, z=6, latent_mean=(0.1,) * 6, latent_std=(0.5, 1, 2, 1, 1, 1))
ODD = VAEConfig(dim=4, multipliers=(1, 3, 2), res_blocks=2, z=5, temporal_down=(True, False))
SMALL = TAEHVConfig(channels=5, encoder_width=6, decoder_widths=(12, 10, 8, 6))
PREVIEW = TAEHVConfig(5, 6, (6, 5, 4, 3), growth=(1, 1, 2), upsample=(True, False, True))
OTHER = TAEHVConfig(3, 4, (6, 4), growth=(3,), upsample=(True,), pooling=(3,))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(codec: torch.nn.Module) -> None:
    torch.manual_seed(11)
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            fan = parameter[0].numel() if parameter.ndim > 1 and not name.endswith("gamma") else 1
            parameter.copy_(torch.randn_like(parameter) * (fan**-0.5 if fan > 1 else 0.3))
            if name.endswith("gamma"):
                parameter.add_(1.0)
    codec.requires_grad_(False).eval()


def wan(config: VAEConfig = WAN) -> CausalVAE:
    codec = CausalVAE(config)
    randomised(codec)
    return codec


def taehv(config: TAEHVConfig = SMALL) -> TAEHV:
    codec = TAEHV(config)
    randomised(codec)
    return codec


@pytest.mark.parametrize("sizes", [(1,), (1, 3), (2, 1)])
@pytest.mark.parametrize("method", METHODS)
def test_wan_frames_are_the_plain_ones(method: Method, sizes: tuple[int, ...]) -> None:
    codec, latents = wan(), noise(2, 5, 6, 2, 3)
    arithmetic = Arithmetic(even=method, odd="concat" if sizes == (1,) else "conv3d")
    decoder = fast_decoder(codec, 16, 24, dtype=torch.float32, batch=2, sizes=sizes, arithmetic=arithmetic)
    wanted = codec.decode(latents)
    for split in [(1, 1, 1, 1, 1), (4, 1), (5,)]:
        stream = decoder.stream()
        pieces = [stream(piece) for piece in latents.split(split, 1)]
        assert [piece.shape[1] for piece in pieces] == [4 * n - 3 * (i == 0) for i, n in enumerate(split)]
        torch.testing.assert_close(torch.cat(pieces, 1), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_another_build_of_the_vae(method: Method) -> None:
    codec, latents = wan(ODD), noise(1, 4, 5, 3, 5)
    stream = fast_stream(codec, 12, 20, torch.float32, sizes=(2, 1), arithmetic=Arithmetic(even=method))
    torch.testing.assert_close(stream(latents), codec.decode(latents), atol=1e-5, rtol=0)


def test_methods_may_differ_by_width() -> None:
    codec, latents = wan(), noise(1, 3, 6, 2, 2)
    mixed = Arithmetic(even="winograd", widths={4: "stacked", 16: "paired"})
    stream = fast_stream(codec, 16, 16, torch.float32, arithmetic=mixed)
    torch.testing.assert_close(stream(latents), codec.decode(latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize("sizes", [(1,), (3, 1)])
@pytest.mark.parametrize("config", [SMALL, PREVIEW, OTHER], ids=["wan", "preview", "another"])
def test_taehv_frames_are_the_plain_ones(config: TAEHVConfig, sizes: tuple[int, ...]) -> None:
    codec = taehv(config)
    latents = noise(2, 7, config.channels, 2, 3)
    size = codec.geometry.spatial
    decoder = fast_decoder(codec, 2 * size, 3 * size, dtype=torch.float32, batch=2, sizes=sizes)
    for split in [(1,) * 7, (3, 3, 1), (7,)]:
        stream = decoder.stream()
        frames = torch.cat([stream(piece) for piece in latents.split(split, 1)], 1)
        torch.testing.assert_close(frames, codec.decode(latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [wan, taehv])
def test_streams_of_one_decoder_take_turns(make: type) -> None:
    codec = make()
    a, b = (noise(1, 4, codec.geometry.channels, 2, 2, seed=seed) for seed in (1, 2))
    decoder = fast_decoder(codec, 16, 16, dtype=torch.float32)
    first, second, out_a, out_b = decoder.stream(), decoder.stream(), [], []
    for start, end in [(0, 1), (1, 2), (2, 4)]:
        out_a.append(first(a[:, start:end]))
        out_b.append(second(b[:, start:end]))
    torch.testing.assert_close(torch.cat(out_a, 1), codec.decode(a), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(out_b, 1), codec.decode(b), atol=1e-5, rtol=0)
    del first
    torch.testing.assert_close(decoder.stream()(a), codec.decode(a), atol=1e-5, rtol=0)
    assert decoder.state_bytes > 0


@pytest.mark.parametrize("make", [wan, taehv])
def test_the_codec_stays_as_it_is(make: type) -> None:
    codec = make()
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    fast_stream(codec, 16, 16)(noise(1, 2, codec.geometry.channels, 2, 2))
    assert all(torch.equal(value, before[name]) for name, value in codec.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_is_no_worse_than_the_plain_path(method: Method) -> None:
    codec = wan(VAEConfig(dim=16, res_blocks=2, z=16))
    latents = noise(1, 4, 16, 4, 6)
    exact = codec.decode(latents)
    fast = fast_stream(codec, 32, 48, arithmetic=Arithmetic(even=method))(latents)
    plain = codec.bfloat16().stream()(latents)
    error, allowed = ((got - exact).norm() / exact.norm() for got in (fast, plain))
    assert 0 < error < 1.2 * allowed, (error, allowed)


@pytest.mark.parametrize("method", ["winograd", "stacked", "conv3d", "wide"])
def test_wan_through_the_kernels(method: Method) -> None:
    pytest.importorskip("triton")
    codec, latents = wan(), noise(1, 3, 6, 2, 2)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    how = {"dtype": torch.float32, "graphs": False, "backend": "triton", "device": on}
    stream = fast_decoder(codec, 16, 16, arithmetic=Arithmetic(even=method), **how).stream()
    tolerance = 1e-5 if on == "cpu" else 1e-2  # a GPU may use TF32
    torch.testing.assert_close(stream(latents).cpu(), codec.decode(latents), atol=tolerance, rtol=0)


def test_taehv_through_the_kernels() -> None:
    pytest.importorskip("triton")
    codec, latents = taehv(), noise(1, 3, 5, 2, 2)
    on = "cuda" if torch.cuda.is_available() else "cpu"
    stream = fast_decoder(codec, 16, 16, dtype=torch.float32, graphs=False, backend="triton", device=on).stream()
    tolerance = 1e-5 if on == "cpu" else 1e-2
    torch.testing.assert_close(stream(latents).cpu(), codec.decode(latents), atol=tolerance, rtol=0)


def test_bad_requests_are_refused() -> None:
    codec = wan()
    with pytest.raises(ValueError, match="multiples of 8, got height 20"):
        fast_decoder(codec, 20, 16)
    with pytest.raises(ValueError, match="have 1 among them"):
        fast_decoder(codec, 16, 16, sizes=(3,))
    with pytest.raises(ValueError, match="even must be one of conv3d"):
        Arithmetic(even="fft")  # pyright: ignore
    with pytest.raises(ValueError, match="odd must be conv3d or concat"):
        Arithmetic(odd="winograd")
    with pytest.raises(ValueError, match="for the Wan VAE"):
        fast_decoder(taehv(), 16, 16, arithmetic=Arithmetic())
    stream = fast_stream(codec, 16, 16)
    for shape in [(1, 1, 6, 2, 3), (2, 1, 6, 2, 2), (1, 0, 6, 2, 2), (1, 6, 2, 2)]:
        with pytest.raises(ValueError, match="this decoder was made for"):
            stream(torch.zeros(shape))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("make", [wan, taehv])
@pytest.mark.parametrize("sizes", [(1,), (3, 1)])
def test_graphs_replay_the_plain_stream(make: type, sizes: tuple[int, ...]) -> None:
    codec = make().cuda()
    decoder = fast_decoder(codec, 16, 24, dtype=torch.float16, sizes=sizes)
    for seed in (1, 2):
        latents = noise(1, 7, codec.geometry.channels, 2, 3, seed=seed).cuda()
        other = noise(1, 7, codec.geometry.channels, 2, 3, seed=seed + 5).cuda()
        one, two, frames = decoder.stream(), decoder.stream(), []
        for piece, interleaved in zip(latents.split((4, 3), 1), other.split((4, 3), 1), strict=True):
            frames.append(one(piece))
            two(interleaved)
        wanted = codec.decode(latents)
        assert (torch.cat(frames, 1) - wanted).norm() / wanted.norm() < 0.02


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "decode.py"
    sizes = ["--height", "16", "--width", "16", "--dim", "4", "--repeat", "1", "--device", "cpu", "--only"]
    monkeypatch.setattr(
        "sys.argv", [str(script), *sizes, "bf16 conv3d,taehv fast bf", "--out", str(tmp_path / "x.json")]
    )
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = tf32
    found = json.loads((tmp_path / "x.json").read_text())
    rows = found["rows"]
    assert {"wan fast bf16 conv3d, by 1", "wan fast bf16 conv3d, by 3", "taehv fast bfloat16, by 3"} <= set(rows)
    assert all(0 < row["error"] < 0.1 and row["p50_ms"] > 0 for row in rows.values())
    assert found["conditions"]["pixels"] == [16, 16] and "failed" not in capsys.readouterr().out
