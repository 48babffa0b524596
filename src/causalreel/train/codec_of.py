"""The codec that a recipe names: a folder, an embedded one, or a released one. That is named as wan, and may be fetched
then, or by its file or a folder that has it, such as wan_models/Wan2.1-T2V-1.3B."""

from __future__ import annotations

from pathlib import Path

from causalreel.codecs.codec import Codec
from causalreel.families import FAMILIES, MODELS
from causalreel.families.family import Decoder, Family
from causalreel.families.files import codec_mark, released_codec
from causalreel.weights.export import codec_identity, codec_name, load_codec, read_codec
from causalreel.weights.hub import HubFile, fetch


def check_codec(name: Path) -> None:
    """ValueError if there is no such codec; reads its config at most."""
    if _released(name) is None:
        read_codec(name)


def files_of(name: Path) -> tuple[HubFile, ...]:
    """What is fetched for it, unless it is here."""
    released = _released(name)
    if released is None or released[2] is not None or released[1].file is None:
        return ()
    return (released[1].file,)


def open_codec(name: Path) -> Codec:
    """The codec in float32 on the CPU; ValueError if it is neither here nor to be had."""
    released = _released(name)
    if released is None:
        return load_codec(name)
    assert released[1].read is not None
    return released[1].read(_place(name))


def mark_of(name: Path) -> str:
    """What data say of the codec that made them: reads all of its file."""
    return codec_identity(name) if _released(name) is None else codec_mark(_place(name))


def name_in_export(name: Path, folder: Path) -> str:
    """How an export in `folder` calls it."""
    released = _released(name)
    return codec_name(name, folder) if released is None else next(iter(released[0].decoders))


def maker_of_data(codec: Path, data: Path, rows: int | None, world: str) -> str:
    """The command that makes data of a world, or of videos, with this codec."""
    released = _released(codec)
    if released is None:
        which = "" if world == "flat" else f" --world {world}"
        return f"causalreel encode{which} --codec {codec} --out {data} --clips {rows or 2048}"
    models = [name for name, (family, row) in MODELS.items() if family is released[0] and row.sampling.chunk is None]
    return f"causalreel prepare VIDEOS --out {data} --model {models[0] if models else 'MODEL'}"


def _released(name: Path) -> tuple[Family, Decoder, Path | None] | None:
    """The family and the codec of released weights that this names, and where its file is; None where it is to be
    fetched. None altogether for a codec of this package."""
    known = released_codec(str(name))
    if known is not None:
        return *known, None
    for family in FAMILIES.values():
        if family.own.file is None:
            continue
        for path in (family.own.file.path, *family.own.file.others):
            if name.is_file() and name.name == path:
                return family, family.own, name
            if name.is_dir() and (name / path).exists():
                return family, family.own, name / path
    return None


def _place(name: Path) -> Path:
    released = _released(name)
    if released is not None and released[2] is not None:
        return released[2]
    (file,) = files_of(name)
    places, reason = fetch([file], None)
    if file not in places:
        raise ValueError(f"codec {name}: {reason or 'not to be had'}: {file.repo}/{file.path}")
    return places[file]
