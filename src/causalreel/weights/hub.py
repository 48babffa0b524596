"""Files of released models: given paths first, then the hub's local cache, then a download that shows progress and
resumes. What cannot be had is one message with the commands that would fetch all of it."""

from __future__ import annotations

import importlib.util
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from causalreel.weights.registry import (
    TAEHV_FILE,
    TEXT_FILE,
    TOKENIZER,
    TOKENIZER_FILES,
    VAE_FILE,
    HubFile,
    ReleasedModel,
)

log = logging.getLogger(__name__)

EXTRA = "pip install 'causalreel[wan]'"

OTHER_NAMES = {
    VAE_FILE: ("Wan2.1_VAE.safetensors", "vae"),
    TEXT_FILE: ("text_encoder",),
    TAEHV_FILE: ("taew2_1.safetensors",),
    **{file: (f"tokenizer/{Path(file.path).name}",) for file in TOKENIZER_FILES},
}
"""Other names under which a file may lie in a given folder, those of a diffusers pipeline among them."""


@dataclass(frozen=True)
class ModelFiles:
    """Where everything is that a full-size pipeline reads."""

    weights: Path
    """The DiT: a file, or the folder of shards."""
    codec: Path
    """The VAE's file, or TAEHV's."""
    text: Path
    """The text encoder's weights."""
    tokenizer: Path
    """The tokenizer's folder."""
    encoder: Path | None = None
    """The VAE's file beside TAEHV, if it is there: it encodes given pictures and videos better."""


def model_files(
    model: ReleasedModel,
    *,
    weights: str | Path | None = None,
    wan_dir: str | Path | None = None,
    decoder: str = "wan",
) -> ModelFiles:
    """Find or download what `model` needs. ValueError, in one message, if something is neither here nor to be had.

    weights: the DiT's file or folder instead of the hub's. wan_dir: folder with the other files (VAE, text encoder,
    tokenizer folder, taew2_1.pth) under their released names, and with the base model's weights.
    decoder: wan or taehv.
    """
    if decoder not in ("wan", "taehv"):
        raise ValueError(f"decoder must be wan or taehv, got {decoder!r}")
    folder = None if wan_dir is None else Path(wan_dir)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"the folder of Wan2.1's files is not there: {folder}")
    if weights is not None and not Path(weights).exists():
        raise ValueError(f"weights not found: {weights}")
    codec = VAE_FILE if decoder == "wan" else TAEHV_FILE
    wanted = [codec, TEXT_FILE, *TOKENIZER_FILES]
    if weights is None:
        wanted = [*model.files, *wanted]
    places = fetch(wanted, folder, model=model, decoder=decoder)
    own = places[model.files[0]] if weights is None else Path(weights)
    if weights is None and len(model.files) > 1:
        own = own.parent
    return ModelFiles(
        weights=own,
        codec=places[codec],
        text=places[TEXT_FILE],
        tokenizer=places[TOKENIZER_FILES[0]].parent,
        encoder=find(VAE_FILE, folder) if decoder == "taehv" else None,
    )


def fetch(
    wanted: Sequence[HubFile], folder: Path | None, *, model: ReleasedModel, decoder: str = "wan"
) -> dict[HubFile, Path]:
    """Each file -> where it is: in `folder`, in the hub's cache, or downloaded just now."""
    places = {file: place for file in wanted if (place := find(file, folder)) is not None}
    if folder is not None:  # any complete tokenizer is one: names of its files differ between releases
        places |= _own_tokenizer(folder, [file for file in wanted if file in TOKENIZER_FILES and file not in places])
    missing = [file for file in wanted if file not in places]
    reason = ""
    for file in missing:
        try:
            places[file] = download(file)
        except HubError as error:
            reason = str(error)
            break
    missing = [file for file in wanted if file not in places]
    if missing:
        raise ValueError(message(model, missing, reason, folder=folder, decoder=decoder))
    return places


def find(file: HubFile, folder: Path | None = None) -> Path | None:
    """A file that is already on this machine: in `folder`, or in the hub's cache; else None."""
    if folder is not None:
        for name in (file.path, *OTHER_NAMES.get(file, ())):
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


def message(model: ReleasedModel, missing: Sequence[HubFile], reason: str, *, folder: Path | None, decoder: str) -> str:
    """What is missing and the commands that fetch it: one line, the commands ready to be pasted."""
    size = sum(file.size_gb for file in missing)
    place = folder or Path("wan_models/Wan2.1-T2V-1.3B")
    wan = [file for file in missing if file not in model.files]
    own = [file for file in missing if file in model.files]
    lines, flags = [], []
    if own:
        home = Path("checkpoints") if "Wan-AI" not in model.repo else Path("wan_models") / model.repo.split("/")[1]
        lines.append(_line(model.repo, own, home))
        flags.append(f"--weights {home / own[0].path if len(model.files) == 1 else home}")
    for repo in dict.fromkeys(file.repo for file in wan):
        lines.append(_line(repo, [file for file in wan if file.repo == repo], place))
    flags.append(f"--wan-dir {place}")
    flags += ["--decoder taehv"] if decoder == "taehv" else []
    why = f" ({reason})" if reason else ""
    return (
        f"{model.name} needs {len(missing)} files (about {size:.1f} GB) that are not on this machine and cannot be "
        f"downloaded now{why}; where there is a network run: {' && '.join(lines)} ; "
        f"then generate with --model {model.name} {' '.join(flags)}"
    )


def _line(repo: str, files: Sequence[HubFile], place: Path) -> str:
    """One command; the tokenizer's files go by their folder, whatever is in it."""
    names = [file.path for file in files if file not in TOKENIZER_FILES]
    pattern = [f'"{TOKENIZER}/*"'] if any(file in TOKENIZER_FILES for file in files) else []
    if names and pattern:  # names and patterns do not mix in one command
        return " && ".join([_command(repo, names, place), _command(repo, ["--include", *pattern], place)])
    return _command(repo, names or ["--include", *pattern], place)


def _command(repo: str, what: Sequence[str], place: Path) -> str:
    return f"hf download {repo} {' '.join(what)} --local-dir {place}"


def _own_tokenizer(folder: Path, missing: Sequence[HubFile]) -> dict[HubFile, Path]:
    """A tokenizer that is whole although some of the released files are not there: stand-ins for those."""
    homes = [home for home in (folder / TOKENIZER, folder / "tokenizer") if (home / "tokenizer.json").is_file()]
    return {file: homes[0] / Path(file.path).name for file in missing} if homes else {}
