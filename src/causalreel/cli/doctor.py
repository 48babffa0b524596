"""`causalreel doctor`: whether a training run is healthy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg


@dataclass(frozen=True)
class Doctor:
    """Say what looks wrong in a training run, and what helps: settings, metrics, weights, previews.

    The run may be going on. Status 0 if nothing is wrong, 1 if something is, 2 for a folder that is of no run.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """Folder of the run: its trainer.out."""
    json: bool = False
    """Print one JSON object."""
    curves: Path | None = None
    """Curves to compare with in place of the package's, as runs/doctor.py makes them."""


def doctor(args: Doctor) -> int:
    from causalreel.train.doctor.curves import read_curves
    from causalreel.train.doctor.report import examine, told

    report = examine(args.run, None if args.curves is None else read_curves(args.curves))
    print(json.dumps(report.content(), indent=1) if args.json else told(report))
    return 0 if report.is_healthy else 1
