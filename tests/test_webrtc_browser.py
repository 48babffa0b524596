"""The lines of docs/scale-out.md in a real browser: a session over WebRTC, its pixels read back."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("aiortc", reason="needs the extra causalreel[webrtc]")
pytest.importorskip("fastapi", reason="needs the extra causalreel[serve]")
pytest.importorskip("playwright", reason="needs playwright")

import httpx
from playwright.sync_api import sync_playwright

from causalreel.eval.metrics import MetricConfig, measure
from patience import PATIENCE_S
from test_replicas import free_ports, stop, wait_until_ready

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
PAGE = Path(__file__).resolve().parents[1] / "docs" / "scale-out.md"
RED, BLUE = "a large red circle moves right", "a blue square moves left"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

BEGIN = """async (id) => {
  window.messages = [];
  const video = document.createElement("video");
  video.muted = true;
  video.autoplay = true;
  document.body.append(video);
  window.video = video;
  Object.assign(window, await show(id, video));
  control.onmessage = ({ data }) => messages.push(JSON.parse(data));
}"""
LOOK = """(side) => {
  const canvas = new OffscreenCanvas(side, side);
  const pen = canvas.getContext("2d");
  pen.drawImage(video, 0, 0, side, side);
  return Array.from(pen.getImageData(0, 0, side, side).data);
}"""
SIDE = 64
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-features=WebRtcHideLocalIpsWithMdns"]
"""The last one: names in place of addresses are asked for on the network; the test stays on this machine."""


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    (port,) = free_ports(1)
    words = ["--model", "tiny", "--port", str(port), "--webrtc", "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(tmp_path / "log", "wb") as log:
        command = [sys.executable, "-m", "causalreel", "serve", *words]
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", process, tmp_path / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def follows(page: Any, prompt: str) -> bool:
    """Whether what the video element shows now is what the prompt says."""
    pixels = torch.tensor(page.evaluate(LOOK, SIDE), dtype=torch.float32).view(SIDE, SIDE, 4)[..., :3]
    video = (pixels.permute(2, 0, 1) / 127.5 - 1)[None, None]  # (1,1,3,H,W)
    return bool(measure(video, [prompt], config=MetricConfig(stride=1)).follow[0] == 1)


def test_a_browser_shows_a_session_and_its_prompt_change(url: str) -> None:
    (snippet,) = re.findall(r"^```js\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    session = httpx.post(f"{url}/v1/sessions", json={"prompt": RED}).json()["id"]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.goto(f"{url}/healthz")  # an empty page of the server's: what plays by itself must be in sight
        page.evaluate(f"() => {{ {snippet}; window.show = show; }}")  # the page's policy admits no script element
        page.evaluate(BEGIN, session)

        def until(holds: Any, what: str) -> None:
            end = time.monotonic() + PATIENCE_S  # not so many looks: on a starved machine each takes seconds
            while time.monotonic() < end:
                if holds():
                    return
                page.wait_for_timeout(100)
            state = page.evaluate("[peer.connectionState, peer.iceConnectionState, video.videoWidth]")
            pytest.fail(f"no {what}: {state}, {page.evaluate('messages')[-3:]}")

        until(lambda: page.evaluate("video.videoWidth") == 256, "picture")
        until(lambda: follows(page, RED), "red circle")
        told = {"type": "command", "id": 1, "name": "prompt", "text": BLUE}
        page.evaluate("text => control.send(text)", json.dumps(told))
        until(lambda: {"type": "ack", "id": 1, "number": 1} in page.evaluate("messages"), "ack")
        until(lambda: follows(page, BLUE), "blue square")
        browser.close()
    assert httpx.get(f"{url}/v1/sessions/{session}").json()["ended"] is None
