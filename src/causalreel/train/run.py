"""From a recipe to a run: build the roles, the data and the stage, train, export.

A recipe names its stage and holds only what differs from the defaults. The trained weights leave as an export folder
(`<out>/export`), which is what later stages take in `init` and what `causalreel generate --model` loads.
"""

from __future__ import annotations

import difflib
import logging
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from causalreel import config as configs
from causalreel.codecs.tiny import tiny_codec
from causalreel.codecs.wan_vae import CausalVAE, latent_statistics
from causalreel.config import FREE
from causalreel.data.prepare import render_clips
from causalreel.data.shards import caption_place, load_prepared
from causalreel.data.sources import ClipSource, LatentSource
from causalreel.flow import sigma_grid, warp_steps
from causalreel.folders import claim
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.linear import effective_state
from causalreel.nn.presets import ModelConfig, preset
from causalreel.parallel.compile import compile_blocks
from causalreel.parallel.graphs import graph_calls
from causalreel.rollout import chunk_sizes
from causalreel.solvers import unipc_sigmas
from causalreel.text.tiny import TinyTextEncoder
from causalreel.train import trainer
from causalreel.train.kit import Viewer
from causalreel.train.stage import DataSource, Stage
from causalreel.train.stages.ar_diffusion import ARDiffusion, ARDiffusionConfig
from causalreel.train.stages.causal_cd import CausalCD, CausalCDConfig
from causalreel.train.stages.causal_ode import CausalODE, CausalODEConfig, make_trajectories
from causalreel.train.stages.codec import CodecConfig, CodecStage
from causalreel.train.stages.dmd import DMD, DMDConfig
from causalreel.train.stages.pretrain import Pretrain, PretrainConfig
from causalreel.train.trainer import Result, TrainerConfig
from causalreel.types import LatentSpec
from causalreel.weights.export import Export, Sampling, load_codec, load_export, read_export, save_codec, save_export
from causalreel.weights.files import read_tensors, write_tensors

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
    init: dict[str, Path] = field(default_factory=dict)
    """Role -> export folder its weights start from."""
    data: Path | None = None
    """Prepared data (see `causalreel encode`); the codec stage renders its own clips."""
    rows: int | None = None
    """Clips used of the data; null for all."""
    data_seed: int = 0
    """World of the clips that the codec stage renders."""
    codec: Path | None = field(default=None, metadata=FREE)
    """Codec that made the data; used for previews and named in the export."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
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


def find_recipe(name: str) -> Path:
    """A YAML file, or the name of a recipe that ships with the package, such as `tiny/causal_cd`."""
    path, shipped = Path(name), Path(__file__).parents[1] / "recipes"
    if path.suffix in (".yaml", ".yml"):
        return path
    found = shipped / f"{name}.yaml"
    if not found.is_file():
        names = sorted(str(p.relative_to(shipped).with_suffix("")) for p in shipped.rglob("*.yaml"))
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
        f"# checkpoints in {s.out}/checkpoints every {s.save_every} steps; export in {s.out}/export",
    ]
    return "\n".join(lines)


def run(recipe: Recipe) -> Result:
    """Train and export; the same call again continues. Returns how it ended."""
    _check_folder(Path(recipe.trainer.out))
    device = trainer.choose_device(recipe.trainer.device)
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # denormal activations slow a CPU down several times
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    build = _build_codec if recipe.stage == "codec" else _build_denoising
    out = Path(recipe.trainer.out)
    with claim(out, "training"):
        stage, source, export = build(recipe, device)
        result = trainer.train(stage, source, recipe.trainer, recipe=recipe)
        if not result.is_interrupted:
            export(out / "export")
        return result


def _check_folder(out: Path) -> None:
    """Fail before the work if nothing could be written into `out`; makes nothing."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"trainer.out: cannot write to {out}, {there} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"trainer.out: cannot write to {out}, {there} is not writable")


# ---- codec


def _build_codec(recipe: Recipe, device: torch.device) -> tuple[Stage, DataSource, Callable[[Path], None]]:
    codec = tiny_codec(recipe.trainer.seed).to(device)
    if device.type == "cuda":
        codec.forward = torch.autocast("cuda", torch.bfloat16)(torch.compile(codec.forward))  # float32 weights stay
    clips = render_clips(recipe.rows or 4096, seed=recipe.data_seed, device=device)
    stage = CodecStage(codec, recipe.settings)

    def export(folder: Path) -> None:
        videos = [clips[i : i + 64].float() / 127.5 - 1 for i in range(0, min(1024, len(clips)), 64)]
        codec.set_statistics(*latent_statistics(codec, videos))
        save_codec(folder, codec, provenance(recipe))
        log.info("codec written to %s", folder)

    return stage, ClipSource(clips), export


# ---- denoisers


def _build_denoising(recipe: Recipe, device: torch.device) -> tuple[Stage, DataSource, Callable[[Path], None]]:
    if recipe.data is None or recipe.codec is None:
        raise ValueError(f"stage {recipe.stage} needs `data` (a prepared folder) and `codec` (a codec's export folder)")
    codec_folder = recipe.codec.resolve()
    codec = load_codec(recipe.codec).to(device)
    latents, told = load_prepared(recipe.data, rows=recipe.rows)
    spec = LatentSpec(*latents.shape[2:])
    if spec.channels != codec.channels:
        raise ValueError(
            f"{recipe.data} has {spec.channels} latent channels, the codec {recipe.codec} {codec.channels}"
        )
    if not isinstance(recipe.settings, PretrainConfig):
        chunk_sizes(latents.shape[1], recipe.settings.chunk)
    encoder = TinyTextEncoder()
    text = _encode(encoder, told, recipe.data)
    source = LatentSource(latents.to(device), text.to(device))
    roles = _roles(recipe, device)
    for role, net in roles.items():
        if (net.config.channels, net.config.text_dim) != (spec.channels, encoder.width):
            raise ValueError(
                f"{role} takes {net.config.channels} latent channels and text of width {net.config.text_dim}, "
                f"the data have {spec.channels} and {encoder.width}"
            )
    null = encoder.null(1).to(device)
    stage, source, exported, sampling = STAGES[recipe.stage](recipe, roles, source, null, codec, device)

    def export(folder: Path) -> None:
        student = roles["student"]
        model = DiTDenoiser(student.config, context=student.context)
        model.load_state_dict(effective_state(stage.roles[exported]))
        card = Export(
            name=f"{recipe.stage}-{Path(recipe.trainer.out).name}",
            model=student.config,
            sampling=sampling,
            context=student.context,
            frames=latents.shape[1],
            fps=16,
            latent=spec,
            codec=os.path.relpath(codec_folder, folder.resolve()),
            text="tiny",
            provenance=provenance(recipe),
        )
        save_export(folder, model, card)
        log.info("weights written to %s", folder)

    return stage, source, export


def _encode(encoder: TinyTextEncoder, told: Sequence[str], data: Path) -> Tensor:
    """The captions (R,K,E); ValueError naming file and line of the first that cannot be read."""
    try:
        return torch.cat([encoder.encode(told[i : i + 4096]) for i in range(0, len(told), 4096)])
    except ValueError:
        for row, caption in enumerate(told):
            try:
                encoder.encode([caption])
            except ValueError as error:
                raise ValueError(f"captions of {data}: {caption_place(data, row)}: {error}") from None
        raise


ROLES = {
    "dmd": ("student", "critic", "teacher"),
    "causal_cd": ("student", "teacher"),
    "causal_ode": ("student", "teacher"),
}
"""Networks a stage needs from outside; the others need a student only."""


def networks(recipe: Recipe) -> list[ModelConfig]:
    """Sizes of the networks that a recipe trains or learns from, as far as their files are there; none for a codec."""
    if recipe.stage == "pretrain":
        return [preset(recipe.model)]
    folders = [Path(folder) for folder in recipe.init.values()]
    return [read_export(folder).model for folder in folders if (folder / "config.yaml").is_file()]


def _roles(recipe: Recipe, device: torch.device) -> dict[str, DiTDenoiser]:
    wanted = ROLES.get(recipe.stage, ("student",))
    for role in recipe.init:
        if role not in wanted:
            raise ValueError(f"init names the role {role!r}; stage {recipe.stage} takes {', '.join(wanted)}")
    compute = (
        torch.bfloat16 if recipe.compute == "bfloat16" or (recipe.compute == "auto" and device.type == "cuda") else None
    )
    roles = {}
    for role in wanted:
        if role in recipe.init:
            net = load_export(recipe.init[role])[0]
        elif role == "student" and recipe.stage == "pretrain":
            with torch.random.fork_rng():
                torch.manual_seed(recipe.trainer.seed)
                net = DiTDenoiser(preset(recipe.model))
        else:
            raise ValueError(f"stage {recipe.stage} needs init.{role}: the export folder it starts from")
        net.compute = compute
        is_trained = role in recipe.trainer.optimisers
        net = net.to(device) if is_trained or compute is None else net.to(device, compute)
        roles[role] = net.requires_grad_(is_trained)
    return roles


Built = tuple[Stage, DataSource, str, Sampling]
"""A stage, its data, the role that is exported and how that is sampled."""


def _compiled(recipe: Recipe, stage: Stage) -> Stage:
    """Compile and graph after the stage has copied its roles: a copy does not inherit either."""
    for net in stage.roles.values():
        assert isinstance(net, DiTDenoiser)
        is_on_gpu = next(net.parameters()).is_cuda
        if is_on_gpu and recipe.speed != "plain":
            compile_blocks(net)
        if is_on_gpu and recipe.speed == "graphed":
            graph_calls(net)
    return stage


def _pretrain(
    recipe: Recipe, roles: dict, source: LatentSource, null: Tensor, codec: CausalVAE, device: torch.device
) -> Built:
    c: PretrainConfig = recipe.settings
    sampling = Sampling(chunk=None, solver="euler", guidance=3.0, multistep=48, shift=c.shift)
    viewer = Viewer(codec, tuple(sigma_grid(24, c.shift).tolist()[:-1]), chunk=1, solver="euler")
    stage = Pretrain(c, student=roles["student"], viewer=viewer)
    return _compiled(recipe, stage), source, "average", sampling


def _ar_diffusion(
    recipe: Recipe, roles: dict, source: LatentSource, null: Tensor, codec: CausalVAE, device: torch.device
) -> Built:
    c: ARDiffusionConfig = recipe.settings
    sampling = Sampling(chunk=c.chunk, solver="unipc", guidance=2.0, multistep=48, shift=c.shift)
    viewer = Viewer(codec, unipc_sigmas(16, c.shift)[:-1], chunk=c.chunk, solver="unipc")
    return _compiled(recipe, ARDiffusion(c, student=roles["student"], viewer=viewer)), source, "average", sampling


FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)


def _causal_ode(
    recipe: Recipe, roles: dict, source: LatentSource, null: Tensor, codec: CausalVAE, device: torch.device
) -> Built:
    c: CausalODEConfig = recipe.settings
    file = Path(recipe.trainer.out) / "trajectories.safetensors"
    if not file.is_file():
        states, text = make_trajectories(
            roles["teacher"], source, c, null=null, seed=recipe.trainer.seed, device=device
        )
        write_tensors(file, {"states": states, "text": text})
    held = read_tensors(file)
    if len(held["states"]) != c.pairs:
        raise ValueError(
            f"{file} holds {len(held['states'])} trajectories, settings.pairs is {c.pairs}: use another out"
        )
    rows = LatentSource(held["states"].to(device), held["text"].to(device))
    sampling = Sampling(chunk=c.chunk, steps=FOUR_STEPS, shift=c.shift)
    viewer = Viewer(codec, warp_steps(FOUR_STEPS, c.shift), chunk=c.chunk)
    return _compiled(recipe, CausalODE(c, student=roles["student"], viewer=viewer)), rows, "average", sampling


def _causal_cd(
    recipe: Recipe, roles: dict, source: LatentSource, null: Tensor, codec: CausalVAE, device: torch.device
) -> Built:
    c: CausalCDConfig = recipe.settings
    sampling = Sampling(chunk=c.chunk, steps=FOUR_STEPS, shift=c.shift)
    viewer = Viewer(codec, warp_steps(FOUR_STEPS, c.shift), chunk=c.chunk)
    stage = CausalCD(c, student=roles["student"], teacher=roles["teacher"], null=null, viewer=viewer)
    return _compiled(recipe, stage), source, "target", sampling


def _dmd(
    recipe: Recipe, roles: dict, source: LatentSource, null: Tensor, codec: CausalVAE, device: torch.device
) -> Built:
    c: DMDConfig = recipe.settings
    sampling = Sampling(chunk=c.chunk, steps=c.steps, first_steps=c.first_steps, shift=c.shift)
    viewer = Viewer(codec, c.sigmas, chunk=c.chunk, first=c.first_sigmas)
    stage = DMD(c, **roles, null=null, viewer=viewer)
    if device.type == "cuda" and recipe.speed != "plain" and stage.sampler is not stage.student:
        compile_blocks(stage.sampler)
    return _compiled(recipe, stage), source, "average", sampling


STAGES: dict[str, Callable[..., Built]] = {
    "pretrain": _pretrain,
    "ar_diffusion": _ar_diffusion,
    "causal_ode": _causal_ode,
    "causal_cd": _causal_cd,
    "dmd": _dmd,
}


def provenance(recipe: Recipe) -> dict[str, Any]:
    """Where weights come from: the resolved recipe, the seed and the commit, if there is one."""
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
    }
