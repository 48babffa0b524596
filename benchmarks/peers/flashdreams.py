"""FlashDreams beside us: its Causal-Forcing inference timed on this machine, with random weights.

    python benchmarks/peers/flashdreams.py --json flashdreams.json

Wan2.1-T2V-1.3B at 480x832, batch 1, bfloat16, 21 latent frames, text excluded. Every group of settings runs in a
process of its own, because a compiled network met with a second chunk size would be compiled again for dynamic shapes.
What is stubbed, what is changed and why that is fair stands in README.md beside this file. FlashDreams itself is not
part of this project; where it is not installed, or there is no GPU, one line says so and the exit status is 0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # this file bears the peer's name: its folder must not be searched for the peer
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parents[1]), *(entry for entry in sys.path if Path(entry or ".").resolve() != here)]

from benchmarks.peers.flashdreams_settings import DEFAULT_SETTINGS, SETTINGS, VERSION, Options, Work

RECORD = "RECORD "
"""Begins the lines by which a group's process hands its results over."""

# ---- all groups, one process after the other -------------------------------------------------------------------------


def run_groups(
    names: Sequence[str], command: Callable[[list[str]], list[str]], budget_s: float
) -> Iterator[dict[str, Any]]:
    """Start `command(settings)` for each group in turn and yield the records it prints, within `budget_s` in all."""
    deadline = time.monotonic() + budget_s
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(SETTINGS[name].group, []).append(name)
    for members in groups.values():
        missing, left = list(members), deadline - time.monotonic()
        reason = f"not started: {budget_s:.0f} s are spent"
        if left > 0:
            status = -1
            for record in run_process(command(members), left):
                status = record.pop("exit status", status)
                if record.get("setting") in missing:
                    missing.remove(record["setting"])
                if record:
                    yield record
            reason = f"its process ended with status {status}" + (
                ", out of time" if time.monotonic() > deadline else ""
            )
        for name in missing:
            yield {"setting": name, "status": "failed", "error": reason}


def run_process(command: list[str], limit_s: float) -> Iterator[dict[str, Any]]:
    """Run `command`: record lines come as dicts, the rest is passed on; at `limit_s` its whole session is killed."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    timer = threading.Timer(limit_s, end_session, (process,))
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(RECORD):
                yield json.loads(line[len(RECORD) :])
            else:
                print(line, end="", flush=True)
        yield {"exit status": process.wait()}
    finally:
        timer.cancel()
        if process.poll() is None:
            end_session(process)


def end_session(process: subprocess.Popen[str]) -> None:
    """Kill the process and the compile workers it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def line_of(record: dict[str, Any]) -> str:
    """One line for the terminal."""
    name = record.get("setting", "")
    if record.get("kind") == "environment":
        versions = f"flashdreams {record['version']} on {record['device']}, torch {record['torch']}"
        return f"{versions}; stubbed: {', '.join(record['stubbed']) or 'nothing'}"
    if record["status"] != "ok":
        return f"{name}: {record['status']}: {record['error']}"
    peak = f", peak {record['peak_gib']:.1f} GiB" if record["peak_gib"] is not None else ""
    tail = f"{peak}, warm-up {record['warmup_s']:.0f} s, {record['graphs_compiled_while_timing']} graphs compiled late"
    if record["kind"] == "decoder":
        return (
            f"{name} ({record['variant']}): {record['steady_ms_per_latent']:.2f} ms a latent frame, first chunk"
            f" {record['first_chunk_ms']:.1f}, clip {record['clip_ms']:.0f} ms{tail}"
        )
    every = " ".join(f"{ms:.0f}" for ms in record["rollouts_ms"])
    pixels = record.get("first_pixels_wan_vae_ms")
    return (
        f"{name} ({record['variant']}): {record['rollout_ms']:.0f} ms ({every}), without the last update"
        f" {record['without_last_update_ms']:.0f}, block 1 / 2 / last {record['block_1_ms']:.1f} /"
        f" {record['block_2_ms']:.1f} / {record['block_last_ms']:.1f} ms, {record['pixel_fps']:.1f} pixel FPS"
        + (f", first pixels {pixels:.1f} ms" if pixels is not None else "")
        + tail
    )


def sums(results: list[dict[str, Any]], work: Work) -> list[dict[str, Any]]:
    """Generation and decoding of one chunk size added up, as the package runs them: one after the other.

    Decoding is counted at its steady rate from the second chunk on: warm-up and graph capture are left out, which
    favours the package.
    """
    rows = {
        kind: [r for r in results if r["status"] == "ok" and r["kind"] == kind] for kind in ("generator", "decoder")
    }
    added = []
    for generated in rows["generator"]:
        for decoded in rows["decoder"]:
            chunk = SETTINGS[generated["setting"]].chunk
            if SETTINGS[decoded["setting"]].chunk != chunk:
                continue
            decode_ms = decoded["first_chunk_ms"] + (work.frames - chunk) * decoded["steady_ms_per_latent"]
            row = {"settings": [generated["setting"], decoded["setting"]]}
            row["pixel_fps"] = 1000 * work.pixel_frames / (generated["rollout_ms"] + decode_ms)
            row["first_pixels_ms"] = generated["block_1_denoise_ms"] + decoded["first_chunk_ms"]
            added.append(row)
    return added


def write_json(path: Path, value: Any) -> None:
    """Write to a temporary name beside `path`, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="Time FlashDreams' Causal-Forcing inference with random weights.")
    made.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(DEFAULT_SETTINGS))
    made.add_argument("--mode", choices=["compiled", "eager"], default="compiled")
    made.add_argument(
        "--graph-breaks",
        choices=["auto", "keep", "remove"],
        default="auto",
        help="torch.sym_min and sym_max in its KV cache; auto removes them where that is faster: frame-wise",
    )
    made.add_argument("--compile-mode", default="", help="a torch.compile mode in place of the package's own")
    made.add_argument("--latent-frames", type=int, default=21, help="more than 21 reaches the CUDA-graph steady state")
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--warmup", type=int, default=2, help="rollouts before the timed ones, compilation included")
    made.add_argument("--budget-s", type=float, default=290.0, help="seconds for everything; the rest is not started")
    made.add_argument("--json", type=Path, help="where the results go; rewritten after each")
    made.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    return made


def absent_because() -> str:
    """Why FlashDreams cannot be timed here; empty if it can."""
    if importlib.util.find_spec("flashdreams") is None:
        return f"not installed (pip install flashdreams=={VERSION})"
    import torch

    return "" if torch.cuda.is_available() else "no CUDA GPU"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 when all settings gave numbers or the peer is absent, 1 when one failed."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser().parse_args(given)
    for name, least in (("latent_frames", 3), ("repeats", 1), ("warmup", 1)):
        if getattr(arguments, name) < least:
            parser().error(f"--{name.replace('_', '-')}: {getattr(arguments, name)} is below {least}")
    if arguments.latent_frames % 3:
        parser().error(f"--latent-frames: {arguments.latent_frames} is not a multiple of 3")
    options = Options(
        compiled=arguments.mode == "compiled",
        graph_breaks=arguments.graph_breaks,
        compile_mode=arguments.compile_mode,
        repeats=arguments.repeats,
        warmup=arguments.warmup,
    )
    work = Work(frames=arguments.latent_frames)
    if reason := absent_because():
        print(f"flashdreams: {reason}; skipped", flush=True)
        if arguments.json and not arguments.in_process:
            write_json(arguments.json, {"peer": "flashdreams", "skipped": reason, "results": []})
        return 0
    if arguments.in_process:
        from benchmarks.peers.flashdreams_timing import run_group

        for record in run_group([SETTINGS[name] for name in arguments.settings], work, options):
            print(RECORD + json.dumps(record), flush=True)
        return 0
    return collect(arguments, given, work, options)


def collect(arguments: argparse.Namespace, given: list[str], work: Work, options: Options) -> int:
    """Run the groups' processes, print each record and keep the JSON up to date -> exit status."""

    def command(members: list[str]) -> list[str]:
        return [sys.executable, str(Path(__file__).resolve()), *given, "--in-process", "--settings", *members]

    report: dict[str, Any] = {"peer": "flashdreams", "work": asdict(work), "options": asdict(options)}
    environments: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    report |= {"environments": environments, "results": results}
    for record in run_groups(arguments.settings, command, arguments.budget_s):
        (environments if record.get("kind") == "environment" else results).append(record)
        print(line_of(record), flush=True)
        report["sums"] = sums(results, work)
        if arguments.json:
            write_json(arguments.json, report)
    for row in sums(results, work):
        speed = f"{row['pixel_fps']:.1f} pixel FPS, first pixels {row['first_pixels_ms']:.1f} ms"
        print(f"{' + '.join(row['settings'])}, added up: {speed}", flush=True)
    return int(any(record["status"] != "ok" for record in results))


if __name__ == "__main__":
    sys.exit(main())
