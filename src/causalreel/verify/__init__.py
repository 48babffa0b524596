"""Recorded numbers of the released code, met by the functions that training and inference run."""

from causalreel.verify.runner import CaseResult, format_table, passed, run

__all__ = ["CaseResult", "format_table", "passed", "run"]
