"""A run's records against each other: what holds for every stage and size, with no curve to compare with."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from causalreel.train.doctor.files import RunFiles
from causalreel.train.doctor.finding import Finding, watch, wrong
from causalreel.train.stages.causal_cd import CausalCDConfig

STILL = 0.999
"""Share of weights that did not change, from which on a network stands still."""


def found(run: RunFiles) -> list[Finding]:
    """Everything that the records alone say."""
    roles = sorted({name.rpartition("/")[0] for record in run.records for name in record if name.endswith("/lr")})
    findings = [finding for role in roles for finding in _of_role(run, role)]
    return [*findings, *_of_average(run, "student"), *_of_critic(run), *_of_text(run), *_of_data(run)]


def _of_role(run: RunFiles, role: str) -> Iterator[Finding]:
    still, ratio, coarse = (run.last(f"{role}/{name}") for name in ("still", "update_ratio", "coarse"))
    is_still = still is not None and still >= STILL and (ratio or 0) < 1e-7
    if coarse is not None and coarse > 0.99 and not (is_still and run.last(f"{role}/lr") == 0):
        share = "" if still is None else f", and {still:.0%} of them did not change in the last step that was recorded"
        yield wrong(
            "bfloat16 masters",
            f"the {role}'s weights are all of bfloat16{share}: steps smaller than 1/256 of a weight are lost",
            "keep trained weights in float32 and compute in bfloat16 (as this trainer does unless it is changed)",
        )
    elif is_still:
        rate = run.last(f"{role}/lr")
        why = "its learning rate is 0" if rate == 0 else f"at a learning rate of {rate:g}"
        yield wrong(
            "frozen",
            f"the {role} does not move: {still:.1%} of its weights were the same after the last recorded step, {why}",
            f"look at trainer.optimisers.{role}, and whether its losses reach it",
        )
    yield from _of_gradients(run, role)
    yield from _of_loss(run, role)


def _of_gradients(run: RunFiles, role: str) -> Iterator[Finding]:
    norms = run.column(f"{role}/grad_norm")
    for place in range(5, len(norms)):
        usual = median(value for _, value in norms[max(0, place - 20) : place])
        if norms[place][1] > 10 * usual > 0:
            yield watch(
                "gradient spike",
                f"the {role}'s gradient norm was {norms[place][1]:.3g} to step {norms[place][0]}, {usual:.3g} before",
                "if it comes again: a lower learning rate, a lower clip, or look at the rows of that time",
            )
            return


def _of_loss(run: RunFiles, role: str) -> Iterator[Finding]:
    losses = [value for _, value in run.column(f"{role}/loss")]
    stage = None if run.recipe is None else run.recipe.stage
    if role == "student" and (
        stage in ("causal_cd", "causal_scm") or any("critic/lr" in record for record in run.records[-1:])
    ):
        return  # consistency with itself, or a surrogate: may rise in a healthy run
    if len(losses) < 8:
        return
    width = len(losses) // 4
    means = [sum(losses[i : i + width]) / width for i in range(len(losses) - width + 1)]
    lowest, last = min(means), means[-1]
    if lowest > 0 and last > 1.5 * lowest:
        check = "critic" if role == "critic" else "loss"
        what = f"the {role}'s loss rose: {lowest:.3g} at its lowest, {last:.3g} now (means of {width} records)"
        if role == "critic":
            yield wrong(check, f"{what}: it falls behind its student", "more critic updates, or a slower student")
        else:
            yield wrong(check, what, "a lower learning rate, and the checkpoint from before it rose")


def _of_average(run: RunFiles, source: str) -> Iterator[Finding]:
    role = "target" if run.last("target/distance") is not None else "average"
    distance, still, ratio = run.last(f"{role}/distance"), run.last(f"{role}/still"), run.last(f"{source}/update_ratio")
    if distance is None or not ratio:
        return
    decay, start = _decay(run)
    if run.step <= start:
        return
    if distance == 0:
        yield wrong(
            "average",
            f"the {role} is a copy of the {source}: nothing is averaged",
            "settings.ema.decay (causal CD: settings.target_decay) such as 0.99, and from_step within the run",
        )
    elif still is not None and still >= STILL:
        yield wrong("average", f"the {role} stands still while the {source} moves", "a decay below 1")
    elif decay is not None and decay < 1:
        behind = 1 / (1 - decay)
        recent = [value for step, value in run.column(f"{source}/update_ratio") if step > run.step - 6 * behind - 1]
        if distance > 3 * behind * max(recent):
            yield wrong(
                "average",
                f"the {role} lags: it is {distance / max(recent):.0f} steps of the {source} away, a decay of {decay:g} "
                f"explains {behind:.0f}",
                "it may have begun too late or have been restored from elsewhere; look at its from_step",
            )


def _decay(run: RunFiles) -> tuple[float | None, int]:
    if run.recipe is None or run.recipe.stage == "codec":
        return None, 0
    settings = run.recipe.settings
    if isinstance(settings, CausalCDConfig):
        return settings.target_decay, 0
    return settings.ema.decay, settings.ema.from_step


def _of_critic(run: RunFiles) -> Iterator[Finding]:
    student, critic = run.last("student/update_ratio"), run.last("critic/update_ratio")
    if student and critic is not None and 0 < critic < 0.1 * student:
        yield wrong(
            "critic",
            f"a cycle moves the critic by {critic:.2g} of its weights, its student by {student:.2g}: it is left behind",
            "more critic updates (settings.critic_updates), or a higher learning rate of the critic",
        )


def _of_text(run: RunFiles) -> Iterator[Finding]:
    gains = [value for _, value in run.column("probe/text")][-2:]
    total = run.recipe.trainer.steps if run.recipe else run.step
    is_new = run.recipe is not None and run.recipe.stage == "pretrain" and run.step < total / 2
    if len(gains) == 2 and max(gains) <= 0 and not is_new:
        yield watch(
            "text",
            "the student knows clips as well with the text of another clip (probe/text is not above 0)",
            "look at whether captions belong to their clips and differ between clips, and at text dropout",
        )


def _of_data(run: RunFiles) -> Iterator[Finding]:
    waits = [value for _, value in run.column("data_wait")][-20:]
    if waits and median(waits) > 0.2:
        yield watch(
            "data wait",
            f"{median(waits):.0%} of the time goes by in waiting for data",
            "put the prepared set on a faster disk, or give the process more CPU",
        )
