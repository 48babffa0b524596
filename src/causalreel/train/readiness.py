"""Whether a run could start: what it needs is there and fits, the device too, the disk has room. Touches nothing."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import torch

from causalreel.codecs.tiny import tiny_codec
from causalreel.data.shards import layout, shards
from causalreel.families import MODELS
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.lora import adapter_state, add_lora
from causalreel.nn.presets import preset
from causalreel.parallel.mesh import launch
from causalreel.train.codec_of import files_of
from causalreel.train.elsewhere import openable
from causalreel.train.ingredients import gather, missing, wanted_roles
from causalreel.train.initial import size_of
from causalreel.train.recipe import Recipe
from causalreel.train.run import check_processes
from causalreel.train.stages.causal_ode import CausalODEConfig
from causalreel.train.state import choose_device, resumable
from causalreel.weights.build import empty_denoiser
from causalreel.weights.hub import HubFile, find

MIB = 1 << 20


def problems(recipe: Recipe) -> list[str]:
    """What would keep the run from its end, one line each; reads all that the run would read.

    Fetches nothing: where files are still to be fetched, what they hold and the checkpoint are not looked at.
    """
    found = missing(recipe)
    where = launch()
    if recipe.trainer.remote is not None:
        try:
            openable(recipe.trainer.remote)
        except (OSError, ValueError, ImportError) as error:
            found.append(str(error))
    try:
        check_processes(recipe, 1 if where is None else where.size)
    except ValueError as error:
        found.append(str(error))
    try:
        device = choose_device(recipe.trainer.device)
    except ValueError as error:
        return [*found, f"trainer.{error}"]
    if not found and not to_fetch(recipe):
        try:
            made = None if recipe.stage == "codec" else gather(recipe, device, is_loaded=False)
            resumable(recipe.trainer, recipe, made.contents if made else ())
        except ValueError as error:
            found.append(str(error))
    if not found:
        needed, free, place = disk_bytes(recipe), *_free(Path(recipe.trainer.out))
        if needed > free:
            found.append(
                f"trainer.out: the run writes about {needed // MIB} MiB, {place} has {free // MIB} MiB free; "
                f"trainer.keep={recipe.trainer.keep} checkpoints are kept"
            )
    return found


def to_fetch(recipe: Recipe) -> list[HubFile]:
    """Files of released networks and codecs that are not here, which the run would fetch first."""
    if recipe.stage == "codec":
        return []
    names = [str(recipe.init[role]) for role in wanted_roles(recipe) if role in recipe.init]
    wanted = [file for name in names if name in MODELS for file in MODELS[name][1].files]
    wanted += files_of(recipe.codec) if recipe.codec is not None else ()
    return [file for file in dict.fromkeys(wanted) if find(file) is None]


def disk_bytes(recipe: Recipe) -> int:
    """About what a run writes: checkpoints (one more than are kept, and one that waits to be copied), trajectories,
    export; not previews and metrics."""
    most = recipe.trainer.keep + 1 + (recipe.trainer.remote is not None)
    if recipe.stage == "codec":
        codec = sum(value.numel() for value in tiny_codec(0).state_dict().values())
        return 4 * codec * (4 * most + 1) + 2 * codec
    numbers = {role: _kept(recipe, role) for role in wanted_roles(recipe)}
    trained = [numbers[role] for role in recipe.trainer.optimisers if role in numbers]
    # float32: what is trained, two moments, and the student's average or target; frozen roles once, for they are links
    checkpoint = 4 * (3 * sum(trained) + numbers["student"])
    frozen = sum(count for role, count in numbers.items() if role not in recipe.trainer.optimisers)
    width = 2 if recipe.compute == "bfloat16" or (recipe.compute == "auto" and torch.cuda.is_available()) else 4
    total = checkpoint * most + (0 if recipe.lora else width * frozen)
    total += 4 * numbers["student"] if "student" in recipe.lora else 0
    if "student" not in recipe.lora or recipe.lora_merged:
        total += 6 * _numbers(recipe, "student")
    if isinstance(recipe.settings, CausalODEConfig) and recipe.data is not None:
        (_, *shape), _ = layout(shards(recipe.data)[0])
        states = len(recipe.settings.keep) + 2
        total += 2 * 2 * recipe.settings.pairs * states * torch.Size(shape).numel()  # float16, parts and whole
    return total


def _numbers(recipe: Recipe, role: str) -> int:
    """Numbers of a role's network; 0 where its files are not here."""
    net = _network(recipe, role)
    return 0 if net is None else sum(value.numel() for value in net.state_dict().values())


def _kept(recipe: Recipe, role: str) -> int:
    """Numbers that a checkpoint holds of a role: of its network, or of its adapters alone."""
    net = _network(recipe, role) if role in recipe.lora else None
    if net is None:
        return _numbers(recipe, role)
    add_lora(net.model, recipe.lora[role])
    return sum(value.numel() for value in adapter_state(net).values())


def _network(recipe: Recipe, role: str) -> DiTDenoiser | None:
    """The network of a role without storage; None where its files are not here."""
    if role not in recipe.init:
        return empty_denoiser(preset(recipe.model)) if recipe.stage == "pretrain" else None
    with contextlib.suppress(ValueError):
        return empty_denoiser(size_of(recipe.init[role]))
    return None


def _free(out: Path) -> tuple[int, Path]:
    """Free bytes where the run would write, and that place."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free, there
