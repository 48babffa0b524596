"""Load on a running server: many viewers at once, a third of them slow, a third dropping and coming back.

    causalreel serve --port 8000 --max-sessions 32 --requests-per-s 1000 &
    python -m benchmarks.serve_load http://127.0.0.1:8000 --clients 32 --seconds 60

Every viewer has a session of its own and checks each chunk's sequence number and first frame: none may be missing,
none twice, for those that stay and those that come back within the window. Meanwhile a process of its own asks for
/healthz ten times a second, and /metrics tells the server's memory. Exits with 1 if a number was wrong.
It only ever talks to loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from causalreel.serve.wire import unpack

PROMPTS = ("a large red circle moves right", "a blue square moves left", "a small green triangle moves up")
KINDS = ("steady", "slow", "dropping")
HEALTH = """
import http.client, json, sys, time
host, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
begin, took, failed = time.monotonic(), [], 0
while (start := time.monotonic()) < begin + seconds:
    try:
        door = http.client.HTTPConnection(host, port, timeout=30)
        door.request("GET", "/healthz")
        failed += door.getresponse().status != 200
        door.close()
    except OSError:
        failed += 1
    took.append((time.monotonic() - start, start - begin))
    time.sleep(max(0.0, start + 0.1 - time.monotonic()))
print(json.dumps([took, failed]))
"""
"""A process of its own, or the time its many viewers take here would count as the server's."""


@dataclass(frozen=True)
class Load:
    """What to do to which server."""

    base: str
    clients: int = 32
    seconds: float = 60.0
    seed: int = 0
    token: str | None = None


@dataclass
class Viewer:
    """One client and what it saw."""

    kind: str
    chunks: int = 0
    frames: int = 0
    drops: int = 0
    resumed: int = 0
    wrong: int = 0
    """Chunks that were not the next one."""
    lost: int = 0
    """Returns that came too late for the server's window."""
    gaps_s: list[float] = field(default_factory=list)
    """Between one chunk and the next, where no drop lay between them."""


@dataclass(frozen=True)
class Report:
    """What all viewers saw together."""

    chunks: int
    frames: int
    drops: int
    resumed: int
    wrong: int
    lost: int
    failed_health: int
    health_p50_s: float
    health_p99_s: float
    health_max_s: float
    health_max_at_s: float
    """Seconds after the start at which it was slowest."""
    gap_p50_s: float
    gap_p95_s: float
    rss: list[float]
    """Resident bytes of the server after a quarter, a half, three quarters and all of the time."""
    frames_per_s: dict[str, float]
    """By kind of viewer, each one's."""


async def run(load: Load) -> Report:
    """Open the sessions, watch for so long, close them."""
    where = urlsplit(load.base)
    if where.hostname not in ("127.0.0.1", "localhost", "::1"):
        raise ValueError(f"base must be a server on loopback, got {load.base!r}")
    headers = {} if load.token is None else {"authorization": f"Bearer {load.token}"}
    asking = [sys.executable, "-c", HEALTH, where.hostname, str(where.port or 80), str(load.seconds)]
    process = await asyncio.create_subprocess_exec(*asking, stdout=asyncio.subprocess.PIPE)
    async with httpx.AsyncClient(base_url=load.base, headers=headers, timeout=60) as http:
        end = time.monotonic() + load.seconds
        memory: list[float] = []
        watch = asyncio.create_task(_watch(http, memory, end))
        viewers = [Viewer(KINDS[number % 3]) for number in range(load.clients)]
        works = [_view(http, load, headers, viewer, number, end) for number, viewer in enumerate(viewers)]
        await asyncio.gather(*works)
        await watch
    answers, failed = json.loads((await process.communicate())[0])
    health = sorted(took for took, _ in answers)
    slowest, when = max(answers)
    gaps = sorted(gap for viewer in viewers if viewer.kind == "steady" for gap in viewer.gaps_s) or [0.0]
    counted = ("chunks", "frames", "drops", "resumed", "wrong", "lost")
    total = {name: sum(getattr(viewer, name) for viewer in viewers) for name in counted}
    rates = {}
    for kind in KINDS:
        of_kind = [viewer.frames for viewer in viewers if viewer.kind == kind]
        rates[kind] = sum(of_kind) / max(1, len(of_kind)) / load.seconds
    return Report(
        **total,
        failed_health=failed,
        health_p50_s=health[len(health) // 2],
        health_p99_s=health[int(0.99 * (len(health) - 1))],
        health_max_s=slowest,
        health_max_at_s=when,
        gap_p50_s=gaps[len(gaps) // 2],
        gap_p95_s=gaps[int(0.95 * (len(gaps) - 1))],
        rss=[memory[(len(memory) - 1) * part // 4] for part in (1, 2, 3, 4)],
        frames_per_s=rates,
    )


async def _view(
    http: httpx.AsyncClient, load: Load, headers: dict[str, str], viewer: Viewer, number: int, end: float
) -> None:
    chance = random.Random(load.seed * 1000 + number)
    answer = await http.post("/v1/sessions", json={"prompt": PROMPTS[number % len(PROMPTS)], "seed": number})
    answer.raise_for_status()
    session, after, frame = answer.json()["id"], -1, 0
    base = load.base.replace("http", "ws", 1)
    try:
        while time.monotonic() < end:
            stay = min(end, time.monotonic() + chance.uniform(0.5, 3)) if viewer.kind == "dropping" else end
            address = f"{base}/v1/sessions/{session}/stream?after={after}"
            # a slow viewer holds few messages, so that the server feels that he does not read
            queue = 1 if viewer.kind == "slow" else 16
            how = {"additional_headers": headers, "max_size": None, "compression": None, "close_timeout": 1}
            socket = await connect(address, max_queue=queue, **how)
            viewer.resumed += after >= 0
            after, frame, is_lost = await _watch_stream(socket, viewer, chance, after, frame, stay)
            if is_lost:
                viewer.lost += 1
                return
            if time.monotonic() < end:
                viewer.drops += 1
                if chance.random() < 0.5:
                    socket.transport.abort()  # as when a cable is pulled
                else:
                    await socket.close()
                await asyncio.sleep(chance.uniform(0, 0.5))
            else:
                await socket.close()
    finally:
        with contextlib.suppress(httpx.HTTPError):
            await http.delete(f"/v1/sessions/{session}")


async def _watch_stream(
    socket: Any, viewer: Viewer, chance: random.Random, after: int, frame: int, stay: float
) -> tuple[int, int, bool]:
    """Read until `stay` -> last sequence number, next frame, whether the server had lost the place."""
    last = None
    while (left := stay - time.monotonic()) > 0:
        try:
            got = await asyncio.wait_for(socket.recv(), left)
        except (asyncio.TimeoutError, WebSocketException):
            break
        if isinstance(got, str):
            if json.loads(got).get("code") == "lost":
                return after, frame, True
            continue
        header, _ = unpack(got)
        viewer.wrong += header["sequence"] != after + 1 or header["first_frame"] != frame
        after, frame = header["sequence"], header["first_frame"] + header["frames"]
        viewer.chunks, viewer.frames = viewer.chunks + 1, viewer.frames + header["frames"]
        now = time.monotonic()
        if last is not None:
            viewer.gaps_s.append(now - last)
        last = now
        if viewer.kind == "slow":
            await asyncio.sleep(chance.uniform(0.5, 1.5))
    return after, frame, False


async def _watch(http: httpx.AsyncClient, memory: list[float], end: float) -> None:
    """Ask every two seconds how much memory the server holds."""
    while time.monotonic() < end:
        text = (await http.get("/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith("process_resident_memory_bytes ")]
        memory += [float(line.split()[1]) for line in lines]
        await asyncio.sleep(2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--token")
    report = asyncio.run(run(Load(**vars(parser.parse_args()))))
    print(json.dumps(asdict(report), indent=1))
    return 1 if report.wrong or report.lost or report.failed_health else 0


if __name__ == "__main__":
    sys.exit(main())
