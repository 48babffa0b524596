"""The pipeline: schedules, determinism across batches and plans, streaming, prefixes, long clips, models by name."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import causalreel
from causalreel import config
from causalreel.codecs.wan_vae import CausalVAE
from causalreel.infer.bench import measure, operations
from causalreel.infer.inputs import fit, read_clip, read_picture
from causalreel.infer.models import find, profile
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import adapt, even_steps, noise_levels, schedule
from causalreel.nn.denoiser import Guided
from causalreel.nn.kv_cache import KVCache
from causalreel.nn.masks import Context
from causalreel.nn.policies.registry import policy_from
from causalreel.rollout import Call, KeyedNoise, Part, chunked, collect, rollout
from causalreel.solvers import SOLVERS
from causalreel.text.tiny import TinyTextEncoder
from causalreel.types import Conditioning, Geometry, LatentSpec
from causalreel.weights import export as exports
from causalreel.weights.export import Sampling, save_export
from test_weights import SMALL_CODEC, small_denoiser, small_export, small_family

PROMPTS = [
    "a large red circle moves right slowly on a grey background",
    "a small blue square moves up slowly on a dark background",
]
GEOMETRY = Geometry(16, 8, 4)
FRAME, CHUNK = Sampling(1), Sampling(4)
FULL = Sampling(None, (), multistep=3, solver="euler", guidance=2.0)


def pipeline(sampling: Sampling = FRAME, context: Context = Context()) -> Pipeline:
    """A random model of 32x32 pixels, trained for 4 latent frames (13 pixel frames)."""
    export = small_export(sampling=sampling, frames=4, context=context)
    denoiser = small_denoiser()
    denoiser.context = context
    with torch.random.fork_rng():
        torch.manual_seed(1)
        codec = CausalVAE(SMALL_CODEC).eval()
    return Pipeline(denoiser, export, sampling, codec, TinyTextEncoder(), torch.device("cpu"))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() < tolerance


@pytest.fixture
def family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(exports, "ASSETS", small_family(tmp_path / "assets"))
    return exports.ASSETS / "tiny"


# ---- schedules


def test_step_lists() -> None:
    assert even_steps(4) == (1000, 750, 500, 250)
    assert even_steps(2) == (1000, 500)
    assert even_steps(1) == (1000,)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        even_steps(0)


def test_adapt_changes_only_what_is_asked_for() -> None:
    first = Sampling(1, (1000.0,), first_steps=(1000.0, 500.0))
    assert adapt(first) == first
    assert adapt(first, steps=1) == first
    assert adapt(first, steps=2) == Sampling(1, (1000.0, 500.0))
    late = Sampling(1, (1000.0, 250.0), first_steps=(1000.0, 500.0))
    assert adapt(late, steps=2) == late and adapt(late, steps=[1000, 500]).steps == (1000.0, 500.0)
    assert adapt(late, steps=3).steps == (1000.0, 2000 / 3, 1000 / 3)
    assert adapt(first, steps=(1000, 300), chunk=2) == Sampling(2, (1000.0, 300.0))
    assert adapt(FULL, steps=7).multistep == 7
    with pytest.raises(ValueError, match="must be a number"):
        adapt(FULL, steps=(1000,))
    with pytest.raises(ValueError, match="chunk cannot be 2"):
        adapt(FULL, chunk=2)


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_many_step_models_use_their_solvers_grid(solver: str) -> None:
    levels = noise_levels(Sampling(1, (), multistep=5, solver=solver))
    assert len(levels) == 5
    assert all(a > b > 0 for a, b in pairwise(levels))


@pytest.mark.parametrize(
    ("sampling", "frames", "prefix", "nearest"),
    [
        (FRAME, 44, 0, "41 or 45"),
        (FRAME, 0, 0, "1"),
        (FRAME, -5, 0, "1"),
        (CHUNK, 45 + 4, 0, "45 or 61"),
        (CHUNK, 12, 0, "13"),
        (CHUNK, 14, 0, "13 or 29"),
        (FRAME, 9, 3, "13"),
        (FRAME, 11, 3, "13"),
        (CHUNK, 13, 4, "29"),
    ],
)
def test_impossible_lengths_name_the_nearest(sampling: Sampling, frames: int, prefix: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"got {frames}; nearest: {nearest}$"):
        schedule(sampling, GEOMETRY, trained=12, frames=frames, prefix=prefix)


def test_lengths() -> None:
    def latents(sampling: Sampling, **request: int | None) -> int:
        return schedule(sampling, GEOMETRY, trained=12, **request).frames

    assert latents(FRAME) == latents(CHUNK) == latents(FULL) == 12
    assert latents(FRAME, frames=1) == 1 and latents(FRAME, frames=45) == 12 and latents(CHUNK, frames=93) == 24
    assert latents(Sampling(5)) == 10
    assert latents(FRAME, prefix=3) == 12 and latents(FRAME, prefix=20) == 21 and latents(CHUNK, prefix=12) == 16
    with pytest.raises(ValueError, match="at most 45"):
        latents(FULL, frames=49)
    with pytest.raises(ValueError, match="needs an autoregressive model"):
        latents(FULL, prefix=1)
    with pytest.raises(ValueError, match="multiple of the chunk's 4 latent frames, got 1"):
        latents(CHUNK, prefix=1)
    with pytest.raises(ValueError, match="chunk must be at most 12"):
        latents(Sampling(13))


# ---- generating


@pytest.mark.parametrize("sampling", [FRAME, CHUNK, FULL, dataclasses.replace(FRAME, guidance=3.0)])
def test_a_stream_is_the_clip_in_pieces(sampling: Sampling) -> None:
    pipe = pipeline(sampling)
    parts = list(pipe.stream(PROMPTS, seed=5))
    expected = [1, 4, 4, 4] if sampling.chunk == 1 else [13]
    assert [part.shape[1] for part in parts] == expected
    video = pipe.generate(PROMPTS, seed=5)
    assert video.shape == (2, 13, 3, 32, 32) and video.dtype == torch.float32
    assert not video.requires_grad
    assert video.abs().max() <= 1 and video.std() > 0.01
    close(torch.cat(parts, 1), video, 1e-6)


@pytest.mark.parametrize("sampling", [FRAME, dataclasses.replace(CHUNK, chunk=2)])
def test_a_clip_depends_on_its_prompt_and_seed_alone(sampling: Sampling) -> None:
    pipe = pipeline(sampling)
    both = pipe.generate(PROMPTS, seed=[7, 3])
    close(both[1:], pipe.generate(PROMPTS[1], seed=3))
    close(both, pipe.generate(PROMPTS, seed=[7, 3], fused=False))
    close(pipe.generate(PROMPTS, seed=7)[1:], pipe.generate(PROMPTS[1], seed=8))
    assert (both[:1] - pipe.generate(PROMPTS[0], seed=8)).abs().max() > 1e-2
    assert (both[:1] - pipe.generate(PROMPTS[1], seed=7)).abs().max() > 1e-3


@torch.no_grad()
def test_it_is_the_rollout_of_the_laws() -> None:
    """Against the plain loop: own plan, no prepared conditioning, whole decode."""
    pipe = pipeline(Sampling(2, (1000.0, 500.0), first_steps=(1000.0, 700.0, 300.0)))
    chunks = rollout(
        pipe.denoiser,
        chunked([2, 2], noise_levels(pipe.sampling), first=noise_levels(Sampling(2, (1000.0, 700.0, 300.0)))),
        conditioning=Conditioning(pipe.text.encode(PROMPTS)),
        noise=KeyedNoise([0, 1], pipe.export.latent),
        cache=pipe.denoiser.new_cache(),
    )
    close(pipe.generate(PROMPTS), pipe.codec.decode(collect(chunks)))


@torch.no_grad()
@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_many_guided_steps_are_the_rollout_of_the_laws(solver: str) -> None:
    """Classifier-free guidance and the model's own solver take part."""
    pipe = pipeline(Sampling(2, (), multistep=3, solver=solver, guidance=4.0))
    guided = Guided(pipe.denoiser, Conditioning(pipe.text.null(1)), 4.0)
    chunks = rollout(
        guided,
        chunked([2, 2], noise_levels(pipe.sampling)),
        conditioning=Conditioning(pipe.text.encode(PROMPTS)),
        noise=KeyedNoise([0, 1], pipe.export.latent),
        solver=SOLVERS[solver],
        cache=guided.new_cache(),
    )
    close(pipe.generate(PROMPTS), pipe.codec.decode(collect(chunks)))


def test_steps_and_chunk_can_be_chosen_per_call() -> None:
    pipe = pipeline(FRAME)
    assert torch.equal(pipe.generate(PROMPTS[0], steps=2), pipe.generate(PROMPTS[0]))
    assert torch.equal(pipe.generate(PROMPTS[0], steps=(1000, 500)), pipe.generate(PROMPTS[0]))
    assert (pipe.generate(PROMPTS[0], steps=1) - pipe.generate(PROMPTS[0])).abs().max() > 1e-3
    assert [part.shape[1] for part in pipe.stream(PROMPTS[0], chunk=2)] == [5, 8]


@pytest.mark.parametrize("context", [Context(), Context(window=3, sink=1)])
def test_longer_clips_stream_on_behind_a_policy_that_bounds_them(context: Context) -> None:
    pipe = pipeline(FRAME, context)
    long, short = pipe.generate(PROMPTS[0], frames=29), pipe.generate(PROMPTS[0])
    assert long.shape[1] == 29
    close(long[:, :13], short)  # the window makes no difference before it is full
    plan = pipe.schedule(frames=29)
    assert plan.context == (context if context.window else policy_from("infinity-rope", frames=4, chunk=1))


def test_a_prefix_leads_the_clip_and_is_seen() -> None:
    pipe = pipeline(FRAME)
    picture = torch.full((3, 32, 32), 0.5)
    parts = list(pipe.stream(PROMPTS, prefix=picture, frames=9))
    assert [part.shape[1] for part in parts] == [1, 4, 4]
    with torch.no_grad():
        close(parts[0], pipe.codec.decode(pipe.codec.encode(picture.expand(2, 1, 3, 32, 32))))
    other = pipe.generate(PROMPTS, prefix=-picture, frames=9)
    assert (other[:, 1:] - torch.cat(parts[1:], 1)).abs().max() > 1e-2
    fused = pipe.generate(PROMPTS, prefix=picture, frames=9)
    close(fused, pipe.generate(PROMPTS, prefix=picture, frames=9, fused=False))


def test_continuation_goes_on_where_the_clip_ended() -> None:
    """A chunk-wise model behind two chunks of video; one clip per prompt."""
    pipe = pipeline(dataclasses.replace(CHUNK, chunk=2))
    clip = torch.rand(2, 13, 3, 32, 32) * 2 - 1
    parts = list(pipe.stream(PROMPTS, prefix=clip, frames=29))
    assert [part.shape[1] for part in parts] == [13, 8, 8]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"prompts": []}, "at least one prompt"),
        ({"prompts": ""}, "describes nothing"),
        ({"prompts": "a red dog"}, "unknown word 'dog'"),
        ({"frames": 12}, "nearest: 9 or 13"),
        ({"seed": [1, 2]}, "one for each of the 1 prompts, got 2"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"steps": (100, 200)}, "steps must fall"),
        ({"chunk": 9}, "chunk must be at most 4"),
        ({"prefix": torch.zeros(3, 16, 16)}, "32x32 pixels, got 16x16"),
        ({"prefix": torch.zeros(2, 3, 32, 32)}, "1 \\+ 4 n frames, got 2; nearest: 1 or 5"),
        ({"prefix": torch.zeros(3, 1, 3, 32, 32)}, "one clip or one for each of the 1 prompts, got 3"),
        ({"prefix": torch.zeros(3, 32, 32, dtype=torch.uint8)}, "floating point"),
        ({"prefix": torch.zeros(32, 32)}, "the prefix must be"),
    ],
)
def test_bad_requests_fail_before_anything_is_made(request_: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline().stream(**{"prompts": PROMPTS[0], **request_})  # not even iterated


def test_grad_mode_of_the_caller_is_left_alone() -> None:
    stream = pipeline().stream(PROMPTS[0])
    next(stream)
    assert torch.is_grad_enabled()
    stream.close()
    assert torch.is_grad_enabled()


def test_bench_measures() -> None:
    speed = measure(pipeline(), PROMPTS, runs=2)
    assert (speed.frames, speed.batch) == (13, 2)
    assert 0 < speed.first_frame_latency_s < speed.first_frame_latency_with_text_s
    assert speed.generator_throughput > 0 and speed.throughput > 0
    assert (speed.chunk_at_start.count, speed.chunk_at_end.count) == (6, 6) and speed.chunk_at_end.p50 > 0
    assert speed.window_fill == 1.0 and "first pixels" in speed.table() and speed.record()["batch"] == 2
    with pytest.raises(ValueError, match="runs must be at least 1"):
        measure(pipeline(), PROMPTS, runs=0)


def test_bench_counts_the_operations_that_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = small_denoiser().config
    denoiser, cache = small_denoiser(), KVCache(config.layers, Context())
    told = denoiser.prepare(Conditioning(torch.zeros(1, 2, config.text_dim)))
    x = torch.randn(1, 5, config.channels, 16, 16)
    tokens = 16 * 16 // config.patch**2
    first, second = Call((Part(0, 2, 1.0, 0.0),)), Call((Part(2, 3, 1.0, 0.0),))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        denoiser(x[:, :2], torch.zeros(1, 2), told, sizes=(2,), cache=cache)
        cache.commit(2)
        denoiser(x[:, 2:], torch.zeros(1, 3), told, sizes=(3,), start=2, cache=cache)
    expected = sum(operations(call, config, tokens, Context()) for call in (first, second))
    assert 0.8 < expected / counter.get_total_flops() < 1.0  # without embeddings and head, which weigh more when small


# ---- models by name


def test_names(family: Path) -> None:
    assert find("tiny") == family / "frame-2step"
    assert find("tiny/chunk-4step") == family / "chunk-4step"
    assert find(family / "frame-1step") == family / "frame-1step"
    assert list(causalreel.variants()) == ["tiny/chunk-4step", "tiny/frame-1step", "tiny/frame-2step"]
    with pytest.raises(ValueError, match="did you mean 'tiny/frame-2step'"):
        find("tiny/frame-2stp")


@pytest.mark.parametrize(
    ("steps", "chunk", "variant"),
    [
        (None, None, "frame-2step"),
        (1, None, "frame-1step"),
        (4, None, "chunk-4step"),
        (None, 4, "chunk-4step"),
        (2, 4, "chunk-4step"),
        (4, 1, "frame-2step"),
        (None, 1, "frame-2step"),
        ((1000, 400), None, "frame-2step"),
        (None, 3, "chunk-4step"),
    ],
)
def test_steps_and_chunk_choose_the_variant(family: Path, steps: int | None, chunk: int | None, variant: str) -> None:
    assert find("tiny", steps=steps, chunk=chunk).name == variant


def test_load_says_when_it_departs_from_training(family: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="causalreel.infer"):
        exact = causalreel.load("tiny", steps=1, device="cpu")
        assert not caplog.records
        assert exact.sampling.first_steps == (1000, 500)
        near = causalreel.load("tiny", steps=2, chunk=4, device="cpu")
    (record,) = caplog.records
    assert "tiny/chunk-4step was trained for chunk 4, steps 1000, 750, 500, 250" in record.getMessage()
    assert near.sampling == Sampling(4, (1000.0, 500.0))
    assert near.generate(PROMPTS[0]).shape == (1, 45, 3, 32, 32)
    assert near.size == (32, 32)


def test_load_refuses_what_does_not_fit(family: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="device must be cpu, cuda or such as"):
        causalreel.load("tiny", device="tpu9")
    save_export(tmp_path / "x", small_denoiser(), small_export(text="umt6", codec=str(family)))
    with pytest.raises(ValueError, match="unknown text encoder 'umt6'"):
        causalreel.load(tmp_path / "x", device="cpu")
    save_export(tmp_path / "y", small_denoiser(), small_export(codec="../nowhere"))
    with pytest.raises(ValueError, match="no codec at"):
        causalreel.load(tmp_path / "y", device="cpu")


def test_without_embedded_weights_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match="not part of this installation"):
        find("tiny")


def test_a_number_of_steps_never_picks_a_teacher(family: Path) -> None:
    """Teachers that are shipped for training are taken by their full names only."""
    card = (family / "frame-2step/config.yaml").read_text()
    shutil.copytree(family / "frame-2step", family / "ar-frame")
    many = card.replace("multistep: null", "multistep: 48").replace("solver: renoise", "solver: euler")
    (family / "ar-frame/config.yaml").write_text(many)
    assert find("tiny/ar-frame") == family / "ar-frame"
    assert find("tiny", steps=48) == family / "chunk-4step"


@pytest.mark.parametrize("variant", ["frame-2step", "frame-1step", "chunk-4step", "base", "ar-frame", "ar-chunk"])
def test_embedded_models_generate(variant: str) -> None:
    name = f"tiny/{variant}"
    if name not in causalreel.variants():
        pytest.skip(f"the embedded model {name} has not been trained yet")
    pipe = causalreel.load(name, device="cpu")
    video = pipe.generate(PROMPTS[0], frames=9)
    assert tuple(video.shape[-2:]) == (64, 64) == pipe.size
    assert video.std() > 0.1  # a red circle is not a flat picture
    assert pipe.export.provenance


# ---- inputs


def test_pictures_are_fitted(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 20), (255, 0, 0)).save(tmp_path / "red.png")
    frames = read_picture(tmp_path / "red.png", (32, 32))
    assert frames.shape == (1, 3, 32, 32)
    close(frames[0, :, 3, 5], torch.tensor([1.0, -1.0, -1.0]), 1e-5)
    picture = torch.rand(2, 3, 32, 32)
    assert torch.equal(fit(picture, (32, 32)), picture)
    (tmp_path / "bad.png").write_text("no picture")
    with pytest.raises(ValueError, match="cannot be read as a picture"):
        read_picture(tmp_path / "bad.png", (32, 32))
    with pytest.raises(FileNotFoundError, match="no picture at"):
        read_picture(tmp_path / "none.png", (32, 32))


def test_videos_are_cut_to_whole_chunks(tmp_path: Path) -> None:
    from causalreel.data.video import write_video

    write_video(tmp_path / "v.mp4", torch.zeros(15, 3, 32, 32))
    assert read_clip(tmp_path / "v.mp4", (16, 16), unit=1, geometry=GEOMETRY).shape == (13, 3, 16, 16)
    assert read_clip(tmp_path / "v.mp4", (16, 16), unit=3, geometry=GEOMETRY).shape == (9, 3, 16, 16)
    with pytest.raises(ValueError, match="fewer than one chunk"):
        read_clip(tmp_path / "v.mp4", (16, 16), unit=5, geometry=GEOMETRY)


# ---- the package


def test_import_is_light() -> None:
    code = "import sys, causalreel, causalreel.cli; assert 'torch' not in sys.modules; print(causalreel.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_env(), check=True)
    assert done.stdout.strip() == causalreel.__version__


def test_a_command_imports_what_it_uses(tmp_path: Path) -> None:
    code = (
        "import sys; from causalreel.cli import main; "
        f"assert main(['generate', 'a red circle', '--frames', '5', '-o', {str(tmp_path / 'v.mp4')!r}]) == 0; "
        "print('\\n'.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_env(), check=True)
    found = set(done.stdout.split())
    others = {"playing", "live", "measuring", "training", "data"}
    assert "causalreel.cli.videos" in found and not found & {f"causalreel.cli.{name}" for name in others}
    rooms = (
        "causalreel.serve",
        "causalreel.train",
        "causalreel.eval",
        "causalreel.weights.lora",
        "causalreel.codecs.fast",
    )
    outside = ("transformers", "diffusers", "fastapi")
    assert [name for name in found if name.startswith(rooms) or name in outside] == []


def test_torch_is_imported_while_the_collector_rests() -> None:
    code = (
        "import gc; from causalreel.cli import main; {before}assert main(['models']) == 0; "
        "print(gc.isenabled(), gc.get_freeze_count() > 50_000)"
    )

    def said(before: str) -> str:
        command = [sys.executable, "-c", code.format(before=before)]
        done = subprocess.run(command, capture_output=True, text=True, env=_env(), check=True)
        return done.stdout.splitlines()[-1]

    assert said("") == "True True"
    assert said("gc.disable(); ") == "False False"
    assert said("import torch; ") == "True False"


def test_the_default_of_a_family_is_found_without_reading_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    parse = config.parse
    monkeypatch.setattr(config, "parse", lambda text, place: read.append(place) or parse(text, place))
    folder = find("tiny")
    profile("tiny")
    assert {Path(place).parent for place in read} == {folder, folder.parent}


def test_public_names_exist() -> None:
    for name in causalreel.__all__:
        assert getattr(causalreel, name) is not None
        assert name in dir(causalreel)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        causalreel.nothing  # noqa: B018 - the access is what fails
    assert causalreel.Pipeline is Pipeline
    assert LatentSpec(1, 2, 3).shape == (1, 2, 3)


def _env() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(Path(causalreel.__file__).parents[1])}


# ---- prepared text


def test_prepared_guidance_changes_nothing() -> None:
    """Text keys of both rows, computed once, give the bits of keys computed in every call."""
    net, text = small_denoiser(), TinyTextEncoder()
    guided, told = Guided(net, Conditioning(text.null(1)), 3.0), Conditioning(text.encode(PROMPTS))
    prepared = guided.prepare(told)
    x, sigma, sizes = torch.randn(2, 4, 16, 4, 4), torch.full((2, 4), 0.7), (2, 2)
    calls = (
        lambda told: guided(x, sigma, told),
        lambda told: guided(x, sigma, told, sizes=sizes, cache=guided.new_cache()),
        lambda told: guided.teacher_forced(x, sigma, told, clean=x, sizes=sizes),
        lambda told: guided.behind(guided.context_of(x, told, sizes=sizes), x, sigma, told, sizes=sizes),
    )
    for call in calls:
        with torch.no_grad():
            assert torch.equal(call(prepared), call(told))
    call = calls[0]
    call(prepared).sum().backward()  # with gradient the text is projected anew
    assert net.model.blocks[0].cross_attn.k.weight.grad is not None


def test_conditioning_prepared_by_another_denoiser_is_refused() -> None:
    net, text = small_denoiser(), TinyTextEncoder()
    guided, told = Guided(net, Conditioning(text.null(1)), 3.0), Conditioning(text.encode(PROMPTS))
    x, sigma = torch.zeros(2, 1, 16, 4, 4), torch.ones(2, 1)
    with torch.no_grad():
        with pytest.raises(ValueError, match="2 rows was prepared for 4"):
            net(x, sigma, guided.prepare(told))
        with pytest.raises(ValueError, match="4 rows was prepared for 2"):
            guided(x, sigma, net.prepare(told))


@pytest.mark.parametrize("sampling", [FRAME, FULL, dataclasses.replace(FULL, chunk=2, solver="unipc")])
def test_a_clip_projects_its_text_once(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pipeline(sampling)
    counted, project = [], made.denoiser.model.embed_text
    monkeypatch.setattr(made.denoiser.model, "embed_text", lambda text: (counted.append(len(text)), project(text))[1])
    made.generate(PROMPTS)
    assert counted == [2 if sampling.guidance == 1 else 4]
