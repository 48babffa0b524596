"""The cache of musubi-tuner for Wan: `CLIP[_FFFFF-NNN]_WWWWxHHHH_wan.safetensors` with normalised latents, and the
text of all windows of a clip in `CLIP_wan_te.safetensors`.

Caches of other architectures have as many channels: the suffix and the metadata tell them apart, and both are asked.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch import Tensor

from causalreel.data.packing import Row
from causalreel.foreign import shown
from causalreel.headers import read_header
from causalreel.weights.files import read_tensors
from causalreel.weights.sets import Found, Wanted
from causalreel.weights.sets.clips import caption, channels_first, check_text

log = logging.getLogger(__name__)

WHAT = "a cache of musubi-tuner for Wan (_wan.safetensors with _wan_te.safetensors)"
NAME = re.compile(r"(?P<clip>.+?)(_(?P<first>\d{5,})-(?P<frames>\d{3,}))?_\d{4,}x\d{4,}_(?P<kind>\w+)\.safetensors")
KEY = re.compile(r"latents_(\d+)x(\d+)x(\d+)_(\w+)")


def is_one(path: Path) -> bool:
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    """Files of latents; those of text end in _te."""
    found = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return [each for each in found if NAME.fullmatch(each.name) and not each.stem.endswith("_te")]


def rows(path: Path, wanted: Wanted) -> Iterator[Found]:
    for file in _files(path):
        yield Found(file.name, partial(_row, file, wanted))


def _row(file: Path, wanted: Wanted) -> Row:
    name = NAME.fullmatch(file.name)
    assert name is not None
    metadata = _check_kind(file, name["kind"])
    text_file = file.with_name(f"{name['clip']}_wan_te.safetensors")
    if not text_file.is_file():
        raise ValueError(f"{file} has no text embeddings: {text_file.name} is not there")
    told = _check_kind(text_file, "wan").get("caption1")
    if told is None:
        raise ValueError(f"{text_file} has no caption1 in its metadata")
    clip = _only(file, "latents_", ("latents_image", "latents_control"))
    text = _only(text_file, "varlen_t5_", ())
    if (said := metadata.get("frame_count")) is not None and said != str(1 + 4 * (clip.shape[1] - 1)):
        raise ValueError(f"{file}: frame_count is {shown(said, 20)}, {clip.shape[1]} latent frames are another number")
    return Row(
        caption(told.encode(errors="surrogatepass"), str(text_file)),
        file.name,
        channels_first(clip, str(file), wanted),
        check_text(text, str(text_file)),
    )


def _check_kind(file: Path, kind: str) -> dict[str, str]:
    """A file's metadata; ValueError if it is of another architecture by its name or by itself."""
    metadata = read_header(file).metadata
    said = metadata.get("architecture")
    if kind != "wan" or said != "wan":
        raise ValueError(
            f"{file} is a cache of another architecture than Wan: its suffix is _{shown(kind, 40)}, its metadata say "
            f"{shown(said, 40)}"
        )
    return metadata


def _only(file: Path, start: str, others: tuple[str, ...]) -> Tensor:
    """The tensor whose name begins like this; ValueError if there is none or its name belies its shape."""
    tensors = read_tensors(file)
    names = [name for name in tensors if name.startswith(start) and not name.startswith(others or ("\0",))]
    if len(names) != 1:
        raise ValueError(f"{file} has {len(names)} tensors named {start}..., 1 is expected")
    if left := sorted(set(tensors) - set(names)):
        log.warning("%s: %s is not imported", file.name, ", ".join(shown(name, 40) for name in left[:4]))
    found = tensors[names[0]]
    if (said := KEY.fullmatch(names[0])) and tuple(map(int, said.groups()[:3])) != tuple(found.shape[1:]):
        raise ValueError(f"{file}: '{names[0]}' has the shape {tuple(found.shape)}")
    return found
