"""Training on several GPUs of one host through `causalreel train`, with random weights and clips of Wan2.1's shape.

    python benchmarks/training_gpus.py --gpus 2 --out run/gpus.json
    python benchmarks/training_gpus.py --gpus 2 --tiny            a rehearsal with processes on a CPU

Every run is the command that a user starts, by torchrun, killed when enough steps are in its metrics file: nothing is
saved. Numbers are written after every run; started again with the same --out, runs that succeeded are not made again.
Sections, of which counts of GPUs are measured from the largest on:

- one: teacher forcing and a DMD cycle on one GPU, batch 1, what the others are compared with
- data: teacher forcing sharded over 2, 4, ... GPUs (FSDP2), batch 1 a GPU: tokens a second against `one`
- cycles: DMD likewise
- hybrid: teacher forcing sharded over half of the GPUs, twice (HSDP)
- context: one clip shared by 4 and by 2 GPUs (Ulysses), as far as that divides the heads: seconds a step against `one`
- stages: causal ODE (two trajectories of six Euler steps), CD and DMD, all of one size, over the GPUs
- dmd14: a DMD cycle with a frozen 14B teacher beside a 1.3B student and critic, and what `causalreel plan` says of it
- critic14: the same with a 14B critic too, recomputed whole (`recompute: full`)
- forcing14: teacher forcing of 14B, one clip shared by 4 GPUs
- resume: a checkpoint written by all GPUs after two steps: the losses of two more steps by all, and by half of them

Seconds are medians of --runs steps after --warmup, of fewer where a run took longer than --patience (then `failed` is
what it said); operations are `train.operations`. After --budget seconds no run is begun, and none goes on. Exits with 1
if something failed or was left out. Nothing of the package's own models is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from causalreel.codecs.tiny import tiny_codec
from causalreel.data.manifest import Manifest, write_manifest
from causalreel.data.packing import Row, pack, write_null
from causalreel.files import write_text
from causalreel.infer.bench import device_name, gpu_facts
from causalreel.nn.presets import preset
from causalreel.train.ingredients import ROLES
from causalreel.train.operations import Clip, peak_of, step_work
from causalreel.train.plan import GIB, Plan, plan, sizes_of
from causalreel.train.recipe import resolve
from causalreel.types import LatentSpec
from causalreel.weights.export import save_codec

SECTIONS = ("one", "data", "cycles", "hybrid", "context", "stages", "dmd14", "critic14", "forcing14", "resume")
Section = dict[str, Callable[[], dict[str, Any]]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ADAM = {"lr": 2e-6, "betas": [0.0, 0.999], "weight_decay": 0.01, "clip": 10.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--chunk", type=int, default=3)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--patience", type=float, default=240.0, help="seconds that a run may take")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds for all of it")
    parser.add_argument("--tiny", action="store_true", help="small networks and clips")
    parser.add_argument("--out", type=Path, help="file for the numbers, which are printed too")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    result, left = measured(args), []
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(args, Path(folder))
        for key, work in (item for section in args.sections for item in getattr(runs, section)().items()):
            if key in result and "failed" not in result[key]:
                continue
            if runs.left_s() > 0:
                result[key] = work()
            if "failed" in result.get(key, {"failed": ""}):
                left.append(key)
            if args.out is not None:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                write_text(args.out, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if left:
        sys.exit(f"failed or left out: {', '.join(left)}")


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """The conditions of this launch, and what was measured under them before."""
    facts = {"gpus": args.gpus, "chunk": args.chunk, "tiny": args.tiny, "device": device_name(DEVICE)}
    facts |= {"torch": str(torch.__version__), **gpu_facts(DEVICE)}
    if args.out is None or not args.out.is_file():
        return {"conditions": facts}
    found = json.loads(args.out.read_text())
    if (before := found["conditions"]) | {"clock_mhz": None} != facts | {"clock_mhz": None}:
        sys.exit(f"{args.out} holds numbers of other conditions ({before}, now {facts}): give another --out")
    return found


class Runs:
    """The runs of one launch of this script, in one folder. Sections name them, and what makes each."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.end = args, folder, time.monotonic() + args.budget
        self.counts = [count for count in (8, 4, 2) if count <= args.gpus]
        self.small, self.large = ("tiny-smoke", "tiny") if args.tiny else ("wan-1.3b", "wan-14b")
        self.clip = Clip(6, LatentSpec(16, 8, 8)) if args.tiny else Clip(21, LatentSpec(16, 60, 104))
        self._write_data()

    def _write_data(self) -> None:
        generator, place = torch.Generator().manual_seed(0), self.folder / "data"
        place.mkdir()
        save_codec(self.folder / "codec", tiny_codec())
        width, rows = preset(self.small).text_dim, []
        for index in range(4 * self.args.gpus):
            clip = torch.randn(self.clip.frames, *self.clip.latent.shape, generator=generator).half()
            text = torch.randn(12, width, generator=generator).bfloat16()
            rows.append(Row("a clip", f"random, {index}", clip, text))
        shard = pack(place / "latents-000.safetensors", rows)
        null = write_null(place, torch.randn(12, width, generator=generator).bfloat16())
        write_manifest(place, Manifest((shard,), null=null))

    def left_s(self) -> float:
        return self.end - time.monotonic()

    # ---- sections

    def one(self) -> Section:
        return {f"one {stage}": partial(self.run, stage, gpus=1, batch=1) for stage in ("ar_diffusion", "dmd")}

    def data(self) -> Section:
        return {f"data {count}": partial(self.run, "ar_diffusion", gpus=count, batch=count) for count in self.counts}

    def cycles(self) -> Section:
        return {f"cycles {count}": partial(self.run, "dmd", gpus=count, batch=count) for count in self.counts}

    def hybrid(self) -> Section:
        how = {"trainer": {"parallel": {"replicate": 2}}}
        return {f"hybrid 2 x {self.args.gpus // 2}": self._over_all("ar_diffusion", **how)}

    def context(self) -> Section:
        counts = [count for count in self.counts if preset(self.small).heads % count == 0]
        how = [{"gpus": count, "batch": 1, "trainer": {"parallel": {"context": count}}} for count in counts]
        return {
            f"context {count}": partial(self.run, "ar_diffusion", **h) for count, h in zip(counts, how, strict=True)
        }

    def stages(self) -> Section:
        few = {"pairs": 2 * self.args.gpus, "grid": 6, "keep": [0, 2, 4], "maker_batch": 1}
        settings = {"causal_ode": few, "causal_cd": {}, "dmd": {}}
        return {f"stage {stage}": self._over_all(stage, settings=more) for stage, more in settings.items()}

    def dmd14(self) -> Section:
        return {"dmd14": self._over_all("dmd", large=("teacher",))}

    def critic14(self) -> Section:
        how = {"trainer": {"recompute": "full"}}  # with its attention kept a critic of 14B needs more than a GPU has
        return {"critic14": self._over_all("dmd", large=("teacher", "critic"), **how)}

    def forcing14(self) -> Section:
        count = self.args.gpus
        how: dict[str, Any] = {"gpus": count, "batch": max(1, count // 4), "large": ("student",)}
        how["trainer"] = {"parallel": {"context": min(4, count)}}
        return {"forcing14": partial(self.run, "ar_diffusion", **how)}

    def resume(self) -> Section:
        return {"resume": self._resumed}

    def _over_all(self, stage: str, **how: Any) -> Callable[[], dict[str, Any]]:
        """A run with a clip for each of the GPUs."""
        return partial(self.run, stage, gpus=self.args.gpus, batch=self.args.gpus, **how)

    def _resumed(self) -> dict[str, Any]:
        """The same run continued twice from its checkpoint of step 2 -> both lists of losses and their distance."""
        count, losses = self.args.gpus, {}
        name, how = f"resume-{len(list(self.folder.iterdir()))}", {"steps": 4, "save_every": 2, "keep": 9}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(self._recipe("ar_diffusion", name, count, (), how)))
        for gpus in (count, count // 2):
            records, said = self._started(path, gpus, steps=4)
            if len(records) < 4:
                return {"failed": said[-2000:], "records": records}
            losses[gpus] = [record["student/loss"] for record in records[2:4]]
            shutil.rmtree(max((self.folder / name / "checkpoints").iterdir()))  # that of step 4
            metrics = self.folder / name / "metrics.jsonl"
            metrics.write_text("".join(f"{line}\n" for line in _lines(metrics)[:2]))
            shutil.rmtree(self.folder / name / "export", ignore_errors=True)
        pairs = zip(*losses.values(), strict=True)
        return {"losses": losses, "relative": max(abs(a - b) / abs(a) for a, b in pairs)}

    # ---- a run

    def run(
        self,
        stage: str,
        *,
        gpus: int,
        batch: int,
        large: tuple[str, ...] = (),
        trainer: dict[str, Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Train until enough steps are recorded -> its numbers, or what it said when it failed."""
        name = f"{stage}-{gpus}-{len(list(self.folder.iterdir()))}"
        recipe = self._recipe(stage, name, batch, large, trainer or {})
        recipe["settings"] |= settings or {}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        began = time.monotonic()
        records, said = self._started(path, gpus)
        seconds = [1 / record["steps_per_second"] for record in records]
        timed = seconds[self.args.warmup : self.args.warmup + self.args.runs]
        found: dict[str, Any] = {"planned_gib": round(self._plan(path, gpus).peak / GIB, 2)}
        if len(timed) < self.args.runs:  # what there is may be all that there will be
            found |= {"failed": said[-2000:]}
        if records:
            found |= {
                "first_s": [round(value, 3) for value in seconds[: self.args.warmup]],
                "all_s": [round(value, 3) for value in timed],
                "loss": {key: value for key, value in records[-1].items() if key.endswith("/loss")},
                "peak_gib": round(max(record.get("peak_memory_gib", 0) for record in records), 2),
                "startup_s": round(time.monotonic() - began - sum(seconds), 1),
            }
        return found | (self._numbers(path, statistics.median(timed), gpus) if timed else {})

    def _recipe(self, stage: str, name: str, batch: int, large: tuple[str, ...], trainer: dict) -> dict[str, Any]:
        roles = ROLES.get(stage, ("student",))
        trained = [role for role in roles if role in ("student", "critic")]
        sizes = {role: self.large if role in large else self.small for role in roles}
        return {
            "stage": stage,
            "data": str(self.folder / "data"),
            "codec": str(self.folder / "codec"),
            "init": {role: f"random:{size}" for role, size in sizes.items()},
            "speed": "plain" if DEVICE.type == "cpu" else "compiled",
            "trainer": {
                "out": str(self.folder / name),
                "steps": 1000,
                "log_every": 1,
                "save_every": 1000,
                "check": False,
                "recompute": "selective",
                "optimisers": dict.fromkeys(trained, ADAM),
                **trainer,
            },
            "settings": {"batch": batch, "chunk": self.args.chunk},
        }

    def _started(self, path: Path, gpus: int, steps: int | None = None) -> tuple[list[dict[str, Any]], str]:
        """Run until so many steps are recorded, or without `steps` until those that are timed are -> records, words."""
        command = [sys.executable, "-m", "causalreel", "train", str(path)]
        if gpus > 1:
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
            command = [sys.executable, *launch, *command[1:]]
        metrics, log = self.folder / path.stem / "metrics.jsonl", self.folder / f"{path.stem}.log"
        with log.open("w") as said:
            process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
            end = time.monotonic() + min(self.args.patience, self.left_s())
            try:
                while process.poll() is None and time.monotonic() < end:
                    if steps is None and len(_lines(metrics)) >= self.args.warmup + self.args.runs:
                        break
                    time.sleep(0.2)
                records = [json.loads(line) for line in _lines(metrics)]
            finally:
                _kill(process)
        print(path.stem, len(records), "steps recorded", flush=True)
        return records, log.read_text()

    def _numbers(self, path: Path, seconds: float, gpus: int) -> dict[str, Any]:
        recipe = resolve(str(path))
        sizes = sizes_of(recipe, self.small)
        work = step_work(recipe.settings, sizes, self.clip)
        assert work is not None
        rate, peak = work.flop / seconds / gpus / 1e12, peak_of(device_name(DEVICE))
        return {
            "s": round(seconds, 3),
            "tokens_per_second": round(work.tokens / seconds),
            "tflops_a_gpu": round(rate, 2),
            "mfu": None if peak is None else round(rate / peak, 3),
        }

    def _plan(self, path: Path, gpus: int) -> Plan:
        recipe = resolve(str(path))
        return plan(recipe, sizes_of(recipe, self.small), self.clip, gpus=gpus)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """A launcher and its processes, each of which is in a session of its own."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if process.poll() is None and children.exists() else []
    for pid in (process.pid, *map(int, workers)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    process.wait()


def _lines(path: Path) -> list[str]:
    """The whole lines of a file that somebody is writing."""
    return path.read_text().splitlines()[: path.read_text().count("\n")] if path.exists() else []


if __name__ == "__main__":
    main()
