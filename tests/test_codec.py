"""The causal VAE: streams equal whole clips, causality, shapes, refusals, official names and numbers, training."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalreel.codecs.tiny import tiny_codec
from causalreel.codecs.wan_vae import PRESETS, CausalVAE, VAEConfig, latent_statistics, vae_config
from causalreel.data.patterns import pattern_clips
from causalreel.data.timed import timed
from causalreel.train.building import _world_of
from causalreel.train.recipe import resolve
from causalreel.train.stage import DataCursor, StepContext
from causalreel.train.stages.codec import CodecConfig, CodecStage, latent_error, near_edges
from causalreel.types import Conditioning, VideoBatch, VideoCodec

GOLDEN = Path(os.environ.get("CAUSALREEL_GOLDEN", Path(__file__).parents[1] / "../shared/golden")).resolve()
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden reference data is not at {GOLDEN}")
SMALL = VAEConfig(dim=4, res_blocks=1, z=6, latent_mean=(0.1,) * 6, latent_std=(0.5, 1, 2, 1, 1, 1))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(config: VAEConfig) -> CausalVAE:
    """Every parameter random, gains and biases too, so that nothing is hidden by a zero."""
    codec = CausalVAE(config)
    with torch.no_grad():
        for parameter in codec.parameters():
            noise = torch.randn(parameter.shape, generator=generator(parameter.numel()))
            parameter.copy_(noise * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3))
        for name, parameter in codec.named_parameters():
            if name.endswith("gamma"):
                parameter.add_(1.0)
    return codec


@pytest.fixture(scope="module")
def codec() -> CausalVAE:
    return randomised(SMALL)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


@pytest.mark.parametrize("split", [(1, 1, 1, 1, 1), (3, 2), (1, 4), (2, 1, 2), (5,)])
@torch.no_grad()
def test_streaming_decode_equals_whole_decode(codec, split):
    latents = noise(2, 5, 6, 2, 3)
    stream = codec.stream()
    pieces = [stream(piece) for piece in latents.split(split, 1)]
    assert [piece.shape[1] for piece in pieces] == [4 * n - 3 if i == 0 else 4 * n for i, n in enumerate(split)]
    torch.testing.assert_close(torch.cat(pieces, 1), codec.decode(latents), atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", [(1, 4, 4, 4), (5, 8), (9, 4), (13,)])
@torch.no_grad()
def test_streaming_encode_equals_whole_encode(codec, split):
    video = noise(2, 13, 3, 16, 24)
    stream = codec.encode_stream()
    pieces = [stream(piece) for piece in video.split(split, 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), codec.encode(video), atol=1e-5, rtol=0)


@torch.no_grad()
def test_streams_are_independent_and_rows_are_too(codec):
    a, b = noise(1, 3, 6, 2, 2, seed=1), noise(1, 3, 6, 2, 2, seed=2)
    first, second = codec.stream(), codec.stream()
    out_a, out_b = [], []
    for i in range(3):  # interleaved
        out_a.append(first(a[:, i : i + 1]))
        out_b.append(second(b[:, i : i + 1]))
    both = codec.decode(torch.cat([a, b]))
    torch.testing.assert_close(torch.cat(out_a, 1), both[:1], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat(out_b, 1), both[1:], atol=1e-5, rtol=0)
    assert (both[0] - both[1]).abs().max() > 0.01


@torch.no_grad()
def test_later_frames_do_not_change_earlier_outputs(codec):
    latents, video = noise(1, 4, 6, 2, 2), noise(1, 13, 3, 16, 16)
    other_latents, other_video = latents.clone(), video.clone()
    other_latents[:, 2:] += 1
    other_video[:, 5:] += 1
    decoded, changed = codec.decode(latents), codec.decode(other_latents)
    assert torch.equal(decoded[:, :5], changed[:, :5]) and not torch.equal(decoded[:, 5], changed[:, 5])
    encoded, changed = codec.encode(video), codec.encode(other_video)
    assert torch.equal(encoded[:, :2], changed[:, :2]) and not torch.equal(encoded[:, 2], changed[:, 2])


@torch.no_grad()
def test_every_earlier_frame_reaches_the_next_output(codec):
    latents = noise(1, 4, 6, 2, 2)
    last = codec.decode(latents)[:, -1]
    for frame in range(3):
        other = latents.clone()
        other[:, frame] += 1
        assert (codec.decode(other)[:, -1] - last).abs().max() > 1e-5


@pytest.mark.parametrize("frames", [1, 5, 17])
@torch.no_grad()
def test_shapes_range_and_protocol(codec, frames):
    assert isinstance(codec, VideoCodec)
    latents = codec.encode(noise(2, frames, 3, 16, 24).clamp(-1, 1))
    assert latents.shape == (2, 1 + (frames - 1) // 4, 6, 2, 3) and latents.dtype == torch.float32
    video = codec.decode(latents * 10)
    assert video.shape == (2, frames, 3, 16, 24) and video.abs().max() == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 3, 16, 16), "must have 1 \\+ 4 n frames, got 4; nearest: 1 or 5"),
        ((1, 0, 3, 16, 16), "got 0; nearest: 1$"),
        ((1, 5, 3, 20, 16), "multiples of 8, got height 20"),
        ((1, 3, 5, 16, 16), r"shape \(1, 3, 5, 16, 16\), expected \(B,T,3,H,W\)"),
        ((5, 3, 16, 16), "expected"),
    ],
)
def test_bad_videos_are_refused(codec, shape, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(torch.zeros(shape))


def test_bad_latents_streams_and_configs_are_refused(codec):
    for shape in [(1, 2, 5, 2, 2), (1, 0, 6, 2, 2), (2, 6, 2, 2)]:
        with pytest.raises(ValueError, match="latents have shape"):
            codec.decode(torch.zeros(shape))
    stream = codec.encode_stream()
    stream(torch.zeros(1, 1, 3, 8, 8))
    with pytest.raises(ValueError, match="5 frames, expected a multiple of 4"):
        stream(torch.zeros(1, 5, 3, 8, 8))
    with pytest.raises(ValueError, match="latent_std has 2 entries"):
        replace(SMALL, latent_std=(1.0, 2.0))
    with pytest.raises(ValueError, match="temporal_down"):
        VAEConfig(temporal_down=(True,))
    with pytest.raises(ValueError, match=r"huge.*tiny, wan2\.1"):
        vae_config("huge")


def test_sizes_and_official_names():
    with torch.device("meta"):
        full, tiny = CausalVAE(PRESETS["wan2.1"]), CausalVAE(PRESETS["tiny"])
    assert sum(p.numel() for p in full.parameters()) == 126_892_531
    assert 2 * sum(p.numel() for p in tiny.parameters()) < 5_400_000
    shapes = {name: tuple(value.shape) for name, value in full.state_dict().items()}
    for name, shape in {
        "encoder.conv1.weight": (96, 3, 3, 3, 3),
        "encoder.downsamples.2.resample.1.weight": (96, 96, 3, 3),
        "encoder.downsamples.3.shortcut.weight": (192, 96, 1, 1, 1),
        "encoder.downsamples.8.time_conv.weight": (384, 384, 3, 1, 1),
        "encoder.middle.1.norm.gamma": (384, 1, 1),
        "encoder.head.2.weight": (32, 384, 3, 3, 3),
        "conv1.weight": (32, 32, 1, 1, 1),
        "conv2.bias": (16,),
        "decoder.middle.1.to_qkv.weight": (1152, 384, 1, 1),
        "decoder.upsamples.3.time_conv.weight": (768, 384, 3, 1, 1),
        "decoder.upsamples.4.shortcut.bias": (384,),
        "decoder.upsamples.11.resample.1.weight": (96, 192, 3, 3),
        "decoder.upsamples.14.residual.6.bias": (96,),
        "decoder.upsamples.14.residual.3.gamma": (96, 1, 1, 1),
        "decoder.head.0.gamma": (96, 1, 1, 1),
    }.items():
        assert shapes[name] == shape, name
    assert len(shapes) == 194


def test_channel_statistics_give_unit_latents():
    codec = randomised(replace(SMALL, latent_mean=None, latent_std=None))
    videos = [noise(2, 5, 3, 16, 16, seed=seed).clamp(-1, 1) for seed in range(3)]
    mean, std = latent_statistics(codec, videos)
    codec.set_statistics(mean, std)
    assert codec.config.latent_mean == mean and "latent_mean" not in codec.state_dict()
    with torch.no_grad():
        latents = torch.cat([codec.encode(video) for video in videos]).transpose(1, 2).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(1, unbiased=False), torch.ones(6), atol=1e-4, rtol=0)
    again = CausalVAE(codec.config)
    again.load_state_dict(codec.state_dict())
    assert torch.equal(again.encode(videos[0]), codec.encode(videos[0]))


@needs_golden
@torch.no_grad()
def test_reference_numbers():
    safetensors = pytest.importorskip("safetensors.torch")
    case = safetensors.load_file(GOLDEN / "c10_vae.safetensors")
    official = PRESETS["wan2.1"]
    torch.testing.assert_close(torch.tensor(official.latent_mean), case["in.channel_mean"])
    torch.testing.assert_close(torch.tensor(official.latent_std), case["in.channel_std"])
    codec = CausalVAE(replace(official, dim=6, res_blocks=1))
    codec.load_state_dict(safetensors.load_file(GOLDEN / "weights_vae.safetensors"))

    def check(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, atol=2.8e-5 * expected.abs().max().item(), rtol=0)

    for frames, kept in [("1f", 1), ("9f", 9), ("7f", 5)]:  # the reference drops surplus frames; we refuse them
        video = case[f"in.video_{frames}"].transpose(1, 2)[:, :kept]
        check(codec.encode(video), case[f"out.latents_{frames}"])
        check(codec(video)[1].movedim(-1, 2), case[f"out.mu_{frames}"])
    latents, expected = case["in.latents"], case["out.video_unclamped"].clamp(-1, 1)
    check(codec.decode(latents), expected)
    check(codec.decode(latents[:, :1]), case["out.video_first_latent_only"])
    stream = codec.stream()
    check(torch.cat([stream(latents[:, i : i + 1]) for i in range(5)], 1), expected)


class Squares:
    """Clips of a moving coloured square on a dark ground, for the codec stage."""

    def __init__(self, count: int = 16, frames: int = 9, size: int = 16) -> None:
        self.video = torch.full((count, frames, 3, size, size), -0.5)
        for i in range(count):
            for t in range(frames):
                x, y = (3 * i + t) % (size - 7), (5 * i) % (size - 7)
                self.video[i, t, i % 3, y : y + 8, x : x + 8] = 1.0

    def __len__(self) -> int:
        return len(self.video)

    def batch(self, indices: Tensor) -> VideoBatch:
        return VideoBatch(Conditioning(torch.zeros(len(indices), 1, 1)), self.video[indices])


def context(source: Squares, cursor: DataCursor, step: int) -> StepContext:
    return StepContext(step, 0, source, cursor, torch.device("cpu"))


def test_fresh_codec_is_deterministic_and_has_finite_gradients_on_plain_grey():
    codec = tiny_codec(seed=3)
    for name, value in tiny_codec(seed=3).state_dict().items():
        assert torch.equal(value, codec.state_dict()[name]), name
    codec(torch.zeros(1, 5, 3, 16, 16))[0].square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in codec.parameters() if p.grad is not None)


def test_stage_learns_to_show_the_object():
    source = Squares()
    cursor = DataCursor(len(source), seed=0)
    config = CodecConfig(batch=8, frames=5, sharpen_from=20, sharpen_over=10)
    stage = CodecStage(tiny_codec(), config)
    optimiser = torch.optim.Adam(stage.roles["codec"].parameters(), lr=3e-4, betas=(0.9, 0.99))
    history = []
    for step in range(40):
        (update,) = stage.updates(context(source, cursor, step))
        assert update.role == "codec" and len(update.losses) == 1
        loss, metrics = update.losses[0]()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.roles["codec"].parameters(), 1.0)
        optimiser.step()
        history.append(metrics["psnr"].item())
    blank = -10 * torch.log10((source.video + 0.5).square().mean() / 4).item()
    assert sum(history[-5:]) / 5 > max(history[0], blank) + 2
    preview = stage.preview(context(source, cursor, 40))
    assert preview.shape == (4, 5, 3, 16, 32) and torch.equal(preview[..., :16], source.video[:4, :5])


def test_stage_is_deterministic_and_checks_its_data():
    source = Squares()
    losses = []
    for _ in range(2):
        stage = CodecStage(tiny_codec(), CodecConfig(batch=2, frames=5))
        (update,) = stage.updates(context(source, DataCursor(len(source), seed=0), 3))
        losses.append(update.losses[0]()[0].item())
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="frames is 6"):
        CodecStage(tiny_codec(), CodecConfig(frames=6))
    stage = CodecStage(tiny_codec(), CodecConfig(batch=2, frames=13))
    with pytest.raises(ValueError, match="clips have 9 frames"):
        next(stage.updates(context(source, DataCursor(len(source), seed=0), 0)))


def test_an_error_is_added_in_units_of_normalised_latents():
    codec, video = randomised(SMALL), torch.rand(1, 5, 3, 16, 16, generator=generator(0)) * 2 - 1
    error = torch.randn(1, 2, 2, 2, 6, generator=generator(1))
    shifted = codec.encode(video) + error.movedim(-1, 2)
    torch.testing.assert_close(codec(video, error=error)[0].clamp(-1, 1), codec.frames(shifted, {}), rtol=0, atol=2e-5)
    nothing = codec(video, error=torch.zeros_like(error))[0]  # its memory lies otherwise, which some processors round
    torch.testing.assert_close(codec(video)[0], nothing, rtol=0, atol=1e-5)


def test_a_decoder_alone_is_trained_behind_the_encoder_that_there_is():
    source, codec = Squares(), tiny_codec(seed=1)
    before = {name: value.clone() for name, value in codec.state_dict().items()}
    stage = CodecStage(codec, CodecConfig(batch=4, frames=5, sharpen_from=0, decoder_only=True, latent_error=0.5))
    (update,) = stage.updates(context(source, DataCursor(len(source), seed=0), 0))
    update.losses[0]()[0].backward()
    optimiser = torch.optim.SGD([p for p in codec.parameters() if p.requires_grad], lr=1e-2)
    optimiser.step()
    changed = {name for name, value in codec.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith(("decoder.", "conv2.")) for name in changed)
    video = source.video[:2, :5]
    assert torch.equal(codec.encode(video), tiny_codec(seed=1).encode(video))


def test_latent_errors_are_veils_and_specks_of_every_strength_up_to_the_largest():
    step = context(Squares(), DataCursor(16, seed=0), 3)
    error = latent_error(step, 64, 4, 8, 8, 16, largest=0.8)  # (B,F,h,w,z)
    size = error.square().mean((2, 3, 4)).sqrt()  # (B,F)
    assert size.min() < 0.1 and 0.5 < size.max() < 1.0 and 0.2 < size.mean() < 0.5
    near = (error[:, :, 1:] * error[:, :, :-1]).mean((2, 3, 4)) / size.square()  # with the row above
    assert near.min() < 0.1 and near.max() > 0.6
    assert torch.equal(error, latent_error(step, 64, 4, 8, 8, 16, largest=0.8))
    assert not latent_error(step, 2, 2, 8, 8, 16, largest=0.0).any()


def test_patterns_are_plain_textured_moving_and_of_the_seed() -> None:
    clips = pattern_clips(64, 9, 32, 48, generator(1))
    assert clips.shape == (64, 9, 3, 32, 48) and clips.isfinite().all() and clips.abs().max() <= 1
    spread = clips.flatten(3).std(-1).mean((1, 2))  # over a frame
    moves = clips.diff(dim=1).abs().mean((1, 2, 3, 4))
    assert (spread == 0).any() and (spread > 0.3).any() and (moves == 0).any() and (moves > 0.1).any()
    colours = clips[:, 0].mean((2, 3))  # (B,3): all over the cube
    assert colours.std(0).min() > 0.3
    assert torch.equal(clips, pattern_clips(64, 9, 32, 48, generator(1)))
    assert not torch.equal(clips, pattern_clips(64, 9, 32, 48, generator(2)))


def test_a_share_of_a_batch_shows_patterns_whatever_shares_the_batch() -> None:
    source = Squares()
    stage = CodecStage(tiny_codec(0), CodecConfig(batch=8, frames=5, patterns=0.375))
    video = torch.zeros(8, 5, 3, 16, 16)
    whole = stage._with_patterns(context(source, DataCursor(16, seed=0), 3), video)
    assert whole[:3].flatten(1).any(1).all() and not whole[3:].any()
    for part in range(2):
        step = replace(context(source, DataCursor(16, seed=0), 3), part=part, parts=2)
        assert torch.equal(stage._with_patterns(step, video[part::2]), whole[part::2])
    none = CodecStage(tiny_codec(0), CodecConfig(batch=8, frames=5))
    assert none._with_patterns(context(source, DataCursor(16, seed=0), 3), video) is video
    seen = []
    stage.loss = lambda step, video: seen.append(video) or (video.sum(), {})  # type: ignore[method-assign]
    (update,) = stage.updates(context(source, DataCursor(16, seed=0), 3))
    update.losses[0]()
    known = {-0.5, 1.0}  # all that the squares are made of
    assert [set(clip.unique().tolist()) <= known for clip in seen[0]] == [False] * 3 + [True] * 5


def test_clips_as_long_as_their_cuts_show_a_change_that_begins_with_a_latent_frame() -> None:
    """The robust codec's recipe, and the shares that its setting tells: of cuts at any place of clips of 45 frames few
    show a whole change where a latent frame of the cut begins."""
    shipped = resolve("tiny/robust_codec")
    frames, count = shipped.settings.frames, 300
    assert shipped.settings.rendered == frames == 17

    def share(rendered: int | None, length: int) -> float:
        recipe = replace(shipped, settings=replace(shipped.settings, rendered=rendered))
        clips = _world_of(recipe).clips(count, seed=0)
        assert clips.video.shape[1] == length
        starts = torch.tensor([1 + 4 * (told[-1][0] - 1) if len(told := timed(c)) > 1 else -99 for c in clips.captions])
        first = torch.randint(length - frames + 1, (count,), generator=generator(0))
        within = starts - first
        return ((within >= 1) & (within + 3 < frames) & (within % 4 == 1)).float().mean().item()

    assert share(17, 17) == pytest.approx(0.86, abs=0.06)
    assert share(None, 45) == pytest.approx(0.10, abs=0.06)


def test_clips_that_are_cut_are_not_shorter_than_the_cut() -> None:
    with pytest.raises(ValueError, match="rendered must be at least the 17 frames of a cut, got 13"):
        CodecConfig(rendered=13)
    with pytest.raises(ValueError, match=r"settings\.rendered"):
        replace(resolve("tiny/walk_codec"), settings=CodecConfig(rendered=17))


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_an_error_that_is_none_is_refused(value: float):
    with pytest.raises(ValueError, match="latent_error must be 0 or more, got"):
        CodecConfig(latent_error=value)


def test_edges_are_where_colours_change():
    video = torch.zeros(1, 1, 3, 16, 16)
    video[..., 4:8, 4:8] = 1
    near = near_edges(video, 1)
    assert near.shape == (1, 1, 1, 16, 16)
    assert near[0, 0, 0, 4, 4] == 1 and near[0, 0, 0, 0, 0] == 0 and near[0, 0, 0, 12, 12] == 0
    assert near[0, 0, 0, 6, 6].item() == 1 and near_edges(torch.zeros_like(video), 2).max() == 0
