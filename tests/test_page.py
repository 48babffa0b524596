"""The live page in a real browser, against `causalreel serve`: what a person sees, does and hears read out.

Needs Playwright's Python package and a Chromium (Debian's, or the one that CHROMIUM names). With PICTURES=docs/pictures
the tests also take the screenshots that the documentation shows.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import causalreel
from causalreel.data.video import to_bytes
from causalreel.data.world import render, simulate
from causalreel.eval.metrics import measure
from causalreel.families import FAMILIES
from patience import PATIENCE_S, wait_until

PACKAGE = Path(causalreel.__file__).resolve().parent
STATIC = PACKAGE / "serve" / "static"
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
MODEL = "tiny/frame-1step"
FIRST = "a large red circle moves right slowly on a dark background"
SECOND = "a blue square moves left"
CHUNKS = 5
"""After so many chunks of the new prompt it shows (docs/page.md)."""

pytest.importorskip("fastapi", reason="needs the extra serve")
api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
if CHROMIUM is None:
    pytest.skip("needs chromium", allow_module_level=True)

COLLECT = """
window.seen = [];
document.addEventListener("frame", ({target, detail}) => {
  const {data} = target.getContext("2d").getImageData(0, 0, target.width, target.height);
  window.seen.push({...detail, width: target.width, height: target.height, at: performance.now(), data});
}, true);
"""
TAKE = """(from) => window.seen.slice(from).map(({data, ...rest}) => {
  let text = "";
  for (const byte of data) text += String.fromCharCode(byte);
  return {...rest, data: btoa(text)};
})"""


_held = io.BytesIO()
Image.new("RGB", (80, 40), (255, 0, 0)).save(_held, "PNG")
PIXEL = _held.getvalue()


@dataclass(frozen=True)
class Frame:
    """A frame read back from the canvas."""

    sequence: int
    number: int
    prompt: str
    at_ms: float
    pixels: Tensor
    """(3,H,W) in [-1,1]"""


# ------------------------------------------------------------------------------------------------- server and browser


def serve(folder: Path, *arguments: str) -> Iterator[str]:
    """Run `causalreel serve` on a free port while in use -> its address. Data and log go to the folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [sys.executable, "-m", "causalreel", "serve", "--model", MODEL, "--port", str(port)]
    line += ["--data", str(folder / "data"), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(line, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_until(lambda: process.poll() is not None or is_ready(port), "the server to be ready")
        if process.poll() is not None:
            pytest.fail(f"the server ended: {(folder / 'log').read_text()}")
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.terminate()
        process.wait(PATIENCE_S)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serve(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A tab that collects what its canvas shows; fails on script errors and refused content."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    tab = context.new_page()
    tab.add_init_script(COLLECT)
    wrongs: list[str] = []
    tab.on("pageerror", lambda error: wrongs.append(str(error)))
    tab.on("console", lambda line: wrongs.append(line.text) if "Content Security Policy" in line.text else None)
    yield tab
    if tab.locator("#end").is_enabled():
        tab.click("#end")  # makes room for the next test
    context.close()
    assert not wrongs


def count(page: Any) -> int:
    return page.evaluate("() => window.seen.length")


def frames(page: Any, start: int = 0) -> list[Frame]:
    """What the canvas showed, from the start-th frame on."""
    found = []
    for one in page.evaluate(TAKE, start):
        raw = np.frombuffer(base64.b64decode(one["data"]), dtype=np.uint8).reshape(one["height"], one["width"], 4)
        pixels = torch.from_numpy(raw[..., :3].copy()).permute(2, 0, 1).float() / 127.5 - 1
        found.append(Frame(one["sequence"], one["frame"], one["prompt"], one["at"], pixels))
    return found


def video(shown: list[Frame]) -> Tensor:
    return torch.stack([frame.pixels for frame in shown])[None]


def play(page: Any, address: str, number: int = 8) -> None:
    """Open the page and wait for so many frames."""
    page.goto(address)
    wait_until(lambda: count(page) >= number, f"{number} frames")


def stands_still(page: Any) -> bool:
    before = count(page)
    time.sleep(1.0)
    return count(page) == before


def attribute(page: Any, where: str, name: str) -> str | None:
    return page.locator(where).get_attribute(name)


def screenshot(page: Any, name: str, after_ms: int = 4000, **how: Any) -> None:
    """A picture for the documentation, if asked for; so late that the graphs have something to show."""
    if "PICTURES" in os.environ:
        page.wait_for_timeout(after_ms)
        page.screenshot(path=Path(os.environ["PICTURES"]) / f"live-{name}.png", **how)


def numbers(shown: list[Frame]) -> list[int]:
    return [frame.number for frame in shown]


# -------------------------------------------------------------------------------------------------------- watch, steer


def test_moves(page: Any, server: str) -> None:
    play(page, server, 6)
    shown = frames(page)
    changes = [b.at_ms for a, b in pairwise(shown) if (a.pixels - b.pixels).abs().max() > 0.2]
    assert changes, "the frames do not differ"
    assert page.locator("#steer").is_hidden()  # this model has no keys
    print(f"moving {changes[0] / 1000:.2f} s after the navigation began")


def test_a_new_prompt_shows(page: Any, server: str) -> None:
    play(page, server, 24)
    page.fill("#prompt", SECOND)
    page.press("#prompt", "Enter")
    wait_until(lambda: page.locator("#playing").inner_text() == SECOND, "the new prompt")
    border = count(page)
    wait_until(lambda: count(page) >= border + 4 * CHUNKS + 24, "frames of the new prompt")
    shown = frames(page)
    before = [frame for frame in shown if frame.prompt == FIRST]
    new = [frame for frame in shown if frame.prompt == SECOND]
    assert numbers(shown) == list(range(shown[0].number, shown[0].number + len(shown)))
    settled = [frame for frame in new if frame.sequence >= new[0].sequence + CHUNKS][:20]
    follow = {
        name: measure(video(part), [prompt]).follow.item()
        for name, part, prompt in (
            ("first", before, FIRST),
            ("second", settled, SECOND),
            ("first in the second's frames", settled, FIRST),
            ("second in the first's frames", before, SECOND),
        )
    }
    print(follow)
    assert follow["first"] >= 0.6
    assert follow["second"] >= 0.8
    assert follow["first in the second's frames"] == 0
    assert follow["second in the first's frames"] == 0
    changes = page.locator("#timeline li.change")
    assert [changes.nth(i).locator("button").inner_text() for i in range(changes.count())] == [FIRST, SECOND]
    assert "s to its first picture on the server" in page.locator("#reaction").inner_text()
    screenshot(page, "page", full_page=True)


def test_a_prompt_that_cannot_be_is_explained(page: Any, server: str) -> None:
    play(page, server)
    page.fill("#prompt", "a purple hexagon")
    page.click("#send")
    wait_until(lambda: page.locator("#prompt-error").is_visible(), "the reason")
    assert "purple" in page.locator("#prompt-error").inner_text()
    assert attribute(page, "#prompt", "aria-invalid") == "true"
    assert "purple" in page.locator("#say").inner_text()
    start = count(page)
    wait_until(lambda: count(page) > start + 8, "the video to go on")
    assert page.locator("#playing").inner_text() == FIRST
    page.click("#timeline li.change button")
    assert page.locator("#prompt").input_value() == FIRST
    assert attribute(page, "#prompt", "aria-invalid") == "false"


def test_keys(page: Any, server: str) -> None:
    """Pause, one chunk, resume, restart and earlier prompts without a pointer."""
    play(page, server)
    page.keyboard.press("k")
    wait_until(lambda: attribute(page, "#pause", "aria-pressed") == "true", "the pause")
    wait_until(lambda: stands_still(page), "the video to stand still")
    last = frames(page)[-1]
    for _ in range(4):  # more than the server makes ahead, so that it has to make some for the steps
        at = count(page)
        page.keyboard.press("s")
        wait_until(lambda at=at: count(page) > at, "a chunk")
        wait_until(lambda: page.locator("#overlay").inner_text() == "Paused", "the end of the step")
    shown = frames(page)
    assert numbers(shown) == list(range(len(shown)))
    assert shown[-1].sequence <= last.sequence + 4
    assert shown[-1].sequence >= last.sequence + 3  # the pause may have come in the middle of a chunk
    page.keyboard.press("k")
    wait_until(lambda: count(page) > len(shown) + 8, "the video to go on")
    assert attribute(page, "#pause", "aria-pressed") == "false"
    page.keyboard.press("/")
    page.keyboard.press("Control+a")
    page.keyboard.type("a green triangle")
    page.keyboard.press("Enter")
    wait_until(lambda: page.locator("#playing").inner_text() == "a green triangle", "the typed prompt")
    page.keyboard.type(" k")
    assert attribute(page, "#pause", "aria-pressed") == "false"  # letters in the box are letters
    page.keyboard.press("ArrowUp")
    assert page.locator("#prompt").input_value() == "a green triangle"
    page.keyboard.press("ArrowDown")
    assert page.locator("#prompt").input_value() == "a green triangle k"


def test_says_when_it_is_too_slow(page: Any, server: str) -> None:
    play(page, server)
    wait_until(lambda: "times real time" in page.locator("#speed").inner_text(), "the speed")
    wait_until(lambda: not page.locator("#slow").is_visible(), "the machine to have time")
    page.fill("#fps", "240")
    page.press("#fps", "Enter")
    wait_until(lambda: page.locator("#slow").is_visible(), "the warning")
    words = page.locator("#slow").inner_text()
    assert re.match(r"Slower than real time: [\d.]+ of 240 frames per second arrive", words)
    said = page.locator("#say")  # on a busy machine a dropped connection may be announced in between
    wait_until(lambda: said.inner_text().startswith("Slower than real time"), "the warning to be announced")
    screenshot(page, "slow")
    page.fill("#fps", "4")
    page.press("#fps", "Enter")
    wait_until(lambda: not page.locator("#slow").is_visible(), "the warning to go")


# ------------------------------------------------------------------------------------------------- connections, access


def test_a_dropped_connection_loses_nothing(page: Any, server: str) -> None:
    sockets: list[Any] = []

    def through(socket: Any) -> None:
        sockets.append((socket, socket.connect_to_server()))

    page.route_web_socket(re.compile("/stream"), through)
    play(page, server)
    for _ in range(2):
        before, start = len(sockets), count(page)
        mine, theirs = sockets[-1]
        theirs.close()
        mine.close(code=1011)
        wait_until(lambda before=before: count(page) and len(sockets) > before, "a new connection")
        wait_until(lambda start=start: count(page) > start + 24, "the video to go on")
    shown = frames(page)
    assert numbers(shown) == list(range(len(shown)))
    assert attribute(page, "#connection", "data-kind") == "live"


def test_a_reload_comes_back_to_its_session(page: Any, server: str) -> None:
    play(page, server)
    session = page.locator("#session").inner_text()
    last = frames(page)[-1]
    play(page, server)
    assert page.locator("#session").inner_text() == session
    assert frames(page)[0].number > last.number


def test_one_window_at_a_time(page: Any, server: str) -> None:
    """A second window of the same session takes over, and the first one says so instead of fighting back."""
    play(page, server)
    session = page.locator("#session").inner_text()
    other = page.context.new_page()
    other.add_init_script(COLLECT)
    other.add_init_script(f"sessionStorage.setItem('causalreel.session', {json.dumps(session)})")
    play(other, server)
    assert other.locator("#session").inner_text() == session
    wait_until(lambda: "Another window" in page.locator("#problem").inner_text(), "the word of it")
    start = count(other)
    wait_until(lambda: count(other) > start + 16, "the video to go on")
    other.click("#end")
    wait_until(lambda: attribute(other, "#connection", "data-kind") == "down", "the end")


def test_token(browser: Any, page: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("correct horse/+=\n", encoding="utf-8")
    for address in serve(tmp_path, "--token-file", str(tmp_path / "token")):
        page.goto(address)
        wait_until(lambda: page.locator("#access").is_visible(), "the question")
        page.fill("#token", "wrong")
        page.press("#token", "Enter")
        wait_until(lambda: "did not take" in page.locator("#problem").inner_text(), "the refusal")
        assert count(page) == 0
        page.fill("#token", "correct horse/+=")
        page.press("#token", "Enter")
        wait_until(lambda: count(page) > 8, "frames")
        assert not page.locator("#access").is_visible()
        assert "token" not in page.url
    wait_until(lambda: attribute(page, "#connection", "data-kind") == "down", "the word that the server is gone")
    assert "the server is shutting down" in page.locator("#overlay").inner_text()
    assert page.locator("#start").is_visible()


# --------------------------------------------------------------------------------------------------------------- files


def test_recording(page: Any, server: str, tmp_path: Path) -> None:
    """A video of the canvas, in a container that others read."""
    play(page, server)
    page.click("#record")
    start = count(page)
    wait_until(lambda: count(page) >= start + 24, "more frames")
    with page.expect_download() as saved:
        page.click("#record")
    path = tmp_path / saved.value.suggested_filename
    saved.value.save_as(path)
    with av.open(str(path)) as container:
        recorded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(recorded) >= 16
    clip = torch.from_numpy(np.stack(recorded)).permute(0, 3, 1, 2)[None].float() / 127.5 - 1
    shown = page.locator("#video").evaluate("(one) => one.clientWidth")
    assert clip.shape[-1] == clip.shape[-2] == 64 * round(shown / 64) > 256  # as it is seen, and crisp
    clip = clip[..., 4 :: clip.shape[-1] // 64, 4 :: clip.shape[-1] // 64]
    assert measure(clip, [FIRST]).present.item() >= 0.9


def test_settings_and_replay(page: Any, server: str, tmp_path: Path) -> None:
    """Every setting reaches the model, and the replay file makes the very frames that were shown."""
    from causalreel.serve.session import Session

    page.goto(f"{server}?prompt=a+large+green+square&seed=3")
    picture = render(simulate(1, seed=11))[0, 0]  # (3,H,W)
    png = io.BytesIO()
    Image.fromarray(to_bytes(picture)[0].numpy()).save(png, "PNG")
    wait_until(lambda: count(page) >= 8, "frames")
    limits = {
        name: (page.get_attribute(f"#{name}", "min"), page.get_attribute(f"#{name}", "max"))
        for name in ("steps", "fps")
    }
    assert limits == {"steps": ("1", "100"), "fps": ("0.1", "240")}  # what the server says of its commands
    steps: list[Callable[[], None]] = [
        lambda: (page.fill("#prompt", SECOND), page.select_option("#mode", "fade"), page.click("#send")),
        lambda: (page.fill("#steps", "2"), page.press("#steps", "Enter")),
        lambda: (page.fill("#seed", "7"), page.press("#seed", "Enter")),
        lambda: page.set_input_files("#image", {"name": "a.png", "mimeType": "image/png", "buffer": png.getvalue()}),
    ]
    for act in steps:
        act()
        start = count(page)
        wait_until(lambda start=start: count(page) >= start + 20, "more frames")
    assert page.locator("#problem").is_hidden()
    before = count(page)
    with page.expect_download() as saved:
        page.click("#replay")
    saved.value.save_as(tmp_path / "replay.json")
    record = json.loads((tmp_path / "replay.json").read_text(encoding="utf-8"))
    assert (record["options"]["prompt"], record["options"]["seed"]) == ("a large green square", 3)
    done = [(one["name"], one["arguments"]) for one in record["commands"]]
    assert [name for name, _ in done] == ["prompt", "steps", "restart", "image"]
    assert done[0][1] == {"text": SECOND, "mode": "fade", "chunks": 4}
    assert (done[1][1]["steps"], done[2][1]["seed"]) == (2, 7)
    made = torch.cat([one.frames for one in Session.replay(causalreel.load(MODEL), record)])  # (t,H,W,3)
    assert before <= len(made)
    shown = frames(page)[: len(made)]  # the video went on after the file was saved
    assert numbers(shown) == list(range(len(shown)))
    assert len(shown) >= before
    expected = made[: len(shown)].permute(0, 3, 1, 2).float() / 127.5 - 1
    error = (video(shown)[0] - expected).square().mean((1, 2, 3))
    assert -10 * torch.log10(error.max() / 4) > 25  # pictures were compressed on their way
    errors = (video(shown)[0] - picture).square().mean((1, 2, 3))
    assert -10 * torch.log10(errors.min() / 4) > 20  # the picture was there


def test_a_replay_file_plays_again(page: Any, server: str, tmp_path: Path) -> None:
    """What was saved shows the same frames, pauses at its end and goes on; other files are refused by name."""
    play(page, server, 16)
    page.fill("#prompt", SECOND)
    page.click("#send")
    wait_until(lambda: page.locator("#playing").inner_text() == SECOND, "the new prompt")
    wait_until(lambda start=count(page): count(page) > start + 8, "more frames")
    page.click("#pause")
    with page.expect_download() as saved:
        page.click("#replay")
    path = tmp_path / "a.replay.json"
    saved.value.save_as(path)
    first, start = frames(page), count(page)
    page.set_input_files("#open", path)
    wait_until(lambda: count(page) > start and page.locator("#showing").inner_text() == "Replay of", "the replay")
    wait_until(lambda: "The replay is over" in page.locator("#overlay").inner_text(), "its end")
    again = frames(page, start)
    chunks = json.loads(path.read_text(encoding="utf-8"))["chunks"]
    assert again[-1].sequence == chunks - 1 and numbers(again) == list(range(len(again)))
    assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(first, again, strict=False))
    page.click("#pause")
    wait_until(lambda: count(page) > start + len(again) + 8, "the video to go on")
    assert page.locator("#showing").inner_text() == "Showing"
    page.set_input_files("#open", {"name": "b.json", "mimeType": "application/json", "buffer": b"{}"})
    wait_until(lambda: "b.json is not a replay file" in page.locator("#problem").inner_text(), "the reason")
    assert page.locator("#end").is_enabled()  # the video that played goes on


def test_words_are_there_to_be_pressed(page: Any, server: str) -> None:
    """Examples and words can be seen and used before anything went wrong; a picture that was given is shown."""
    play(page, server)
    assert page.locator("#words").is_visible() and page.locator("#prompt-error").is_hidden()
    pressed = page.locator("#words button[aria-pressed=true]")
    assert pressed.all_inner_texts() == ["large", "red", "circle", "right", "slowly", "dark"]
    page.click("#words button:text-is('cyan')")
    assert page.locator("#prompt").input_value() == FIRST.replace("red", "cyan")
    page.click("#words button:text-is('slowly')")
    page.click("#another")
    page.click("#words button:text-is('triangle')")
    two = "a large cyan circle moves right and a red on a dark background"
    assert page.locator("#prompt").input_value() == two  # a triangle was there, and a second press takes it out
    page.click("#examples button:text-is('a blue square moves left')")
    wait_until(lambda: page.locator("#playing").inner_text() == SECOND, "the example")
    assert page.locator("#thumbnail").is_hidden()
    page.set_input_files("#image", {"name": "a.png", "mimeType": "image/png", "buffer": PIXEL})
    wait_until(lambda: page.locator("#thumbnail").is_visible(), "the picture beside its button")
    page.click("#without")
    wait_until(lambda: page.locator("#thumbnail").is_hidden(), "the picture to go")
    bottom = "() => document.getElementById('timeline').getBoundingClientRect().bottom <= innerHeight"
    assert page.locator("#timeline").evaluate(bottom)


def test_formats(page: Any, server: str) -> None:
    """Changing how the stream is sent loses no frame; H.264 where the browser decodes it."""
    play(page, server)
    values = page.locator("#format option").evaluate_all("(all) => all.map((one) => one.value)")
    assert values[:2] == ["webp", "jpeg"]
    for value in [*values[1:], *values[-2::-1]]:
        start = count(page)
        page.select_option("#format", value)
        wait_until(lambda start=start: count(page) > start + 24, f"frames as {value}")
    shown = frames(page)
    assert numbers(shown) == list(range(len(shown)))
    assert measure(video(shown[-24:]), [FIRST]).present.item() >= 0.6
    assert not page.locator("#problem").is_visible()


# -------------------------------------------------------------------------------------------------------- for everybody


PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}


def fits(page: Any) -> bool:
    """Compared with what a phone has: its innerWidth grows with what does not fit."""
    return page.evaluate("() => document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_phone_and_names(browser: Any, server: str) -> None:
    """Fits a small screen, is large enough to touch, and everything that can be used has a name."""
    context = browser.new_context(**PHONE, color_scheme="dark")
    page = context.new_page()
    page.add_init_script(COLLECT)
    play(page, server, 24)
    assert fits(page)
    small = """(all) => all.filter((one) => one.offsetParent && one.getBoundingClientRect().height < 40)
        .map((one) => one.id)"""
    assert (
        page.locator("button, .button, select, input:not([type=checkbox], .unseen), textarea").evaluate_all(small) == []
    )
    names = """(all) => all.filter((one) => !(one.labels?.length || one.textContent.trim()
        || one.getAttribute("aria-label") || one.getAttribute("aria-labelledby"))).map((one) => one.outerHTML)"""
    assert page.locator("button, select, input, textarea, canvas, ol, section").evaluate_all(names) == []
    page.fill("#prompt", SECOND)
    page.tap("#send")
    page.evaluate("() => { document.activeElement.blur(); window.scrollTo(0, 0); }")
    wait_until(lambda: page.locator("#playing").inner_text() == SECOND, "the new prompt")
    assert fits(page)
    screenshot(page, "phone", after_ms=2500)  # the change is still in sight
    order = page.evaluate("() => ['stage', 'prompt-form', 'pace'].map((id) => document.getElementById(id).offsetTop)")
    assert order == sorted(order)
    page.click("#end")
    context.close()


def test_why_a_replay_differs_fits_a_phone(browser: Any, server: str, tmp_path: Path) -> None:
    """A context policy is a long word without a space."""
    context = browser.new_context(**PHONE, accept_downloads=True)
    page = context.new_page()
    page.add_init_script(COLLECT)
    play(page, server)
    with page.expect_download() as saved:
        page.click("#replay")
    record = json.loads(Path(saved.value.path()).read_text(encoding="utf-8"))
    was = record["context"].replace("cache_chunks=11", "cache_chunks=9")
    path = tmp_path / "a.replay.json"
    path.write_text(json.dumps({**record, "context": was}))
    page.set_input_files("#open", path)
    wait_until(lambda: f"context was {was}, is {record['context']}." in page.locator("#problem").inner_text(), "why")
    assert was != record["context"] and fits(page)
    page.click("#end")
    context.close()


def test_less_motion(browser: Any, server: str) -> None:
    """Who asks for less motion starts the video himself."""
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    page.add_init_script(COLLECT)
    page.goto(server)
    page.wait_for_timeout(1000)
    assert count(page) == 0
    assert page.input_value("#prompt") == FAMILIES["tiny"].text.examples[0]  # the model's, not the page's own
    assert page.input_value("#mode") == FAMILIES["tiny"].text.mode == "forget"
    assert "less motion" in page.locator("#overlay").inner_text()
    page.click("#again")
    wait_until(lambda: count(page) > 4, "frames")
    page.click("#end")
    wait_until(lambda: attribute(page, "#connection", "data-kind") == "down", "the end")
    context.close()


def test_the_api_is_shown_and_can_be_tried(browser: Any, server: str) -> None:
    context = browser.new_context(viewport={"width": 390, "height": 844})
    tab, wrongs = context.new_page(), []
    tab.on("pageerror", lambda error: wrongs.append(str(error)))
    tab.on("console", lambda line: wrongs.append(line.text) if "Content Security Policy" in line.text else None)
    tab.on(
        "request", lambda request: wrongs.append(request.url) if not request.url.startswith((server, "data:")) else None
    )
    tab.goto(f"{server}docs")
    room = tab.locator("details", has_text="Open Session")
    room.locator("summary").click()
    room.locator("button").click()
    room.locator("pre", has_text="201").wait_for()
    session = re.search('"id": "([0-9a-f]{32})"', room.locator("pre").inner_text())
    assert session is not None
    room = tab.locator("details", has_text="Close Session")
    room.locator("summary").click()
    room.locator("input").fill(session[1])
    room.locator("button").click()
    room.locator("pre", has_text='"deleted": true').wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not wrongs
    context.close()


def test_nothing_from_elsewhere(page: Any, server: str) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    play(page, server)
    assert asked
    assert all(url.startswith((server, "blob:", "data:")) for url in asked)
    for file in STATIC.iterdir():
        assert not re.search(r"(https?:)?//[a-z0-9-]+\.[a-z]", file.read_text(encoding="utf-8")), file.name
    markup = (STATIC / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son[a-z]+=", markup)
