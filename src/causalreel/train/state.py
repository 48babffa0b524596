"""The state of a run: all that a checkpoint holds, and how to get it in and out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from causalreel.config import defaults, dump, fixed
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.lora import adapter_state
from causalreel.parallel.hosted import host_blocks
from causalreel.parallel.sharding import Team
from causalreel.train import checkpoint, sharded
from causalreel.train.adapters import kept
from causalreel.train.average import Follower
from causalreel.train.contents import Content, fingerprints
from causalreel.train.log import NonFiniteError, Window, duration
from causalreel.train.looks import looks
from causalreel.train.meter import Meter
from causalreel.train.optim import RoleOptimiser, learning_rate
from causalreel.train.stage import (
    DataCursor,
    DataSource,
    Probes,
    ShowsData,
    Stage,
    StepContext,
    Update,
    stable_seed,
)
from causalreel.train.watch import Watch

if TYPE_CHECKING:
    from causalreel.train.initial import Start
    from causalreel.train.operations import Work
    from causalreel.train.remote import Remote
    from causalreel.train.trainer import PreviewWriter, TrainerConfig

logger = logging.getLogger("causalreel.train")


class Run:
    """The state of a run: all that a checkpoint holds, and how to get it in and out."""

    def __init__(
        self,
        stage: Stage,
        source: DataSource,
        config: TrainerConfig,
        recipe: Any,
        contents: Sequence[Content],
        starts: Mapping[str, Start],
        team: Team | None,
        work: Work | None,
    ) -> None:
        self.stage, self.source, self.config, self.recipe = stage, source, config, recipe
        self.contents = tuple(contents)
        self._kept: dict[str, str] = {}  # what the checkpoint was made from, where nothing is compared
        self.device = choose_device(config.device)
        self.directory = Path(config.out) / "checkpoints"
        self.step = 0
        self.team = team or Team(config.parallel, self.device)
        self.meter = Meter(work, self.device, self.team.size)
        self.saver = self._make_saver()
        self.remote: Remote | None = None  # in the first process, where it is set
        self.window = Window(mean=self.team.mean)
        self.cursor = DataCursor(len(source), config.seed)
        self.optimisers = self._prepare_roles(starts)
        self.followers = {
            role: [
                Follower(a, stage.roles, is_on_host=config.offload_averages) for a in stage.averages if a.source == role
            ]
            for role in stage.roles
        }
        trained = {role: optimiser.parameters for role, optimiser in self.optimisers.items()}
        self.watch = Watch(stage.roles, trained, stage.averages)
        self._began = self._saved = time.monotonic()
        self.aside = 0.0  # seconds of previews and saves
        self._recorded = (0, 0.0)  # step and seconds of steps at the latest record

    def _prepare_roles(self, starts: Mapping[str, Start]) -> dict[str, RoleOptimiser]:
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
            if name not in trained:
                module.requires_grad_(False).eval()
        are_adapted = any(adapter_state(module) for module in roles.values())
        if are_adapted and (self.config.offload_averages or self.config.offload_frozen):
            key = "averages" if self.config.offload_averages else "frozen"
            raise ValueError(
                f"trainer.offload_{key}: got true, but networks with adapters have their base in common, which stays "
                "on the GPU; give false"
            )
        for name, network in roles.items():
            is_average = name in followed
            is_on_host = self.config.offload_averages if is_average else self.config.offload_frozen
            self._place(network, are_adapted, is_on_host and name not in trained)
        for network in getattr(self.stage, "derived", ()):
            self._place(network, are_adapted)
        for network in getattr(self.stage, "whole", ()):
            self._place(network, is_repeated=True)
        if checkpoint.latest(self.directory) is None:
            for name, start in starts.items():
                if name in roles:
                    seed = stable_seed(self.config.seed, 0, name)
                    start.fill(cast("DiTDenoiser", roles[name]), seed=seed, device=self.device)
        how: dict[str, Any] = {"average": self.team.average} if are_adapted else {"norm": self.team.norm}
        return {name: RoleOptimiser(name, roles[name], options, **how) for name, options in trained.items()}

    def _place(self, network: nn.Module, is_repeated: bool, is_on_host: bool = False) -> None:
        """Put a network on the device, or this process's part of it unless all have it; one without storage gets some.

        is_on_host: a denoiser's weights wait in the host's memory instead.
        """
        is_on_host = is_on_host and isinstance(network, DiTDenoiser)
        if is_on_host and self.team.control is None:
            host_blocks(cast("DiTDenoiser", network), self.device)
            return
        is_empty = any(parameter.is_meta for parameter in network.parameters())
        if not is_empty:
            network.to(self.device)
        self.team.repeat(network) if is_repeated else self.team.share(network, is_on_host=is_on_host)
        if is_empty:
            network.to_empty(device="cpu" if is_on_host else self.device)

    def _make_saver(self) -> sharded.Saver | None:
        """What writes checkpoints where several processes share the roles."""
        if self.team.control is None:
            return None
        config = self.config
        how = {"is_hashed": config.check, "is_behind": config.saves_behind}
        return sharded.Saver(self.directory, self.team, whole=self._whole, **how)

    def contexts(self) -> list[StepContext]:
        """What the stage is given for each part of the next step; the first moves the data position."""
        count, step = self.config.accumulate, (self.step, self.config.seed, self.source)
        first, parts = self.team.part * count, self.team.parts * count
        cursors = [self.cursor, *(self.cursor.copy() for _ in range(1, count))]
        waiting = self.meter.waiting
        return [StepContext(*step, c, self.device, first + i, parts, waiting) for i, c in enumerate(cursors)]

    def sum_at_end(self, update: Update, is_end: bool) -> None:
        """Whether the next backward pass is the last one of the update."""
        self.team.sum_at_end(self.stage.roles[update.role], is_end)

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
        record |= self.meter.record(self.step - step_before, working - seconds_before)
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

    def settle(self) -> None:
        """Wait for averages that follow on the host."""
        for follower in (f for followers in self.followers.values() for f in followers):
            follower.wait()

    def preview(self, write: PreviewWriter) -> None:
        """Let the stage show its progress, without a trace in random state or data position."""
        began = self._clock()
        context = self._aside_context()
        with torch.no_grad(), self._own_random():
            video = self.stage.preview(context)  # in all processes alike
            shown = {"preview": video}
            if isinstance(self.stage, ShowsData) and self.step < self.config.preview_every:
                shown["data"] = self.stage.viewer.data(context)
        for name, of in shown.items():
            if of is not None:
                self.window.add(self.step, {f"{name}/{what}": value for what, value in looks(of).items()})
        if video is not None and self.team.is_first:
            place = Path(self.config.out) / "previews"
            write(video, place, self.step)
            logger.info("preview of step %d in %s: %.1f s", self.step, place, self._step_aside(began))

    def probe(self) -> None:
        """Let the stage say how well its student knows the data, without a trace in random state or data position."""
        if not isinstance(self.stage, Probes):
            return
        began = self._clock()
        # With gradient it is the pass of a training step, which is compiled or recorded already; sharded networks want
        # a backward pass after it.
        with torch.set_grad_enabled(self.team.size == 1), self._own_random():
            found = self.stage.probe(self._aside_context(parts=self.team.parts * self.config.accumulate))
        self.window.add(self.step, {f"probe/{name}": value.detach() for name, value in found.items()})
        self._step_aside(began)

    def _aside_context(self, *, parts: int = 1) -> StepContext:
        """What a stage gets beside its steps; parts: in how many a batch is cut."""
        cursor = self.cursor.copy()
        return StepContext(self.step, self.config.seed, self.source, cursor, self.device, parts=parts)

    def _own_random(self) -> AbstractContextManager[None]:
        """Within it torch's generators may be used; afterwards they are as before."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])

    def is_save_due(self) -> bool:
        """Whether the time between checkpoints is over."""
        limit = self.config.save_every_seconds
        return limit is not None and time.monotonic() - self._saved >= limit

    def save(self) -> None:
        """Write a checkpoint, unless a loss since the last record was not finite."""
        began = self._clock()
        self._means()
        self.settle()
        frozen = self._frozen()
        trainer = {
            "step": self.step,
            "seconds": self.seconds,
            "aside": self.aside,
            "recorded": self._recorded,
            "window": self.window.fetch(),
            "rows": self.cursor.rows,
            "position": self.cursor.position,
        }
        moments = {}
        if self.saver is None:
            trainer["optimisers"] = {role: optimiser.adamw.state_dict() for role, optimiser in self.optimisers.items()}
            trainer["rng"] = self._random_state()
        else:
            moments = self._moments()
            trainer["rngs"] = self.team.gathered(self._random_state())
        roles = dict(kept(self.stage.roles, frozen))
        made_from = {**self._kept, **fingerprints(self.contents)}
        facts = (dump(self.recipe), fixed(self.recipe), made_from, frozenset(frozen), moments)
        state = checkpoint.State(roles, trainer, *facts)
        if self.saver is None:
            path = checkpoint.save(self.directory, self.step, state)
            self._whole(path)
        else:
            path = self.saver.save(self.step, state)
        self._saved = time.monotonic()
        logger.info("saved %s: %.1f s", path, self._step_aside(began))

    def _whole(self, path: Path) -> None:
        """In the first process, once a checkpoint is there: copy it, and delete older ones."""
        if self.remote is not None:
            self.remote.send(path)
        checkpoint.prune(self.directory, self.config.keep, () if self.remote is None else self.remote.held)

    def wait_for_copies(self) -> None:
        """In all processes: until the remote has what was saved, or could not take it."""
        if self.remote is not None:
            self.remote.wait()
        if self.config.remote is not None:
            self.team.wait()

    def end(self) -> None:
        """Wait for averages that follow on the host, and for a checkpoint that is still being written."""
        self.settle()
        if self.saver is not None:
            self.saver.finish()

    def _random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _moments(self) -> dict[str, Tensor]:
        """What all optimisers hold, by "role.adamw/parameter/kind"."""
        found = self.optimisers.items()
        return {f"{role}.adamw/{name}": value for role, o in found for name, value in o.moments().items()}

    def _frozen(self) -> set[str]:
        """The roles that nothing changes."""
        return self.stage.roles.keys() - self.optimisers.keys() - {average.role for average in self.stage.averages}

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
            self._seed(0)
            for follower in (f for followers in self.followers.values() for f in followers):
                follower.copy()
            self.settle()
            return False
        self._kept = checkpoint.contents_of(path)
        if self.contents and not self._kept:
            logger.info("%s is older than fingerprints are: data and initial weights cannot be compared with it", path)
        trainer = self._read_shards(path) if sharded.is_sharded(path) else self._read_whole(path)
        if trainer["rows"] != self.cursor.rows:
            raise ValueError(f"checkpoint {path}: the data source had {trainer['rows']} rows, now {self.cursor.rows}")
        self._set_random_state(trainer)
        self.step, self.cursor.position = trainer["step"], trainer["position"]
        self.window, self._recorded = Window(trainer["window"], mean=self.team.mean), trainer["recorded"]
        self._began, self.aside = time.monotonic() - trainer["seconds"], trainer.get("aside", 0.0)
        logger.info("resumed %s after %s of training", path, duration(trainer["seconds"]))
        return True

    def _read_whole(self, path: Path) -> dict[str, Any]:
        """A checkpoint of one process, into one or several -> what is no tensor of a role."""
        state = checkpoint.load(path, is_checked=self.config.check)
        if state.roles.keys() != self.stage.roles.keys():
            raise ValueError(
                f"checkpoint {path} has the roles {sorted(state.roles)}, expected {sorted(self.stage.roles)}"
            )
        for role, wanted in kept(self.stage.roles, self._frozen()):
            checkpoint.load_strict(wanted, state.roles[role], f"checkpoint {path}, role {role!r}")
        for role, optimiser in self.optimisers.items():
            optimiser.take(state.trainer["optimisers"][role])
        return state.trainer

    def _read_shards(self, path: Path) -> dict[str, Any]:
        """A checkpoint of several processes, into as many or others; -> as `_read_whole`."""
        if self.config.check:
            sharded.verify(path, self.team)
        names = [name.split(".adamw/", 1) for name in sharded.moments_in(path)]
        for role, optimiser in self.optimisers.items():
            optimiser.make_moments(name for owner, name in names if owner == role)
        roles = dict(kept(self.stage.roles, self._frozen()))
        tensors = {f"{role}/{name}": tensor for role, held in roles.items() for name, tensor in held.items()}
        sharded.read_into(path, {**tensors, **self._moments()}, self.team)
        return checkpoint.load_trainer(path)

    def _seed(self, step: int) -> None:
        """Seed torch's own generators, in each process otherwise: its rows are others, and so is what dropout drops."""
        purpose = "global" if self.team.is_first else f"global {self.team.rank}"
        torch.manual_seed(stable_seed(self.config.seed, step, purpose))

    def _set_random_state(self, trainer: dict[str, Any]) -> None:
        """This process's, or one of its own where another number of processes wrote the checkpoint."""
        states = trainer["rngs"] if "rngs" in trainer else [trainer["rng"]]
        if len(states) != self.team.size:
            self._seed(trainer["step"])
            return
        state = states[self.team.rank]
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)


def resumable(config: TrainerConfig, recipe: Any, contents: Sequence[Content] = ()) -> Path | None:
    """The checkpoint that a run would go on from; ValueError if it is of another run or has more steps."""
    path = checkpoint.latest(Path(config.out) / "checkpoints")
    if path is None:
        return None
    checkpoint.check_same(path, fixed(recipe), contents if config.check else (), before=partial(defaults, recipe))
    done = checkpoint.step_of(path)
    if done > config.steps:
        raise ValueError(f"steps: got {config.steps}, but {path} has {done}; ask for {done} or more or use another out")
    return path


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
