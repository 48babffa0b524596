"""Two replicas on Ray Serve, each an application with a route of its own; on this machine, where Ray is installed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="needs the extra causalreel[serve]")
pytest.importorskip("websockets", reason="needs the extra causalreel[serve]")

import httpx

from causalreel.serve.ray_app import Replica, build
from patience import PATIENCE_S
from test_replicas import KNOWN, RED, TOKEN, chunks, free_ports


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    ray = pytest.importorskip("ray", reason="needs the extra causalreel[ray]")
    serve = pytest.importorskip("ray.serve", reason="needs the extra causalreel[ray]")
    (port,) = free_ports(1)
    (tmp_path / "token").write_text(TOKEN)
    where = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    size = {"num_cpus": 4, "object_store_memory": 100 << 20, "include_dashboard": False}
    ray.init(**size, runtime_env={"env_vars": where}, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        for name in "ab":
            fields = {"model": "tiny/frame-1step", "replica": name, "gpus": 0, "token_file": str(tmp_path / "token")}
            serve.run(build(fields), name=name, route_prefix=f"/{name}")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.mark.slow
def test_each_replica_serves_its_sessions_at_its_route(url: str) -> None:
    sessions = {}
    for name in "ab":
        at = f"{url}/{name}"
        assert httpx.get(f"{at}/healthz").json() == {"ok": True}
        assert httpx.get(f"{at}/v1/sessions").status_code == 401
        opened = httpx.post(f"{at}/v1/sessions", json={"prompt": RED, "fps": 60}, headers=KNOWN, timeout=PATIENCE_S)
        assert opened.status_code == 201, opened.text
        sessions[name] = opened.json()["id"]
        assert sessions[name].startswith(f"{name}-")
        seen = [header["sequence"] for header in chunks(at, sessions[name], 6)]
        seen += [header["sequence"] for header in chunks(at, sessions[name], 4, after=seen[-1])]
        assert seen == list(range(10))
    listed = httpx.get(f"{url}/a/v1/sessions", headers=KNOWN).json()["data"]
    assert [session["id"] for session in listed] == [sessions["a"]]
    assert httpx.get(f"{url}/a/v1/sessions/{sessions['b']}", headers=KNOWN).status_code == 404


@pytest.mark.parametrize("fields", [{"replica": "A"}, {"gpus": -1}, {"sessions": 0}, {"models": "tiny"}])
def test_replicas_are_described_strictly(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Replica.model_validate(fields)
