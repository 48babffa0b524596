"""A run's checkpoints against each other: some weights of each role, read from the mapped files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from causalreel.headers import read_header
from causalreel.train import checkpoint, sharded
from causalreel.train.doctor.files import RunFiles
from causalreel.train.doctor.finding import Finding, wrong
from causalreel.train.watch import LOW_BITS
from causalreel.weights.files import read_tensors

SAMPLE, TENSORS = 4096, 64
"""Weights that are looked at in a tensor, and tensors of a role."""


def found(run: RunFiles, notes: list[str]) -> list[Finding]:
    """What two checkpoints say, or one; notes: what could not be looked at, and why."""
    if not run.checkpoints:
        notes.append("weights: there is no checkpoint yet")
        return []
    if any(map(sharded.is_sharded, run.checkpoints)):
        notes.append("weights: several processes wrote the checkpoints; the records stand for them")
        return []
    ends = [run.checkpoints[-1]] if len(run.checkpoints) == 1 else [run.checkpoints[-2], run.checkpoints[-1]]
    try:
        return list(_compared(run, ends, notes))
    except (ValueError, OSError) as error:  # a run that goes on removes old ones
        notes.append(f"weights: {error}")
        return []


def _compared(run: RunFiles, ends: list[Path], notes: list[str]) -> Iterator[Finding]:
    trained = set(run.recipe.trainer.optimisers) if run.recipe else {"student"}
    roles = sorted(path.stem for path in ends[-1].glob("*.safetensors"))
    steps = " to ".join(str(checkpoint.step_of(end)) for end in ends)
    if len(ends) == 1:
        notes.append("weights: one checkpoint alone; whether they move cannot be seen in it")
    held = {role: [_sample(end / f"{role}.safetensors") for end in ends] for role in roles}
    for role, (*before, now) in held.items():
        if not now.numel():
            continue
        if not now.isfinite().all():
            yield wrong("weights", f"the {role} has weights that are not finite in {ends[-1].name}", "an earlier one")
        stands = bool(before) and before[0].shape == now.shape and torch.equal(before[0], now)
        if role in trained and _is_coarse(now) and not stands:  # else it may be as it was read
            yield wrong(
                "bfloat16 masters",
                f"every weight of the {role} in {ends[-1].name} fits in bfloat16",
                "keep trained weights in float32",
            )
        if not before or before[0].shape != now.shape:
            continue
        changed = (before[0] != now).float().mean().item()
        is_followed = role in ("average", "target")
        is_moved = role in trained or (is_followed and "student" in held and _moved(held["student"]))
        if is_moved and changed < 0.001:
            check = "average" if is_followed else "frozen"
            yield wrong(check, f"the {role} is the same in steps {steps}", f"look at what should move the {role}")
        elif role not in trained and not is_followed and changed > 0:
            yield wrong(
                "frozen role", f"the {role} has no optimiser and changed in steps {steps}", "find what wrote it"
            )
    for role in ("average", "target"):
        if role in held and "student" in held and torch.equal(held[role][-1], held["student"][-1]):
            start = getattr(getattr(run.recipe and run.recipe.settings, "ema", None), "from_step", 0)
            if checkpoint.step_of(ends[-1]) > start and _moved(held["student"]):
                yield wrong(
                    "average", f"the {role} in {ends[-1].name} is a copy of the student", "set its decay, such as 0.99"
                )


def _moved(samples: list[Tensor]) -> bool:
    return len(samples) == 1 or not torch.equal(samples[0], samples[-1])


def _is_coarse(values: Tensor) -> bool:
    weights = values[values != 0]
    return bool(len(weights)) and bool(((weights.view(torch.int32) & LOW_BITS) == 0).all())


def _sample(path: Path) -> Tensor:
    """Some float32 weights (n,) of a role's file, the same ones of every such file."""
    entries = read_header(path).entries
    names = sorted(name for name, entry in entries.items() if entry.dtype == "F32")
    names = names[:: max(1, len(names) // TENSORS)]
    tensors = read_tensors(path) if names else {}
    parts = []
    for name in names:
        flat = tensors[name].reshape(-1)
        parts.append(flat[:: max(1, len(flat) // SAMPLE)][:SAMPLE].clone())
    return torch.cat(parts) if parts else torch.empty(0)
