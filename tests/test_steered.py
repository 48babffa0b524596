"""Keys, trajectory strings and pose files on the command line, to the fields of a clip."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from causalreel import cli
from causalreel.codecs.tiny import tiny_codec
from causalreel.control.strings import latent_poses, view_matrices
from causalreel.data.video import write_video
from causalreel.data.video_in import count_frames
from causalreel.data.walk import fields, held, simulate
from causalreel.families import FAMILIES
from causalreel.infer.steered import Steered, read_held
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.masks import Context
from causalreel.types import LatentSpec
from causalreel.weights.export import Export, Sampling, save_export

WALK = FAMILIES["walk"].control
assert WALK is not None


def test_keys_give_the_worlds_fields() -> None:
    made = Steered(keys="w*2, left+w*2,none,d").fields(WALK, None)
    state = simulate(1, seed=0).walking(held([], ["w"], ["w"], ["w", "left"], ["w", "left"], [], ["d"])[None])
    for name, value in fields(state).items():
        torch.testing.assert_close(made[name], value, rtol=0, atol=1e-5)
    assert Steered(keys="w*9").fields(WALK, 4)["w2c"].shape == (1, 4, 4, 4)
    still = Steered().fields(WALK, 3)
    assert torch.equal(still["w2c"], torch.eye(4).expand(1, 3, 4, 4)) and not still["actions"].any()


def test_trajectories_and_poses_go_the_same_way(tmp_path: Path) -> None:
    poses = latent_poses("w*3,l*4", "minwm")
    expected = torch.tensor(view_matrices(poses), dtype=torch.float32)
    told = Steered(trajectory="w*3,l*4", dialect="minwm").fields(WALK, None)
    torch.testing.assert_close(told["w2c"][0], expected, rtol=0, atol=1e-6)
    np.save(tmp_path / "poses.npy", poses)
    read = Steered(poses=tmp_path / "poses.npy", convention="c2w").fields(WALK, None)
    torch.testing.assert_close(read["w2c"], told["w2c"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"keys": "w*3"}, r"leads through 3 latent frames behind the first, the video has 9"),
        ({"keys": "q*3"}, "unknown 'q'"),
        ({"keys": "w*"}, r"expected pieces such as w\*5"),
        ({"keys": "w", "poses": Path("x"), "convention": "c2w"}, "exclude each other"),
        ({"trajectory": "w*3"}, "--trajectory and --dialect go together"),
        ({"poses": Path("x.npy")}, "--convention"),
    ],
)
def test_what_cannot_be_followed_is_one_line(given: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        Steered(**given).fields(WALK, 10)
    assert "\n" not in str(error.value)


def test_keys_are_bounded() -> None:
    assert len(read_held("w*10000", WALK)) == 10_000
    for text in ("w*10001", "w*5000,none*5001", "w*" + "9" * 5000, " ".join(["w*9999"] * 2)):
        with pytest.raises(
            ValueError, match=r"^keys: lead through more than 10,000 latent frames, the most of a clip$"
        ):
            read_held(text, WALK)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("w w w", "w*3"),
        (" w  ,w\tw\n", "w,w,w"),
        ("W*2 left + w * 3 none", "w*2,left+w*3,none*1"),
        ("w *2, left+ w *03", "w*2,left+w*3"),
    ],
)
def test_pieces_stand_behind_commas_or_spaces(text: str, same: str) -> None:
    assert read_held(text, WALK) == read_held(same, WALK)


@pytest.mark.parametrize(
    "text", ["", " ", "w,,w", "w,", "w*", "w 3", "w*0", "w*-1", "+w", "w++a", "w;a", "w*2*3", "\0"]
)
def test_what_are_no_keys_is_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"^keys: (cannot read '.*'|got nothing); expected pieces such as [^\n]*$"):
        read_held(text, WALK)


def test_a_model_without_a_camera_says_so(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert (
        cli.main(["generate", "--keys", "w*3", "a red circle", "-o", str(tmp_path / "x.mp4"), "--device", "cpu"]) == 2
    )
    assert "has no camera" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_course_is_as_long_as_its_clip_and_gives_what_the_network_takes(tmp_path: Path) -> None:
    """A model of cameras without actions; prompts by time and a given video say how long their clips are."""
    family, sampling = FAMILIES["walk"], Sampling(chunk=1, steps=(1000.0,))
    size = replace(family.presets["walk-smoke"], actions=0)
    card = Export("cam", size, sampling, Context(), 6, 16.0, LatentSpec(16, 8, 8), family="walk", text="walk")
    card = replace(card, control=replace(WALK, actions=()))
    save_export(tmp_path / "model", DiTDenoiser(size, context=Context()), card, codec=tiny_codec())
    write_video(tmp_path / "given.mp4", [torch.zeros(9, 3, 64, 64, dtype=torch.uint8)], 16.0)
    prompt = "a red pillar ahead"
    for number, (words, more, frames) in enumerate(
        (
            (f"{prompt}[0.5s] | night sky[0.5s]", [], 13),
            (prompt, ["--video", str(tmp_path / "given.mp4"), "--strength", "0.5"], 9),
            (prompt, ["--keys", "w*2"], 9),
        )
    ):
        output = tmp_path / f"{number}.mp4"
        told = ["generate", words, *more, "--model", str(tmp_path / "model"), "-o", str(output), "--device", "cpu"]
        assert cli.main(told) == 0
        assert count_frames(output, fps=16.0) == frames
