"""Config files: strict keys, types, extends, overrides, and law 12: config -> YAML -> config is the identity."""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import causalreel
from causalreel import cli, config
from causalreel.codecs.wan_vae import VAEConfig
from causalreel.data.world import WorldConfig
from causalreel.eval.metrics import MetricConfig
from causalreel.nn.masks import Context
from causalreel.nn.presets import ModelConfig
from causalreel.train.kit import EMAConfig
from causalreel.train.optim import OptimiserConfig
from causalreel.train.recipe import SETTINGS, Recipe
from causalreel.train.trainer import TrainerConfig
from causalreel.weights.export import CodecExport, Export, Sampling


@dataclass(frozen=True)
class Optimiser:
    lr: float
    betas: tuple[float, float] = (0.9, 0.95)
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise ValueError(f"lr: got {self.lr}, allowed 0 or more")


@dataclass(frozen=True)
class Dmd:
    kind: Literal["dmd"] = "dmd"
    critic_updates: int = 5


@dataclass(frozen=True)
class Ode:
    kind: Literal["ode"] = "ode"
    sigmas: tuple[float, ...] = (1.0, 0.5)


@dataclass(frozen=True)
class Run:
    name: str = "run"
    steps: int = field(default=10, metadata=config.FREE)
    is_causal: bool = True
    out: Path = Path("out")
    shift: float = 5.0
    start: int | str = 0
    note: str | None = None
    sizes: list[int] = field(default_factory=list)
    optimisers: dict[str, Optimiser] = field(default_factory=dict)
    stage: Dmd | Ode = field(default_factory=Dmd)
    spare: Optimiser | None = None
    grid: tuple[tuple[int, ...], ...] = ()


FLOATS = st.floats(allow_nan=False)
OPTIMISERS = st.builds(
    Optimiser,
    lr=st.floats(min_value=0, allow_nan=False),
    betas=st.tuples(FLOATS, FLOATS),
    schedule=st.sampled_from(["constant", "cosine"]),
    clip=st.none() | FLOATS,
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
RUNS = st.builds(
    Run,
    name=TEXT,
    steps=st.integers(),
    is_causal=st.booleans(),
    out=st.from_regex(r"[a-z./0-9 ]{1,12}", fullmatch=True).map(Path),
    shift=FLOATS,
    start=st.integers() | TEXT,
    note=st.none() | TEXT,
    sizes=st.lists(st.integers(), max_size=3),
    optimisers=st.dictionaries(TEXT, OPTIMISERS, max_size=2),
    stage=st.builds(Dmd, critic_updates=st.integers()) | st.builds(Ode, sigmas=st.lists(FLOATS, max_size=3).map(tuple)),
    spare=st.none() | OPTIMISERS,
    grid=st.lists(st.lists(st.integers(), max_size=2).map(tuple), max_size=2).map(tuple),
)


@settings(max_examples=150, deadline=None)
@given(RUNS)
def test_there_and_back_is_the_identity(run: Run) -> None:
    again = config.loads(config.dump(run), Run)
    assert again == run
    assert [type(getattr(again, f.name)) for f in fields(run)] == [type(getattr(run, f.name)) for f in fields(run)]


@pytest.mark.parametrize(
    "text", ["\x85", "a\u2028b\u2029", "\ufeff", "line\nline\n", " é 猫 ", "off", "1e3", "null", "~", "#"]
)
def test_odd_texts_survive(text: str) -> None:
    assert config.loads(config.dump(Run(name=text, note=text)), Run) == Run(name=text, note=text)


def test_floats_without_a_point_are_floats() -> None:
    run = config.loads("{shift: 2e-6, optimisers: {student: {lr: 1e-5, clip: 1}}}", Run)
    assert run.shift == 2e-6 and run.optimisers["student"] == Optimiser(1e-5, clip=1.0)
    assert math.isinf(config.loads("shift: .inf", Run).shift)


def test_extends_merges_recursively_and_overrides_win(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text("name: base\nsizes: [1, 2]\noptimisers: {student: {lr: 1, clip: 2}}\n")
    (tmp_path / "deep" / "middle.yaml").write_text("extends: ../base.yaml\nsizes: [3]\n")
    (tmp_path / "run.yaml").write_text("extends: deep/middle.yaml\noptimisers: {student: {clip: 3}, critic: {lr: 4}}\n")
    run = config.load(
        tmp_path / "run.yaml", Run, ["optimisers.student.lr=2e-6", "sizes=[7, 8]", "note=null", "name=a=b"]
    )
    assert run.name == "a=b" and run.sizes == [7, 8] and run.note is None
    assert run.optimisers == {"student": Optimiser(2e-6, clip=3.0), "critic": Optimiser(4.0)}


def test_a_file_that_extends_itself_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: a.yaml")
    with pytest.raises(ValueError, match="extends itself"):
        config.load(tmp_path / "a.yaml", Run)
    with pytest.raises(ValueError, match=r"no file .*missing\.yaml"):
        config.load(tmp_path / "missing.yaml", Run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", r"unknown key 'stepz' in the top level; did you mean 'steps'\? allowed: grid, is_causal"),
        ("optimisers: {student: {lr: 1, beta: 2}}", r"unknown key 'beta' in optimisers.student; did you mean 'betas'"),
        ("stage: {kind: ode, sigma: []}", r"unknown key 'sigma' in stage; did you mean 'sigmas'"),
        ("qqq: 3", r"unknown key 'qqq' in the top level; allowed: "),
        ("steps: 1.5", r"steps: got 1.5 \(float\), expected int"),
        ("steps: true", r"steps: got True \(bool\), expected int"),
        ("steps: ", r"steps: got null, expected int"),
        ("is_causal: 1", r"is_causal: got 1 \(int\), expected bool"),
        ("shift: fast", r"shift: got 'fast' \(str\), expected float"),
        ("name: 3", r"name: got 3 \(int\), expected str"),
        ("start: 1.5", r"start: got 1.5 \(float\), expected int \| str"),
        ("sizes: [1, x]", r"sizes\[1\]: got 'x' \(str\), expected int"),
        ("grid: [[1], 2]", r"grid\[1\]: got 2 \(int\), expected a list"),
        ("optimisers: {student: {}}", r"optimisers.student: 'lr' is missing"),
        ("optimisers: {student: {lr: -1}}", r"optimisers.student: lr: got -1.0, allowed"),
        ("optimisers: {student: {lr: 1, betas: [1]}}", r"student.betas: got 1 values, expected 2"),
        ("optimisers: {student: {lr: 1, schedule: off}}", r"got False .*expected 'constant' \| 'cosine'; on, off"),
        ("stage: {kind: dmb}", r"stage: one key must choose the variant: kind: 'dmd' \| 'ode'"),
        ("[1]", "expected a mapping"),
    ],
)
def test_errors_name_the_place_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config.loads(text, Run)


@pytest.mark.parametrize("text", ["steps", "=3", "a..b=1", "steps=[1"])
def test_bad_overrides_are_errors(text: str) -> None:
    with pytest.raises(ValueError, match="override"):
        config.loads("", Run, [text])


def test_errors_of_a_file_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("name: x")
    with pytest.raises(ValueError, match=r"run.yaml: unknown key 'optimizers'.*did you mean 'optimisers'"):
        config.load(tmp_path / "run.yaml", Run, ["optimizers.student.lr=1"])


def test_fixed_leaves_out_the_fields_that_may_change() -> None:
    kept = config.fixed(Run(optimisers={"student": Optimiser(1.0)}, steps=99))
    assert "steps" not in kept
    assert kept["optimisers.student.lr"] == 1.0 and kept["stage.kind"] == "dmd" and kept["out"] == "out"


# ---- the package's own configs

CONFIGS = [
    *(Recipe, TrainerConfig, OptimiserConfig, *SETTINGS.values(), EMAConfig),
    *(Export, CodecExport, Sampling, ModelConfig, Context, VAEConfig, WorldConfig, MetricConfig),
]


@pytest.mark.parametrize("cls", [*CONFIGS, *cli.NAMES.values()], ids=lambda cls: cls.__name__)
def test_every_field_has_its_line_of_documentation(cls: type) -> None:
    documented = {}
    for one in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(definition, ast.ClassDef) and ast.get_docstring(definition)
        documented |= {
            first.target.id: inspect.cleandoc(second.value.value)
            for first, second in zip(definition.body, definition.body[1:], strict=False)
            if isinstance(first, ast.AnnAssign)
            and isinstance(first.target, ast.Name)
            and isinstance(second, ast.Expr)
            and isinstance(second.value, ast.Constant)
            and isinstance(second.value.value, str)
        }
    assert [f.name for f in fields(cls) if f.name not in documented] == []
    assert [name for name, text in documented.items() if not text.endswith(".") and not text.endswith(")")] == []


@cache
def reads() -> dict[str, set[tuple[str, str]]]:
    """Attribute name -> (module, class or its __post_init__) of every place in the package that reads it."""
    found: dict[str, set[tuple[str, str]]] = {}

    def visit(node: ast.AST, module: str, place: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = place
            if isinstance(child, ast.ClassDef):
                inside = child.name
            if isinstance(child, ast.FunctionDef) and child.name == "__post_init__":
                inside = f"{place}.__post_init__"
            if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
                found.setdefault(child.attr, set()).add((module, inside))
            visit(child, module, inside)

    for path in Path(causalreel.__file__).parent.rglob("*.py"):
        visit(ast.parse(path.read_text(encoding="utf-8")), str(path), "")
    return found


@pytest.mark.parametrize("cls", [*CONFIGS, *cli.NAMES.values()], ids=lambda cls: cls.__name__)
def test_every_field_is_read_somewhere(cls: type) -> None:
    """In code that does something with it: a check in the class's own __post_init__ does not count."""
    own = (str(Path(sys.modules[cls.__module__].__file__ or "")), f"{cls.__name__}.__post_init__")
    assert [f.name for f in fields(cls) if not reads().get(f.name, set()) - {own}] == []
