"""Exports: a model's weights with what is needed to use them, as a folder of two files.

    folder/config.yaml         an `Export`: network, sampling, context, latents, codec, text encoder, provenance
    folder/model.safetensors   the network under Wan2.1's bare names, bfloat16 unless asked otherwise; none where the
                               config says that the weights are those of an export in a folder beside this one

A codec is two files side by side as well, `codec.safetensors` and `codec.yaml` with a `CodecExport`; either its folder
or the .safetensors file names it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from causalreel import config
from causalreel.codecs.codec import Codec
from causalreel.codecs.kinds import KINDS, kind_of
from causalreel.control.steering import Steering
from causalreel.files import write_text
from causalreel.fingerprint import fingerprint
from causalreel.flow import warp_steps
from causalreel.folders import claim
from causalreel.foreign import file_in, shown
from causalreel.headers import Header, read_header
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.linear import effective_state
from causalreel.nn.policies.registry import AnyPolicy
from causalreel.nn.presets import ModelConfig
from causalreel.types import LatentSpec
from causalreel.weights.files import read_tensors, write_tensors
from causalreel.weights.identify import folder_in_words
from causalreel.weights.sizes import check_codec, check_model, check_numbers
from causalreel.weights.strict import FLOATS, check_finite, filled_codec, load_strictly, without_initialisation

ASSETS = Path(__file__).resolve().parents[1] / "assets"
"""Where the embedded models are: a folder per family, in it `codec.safetensors` and a folder per variant."""

DEFAULT_VARIANTS = {"tiny": "frame-2step"}
"""Family -> the variant that its bare name means."""

ALIASES = {"tiny/ar": "tiny/ar-frame"}

CONFIG, MODEL = "config.yaml", "model.safetensors"

log = logging.getLogger(__name__)


def _fall(levels: Sequence[float]) -> bool:
    return bool(levels) and levels[0] <= 1 and levels[-1] > 0 and all(a > b for a, b in pairwise(levels))


@dataclass(frozen=True)
class Sampling:
    """How a model was trained to be sampled."""

    chunk: int | None = 1
    """Latent frames generated together; null: the whole clip at once and without a cache (a bidirectional model)."""
    steps: tuple[float, ...] = (1000.0, 500.0)
    """Noise levels of a chunk before the shift, falling, in (0, 1000]; unused by many-step models."""
    first_steps: tuple[float, ...] | None = None
    """Those of the first generated chunk, where they differ."""
    shift: float = 5.0
    """The flow-matching time shift, at least 1."""
    solver: Literal["renoise", "euler", "unipc"] = "renoise"
    """The move from one noise level to the next."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is none."""
    multistep: int | None = None
    """Many-step models: this many moves on the solver's own grid instead of `steps` (euler or unipc)."""
    plan: Literal["chunked", "rolling"] = "chunked"
    """chunked: one chunk after the other; rolling: a window of chunks at rising noise levels (Rolling Forcing)."""
    levels: tuple[tuple[float, ...], ...] = ()
    """Exact noise levels of the first generated chunk, the second ..., the last list for all further ones, in place of
    steps, first_steps and shift; the state between the calls of a chunk is then float64, and begins as noise times the
    first level (Causal-rCM)."""
    noisy_from: int | None = None
    """Chunks from this number on, given ones counted, become context as their last denoising call read them (noisy
    context); null: every finished chunk is read once more, clean."""
    times: Literal["exact", "bfloat16"] = "exact"
    """What the network is told of a noise level: itself, or 1000 times it rounded to bfloat16, as it was trained."""

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, or null for the whole clip; got {self.chunk}")
        if not self.shift >= 1:
            raise ValueError(f"shift must be at least 1, got {self.shift}")
        if not self.guidance > 0:
            raise ValueError(f"guidance must be positive, got {self.guidance}")
        if self.multistep is not None and (self.multistep < 1 or self.solver == "renoise"):
            raise ValueError(
                f"multistep must be at least 1 with solver euler or unipc; got {self.multistep} with {self.solver}"
            )
        if not all(_fall(levels) for levels in self.levels):
            raise ValueError(f"levels must be lists that fall strictly within (0, 1], got {self.levels}")
        if len({levels[0] for levels in self.levels}) > 1 or (self.levels and self.multistep is not None):
            raise ValueError("levels must all begin alike, and are not for many-step models")
        if self.noisy_from is not None and (self.noisy_from < 0 or self.plan != "chunked"):
            raise ValueError(
                f"noisy_from must be at least 0 and is for chunked plans; got {self.noisy_from}, {self.plan}"
            )
        if self.plan == "rolling" and (
            self.chunk is None or self.multistep is not None or self.first_steps is not None
        ):
            raise ValueError("a rolling plan needs a chunk and one step list for all chunks")
        if self.multistep is None:
            for steps in (self.steps, self.first_steps or self.steps):
                warp_steps(steps, self.shift)


@dataclass(frozen=True)
class Export:
    """Everything but the weights that it takes to use a model."""

    name: str
    """What messages call it."""
    model: ModelConfig
    """The network."""
    sampling: Sampling
    """How to sample from it."""
    context: AnyPolicy
    """The context policy: how much of the past a chunk was trained to see, and at which positions."""
    frames: int
    """Latent frames of a training clip."""
    fps: float
    """Pixel frames per second."""
    latent: LatentSpec
    """Shape of one latent frame."""
    codec: str = "tiny"
    """The codec: an embedded family's name such as tiny, or a path relative to the export's folder, such as `..`."""
    text: str = "tiny"
    """The text encoder's name."""
    family: str = "tiny"
    """The family of models, a key of families.FAMILIES."""
    control: Steering | None = None
    """The keys that steer it, and how its cameras and actions follow them; null: it has none."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from: recipe, commit, seed, metrics."""
    weights_of: str | None = field(default=None, compare=False)
    """The folder beside this one, an export too, whose weights these are, such as `walk`; null: it has its own."""
    weights: str = field(default="", compare=False)
    """A hash of the weights beside it, which their file holds too; empty in older exports."""

    def __post_init__(self) -> None:
        name = self.weights_of
        if name is not None and (name in ("", ".", "..") or any(c in name for c in "/\\\0") or not self.weights):
            raise ValueError(
                "weights_of must be the plain name of a folder beside this one, and weights the hash of its weights; "
                f"got {shown(name)!r} and {shown(self.weights)!r}"
            )
        if self.frames < 1 or (self.sampling.chunk is not None and self.frames % self.sampling.chunk):
            raise ValueError(f"frames must be a positive multiple of chunk {self.sampling.chunk}, got {self.frames}")
        if not self.fps > 0:
            raise ValueError(f"fps must be positive, got {self.fps}")
        if self.latent.channels != self.model.channels:
            raise ValueError(f"latent has {self.latent.channels} channels, the model {self.model.channels}")
        if self.control is not None and len(self.control.actions) != self.model.actions:
            raise ValueError(
                f"control.actions must have the model's {self.model.actions} columns, got {len(self.control.actions)}"
            )


@dataclass(frozen=True)
class CodecExport:
    """Everything but the weights that it takes to use a codec."""

    codec: Any
    """Sizes and latent statistics."""
    kind: str = "wan"
    """What kind of codec it is, a key of codecs.kinds.KINDS."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from: recipe, commit, seed, metrics."""
    weights: str = field(default="", compare=False)
    """A hash of the weights beside it, which their file holds too; empty in older exports."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {shown(self.kind)!r}")
        sizes = KINDS[self.kind].sizes
        if isinstance(self.codec, dict):
            object.__setattr__(self, "codec", config.build(sizes, self.codec, "codec"))
        if not isinstance(self.codec, sizes):
            raise ValueError(
                f"codec must be a mapping with the keys of {sizes.__name__}, got {shown(self.codec, 60)!r}"
            )


def save_export(
    folder: str | Path,
    denoiser: DiTDenoiser,
    export: Export,
    *,
    codec: Codec | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write an export into `folder`, which is made if need be; each file is whole or absent, the config comes last.

    What is stopped in between is no export, or two halves of different ones that refuse to be loaded.
    codec: written beside the model as codec.safetensors, to which the config then refers. -> the folder.
    """
    folder = Path(folder)
    if denoiser.config != export.model:
        raise ValueError(f"export.model differs from the saved network's config: {export.model}, {denoiser.config}")
    with claim(folder, "export"):
        cast = cast_weights(denoiser.model, dtype)
        beside = () if codec is None else (fingerprint(codec.state_dict()),)
        export = dataclasses.replace(export, weights=fingerprint(cast, *beside)[:16], weights_of=None)
        metadata = {"format": "causalreel", "name": export.name, "config_hash": _identity(export)}
        write_tensors(folder / MODEL, cast, metadata | {"weights": export.weights})
        if codec is not None:
            save_codec(folder / "codec.safetensors", codec)
            export = dataclasses.replace(export, codec="codec.safetensors")
        write_text(folder / CONFIG, config.dump(export))
    return folder


def embedded() -> dict[str, Path]:
    """Names of the embedded models, such as `tiny/frame-2step` -> their folders."""
    folders = sorted(path.parent for path in ASSETS.glob(f"*/*/{CONFIG}"))
    return {f"{folder.parent.name}/{folder.name}": folder for folder in folders}


def export_folder(model: str | Path) -> Path:
    """The folder of an embedded model's name (`tiny`, `tiny/base`, `tiny/ar` ...); other paths as they are."""
    name = Path(model).as_posix()
    name = f"{name}/{DEFAULT_VARIANTS[name]}" if name in DEFAULT_VARIANTS else ALIASES.get(name, name)
    known = embedded()
    if name in known and (Path(model) / CONFIG).is_file():
        log.warning("%s is taken as the embedded model, not as the folder here; that needs an absolute path", model)
    return known.get(name, Path(model))


def read_export(folder: str | Path) -> Export:
    """The config of an export (a folder, or an embedded model's name), without its weights."""
    folder = export_folder(folder)
    if not (folder / CONFIG).is_file():
        known = embedded() if folder.parts[:1] and folder.parts[0] in DEFAULT_VARIANTS else {}
        told = (
            folder_in_words(folder) if folder.is_dir() else f"embedded models are {', '.join(known)}" if known else ""
        )
        raise ValueError(f"{folder} is not an export: it has no {CONFIG}" + (f"; {told}" if told else ""))
    export = config.load(folder / CONFIG, Export, alone=True)
    try:
        check_numbers(export)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    return export


def load_export(
    folder: str | Path, *, compute: torch.dtype | None = None, backend: str = "auto"
) -> tuple[DiTDenoiser, Export]:
    """An export as a float32 network on the CPU, in evaluation mode, and its config.

    compute, backend: see DiTDenoiser. Raises ValueError, in one line, for a missing or cut off file and for weights
    that were saved for another model.
    """
    export, tensors = open_export(folder)
    with without_initialisation():
        denoiser = DiTDenoiser(export.model, context=export.context, backend=backend, compute=compute)
    load_strictly(denoiser.model, tensors, source=str(weights_file(folder, export)), types=FLOATS)
    return denoiser.requires_grad_(False).eval(), export


def open_export(folder: str | Path) -> tuple[Export, dict[str, Tensor]]:
    """An export's config and its weights, mapped and not yet read; ValueError as of `load_export`."""
    folder = export_folder(folder)
    export = read_export(folder)
    path = weights_file(folder, export)
    name = export.name if export.weights_of is None else read_export(path.parent).name
    header = read_header(path)
    claimed, identity = header.metadata, _identity(dataclasses.replace(export, name=name))
    if claimed.get("config_hash", identity) != identity:
        raise ValueError(
            f"{path} holds the weights of '{shown(claimed.get('name', 'another model'))}', "
            f"not of '{shown(name)}' as {folder / CONFIG} says"
        )
    _check_pair(header, export.weights, path, folder / CONFIG)
    check_model(export.model, header, path)
    return export, read_tensors(path)


def weights_file(folder: str | Path, export: Export) -> Path:
    """The weights of an export in `folder`: its own, or those of the one beside it that it names, which has its own."""
    folder = export_folder(folder)
    if export.weights_of is None:
        return folder / MODEL
    beside = file_in(folder / os.pardir, export.weights_of, str(folder / CONFIG))
    try:
        other = read_export(beside)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: weights_of: {error}") from None
    if other.weights_of is not None:
        raise ValueError(
            f"{folder / CONFIG}: weights_of must name an export that has its own weights; {export.weights_of!r} has "
            f"those of {other.weights_of!r}"
        )
    return beside / MODEL


def save_codec(
    path: str | Path,
    codec: Codec,
    provenance: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write a codec into a folder, or as a .safetensors file with its config beside it; -> the .safetensors file."""
    path = _codec_path(path)
    cast = cast_weights(codec, dtype)
    card = CodecExport(codec.config, kind_of(codec.config).name, dict(provenance or {}), fingerprint(cast)[:16])
    write_tensors(path, cast, {"format": "causalreel-codec", "weights": card.weights})
    write_text(path.with_suffix(".yaml"), config.dump(card))
    return path


def load_codec(path: str | Path) -> Codec:
    """A saved codec (its folder or its .safetensors file) in float32 on the CPU, in evaluation mode."""
    path, card = find_codec(path), read_codec(path)
    sizes, header = card.codec, read_header(path)
    _check_pair(header, card.weights, path, path.with_suffix(".yaml"))
    check_codec(sizes, header, path)
    return filled_codec(sizes, read_tensors(path), source=str(path), types=FLOATS)


def read_codec(path: str | Path) -> CodecExport:
    """The config of a saved codec, without its weights."""
    path = find_codec(path)
    if not path.with_suffix(".yaml").is_file():
        raise ValueError(f"no codec at {path}: {path.with_suffix('.yaml').name} is missing")
    export = config.load(path.with_suffix(".yaml"), CodecExport, alone=True)
    try:
        check_numbers(export)
    except ValueError as error:
        raise ValueError(f"{path.with_suffix('.yaml')}: {error}") from None
    return export


def codec_file(folder: str | Path, name: str) -> Path:
    """The file that an export in `folder` means by its codec's name."""
    is_embedded = name not in (".", "..") and Path(name).name == name and not name.endswith(".safetensors")
    return _codec_path(ASSETS / name if is_embedded else Path(folder) / name)


def codec_identity(path: str | Path) -> str:
    """What tells one trained codec from another: a hash of its weights file."""
    return hashlib.sha256(find_codec(path).read_bytes()).hexdigest()[:16]


def find_codec(path: str | Path) -> Path:
    """The .safetensors file of a codec: of an embedded family's name such as `tiny`, else of a folder or a file."""
    name = str(path)
    inside = ASSETS / name / "codec.safetensors"
    if name in DEFAULT_VARIANTS and inside.is_file():
        if _codec_path(path).is_file():
            log.warning("%s is taken as the embedded codec, not as the folder here; that needs an absolute path", name)
        return inside
    return _codec_path(path)


def codec_name(codec: str | Path, folder: Path) -> str:
    """How an export in `folder` names its codec: an embedded family, or a path relative to the folder."""
    place = find_codec(codec).parent.resolve()
    if place.parent == ASSETS.resolve():
        return place.name
    return os.path.relpath(place, folder.resolve())


def _codec_path(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / "codec.safetensors"


def _check_pair(header: Header, weights: str, path: Path, card: Path) -> None:
    """ValueError for weights and a config that were written one after the other, and of which one is of before."""
    if card.parent != path.parent and header.metadata.get("weights") != weights:
        raise ValueError(f"{path} does not hold the weights that {card} was written for")
    if header.metadata.get("weights", weights) != weights:
        raise ValueError(
            f"{path} is not what {card.name} beside it was written for: the export was stopped between the two files; "
            "run what writes it again"
        )


def cast_weights(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> Mapping[str, Tensor]:
    """What an export of it holds; ValueError for values that are not finite."""
    cast = {name: value.to(dtype) for name, value in effective_state(module).items()}
    check_finite(cast, source="weights to be exported")
    return cast


def _identity(export: Export) -> str:
    """A hash of what fixes the meaning of the weights; sampling and provenance may be edited by hand."""
    facts = {"name": export.name, "text": export.text}
    later = ("camera: none\n", "actions: 0\n")  # networks that take neither are known as before there was either
    size = "".join(line for line in config.dump(export.model).splitlines(keepends=True) if line not in later)
    text = repr(facts) + size + config.dump(export.latent)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
