"""The rooms that a prompt, a latent, a batch, a key name and a live command enter, and how often the way leads back up.

    python benchmarks/walks.py

Each walk is run on the tiny models with every call traced. A room is a module or folder of the package (the table of
docs/architecture.md); a climb is a call from a room into one of a higher layer, each pair of modules counted once: what
a lower room was handed and calls back. It runs on any revision: PYTHONPATH says which.
"""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import causalreel

PACKAGE = str(Path(causalreel.__file__).parent) + os.sep
LAYERS = (
    ("types",),
    (
        "config",
        "flow",
        "solvers",
        "vocabulary",
        "folders",
        "fingerprint",
        "hashed",
        "files",
        "foreign",
        "headers",
        "spelling",
    ),
    ("nn", "codecs", "text", "data", "control", "rollout"),
    ("weights", "parallel"),
    ("families",),
    ("train", "infer"),
    ("verify", "eval", "serve"),
    ("cli",),
)
LAYER = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}
RED, BLUE = "a large red circle moves right", "a blue square moves left"
SMALL = ("trainer.steps=2", "trainer.device=cpu", "trainer.preview_every=0", "settings.batch=2")


class Walk:
    """What is called while it is on, in all threads that begin after `install`."""

    def __init__(self) -> None:
        self.is_on = False
        self.rooms: dict[str, set[str]] = {}
        """Room -> its modules, in the order in which rooms were entered."""
        self.climbs: set[tuple[str, str]] = set()
        self.places: dict[str, tuple[str, str] | None] = {}

    def install(self) -> None:
        threading.setprofile(self._see)
        sys.setprofile(self._see)

    def take(self, what: str, do: Callable[[], Any]) -> None:
        """Run it and print its row."""
        self.rooms, self.climbs, self.is_on = {}, set(), True
        do()
        self.is_on = False
        rooms = [room for room in self.rooms if LAYER.get(room, 1) > 1]
        modules = sum(len(found) for found in self.rooms.values())
        low, climbs = len(self.rooms) - len(rooms), ", ".join(sorted(f"{a} to {b}" for a, b in self.climbs))
        print(
            f"| {what} | {', '.join(rooms)} | {len(rooms)} | {low} | {modules} | {len(self.climbs)}: {climbs} |",
            flush=True,
        )

    def _see(self, frame: FrameType, event: str, _: object) -> None:
        if not self.is_on or event != "call" or (here := self._place(frame)) is None:
            return
        self.rooms.setdefault(here[0], set()).add(here[1])
        caller = frame.f_back
        while caller is not None and self._place(caller) is None:
            caller = caller.f_back
        there = None if caller is None else self._place(caller)
        if there is not None and LAYER.get(here[0], 1) > LAYER.get(there[0], 1):
            self.climbs.add((there[1], here[1]))

    def _place(self, frame: FrameType) -> tuple[str, str] | None:
        """Room and module of a frame; None outside the package and while modules are read."""
        code = frame.f_code
        if code.co_filename not in self.places:
            found = None
            if code.co_filename.startswith(PACKAGE):
                parts = Path(code.co_filename[len(PACKAGE) :]).with_suffix("").parts
                found = (parts[0], ".".join(part for part in parts if part != "__init__"))
            self.places[code.co_filename] = found
        return None if code.co_name in ("<module>", "__getattr__") else self.places[code.co_filename]


def reel(*arguments: str) -> None:
    from causalreel import cli

    assert cli.main(list(arguments)) == 0


def main() -> None:
    walk = Walk()
    walk.install()
    os.chdir(tempfile.mkdtemp())
    reel("train", "tiny/codec", *SMALL, "rows=4", "trainer.out=codec")
    _walks(lambda what, do: do(), "first-")  # modules are imported then, which is no walk
    _walks(walk.take, "")
    _live(walk)


def _walks(take: Callable[[str, Callable[[], Any]], None], prefix: str) -> None:
    """Every walk but the live one; prefix: of the files that it leaves in the current folder."""
    generate = ("generate", RED, "--frames", "9", "--device", "cpu", "--precision", "eager", "-o")
    encode = ("encode", "--codec", "codec/export", "--clips", "6", "--batch", "4", "--device", "cpu", "--out")
    base = ("train", "tiny/base", *SMALL, "codec=codec/export", "rows=null", "model=tiny-smoke")
    take("a prompt", lambda: reel(*generate, f"{prefix}a.mp4"))
    take("a latent", lambda: reel(*encode, f"{prefix}data"))
    take("a batch", lambda: reel(*base, f"data={prefix}data", f"trainer.out={prefix}base"))
    take("a key name", lambda: _names(f"{prefix}base/export"))


def _names(folder: str) -> None:
    from causalreel.weights.export import load_export

    load_export(folder)


def _live(walk: Walk) -> None:
    from fastapi.testclient import TestClient

    from causalreel.serve.app import create_app
    from causalreel.serve.safety import Settings

    pipeline = causalreel.load("tiny/frame-1step", device="cpu")
    with TestClient(create_app(pipeline, Settings())) as client:
        session = client.post("/v1/sessions", json={"prompt": RED, "pace": "max"}).json()["id"]
        path = f"/v1/sessions/{session}"

        def change(prompt: str) -> None:
            assert client.post(f"{path}/commands", json={"name": "prompt", "text": prompt}).status_code == 200
            while client.get(path).json()["state"]["prompt"] != prompt:
                time.sleep(0.05)

        change(RED + " slowly")
        walk.take("a live command", lambda: change(BLUE))


if __name__ == "__main__":
    main()
