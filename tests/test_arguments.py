"""What the command line says of odd arguments, for any flag of a command: one line and an exit status, at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from causalreel import cli
from causalreel.cli import NAMES
from causalreel.cli.flags import cache_folder
from causalreel.cli.parsing import UsageError, check_numbers, flags, numbers, one_sentence, parse
from causalreel.spelling import distance, nearest
from causalreel.vocabulary import tokenize
from patience import PATIENCE_S

NEEDED = {
    "plan": ["wan/ar"],
    "policy": ["full"],
    "generate": ["a red circle"],
    "train": ["tiny/base"],
    "encode": ["--codec", "x", "--out", "y"],
    "export": ["a", "b"],
    "import": ["a", "--out", "y"],
    "convert": ["a", "b", "--to", "wan"],
    "verify": ["x"],
    "replay": ["x"],
}
"""What a command does not go without."""

ODD = {int: (-1, -(10**20), 10**30, 10**5000), float: (-1.0, -1e-300, 1e300, float("inf"), float("-inf"), float("nan"))}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert shown.out == "" and len(lines) == 1 and lines[0].startswith("causalreel: error: "), shown.err
    assert lines[0].isprintable() and len(lines[0]) < 700
    return lines[0]


def test_every_number_of_every_command_has_a_range_and_odd_ones_are_refused() -> None:
    count = 0
    for name, cls in NAMES.items():
        for field, (kind, bounds) in numbers(cls).items():
            assert bounds is not None and bounds.least < bounds.most, f"{name} --{field}"
            for value in ODD[kind]:
                args = object.__new__(cls)
                for other in numbers(cls):
                    object.__setattr__(args, other, value if other == field else None)
                with pytest.raises(UsageError) as caught:
                    check_numbers(args)
                message = str(caught.value)
                assert f"--{field.replace('_', '-')} must be" in message and len(message) < 200
                count += 1
    assert count > 200


ZERO = {
    "seed": "the first of the seeds",
    "port": "a free one",
    "resume_chunks": "nothing is kept for who comes back",
    "frames of estimate": "endless",
    "noisy_context": "from the first chunk on",
    "motion": "static clips too",
    "brightness": "black clips too",
    "events": "captions stay as they are",
    "named": "no change says where to go",
    "same_background": "backgrounds are drawn as ever",
    "two_objects": "objects come and go as ever",
    "crowded": "changes need room",
    "direction_alone": "directions change with the rest",
    "least_psnr": "any codec",
}
"""Numbers that may be 0, and what it means."""


def test_nothing_of_something_is_refused_where_it_means_nothing() -> None:
    for name, cls in NAMES.items():
        for field, (_, bounds) in numbers(cls).items():
            assert bounds is not None
            may_be = field in ZERO or f"{field} of {name}" in ZERO
            assert bounds.least == 0 if may_be else bounds.least > 0, f"{name} --{field}"


@pytest.mark.parametrize("name", [name for name, cls in NAMES.items() if numbers(cls)])
@pytest.mark.parametrize("value", ["-1", "1" * 5000, "abc", ""])
def test_odd_numbers_are_refused_as_they_are_typed(name: str, value: str) -> None:
    field = list(numbers(NAMES[name]))[len(value) % len(numbers(NAMES[name]))]
    flag = f"--{field.replace('_', '-')}"
    with pytest.raises(UsageError) as caught:
        parse(NAMES, [name, *NEEDED.get(name, []), f"{flag}={value}"])
    message = str(caught.value)
    assert flag in message and message.isprintable() and len(message) < 300, message


def test_what_is_in_range_is_taken() -> None:
    args = parse(NAMES, ["generate", "--seed", "0", "x", "--height=480", "--latent_frames", "3"])
    assert (args.seed, args.height, args.latent_frames, args.prompts) == (0, 480, 3, ("x",))
    args = parse(NAMES, ["train", "tiny/base", "--no-check", "a=--b"])
    assert not args.check and args.overrides == ("a=--b",)
    for words in ([], ["--hide-prompts"], ["--no-log-prompts"]):
        assert parse(NAMES, ["serve", *words]).hide_prompts == bool(words)


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_flag_of_any_command_is_told_which_was_meant(name: str) -> None:
    for flag in flags(NAMES[name]):
        wrong = flag[:-2] + flag[-1] + flag[-2] + "x"
        if wrong not in flags(NAMES[name]):
            with pytest.raises(UsageError, match=f"{name} has no flag '{re.escape(wrong)}'"):
                parse(NAMES, [name, f"{wrong}=1"])
    with pytest.raises(UsageError, match=f"causalreel {name} --help"):
        parse(NAMES, [name, "--qqqqqqqqqqq"])


@pytest.mark.parametrize(
    "box",
    [
        "╭─ Missing ────╮\n│ No value for │\n│ --steps.     │\n│ ──────────── │\n│ For help     │\n╰──────────────╯\n",
        " Missing      \n ------------ \n  No value for  \n  --steps. \n  ---------\n  For help  \n    \n",
    ],
)
def test_the_parsers_box_is_a_sentence(box: str) -> None:
    assert one_sentence(box, ["bench"]) == "No value for --steps. (see causalreel bench --help)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["genrate", "x"], "did you mean 'generate'?"),
        (["Generate", "x"], "did you mean 'generate'?"),
        (["qqqq"], "unknown command 'qqqq'; the commands are generate"),
        (["--stepz", "generate"], "unknown flag '--stepz'"),
        ([], "generate, stream"),
        (["generate", "x", "--stepz", "3"], "did you mean --steps?"),
        (["generate", "x", "--steps"], "--steps"),
        (["generate", "x", "--steps", "abc"], "--steps must be a whole number, got 'abc'"),
        (["convert", "a"], "causalreel convert --help"),
        (["models", "\x1b[31mred\n"], "red"),
        (["generate", "x", "--decoder", "foo"], "--decoder"),
        (["generate", "x", "--device", "mps"], "device must be cpu, cuda or such as cuda:1, got 'mps'"),
        (["generate", "x", "--device", "gpu"], "device must be"),
        (["generate", "x", "--device", ""], "device must be"),
        (["generate", "x", "--device", "cpu:7"], "device must be"),
        (["generate", "x", "--device", "cuda:99"], "cuda:99"),
        (["generate", "x", "--decode-device", "meta"], "device must be"),
        (["eval", "--device", "tpu"], "device must be"),
        (["encode", "--codec", "x", "--out", "y", "--device", "xpu"], "device must be"),
        (["serve", "--port", "99999"], "--port must be at most 65,535, got 99999"),
        (
            ["serve", "--host", "nowhere.invalid"],
            "cannot listen on nowhere.invalid port 8000: no address has that name",
        ),
        (["serve", "--host", "203.0.113.7"], "203.0.113.7 port 8000: that is no address of this machine; name one"),
        (["serve", "--host", ""], "host must be an address or a name, got ''; 0.0.0.0 is every address"),
        (["serve", "--host", "a\0b"], "host must be an address or a name"),
        (["serve", "--host", "x" * 300], "cannot listen on xxx"),
        (["stream", "--seconds", "inf", "-o", "x.mp4"], "--seconds must be"),
        (["estimate", "--dtype", "float32", "--precision", "bf16"], "dtype float32 is for --precision eager"),
        (["generate", "a cat"], "unknown word 'cat'; the words are size"),
        (["generate", "a rde circle"], "did you mean 'red'?"),
    ],
)
def test_what_cannot_be_meant_is_one_line_and_status_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    assert message in one_line(capsys)


def test_help_is_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        with pytest.raises(SystemExit) as end:
            cli.main([name, "--help"])
        shown = capsys.readouterr()
        assert end.value.code == 0 and name in shown.out and shown.err == ""


def test_a_fault_is_one_line_and_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(error: BaseException) -> int:
        def command(args: object) -> int:
            raise error

        monkeypatch.setattr("causalreel.cli.files.models", command)
        return cli.main(["models"])

    monkeypatch.delenv("CAUSALREEL_TRACEBACK", raising=False)
    assert fails(RecursionError("too deep")) == 1 and "a fault of causalreel" in one_line(capsys)
    assert fails(OSError(28, "No space left on device", "x\x1b.mp4")) == 1 and r"x\x1b.mp4: No space" in one_line(
        capsys
    )
    assert fails(ValueError("x" * 10**6)) == 2 and len(capsys.readouterr().err) < 2200
    assert fails(FileNotFoundError(2, "No such file", "x")) == 2
    assert fails(KeyboardInterrupt()) == 130
    monkeypatch.setenv("CAUSALREEL_TRACEBACK", "1")
    with pytest.raises(RecursionError):
        fails(RecursionError("too deep"))


def test_a_stopped_command_leaves_nothing_and_says_143(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "causalreel", "generate", "a red circle", "--frames", "400001", "--device", "cpu"]
    made = subprocess.Popen([*words, "-o", str(tmp_path / "a.mp4")], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        while made.poll() is None and not list(tmp_path.iterdir()):  # until it has begun to write
            time.sleep(0.01)
        made.send_signal(signal.SIGTERM)
        _, said = made.communicate(timeout=PATIENCE_S)
    finally:
        made.kill()
    assert made.returncode == 143 and b"Traceback" not in said and list(tmp_path.iterdir()) == []


def test_without_a_home_there_is_no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("prompts") == tmp_path / ".cache/causalreel/prompts"
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 3_999_999_999)  # nobody that the system knows
    assert cache_folder("prompts") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cache_folder("prompts") == tmp_path / "c/causalreel/prompts"


def test_words_are_near_by_their_letters() -> None:
    assert [distance(a, b) for a, b in (("", "ab"), ("ab", "ba"), ("cat", "cut"), ("sqare", "square"))] == [2, 1, 1, 1]
    assert nearest("bleu", ["blue", "red"]) == "blue" and nearest("cat", ["quickly", "red", "fast"]) is None
    assert nearest("x" * 10**6, ["x"]) is None
    with pytest.raises(ValueError, match=r"unknown word 'x+\.\.\.x+'; the words are"):
        tokenize("x" * 100_000)
