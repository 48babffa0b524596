"""What to generate, from files: prompt files, one prompt a line or JSON lines, and folders of pictures with prompts."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from causalreel.data.pictures import suffixes
from causalreel.files import read_lines

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """One video: its prompt, and what it starts from and is drawn by where that is its own."""

    prompt: str
    image: Path | None = None
    """Picture that it starts with."""
    seed: int | None = None
    """None: counted up from the request's."""
    name: str | None = None
    """Of its file, without suffix; None: a number."""


def read_prompts(path: str | Path) -> list[Wanted]:
    """A text file with one prompt a line, or a .jsonl file with {"prompt": ..., "image": ..., "seed": ...} a line.

    Empty lines are skipped; image (relative to the file) and seed may be left out.
    """
    path = Path(path)
    found = [(number, line) for number, line in enumerate(read_lines(path), start=1) if line]
    if not found:
        raise ValueError(f"{path} holds no prompt")
    if path.suffix.lower() != ".jsonl":
        return [Wanted(line) for _, line in found]
    return [_from_json(line, f"{path}, line {number}", path.parent) for number, line in found]


def read_pairs(folder: str | Path) -> list[Wanted]:
    """A folder of pictures, each with its prompt in a .txt file of the same name beside it, in order of names.

    Hidden files are no part of it; other files that are not used are named in the log.
    """
    folder = Path(folder)
    files = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    pictures = [file for file in files if file.suffix.lower() in suffixes()]
    used = {*pictures, *(picture.with_suffix(".txt") for picture in pictures)}
    skipped = [file.name for file in files if file not in used]
    if not pictures:
        others = f"; it has {_some(skipped)}" if skipped else ""
        raise ValueError(f"{folder} holds no pictures such as .png or .jpg{others}")
    lonely = [picture.name for picture in pictures if not picture.with_suffix(".txt").is_file()]
    if lonely:
        raise ValueError(f"{folder}: no prompt for {_some(lonely)}: each picture needs a .txt of the same name")
    twice = [stem for stem, count in Counter(picture.stem for picture in pictures).items() if count > 1]
    if twice:
        raise ValueError(f"{folder}: two pictures are called {twice[0]}")
    if skipped:
        log.warning(
            "%s: skipped %s, which are no pictures that can be read and no prompts of any", folder, _some(skipped)
        )
    prompts = [" ".join(" ".join(read_lines(picture.with_suffix(".txt"))).split()) for picture in pictures]
    empty = [picture.stem for picture, prompt in zip(pictures, prompts, strict=True) if not prompt]
    if empty:
        raise ValueError(f"{folder}: {empty[0]}.txt is empty")
    return [Wanted(prompt, picture, name=picture.stem) for picture, prompt in zip(pictures, prompts, strict=True)]


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _from_json(line: str, where: str, folder: Path) -> Wanted:
    allowed = {"prompt": str, "image": str, "seed": int}
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
        raise ValueError(f'{where}: expected {{"prompt": "..."}}, got {line[:60]}')
    for key, value in row.items():
        if key not in allowed or not isinstance(value, allowed[key]) or isinstance(value, bool):
            raise ValueError(f"{where}: {key!r} must be one of prompt (text), image (path), seed (number)")
    image = folder / row["image"] if "image" in row else None
    return Wanted(row["prompt"].strip(), image, row.get("seed"))


def numbered(wanted: Sequence[Wanted]) -> list[str]:
    """A file name, without suffix, for each."""
    return [one.name or str(i) for i, one in enumerate(wanted)]
