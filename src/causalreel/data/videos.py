"""Videos prepared for training: decoded, cut, encoded, written as shards; with a report of what was left out.

Videos are taken in groups. A group's captions are embedded first, then its clips are encoded, so that one model is in
memory at a time; what is finished lies in `.prepare/`, whole or not there, and is not done again after a kill. A
group's shards depend on the group alone: any number of processes, each with every n-th group, write the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from causalreel.data.encoding import embed, encode_clips
from causalreel.data.groups import WORK, Group, Plan, Share, Teller, read_part
from causalreel.data.listing import Item
from causalreel.data.manifest import NULL, Manifest, ShardEntry, read_manifest, write_manifest
from causalreel.data.packing import Moments, write_null
from causalreel.data.sheet import Tile, write_sheet
from causalreel.files import write_text
from causalreel.folders import claim
from causalreel.foreign import read_json

log = logging.getLogger(__name__)

REPORT = "report.csv"
SHEET = "contact.png"


def prepare_videos(
    source: str, items: Sequence[Item], out: Path, plan: Plan, share: Share = Share()
) -> Manifest | None:
    """Prepare this process's share of the groups; the first process waits for the others and finishes the folder.

    -> the manifest, None in the other processes. ValueError where `out` holds other data. Nothing that one video does
    stops the others: what cannot be decoded, has no caption or gives no clip is in the report.
    """
    out = Path(out)
    made = json.loads(json.dumps(plan.made(source, items)))  # as it is read back
    groups = [items[first : first + plan.group] for first in range(0, len(items), plan.group)]
    with ExitStack() as stack:
        if share.rank == 0:
            stack.enter_context(claim(out, "preparing"))
        _agree(out, made, share)
        if (held := read_manifest(out)) is not None and held.made == made and _is_whole(out, held):
            return held if share.rank == 0 else None
        mine = [Group(out, number, group, plan) for number, group in enumerate(groups)][share.rank :: share.size]
        waiting = [group for group in mine if not group.is_done]
        if waiting or share.rank == 0:
            embed(out, waiting, plan)
        encode_clips(waiting, plan, share)
        if share.rank > 0:
            return None
        _wait([Group(out, number, group, plan) for number, group in enumerate(groups)])
        return _finish(out, made, len(groups))


def _is_whole(out: Path, manifest: Manifest) -> bool:
    """Whether all files that a manifest names are there."""
    if manifest.null is not None and not (out / NULL).is_file():
        return False
    paths = [(out / shard.file, shard.bytes) for shard in manifest.shards]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _agree(out: Path, made: dict[str, Any], share: Share) -> None:
    """The first process writes what is made here, or checks that the folder holds the same; the others wait for it."""
    path = out / WORK / "plan.json"
    while True:
        held = read_manifest(out)
        found = held.made if held is not None else read_json(path) if path.is_file() else None
        if found == made:
            return
        if share.rank == 0:
            break
        time.sleep(0.2)
    if found is not None:
        name = next(name for name in [*made, *found] if made.get(name) != found.get(name))
        raise ValueError(
            f"{out} holds data with {name}={found.get(name)}, asked for {name}={made.get(name)}: use another folder"
        )
    if any(out.glob("latents-*.safetensors")):
        raise ValueError(f"{out} holds shards that were not prepared here: use another folder")
    write_text(path, json.dumps(made, indent=1))


def _wait(groups: Sequence[Group]) -> None:
    """Until other processes have done their groups; if one fails, all end."""
    tell = Teller()
    while left := [group for group in groups if not group.is_done]:
        tell(f"waiting for {len(left)} of {len(groups)} groups of videos")
        time.sleep(0.5)


def _finish(out: Path, made: dict[str, Any], groups: int) -> Manifest:
    """Report, contact sheet, unconditional text, and the manifest last."""
    records = [read_json(out / WORK / f"{number:05d}.json") for number in range(groups)]
    left = [row for record in records for row in record["left"]]
    _write_report(out / REPORT, left)
    entries = tuple(ShardEntry(**entry) for record in records for entry in record["shards"])
    clips = sum(entry.clips for entry in entries)
    reasons = Counter(row["reason"].partition(":")[0] for row in left)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(6))
    if not clips:
        raise ValueError(f"no clip could be made of {made['source']} ({told}); {out / REPORT} says of each why")
    moments = Moments()
    for record in records:
        moments = moments.plus(Moments.revived(record["moments"]))
    tiles = [tile for record in records for tile in record["tiles"]]
    chosen = [tiles[i * len(tiles) // min(48, len(tiles))] for i in range(min(48, len(tiles)))]
    write_sheet(out / SHEET, [Tile(read_part(out / WORK / t["file"])["shown"].numpy(), t["caption"]) for t in chosen])
    null = write_null(out, read_part(out / WORK / "null.safetensors")["text"])
    statistics = moments.told() | {"clips": clips, "left out": dict(reasons)}
    manifest = Manifest(entries, made, statistics, null)
    write_manifest(out, manifest)
    log.info("%d clips in %d shards, %d left out%s", clips, len(entries), len(left), f": {told}" if told else "")
    return manifest


def _write_report(path: Path, left: list[Any]) -> None:
    table = io.StringIO(newline="")
    writer: Any = csv.DictWriter(table, ("source", "start", "reason"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(left)
    write_text(path, table.getvalue().encode(errors="backslashreplace").decode())  # a file's name may be no UTF-8
