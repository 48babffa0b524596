"""From the words of a command line to the arguments of a subcommand; what is wrong with them is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union

import tyro

from causalreel.foreign import shown
from causalreel.spelling import nearest


class UsageError(ValueError):
    """The command line says something that cannot be meant."""


@dataclass(frozen=True)
class Range:
    """In an annotation of a number: what is allowed, both ends included."""

    least: float
    most: float


SIDE = Range(16, 8192)
FRAMES = Range(1, 1_000_000)
CHUNK = Range(1, 10_000)
BATCH = Range(1, 4096)
SEED = Range(0, 2**62)
LORA = tyro.conf.UseAppendAction
"""Of a flag that may stand several times."""


def parse(commands: Mapping[str, type], argv: Sequence[str]) -> Any:
    """The dataclass of the subcommand that `argv` names; UsageError in one line, or SystemExit after help.

    Of `commands` no other is looked up then: one that is asked for pays for its own arguments alone.
    """
    _check_words(commands, argv)
    said = io.StringIO()
    how: dict[str, Any] = {"config": (tyro.conf.FlagCreatePairsOff,)}
    try:
        with contextlib.redirect_stderr(said):
            if argv and argv[0] in commands:
                args = tyro.cli(commands[argv[0]], prog=f"causalreel {argv[0]}", args=list(argv[1:]), **how)
            else:
                about = "Causal video diffusion: few-step autoregressive generation and its training."
                args = tyro.cli(_union(commands), prog="causalreel", description=about, args=list(argv), **how)
    except SystemExit as end:
        if end.code in (None, 0):
            sys.stderr.write(said.getvalue())
            raise
        raise UsageError(one_sentence(said.getvalue(), argv)) from None
    check_numbers(args)
    return args


def _union(commands: Mapping[str, type]) -> Any:
    """All subcommands as one type."""
    return Union[tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in commands.items())]  # noqa: UP007


def check_numbers(args: Any) -> None:
    """UsageError that names the first number outside the range that its annotation gives."""
    for name, (_, bounds) in numbers(type(args)).items():
        value = getattr(args, name)
        if value is None or bounds is None or bounds.least <= value <= bounds.most:
            continue
        limit = f"at most {bounds.most:,}" if value > bounds.most else f"at least {bounds.least:,}"
        raise UsageError(f"--{name.replace('_', '-')} must be {limit}, got {shown(value, 60)}")


def numbers(cls: type) -> dict[str, tuple[type, Range | None]]:
    """The fields of a subcommand that take one number: name -> int or float, and the range."""
    found: dict[str, tuple[type, Range | None]] = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        inner, extras = (typing.get_args(hint)[0], hint.__metadata__) if hasattr(hint, "__metadata__") else (hint, ())
        kinds = [kind for kind in (typing.get_args(inner) or (inner,)) if kind is not type(None)]
        if kinds in ([int], [float]):
            found[name] = kinds[0], next((extra for extra in extras if isinstance(extra, Range)), None)
    return found


def flags(cls: type) -> list[str]:
    """Every flag that a subcommand knows, as it is typed."""
    found, hints = ["--help"], typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        extras = getattr(hints[field.name], "__metadata__", ())
        no = "no-" if field.default is True else ""
        found += [f"--{no}{field.name.replace('_', '-')}"]
        for extra in extras:
            found += [alias for alias in getattr(extra, "aliases", None) or () if alias.startswith("--")]
    return found


def _check_words(commands: Mapping[str, type], argv: Sequence[str]) -> None:
    """UsageError for an unknown subcommand or flag, with the one that was probably meant."""
    if not argv or argv[0] in ("-h", "--help", "--version"):
        return
    if argv[0] not in commands:
        near = nearest(argv[0], commands)
        what = "flag" if argv[0].startswith("-") else "command"
        hint = f"did you mean {near!r}? " if near else ""
        raise UsageError(f"unknown {what} '{shown(argv[0], 60)}'; {hint}the commands are {', '.join(commands)}")
    known = flags(commands[argv[0]])
    for word in argv[1:]:
        if word == "--":
            return
        name = word.partition("=")[0].replace("_", "-")
        if re.match(r"--\w", word) and name not in known:
            near = nearest(name, known)
            hint = f"did you mean {near}?" if near else f"causalreel {argv[0]} --help lists what there is"
            raise UsageError(f"{argv[0]} has no flag '{shown(word.partition('=')[0], 60)}'; {hint}")


def one_sentence(box: str, argv: Sequence[str]) -> str:
    """What the parser says in a box, as a sentence."""
    lines = [line.strip("│ \t") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    body = [line for line in lines if line and line[0] not in "╭╰"]
    if len(body) > 1 and not body[1].strip("-"):  # without UTF-8 the title stands above a rule, and not in the frame
        body = body[2:]
    end = next((i for i, line in enumerate(body) if not line.strip("─-")), len(body))
    text = " ".join(body[:end])
    if wrong := re.search(r"Error parsing (\S+?):.*?instantiated from \[(.*?)\]\.", text):
        kind = {"int": "a whole number", "float": "a number"}.get(_kind(text), "a value of another kind")
        return f"{wrong[1]} must be {kind}, got {shown(wrong[2], 60)}"
    if wrong := re.search(r"Error parsing (\S+?): (.*)", text):
        return f"{wrong[1]}: {shown(wrong[2], 200)}"
    help_at = f"causalreel {argv[0]} --help" if argv and not argv[0].startswith("-") else "causalreel --help"
    return f"{shown(text, 500) or 'the command line cannot be read'} (see {help_at})"


def _kind(text: str) -> str:
    found = re.findall(r"<class '(int|float)'>", text)
    return found[-1] if found else "int" if "INT" in text else "float" if "FLOAT" in text else ""
