"""The picture of a context policy, and the data behind it."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from causalreel.cli import main
from causalreel.infer.policy_picture import sights
from causalreel.nn.policies.registry import POLICIES, policy_from


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_drawn(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "drawn.png"
    assert main(["policy", name, "--frames", "36", "--chunk", "2", "--trained", "12", "-o", str(target)]) == 0
    with Image.open(target) as picture:
        assert picture.format == "PNG" and len(picture.convert("RGB").getcolors(100_000) or ()) > 5
    assert "a chunk sees up to" in capsys.readouterr().out
    found = sights(policy_from(name, frames=12, chunk=2), 36, 2)
    assert [sight.start for sight in found] == list(range(0, 36, 2)) and not found[0].read
    assert all(len(sight.own) == 2 for sight in found)
    assert all(frame < sight.start for sight in found for frame, _, _ in sight.read)


def test_what_is_drawn_is_what_is_seen() -> None:
    last = sights(policy_from("sink:window=6,sink=2", chunk=2), 12, 2)[-1]
    assert last.read == ((0, 0, 1.0), (1, 1, 1.0), (8, 8, 1.0), (9, 9, 1.0)) and last.own == (10, 11)
    last = sights(policy_from("memrope:sink=2,local=2", chunk=2), 12, 2)[-1]
    assert [frame for frame, _, _ in last.read] == [0, 1, -1, -2, 8, 9]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "policy must be one of"),
        (["memrop"], "did you mean 'memrope'"),
        (["sink:window=3,sink=2", "--chunk", "2"], "window must hold the sink and the chunk's 2 frames"),
        (["full", "--frames", "1"], "--frames must be at least the chunk's 3"),
        (["full", "-o", "x.jpg"], ".png"),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", *arguments]) == 2
    told = capsys.readouterr().err
    assert message in told and len(told.strip().splitlines()) == 1
