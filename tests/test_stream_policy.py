"""Context policies of live streams, from the command line to the replay file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from causalreel import cli, families
from causalreel.data.video_in import read_video
from causalreel.files import write_text
from causalreel.foreign import read_json
from causalreel.infer.live import Policy
from causalreel.infer.models import load, profile, request_for
from causalreel.nn.policies.registry import described, policy_from
from causalreel.nn.policies.window import Context
from causalreel.serve.emitted import Emitted
from causalreel.serve.session import Session

RED = "a large red circle moves right"
INFINITY = (
    "infinity-rope:cache_chunks=11,sink_chunks=1,last_position=11,flush_every=0,cut_shift=21,shifts_single_frames=true"
)
CHUNKS, ROOM = "tiny/chunk-4step", "window must hold the sink and the chunk's 3 frames: got window=4, sink=2"
GIVEN = ("--video", "given.mp4", "--strength")


@pytest.mark.parametrize(
    ("policy", "kind", "context"),
    [
        ("memrope", "slide", "memrope:sink=1,local=8,alpha_long=0.01,alpha_short=0.1"),
        ("renew", "renew", "full"),
        (None, "slide", INFINITY),
    ],
)
def test_a_stream_takes_a_policy_and_its_record_makes_it_again(
    policy: str | None, kind: str, context: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = [] if policy is None else ["--policy", policy]
    record, shown, again = (str(tmp_path / name) for name in ("r.json", "a.mp4", "b.mp4"))
    told = ["stream", RED, "--device", "cpu", "--frames", "53", "-o", shown, "--record", record, *how]
    assert cli.main(told) == 0
    found = read_json(record)
    assert (found["policy"], found["context"]) == (kind, context)
    capsys.readouterr()
    assert cli.main(["replay", record, "--device", "cpu", "-o", again]) == 0
    assert "may differ" not in capsys.readouterr().err
    (first, _), (second, _) = read_video(shown), read_video(again, frames=53)
    assert (first - second[:53]).abs().max() == 0


def test_a_record_with_chunks_of_its_own_keeps_the_policy_that_holds_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two frames hold a chunk of one, and none of the model's own three."""
    record, shown, again = (str(tmp_path / name) for name in ("r.json", "a.mp4", "b.mp4"))
    how = ["--model", CHUNKS, "--chunk", "1", "--policy", "window:window=2", "--frames", "9"]
    assert cli.main(["stream", RED, "--device", "cpu", "-o", shown, "--record", record, *how]) == 0
    assert cli.main(["replay", record, "--device", "cpu", "-o", again]) == 0
    assert "may differ" not in capsys.readouterr().err
    assert (read_video(shown)[0] - read_video(again)[0]).abs().max() == 0


def recorded(tmp_path: Path, *how: str) -> Path:
    path = tmp_path / "r.json"
    told = ["stream", RED, "--device", "cpu", "--frames", "5", "-o", str(tmp_path / "a.mp4"), "--record", str(path)]
    assert cli.main([*told, *how]) == 0
    return path


@pytest.mark.parametrize(
    ("how", "model", "context"),
    [
        ([], CHUNKS, INFINITY.replace("cache_chunks=11", "cache_chunks=3")),
        (["--policy", "memrope:alpha_long=0.02"], CHUNKS, "memrope:sink=3,local=4,alpha_long=0.02,alpha_short=0.1"),
        (["--policy", "sink:window=9"], CHUNKS, "sink:window=9,sink=3"),
        (["--policy", "sink", "--model", CHUNKS], "tiny/frame-1step", "sink:window=12,sink=1"),
        (["--policy", "sink", "--model", CHUNKS, "--chunk", "1"], "tiny/frame-1step", "sink:window=12,sink=1"),
        (["--policy", "sink:sink=2"], "tiny/frame-1step", "sink:window=12,sink=2"),
    ],
)
def test_another_model_replays_with_numbers_of_its_own(
    how: list[str], model: str, context: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for those that were named."""
    record, again, made = recorded(tmp_path, *how), str(tmp_path / "b.mp4"), []
    replayed = Session.replayed

    def noted(session: Session) -> Iterator[Emitted]:
        made.append(described(session.video.policy.context))
        return replayed(session)

    monkeypatch.setattr(Session, "replayed", noted)
    assert cli.main(["replay", str(record), "--model", model, "--device", "cpu", "-o", again]) == 0
    assert made == [context]


def test_numbers_that_may_not_suit_the_model_that_replays_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, again = recorded(tmp_path, "--policy", "sink:window=4,sink=2"), tmp_path / "b.mp4"
    line = ["replay", str(record), "--device", "cpu", "-o", str(again), "--model"]
    capsys.readouterr()
    assert cli.main([*line, CHUNKS]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and ROOM in told and "sink:window=4,sink=2, does not suit" in told, told
    assert "--policy names another" in told and not again.exists()
    write_text(record, json.dumps({**read_json(record), "model": "mine/one"}))
    assert cli.main([*line, "tiny/frame-1step"]) == 0
    assert "those of mine/one, which is not here; --policy sink has this model's own" in capsys.readouterr().err
    for context in (INFINITY, "full"):  # what this model has in any case, and what has no numbers
        write_text(record, json.dumps({**read_json(record), "context": context}))
        assert cli.main([*line, "tiny/frame-1step"]) == 0
        assert "mine/one, which is not here" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["stream", RED, "--policy", "memrop", "--frames", "5", "-o", "x.mp4"], "did you mean 'memrope'"),
        (
            ["stream", RED, "--policy", "sink:window=1,sink=1", "--frames", "5", "-o", "x.mp4"],
            "window must exceed sink",
        ),
        (["serve", "--policy", "sinks", "--port", "0"], "did you mean 'sink'"),
        (["generate", RED, "--plan", "rolling", "-o", "x.mp4"], "--any-plan allows it"),
        (["generate", RED, "--policy", "sink:window=2,sink=2", "-o", "x.mp4"], "window must exceed sink"),
        (["generate", RED, "--model", CHUNKS, "--policy", "sink:window=4,sink=2", "-o", "x.mp4"], ROOM),
        (["stream", RED, "--model", CHUNKS, "--policy", "sink:window=4,sink=2", "--frames", "9", "-o", "x.mp4"], ROOM),
        (["serve", "--model", CHUNKS, "--policy", "sink:window=4,sink=2", "--port", "0"], ROOM),
        (["generate", "a[5s] | b[-2s]", "-o", "x.mp4"], "a script cannot go back in time"),
        *((["generate", RED, *GIVEN, strength, "-o", "x.mp4"], "strength") for strength in ("0", "-1", "1.01", "nan")),
        *((["stream", RED, *GIVEN, strength, "-o", "x.mp4"], "strength") for strength in ("0", "-1", "1.01", "nan")),
    ],
)
def test_what_cannot_be_is_one_line(
    command: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command, "--device", "cpu"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and message in told and list(tmp_path.iterdir()) == []


def test_beyond_a_training_clip_a_family_may_have_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In clips and in streams that slide; clips of a training clip's length, and policies that are named, stay."""
    monkeypatch.setitem(families.FAMILIES, "tiny", dataclasses.replace(families.FAMILIES["tiny"], longer="memrope"))
    pipeline = load("tiny/chunk-4step", device="cpu")
    expected = policy_from("memrope", frames=12, chunk=3)
    assert pipeline.schedule(57).context == expected == profile("tiny/chunk-4step").schedule(57).context
    assert pipeline.schedule(45).context == Context() == pipeline.export.context
    assert Policy.of(pipeline.export, pipeline.sampling, "slide").context == expected
    assert request_for("tiny/chunk-4step", frames=0).context == expected
    named = load("tiny/chunk-4step", policy="sink", device="cpu")
    assert named.schedule(57).context == Context(12, 3)
    clip, long = pipeline.generate(RED, seed=1), pipeline.generate(RED, frames=57, seed=1)
    assert long.shape[1] == 57 and (long[:, :45] - clip).abs().max() < 2e-3
