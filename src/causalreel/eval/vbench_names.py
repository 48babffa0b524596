"""How VBench finds videos and reads their prompts: by file names alone, and what is lost so without a word.

VBench at 45e79ec (standard mode and custom input), VBench-Long, and the scripts of rCM.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from causalreel.foreign import shown

LONGEST_NAME = 255
"""Bytes of a file's name."""
SAMPLES = 5
"""Videos of a prompt that VBench counts with; temporal flickering wants 25."""
VIDEOS = (".mp4", ".gif", ".jpg", ".png")
"""Files that custom input takes."""
NOT_CUSTOM = ("object_class", "multiple_objects", "scene", "appearance_style", "color", "spatial_relationship")
"""Dimensions that custom input does not measure: they need more than a video and its prompt."""


def video_name(prompt: str, number: int, suffix: str = ".mp4") -> str:
    """The only name under which VBench looks for a prompt's video; ValueError where no file can be called so."""
    name = f"{prompt}-{number}{suffix}"
    if "/" in name or "\0" in name:
        raise ValueError(f"no file name has a / or a zero byte in it: {shown(prompt, 60)!r}")
    if (size := len(name.encode("utf-8", "replace"))) > LONGEST_NAME:
        raise ValueError(f"its file name has {size} bytes, more than {LONGEST_NAME} bytes: {shown(prompt, 60)!r}")
    return name


def rcm_name(prompt: str, number: int) -> str:
    """What rCM's scripts call it; VBench finds it only where this is `video_name`."""
    return f"{prompt}-{number}.mp4".replace("/", "-").replace("\n", " ")


def prompt_of(name: str, *, is_long: bool = False) -> str:
    """The prompt that VBench takes from a file's name or path: one ending of - and digits is its number.

    is_long: as VBench-Long, for which the number of a clip, or of a scene and its clip, may stand behind.
    """
    stem = Path(name).stem
    if is_long:
        stem = re.sub(r"(-Scene)?-\d+_\d+$", "", stem)
    return re.sub(r"-\d+$", "", stem)


def found(
    info: Iterable[Mapping[str, Any]], names: Sequence[str], dimensions: Iterable[str]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What standard mode makes of a list of prompts and a folder -> entries with their videos, names not found.

    info: entries with `prompt_en` and `dimension`, as in VBench_full_info.json; those of other dimensions are left out.
    names: the folder's files in the order in which the system lists them: the first one's ending, whatever it is, is
    looked for behind every prompt. ValueError for an empty folder.
    """
    if not names:
        raise ValueError("the folder must hold a video, it is empty")
    suffix, there, wanted = Path(names[0]).suffix, set(names), set(dimensions)
    entries, missing = list[dict[str, Any]](), list[str]()
    for entry in info:
        if wanted.isdisjoint(entry["dimension"]):
            continue
        looked_for = [f"{entry['prompt_en']}-{number}{suffix}" for number in range(SAMPLES)]
        entries.append({**entry, "video_list": [name for name in looked_for if name in there]})
        missing += [name for name in looked_for if name not in there]
    return entries, missing


def custom_prompts(names: Iterable[str], dimensions: Iterable[str]) -> dict[str, str]:
    """What custom input makes of a folder: file -> prompt; ValueError for a dimension that it does not measure."""
    for dimension in dimensions:
        if dimension in NOT_CUSTOM:
            raise ValueError(f"custom input does not measure {dimension}: no file name says what it asks for")
    return {name: prompt_of(name) for name in names if Path(name).suffix.lower() in VIDEOS}


def merged(info: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An entry for each prompt, as in rCM's vbench_eval_info.json: dimensions, videos and what they ask for joined.

    VBench's own list has two prompts twice, with other dimensions.
    """
    entries: dict[str, dict[str, Any]] = {}
    for entry in info:
        one = entries.setdefault(entry["prompt_en"], {})
        for name, value in entry.items():
            if isinstance(value, list):
                one[name] = list(dict.fromkeys([*one.get(name, []), *value]))
            elif isinstance(value, Mapping):
                one[name] = {**one.get(name, {}), **value}
            else:
                one.setdefault(name, value)
    return list(entries.values())
