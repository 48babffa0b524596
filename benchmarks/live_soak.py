"""Run live sessions for minutes and report, minute by minute, speed, chunk latency and memory.

    python benchmarks/live_soak.py --minutes 10                 one session at the model's own frame rate
    python benchmarks/live_soak.py --sessions 1 2 4 --pace max  one, then two, then four that share the model, each for
                                                                so many minutes

On a GPU with a released model (random weights will do): --model causal-forcing/chunkwise --weights random --prompts 3
also changes the prompt every so many seconds and reports the latency from the change to its first affected pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch

from causalreel.infer.accelerate import accelerate
from causalreel.infer.commands import MODES
from causalreel.infer.models import load
from causalreel.parallel.fast import PRECISIONS
from causalreel.serve.handle import Ended, Handle, Limits
from causalreel.serve.memory import steady_heap
from causalreel.serve.scheduler import Scheduler
from causalreel.serve.session import Options

PROMPTS = ("a large red circle moves right", "a small blue square moves left", "a large green triangle moves up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--weights")
    parser.add_argument("--decoder")
    parser.add_argument("--policy", help="renew, slide, or a context policy such as memrope")
    parser.add_argument("--precision", default="bf16", choices=("eager", *PRECISIONS))
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--minute", type=float, default=60, help="seconds that a row of the table covers")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1])
    parser.add_argument("--pace", default="realtime", choices=("realtime", "max"))
    parser.add_argument("--prompts", type=float, default=0, help="seconds between prompt changes; 0: none")
    parser.add_argument("--mode", default="recompute", choices=MODES)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--plain-heap", action="store_true", help="leave the C library's memory as it is")
    parser.add_argument("--output", type=Path, help="JSON")
    args = parser.parse_args()
    if not args.plain_heap:
        steady_heap()
    if args.threads:
        torch.set_num_threads(args.threads)
    given = {name: getattr(args, name) for name in ("weights", "decoder") if getattr(args, name) is not None}
    kind = args.policy if args.policy in (None, "renew", "slide") else "slide"
    pipeline = load(args.model, **given, policy=None if kind == args.policy else args.policy)
    if args.precision != "eager" and pipeline.device.type == "cuda":
        pipeline = accelerate(pipeline, precision=args.precision)
    scheduler = Scheduler(pipeline, Limits(sessions=max(args.sessions)), policy=kind)
    begun = time.monotonic()
    scheduler.start()
    while not scheduler.is_ready:
        time.sleep(0.05)
    print(f"{args}\nwarm after {time.monotonic() - begun:.1f} s; {scheduler.facts()}", flush=True)
    found = [soak(scheduler, count, args) for count in args.sessions]
    scheduler.close()
    if args.output:
        args.output.write_text(json.dumps({"args": vars(args) | {"output": None}, "found": found}, indent=1))


def soak(scheduler: Scheduler, count: int, args: argparse.Namespace) -> dict[str, Any]:
    """`count` sessions for `args.minutes` -> what they were like, minute by minute."""
    readers = [Reader(scheduler.open(Options(PROMPTS[i % 3], seed=i), pace=args.pace)) for i in range(count)]
    rows, start, done = [], time.monotonic(), threading.Event()
    if args.prompts:
        threading.Thread(target=change, args=(readers, args.prompts, args.mode, done), daemon=True).start()
    print(f"{count} session{'s' if count > 1 else ''}")
    print(
        "minute | frames/s a session | latency p50, p95, max (ms) | queue p95 (ms) | change p50, p95 (ms) | "
        "RSS, GPU MiB"
    )
    while time.monotonic() - start < args.minutes * 60:
        time.sleep(args.minute)
        rows.append(report(len(rows) + 1, readers, scheduler, args.minute))
    first_ms = [round(1000 * reader.first_s) for reader in readers]
    print("first pixels (ms):", first_ms, flush=True)
    done.set()
    for reader in readers:
        reader.handle.close()
        reader.thread.join()
    return {"sessions": count, "first_pixels_ms": first_ms, "rows": rows}


class Reader:
    """Takes chunks as they come and keeps their timings until they are reported."""

    def __init__(self, handle: Handle) -> None:
        self.handle, self.made, self.opened_s, self.first_s = handle, [], time.monotonic(), 0.0
        self.changes: list[float] = []
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self) -> None:
        after = -1
        while True:
            chunk = self.handle.pull(after, 5)
            if isinstance(chunk, Ended):
                return
            if chunk is not None:
                self.first_s = self.first_s or time.monotonic() - self.opened_s
                after = chunk.sequence
                self.made.append((len(chunk.frames), chunk.timings))
                self.changes += [c.latency_s for c in chunk.commands if c.name == "prompt"]


def change(readers: list[Reader], every_s: float, mode: str, done: threading.Event) -> None:
    turn = 0
    while True:
        for reader in readers:
            if done.wait(every_s / len(readers)):
                return
            turn += 1
            reader.handle.command("prompt", text=PROMPTS[turn % 3], mode=mode)


def report(minute: int, readers: list[Reader], scheduler: Scheduler, seconds: float) -> dict[str, Any]:
    made, changes = [], []
    for reader in readers:
        taken, reader.made = reader.made, []
        told, reader.changes = reader.changes, []
        made, changes = made + taken, changes + told
    facts = scheduler.facts()
    latency = [1000 * (t.denoise_s + t.decode_s) for _, t in made]
    row = {
        "minute": minute,
        "frames_per_s": sum(n for n, _ in made) / seconds / len(readers),
        "latency_ms": (*quantiles(latency), max(latency, default=0)),
        "queue_ms": quantiles([1000 * t.queue_s for _, t in made])[1],
        "change_ms": quantiles([1000 * s for s in changes]),
        "memory_mib": [round((facts[k] or 0) / 2**20, 1) for k in ("process_bytes", "device_bytes")],
    }
    cells = [str(minute), f"{row['frames_per_s']:.2f}", words(row["latency_ms"]), f"{row['queue_ms']:.1f}"]
    print(" | ".join([*cells, words(row["change_ms"]), str(row["memory_mib"])]), flush=True)
    return row


def quantiles(values: list[float]) -> tuple[float, float]:
    """p50 and p95."""
    if len(values) < 2:
        return (values[0], values[0]) if values else (0.0, 0.0)
    return statistics.median(values), statistics.quantiles(values, n=20)[-1]


def words(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.1f}" for value in values)


if __name__ == "__main__":
    main()
