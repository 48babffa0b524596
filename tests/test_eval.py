"""Evaluation as a whole: random models against a few held-out prompts; rows, columns and files, not the numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from causalreel import cli
from causalreel.codecs.tiny import tiny_codec
from causalreel.eval import run as evaluation
from causalreel.eval.registry import METRICS, clip_scores, metric
from causalreel.eval.run import COLUMNS, REFERENCES, Row, parse_model, run, table, with_steps
from causalreel.foreign import read_json
from causalreel.infer.models import load
from causalreel.types import LatentSpec
from causalreel.weights.export import Sampling, save_codec, save_export
from causalreel.weights.files import read_tensors
from test_weights import small_denoiser, small_export

FRAME = Sampling(1, (1000.0,))
CHUNK = Sampling(4, (1000.0, 500.0), first_steps=(1000.0,))
WHOLE = Sampling(None, multistep=2, solver="euler", guidance=2.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of random models of 64x64 pixels, with their codec."""
    root = tmp_path_factory.mktemp("models")
    save_codec(root, tiny_codec())
    for name, sampling in {"frame": FRAME, "chunk": CHUNK, "whole": WHOLE}.items():
        save_export(root / name, small_denoiser(), small_export(name, sampling, latent=LatentSpec(16, 8, 8)))
    return root


@pytest.fixture(scope="module")
def result(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], Path]:
    out = tmp_path_factory.mktemp("eval") / "a" / "b"
    specs = [f"frame-wise={models / 'frame'}@2", f"whole={models / 'whole'}"]
    return run(specs, out=out, clips=4, seed=7, batch=3, device="cpu"), out


def test_the_table_has_a_row_per_reference_and_model(result: tuple[list[Row], Path]) -> None:
    rows, out = result
    lines = (out / "table.md").read_text().splitlines()
    header, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert header == ["model", *COLUMNS, "frechet"]
    assert [row[0] for row in body] == [*REFERENCES, "frame-wise", "whole"] == [row.label for row in rows]
    assert all(len(row) == len(header) and row[-1] == "n/a" for row in body)  # 4 clips say nothing of a distribution
    assert "\n".join(lines) == table(rows)


def test_real_clips_follow_their_captions(result: tuple[list[Row], Path]) -> None:
    real, _, *made = result[0]
    assert real.clips["follow"].mean() >= 0.98 and real.clips["direction"].nanmean() >= 0.98
    assert real.seconds == 0 and all(row.seconds > 0 for row in made)
    assert all(row.clips["follow"].mean() < 0.5 for row in made)  # random weights show nothing


def test_files_hold_every_clip_and_every_metric(result: tuple[list[Row], Path]) -> None:
    rows, out = result
    assert {path.name for path in out.iterdir()} == {
        *("scores.json", "scores.safetensors", "table.md"),
        *("real-clips.png", "codec-reconstruction.png", "frame-wise.png", "whole.png"),
    }
    record = read_json(out / "scores.json", what="scores")  # which takes no NaN
    assert record["models"]["whole"]["frechet"] is None
    assert record["facts"]["clips"] == 4 and record["facts"]["seed"] == 7
    assert list(record["models"]) == [row.label for row in rows]
    for row in record["models"].values():
        assert {*COLUMNS, "frechet", "seconds"} <= set(row) and row["frechet"] is None
        assert set(row["follow"]) == {"mean", "stderr", "low", "high", "count"}
    clips = read_tensors(out / "scores.safetensors")
    assert clips["frame-wise/follow"].shape == (4,)
    assert torch.equal(clips["real clips/follow"], rows[0].clips["follow"].float())


def test_clips_depend_on_their_number_not_on_the_batch(models: Path) -> None:
    pipeline = load(models / "frame", device="cpu")
    prompts = ["a large red circle moves right"] * 3
    whole = evaluation.sample(pipeline, prompts, seed=5, batch=3)
    parts = evaluation.sample(pipeline, prompts, seed=5, batch=2)
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-3)
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize(
    ("spec", "parsed"),
    [
        ("tiny", ("tiny", "tiny", None)),
        ("tiny/frame-1step", ("tiny/frame-1step", "tiny/frame-1step", None)),
        ("tiny@2", ("tiny@2", "tiny", 2)),
        ("cd=runs/cd/export", ("cd", "runs/cd/export", None)),
        ("cd at 2=runs/cd/export@2", ("cd at 2", "runs/cd/export", 2)),
        ("me@home/export", ("me@home/export", "me@home/export", None)),
        ("a=me@home/export@4", ("a", "me@home/export", 4)),
        ("a=b=c", ("a=b", "c", None)),
    ],
)
def test_parse_model(spec: str, parsed: tuple[str, str, int | None]) -> None:
    assert parse_model(spec) == parsed


def test_with_steps_gives_the_first_frame_four_steps_frame_wise_only(models: Path) -> None:
    frame, chunk, whole = (load(models / name, device="cpu") for name in ("frame", "chunk", "whole"))
    four = (1000.0, 750.0, 500.0, 250.0)
    assert with_steps(frame, None) is frame
    assert with_steps(frame, 1).sampling == replace(FRAME, first_steps=four)
    assert with_steps(frame, 2).sampling == replace(FRAME, steps=(1000.0, 500.0), first_steps=four)
    assert with_steps(frame, 4).sampling == replace(FRAME, steps=four)
    assert with_steps(chunk, 2).sampling == replace(CHUNK, first_steps=None)
    assert with_steps(whole, 2).sampling == Sampling(None, (1000.0, 500.0))


def test_names_must_differ(models: Path, tmp_path: Path) -> None:
    for specs in ([f"a={models / 'frame'}", f"a={models / 'chunk'}"], [f"real clips={models / 'frame'}"]):
        with pytest.raises(ValueError, match="two rows would be called"):
            run(specs, out=tmp_path / "out", clips=4, device="cpu")
    with pytest.raises(ValueError, match="name at least one model"):
        run([], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_enough_clips_have_a_distance(monkeypatch: pytest.MonkeyPatch, models: Path) -> None:
    monkeypatch.setattr(evaluation, "FRECHET_CLIPS", 4)
    rows, _, _ = evaluation.evaluate({"a": load(models / "frame", device="cpu")}, clips=4, seed=7, batch=4)
    assert all(row.frechet is not None and row.frechet > 0 for row in rows)
    assert "n/a" not in table(rows)


METRIC_FILE = """
from causalreel.eval.registry import metric

@metric("brightness")
def brightness(video, prompts):
    return video.mean((1, 2, 3, 4))

@metric("words", in_table=False)
def words(video, prompts):
    return video.new_tensor([len(prompt.split()) for prompt in prompts])
"""


@pytest.fixture
def no_metrics() -> Iterator[None]:
    """What a test enters is gone behind it."""
    before = dict(METRICS)
    yield
    METRICS.clear()
    METRICS.update(before)


def test_a_metric_of_ones_own_is_in_table_and_files(
    models: Path, tmp_path: Path, no_metrics: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(METRIC_FILE)
    asked = ["eval", f"a={models / 'frame'}", "--clips", "3", "--device", "cpu", "--metrics", str(tmp_path / "mine.py")]
    assert cli.main([*asked, "--out", str(tmp_path / "out")]) == 0
    header, _, real, *_ = capsys.readouterr().out.splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    assert names == ["model", *COLUMNS, "brightness", "frechet"]
    record = read_json(tmp_path / "out" / "scores.json", what="scores")["models"]
    clips = read_tensors(tmp_path / "out" / "scores.safetensors")
    for row in record.values():
        assert row["brightness"]["count"] == 3 and row["words"]["mean"] > 3
    assert record["real clips"]["brightness"]["mean"] == pytest.approx(clips["real clips/brightness"].mean().item())
    shown = real.split("|")[names.index("brightness") + 1]
    assert float(shown) == pytest.approx(record["real clips"]["brightness"]["mean"], abs=1e-3)


def test_metrics_that_cannot_be(tmp_path: Path, no_metrics: None, capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in {
        "follow": "there is a metric called 'follow'",
        "a|b": "small letters",
        "": "small letters",
    }.items():
        with pytest.raises(ValueError, match=said):
            metric(name)
    metric("flat")(lambda video, prompts: video)
    with pytest.raises(ValueError, match=r"metric flat must give a tensor \(1,\), .*; got \(1, 2, 3, 8, 8\)"):
        clip_scores(torch.zeros(1, 2, 3, 8, 8), ["a red circle"])
    (tmp_path / "none.py").write_text("x = 1\n")
    (tmp_path / "bad.py").write_text("x = (\n")
    (tmp_path / "absent.py").write_text("import nothing_like_it\n")
    for name, said in {"bad.py": "bad.py stopped: SyntaxError", "absent.py": "stopped: ModuleNotFoundError"}.items():
        assert cli.main(["eval", "--metrics", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    for file, said in {
        "none.py": "enters no metric",
        "gone.py": "must be a Python file",
        ".": "must be a Python file",
    }.items():
        assert cli.main(["eval", "--metrics", str(tmp_path / file), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
