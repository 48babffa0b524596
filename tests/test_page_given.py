"""A session that is made of a video file or of the camera, on the page, in a real browser with a camera of its own.

The model is embedded, at little strength, so that what is given shows. With STATES=folder the page is photographed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("playwright.sync_api", reason="needs playwright")

from causalreel.data.video import write_video
from causalreel.serve.handle import Limits
from causalreel.serve.records import FORMAT
from patience import wait_until
from served import listening, small_pipeline
from test_page import CHROMIUM, COLLECT, api, count, frames

CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(small_pipeline(), Limits(sessions=4, buffer_chunks=1)) as where:
        yield f"http://{where}/"


@pytest.fixture(scope="module")
def seeing() -> Iterator[Any]:
    """A browser with a camera, which shows a green picture with a moving disc."""
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", *CAMERA])
        yield opened
        opened.close()


@pytest.fixture(params=["desktop", "phone"])
def page(seeing: Any, address: str, request: Any) -> Iterator[Any]:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    how = phone if request.param == "phone" else {"viewport": {"width": 1280, "height": 900}}
    context = seeing.new_context(**how)
    page = context.new_page()
    page.add_init_script(COLLECT)
    page.wrongs, page.kind = [], request.param
    page.on("pageerror", lambda error: page.wrongs.append(str(error)))
    page.goto(address)
    wait_until(lambda: count(page) >= 6, "frames")
    yield page
    assert not page.wrongs
    context.close()


def strength(page: Any, value: float) -> None:
    page.locator("#strength").evaluate(
        "(one, value) => { one.value = value; one.dispatchEvent(new Event('input')); "
        "one.dispatchEvent(new Event('change')); }",
        value,
    )


def photograph(page: Any, name: str) -> None:
    if "STATES" in os.environ:
        page.locator("#camera").scroll_into_view_if_needed()
        page.wait_for_timeout(800)
        page.screenshot(path=Path(os.environ["STATES"]) / f"{name}-{page.kind}.png", full_page=True)


def test_the_camera_shows_in_the_video_and_stops_with_the_session(page: Any) -> None:
    strength(page, 0.1)
    before = page.locator("#session").inner_text()
    page.click("#camera")
    wait_until(lambda: page.locator("#session").inner_text() != before, "another session")
    wait_until(lambda: "what the camera sees" in page.locator("#given-now").inner_text(), "the words")
    begun = count(page)
    wait_until(lambda: count(page) >= begun + 12, "frames")
    pixels = frames(page, count(page) - 1)[-1].pixels
    red, green, blue = (float(one) for one in pixels.mean((1, 2)))
    assert green > red + 0.2 and green > blue + 0.2
    photograph(page, "camera")
    strength(page, 1.0)
    asked = page.locator("#prompt").input_value()
    page.fill("#prompt", "a blue square moves left on a dark background")
    page.click("#send")
    wait_until(lambda: page.locator("#playing").inner_text().startswith("a blue square"), "the prompt")
    begun = count(page)
    wait_until(
        lambda: count(page) > begun + 8 and float(frames(page, count(page) - 1)[-1].pixels[1].mean()) < 0,
        "a video of the prompt alone",
    )
    assert asked and page.locator("#replay").is_disabled()
    page.click("#end")
    wait_until(lambda: page.locator("#camera").inner_text() == "Use the camera", "the end")
    assert page.evaluate("() => document.querySelector('#mirror').srcObject === null")
    assert page.evaluate("() => document.documentElement.scrollWidth <= document.documentElement.clientWidth")


def test_a_video_is_given_and_the_session_ends_with_it(page: Any, tmp_path: Path) -> None:
    write_video(tmp_path / "blue.mp4", torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(1, 45, 3, 80, 80), 16)
    strength(page, 0.1)
    page.set_input_files("#given", tmp_path / "blue.mp4")
    wait_until(lambda: "the one you gave" in page.locator("#given-now").inner_text(), "the words")
    wait_until(lambda: "the given video is over" in page.locator("#words-over").inner_text(), "the end")
    pixels = frames(page, count(page) - 1)[-1].pixels
    assert float(pixels[2].mean()) > float(pixels[0].mean()) + 0.5
    (tmp_path / "no.mp4").write_bytes(b"no video")
    page.set_input_files("#given", tmp_path / "no.mp4")
    wait_until(lambda: "cannot be read as a video" in page.locator("#problem").inner_text(), "the reason")


def test_what_cannot_be_given_leaves_the_video_that_plays(page: Any) -> None:
    """And says why where it is read, wherever the page is scrolled to."""
    before = page.locator("#session").inner_text()
    options = {"prompt": "a red pillar ahead"}
    record = {
        "format": FORMAT,
        "model": "tiny/walk",
        "policy": "renew",
        "options": options,
        "commands": [],
        "chunks": 9,
    }
    for where, name, data, words in (
        ("#given", "no.mp4", b"no video", "cannot be read as a video"),
        (
            "#open",
            "walk.json",
            json.dumps(record).encode(),
            "the record was made with tiny/walk, this server shows tiny",
        ),
    ):
        page.locator("#session").scroll_into_view_if_needed()
        page.set_input_files(where, {"name": name, "mimeType": "application/octet-stream", "buffer": data})
        wait_until(lambda words=words: words in page.locator("#problem").inner_text(), words)
        box = page.locator("#problem").bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= page.evaluate("innerHeight")
        begun = count(page)
        wait_until(lambda begun=begun: count(page) > begun + 4, "the video to go on")
    assert page.locator("#session").inner_text() == before and page.locator("#end").is_enabled()


def test_the_video_stays_in_sight_of_the_prompt(page: Any) -> None:
    """On a phone, where the prompt is below it, small in a corner; a press leads back."""
    screen = page.locator("#screen")
    page.locator("#send").scroll_into_view_if_needed()
    page.evaluate("() => document.querySelector('#prompt-form').scrollIntoView()")
    if page.kind == "desktop":
        page.wait_for_timeout(200)
        assert screen.bounding_box()["width"] > 300
        return
    wait_until(lambda: screen.bounding_box()["width"] < 130, "a small video")
    box = screen.bounding_box()
    assert box["y"] >= 0 and box["x"] + box["width"] <= 390
    photograph(page, "mini")
    screen.click()
    wait_until(lambda: screen.bounding_box()["width"] > 300, "the large video")
    assert page.locator("#frame").bounding_box()["y"] >= -1
