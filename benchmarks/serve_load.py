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
import http.client, json, select, sys, time
host, port = sys.argv[1], int(sys.argv[2])
begin, took, failed, ended = time.monotonic(), [], 0, []
while not ended:
    start = time.monotonic()
    try:
        door = http.client.HTTPConnection(host, port, timeout=300)
        door.request("GET", "/healthz")
        failed += door.getresponse().status != 200
        door.close()
    except OSError:
        failed += 1
    took.append((time.monotonic() - start, start - begin))
    ended = select.select([sys.stdin], [], [], max(0.0, start + 0.1 - time.monotonic()))[0]
print(json.dumps([took, failed]))
"""
"""A process of its own, or the time its many viewers take here would count as the server's; ends with its input."""


@dataclass(frozen=True)
class Load:
    """What to do to which server."""

    base: str
    clients: int = 32
    seconds: float = 60.0
    chunks: int | None = None
    """In place of seconds: until every viewer has seen so many, and the dropping ones have come back twice."""
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

    def has_seen(self, chunks: int | None) -> bool:
        came_back = self.kind != "dropping" or self.resumed > 1
        return chunks is not None and self.chunks >= chunks and came_back


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
    asking = [sys.executable, "-c", HEALTH, where.hostname, str(where.port or 80)]
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(*asking, **pipes)
    begin = time.monotonic()
    async with httpx.AsyncClient(base_url=load.base, headers=headers, timeout=300) as http:
        end = float("inf") if load.chunks else begin + load.seconds
        memory, is_over = [], asyncio.Event()
        watch = asyncio.create_task(_watch(http, memory, is_over))
        viewers = [Viewer(KINDS[number % 3]) for number in range(load.clients)]
        works = [_view(http, load, headers, viewer, number, end) for number, viewer in enumerate(viewers)]
        await asyncio.gather(*works)
        took_s = time.monotonic() - begin
        is_over.set()
        await watch
    answers, failed = json.loads((await process.communicate(b""))[0])
    health = sorted(took for took, _ in answers)
    slowest, when = max(answers)
    gaps = sorted(gap for viewer in viewers if viewer.kind == "steady" for gap in viewer.gaps_s) or [0.0]
    counted = ("chunks", "frames", "drops", "resumed", "wrong", "lost")
    total = {name: sum(getattr(viewer, name) for viewer in viewers) for name in counted}
    rates = {}
    for kind in KINDS:
        of_kind = [viewer.frames for viewer in viewers if viewer.kind == kind]
        rates[kind] = sum(of_kind) / max(1, len(of_kind)) / took_s
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
        while time.monotonic() < end and not viewer.has_seen(load.chunks):
            stay = min(end, time.monotonic() + chance.uniform(0.5, 3)) if viewer.kind == "dropping" else end
            address = f"{base}/v1/sessions/{session}/stream?after={after}"
            # a slow viewer holds few messages, so that the server feels that he does not read
            queue = 1 if viewer.kind == "slow" else 16
            how = {"additional_headers": headers, "max_size": None, "compression": None, "close_timeout": 1}
            socket = await connect(address, max_queue=queue, **how)
            viewer.resumed += after >= 0
            after, frame, is_lost = await _watch_stream(socket, viewer, chance, after, frame, stay, load.chunks)
            if is_lost:
                viewer.lost += 1
                return
            if time.monotonic() < end and not viewer.has_seen(load.chunks):
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
    socket: Any, viewer: Viewer, chance: random.Random, after: int, frame: int, stay: float, chunks: int | None
) -> tuple[int, int, bool]:
    """Read until `stay` or enough is seen -> last sequence number, next frame, whether the server lost the place."""
    last = None
    while (left := stay - time.monotonic()) > 0 and not viewer.has_seen(chunks):
        try:
            got = await asyncio.wait_for(socket.recv(), None if left == float("inf") else left)
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


async def _watch(http: httpx.AsyncClient, memory: list[float], is_over: asyncio.Event) -> None:
    """Ask every two seconds how much memory the server holds."""
    while True:
        text = (await http.get("/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith("process_resident_memory_bytes ")]
        memory += [float(line.split()[1]) for line in lines]
        if is_over.is_set():
            return
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(is_over.wait(), 2)


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
