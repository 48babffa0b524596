"""What `train --dry-run` promises: it names what is missing and what makes it, for every recipe, and asks for about as
much room on the disk as a run takes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from causalreel import cli
from causalreel.train import readiness
from causalreel.train.ingredients import missing
from causalreel.train.readiness import disk_bytes
from causalreel.train.recipe import RECIPES, resolve, shipped_recipes
from causalreel.weights.export import embedded, export_folder
from test_run import DATA, DMD, FROM_BASE, SMALL, made, place, reel  # noqa: F401 - fixtures

TINY = [name for name in shipped_recipes() if name.startswith("tiny/")]


def test_every_recipe_is_looked_at() -> None:
    assert len(TINY) == len(list((RECIPES / "tiny").glob("*.yaml"))) >= 14


def makers(line: str) -> list[list[str]]:
    """The commands that an error names."""
    return [shlex.split(command)[1:] for command in re.findall(r"`(causalreel [^`]+)`", line)]


@pytest.mark.parametrize("name", TINY)
def test_what_a_recipe_needs_is_named_with_the_command_that_makes_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder. Whatever does not come with the package has its command, and that command leads there."""
    monkeypatch.chdir(tmp_path)
    recipe = resolve(name)
    status = cli.main(["train", name, "--dry-run"])
    errors = capsys.readouterr().err
    commands = makers(errors)
    if recipe.stage == "codec":
        assert status == 0 and not commands
        return
    assert status == 2 and errors.count("\n") == 1
    world = [] if recipe.world == "flat" else ["--world", recipe.world]
    assert ["encode", *world, "--codec", str(recipe.codec), "--out", str(recipe.data), "--clips", "2048"] in commands
    for role, folder in recipe.init.items():
        if is_embedded(folder):
            continue
        assert f"init.{role}: {folder} is not an export" in errors
        maker = next(words for words in commands if words[0] == "train" and makes(words[1], folder))
        assert maker[1] in TINY and maker[1] != name
        assert not (set(resolve(maker[1]).init.values()) & {folder}), "it would wait for itself"
    assert len(commands) == len(missing(recipe))
    assert os.listdir(tmp_path) == []


def is_embedded(folder: Path) -> bool:
    return export_folder(folder) in embedded().values()


def makes(name: str, folder: Path) -> bool:
    return Path(resolve(name).trainer.out) / "export" == folder


def test_the_commands_that_are_named_lead_to_a_start_one_after_the_other() -> None:
    """From any recipe, back through what makes its weights, to what needs nothing but prepared data."""
    for name in TINY:
        seen, waiting = set(), [name]
        while waiting:
            recipe = resolve(waiting.pop())
            assert recipe.trainer.out not in seen
            for folder in set(recipe.init.values()):
                if not is_embedded(folder):
                    waiting += [other for other in TINY if makes(other, folder)]
                    assert waiting, f"{name}: nothing makes {folder}"


def test_a_folder_of_ones_own_is_asked_for_and_other_recipes_are_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = missing(resolve("tiny/dmd", ["init.student=mine/export", "init.critic=tiny/base"]))
    assert told[1:] == ["init.student: mine/export is not an export: it has no config.yaml"]


# ---- room on the disk

MORE = {
    "tiny/base": ("model=tiny-smoke",),
    "tiny/causal_cd": FROM_BASE,
    "tiny/causal_ode": (*FROM_BASE, "settings.pairs=4", "settings.grid=4", "settings.keep=[0,1,2,3]"),
    "tiny/dmd": DMD,
}


@pytest.mark.parametrize("name", MORE)
def test_the_room_that_is_asked_for_is_the_room_that_a_run_takes(place: Path, name: str) -> None:  # noqa: F811
    keep = ("trainer.steps=4", "trainer.save_every=1", "trainer.keep=2", "trainer.out=out")
    arguments = (*SMALL, *DATA, *MORE[name], *keep)
    estimate = disk_bytes(resolve(name, arguments))
    reel("train", name, *arguments)
    sizes = {entry.stat().st_ino: entry.stat().st_size for entry in Path("out").rglob("*") if entry.is_file()}
    newest = Path("out/checkpoints/step-00000004")  # written before the oldest goes; frozen roles are links
    more = sum(file.stat().st_size for file in newest.iterdir() if file.stat().st_nlink == 1)
    taken = sum(sizes.values()) + more
    assert taken * 0.9 < estimate < taken * 1.25


def test_a_disk_without_that_room_is_said_before_the_run(
    place: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ("train", "tiny/causal_cd", *SMALL, *DATA, *FROM_BASE, "trainer.out=new/run", "--dry-run")
    need = disk_bytes(resolve("tiny/causal_cd", command[2:-1]))
    usage = namedtuple("usage", "total used free")
    for free, status in ((need - 1, 2), (need, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage(free, 0, free))
        assert cli.main(list(command)) == status
        errors = capsys.readouterr().err
        assert status == 0 or f"writes about {need >> 20} MiB, {place} has {free >> 20} MiB free" in errors
    assert not Path("new").exists() and readiness.MIB == 1 << 20
