"""The command line: what it writes, and one line on standard error with status 2 for everything that can go wrong."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from causalreel import cli
from causalreel.cli import videos
from causalreel.cli.flags import ModelFlags, ThreadFlag
from causalreel.data import prepare as preparing
from causalreel.data.video_in import read_video
from causalreel.infer import models
from causalreel.infer.clips import ClipRequest
from causalreel.infer.pipeline import Pipeline
from causalreel.nn.presets import PRESETS
from causalreel.weights import export as exports
from test_weights import small_family

RED, BLUE = "a large red circle moves right", "a small blue square moves up"


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_family(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def place(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The family of random models is the embedded one, and the working directory is empty."""
    monkeypatch.setattr(exports, "ASSETS", assets)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(*arguments: str) -> int:
    return cli.main(["generate", *arguments, "--device", "cpu"])


def fails(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    """One line on standard error, and no file (hidden ones included) beside those in the list."""
    captured = capsys.readouterr()
    assert re.fullmatch(r"causalreel: error: [^\n]+\n", captured.err), captured.err
    assert captured.out == ""
    for part in parts:
        assert part in captured.err


def test_a_prompt_becomes_a_video(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(RED, "-o", "red.mp4", "--scale", "1") == 0
    video, fps = read_video("red.mp4")
    assert video.shape == (45, 3, 32, 32) and fps == 16
    line = capsys.readouterr().out
    assert re.search(r"^red\.mp4: 45 frames in \d+\.\d\d s, first frame after \d+\.\d\d s, [\d.]+ frames/s$", line)
    assert os.listdir() == ["red.mp4"]


def test_options_reach_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    stream = Pipeline.stream

    def spy(self, request: ClipRequest):
        seen.append((self.export.name, request.prompts, request.frames, request.seed))
        return stream(self, request)

    monkeypatch.setattr(Pipeline, "stream", spy)
    assert generate(RED, BLUE, "-o", "a.gif", "--seed", "3", "--frames", "13", "--chunk", "4") == 0
    assert seen == [("tiny/chunk-4step", RED, 13, 3), ("tiny/chunk-4step", BLUE, 13, 4)]
    assert sorted(os.listdir()) == ["a-0.gif", "a-1.gif"]


def test_prompt_files_folders_and_sheets() -> None:
    Path("p.txt").write_text(f"{RED}\n\n  {BLUE}\n")
    assert generate("--prompt-file", "p.txt", "-o", "clips", "--frames", "5", "--sheet", "s.png") == 0
    assert sorted(os.listdir("clips")) == ["0.mp4", "1.mp4"]
    assert Path("s.png").stat().st_size > 0
    assert generate(RED, "-o", "clips", "--frames", "1", "--steps", "1", "--scale", "1") == 0
    assert read_video("clips/0.mp4")[0].shape == (1, 3, 32, 32)


def test_a_picture_and_a_video_start_a_clip() -> None:
    from PIL import Image

    Image.new("RGB", (50, 40), (0, 0, 255)).save("blue.png")
    assert generate(BLUE, "--image", "blue.png", "-o", "a.mp4", "--frames", "9") == 0
    assert generate(BLUE, "--video", "a.mp4", "-o", "b.mp4", "--frames", "17", "--scale", "1") == 0
    assert len(read_video("b.mp4")[0]) == 17


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no prompt"]),
        ([""], ["describes nothing"]),
        (["a red dog"], ["unknown word 'dog'", "the words are"]),
        ([RED, "a red dog"], ["unknown word 'dog'"]),
        ([RED, "--frames", "44"], ["got 44", "41 or 45"]),
        ([RED, "--frames", "49", "--chunk", "4"], ["45 or 61"]),
        ([RED, "--steps", "0"], ["steps must be at least 1"]),
        ([RED, "--chunk", "0"], ["chunk must be at least 1"]),
        ([RED, "--model", "tony"], ["unknown model 'tony'", "did you mean 'tiny'"]),
        ([RED, "--model", "."], ["is not an export"]),
        ([RED, "-o", "x.avi"], [".mp4", "'x.avi'"]),
        ([RED, "-o", "no/such/x.mp4"], ["no/such", "does not exist"]),
        ([RED, "--sheet", "x.pdf"], [".png", "'x.pdf'"]),
        ([RED, "--sheet", "no/such/x.png"], ["does not exist"]),
        ([RED, "--prompt-file", "none.txt"], ["none.txt"]),
        ([RED, "--image", "none.png"], ["no picture at none.png"]),
        ([RED, "--video", "none.mp4"], ["no video file at none.mp4"]),
        ([RED, "--image", "a.png", "--video", "b.mp4"], ["exclude each other"]),
        ([RED, "--scale", "0"], ["scale must be at least 1"]),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(*arguments) == 2
    fails(capsys, *parts)
    assert os.listdir() == []


def test_an_unwritable_directory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("locked").mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may write everywhere
    assert generate(RED, "-o", "locked/x.mp4") == 2
    fails(capsys, "not writable")


def test_an_unwritable_file(capsys: pytest.CaptureFixture[str]) -> None:
    """A directory stands where the video should go; a file stands where a directory is needed."""
    Path("x.mp4").mkdir()
    Path("y").write_text("")
    assert generate(RED, "-o", "y/x.mp4") == 2
    fails(capsys, "y")
    assert generate(RED, BLUE, "-o", "y") == 2
    fails(capsys, "y")


def test_unreadable_models(capsys: pytest.CaptureFixture[str], assets: Path, place: Path) -> None:
    import shutil

    shutil.copytree(assets / "tiny", "models")
    file = Path("models/frame-2step/model.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert generate(RED, "--model", "models/frame-2step") == 2
    fails(capsys, "model.safetensors", "cut off")
    file.write_bytes(Path("models/chunk-4step/model.safetensors").read_bytes())
    assert generate(RED, "--model", "models/frame-2step") == 2
    fails(capsys, "weights of 'tiny/chunk-4step'", "not of 'tiny/frame-2step'")
    assert os.listdir() == ["models"]


@pytest.mark.parametrize(
    "error", [ValueError("broken\nbadly"), OSError(28, "No space left on device"), KeyboardInterrupt()]
)
def test_a_failure_half_way_leaves_what_was_there(
    error: BaseException, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out.mp4").write_text("before")

    def stream(self, prompts, **request):
        yield torch.zeros(1, 1, 3, 32, 32)
        raise error

    monkeypatch.setattr(Pipeline, "stream", stream)
    assert generate(RED) == {KeyboardInterrupt: 130, OSError: 1, ValueError: 2}[type(error)]
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir() == ["out.mp4"] and Path("out.mp4").read_text() == "before"


def test_frames_are_written_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The file grows while later chunks are still being made (the encoder itself looks some 40 frames ahead)."""
    files = []

    def stream(self, prompts, **request):
        for _ in range(40):
            files.append(len(os.listdir()))
            yield torch.zeros(1, 4, 3, 32, 32)

    monkeypatch.setattr(Pipeline, "stream", stream)
    assert generate(RED) == 0
    assert files[0] == 0 and files[-1] == 1


FOLDERS = [
    (1, "new/", ["new/0.mp4"]),
    (1, "a/b/new/", ["a/b/new/0.mp4"]),
    (1, "there", ["there/0.mp4"]),
    (1, "there/", ["there/0.mp4"]),
    (1, "here.mp4", ["here.mp4"]),
    (2, "new", ["new/0.mp4", "new/1.mp4"]),
    (2, "a/new/", ["a/new/0.mp4", "a/new/1.mp4"]),
    (2, "v1.2/", ["v1.2/0.mp4", "v1.2/1.mp4"]),
    (2, "here.gif", ["here-0.gif", "here-1.gif"]),
    (2, "there/here.gif", ["there/here-0.gif", "there/here-1.gif"]),
]


@pytest.mark.parametrize(("prompts", "output", "files"), FOLDERS)
def test_a_folder_is_made_where_one_is_meant_and_said(
    prompts: int, output: str, files: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slash says a folder, several prompts and no suffix do; what was made is said, and every file."""
    monkeypatch.setattr(Pipeline, "stream", lambda self, prompts, **request: iter([torch.zeros(1, 4, 3, 32, 32)]))
    Path("there").mkdir()
    assert generate(*[RED, BLUE][:prompts], "-o", output) == 0
    shown, said = capsys.readouterr()
    assert [line.partition(":")[0] for line in shown.splitlines()] == files
    assert sorted(str(path) for path in Path().rglob("*.*") if path.is_file()) == files
    folder = Path(files[0]).parent
    is_made = folder not in (Path(), Path("there"))
    assert (f"causalreel: made the folder {folder}\n" in said) == is_made


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("there/no/x.mp4", "cannot write there/no/x.mp4: directory there/no does not exist"),
        ("file/", "cannot write file/0.mp4: file is a file"),
        ("file/new/", "cannot write file/new/0.mp4: file is a file"),
        ("n" * 300 + "/new/", "names have at most 255 bytes here, got 300"),
        ("no", "path must end in .mp4, .mkv, .mov, .webm, .gif, got 'no'"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_the_work(
    output: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("file").write_text("")
    Path("there").mkdir()
    monkeypatch.setattr(ModelFlags, "load", None)
    assert generate(RED, "-o", output) == 2
    fails(capsys, message)
    assert sorted(os.listdir()) == ["file", "there"]


def test_a_folder_that_was_made_in_vain_goes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(self: Pipeline, request: ClipRequest) -> Any:
        yield torch.zeros(1, 4, 3, 32, 32)
        if request.prompts == BLUE:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Pipeline, "stream", stream)
    assert generate(BLUE, RED, "-o", "a/new/") == 1
    assert os.listdir() == []
    assert generate(RED, BLUE, "-o", "a/new/") == 1  # what is finished stays
    assert [str(path) for path in Path().rglob("*.mp4")] == ["a/new/0.mp4"] and len(os.listdir("a/new")) == 1


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now

    def stream(self: Pipeline, prompts: str, **request: Any) -> Any:
        for _ in range(8):
            clock.now += 4
            yield torch.zeros(1, 4, 3, 32, 32)

    monkeypatch.setattr(Pipeline, "stream", stream)
    monkeypatch.setattr(videos, "time", clock)
    assert generate(RED, "-o", "red.mp4") == 0
    shown, said = capsys.readouterr()
    lines = [line for line in said.splitlines() if line.startswith("red.mp4")]
    assert lines == ["red.mp4: 12 frames after 12 s", "red.mp4: 24 frames after 24 s"]
    assert shown == "red.mp4: 32 frames in 32.00 s, first frame after 4.00 s, 1.0 frames/s\n" and "\r" not in said


@pytest.mark.parametrize(("device", "more", "batch"), [("cpu", [], 4), ("cpu", ["--batch", "9"], 9), ("cuda", [], 256)])
def test_encode_takes_few_clips_at_once_on_a_cpu(
    device: str, more: list[str], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 at once, as on a GPU, would need 22 GB."""
    taken: dict[str, Any] = {}

    class Codec:
        def to(self, device: torch.device) -> Codec:
            return self

    def prepare(out: Path, codec: Codec, **how: Any) -> Path:
        taken.update(how)
        return out

    monkeypatch.setattr(preparing, "prepare", prepare)
    monkeypatch.setattr(exports, "load_codec", lambda folder: Codec())
    monkeypatch.setattr(models, "choose_device", lambda *_, **__: torch.device(device))
    assert cli.main(["encode", "--codec", "tiny", "--out", "data", *more]) == 0
    assert (taken["batch"], taken["device"].type) == (batch, device)


def test_bench_prints_and_writes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "speed.json"
    how = ["bench", "--runs", "1", "--frames", "5", "--batch", "2", "--device", "cpu"]
    assert cli.main([*how, "-o", str(written)]) == 0
    assert "first pixels" in capsys.readouterr().out
    found = json.loads(written.read_text())
    assert found["batch"] == 2 and found["precision"] == "eager"  # bf16, the default, is for GPUs
    assert cli.main([*how, "--precision", "eager"]) == 0
    capsys.readouterr()
    assert cli.main(["bench", "--batch", "0"]) == 2
    fails(capsys, "batch must be at least 1")
    monkeypatch.setattr(ModelFlags, "load", None)  # said before anything is measured
    assert cli.main([*how, "-o", str(tmp_path / "no/speed.json")]) == 2
    fails(capsys, "no does not exist")


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in ("generate", "train", "verify"))])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(arguments)
    assert done.value.code == 0
    assert "causalreel" in capsys.readouterr().out


def test_version_and_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("causalreel 0.")
    for arguments in ([], ["fly"], ["generate", "--colour"], ["generate", RED, "--seed", "x"]):
        assert cli.main(arguments) == 2
        fails(capsys)


def test_train_resolves_recipes_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "tiny/causal_cd", "seed=3", "--dry-run"]) in (0, 2)  # the recipe's own keys decide
    assert cli.main(["train", "none.yaml"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("causalreel: error:")
    assert os.listdir() == []


def test_verify_refuses_a_missing_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "no-such-folder"]) == 2
    fails(capsys, "no-such-folder")


def test_small_networks_take_one_thread_unless_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """While the command works; a program that calls it computes with as many as before afterwards."""
    before, how = torch.get_num_threads(), (RED, "--frames", "5", "-o", str(tmp_path / "red.mp4"))
    real, during = Pipeline.stream, []

    def stream(*args: Any, **kwargs: Any) -> Any:
        during.append(torch.get_num_threads())
        return real(*args, **kwargs)

    def threads(*more: str) -> int:
        assert generate(*how, *more) == 0 and torch.get_num_threads() == 3
        return during.pop()

    monkeypatch.setattr(Pipeline, "stream", stream)
    try:
        torch.set_num_threads(3)
        assert threads("--threads", "2") == 2
        assert generate(*how, "--threads", "0") == 2 and not during
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        ThreadFlag().set_threads([PRESETS["tiny"], PRESETS["wan-1.3b"]], "cpu")
        assert torch.get_num_threads() == 3
        assert threads() == 1
    finally:
        torch.set_num_threads(before)
