"""What data are prepared with: a model's codec and text encoder by name, each read when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from causalreel import families
from causalreel.families import MODELS
from causalreel.families.files import codec_mark, model_files
from causalreel.foreign import shown
from causalreel.infer.models import find
from causalreel.infer.released import random_codec
from causalreel.text.fixed import FixedTextEncoder
from causalreel.types import Geometry, TextEncoder, VideoCodec
from causalreel.weights.export import Export, codec_file, codec_identity, load_codec, read_codec, read_export


@dataclass(frozen=True)
class Encoders:
    """A model's encoders, found and not loaded."""

    export: Export
    """The model's sizes and rates."""
    geometry: Geometry
    """The codec's."""
    load_codec: Callable[[], VideoCodec]
    load_text: Callable[[], TextEncoder]
    codec: str
    """What tells the codec from others."""
    text: str
    """What tells the text encoder from others."""


def encoders(
    model: str,
    *,
    wan_dir: Path | None = None,
    is_random: bool = False,
    height: int | None = None,
    width: int | None = None,
    device: torch.device | str = "cpu",
    prompt_cache: Path | None = None,
) -> Encoders:
    """The encoders of a model by name (as for `infer.models.load`); ValueError if there is none or a file is missing.

    wan_dir: folder with the VAE, the text encoder and its tokenizer; where it is None, or lacks one, the hub's cache
    and the hub. is_random: random weights at full size, for trying; every prompt then has the same embedding.
    height, width: of released models in pixels, instead of their own.
    """
    if model not in MODELS:
        given = {"wan_dir": wan_dir, "random weights": is_random or None, "height": height, "width": width}
        if wrong := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(wrong)}: only for released models, not '{shown(model, 60)}'")
        return _of_export(model, device)
    family, row = MODELS[model]
    export, device = family.export(row, height=height, width=width), torch.device(device)
    if is_random:
        network = export.model
        fixed = partial(FixedTextEncoder, network.text_length, network.text_dim, device)
        return Encoders(
            export,
            family.own.sizes.geometry,
            lambda: random_codec(family.own.sizes).to(device),
            fixed,
            f"random {family.name}",
            "fixed",
        )
    files, read, known = (
        model_files(family, replace(row, files=()), wan_dir=wan_dir),
        family.own.read,
        family.text.identity,
    )
    codec = files.codec
    if codec is None or read is None:
        raise ValueError(f"the codec of {family.name} has no files; random weights need none")
    return Encoders(
        export,
        family.own.sizes.geometry,
        lambda: read(codec).to(device),  # float32: data are made once, and what they lose is lost for every training
        partial(family.text.open, files.text, device, prompt_cache, True),
        codec_mark(codec),
        family.text.name if known is None else f"{family.text.name} {known(files.text)}",
    )


def _of_export(model: str, device: torch.device | str) -> Encoders:
    folder = find(model)
    export = read_export(folder)
    family, codec = families.of(export), codec_file(folder, export.codec)
    if family.text.files:
        raise ValueError(
            f"{folder} is a model of {family.name}: name a released one, whose codec and text are the same"
        )
    return Encoders(
        export,
        read_codec(codec).codec.geometry,
        lambda: load_codec(codec).to(device),
        partial(family.encoder, device),
        codec_identity(codec),
        export.text,
    )
