"""Long videos as VBench-Long wants to find them: a flat folder of `{prompt}-{number}.mp4`, and nothing else in it.

VBench finds a video by its name alone. What its scripts lose without a word is refused here: a name that is no file
name, two prompts of one name, a prompt that ends as an index does, and "_", at which VBench-Long ends a clip's name.
Each number of a prompt has its own seed. What was made with which seed stands beside the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from causalreel.data.video import write_video
from causalreel.eval.vbench_names import SAMPLES, video_name
from causalreel.files import write_text
from causalreel.foreign import shown


@dataclass(frozen=True)
class Video:
    """One file to be made."""

    prompt: str
    number: int
    seed: int

    @property
    def name(self) -> str:
        return video_name(self.prompt, self.number)


def videos(prompts: Sequence[str], *, samples: int = SAMPLES, seed: int = 0) -> list[Video]:
    """The files of these prompts; the seed of number i is seed + i. ValueError, in one line, for one that VBench-Long
    would not find."""
    seen: dict[str, int] = {}
    for line, prompt in enumerate(prompts, start=1):
        where, told = f"prompt {line}", repr(shown(prompt, 60))
        if not prompt.strip() or prompt != prompt.strip():
            raise ValueError(f"{where} must not be empty, nor begin or end with a blank: {told}")
        if "\\" in prompt or not prompt.isprintable():
            raise ValueError(f"{where} is no file name, as VBench needs it: no \\ and one line; got {told}")
        try:
            video_name(prompt, samples - 1)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if "_" in prompt:
            raise ValueError(f"{where} has a _, at which VBench-Long cuts names: its clips would be lost; got {told}")
        head, dash, tail = prompt.rpartition("-")
        if dash and head and tail.isdigit():
            raise ValueError(f"{where} ends in -{tail}, which VBench takes for an index: {told}")
        if prompt in seen:
            raise ValueError(f"{where} is prompt {seen[prompt]} again: {told}")
        seen[prompt] = line
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    return [Video(prompt, i, seed + i) for prompt in prompts for i in range(samples)]


def export(
    wanted: Sequence[Video],
    folder: Path,
    make: Callable[[Video], Iterator[Tensor]],
    *,
    fps: float,
    facts: dict[str, object],
) -> Iterator[Path]:
    """Write the videos that are not there yet, and yield the path of each; the same call again goes on.

    make: -> parts (1,t,3,H,W) of one. The manifest is `{folder}.json`, beside the folder: VBench reads what kind the
    videos are of from the first name in it. ValueError for a folder that holds something else, or other facts.
    """
    names = {video.name for video in wanted}
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(path.name for path in folder.iterdir() if path.name not in names and not path.name.startswith("."))
    if others:
        raise ValueError(f"{folder} must hold nothing but its videos, got {shown(others[0], 60)!r}")
    listed = "\n".join(dict.fromkeys(video.prompt for video in wanted))
    told = facts | {"prompts": hashlib.sha256(listed.encode()).hexdigest(), "fps": fps}
    rows = [{"file": video.name, "prompt": video.prompt, "seed": video.seed} for video in wanted]
    record = json.dumps({"facts": told, "videos": rows}, indent=1, allow_nan=False, default=str)
    manifest = folder.with_name(f"{folder.name}.json")
    if manifest.exists() and manifest.read_text("utf-8") != record:
        raise ValueError(f"{manifest} is of other videos: name another folder")
    write_text(manifest, record)
    for video in wanted:
        path = folder / video.name
        if not path.exists():
            write_video(path, (part[0] for part in make(video)), fps)
            yield path
