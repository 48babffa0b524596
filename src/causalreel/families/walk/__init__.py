"""The walkable family: tiny networks that take cameras and keys, for the walkable world's clips (`data.walk`)."""

from __future__ import annotations

from dataclasses import replace

from causalreel.codecs.wan_vae import vae_config
from causalreel.control.steering import Steering
from causalreel.families.family import Decoder, Family, Text
from causalreel.nn.presets import PRESETS
from causalreel.scenery import KEYS, SLOTS
from causalreel.text.walk import LENGTH, WalkTextEncoder

EXAMPLES = (
    "a red pillar ahead, a blue block right, sand floor, day sky",
    "a yellow block ahead, nothing right, nothing left, slate floor, night sky",
    "a cyan pillar left, a magenta pillar right, nothing ahead, grass floor, dusk sky",
)

TAKES = {"text_length": LENGTH, "camera": "prope", "actions": len(KEYS)}

FAMILY = Family(
    name="walk",
    presets={
        "walk": replace(PRESETS["tiny"], **TAKES),
        "walk-smoke": replace(PRESETS["tiny-smoke"], **TAKES),
    },
    decoders={"walk": Decoder(vae_config("tiny"))},
    text=Text(
        name="walk",
        open=lambda files, device, cache, stays: WalkTextEncoder(device),
        examples=EXAMPLES,
        words=SLOTS,
        changes=False,
    ),
    size=(64, 64),
    fps=16.0,
    policy="slide",
    control=Steering(
        keys=(("w", "a", "s", "d"), ("left", "right")),
        step=0.08,
        degrees=12.0,
        halves_turn=True,
        intrinsics=(0.6, 0.6, 0.5, 0.5),
        actions=KEYS,
    ),
)
