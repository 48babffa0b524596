"""Every stage at Wan2.1's real shapes for three steps, with random weights: does it run, how long, in how much memory.

    python runs/wan_smoke.py                        one GPU with 80 GB or more; 8 clips of random latents
    python runs/wan_smoke.py --videos FOLDER        8 clips of these videos instead, through `causalreel prepare`
    python runs/wan_smoke.py --stages ar dmd -- trainer.offload_averages=true     a part of it, with other settings
    python runs/wan_smoke.py --smoke                the same path in miniature on a CPU: proves the plumbing only

Each stage is the command that a user starts, `causalreel train wan/...`, of 1.3B networks on clips of 21 latent frames
of 480x832, a clip at a time, and begins where the one before ended; then `causalreel export`, and a video. Stop it and
run it again: finished stages are skipped, one that had saved goes on. A finished stage's checkpoints go, and exports
that no later stage needs, so that 64 GB of disk do. Seconds and memory are printed beside what `causalreel plan` says.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from causalreel.data.manifest import Manifest, write_manifest
from causalreel.data.packing import Row, pack, write_null
from causalreel.files import write_text
from causalreel.infer.bench import device_name
from causalreel.infer.models import load
from causalreel.infer.pipeline import Pipeline
from causalreel.nn.presets import preset
from causalreel.text.fixed import FixedTextEncoder
from causalreel.train.operations import Clip, peak_of
from causalreel.train.plan import GIB, clip_of, plan, sizes_of
from causalreel.train.recipe import resolve
from causalreel.types import LatentSpec
from causalreel.weights.export import load_export

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
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--smoke", action="store_true", help="small networks on the CPU")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="laid upon every recipe, after --")
    args = parser.parse_args()
    out = args.out or Path("runs/wan-smoke-cpu" if args.smoke else "runs/wan-smoke")
    if not args.smoke and not torch.cuda.is_available():
        parser.error("there is no GPU here; --smoke is for CPUs")
    run = Run(out, args.smoke, args.steps, tuple(args.settings))
    run.make_data(args.videos)
    for name in args.stages:
        if not run.train(name):
            return 1
    run.show_video(args.stages[-1])
    print(run.table())
    return 0


class Run:
    """All of it, in one folder."""

    def __init__(self, out: Path, is_small: bool, steps: int, settings: tuple[str, ...]) -> None:
        self.out, self.is_small, self.steps, self.settings = out, is_small, steps, settings
        self.size = "tiny-smoke" if is_small else "wan-1.3b"
        self.file = out / "results.json"
        out.mkdir(parents=True, exist_ok=True)
        self.found: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}

    def make_data(self, videos: Path | None) -> None:
        data = self.out / "data"
        if (data / "manifest.json").exists():
            return
        if videos is not None:
            model = ["tiny"] if self.is_small else ["wan2.1-t2v-1.3b", "--random-weights"]
            self._command("prepare", videos, "--out", data, "--model", *model, "--clips", "1")
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
        if name in self.found:
            return True
        job, out = JOBS[name], self.out / name
        starts = {
            role: f"random:{self.size}" if of is None else self.out / of / "export" for role, of in job.init.items()
        }
        if missing := [str(start) for start in starts.values() if isinstance(start, Path) and not start.exists()]:
            print(f"{name} begins with {missing[0]}: run that stage first", file=sys.stderr)
            return False
        words = [
            *(f"data={self.out / 'data'}", "codec=tiny", f"trainer.out={out}", f"trainer.steps={self.steps}"),
            *("trainer.log_every=1", "trainer.preview_every=0", "trainer.probe_every=0", "trainer.check=false"),
            *("settings.batch=1", "trainer.keep=1", *(f"init.{role}={start}" for role, start in starts.items())),
            *job.settings,
            *(("trainer.device=cpu",) if self.is_small else ()),
            *self.settings,
        ]
        began = time.monotonic()
        if self._command("train", job.recipe, *words, may_fail=True):
            return False
        seconds = time.monotonic() - began
        records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        recipe = resolve(job.recipe, words)
        sizes = sizes_of(recipe, self.size)
        rate = None if self.is_small else peak_of(device_name(torch.device("cuda")))
        planned = plan(recipe, sizes, clip_of(recipe, 81, (480, 832)), rate=rate)
        self.found[name] = {
            "stage": name,
            "seconds in all": round(seconds, 1),
            "s a step": [round(1 / record["steps_per_second"], 2) for record in records],
            "planned s": None if planned.seconds is None else round(planned.seconds, 2),
            "GiB": round(max(record.get("peak_memory_gib", 0.0) for record in records), 2),
            "planned GiB": round(planned.peak / GIB, 2),
            "loss": [round(record["student/loss"], 4) for record in records],
        }
        write_text(self.file, json.dumps(self.found, indent=1))
        shutil.rmtree(out / "checkpoints")
        (out / "trajectories.safetensors").unlink(missing_ok=True)
        wanted = {start for other, left in JOBS.items() if other not in self.found for start in left.init.values()}
        for old in self.found.keys() & JOBS.keys() - wanted - {name}:  # nothing begins with them any more
            shutil.rmtree(self.out / old / "export", ignore_errors=True)
        return True

    def show_video(self, name: str) -> None:
        """Export the last stage, and make a clip with it."""
        if self.found.get("video", {}).get("of") == name:
            return
        given, began = self.out / f"given-{name}", time.monotonic()
        if not given.exists():
            self._command("export", self.out / name / "export", given, "--name", "wan-smoke")
        denoiser, export = load_export(given)
        device = torch.device("cpu" if self.is_small else "cuda")
        if self.is_small:
            pipeline = load(given, device="cpu")
        else:  # Wan2.1's text encoder is 11 GB, and says as little as this one with random weights
            codec = load("tiny").codec
            text = FixedTextEncoder(export.model.text_length, export.model.text_dim, device)
            denoiser = denoiser.to(device, torch.bfloat16)
            pipeline = Pipeline(denoiser, export, export.sampling, codec, text, device)
        prompt = "a large red circle moves right slowly on a dark background"
        video = pipeline.generate(prompt, seed=0)
        assert video.isfinite().all() and video.std() > 0
        self.found["video"] = {"of": name, "shape": list(video.shape), "seconds": round(time.monotonic() - began, 1)}
        write_text(self.file, json.dumps(self.found, indent=1))

    def table(self) -> str:
        rows = [[str(value.get(key)) for key in SHOWN] for name, value in self.found.items() if name in JOBS]
        lines = ["| " + " | ".join(SHOWN) + " |", "|" + " --- |" * len(SHOWN)]
        return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), f"video: {self.found['video']}"])

    def _command(self, *words: Any, may_fail: bool = False) -> int:
        command = ["causalreel", *map(str, words)]
        print("$ " + " ".join(command), flush=True)
        done = subprocess.run([sys.executable, "-m", *command], check=not may_fail)
        return done.returncode


if __name__ == "__main__":
    sys.exit(main())
