"""A family of models as a row: networks, codecs, text encoder, geometry, files and names. No code asks which it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from causalreel.codecs.codec import Codec, CodecKind
from causalreel.control.steering import Steering
from causalreel.nn.policies.registry import AnyPolicy
from causalreel.nn.policies.window import Context
from causalreel.nn.presets import ModelConfig
from causalreel.types import Geometry, TextEncoder
from causalreel.weights.export import Export, Sampling
from causalreel.weights.hub import HubFile


@dataclass(frozen=True)
class Decoder:
    """A codec that makes pixels of a family's latents."""

    sizes: Any
    """Of any kind in `codecs.kinds`."""
    file: HubFile | None = None
    """Where its released weights are."""
    read: Callable[[Path], Codec] | None = None
    """Reads that file, whatever its layout, in float32 on the CPU."""


@dataclass(frozen=True)
class Text:
    """A text encoder."""

    name: str
    """What exports call it."""
    open: Callable[[Sequence[Path], torch.device, Path | None, bool], TextEncoder]
    """Places of its `files` in their order, device of the embeddings, folder for finished ones, whether weights stay on
    the device between prompts -> the encoder."""
    files: tuple[HubFile, ...] = ()
    """What it reads; an encoder without files is made at once."""
    identity: Callable[[Sequence[Path]], str] | None = None
    """Places of its files -> what tells them from others."""
    bytes: int = 0
    """Of its weights in memory."""
    examples: tuple[str, ...] = ()
    """Prompts to begin with."""
    words: Mapping[str, Sequence[str]] | None = None
    """What a prompt may say, by kind of word; None: anything."""
    synonyms: Mapping[str, str] = field(default_factory=dict)
    """Other spellings of words."""
    mode: Literal["switch", "recompute", "forget"] = "recompute"
    """How another prompt is taken where nobody says (`infer.commands.Prompt`): switch or forget for models trained on
    texts that change within a clip, whose past keeps its own."""
    changes: bool = True
    """Whether another prompt changes a video that plays; where not, the live page begins again with it."""
    looks: int = 0
    """Latent frames that `complete` is shown when a prompt changes a video, decoded by themselves; 0: none."""
    retold: Callable[[str, str, Tensor | None], str] | None = None
    """The completed prompts before and behind a change, and what `complete` is shown -> what frames of the past are
    told when they are read again, in place of the former; None: the former."""


@dataclass(frozen=True)
class ReleasedModel:
    """One released model at full size."""

    name: str
    """What --model takes."""
    what: str
    """What it is, in a few words."""
    files: tuple[HubFile, ...]
    """Its weights; where there are several, the first is the index of the others."""
    which: str | None
    """Top-level key of a .pt file: generator is the raw weights, generator_ema the averaged ones; None takes the first
    that is there, and files without top-level keys need none."""
    preset: str
    """Its size, a key of its family's presets."""
    sampling: Sampling
    """How it is sampled."""
    context: AnyPolicy = Context()
    """What a chunk sees; longer clips than the training's get a window of that length."""
    frames: int = 21
    """Latent frames of a training clip."""
    is_named_by_file: bool = False
    """The last two names of its file's path are its own, wherever the file lies."""

    @property
    def repo(self) -> str:
        return self.files[0].repo if self.files else ""

    @property
    def size_gb(self) -> float:
        return sum(file.size_gb for file in self.files)

    def is_file(self, path: Path) -> bool:
        """Whether a file is this model's by the last names of its path, such as framewise/causal_forcing.pt."""
        return self.is_named_by_file and path.parts[-2:] == Path(self.files[0].path).parts[-2:]


@dataclass(frozen=True)
class Family:
    """Models that share latents, text and files."""

    name: str
    """What exports call it."""
    presets: Mapping[str, ModelConfig]
    """Sizes of its networks by name; `add` enters them in `nn.presets`."""
    decoders: Mapping[str, Decoder]
    """What makes pixels of its latents, by the name that --decoder takes; the first is its own, which encodes too."""
    text: Text
    """The text encoder."""
    size: tuple[int, int]
    """Height and width of its videos in pixels, unless asked otherwise."""
    fps: float
    """Pixel frames per second."""
    models: tuple[ReleasedModel, ...] = ()
    """Released models."""
    policy: Literal["renew", "slide"] = "slide"
    """How live streams outlast a training clip, see `infer.live.Policy`: slide, under `longer` or in a window as the
    released code for long videos does, unless renew was measured to be better."""
    longer: str | None = None
    """Context policy beyond a training clip's length, as `--policy` reads it, of models whose own keeps everything:
    what was measured to drift least, and of equals the fastest; None: a window of that length."""
    begins_again: bool = False
    """What a prompt taken by `forget` keeps is encoded again from its frames, as clips begin: for models whose clips
    all begin with a picture, and whose codec is light."""
    control: Steering | None = None
    """The keys of its models that take cameras and actions, unless an export says otherwise."""
    kinds: tuple[CodecKind, ...] = ()
    """Kinds of codecs that it brings; `add` enters them in `codecs.kinds`."""

    @property
    def own(self) -> Decoder:
        """Its own codec."""
        return next(iter(self.decoders.values()))

    @property
    def geometry(self) -> Geometry:
        """What its latents stand for."""
        return self.own.sizes.geometry

    def decoder(self, name: str | None) -> Decoder:
        """What makes pixels, by name; None is its own. ValueError names all."""
        if name is None:
            return self.own
        if name not in self.decoders:
            raise ValueError(f"decoder must be {' or '.join(self.decoders)}, got {name!r}")
        return self.decoders[name]

    def encoder(self, device: torch.device | str = "cpu") -> TextEncoder:
        """A text encoder that reads no files."""
        return self.text.open((), torch.device(device), None, False)

    def export(self, model: ReleasedModel, *, height: int | None = None, width: int | None = None) -> Export:
        """Everything of a released model but the weights, as for exported ones; for other sides in pixels if given."""
        network = self.presets[model.preset]
        sides = (self.size[0] if height is None else height, self.size[1] if width is None else width)
        return Export(
            name=model.name,
            model=network,
            sampling=model.sampling,
            context=model.context,
            frames=model.frames,
            fps=self.fps,
            latent=self.geometry.latent_of(*sides, patch=network.patch),
            codec=next(iter(self.decoders)),
            text=self.text.name,
            family=self.name,
        )
