"""Which videos there are to prepare, and what they show: a folder, a table, or webdataset tars.

A folder has videos with captions beside them, `x.mp4` and `x.txt`. A table is CSV or JSON lines with the columns path,
caption and, in seconds, start and end; paths are relative to the table. Tars hold `KEY.mp4` and `KEY.txt`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalreel.data.tars import Part, members, read_member
from causalreel.foreign import parse_json, read_text, shown

_SUFFIXES = "mp4 mov m4v mkv webm avi ts mts m2ts mpg mpeg flv ogv wmv gif 3gp y4m mxf"
VIDEOS = frozenset(f".{each}" for each in _SUFFIXES.split())
CAPTION_BYTES = 1 << 16
TABLE_BYTES = 1 << 30
NAMES = {
    "path": ("path", "video", "video_path", "file_path", "file_name", "file"),
    "caption": ("caption", "text", "prompt", "cap"),
    "start": ("start", "start_time"),
    "end": ("end", "end_time"),
}
"""Column -> what tables in circulation call it."""


@dataclass(frozen=True)
class Item:
    """A video, or a part of one, that clips are to be cut from."""

    name: str
    """What reports call it: its path within the source, and its part."""
    file: Path
    caption: str | None
    """None: none was found, or none that can be read."""
    start: float = 0.0
    end: float | None = None
    """Seconds."""
    part: Part | None = None
    """Where in a tar it is."""
    problem: str | None = None
    """Why its caption cannot be read."""

    @contextlib.contextmanager
    def on_disk(self, scratch: Path) -> Iterator[Path]:
        """The video as a file of its own; one in a tar is copied into `scratch` for the while."""
        if self.part is None:
            yield self.file
            return
        target = scratch / f"member{Path(self.name).suffix[:16]}"
        try:
            with self.file.open("rb") as archive, target.open("wb") as copy:
                archive.seek(self.part[0])
                left = self.part[1]
                while left and (piece := archive.read(min(left, 1 << 22))):
                    left -= copy.write(piece)
            yield target
        finally:
            with contextlib.suppress(OSError):
                target.unlink()


def items_of(source: Path) -> list[Item]:
    """The videos of a source in their order; ValueError, in one line, if there are none or none has a caption."""
    if source.is_dir():
        tars = sorted(path for path in source.glob("*.tar") if not path.name.startswith("."))
        found = [item for tar in tars for item in _of_tar(tar)] if tars else list(_of_folder(source))
        what = "webdataset tars with .mp4 and .txt" if tars else f"videos ({', '.join(sorted(VIDEOS))}) or .tar files"
    elif source.suffix == ".tar":
        found, what = list(_of_tar(source)), "webdataset samples, .mp4 and .txt"
    elif source.suffix in (".csv", ".tsv", ".jsonl"):
        found, what = list(_of_table(source)), "rows with a path and a caption"
    elif not source.exists():
        raise ValueError(
            f"no videos at {shown(str(source), 400)}: a folder, a .csv or .jsonl table, or .tar is expected"
        )
    else:
        raise ValueError(f"{source} is no folder of videos, no .csv, .tsv or .jsonl table and no .tar")
    if not found:
        raise ValueError(f"{source} holds no {what}")
    if all(item.caption is None for item in found):
        if (problem := next((item.problem for item in found if item.problem), None)) is not None:
            raise ValueError(f"{source}: no caption can be read, the first one: {problem}")
        raise ValueError(
            f"{source} has {len(found)} videos and no captions: each needs a text file beside it, such as "
            f"{Path(found[0].name).with_suffix('.txt')} for {found[0].name}"
        )
    return found


# ---- folders


def _of_folder(source: Path) -> Iterator[Item]:
    for path in sorted(source.rglob("*")):
        inside = path.relative_to(source)
        if (
            path.suffix.lower() not in VIDEOS
            or any(part.startswith(".") for part in inside.parts)
            or not path.is_file()
        ):
            continue
        beside = path.with_suffix(".txt")
        caption, problem = _caption_of(beside) if beside.is_file() else (None, None)
        yield Item(inside.as_posix(), path, caption, problem=problem)


def _caption_of(path: Path) -> tuple[str | None, str | None]:
    """-> the caption, and why there is none."""
    try:
        return read_text(path, most=CAPTION_BYTES, what="caption").strip() or None, None
    except ValueError as error:
        return None, str(error)


# ---- tables


def _of_table(source: Path) -> Iterator[Item]:
    text = read_text(source, most=TABLE_BYTES, what="table of videos")
    rows = _json_rows(text, source) if source.suffix == ".jsonl" else _table_rows(text, source)
    for place, row in rows:
        path = _column(row, "path", str, place)
        if not path:
            raise ValueError(f"{place} has no path; columns are path, caption, start, end")
        start, end = _column(row, "start", float, place) or 0.0, _column(row, "end", float, place)
        if end is not None and end <= start:
            raise ValueError(f"{place}: end {end:g} is not behind start {start:g}")
        caption = (_column(row, "caption", str, place) or "").strip() or None
        name = path if not start and end is None else f"{path}#t={start:g}{'' if end is None else f',{end:g}'}"
        yield Item(name, source.parent / path, caption, start, end)


def _table_rows(text: str, source: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if source.suffix == ".tsv" else ",")
    try:
        heads = [head.strip().lower() for head in reader.fieldnames or ()]
        if not set(heads) & set(NAMES["path"]):
            raise ValueError(
                f"{source}: its first line must name the columns path, caption, start, end; got {shown(heads, 80)}"
            )
        reader.fieldnames = heads
        for row in reader:
            place = f"{source}, line {reader.line_num}"
            if row.get(None) is not None:  # type: ignore[call-overload] - what csv calls cells without a column
                raise ValueError(f"{place} has more cells than there are columns; a caption with commas needs quotes")
            yield place, row
    except csv.Error as error:
        raise ValueError(f"{source}, line {reader.line_num}: {shown(str(error))}") from None


def _json_rows(text: str, source: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"{source}, line {number}"
            yield place, parse_json(line, place)


def _column(row: Mapping[str, Any], name: str, kind: type, place: str) -> Any:
    """A row's value under any of the names of a column; None if it has none."""
    value = next((row[each] for each in NAMES[name] if row.get(each) not in (None, "")), None)
    if value is None:
        return None
    if kind is str:
        if not isinstance(value, str) or "\0" in value:
            raise ValueError(f"{place}: {name} must be a text, got {shown(value, 60)}")
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < 1e7 or isinstance(value, bool):
        raise ValueError(f"{place}: {name} must be seconds from 0 on, got {shown(value, 60)}")
    return number


# ---- tars


def _of_tar(source: Path) -> Iterator[Item]:
    """Samples in their order: KEY.mp4 with KEY.txt, or with KEY.json that has a caption."""
    found: dict[str, dict[str, tuple[str, Part]]] = {}
    for name, part in members(source):
        above, _, last = name.rpartition("/")
        stem, _, suffix = last.partition(".")
        if last.startswith("."):
            continue
        parts = found.setdefault(f"{above}/{stem}", {})
        if (kind := f".{suffix.lower()}") in parts:
            raise ValueError(f"{source}: '{shown(name)}' is in it twice")
        parts[kind] = name, part
    for key, parts in found.items():
        video = next((suffix for suffix in parts if suffix in VIDEOS), None)
        if video is not None:
            name, part = parts[video]
            caption, problem = None, None
            try:
                caption = _caption_in(source, parts, key)
            except ValueError as error:
                problem = str(error)
            yield Item(f"{source.name}/{name}", source, caption, part=part, problem=problem)


def _caption_in(source: Path, parts: Mapping[str, tuple[str, Part]], key: str) -> str | None:
    place = f"{source}: {shown(key, 100)}"
    for suffix in (".txt", ".caption", ".json"):
        if suffix not in parts:
            continue
        part = parts[suffix][1]
        if part[1] > CAPTION_BYTES:
            raise ValueError(f"{place}{suffix} has {part[1]:,} bytes, a caption has at most {CAPTION_BYTES:,}")
        try:
            text = read_member(source, part).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise ValueError(f"{place}{suffix} is not UTF-8 text") from None
        told = _column(parse_json(text, f"{place}{suffix}"), "caption", str, place) if suffix == ".json" else text
        if told and told.strip():
            return told.strip()
    return None
