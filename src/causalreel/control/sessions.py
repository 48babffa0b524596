"""Timed sessions in Zing's JSON lines: prompts by interval and keys by pixel frame, to spans of latents and windows.

Frames are pixel frames, 1 + 4 N of them with the reference picture; latent k holds pixel frames 4k-3 .. 4k, latent 0
the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from causalreel.control.strings import FRAMES
from causalreel.foreign import ordinary_file, parse_json, shown

KEYS = ("w", "a", "s", "d", "i", "j", "k", "l")
"""Columns of a row of keys."""
SIDE_MULTIPLE = 32
LINE_BYTES = 16 << 20
LARGEST = 100_000
"""Pixel frames, and the longest side."""


@dataclass(frozen=True)
class TimedSession:
    """One session: what is shown when, and which keys are held."""

    name: str
    latents: int
    """Latent frames, that of the reference picture included."""
    width: int
    height: int
    prompts: tuple[tuple[str, int], ...]
    """Prompt and for how many latent frames it counts, in order."""
    keys: NDArray[np.float32] | None
    """(latents, 4, 8): how far each key of KEYS is pressed in each pixel frame of a latent; zeros for latent 0."""
    image: str | None = None
    """Where the reference picture is."""

    def chunks(self, size: int = 2) -> list[tuple[int, int]]:
        """[start, end) of each chunk in latents: the first latent alone, `size` after it, cut at prompt borders."""
        borders, at = [], 0
        for _, length in self.prompts:
            at += length
            borders.append(at)
        found, start = [(0, 1)], 1
        for border in borders:
            while start < border:
                found.append((start, min(start + size, border)))
                start = found[-1][1]
        return found


def read_sessions(path: str | Path) -> list[TimedSession]:
    """The sessions of a .jsonl file, one a line; ValueError naming the line and its sample."""
    path, found = ordinary_file(path, "session file"), []
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LINE_BYTES + 1):
            number += 1
            if len(line) > LINE_BYTES:
                raise ValueError(f"session file {path}, line {number}: more than {LINE_BYTES:,} bytes")
            if line.strip():
                found.append(_line(line, f"session file {path}, line {number}"))
    if not found:
        raise ValueError(f"session file {path} holds no session")
    return found


def _line(line: bytes, where: str) -> TimedSession:
    try:
        document = parse_json(line.decode("utf-8-sig"), where)
    except UnicodeDecodeError:
        raise ValueError(f"{where}: is not UTF-8 text") from None
    return parse_session(document, f"{where}, {shown(str(document.get('sample_id', 'no sample_id')))}")


def parse_session(document: Mapping[str, Any], where: str = "session") -> TimedSession:
    """One session; ValueError saying what is wrong with it."""
    if document.get("schema_version") != 2:
        raise ValueError(f"{where}: schema_version is {shown(document.get('schema_version'))}, expected 2")
    messages = _list(document.get("messages"), f"{where}: messages")
    text = " ".join(_texts(messages)).strip()
    target = next((m for m in messages if isinstance(m, Mapping) and m.get("role") == "target"), None)
    if target is None or target.get("type") != "video":
        raise ValueError(f"{where}: has no message of role target and type video")
    output = target.get("output")
    if not isinstance(output, Mapping):
        raise ValueError(f"{where}: the target has no output")
    references = _whole(target.get("reference_frame_count", 0), f"{where}: reference_frame_count", 0, 1)
    image = target.get("uri")
    if references and not (isinstance(image, str) and image.strip()):
        raise ValueError(f"{where}: has a reference frame but no uri of its picture")
    frames = _whole(output.get("frames"), f"{where}: frames", 1 - references, LARGEST) + references
    if (frames - 1) % FRAMES:
        raise ValueError(f"{where}: has {frames} frames with the reference, expected 1 + {FRAMES} N")
    width, height = (_side(output.get(name), f"{where}: {name}") for name in ("width", "height"))
    prompts, keys = None, None
    for control in _list(target.get("controls", []), f"{where}: controls"):
        kind = control.get("type") if isinstance(control, Mapping) else None
        if kind == "text_prompt_interval" and prompts is None:
            prompts = _prompts(control, frames, text, where)
        elif kind == "keyboard_direction_frame_interval" and keys is None:
            keys = _keys(control, frames, where)
        else:
            again = "a second control" if kind in ("text_prompt_interval", "keyboard_direction_frame_interval") else ""
            raise ValueError(f"{where}: {again or 'unknown control'} of type {shown(kind)}")
    latents = 1 + (frames - 1) // FRAMES
    if prompts is None:
        if not text:
            raise ValueError(f"{where}: has no text")
        prompts = ((text, latents),)
    name = str(document.get("sample_id", ""))
    return TimedSession(name, latents, width, height, prompts, keys, image if references else None)


def _texts(messages: Sequence[Any]) -> list[str]:
    said = (m for m in messages if isinstance(m, Mapping) and m.get("role") == "user" and m.get("type") == "text")
    return [m["content"].strip() for m in said if isinstance(m.get("content"), str)]


def _prompts(control: Mapping[str, Any], frames: int, text: str, where: str) -> tuple[tuple[str, int], ...]:
    """Segments [start, end) in pixel frames without gaps up to the end -> prompts and their latents."""
    at, found = 0, []
    segments = _list(control.get("segments"), f"{where}: segments")
    for number, segment in enumerate(segments):
        place = f"{where}: segment {number}"
        if not isinstance(segment, Mapping):
            raise ValueError(f"{place}: expected an object")
        start, end = (_whole(segment.get(key), f"{place}: {key}", 0, LARGEST) for key in ("start", "end"))
        said = segment.get("text")
        if not isinstance(said, str) or not said.strip():
            raise ValueError(f"{place}: has no text")
        if number == 0 and start > 0:
            if not text:
                raise ValueError(f"{place}: starts at frame {start}, and there is no text before it")
            found.append((text, 0, start))
            at = start
        if start != at or end <= start:
            raise ValueError(f"{place}: is [{start}, {end}), expected to start at {at} and to end after it")
        found.append((said.strip(), start, end))
        at = end
    if at != frames:
        raise ValueError(f"{where}: segments end at frame {at}, expected {frames}")
    prompts = tuple((said, _latent(end) - _latent(start)) for said, start, end in found)
    for said, length in prompts:
        if length < 1:
            raise ValueError(f"{where}: the prompt {shown(said)!r} is too short for a latent frame")
    return prompts


def _latent(border: int) -> int:
    """The border's latent: it snaps to the nearest 1 + 4 k, the lower one on a tie, where latent 1 + k begins."""
    return 0 if border == 0 else 1 + max(0, -(-(2 * (border - 1) - FRAMES) // (2 * FRAMES)))


def _keys(control: Mapping[str, Any], frames: int, where: str) -> NDArray[np.float32]:
    """One row a pixel frame after the first -> (latents, 4, 8)."""
    if list(control.get("action_keys", KEYS)) != list(KEYS):
        raise ValueError(f"{where}: action_keys are {shown(control.get('action_keys'))}, expected {', '.join(KEYS)}")
    rows = _list(control.get("actions"), f"{where}: actions")
    if len(rows) != frames - 1:
        raise ValueError(f"{where}: has {len(rows)} rows of keys, expected {frames - 1}: one a frame after the first")
    found = np.zeros((1 + len(rows) // FRAMES, FRAMES, len(KEYS)), dtype=np.float32)
    for number, row in enumerate(rows):
        numbers = isinstance(row, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in row)
        if not numbers or len(row) != len(KEYS) or not all(0 <= v <= 1 for v in row):
            raise ValueError(f"{where}: row {number} of keys must be {len(KEYS)} numbers from 0 to 1, got {shown(row)}")
        found[1 + number // FRAMES, number % FRAMES] = row
    return found


def _list(value: object, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list, got {shown(value)}")
    return value


def _whole(value: object, where: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{where}: got {shown(value)}, allowed a whole number from {least} to {most}")
    return value


def _side(value: object, where: str) -> int:
    side = _whole(value, where, SIDE_MULTIPLE, LARGEST)
    if side % SIDE_MULTIPLE:
        raise ValueError(f"{where}: got {side}, allowed multiples of {SIDE_MULTIPLE}")
    return side
