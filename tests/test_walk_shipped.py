"""`tiny/walk` and `tiny/walk-1step` as they come with the package: by name everywhere, and their pictures go where keys
say."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import causalreel
from causalreel import cli
from causalreel.data.video import write_video
from causalreel.data.video_in import count_frames
from causalreel.data.walk import WalkState, captions, fields, held, simulate, there_and_back
from causalreel.data.walk_render import paint
from causalreel.eval.control import pose_errors, psnr
from causalreel.fingerprint import fingerprint
from causalreel.infer.pipeline import Pipeline
from causalreel.train.initial import open_start
from causalreel.weights.export import ASSETS, load_export, read_export
from causalreel.weights.re_export import re_export

NAME = "tiny/walk"
FASTER = "tiny/walk-1step"
PROMPT = "a red pillar ahead, a blue block right, sand floor, day sky"

if not {NAME, FASTER} <= causalreel.variants().keys():
    pytest.skip(f"{NAME} is not part of this installation", allow_module_level=True)


@pytest.fixture(scope="module", params=[NAME, FASTER])
def pipeline(request: pytest.FixtureRequest) -> Pipeline:
    return causalreel.load(request.param, device="cpu")


def made(pipeline: Pipeline, state: WalkState) -> Tensor:
    """Pictures of latent frames (B,F,3,H,W) behind a true first one."""
    first = paint(state, state.yaw[:, :1], state.at[:, :1])
    frames = 1 + 4 * (state.yaw.shape[1] - 1)
    return pipeline.generate(captions(state), seed=0, prefix=first, fields=fields(state), frames=frames)[:, ::4]


def test_it_turns_as_its_keys_say_and_finds_back(pipeline: Pipeline) -> None:
    """Held-out scenes: four turns to the right and four back, behind a true first picture."""
    scenes = simulate(4, seed=0, held_out=True)
    there = held([], *[["right"]] * 4)
    state = scenes.walking(there_and_back(there[None]).expand(4, -1, -1))
    pictures = made(pipeline, state)
    found = pose_errors(pictures[:, :5], state.walking(there[None].expand(4, -1, -1)))
    assert found["yaw error"].nanmean() < 3  # a key turns by 12 degrees
    assert psnr(pictures[:, -1], pictures[:, 0]).mean() > 30  # standing elsewhere is below 22
    assert math.isclose(float(state.yaw[0, 4]), math.radians(48), abs_tol=1e-4)


def test_they_are_small_and_say_what_they_are() -> None:
    files = [path for name in (NAME, FASTER) for path in (ASSETS / name).iterdir()]
    assert {path.name for path in files} == {"config.yaml", "model.safetensors", "codec.safetensors", "codec.yaml"}
    assert len(files) == 5  # one codec and one set of weights for both
    assert max(path.stat().st_size for path in files) < 16e6
    for name, steps in ((NAME, 2), (FASTER, 1)):
        card = read_export(name)
        assert card.name == name and card.family == "walk" and card.sampling.chunk == 1
        assert len(card.sampling.steps) == steps and len(card.sampling.first_steps or ()) == 4
        assert card.provenance["recipe"]["stage"] == "dmd" and card.provenance["metrics"]["clips"] >= 64


def test_the_faster_one_makes_what_it_makes_with_weights_of_its_own(tmp_path: Path) -> None:
    """Bit for bit, and training knows both starts by one fingerprint."""
    codec = str((ASSETS / NAME / "codec.safetensors").resolve())
    own = re_export(FASTER, tmp_path / "own", codec=codec)
    assert (own / "model.safetensors").is_file() and read_export(own).weights_of is None
    shared, whole = (causalreel.load(model, device="cpu") for model in (FASTER, own))
    states = [pipeline.denoiser.model.state_dict() for pipeline in (shared, whole)]
    assert fingerprint(states[0]) == fingerprint(states[1]) == fingerprint(load_export(NAME)[0].model.state_dict())
    clips = [pipeline.generate(PROMPT, seed=1, frames=13) for pipeline in (shared, whole)]
    assert torch.equal(*clips)
    assert open_start(Path(FASTER)).fingerprint() == open_start(own).fingerprint()


def test_every_command_knows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def reel(*words: str) -> str:
        assert cli.main(list(words)) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    one, two, three = (tmp_path / f"{name}.mp4" for name in ("keys", "string", "stream"))
    here = ("--model", NAME, "--device", "cpu")
    reel("generate", PROMPT, *here, "--keys", "right*2,w", "-o", str(one))
    assert count_frames(one, fps=16.0) == 13
    start = tmp_path / "start.mp4"
    write_video(start, (torch.zeros(1, 3, 64, 64)), 16.0)
    reel("generate", PROMPT, *here, "--trajectory", "w*2", "--dialect", "minwm", "--video", str(start), "-o", str(two))
    (tmp_path / "keys").write_text("0.25 w left\n0.5\n")
    reel("stream", PROMPT, *here, "--keys", str(tmp_path / "keys"), "--seconds", "1", "-o", str(three))
    assert count_frames(three, fps=16.0) >= 16
    assert {NAME, FASTER} <= set(reel("models", "--names").splitlines())
    assert "needed" in reel("estimate", "--model", NAME)
    reel("export", NAME, str(tmp_path / "mine"), "--name", "mine", "--steps", "1")
    mine = read_export(tmp_path / "mine").sampling
    assert mine.steps == (1000.0,) and len(mine.first_steps or ()) == 4
    assert causalreel.load(tmp_path / "mine", device="cpu").generate(PROMPT, frames=5).shape[1] == 5
    reel("export", str(tmp_path / "mine"), str(tmp_path / "more"), "--first-steps", "5")
    more = read_export(tmp_path / "more").sampling
    assert more.steps == mine.steps and more.first_steps == (1000.0, 800.0, 600.0, 400.0, 200.0)
    reel("export", str(tmp_path / "more"), str(tmp_path / "listed"), "--step-list", "1000", "190")
    listed = read_export(tmp_path / "listed").sampling
    assert listed.steps == (1000.0, 190.0) and listed.first_steps == more.first_steps
    reel("export", str(tmp_path / "mine"), str(tmp_path / "mean"), "--mean-with", str(tmp_path / "more"), FASTER)
    marks = read_export(tmp_path / "mean").provenance["mean_of"]
    assert list(marks) == ["mine", str(tmp_path / "more"), FASTER]
    for wrong, message in ((["190", "1000"], "steps"), (["1000", "190", "--steps", "2"], "give one of them")):
        assert cli.main(["export", NAME, str(tmp_path / "wrong"), "--step-list", *wrong]) != 0
        assert message in capsys.readouterr().err and not (tmp_path / "wrong").exists()
    assert cli.main(["export", "tiny/base", str(tmp_path / "base"), "--first-steps", "5"]) != 0
    said = capsys.readouterr().err
    assert "first_steps is of a few-step model that makes clips chunk by chunk" in said and said.count("\n") == 1
    assert not (tmp_path / "base").exists()
