"""The trainer: one loop for every stage. It owns optimisers, averages, checkpoints, metrics and previews.

To resume, run the same command again: the newest checkpoint under `out` is restored and the run goes on as if it had
never stopped, bit for bit, its metrics file included.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from causalreel.config import FREE, MASK, dump
from causalreel.files import remove_leftovers, write_text
from causalreel.folders import claim
from causalreel.parallel.recompute import Recompute
from causalreel.parallel.sharding import ParallelConfig, Team
from causalreel.train.contents import Content
from causalreel.train.elsewhere import check_url, masked
from causalreel.train.initial import Start
from causalreel.train.log import NonFiniteError, Progress, Writer, open_jsonl, open_tensorboard
from causalreel.train.operations import Work
from causalreel.train.optim import OptimiserConfig, learning_rate
from causalreel.train.remote import Remote
from causalreel.train.stage import DataSource, Stage, Update
from causalreel.train.state import Run

PreviewWriter = Callable[[Tensor, Path, int], None]
"""Shows a video (B,T,3,H,W) in [-1, 1]: gets it, the directory for previews and the number of completed steps."""

FORWARDED_S = 10.0
"""How long a launcher may take to forward a signal that its processes have got as well, as from a terminal or Slurm."""

logger = logging.getLogger("causalreel.train")


@dataclass(frozen=True)
class TrainerConfig:
    """How long, from which seed, with which optimisers, and what is kept where."""

    out: Path = field(metadata=FREE)
    """Directory of the run: checkpoints, metrics, previews."""
    steps: int = field(metadata=FREE)
    """Trainer steps in all; may be raised when resuming (a cosine schedule then changes course)."""
    optimisers: dict[str, OptimiserConfig]
    """Optimiser by role; roles without one are frozen."""
    seed: int = 0
    """Seed of data order and of everything that a stage draws."""
    log_every: int = field(default=20, metadata=FREE)
    """Steps per metrics record."""
    save_every: int = field(default=1000, metadata=FREE)
    """Steps between checkpoints."""
    save_every_seconds: float | None = field(default=None, metadata=FREE)
    """Seconds after which a checkpoint is written even before `save_every` steps; null for never."""
    preview_every: int = field(default=0, metadata=FREE)
    """Steps between previews, 0 for none."""
    probe_every: int = field(default=500, metadata=FREE)
    """Steps between probes, which measure how well the student knows some clips of the data at some noise levels and
    whether it uses their text; 0 for none."""
    keep: int = field(default=2, metadata=FREE)
    """Checkpoints kept."""
    remote: str | None = field(default=None, repr=False, metadata={**FREE, MASK: masked})
    """URL of a folder elsewhere, such as s3://bucket/run, that gets a copy of the checkpoints, the records and the
    export, and from which a run goes on in an empty `out`; of any file system of fsspec."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=FREE)
    """Where to train; auto takes the GPU if there is one."""
    tensorboard: bool = field(default=False, metadata=FREE)
    """Whether to write TensorBoard event files beside the metrics file."""
    check: bool = field(default=True, metadata=FREE)
    """Whether the contents of data, weights and checkpoints are hashed and compared, about a second per GB."""
    parallel: ParallelConfig = field(default=ParallelConfig(), metadata=FREE)
    """How the processes of a launch (torchrun) share the work."""
    saves_behind: bool = field(default=False, metadata=FREE)
    """Whether several processes go on training while a checkpoint is written; its tensors are copied to the host."""
    accumulate: int = field(default=1, metadata=FREE)
    """Parts, one after the other, in which a process takes its rows of each batch: less memory, the same step."""
    offload_activations: bool = field(default=False, metadata=FREE)
    """Whether what trained networks keep for the backward pass waits in the host's memory: slower, less on the GPU."""
    offload_averages: bool = field(default=False, metadata=FREE)
    """Whether averages and targets wait in the host's memory, where they follow while the GPU goes on."""
    offload_frozen: bool = field(default=False, metadata=FREE)
    """Whether frozen networks wait in the host's memory and come to the GPU block by block when they are called."""
    recompute: Recompute = field(default="none", metadata=FREE)
    """Activations of trained networks that are computed again in the backward pass: none, all but attention's
    (selective), or all of a block's (full)."""

    def __post_init__(self) -> None:
        least_of = {"steps": 1, "log_every": 1, "save_every": 1, "preview_every": 0, "probe_every": 0}
        least_of |= {"keep": 1, "accumulate": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed {least} or more")
        if self.remote is not None:
            check_url(self.remote)
        if not self.optimisers:
            raise ValueError("optimisers: got none, at least one role must be trained")


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    """Completed steps."""
    is_interrupted: bool = False
    is_idle: bool = False
    """All steps had been done before."""

    @property
    def exit_code(self) -> int:
        """For the shell: 130 after Ctrl-C or SIGTERM."""
        return 130 if self.is_interrupted else 0


def train(
    stage: Stage,
    source: DataSource,
    config: TrainerConfig,
    *,
    recipe: Any = None,
    contents: Sequence[Content] = (),
    starts: Mapping[str, Start] | None = None,
    team: Team | None = None,
    work: Work | None = None,
    write_preview: PreviewWriter | None = None,
    remote: Remote | None = None,
) -> Result:
    """Train a stage up to `config.steps`, from the newest checkpoint under `config.out` if there is one.

    `recipe` is the resolved run config that contains `config`: it is saved with each checkpoint and must be the same on
    resuming, but for fields marked `FREE`; so must `contents`, what the run is made from. Raises NonFiniteError, and
    saves nothing, once a loss or gradient norm is infinite or NaN. Ctrl-C and SIGTERM end the run after the current
    step, with a checkpoint; a second one at once. The folder is claimed: a second process in it is a ValueError before
    anything in it is touched. Within `parallel.mesh.join` all processes of the launch train together, each with its own
    copy of the arguments, and the first one writes.

    starts: what fills roles without storage (meta device); averages fill themselves. work: operations of a step, for
    the records. remote: in the first process, what `train.remote.attached` makes of the config; copying may go on when
    the run has ended.
    """
    run = Run(stage, source, config, config if recipe is None else recipe, contents, starts or {}, team, work)
    run.remote = remote
    if run.team.is_first and (remote is None) != (config.remote is None):
        raise ValueError("remote: what train.remote.attached makes of the config is expected, and got none or another")
    with claim(config.out, "training") if run.team.is_first else contextlib.nullcontext(False) as is_alone:
        for folder in ("", "checkpoints", "previews", "export") if run.team.is_first else ():
            remove_leftovers(Path(config.out) / folder, is_alone=is_alone and folder == "checkpoints")
        run.team.wait()
        try:
            return _train(run, _write_preview if write_preview is None else write_preview)
        except NonFiniteError:  # in all processes alike: what is still being written is from before
            run.end()
            raise
        except KeyboardInterrupt:
            if run.saver is not None:
                run.saver.rescue()
            raise


def _train(run: Run, write_preview: PreviewWriter) -> Result:
    config, recipe = run.config, run.recipe
    if not run.restore():
        logger.info("resolved config:\n%s", dump(recipe))
    if run.step >= config.steps:
        logger.info("nothing to do: %d of %d steps are done", run.step, config.steps)
        return Result(run.step, is_idle=True)
    if run.team.is_first:
        write_text(Path(config.out) / "config.yaml", dump(recipe))  # for who looks before there is a checkpoint

    writers, progress = _open_writers(config, run)
    if config.preview_every and run.step == 0:
        run.preview(write_preview)

    with _interruptible(0.0 if run.team.size == 1 else FORWARDED_S) as is_interrupted, contextlib.closing(progress):
        for step in range(run.step, config.steps):
            is_last = step + 1 == config.steps
            is_recorded = (step + 1) % config.log_every == 0 or is_last
            if is_recorded:
                run.settle()
                run.watch.before()
            _take_step(run, step)
            run.step = step + 1
            if is_recorded:
                run.settle()
                run.window.add(step, run.watch.after())
            if config.probe_every and run.step % config.probe_every == 0:
                run.probe()
            is_stopping, is_save_due = run.team.any(is_interrupted(), run.is_save_due())
            progress.tick(run.step)
            if is_recorded:
                record = run.record()
                for write in writers:
                    write(record)
            if config.preview_every and run.step % config.preview_every == 0:
                run.preview(write_preview)
            if run.step % config.save_every == 0 or is_save_due or is_last or is_stopping:
                run.save()
            elif run.saver is not None:
                run.saver.poll()
            if is_stopping and not is_last:
                run.end()
                run.wait_for_copies()
                logger.info("stopped after step %d; run the same command again to go on", run.step)
                return Result(run.step, is_interrupted=True)
        run.end()
    return Result(run.step)


def _take_step(run: Run, step: int) -> None:
    """All updates of a step, each in the parts that follow one another in this process."""
    parts = [run.stage.updates(context) for context in run.contexts()]
    while (update := next(parts[0], None)) is not None:
        role, optimiser = update.role, run.optimiser(update)
        for number, part in enumerate(parts):
            update = update or next(part)
            _add_gradients(run, step, update, number + 1, len(parts))
            update = None  # with all that its losses hold, such as a rollout, before the next part makes its own
        for follower in run.followers[role]:
            follower.wait()
        norm = optimiser.step(learning_rate(optimiser.config, step, run.config.steps))
        run.window.add(step, {f"{role}/grad_norm": norm})
        run.clear_gradients()
        for follower in run.followers[role]:
            follower.follow(step)


def _add_gradients(run: Run, step: int, update: Update, part: int, parts: int) -> None:
    """Those of the losses of one part, which is the `part`-th."""
    for piece, compute in enumerate(update.losses, 1):
        run.sum_at_end(update, part == parts and piece == len(update.losses))
        loss, metrics = compute()
        _backward(loss, update, parts * len(update.losses))
        run.window.add(step, {f"{update.role}/{k}": v for k, v in {"loss": loss.detach(), **metrics}.items()})


def _backward(loss: Tensor, update: Update, pieces: int) -> None:
    if loss.ndim or loss.dtype != torch.float32:
        raise ValueError(
            f"loss of role {update.role!r}: got {loss.dtype} {tuple(loss.shape)}, expected a float32 scalar"
        )
    (loss / pieces).backward()  # type: ignore[no-untyped-call]


def _open_writers(config: TrainerConfig, run: Run) -> tuple[list[Writer], Progress]:
    """What takes the records, and the progress line; the first process alone has writers."""
    out, step = Path(config.out), run.step
    progress = Progress(config.steps, step, aside=lambda: run.aside)
    if not run.team.is_first:
        return [], progress
    writers: list[Writer] = [open_jsonl(out / "metrics.jsonl", step=step), progress]
    if config.tensorboard:
        writers.append(open_tensorboard(out / "tensorboard", step=step))
    return writers, progress


def _write_preview(video: Tensor, directory: Path, step: int) -> None:
    from causalreel.data.video import contact_sheet, write_video

    directory.mkdir(parents=True, exist_ok=True)
    contact_sheet(video, directory / f"step-{step:08}.png")
    write_video(directory / f"step-{step:08}.mp4", video[0], fps=16)


@contextlib.contextmanager
def _interruptible(same_s: float) -> Iterator[Callable[[], bool]]:
    """Within it, the first SIGINT or SIGTERM only makes the yielded function true; the second aborts at once.

    same_s: for so many seconds a further signal counts as the first one.
    """
    stop, since = threading.Event(), 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if stop.is_set():
            if time.monotonic() - since < same_s:
                return
            raise KeyboardInterrupt
        since = time.monotonic()
        stop.set()
        logger.warning("stopping: this step is finished and saved first; once more to abort at once")

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stop.is_set
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
