"""What to generate, from files: prompt files, one prompt a line or JSON lines, and folders of pictures with prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


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
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file: {error.reason} at byte {error.start}") from None
    found = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise ValueError(f"{path} holds no prompt")
    if path.suffix != ".jsonl":
        return [Wanted(line) for _, line in found]
    return [_from_json(line, f"{path}, line {number}", path.parent) for number, line in found]


def read_pairs(folder: str | Path) -> list[Wanted]:
    """A folder of pictures, each with its prompt in a .txt file of the same name beside it, in order of names."""
    folder = Path(folder)
    pictures = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not pictures:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)})")
    lonely = [picture.name for picture in pictures if not picture.with_suffix(".txt").is_file()]
    if lonely:
        raise ValueError(f"{folder}: no prompt for {', '.join(lonely[:3])}: each picture needs a .txt of the same name")
    twice = [a.stem for a, b in pairwise(pictures) if a.stem == b.stem]
    if twice:
        raise ValueError(f"{folder}: two pictures are called {twice[0]}")
    prompts = [" ".join(picture.with_suffix(".txt").read_text(encoding="utf-8").split()) for picture in pictures]
    empty = [picture.stem for picture, prompt in zip(pictures, prompts, strict=True) if not prompt]
    if empty:
        raise ValueError(f"{folder}: {empty[0]}.txt is empty")
    return [Wanted(prompt, picture, name=picture.stem) for picture, prompt in zip(pictures, prompts, strict=True)]


def _from_json(line: str, where: str, folder: Path) -> Wanted:
    allowed = {"prompt": str, "image": str, "seed": int}
    try:
        row = json.loads(line)
    except ValueError as error:
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
