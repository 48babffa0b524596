"""A prepared folder looked at whole: every byte as it was written, every row finite, none twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from causalreel.data.manifest import MANIFEST, NULL, read_manifest
from causalreel.data.packing import Moments
from causalreel.data.shards import Shard, agree, read_captions, read_ragged_text, read_shard, shards
from causalreel.hashed import sha256_of

FAR_MEAN, FAR_STD = 1.0, (0.3, 3.0)
"""Normalised latents have means near 0 and standard deviations near 1: beyond these a set is warned about."""


@dataclass
class Findings:
    """What a check has found."""

    clips: int = 0
    shards: int = 0
    shape: tuple[int, ...] = ()
    """Of a clip."""
    problems: list[str] = field(default_factory=list)
    """What training would fail at, or should."""
    warnings: list[str] = field(default_factory=list)
    """What is allowed and worth a look."""
    moments: Moments = field(default_factory=Moments)
    tokens: int = 0
    """Of the stored text, in all."""


def check(folder: Path) -> Findings:
    """Read everything; ValueError only where there is nothing to check."""
    found, first = Findings(), None
    seen: dict[bytes, str] = {}
    twice: list[str] = []
    for path in shards(folder):
        try:
            shard = read_shard(path)
            first = agree(first, shard)
            captions = read_captions(path, shard.clips)
            found.shape = shard.shape
            found.clips, found.shards = found.clips + shard.clips, found.shards + 1
            found.problems += _rows(shard, captions, seen, twice, found)
        except ValueError as error:
            found.problems.append(str(error))
    found.problems += [*_against_manifest(folder), *twice]
    if first is not None and first.text_width is not None and not (folder / NULL).is_file():
        found.warnings.append(f"{folder} has no {NULL}: training with guidance needs the unconditional text")
    found.warnings += _far(found.moments)
    return found


def _rows(
    shard: Shard, captions: list[str], seen: dict[bytes, str], twice: list[str], found: Findings
) -> Iterator[str]:
    """Problems of a shard's rows, numbers that are none; clips that were there before go to `twice`."""
    lengths = shard.lengths("text") if shard.text_width is not None else None
    if lengths is not None:
        found.tokens += int(lengths.sum())
        bad = [row for row, text in enumerate(shard.texts()) if not text.isfinite().all()]
        yield from (f"{shard.path}: clip {row} has text that is not finite" for row in bad)
        if empty := int((lengths == 0).sum()):
            found.warnings.append(f"{shard.path}: {empty} clips have text without a token")
    sources = read_ragged_text(shard, "sources") if "sources" in shard.entries else []
    for row in range(shard.clips):
        place = f"{shard.path}: clip {row}{f' ({sources[row]})' if sources else ''}"
        digest = hashlib.sha256(captions[row].encode() if shard.kind is None else b"")
        if shard.kind is not None:
            clip = shard.clip(row)
            digest.update(clip.view(torch.uint8).numpy().data)
            if not clip.isfinite().all():
                yield f"{place} has latents that are not finite"
                continue
            found.moments.add(clip)
        if (before := seen.setdefault(digest.digest(), place)) != place:
            twice.append(f"{place} is the same as {before}")


def _against_manifest(folder: Path) -> Iterator[str]:
    """Problems of a folder whose manifest names other files or other bytes."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        yield str(error)
        return
    if manifest is None:
        return
    told = {shard.file: shard for shard in manifest.shards}
    there = {path.name for path in shards(folder)}
    yield from (f"{folder}: shard {name} of {MANIFEST} is missing" for name in sorted(set(told) - there))
    yield from (f"{folder}: shard {name} is not in {MANIFEST}" for name in sorted(there - set(told)))
    for name in sorted(there & set(told)):
        if sha256_of(folder / name) != told[name].sha256:
            yield f"{folder / name} is not as it was written: its hash is another than in {MANIFEST}"
    if manifest.null is not None:
        path = folder / NULL
        if not path.is_file() or sha256_of(path) != manifest.null:
            yield f"{path} is missing or not as it was written"


def _far(moments: Moments) -> list[str]:
    """Whether latents look normalised, in words."""
    told = moments.told()
    if not told:
        return []
    means, stds = torch.tensor(told["mean"]), torch.tensor(told["std"])
    if means.abs().max() < FAR_MEAN and FAR_STD[0] < stds.min() and stds.max() < FAR_STD[1]:
        return []
    return [
        f"latents do not look normalised: means of channels {means.min():.2f} to {means.max():.2f}, deviations "
        f"{stds.min():.2f} to {stds.max():.2f}; about 0 and 1 are usual"
    ]
