"""Prompt files, folders of pictures with prompts, and pictures brought to the video's shape."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image, features

from causalreel import cli
from causalreel.data.video import write_video
from causalreel.infer.clips import ClipRequest
from causalreel.infer.inputs import fit, read_picture
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.requests import Wanted, numbered, read_pairs, read_prompts
from causalreel.weights import export as exports
from test_weights import small_family

RED, BLUE = "a large red circle moves right", "a small blue square moves up"


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_family(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def place(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "ASSETS", assets)
    monkeypatch.chdir(tmp_path)


def picture(path: str, color: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (40, 20)) -> Path:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return Path(path)


def test_prompts_are_lines() -> None:
    Path("p.txt").write_text("  one, two \n\n三\n", encoding="utf-8")
    assert read_prompts("p.txt") == [Wanted("one, two"), Wanted("三")]


def test_json_lines_carry_pictures_and_seeds() -> None:
    Path("sub").mkdir()
    rows = [{"prompt": " one "}, {"prompt": "two", "image": "a.png", "seed": 7}]
    Path("sub/p.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert read_prompts("sub/p.jsonl") == [Wanted("one"), Wanted("two", Path("sub/a.png"), 7)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", " \n", "holds no prompt"),
        ("p.jsonl", "one", "line 1: no JSON"),
        ("p.jsonl", '{"prompt": "one"}\n["two"]', "line 2: expected"),
        ("p.jsonl", '{"prompt": ""}', "line 1: expected"),
        ("p.jsonl", '{"prompt": "one", "seed": "7"}', "line 1: 'seed' must be one of"),
        ("p.jsonl", '{"prompt": "one", "seed": true}', "line 1: 'seed' must be one of"),
        ("p.jsonl", '{"prompt": "one", "sead": 7}', "line 1: 'sead' must be one of"),
    ],
)
def test_bad_prompt_files(name: str, text: str, message: str) -> None:
    Path(name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(name)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_alone(mark: str, end: str) -> None:
    """Byte-order marks are no text; separators that JSON may hold inside a string end no line."""
    Path("p.txt").write_bytes((mark + end.join(["one\u2028half", "", "  ", "two"])).encode())
    assert read_prompts("p.txt") == [Wanted("one\u2028half"), Wanted("two")]
    rows = [{"prompt": "one\u2028\u0085half"}, {"prompt": "two", "seed": 7}]
    Path("p.JSONL").write_bytes((mark + end.join(json.dumps(row, ensure_ascii=False) for row in rows)).encode())
    assert read_prompts("p.JSONL") == [Wanted("one\u2028\u0085half"), Wanted("two", seed=7)]
    picture("pairs/a.png")
    Path("pairs/a.txt").write_bytes((mark + end.join(["", "a red", "circle", ""])).encode())
    assert read_pairs("pairs")[0].prompt == "a red circle"


@pytest.mark.parametrize(
    ("data", "looks"),
    [
        ("a red circle\nü".encode("utf-16"), "UTF-16"),
        ("a red circle".encode("utf-16-le"), "UTF-16"),
        ("a red circle".encode("utf-16-be"), "UTF-16"),
        ("a red circle".encode("utf-32"), "UTF-32"),
        ("ein großer Kreis".encode("cp1252"), r"an older encoding, such as Windows-1252 or GBK \(byte 7 is 0xdf\)"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\1", "a binary file"),
        (b"\xff\xfe\x00", "UTF-16"),
    ],
)
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "pairs/a.txt"])
def test_other_files_are_named_for_what_they_look_like(name: str, data: bytes, looks: str) -> None:
    picture("pairs/a.png")
    Path(name).write_bytes(data)
    with pytest.raises(ValueError, match=f"^{name} is not UTF-8 text but looks like {looks}"):
        read_pairs("pairs") if "/" in name else read_prompts(name)


def test_pictures_go_with_their_prompts(caplog: pytest.LogCaptureFixture) -> None:
    for name, text in (("b.png", "two\n lines "), ("a.JPG", "one")):
        picture(f"pairs/{name}")
        Path(f"pairs/{name[0]}.txt").write_text(text)
    for name in ("notes.md", "c.heic", "c.txt", "._a.png", ".DS_Store"):
        Path(f"pairs/{name}").write_text("")
    pairs = read_pairs("pairs")
    assert "pairs: skipped c.heic, c.txt, notes.md" in caplog.text
    assert pairs == [
        Wanted("one", Path("pairs/a.JPG"), name="a"),
        Wanted("two lines", Path("pairs/b.png"), name="b"),
    ]
    assert numbered([*pairs, Wanted("x")]) == ["a", "b", "2"]


@pytest.mark.parametrize("name", ["a.tiff", "a.webp", "a.gif", "a.bmp", "a.avif", "a.PPM"])
def test_all_kinds_of_pictures_are_taken(name: str) -> None:
    if name == "a.avif" and not features.check("avif"):
        pytest.skip("Pillow without AVIF")
    picture(f"pairs/{name}")
    Path("pairs/a.txt").write_text("one")
    assert [str(one.image) for one in read_pairs("pairs")] == [f"pairs/{name}"]


def test_bad_folders() -> None:
    Path("pairs").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        read_pairs("pairs")
    picture("pairs/a.png")
    with pytest.raises(ValueError, match=r"no prompt for a\.png"):
        read_pairs("pairs")
    Path("pairs/a.txt").write_text(" ")
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        read_pairs("pairs")
    picture("pairs/a.jpg")
    picture("pairs/a.b.png")  # between them
    Path("pairs/a.b.txt").write_text("one")
    with pytest.raises(ValueError, match="two pictures are called a"):
        read_pairs("pairs")


@pytest.mark.parametrize(("height", "width"), [(20, 80), (80, 20), (33, 64), (16, 16)])
def test_fitting_keeps_the_aspect(height: int, width: int) -> None:
    """A white disc stays a disc; padding shows all of it between black bars, cropping fills the frame."""
    y, x = torch.meshgrid(torch.arange(height) - height / 2 + 0.5, torch.arange(width) - width / 2 + 0.5, indexing="ij")
    radius = min(height, width) / 2
    disc = torch.where(x**2 + y**2 < radius**2, 1.0, 0.0).expand(1, 3, -1, -1)
    padded, cropped = fit(disc, (32, 48), "pad"), fit(disc, (32, 48), "crop")
    assert padded.shape == cropped.shape == (1, 3, 32, 48)
    ratio = min(32 / height, 48 / width)
    shown = (padded[0, 0] > 0.5).nonzero()
    spans = shown.amax(0) - shown.amin(0) + 1
    assert (spans - 2 * radius * ratio).abs().max() <= 2
    inner = (round(height * ratio), round(width * ratio))
    bars = (padded == -1).all(1)[0]
    assert abs(int((~bars.all(1)).sum()) - inner[0]) <= 1 and abs(int((~bars.all(0)).sum()) - inner[1]) <= 1
    assert (cropped >= 0).all()
    with pytest.raises(ValueError, match="fit must be crop or pad, got 'stretch'"):
        fit(disc, (32, 48), "stretch")  # type: ignore[arg-type]


def test_padding_is_centred() -> None:
    padded = fit(torch.ones(1, 3, 10, 10), (10, 30), "pad")
    assert torch.equal(padded[0, 0, 0], torch.tensor([-1.0] * 10 + [1.0] * 10 + [-1.0] * 10))
    assert torch.equal(fit(padded, (10, 30), "pad"), padded)


def test_pictures_keep_their_size_unless_asked() -> None:
    path = picture("a.png", (255, 0, 127), size=(50, 30))
    assert read_picture(path).shape == (1, 3, 30, 50)
    assert read_picture(path)[0, :, 0, 0].tolist() == [1.0, -1.0, pytest.approx(127 / 127.5 - 1)]


def spy_on(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, torch.Tensor | None]]:
    seen = []

    def stream(self, request: ClipRequest):
        seen.append((request.prompts, request.seed, request.prefix))
        yield torch.zeros(1, 5, 3, 32, 32)

    monkeypatch.setattr(Pipeline, "stream", stream)
    return seen


def generate(*arguments: str) -> int:
    return cli.main(["generate", *arguments, "--device", "cpu"])


def test_a_folder_makes_a_video_of_each_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on(monkeypatch)
    for name, text, color in (("x", RED, (255, 255, 255)), ("y", BLUE, (0, 0, 0))):
        picture(f"pairs/{name}.png", color)
        Path(f"pairs/{name}.txt").write_text(text)
    assert generate("--image", "pairs", "-o", "out", "--fit", "pad", "--seed", "5") == 0
    assert sorted(os.listdir("out")) == ["x.mp4", "y.mp4"]
    assert [(prompt, seed) for prompt, seed, _ in seen] == [(RED, 5), (BLUE, 6)]
    (white, black) = (prefix for _, _, prefix in seen)
    assert white is not None and black is not None
    assert white[0, 0, 16, 16] > 0.999 and white[0, 0, 0, 16] == -1 and (black < -0.999).all()


def test_json_lines_reach_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = spy_on(monkeypatch)
    picture("a.png", (255, 255, 255), size=(32, 32))
    rows = [{"prompt": RED, "seed": 9, "image": "a.png"}, {"prompt": BLUE}]
    Path("p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert generate("--prompt-file", "p.jsonl", "-o", "a.mp4") == 0
    assert sorted(os.listdir()) == ["a-0.mp4", "a-1.mp4", "a.png", "p.jsonl"]
    assert [(prompt, seed, prefix is None) for prompt, seed, prefix in seen] == [(RED, 9, False), (BLUE, 1, True)]


def test_sigterm_leaves_nothing_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def stream(self, prompt, **request):
        for _ in range(9):
            yield torch.zeros(1, 5, 3, 32, 32)
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Pipeline, "stream", stream)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        generate(RED, "-o", "a.mp4")
    assert os.listdir() == [] and signal.getsignal(signal.SIGTERM) == before


def unwanted(*args: object, **how: object) -> None:
    raise AssertionError("the model was read")


def test_lengths_are_positive(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(RED, "--latent-frames", "0") == 2
    assert "--latent-frames must be at least 1" in capsys.readouterr().err and os.listdir() == []


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([RED, "--image", "text.png"], ["text.png cannot be read as a picture"]),
        (["--image", "pairs"], ["no prompt for a.png"]),
        ([RED, "--image", "pairs"], ["prompts of its own"]),
        (["--prompt-file", "p.jsonl"], ["no picture at none.png"]),
        (["--prompt-file", "p.jsonl", "--image", "pairs/a.png"], ["names pictures of its own"]),
        ([RED, "--frames", "5", "--blocks", "2"], ["exclude each other"]),
        ([f"{RED} on a dark background", "--image", "pairs/light.png"], ["asks for a dark background", "a light one"]),
        (["a red circle and a red square"], ["two things the colour red"]),
        ([RED, "--image", "pairs/a.png", "--chunk", "2"], ["the prefix must have a multiple of the chunk's 2"]),
        ([RED, "--video", "none.mp4"], ["no video file at none.mp4"]),
        ([RED, "--video", "text.png"], ["text.png cannot be read as a video"]),
        ([RED, "--video", "long.mp4", "--frames", "9"], ["long.mp4 has more than 5 frames at 16 a second", "--frames"]),
        ([RED, "--video", "long.mp4", "--frames", "1"], ["a video of 1 frames leaves no room behind long.mp4"]),
        ([RED, "--video", "long.mp4"], ["long.mp4 has more than 45 frames at 16 a second, which leaves no room"]),
        ([RED, "-o", "x" * 252 + ".mp4"], ["File name too long"]),
        ([RED, BLUE, "-o", "x" * 250 + ".mp4"], ["names have at most 255 bytes here, got 256"]),
        ([RED, "--sheet", "x" * 252 + ".png"], ["names have at most 255 bytes here, got 256"]),
        ([RED, "--height", "480"], ["height: only for released models such as causal-forcing/chunkwise, not 'tiny'"]),
        ([RED, "--decoder", "taehv"], ["decoder: only for released models"]),
    ],
)
def test_errors_are_one_line_leave_nothing_and_come_before_the_model_is_read(
    arguments: list[str], parts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("causalreel.infer.models.load_export", unwanted)
    picture("pairs/a.png")
    picture("pairs/light.png", (240, 240, 240))
    Path("pairs/light.txt").write_text(RED)
    Path("text.png").write_text("no picture")
    write_video("long.mp4", torch.zeros(100, 3, 16, 16), 30)
    Path("p.jsonl").write_text('{"prompt": "a red circle", "image": "none.png"}')
    before = sorted(map(str, Path().rglob("*")))
    assert generate(*arguments) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"causalreel: error: [^\n]+\n", captured.err) and captured.out == "", captured
    for part in parts:
        assert part in captured.err
    assert sorted(map(str, Path().rglob("*"))) == before
