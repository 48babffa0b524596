"""Prompts by time: what is read, how it is spread over chunks, and what a clip then reads."""

from __future__ import annotations

import pytest
import torch

from causalreel.infer.clips import ClipRequest
from causalreel.infer.models import load, profile
from causalreel.infer.scripts import Spoken, chunks_of, is_script, read_script, spread
from causalreel.text.tiny import TinyTextEncoder

RED, BLUE = "a large red circle moves right slowly on a dark background", "a large blue square moves left"


def test_a_script_is_read() -> None:
    assert read_script("a cat[5s] | a dog [ 2.5s# ]|a fish") == (
        Spoken("a cat", 5.0),
        Spoken("a dog", 2.5, True),
        Spoken("a fish", None),
    )
    assert read_script("alone[3s]") == (Spoken("alone", 3.0),)
    assert is_script("a[5s] | b") and is_script("a[5s]")
    assert not any(is_script(text) for text in ("a | b", "a [sic] b", "a[5m]", "", "[words]", "5s", "a[5]", "a[s]"))
    assert read_script("a[1s] | b [ .5 s # ] ")[1] == Spoken("b", 0.5, True)


def test_a_long_prompt_is_looked_at_once() -> None:
    """Text of others comes here: no pattern may go over its spaces again and again."""
    for text in ("a[" + " " * 100_000 + "x", "[ " * 50_000, "a[1" + "s " * 50_000 + "x]", "|" * 100_000):
        assert not is_script(text)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("a[5s] | b[-2s]", "prompt 2 .* got -2: a script cannot go back in time"),
        ("a[0s]", "got 0: a script cannot go back in time"),
        ("a[5s] | b | c[2s]", "prompt 2 of the script has no time"),
        ("[5s] | b", "prompt 1 of the script is empty"),
        ("a[5s] | ", "prompt 2 of the script is empty"),
        ("a[5s#] | b", "begins no new scene"),
        ("a[100000s]", "up to 86400 seconds"),
        ("a[86400s]|" * 999 + "b", "prompt 2 .* ends after 172800 seconds: a script lasts at most 86400"),
        ("a[1s]|" * 1000 + "b", "at most 1000 prompts"),
    ],
)
def test_a_wrong_script_is_one_line(script: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        read_script(script)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 300


def test_seconds_become_whole_chunks() -> None:
    script = read_script("a[2.25s] | b[2.25s#] | c[0.01s]")
    assert chunks_of(script, per_second=4, chunk=3) == [3, 3, 1]
    assert chunks_of(script, per_second=4, chunk=4, first=1) == [3, 3, 1]  # 1 + 4 + 4, then 9 frames in fours
    assert chunks_of(read_script("a[0.125s] | b[0.375s]"), per_second=4, chunk=1) == [1, 2]  # rounded to even
    found = spread([1, 2, None], read_script("a[1s] | b[1s#] | c"), [2] * 5)
    assert found.prompts == (0, 0, 1, 1, 1, 1, 2, 2, 2, 2)
    assert found.cuts == tuple(frame in (2, 3) for frame in range(10))
    assert spread([1, 1], read_script("a[1s] | b[1s]"), [1] * 4).prompts == (0, 1, 1, 1)
    with pytest.raises(ValueError, match="the clip ends before prompt 3 of the script's 3 begins: ask for more frames"):
        spread([2, 3, 1], read_script("a[1s] | b[1s] | c[1s]"), [1] * 5)


def test_a_clip_reads_its_script() -> None:
    known = profile("tiny")
    checked = ClipRequest(f"{RED}[1s] | {BLUE}[0.5s#]").check(known, TinyTextEncoder())
    assert checked.plan.frames == 6 and checked.spread is not None and len(checked.prompts) == 2
    assert checked.prompts[0] == RED and checked.spread.prompts == (0, 0, 0, 0, 1, 1)
    assert checked.spread.cuts == (False,) * 4 + (True, False)
    longer = ClipRequest(f"{RED}[1s] | {BLUE}", 37).check(known, None)
    assert longer.spread is not None and longer.spread.prompts == (0,) * 4 + (1,) * 6
    with pytest.raises(ValueError, match="made alone"):
        ClipRequest([f"{RED}[1s]", BLUE]).check(known, None)
    pipeline = load("tiny", policy="infinity-rope:cut_shift=3")
    plain = torch.cat([c.latents for c in pipeline.latents(RED, frames=21)], 1)
    spoken = torch.cat([c.latents for c in pipeline.latents(f"{RED}[1s] | {BLUE}[0.5s#]")], 1)
    soft = torch.cat([c.latents for c in pipeline.latents(f"{RED}[1s] | {BLUE}[0.5s]")], 1)
    assert plain.shape == spoken.shape
    assert torch.allclose(plain[:, :4], spoken[:, :4], atol=1e-5)
    assert not torch.allclose(spoken[:, 4], plain[:, 4], atol=1e-2)
    assert not torch.allclose(spoken[:, 4], soft[:, 4], atol=1e-3)  # the cut moves it
