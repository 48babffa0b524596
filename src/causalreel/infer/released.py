"""Pipelines of released full-size models: files found or fetched, networks built where they are used, parts connected.

Nothing here knows a layout or a name on the hub (`weights` does) nor how frames are made (`infer.pipeline` does).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.codecs.codec import Codec
from causalreel.codecs.kinds import build
from causalreel.families import MODELS, owner_of
from causalreel.families.family import Decoder, Family, ReleasedModel
from causalreel.families.files import ModelFiles, model_files
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import adapt
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.text.fixed import FixedTextEncoder
from causalreel.types import DecodeStream, TextEncoder, VideoCodec
from causalreel.weights.build import load_denoiser, random_denoiser
from causalreel.weights.export import Export
from causalreel.weights.identify import preset_of, size_in_words
from causalreel.weights.layouts import keys_of, read_network

log = logging.getLogger(__name__)

RANDOM = "random"
"""What `weights` is for a model with random weights."""


@dataclass(frozen=True)
class Choices:
    """How a full-size model is wanted; None is the model's own."""

    weights: str | Path | None = None
    """The DiT's file or folder, of any layout; `random` needs no file at all: for benchmarks."""
    wan_dir: str | Path | None = None
    """Folder with the family's other files: for Wan2.1 the VAE, the text encoder and its tokenizer, and taew2_1.pth."""
    decoder: str | None = None
    """What makes the pixels, a name of the family's (`families`), such as taehv, faster and less exact."""
    height: int | None = None
    """Height of the video in pixels, a multiple of what one token covers (16 for Wan2.1)."""
    width: int | None = None
    """Width of the video in pixels, likewise."""
    which: str | None = None
    """Top-level key of a .pt file, such as generator_ema."""
    prompt_cache: Path | None = None
    """Folder for finished text embeddings."""
    before_loading: Callable[[Export, torch.device], None] | None = None
    """Called when everything is found and nothing is loaded, with what will be: the place for a memory estimate."""


def load_released(
    family: Family,
    model: ReleasedModel,
    choices: Choices,
    device: torch.device,
    *,
    steps: int | Sequence[float] | None = None,
    chunk: int | None = None,
) -> Pipeline:
    """A pipeline for a released model. Everything that can be refused is refused before anything large is read."""
    decoder = family.decoder(choices.decoder)
    export = family.export(model, height=choices.height, width=choices.width)
    sampling = adapt(export.sampling, steps=steps, chunk=chunk)
    if sampling != export.sampling:
        log.info("%s was trained for other steps or chunks than those asked for", model.name)
    dtype = choose_dtype(device)
    files = None
    if choices.weights != RANDOM:
        how = {"weights": choices.weights, "wan_dir": choices.wan_dir, "decoder": choices.decoder}
        files = model_files(family, model, **how)
    if choices.before_loading is not None:
        choices.before_loading(export, device)
    denoiser = _denoiser(model, export, choices, files, device, dtype)
    codec = open_codec(family, decoder, files, device, dtype)
    if codec.geometry.channels != export.latent.channels:
        raise ValueError(f"the codec has {codec.geometry.channels} channels, {model.name} has {export.latent.channels}")
    text = open_text(family, export, files, choices.prompt_cache, device)
    return Pipeline(denoiser, export, sampling, codec, text, device)


def choose_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU, as the models were trained and are released to be run; float32 on a CPU."""
    if device.type != "cuda":
        return torch.float32
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise ValueError(
            f"{name} has no bfloat16, which full-size models need (Ampere or later does); use --device cpu"
        )
    return torch.bfloat16


def _denoiser(
    model: ReleasedModel,
    export: Export,
    choices: Choices,
    files: ModelFiles | None,
    device: torch.device,
    dtype: torch.dtype,
) -> DiTDenoiser:
    if files is None:
        return random_denoiser(export.model, context=export.context, device=device, dtype=dtype)
    owner = owner_of(files.weights)
    is_others = owner is not None and owner.name != model.name
    hint = f"; by its name it is the file of {owner.name}: --model {owner.name}" if owner and is_others else ""
    which = choices.which or (model.which if keys_of(files.weights) else None)
    try:
        network = read_network(files.weights, which)
        found = network.config()
    except ValueError as error:
        raise ValueError(f"{error}{hint}") from None
    preset = preset_of(found)
    if preset is not None and preset != model.preset:
        names = [name for name, (_, row) in MODELS.items() if row.preset == preset]
        raise ValueError(
            f"{files.weights} is of another model size: it looks like {size_in_words(found)}, and {model.name} is "
            f"{size_in_words(export.model)}; give --model NAME of that size: {', '.join(names[:3]) or 'there is none'}"
            f"{' ...: causalreel models' if len(names) > 3 else ''}"
        )
    if is_others:
        log.warning("%s is used as %s%s", files.weights, model.name, hint)
    return load_denoiser(network, export.model, context=export.context, device=device, dtype=dtype)


def open_codec(
    family: Family, decoder: Decoder, files: ModelFiles | None, device: torch.device, dtype: torch.dtype
) -> VideoCodec:
    """What makes the pixels, with random weights where there are no files; the family's own codec encodes if it can."""
    if files is None or files.codec is None or decoder.read is None:
        return random_codec(decoder.sizes).to(device, dtype)
    codec = decoder.read(files.codec).requires_grad_(False).eval().to(device, dtype)
    read, place = family.own.read, files.encoder
    if place is None or read is None:
        return codec
    return TwoCodecs(codec, lambda: read(place).to(device, dtype))


def random_codec(sizes: Any) -> Codec:
    """A codec with random weights, always the same ones, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(sizes).requires_grad_(False).eval()


def open_text(
    family: Family, export: Export, files: ModelFiles | None, cache: Path | None, device: torch.device
) -> TextEncoder:
    """The family's text encoder; one that says nothing where it reads files and there are none."""
    if files is None and family.text.files:
        return FixedTextEncoder(export.model.text_length, export.model.text_dim, device)
    return family.text.open(() if files is None else files.text, device, cache, False)


class TwoCodecs:
    """Decodes with one codec and encodes with another, which is read when it is first needed; see types.VideoCodec."""

    def __init__(self, decoder: VideoCodec, read_encoder: Callable[[], VideoCodec]) -> None:
        self.decoder, self._read = decoder, read_encoder
        self.geometry = decoder.geometry

    @cached_property
    def _encoder(self) -> VideoCodec:
        return self._read()

    def encode(self, video: Tensor) -> Tensor:
        return self._encoder.encode(video)

    @property
    def encode_stream(self) -> Any:
        """As the encoder's, if it has one."""
        return getattr(self._encoder, "encode_stream", None)

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder.decode(latents)

    def stream(self) -> DecodeStream:
        return self.decoder.stream()
