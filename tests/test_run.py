"""Recipes from the command line: every shipped one resolves, the whole chain runs in miniature, kills cost nothing, and
bad input is one clear line on standard error that leaves nothing behind."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import causalreel
from causalreel import cli, config
from causalreel.codecs.tiny import tiny_codec
from causalreel.data.prepare import render_clips
from causalreel.data.shards import Prepared, load_prepared
from causalreel.train.arithmetic import flushes_denormals
from causalreel.train.checkpoint import latest
from causalreel.train.recipe import SETTINGS, Recipe, describe, resolve
from causalreel.weights.export import load_codec, read_export, save_codec, save_export
from patience import PATIENCE_S, wait_until
from test_folders import holder
from test_weights import small_denoiser, small_export

RECIPES = sorted((Path(causalreel.__file__).parent / "recipes").rglob("*.yaml"))
RED = "a large red circle moves right"
SMALL = ("trainer.steps=2", "trainer.device=cpu", "trainer.preview_every=0", "settings.batch=2")
DATA = ("data=data", "codec=codec/export", "rows=null")
FROM_BASE = ("init.student=base/export", "init.teacher=base/export")
DMD = (*FROM_BASE, "init.critic=base/export", "settings.critic_updates=2", "settings.critic_rollouts=1")


def reel(*arguments: str) -> None:
    assert cli.main(list(arguments)) == 0
    assert not flushes_denormals()  # a process computes as before when a command has ended


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a codec, data and a base, all of them trained for two steps."""
    root, before = tmp_path_factory.mktemp("made"), Path.cwd()
    os.chdir(root)
    try:
        reel("train", "tiny/codec", *SMALL, "rows=4", "trainer.out=codec")
        reel("encode", "--codec", "codec/export", "--out", "data", "--clips", "6", "--batch", "4", "--device", "cpu")
        reel("train", "tiny/base", *SMALL, *DATA, "model=tiny-smoke", "trainer.out=base")
    finally:
        os.chdir(before)
    yield root


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with copies of them."""
    for name in ("codec", "data", "base"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- recipes


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_resolve_and_dry_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"{path.parent.name}/{path.stem}"
    recipe = resolve(name)
    assert isinstance(recipe.settings, SETTINGS[recipe.stage])
    trained = {"codec": {"codec"}, "dmd": {"student", "critic"}}.get(recipe.stage, {"student"})
    assert set(recipe.trainer.optimisers) == trained
    is_ready = cli.main(["train", name, "trainer.seed=3", "--dry-run"]) == 0
    shown, errors = capsys.readouterr()
    assert is_ready == (recipe.stage == "codec")
    world = "" if recipe.world == "flat" else f" --world {recipe.world}"
    maker = f"encode{world} --codec {recipe.codec}" if path.parent.name == "tiny" else "prepare VIDEOS"
    rest = "--clips 2048" if path.parent.name == "tiny" else "--model wan2.1-t2v-1.3b"
    assert is_ready or f"`causalreel {maker} --out {recipe.data} {rest}`" in errors
    assert recipe.world == "walk" or "no codec" not in errors
    assert describe(resolve(name, ["trainer.seed=3"])) in shown
    assert config.loads(shown, Recipe) == resolve(name, ["trainer.seed=3"])  # what is printed is a recipe
    assert list(tmp_path.iterdir()) == []


def test_recipes_were_found() -> None:
    assert len(RECIPES) >= 12


def test_a_recipe_survives_yaml() -> None:
    recipe = resolve("tiny/dmd", ["settings.steps=[1000]", "speed=plain"])
    assert config.loads(config.dump(recipe), Recipe) == recipe


# ---- the chain


def test_the_chain_of_causal_rcm_in_miniature(place: Path) -> None:
    """Its three stages and the one in continuous time; exports are sampled as they were trained."""
    small, ar = (*SMALL, *DATA), ("init.student=ar/export", "init.teacher=ar/export")
    reel("train", "tiny/ar", *small, "init.student=base/export", "settings.levels=clip", "trainer.out=ar")
    noisy = ("settings.noisy_from=1", "settings.chunk=1")
    ways = ("settings.levels=continuous", "settings.agrees_with=student", "settings.include_last=false")
    reel("train", "tiny/causal_cd", *small, *ar, *ways, *noisy, "trainer.out=dcm")
    reel("train", "tiny/causal_scm", *small, *ar, *noisy, "trainer.out=scm", "trainer.preview_every=2")
    scores = ("init.critic=base/export", "init.teacher=base/export", "settings.critic_updates=2")
    turns = ("settings.exits=in_turn", *noisy)
    reel("train", "tiny/dmd", *small, *scores, *turns, "init.student=dcm/export", "trainer.out=noisy")
    reel("train", "tiny/dmd", *small, *scores, "init.student=noisy/export", "trainer.out=plain")
    context = {name: read_export(f"{name}/export").sampling.noisy_from for name in ("dcm", "scm", "noisy", "plain")}
    assert context == {"dcm": 1, "scm": 1, "noisy": 1, "plain": None}
    records = [json.loads(line) for line in Path("scm/metrics.jsonl").read_text().splitlines()]
    assert records[-1]["student/tangent"] > 0 and 0 < records[-1]["student/loss"] < 1
    assert Path("scm/previews/step-00000002.mp4").stat().st_size > 0
    for name in ("dcm", "scm", "noisy"):
        reel("generate", RED, "--model", f"{name}/export", "-o", f"{name}.gif", "--device", "cpu", "--scale", "1")


def test_the_whole_chain_in_miniature(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = (*SMALL, *DATA)
    ode = ("settings.pairs=4", "settings.grid=4", "settings.keep=[0,1,2,3]")
    ar = ("init.student=ar/export", "init.teacher=ar/export")
    reel("train", "tiny/ar", *small, "init.student=base/export", "trainer.out=ar")
    reel("train", "tiny/causal_ode", *small, *ar, *ode, "trainer.out=ode")
    reel("train", "tiny/causal_cd", *small, *ar, "trainer.out=cd")
    scores = ("init.critic=base/export", "init.teacher=base/export", "settings.critic_updates=2")
    reel("train", "tiny/dmd", *small, *scores, "init.student=cd/export", "trainer.out=frame", "trainer.preview_every=2")
    reel("train", "tiny/dmd_chunk", *small, *scores, "init.student=ode/export", "trainer.out=chunk")
    assert {path.name for path in Path("frame/previews").iterdir()} == {
        *("step-00000000.mp4", "step-00000000.png", "step-00000002.mp4", "step-00000002.png")
    }
    for name in ("base", "ar", "ode", "cd", "frame", "chunk"):
        export = read_export(f"{name}/export")
        recipe = config.build(Recipe, export.provenance["recipe"])
        assert recipe.trainer.out == Path(name) and export.provenance["seed"] == 0
        assert export.sampling.chunk == {"base": None, "chunk": 3}.get(name, 1)
        few = ["--steps", "2"] if name in ("base", "ar") else []
        reel("generate", RED, "--model", f"{name}/export", "-o", f"{name}.gif", "--device", "cpu", "--scale", "1", *few)
    capsys.readouterr()
    exported = {name: load_file(f"{name}/export/model.safetensors") for name in ("cd", "frame", "base")}
    assert any(not torch.equal(value, exported["frame"][key]) for key, value in exported["cd"].items())
    reel("export", "frame/export", "given", "--name", "mine")
    assert sorted(os.listdir("given")) == ["codec.safetensors", "codec.yaml", "config.yaml", "model.safetensors"]
    reel("train", "tiny/dmd", *small, *scores, "init.student=cd/export", "trainer.out=frame", "trainer.preview_every=2")
    again = load_file("frame/export/model.safetensors")  # the same command again has nothing to do
    assert all(torch.equal(value, again[key]) for key, value in exported["frame"].items())


def test_encoding_goes_on_where_it_stopped(place: Path) -> None:
    def encode(clips: int) -> Prepared:
        reel("encode", "--codec", "codec/export", "--out", "data", "--clips", str(clips), "--device", "cpu")
        return load_prepared("data")

    before = load_prepared("data")
    written = Path("data/latents-00000.safetensors").stat().st_mtime_ns
    assert len(encode(6).latents) == len(encode(2).latents) == 6
    assert Path("data/latents-00000.safetensors").stat().st_mtime_ns == written
    more = encode(8)
    assert len(more.latents) == len(more.captions) == 8 and more.captions[:6] == before.captions
    torch.testing.assert_close(more.latents[:6], before.latents, rtol=1e-2, atol=1e-2)  # other batches, other rounding


def test_a_decoder_trained_alone_keeps_the_latents(place: Path) -> None:
    other = ("rows=4", "data_seed=1", "trainer.out=robust")  # clips that would give other statistics
    reel("train", "tiny/robust_codec", *SMALL, *other, "init.codec=codec/export")
    old, new = load_codec("codec/export"), load_codec("robust/export")
    video = render_clips(2, seed=5, device=torch.device("cpu"))[:, :9].float() / 127.5 - 1
    assert torch.equal(old.encode(video), new.encode(video))  # statistics included
    assert not torch.equal(old.decode(old.encode(video)), new.decode(new.encode(video)))


def test_encoding_with_another_codec_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_codec("other", tiny_codec(seed=7))
    refused(capsys, ["encode", "--codec", "other", "--out", "data", "--device", "cpu"], "codec=", "use another folder")


# ---- killed and started again


def start(*arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(causalreel.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "causalreel", *arguments]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    errors = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 0, errors
    return errors


def kill_at(step: int, delay_s: float, *command: str, out: Path) -> bool:
    """Run and SIGKILL once `step` is in the metrics and `delay_s` is over; whether it was still training then."""
    process, log = start(*command), out / "metrics.jsonl"
    wait_until(
        lambda: process.poll() is not None or (log.is_file() and f'"step": {step},' in log.read_text()),
        "the run to get on",
        every_s=0.001,
    )
    time.sleep(delay_s)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL and latest(out / "checkpoints") != out / "checkpoints/step-00000008"


@pytest.mark.parametrize(
    ("recipe", "more", "followers"),
    [("tiny/causal_cd", FROM_BASE, {"target"}), ("tiny/dmd", DMD, {"average"})],
    ids=["causal CD", "DMD"],
)
def test_killed_and_started_again_is_uninterrupted(
    place: Path, recipe: str, more: tuple[str, ...], followers: set[str]
) -> None:
    """Bit for bit: the export, and in the last checkpoint every role, optimiser, average and data position."""
    keep = ("trainer.steps=8", "trainer.save_every=2", "trainer.log_every=1", "trainer.seed=5")
    command = ("train", recipe, *SMALL, *DATA, *more, *keep)
    whole = start(*command, "trainer.out=whole")
    for _ in range(5):
        step, delay_s = random.randint(3, 6), random.random() * 0.1
        shutil.rmtree("killed", ignore_errors=True)
        if kill_at(step, delay_s, *command, "trainer.out=killed", out=Path("killed")):
            break
    else:
        pytest.fail("the run was always over before it could be killed")
    where = f"killed at step {step} + {delay_s:.3f} s"
    assert not Path("killed/export").exists(), where
    finish(whole)
    assert "resumed" in finish(start(*command, "trainer.out=killed")), where
    models = [load_file(f"{out}/export/model.safetensors") for out in ("whole", "killed")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items()), where
    ends = [latest(Path(out) / "checkpoints") for out in ("whole", "killed")]
    assert all(end is not None and end.name == "step-00000008" for end in ends), where
    names = {path.stem for path in ends[0].glob("*.safetensors")}
    assert names >= {"student", "teacher", *followers}
    for name in names:
        one, two = (load_file(end / f"{name}.safetensors") for end in ends)
        assert all(torch.equal(value, two[key]) for key, value in one.items()), f"{name}, {where}"
    one, two = (torch.load(end / "trainer.pt", weights_only=True) for end in ends)
    assert one["position"] == two["position"] and one["optimisers"].keys() == two["optimisers"].keys()
    for role, state in one["optimisers"].items():
        for index, moments in state["state"].items():
            assert all(torch.equal(v, two["optimisers"][role]["state"][index][k]) for k, v in moments.items()), where


# ---- bad input


def tree(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): path.stat().st_size for path in root.rglob("*") if path.is_file()}


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], *parts: str) -> None:
    """Exit status 2, one line on standard error that has all the parts, and no file made or changed."""
    before = tree(Path())
    capsys.readouterr()
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"causalreel: error: [^\n]+\n", captured.err), captured.err
    assert captured.out == ""
    for part in parts:
        assert part in captured.err, captured.err
    assert tree(Path()) == before


CD = ["train", "tiny/causal_cd", *SMALL, *DATA, *FROM_BASE, "trainer.out=new"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "tiny/causal_dc"], ["no recipe 'tiny/causal_dc'", "did you mean 'tiny/causal_cd'"]),
        (["train", "none.yaml"], ["no file none.yaml"]),
        ([*CD, "sped=plain"], ["unknown key 'sped'", "did you mean 'speed'"]),
        ([*CD, "settings.guidence=2"], ["unknown key 'guidence' in settings", "did you mean 'guidance'"]),
        ([*CD, "trainer.optimisers.student.rate=2"], ["unknown key 'rate' in trainer.optimisers.student"]),
        ([*CD, "settings=3"], ["settings: got 3", "CausalCDConfig"]),
        ([*CD, "stage=cd"], ["stage: got 'cd'", "'causal_cd'"]),
        ([*CD, "settings.batch=two"], ["settings.batch: got 'two'", "expected int"]),
        ([*CD, "settings.chunk=5"], ["multiple of the chunk size 5, got 12", "nearest: 10 or 15"]),
        (
            [*CD, "data=nowhere"],
            ["no prepared data in nowhere", "`causalreel encode --codec codec/export --out nowhere --clips 2048`"],
        ),
        ([*CD, "data=null"], ["needs `data`"]),
        ([*CD, "rows=100"], ["data has 6 clips, 100 were asked for"]),
        ([*CD, "codec=nowhere"], ["no codec at nowhere"]),
        ([*CD, "init.student=nowhere"], ["nowhere is not an export"]),
        ([*CD, "init.critic=base/export"], ["role 'critic'", "causal_cd takes student, teacher"]),
        (
            ["train", "tiny/dmd", *SMALL, *DATA],
            ["runs/tiny/ode-frame/export is not an export", "make it with `causalreel train tiny/causal_ode`"],
        ),
        (
            ["train", "tiny/dmd", *SMALL, *DATA, *DMD, "settings.rollout_precision=fp8"],
            ["settings.rollout_precision: fp8 needs rollouts on the inference path", "bf16 works everywhere"],
        ),
        ([*CD, "init.student=tiny/bsae"], ["tiny/bsae is not an export", "embedded models are", "tiny/base"]),
        ([*CD, "rows=0"], ["rows: got 0"]),
        ([*CD, "trainer.optimisers.critic.lr=1"], ["no role 'critic'"]),
        ([*CD, "trainer.out=base/export/config.yaml/x"], ["cannot write to base", "config.yaml is a file"]),
        (["train", "tiny/base", *SMALL, *DATA, "model=tinny"], ["unknown model preset 'tinny'"]),
        (["train", "tiny/codec", *SMALL, "rows=4", "model=wan2.1"], ["the codec stage trains only 'tiny'"]),
        (["train", "tiny/codec", *SMALL, "rows=4", "settings.frames=16", "trainer.out=new"], ["frames", "16"]),
        (["encode", "--codec", "codec/export", "--out", "no", "--named", "1"], ["--same-background", "give --events"]),
        (["train", "tiny/codec", *SMALL, "settings.patterns=1.5"], ["patterns must be 0 to 1, got 1.5"]),
        (["train", "tiny/codec", *SMALL, "settings.decoder_only=true"], ["settings.decoder_only", "init.codec"]),
        (["encode", "--codec", "nowhere", "--out", "new"], ["no codec at nowhere"]),
        (["encode", "--codec", "codec/export", "--out", "new", "--clips", "0"], ["clips must be at least 1"]),
        (["encode", "--codec", "codec/export", "--out", "new", "--batch", "0"], ["batch must be at least 1"]),
        (["encode", "--codec", "codec/export", "--out", "data", "--seed", "9"], ["world_seed=0", "use another folder"]),
        (["encode", "--codec", "codec/export", "--out", "base/export/config.yaml"], ["base/export/config.yaml"]),
        (["eval", "nowhere", "--out", "new"], ["unknown model 'nowhere'"]),
        (["eval", "--guidance", "2", "--out", "new"], ["--guidance is for --control and --changes"]),
        (["eval", "--long", "--guidance", "2", "--out", "new"], ["--guidance is for --control and --changes"]),
        (["eval", "base/export", "--clips", "1"], ["clips must be at least 2"]),
        (["eval", "base/export", "--batch", "0"], ["batch must be at least 1"]),
        (["eval", "base/export", "--out", "base/export/config.yaml", "--device", "cpu"], ["base/export/config.yaml"]),
        (["export", "nowhere", "new"], ["nowhere is not an export"]),
        (["generate", "", "--model", "base/export"], ["describes nothing"]),
        (["generate", RED, "--model", "base/export", "--frames", "44"], ["got 44", "41 or 45"]),
        (["generate", RED, "--model", "base/export", "-o", "base/export/config.yaml/x.mp4"], ["cannot write"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    refused(capsys, arguments, *parts)


def test_a_second_process_in_a_folder_is_refused_and_touches_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reel(*CD)
    half = Path(f"new/checkpoints/.causalreel-{'0' * 8}-1-12345678.partial")  # of another machine
    half.mkdir()
    (half / "student.safetensors").write_text("half")
    commands = {
        "new": [*CD, "settings.guidance=1.5"],
        "data": ["encode", "--codec", "codec/export", "--out", "data", "--clips", "9", "--device", "cpu"],
        "scores": ["eval", "base/export", "--out", "scores", "--clips", "2", "--device", "cpu"],
        "given": ["export", "base/export", "given"],
    }
    for folder, command in commands.items():
        process = holder(Path(folder))
        try:
            refused(capsys, command, f"{folder} is in use by process {process.pid}")
        finally:
            process.kill()
            process.communicate()
    assert cli.main(commands["new"]) == 2 and "settings.guidance" in capsys.readouterr().err
    reel(*CD)
    assert not half.exists() and not Path("new/.lock").exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_weights_data_and_captions(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, whole = Path("base/export/model.safetensors"), Path("base/export/model.safetensors").read_bytes()
    cut(weights)
    refused(capsys, CD, "base/export/model.safetensors", "cut off")
    weights.write_bytes(whole)

    captions = Path("data/latents-00000.txt")
    lines = captions.read_text()
    captions.write_text(lines.replace(lines.splitlines()[2], "a large red dog moves right"))
    refused(capsys, CD, "captions of data", "latents-00000.txt, line 3", "unknown word 'dog'")
    captions.write_text("\n".join(lines.splitlines()[:4]) + "\n")
    refused(capsys, CD, "6 latents but 4 captions")
    captions.write_text(lines)

    cut(Path("data/latents-00000.safetensors"))
    refused(capsys, CD, "latents-00000.safetensors is damaged", "causalreel encode")
    cut(Path("codec/export/codec.safetensors"))
    refused(capsys, CD, "codec.safetensors", "cut off")


def test_weights_of_another_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file of another size under this config; and a model that the data do not fit."""
    sizes = {"wide": {"dim": 96}, "thin": {"channels": 4}, "deaf": {"text_dim": 32}}
    for name, change in sizes.items():
        model = config.build(type(read_export("base/export").model), {**config.to_dict(small_export().model), **change})
        latent = small_export().latent if name != "thin" else type(small_export().latent)(4, 8, 8)
        save_export(name, small_denoiser(model), small_export(name, model=model, latent=latent))
    refused(capsys, [*CD, "init.student=thin"], "student takes 4 latent channels", "the data have 16")
    refused(capsys, [*CD, "init.teacher=deaf"], "teacher takes 16 latent channels and text of width 32")
    shutil.copy("wide/model.safetensors", "base/export/model.safetensors")
    refused(capsys, CD, "base/export/model.safetensors", "holds the weights of 'wide'")
    save_file(load_file("wide/model.safetensors"), "base/export/model.safetensors")  # without the name in it
    refused(capsys, CD, "base/export/model.safetensors", "another model size")


def test_a_damaged_checkpoint_and_another_recipe(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reel(*CD)
    shutil.rmtree("new/export")
    more = [*CD, "trainer.steps=4"]
    refused(capsys, [*more, "settings.guidance=1.5"], "settings.guidance (2.0 there, 1.5 here)", "use another out")
    refused(capsys, [*more, "rows=5"], "rows")
    file = Path("new/checkpoints/step-00000002/student.safetensors")
    cut(file)
    refused(capsys, more, "student.safetensors", "instead of", "delete new/checkpoints/step-00000002")


def test_a_loss_that_is_not_finite_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latents = load_file("data/latents-00000.safetensors")["latents"]
    save_file({"latents": latents.float() * 1e30}, "data/latents-00000.safetensors")
    assert cli.main([*CD, "trainer.log_every=1"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"causalreel: error: step 1, role 'student': the loss is (nan|inf)", last)
    assert latest(Path("new/checkpoints")) is None and not Path("new/export").exists()
