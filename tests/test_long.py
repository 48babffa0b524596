"""Drift: windows of a stream, numbers by hand, real clips, files, pictures and VBench-Long's names."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalreel import cli
from causalreel.codecs.wan_vae import CausalVAE
from causalreel.data.video import write_video
from causalreel.data.world import captions, render, simulate
from causalreel.eval.curve_picture import draw
from causalreel.eval.frames import STATISTICS, frame_statistics
from causalreel.eval.long import RENEW, of_file, of_model, record, run, stream, table
from causalreel.eval.vbench import export, videos
from causalreel.eval.windows import EXACT, Long, Windows, curves, drift_error, ending, last_minus_first
from causalreel.foreign import read_json
from causalreel.infer.models import load
from causalreel.weights.export import Sampling, save_codec, save_export
from causalreel.weights.files import read_tensors
from test_weights import SMALL_CODEC, small_denoiser, small_export


def parts(video: Tensor, *sizes: int) -> list[Tensor]:
    """A video (B,T,3,H,W) in parts of these sizes, the last for all further ones."""
    cut, start = [], 0
    while start < video.shape[1]:
        size = sizes[min(len(cut), len(sizes) - 1)]
        cut.append(video[:, start : start + size])
        start += size
    return cut


def test_statistics_are_those_by_hand() -> None:
    picture = torch.zeros(1, 2, 3, 4, 4)
    picture[0, 0] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]  # red
    picture[0, 1, :, :, :2] = 1.0  # half white, half black
    found = {name: values[0].tolist() for name, values in frame_statistics(2 * picture - 1).items()}
    assert tuple(found) == STATISTICS
    assert found["brightness"] == pytest.approx([0.2126, 0.5]) and found["contrast"] == pytest.approx([0.0, 0.5])
    assert found["saturation"] == pytest.approx([1.0, 0.0])
    assert found["colourfulness"] == pytest.approx([0.3 * math.hypot(1.0, 0.5), 0.0], abs=1e-6)
    assert found["sharpness"] == pytest.approx([0.0, 1.0], abs=1e-6)  # the Laplacian is -1 and 1
    assert math.isnan(found["motion"][0]) and found["motion"][1] == pytest.approx((1 - 0.2126 + 0.2126) / 2)
    again = frame_statistics(2 * picture[:, 1:] - 1, 2 * picture[:, 0] - 1)["motion"]
    assert again[0, 0].item() == pytest.approx(found["motion"][1])


@pytest.mark.parametrize("sizes", [(1,), (9, 12), (45, 48), (1000,)])
def test_windows_do_not_depend_on_how_the_stream_is_cut(sizes: tuple[int, ...]) -> None:
    video = torch.rand(2, 30, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found, whole = curves(parts(video, *sizes), Windows(9, 8)), frame_statistics(video)
    for name in STATISTICS:
        expected = [whole[name][:, a:b].nanmean(1) for a, b in ((0, 9), (9, 17), (17, 25))]  # the last 5 fill none
        torch.testing.assert_close(found[name], torch.stack(expected, 1))


def test_real_clips_do_not_drift_and_broken_ones_do() -> None:
    state = simulate(3, seed=1, held_out=True)
    video, told = render(state), captions(state)
    found = curves(parts(video, 1, 4), Windows(21, 12), told)
    assert set(found) == {*STATISTICS, *EXACT} and found["follow"].shape == (3, 3)
    assert found["follow"].min() == 1.0 and last_minus_first(found["follow"]).abs().max() == 0
    assert last_minus_first(found["quality"]).abs().max() < 0.03
    fading = video * torch.linspace(1, 0.2, video.shape[1])[:, None, None, None]
    worse = curves(parts(fading, 1, 4), Windows(21, 12), told)
    assert (last_minus_first(worse["saturation"]) < -0.01).all() and worse["follow"][:, -1].max() < 0.5


def test_a_short_video_is_one_window_and_none_is_refused() -> None:
    video = torch.zeros(1, 5, 3, 8, 8)
    assert curves([video], Windows(9, 8))["contrast"].shape == (1, 1)
    with pytest.raises(ValueError, match="no frame"):
        curves([], Windows(9, 8))
    with pytest.raises(ValueError, match="at least 1 frame"):
        Windows(0, 8)


def test_drift_errors_are_those_by_hand() -> None:
    values = torch.tensor([[2.0, 1.0, 2.0, 4.0], [0.0, 1.0, 1.0, 1.0]])
    error = drift_error(values)
    assert error[0].item() == (3 * 1 + 2 * 0 + 1 * 2) / 2 and error[1].isinf()
    assert drift_error(values, weights="log")[0].item() == pytest.approx((math.log(3) * 1 + 0 + 0) / 2)
    assert drift_error(values[:, :1]).tolist() == [0.0, 0.0]
    assert last_minus_first(values).tolist() == [2.0, 1.0]
    assert ending(values, 4)[0].item() == 4.0 and ending(torch.arange(10.0)[None], 10)[0].item() == 8.5
    with pytest.raises(ValueError, match="linear or log"):
        drift_error(values, weights="cubic")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random chunk-wise model of 32x32 pixels, beside its codec."""
    root = tmp_path_factory.mktemp("models")
    save_codec(root, CausalVAE(SMALL_CODEC))
    sampling = Sampling(4, (1000.0,))
    save_export(root / "chunk", small_denoiser(), small_export("chunk", sampling))
    return root / "chunk"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, model: Path) -> tuple[list[Long], Path]:
    out = tmp_path_factory.mktemp("long") / "drift"
    file = out.parent / "clip.mp4"
    write_video(file, render(simulate(1, seed=3))[0], 16)
    how = {"lengths": 2, "policies": ("memrope", RENEW), "clips": 2, "seed": 5, "device": "cpu", "window_s": 1.0}
    return run([f"c={model}"], out=out, files=[file], **how), out


def test_the_folder_holds_every_window(made: tuple[list[Long], Path]) -> None:
    rows, out = made
    assert [row.label for row in rows] == ["c, memrope", "c, renew", "clip.mp4"]
    assert [row.count for row in rows] == [2, 2, 2]
    told, clips = read_json(out / "drift.json"), read_tensors(out / "drift.safetensors")
    for row in rows:
        assert told["rows"][row.label] == record(row)
        assert set(told["rows"][row.label]["metrics"]) == set(row.curves)
        torch.testing.assert_close(clips[f"{row.label}/motion"], row.curves["motion"], equal_nan=True)
    assert (out / "drift.md").read_text() == table(rows) + "\n"
    from PIL import Image

    with Image.open(out / "drift.png") as picture:
        assert picture.width > 600 and picture.height > 400


def test_the_first_window_is_what_eval_says_of_the_clip(made: tuple[list[Long], Path], model: Path) -> None:
    """And under every policy the same, up to rounding: nothing has left the context yet."""
    from causalreel.data.world import prompts
    from causalreel.eval.metrics import measure

    pipeline = load(model, device="cpu")
    told = prompts(2, seed=5)
    clip = measure(pipeline.generate(told, seed=[5, 6]), told)
    for row in made[0][:2]:
        for name in EXACT:
            torch.testing.assert_close(row.curves[name][:, 0], getattr(clip, name), atol=2e-3, rtol=0)


def test_streams_together_are_the_streams_alone(model: Path) -> None:
    pipeline = load(model, device="cpu")
    told = ["a large red circle moves right", "a small blue square moves left slowly"]
    both = torch.cat(list(stream(pipeline, told, [1, 2], 2, RENEW)), 1)
    alone = torch.cat(list(stream(pipeline, told[1:], [2], 2, RENEW)), 1)
    assert both.shape[1] == 45 + 48 and (both[1:] - alone).abs().max() < 2e-3


def test_parts_can_be_watched(model: Path) -> None:
    pipeline, seen = load(model, device="cpu"), []
    how = {"prompts": ["a large red circle"], "seeds": [1], "lengths": 1, "batch": 1}
    row = of_model(pipeline, "x", way="", watch=lambda number, part: seen.append((number, part.shape[1])), **how)
    assert seen == [(0, 13), (1, 16), (2, 16)] and row.seconds > 0


def test_what_is_not_there_in_time_is_left_out(model: Path) -> None:
    """A window at least, and as many as all batches have, the same numbers as of whole clips."""
    pipeline = load(model, device="cpu")
    how = {"way": "memrope", "prompts": ["a large red circle", "a blue square"], "seeds": [1, 2], "lengths": 3}
    cut, whole = (of_model(pipeline, "x", batch=1, until=until, **how) for until in (0.0, math.inf))
    assert (cut.count, whole.count) == (1, 3)
    for name in EXACT:
        torch.testing.assert_close(cut.curves[name], whole.curves[name][:, :1], equal_nan=True)


def test_files_of_any_size_and_rate_are_measured(tmp_path: Path) -> None:
    video = torch.rand(20, 3, 50, 70, generator=torch.Generator().manual_seed(0)) * 2 - 1
    write_video(tmp_path / "a.mp4", video, 10)
    row = of_file(tmp_path / "a.mp4", window_s=0.5)
    assert row.count == 4 and set(row.curves) == set(STATISTICS)  # 2 s at 16 frames/s
    (tmp_path / "no.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match=r"no\.mp4"):
        of_file(tmp_path / "no.mp4")


def test_a_picture_of_nothing_known_is_drawn(tmp_path: Path) -> None:
    rows = [Long("a", {"follow": torch.full((2, 3), float("nan"))}), Long("b", {"motion": torch.zeros(1, 1)})]
    draw(rows, ("follow", "motion"), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 500


# ---- VBench-Long


def test_names_are_those_that_vbench_finds(tmp_path: Path) -> None:
    wanted = videos(["a cat, running", "two dogs"], samples=2, seed=7)
    assert [(one.name, one.seed) for one in wanted] == [
        *(("a cat, running-0.mp4", 7), ("a cat, running-1.mp4", 8)),
        *(("two dogs-0.mp4", 7), ("two dogs-1.mp4", 8)),
    ]
    folder, asked = tmp_path / "videos", []

    def make(one):
        asked.append(one.name)
        yield torch.zeros(1, 3, 3, 16, 16)

    how = {"fps": 16.0, "facts": {"model": "x"}}
    assert [path.name for path in export(wanted, folder, make, **how)] == [one.name for one in wanted]
    assert sorted(path.name for path in folder.iterdir()) == sorted(one.name for one in wanted)  # and nothing else
    manifest = read_json(tmp_path / "videos.json")
    assert manifest["facts"]["model"] == "x" and manifest["videos"][1]["seed"] == 8
    (folder / wanted[2].name).unlink()
    assert [path.name for path in export(wanted, folder, make, **how)] == [wanted[2].name]  # goes on
    with pytest.raises(ValueError, match="of other videos"):
        list(export(wanted, folder, make, fps=16.0, facts={"model": "y"}))
    (folder / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"nothing but its videos, got 'notes\.txt'"):
        list(export(wanted, folder, make, **how))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a/b", "no file name"),
        ("two\nlines", "no file name"),
        ("snake_case", "cuts names"),
        ("route-66", "takes for an index"),
        ("x" * 250, "more than 255 bytes"),
        (" a", "begin or end with a blank"),
    ],
)
def test_names_that_vbench_would_lose_are_one_line(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        videos(["fine", prompt])
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith("prompt 2")
    with pytest.raises(ValueError, match="is prompt 1 again"):
        videos(["fine", "fine"])


# ---- the command


def test_the_command_makes_videos_for_vbench(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a large red circle moves right\n\n")
    how = ["--prompt-file", str(tmp_path / "prompts.txt"), "--vbench", str(tmp_path / "v"), "--samples", "2"]
    how += ["--lengths", "1", "--device", "cpu"]
    assert cli.main(["eval", str(model), "--long", *how]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert cli.main(["eval", str(model), "--long", *how]) == 0
    assert capsys.readouterr().out == ""  # they are there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--policies", "memrope"], "--policies is for --long"),
        (["--long", "--vbench", "v"], "--vbench and --prompt-file go together"),
        (["--long", "--metrics", "m.py"], "--metrics is for clips"),
        (["--long", "--lengths", "0"], "lengths"),
        (["--long", "--policies", "memrop"], "did you mean 'memrope'"),
        (["tiny/base", "--long", "--clips", "2"], "needs an autoregressive model"),
        (["--long", "--videos", "none.mp4"], r"none\.mp4"),
        (["tiny", "tiny", "--long"], "two rows would be called 'tiny'"),
    ],
)
def test_what_cannot_be_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert re.search(message, told) and told.count("error:") == 1
    assert not (tmp_path / "out" / "drift.json").exists()


def test_drift_measures_no_clips_beside_others(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from benchmarks import drift

    asked = argparse.Namespace(out=tmp_path, lengths=100, clips=32, seeds=[0, 1, 2])
    (tmp_path / "a.memrope.safetensors").touch()
    there = {"clips": 32, "seeds": [0, 1, 2]}
    (tmp_path / "a.memrope.json").write_text(json.dumps(there))  # of before lengths were told
    drift.check_alike(asked)
    (tmp_path / "a.memrope.json").write_text(json.dumps({**there, "lengths": 2}))
    with pytest.raises(SystemExit, match=r"--lengths: got 100, but .*safetensors has 2; take another --out"):
        drift.check_alike(asked)
