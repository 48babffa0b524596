"""Run the recorded cases of a folder and say which are met."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from causalreel.verify import (
    cases_checkpoints,
    cases_codec,
    cases_control,
    cases_data,
    cases_evaluation,
    cases_lora,
    cases_network,
    cases_policies,
    cases_rcm,
    cases_rollout,
    cases_sampler,
    cases_schedule,
    cases_text,
    cases_training,
)
from causalreel.verify.case import Case, Findings, read_case

Handler = Callable[[Case, Findings], None]

HANDLERS: dict[str, Callable[[Case], Handler | None]] = {
    "c1": lambda case: cases_network.bidirectional,
    "c2": lambda case: cases_network.diffusion_forcing,
    "c3": lambda case: cases_network.teacher_forcing,
    "c4": lambda case: cases_rollout.few_step,
    "c5": lambda case: cases_rollout.many_step,
    "c6": lambda case: cases_schedule.schedules,
    "c7": cases_training.handler,
    "c8": lambda case: cases_sampler.rolling_forcing,
    "c9": cases_control.cameras,
    "c10": lambda case: cases_codec.wan_vae,
    "c11": lambda case: cases_codec.taehv,
    "c12": lambda case: cases_text.umt5,
    "c13": lambda case: cases_text.cleaning,
    "c14": cases_checkpoints.handler,
    "c15": lambda case: cases_data.lmdb,
    "c16": lambda case: cases_sampler.rcm_sampler,
    "c17": cases_policies.handler,
    "c18": cases_checkpoints.handler,
    "c19": cases_rcm.handler,
    "c20": lambda case: cases_lora.loras,
    "c21": lambda case: cases_control.controls,
    "c22": lambda case: cases_evaluation.vbench,
    "c23": lambda case: cases_data.foreign,
}
"""Family of a case, the beginning of its name -> what checks it; None where nothing does."""

PASS, FAIL, ERROR, NOT_COVERED = "pass", "fail", "error", "not covered"


@dataclass(frozen=True)
class CaseResult:
    """One case. error: largest error of an output, relative to its largest value, and `worst` is its name."""

    case: str
    status: str
    error: float = math.nan
    tolerance: float = math.nan
    worst: str = ""
    detail: str = ""


def run(folder: Path, *, allow_uncovered: bool = False, pattern: str | None = None) -> list[CaseResult]:
    """Every case of a folder, or those whose name fits the glob `pattern`; see `passed` for the verdict."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"folder of cases not found: {folder}")
    paths = sorted(folder.glob("*.json"), key=lambda path: _natural(path.stem))
    if not paths:
        raise ValueError(f"no cases (*.json) in {folder}")
    chosen = [path for path in paths if pattern is None or fnmatch.fnmatch(path.stem, pattern)]
    if not chosen:
        raise ValueError(f"no case in {folder} fits {pattern!r}; there are {', '.join(path.stem for path in paths)}")
    return [run_case(path, allow_uncovered=allow_uncovered) for path in chosen]


def run_case(path: Path, *, allow_uncovered: bool = False) -> CaseResult:
    """One <case>.json with its tensors; what goes wrong is a result too."""
    name = path.stem
    uncovered = CaseResult(name, NOT_COVERED, detail="allowed" if allow_uncovered else "nothing here checks it")
    try:
        pick = HANDLERS.get(name.split("_")[0])
        case = read_case(path) if pick else None
        handler = pick(case) if pick and case else None
        if case is None or handler is None:
            return uncovered
        found = Findings(case)
        handler(case, found)
    except Exception as error:  # a case that cannot be run is reported, and the others still run
        lacks = "the case lacks " if isinstance(error, KeyError) else f"{type(error).__name__}: "
        return CaseResult(name, ERROR, detail=f"{lacks}{error}")
    return _verdict(found)


def _verdict(found: Findings) -> CaseResult:
    case, notes = found.case, []
    if not found.checks:
        return CaseResult(
            case.name, ERROR, tolerance=case.tolerance, detail="the case has no output that is known here"
        )
    missed = [check for check in found.checks if check.ratio > 1]
    outputs = [check for check in found.checks if not check.is_printed]  # they say more: tables have six digits
    worst = max(missed or outputs or found.checks, key=lambda check: check.ratio)
    if missed:
        notes.append(f"{len(missed)} of {len(found.checks)} checks missed: {_few([check.name for check in missed])}")
    if found.unchecked:
        notes.append(f"not checked: {_few(found.unchecked)}")
    status = FAIL if missed else PASS
    return CaseResult(case.name, status, worst.error, worst.limit, worst.name, "; ".join(notes))


def passed(results: Sequence[CaseResult], allow_uncovered: bool = False) -> bool:
    """Whether every case passed; cases that nothing here checks count as failures unless allowed."""
    fine = (PASS, NOT_COVERED) if allow_uncovered else (PASS,)
    return bool(results) and all(result.status in fine for result in results)


def format_table(results: Sequence[CaseResult]) -> str:
    """The results as aligned text, one line a case, and a line of totals."""
    rows = [("case", "status", "error", "tolerance", "worst output")]
    rows += [(r.case, r.status, _number(r.error), _number(r.tolerance), r.worst) for r in results]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = []
    for row, result in zip(rows, [None, *results], strict=True):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        detail = f"  [{result.detail}]" if result and result.detail else ""
        lines.append(("  ".join([*cells, row[4]]) + detail).rstrip())
    counts = {status: sum(r.status == status for r in results) for status in (PASS, FAIL, ERROR, NOT_COVERED)}
    lines.append(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    return "\n".join(lines)


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1e}"


def _few(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts c2 before c10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
