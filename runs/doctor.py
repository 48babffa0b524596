"""Curves of healthy runs for `causalreel doctor`, and ten broken runs that it must notice.

    python runs/doctor.py --out runs/doctor                 one GPU (or several): about 15 minutes
    python runs/doctor.py --out /tmp/doctor --smoke         in miniature on a CPU: proves the plumbing, nothing else

Every tiny recipe is begun with three seeds, whose metrics become bands (`<out>/curves.json`, which the package takes as
train/doctor/curves.json). Three other seeds must then look healthy and ten runs with a fault each must not
(`<out>/verdicts.md`, `verdicts.json`; status 1 if one is missed or falsely accused). The runs are short and keep their
recipe's own batch; learning rates stay where a whole run begins. Stopped and started again it goes on; after --minutes
no further run begins, and what there is then is judged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from causalreel import config
from causalreel.data.shards import load_prepared
from causalreel.files import write_text
from causalreel.train.doctor import curves
from causalreel.train.doctor.files import read_run
from causalreel.train.doctor.report import examine
from causalreel.train.optim import RoleOptimiser
from causalreel.weights.files import write_tensors

BANDS, TESTS = (0, 1, 2), (3, 4, 5)
"""Seeds that make the bands, and others that must lie in them."""

STEPS = {"base": 160, "ar": 160, "ode": 160, "cd": 160, "dmd": 40}


@dataclass(frozen=True)
class Job:
    """A short run of a recipe."""

    name: str
    recipe: str
    more: tuple[str, ...]
    """Overrides."""
    seed: int = 0
    needs: tuple[str, ...] = ()
    """Jobs whose exports it starts from."""
    patch: str = ""
    """A fault that no setting makes: `bfloat16 masters`, or `noisy context` in the export alone."""


# ---- what is run


class Bench:
    """All jobs, at the recipes' own size or in miniature."""

    def __init__(self, out: Path, *, is_smoke: bool) -> None:
        self.out, self.is_smoke = out, is_smoke
        embedded = {"base": "tiny/base", "ar-frame": "tiny/ar", "ar-chunk": "tiny/ar-chunk"}
        made = ("base", "ar-frame", "ar-chunk", "ode-frame", "ode-chunk") if is_smoke else ("ode-frame", "ode-chunk")
        self.places = {**embedded, **{name: str(out / f"start-{name}" / "export") for name in made}}
        self.made = made

    def init(self, **roles: str) -> tuple[str, ...]:
        return tuple(f"init.{role}={self.places[name]}" for role, name in roles.items())

    def kinds(self) -> dict[str, Job]:
        """A healthy run of every kind."""
        steps, every = (STEPS, 10) if not self.is_smoke else (dict.fromkeys(STEPS, 16) | {"dmd": 6}, 4)
        found = {}

        def add(name: str, stage: str, recipe: str, *more: str, **roles: str) -> None:
            half = steps[stage] // 2
            log, probe = every if stage != "dmd" else max(2, every // 5), half if self.is_smoke else half // 2
            often = (f"trainer.steps={steps[stage]}", f"trainer.log_every={log}", f"trainer.save_every={half}")
            often += (
                f"trainer.probe_every={probe}",
                f"trainer.preview_every={half if stage == 'dmd' and not self.is_smoke else 0}",
            )
            needs = tuple(f"start-{name}" for name in dict.fromkeys(roles.values()) if name in self.made)
            found[name] = Job(name, recipe, (*often, *more, *self.small(stage), *self.init(**roles)), needs=needs)

        ode = ("settings.pairs=512",)
        add("base", "base", "tiny/base", *(["model=tiny-smoke"] if self.is_smoke else []))
        add("ar-frame", "ar", "tiny/ar", student="base")
        add("ar-chunk", "ar", "tiny/ar", "settings.chunk=3", student="base")
        add("ode-frame", "ode", "tiny/causal_ode", *ode, student="ar-frame", teacher="ar-frame")
        add("ode-chunk", "ode", "tiny/causal_ode_chunk", *ode, student="ar-chunk", teacher="ar-chunk")
        add("cd-frame", "cd", "tiny/causal_cd", student="ar-frame", teacher="ar-frame")
        add("cd-chunk", "cd", "tiny/causal_cd", "settings.chunk=3", student="ar-chunk", teacher="ar-chunk")
        add("dmd-frame", "dmd", "tiny/dmd", student="ode-frame", critic="base", teacher="base")
        add("dmd-chunk", "dmd", "tiny/dmd_chunk", student="ode-chunk", critic="base", teacher="base")
        return found

    def small(self, stage: str) -> tuple[str, ...]:
        """What makes it miniature."""
        if not self.is_smoke:
            return ()
        more = {"ode": ("settings.pairs=16", "settings.grid=4", "settings.keep=[0,1,2,3]", "settings.guidance=1.5")}
        few = ("settings.critic_updates=2",) if stage == "dmd" else ()
        return ("settings.batch=8", "trainer.device=cpu", *more.get(stage, ()), *few)

    def starts(self) -> list[Job]:
        """Longer runs that others start from."""
        kinds = self.kinds()
        found = []
        for name in self.made:
            longer = 600 if not self.is_smoke else 120 if name == "base" else 50
            more = (f"trainer.steps={longer}", f"trainer.save_every={longer}", "trainer.probe_every=0")
            pairs = ("settings.pairs=1024",) if name.startswith("ode") and not self.is_smoke else ()
            lr = "trainer.optimisers.student."
            fast = (f"{lr}lr=5e-3", f"{lr}warmup_steps=0", "settings.ema.decay=0.9") if self.is_smoke else ()
            found.append(replace(kinds[name], name=f"start-{name}", more=(*kinds[name].more, *more, *pairs, *fast)))
        return found

    def healthy(self, seeds: Sequence[int]) -> list[Job]:
        return [replace(job, name=f"{job.name}-{seed}", seed=seed) for seed in seeds for job in self.kinds().values()]

    def broken(self) -> list[Job]:
        """Ten faults, each in the kind of run where it belongs."""
        kinds = self.kinds()

        def fault(name: str, kind: str, *more: str, patch: str = "") -> Job:
            job = kinds[kind]
            return replace(job, name=f"broken-{name}", seed=9, more=(*job.more, *more), patch=patch)

        return [
            fault("wrong-shift", "ar-frame", "settings.shift=1.0"),
            fault("missing-average", "ode-frame", "settings.ema.decay=0.0"),
            fault("bfloat16-masters", "cd-frame", patch="bfloat16 masters"),
            fault("learning-rate-x30", "ar-frame", "trainer.optimisers.student.lr=1.2e-2"),
            fault("frozen-student", "dmd-frame", "trainer.optimisers.student.lr=0.0"),
            fault("shuffled-captions", "ar-frame", f"data={self.out / 'data-shuffled'}"),
            fault("guidance-0-teacher", "dmd-frame", "settings.guidance=0.0"),
            fault("wrong-chunk", "cd-chunk", *self.init(student="ar-frame", teacher="ar-frame")),
            fault("noisy-context-at-inference", "ar-frame", patch="noisy context"),
            fault("no-first-chunk-steps", "dmd-frame", "settings.first_steps=null"),
        ]

    def jobs(self) -> list[Job]:
        """All of them, those first without which others cannot be, or not be judged."""
        return [*self.starts(), *self.healthy(BANDS), *self.broken(), *self.healthy(TESTS)]

    def make_data(self) -> None:
        data = self.out / "data"
        if self.is_smoke:
            write_small_world(data)
        elif not (self.out / "data-shuffled").is_dir():
            reel = [sys.executable, "-m", "causalreel", "encode", "--codec", "tiny", "--out", str(data)]
            subprocess.run([*reel, "--clips", "4096"], check=True)
        made = load_prepared(data)
        write_set(self.out / "data-shuffled", made.latents, [*made.captions[7:], *made.captions[:7]])


def write_set(folder: Path, latents: torch.Tensor, captions: Sequence[str]) -> None:
    """A prepared set of one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "latents-00000.safetensors", {"latents": latents})
    write_text(folder / "latents-00000.txt", "".join(f"{caption}\n" for caption in captions))


def write_small_world(folder: Path, clips: int = 48, frames: int = 6, side: int = 4) -> None:
    """Clips that their caption decides: a pattern for each of its words, which drifts."""
    draw = torch.Generator().manual_seed(0)
    words = {
        kind: {word: torch.randn(16, side, side, generator=draw) for word in found}
        for kind, found in {
            "size": ("small", "large"),
            "colour": ("red", "blue", "green"),
            "shape": ("circle", "square"),
            "way": ("right", "left"),
        }.items()
    }
    latents, captions = [], []
    for _ in range(clips):
        picked = {k: list(found)[int(torch.randint(len(found), (), generator=draw))] for k, found in words.items()}
        still = sum(words[kind][picked[kind]] for kind in ("size", "colour", "shape")) / 1.7
        drift = torch.linspace(-1, 1, frames).view(-1, 1, 1, 1) * words["way"][picked["way"]] / 2
        latents.append(still + drift)
        captions.append(f"a {picked['size']} {picked['colour']} {picked['shape']} moves {picked['way']}")
    write_set(folder, torch.stack(latents).half(), captions)


# ---- running


def is_done(out: Path, job: Job) -> bool:
    return (out / job.name / "export" / "config.yaml").is_file()


def train_here(out: Path, job: Job) -> None:
    """Run a job in this process."""
    from causalreel.train import trainer
    from causalreel.train.recipe import resolve
    from causalreel.train.run import run

    overrides = [f"trainer.out={out / job.name}", f"trainer.seed={job.seed}", f"data={out / 'data'}"]
    overrides += ["codec=tiny", "rows=null", "speed=plain", "trainer.optimisers.student.schedule=constant", *job.more]
    try:
        import av  # noqa: F401
    except ImportError:  # numbers of previews are in the records all the same
        trainer._write_preview = lambda video, directory, step: None
    with bfloat16_masters() if job.patch == "bfloat16 masters" else contextlib.nullcontext():
        if run(resolve(job.recipe, overrides)).is_interrupted:
            raise KeyboardInterrupt
    if job.patch == "noisy context":
        card = out / job.name / "export" / "config.yaml"
        content = config.read(card)
        content["sampling"]["noisy_from"] = 1
        write_text(card, json.dumps(content))


@contextlib.contextmanager
def bfloat16_masters() -> Iterator[None]:
    """Within it weights are rounded after every step, as if they were held in bfloat16."""
    exact = RoleOptimiser.step

    def rounded(self: RoleOptimiser, lr: float) -> torch.Tensor:
        norm = exact(self, lr)
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.copy_(parameter.bfloat16())
        return norm

    RoleOptimiser.step = rounded  # type: ignore[method-assign]
    try:
        yield
    finally:
        RoleOptimiser.step = exact  # type: ignore[method-assign]


def start(bench: Bench, job: Job, gpu: str | None) -> None:
    """Run a job in a process of its own; CalledProcessError if it fails, with its log in <out>/<name>.log."""
    environment = {"OMP_NUM_THREADS": "2", **os.environ, **({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})}
    command = [sys.executable, __file__, "--out", str(bench.out), "--only", job.name]
    with (bench.out / f"{job.name}.log").open("ab") as log:
        command += ["--smoke"] if bench.is_smoke else []
        subprocess.run(command, env=environment, stdout=log, stderr=log, check=True)


def run_all(bench: Bench, *, at_once: int, until: float, gpus: Sequence[str | None]) -> None:
    """Run what is not done yet, so many at once; none begins after `until` (time.monotonic)."""
    out = bench.out
    futures: dict[str, Future[None]] = {}
    free, lock = dict.fromkeys(gpus, 0), threading.Lock()

    def one(job: Job) -> None:
        for name in job.needs:
            futures[name].result()
        if is_done(out, job):
            return
        if time.monotonic() > until:
            print(f"-- {job.name}: no time left", flush=True)
            return
        with lock:
            gpu = min(free, key=lambda g: free[g])
            free[gpu] += 1
        began = time.monotonic()
        try:
            start(bench, job, gpu)
            print(f"== {job.name}: {time.monotonic() - began:.0f} s", flush=True)
        except subprocess.CalledProcessError as error:
            print(f"!! {job.name}: status {error.returncode}, see {out / job.name}.log", flush=True)
        finally:
            with lock:
                free[gpu] -= 1

    with ThreadPoolExecutor(at_once) as pool:
        for job in bench.jobs():
            futures[job.name] = pool.submit(one, job)
    for future in futures.values():
        future.result()


# ---- judging


def judge(bench: Bench) -> bool:
    """Write curves and verdicts of what is there -> whether all of it is as it should be."""
    out = bench.out
    made = {}
    for kind in bench.kinds():
        found = [
            out / f"{kind}-{seed}"
            for seed in BANDS
            if is_done(out, replace(bench.kinds()[kind], name=f"{kind}-{seed}"))
        ]
        if len(found) > 1:
            one = curves.make_curves(kind, [read_run(folder) for folder in found])
            made[one.pop("name")] = one
    where = torch.cuda.get_device_name() if torch.cuda.is_available() and not bench.is_smoke else "CPU"
    facts = {"device": where, "torch": str(torch.__version__), "seeds": list(BANDS)}
    write_text(out / "curves.json", json.dumps({"made": facts, "curves": made}, separators=(",", ":")) + "\n")
    known = curves.read_curves(out / "curves.json")
    rows, lines = [], ["| run | should be | found | measured | in its settings |", "|---|---|---|---|---|"]
    for job in (*bench.broken(), *bench.healthy(TESTS)):
        if not is_done(out, job):
            rows.append({"run": job.name, "verdict": "not run"})
            lines.append(f"| {job.name} | | not run | | |")
            continue
        report = examine(out / job.name, known)
        is_expected = report.is_healthy != job.name.startswith("broken-")
        checks = {
            by: sorted({f.check for f in report.findings if f.by == by and f.level == "wrong"})
            for by in ("measured", "settings")
        }
        verdict = "healthy" if report.is_healthy else "wrong"
        rows.append({"run": job.name, "verdict": verdict, "is_expected": is_expected, **report.content()})
        expected = "wrong" if job.name.startswith("broken-") else "healthy"
        mark = "" if is_expected else " **(missed)**"
        seen = [", ".join(checks[by]) for by in ("measured", "settings")]
        lines.append(f"| {job.name} | {expected} | {verdict}{mark} | {seen[0]} | {seen[1]} |")
    write_text(out / "verdicts.json", json.dumps(rows, indent=1) + "\n")
    write_text(out / "verdicts.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
    return all(row.get("is_expected", False) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument(
        "--at-once", type=int, default=None, help="runs at once; default 7 for each GPU, 1 in miniature"
    )
    parser.add_argument("--minutes", type=float, default=14.0, help="after which no run begins")
    parser.add_argument("--only", help="one run, in this process; judge nothing")
    parser.add_argument("--results", type=Path, help="folder that also gets what is small: curves, verdicts, records")
    parser.add_argument("--judge", action="store_true", help="judge what is there, run nothing")
    args = parser.parse_args()
    out = args.out
    out.mkdir(parents=True, exist_ok=True)
    bench = Bench(out, is_smoke=args.smoke)
    if args.only:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        train_here(out, next(job for job in bench.jobs() if job.name == args.only))
        return 0
    if not args.judge:
        until = time.monotonic() + 60 * args.minutes
        bench.make_data()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus: list[str | None] = [None] if args.smoke or not visible else list(visible.split(","))
        run_all(bench, at_once=args.at_once or (1 if args.smoke else 7 * len(gpus)), until=until, gpus=gpus)
    is_as_expected = judge(bench)
    if args.results is not None:
        small = ("*.json", "verdicts.md", "*/metrics.jsonl", "*/config.yaml", "*/export/config.yaml")
        for path in (path for pattern in small for path in out.glob(pattern)):
            target = args.results / path.relative_to(out)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return 0 if is_as_expected else 1


if __name__ == "__main__":
    raise SystemExit(main())
