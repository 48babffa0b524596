"""A family of models with a VAE of its own, entered from this file alone, goes the whole public way.

The VAE has the shape of Wan2.2's: pixels are put into channels two by two, a causal VAE halves three times more (16x in
space, 4x in time), and latents have 48 channels. Sizes are tiny and weights random.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import causalreel
from causalreel import cli, families
from causalreel.codecs import kinds
from causalreel.codecs.codec import Codec, CodecKind, DecoderMemory
from causalreel.codecs.wan_vae import CausalConv, Downsample, FrameAttention, History, ResidualBlock, Upsample
from causalreel.data.video_in import read_video
from causalreel.families.family import Decoder, Family, ReleasedModel, Text
from causalreel.infer.commands import Options
from causalreel.infer.estimate import estimate
from causalreel.infer.live import Live, Policy, encode_prompt, hints
from causalreel.infer.models import profile, request_for
from causalreel.nn.presets import PRESETS, ModelConfig
from causalreel.serve.session import Session
from causalreel.text.fixed import FixedTextEncoder
from causalreel.types import Geometry, LatentSpec, VideoCodec
from causalreel.weights.export import Sampling, codec_file, load_codec, save_codec, save_export

# ------------------------------------------------------------------------------------------- what a new family brings


@dataclass(frozen=True)
class SquareSizes:
    """Sizes of the VAE."""

    dim: int = 4
    """Channels at every resolution but the first, twice of it there."""
    z: int = 48
    """Latent channels."""

    @property
    def geometry(self) -> Geometry:
        """What its latents stand for."""
        return Geometry(self.z, 16, 4)


class SquareVAE(Codec):
    """16x in space, 4x in time, 48 channels."""

    def __init__(self, sizes: SquareSizes) -> None:
        super().__init__(sizes, sizes.geometry)
        dim = 2 * sizes.dim
        self.encoder = nn.ModuleList(
            [
                CausalConv(12, dim),
                ResidualBlock(dim, dim),
                *(Downsample(dim, temporal=temporal) for temporal in (False, True, True)),
                FrameAttention(dim),
                CausalConv(dim, sizes.z),
            ]
        )
        steps: list[nn.Module] = [CausalConv(sizes.z, dim), FrameAttention(dim)]
        for temporal in (True, True, False):
            steps += [Upsample(dim, temporal=temporal), ResidualBlock(dim // 2, dim)]
        self.decoder = nn.ModuleList([*steps, CausalConv(dim, 12)])

    def encode(self, video: Tensor) -> Tensor:
        self.check_video(video)
        b, t, c, h, w = video.shape
        x = video.view(b, t, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4, 6).flatten(4)  # (B,T,H/2,W/2,12)
        for layer in self.encoder:
            x = layer(x) if isinstance(layer, CausalConv) else layer(x, None)
        return x.movedim(-1, 2).float()

    def frames(self, latents: Tensor, history: History | None) -> Tensor:
        x = latents.to(next(self.parameters()).dtype).movedim(2, -1)  # (B,F,h,w,C)
        for layer in self.decoder:
            x = layer(x, history)
        x = x.unflatten(-1, (3, 2, 2)).permute(0, 1, 4, 2, 5, 3, 6)  # (B,T,3,H/2,2,W/2,2)
        return x.flatten(5, 6).flatten(3, 4).float().clamp(-1, 1)


def differs(sizes: SquareSizes, shapes: dict[str, tuple[int, ...]]) -> str | None:
    """How a file's tensors differ from a VAE of these sizes."""
    found = shapes.get("decoder.0.weight", (0, 0))[:2]
    return None if found == (2 * sizes.dim, sizes.z) else f"its decoder begins with {found}"


def memory(sizes: SquareSizes, *, frames: int, width: int, is_fast: bool) -> DecoderMemory:
    """What decoding takes: the widest activation is what the last convolution reads, and its taps beside it."""
    with torch.device("meta"):
        weights = kinds.count(SquareVAE(sizes))
    positions = 4 * frames * 8**2  # of a latent one
    return DecoderMemory(weights * width, 2 * 2 * sizes.dim * 12 * 8**2 * width, 8 * positions * 2 * sizes.dim * width)


SMALL = ModelConfig(48, 64, heads=2, layers=2, text_dim=8, text_length=6, freq_dim=16, channels=48)
SQUARE = Family(
    name="square",
    presets={"square-small": SMALL},
    decoders={"square": Decoder(SquareSizes())},
    text=Text("fixed", open=lambda files, device, cache, stays: FixedTextEncoder(6, 8, device), examples=("a cat",)),
    size=(64, 96),
    fps=24.0,
    models=(
        ReleasedModel(
            "square/frame", "frame by frame", (), None, "square-small", Sampling(1, (1000.0, 500.0)), frames=5
        ),
    ),
    kinds=(CodecKind("square", SquareSizes, SquareVAE, differs, memory),),
)


@pytest.fixture(scope="module", autouse=True)
def entered() -> Iterator[None]:
    """The family, for the tests of this file alone."""
    families.add(SQUARE)
    yield
    for table in (families.FAMILIES, families.MODELS, PRESETS, kinds.KINDS):
        for name in ("square", "square/frame", "square-small"):
            table.pop(name, None)  # type: ignore[attr-defined]


HOW: dict[str, Any] = {"weights": "random", "device": "cpu"}

# ------------------------------------------------------------------------------------------------------ the public way


def test_its_codec_is_one() -> None:
    codec = kinds.build(SquareSizes()).requires_grad_(False)
    assert isinstance(codec, VideoCodec) and codec.geometry == Geometry(48, 16, 4)
    video = torch.rand(1, 9, 3, 32, 48) * 2 - 1
    latents = codec.encode(video)
    assert latents.shape == (1, 3, 48, 2, 3) and codec.decode(latents).shape == video.shape
    stream = codec.stream()
    assert torch.allclose(
        torch.cat([stream(latents[:, :1]), stream(latents[:, 1:])], 1), codec.decode(latents), atol=1e-5
    )
    with pytest.raises(ValueError, match="multiples of 16, got width 40"):
        codec.encode(video[..., :40])


def test_load_and_generate() -> None:
    pipe = causalreel.load("square/frame", **HOW)
    assert pipe.size == (64, 96) and pipe.export.latent == LatentSpec(48, 4, 6) and pipe.export.fps == 24
    video = pipe.generate("anything", frames=9)
    assert video.shape == (1, 9, 3, 64, 96) and video.isfinite().all() and video.std() > 0
    first = torch.rand(3, 64, 96) * 2 - 1
    from_picture = pipe.generate("anything", frames=9, prefix=first)
    shown = pipe.codec.decode(pipe.codec.encode(first[None, None]))
    assert torch.allclose(from_picture[:, :1], shown, atol=1e-5) and not torch.equal(from_picture, video)
    with pytest.raises(ValueError, match=r"1 \+ 4 n frames, got 3; nearest: 1 or 5"):
        pipe.generate("anything", prefix=first.expand(3, -1, -1, -1))


def test_the_command_line_writes_a_video_of_its_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.mp4"
    plain = ["--model", "square/frame", "--weights", "random", "--device", "cpu"]
    assert cli.main(["generate", "x", *plain, "--frames", "9", "--scale", "1", "-o", str(out)]) == 0
    video, fps = read_video(out)
    assert video.shape == (9, 3, 64, 96) and fps == 24
    wide = [*plain, "--height", "32", "--width", "64", "--latent-frames", "2", "--scale", "1"]
    Image.new("RGB", (100, 70), (200, 30, 30)).save(tmp_path / "red.png")
    assert cli.main(["generate", "x", *wide, "--image", str(tmp_path / "red.png"), "-o", str(tmp_path / "b.mp4")]) == 0
    assert read_video(tmp_path / "b.mp4")[0].shape == (5, 3, 32, 64)
    capsys.readouterr()
    assert cli.main(["generate", "x", *plain, "--height", "48", "-o", str(out)]) == 2
    assert "positive multiples of 32, got height 48; nearest: 64 x 96" in capsys.readouterr().err
    assert cli.main(["generate", "x", *plain, "--decoder", "taehv", "-o", str(out)]) == 2
    assert "decoder must be square, got 'taehv'" in capsys.readouterr().err
    assert cli.main(["models", "--names"]) == 0 and "square/frame" in capsys.readouterr().out


def test_a_live_session() -> None:
    pipe = causalreel.load("square/frame", **HOW)
    assert Policy.of(pipe.export, pipe.sampling).kind == "slide"
    taken = {"mode": "recompute", "changes": True}
    assert hints(pipe.export) == {"examples": ["a cat"], "words": None, "synonyms": {}} | taken
    live = Live(pipe, encode_prompt(pipe, "a"))
    assert [live.next_chunk().latents.shape for _ in range(7)] == [(1, 1, 48, 4, 6)] * 7
    session = Session(pipe, Options("a"))
    shown = [session.next_chunk() for _ in range(3)]
    assert [tuple(chunk.frames.shape) for chunk in shown] == [(1, 64, 96, 3), (4, 64, 96, 3), (4, 64, 96, 3)]
    session.close()


def test_estimates(capsys: pytest.CaptureFixture[str]) -> None:
    request = request_for("square/frame", form="eager", dtype="float32")
    assert request.decoder == SquareSizes() and request.text_encoder == "none" and request.model == SMALL
    codec = kinds.build(SquareSizes())
    assert estimate(request)["decoder weights"] == sum(4 * part.numel() for part in codec.parameters())
    assert estimate(request)["decoder state"] > 0 and estimate(replace(request, decoder=None))["decoder state"] == 0
    assert request_for("square-small").model == SMALL
    assert cli.main(["estimate", "--model", "square/frame"]) == 0
    assert "decoder weights" in capsys.readouterr().out
    assert profile("square/frame").schedule(9).frames == 3


def test_exports_name_family_and_codec(tmp_path: Path) -> None:
    pipe = causalreel.load("square/frame", **HOW)
    assert isinstance(pipe.codec, Codec)
    save_export(tmp_path, pipe.denoiser, pipe.export, codec=pipe.codec, dtype=torch.float32)
    assert "family: square" in (tmp_path / "config.yaml").read_text()
    assert "kind: square" in (tmp_path / "codec.yaml").read_text()
    again = causalreel.load(tmp_path, device="cpu")
    assert torch.allclose(again.generate("x", frames=5), pipe.generate("x", frames=5), atol=2e-3)  # the codec in half
    assert estimate(request_for(tmp_path)).needed > 0 and profile(tmp_path).size == (64, 96)
    save_codec(tmp_path, SquareVAE(SquareSizes(dim=8)))
    card = tmp_path / "codec.yaml"
    card.write_text(card.read_text().replace("dim: 8", "dim: 4"))
    with pytest.raises(
        ValueError, match=r"another codec than the config beside it: its decoder begins with \(16, 48\)"
    ):
        load_codec(codec_file(tmp_path, "codec.safetensors"))


def test_names_are_taken_once() -> None:
    for wrong, said in [
        (SQUARE, "there is a family square already"),
        (replace(SQUARE, name="other", presets={"tiny": SMALL}, models=()), "there is tiny already"),
        (replace(SQUARE, name="other"), "square/frame already"),
        (
            replace(
                SQUARE, name="other", models=(), kinds=(CodecKind("wan", SquareSizes, SquareVAE, differs, memory),)
            ),
            "wan",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            families.add(wrong)
    export = causalreel.load("square/frame", **HOW).export
    with pytest.raises(ValueError, match=r"unknown family 'round'; there are .*tiny.*square"):
        families.of(replace(export, family="round"))
    with pytest.raises(ValueError, match="unknown text encoder 'umt5'; models of square have fixed"):
        families.of(replace(export, text="umt5"))
    assert json.dumps(sorted(families.FAMILIES)) == '["square", "tiny", "walk", "wan21"]'
