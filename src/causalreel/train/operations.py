"""How many operations a training step takes: by arithmetic, for records, plans and benchmarks. The formula of MFU.

Counted are products of matrices, 2 a multiplication and addition: linear layers; cross-attention over all text tokens;
self-attention over the pairs of frames that see each other. A backward pass counts twice its forward pass; what is
computed again to save memory counts nothing. MFU is this number over what the GPU's datasheet says of dense bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from causalreel.nn.masks import Frame, frames_of, reading, sees
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.window import Context
from causalreel.nn.presets import ModelConfig
from causalreel.rollout import chunk_sizes
from causalreel.train.stages.ar_diffusion import ARDiffusionConfig
from causalreel.train.stages.causal_cd import CausalCDConfig
from causalreel.train.stages.causal_ode import CausalODEConfig
from causalreel.train.stages.causal_scm import CausalSCMConfig
from causalreel.train.stages.dmd import DMDConfig
from causalreel.types import LatentSpec

TANGENT = 2
"""A derivative in forward mode, in forward passes: every product once more. Attention takes three, not counted."""
BACKWARD = 2
"""A backward pass, in forward passes."""

PEAKS = {"H100": 989.4, "H200": 989.4, "H800": 989.4, "A100": 312.0, "A800": 312.0, "B200": 2250.0, "L40S": 362.0}
"""TFLOP/s of dense bf16 products by datasheet, of the GPUs whose names hold these."""


def peak_of(name: str) -> float | None:
    """The datasheet's TFLOP/s in bf16 of a GPU by its name; None for others, and for cut-down ones of these names."""
    if any(mark in name for mark in ("PCIe", "NVL", "MIG")):
        return None
    return next((value for mark, value in PEAKS.items() if mark in name), None)


@dataclass(frozen=True)
class Work:
    """Operations and tokens of some passes."""

    flop: float = 0.0
    tokens: int = 0
    """Of the passes with gradient: what `tokens a second` counts."""

    def __add__(self, other: Work) -> Work:
        return Work(self.flop + other.flop, self.tokens + other.tokens)

    def __mul__(self, times: float) -> Work:
        return Work(self.flop * times, round(self.tokens * times))


@dataclass(frozen=True)
class Clip:
    """What a network reads of one clip: latent frames of one shape."""

    frames: int
    latent: LatentSpec

    def tokens(self, model: ModelConfig) -> int:
        """Tokens of a latent frame."""
        return self.latent.height * self.latent.width // model.patch**2


def forward(model: ModelConfig, clip: Clip, frames: int, pairs: int) -> float:
    """One forward pass over so many frames, of which so many pairs (query, key) see each other."""
    tokens, dim = clip.tokens(model), model.dim
    linear = 6 * dim**2 + 2 * dim * model.ffn_dim  # q, k, v, o; the text's q, o; feed-forward
    twins = dim**2 if model.camera == "prope" else 0
    each = 2 * (linear + twins) + 4 * dim * model.text_length
    text = 2 * 2 * dim**2 * model.text_length  # its keys and values
    attention = 4 * dim * (model.attention_heads // model.heads) * tokens**2 * pairs
    ends = 2 * dim * model.channels * model.patch**2 * 2 * frames * tokens
    return model.layers * (each * frames * tokens + text + attention) + ends


@lru_cache(maxsize=256)
def _pairs(queries: tuple[Frame, ...], keys: tuple[Frame, ...], context: ContextPolicy) -> int:
    if isinstance(context, Context):
        return sum(sees(query, key, context) for query in queries for key in keys)
    if context.selects:  # known during the rollout only; as many as it may read
        sizes = [(frame.chunk_end, frame.chunk_end - frame.chunk_start) for frame in queries]
        return sum(context.span(end, size) or end for end, size in sizes)
    groups = reading(queries, keys, context).groups
    return sum((group.rows[1] - group.rows[0]) * len(group.keys) for group in groups)


def teacher_forced(model: ModelConfig, clip: Clip, sizes: Sequence[int], context: ContextPolicy) -> float:
    """One pass over the clean clip and the noisy one."""
    both = frames_of(sizes, stream=0) + frames_of(sizes, stream=1)
    return forward(model, clip, 2 * clip.frames, _pairs(both, both, context))


def causal(model: ModelConfig, clip: Clip, sizes: Sequence[int], context: ContextPolicy) -> float:
    """One pass over chunks that see themselves and the ones before: diffusion forcing, or a clip's context."""
    frames = frames_of(sizes)
    return forward(model, clip, clip.frames, _pairs(frames, frames, context))


def behind(model: ModelConfig, clip: Clip, sizes: Sequence[int], context: ContextPolicy) -> float:
    """One pass over noisy chunks that read a clip's context."""
    noisy, clean = frames_of(sizes, stream=1), frames_of(sizes)
    return forward(model, clip, clip.frames, _pairs(noisy, clean + noisy, context))


def bidirectional(model: ModelConfig, clip: Clip) -> float:
    """One pass in which all frames see each other."""
    return forward(model, clip, clip.frames, clip.frames**2)


def rolled_out(
    model: ModelConfig,
    clip: Clip,
    sizes: Sequence[int],
    context: ContextPolicy,
    calls: float,
    first: float | None = None,
    spared: Callable[[int], float] = lambda chunk: 0.0,
) -> float:
    """A rollout with so many denoising calls a chunk, on average, and one that commits each but the last.

    spared: of chunk i, the share of rollouts in which its last denoising call commits it.
    """
    total, start = 0.0, 0
    for index, size in enumerate(sizes):
        chunk = frames_of([size], start=start)
        seen = min(start + size, context.span(clip.frames, size) or clip.frames)
        commits = 1 - spared(index) if index + 1 < len(sizes) else 0
        times = (first if index == 0 and first is not None else calls) + commits
        total += times * forward(model, clip, size, len(chunk) * seen)
        start += size
    return total


# ---- stages ----------------------------------------------------------------------------------------------------------


def step_work(
    settings: Any, roles: dict[str, ModelConfig], clip: Clip, context: ContextPolicy = Context()
) -> Work | None:
    """A trainer step over the whole batch; None for stages whose networks are not counted (the codec's).

    settings: the stage's. roles: the size of each network that takes part. Trajectories of causal ODE are made once,
    before the first step, and are not in it.
    """
    if not hasattr(settings, "batch") or "student" not in roles:
        return None
    student, whole = roles["student"], clip.frames * clip.tokens(roles["student"])
    if isinstance(settings, DMDConfig):
        return _dmd(settings, roles, clip, context) * settings.batch
    if not isinstance(settings, (ARDiffusionConfig, CausalODEConfig, CausalCDConfig, CausalSCMConfig)):
        return Work((1 + BACKWARD) * bidirectional(student, clip), whole) * settings.batch
    sizes = chunk_sizes(clip.frames, settings.chunk)
    if getattr(settings, "forcing", "teacher") == "diffusion":
        return Work((1 + BACKWARD) * causal(student, clip, sizes, context), whole) * settings.batch
    work = Work((1 + BACKWARD) * teacher_forced(student, clip, sizes, context), 2 * whole)
    if isinstance(settings, (CausalCDConfig, CausalSCMConfig)):
        rows, is_step = 1 if settings.guidance == 1 else 2, isinstance(settings, CausalCDConfig)
        work += Work(rows * teacher_forced(roles["teacher"], clip, sizes, context))
        work += Work((1 if is_step else TANGENT) * teacher_forced(student, clip, sizes, context))  # of the target
    return work * settings.batch


def _dmd(c: DMDConfig, roles: dict[str, ModelConfig], clip: Clip, context: ContextPolicy) -> Work:
    """A cycle, for one row of the batch of each update."""
    student, critic, teacher = roles["student"], roles["critic"], roles["teacher"]
    sizes, whole = chunk_sizes(clip.frames, c.chunk), clip.frames * clip.tokens(student)

    def made_by(levels: Sequence[float]) -> list[int]:
        """Calls of a chunk, of every exit that is as likely as the others."""
        last, turns = len(levels), len(c.first_steps or c.steps)
        if c.exits == "in_turn":
            return [min(turn, last) for turn in range(1, turns + 1)]
        return [last] if c.exits == "last" else list(range(1, last + 1))

    def calls(levels: Sequence[float]) -> float:
        return sum(made_by(levels)) / len(made_by(levels))

    def spared(chunk: int) -> float:
        levels = c.steps if chunk or c.first_steps is None else c.first_steps
        is_noisy = c.noisy_from is not None and chunk >= c.noisy_from
        return made_by(levels).count(len(levels)) / len(made_by(levels)) if is_noisy else 0.0

    if c.samples == "self_rollout":
        first = None if c.first_steps is None else calls(c.first_steps)
        longer = round((clip.frames + (c.longest or clip.frames)) / 2 / c.chunk)  # chunks of a rollout, on average
        rolled = replace(clip, frames=longer * c.chunk)
        plan = chunk_sizes(rolled.frames, c.chunk)
        made = Work(rolled_out(student, rolled, plan, context, calls(c.steps), first, spared)) * (1 - c.rolling)
        made += Work(rolled_out(student, rolled, plan, context, len(c.steps))) * c.rolling  # every chunk at every level
        again = Work(
            causal(student, rolled, plan, context) + (1 + BACKWARD) * behind(student, clip, sizes, context), whole
        )
    else:
        one = teacher_forced if c.samples == "teacher_forced" else causal
        made = Work(one(student, clip, sizes, context))
        again = Work((1 + BACKWARD) * one(student, clip, sizes, context), whole)

    def score(model: ModelConfig) -> float:
        if c.samples == "teacher_forced":
            return teacher_forced(model, clip, sizes, context)
        return bidirectional(model, clip)

    update = Work((1 + BACKWARD) * score(critic), whole)
    scores = Work(score(critic) + (1 if c.guidance == 1 else 2) * score(teacher))
    samples = c.critic_samples + (c.student_samples == "fresh")
    return made * samples + update * c.critic_updates + scores + again
