"""A run's health in words, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from causalreel.train.doctor import curves, previews, records, settings, weights
from causalreel.train.doctor.curves import Curves
from causalreel.train.doctor.files import read_run
from causalreel.train.doctor.finding import Finding

STAGES = {
    "codec": "codec",
    "pretrain": "bidirectional base",
    "ar_diffusion": "stage 1, AR diffusion",
    "causal_ode": "stage 2a, causal ODE",
    "causal_cd": "stage 2b, causal CD",
    "causal_scm": "stage 2c, causal sCM",
    "dmd": "stage 3, asymmetric DMD",
}


@dataclass(frozen=True)
class Report:
    """What was found in a run, and what was not looked at."""

    run: str
    stage: str | None
    step: int
    steps: int | None
    """Steps that it is to have; None where its settings are not known."""
    measure: str | None
    """The shipped recipe whose settings are the measure."""
    curves: str | None
    """Whose curves it was compared with."""
    findings: Sequence[Finding]
    """What is wrong first."""
    notes: Sequence[str]
    """What was not looked at, and why."""

    @property
    def is_healthy(self) -> bool:
        """Whether nothing is wrong."""
        return not any(finding.level == "wrong" for finding in self.findings)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "is_healthy": self.is_healthy}


def examine(folder: Path, known: Sequence[Curves] | None = None) -> Report:
    """Everything that a run's folder says of its health. known: curves; those of the package where not given.

    ValueError, in one line, for a folder that is of no run.
    """
    run = read_run(folder)
    notes, compared = list(run.notes), None
    findings = [*settings.found(run), *records.found(run)]
    if run.records:
        compared = curves.of_run(run, curves.read_curves() if known is None else known, notes)
        findings += curves.found(run, compared) if compared is not None else []
    else:
        notes.append("metrics: there are no records yet")
    findings += weights.found(run, notes) + previews.found(run, notes)
    if (
        run.recipe is not None
        and run.records
        and run.last("student/update_ratio") is None
        and run.recipe.stage != "codec"
    ):
        notes.append("movement of the weights: this run's records are older than it is measured")
    recipe = run.recipe
    return Report(
        run=str(folder),
        stage=None if recipe is None else recipe.stage,
        step=run.step,
        steps=None if recipe is None else recipe.trainer.steps,
        measure=None if recipe is None else settings.nearest(recipe, run.size),
        curves=None if compared is None else compared.name,
        findings=_once(findings),
        notes=notes,
    )


def _once(findings: Sequence[Finding]) -> list[Finding]:
    """What is wrong before what is to be watched; each fault once for each place that it was seen in."""
    ordered = sorted(findings, key=lambda finding: finding.level != "wrong")
    return list({(f.check, f.level, f.by, f.what): f for f in ordered}.values())


def told(report: Report) -> str:
    """The report for people."""
    stage = "a run whose settings are not known" if report.stage is None else STAGES.get(report.stage, report.stage)
    steps = "" if report.steps is None else f" of {report.steps}"
    lines = [f"{report.run}: {stage}, {report.step}{steps} steps"]
    if report.measure is not None:
        lines.append(f"  settings beside those of {report.measure}, metrics beside {_measured_by(report)}")
    for finding in report.findings:
        seen = "in its settings" if finding.by == "settings" else "measured"
        lines += [f"{finding.level.upper():<6} {finding.check} ({seen}): {finding.what}", f"       do: {finding.do}"]
    lines += [f"       not looked at: {note}" for note in report.notes]
    wrong = sum(finding.level == "wrong" for finding in report.findings)
    lines.append("nothing is wrong" if not wrong else f"{wrong} {'thing is' if wrong == 1 else 'things are'} wrong")
    return "\n".join(lines)


def _measured_by(report: Report) -> str:
    return "each other alone" if report.curves is None else f"curves of {report.curves}"
