"""The documentation holds: snippets and examples run, commands parse, names of code exist, links lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import causalreel
from causalreel import cli
from causalreel.cli.training import Train
from causalreel.infer.models import variants
from causalreel.train.recipe import find_recipe, resolve
from causalreel.weights import export as exports
from conftest import why_skipped
from test_weights import small_family

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
ROOMS = {module.name for module in pkgutil.iter_modules(causalreel.__path__)}
FILES = (".md", ".py", ".yaml", ".toml", ".mp4", ".png", ".jsonl", ".safetensors", ".txt", ".sh")

each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
each_example = pytest.mark.parametrize("example", EXAMPLES, ids=[example.name for example in EXAMPLES])


def fenced(page: Path, kind: str) -> list[str]:
    """The code blocks of a page that start with exactly this word or these words."""
    return re.findall(rf"^```{re.escape(kind)}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; the embedded models are the size of a test and random."""
    monkeypatch.setattr(exports, "ASSETS", small_family(tmp_path / "assets"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


SNIPPETS = [(page, code) for page in PAGES for code in fenced(page, "python run")]


@pytest.mark.parametrize(("page", "code"), SNIPPETS, ids=[page.name for page, _ in SNIPPETS])
def test_snippets_run(page: Path, code: str, place: Path) -> None:
    exec(compile(code, str(page), "exec"), {"__name__": "snippet"})


def test_every_python_snippet_is_run() -> None:
    """A snippet that is not marked is one that nobody notices when it breaks."""
    assert not [page.name for page in PAGES if fenced(page, "python")]
    assert SNIPPETS


@each_example
def test_examples_are_short_and_run(
    example: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(example.read_text(encoding="utf-8").splitlines()) <= 40
    monkeypatch.setattr("sys.argv", [example.name])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out


def lines(page: Path) -> list[list[str]]:
    """Every command in the shell blocks of a page, in words."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"^```bash(?: run)?\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    parts = [part for line in blocks.replace("\\\n", " ").splitlines() for part in line.split("&&")]
    return [words for part in parts if (words := shlex.split(part, comments=True))]


def commands(page: Path) -> list[list[str]]:
    """Arguments of every `causalreel ...` line in the shell blocks of a page."""
    return [words[1:] for words in lines(page) if Path(words[0]).name == "causalreel"]


SHELL = [(page, block) for page in PAGES for block in fenced(page, "bash run")]


@pytest.mark.parametrize(("page", "block"), SHELL, ids=[page.name for page, _ in SHELL])
def test_shell_blocks_run(page: Path, block: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As they stand, one line after the other, in a folder that is empty at first."""
    for line in block.splitlines():
        if line.startswith("causalreel "):
            assert cli.main(shlex.split(line, comments=True)[1:]) == 0, (line, capsys.readouterr().err)
        else:
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
            subprocess.run(["bash", "-c", line], env={**os.environ, "PATH": path}, check=True)


MAKES = {"-o", "--output", "--sheet", "--out", "--record", "--data", ">"}
"""What stands before a file or folder that a command makes."""


def read_and_made(words: list[str]) -> tuple[set[str], set[str]]:
    """Files and folders that a command reads, and that it makes."""
    if re.match(r"\w+=", words[0]):  # a variable of the shell
        return set(), {f"${words[0].partition('=')[0]}"}
    made = {after for word, after in pairwise(words) if word in MAKES}
    made |= set(re.findall(r"save\('([^']+)'\)", " ".join(words)))
    read = {word.partition("=")[2] for word in words if re.match(r"(init\.\w+|codec|data)=", word)}
    read |= {after for word, after in pairwise(words) if word in ("--codec", "--token-file", "--wan-dir")}
    if words[1:2] == ["train"]:
        recipe = resolve(words[2], [word for word in words[3:] if not word.startswith("--")])
        made |= {str(recipe.trainer.out), f"{recipe.trainer.out}/export"}
    if words[1:2] == ["convert"]:
        made.add(words[3])
    named = {word.rpartition("=")[2] for word in words if "(" not in word and word.endswith(FILES)}
    return (read | named) - made, made


@each_page
def test_files_that_commands_read_are_there(page: Path) -> None:
    """In the repository, made by an earlier line of the page, or explained: the page names them or their folder."""
    here = set(re.findall(r"`([\w./-]+)`", prose(page)))
    for words in lines(page):
        read, made = read_and_made(words)
        for name in read:
            known = {name, *map(str, Path(name).parents)} - {".", "runs"}
            assert (ROOT / name).exists() or known & here, (name, words)
        here |= made


@each_page
def test_commands_are_understood(
    page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names and options exist; recipes resolve with their overrides; nothing is carried out."""

    def understand(args: Any) -> int:
        if isinstance(args, Train):
            resolve(args.recipe, args.overrides)
        return 0

    monkeypatch.setattr(cli, "function", lambda name: understand)
    for words in commands(page):
        status = cli.main(words)
        assert status == 0, (words, capsys.readouterr().err)


def test_commands_are_found() -> None:
    assert len(commands(ROOT / "README.md")) >= 8


def exists(name: str) -> bool:
    """Whether a dotted name below `causalreel` is a module, or an attribute or a field of something."""
    found: Any = causalreel
    for part in name.removeprefix("causalreel.").split("."):
        if dataclasses.is_dataclass(found) and part in {field.name for field in dataclasses.fields(found)}:
            return True
        if isinstance(found, ModuleType) and not hasattr(found, part):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except ImportError:
                return False
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def names_of_code(page: Path) -> list[str]:
    """Dotted names in backticks that begin with the package or one of its rooms."""
    quoted = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)+)(?:\(\))?`", prose(page))
    return [name for name in quoted if name.split(".")[0] in {*ROOMS, "causalreel"} and not name.endswith(FILES)]


@each_page
def test_names_of_code_exist(page: Path) -> None:
    assert [name for name in names_of_code(page) if not exists(name)] == []


def test_names_of_code_are_found() -> None:
    assert len(names_of_code(ROOT / "docs" / "architecture.md")) > 40
    assert not exists("rollout.never") and not exists("causalreel.nn.never") and exists("causalreel.rollout.chunked")


@each_page
def test_recipes_and_models_exist(page: Path) -> None:
    """`tiny/...` in backticks is a recipe that resolves, or an embedded model."""
    known = {"tiny/frame-2step", "tiny/frame-1step", "tiny/chunk-4step", *variants()}
    for words in re.findall(r"`(tiny/[^`]*)`", prose(page)):
        name, *overrides = words.split()
        if name not in known:
            assert find_recipe(name).is_file()
            resolve(name, overrides)


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@each_page
def test_files_that_are_named_exist(page: Path) -> None:
    """Paths in backticks that begin in a folder of the repository."""
    for name in re.findall(r"`((?:src|tests|docs|runs|examples|\.ci)/[\w./-]+)`", prose(page)):
        if not name.startswith("runs/") or name.endswith(".sh"):
            assert (ROOT / name).exists(), name


SCORED = {
    "tiny/frame-2step": ("evaluation.md", "frame-2step"),
    "tiny/frame-1step": ("evaluation.md", "frame-1step"),
    "tiny/chunk-4step": ("evaluation.md", "chunk-4step"),
    "tiny/base": ("evaluation.md", "tiny/base, 48 Euler steps, guidance 3"),
    "tiny/ar-frame": ("evaluation.md", "tiny/ar-frame, 48 UniPC steps, guidance 2"),
    "tiny/ar-chunk": ("evaluation.md", "tiny/ar-chunk, 48 UniPC steps, guidance 2"),
    "tiny/walk": ("walk.md", "**DMD from AR, 2 steps**"),
    "tiny/walk-1step": ("walk.md", "**DMD from AR, 1 step**"),
}
"""Embedded model -> the page and the row of its tables."""

HEADINGS = {"evaluation.md": "The shipped models", "walk.md": "Measured"}
CALLED = {"PSNR seen": "psnr seen", "yaw within 6 degrees": "yaw within", "`ahead` there": "ahead"}
CALLED |= {f"{way} within 0.25": f"{way} within" for way in ("forward", "sideways")}
"""Columns that scores have under another name."""


def row_of(page: str, label: str) -> dict[str, str]:
    """The cells of a row, by the heads of their columns, of all tables behind the page's heading."""
    found: dict[str, str] = {}
    heads: list[str] = []
    behind = (ROOT / "docs" / page).read_text().split(f"\n## {HEADINGS[page]}\n")[1]
    for line in re.split(r"^##+ ", behind, flags=re.MULTILINE)[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            heads = []
        elif not heads:
            heads = cells
        elif cells[0] == label:
            found |= dict(zip(heads[1:], cells[1:], strict=True))
    return found


@pytest.mark.parametrize("name", SCORED)
def test_embedded_models_score_as_the_docs_say(name: str) -> None:
    scores = exports.read_export(variants()[name]).provenance["metrics"]
    told = {CALLED.get(head, head): cell.split()[0] for head, cell in row_of(*SCORED[name]).items()}
    shared = told.keys() & scores.keys()
    assert len(shared) >= 6, told
    for metric in shared:
        digits = len(told[metric].partition(".")[2])
        assert abs(float(told[metric]) - scores[metric]) <= 0.5001 * 10**-digits + 5e-5, metric


def test_ci_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_why_tests_were_skipped_is_said_in_one_line() -> None:
    reasons = ["Skipped: needs a CUDA GPU", "no recorded cases in x (set CAUSALREEL_GOLDEN)", "no CUDA device", "odd"]
    assert why_skipped(reasons) == "skipped 4: 2 need a GPU, 1 recorded numbers (CAUSALREEL_GOLDEN), 1 odd"
