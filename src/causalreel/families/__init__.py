"""The families of models that there are: one folder each, with its row `FAMILY`. A new one needs no entry elsewhere."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from pathlib import Path

from causalreel.codecs import kinds
from causalreel.control.steering import Steering
from causalreel.families.family import Family, ReleasedModel
from causalreel.nn.presets import PRESETS
from causalreel.weights.export import Export

FAMILIES: dict[str, Family] = {}
"""Name -> family."""

MODELS: dict[str, tuple[Family, ReleasedModel]] = {}
"""Released models in the order in which they are listed: name -> their family and row."""


def add(family: Family) -> None:
    """Enter a family, its sizes, its kinds of codecs and its released models; ValueError for a name that is taken."""
    taken = [name for name in family.presets if PRESETS.get(name, family.presets[name]) != family.presets[name]]
    taken += [model.name for model in family.models if model.name in MODELS]
    taken += [f"a family {family.name}"] if family.name in FAMILIES else []
    if taken:
        raise ValueError(f"there is {taken[-1]} already")
    for kind in family.kinds:
        kinds.add(kind)
    PRESETS.update(family.presets)
    FAMILIES[family.name] = family
    MODELS.update((model.name, (family, model)) for model in family.models)


def of(export: Export) -> Family:
    """The family of an export; ValueError names those that there are."""
    if export.family not in FAMILIES:
        raise ValueError(f"unknown family {export.family!r}; there are {', '.join(FAMILIES)}")
    family = FAMILIES[export.family]
    if export.text != family.text.name:
        raise ValueError(f"unknown text encoder {export.text!r}; models of {family.name} have {family.text.name}")
    return family


def steering(export: Export) -> Steering | None:
    """The keys that steer a model: what its export says, else its family for models that take them; None: prompts
    alone steer it."""
    control, model = export.control or of(export).control, export.model
    fits = control is not None and model.camera != "none" and len(control.actions) == model.actions
    return control if fits or export.control is not None else None


def of_preset(name: str) -> Family:
    """The family of a network's size; ValueError names all sizes."""
    for family in FAMILIES.values():
        if name in family.presets:
            return family
    raise ValueError(f"unknown model preset {name!r}; there are {', '.join(PRESETS)}")


def released(name: str) -> tuple[Family, ReleasedModel]:
    """The row called `name`; ValueError names the nearest and all there are."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown model {name!r}; did you mean {near!r}? there are {', '.join(MODELS)}")
    return MODELS[name]


def owner_of(path: str | Path) -> ReleasedModel | None:
    """The model whose released file has this path's last names, such as framewise/causal_forcing.pt."""
    return next((model for _, model in MODELS.values() if model.is_file(Path(path))), None)


for _found in pkgutil.iter_modules(__path__):
    if _found.ispkg:
        add(importlib.import_module(f"{__name__}.{_found.name}").FAMILY)
