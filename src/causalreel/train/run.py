"""From a recipe to a run: build the roles, the data and the stage, train, export.

A recipe names its stage and holds only what differs from the defaults. The trained weights leave as an export folder
(`<out>/export`), which is what later stages take in `init` and what `causalreel generate --model` loads.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from causalreel import config as configs
from causalreel.codecs.tiny import tiny_codec
from causalreel.codecs.wan_vae import latent_statistics
from causalreel.config import FREE
from causalreel.data.prepare import render_clips
from causalreel.data.sources import ClipSource
from causalreel.data.world import WorldConfig
from causalreel.data.worlds import WORLDS, flat
from causalreel.files import remove_folder
from causalreel.flow import sigma_grid, warp_steps
from causalreel.folders import claim
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.linear import effective_state
from causalreel.nn.lora import LoRAConfig
from causalreel.nn.policies.registry import policy_from
from causalreel.nn.split_attention import fills, processors_of
from causalreel.parallel.compile import compile_blocks
from causalreel.parallel.fast import accelerate, check_precision
from causalreel.parallel.graphs import graph_calls
from causalreel.parallel.mesh import Launch, join, launch
from causalreel.parallel.offload import offload_activations
from causalreel.parallel.recompute import recompute_blocks
from causalreel.parallel.sharding import Team, whole_state
from causalreel.solvers import unipc_sigmas
from causalreel.train import trainer
from causalreel.train.adapters import lora_of
from causalreel.train.arithmetic import arithmetic
from causalreel.train.checkpoint import latest
from causalreel.train.codec_of import name_in_export
from causalreel.train.contents import Content, fingerprints
from causalreel.train.ingredients import Ingredients, gather
from causalreel.train.initial import Start
from causalreel.train.kit import Viewer
from causalreel.train.operations import Clip, Work, step_work
from causalreel.train.stage import DataSource, Stage
from causalreel.train.stages.ar_diffusion import ARDiffusion, ARDiffusionConfig
from causalreel.train.stages.causal_cd import CausalCD, CausalCDConfig
from causalreel.train.stages.causal_ode import CausalODE, CausalODEConfig, make_part, parts_of
from causalreel.train.stages.codec import CodecConfig, CodecStage
from causalreel.train.stages.dmd import DMD, DMDConfig
from causalreel.train.stages.pretrain import Pretrain, PretrainConfig
from causalreel.train.state import choose_device, resumable
from causalreel.train.stored import Store, placed
from causalreel.train.trainer import Result, TrainerConfig
from causalreel.types import LatentSpec
from causalreel.weights.build import empty_denoiser
from causalreel.weights.export import (
    MODEL,
    Export,
    Sampling,
    codec_identity,
    find_codec,
    load_codec,
    read_codec,
    read_export,
    save_codec,
    save_export,
)
from causalreel.weights.lora_layouts import write_lora

if TYPE_CHECKING:
    from causalreel.nn.policies.registry import AnyPolicy

log = logging.getLogger("causalreel.train")

SETTINGS: dict[str, type] = {
    "codec": CodecConfig,
    "pretrain": PretrainConfig,
    "ar_diffusion": ARDiffusionConfig,
    "causal_ode": CausalODEConfig,
    "causal_cd": CausalCDConfig,
    "dmd": DMDConfig,
}
"""The stages, and the dataclass of each one's `settings`."""


ADAPTERS = "lora"
"""Folder of the adapters, beside the export."""


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    stage: Literal["codec", "pretrain", "ar_diffusion", "causal_ode", "causal_cd", "dmd"]
    """What is trained."""
    trainer: TrainerConfig
    """How long, with which optimisers, and where it is kept."""
    settings: Any = field(default_factory=dict)
    """The stage's own settings: losses, chunk size, step lists."""
    model: str = "tiny"
    """Size of a network that no `init` gives: a preset of nn.presets, or of the codec."""
    init: dict[str, Path] = field(default_factory=dict, metadata=FREE)
    """Role -> where its weights start from: an export folder, an embedded model such as tiny/base, a released one such
    as wan2.1-t2v-1.3b, a weights file or folder of any known layout, or random:wan-1.3b to measure with."""
    data: Path | None = field(default=None, metadata=FREE)
    """Prepared data (see `causalreel prepare` and `encode`); the codec stage renders its own clips."""
    rows: int | None = None
    """Clips used of the data; null for all."""
    world: Literal["flat", "walk"] = "flat"
    """Whose clips the codec stage renders, and the data are of: objects on a plane, or a place that one walks in."""
    data_seed: int = 0
    """Which world of that kind."""
    codec: Path | None = field(default=None, metadata=FREE)
    """Codec that made the data: a folder, tiny, or wan (of Wan2.1); used for previews and named in the export."""
    lora: dict[str, LoRAConfig] = field(default_factory=dict)
    """Role -> adapters that are trained in place of its weights. Roles that start from one folder share these then."""
    lora_init: dict[str, Path] = field(default_factory=dict, metadata=FREE)
    """Role -> LoRA file or folder that its adapters begin as, such as <out>/lora of an earlier run."""
    lora_merged: bool = field(default=True, metadata=FREE)
    """Whether the weights with the adapters in them are exported too, beside the adapters."""
    compute: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata=FREE)
    """Arithmetic of the networks; weights stay float32. auto: bfloat16 on the GPU."""
    speed: Literal["plain", "compiled", "graphed"] = field(default="plain", metadata=FREE)
    """On the GPU: compile blocks with torch.compile, and also replay calls as CUDA graphs. The CPU is always plain."""

    def __post_init__(self) -> None:
        expected = SETTINGS[self.stage]
        if isinstance(self.settings, dict):
            object.__setattr__(self, "settings", configs.build(expected, self.settings, "settings"))
        if not isinstance(self.settings, expected):
            raise ValueError(
                f"settings: got {self.settings!r}, expected a mapping with the keys of {expected.__name__}"
            )
        if self.stage == "codec" and self.model != "tiny":
            raise ValueError(f"model: got {self.model!r}, the codec stage trains only 'tiny'")
        if isinstance(self.settings, CodecConfig) and self.world != "flat" and self.settings.events:
            raise ValueError(f"settings.events: got {self.settings.events}, the world {self.world!r} has none: give 0")
        for role in self.lora:
            if role not in self.trainer.optimisers or self.stage == "codec":
                raise ValueError(f"lora.{role}: the role has no optimiser that could train adapters")
        for role in self.lora_init:
            if role not in self.lora:
                raise ValueError(f"lora_init.{role}: the role has no adapters; lora.{role} says which")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows: got {self.rows}, allowed 1 or more, or null for all")


RECIPES = Path(__file__).parents[1] / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A YAML file, or the name of a recipe that ships with the package, such as `tiny/causal_cd`."""
    path, shipped = Path(name), RECIPES
    if path.suffix in (".yaml", ".yml"):
        return path
    found = shipped / f"{name}.yaml"
    if not found.is_file():
        names = shipped_recipes()
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"no recipe {name!r}{hint} there are {', '.join(names)}, or give a .yaml file")
    return found


def resolve(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe `name` (see `find_recipe`) with `key.key=value` overrides laid upon it; reads, touches nothing."""
    return configs.load(find_recipe(name), Recipe, overrides)


def describe(recipe: Recipe) -> str:
    """The plan of a run in words."""
    s = recipe.trainer
    lines = [
        f"# stage {recipe.stage}: {s.steps} steps, trained roles: {', '.join(s.optimisers)}",
        *(f"# {role} starts from {path}" for role, path in recipe.init.items()),
        f"# data: {recipe.data or 'clips rendered on the fly'}",
        *(f"# {role} trains adapters of rank {lora.rank}" for role, lora in recipe.lora.items()),
        f"# checkpoints in {s.out}/checkpoints every {s.save_every} steps; export in {s.out}/export",
    ]
    return "\n".join(lines)


def run(recipe: Recipe) -> Result:
    """Train and export; the same call again continues. Returns how it ended; the process computes as before then.

    Started by torchrun, all processes of the launch train together.
    """
    out, where = Path(recipe.trainer.out), launch()
    check_processes(recipe, 1 if where is None else where.size)
    _check_folder(out)
    build = _build_codec if recipe.stage == "codec" else _build_denoising
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(_joined(where, recipe.trainer.device))
        stack.enter_context(arithmetic(device))
        team = Team(recipe.trainer.parallel, device)
        if team.is_first:
            stack.enter_context(claim(out, "training"))
        team.wait()
        run = build(recipe, device, team)
        how: dict[str, Any] = {"contents": run.contents, "starts": run.starts, "work": run.work}
        result = trainer.train(run.stage, run.source, recipe.trainer, recipe=recipe, team=team, **how)
        if result.is_idle and _is_exported(out / "export", recipe, run.contents):
            log.info("%s is up to date", out / "export")
        elif not result.is_interrupted:
            run.export(out / "export")
        return result


@contextlib.contextmanager
def _joined(where: Launch | None, device: str) -> Iterator[torch.device]:
    """This process's device, while it is joined with the others of the launch if there are any."""
    if where is None:
        yield choose_device(device)
        return
    with join(where, None if device == "auto" else device) as mesh:
        yield mesh.device


def check_processes(recipe: Recipe, count: int) -> None:
    """ValueError, which names the key to change, for a recipe that so many processes cannot run."""
    parallel, accumulate = recipe.trainer.parallel, recipe.trainer.accumulate
    parallel.shards(count)
    parts = count // parallel.context * accumulate
    if recipe.settings.batch % parts:
        raise ValueError(
            f"settings.batch: got {recipe.settings.batch}, which {count // parallel.context} processes with rows of "
            f"their own, times trainer.accumulate={accumulate}, cannot share: take a multiple of {parts}"
        )
    is_graphed = recipe.speed == "graphed" and choose_device(recipe.trainer.device).type == "cuda"
    if count > 1 and is_graphed:
        raise ValueError("speed: got graphed, which one process alone can do; with several use speed=compiled or plain")
    for key in ("offload_averages", "offload_frozen"):
        if is_graphed and getattr(recipe.trainer, key):
            raise ValueError(
                f"speed: got graphed, whose recorded calls need their weights on the GPU, with trainer.{key}: use "
                f"speed=compiled or plain, or trainer.{key}=false"
            )


def _is_exported(folder: Path, recipe: Recipe, contents: Sequence[Content]) -> bool:
    """Whether the export is of this recipe and these contents: then it is not written again, not even rounded anew."""
    try:
        if recipe.stage == "codec":
            told, weights = read_codec(folder).provenance, find_codec(folder)
        else:
            told, weights = read_export(folder).provenance, folder / MODEL
    except ValueError:
        return False
    is_there = weights.is_file() and ("student" not in recipe.lora or (folder.parent / ADAPTERS).is_dir())
    return is_there and told == provenance(recipe, contents)


@dataclass(frozen=True)
class Prepared:
    """A run before its first step."""

    stage: Stage
    source: DataSource
    export: Callable[[Path], None]
    contents: tuple[Content, ...] = ()
    starts: Mapping[str, Start] = field(default_factory=dict)
    """What fills roles that have no storage."""
    work: Work | None = None
    """Operations of a step."""


def _check_folder(out: Path) -> None:
    """Fail before the work if nothing could be written into `out`; makes nothing."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"trainer.out: cannot write to {out}, {there} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"trainer.out: cannot write to {out}, {there} is not writable")


# ---- codec


def _build_codec(recipe: Recipe, device: torch.device, team: Team) -> Prepared:
    contents = ()
    codec = tiny_codec(recipe.trainer.seed)
    if (start := recipe.init.get("codec")) is not None:
        codec.load_state_dict(load_codec(start).state_dict())
        contents = (Content("init.codec", str(start), codec_identity(start)),)
    resumable(recipe.trainer, recipe, contents)
    codec = codec.to(device)
    if device.type == "cuda":
        codec.forward = torch.autocast("cuda", torch.bfloat16)(torch.compile(codec.forward))  # float32 weights stay
    world = flat(WorldConfig(events=recipe.settings.events)) if recipe.settings.events else WORLDS[recipe.world]()
    clips = render_clips(recipe.rows or 4096, seed=recipe.data_seed, world=world, device=device)
    stage = CodecStage(codec, recipe.settings)

    def export(folder: Path) -> None:
        weights = whole_state(codec.state_dict(), is_kept=team.is_first)
        if not team.is_first:
            return
        trained = tiny_codec(recipe.trainer.seed).to(device)
        trained.load_state_dict(weights)
        videos = [clips[i : i + 64].float() / 127.5 - 1 for i in range(0, min(1024, len(clips)), 64)]
        trained.set_statistics(*latent_statistics(trained, videos))
        save_codec(folder, trained, provenance(recipe, contents))
        log.info("codec written to %s", folder)

    return Prepared(stage, ClipSource(clips), export, contents)


# ---- denoisers


def _build_denoising(recipe: Recipe, device: torch.device, team: Team | None = None) -> Prepared:
    made = gather(recipe, device, team)
    team = made.team
    resumable(recipe.trainer, recipe, made.contents)  # before anything is made
    stage, source, exported, sampling = STAGES[recipe.stage](recipe, made, device)
    assert recipe.codec is not None
    codec_folder = recipe.codec

    def export(folder: Path) -> None:
        student = made.roles["student"]
        if "student" in recipe.lora:
            if team.is_first:
                _export_adapters(stage.roles[exported], recipe, folder.parent / ADAPTERS)
            if not recipe.lora_merged:
                return
        weights = whole_state(effective_state(stage.roles[exported]), is_kept=team.is_first)
        if not team.is_first:
            return
        model = empty_denoiser(student.config, context=student.context)
        model.load_state_dict(weights, assign=True)
        card = Export(
            name=f"{recipe.stage}-{Path(recipe.trainer.out).name}",
            model=student.config,
            sampling=sampling,
            context=cast("AnyPolicy", student.context),
            frames=made.frames,
            fps=made.family.fps,
            latent=made.spec,
            codec=name_in_export(codec_folder, folder),
            text=made.family.text.name,
            family=made.family.name,
            provenance=provenance(recipe, made.contents),
        )
        save_export(folder, model, card)
        log.info("weights written to %s", folder)

    sizes = {role: net.config for role, net in made.roles.items()}
    context = made.roles["student"].context
    work = step_work(recipe.settings, sizes, Clip(made.frames, made.spec), context)
    return Prepared(stage, source, export, made.contents, made.starts, work)


def _export_adapters(net: nn.Module, recipe: Recipe, folder: Path) -> None:
    """The adapters as peft has them, in a folder of their own, in place of those of an earlier time."""
    assert isinstance(net, DiTDenoiser)
    folder.parent.mkdir(parents=True, exist_ok=True)
    note = {"base": str(recipe.init.get("student", recipe.model))}
    fresh = folder.with_name(f"{folder.name}-new")
    for left in (path for path in (fresh,) if path.exists()):
        remove_folder(left)
    write_lora(lora_of(net, str(folder)), fresh, "peft", note=note)
    if folder.exists():  # not before there is what takes its place
        remove_folder(folder)
    fresh.rename(folder)
    log.info("adapters written to %s", folder)


Built = tuple[Stage, DataSource, str, Sampling]
"""A stage, its data, the role that is exported and how that is sampled."""


def _compiled(recipe: Recipe, stage: Stage, device: torch.device) -> Stage:
    """Recompute, compile and graph after the stage has copied its roles: a copy does not inherit these."""
    for role, net in stage.roles.items():
        assert isinstance(net, DiTDenoiser)
        if role in recipe.trainer.optimisers:
            recompute_blocks(net, recipe.trainer.recompute)
            if recipe.trainer.offload_activations:
                offload_activations(net)
        if device.type == "cuda" and recipe.speed != "plain":
            compile_blocks(net)
        if device.type == "cuda" and recipe.speed == "graphed":
            graph_calls(net)
    return stage


def _pretrain(recipe: Recipe, made: Ingredients, device: torch.device) -> Built:
    c: PretrainConfig = recipe.settings
    sampling = Sampling(chunk=None, solver="euler", guidance=3.0, multistep=48, shift=c.shift)
    viewer = Viewer(made.codec, tuple(sigma_grid(24, c.shift).tolist()[:-1]), chunk=1, solver="euler")
    stage = Pretrain(c, student=made.roles["student"], viewer=viewer)
    return _compiled(recipe, stage, device), made.source, "average", sampling


def _ar_diffusion(recipe: Recipe, made: Ingredients, device: torch.device) -> Built:
    c: ARDiffusionConfig = recipe.settings
    if c.policy is not None:
        made.roles["student"].context = policy_from(c.policy, frames=made.frames // c.chunk * c.chunk, chunk=c.chunk)
    sampling = Sampling(chunk=c.chunk, solver="unipc", guidance=2.0, multistep=48, shift=c.shift)
    viewer = Viewer(made.codec, unipc_sigmas(16, c.shift)[:-1], chunk=c.chunk, solver="unipc")
    stage = ARDiffusion(c, student=made.roles["student"], viewer=viewer)
    return _compiled(recipe, stage, device), made.source, "average", sampling


FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)


def _trajectories(recipe: Recipe, made: Ingredients, device: torch.device) -> DataSource:
    """The teacher's trajectories to the data's clips, made once and stored in the run's folder."""
    c: CausalODEConfig = recipe.settings
    out, kept = Path(recipe.trainer.out), fingerprints(made.contents)
    decides = {what: kept[what] for what in ("data", "init.teacher", "compute") if what in kept}
    decides |= {"trainer.seed": str(recipe.trainer.seed), **c.of_trajectories}
    store = Store(out, decides, latest(out / "checkpoints") is not None, recipe.trainer.check, made.team)
    teacher = cache(partial(made.filled, "teacher", device))  # read only if there is something to make

    def make(first: int) -> dict[str, Tensor]:
        how = {"config": c, "null": made.null, "seed": recipe.trainer.seed, "device": device}
        return make_part(first, teacher=teacher(), source=made.source, **how)

    return placed(store.get(c.pairs, parts_of(c), make), device)


def _causal_ode(recipe: Recipe, made: Ingredients, device: torch.device) -> Built:
    c: CausalODEConfig = recipe.settings
    rows = made.source if made.kind == "trajectories" else _trajectories(recipe, made, device)
    sampling = Sampling(chunk=c.chunk, steps=FOUR_STEPS, shift=c.shift)
    viewer = Viewer(made.codec, warp_steps(FOUR_STEPS, c.shift), chunk=c.chunk)
    return (
        _compiled(recipe, CausalODE(c, student=made.roles["student"], viewer=viewer), device),
        rows,
        "average",
        sampling,
    )


def _causal_cd(recipe: Recipe, made: Ingredients, device: torch.device) -> Built:
    c: CausalCDConfig = recipe.settings
    sampling = Sampling(chunk=c.chunk, steps=FOUR_STEPS, shift=c.shift)
    viewer = Viewer(made.codec, warp_steps(FOUR_STEPS, c.shift), chunk=c.chunk)
    stage = CausalCD(c, student=made.roles["student"], teacher=made.roles["teacher"], null=made.null, viewer=viewer)
    return _compiled(recipe, stage, device), made.source, "target", sampling


def _is_recorded(sampler: DiTDenoiser, chunk: int, spec: LatentSpec, device: torch.device) -> bool:
    """Whether rollouts go through the inference path: on one GPU, of networks that it computes, where a chunk of one
    clip fills it. Small clips are faster together, in compiled blocks; the inference path takes them one by one.
    """
    config = sampler.config
    if config.camera == "prope" or torch.distributed.is_initialized():
        return False
    queries = chunk * spec.height * spec.width // config.patch**2
    return fills(queries, config.heads, processors_of(device))


def _dmd(recipe: Recipe, made: Ingredients, device: torch.device) -> Built:
    c: DMDConfig = recipe.settings
    sampling = Sampling(chunk=c.chunk, steps=c.steps, first_steps=c.first_steps, shift=c.shift)
    if c.rolling:
        sampling = replace(sampling, plan="rolling", first_steps=None)
    viewer = Viewer(made.codec, c.sigmas, chunk=c.chunk, first=c.first_sigmas)
    if c.policy is not None:
        made.roles["student"].context = policy_from(c.policy, frames=made.frames // c.chunk * c.chunk, chunk=c.chunk)
    stage = DMD(c, **made.roles, null=made.null, viewer=viewer)
    is_fast = False
    if device.type == "cuda" and recipe.speed != "plain" and stage.sampler is not stage.student:
        is_fast = _is_recorded(stage.sampler, c.chunk, made.spec, device)
        if is_fast and stage.sampler.model.device.type == "meta":
            stage.sampler.to_empty(device=device)  # the fast form holds storage; its weights come with each rollout
        if is_fast:
            check_precision(c.rollout_precision, device)
            accelerate(stage.sampler, precision=c.rollout_precision)
        else:
            compile_blocks(stage.sampler)
    if c.rollout_precision != "bf16" and not is_fast:
        raise ValueError(
            f"settings.rollout_precision: {c.rollout_precision} needs rollouts on the inference path: one GPU, "
            "speed: compiled, and chunks large enough to fill it; bf16 works everywhere"
        )
    return _compiled(recipe, stage, device), made.source, "average", sampling


STAGES: dict[str, Callable[..., Built]] = {
    "pretrain": _pretrain,
    "ar_diffusion": _ar_diffusion,
    "causal_ode": _causal_ode,
    "causal_cd": _causal_cd,
    "dmd": _dmd,
}


def provenance(recipe: Recipe, contents: Sequence[Content] = ()) -> dict[str, Any]:
    """Where weights come from: the resolved recipe, the seed, what they were made from, the commit if there is one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        commit = found.stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    return {
        "commit": commit,
        "seed": recipe.trainer.seed,
        "torch": str(torch.__version__),
        "recipe": configs.to_dict(recipe),
        "contents": fingerprints(contents),
    }
