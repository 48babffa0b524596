"""Wan2.1 and what was trained from it: Causal Forcing, Self Forcing, and the bidirectional base models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from causalreel.codecs.codec import Codec
from causalreel.codecs.taehv import TAEHVConfig
from causalreel.codecs.wan_vae import vae_config
from causalreel.families.family import Decoder, Family, Text
from causalreel.families.wan21.models import CF, MODELS, SF, WAN_SMALL
from causalreel.nn.presets import PRESETS
from causalreel.text.umt5 import UMT5Sizes
from causalreel.types import TextEncoder
from causalreel.weights.hub import HubFile

VAE_FILE = HubFile(WAN_SMALL, "Wan2.1_VAE.pth", 0.5, ("Wan2.1_VAE.safetensors", "vae"))
TAEHV_FILE = HubFile("lightx2v/Autoencoders", "taew2_1.pth", 0.02, ("taew2_1.safetensors",))
"""A mirror of the file in github.com/madebyollin/taehv, which is not on the hub."""
TEXT_FILE = HubFile(WAN_SMALL, "models_t5_umt5-xxl-enc-bf16.pth", 11.4, ("text_encoder",))
TOKENIZER_FILES = tuple(
    HubFile(WAN_SMALL, f"google/umt5-xxl/{name}", size, (f"tokenizer/{name}",), is_of_tokenizer=True)
    # assumption: the four files of the tokenizer folder of the same model in diffusers' layout
    for name, size in (
        ("special_tokens_map.json", 0.0),
        ("spiece.model", 0.005),
        ("tokenizer.json", 0.017),
        ("tokenizer_config.json", 0.0),
    )
)


def read_vae(path: Path) -> Codec:
    """The Wan VAE of a file or folder."""
    from causalreel.families.wan21.codec_files import load_wan_vae

    return load_wan_vae(path)


def read_taehv(path: Path) -> Codec:
    """TAEHV of a file or folder."""
    from causalreel.families.wan21.codec_files import load_taehv

    return load_taehv(path)


def open_text(places: Sequence[Path], device: torch.device, cache: Path | None, stays: bool) -> TextEncoder:
    """UMT5-XXL from its weights and its tokenizer's files."""
    from causalreel.text.umt5 import Placement
    from causalreel.weights.umt5_files import load_text_encoder

    placement = Placement(device=device, offload="keep" if stays else "cpu")
    return load_text_encoder(places[0], places[1].parent, placement=placement, cache=cache)


def text_identity(places: Sequence[Path]) -> str:
    """What tells these files from others without reading all of them."""
    from causalreel.weights.umt5_files import fingerprint

    return fingerprint(places[0], places[1].parent)


FAMILY = Family(
    name="wan21",
    presets={name: PRESETS[name] for name in ("wan-1.3b", "wan-14b")},
    decoders={
        "wan": Decoder(vae_config("wan2.1"), VAE_FILE, read_vae),
        "taehv": Decoder(TAEHVConfig(), TAEHV_FILE, read_taehv),
    },
    text=Text(
        name="umt5",
        open=open_text,
        files=(TEXT_FILE, *TOKENIZER_FILES),
        identity=text_identity,
        bytes=UMT5Sizes().bytes,
        examples=(
            "A red sailing boat drifts across a calm bay at sunset, gentle waves, wide shot",
            "A cat walks through tall grass towards the camera, soft morning light",
            "A steam train crosses a stone bridge in the mountains, snow falling",
        ),
    ),
    size=(480, 832),
    fps=16.0,
    models=tuple(replace(model, is_named_by_file=model.repo in (CF, SF)) for model in MODELS),
)
