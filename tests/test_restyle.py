"""Video to video: a given video, noised chunk by chunk and denoised from there."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalreel import cli
from causalreel.codecs.wan_vae import CausalVAE
from causalreel.data.video import to_bytes, write_video
from causalreel.data.video_in import count_frames, read_video
from causalreel.data.world import render, simulate, specs
from causalreel.eval.metrics import measure
from causalreel.flow import warp_steps
from causalreel.infer.clips import ClipRequest
from causalreel.infer.models import load
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.restyle import Encoded, GivenVideo, Restyle
from causalreel.infer.schedule import below
from causalreel.serve.session import Options, Session
from causalreel.types import Geometry
from causalreel.vocabulary import Caption, compose
from causalreel.weights.export import Sampling, save_codec, save_export
from test_weights import SMALL_CODEC, small_denoiser, small_export

RED, BLUE = "a large red circle moves right", "a large blue circle moves right"


def models(root: Path, **samplings: Sampling) -> dict[str, Pipeline]:
    save_codec(root, CausalVAE(SMALL_CODEC))
    for name, sampling in samplings.items():
        save_export(root / name, small_denoiser(), small_export(name, sampling))
    return {name: load(root / name, device="cpu") for name in samplings}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """Random models of 32x32 pixels."""
    two = Sampling(2, (1000.0, 500.0))
    one = Sampling(1, (1000.0, 500.0), first_steps=(1000.0, 750.0, 500.0))
    exact = Sampling(1, levels=((0.99, 0.8, 0.3), (0.99, 0.5)))
    whole = Sampling(None, multistep=2, solver="euler")
    return models(tmp_path_factory.mktemp("small"), two=two, one=one, exact=exact, whole=whole)


def clip(frames: int) -> Tensor:
    return torch.rand(frames, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_steps_are_those_below() -> None:
    levels = warp_steps((1000.0, 750.0, 500.0, 250.0), 5.0)
    assert below(levels, 0.9) == (0.9, *levels[2:]) and below(levels, 0.1) == (0.1,)
    assert below(levels, 1.0) == levels and below(levels, levels[1]) == levels[1:]


@pytest.mark.parametrize("name", ["one", "two"])
def test_strength_one_is_the_prompt_alone(small: dict[str, Pipeline], name: str) -> None:
    pipeline = small[name]
    plain = pipeline.generate(RED, frames=29, seed=3)
    assert torch.equal(pipeline.generate(RED, video=clip(29), strength=1.0, seed=3), plain)


@pytest.mark.parametrize("name", ["one", "two", "exact"])
def test_chunks_are_the_given_ones_noised_and_denoised(small: dict[str, Pipeline], name: str) -> None:
    """By hand, over the latents of the whole clip; a little strength keeps nearly all."""
    pipeline, video = small[name], clip(29)
    latents = pipeline.codec.encode(video[None])
    made = torch.cat([c.latents for c in pipeline.latents(RED, video=video, strength=1e-6, seed=3)], 1)
    assert made.shape == latents.shape and (made - latents).abs().max() < 1e-3
    far = torch.cat([c.latents for c in pipeline.latents(RED, video=video, strength=0.7, seed=3)], 1)
    half = torch.cat([c.latents for c in pipeline.latents(RED, video=video, strength=0.3, seed=3)], 1)
    plain = torch.cat([c.latents for c in pipeline.latents(RED, frames=29, seed=3)], 1)
    assert (half - latents).square().mean() < (far - latents).square().mean() < (plain - latents).square().mean()


def test_the_plan_begins_at_the_strength(small: dict[str, Pipeline]) -> None:
    def levels(name: str, strength: float) -> list[list[float]]:
        """Of the first chunk, the second, the third."""
        plan = ClipRequest(RED, video=clip(29), strength=strength).check(small[name], None).plan
        found: dict[int, list[float]] = {}
        for call in plan.plan(fused=False):
            for part in call.parts:
                if part.sigma_next is not None:
                    found.setdefault(part.start, []).append(part.sigma)
        return list(found.values())[:3]

    shifted = warp_steps((750.0, 500.0), 5.0)
    assert levels("one", 0.95) == [[0.95, *shifted], [0.95, shifted[1]], [0.95, shifted[1]]]
    assert levels("two", 0.6) == [[0.6]] * 3
    assert levels("exact", 0.6) == [[0.6, 0.3], [0.6, 0.5], [0.6, 0.5]]


def test_clips_together_are_the_clips_alone(small: dict[str, Pipeline]) -> None:
    pipeline = small["two"]
    both = pipeline.generate([RED, BLUE], video=clip(13), strength=0.8, seed=[1, 2])
    alone = pipeline.generate(BLUE, video=clip(13), strength=0.8, seed=2)
    assert both.shape == (2, 13, 3, 32, 32) and (both[1:] - alone).abs().max() < 1e-3


def test_frames_are_read_no_sooner_than_they_are_needed(small: dict[str, Pipeline]) -> None:
    """And no frame twice; the file is let go of when the clip ends or is given up."""
    read, closed = [], []

    def parts():
        try:
            for number, frame in enumerate(clip(29)):
                read.append(number)
                yield frame[None, None]
        finally:
            closed.append(True)

    stream = small["two"].stream(RED, video=GivenVideo(29, (32, 32), parts), strength=0.5, ahead=False)
    counts = []
    for made in stream:
        counts.append((made.shape[1], len(read)))
    assert counts == [(5, 5), (8, 13), (8, 21), (8, 29)] and read == list(range(29)) and closed == [True]
    stream = small["two"].stream(RED, video=GivenVideo(29, (32, 32), parts), strength=0.5, ahead=False)
    next(stream)
    stream.close()
    del stream
    assert len(closed) == 2


def test_a_codec_that_encodes_whole_clips_does() -> None:
    torch.manual_seed(0)
    codec, video = CausalVAE(SMALL_CODEC).requires_grad_(False), clip(13)

    class Whole:
        geometry: Geometry = codec.geometry
        encode, decode, stream = codec.encode, codec.decode, codec.stream

    expected = codec.encode(video[None])
    for one in (codec, Whole()):
        given = Encoded(one, GivenVideo.of(video), torch.device("cpu"))  # type: ignore[arg-type]
        assert given.has(2) and given.has(4) and (one is not codec or not given.has(5))
        made = torch.cat([given(1), given(2), given(1)], 1)
        torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
        given.close()


def test_files_of_any_size_and_rate(tmp_path: Path, small: dict[str, Pipeline]) -> None:
    write_video(tmp_path / "odd.mp4", clip(30)[:, :, :30, :26], 10)
    assert count_frames(tmp_path / "odd.mp4", fps=16) == len(read_video(tmp_path / "odd.mp4", fps=16)[0]) == 48
    assert count_frames(tmp_path / "odd.mp4", fps=16, most=7) == 7
    given = GivenVideo.of_file(tmp_path / "odd.mp4", (32, 32), fps=16)
    made = small["two"].generate(RED, video=given, strength=0.5)
    assert made.shape == (1, 45, 3, 32, 32)  # 12 latent frames, six chunks of two


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 0.0}, "strength must be above 0 and at most 1, got 0"),
        ({"strength": 1.2}, "strength must be above 0 and at most 1, got 1.2"),
        ({"strength": float("nan")}, "strength must be above 0"),
        ({"strength": None}, r"needs a strength in \(0, 1\]"),
        ({"video": None}, "strength is for a given video"),
        ({"video": clip(4)}, r"has 4 frames, fewer than one chunk \(5\)"),
        ({"video": clip(13)[:, :, :16]}, "must be 32x32 pixels, got 16x32"),
        ({"video": clip(13)[:, 0]}, r"must be \(T,3,H,W\)"),
        ({"frames": 29}, "frames must be at most the 13 of the given video's whole chunks, got 29"),
        ({"prefix": clip(13)}, "begins with a prefix or is made of a given video, not both"),
        ({"model": "whole"}, "needs a model that goes chunk by chunk; whole does not"),
    ],
)
def test_what_cannot_be_is_one_line(small: dict[str, Pipeline], changes: dict, message: str) -> None:
    how = {"video": clip(13), "strength": 0.5, **changes}
    with pytest.raises(ValueError, match=message) as refusal:
        small[how.pop("model", "two")].generate(RED, **how)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0"], "--strength must be at least 0.001, got 0"),
        (["--strength", "1.5"], "--strength must be at most 1, got 1.5"),
        (["--strength", "0.5"], "--strength is for --video"),
        (["--strength", "0.5", "--video", "none.mp4"], r"none\.mp4"),
        (["--strength", "0.5", "--video", "none.mp4", "--image", "a.png"], "exclude each other"),
    ],
)
def test_the_command_says_so_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", RED, "--device", "cpu", "-o", str(tmp_path / "x.mp4"), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and re.search(message, told)
    assert not (tmp_path / "x.mp4").exists()


def test_a_prompt_changes_the_colour_and_keeps_the_rest(tmp_path: Path) -> None:
    """The tiny world: what was red becomes blue, where it was."""
    config = simulate(1, seed=0).config
    state = next(s for s in (simulate(1, seed=seed, config=config) for seed in range(99)) if not s.present[0, 1])
    video = render(state)[0]
    write_video(tmp_path / "in.mp4", video, 16)
    (told,) = specs(state)
    before = told.objects[0]
    colour = "blue" if before.color != "blue" else "red"
    wanted = Caption((dataclasses.replace(before, color=colour),), told.background)
    how = ["--video", str(tmp_path / "in.mp4"), "--strength", "0.5", "--scale", "1", "--device", "cpu"]
    assert cli.main(["generate", compose(wanted), "--model", "tiny", "-o", str(tmp_path / "out.mp4"), *how]) == 0
    made, _ = read_video(tmp_path / "out.mp4")
    assert made.shape == video.shape
    assert measure(made[None], [wanted]).follow.item() > 0.7 and measure(video[None], [wanted]).follow.item() == 0
    here, there = ((v - v.flatten(2).median(2).values[..., None, None]).abs().sum(1) > 0.4 for v in (made, video))
    overlap = (here & there).sum((1, 2)) / (here | there).sum((1, 2))
    assert overlap.mean() > 0.6  # the same place, frame for frame


# ---- streams


def test_a_stream_is_made_of_a_video_and_ends_with_it(small: dict[str, Pipeline]) -> None:
    """Beyond a training clip, through a prompt change; at little strength it is the video."""
    pipeline, video = small["two"], clip(61)
    restyle = Restyle(GivenVideo.of(video), 1e-6)
    session = Session(pipeline, Options(RED), restyle=restyle)
    shown = []
    while not session.closed:
        if session.sequence == 3:
            session.command("prompt", text=BLUE)
        made = session.next_chunk()
        shown += [] if made is None else [made.frames]
    latents = pipeline.codec.encode(video[None])
    expected = torch.cat([to_bytes(pipeline.codec.decode(latents)[0])])
    assert torch.cat(shown).shape == expected.shape  # 16 latent frames, eight chunks
    assert (torch.cat(shown).int() - expected.int()).abs().max() <= 1
    with pytest.raises(ValueError, match="strength must be above 0"):
        Session(pipeline, Options(RED), restyle=Restyle(GivenVideo.of(video), 0.0))
    with pytest.raises(ValueError, match="must be 32x32 pixels"):
        Session(pipeline, Options(RED), restyle=Restyle(GivenVideo.of(video[..., :16]), 0.5))


def test_the_first_clip_of_a_stream_is_the_clip(small: dict[str, Pipeline]) -> None:
    pipeline, video = small["two"], clip(29)
    session = Session(pipeline, Options(RED, seed=3), restyle=Restyle(GivenVideo.of(video), 0.7), policy="slide")
    shown = torch.cat([made.frames for made in iter(session.next_chunk, None)])
    expected = to_bytes(pipeline.generate(RED, seed=3, video=video, strength=0.7)[0])
    assert shown.shape == expected.shape and (shown.int() - expected.int()).abs().max() <= 1


def test_a_pipe_is_read_as_it_comes(tmp_path: Path) -> None:
    """The stream shows frames before the pipe has ended."""
    path = tmp_path / "camera.y4m"
    os.mkfifo(path)
    went_on = threading.Event()
    frames = (torch.rand(30, 48, 40, 3, generator=torch.Generator().manual_seed(0)) * 255).byte()

    def camera() -> None:
        with open(path, "wb") as out:
            out.write(b"YUV4MPEG2 W40 H48 F16:1 C444\n")
            for number, frame in enumerate(frames):
                if number == 20:
                    went_on.wait(30)
                out.write(b"FRAME\n" + frame.permute(2, 0, 1).contiguous().numpy().tobytes())
                out.flush()

    thread = threading.Thread(target=camera, daemon=True)
    thread.start()
    parts = iter(GivenVideo.of_stream(path, (32, 32), fps=16).read())
    first = [next(parts) for _ in range(5)]
    went_on.set()
    rest = list(parts)
    thread.join(30)
    assert len(first) + len(rest) == 30 and all(part.shape == (1, 1, 3, 32, 32) for part in first + rest)
    with pytest.raises(ValueError, match="known length"):
        ClipRequest(RED, video=GivenVideo.of_stream(path, (64, 64), fps=16), strength=0.5).check(
            load("tiny", device="cpu"), None
        )


def test_the_stream_command_takes_a_file_and_standard_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.mp4"
    write_video(source, render(simulate(1, seed=3))[0][:29], 16)
    how = [sys.executable, "-m", "causalreel", "stream", BLUE, "--strength", "0.5", "--device", "cpu", "--video"]
    for given, name in ((str(source), "a.mp4"), ("-", "b.mp4")):
        done = subprocess.run([*how, given, "-o", str(tmp_path / name)], stdin=source.open("rb"), capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
    (one, _), (other, _) = read_video(tmp_path / "a.mp4"), read_video(tmp_path / "b.mp4")
    assert one.shape[0] == 29 and torch.equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strength", "0.5", "--frames", "5"], "--video and --strength go together"),
        (["--video", "none.mp4", "--strength", "0.5"], "no video file at none.mp4"),
        (["--video", "-", "--strength", "2"], "--strength must be at most 1, got 2"),
        (["--video", "-", "--strength", "1", "--stdin"], "both read standard input"),
        (["--video", "-", "--strength", "1", "--image", "a.png"], "exclude each other"),
        (["--video", "-", "--strength", "1", "--record", "r.json"], "which a replay file does not hold"),
    ],
)
def test_a_stream_that_cannot_be_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["stream", RED, "--device", "cpu", "-o", str(tmp_path / "x.mp4"), *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and message in told
