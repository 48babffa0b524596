"""A run: the processes of a launch, the folder that it claims, training, and the export that it leaves.

The trained weights leave as an export folder (`<out>/export`), which is what later stages take in `init` and what
`causalreel generate --model` loads.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from causalreel.folders import claim
from causalreel.parallel.mesh import Launch, join, launch
from causalreel.parallel.sharding import Team
from causalreel.train import trainer
from causalreel.train.arithmetic import arithmetic
from causalreel.train.building import ADAPTERS, build_codec, build_denoising
from causalreel.train.contents import Content
from causalreel.train.recipe import Recipe, provenance
from causalreel.train.remote import attached
from causalreel.train.state import choose_device
from causalreel.train.trainer import Result
from causalreel.weights.export import MODEL, find_codec, read_codec, read_export

log = logging.getLogger("causalreel.train")


def run(recipe: Recipe) -> Result:
    """Train and export; the same call again continues. Returns how it ended; the process computes as before then.

    Started by torchrun, all processes of the launch train together.
    """
    out, where = Path(recipe.trainer.out), launch()
    check_processes(recipe, 1 if where is None else where.size)
    _check_folder(out)
    build = build_codec if recipe.stage == "codec" else build_denoising
    with contextlib.ExitStack() as stack:
        device = stack.enter_context(_joined(where, recipe.trainer.device))
        stack.enter_context(arithmetic(device))
        team = Team(recipe.trainer.parallel, device)
        remote = None
        if team.is_first:
            stack.enter_context(claim(out, "training"))
            remote = stack.enter_context(attached(recipe.trainer, recipe))
        team.wait()  # also for a checkpoint that is fetched
        run = build(recipe, device, team)
        how: dict[str, Any] = {"contents": run.contents, "starts": run.starts, "work": run.work}
        how |= {"team": team, "remote": remote}
        result = trainer.train(run.stage, run.source, recipe.trainer, recipe=recipe, **how)
        if result.is_idle and _is_exported(out / "export", recipe, run.contents):
            log.info("%s is up to date", out / "export")
        elif not result.is_interrupted:
            run.export(out / "export")
        if remote is not None:
            remote.finish(*(() if result.is_interrupted else ("export", ADAPTERS)))
        if recipe.trainer.remote is not None:
            team.wait()
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


def _check_folder(out: Path) -> None:
    """Fail before the work if nothing could be written into `out`; makes nothing."""
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"trainer.out: cannot write to {out}, {there} is a file")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"trainer.out: cannot write to {out}, {there} is not writable")
