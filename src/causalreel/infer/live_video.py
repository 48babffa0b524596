"""One live video: an endless rollout with its decoder, and all that a command can change of it.

It makes pixels when it is asked for them and knows no clock, queue or record: see `serve.session`. What it shows is a
function of how it began and of which command took effect before which chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from causalreel.data.video import to_bytes
from causalreel.infer.commands import Command, Mode, Options, Scene
from causalreel.infer.live import Live, Policy, PolicyKind, encode_prompt
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import adapt
from causalreel.types import Conditioning, DecodeStream
from causalreel.weights.export import Sampling


class LiveVideo:
    """A video that goes on for ever. Raises ValueError for options that the model cannot meet."""

    def __init__(self, pipeline: Pipeline, options: Options, policy: PolicyKind | None = None) -> None:
        """policy: see `infer.live.Policy`; None: the model's."""
        self.pipeline = pipeline
        self.options = options = options.checked()
        self.sampling = adapt(pipeline.sampling, steps=options.steps, chunk=options.chunk)
        self.policy = Policy.of(pipeline.export, self.sampling, policy)
        if options.image is not None:
            self.check_picture(options.image)
        self.scene = Scene(options.prompt, options.seed, options.image)
        self.fps = pipeline.export.fps if options.fps is None else options.fps
        self.paused = self.closed = False
        self.to_step = 0
        """Chunks that a paused video still makes."""
        self.fields = _first_fields(pipeline, options.fields)
        """Field of the conditioning -> what it holds for a frame."""
        self.text = self.encode(self.scene, begins=True)
        """(1,K,E): the prompt in force."""
        self.live: Live | None = None
        self._decode: DecodeStream | None = None

    @property
    def can_run(self) -> bool:
        """Whether there is a next chunk to be made."""
        return not self.closed and (not self.paused or self.to_step > 0)

    # ---- chunks ----

    def next_latents(self) -> Tensor:
        """(1,F,C,H,W): the next chunk, a given picture first of all."""
        if self.live is not None:
            return self.live.next_chunk(self._fields_of(self.sampling.chunk or 1)).latents
        first, picture = None, self.scene.picture
        if picture is not None:
            picture = in_range(picture)[None, None].to(self.pipeline.device)  # (1,1,3,H,W)
            first = self.pipeline.codec.encode(picture)  # (1,1,C,h,w)
        self.live = Live(
            self.pipeline,
            self.text,
            seed=self.scene.seed,
            sampling=self.sampling,
            policy=self.policy,
            first=first,
            fields=self._fields_of(1) if picture is not None else None,
        )
        self._decode = self.pipeline.codec.stream() if self.pipeline.decoder is None else self.pipeline.decoder(1)
        return self.next_latents() if first is None else first

    def pixels(self, latents: Tensor) -> Tensor:
        """(1,F,C,H,W) -> (t,H,W,3) uint8 on the CPU."""
        assert self._decode is not None
        return to_bytes(self._decode(latents)[0])

    def reset(self) -> None:
        """Free all that it holds on its device; the next chunk is the scene's first one."""
        if self.live is not None:
            self.live.close()
        self.live = self._decode = None

    # ---- commands ----

    def encode(self, scene: Scene, *, begins: bool) -> Tensor:
        """A scene's words -> (1,K,E), where the encoder makes it; ValueError. begins: with the scene's picture."""
        picture = None if scene.picture is None or not begins else in_range(scene.picture)
        return encode_prompt(self.pipeline, scene.prompt, scene.seed, picture)

    def take(self, command: Command, text: Tensor | None) -> None:
        """A command takes effect. text: its scene's words, encoded, if it has a scene."""
        if text is not None:
            self.scene, self.text = command.scene(self.scene) or self.scene, text
        command.apply(self)

    def read_prompt(self, mode: Mode, chunks: int) -> None:
        """Go over to the text in force; see `Live.tell`."""
        if self.live is not None:
            self.live.tell(self.text, mode=mode, chunks=chunks)

    def sampling_of(self, steps: int) -> Sampling:
        """How chunks are made with so many steps; ValueError."""
        return adapt(self.pipeline.sampling, steps=steps, chunk=self.sampling.chunk)

    def resample(self, steps: int) -> None:
        """Other denoising steps from the next chunk on."""
        self.sampling = self.sampling_of(steps)
        if self.live is not None:
            self.live.resample(self.sampling)

    def check_picture(self, picture: Tensor) -> None:
        """ValueError unless the video can begin with this picture (H,W,3)."""
        if self.sampling.chunk != 1:
            raise ValueError(
                f"a picture to begin with needs a frame-wise model (chunk 1); this one has chunk {self.sampling.chunk}"
            )
        if tuple(picture.shape[:2]) != self.pipeline.size:
            got = (3, *picture.shape[:2])
            raise ValueError(f"image must be a tensor {(3, *self.pipeline.size)} in [-1,1], got {got}")

    def check_field(self, name: str, value: Any) -> None:
        """ValueError unless the video began with this field and the value has the shape that it began with."""
        _known_field(name, self.pipeline.fields)
        if name not in self.fields:
            raise ValueError(f"this video began without the field {name!r}; give its first value in `fields`")
        began, got = self.fields[name].shape, torch.tensor(value).shape
        if began != got:
            raise ValueError(f"{name} must have the shape {tuple(began)}, as at the beginning; got {tuple(got)}")

    def set_field(self, name: str, value: Any) -> None:
        """What a field holds from the next chunk on."""
        self.fields = {**self.fields, name: torch.tensor(value, dtype=torch.float32)}

    def check_lora(self, name: str, strength: float) -> None:
        """ValueError unless the model was loaded with this LoRA and can have it at this strength."""
        if self.pipeline.loras is None:
            raise ValueError("this model was loaded without a LoRA, so that none can be set")
        self.pipeline.loras.check({name: strength})

    def _fields_of(self, frames: int) -> dict[str, Tensor]:
        """Name -> (1,frames,...): what is in force, for frames to be made."""
        return {name: value.expand(1, frames, *value.shape) for name, value in self.fields.items()}


def in_range(picture: Tensor) -> Tensor:
    """(H,W,3) uint8 -> (3,H,W) float32 in [-1,1]."""
    return picture.permute(2, 0, 1).float() / 127.5 - 1


def _first_fields(pipeline: Pipeline, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a model's fields hold at first; ValueError for others, and for values that its network does not take."""
    for name in given:
        _known_field(name, pipeline.fields)
    held = {name: torch.tensor(value, dtype=torch.float32) for name, value in given.items()}
    frame = Conditioning(torch.zeros(1, 1, 1), {name: value[None, None] for name, value in held.items()})
    pipeline.denoiser.model.check_fields(frame, 1)
    return held


def _known_field(name: str, fields: frozenset[str]) -> None:
    if name not in fields:
        allowed = f"it has {', '.join(sorted(fields))}" if fields else "it has none"
        raise ValueError(f"this model has no field {name!r}; {allowed}")
