"""The tiny family: small networks, a small causal VAE and a text encoder without weights, for the tiny world's clips.

Its models come with the package (`weights.export.embedded`) and are trained by its own recipes.
"""

from __future__ import annotations

from causalreel.codecs.wan_vae import vae_config
from causalreel.families.family import Decoder, Family, Text
from causalreel.nn.presets import PRESETS
from causalreel.text.tiny import TinyTextEncoder, told_anew
from causalreel.vocabulary import SLOTS, SYNONYMS

EXAMPLES = (
    "a large red circle moves right slowly on a dark background",
    "a blue square moves left",
    "a small yellow triangle moves up quickly on a light background",
    "a large green circle moves down and a small magenta square moves right",
)

FAMILY = Family(
    name="tiny",
    presets={name: PRESETS[name] for name in ("tiny", "tiny-smoke")},
    decoders={"tiny": Decoder(vae_config("tiny"))},
    text=Text(
        name="tiny",
        open=lambda files, device, cache, stays: TinyTextEncoder(device),
        examples=EXAMPLES,
        words=SLOTS,
        synonyms=SYNONYMS,
        mode="forget",
        looks=3,
        retold=told_anew,
    ),
    size=(64, 64),
    fps=16.0,
    policy="slide",
    longer="infinity-rope",
    begins_again=True,
)
