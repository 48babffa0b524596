"""Adapters as they are asked for: FILE[:STRENGTH], where FILE is a path or lies on the hub."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence
from pathlib import Path

from causalreel.foreign import shown
from causalreel.weights.hub import EXTRA, HubError, HubFile, check_connection, download, find
from causalreel.weights.lora import CONFIG, TENSOR_FILES, Lora, check_strength, read_lora

Asked = str | Path | tuple[str | Path, float]
"""An adapter: its place, its place and strength in one text, or both."""

MOST = 32
"""Adapters of one model."""


def read_loras(asked: Sequence[Asked]) -> list[tuple[str, Lora, float]]:
    """-> name, adapter and strength of each. ValueError, naming it, for one that is not there, broken, or asked twice.

    A name is that of the file without its suffix, or of its folder where programs call all files the same; a number
    is added to the second of a name.
    """
    if isinstance(asked, (str, Path)):
        raise ValueError(f"loras must be a list of files, got the text '{shown(str(asked))}'")
    if len(asked) > MOST:
        raise ValueError(f"at most {MOST} LoRAs can be given, got {len(asked)}")
    found: list[tuple[str, Lora, float]] = []
    places: set[Path] = set()
    for one in asked:
        place, strength = (str(one[0]), one[1]) if isinstance(one, tuple) else parse(str(one))
        strength = check_strength(strength, place)
        path = locate(place)
        if path.resolve() in places:
            raise ValueError(f"the LoRA {shown(place)} is given twice; give it once, with the sum of the strengths")
        places.add(path.resolve())
        found.append((_name(path, [name for name, _, _ in found]), read_lora(path), strength))
    return found


def parse(text: str) -> tuple[str, float]:
    """FILE or FILE:STRENGTH -> both; what is there under the whole text is a file, whatever is in its name."""
    place, colon, tail = text.rpartition(":")
    if not colon or _is_there(text):
        return text, 1.0
    number = re.fullmatch(r"\s*[+-]?(\d+\.?\d*([eE][+-]?\d+)?|\.\d+([eE][+-]?\d+)?|nan|inf|infinity)\s*", tail, re.I)
    if number is None:
        if not _is_there(place):
            return text, 1.0
        raise ValueError(f"the strength of the LoRA {shown(place)} must be a number, got '{shown(tail, 40)}'")
    strength = float(tail)
    if not math.isfinite(strength):
        raise ValueError(f"the strength of the LoRA {shown(place)} must be a finite number, got {shown(tail, 40)}")
    return place, strength


def locate(place: str) -> Path:
    """A path that is there, or a file of the hub: OWNER/REPOSITORY, or OWNER/REPOSITORY/FILE."""
    if _is_there(place):
        return Path(place)
    parts = place.split("/")
    if len(parts) < 2 or not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts):
        raise ValueError(
            f"the LoRA is not there: {shown(place)}; give a file or folder, or OWNER/REPOSITORY[/FILE] of the hub"
        )
    repo, name = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        return _fetch(repo, name or _only_file(repo))
    except HubError as error:
        raise ValueError(f"the LoRA {shown(place)} is no file here, and the hub does not give it: {error}") from None


def _is_there(place: str) -> bool:
    try:
        return Path(place).exists()
    except (OSError, ValueError) as error:  # a name that is too long, a zero byte in it
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"the LoRA {shown(place)}: {why}") from None


def _fetch(repo: str, name: str) -> Path:
    """A file of the hub, with peft's configuration where the name is peft's."""
    file = HubFile(repo, name, 0)
    if name.rpartition("/")[2].startswith("adapter_model."):
        config = HubFile(repo, name.rpartition("/")[0] + "/" * ("/" in name) + CONFIG, 0)
        if find(config) is None:
            download(config)
    return find(file) or download(file)


def _only_file(repo: str) -> str:
    """The name of the adapter in a repository: under a usual name in the cache, or the only one of its kind there."""
    for name in TENSOR_FILES:
        if find(HubFile(repo, name, 0)) is not None:
            return name
    if importlib.util.find_spec("huggingface_hub") is None:
        raise HubError(f"huggingface_hub is not installed ({EXTRA})")
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set")
    check_connection(constants.ENDPOINT)
    try:
        names = [name for name in HfApi().list_repo_files(repo) if name.endswith(".safetensors")]
    except Exception as error:  # connection, permission, no such repository: all end in the same advice
        raise HubError(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
    if len(names) != 1:
        told = f": {shown(', '.join(names), 200)}" if names else ""
        raise HubError(f"it has {len(names)} .safetensors files{told}; name one, {repo}/FILE")
    return names[0]


def _name(path: Path, taken: Sequence[str]) -> str:
    usual = path.name in TENSOR_FILES or path.is_dir()
    stem = (path.resolve().parent.name if path.is_file() else path.resolve().name) if usual else path.stem
    stem = re.sub(r"\s+", "-", stem) or "lora"
    name, number = stem, 2
    while name in taken:
        name, number = f"{stem}-{number}", number + 1
    return name
