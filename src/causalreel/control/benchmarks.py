"""minWM's benchmark files: what is to be made, and how the results are called.

A JSON list of {id, caption, trajectory?, image?}; results are {id}.mp4 beside a manifest.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalreel.foreign import read_json_list, shown

NAME_LENGTH = 100


@dataclass(frozen=True)
class Item:
    """One video to be made."""

    id: str
    caption: str
    trajectory: str | None = None
    image: Path | None = None
    """Picture of the first frame; in the file relative to the file."""


def read_benchmark(path: str | Path) -> list[Item]:
    """The items of a benchmark file; ValueError naming one that lacks something, or two that would have one name."""
    path = Path(path)
    found = read_json_list(path, what="benchmark file")
    if not found:
        raise ValueError(f"benchmark file {path} holds no item")
    items, names = [], dict[str, str]()
    for number, entry in enumerate(found):
        item = _item(entry, path, f"benchmark file {path}, item {number}")
        name = output_name(item.id)
        if name in names:
            raise ValueError(
                f"benchmark file {path}: the ids {shown(names[name])!r} and {shown(item.id)!r} both give {name}"
            )
        names[name] = item.id
        items.append(item)
    return items


def _item(entry: object, path: Path, where: str) -> Item:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where}: expected an object, got {shown(entry)}")
    texts: dict[str, str | None] = {}
    for key in ("id", "caption", "trajectory", "image"):
        value = entry.get(key)
        if value is None and key in ("trajectory", "image"):
            texts[key] = None
        elif isinstance(value, str) and (value.strip() or key == "id"):
            texts[key] = value
        else:
            raise ValueError(f"{where}: {key} is {shown(value)}, expected text")
    image = texts["image"]
    return Item(
        id=texts["id"] or "",
        caption=texts["caption"] or "",
        trajectory=texts["trajectory"],
        image=None if image is None else path.parent / image,
    )


def output_name(name: str) -> str:
    """The file of an item: other characters than letters, digits, . _ - become _, 100 at most, `sample` if blank."""
    cleaned = re.sub(r"[^A-Za-z0-9._ -]", "_", name).strip()
    return f"{re.sub(r' +', '_', cleaned)[:NAME_LENGTH] or 'sample'}.mp4"


def manifest(items: Sequence[Item], seeds: Sequence[int]) -> dict[str, Any]:
    """What manifest.json holds for finished items: seeds are the first one plus the index, however work was shared."""
    rows = [
        {
            "index": index,
            "id": item.id,
            "prompt": item.caption,
            "trajectory": item.trajectory,
            "seed": seed,
            "video": output_name(item.id),
        }
        for index, (item, seed) in enumerate(zip(items, seeds, strict=True))
    ]
    return {"items": rows}
