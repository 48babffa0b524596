"""What says how much a pair counts: peft's adapter_config.json, or the same beside diffusers' tensors.

peft matches the keys of its patterns as regular expressions against the end of a layer's name. They come from
strangers, so that only expressions are taken which cannot run away.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causalreel.foreign import TEXT_BYTES, parse_json, read_json, shown

PATTERNS = 20_000
"""Of a configuration."""

EXPRESSIONS = 16
"""Of these that are more than names."""

METADATA = "lora_adapter_metadata"
"""Under which diffusers keeps the configuration in a file's own metadata, of a pipeline with `transformer.` before
every name."""

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin that also change the base's weights, so that the pairs alone are not the adapter."""

REFUSED = {
    "fan_in_fan_out": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False, None),
    "layer_replication": (),
    "target_parameters": (),
    "modules_to_save": (),
    "trainable_token_indices": (),
    "velora_config": (),
}
"""Settings that mean other mathematics or weights -> what they may be, beside nothing."""


SPECIAL = re.compile(r"[\\\[\](){}*+?|^$]")
"""Characters that make a pattern more than a name; a dot in a name may stay one."""


class Patterns:
    """Values by pattern; the first pattern that fits a name, or its end behind a dot, counts, as peft has it."""

    def __init__(self, values: Mapping[str, Any], place: str) -> None:
        if len(values) > PATTERNS:
            raise ValueError(f"{place} must have at most {PATTERNS:,} patterns, got {len(values):,}")
        self._plain = {pattern: (order, value) for order, (pattern, value) in enumerate(values.items())}
        self._special: list[tuple[int, re.Pattern[str], Any]] = []
        for pattern, (order, value) in self._plain.items():
            if SPECIAL.search(pattern):
                self._special.append((order, _compiled(pattern, place), value))
        if len(self._special) > EXPRESSIONS:
            raise ValueError(f"{place} must have at most {EXPRESSIONS} regular expressions, got {len(self._special)}")

    def find(self, name: str, otherwise: Any) -> Any:
        """The value for a layer's name; `otherwise` if no pattern fits."""
        parts = name.split(".")
        ends = (".".join(parts[at:]) for at in range(len(parts)))
        found = [self._plain[end] for end in ends if end in self._plain]
        found += [(order, value) for order, pattern, value in self._special if pattern.match(name)]
        return min(found, key=lambda one: one[0])[1] if found else otherwise


NONE = Patterns({}, "")


@dataclass(frozen=True)
class Scales:
    """alpha and rank per layer, as a configuration has them; without one every scale is 1."""

    source: str | None = None
    rank: int = 8
    alpha: float = 8.0
    ranks: Patterns = NONE
    alphas: Patterns = NONE
    is_rslora: bool = False
    is_dora: bool = False

    def of(self, name: str, rank: int, source: str) -> float:
        """The scale of a layer (as the file writes it) whose pair has this rank."""
        if self.source is None:
            return 1.0
        said = self.ranks.find(name, self.rank)
        if said != rank:
            raise ValueError(f"{source}: {shown(name)} has rank {rank}, and {self.source} says {said}")
        alpha = self.alphas.find(name, self.alpha)
        return alpha / math.sqrt(rank) if self.is_rslora else alpha / rank


def read_adapter_config(path: Path) -> Scales:
    """peft's adapter_config.json -> scales; ValueError for an adapter of another kind."""
    return _scales(read_json(path, most=TEXT_BYTES, what="adapter_config.json"), str(path))


def in_metadata(metadata: Mapping[str, str], source: str) -> Scales | None:
    """The configuration in a file's metadata -> scales; None if there is none."""
    text = metadata.get(METADATA)
    if text is None:
        return None
    found = parse_json(text, f"{source}: its {METADATA}", items=PATTERNS * 4)
    if not any("." in key for key in found):  # as one network's `save_lora_adapter` writes it
        return _scales(found, f"its {METADATA}")
    own = {key.removeprefix("transformer."): value for key, value in found.items() if key.startswith("transformer.")}
    if not own:
        raise ValueError(f"{source}: its {METADATA} says nothing of the transformer: {shown(', '.join(found), 100)}")
    return _scales(own, f"its {METADATA}")


def _scales(found: Mapping[str, Any], source: str) -> Scales:
    kind = found.get("peft_type", "LORA")
    if kind != "LORA":
        raise ValueError(f"{source}: peft_type is {shown(kind, 40)}, not LORA")
    for name, allowed in REFUSED.items():
        value = found.get(name)
        if value not in (None, [], {}, *allowed):
            raise ValueError(f"{source}: {name} is {shown(value, 60)}, which is not read")
    begun = found.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"{source}: init_lora_weights is {shown(begun, 40)}, which changes the base too; convert it first"
        )
    for name in ("use_rslora", "use_dora"):
        if not isinstance(found.get(name) or False, bool):
            raise ValueError(f"{source}: {name} must be true or false, got {shown(found[name], 40)}")
    rank, alpha = found.get("r"), found.get("lora_alpha")
    return Scales(
        source,
        8 if rank is None else _rank(rank, "r", source),
        8.0 if alpha is None else _alpha(alpha, "lora_alpha", source),
        _patterns(found, "rank_pattern", source, _rank),
        _patterns(found, "alpha_pattern", source, _alpha),
        bool(found.get("use_rslora")),
        bool(found.get("use_dora")),
    )


def _patterns(
    found: Mapping[str, Any], name: str, source: str, read: Callable[[Any, str, str], int | float]
) -> Patterns:
    patterns = found.get(name) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{source}: {name} must be an object of numbers, got {shown(patterns, 60)}")
    return Patterns({key: read(value, f"{name} {key}", source) for key, value in patterns.items()}, f"{source}: {name}")


def _compiled(pattern: str, place: str) -> re.Pattern[str]:
    """ValueError for a regular expression that is none, or that could take long on a name."""
    repeats = re.findall(r"(?<!\\)[*+?{]", pattern)
    if len(pattern) <= 200 and len(repeats) <= 2 and not re.search(r"\)[*+?{]|\\[1-9]|\(\?", pattern):
        try:
            return re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, RecursionError, OverflowError):
            pass
    raise ValueError(f"{place} has the pattern '{shown(pattern, 80)}', which is too involved or no pattern")


def _rank(value: Any, name: str, source: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**20:
        raise ValueError(f"{source}: {shown(name, 80)} must be a whole number from 1 on, got {shown(value, 40)}")
    return value


def _alpha(value: Any, name: str, source: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ValueError(f"{source}: {shown(name, 80)} must be a number, got {shown(value, 40)}")
    return float(value)
