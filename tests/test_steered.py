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
        pytest.param("w" + 100_000 * " " + "w", "w*2", id="spaces"),  # in time that grows with them alone
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


def poses(**cells: float) -> np.ndarray:
    """Three poses, with numbers of the second one changed: _RC."""
    found = np.tile(np.eye(4), (3, 1, 1))
    for place, number in cells.items():
        found[1, int(place[1]), int(place[2])] = number
    return found


FILES = {
    "few": poses(),
    "scaled": poses(_00=2.0),
    "mirrored": poses(_00=-1.0),
    "nan": poses(_03=np.nan),
    "infinite": poses(_11=np.inf),
    "flat": np.zeros((3, 3)),
    "long": np.tile(np.eye(4, dtype=np.float32), (10_002, 1, 1)),
}
PIXELS = np.array([969.0, 969.0, 960.0, 540.0])
WALKS, FLAT = "tiny/walk", "tiny/frame-1step"


@pytest.mark.parametrize(
    ("model", "words", "told"),
    [
        (WALKS, "--poses few.npy --convention c2w --latent-frames 6", "--poses: leads through 2 latent frames behind"),
        (WALKS, "--trajectory w*2 --dialect minwm --latent-frames 6", "--trajectory: leads through 2 latent frames"),
        (
            WALKS,
            "--keys w*2 --latent-frames 6",
            "--keys: leads through 2 latent frames behind the first, the video has 5",
        ),
        (WALKS, "--poses scaled.npy --convention c2w", "the upper left of pose 1 is no rotation"),
        (WALKS, "--poses mirrored.npy --convention c2w", "the upper left of pose 1 is no rotation"),
        (WALKS, "--poses nan.npy --convention c2w", "pose 1 is not finite"),
        (WALKS, "--poses infinite.npy --convention w2c", "pose 1 is not finite"),
        (WALKS, "--poses flat.npy --convention c2w", "expected numbers"),
        (WALKS, "--poses few.npy", "--poses and --convention"),
        (WALKS, "--poses none.npy --convention c2w", "poses not found"),
        (
            WALKS,
            "--poses long.npy --convention c2w",
            "--poses: leads through 10,001 latent frames behind the first, at",
        ),
        (
            WALKS,
            "--trajectory w*10001 --dialect minwm",
            "leads through 10,001 latent frames, at most 10,000 can be used",
        ),
        (WALKS, "--trajectory w-999999 --dialect sana", "leads through 249,999 latent frames, at most 10,000"),
        (WALKS, "--keys w,lift", "keys: unknown 'lift', did you mean 'left'?; there are w, a, s, d, left, right"),
        (WALKS, "--trajectory w*2 --dialect minvm", "dialect: unknown 'minvm', did you mean 'minwm'?"),
        (WALKS, "--trajectory q*2 --dialect minwm", "trajectory: unknown key 'q'"),
        (WALKS, "--trajectory-file few.npy --dialect minwm", "few.npy is not UTF-8 text"),
        (
            WALKS,
            "--trajectory w --trajectory-file walk.txt --dialect minwm",
            "--trajectory and --trajectory-file exclude",
        ),
        (
            WALKS,
            "--keys w --intrinsics 969,969,960,540",
            "a focal length of 969 as a normalised one; it looks like pixels",
        ),
        (
            WALKS,
            "--poses pixels.npz --convention c2w",
            "a focal length of 969 as a normalised one; it looks like pixels",
        ),
        (WALKS, "--poses two.npz --convention c2w", "two.npz has 2 intrinsics for 3 poses"),
        (WALKS, "--keys w --intrinsics 0.5,0.5,0.5", "--intrinsics: expected fx,fy,cx,cy, four finite numbers"),
        (WALKS, "--keys w --intrinsics nan,1,1,1", "--intrinsics: expected fx,fy,cx,cy, four finite numbers"),
        (WALKS, "--keys w --intrinsics 0,1,1,1", "--intrinsics: expected fx,fy,cx,cy, four finite numbers"),
        (FLAT, "--poses few.npy --convention c2w", "tiny/frame-1step has no camera"),
        (FLAT, "--keys w*3", "tiny/frame-1step has no camera"),
        (FLAT, "--intrinsics 0.5,0.5,0.5,0.5", "tiny/frame-1step has no camera"),
    ],
)
def test_what_a_camera_cannot_follow_is_one_line_before_weights_are_loaded(
    model: str, words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("causalreel.infer.models.load", never)
    monkeypatch.chdir(tmp_path)
    for name, array in FILES.items():
        np.save(f"{name}.npy", array)
    np.savez("pixels.npz", c2w=poses(), intrinsics=PIXELS)
    np.savez("two.npz", c2w=poses(), intrinsics=np.full((2, 4), 0.5))
    Path("walk.txt").write_text("w*2\n")
    prompt = "a red pillar ahead" if model == WALKS else "a red circle"
    told_to = ["generate", prompt, "--model", model, *words.split(), "-o", "x.mp4", "--device", "cpu"]
    assert cli.main(told_to) == 2
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1 and not Path("x.mp4").exists(), said


def test_intrinsics_are_those_that_are_named(tmp_path: Path) -> None:
    """Before those of a file, and for keys too."""
    rows = np.linspace(0.4, 0.6, 12).reshape(3, 4)
    np.savez(tmp_path / "poses.npz", c2w=poses(), intrinsics=rows)
    file = {"poses": tmp_path / "poses.npz", "convention": "c2w"}
    made = Steered(**file).fields(WALK, None)["intrinsics"][0].double()
    torch.testing.assert_close(made, torch.tensor(rows), atol=1e-6, rtol=0)
    for given in (file, {"keys": "w*2"}, {}):
        made = Steered(**given, intrinsics="0.6, 0.7 0.5 0.4").fields(WALK, 3)["intrinsics"]
        assert torch.equal(made, torch.tensor([0.6, 0.7, 0.5, 0.4]).expand(1, 3, 4))


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
