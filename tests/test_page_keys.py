"""Keys on the page, in a real browser: they turn the view the right way, together too, and stop when they are let go.

The world is painted by hand from the camera's pose (`steered`), so the canvas says which way the camera looks. With
AXE=axe.min.js its rules are checked, with STATES=folder the page is photographed.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("playwright.sync_api", reason="needs playwright")

from causalreel.serve.handle import Limits
from patience import wait_until
from served import listening
from steered import DEGREES, PROMPT, STEP, painted, read_view, turned
from test_page import COLLECT, Frame, browser, count, frames, numbers  # noqa: F401 - a fixture

CHUNKS = 3
"""From a key to its first picture, at most so many chunks behind the one that is shown (docs/page.md)."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with listening(painted(), Limits(sessions=4, buffer_chunks=1), policy="slide") as where:
        yield f"http://{where}/?prompt={PROMPT.replace(' ', '%20')}"


def opened(browser: Any, address: str, **how: Any) -> Any:  # noqa: F811
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | how))
    page = context.new_page()
    page.add_init_script(COLLECT)
    page.wrongs = []
    page.on("pageerror", lambda error: page.wrongs.append(str(error)))
    page.goto(address)
    wait_until(lambda: count(page) >= 6, "frames")
    return page


def closed(page: Any) -> None:
    page.click("#end")
    wrongs = page.wrongs
    page.context.close()
    assert not wrongs


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:  # noqa: F811
    made = opened(browser, address)
    yield made
    closed(made)


def views(shown: list[Frame]) -> list[tuple[float, float, float]]:
    """Yaw, x and z of frames."""
    return [read_view(frame.pixels) for frame in shown]


def moved(shown: list[Frame]) -> tuple[float, float, float]:
    """Degrees to the right, and the ways to the right and forward, from the first frame to the last."""
    seen = views(shown)
    right = sum(turned(a[0], b[0]) for a, b in pairwise(seen))
    return right, seen[-1][1] - seen[0][1], seen[-1][2] - seen[0][2]


def stands(page: Any) -> bool:
    """Whether nothing has moved in the last two chunks."""
    seen = views(frames(page, max(0, count(page) - 9)))
    return all(abs(turned(a[0], b[0])) < 0.5 and abs(a[1] - b[1]) + abs(a[2] - b[2]) < 0.04 for a, b in pairwise(seen))


def while_held(page: Any, press: Callable[[], Any], lift: Callable[[], Any], shown: int = 6) -> list[Frame]:
    """What is shown from the press on: so many frames behind the first that moved, and all until the view stands."""
    start = count(page)
    press()
    wait_until(lambda: not stands(page), "the view to move")
    begun = count(page)
    wait_until(lambda: count(page) >= begun + shown, "more frames")
    lift()
    let_go = count(page)
    wait_until(lambda: count(page) >= let_go + 4 and stands(page), "the view to stand still")
    return frames(page, start)


def test_a_key_turns_the_view_within_the_documented_chunks_and_stops(page: Any) -> None:
    for key, way in (("ArrowRight", 1), ("ArrowLeft", -1)):
        shown = while_held(page, lambda key=key: page.keyboard.down(key), lambda key=key: page.keyboard.up(key))
        steps = [turned(a[0], b[0]) for a, b in pairwise(views(shown))]
        moving = [step * way for step in steps if abs(step) > 0.5]
        assert moving and all(abs(step - DEGREES / 4) < 0.8 for step in moving)
        assert abs(moved(shown)[2]) < 0.1
        assert numbers(shown) == list(range(shown[0].number, shown[-1].number + 1))
        first = next(b for (_, b), step in zip(pairwise(shown), steps, strict=True) if abs(step) > 0.5)
        assert first.sequence - shown[0].sequence <= CHUNKS
    words = page.locator("#key-latency").inner_text()
    assert re.match(r"From the key to the first picture made with it: \d+ ms", words)
    print(words)
    assert page.locator("#held").inner_text() == "none"


def test_two_keys_together_and_a_prompt_between(page: Any) -> None:
    start = count(page)
    page.keyboard.down("w")
    page.keyboard.down("ArrowLeft")
    wait_until(lambda: page.locator("#held-shown").inner_text() == "W ←", "both keys in the picture")
    assert page.locator("#pads [data-key=w]").get_attribute("aria-pressed") == "true"
    begun = count(page)
    wait_until(lambda: count(page) >= begun + 8, "more frames")
    right, _, ahead = moved(frames(page, start))
    assert right < -DEGREES and ahead > STEP
    page.keyboard.up("ArrowLeft")
    wait_until(lambda: page.locator("#held-shown").inner_text() == "W", "one key alone")
    begun = count(page)
    wait_until(lambda: count(page) >= begun + 10, "more frames")
    assert abs(moved(frames(page, begun + 1))[0]) < 1
    page.fill("#prompt", "a blue square moves left")  # a text field: nothing is held while one writes
    wait_until(lambda: page.locator("#held").inner_text() == "none", "the release")
    page.keyboard.up("w")
    page.select_option("#mode", "switch")
    page.click("#send")
    wait_until(lambda: page.locator("#playing").inner_text() == "a blue square moves left", "the prompt")
    x, z, yaw = (float(page.locator("#map").get_attribute(f"data-{name}")) for name in ("x", "z", "yaw"))
    assert yaw < -DEGREES / 2 and abs(x) + abs(z) > STEP
    assert "looking" in page.locator("#where").inner_text()


def test_whoever_looks_away_lets_go_and_keys_are_no_shortcuts(page: Any) -> None:
    blur = "() => dispatchEvent(new Event('blur'))"
    shown = while_held(page, lambda: page.keyboard.down("d"), lambda: page.evaluate(blur))
    assert moved(shown)[1] > STEP / 2
    page.keyboard.up("d")
    page.keyboard.press("s")
    page.focus("#pads [data-key=right]")  # a pad is held by the space bar too
    shown = while_held(page, lambda: page.keyboard.down(" "), lambda: page.keyboard.up(" "), shown=4)
    assert moved(shown)[0] > DEGREES / 2
    assert page.locator("#pause").get_attribute("aria-pressed") == "false"
    page.keyboard.press("k")
    wait_until(lambda: page.locator("#pause").get_attribute("aria-pressed") == "true", "the pause")


def test_a_short_press_moves_by_one_chunk_wherever_a_border_falls(page: Any) -> None:
    """Down and up at once, and twice in less time than lies between two messages."""
    for _ in range(3):
        shown = while_held(page, lambda: page.keyboard.press("ArrowRight"), lambda: None)
        assert abs(moved(shown)[0] - DEGREES) < 1
    press = "(keys) => keys.forEach((code) => ['keydown', 'keyup'].forEach((kind) => dispatchKey(kind, code)))"
    page.evaluate(
        """() => { window.dispatchKey = (kind, code, key = "?") =>
            document.body.dispatchEvent(new KeyboardEvent(kind, {code, key, bubbles: true, cancelable: true})); }"""
    )
    shown = while_held(page, lambda: page.evaluate(press, ["KeyW", "ArrowRight", "KeyW"]), lambda: None)
    right, aside, ahead = moved(shown)
    assert right > DEGREES - 1 and math.hypot(aside, ahead) > 0.8 * STEP


def test_letters_count_by_their_place_on_every_layout(page: Any) -> None:
    """What AZERTY writes on W and A is Z and Q, what Dvorak writes on J is H: as games have it."""
    named = """async ([names, events]) => {
        const {Steering} = await import("./static/steer.js");
        const one = Object.assign(Object.create(Steering.prototype), {names});
        return events.map(([code, key]) => one.named({code, key}));
    }"""
    letters = ["w", "a", "s", "d", "i", "j", "k", "l", "u"]
    events = [[f"Key{letter.upper()}", "?"] for letter in letters]
    assert page.evaluate(named, [letters, events]) == letters
    events = [["KeyW", "z"], ["KeyZ", "w"], ["KeyA", "q"], ["Semicolon", "s"], ["", "d"], ["ArrowLeft", "ArrowLeft"]]
    assert page.evaluate(named, [letters, events]) == ["w", "", "a", "", "d", "j"]


def test_by_touch_at_phone_width(browser: Any, address: str) -> None:  # noqa: F811
    page = opened(browser, address, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    wire = page.context.new_cdp_session(page)
    page.locator("#pads").scroll_into_view_if_needed()

    def touch(*keys: str) -> None:
        boxes = [page.locator(f"#pads [data-key={key}]").bounding_box() for key in keys]
        points = [{"x": b["x"] + b["width"] / 2, "y": b["y"] + b["height"] / 2, "id": n} for n, b in enumerate(boxes)]
        wire.send("Input.dispatchTouchEvent", {"type": "touchStart" if keys else "touchEnd", "touchPoints": points})

    for keys, right, ahead in ((("right",), 1, 0), (("w", "left"), -1, 1)):
        shown = while_held(page, lambda keys=keys: touch(*keys), touch)
        found = moved(shown)
        assert found[0] * right > DEGREES and (found[2] > 0.1 if ahead else abs(found[2]) < 0.1)
    assert page.evaluate("() => document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    sizes = page.locator("#pads button").evaluate_all("(all) => all.map((one) => one.getBoundingClientRect().height)")
    assert min(sizes) >= 44
    page.evaluate("() => scrollTo(0, 0)")
    photograph(page, "keys-phone")
    axe(page)
    closed(page)


def test_a_gamepad_steers(page: Any) -> None:
    page.evaluate("""() => {
        window.stick = [0, 0, 0, 0];
        const buttons = Array.from({length: 16}, () => ({pressed: false}));
        navigator.getGamepads = () => [{axes: window.stick, buttons}];
        dispatchEvent(new Event("gamepadconnected"));
    }""")
    push = "() => { window.stick = [0, -1, 0.9, 0]; }"
    shown = while_held(
        page, lambda: page.evaluate(push), lambda: page.evaluate("() => { window.stick = [0, 0, 0, 0]; }")
    )
    right, _, ahead = moved(shown)
    assert right > DEGREES and ahead > 0.1


def test_everybody_can_steer(page: Any) -> None:
    page.keyboard.down("w")
    page.keyboard.down("ArrowRight")
    wait_until(lambda: page.locator("#held-shown").inner_text() == "W →", "the keys")
    labels = page.locator("#pads button").evaluate_all("(all) => all.map((one) => one.getAttribute('aria-label'))")
    assert labels == ["forward", "back", "left", "right", "turn left", "turn right"]
    photograph(page, "keys-desktop")
    axe(page)
    page.keyboard.up("w")
    page.keyboard.up("ArrowRight")


def photograph(page: Any, name: str) -> None:
    if "STATES" in os.environ:
        page.wait_for_timeout(1500)
        page.screenshot(path=Path(os.environ["STATES"]) / f"{name}.png")


def axe(page: Any) -> None:
    """Its rules, if it is there."""
    if "AXE" not in os.environ:
        return
    page.evaluate(Path(os.environ["AXE"]).read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run()")
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]] == []
