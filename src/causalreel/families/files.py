"""Files of released models: found, fetched, or asked for in one message with the commands that fetch all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from causalreel.families import FAMILIES, MODELS
from causalreel.families.family import Decoder, Family, ReleasedModel
from causalreel.hashed import sha256_of
from causalreel.weights.export import Sampling
from causalreel.weights.hub import HubFile, commands, fetch, find


@dataclass(frozen=True)
class ModelFiles:
    """Where everything is that a full-size pipeline reads."""

    weights: Path
    """The network: a file, or the folder of shards; nowhere for a model without files."""
    codec: Path | None
    """The decoder's file, if it has one."""
    text: tuple[Path, ...]
    """The text encoder's files, in the order of its row."""
    encoder: Path | None = None
    """The family's own codec beside another decoder, if it is there: it encodes given pictures and videos better."""


def model_files(
    family: Family,
    model: ReleasedModel,
    *,
    weights: str | Path | None = None,
    wan_dir: str | Path | None = None,
    decoder: str | None = None,
) -> ModelFiles:
    """Find or download what `model` needs. ValueError, in one message, if something is neither here nor to be had.

    weights: the network's file or folder instead of the hub's. wan_dir: folder with the family's other files (codec,
    text encoder, tokenizer) under their released names, and with the base model's weights. decoder: see
    `Family.decoder`.
    """
    chosen = family.decoder(decoder)
    folder = None if wan_dir is None else Path(wan_dir)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"the folder of {family.name}'s files is not there: {folder}")
    if weights is not None and not Path(weights).exists():
        raise ValueError(f"weights not found: {weights}")
    wanted = [*([chosen.file] if chosen.file else []), *family.text.files]
    wanted = [*model.files, *wanted] if weights is None else wanted
    places, reason = fetch(wanted, folder)
    missing = [file for file in wanted if file not in places]
    if missing:
        flags = [] if chosen == family.own else [f"--decoder {decoder}"]
        raise ValueError(_message(model, missing, reason, folder or _home(family), flags))
    own = Path() if weights is None else Path(weights)
    if weights is None and model.files:
        own = places[model.files[0]]
        own = own.parent if len(model.files) > 1 else own
    beside = family.own.file if chosen != family.own else None
    return ModelFiles(
        weights=own,
        codec=places[chosen.file] if chosen.file else None,
        text=tuple(places[file] for file in family.text.files),
        encoder=find(beside, folder) if beside else None,
    )


def released_codec(name: str) -> tuple[Family, Decoder] | None:
    """The family's own codec that is called `name` and has released weights, such as wan; None for other names."""
    for family in FAMILIES.values():
        known, own = next(iter(family.decoders.items()))
        if known == name and own.file is not None:
            return family, own
    return None


def codec_mark(path: Path) -> str:
    """What tells a released codec from others: a hash of its file, or the name of its folder."""
    return sha256_of(path)[:16] if path.is_file() else path.name


def _home(family: Family) -> Path:
    """Where the commands put the files that a family's models share: a folder by the name of their repository."""
    shared = [*family.text.files, *([family.own.file] if family.own.file else [])]
    return Path("wan_models" if family.name == "wan21" else family.name) / (
        shared[0].repo.split("/")[-1] if shared else ""
    )


def _message(model: ReleasedModel, missing: Sequence[HubFile], reason: str, place: Path, flags: Sequence[str]) -> str:
    """What is missing and the commands that fetch it: one line, the commands ready to be pasted."""
    size = sum(file.size_gb for file in missing)
    own = [file for file in missing if file in model.files]
    lines, given = [], []
    if own:
        home = Path("checkpoints") if model.is_named_by_file else Path("wan_models") / model.repo.split("/")[1]
        lines += commands(own, home)
        given.append(f"--weights {home / own[0].path if len(model.files) == 1 else home}")
    others = [file for file in missing if file not in model.files]
    for repo in dict.fromkeys(file.repo for file in others):
        lines += commands([file for file in others if file.repo == repo], place)
    why = f" ({reason})" if reason else ""
    return (
        f"{model.name} needs {len(missing)} files (about {size:.1f} GB) that are not on this machine and cannot be "
        f"downloaded now{why}; where there is a network run: {' && '.join(lines)} ; "
        f"then generate with --model {model.name} {' '.join([*given, f'--wan-dir {place}', *flags])}"
    )


def table() -> str:
    """All released models as aligned text: name, what, size, steps, weights and where they are."""
    rows = [("name", "size", "GB", "chunk", "steps", "weights", "on the hub", "what")]
    listed = [(family, model) for family, model in MODELS.values() if model.files]
    for _, model in listed:
        sampling = model.sampling
        rows.append(
            (
                model.name,
                model.preset,
                f"{model.size_gb:.1f}",
                "whole clip" if sampling.chunk is None else str(sampling.chunk),
                steps_in_words(sampling),
                model.which or "first found" if model.files[0].path.endswith(".pt") else "-",
                f"{model.repo} {model.files[0].path}",
                model.what,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    for family in {family.name: family for family, _ in listed}.values():
        shared = [*([family.own.file] if family.own.file else []), *family.text.files]
        names = dict.fromkeys(f"{Path(f.path).parent}/" if f.is_of_tokenizer else f.path for f in shared)
        size = sum(file.size_gb for file in shared)
        lines.append(f"models of {family.name} also need {', '.join(names)} of {shared[0].repo} ({size:.1f} GB, once)")
        lines += [
            f"--decoder {name} needs {decoder.file.path} of {decoder.file.repo} instead of the VAE"
            for name, decoder in family.decoders.items()
            if decoder.file and decoder != family.own
        ]
    return "\n".join(lines)


def steps_in_words(sampling: Sampling) -> str:
    """4, or 2 (first chunk 4), or 50 UniPC x guidance 3."""
    if sampling.multistep is not None:
        return f"{sampling.multistep} {sampling.solver}, guidance {sampling.guidance:g}"
    if sampling.levels:
        lengths = [len(levels) for levels in sampling.levels]
        return f"{lengths[-1]}" + (f" (first chunk {lengths[0]})" if lengths[0] != lengths[-1] else "")
    first = f" (first chunk {len(sampling.first_steps)})" if sampling.first_steps else ""
    return f"{len(sampling.steps)}{first}"
