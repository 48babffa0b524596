"""A server that is killed in any phase of its work, or whose disk is really full: what a restart on the same folder
finds, and what clients are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra causalreel[serve]")

from patience import PATIENCE_S
from served import RED, serving, small_pipeline, wait_for

KILLED = """
import os, signal, socket, sys, time
from pathlib import Path
import httpx
from causalreel.serve import jobs
from causalreel.serve.scheduler import Limits
from causalreel.serve.store import Store
from patience import wait_until
from served import RED, listening, small_pipeline

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def after_row():
    real = Store.add
    Store.add = lambda *a, **k: (real(*a, **k), die())

def recording(is_before):
    real = jobs.Jobs._record
    def record(self):
        is_told = bool(self.outcomes)
        is_told and is_before and die()
        real(self)
        is_told and die()
    jobs.Jobs._record = record

def half_way():
    real = jobs.write_video
    def write(path, frames, fps, **how):
        def some():
            yield next(frames)
            yield next(frames)
            die()
        return real(path, some(), fps, **how)
    jobs.write_video = write

def video(place, frames=21):
    return httpx.post(f"http://{place}/v1/videos", json={"prompt": RED, "frames": frames}, timeout=None).json()["id"]

def wait(place, name, status):
    wait_until(lambda: httpx.get(f"http://{place}/v1/videos/{name}").json()["status"] == status, status)

def upload(place):
    host, port = place.split(":")
    raw = socket.create_connection((host, int(port)))
    head = "POST /v1/videos HTTP/1.1", "host: h", "content-type: application/json", "content-length: 200000", "", ""
    raw.sendall("\\r\\n".join(head).encode() + b'{"prompt": "' + b"a" * 100_000)
    httpx.get(f"http://{place}/healthz")
    die()

def ask(place):
    video(place)
    time.sleep(600)

def delete(place):
    name = video(place, 5)
    wait(place, name, "completed")
    Path.unlink = die
    httpx.delete(f"http://{place}/v1/videos/{name}")

def cancel(place):
    name = video(place, 997)
    wait(place, name, "in_progress")
    httpx.delete(f"http://{place}/v1/videos/{name}")
    die()

def session(place):
    for _ in range(2):
        one = httpx.post(f"http://{place}/v1/sessions", json={"prompt": RED}, timeout=None).json()["id"]
    wait_until(lambda: httpx.get(f"http://{place}/v1/sessions/{one}").json()["state"]["sequence"] > 1, "chunks")
    die()

PHASES = {
    "upload": (lambda: None, upload),
    "row written": (after_row, ask),
    "job running": (half_way, ask),
    "file written and not its row": (lambda: recording(True), ask),
    "row of the file written": (lambda: recording(False), ask),
    "deleted, its row and not its file": (lambda: None, delete),
    "cancelled": (lambda: None, cancel),
    "session live": (lambda: None, session),
}
pipeline = small_pipeline()
for number, (name, (prepare, do)) in enumerate(PHASES.items()):
    if (pid := os.fork()) == 0:
        prepare()
        with listening(pipeline, Limits(), data=Path(sys.argv[1]) / str(number)) as place:
            do(place)
        os._exit(0)
    print(name, os.WTERMSIG(os.waitpid(pid, 0)[1]), sep="\\t", flush=True)
"""


def run(program: str, *arguments: object, before: list[str] | None = None) -> str:
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [*(before or []), sys.executable, "-c", program, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def files(folder: Path) -> set[str]:
    """What is in a server's folder besides its database and its lock."""
    return {path.name for path in folder.iterdir() if not path.name.startswith(("videos.", "lock"))}


LEFT = {
    "upload": [],
    "row written": ["queued"],
    "job running": ["interrupted"],
    "file written and not its row": ["completed"],
    "row of the file written": ["completed"],
    "deleted, its row and not its file": [],
    "cancelled": ["cancelled"],
    "session live": [],
}
"""Phase of the kill -> statuses that the restart finds."""


def test_a_restart_after_a_kill_in_any_phase_leaves_nothing_half_done(tmp_path: Path) -> None:
    """Nothing is in progress for ever, no file without its record, no record without its file; and work goes on."""
    killed = [line.split("\t") for line in run(KILLED, tmp_path).splitlines()]
    assert killed == [[name, "9"] for name in LEFT]
    pipeline = small_pipeline()
    for number, (name, statuses) in enumerate(LEFT.items()):
        folder = tmp_path / str(number)
        with serving(pipeline, data=folder) as client:
            rows = client.get("/v1/videos").json()["data"]
            assert len(rows) == len(statuses), name
            for row, status in zip(rows, statuses, strict=True):
                if status == "queued":  # and made by now, perhaps
                    row, status = wait_for(client, row["id"], "completed"), "completed"
                assert row["status"] == status, name
                if status == "completed":
                    answer = client.get(f"/v1/videos/{row['id']}/content")
                    assert answer.status_code == 200 and len(answer.content) == row["bytes"], name
            rows = client.get("/v1/videos").json()["data"]
            assert files(folder) == {f"{row['id']}.mp4" for row in rows if row["status"] == "completed"}, name
            new = client.post("/v1/videos", json={"prompt": RED, "frames": 5}).json()["id"]
            wait_for(client, new, "completed")


FULL = """
import json, os, subprocess, sys
from pathlib import Path
folder = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], check=True)
from causalreel.cli import main
from causalreel.serve.scheduler import Limits
from served import RED, serving, small_pipeline, wait_for

said, filler = {}, folder / "filler"

def fill(leave):
    with open(filler, "ab", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            file.truncate(max(0, file.tell() - leave))

def statuses(client):
    return sorted(row["status"] for row in client.get("/v1/videos").json()["data"])

def ask(client, frames):
    return client.post("/v1/videos", json={"prompt": RED, "frames": frames})

with serving(small_pipeline(), data=folder) as client:
    wait_for(client, ask(client, 5).json()["id"], "completed")
    session = client.post("/v1/sessions", json={"prompt": RED}).json()["id"]
    fill(24 << 10)  # room for the row, not for the video
    row = wait_for(client, ask(client, 997).json()["id"], "failed", "completed")
    said["video"] = [row["status"], row["error"]]
    fill(0)
    answers = [ask(client, 5) for _ in range(30)]
    said["rows"] = sorted({(a.status_code, a.json().get("error", {}).get("code")) for a in answers}, key=str)
    said["alive"] = [client.get("/healthz").status_code, client.get(f"/v1/sessions/{session}").status_code]
    said["record"] = client.get(f"/v1/sessions/{session}/record").status_code
    said["stream"] = main(["stream", "--model", "tiny/frame-1step", "--device", "cpu", "--frames", "9", "-o", "-",
        "--pipe", "rgb24", "--record", str(folder / "r.json")]) if os.dup2(os.open(os.devnull, os.O_WRONLY), 9) else 0
    said["half"] = [path.name for path in folder.iterdir() if path.name.startswith(".") or path.suffix == ".json"]
    filler.unlink()
    for row in client.get("/v1/videos").json()["data"]:
        wait_for(client, row["id"], "completed", "failed")
    wait_for(client, ask(client, 5).json()["id"], "completed")
    said["after"] = sorted(set(statuses(client)))
    kept = {row["id"] + ".mp4" for row in client.get("/v1/videos").json()["data"] if row["status"] == "completed"}
    said["orphans"] = sorted({path.name for path in folder.glob("*.mp4")} ^ kept)
sys.stderr.write(json.dumps(said))
"""


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A small file system of its own: a video that does not fit has failed, rows that do not fit are 507, a replay file
    is not half written; sessions go on, and so does everything once there is room."""
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    try:
        subprocess.run([*space, "mount", "-t", "tmpfs", "tmpfs", tmp_path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a system where a process may mount a file system of its own")
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [*space, sys.executable, "-c", FULL, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:].decode()
    said: dict[str, Any] = json.loads(done.stderr.decode().splitlines()[-1])
    assert said["video"][0] == "failed" and said["video"][1]["code"] == "storage"
    assert [507, "storage"] in said["rows"] and all(status in (202, 429, 507) for status, _ in said["rows"])
    assert said["alive"] == [200, 200] and said["record"] == 200
    assert said["stream"] == 1 and said["half"] == []
    assert said["after"] == ["completed", "failed"] and said["orphans"] == []
