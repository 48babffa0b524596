"""The live page in each state that a person can meet, at the sizes of a desktop, a tablet and a phone held either way.

Everything fits in the width, says what has happened, and can be read by those who cannot see it: with AXE=axe.min.js
(`npm pack axe-core`) its rules are checked too. With STATES=folder each state is photographed.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("playwright.sync_api", reason="needs playwright")

from patience import wait_until
from test_page import COLLECT, FIRST, browser, count, play, serve, server  # noqa: F401 - fixtures

SIZES = {"desktop": (1280, 800), "tablet": (820, 1180), "phone": (390, 844), "landscape": (844, 390)}
WIDER = """() => [...document.querySelectorAll("body *")].filter((one) => one.checkVisibility()
  && !one.closest(".unseen, #timeline, .chips") && one.getBoundingClientRect().right > innerWidth + 1)
  .map((one) => one.outerHTML)"""
"""What is cut off, but for what a finger moves sideways."""
COVERED = """() => ["problem", "words-over", "start", "prompt-error", "send", "slow"]
  .map((id) => document.getElementById(id)).filter((one) => one.checkVisibility() && one.textContent)
  .filter((one) => {
    one.scrollIntoView({block: "center"});
    const box = one.getBoundingClientRect();
    const top = document.elementFromPoint(box.left + box.width / 2, box.top + box.height / 2);
    return !one.contains(top);
  }).map((one) => one.id)"""
"""What a person has to read or press and that something else lies upon."""


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:  # noqa: F811
    context = browser.new_context(viewport={"width": 1280, "height": 800}, accept_downloads=True)
    page = context.new_page()
    page.add_init_script(COLLECT)
    yield page
    if page.locator("#end").count() and page.locator("#end").is_enabled():
        page.click("#end")
    context.close()


def says(page: Any, where: str, words: str) -> None:
    wait_until(lambda: words in page.locator(where).inner_text(), lambda: f"{words!r} in {where}")


def idle(page: Any, address: str) -> None:
    play(page, address)
    page.click("#end")
    says(page, "#words-over", "The session has ended")
    assert page.locator("#start").is_visible() and page.locator("#pause").is_disabled()


def playing(page: Any, address: str) -> None:
    play(page, address, 40)
    wait_until(lambda: page.locator("#timeline li").count() >= 2, "pictures in the timeline")
    assert page.locator("#playing").inner_text() == FIRST and page.locator("#connection").inner_text() == "Live"


def paused(page: Any, address: str) -> None:
    play(page, address, 12)
    page.click("#pause")
    wait_until(lambda: page.locator("#pause").get_attribute("aria-pressed") == "true", "the pause")


def bad_picture(page: Any, address: str) -> None:
    play(page, address)
    page.set_input_files("#image", {"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture"})
    wait_until(lambda: page.locator("#problem").is_visible(), "the reason")
    assert page.locator("#connection").inner_text() == "Live"


def refused_prompt(page: Any, address: str) -> None:
    play(page, address)
    page.fill("#prompt", "a purple elephant jumps over " + "w" * 300)
    page.click("#send")
    wait_until(lambda: page.locator("#prompt-error").is_visible(), "the reason")
    assert "purple" in page.locator("#prompt-error").inner_text()


def replay(page: Any, address: str) -> None:
    play(page, address, 12)
    page.click("#pause")
    with page.expect_download() as saved:
        page.click("#replay")
    page.set_input_files("#open", saved.value.path())
    says(page, "#overlay", "The replay is over")


STATES: dict[str, Callable[[Any, str], None]] = {
    "idle": idle,
    "playing": playing,
    "paused": paused,
    "bad-picture": bad_picture,
    "refused-prompt": refused_prompt,
    "replay": replay,
}


def look(page: Any, state: str) -> None:
    """At every size: nothing is too wide or covered, and axe finds nothing."""
    for name, (width, height) in SIZES.items():
        page.set_viewport_size({"width": width, "height": height})
        page.wait_for_timeout(300)
        if "STATES" in os.environ:
            page.screenshot(path=Path(os.environ["STATES"]) / f"{state}-{name}.png", full_page=name != "landscape")
        assert page.evaluate("() => document.documentElement.scrollWidth <= innerWidth"), name
        assert page.evaluate(WIDER) == [], name
        assert page.evaluate(COVERED) == [], name
        page.evaluate("() => scrollTo(0, 0)")
        if "AXE" in os.environ:
            page.evaluate(Path(os.environ["AXE"]).read_text())
            found = page.evaluate("async () => (await axe.run()).violations")
            told = [f"{one['id']}: {one['help']}: {[node['html'][:120] for node in one['nodes']]}" for one in found]
            assert told == [], f"{state}, {name}"


@pytest.mark.parametrize("state", STATES)
def test_a_state_at_every_size(tab: Any, server: str, state: str) -> None:  # noqa: F811
    STATES[state](tab, server)
    look(tab, state)


def test_a_full_server_and_one_that_goes(browser: Any, tmp_path: Path) -> None:  # noqa: F811
    """No room: it says so and offers to try again. Gone while it plays: it says that it tries again by itself."""
    first, second = (browser.new_context(viewport={"width": 1280, "height": 800}) for _ in range(2))
    running = serve(tmp_path, "--max-sessions", "1")
    address = next(running)
    page, other = first.new_page(), second.new_page()
    page.add_init_script(COLLECT)
    play(page, address)
    other.goto(address)
    says(other, "#words-over", "No room at the moment")
    assert other.locator("#start").is_visible() and other.locator("#problem").is_visible()
    look(other, "full")
    second.close()
    before = page.locator("#session").inner_text()
    page.click("#again")  # where there is no place for two the one that plays makes room
    wait_until(lambda: page.locator("#session").inner_text() not in (before, "none"), "another session")
    wait_until(lambda shown=count(page): count(page) > shown + 4, "frames")
    kill(running)
    says(page, "#connection", "No connection, trying again")
    says(page, "#words-over", "No connection, trying again")
    wait_until(lambda: not page.locator("#slow").is_visible(), "no word of a slow model")
    look(page, "gone")
    first.close()


def kill(running: Iterator[str]) -> None:
    """SIGKILL the server of `test_page.serve`, and end its generator."""
    process: subprocess.Popen[bytes] = running.gi_frame.f_locals["process"]  # type: ignore[attr-defined]
    process.send_signal(signal.SIGKILL)
    process.wait()
    running.close()  # type: ignore[attr-defined]
