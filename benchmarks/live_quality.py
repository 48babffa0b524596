"""How well an endless stream of the tiny model holds its prompt, and how soon it follows another: exact metrics.

    python benchmarks/live_quality.py --streams 16 --chunks 120

One table for the ways to go on for ever (follow, consistency and quality in three stretches of the stream), one for the
ways to change the prompt (follow of the new prompt, chunk by chunk behind the change).
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator

import torch

from causalreel import families, load
from causalreel.eval.metrics import measure
from causalreel.infer.commands import MODES
from causalreel.infer.live import Live, Policy, encode_prompt
from causalreel.infer.models import profile
from causalreel.nn.masks import Context
from causalreel.nn.policies.registry import without_own
from causalreel.vocabulary import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, SIZES, SLOTS, SPEEDS

STRETCHES = ((0, 12), (12, 40), (40, None))
CHANGE = 10
"""Chunks before the prompt changes: in the middle of nothing, so that segments do not begin there anyway."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=120)
    parser.add_argument("--behind", type=int, default=16, help="chunks looked at behind a change")
    parser.add_argument("--only", choices=("streams", "changes"))
    args = parser.parse_args()
    if args.chunks <= STRETCHES[-1][0]:
        parser.error(f"--chunks must be more than {STRETCHES[-1][0]}, where the last stretch begins")
    if min(args.streams, args.behind) < 1:
        parser.error(f"--streams and --behind must be at least 1, got {args.streams} and {args.behind}")
    try:
        words = families.of(profile(args.model).export).text.words
    except (ValueError, OSError) as error:
        parser.error(f"--model: {error}")
    if words != SLOTS:
        parser.error(f"--model must be one that reads the tiny world's prompts, such as tiny; got {args.model}")
    pipeline = load(args.model, device="cpu")
    if args.only != "changes":
        streams(pipeline, args)
    if args.only != "streams":
        changes(pipeline, args)


def streams(pipeline, args) -> None:
    export, chunk = pipeline.export, pipeline.sampling.chunk
    policies = {
        f"renew, keep {keep}": Policy.of(export, pipeline.sampling, "renew", keep) for keep in kept(export, chunk)
    }
    half = Policy("slide", 1023, chunk, Context(window=export.frames // 2 // chunk * chunk))
    for policy in (Policy.of(export, pipeline.sampling, "slide"), half):
        policies[sliding(policy, export.frames // chunk * chunk, chunk)] = policy
    policies["full cache, absolute positions"] = Policy("slide", 1023, chunk)
    print(f"{args.model}: {args.streams} streams of {args.chunks} chunks; follow / consistency / quality")
    for name, policy in policies.items():
        rows = [scores(pipeline, policy, seed, args.chunks) for seed in range(args.streams)]
        cells = [" / ".join(f"{mean(row[i][k] for row in rows):.3f}" for k in range(3)) for i in range(len(STRETCHES))]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def sliding(policy: Policy, frames: int, chunk: int) -> str:
    """slide under which context policy, with the numbers that its name alone does not say: "slide, window 12"."""
    context = policy.context
    is_window = isinstance(context, Context) and context == Context(context.window)
    return f"slide, {f'window {context.window}' if is_window else without_own(context, frames=frames, chunk=chunk)}"


def changes(pipeline, args) -> None:
    export, chunk = pipeline.export, pipeline.sampling.chunk
    default = Policy.of(export, pipeline.sampling, "renew").keep
    print(f"follow of the new prompt in chunks behind the change; {args.streams} streams")
    for keep in kept(export, chunk):
        policy = Policy.of(export, pipeline.sampling, "renew", keep)
        modes = MODES if keep == default else ("recompute",)
        for mode in modes:
            curves = [change(pipeline, policy, seed, mode, args.behind) for seed in range(args.streams)]
            cells = [f"{mean(curve[i] for curve in curves):.2f}" for i in range(args.behind)]
            print(f"| {mode}, keep {keep} | {' | '.join(cells)} |", flush=True)


def kept(export, chunk: int) -> list[int]:
    return sorted({max(round(export.frames * part) // chunk * chunk, chunk) for part in (0.25, 0.5, 0.75)} | {chunk})


def prompt(seed: int) -> str:
    """A full sentence with one object, so that nothing is left to chance."""
    pick = random.Random(seed).choice
    words = f"a {pick(SIZES)} {pick(COLORS)} {pick(SHAPES)} moves {pick(DIRECTIONS)} {pick(SPEEDS)}"
    return f"{words} on a {pick(BACKGROUNDS)} background"


def pixels(pipeline, policy: Policy, seed: int, chunks: int, new: tuple[str, str] | None = None) -> Iterator:
    """Yield the frames (1,t,3,H,W) of each chunk; `new` is a mode and a prompt from chunk CHANGE on."""
    live = Live(pipeline, encode_prompt(pipeline, prompt(seed)), seed=seed, policy=policy)
    decode = pipeline.codec.stream()
    for index in range(chunks):
        if new is not None and index == CHANGE:
            live.tell(encode_prompt(pipeline, new[1]), mode=new[0], chunks=4)
        yield decode(live.next_chunk().latents)


def scores(pipeline, policy: Policy, seed: int, chunks: int) -> list[tuple[float, float, float]]:
    shown = list(pixels(pipeline, policy, seed, chunks))
    result = []
    for first, last in STRETCHES:
        score = measure(torch.cat(shown[first:last], dim=1), [prompt(seed)])
        result.append((score.follow.item(), score.consistency.item(), score.quality.item()))
    return result


def change(pipeline, policy: Policy, seed: int, mode: str, behind: int) -> list[float]:
    new = prompt(1000 + seed)
    shown = list(pixels(pipeline, policy, seed, CHANGE + behind, (mode, new)))[CHANGE:]
    return [measure(frames[:, -1:], [new]).follow.item() for frames in shown]


def mean(values) -> float:
    known = [value for value in values if value == value]
    return sum(known) / len(known) if known else math.nan


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
