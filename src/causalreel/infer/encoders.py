"""What data are prepared with: a model's codec and text encoder by name, each read when it is needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from causalreel.foreign import shown
from causalreel.hashed import sha256_of
from causalreel.infer.models import TEXT_ENCODERS, find
from causalreel.infer.released import random_codec
from causalreel.text.fixed import FixedTextEncoder
from causalreel.types import TextEncoder, VideoCodec
from causalreel.weights.export import Export, codec_file, codec_identity, load_codec, read_export
from causalreel.weights.hub import fetch
from causalreel.weights.registry import MODELS, TEXT_FILE, TOKENIZER_FILES, VAE_FILE


@dataclass(frozen=True)
class Encoders:
    """A model's encoders, found and not loaded."""

    export: Export
    """The model's sizes and rates."""
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
    export = MODELS[model].export(height=height, width=width)
    if is_random:
        network = export.model
        fixed = partial(FixedTextEncoder, network.text_length, network.text_dim, device)
        return Encoders(export, partial(_placed_random, device), fixed, "random wan2.1", "fixed")
    places = fetch([VAE_FILE, TEXT_FILE, *TOKENIZER_FILES], wan_dir, model=MODELS[model])
    vae, text, tokenizer = places[VAE_FILE], places[TEXT_FILE], places[TOKENIZER_FILES[0]].parent
    from causalreel.weights.umt5 import fingerprint

    return Encoders(
        export,
        partial(_wan_vae, vae, device),
        partial(_umt5, text, tokenizer, device, prompt_cache),
        _identity(vae),
        f"umt5 {fingerprint(text, tokenizer)}",
    )


def _of_export(model: str, device: torch.device | str) -> Encoders:
    folder = find(model)
    export = read_export(folder)
    if export.text not in TEXT_ENCODERS:
        raise ValueError(f"{folder}: unknown text encoder {export.text!r}; there are {', '.join(TEXT_ENCODERS)}")
    codec = codec_file(folder, export.codec)
    return Encoders(
        export,
        lambda: load_codec(codec).to(device),
        partial(TEXT_ENCODERS[export.text], device),
        codec_identity(codec),
        export.text,
    )


def _placed_random(device: torch.device | str) -> VideoCodec:
    return random_codec("wan").requires_grad_(False).eval().to(device)


def _wan_vae(path: Path, device: torch.device | str) -> VideoCodec:
    """In float32: data are made once, and what they lose is lost for every training."""
    from causalreel.weights.codecs import load_wan_vae

    return load_wan_vae(path).to(device)


def _umt5(weights: Path, tokenizer: Path, device: torch.device | str, cache: Path | None) -> TextEncoder:
    from causalreel.text.umt5 import Placement
    from causalreel.weights.umt5 import load_text_encoder

    return load_text_encoder(weights, tokenizer, placement=Placement(device=device, offload="keep"), cache=cache)


def _identity(path: Path) -> str:
    """Of a released codec: a hash of its file, or of the name and size of a folder's."""
    return sha256_of(path)[:16] if path.is_file() else path.name
