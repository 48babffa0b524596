"""Two servers behind a stock reverse proxy, as `examples/nginx.conf` has it: three processes, on loopback."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra causalreel[serve]")
pytest.importorskip("websockets", reason="needs the extra causalreel[serve]")

import httpx
from websockets.sync.client import connect

from causalreel.serve.safety import Settings
from causalreel.serve.wire import unpack
from patience import PATIENCE_S, wait_until

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "nginx.conf"
RED, BLUE = "a large red circle moves right", "a blue square moves left"
TOKEN = "open-sesame"
KNOWN = {"authorization": f"Bearer {TOKEN}"}

needs_nginx = pytest.mark.skipif(NGINX is None, reason="nginx is not installed")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on just now."""
    doors = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [door.getsockname()[1] for door in doors]
    for door in doors:
        door.close()
    return ports


@dataclass(frozen=True)
class Site:
    """A proxy and what stands behind it."""

    url: str
    replicas: dict[str, subprocess.Popen[bytes]]
    direct: dict[str, str]

    def open(self, http: httpx.Client, **options: Any) -> httpx.Response:
        return http.post("/v1/sessions", json={"prompt": RED, "fps": 60, **options})


def start_replica(name: str, port: int, folder: Path) -> subprocess.Popen[bytes]:
    token = folder / "token"
    token.write_text(TOKEN)
    words = ["--model", "tiny/frame-1step", "--port", str(port), "--replica", name, "--behind-proxy"]
    words += ["--max-sessions", "2", "--token-file", str(token), "--data", str(folder / name), "--device", "cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with open(folder / f"{name}.log", "wb") as log:
        return subprocess.Popen([sys.executable, "-m", "causalreel", "serve", *words], env=env, stdout=log, stderr=log)


def start_proxy(folder: Path, ports: dict[str, int]) -> subprocess.Popen[bytes]:
    """nginx with the example as it is but for the ports, and without rights or files of its own outside the folder."""
    text = EXAMPLE.read_text(encoding="utf-8")
    for old, new in ports.items():
        assert f"127.0.0.1:{old}" in text
        text = text.replace(f"127.0.0.1:{old}", f"127.0.0.1:{new}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    scratch = "".join(f"{kind}_temp_path {folder / kind};\n" for kind in kinds)
    head = f"daemon off; master_process off; pid {folder / 'pid'}; error_log {folder / 'nginx.log'};\nevents {{}}\n"
    conf = folder / "nginx.conf"
    conf.write_text(f"{head}http {{\naccess_log off;\n{scratch}{text}}}\n")
    assert NGINX is not None
    checked = subprocess.run([NGINX, "-t", "-p", str(folder), "-c", str(conf)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    return subprocess.Popen([NGINX, "-p", str(folder), "-c", str(conf)])


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    def is_ready() -> bool:
        if process.poll() is not None:
            pytest.fail(f"{url} has ended: {log.read_text()[-2000:] if log.exists() else 'no log'}")
        try:
            return httpx.get(f"{url}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    wait_until(is_ready, url, every_s=0.1)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    tmp_path = tmp_path_factory.mktemp("site")
    a, b, front = free_ports(3)
    replicas = {"a": start_replica("a", a, tmp_path), "b": start_replica("b", b, tmp_path)}
    proxy = start_proxy(tmp_path, {"8001": a, "8002": b, "8000": front})
    direct = {"a": f"http://127.0.0.1:{a}", "b": f"http://127.0.0.1:{b}"}
    try:
        for name, process in replicas.items():
            wait_until_ready(direct[name], process, tmp_path / f"{name}.log")
        url = f"http://127.0.0.1:{front}"
        wait_until_ready(url, proxy, tmp_path / "nginx.log")
        yield Site(url, replicas, direct)
    finally:
        for process in (proxy, *replicas.values()):
            stop(process)


def chunks(url: str, session: str, count: int, after: int = -1) -> Iterator[dict[str, Any]]:
    """Headers of the chunks behind `after`, then the connection is dropped."""
    address = f"{url.replace('http', 'ws')}/v1/sessions/{session}/stream?after={after}"
    with connect(address, additional_headers=KNOWN, max_size=None) as stream:
        while count:
            message = stream.recv(timeout=PATIENCE_S)
            if isinstance(message, bytes):
                yield unpack(message)[0]
                count -= 1


@needs_nginx
def test_videos_are_found_through_the_proxy(site: Site) -> None:
    with httpx.Client(base_url=site.url, headers=KNOWN, timeout=PATIENCE_S) as http:
        asked = [http.post("/v1/videos", json={"prompt": RED, "seed": seed}) for seed in (1, 2)]
        assert [answer.status_code for answer in asked] == [202, 202], [answer.text for answer in asked]
        videos = [answer.json()["id"] for answer in asked]
        assert {re.fullmatch(r"video_([ab])-[0-9a-f]+", video).group(1) for video in videos} == {"a", "b"}
        for video in videos:
            status = lambda video=video: http.get(f"/v1/videos/{video}").json()["status"]  # noqa: E731
            wait_until(lambda status=status: status() == "completed", video, every_s=0.1)  # requests are limited
            content = http.get(f"/v1/videos/{video}/content")
            assert content.headers["content-type"] == "video/mp4", content.text
            assert content.content[4:8] == b"ftyp"


@needs_nginx
def test_sessions_stay_with_their_replica_and_outlive_the_other_one(site: Site) -> None:
    """The last one to use the site, since it kills a replica."""
    with httpx.Client(base_url=site.url, headers=KNOWN, timeout=PATIENCE_S) as http:
        assert httpx.get(f"{site.url}/v1/sessions").status_code == 401
        opened = [site.open(http) for _ in range(4)]
        assert [answer.status_code for answer in opened] == [201] * 4, [answer.text for answer in opened]
        sessions = [answer.json()["id"] for answer in opened]
        assert sorted(session.split("-")[0] for session in sessions) == ["a", "a", "b", "b"], "not spread evenly"
        full = site.open(http)
        assert (full.status_code, full.json()["error"]["code"]) == (503, "busy")

        one = {session[0]: session for session in sessions}  # one session of each replica
        for name, session in one.items():
            assert http.get(f"/v1/sessions/{session}").json()["id"] == session
            other = site.direct["b" if name == "a" else "a"]
            assert httpx.get(f"{other}/v1/sessions/{session}", headers=KNOWN).status_code == 404
            seen = [header["sequence"] for header in chunks(site.url, session, 6)]
            told = http.post(f"/v1/sessions/{session}/commands", json={"name": "prompt", "text": BLUE})
            assert (told.status_code, told.json()["number"]) == (200, 1)
            resumed = list(chunks(site.url, session, 10, after=seen[-1]))
            assert seen + [header["sequence"] for header in resumed] == list(range(16))
            assert resumed[-1]["prompt"] == BLUE
            assert [command["number"] for header in resumed for command in header["commands"]] == [1]
        assert http.get("/v1/sessions/c-0123").status_code == 404
        assert http.get("/metrics").status_code == 404
        assert httpx.get(f"{site.direct['a']}/metrics", headers=KNOWN).status_code == 200

        for session in sessions:
            if session not in one.values():
                assert http.delete(f"/v1/sessions/{session}").status_code == 200
        site.replicas["a"].send_signal(signal.SIGKILL)
        site.replicas["a"].wait()
        assert http.get(f"/v1/sessions/{one['a']}").status_code == 502
        after = http.get(f"/v1/sessions/{one['b']}").json()["state"]["sequence"] - 1
        assert [header["sequence"] for header in chunks(site.url, one["b"], 3, after=after)] == [
            after + 1,
            after + 2,
            after + 3,
        ]
        again = site.open(http)
        assert again.status_code == 201, again.text
        assert again.json()["id"].startswith("b-")


@pytest.mark.parametrize("name", ["", "A", "a-b", "a/b", "x" * 17, "a\n"])
def test_names_of_replicas_that_a_proxy_could_not_tell_apart_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="replica must be 1 to 16 small letters and digits"):
        Settings(replica=name)
