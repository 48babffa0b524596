"""A recipe's codec may be a released one: known by name, fetched, compared with the data, named in the export."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from causalreel import cli, config
from causalreel.codecs.tiny import tiny_codec
from causalreel.families import FAMILIES
from causalreel.families.family import Decoder
from causalreel.families.files import codec_mark
from causalreel.train import codec_of, readiness
from causalreel.train.recipe import resolve
from causalreel.weights.export import load_codec, read_export
from causalreel.weights.hub import HubFile
from test_run import SMALL, made, place, reel  # noqa: F401 - fixtures

FILE = HubFile("someone/codecs", "far.pth", 0.1)
COMMAND = ("tiny/ar", *SMALL, "data=data", "codec=far", "rows=null", "init.student=base/export", "trainer.out=ar")


@pytest.fixture
def released(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """The file of a codec "far" that a hub has."""
    path = place / "far.pth"
    path.write_bytes(b"weights")
    far = Decoder(tiny_codec(0).config, FILE, lambda found: load_codec(place / "codec/export"))
    monkeypatch.setitem(FAMILIES, "far", replace(FAMILIES["tiny"], name="far", decoders={"far": far}, models=()))
    monkeypatch.setattr(codec_of, "fetch", lambda files, folder: ({FILE: path}, ""))
    return path


def test_a_run_with_a_released_codec(released: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *COMMAND]) == 2
    assert "data was encoded with another codec than far" in capsys.readouterr().err
    info = Path("data/info.yaml")
    info.write_text(json.dumps({**config.read(info), "codec": codec_mark(released)}))
    reel("train", *COMMAND)
    assert read_export("ar/export").codec == "far"


def test_a_dry_run_fetches_nothing_and_says_what_the_run_will(
    released: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(codec_of, "fetch", lambda files, folder: pytest.fail("something is fetched"))
    assert readiness.to_fetch(resolve(COMMAND[0], COMMAND[1:])) == [FILE]
    reel("train", *COMMAND, "--dry-run")
    assert "someone/codecs/far.pth (0.1 GB)" in capsys.readouterr().out


def test_a_codec_that_cannot_be_had_is_one_line(
    released: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(codec_of, "fetch", lambda files, folder: ({}, "HF_HUB_OFFLINE is set"))
    assert cli.main(["train", *COMMAND]) == 2
    assert "codec far: HF_HUB_OFFLINE is set: someone/codecs/far.pth" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["files/far.pth", "files"])
def test_the_file_may_be_named_itself(
    released: Path, named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or the folder that has it: nothing is fetched then."""
    monkeypatch.setattr(codec_of, "fetch", lambda files, folder: pytest.fail("something is fetched"))
    Path("files").mkdir()
    Path("files/far.pth").write_bytes(released.read_bytes())
    info = Path("data/info.yaml")
    info.write_text(json.dumps({**config.read(info), "codec": codec_mark(released)}))
    command = [word if not word.startswith("codec=") else f"codec={named}" for word in COMMAND]
    assert readiness.to_fetch(resolve(command[0], command[1:])) == []
    reel("train", *command)
    assert read_export("ar/export").codec == "far"
    Path("files/far.pth").write_bytes(b"others")
    assert cli.main(["train", *command, "trainer.out=other"]) == 2
    assert f"data was encoded with another codec than {named}" in capsys.readouterr().err
