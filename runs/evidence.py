"""The table of initialisations: what stage 2 leaves, and what stage 3 makes of it, at equal cost.

    python runs/evidence.py --run runs/tiny --cycles 60             all cells, then the table
    python runs/evidence.py --run runs/tiny --inits sf ar           a part of them, beside other processes
    python runs/evidence.py --run runs/tiny --table                 the table of what is there

Four initialisations (Self Forcing ODE, AR diffusion, causal ODE, causal CD) in four settings: chunk-wise 4-step, and
frame-wise 4, 2 and 1 step, where 1 and 2 steps give the first frame 4. Needs what `runs/speedrun.sh` made, its
evaluation of the teachers too, and makes the Self Forcing initialisation itself. A cell is evaluated as soon as it is
trained, into `<run>/evidence/<cell>`; run it again and it continues. Processes that share a GPU must not share
initialisations. One training seed: read differences with the standard errors in mind.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch

from causalreel.eval import run as evaluation
from causalreel.files import write_text
from causalreel.train import run as training
from causalreel.train.recipe import resolve
from causalreel.weights.files import read_tensors

INITS = {"sf": "Self Forcing ODE", "ar": "AR diffusion", "ode": "causal ODE", "cd": "causal CD"}
FOUR = ["settings.steps=[1000,750,500,250]", "settings.first_steps=null"]
SETTINGS: dict[str, tuple[str, int, list[str]]] = {  # the most telling first
    "frame 2-step": ("frame", 2, ["settings.steps=[1000,500]"]),
    "chunk 4-step": ("chunk", 4, ["settings.chunk=3", *FOUR]),
    "frame 1-step": ("frame", 1, ["settings.steps=[1000]"]),
    "frame 4-step": ("frame", 4, FOUR),
}
COLUMNS = ("follow", "direction", "first", "dynamic")


def train(name: str, recipe: str, overrides: list[str], run: Path) -> None:
    """One training run below `run`, unless its export is there already; raises KeyboardInterrupt if it was stopped."""
    if (run / name / "export" / "config.yaml").is_file():
        return
    common = [f"trainer.out={run / name}", f"data={run / 'data'}", f"codec={run / 'codec/export'}"]
    print(f"== {name}", flush=True)
    if training.run(resolve(recipe, [*common, "trainer.preview_every=0", *overrides])).is_interrupted:
        raise KeyboardInterrupt


def start(run: Path, **roles: str) -> list[str]:
    return [f"init.{role}={run / name / 'export'}" for role, name in roles.items()]


def folder(init: str, setting: str) -> str:
    return f"{init}-{setting.replace(' ', '-')}"


def is_done(out: Path) -> bool:
    return (out / "scores.safetensors").is_file()


def make_cell(init: str, setting: str, run: Path, args: argparse.Namespace) -> None:
    """Train one cell, and its initialisation if that is Self Forcing's; evaluate both with the cell's steps."""
    unit, steps, overrides = SETTINGS[setting]
    cell, out = folder(init, setting), run / "evidence" / folder(init, setting)
    if is_done(out):
        return
    tiny = ["trainer.steps=2", "trainer.device=cpu", "settings.batch=2", "rows=null"] if args.smoke else []
    if init == "sf":
        few = [*tiny, "settings.pairs=4", "settings.grid=4", "settings.keep=[0,1,2,3]"] if args.smoke else []
        chunk = f"settings.chunk={3 if unit == 'chunk' else 1}"
        train(f"sf-{unit}", "tiny/self_forcing_ode", [*start(run, student="base", teacher="base"), chunk, *few], run)
    roles = start(run, student=f"{init}-{unit}", critic="base", teacher="base")
    small = [*tiny, "settings.critic_updates=2"] if args.smoke else []
    train(f"cells/{cell}", "tiny/dmd", [*roles, f"trainer.steps={args.cycles}", *overrides, *small], run)
    torch.set_float32_matmul_precision("highest")  # as `causalreel eval` has it; training lowers it on a GPU
    models = [f"stage 2={run / f'{init}-{unit}' / 'export'}@{steps}", f"stage 3={run / 'cells' / cell / 'export'}"]
    evaluation.run(models, out=out, clips=args.clips, batch=args.batch)
    torch.cuda.empty_cache()  # room for the processes beside this one


def scores(path: Path) -> dict[str, Any]:
    return json.loads((path / "scores.json").read_text())


def shown(found: dict[str, Any]) -> list[str]:
    """The table's columns of one row of a scores.json."""
    return [
        f"{found[name]['mean']:.3f}" + (f" ± {found[name]['stderr']:.3f}" if name in COLUMNS[:2] else "")
        for name in COLUMNS
    ]


def difference(run: Path, setting: str, init: str, stage: str, metric: str) -> str:
    """A metric of an initialisation minus that of causal ODE, clip by clip, with its standard error."""
    found = [read_tensors(run / "evidence" / folder(i, setting) / "scores.safetensors") for i in (init, "ode")]
    apart = (found[0][f"{stage}/{metric}"] - found[1][f"{stage}/{metric}"]).double()
    apart = apart[~apart.isnan()]
    return f"{apart.mean():+.3f} ± {apart.std() / math.sqrt(len(apart)):.3f}"


def table(run: Path) -> str:
    """Markdown tables of the cells that are there, of the paired differences from causal ODE, and of the teachers."""
    there = [(s, i) for s in SETTINGS for i in INITS if is_done(run / "evidence" / folder(i, s))]
    lines = [
        "| setting, initialisation | stage 2: " + " | ".join(COLUMNS) + " | stage 3: " + " | ".join(COLUMNS) + " |"
    ]
    lines.append("|" + "---|" * (1 + 2 * len(COLUMNS)))
    for setting, init in there:
        models = scores(run / "evidence" / folder(init, setting))["models"]
        row = [f"{setting}, {INITS[init]}", *shown(models["stage 2"]), *shown(models["stage 3"])]
        lines.append("| " + " | ".join(row) + " |")
    lines += ["", "| less causal ODE | stage 2: follow | stage 3: " + " | ".join(COLUMNS) + " |"]
    lines.append("|" + "---|" * (2 + len(COLUMNS)))
    for setting, init in there:
        if init != "ode" and (setting, "ode") in there:
            apart = [("stage 2", "follow"), *(("stage 3", name) for name in COLUMNS)]
            row = [difference(run, setting, init, stage, name) for stage, name in apart]
            lines.append(f"| {setting}, {INITS[init]} | " + " | ".join(row) + " |")
    if is_done(run / "eval"):
        found = scores(run / "eval")
        lines += ["", f"| {found['facts']['clips']} clips | " + " | ".join(COLUMNS) + " |"]
        lines.append("|" + "---|" * (1 + len(COLUMNS)))
        lines += [f"| {label} | " + " | ".join(shown(row)) + " |" for label, row in found["models"].items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--cycles", type=int, default=60, help="DMD cycles per cell")
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64, help="clips evaluated together")
    parser.add_argument("--inits", nargs="*", default=list(INITS), choices=list(INITS))
    parser.add_argument("--table", action="store_true", help="train nothing, print the table of what is there")
    parser.add_argument("--smoke", action="store_true", help="two steps a run on a CPU, after speedrun.sh --smoke")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for setting in SETTINGS if not args.table else ():
        for init in args.inits:
            make_cell(init, setting, args.run, args)
    found = table(args.run)
    (args.run / "evidence").mkdir(exist_ok=True)
    write_text(args.run / "evidence" / "table.md", found + "\n")
    print(found)


if __name__ == "__main__":
    main()
