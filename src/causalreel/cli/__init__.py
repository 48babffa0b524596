"""The command `causalreel`: reads arguments, calls the package, prints. Nothing else in the package does any of it.

Each subcommand is a dataclass of its arguments and a function that imports what it needs. Whatever goes wrong becomes
one line on standard error. Exit status: 2 for arguments that cannot be meant or files that are not there or not what
they should be, 1 for everything else that stops a command, 130 after Ctrl-C, 143 after SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import logging
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from causalreel.cli.flags import ending, own_threads
from causalreel.cli.parsing import parse
from causalreel.foreign import shown
from causalreel.parallel.mesh import Launch, launch

COMMANDS: dict[str, tuple[str, str, str]] = {
    "generate": ("videos", "Generate", "generate"),
    "stream": ("playing", "Stream", "stream"),
    "replay": ("playing", "Replay", "replay"),
    "train": ("training", "Train", "train"),
    "plan": ("planning", "PlanRun", "plan_run"),
    "doctor": ("doctor", "Doctor", "doctor"),
    "encode": ("training", "Encode", "encode"),
    "prepare": ("data", "Prepare", "prepare"),
    "import": ("data", "Import", "import_data"),
    "eval": ("measuring", "Evaluate", "evaluate"),
    "export": ("files", "ExportModel", "export_model"),
    "convert": ("files", "Convert", "convert"),
    "models": ("files", "Models", "models"),
    "verify": ("measuring", "Verify", "verify"),
    "bench": ("measuring", "Bench", "bench"),
    "estimate": ("measuring", "EstimateMemory", "estimate_memory"),
    "policy": ("policies", "DrawPolicy", "draw_policy"),
    "serve": ("live", "Serve", "serve"),
}
"""Name of a subcommand -> its module here, which is imported once it is asked for, and in it the arguments and the
function."""


class _Arguments(Mapping[str, type]):
    """Name of a subcommand -> its arguments."""

    def __getitem__(self, name: str) -> type:
        module, arguments, _ = COMMANDS[name]
        return getattr(importlib.import_module(f"{__name__}.{module}"), arguments)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


NAMES = _Arguments()


def function(name: str) -> Callable[[Any], int]:
    """What carries a subcommand out -> exit status."""
    module, _, function = COMMANDS[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), function)


TOGETHER = ("generate", "prepare", "train")
"""Subcommands that run in several processes."""

USAGE = (ValueError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
NAMED = (errno.ENAMETOOLONG, errno.EADDRINUSE, errno.EADDRNOTAVAIL, socket.EAI_NONAME)
"""What is wrong with the arguments or with what they name, as types and as numbers of an OSError: exit status 2."""

TRACEBACK = "CAUSALREEL_TRACEBACK"
"""For developers: faults of the package come out as they are."""


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: the process's arguments), run the subcommand -> exit status.

    In one of several processes (torchrun) all but the first are silent, and an error in any of them ends all.
    """
    where = launch()
    if where is None:
        return _main(argv, None)
    from causalreel.parallel.crew import leave

    with contextlib.ExitStack() as silence:
        if where.rank > 0:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            status = _main(argv, where)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:  # not swallowed: the process says what it was and ends with it, and does not wait for others
            traceback.print_exc()
            status = 1
        return leave(where, status)


def _main(argv: Sequence[str] | None, where: Launch | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:
        from causalreel import __version__

        print(f"causalreel {__version__}")
        return 0
    _log_to_stderr()
    try:
        with ending(), own_threads(), _together(where):
            args = parse(NAMES, argv)
            _import_torch()
            _check_devices(args)
            if where is not None and argv[0] not in TOGETHER:
                told = "only generate, prepare and train run in several processes; start this command without torchrun"
                raise ValueError(told)
            return function(argv[0])(args)
    except KeyboardInterrupt:
        print("causalreel: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        _print_error(_one_line(error))
        return 2 if isinstance(error, USAGE) or getattr(error, "errno", None) in NAMED else 1
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's own, which is not imported for this
            _print_error(f"{_one_line(error)} (causalreel estimate says what takes how much)")
            return 1
        if os.environ.get(TRACEBACK):
            raise
        _print_error(f"{type(error).__name__}: {_one_line(error)} (a fault of causalreel; {TRACEBACK}=1 shows where)")
        return 1


def _import_torch() -> None:
    """Import torch, which every subcommand does first, while the garbage collector rests; it lets be what is there.

    None of torch's 160,000 objects is garbage: looking through them again and again took a fifth of a short command.
    """
    if "torch" in sys.modules or not gc.isenabled():  # in a program of its own; or whoever disabled it knows why
        return
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()


def _check_devices(args: Any) -> None:
    """ValueError for a device that is not there, before anything is loaded for it."""
    for name in ("device", "decode_device"):
        if (device := getattr(args, name, None)) is not None:
            from causalreel.infer.models import choose_device

            choose_device(device, name=name)


def _together(where: Launch | None) -> AbstractContextManager[None]:
    if where is None:
        return contextlib.nullcontext()
    from causalreel.parallel.crew import crew

    return crew(where, describe=_one_line, report=_print_error)


def _print_error(line: str) -> None:
    print(f"causalreel: error: {line}", file=sys.stderr, flush=True)


class _ToStderr(logging.Handler):
    """Log lines to what is standard error at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    logger = logging.getLogger("causalreel")
    if not logger.handlers:
        handler = _ToStderr()
        handler.setFormatter(logging.Formatter("causalreel: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _one_line(error: BaseException) -> str:
    """What an error says: one line of printable characters, at most `LINE`."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # the system's number says nothing to a reader
        text = error.strerror
        if isinstance(error.filename, (str, bytes)) and error.filename:
            text = f"{os.fsdecode(error.filename)}: {text}"
    return shown(" ".join(text.split()) or type(error).__name__, LINE)


LINE = 2000
"""Characters of an error's line."""
