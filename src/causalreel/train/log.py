"""Where metrics go: a JSONL file always, TensorBoard beside it if asked for, and a line on the terminal.

Losses stay on the GPU until a window of steps is read at once, so logging costs no wait in between.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from causalreel.files import append_text, write_text

Record = Mapping[str, float | int]
Writer = Callable[[Record], None]

logger = logging.getLogger("causalreel.train")


class NonFiniteError(FloatingPointError):
    """A loss or a gradient norm is infinite or NaN."""


class Mean(Protocol):
    """Each process's numbers -> their means; see `parallel.sharding.Team.mean`."""

    def __call__(self, numbers: Sequence[float], *, is_strict: Sequence[bool]) -> list[float]: ...


class Window:
    """The metrics since the last record: tensors as they come, numbers once fetched.

    mean: over the processes of the run, all of which have the same metrics in the same order.
    """

    def __init__(self, values: Sequence[tuple[int, str, float]] = (), *, mean: Mean | None = None) -> None:
        self._pending: list[tuple[int, str, Tensor]] = []
        self._values, self._mean = list(values), mean

    def add(self, step: int, metrics: Mapping[str, Tensor]) -> None:
        """Keep scalar tensors () of trainer step `step` (0-based) without waiting for them."""
        self._pending.extend((step, name, value) for name, value in metrics.items())
        if len(self._pending) > 20_000:  # a window without end would hold as many tensors
            self.fetch()

    def fetch(self) -> list[tuple[int, str, float]]:
        """Everything since the last `clear` as (step, name, value); raises NonFiniteError for a bad loss or norm."""
        groups: dict[Any, list[int]] = defaultdict(list)
        for index, (_, name, value) in enumerate(self._pending):
            if value.ndim:
                raise ValueError(f"metric {name!r}: got shape {tuple(value.shape)}, a scalar is expected")
            groups[value.device, value.dtype].append(index)
        numbers = [0.0] * len(self._pending)
        for indices in groups.values():
            stacked = torch.stack([self._pending[index][2] for index in indices]).tolist()
            for index, number in zip(indices, stacked, strict=True):
                numbers[index] = float(number)
        names = [name.rpartition("/") for _, name, _ in self._pending]
        is_strict = [metric in ("loss", "grad_norm") for _, _, metric in names]
        if self._mean is not None and numbers:
            numbers = self._mean(numbers, is_strict=is_strict)
        fetched = [(step, name, n) for (step, name, _), n in zip(self._pending, numbers, strict=True)]
        self._pending.clear()
        for (step, _, number), (role, _, metric), strict in zip(fetched, names, is_strict, strict=True):
            if strict and not math.isfinite(number):
                what = "loss" if metric == "loss" else "gradient norm"
                raise NonFiniteError(f"step {step + 1}, role {role!r}: the {what} is {number}")
        self._values += fetched
        return [*self._values]  # a checkpoint that is written later must not see what comes in the meantime

    def means(self) -> dict[str, float]:
        """Mean of each metric over its finite values."""
        columns: dict[str, list[float]] = defaultdict(list)
        for _, name, number in self.fetch():
            if math.isfinite(number):
                columns[name].append(number)
        return {name: math.fsum(column) / len(column) for name, column in columns.items()}

    def clear(self) -> None:
        """Begin a new window."""
        self._values = []


def open_jsonl(path: Path, *, step: int) -> Writer:
    """A writer of one JSON object a line, on a file from which lines past `step` were dropped."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError, RecursionError):  # torn by a kill in mid-write, or a stranger's
                continue
    write_text(path, "".join(kept))

    def write(record: Record) -> None:
        append_text(path, json.dumps(record) + "\n")

    return write


def open_tensorboard(directory: Path, *, step: int) -> Writer:
    """A writer to TensorBoard event files; records past `step` of an earlier run are hidden."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("tensorboard=true needs TensorBoard: pip install 'causalreel[train]'") from error
    events = SummaryWriter(str(directory), purge_step=step + 1)

    def write(record: Record) -> None:
        for name, value in record.items():
            if name != "step":
                events.add_scalar(name, value, int(record["step"]))
        events.flush()

    return write


class Progress:
    """One line that is rewritten on a terminal; elsewhere a log line per record."""

    def __init__(
        self, steps: int, first: int, stream: TextIO | None = None, *, aside: Callable[[], float] = lambda: 0.0
    ) -> None:
        """aside: seconds so far that are no training steps."""
        self._steps, self._first, self._stream = steps, first, stream or sys.stderr
        self._aside, self._aside_before = aside, aside()
        self._began = self._drawn = time.monotonic()
        self._is_terminal = self._stream.isatty()
        self._losses = ""

    def __call__(self, record: Record) -> None:
        """Show the losses of a record."""
        losses = {name: value for name, value in record.items() if name.endswith("/loss")}
        self._losses = "  ".join(f"{name} {value:.4g}" for name, value in losses.items())
        if not self._is_terminal:
            speed = f"{record['steps_per_second']:.3g} steps/s"
            logger.info("step %d/%d  %s  %s", record["step"], self._steps, speed, self._losses)

    def tick(self, done: int) -> None:
        """Redraw after `done` steps, at most five times a second."""
        now = time.monotonic()
        if not self._is_terminal or (now - self._drawn < 0.2 and done < self._steps):
            return
        self._drawn = now
        rate = max(done - self._first, 1) / (now - self._began - (self._aside() - self._aside_before))
        bar = "=" * (20 * done // max(self._steps, 1))
        eta = duration((self._steps - done) / rate)
        self._stream.write(f"\r[{bar:<20}] {done}/{self._steps}  {rate:.3g} steps/s  {eta} left  {self._losses}\x1b[K")
        self._stream.flush()

    def close(self) -> None:
        """Leave the line."""
        if self._is_terminal:
            self._stream.write("\n")
            self._stream.flush()


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
