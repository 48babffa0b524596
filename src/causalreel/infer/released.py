"""Pipelines of released full-size models: files found or fetched, networks built where they are used, parts connected.

Nothing here knows a layout or a name on the hub (`weights` does) nor how frames are made (`infer.pipeline` does).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from causalreel.codecs.codec import Codec
from causalreel.codecs.kinds import build
from causalreel.codecs.taehv import TAEHVConfig
from causalreel.codecs.wan_vae import vae_config
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import adapt
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.text.fixed import FixedTextEncoder
from causalreel.types import DecodeStream, TextEncoder, VideoCodec
from causalreel.weights.build import load_denoiser, random_denoiser
from causalreel.weights.export import Export
from causalreel.weights.hub import ModelFiles, model_files
from causalreel.weights.identify import preset_of, size_in_words
from causalreel.weights.layouts import keys_of, read_network
from causalreel.weights.registry import MODELS, ReleasedModel, owner_of

log = logging.getLogger(__name__)

DECODERS = {"wan": vae_config("wan2.1"), "taehv": TAEHVConfig()}
"""What makes pixels of Wan's latents: name -> sizes."""

RANDOM = "random"
"""What `weights` is for a model with random weights."""


@dataclass(frozen=True)
class Choices:
    """How a full-size model is wanted; None is the model's own."""

    weights: str | Path | None = None
    """The DiT's file or folder, of any layout; `random` needs no file at all: for benchmarks."""
    wan_dir: str | Path | None = None
    """Folder with the VAE, the text encoder and its tokenizer, and taew2_1.pth."""
    decoder: Literal["wan", "taehv"] = "wan"
    """wan: the model's own VAE; taehv: a tiny one, faster and less exact."""
    height: int | None = None
    """Height of the video in pixels, a multiple of 16."""
    width: int | None = None
    """Width of the video in pixels, a multiple of 16."""
    which: str | None = None
    """Top-level key of a .pt file, such as generator_ema."""
    prompt_cache: Path | None = None
    """Folder for finished text embeddings."""
    before_loading: Callable[[Export, torch.device], None] | None = None
    """Called when everything is found and nothing is loaded, with what will be: the place for a memory estimate."""


def load_released(
    model: ReleasedModel,
    choices: Choices,
    device: torch.device,
    *,
    steps: int | Sequence[float] | None = None,
    chunk: int | None = None,
) -> Pipeline:
    """A pipeline for a released model. Everything that can be refused is refused before anything large is read."""
    if model.sampling.plan == "rolling":
        raise ValueError(
            f"{model.name} is made by a rolling window of chunks at rising noise levels, which is not supported yet; "
            f"causalreel convert reads its file"
        )
    if choices.decoder not in DECODERS:
        raise ValueError(f"decoder must be {' or '.join(DECODERS)}, got {choices.decoder!r}")
    export = model.export(height=choices.height, width=choices.width)
    sampling = adapt(export.sampling, steps=steps, chunk=chunk)
    if sampling != export.sampling:
        log.info("%s was trained for other steps or chunks than those asked for", model.name)
    dtype = choose_dtype(device)
    files = None
    if choices.weights != RANDOM:
        files = model_files(model, weights=choices.weights, wan_dir=choices.wan_dir, decoder=choices.decoder)
    if choices.before_loading is not None:
        choices.before_loading(export, device)
    denoiser = _denoiser(model, export, choices, files, device, dtype)
    codec = _codec(choices.decoder, files, device, dtype)
    if codec.geometry.channels != export.latent.channels:
        raise ValueError(f"the codec has {codec.geometry.channels} channels, {model.name} has {export.latent.channels}")
    return Pipeline(denoiser, export, sampling, codec, _text(export, files, choices, device), device)


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
        names = [name for name, row in MODELS.items() if row.preset == preset]
        raise ValueError(
            f"{files.weights} is of another model size: it looks like {size_in_words(found)}, and {model.name} is "
            f"{size_in_words(export.model)}; give --model NAME of that size: {', '.join(names[:3]) or 'there is none'}"
            f"{' ...: causalreel models' if len(names) > 3 else ''}"
        )
    if is_others:
        log.warning("%s is used as %s%s", files.weights, model.name, hint)
    return load_denoiser(network, export.model, context=export.context, device=device, dtype=dtype)


def _codec(decoder: str, files: ModelFiles | None, device: torch.device, dtype: torch.dtype) -> VideoCodec:
    codec = random_codec(decoder) if files is None else _read_codec(decoder, files.codec)
    placed = codec.requires_grad_(False).eval().to(device, dtype)
    if files is None or files.encoder is None:
        return placed
    encoder = files.encoder
    return TwoCodecs(placed, lambda: _read_codec("wan", encoder).to(device, dtype))


def _read_codec(decoder: str, path: Path) -> Codec:
    from causalreel.weights.codecs import load_taehv, load_wan_vae

    return load_wan_vae(path) if decoder == "wan" else load_taehv(path)


def random_codec(decoder: str) -> Codec:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build(DECODERS[decoder])


def _text(export: Export, files: ModelFiles | None, choices: Choices, device: torch.device) -> TextEncoder:
    if files is None:
        return FixedTextEncoder(export.model.text_length, export.model.text_dim, device)
    from causalreel.text.umt5 import Placement
    from causalreel.weights.umt5 import load_text_encoder

    return load_text_encoder(
        files.text, files.tokenizer, placement=Placement(device=device), cache=choices.prompt_cache
    )


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

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder.decode(latents)

    def stream(self) -> DecodeStream:
        return self.decoder.stream()
