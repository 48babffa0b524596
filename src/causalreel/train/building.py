"""From a recipe to a run before its first step: roles, data, stage, and how the trained weights leave."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from causalreel.codecs.tiny import tiny_codec
from causalreel.codecs.wan_vae import latent_statistics
from causalreel.data.compared import write_compared
from causalreel.data.prepare import render_clips
from causalreel.data.sources import ClipSource
from causalreel.data.world import WorldConfig
from causalreel.data.worlds import WORLDS, World, flat
from causalreel.files import remove_folder
from causalreel.flow import sigma_grid, warp_steps
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.linear import effective_state
from causalreel.nn.policies.registry import policy_from
from causalreel.nn.split_attention import fills, processors_of
from causalreel.parallel.compile import compile_blocks
from causalreel.parallel.fast import accelerate, check_precision
from causalreel.parallel.graphs import graph_calls
from causalreel.parallel.offload import offload_activations
from causalreel.parallel.recompute import recompute_blocks
from causalreel.parallel.sharding import Team, whole_state
from causalreel.solvers import unipc_sigmas
from causalreel.train.adapters import lora_of
from causalreel.train.checkpoint import latest
from causalreel.train.codec_of import name_in_export
from causalreel.train.contents import Content, fingerprints
from causalreel.train.ingredients import Ingredients, gather
from causalreel.train.initial import Start
from causalreel.train.kit import Viewer
from causalreel.train.operations import Clip, Work, step_work
from causalreel.train.recipe import Recipe, provenance
from causalreel.train.stage import DataSource, Stage
from causalreel.train.stages.ar_diffusion import ARDiffusion, ARDiffusionConfig
from causalreel.train.stages.causal_cd import CausalCD, CausalCDConfig
from causalreel.train.stages.causal_ode import CausalODE, CausalODEConfig, make_part, parts_of
from causalreel.train.stages.causal_scm import CausalSCM, CausalSCMConfig
from causalreel.train.stages.codec import CodecConfig, CodecStage
from causalreel.train.stages.dmd import DMD, DMDConfig
from causalreel.train.stages.pretrain import Pretrain, PretrainConfig
from causalreel.train.state import resumable
from causalreel.train.stored import Store, placed
from causalreel.types import LatentSpec
from causalreel.weights.build import empty_denoiser
from causalreel.weights.export import Export, Sampling, codec_identity, load_codec, save_codec, save_export
from causalreel.weights.lora_layouts import write_lora

if TYPE_CHECKING:
    from causalreel.nn.policies.registry import AnyPolicy

log = logging.getLogger("causalreel.train")

ADAPTERS = "lora"
"""Folder of the adapters, beside the export."""


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


# ---- codec


def build_codec(recipe: Recipe, device: torch.device, team: Team) -> Prepared:
    contents = ()
    codec = tiny_codec(recipe.trainer.seed)
    if (start := recipe.init.get("codec")) is not None:
        begun = load_codec(start)
        codec.load_state_dict(begun.state_dict())
        codec.set_statistics(begun.config.latent_mean, begun.config.latent_std)
        contents = (Content("init.codec", str(start), codec_identity(start)),)
    resumable(recipe.trainer, recipe, contents)
    codec = codec.to(device)
    if device.type == "cuda":
        codec.forward = torch.autocast("cuda", torch.bfloat16)(torch.compile(codec.forward))  # float32 weights stay
    world = _world_of(recipe)
    clips = render_clips(recipe.rows or 4096, seed=recipe.data_seed, world=world, device=device)
    stage = CodecStage(codec, recipe.settings)

    def export(folder: Path) -> None:
        weights = whole_state(codec.state_dict(), is_kept=team.is_first)
        if not team.is_first:
            return
        trained = tiny_codec(recipe.trainer.seed).to(device)
        trained.load_state_dict(weights)
        if recipe.settings.decoder_only:
            trained.set_statistics(codec.config.latent_mean, codec.config.latent_std)
        else:
            videos = [clips[i : i + 64].float() / 127.5 - 1 for i in range(0, min(1024, len(clips)), 64)]
            trained.set_statistics(*latent_statistics(trained, videos))
        save_codec(folder, trained, provenance(recipe, contents))
        log.info("codec written to %s", folder)

    return Prepared(stage, ClipSource(clips), export, contents)


def _world_of(recipe: Recipe) -> World:
    """What the codec stage's clips are of."""
    if recipe.world != "flat":
        return WORLDS[recipe.world]()
    settings: CodecConfig = recipe.settings
    config = WorldConfig(events=settings.events)
    return flat(config if settings.rendered is None else replace(config, frames=settings.rendered))


# ---- denoisers


def build_denoising(recipe: Recipe, device: torch.device, team: Team | None = None) -> Prepared:
    made = gather(recipe, device, team)
    team = made.team
    resumable(recipe.trainer, recipe, made.contents)  # before anything is made
    if team.is_first and made.compared:
        write_compared(Path(recipe.trainer.out), made.compared)
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
    sampling, viewer = _in_four_steps(made, c)
    stage = CausalCD(c, student=made.roles["student"], teacher=made.roles["teacher"], null=made.null, viewer=viewer)
    return _compiled(recipe, stage, device), made.source, "target", sampling


def _causal_scm(recipe: Recipe, made: Ingredients, device: torch.device) -> Built:
    c: CausalSCMConfig = recipe.settings
    sampling, viewer = _in_four_steps(made, c)
    stage = CausalSCM(c, student=made.roles["student"], teacher=made.roles["teacher"], null=made.null, viewer=viewer)
    return _compiled(recipe, stage, device), made.source, "average", sampling


def _in_four_steps(made: Ingredients, c: CausalCDConfig | CausalSCMConfig) -> tuple[Sampling, Viewer]:
    """How consistency models are sampled and shown."""
    sampling = Sampling(chunk=c.chunk, steps=FOUR_STEPS, shift=c.shift, noisy_from=c.noisy_from)
    return sampling, Viewer(made.codec, warp_steps(FOUR_STEPS, c.shift), chunk=c.chunk, noisy_from=c.noisy_from)


def _is_recorded(sampler: DiTDenoiser, chunk: int, spec: LatentSpec, device: torch.device, team: Team) -> bool:
    """Whether rollouts go through the inference path: of networks that it computes, where a chunk of one clip fills a
    GPU, and no processes share its tokens. Small clips are faster together, in compiled blocks; the inference path
    takes them one by one.
    """
    config = sampler.config
    if config.camera == "prope" or team.context is not None:
        return False
    queries = chunk * spec.height * spec.width // config.patch**2
    return fills(queries, config.heads, processors_of(device))


def _dmd(recipe: Recipe, made: Ingredients, device: torch.device) -> Built:
    c: DMDConfig = recipe.settings
    steps = {"steps": c.steps, "first_steps": c.first_steps, "shift": c.shift}
    sampling = Sampling(chunk=c.chunk, noisy_from=c.noisy_from, **steps)
    if c.rolling:
        sampling = replace(sampling, plan="rolling", first_steps=None)
    viewer = Viewer(made.codec, c.sigmas, chunk=c.chunk, first=c.first_sigmas, noisy_from=c.noisy_from)
    if c.policy is not None:
        made.roles["student"].context = policy_from(c.policy, frames=made.frames // c.chunk * c.chunk, chunk=c.chunk)
    stage = DMD(c, **made.roles, null=made.null, viewer=viewer)
    is_fast = False
    if device.type == "cuda" and recipe.speed != "plain" and stage.sampler is not stage.student:
        is_whole = made.team.control is None or c.rollout_weights == "whole"
        is_fast = is_whole and _is_recorded(stage.sampler, c.chunk, made.spec, device, made.team)
        if is_fast and stage.sampler.model.device.type == "meta":
            stage.sampler.to_empty(device=device)  # the fast form holds storage; its weights come with each rollout
        if is_fast:
            check_precision(c.rollout_precision, device)
            accelerate(stage.sampler, precision=c.rollout_precision)
            stage.derived, stage.whole = (), stage.derived
        else:
            compile_blocks(stage.sampler)
    if c.rollout_precision != "bf16" and not is_fast:
        raise ValueError(
            f"settings.rollout_precision: {c.rollout_precision} needs rollouts on the inference path: "
            "speed: compiled, settings.rollout_weights: whole, trainer.parallel.context: 1, and chunks large enough to "
            "fill a GPU; bf16 works everywhere"
        )
    return _compiled(recipe, stage, device), made.source, "average", sampling


STAGES: dict[str, Callable[..., Built]] = {
    "pretrain": _pretrain,
    "ar_diffusion": _ar_diffusion,
    "causal_ode": _causal_ode,
    "causal_cd": _causal_cd,
    "causal_scm": _causal_scm,
    "dmd": _dmd,
}
