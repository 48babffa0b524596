"""Sizes that a stranger's config names: within what there are models of, and those of the weights beside it.

A network is built from its config before the weights fill it, so a config of a few bytes could ask for any memory.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from causalreel.codecs.kinds import kind_of
from causalreel.headers import Header
from causalreel.nn.presets import ModelConfig
from causalreel.weights.identify import LAYERS, config_of, describe, size_in_words, visible

MOST = {"layers": LAYERS, "res_blocks": 64, "patch": 64, "fps": 1000.0}
"""Name of a field -> its largest value, where that is not `ANY`."""

ANY = 1 << 20
"""The largest value of every other number."""

PARAMETERS = 1 << 40
"""Of a network."""


def check_numbers(config: Any, place: str = "") -> None:
    """ValueError for a number in a config (dataclasses in each other) that is not finite or beyond every model."""
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{place}{field.name}"
        if dataclasses.is_dataclass(value):
            check_numbers(value, f"{name}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, (int, float)) and not abs(number) <= MOST.get(field.name, ANY):
                raise ValueError(f"{name} must be at most {MOST.get(field.name, ANY):g}, got {number:g}")
        if isinstance(value, tuple) and len(value) > 4096:
            raise ValueError(f"{name} must have at most 4096 values, got {len(value)}")
    if isinstance(config, ModelConfig):
        total = config.layers * config.dim * (8 * config.dim + 2 * config.ffn_dim) + config.dim * config.text_dim
        if total > PARAMETERS:
            raise ValueError(f"{place}dim, ffn_dim and layers make {total:.2g} parameters, at most {PARAMETERS:.2g}")


def check_model(config: ModelConfig, header: Header, path: Path) -> None:
    """ValueError if the tensors of a file are plainly not those of a network of this size; nothing is built."""
    shapes = {name: entry.shape for name, entry in header.entries.items()}
    seen = config_of(shapes)
    if seen is None:
        raise ValueError(f"{path} does not fit the config beside it, {size_in_words(config)}: {describe(shapes)}")
    told = {name: value for name, value in visible(config).items() if visible(seen)[name] != value}
    if told:
        differing = ", ".join(f"{name} {visible(seen)[name]} and not {value}" for name, value in told.items())
        raise ValueError(f"{path} is of another model size than the config beside it: {differing}; {describe(shapes)}")


def check_codec(config: Any, header: Header, path: Path) -> None:
    """As `check_model`, for a codec of any kind."""
    told = kind_of(config).differs(config, {name: entry.shape for name, entry in header.entries.items()})
    if told is not None:
        raise ValueError(f"{path} is of another codec than the config beside it: {told}")
