"""`causalreel eval --changes`: videos of the tiny world that are told another prompt, judged around that moment.

Half of the second prompts name everything, half of them a few words; what these leave open should stay. The moment is
drawn too. Reported apart are prompts that say what is there and where it goes, and nothing else, as people steer, and
the examples that the live page shows, told behind each other. Models that are not
autoregressive make clips whose later frames read the second prompt, as in training; all others live videos. A table,
every stream's numbers and contact sheets of the frames around the change are written.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel import families
from causalreel.data.video import contact_sheet, to_bytes
from causalreel.data.world import prompts
from causalreel.eval.changes import LOOKED_AT, Changed, judge
from causalreel.eval.run import file_name, known, many_step, parse_model, with_steps
from causalreel.eval.statistics import Estimate, compare, summarise
from causalreel.files import write_text
from causalreel.folders import claim
from causalreel.infer.commands import Mode
from causalreel.infer.live import Live, hints, seen_in
from causalreel.infer.models import load
from causalreel.infer.pipeline import Pipeline
from causalreel.rollout import KeyedNoise
from causalreel.types import Conditioning
from causalreel.vocabulary import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    Caption,
    ObjectSpec,
    compose,
    parse_caption,
    said_of,
)

log = logging.getLogger(__name__)

COLUMNS = ("clean", "noise", "shown", "turned", "kept", "steady", "stayed")
"""Of the table: share of the streams without a foreign frame, then the means of `Changed`."""
ALONE = ", directions alone"
PAGE = ", examples of the page"
"""What is added to a model's name in the rows of these."""
ROUNDS = 4
"""How often each pair of them is played, at other moments and by other seeds."""
TOGETHER = 16
"""Streams that are made together, at most."""
SHEETS = 10
BEFORE, BEHIND = 2, LOOKED_AT
"""Frames of a contact sheet before the change and from it on."""


@dataclass(frozen=True)
class Told:
    """One stream: what it is told, and when."""

    seed: int
    first: str
    second: str
    at: int
    """Latent frames before the change: at least so many of a live video, at most so many of a clip."""


@dataclass(frozen=True)
class Stream:
    """How it went."""

    told: Told
    result: Changed
    frames: Tensor
    """(t,3,H,W) uint8 around the change."""


def draw(count: int, *, seed: int) -> list[Told]:
    """What `count` streams are told, the same for every model."""
    whole = prompts(2 * count, seed=seed + 17)
    found = []
    for number in range(count):
        chance = random.Random(f"{seed}/{number}/change")
        second = whole[count + number] if chance.random() < 0.5 else _open(chance)
        found.append(Told(seed + number, whole[number], second, chance.randrange(3, 15)))
    return found


def of_the_page(examples: Sequence[str], count: int, *, seed: int) -> list[Told]:
    """The live page's own examples, each told behind each of the others, `ROUNDS` times; at most `count` streams."""
    found = []
    for number, (first, second) in enumerate(ROUNDS * list(itertools.permutations(examples, 2))):
        chance = random.Random(f"{seed}/{number}/page")
        found.append(Told(seed + number, first, second, chance.randrange(3, 15)))
    return found[:count]


def steered(count: int, *, seed: int) -> list[Told]:
    """What `count` streams are told that are only sent elsewhere: the things that are there, by colour and shape, and
    where one of them or all of them go, drawn of all directions. So a quarter is told the same one again."""
    found = []
    for number, first in enumerate(prompts(count, seed=seed + 19)):
        chance = random.Random(f"{seed}/{number}/steered")
        objects = [ObjectSpec(one.color, one.shape) for one in parse_caption(first).objects]
        told = [[n] for n in range(len(objects))] + [list(range(len(objects)))]
        for n in chance.choice(told):
            objects[n] = dataclasses.replace(objects[n], direction=chance.choice(DIRECTIONS))
        found.append(Told(seed + number, first, compose(Caption(tuple(objects))), chance.randrange(3, 15)))
    return found


def _open(chance: random.Random) -> str:
    """A prompt of a few words."""
    pick = chance.choice
    kinds = (
        lambda: f"a {pick(COLORS)} {pick(SHAPES)}",
        lambda: f"a {pick(SHAPES)}",
        lambda: f"a {pick(SIZES)} {pick(COLORS)} {pick(SHAPES)}",
        lambda: f"a {pick(COLORS)} {pick(SHAPES)} moves {pick(DIRECTIONS)}",
        lambda: f"a {pick(COLORS)} {pick(SHAPES)} moves {pick(DIRECTIONS)} {pick(SPEEDS)}",
        lambda: f"a {pick(COLORS)} {pick(SHAPES)} on a {pick(BACKGROUNDS)} background",
        lambda: f"on a {pick(BACKGROUNDS)} background",
    )
    return pick(kinds)()


@torch.no_grad()
def play(pipeline: Pipeline, told: Sequence[Told], *, mode: Mode | None = None, rows: int = 1) -> Iterator[Stream]:
    """Videos and their changes, in the order in which they are made; mode None: as a prompt is taken that names none.

    rows: how many are made together, of those that change at the same chunk; on a GPU always so many, because every
    other number would be compiled or recorded anew. What a video shows does not depend on it, up to rounding.
    Raises ValueError for a mode of a model that generates whole clips.
    """
    chunk = pipeline.sampling.chunk
    if chunk is None and mode is not None:
        raise ValueError(f"mode is of live videos, and this model generates whole clips: got {mode!r}")
    together: dict[int, list[Told]] = {}
    for one in told:
        together.setdefault(_change(pipeline, one), []).append(one)
    for at, ones in together.items():
        for first in range(0, len(ones), rows):
            some = ones[first : first + rows]
            filled = some if pipeline.device.type == "cpu" else some + some[-1:] * (rows - len(some))
            made = _clips(pipeline, filled, at) if chunk is None else _live(pipeline, filled, at // chunk, mode)
            yield from made[: len(some)]


def _change(pipeline: Pipeline, told: Told) -> int:
    """Latent frames before the change: whole chunks, or as many as leave enough of a clip."""
    chunk, behind = pipeline.sampling.chunk, _behind(pipeline)
    if chunk is not None:
        return -(-told.at // chunk) * chunk
    at = min(told.at, pipeline.export.frames - behind)
    if at < 2:
        needed, frames = 2 + behind, pipeline.export.frames
        raise ValueError(f"clips must have {needed} latent frames for a change to show, got {frames}")
    return at


def _behind(pipeline: Pipeline) -> int:
    """Latent frames from a change on that show what is looked at."""
    return 1 + BEHIND // pipeline.geometry.temporal


def _first(pipeline: Pipeline, told: Sequence[Told]) -> list[str]:
    """What holds before each change."""
    return [pipeline.text.complete(one.first, one.seed) for one in told]


def _second(pipeline: Pipeline, told: Sequence[Told], before: list[str], seen: Tensor | None) -> list[str]:
    """What holds behind it, as a session completes it; seen (B,T,3,H,W): the last frames, if it looks at them."""
    rows = zip(told, before, [None] * len(told) if seen is None else seen, strict=True)
    return [pipeline.text.complete(one.second, one.seed, before=held, seen=frames) for one, held, frames in rows]


def _retold(pipeline: Pipeline, before: list[str], after: list[str], seen: Tensor | None) -> list[str]:
    """What holds before each change, as it is told anew for it; seen: as of `_second`."""
    tell, shown = families.of(pipeline.export).text.retold, [None] * len(before) if seen is None else seen
    return before if tell is None else [tell(*one) for one in zip(before, after, shown, strict=True)]


def _live(pipeline: Pipeline, told: Sequence[Told], chunks: int, mode: Mode | None) -> list[Stream]:
    """Live videos that are told another prompt behind so many chunks."""
    before = _first(pipeline, told)
    live = Live(pipeline, pipeline.text.encode(before), seed=[one.seed for one in told])
    decode = pipeline.codec.stream() if pipeline.decoder is None else pipeline.decoder(len(told))
    frames: list[Tensor] = []
    latents: list[Tensor] = []

    def go_on(chunks: int) -> int:
        for _ in range(chunks):
            latents.append(live.next_chunk().latents)
            frames.append(torch.stack([to_bytes(one) for one in decode(latents[-1])]))
        return sum(made.shape[1] for made in frames)

    start = go_on(chunks)
    seen = seen_in(pipeline, torch.cat(latents, dim=1))
    after = _second(pipeline, told, before, seen)
    usual = families.of(pipeline.export).text.mode
    past = pipeline.text.encode(_retold(pipeline, before, after, seen))
    how: dict[str, Any] = {"mode": usual if mode is None else mode, "past": past}
    live.tell(pipeline.text.encode(after), **how)
    go_on(-(-_behind(pipeline) // (pipeline.sampling.chunk or 1)))
    live.close()
    shown = torch.cat(frames, dim=1)
    return [_judged(*one, start) for one in zip(told, shown, before, after, strict=True)]


def _clips(pipeline: Pipeline, told: Sequence[Told], at: int) -> list[Stream]:
    """The same of a model that sees all frames at once, which read the first prompt and then the second one."""
    before = _first(pipeline, told)
    seen = torch.empty(len(told), 0, 3, *pipeline.size)  # there is none yet
    after = _second(pipeline, told, before, seen)
    past = _retold(pipeline, before, after, seen)
    first, second = (Conditioning(pipeline.text.encode(said)).to(pipeline.device) for said in (past, after))
    changed = torch.ones(len(told), dtype=torch.bool, device=pipeline.device)
    told_by_frame = first.changing(second, changed, at, pipeline.export.frames)
    plan = pipeline.schedule()
    conditioning = pipeline.denoiser_for(plan.sampling).prepare(told_by_frame)
    noise = KeyedNoise([one.seed for one in told], pipeline.export.latent, pipeline.device)
    chunks = pipeline.rollout(plan, conditioning, noise, batch=len(told))
    latents = torch.cat([chunk.latents for chunk in chunks], dim=1)
    shown = [to_bytes(video) for video in pipeline.codec.decode(latents)]
    start = 1 + pipeline.geometry.temporal * (at - 1)
    placed = [dataclasses.replace(one, at=at) for one in told]
    return [_judged(*one, start) for one in zip(placed, shown, before, after, strict=True)]


def _judged(told: Told, frames: Tensor, before: str, after: str, start: int) -> Stream:
    """frames (T,H,W,3) uint8, of which the one at `start` is the first under the second prompt."""
    shown, new = frames.movedim(-1, 1), parse_caption(after)  # (T,3,H,W)
    said = said_of(told.second, before=before)
    if not said.objects:  # it names none, and all stay
        said = dataclasses.replace(said, objects=(ObjectSpec("", ""),) * len(new.objects))
    result = judge(shown / 127.5 - 1, start, parse_caption(before), new, said)
    return Stream(told, result, shown[start - BEFORE : start + BEHIND])


def numbers(streams: Sequence[Stream]) -> dict[str, Estimate]:
    """Column -> its mean over the streams that have it, with its standard error."""
    return summarise(_columns(streams))


def _columns(streams: Sequence[Stream]) -> dict[str, Tensor]:
    """Column -> a number for each stream, NaN where there is nothing to be seen of it."""

    def column(values: Iterable[float | None]) -> Tensor:
        return torch.tensor([float("nan") if value is None else value for value in values])

    results = [s.result for s in streams]
    return {
        "clean": column(float(r.noise == 0) for r in results),
        "noise": column(r.noise for r in results),
        "shown": column(r.is_shown for r in results),
        "turned": column(r.turned for r in results),
        "kept": column(r.kept for r in results),
        "steady": column(r.steady for r in results),
        "stayed": column(r.stayed for r in results),
    }


def table(rows: dict[str, dict[str, Estimate]]) -> str:
    """A Markdown table: means and standard errors."""
    lines = ["| model | " + " | ".join(COLUMNS) + " |", "|" + "---|" * (len(COLUMNS) + 1)]
    for label, row in rows.items():
        cells = [f"{row[name].mean:.3f} ± {row[name].stderr:.3f}" for name in COLUMNS]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(
    models: Sequence[str],
    *,
    out: Path,
    streams: int = 100,
    seed: int = 0,
    mode: Mode | None = None,
    guidance: float | None = None,
    device: str | None = None,
) -> dict[str, dict[str, Estimate]]:
    """Play, judge and write -> the rows of the table: each model, then each but the first less the first, paired.

    guidance: of models of many steps; None: their own.
    """
    rows: dict[str, dict[str, Estimate]] = {}
    columns: dict[str, dict[str, Tensor]] = {}
    specs = [parse_model(spec) for spec in models]
    names = [file_name(label) for label, _, _ in specs]
    for label, name in zip((spec[0] for spec in specs), names, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"two rows would be called {label!r}, or their files so: name one of them, label=model")
    with claim(out, "evaluation"):
        for name, (label, model, steps) in zip(names, specs, strict=True):
            pipeline = many_step(with_steps(load(model, device=device), steps), guidance=guidance)
            page = of_the_page(page_examples(pipeline), streams, seed=seed)
            sets = {
                (label, name): draw(streams, seed=seed),
                (f"{label}{ALONE}", f"{name}-directions"): steered(streams, seed=seed),
                (f"{label}{PAGE}", f"{name}-page"): page,
            }
            for (row, file), told in sets.items():
                found = list[Stream]()
                for one in play(pipeline, told, mode=mode, rows=TOGETHER):
                    found.append(one)
                    if len(found) % 10 == 0:
                        log.info("%s: %d of %d streams", row, len(found), len(told))
                found.sort(key=lambda stream: stream.told.seed)
                columns[row], rows[row] = _columns(found), numbers(found)
                _write(found, rows[row], out / f"changes-{file}")
        (first, _, _), *others = specs
        for label, _, _ in others:
            for kind in ("", ALONE, PAGE):
                one, other = columns[f"{label}{kind}"], columns[f"{first}{kind}"]
                rows[f"{label} less {first}{kind}"] = compare(one, other)
        write_text(out / "changes.md", table(rows) + "\n")
    return rows


def page_examples(pipeline: Pipeline) -> list[str]:
    """The prompts that the live page shows for a model."""
    return list(hints(pipeline.export)["examples"])


def _write(found: Sequence[Stream], row: dict[str, Estimate], path: Path) -> None:
    """Numbers of the streams, and a contact sheet of some of them, the noisiest first."""
    told = [{**dataclasses.asdict(s.told), **dataclasses.asdict(s.result)} for s in found]
    means, errors = (known({name: getattr(row[name], kind) for name in COLUMNS}) for kind in ("mean", "stderr"))
    content = json.dumps({"means": means, "errors": errors, "streams": told}, indent=1, allow_nan=False)
    write_text(path.with_name(f"{path.name}.json"), content)
    worst = sorted(found, key=lambda s: -s.result.noise)[: SHEETS // 2]
    some = worst + [s for s in found if s not in worst][: SHEETS - len(worst)]
    sheet = torch.stack([s.frames for s in some]) / 127.5 - 1
    captions = [f"{s.told.first} | {s.told.second}" for s in some]
    try:
        contact_sheet(sheet, path.with_name(f"{path.name}.png"), captions, columns=BEFORE + BEHIND)
    except ImportError as error:  # the numbers took minutes
        log.warning("no contact sheet %s: %s", path.name, error)
