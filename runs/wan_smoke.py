"""Every stage at Wan2.1's real shapes for three steps, with random weights: does it run, how long, in how much memory.

    python runs/wan_smoke.py                        one GPU with 80 GB or more; 8 clips of random latents
    python runs/wan_smoke.py --videos FOLDER        8 clips of these videos instead, through `causalreel prepare`
    python runs/wan_smoke.py --stages ar dmd -- trainer.offload_averages=true     a part of it, with other settings
    python runs/wan_smoke.py --gpus 2               every stage by two processes, a clip each
    python runs/wan_smoke.py --smoke                the same path in miniature on a CPU: proves the plumbing only

Each stage is the command that a user starts, `causalreel train wan/...`, of 1.3B networks on clips of 21 latent frames
of 480x832, a clip a GPU, and begins where the one before ended; then `causalreel export`, and a video. Stop it and run
it again: stages that ended with the same settings are skipped, one that had saved goes on. A stage that fails, or takes
longer than --limit, is noted, and those go on that need nothing of it. A finished stage's checkpoints go, and exports
that no later stage needs, so that 64 GB of disk do. Seconds and memory, written after every stage, stand beside what
`causalreel plan` says. Nothing of the package's own models is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causalreel.codecs.tiny import tiny_codec
from causalreel.data.manifest import Manifest, write_manifest
from causalreel.data.packing import Row, pack, write_null
from causalreel.files import write_text
from causalreel.infer.bench import device_name
from causalreel.infer.pipeline import Pipeline
from causalreel.nn.presets import preset
from causalreel.text.fixed import FixedTextEncoder
from causalreel.train.operations import Clip, peak_of
from causalreel.train.plan import GIB, clip_of, plan, sizes_of
from causalreel.train.recipe import resolve
from causalreel.types import LatentSpec
from causalreel.weights.export import load_codec, load_export, save_codec

CLIPS = 8
SHOWN = ("stage", "seconds in all", "s a step", "planned s", "GiB", "planned GiB", "loss")


@dataclass(frozen=True)
class Job:
    """A stage: its recipe, what its networks begin as (a stage before, or None for random weights), its settings."""

    recipe: str
    init: dict[str, str | None]
    settings: tuple[str, ...] = ()


JOBS = {
    "ar": Job("wan/ar", {"student": None}),
    "ode": Job(
        "wan/causal_ode",
        {"student": "ar", "teacher": "ar"},
        ("settings.pairs=2", "settings.grid=6", "settings.keep=[0,2,4]"),
    ),
    "cd": Job("wan/causal_cd", {"student": "ar", "teacher": "ar"}),
    "dmd": Job("wan/dmd", {"student": "cd", "critic": None, "teacher": None}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, help="folder of videos with captions beside them")
    parser.add_argument("--stages", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--out", type=Path, help="default runs/wan-smoke, with --smoke runs/wan-smoke-cpu")
    parser.add_argument("--results", type=Path, help="file that also gets the numbers; default OUT/results.json alone")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gpus", type=int, default=1, help="processes that train together, a clip of the batch each")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that a stage may take")
    parser.add_argument("--smoke", action="store_true", help="small networks on the CPU")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="laid upon every recipe, after --")
    args = parser.parse_args()
    out = args.out or Path("runs/wan-smoke-cpu" if args.smoke else "runs/wan-smoke")
    if not args.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke is for CPUs")
    run = Run(out, args)
    run.make_data(args.videos)
    ended = [run.train(name) for name in args.stages]
    try:
        well = [name for name, is_well in zip(args.stages, ended, strict=True) if is_well]
        if exports := [name for name in well if (out / name / "export").exists()]:
            run.show_video(exports[-1])
    finally:
        print(run.table())
    return 0 if all(ended) and "failed" not in run.found.get("video", {}) else 1


class Run:
    """All of it, in one folder."""

    def __init__(self, out: Path, args: argparse.Namespace) -> None:
        self.out, self.is_small, self.steps, self.settings = out, args.smoke, args.steps, tuple(args.settings)
        self.gpus, self.limit = args.gpus, args.limit
        self.size = "tiny-smoke" if self.is_small else "wan-1.3b"
        self.files = [out / "results.json", *([args.results] if args.results else [])]
        for file in self.files:
            file.parent.mkdir(parents=True, exist_ok=True)
        there = self.files[0]
        self.found: dict[str, Any] = json.loads(there.read_text()) if there.exists() else {}

    def make_data(self, videos: Path | None) -> None:
        data = self.out / "data"
        if not (self.out / "codec").exists():
            save_codec(self.out / "codec", tiny_codec())
        if (data / "manifest.json").exists():
            return
        if videos is not None:
            model = ["tiny"] if self.is_small else ["wan2.1-t2v-1.3b", "--random-weights"]
            said = self._command("prepare", videos, "--out", data, "--model", *model, "--clips", "1")
            if said is not None:
                raise SystemExit(f"prepare: {said}")
            return
        clip = Clip(6, LatentSpec(16, 8, 8)) if self.is_small else Clip(21, LatentSpec(16, 60, 104))
        draw, width = torch.Generator().manual_seed(0), preset(self.size).text_dim
        data.mkdir(exist_ok=True)
        rows = [
            Row(
                "a clip",
                f"random, {index}",
                torch.randn(clip.frames, *clip.latent.shape, generator=draw).half(),
                torch.randn(12, width, generator=draw).bfloat16(),
            )
            for index in range(CLIPS)
        ]
        null = write_null(data, torch.randn(12, width, generator=draw).bfloat16())
        write_manifest(data, Manifest((pack(data / "latents-000.safetensors", rows),), null=null))

    def train(self, name: str) -> bool:
        """A stage, unless it is done -> whether it ended well."""
        job, out = JOBS[name], self.out / name
        laid = [f"trainer.steps={self.steps}", f"settings.batch={self.gpus}", *job.settings, *self.settings]
        known = self.found.get(name, {})
        if known.get("settings") == laid and "failed" not in known:
            return True
        starts = {
            role: f"random:{self.size}" if of is None else self.out / of / "export" for role, of in job.init.items()
        }
        if missing := [str(start) for start in starts.values() if isinstance(start, Path) and not start.exists()]:
            print(f"{name} begins with {missing[0]}: run that stage first", file=sys.stderr)
            return False
        words = [
            *(f"data={self.out / 'data'}", f"codec={self.out / 'codec'}", f"trainer.out={out}"),
            *("trainer.log_every=1", "trainer.preview_every=0", "trainer.probe_every=0", "trainer.check=false"),
            *("trainer.keep=1", *(f"init.{role}={start}" for role, start in starts.items())),
            *(("trainer.device=cpu",) if self.is_small else ()),
            *laid,
        ]
        if not (out / "checkpoints").exists():  # then it begins anew, and what is recorded is of another run
            (out / "metrics.jsonl").unlink(missing_ok=True)
        began = time.monotonic()
        failure = self._command("train", job.recipe, *words, gpus=self.gpus)
        found = {"stage": name, "settings": laid, "seconds in all": round(time.monotonic() - began, 1)}
        if failure is not None:
            found["failed"] = failure
        self._note(name, found | _measured(out / "metrics.jsonl"))  # kept whatever comes
        if failure is not None:
            return False
        recipe = resolve(job.recipe, words)
        rate = None if self.is_small else peak_of(device_name(torch.device("cuda")))
        sizes, clip = sizes_of(recipe, self.size), clip_of(recipe, 81, (480, 832))
        planned = plan(recipe, sizes, clip, gpus=self.gpus, rate=rate)
        seconds = None if planned.seconds is None else round(planned.seconds, 2)
        self._note(name, self.found[name] | {"planned s": seconds, "planned GiB": round(planned.peak / GIB, 2)})
        shutil.rmtree(out / "checkpoints")
        (out / "trajectories.safetensors").unlink(missing_ok=True)
        left = [other for other in JOBS if "failed" in self.found.get(other, {"failed": "not begun"})]
        wanted = {start for other in left for start in JOBS[other].init.values()}
        for old in self.found.keys() & JOBS.keys() - wanted - {name}:  # nothing begins with them any more
            shutil.rmtree(self.out / old / "export", ignore_errors=True)
        return True

    def show_video(self, name: str) -> None:
        """Export a stage, and make a clip with it."""
        known = self.found.get("video", {})
        if (known.get("of"), known.get("settings")) == (name, self.found[name]["settings"]):
            return
        given, began = self.out / f"given-{name}", time.monotonic()
        shutil.rmtree(given, ignore_errors=True)
        found = {"of": name, "settings": self.found[name]["settings"]}
        said = self._command("export", self.out / name / "export", given, "--name", "wan-smoke")
        if said is not None:
            self._note("video", {"failed": said})
            return
        device = torch.device("cpu" if self.is_small else "cuda")
        denoiser, export = load_export(given)
        denoiser = denoiser.to(device, torch.float32 if self.is_small else torch.bfloat16)
        # Wan2.1's text encoder is 11 GB, and says as little as this one with random weights
        text = FixedTextEncoder(export.model.text_length, export.model.text_dim, device)
        codec = load_codec(self.out / "codec").to(device)
        pipeline = Pipeline(denoiser, export, export.sampling, codec, text, device)
        video = pipeline.generate("a large red circle moves right slowly on a dark background", seed=0)
        assert video.isfinite().all() and video.std() > 0
        self._note("video", {**found, "shape": list(video.shape), "seconds": round(time.monotonic() - began, 1)})
        shutil.rmtree(given)

    def table(self) -> str:
        rows = [[str(value.get(key, "")) for key in SHOWN] for name, value in self.found.items() if name in JOBS]
        lines = ["| " + " | ".join(SHOWN) + " |", "|" + " --- |" * len(SHOWN)]
        lines += ["| " + " | ".join(row) + " |" for row in rows]
        lines += [f"{name} failed: {value['failed']}" for name, value in self.found.items() if "failed" in value]
        return "\n".join([*lines, f"video: {self.found.get('video')}"])

    def _note(self, name: str, found: dict[str, Any]) -> None:
        self.found[name] = found
        for file in self.files:
            write_text(file, json.dumps(self.found, indent=1))

    def _command(self, *words: Any, gpus: int = 1) -> str | None:
        """Run `causalreel` by so many processes -> None, or the end of what it said if it failed or took too long."""
        command = ["-m", "causalreel", *map(str, words)]
        if gpus > 1:
            command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}", *command]
        print("$ " + " ".join(["causalreel", *map(str, words)]), flush=True)
        log = self.out / f"{words[0]}.log"
        with log.open("w") as said:
            process = subprocess.Popen(
                [sys.executable, *command], stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status: int | None = process.wait(self.limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if status == 0:
            return None
        how = f"took longer than {self.limit:g} s" if status is None else f"status {status}"
        failure = f"{how}: ...{log.read_text()[-2000:]}"
        print(failure, file=sys.stderr, flush=True)
        return failure


def _measured(metrics: Path) -> dict[str, Any]:
    """What the records of a run say of its steps; nothing where there are none."""
    lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    if not records:
        return {}
    return {
        "s a step": [round(1 / record["steps_per_second"], 2) for record in records],
        "GiB": round(max(record.get("peak_memory_gib", 0.0) for record in records), 2),
        "loss": [round(record["student/loss"], 4) for record in records],
    }


if __name__ == "__main__":
    sys.exit(main())
