"""Help for tests of the server: the small embedded model behind an application, its messages read one by one."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient
from PIL import Image

import causalreel
from causalreel.infer.live import PolicyKind
from causalreel.infer.pipeline import Pipeline
from causalreel.serve.app import create_app
from causalreel.serve.handle import Limits
from causalreel.serve.listen import Server, listen
from causalreel.serve.safety import Settings
from causalreel.serve.scheduler import Scheduler
from causalreel.serve.wire import unpack
from patience import PATIENCE_S, wait_until

RED, BLUE = "a large red circle moves right", "a blue square moves left"
PLENTY: dict[str, Any] = {"requests_per_s": 1e6, "burst": 10**6}


def small_pipeline() -> Pipeline:
    return causalreel.load("tiny/frame-1step", device="cpu")


@contextlib.contextmanager
def serving(pipeline: Pipeline, limits: Limits = Limits(), **settings: Any) -> Iterator[TestClient]:
    """A client of a running application; a server's error is an answer and not an exception."""
    scheduler = Scheduler(pipeline, limits)
    scheduler.start()
    try:
        app = create_app(scheduler, Settings(**(PLENTY | settings)))
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client
    finally:
        scheduler.close()


@contextlib.contextmanager
def listening(pipeline: Pipeline, limits: Limits, policy: PolicyKind | None = None, **how: Any) -> Iterator[str]:
    """A real server on a free port of loopback -> host:port."""
    scheduler = Scheduler(pipeline, limits, policy=policy)
    scheduler.start()
    allowed = Settings(**(PLENTY | how))
    with listen("127.0.0.1", 0) as door:
        server = Server(create_app(scheduler, allowed))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
        thread.start()
        wait_until(lambda: server.started, "the server")
        host, port = door.getsockname()
        try:
            yield f"{host}:{port}"
        finally:
            server.should_exit = True
            thread.join(PATIENCE_S)
            scheduler.close()
    assert not thread.is_alive()


def opened(client: TestClient, prompt: str = RED, **options: Any) -> str:
    answer = client.post("/v1/sessions", json={"prompt": prompt, **options})
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def message(socket: Any) -> tuple[dict[str, Any], list[bytes]]:
    """The next message: text without payloads, or a chunk with them."""
    got = socket.receive()
    if got["type"] == "websocket.close":
        return {"type": "close", "code": got["code"]}, []
    if got.get("text") is not None:
        return json.loads(got["text"]), []
    return unpack(got["bytes"])


def until(socket: Any, is_it: Callable[[dict[str, Any]], bool], limit: int = 200) -> list[dict[str, Any]]:
    """Messages up to the first that is the one, that one included."""
    seen = []
    for _ in range(limit):
        seen.append(message(socket)[0])
        if is_it(seen[-1]):
            return seen
    raise AssertionError(f"not among {limit} messages: {[m['type'] for m in seen]}")


def picture(width: int = 64, height: int = 64, kind: str = "PNG", mode: str = "RGB") -> bytes:
    held = io.BytesIO()
    Image.new(mode, (width, height), (255, 0, 0) if mode == "RGB" else 0).save(held, kind)
    return held.getvalue()


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def wait_for(client: TestClient, video: str, *statuses: str) -> dict[str, Any]:
    def row() -> dict[str, Any]:
        return client.get(f"/v1/videos/{video}").json()

    wait_until(lambda: row()["status"] in statuses, lambda: f"{statuses}, still {row()}", every_s=0.05)
    return row()


def folder_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".mp4"}
