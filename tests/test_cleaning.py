"""Cleaning of prompts: what released pipelines make of them, row by row, and what holds for any text."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from causalreel.text.cleaning import clean
from causalreel.text.umt5 import NEGATIVE_PROMPT
from causalreel.verify import run
from causalreel.verify.runner import ERROR, FAIL, PASS

pytest.importorskip("ftfy", reason="needs the extra wan")

GOLDEN = Path(os.environ.get("CAUSALREEL_GOLDEN", Path(__file__).parents[1] / ".." / "shared" / "golden"))
CASES = sorted(GOLDEN.glob("c13_*.json")) if GOLDEN.is_dir() else []
ROWS = [row for path in CASES for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]

SETTLED = "abcXYZ 019.,!?()中文字гдеשלום한글ＡＢ１２，！：“”‘’\u3000\u2003\t" + "\u200bﬁ"  # noqa: RUF001
"""Characters whose cleaning is final after one pass: no entities, no line breaks, nothing that could be mojibake."""


@pytest.mark.skipif(not ROWS, reason=f"no recorded prompts in {GOLDEN} (set CAUSALREEL_GOLDEN)")
def test_recorded_prompts_match_exactly() -> None:
    assert [row["name"] for row in ROWS if clean(row["input"]) != row["whitespace"]] == []


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a \t cat\n\nwalks\u3000home ", "a cat walks home"),
        ("“Hi”，‘ＡＢ１’", "\"Hi\",'AB1'"),  # noqa: RUF001
        ("Tom &amp;amp; Jerry", "Tom & Jerry"),
        ("<b> &amp;amp;amp; x", "<b> &amp; x"),  # a `<` keeps ftfy from decoding: exactly two levels go
        ("<i> &lt;&nbsp;&gt;", "<i> < >"),
        ("a\u000bb", "ab"),
        ("cafÃ©", "café"),
        ("e\u0301", "é"),
        ("zero\u200bwidth", "zero\u200bwidth"),
        ("", ""),
    ],
)
def test_what_released_pipelines_do(prompt: str, cleaned: str) -> None:
    assert clean(prompt) == cleaned


def test_the_negative_prompt_loses_its_wide_commas() -> None:
    cleaned = clean(NEGATIVE_PROMPT)
    assert cleaned.startswith("色调艳丽,过曝,静态") and cleaned.endswith("背景人很多,倒着走")
    assert "，" not in cleaned and len(cleaned) == len(NEGATIVE_PROMPT)  # noqa: RUF001


def test_a_second_pass_may_decode_more() -> None:
    """Why nothing is cleaned twice on its way."""
    once = clean("<b> &amp;amp;amp; x")
    assert clean(once) != once


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_white_space_is_single_spaces_inside(text: str) -> None:
    cleaned = clean(text)
    assert cleaned == " ".join(cleaned.split())


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=SETTLED))
def test_settled_text_stays_as_it_is(text: str) -> None:
    once = clean(text)
    assert clean(once) == once and clean(f"\n {text}\t ") == once


def test_other_types_are_refused() -> None:
    with pytest.raises(TypeError, match="prompt must be a string, got bytes"):
        clean(b"cat")  # type: ignore[arg-type]


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match=r"pip install 'causalreel\[wan\]'"):
        clean("cat")


def small_case(folder: Path, *, wanted: str = "a cat", mode: str = "whitespace") -> Path:
    rows = [{"name": "plain", "input": " a  cat", "whitespace": wanted, "lower": "not looked at"}]
    described = {"case": "c13_small", "config": {"used_by_the_pipeline": mode}, "rows": rows}
    (folder / "c13_small.json").write_text(json.dumps(described), encoding="utf-8")
    return folder


def test_verify_compares_every_row_and_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = run(small_case(tmp_path))
    assert result.status == PASS
    (result,) = run(small_case(tmp_path, wanted="a  cat"))
    assert result.status == FAIL and "rows.plain" in result.detail
    (result,) = run(small_case(tmp_path, mode="lower"))
    assert result.status == ERROR and "cleaning mode 'lower'" in result.detail
    monkeypatch.setitem(sys.modules, "ftfy", None)
    (result,) = run(small_case(tmp_path))
    assert result.status == ERROR and "pip install 'causalreel[wan]'" in result.detail
