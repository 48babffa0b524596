"""Causal video diffusion: few-step autoregressive generation, and the training that makes it.

`import causalreel` is light: what is listed here is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from causalreel.infer.models import load, variants
    from causalreel.infer.pipeline import Pipeline
    from causalreel.weights.export import Export, Sampling, load_codec, load_export, save_codec, save_export

__version__ = "0.1.0"

_PLACES = {
    "load": "causalreel.infer.models",
    "variants": "causalreel.infer.models",
    "Pipeline": "causalreel.infer.pipeline",
    "Export": "causalreel.weights.export",
    "Sampling": "causalreel.weights.export",
    "load_codec": "causalreel.weights.export",
    "load_export": "causalreel.weights.export",
    "save_codec": "causalreel.weights.export",
    "save_export": "causalreel.weights.export",
}
"""Public name -> the module that defines it."""

__all__ = [
    "Export",
    "Pipeline",
    "Sampling",
    "__version__",
    "load",
    "load_codec",
    "load_export",
    "save_codec",
    "save_export",
    "variants",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'causalreel' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
