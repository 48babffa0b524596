"""The table of initialisations: what stage 2 leaves, and what stage 3 makes of it, at equal cost.

    python runs/evidence.py --run runs/tiny --cycles 60

Four initialisations (Self Forcing ODE, AR diffusion, causal ODE, causal CD) in four settings: chunk-wise 4-step, and
frame-wise 4, 2 and 1 step, where 1 and 2 steps give the first frame 4. Needs what `runs/speedrun.sh` made and makes the
Self Forcing initialisation itself. All in one process, so that compilation is paid once. Run it again and it continues.
One training seed: read differences with the standard errors in mind.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from causalreel import config
from causalreel.eval import run as evaluation
from causalreel.train import run as training

INITS = {"Self Forcing ODE": "sf", "AR diffusion": "ar", "causal ODE": "ode", "causal CD": "cd"}
SETTINGS = {
    "chunk 4-step": (
        "chunk",
        4,
        ["settings.chunk=3", "settings.steps=[1000,750,500,250]", "settings.first_steps=null"],
    ),
    "frame 4-step": ("frame", 4, ["settings.steps=[1000,750,500,250]", "settings.first_steps=null"]),
    "frame 2-step": ("frame", 2, ["settings.steps=[1000,500]"]),
    "frame 1-step": ("frame", 1, ["settings.steps=[1000]"]),
}


def train(name: str, recipe: str, overrides: list[str], run: Path) -> None:
    """One training run below `run`, unless its export is there already."""
    if (run / name / "export" / "config.yaml").is_file():
        return
    common = [f"trainer.out={run / name}", f"data={run / 'data'}", f"codec={run / 'codec/export'}"]
    print(f"== {name}", flush=True)
    training.run(
        config.load(training.find_recipe(recipe), training.Recipe, [*common, "trainer.preview_every=0", *overrides])
    )


def start(run: Path, **roles: str) -> list[str]:
    return [f"init.{role}={run / name / 'export'}" for role, name in roles.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--cycles", type=int, default=60, help="DMD cycles per cell")
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--inits", nargs="*", default=list(INITS.values()))
    parser.add_argument("--smoke", action="store_true", help="two steps a run on a CPU, after speedrun.sh --smoke")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = args.run
    tiny = ["trainer.steps=2", "trainer.device=cpu", "settings.batch=2", "rows=null"] if args.smoke else []
    dmd = [*tiny, "settings.critic_updates=2"] if args.smoke else []
    sf = [*tiny, "settings.pairs=4", "settings.grid=4", "settings.keep=[0,1,2,3]"] if args.smoke else []

    chunks = {"frame": "settings.chunk=1", "chunk": "settings.chunk=3"}
    for unit, chunk in chunks.items():
        if "sf" in args.inits:
            train(f"sf-{unit}", "tiny/self_forcing_ode", [*start(run, student="base", teacher="base"), chunk, *sf], run)
    cells = [(label, setting) for label, name in INITS.items() if name in args.inits for setting in SETTINGS]
    before, after = [], []
    for label, setting in cells:
        unit, steps, overrides = SETTINGS[setting]
        init = f"{INITS[label]}-{unit}"
        cell = f"cells/{INITS[label]}-{setting.replace(' ', '-')}"
        roles = start(run, student=init, critic="base", teacher="base")
        train(cell, "tiny/dmd", [*roles, f"trainer.steps={args.cycles}", *overrides, *dmd], run)
        before.append(f"{label}, {setting}, stage 2={run / init / 'export'}@{steps}")
        after.append(f"{label}, {setting}, stage 3={run / cell / 'export'}")
    names = {"bidirectional": "base", "AR frame-wise": "ar-frame", "AR chunk-wise": "ar-chunk"}
    teachers = [f"{label}, 48 steps={run / name / 'export'}" for label, name in names.items()]
    rows = evaluation.run([*teachers, *before, *after], out=run / "evidence", clips=args.clips, batch=args.batch)
    print(evaluation.table(rows))


if __name__ == "__main__":
    main()
