"""Where networks start from: opened first, then read once, into the memory of whoever needs each part.

A network is built without storage (meta device) and cut over the processes of the run before anything is read; then
every tensor goes from the mapped file straight to where it is used, a process reading its own part. So a 14B teacher
needs no host memory but the page cache, which all processes of a machine share.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from causalreel.families import MODELS
from causalreel.fingerprint import fingerprint
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.policies.registry import AnyPolicy
from causalreel.nn.policies.window import Context
from causalreel.nn.presets import PRESETS, ModelConfig, preset
from causalreel.parallel.sharding import fill, local
from causalreel.train.contents import facts_of
from causalreel.weights.build import draw, empty_denoiser
from causalreel.weights.export import CONFIG, export_folder, open_export, read_export, weights_file
from causalreel.weights.hub import fetch
from causalreel.weights.identify import preset_of, size_in_words
from causalreel.weights.layouts import check_heads, read_network
from causalreel.weights.strict import check_fits, check_types

RANDOM = "random:"
"""In place of a folder, before the name of a preset: random weights, for measuring."""


@dataclass(frozen=True)
class Start:
    """A network's weights, opened and not yet read."""

    place: str
    """Where they are, for messages."""
    config: ModelConfig
    context: AnyPolicy = field(default_factory=Context)
    tensors: Mapping[str, Tensor] | None = None
    """Mapped, under Wan2.1's names; None: random ones."""
    file: str = ""
    """The file that they are in, where the place is a folder."""

    def denoiser(self) -> DiTDenoiser:
        """The network without storage, float32."""
        return empty_denoiser(self.config, context=self.context)

    def fingerprint(self) -> str:
        """Of the weights in float32 and what else decides the network: reads all of it once."""
        facts = facts_of(self.config, self.context)
        return fingerprint({} if self.tensors is None else _Float32(self.tensors), facts)

    @torch.no_grad()
    def fill(self, denoiser: DiTDenoiser, *, seed: int = 0, device: torch.device | None = None) -> None:
        """Read the weights into the network's storage, whole or this process's part; ValueError if not finite.

        seed: of random weights, which are drawn on `device`, by default that of the network.
        """
        device = device or denoiser.model.device
        generator = torch.Generator(device).manual_seed(seed)
        for name, target in denoiser.model.state_dict().items():
            if self.tensors is None:  # drawn whole, and each process takes its part
                drawn = torch.empty(target.shape, dtype=target.dtype, device=device)
                draw(name, drawn, generator)
                fill(target, drawn)
            else:
                fill(target, self.tensors[name])
            if not local(target).isfinite().all():
                raise ValueError(f"{self.file or self.place}: not finite: {name} has values that are NaN or infinite")


class _Float32(Mapping[str, Tensor]):
    """Tensors in float32, each for as long as it is looked at."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def size_of(source: Path) -> ModelConfig:
    """The size of a network, without its weights; ValueError if there is none."""
    if (name := str(source)).startswith(RANDOM):
        return preset(name.removeprefix(RANDOM))
    if name in MODELS:
        return PRESETS[MODELS[name][1].preset]
    return read_export(source).model if is_export(source) else read_network(source).config()


def open_start(source: Path) -> Start:
    """`init.<role>`: an export or an embedded model, a released name, weights of any known layout, `random:<preset>`.

    Released weights are fetched where they are not here. ValueError, in one line, for what is missing or does not fit.
    """
    name = str(source)
    if name.startswith(RANDOM):
        return Start(name, size_of(source))
    if name in MODELS:
        model = MODELS[name][1]
        places, reason = fetch(model.files, None)
        if missing := [file for file in model.files if file not in places]:
            files = ", ".join(f"{file.repo}/{file.path}" for file in missing)
            raise ValueError(f"{name}: {reason or 'not to be had'}: {files}; give init the path of a file that is here")
        path = places[model.files[0]]
        path = path.parent if len(model.files) > 1 else path
        found = _of_file(path, which=model.which, context=model.context)
        if preset_of(found.config) != model.preset:
            sizes = f"{size_in_words(found.config)}, {name} is {size_in_words(PRESETS[model.preset])}"
            raise ValueError(f"{found.place} is of another model size: {sizes}")
        return found
    if not is_export(source):
        return _of_file(source)
    export, tensors = open_export(source)
    found = Start(str(source), export.model, export.context, tensors, str(weights_file(source, export)))
    check_fits(found.denoiser().model, tensors, source=found.file)
    check_types(tensors, source=found.file)
    return found


def _of_file(path: Path, *, which: str | None = None, context: AnyPolicy = Context()) -> Start:
    network = read_network(path, which)
    config = network.config()
    found = Start(network.source, config, context, network.tensors)
    model = found.denoiser().model
    check_heads(model, network)
    check_fits(model, network.tensors, source=network.source)
    return found


def is_export(source: Path) -> bool:
    """Whether it can only be meant as an export: a folder of one, an embedded name, or nothing that is there."""
    return (export_folder(source) / CONFIG).is_file() or not source.exists()
