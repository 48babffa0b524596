"""What tiny/walk shows when it is back where it began, up to ten training lengths later, under every context policy.

    python benchmarks/walk_memory.py --out runs/walk_memory                  on one CPU core; goes on where it stopped
    python benchmarks/walk_memory.py --out runs/x --clips 2 --lengths 1 --policies sink           in miniature

Held-out scenes behind their true first picture, in which objects are seen. turn: away by 84 degrees, so that nothing of
that picture is in sight, looks about there, and turns back; walk: turns away, walks off and comes back. Of the last
picture, at the pose of the first:

psnr         dB against the true render, exact
remembers    share of scenes where it is nearer to the true render than to the same floor and sky without objects
ahead        share where the colour that stood ahead is there (the prompt says it too, but not how large and where)

glance: far off, 60 degrees away and back, against its own picture before that: what is remembered of the start costs
room for what is here.

Rows beside the policies: the codec; floor and sky alone; and words alone, a first picture drawn from the prompt.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.data.video import contact_sheet
from causalreel.data.walk import (
    TEMPORAL,
    WalkState,
    captions,
    fields,
    held,
    is_free,
    opposite,
    simulate,
    there_and_back,
)
from causalreel.data.walk_render import paint
from causalreel.eval.control import LEAST_PIXELS, colors_in, psnr
from causalreel.eval.run import file_name
from causalreel.eval.statistics import estimate
from causalreel.files import write_text
from causalreel.infer.clips import ClipRequest
from causalreel.infer.models import load, profile
from causalreel.infer.pipeline import Pipeline
from causalreel.rollout import KeyedNoise, collect
from causalreel.types import Conditioning
from causalreel.weights.files import read_tensors, write_tensors

AWAY = 7
"""Turns of 12 degrees: the picture is 80 degrees wide."""
OBJECTS_SEEN = 25.0
"""dB: floor and sky alone are no more like the pictures of the scenes that are taken."""
TAIL = 12
"""Latent frames that are decoded for the last picture; what is before them does not show in it."""
POLICIES = (
    *("window", "full", "sink", "rolling-sink", "memrope", "deep-forcing", "infinity-rope", "relax-forcing"),
    "re-indexed",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/walk_memory"))
    parser.add_argument("--model", default="tiny/walk")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), help="full keeps everything; own: the model's")
    parser.add_argument("--lengths", type=int, nargs="*", default=[1, 2, 10], help="training lengths of a path")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    trained = profile(args.model).export.frames
    scene = scenes(args.clips, args.seed)
    paths = {f"turn, {n}x": turned(scene, n * trained) for n in args.lengths}
    paths |= {f"walk, {n}x": walked_off(scene, n * trained) for n in args.lengths if n * trained > 4 * AWAY}
    paths |= {"far": glanced(scene, 0), "glance": glanced(scene, 5)}
    truth, empty = first_picture(scene), first_picture(without_objects(scene))
    base = load(args.model)
    with torch.no_grad():
        plain = base.codec.decode(base.codec.encode(truth.to(base.device))).cpu()
    told = words(base, scene, args)
    shown = {"codec": {"first": plain}, "floor and sky": {"first": empty}, "words alone": {"first": told}}
    for policy in args.policies:
        place = args.out / f"{file_name(f'{args.model} {args.seed} {policy}')}.safetensors"
        before = read_tensors(place) if place.exists() else {}
        missing = {name: path for name, path in paths.items() if len(before.get(name, ())) != len(scene)}
        if missing:
            began = time.perf_counter()
            pipeline = load(args.model, policy=spelled(policy, paths))
            write_tensors(place, before | made(pipeline, missing, args))
            print(f"{policy}: {time.perf_counter() - began:.0f} s", flush=True)
        shown[policy] = read_tensors(place)
        tell(args, scene, truth, empty, shown)
    print((args.out / "table.md").read_text())


def scenes(count: int, seed: int) -> WalkState:
    """The first so many held-out scenes in whose first pictures objects are seen."""
    some = simulate(4 * count + 16, seed=seed, held_out=True)
    is_seen = psnr(first_picture(some), first_picture(without_objects(some)))[:, 0] < OBJECTS_SEEN
    return some[is_seen.nonzero()[:count, 0]]


def turned(scene: WalkState, frames: int) -> WalkState:
    """Away to the right, looking about for what is left of the time, and back."""
    middle = frames - 1 - 2 * AWAY
    about = ["right"] * 3 + ["left"] * 3
    steps = [[]] + [["right"]] * AWAY + [[key] for key in about] * (middle // 6) + [[]] * (middle % 6)
    keys = held(*steps, *[["left"]] * AWAY)
    return scene.walking(keys.expand(len(scene), -1, -1))


def walked_off(scene: WalkState, frames: int) -> WalkState:
    """Away to the side on which nothing is in the way, straight on, and back the same way, looking where it looked."""
    off = (frames + 1) // 2 - 1 - AWAY
    right = held([], *[["right"]] * AWAY, *[["w"]] * off)
    keys = torch.stack([there_and_back(side[None])[0] for side in (right, opposite(right))])  # (2,F,6)
    free = torch.stack([is_free(scene.walking(side.expand(len(scene), -1, -1))) for side in keys], dim=1)
    return scene.walking(keys[free.int().argmax(1)])


def glanced(scene: WalkState, turns: int) -> WalkState:
    """Away, a training length straight on, and so many turns to the right and back."""
    steps = [["right"]] * AWAY + [["w"]] * 16 + [["right"]] * turns + [["left"]] * turns
    return scene.walking(held([], *steps).expand(len(scene), -1, -1))


def without_objects(scene: WalkState) -> WalkState:
    return dataclasses.replace(scene, present=torch.zeros_like(scene.present))


def first_picture(scene: WalkState) -> Tensor:
    """-> (B,1,3,H,W)."""
    return paint(scene, scene.yaw[:, :1], scene.at[:, :1])


def spelled(policy: str, paths: dict[str, WalkState]) -> str | None:
    longest = max(path.yaw.shape[1] for path in paths.values())
    return {"full": f"window:window={longest}", "own": None}.get(policy, policy)


@torch.no_grad()
def made(
    pipeline: Pipeline, paths: dict[str, WalkState], args: argparse.Namespace, *, given: bool = True
) -> dict[str, Tensor]:
    """-> the last picture (B,1,3,H,W) of each path."""
    found = {}
    for name, path in paths.items():
        parts = []
        for start in range(0, len(path), args.batch):
            some = path[start : start + args.batch]
            seeds = list(range(args.seed + start, args.seed + start + len(some)))
            frames = 1 + TEMPORAL * (some.yaw.shape[1] - 1)
            request = ClipRequest(
                captions(some), frames, seeds, prefix=first_picture(some) if given else None, fields=fields(some)
            )
            parts.append(last_picture(pipeline, request))
        found[name] = torch.cat(parts)
    return found


def last_picture(pipeline: Pipeline, request: ClipRequest) -> Tensor:
    """As `Pipeline.generate`, but only the end is decoded -> (B,1,3,H,W)."""
    checked, device = request.check(pipeline, pipeline.text), pipeline.device
    told = Conditioning(pipeline.text.encode(checked.prompts), request.fields_for(checked.plan.frames)).to(device)
    prefix = None if checked.prefix is None else pipeline.codec.encode(checked.prefix.to(device))
    noise = KeyedNoise(checked.seeds, pipeline.export.latent, device)
    prepared = pipeline.denoiser_for(pipeline.sampling).prepare(told)
    made = collect(pipeline.rollout(checked.plan, prepared, noise, batch=len(told), prefix=prefix))
    latents = made if prefix is None else torch.cat([prefix, made], dim=1)
    return pipeline.codec.decode(latents[:, -TAIL:])[:, -1:].cpu().clamp(-1, 1).contiguous()


def words(pipeline: Pipeline, scene: WalkState, args: argparse.Namespace) -> Tensor:
    """First pictures (B,1,3,H,W) of captions alone."""
    return made(pipeline, {"first": scene.walking(scene.keys[:, :1])}, args, given=False)["first"]


def tell(
    args: argparse.Namespace, scene: WalkState, truth: Tensor, empty: Tensor, shown: dict[str, dict[str, Tensor]]
) -> None:
    """Write the table, its numbers, and a sheet for each path: the true pictures, and below them each row's."""
    result: dict[str, Any] = {}
    lines = ["| | path | psnr | remembers | ahead |", "|---|---|---|---|---|"]
    for label, pictures in shown.items():
        for name, seen in pictures.items():
            if name == "far":
                continue
            right, wrong = psnr(seen[:, 0], truth[:, 0]), psnr(seen[:, 0], empty[:, 0])
            is_there = (colors_in(seen[:, 0]) == scene.color[:, 0, None, None]).sum((1, 2)) >= LEAST_PIXELS
            clips = {
                "psnr": right,
                "remembers": (right > wrong).float(),
                "ahead": torch.where(scene.present[:, 0], is_there.float(), torch.nan),
            }
            if name == "glance":
                clips = {"psnr": psnr(seen[:, 0], pictures["far"][:, 0])}
            found = {metric: estimate(values) for metric, values in clips.items()}
            result.setdefault(label, {})[name] = {
                metric: {"mean": one.mean, "stderr": one.stderr, "clips": clips[metric].tolist()}
                for metric, one in found.items()
            }
            cells = " | ".join(f"{one.mean:.2f} ± {one.stderr:.2f}" for one in found.values())
            lines.append(f"| {label} | {name} | {cells} |" + " |" * (3 - len(found)))
    facts = {"clips": args.clips, "seed": args.seed, "model": args.model, "torch": str(torch.__version__)}
    write_text(args.out / "memory.json", json.dumps({"facts": facts, "rows": result}, indent=1).replace("NaN", "null"))
    write_text(args.out / "table.md", "\n".join(lines) + "\n")
    for name in dict.fromkeys(
        name for pictures in shown.values() for name in pictures if name not in ("far", "glance")
    ):
        rows = {"true": truth} | {label: pictures[name] for label, pictures in shown.items() if name in pictures}
        strips = [pictures[:12, 0] for pictures in rows.values()]  # a scene a column
        contact_sheet(strips, args.out / f"{name.replace(', ', '-')}.png", list(rows), columns=12)


if __name__ == "__main__":
    main()
