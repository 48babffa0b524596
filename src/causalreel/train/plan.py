"""What a run will take before anything is loaded: memory of a GPU by part, operations, seconds a step.

What stays is counted: masters, moments, gradients, averages, frozen networks, each process's share. What passes is the
widest moment, in tensors of a token's width for every token of a pass (`unit`). Counts stand beside the names of the
tensors that are alive; three numbers are fitted to measurements and say so (docs/training-at-scale.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from causalreel.data.shards import layout, shards
from causalreel.nn.masks import Context
from causalreel.nn.presets import ModelConfig, preset
from causalreel.train.ingredients import ROLES
from causalreel.train.initial import size_of
from causalreel.train.operations import Clip, Work, step_work
from causalreel.train.stages.ar_diffusion import ARDiffusionConfig
from causalreel.train.stages.causal_cd import CausalCDConfig
from causalreel.train.stages.causal_ode import CausalODEConfig
from causalreel.train.stages.causal_scm import CausalSCMConfig
from causalreel.train.stages.dmd import DMDConfig
from causalreel.types import Geometry, LatentSpec
from causalreel.weights.build import empty_denoiser

if TYPE_CHECKING:
    from causalreel.train.recipe import Recipe

GIB = 2**30
NARROW, WIDE = 2, 4
"""Bytes of a number in bfloat16, in float32."""

KEPT = {"none": 23, "selective": 7, "full": 2}
"""Units that a block keeps for its backward pass. selective: its input (float32, so two), q, k, v, what attention
gives, the feed-forward's result. full: its input. none: as compiled; an eager block keeps more."""

PASSING = 32
"""Units at the widest moment of a backward pass, near its beginning: a block computed again, its gradients, the parts
of masked attention. Fitted to teacher forcing of the 1.3B network on an H200."""

EXCHANGED = 12
"""Units of processes that share tokens: q, k and v as they are sent and received, and their gradients likewise."""

BESIDE = 99
"""Units of a clip that a DMD cycle holds beside what is counted. Fitted to one on one H200, of the same network; two
processes, which record no calls, were measured to hold as much. What it consists of is not known."""

RATES = {
    "ar_diffusion": 0.40,
    "causal_ode": 0.40,
    "causal_cd": 0.45,
    "causal_scm": 0.107,
    "dmd": 0.475,
    "pretrain": 0.43,
}
"""Shares of the datasheet's bf16 rate that steps reached on an H200 at 1.3B; of causal ODE taken from AR diffusion;
of causal sCM frame by frame, where four fifths of a step are its derivative. None is promised of other stages."""


@dataclass(frozen=True)
class Part:
    """A share of a GPU's memory."""

    name: str
    size: float
    """Bytes."""
    what: str
    is_on_host: bool = False
    """Whether it is memory of the machine, for each of its GPUs, not of the GPU."""


@dataclass(frozen=True)
class Plan:
    """What one GPU of a launch holds, and what a step takes."""

    gpus: int
    rows: int
    """Rows of the batch that a GPU takes at a time."""
    parts: tuple[Part, ...]
    work: Work
    """Of a step, all GPUs together."""
    seconds: float | None
    """Of a step; None where the GPU's rate is not known."""

    @property
    def peak(self) -> float:
        """Bytes of a GPU, all parts together."""
        return sum(part.size for part in self.parts if not part.is_on_host)


def plan(
    recipe: Recipe, sizes: Mapping[str, ModelConfig], clip: Clip, *, gpus: int = 1, rate: float | None = 989.4
) -> Plan:
    """The plan of a recipe on so many GPUs.

    sizes: every network's, by role. clip: one row of the data. rate: a GPU's TFLOP/s in bf16. ValueError for a batch
    that the GPUs cannot share, and as `ParallelConfig.shards`.
    """
    shards = recipe.trainer.parallel.shards(gpus) * recipe.trainer.parallel.context  # those that share tokens too
    rows, parts = _rows(recipe, gpus), []
    for role, size in sizes.items():
        parts += _role(recipe, role, size, shards)
    trained = [size for role, size in sizes.items() if role in recipe.trainer.optimisers]
    gradients = WIDE * max(map(parameters, trained)) / shards
    if shards > 1:
        whole = {role: WIDE if role in recipe.trainer.optimisers else NARROW for role in sizes}
        gathered = max(2 * whole[role] * _block(size) for role, size in sizes.items())
        gathered += WIDE * max(map(_block, trained))
        parts.append(Part("gathered", gathered, "two blocks whole, trained ones in float32, and one's gradient"))
    is_recorded = recipe.speed != "plain" and (gpus == 1 or _rolls_whole(recipe))
    parts += _activations(recipe, sizes, clip, rows, gradients, is_recorded=is_recorded)
    context = Context()
    work = step_work(recipe.settings, dict(sizes), clip, context) or Work()
    reached = RATES.get(recipe.stage)
    seconds = None if rate is None or reached is None else work.flop / gpus / (rate * 1e12 * reached)
    return Plan(gpus, rows, tuple(parts), work, seconds)


def _rows(recipe: Recipe, gpus: int) -> int:
    takers = gpus // recipe.trainer.parallel.context
    each, rest = divmod(recipe.settings.batch, takers * recipe.trainer.accumulate)
    if rest or not each:
        raise ValueError(
            f"settings.batch: {recipe.settings.batch} rows cannot be shared by {takers} processes in "
            f"{recipe.trainer.accumulate} parts; set trainer.accumulate or a batch that "
            f"{takers * recipe.trainer.accumulate} divides"
        )
    return each


def _role(recipe: Recipe, role: str, size: ModelConfig, shards: int) -> list[Part]:
    count, found = parameters(size) / shards, []
    trainer = recipe.trainer
    if role not in trainer.optimisers:
        if trainer.offload_frozen and not is_before_training(recipe, role):
            return _on_host(f"{role}, frozen", size, NARROW, shards)
        return [Part(f"{role}, frozen", NARROW * count, "bfloat16")]
    found.append(Part(f"{role}, masters", WIDE * count, "float32"))
    found.append(Part(f"{role}, moments", 2 * WIDE * count, "float32, of AdamW"))
    if role == "student":
        name = "target" if isinstance(recipe.settings, CausalCDConfig) else "average"
        if trainer.offload_averages:
            found += _on_host(name, size, WIDE, shards)
        else:
            found.append(Part(name, WIDE * count, "float32"))
        if isinstance(recipe.settings, DMDConfig):
            held = parameters(size) if _rolls_whole(recipe) else count
            found.append(Part("sampler", NARROW * held, "the student in bfloat16, which rolls out"))
    return found


def _rolls_whole(recipe: Recipe) -> bool:
    """Whether each GPU rolls out with weights of its own."""
    settings = recipe.settings
    return (
        isinstance(settings, DMDConfig) and settings.rollout_weights == "whole" and recipe.trainer.parallel.context == 1
    )


def is_before_training(recipe: Recipe, role: str) -> bool:
    """Whether a role's network only makes the data, whole on the GPU, before the first step."""
    return isinstance(recipe.settings, CausalODEConfig) and role == "teacher"


def _on_host(name: str, size: ModelConfig, width: int, shards: int) -> list[Part]:
    """A network that waits on the host. Called, it has two blocks on the GPU; those of processes that share it are
    counted as `gathered`."""
    count, block = parameters(size), _block(size)
    waiting = Part(name, width * count / shards, "waits on the host, pinned", is_on_host=True)
    if shards > 1:
        return [waiting]
    outside = count - size.layers * block
    waiting = replace(waiting, size=width * size.layers * block)
    return [waiting, Part(f"{name}, here", width * (outside + 2 * block), "its embeddings and head, two blocks")]


def _activations(
    recipe: Recipe, sizes: Mapping[str, ModelConfig], clip: Clip, rows: int, gradients: float, *, is_recorded: bool
) -> list[Part]:
    """The widest gradient pass of the step: activations go while gradients come, so that the larger of both
    counts, unless a batch is taken in parts. What the student's rollout leaves is there in the student's pass alone.
    is_recorded: whether rollouts stay in memory of their own."""
    settings, context = recipe.settings, recipe.trainer.parallel.context
    passes: list[tuple[ModelConfig, int]] = []  # network, latent frames
    if isinstance(settings, (ARDiffusionConfig, CausalODEConfig, CausalCDConfig, CausalSCMConfig)):
        is_forced = getattr(settings, "forcing", "teacher") == "teacher"
        passes.append((sizes["student"], clip.frames * (2 if is_forced else 1)))
    elif isinstance(settings, DMDConfig):
        passes += [(sizes["student"], clip.frames), (sizes["critic"], clip.frames)]
    else:
        passes.append((sizes["student"], clip.frames))
    kept = KEPT[recipe.trainer.recompute]
    exchanged = EXCHANGED if context > 1 else 0
    units = [(model, NARROW * rows * frames * clip.tokens(model) * model.dim / context) for model, frames in passes]
    rolled, left = _left_by_rollout(settings, clip, *units[0])
    others = [sum(part.size for part in left), *(0.0 for _ in units[1:])]
    widths = [
        (kept * model.layers * unit, (PASSING + exchanged) * unit, other)
        for (model, unit), other in zip(units, others, strict=True)
    ]
    activations, passing, other = max(widths, key=sum)
    how = f"kept for the backward pass, recompute: {recipe.trainer.recompute}"
    is_on_host = recipe.trainer.offload_activations
    found = [Part("activations", activations, how, is_on_host)]
    if is_on_host:
        activations = 0.0  # those of a block are of the widest moment
    summed = Part("gradients", gradients, "float32, of the role that is updated")
    if recipe.trainer.accumulate > 1:
        found.append(summed)  # those of the parts before are there from the beginning
    elif gradients > activations + passing:
        found = [summed, *(part for part in found if part.is_on_host)]
    found.append(Part("passing", passing, "the widest moment of a backward pass"))
    found += left if other else []
    if rolled and is_recorded:  # others have given their cache back by then
        found.append(Part("rollouts", rolled, "the cache of recorded calls"))
    return found


def _left_by_rollout(settings: object, clip: Clip, model: ModelConfig, unit: float) -> tuple[float, list[Part]]:
    """Of DMD's own rollouts: bytes of a cache of fixed size, and what the student reads of one in its pass."""
    if not isinstance(settings, DMDConfig) or settings.samples != "self_rollout":
        return 0.0, []
    rolled = max(settings.longest or 0, clip.frames)  # latent frames of the longest rollout
    cache = 2 * model.layers * unit * rolled / clip.frames
    return cache * (1 + settings.chunk / rolled), [
        Part("context", cache, "keys and values of the rollout that the student reads"),
        Part("beside", BESIDE * unit, "what was measured beside these, not told apart"),
    ]


def parameters(size: ModelConfig) -> int:
    """Numbers of a network."""
    return sum(value.numel() for value in empty_denoiser(size).state_dict().values())


def _block(size: ModelConfig) -> int:
    return sum(value.numel() for value in empty_denoiser(size).model.blocks[0].state_dict().values())


def sizes_of(recipe: Recipe, otherwise: str) -> dict[str, ModelConfig]:
    """The size of every network that the recipe needs, by role; `otherwise` is the preset of those not here yet."""
    found = {}
    for role in ROLES.get(recipe.stage, ("student",)):
        found[role] = preset(recipe.model if recipe.stage == "pretrain" else otherwise)
        if role in recipe.init:
            with contextlib.suppress(ValueError, OSError):
                found[role] = size_of(recipe.init[role])
    return found


def clip_of(recipe: Recipe, frames: int, size: tuple[int, int]) -> Clip:
    """A row of the recipe's data; of Wan2.1's latents of so many pixel frames of height and width without them."""
    if recipe.data is not None:
        with contextlib.suppress(ValueError):
            (_, count, *latent), _ = layout(shards(recipe.data)[0])
            return Clip(count, LatentSpec(*latent))
    geometry = Geometry(channels=16, spatial=8, temporal=4)
    return Clip(geometry.latents_of(frames, name="frames"), geometry.latent_of(*size, patch=2))


def told(found: Plan, memory: float) -> Sequence[str]:
    """The plan in lines: parts, sum against `memory` GiB, operations, seconds."""
    widest = max(len(part.name) for part in found.parts)
    here, there = ([part for part in found.parts if part.is_on_host is host] for host in (False, True))
    lines = [f"{part.name:<{widest}}  {part.size / GIB:7.2f} GiB  {part.what}" for part in here]
    verdict = "fits" if found.peak / GIB <= memory else "DOES NOT FIT"
    lines.append(
        f"{'together':<{widest}}  {found.peak / GIB:7.2f} GiB  on each of {found.gpus} GPUs: {verdict} {memory:g}"
    )
    lines += [f"{part.name:<{widest}}  {part.size / GIB:7.2f} GiB  of the host: {part.what}" for part in there]
    lines.append(
        f"a step: {found.work.flop / 1e12:,.0f} TFLOP, {found.work.tokens:,} tokens, "
        f"{found.rows} rows on a GPU at a time"
    )
    if found.seconds is not None:
        lines.append(f"about {found.seconds:.3g} s a step, by rates measured at 1.3B on an H200 (estimated)")
    return lines
