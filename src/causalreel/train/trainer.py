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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

from causalreel.config import FREE, dump, fixed
from causalreel.files import remove_leftovers
from causalreel.folders import claim
from causalreel.train import checkpoint
from causalreel.train.average import Follower
from causalreel.train.contents import Content, fingerprints
from causalreel.train.log import NonFiniteError, Progress, Window, Writer, duration, open_jsonl, open_tensorboard
from causalreel.train.optim import OptimiserConfig, RoleOptimiser, learning_rate
from causalreel.train.stage import DataCursor, DataSource, Stage, StepContext, Update, stable_seed

PreviewWriter = Callable[[Tensor, Path, int], None]
"""Shows a video (B,T,3,H,W) in [-1, 1]: gets it, the directory for previews and the number of completed steps."""

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
    keep: int = field(default=2, metadata=FREE)
    """Checkpoints kept."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=FREE)
    """Where to train; auto takes the GPU if there is one."""
    tensorboard: bool = field(default=False, metadata=FREE)
    """Whether to write TensorBoard event files beside the metrics file."""
    check: bool = field(default=True, metadata=FREE)
    """Whether the contents of data, weights and checkpoints are hashed and compared, about a second per GB."""

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "log_every": 1, "save_every": 1, "preview_every": 0, "keep": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed {least} or more")
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
    write_preview: PreviewWriter | None = None,
) -> Result:
    """Train a stage up to `config.steps`, from the newest checkpoint under `config.out` if there is one.

    `recipe` is the resolved run config that contains `config`: it is saved with each checkpoint and must be the same on
    resuming, but for fields marked `FREE`; so must `contents`, what the run is made from. Raises NonFiniteError, and
    saves nothing, once a loss or gradient norm is infinite or NaN. Ctrl-C and SIGTERM end the run after the current
    step, with a checkpoint; a second one at once. The folder is claimed: a second process in it is a ValueError before
    anything in it is touched.
    """
    with claim(config.out, "training") as is_alone:
        for folder in ("", "checkpoints", "previews", "export"):
            remove_leftovers(Path(config.out) / folder, is_alone=is_alone and folder == "checkpoints")
        run = Run(stage, source, config, config if recipe is None else recipe, contents)
        return _train(run, _write_preview if write_preview is None else write_preview)


def _train(run: Run, write_preview: PreviewWriter) -> Result:
    stage, config, recipe = run.stage, run.config, run.recipe
    if not run.restore():
        logger.info("resolved config:\n%s", dump(recipe))
    if run.step >= config.steps:
        logger.info("nothing to do: %d of %d steps are done", run.step, config.steps)
        return Result(run.step, is_idle=True)

    writers, progress = _open_writers(config, run)
    if config.preview_every and run.step == 0:
        run.preview(write_preview)

    with _interruptible() as is_stopping, contextlib.closing(progress):
        for step in range(run.step, config.steps):
            for update in stage.updates(run.context()):
                optimiser = run.optimiser(update)
                for compute in update.losses:
                    loss, metrics = compute()
                    _backward(loss, update)
                    run.window.add(
                        step, {f"{update.role}/{k}": v for k, v in {"loss": loss.detach(), **metrics}.items()}
                    )
                norm = optimiser.step(learning_rate(optimiser.config, step, config.steps))
                run.window.add(step, {f"{update.role}/grad_norm": norm})
                run.clear_gradients()
                for follower in run.followers[update.role]:
                    follower.follow(step)

            run.step = step + 1
            is_last = run.step == config.steps
            progress.tick(run.step)
            if run.step % config.log_every == 0 or is_last:
                record = run.record()
                for write in writers:
                    write(record)
            if config.preview_every and run.step % config.preview_every == 0:
                run.preview(write_preview)
            if run.step % config.save_every == 0 or run.is_save_due() or is_last or is_stopping():
                run.save()
            if is_stopping() and not is_last:
                logger.info("stopped after step %d; run the same command again to go on", run.step)
                return Result(run.step, is_interrupted=True)
    return Result(run.step)


class Run:
    """The state of a run: all that a checkpoint holds, and how to get it in and out."""

    def __init__(
        self, stage: Stage, source: DataSource, config: TrainerConfig, recipe: Any, contents: Sequence[Content] = ()
    ) -> None:
        self.stage, self.source, self.config, self.recipe = stage, source, config, recipe
        self.contents = tuple(contents)
        self._kept: dict[str, str] = {}  # what the checkpoint was made from, where nothing is compared
        self.device = choose_device(config.device)
        self.directory = Path(config.out) / "checkpoints"
        self.step = 0
        self.window = Window()
        self.cursor = DataCursor(len(source), config.seed)
        self.optimisers = self._prepare_roles()
        self.followers = {
            role: [Follower(a, stage.roles) for a in stage.averages if a.source == role] for role in stage.roles
        }
        self._began = self._saved = time.monotonic()
        self.aside = 0.0  # seconds of previews and saves
        self._recorded = (0, 0.0)  # step and seconds of steps at the latest record

    def _prepare_roles(self) -> dict[str, RoleOptimiser]:
        """Put every role on the device, freeze those that are not trained, make the optimisers of the others."""
        roles, trained = self.stage.roles, self.config.optimisers
        _check_names("optimisers", trained, roles)
        _check_names("averages", {name: 0 for a in self.stage.averages for name in (a.role, a.source)}, roles)
        followed = [average.role for average in self.stage.averages]
        for name in followed:
            if name in trained or followed.count(name) > 1:
                other = "also has an optimiser" if name in trained else "follows two roles"
                raise ValueError(f"averages: role {name!r} {other}")
        for name, module in roles.items():
            module.to(self.device)
            if name not in trained:
                module.requires_grad_(False).eval()
        return {name: RoleOptimiser(name, roles[name], options) for name, options in trained.items()}

    def context(self, cursor: DataCursor | None = None) -> StepContext:
        """What the stage is given for the next step."""
        return StepContext(self.step, self.config.seed, self.source, cursor or self.cursor, self.device)

    def optimiser(self, update: Update) -> RoleOptimiser:
        """The optimiser of an update's role."""
        if update.role not in self.optimisers:
            raise ValueError(f"update: role {update.role!r} has no optimiser; allowed: {', '.join(self.optimisers)}")
        if not update.losses:
            raise ValueError(f"update of role {update.role!r}: got no losses, at least one is needed")
        return self.optimisers[update.role]

    def clear_gradients(self) -> None:
        """Drop the gradients of all roles, so that a loss on one role leaves nothing behind in another."""
        for optimiser in self.optimisers.values():
            optimiser.clear()

    @property
    def seconds(self) -> float:
        """Seconds of training so far, over all resumptions."""
        return time.monotonic() - self._began

    def record(self) -> dict[str, float | int]:
        """Close the window: the metrics since the last record. Waits for the GPU; raises NonFiniteError."""
        means, seconds = self._means(), self.seconds
        step_before, seconds_before = self._recorded
        working = seconds - self.aside
        record: dict[str, float | int] = {"step": self.step, "seconds": seconds, **means}
        for role, optimiser in self.optimisers.items():
            record[f"{role}/lr"] = learning_rate(optimiser.config, self.step - 1, self.config.steps)
        record["steps_per_second"] = (self.step - step_before) / max(working - seconds_before, 1e-9)
        if self.device.type == "cuda":
            record["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.window.clear()
        self._recorded = (self.step, working)
        return record

    def _means(self) -> dict[str, float]:
        try:
            return self.window.means()
        except NonFiniteError as error:
            kept = checkpoint.latest(self.directory)
            rest = f"the last checkpoint is {kept}" if kept else "there is no checkpoint yet"
            raise NonFiniteError(f"{error}. Training stopped and saved nothing; {rest}") from None

    def preview(self, write: PreviewWriter) -> None:
        """Let the stage show its progress, without a trace in random state or data position."""
        began = self._clock()
        devices = [self.device] if self.device.type == "cuda" else []
        cursor = DataCursor(self.cursor.rows, self.config.seed, self.cursor.position)
        with torch.no_grad(), torch.random.fork_rng(devices):
            video = self.stage.preview(self.context(cursor))
        if video is not None:
            place = Path(self.config.out) / "previews"
            write(video, place, self.step)
            logger.info("preview of step %d in %s: %.1f s", self.step, place, self._step_aside(began))

    def is_save_due(self) -> bool:
        """Whether the time between checkpoints is over."""
        limit = self.config.save_every_seconds
        return limit is not None and time.monotonic() - self._saved >= limit

    def save(self) -> None:
        """Write a checkpoint, unless a loss since the last record was not finite."""
        began = self._clock()
        self._means()
        frozen = self.stage.roles.keys() - self.optimisers.keys() - {average.role for average in self.stage.averages}
        trainer = {
            "step": self.step,
            "seconds": self.seconds,
            "aside": self.aside,
            "recorded": self._recorded,
            "window": self.window.fetch(),
            "rows": self.cursor.rows,
            "position": self.cursor.position,
            "optimisers": {role: optimiser.adamw.state_dict() for role, optimiser in self.optimisers.items()},
            "rng": {"cpu": torch.get_rng_state()},
        }
        if self.device.type == "cuda":
            trainer["rng"]["cuda"] = torch.cuda.get_rng_state(self.device)
        roles = {role: module.state_dict() for role, module in self.stage.roles.items()}
        made_from = {**self._kept, **fingerprints(self.contents)}
        state = checkpoint.State(roles, trainer, dump(self.recipe), fixed(self.recipe), made_from, frozenset(frozen))
        path = checkpoint.save(self.directory, self.step, state, keep=self.config.keep)
        self._saved = time.monotonic()
        logger.info("saved %s: %.1f s", path, self._step_aside(began))

    def _clock(self) -> float:
        """Now, when the GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def _step_aside(self, began: float) -> float:
        """Seconds since `began`, which do not count as training steps."""
        seconds = time.monotonic() - began
        self.aside += seconds
        return seconds

    def restore(self) -> bool:
        """Take over the newest checkpoint if there is one; else seed torch and let the averages start as copies."""
        path = resumable(self.config, self.recipe, self.contents)
        if path is None:
            torch.manual_seed(stable_seed(self.config.seed, 0, "global"))
            for follower in (f for followers in self.followers.values() for f in followers):
                follower.copy()
            return False
        state = checkpoint.load(path, is_checked=self.config.check)
        self._kept = dict(state.contents)
        if self.contents and not state.contents:
            logger.info("%s is older than fingerprints are: data and initial weights cannot be compared with it", path)
        trainer = state.trainer
        if state.roles.keys() != self.stage.roles.keys():
            raise ValueError(
                f"checkpoint {path} has the roles {sorted(state.roles)}, expected {sorted(self.stage.roles)}"
            )
        if trainer["rows"] != self.cursor.rows:
            raise ValueError(f"checkpoint {path}: the data source had {trainer['rows']} rows, now {self.cursor.rows}")
        for role, module in self.stage.roles.items():
            checkpoint.load_strict(module, state.roles[role], f"checkpoint {path}, role {role!r}")
        for role, optimiser in self.optimisers.items():
            optimiser.adamw.load_state_dict(trainer["optimisers"][role])
        torch.set_rng_state(trainer["rng"]["cpu"])
        if self.device.type == "cuda" and "cuda" in trainer["rng"]:
            torch.cuda.set_rng_state(trainer["rng"]["cuda"], self.device)
        self.step, self.cursor.position = trainer["step"], trainer["position"]
        self.window, self._recorded = Window(trainer["window"]), trainer["recorded"]
        self._began, self.aside = time.monotonic() - trainer["seconds"], trainer.get("aside", 0.0)
        logger.info("resumed %s after %s of training", path, duration(trainer["seconds"]))
        return True


def resumable(config: TrainerConfig, recipe: Any, contents: Sequence[Content] = ()) -> Path | None:
    """The checkpoint that a run would go on from; ValueError if it is of another run or has more steps."""
    path = checkpoint.latest(Path(config.out) / "checkpoints")
    if path is None:
        return None
    checkpoint.check_same(path, fixed(recipe), contents if config.check else ())
    done = checkpoint.step_of(path)
    if done > config.steps:
        raise ValueError(f"steps: got {config.steps}, but {path} has {done}; ask for {done} or more or use another out")
    return path


def _backward(loss: Tensor, update: Update) -> None:
    if loss.ndim or loss.dtype != torch.float32:
        raise ValueError(
            f"loss of role {update.role!r}: got {loss.dtype} {tuple(loss.shape)}, expected a float32 scalar"
        )
    (loss / len(update.losses)).backward()  # type: ignore[no-untyped-call]


def _check_names(what: str, names: dict[str, Any], roles: dict[str, Any]) -> None:
    for name in names:
        if name not in roles:
            raise ValueError(f"{what}: the stage has no role {name!r}; allowed: {', '.join(roles)}")


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> the device; ValueError for a GPU that is not there."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got cuda, but there is no GPU here; allowed: auto, cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _open_writers(config: TrainerConfig, run: Run) -> tuple[list[Writer], Progress]:
    out, step = Path(config.out), run.step
    progress = Progress(config.steps, step, aside=lambda: run.aside)
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
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Within it, the first SIGINT or SIGTERM only makes the yielded function true; the second aborts at once."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
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
