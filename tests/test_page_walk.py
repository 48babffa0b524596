"""The shipped walkable model on the page, in a real browser: keys turn the view by what the world's metric says.

A true picture of a held-out scene is given, so that what the canvas shows can be compared with exact renders of that
scene from every direction.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("playwright.sync_api", reason="needs playwright")

import causalreel
from causalreel.data.walk import CELL, captions, simulate
from causalreel.data.walk_render import paint, seen
from causalreel.eval.control import psnr
from causalreel.serve.handle import Limits
from patience import wait_until
from served import listening
from test_page import Frame, browser, count, frames  # noqa: F401 - a fixture
from test_page_keys import CHUNKS, closed, opened

if "tiny/walk" not in causalreel.variants():
    pytest.skip("tiny/walk is not part of this installation", allow_module_level=True)

SCENE = simulate(8, seed=0, held_out=True)[3:4]
YAWS = range(-48, 49, 3)
"""Degrees to the right that are tried: beyond, too little of the first picture is left in sight to tell them apart."""
TURN = 12
"""Degrees of a key in a chunk."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    pipeline = causalreel.load("tiny/walk", device="cpu")
    with listening(pipeline, Limits(sessions=2, buffer_chunks=1)) as where:
        yield f"http://{where}/?prompt={captions(SCENE)[0].replace(' ', '%20')}"


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:  # noqa: F811
    made = opened(browser, address)
    yield made
    closed(made)


def begin(page: Any) -> None:
    """Start again from the scene's first picture, and wait until that is shown."""
    picture = ((paint(SCENE, SCENE.yaw[:, :1], SCENE.at[:, :1])[0, 0].movedim(0, -1) + 1) * 127.5).round().byte()
    held = io.BytesIO()
    Image.fromarray(picture.numpy()).save(held, "PNG")
    before = count(page)
    page.set_input_files("#image", {"name": "first.png", "mimeType": "image/png", "buffer": held.getvalue()})
    shown = "the given picture"
    wait_until(lambda: any(float(fits(one, [(0, 0, 0)])[0]) > 30 for one in frames(page, before)), shown, every_s=0.2)


def fits(frame: Frame, poses: list[tuple[float, float, float]]) -> Tensor:
    """PSNR of a frame against renders from these poses (degrees to the right, x, z in cells), where the first picture
    saw the scene; -1 from where it saw too little."""
    degrees, *places = torch.tensor(poses, dtype=torch.float64).T
    yaw, at = torch.deg2rad(degrees)[None], torch.stack(places, -1)[None]
    pictures = frame.pixels.expand(1, len(poses), 3, -1, -1)
    return psnr(pictures, paint(SCENE, yaw, at), seen(SCENE, yaw, at))[0].nan_to_num(-1)


def looks(frame: Frame) -> int:
    """Degrees to the right of the start, of a camera that has only turned."""
    return YAWS[int(fits(frame, [(yaw, 0, 0) for yaw in YAWS]).argmax())]


def agrees(frame: Frame, pose: tuple[float, float, float]) -> bool:
    """Whether it shows what is seen from there: clearly rather than from the start or from where the opposite keys
    lead, and rather than from a key's turn to either side."""
    yaw, x, z = pose
    told, started, otherwise, left, right = fits(
        frame, [pose, (0, 0, 0), (-yaw, -x, z), (yaw - TURN, x, z), (yaw + TURN, x, z)]
    ).tolist()
    return told > max(started, otherwise) + 3 and told > max(left, right)


def where(page: Any) -> tuple[float, float, float]:
    """Degrees, x and z in cells, of what is shown, as the page's map has them."""
    yaw, x, z = (float(page.locator("#map").get_attribute(f"data-{name}")) for name in ("yaw", "x", "z"))
    return yaw, x / CELL, z / CELL


def until_it_stands(page: Any) -> Frame:
    """Two more chunks with an unchanged map -> the last frame."""

    def stands() -> bool:
        before, start = where(page), count(page)
        wait_until(lambda: count(page) >= start + 8, "more frames")
        return where(page) == before

    wait_until(stands, "the view to stand still")
    return frames(page, count(page) - 1)[0]


def test_a_key_turns_the_view_by_the_metric_and_its_release_stops_it(page: Any) -> None:
    begin(page)
    start = count(page)
    page.keyboard.down("ArrowRight")
    wait_until(lambda: where(page)[0] >= TURN, "the first turn")
    page.keyboard.up("ArrowRight")
    last = until_it_stands(page)
    shown = frames(page, start)[::2]  # a render for each direction takes a while
    turned = [looks(frame) for frame in shown]
    degrees = where(page)[0]
    assert degrees >= TURN and degrees % TURN == 0
    assert agrees(last, (degrees, 0, 0))
    assert max(abs(after - before) for before, after in pairwise(turned)) <= TURN  # no jump
    assert max(turned[-3:]) - min(turned[-3:]) <= 3
    moved = next(frame for frame, yaw in zip(shown, turned, strict=True) if yaw >= TURN / 2)
    assert moved.sequence - shown[0].sequence <= CHUNKS


def test_another_prompt_begins_again(page: Any) -> None:
    """The model was not trained for prompts that change what plays (docs/walk.md)."""
    assert page.input_value("#mode") == "restart" and "first frame" in page.locator("#mode-help").inner_text()


def test_two_keys_together(page: Any) -> None:
    begin(page)
    page.keyboard.down("w")
    page.keyboard.down("ArrowLeft")
    wait_until(lambda: where(page)[0] <= -TURN, "the first turn")
    page.keyboard.up("w")
    page.keyboard.up("ArrowLeft")
    last = until_it_stands(page)
    yaw, x, z = where(page)
    assert yaw <= -TURN and z > 0.2 and x < 0
    assert agrees(last, (yaw, x, z))


def test_by_touch_at_phone_width(browser: Any, address: str) -> None:  # noqa: F811
    page = opened(browser, address, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    begin(page)
    page.locator("#pads").scroll_into_view_if_needed()
    box = page.locator("#pads [data-key=left]").bounding_box()
    wire = page.context.new_cdp_session(page)
    finger = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    wire.send("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": [finger]})
    wait_until(lambda: where(page)[0] <= -TURN, "the first turn")
    wire.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    last = until_it_stands(page)
    assert agrees(last, (where(page)[0], 0, 0))
    closed(page)
