"""The codec that a recipe names: a folder, an embedded one, or a released one such as wan, which may be fetched."""

from __future__ import annotations

from pathlib import Path

from causalreel.codecs.codec import Codec
from causalreel.families import MODELS
from causalreel.families.files import codec_mark, released_codec
from causalreel.weights.export import codec_identity, codec_name, load_codec, read_codec
from causalreel.weights.hub import HubFile, fetch


def check_codec(name: Path) -> None:
    """ValueError if there is no such codec; reads its config at most."""
    if released_codec(str(name)) is None:
        read_codec(name)


def files_of(name: Path) -> tuple[HubFile, ...]:
    """What is fetched for it, unless it is here."""
    released = released_codec(str(name))
    return () if released is None or released[1].file is None else (released[1].file,)


def open_codec(name: Path) -> Codec:
    """The codec in float32 on the CPU; ValueError if it is neither here nor to be had."""
    released = released_codec(str(name))
    if released is None:
        return load_codec(name)
    assert released[1].read is not None
    return released[1].read(_place(name))


def mark_of(name: Path) -> str:
    """What data say of the codec that made them: reads all of its file."""
    return codec_identity(name) if released_codec(str(name)) is None else codec_mark(_place(name))


def name_in_export(name: Path, folder: Path) -> str:
    """How an export in `folder` calls it."""
    return codec_name(name, folder) if released_codec(str(name)) is None else str(name)


def maker_of_data(codec: Path, data: Path, rows: int | None, world: str) -> str:
    """The command that makes data of a world, or of videos, with this codec."""
    released = released_codec(str(codec))
    if released is None:
        which = "" if world == "flat" else f" --world {world}"
        return f"causalreel encode{which} --codec {codec} --out {data} --clips {rows or 2048}"
    models = [name for name, (family, row) in MODELS.items() if family is released[0] and row.sampling.chunk is None]
    return f"causalreel prepare VIDEOS --out {data} --model {models[0] if models else 'MODEL'}"


def _place(name: Path) -> Path:
    (file,) = files_of(name)
    places, reason = fetch([file], None)
    if file not in places:
        raise ValueError(f"codec {name}: {reason or 'not to be had'}: {file.repo}/{file.path}")
    return places[file]
