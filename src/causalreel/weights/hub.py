"""Files on the hub: in a given folder, in the hub's cache, or by a download that shows progress and resumes."""

from __future__ import annotations

import importlib.util
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

log = logging.getLogger(__name__)

EXTRA = "pip install 'causalreel[wan]'"


@dataclass(frozen=True)
class HubFile:
    """A file on the Hugging Face hub."""

    repo: str
    path: str
    size_gb: float
    """About how large it is, for messages."""
    others: tuple[str, ...] = ()
    """Other names under which it may lie in a given folder, those of a diffusers pipeline among them."""
    is_of_tokenizer: bool = False
    """One of a tokenizer's files: any complete tokenizer stands in for all of them."""


def fetch(wanted: Sequence[HubFile], folder: Path | None) -> tuple[dict[HubFile, Path], str]:
    """Each file -> where it is: in `folder`, in the hub's cache, or downloaded just now; and why others cannot be had.

    Files that cannot be had are left out.
    """
    places = {file: place for file in wanted if (place := find(file, folder)) is not None}
    if folder is not None:  # any complete tokenizer is one: names of its files differ between releases
        missing = [file for file in wanted if file.is_of_tokenizer and file not in places]
        places |= _own_tokenizer(folder, missing)
    for file in wanted:
        if file not in places:
            try:
                places[file] = download(file)
            except HubError as error:
                return places, str(error)
    return places, ""


def find(file: HubFile, folder: Path | None = None) -> Path | None:
    """A file that is already on this machine: in `folder`, or in the hub's cache; else None."""
    if folder is not None:
        for name in (file.path, *file.others):
            if (folder / name).exists():
                return folder / name
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(file.repo, file.path)
    return Path(found) if isinstance(found, str) and Path(found).is_file() else None


class HubError(Exception):
    """A download that cannot be made, and why."""


def download(file: HubFile) -> Path:
    """Fetch a file into the hub's cache, with progress; a download that stopped half way goes on. HubError if not."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise HubError(f"huggingface_hub is not installed ({EXTRA})")
    from huggingface_hub import constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set")
    check_connection(constants.ENDPOINT)
    size = f" (about {file.size_gb:.1f} GB)" if file.size_gb else ""
    log.info("downloading %s of %s%s", file.path, file.repo, size)
    try:
        return Path(hf_hub_download(file.repo, file.path))
    except Exception as error:  # connection, proxy, permission, disk, unknown file: all end in the same advice
        text = " ".join(str(error).split()).split(". ")[0]
        raise HubError(f"{type(error).__name__}: {text}") from error


def check_connection(endpoint: str) -> None:
    """HubError if nothing answers there, within seconds; the hub's own client tries for half a minute first."""
    host = urlsplit(endpoint)
    if getproxies():
        return  # what a direct connection says does not count
    try:
        socket.create_connection((host.hostname or endpoint, host.port or 443), timeout=5).close()
    except OSError as error:
        raise HubError(f"no connection to {host.hostname}: {error.strerror or error}") from error


def commands(files: Sequence[HubFile], place: Path) -> list[str]:
    """What downloads files of one repository; a tokenizer's go by their folder, whatever is in it."""
    repo, names = files[0].repo, [file.path for file in files if not file.is_of_tokenizer]
    homes = dict.fromkeys(str(Path(file.path).parent) for file in files if file.is_of_tokenizer)
    asked = [names] if names else []  # names and patterns do not mix in one command
    asked += [["--include", *(f'"{home}/*"' for home in homes)]] if homes else []
    return [f"hf download {repo} {' '.join(what)} --local-dir {place}" for what in asked]


def _own_tokenizer(folder: Path, missing: Sequence[HubFile]) -> dict[HubFile, Path]:
    """A tokenizer that is whole although some of the released files are not there: stand-ins for those."""
    places = [folder / name for file in missing for name in (file.path, *file.others)]
    homes = [place.parent for place in places if (place.parent / "tokenizer.json").is_file()]
    return {file: homes[0] / Path(file.path).name for file in missing} if homes else {}
