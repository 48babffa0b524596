"""A recipe against the methods' own settings, and against where its networks come from. Reads configs only.

The measure is the shipped recipe that is nearest: of the same family of sizes (tiny/ or wan/), stage and kind. Those
under wan/ have the hyper-parameters of the released configs, but for what their headers say.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from causalreel.train.doctor.files import RunFiles, start_of
from causalreel.train.doctor.finding import Finding
from causalreel.train.recipe import Recipe, resolve, shipped_recipes
from causalreel.train.stages.causal_cd import CausalCDConfig
from causalreel.train.stages.causal_ode import CausalODEConfig
from causalreel.train.stages.dmd import DMDConfig


def found(run: RunFiles) -> list[Finding]:
    """What the settings of a run contradict."""
    if run.recipe is None or run.recipe.stage == "codec":
        return []
    name = nearest(run.recipe, run.size)
    findings = [*_of_average(run.recipe, run.step), *_of_starts(run.recipe), *_of_export(run)]
    if isinstance(run.recipe.settings, DMDConfig):
        findings += _of_cycle(run.recipe)
    if name is not None:
        findings += _against(run.recipe, name)
    return findings


@cache
def _shipped() -> dict[str, Recipe]:
    return {name: resolve(name) for name in shipped_recipes()}


def nearest(recipe: Recipe, size: str | None) -> str | None:
    """The shipped recipe that a run is measured by; None where there is none of its stage."""
    family = (
        "wan/" if str(size).startswith("wan") or (recipe.codec is not None and str(recipe.codec) == "wan") else "tiny/"
    )
    same = {n: r for n, r in _shipped().items() if n.startswith(family) and r.stage == recipe.stage}

    def distance(name: str) -> tuple[int, int, int, int]:
        other, marks = same[name], ("samples", "trajectories", "forcing", "chunk", "steps")
        pairs = [(getattr(recipe.settings, m, None), getattr(other.settings, m, None)) for m in marks]
        places = (recipe.codec != other.codec) + (recipe.data != other.data) + (recipe.model != other.model)
        mine, theirs = (vars(settings) for settings in (recipe.settings, other.settings))
        all_of_them = sum(value != theirs.get(key) for key, value in mine.items())
        return sum(one != other for one, other in pairs), places, all_of_them, len(name)

    return min(same, key=distance, default=None)


# ---- against the shipped recipe


def _against(recipe: Recipe, name: str) -> Iterator[Finding]:
    other = _shipped()[name]
    mine, theirs = recipe.settings, other.settings
    shift = getattr(mine, "shift", None)
    if shift is not None and shift != theirs.shift:
        yield _wrong(
            "shift",
            f"settings.shift is {shift:g}; {name} has {theirs.shift:g}, which samplers and later stages assume",
            f"train with settings.shift={theirs.shift:g}",
        )
    yield from _of_guidance(mine, theirs, name)
    for role, options in recipe.trainer.optimisers.items():
        usual = other.trainer.optimisers.get(role)
        if usual is None or options.lr == 0:
            continue
        ratio = options.lr / usual.lr
        if ratio > 2.5 or ratio < 0.05:
            level = "wrong" if ratio > 6 else "watch"
            yield Finding(
                "learning rate",
                level,
                "settings",
                f"the {role}'s learning rate {options.lr:g} is {ratio:.3g} times that of {name} ({usual.lr:g})",
                f"trainer.optimisers.{role}.lr={usual.lr:g}",
            )


def _of_guidance(mine: Any, theirs: Any, name: str) -> Iterator[Finding]:
    scale, usual = getattr(mine, "guidance", None), getattr(theirs, "guidance", None)
    if scale is None or usual is None:
        return
    if scale <= 1 < usual:
        what = "without guidance" if scale == 1 else "by less than its text says" if scale else "without its text"
        yield _wrong(
            "guidance",
            f"settings.guidance is {scale:g}: the teacher teaches {what}; {name} has {usual:g} (1 is no guidance: "
            f"uncond + scale * (cond - uncond); a released stage 3 guidance_scale counts one less)",
            f"train with settings.guidance={usual:g}",
        )
    elif scale > 2.5 * usual:
        yield _watch(
            "guidance",
            f"settings.guidance is {scale:g}, {name} has {usual:g}: colours tend to saturate",
            "look at the previews' contrast and colour, or lower it",
        )


# ---- against itself


def _of_average(recipe: Recipe, step: int) -> Iterator[Finding]:
    settings, steps = recipe.settings, recipe.trainer.steps
    if isinstance(settings, CausalCDConfig):
        decay, start, key, role = settings.target_decay, 0, "settings.target_decay", "target"
    else:
        decay, start, key, role = settings.ema.decay, settings.ema.from_step, "settings.ema.decay", "average"
    if decay == 0:
        what = (
            "the student must agree with itself" if role == "target" else "what is exported is the last step's weights"
        )
        yield _wrong("average", f"{key} is 0: the {role} is a copy of the student, {what}", f"set {key}, such as 0.99")
    elif start >= steps:
        yield _wrong(
            "average",
            f"settings.ema.from_step is {start}, the run has {steps} steps: the average never begins",
            "settings.ema.from_step=0",
        )
    elif decay == 1:
        yield _wrong("average", f"{key} is 1: the {role} never moves", f"set {key}, such as 0.99")
    elif 1 / (1 - decay) > steps / 2 and step >= steps:
        yield _watch(
            "average",
            f"the {role} spans about {1 / (1 - decay):.0f} steps, the run has {steps}: the beginning is in it",
            f"train longer or lower {key}",
        )


def _of_starts(recipe: Recipe) -> Iterator[Finding]:
    """What the exports say that the networks begin as."""
    settings, chunk = recipe.settings, getattr(recipe.settings, "chunk", None)
    starts = {role: start_of(recipe, role) for role in recipe.init}
    both = dict.fromkeys(("causal_ode", "causal_cd", "causal_scm"), ("student", "teacher"))
    wanted: dict[str, tuple[str, ...]] = {**both, "dmd": ("student",)}
    is_baseline = isinstance(settings, CausalODEConfig) and settings.trajectories == "bidirectional"
    for role in () if is_baseline else wanted.get(recipe.stage, ()):
        start = starts.get(role)
        if start is None:
            continue
        if start.sampling.chunk is None and role == "teacher":
            yield _wrong(
                "teacher",
                f"init.teacher ({recipe.init[role]}) is bidirectional: an AR student learns a blurred mean of it",
                "take an AR teacher of the same chunk, as stage 1 makes it",
            )
        elif start.sampling.chunk not in (None, chunk):
            yield _wrong(
                "chunk",
                f"settings.chunk is {chunk}, init.{role} ({recipe.init[role]}) was trained in chunks of "
                f"{start.sampling.chunk}",
                f"settings.chunk={start.sampling.chunk}, or begin with a network of chunks of {chunk}",
            )
    for role, start in starts.items():
        shift = getattr(settings, "shift", None)
        if start is not None and shift is not None and start.sampling.shift != shift:
            yield _wrong(
                "shift",
                f"settings.shift is {shift:g}, init.{role} ({recipe.init[role]}) has {start.sampling.shift:g}",
                f"settings.shift={start.sampling.shift:g}, or begin with another network",
            )
    teacher = starts.get("teacher")
    is_scored = isinstance(settings, DMDConfig) and settings.samples == "self_rollout"
    if is_scored and teacher is not None and teacher.sampling.chunk is not None:
        yield _watch(
            "teacher",
            f"init.teacher ({recipe.init['teacher']}) is causal; distribution matching gains by a bidirectional one",
            "take the bidirectional base",
        )


def _of_export(run: RunFiles) -> Iterator[Finding]:
    settings, sampling = run.recipe and run.recipe.settings, run.sampling
    noise = getattr(settings, "context_noise", 0) or getattr(settings, "context_sigma", 0)
    if sampling is None:
        return
    noisy_from = getattr(settings, "noisy_from", None)
    if sampling.noisy_from is not None and noisy_from is None and not noise:
        yield _wrong(
            "context noise",
            f"the export is sampled with noisy context (sampling.noisy_from: {sampling.noisy_from}), and was trained "
            f"behind clean frames alone",
            "take sampling.noisy_from out of the export's config, or train with settings.context_noise (stage 1) or "
            "settings.noisy_from (stages 2 and 3)",
        )
    for name in ("chunk", "shift", "steps", "first_steps", *(["noisy_from"] if noisy_from is not None else [])):
        trained, sampled = getattr(settings, name, None), getattr(sampling, name)
        if hasattr(settings, name) and trained != sampled and sampling.chunk is not None:
            yield _wrong(
                name.replace("_", " "),
                f"the export is sampled with {name}={sampled}, it was trained with {name}={trained}",
                f"set sampling.{name} of the export's config to what it was trained with",
            )


def _of_cycle(recipe: Recipe) -> Iterator[Finding]:
    settings: DMDConfig = recipe.settings
    if settings.samples == "self_rollout" and len(settings.steps) <= 2 and settings.first_steps is None:
        yield Finding(
            "first steps",
            "wrong" if settings.chunk == 1 else "watch",
            "settings",
            f"{len(settings.steps)} steps for the first chunk too, which has no context to lean on; released 1- and "
            f"2-step models give it 4",
            "settings.first_steps=[1000,750,500,250]",
        )
    if settings.critic_updates < 2:
        yield Finding(
            "critic",
            "watch" if settings.critic_updates else "wrong",
            "settings",
            f"settings.critic_updates is {settings.critic_updates}, released runs take 5 for each of the student",
            "settings.critic_updates=5",
        )


def _wrong(check: str, what: str, do: str) -> Finding:
    return Finding(check, "wrong", "settings", what, do)


def _watch(check: str, what: str, do: str) -> Finding:
    return Finding(check, "watch", "settings", what, do)
