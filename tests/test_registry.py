"""Released models: their rows, their files, and pipelines of them at full structure and small size.

No network: the hub is a stand-in, text encoder and codec loaders are stand-ins, and the presets are shrunk.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

import causalreel
from causalreel import cli
from causalreel.codecs.wan_vae import CausalVAE, VAEConfig
from causalreel.data.video_in import read_video
from causalreel.families import FAMILIES, MODELS, owner_of, released, wan21
from causalreel.families.family import Decoder, ReleasedModel
from causalreel.families.files import model_files
from causalreel.infer import released as building
from causalreel.infer.models import load, request_for
from causalreel.infer.released import TwoCodecs, choose_dtype
from causalreel.infer.schedule import schedule
from causalreel.nn.policies.rolling_forcing import RollingForcing
from causalreel.nn.presets import ModelConfig
from causalreel.text.fixed import FixedTextEncoder
from causalreel.types import Geometry, LatentSpec
from causalreel.weights import hub, identify
from causalreel.weights.build import random_denoiser
from causalreel.weights.export import Export, save_export
from causalreel.weights.hub import HubFile
from test_cli import fails

SMALL = ModelConfig(dim=16, ffn_dim=24, heads=2, layers=2, text_dim=8, text_length=6, freq_dim=16)
LARGE = ModelConfig(dim=24, ffn_dim=24, heads=2, layers=3, text_dim=8, text_length=6, freq_dim=16)
CODEC = VAEConfig(dim=4, res_blocks=1)
SIDES = ("--height", "32", "--width", "48", "--device", "cpu")
FAST = {"height": 32, "width": 48, "device": "cpu"}
CF_2STEP = "causal-forcing/framewise-2step"


class Codecs:
    """Stands in for the loaders of codecs: a small VAE for every file."""

    def __init__(self) -> None:
        self.read: list[Path] = []

    def __call__(self, path: Path) -> CausalVAE:
        self.read.append(Path(path))
        return codec()


def codec() -> CausalVAE:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CausalVAE(CODEC)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small presets, an empty cache, no network, stand-ins for the parts; the working directory is empty."""
    codecs, family = Codecs(), FAMILIES["wan21"]
    small = dataclasses.replace(
        family,
        presets={"wan-1.3b": SMALL, "wan-14b": LARGE},
        decoders={name: Decoder(CODEC, row.file, codecs) for name, row in family.decoders.items()},
        text=dataclasses.replace(family.text, open=text_encoder),
    )
    monkeypatch.setitem(FAMILIES, "wan21", small)
    for model in family.models:
        monkeypatch.setitem(MODELS, model.name, (small, model))
    monkeypatch.setattr(identify, "PRESETS", small.presets)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda repo, path: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "check_connection", lambda endpoint: None)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def text_encoder(places: Sequence[Path], device: torch.device, cache: Path | None, stays: bool) -> FixedTextEncoder:
    assert places[0].exists() and all(place.parent.is_dir() for place in places)
    return FixedTextEncoder(SMALL.text_length, SMALL.text_dim, device)


def row(name: str) -> ReleasedModel:
    return MODELS[name][1]


def export(name: str, **sides: int) -> Export:
    family, model = MODELS[name]
    return family.export(model, **sides)


def unreachable(repo: str, path: str) -> str:
    raise ConnectionError("no route\nto the hub. Try again later.")


def wan_dir(folder: Path) -> Path:
    """Wan2.1's folder as it is released, without anything in the files."""
    for file in (wan21.VAE_FILE, wan21.TEXT_FILE, wan21.TAEHV_FILE, *wan21.TOKENIZER_FILES):
        (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.path).write_bytes(b"x")
    return folder


def weights(path: Path, *keys: str, config: ModelConfig = SMALL) -> Path:
    """A released .pt with these top-level keys, random and different from each other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    inside = {
        key: {f"model.{n}": v for n, v in random_denoiser(config, seed=i).model.state_dict().items()}
        for i, key in enumerate(keys)
    }
    torch.save(inside, path)
    return path


# --------------------------------------------------------------------------------------------------------- the rows


@pytest.mark.parametrize(
    ("name", "path", "which"),
    [
        ("causal-forcing/chunkwise", "chunkwise/causal_forcing.pt", "generator"),
        ("causal-forcing/framewise", "framewise/causal_forcing.pt", "generator_ema"),
        ("causal-forcing/framewise-2step", "causal-forcing++/framewise-2step.pt", "generator_ema"),
        ("causal-forcing/framewise-1step", "causal-forcing++/framewise-1step.pt", "generator_ema"),
        ("causal-forcing/longvideo", "chunkwise/longvideo.pt", "generator_ema"),
        ("causal-forcing/chunkwise-ar-diffusion", "chunkwise/ar_diffusion.pt", "generator"),
        ("causal-forcing/framewise-ar-diffusion", "framewise/ar_diffusion.pt", "generator"),
        ("causal-forcing/chunkwise-causal-ode", "chunkwise/causal_ode.pt", "generator"),
        ("causal-forcing/framewise-causal-cd", "framewise/causal_cd.pt", None),
        ("self-forcing", "checkpoints/self_forcing_dmd.pt", "generator_ema"),
        ("wan2.1-t2v-1.3b", "diffusion_pytorch_model.safetensors", None),
    ],
)
def test_files_and_the_weights_inside(name: str, path: str, which: str | None) -> None:
    model = released(name)[1]
    assert [file.path for file in model.files] == [path] and model.which == which
    repo = {"causal": "zhuhz22/Causal-Forcing", "self": "gdhe17/Self-Forcing", "wan2.1": "Wan-AI/Wan2.1-T2V-1.3B"}
    assert model.repo == repo[name.split("-")[0]]


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("causal-forcing/chunkwise", 28),
        ("causal-forcing/framewise", 84),
        ("causal-forcing/framewise-2step", 44),
        ("causal-forcing/framewise-1step", 24),
        ("self-forcing", 28),
        ("causal-forcing/chunkwise-ar-diffusion", 350),
        ("wan2.1-t2v-14b", 50),
        ("causal-forcing/longvideo", 28),
        ("causal-rcm/framewise-2step-noisy", 44),
        ("causal-rcm/chunkwise-2step", 16),
    ],
)
def test_denoising_calls_of_a_training_clip(name: str, calls: int) -> None:
    """Network evaluations that the releases need for 21 latent frames, beside those that only write the cache."""
    model = released(name)[1]
    plan = list(schedule(model.sampling, Geometry(16, 8, 4), trained=model.frames).plan(fused=False))
    assert sum(part.sigma_next is not None for call in plan for part in call.parts) == calls
    assert model.sampling.shift == 5 and model.frames == 21 and FAMILIES["wan21"].fps == 16


def test_the_page_lists_them_all() -> None:
    page = (Path(__file__).parents[1] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    for name, (_, model) in MODELS.items():
        assert f"`{model.files[0].path}`" in rows[name], name
        inside = {"generator": "| raw |", "generator_ema": "| averaged |", None: "|"}[model.which]
        assert inside in rows[name], name
        assert (
            str(model.sampling.multistep or len(model.sampling.steps)) in rows[name] or model.sampling.plan == "rolling"
        )
    assert {name for name in rows if name.startswith("causal-forcing/")} <= {*MODELS}


def test_rows_are_complete() -> None:
    for name, (family, model) in MODELS.items():
        made = family.export(model)
        assert made.name == name and (made.latent.height, made.latent.width) == (60, 104)
        assert made.text == "umt5" and made.codec == "wan" and made.family == "wan21"
        assert (model.sampling.guidance > 1) == (model.sampling.multistep is not None)
    assert len(row("wan2.1-t2v-14b").files) == 7
    with pytest.raises(
        ValueError, match=r"unknown model 'causal-forcing/chunk'; did you mean 'causal-forcing/chunkwise'"
    ):
        released("causal-forcing/chunk")


@pytest.mark.parametrize(("height", "width"), [(481, 832), (480, 840), (0, 832), (8, 16), (-480, 832)])
def test_sides_are_multiples_of_sixteen(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=r"multiples of 16, got (height|width) -?\d+.*; nearest: \d+ x \d+"):
        export("self-forcing", height=height, width=width)


def test_other_sides_change_the_latent_only() -> None:
    wide = export("self-forcing", height=720, width=1280)
    assert (wide.latent.height, wide.latent.width) == (90, 160)
    assert dataclasses.replace(wide, latent=LatentSpec(16, 60, 104)) == export("self-forcing")


def test_owners_are_known_by_the_last_names_of_a_path() -> None:
    assert owner_of("/x/checkpoints/framewise/causal_forcing.pt") is row("causal-forcing/framewise")
    assert owner_of("checkpoints/self_forcing_dmd.pt") is row("self-forcing")
    assert owner_of("causal_forcing.pt") is None and owner_of("diffusion_pytorch_model.safetensors") is None


# -------------------------------------------------------------------------------------------------------- the files


def test_local_files_need_no_hub(place: Path) -> None:
    model = row(CF_2STEP)
    path = weights(place / "own.pt", "generator_ema")
    files = model_files(FAMILIES["wan21"], model, weights=path, wan_dir=wan_dir(place / "wan"))
    assert files.weights == path and files.codec == place / "wan/Wan2.1_VAE.pth"
    assert files.text[1].parent == place / "wan/google/umt5-xxl" and files.encoder is None
    fast = model_files(FAMILIES["wan21"], model, weights=path, wan_dir=place / "wan", decoder="taehv")
    assert fast.codec == place / "wan/taew2_1.pth" and fast.encoder == files.codec


def test_a_folder_in_the_layout_of_a_diffusers_pipeline(place: Path) -> None:
    folder = place / "pipe"
    for name in ("vae/x", "text_encoder/x", "tokenizer/tokenizer.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    files = model_files(*MODELS[CF_2STEP], weights=weights(place / "own.pt", "generator"), wan_dir=folder)
    assert (files.codec, files.text[0], files.text[1].parent) == (
        folder / "vae",
        folder / "text_encoder",
        folder / "tokenizer",
    )


def test_the_base_model_lies_in_its_own_folder(place: Path) -> None:
    folder = wan_dir(place / "wan")
    (folder / "diffusion_pytorch_model.safetensors").write_text("x")
    files = model_files(*MODELS["wan2.1-t2v-1.3b"], wan_dir=folder)
    assert files.weights == folder / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"wan2.1-t2v-14b needs 7 files \(about 57.2 GB\)"):
        model_files(*MODELS["wan2.1-t2v-14b"], wan_dir=folder)


def test_missing_files_are_fetched_once_each(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repo: str, path: str) -> str:
        asked.append((repo, path))
        target = place / "cache" / repo / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"x")
        return str(target)

    def cached(repo: str, path: str) -> str | object:
        found = place / "cache" / repo / path
        return str(found) if found.is_file() else object()  # the hub's mark for "known not to exist"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", cached)
    for _ in range(2):
        files = model_files(*MODELS["wan2.1-t2v-14b"])
    assert files.weights == place / "cache/Wan-AI/Wan2.1-T2V-14B"
    assert asked == [
        (file.repo, file.path)
        for file in (
            *row("wan2.1-t2v-14b").files,
            wan21.VAE_FILE,
            wan21.TEXT_FILE,
            *wan21.TOKENIZER_FILES,
        )
    ]


def test_no_connection_is_noticed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's client, which would try for long, is not even asked."""
    monkeypatch.undo()
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args: pytest.fail("asked"))
    with pytest.raises(hub.HubError, match=r"no connection to 127\.0\.0\.1: Connection refused"):
        hub.download(wan21.VAE_FILE)


def commands(message: str) -> list[str]:
    """The shell commands of the message."""
    return re.search(r"run: (.*) ; then", message)[1].split(" && ")  # type: ignore[index]


def test_an_offline_machine_gets_all_commands_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError) as caught:
        model_files(*MODELS[CF_2STEP], decoder="taehv")
    message = str(caught.value)
    assert "HF_HUB_OFFLINE is set" in message and "\n" not in message
    assert commands(message) == [
        "hf download zhuhz22/Causal-Forcing causal-forcing++/framewise-2step.pt --local-dir checkpoints",
        "hf download lightx2v/Autoencoders taew2_1.pth --local-dir wan_models/Wan2.1-T2V-1.3B",
        "hf download Wan-AI/Wan2.1-T2V-1.3B models_t5_umt5-xxl-enc-bf16.pth --local-dir wan_models/Wan2.1-T2V-1.3B",
        'hf download Wan-AI/Wan2.1-T2V-1.3B --include "google/umt5-xxl/*" --local-dir wan_models/Wan2.1-T2V-1.3B',
    ]
    assert message.endswith(
        "--model causal-forcing/framewise-2step --weights checkpoints/causal-forcing++/framewise-2step.pt "
        "--wan-dir wan_models/Wan2.1-T2V-1.3B --decoder taehv"
    )


def test_the_message_names_only_what_is_missing(place: Path) -> None:
    folder = wan_dir(place / "wan")
    (folder / "Wan2.1_VAE.pth").unlink()
    path = weights(place / "own.pt", "generator_ema")
    with pytest.raises(ValueError) as caught:
        model_files(*MODELS[CF_2STEP], weights=path, wan_dir=folder)
    assert "ConnectionError: no route to the hub" in str(caught.value)
    assert commands(str(caught.value)) == [f"hf download Wan-AI/Wan2.1-T2V-1.3B Wan2.1_VAE.pth --local-dir {folder}"]
    assert f"--wan-dir {folder}" in str(caught.value)


def test_the_large_model_is_fetched_as_a_folder() -> None:
    with pytest.raises(ValueError) as caught:
        model_files(*MODELS["wan2.1-t2v-14b"])
    first = commands(str(caught.value))[0]
    assert first.count("-of-00006.safetensors") == 6 and first.endswith("--local-dir wan_models/Wan2.1-T2V-14B")
    assert "--weights wan_models/Wan2.1-T2V-14B " in str(caught.value)


def test_without_the_hub_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"huggingface_hub is not installed \(pip install 'causalreel\[wan\]'\)"):
        model_files(*MODELS[CF_2STEP])
    assert hub.find(HubFile("a/b", "c", 1.0)) is None


# ---------------------------------------------------------------------------------------------------- the pipelines


def test_a_random_model_needs_no_files() -> None:
    seen = []
    pipe = load(CF_2STEP, weights="random", **FAST, before_loading=lambda export, device: seen.append((export, device)))
    assert [(export.name, device.type) for export, device in seen] == [(CF_2STEP, "cpu")]
    assert pipe.size == (32, 48) and pipe.sampling == row(CF_2STEP).sampling
    assert {parameter.dtype for parameter in pipe.denoiser.parameters()} == {torch.float32}
    video = pipe.generate("anything", frames=9)
    assert video.shape == (1, 9, 3, 32, 48) and video.isfinite().all() and video.std() > 0
    assert torch.equal(video, load(CF_2STEP, weights="random", **FAST).generate("something else", frames=9))


@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "causal-forcing/chunkwise-ar-diffusion"])
def test_many_step_models_run_with_guidance(name: str) -> None:
    pipe = load(name, weights="random", steps=2, **FAST)
    assert pipe.sampling.multistep == 2 and pipe.sampling.guidance > 1
    assert pipe.generate("x", frames=9).isfinite().all()


def test_a_hook_can_refuse_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(export: object, device: torch.device) -> None:
        raise ValueError("12 GB are missing")

    monkeypatch.setattr(building, "random_denoiser", lambda *args, **how: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="12 GB are missing"):
        load(CF_2STEP, weights="random", **FAST, before_loading=refuse)


@pytest.mark.parametrize(
    ("name", "which", "seed"),
    [
        ("causal-forcing/chunkwise", None, 0),
        ("causal-forcing/framewise", None, 1),
        ("causal-forcing/framewise", "generator", 0),
        ("causal-forcing/chunkwise-causal-cd", None, 0),
    ],
)
def test_the_weights_that_the_release_means(name: str, which: str | None, seed: int, place: Path) -> None:
    path = weights(place / "own.pt", "generator", "generator_ema")
    pipe = load(name, weights=path, wan_dir=wan_dir(place / "wan"), which=which, **FAST)
    wanted = random_denoiser(SMALL, seed=seed).model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in pipe.denoiser.model.state_dict().items())


def test_bare_weights_need_no_key(place: Path) -> None:
    from causalreel.weights.convert import convert

    convert(weights(place / "own.pt", "generator"), place / "bare.safetensors", "wan")
    convert(place / "own.pt", place / "own", "diffusers", heads=2)
    for path in (place / "bare.safetensors", place / "own"):
        pipe = load(CF_2STEP, weights=path, wan_dir=wan_dir(place / "wan"), **FAST)
        assert pipe.generate("x", frames=5).shape[1] == 5


def test_the_wrong_stage_is_said(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = wan_dir(place / "wan")
    path = weights(place / "framewise/ar_diffusion.pt", "generator")
    with pytest.raises(ValueError) as caught:
        load(CF_2STEP, weights=path, wan_dir=folder, **FAST)
    assert "no weights called 'generator_ema'; it has generator" in str(caught.value)
    assert "by its name it is the file of causal-forcing/framewise-ar-diffusion: --model causal" in str(caught.value)
    with caplog.at_level("WARNING", "causalreel"):
        load("causal-forcing/chunkwise", weights=path, wan_dir=folder, **FAST)
    assert "is used as causal-forcing/chunkwise; by its name it is the file of causal" in caplog.text
    caplog.clear()
    load("causal-forcing/framewise-ar-diffusion", weights=path, wan_dir=folder, **FAST)
    assert not caplog.records


def test_another_size_is_said_with_the_models_that_have_it(place: Path) -> None:
    path = weights(place / "own.pt", "generator", config=LARGE)
    with pytest.raises(ValueError) as caught:
        load("causal-forcing/chunkwise", weights=path, wan_dir=wan_dir(place / "wan"), **FAST)
    assert "another model size: it looks like wan-14b (width 24, 3 blocks)" in str(caught.value)
    assert "give --model NAME of that size: wan2.1-t2v-14b" in str(caught.value)


def test_taehv_decodes_and_the_vae_encodes(place: Path) -> None:
    path = weights(place / "own.pt", "generator_ema")
    pipe = load("causal-forcing/framewise", weights=path, wan_dir=wan_dir(place / "wan"), decoder="taehv", **FAST)
    codecs = FAMILIES["wan21"].own.read
    assert isinstance(pipe.codec, TwoCodecs) and isinstance(codecs, Codecs)
    assert [file.name for file in codecs.read] == ["taew2_1.pth"]
    video = pipe.generate("x", frames=5, prefix=torch.zeros(3, 32, 48))
    assert video.shape[1] == 5 and [file.name for file in codecs.read] == ["taew2_1.pth", "Wan2.1_VAE.pth"]
    pipe.generate("x", frames=5, prefix=torch.zeros(3, 32, 48))
    assert len(codecs.read) == 2


def test_a_model_of_a_rolling_window_generates_by_itself(place: Path) -> None:
    pipe = load("causal-forcing/longvideo", weights="random", **FAST)
    chunks = list(pipe.latents("x", frames=93))
    assert pipe.export.context == RollingForcing() and pipe.sampling.plan == "rolling"
    assert [chunk.start for chunk in chunks] == list(range(0, 24, 3))
    assert all(chunk.latents.isfinite().all() for chunk in chunks)


def test_two_codecs_are_one() -> None:
    one, other = codec(), codec()
    both = TwoCodecs(one, lambda: other)
    latents = torch.randn(1, 2, 16, 4, 4)
    video: Tensor = one.decode(latents)
    assert torch.equal(both.decode(latents), video) and torch.equal(both.stream()(latents), one.stream()(latents))
    assert torch.equal(both.encode(video), other.encode(video))
    assert both.geometry == Geometry(16, 8, 4)


def test_what_only_released_models_take(place: Path) -> None:
    with pytest.raises(ValueError, match="height, width: only for released models"):
        causalreel.load("tiny", height=480, width=832, device="cpu")
    with pytest.raises(ValueError, match="decoder must be wan or taehv, got 'vae'"):
        load(CF_2STEP, weights="random", decoder="vae", **FAST)
    with pytest.raises(ValueError, match=r"weights not found: none\.pt"):
        load(CF_2STEP, weights="none.pt", **FAST)
    with pytest.raises(ValueError, match=r"folder of wan21's files is not there: none"):
        load(CF_2STEP, wan_dir="none", **FAST)
    with pytest.raises(ValueError, match="did you mean 'causal-forcing/framewise'"):
        load("causal-forcing/frame-wise", device="cpu")


def test_a_gpu_without_bfloat16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_dtype(torch.device("cpu")) == torch.float32
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match="Tesla T4 has no bfloat16"):
        choose_dtype(torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype(torch.device("cuda:1")) == torch.bfloat16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_random_weights_are_made_on_the_gpu_in_bfloat16() -> None:
    pipe = load(CF_2STEP, weights="random", height=32, width=48, device="cuda")
    assert {(p.device.type, p.dtype) for p in pipe.denoiser.parameters()} == {("cuda", torch.bfloat16)}
    assert pipe.generate("x", frames=9).isfinite().all()


# ------------------------------------------------------------------------------------------------- the command line


def generate(*arguments: str) -> int:
    return cli.main(["generate", *arguments, *SIDES])


@pytest.mark.parametrize(
    ("arguments", "frames"),
    [
        (["--model", CF_2STEP, "--frames", "9"], 9),
        (["--model", CF_2STEP, "--num-output-frames", "3"], 9),
        (["--model", CF_2STEP, "--latent-frames", "3"], 9),
        (["--model", CF_2STEP, "--total-blocks", "3"], 9),
        (["--model", "causal-forcing/chunkwise", "--blocks", "2"], 21),
    ],
)
def test_lengths_in_pixels_latents_and_chunks(arguments: list[str], frames: int) -> None:
    assert generate("x", "--weights", "random", *arguments, "-o", "a.mp4", "--scale", "1") == 0
    video, fps = read_video("a.mp4")
    assert video.shape == (frames, 3, 32, 48) and fps == 16
    assert os.listdir() == ["a.mp4"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--height", "481"], ["positive multiples of 16", "height 481", "nearest: 480 x 48"]),
        (["--model", "causal-forcing/framewise3"], ["unknown model", "did you mean 'causal-forcing/framewise'"]),
        (["--weights", "missing.pt"], ["weights not found: missing.pt"]),
        (["--weights", "cut.pt", "--wan-dir", "wan"], ["cut.pt", "zip directory"]),
        (["--weights", "shards", "--wan-dir", "wan"], ["shorter than its header says"]),
        (["--weights", "large.pt", "--wan-dir", "wan"], ["another model size", "wan2.1-t2v-14b"]),
        (["--weights", "critic.pt", "--wan-dir", "wan"], ["no weights called 'generator_ema'; it has critic"]),
        (["--weights", "random", "--blocks", "2", "--frames", "9"], ["exclude each other"]),
        (["--weights", "random", "--blocks", "0"], ["blocks must be at least 1"]),
        (["--weights", "random", "--model", "wan2.1-t2v-1.3b", "--blocks", "1"], ["whole clips"]),
        (["--weights", "random", "--image", "text.png"], ["text.png cannot be read as a picture"]),
        ([], ["needs 7 files", "hf download"]),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from causalreel.weights.convert import write_folder

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    wan_dir(Path("wan"))
    weights(Path("large.pt"), "generator_ema", config=LARGE)
    weights(Path("critic.pt"), "critic")
    Path("cut.pt").write_bytes(weights(Path("whole.pt"), "generator_ema").read_bytes()[:20_000])
    write_folder(Path("shards"), random_denoiser(SMALL).model.state_dict(), SMALL, "wan", shard_bytes=9_000)
    shard = sorted(Path("shards").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    Path("text.png").write_text("no picture")
    before = sorted(map(str, Path().rglob("*")))
    arguments = arguments if "--model" in arguments else ["--model", CF_2STEP, *arguments]
    sides = [] if "--height" not in arguments else ["--width", "48", "--device", "cpu"]
    assert (cli.main(["generate", "x", *arguments, *sides]) if sides else generate("x", *arguments)) == 2
    fails(capsys, *parts)
    assert sorted(map(str, Path().rglob("*"))) == before


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models"]) == 0
    shown = capsys.readouterr().out
    for name, (_, model) in MODELS.items():
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert model.files[0].path in line and model.what in line and f"{model.size_gb:.1f}" in line
    assert re.search(r"framewise-1step .* 1 \(first chunk 4\) .* generator_ema", shown)
    assert re.search(r"chunkwise-ar-diffusion .* 50 unipc, guidance 3 .* generator ", shown)
    assert cli.main(["models", "--names"]) == 0
    assert set(MODELS) < set(capsys.readouterr().out.split())


def test_an_export_of_ones_own_finds_the_files_of_its_family(place: Path) -> None:
    made = load(CF_2STEP, weights="random", **FAST)
    folder = save_export(
        place / "mine", made.denoiser, dataclasses.replace(made.export, name="mine"), dtype=torch.float32
    )
    files = wan_dir(place / "wan")
    again = load(folder, wan_dir=files, device="cpu")
    assert again.size == (32, 48) and again.export.family == "wan21" and again.export.codec == "wan"
    assert torch.equal(again.generate("x", frames=5), made.generate("x", frames=5))
    fast = load(folder, wan_dir=files, decoder="taehv", device="cpu")
    assert isinstance(fast.codec, TwoCodecs)
    request = request_for(folder, form="eager")
    assert request.decoder == CODEC and request.text_encoder == "cpu" and dict(request.decoders) == {"taehv": CODEC}
    (files / wan21.TEXT_FILE.path).unlink()
    with pytest.raises(ValueError, match=r"mine needs 1 files .*models_t5_umt5-xxl-enc-bf16.pth"):
        load(folder, wan_dir=files, device="cpu")
    with pytest.raises(ValueError, match="height: only for released models"):
        load(folder, wan_dir=files, height=64, device="cpu")
    with pytest.raises(ValueError, match="decoder must be wan or taehv, got 'vae'"):
        load(folder, wan_dir=files, decoder="vae", device="cpu")


def test_messages_name_the_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    family, model = MODELS["causal-forcing/framewise-1step"]
    other = dataclasses.replace(family, name="other")
    with pytest.raises(ValueError, match="the folder of other's files is not there: nowhere"):
        model_files(other, model, wan_dir="nowhere")
