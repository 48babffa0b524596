"""An export written again: under another name, with its codec, sampling and scores, and with weights or without.

Without: two models of the same weights that are sampled differently need them once, and lie side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from causalreel import config
from causalreel.files import write_text
from causalreel.fingerprint import fingerprint
from causalreel.folders import claim
from causalreel.foreign import read_json
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.weights.export import (
    CONFIG,
    MODEL,
    Export,
    Sampling,
    cast_weights,
    codec_file,
    export_folder,
    load_codec,
    load_export,
    open_export,
    save_export,
    weights_file,
)


def re_export(
    source: str | Path,
    folder: str | Path,
    *,
    name: str | None = None,
    codec: str | None = None,
    scores: Path | None = None,
    label: str | None = None,
    sampling: Sampling | None = None,
    weights_of: str | None = None,
    mean_with: Sequence[str | Path] = (),
) -> Path:
    """Save an export again under another name, with its codec beside it or named `codec`, and its scores -> the folder.

    scores: scores.json (or control.json) of an evaluation, of which the row `label` goes into the provenance.
    sampling: how it is sampled from now on; None: as before. weights_of: name of an export beside `folder` with the
    same weights, which are then not written again; `codec` has to be named with it. mean_with: other exports of this
    network; the weights become the mean of all, in float32, everything else stays the source's.
    """
    if weights_of is not None and codec is None:
        raise ValueError("codec: name one, such as that of the other export, where weights_of is given")
    source = export_folder(source)
    denoiser, export = load_export(source)
    provenance = dict(export.provenance)
    if mean_with:
        provenance.pop("metrics", None)  # they were the source's
        provenance["mean_of"] = _take_mean(denoiser, export, mean_with)
    if scores is not None:
        provenance["metrics"] = _metrics(scores, label)
    beside = load_codec(codec_file(source, export.codec)) if codec is None else None
    named = dataclasses.replace(
        export,
        name=name or export.name,
        codec=codec or export.codec,
        sampling=sampling or export.sampling,
        provenance=provenance,
    )
    if weights_of is not None:
        return _save_beside(Path(folder), denoiser, named, weights_of)
    return save_export(folder, denoiser, named, codec=beside)


@torch.no_grad()
def _take_mean(denoiser: DiTDenoiser, export: Export, others: Sequence[str | Path]) -> dict[str, str]:
    """Make a network's weights the mean of its own and those of others -> the marks of all of them, by name or folder.

    ValueError for one of another shape, with other latents, text or controls.
    """
    marks = {export.name: export.weights}
    mean = {name: value.clone() for name, value in denoiser.state_dict().items()}
    for other in others:
        network, card = load_export(export_folder(other))
        for field in ("model", "family", "latent", "text", "control"):
            if getattr(card, field) != getattr(export, field):
                raise ValueError(f"mean_with: {other} must have the {field} of {export.name}, and has another one")
        for name, value in network.state_dict().items():
            mean[name] += value
        marks[card.name if card.name not in marks else str(other)] = card.weights
    denoiser.load_state_dict({name: value / (1 + len(others)) for name, value in mean.items()})
    return marks


def _save_beside(folder: Path, denoiser: DiTDenoiser, export: Export, weights_of: str) -> Path:
    """Write the config alone, which names the export beside `folder` whose weights are the same; ValueError if not."""
    with claim(folder, "export"):
        weights = fingerprint(cast_weights(denoiser.model))
        export = dataclasses.replace(export, weights=weights[:16], weights_of=weights_of)
        owner = weights_file(folder, export).parent
        card, tensors = open_export(owner)
        if owner.samefile(folder):
            raise ValueError(f"weights_of must name another export than {folder}, which would lose its weights")
        if fingerprint(tensors) != weights:
            raise ValueError(f"weights_of: {owner.resolve()} holds other weights than {export.name}")
        write_text(folder / CONFIG, config.dump(dataclasses.replace(export, weights=card.weights)))
        (folder / MODEL).unlink(missing_ok=True)
    open_export(folder)
    return folder


def _metrics(scores: Path, label: str | None) -> dict[str, Any]:
    """What an evaluation's scores.json says of one of its models."""
    rows = read_json(scores, what="scores.json of an evaluation")
    try:
        models, facts = rows["models"], rows["facts"]
        if label not in models:
            raise ValueError(f"label must be one of {', '.join(models)}; got {label!r}")
        means = {key: value["mean"] for key, value in models[label].items() if isinstance(value, dict)}
        known = {key: round(mean, 4) for key, mean in means.items() if mean is not None}
        return {"clips": facts["clips"], "seed": facts["seed"], **known}
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{scores} is no scores.json of an evaluation") from None
