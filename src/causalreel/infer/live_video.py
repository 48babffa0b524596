"""One live video: an endless rollout with its decoder, and all that a command can change of it.

It makes pixels when it is asked for them and knows no clock, queue or record: see `serve.session`. What it shows is a
function of how it began and of which command took effect before which chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalreel import families
from causalreel.control import poses as P
from causalreel.control import strings
from causalreel.control.poses import Array
from causalreel.control.steering import Course, Steering
from causalreel.control.steering import Frame as Steered
from causalreel.infer.commands import Command, Mode, Options, Scene
from causalreel.infer.live import Live, Policy, PolicyKind, seen_in
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.restyle import Encoded, Feed, GivenVideo, Restyle
from causalreel.infer.schedule import adapt
from causalreel.nn.camera import ACTIONS, INTRINSICS, W2C
from causalreel.types import Conditioning, DecodeStream
from causalreel.weights.export import Export, Sampling

MOST_AHEAD = 1000
"""Latent frames of a trajectory: their poses are made at once, between two chunks, while other sessions wait."""


class LiveVideo:
    """A video that goes on for ever. Raises ValueError for options that the model cannot meet."""

    def __init__(
        self,
        pipeline: Pipeline,
        options: Options,
        policy: PolicyKind | None = None,
        *,
        restyle: Restyle | None = None,
    ) -> None:
        """policy: see `infer.live.Policy`; None: the model's. restyle: a video that it is made of, and ends with."""
        self.pipeline = pipeline
        self.options = options = options.checked()
        self.sampling = adapt(pipeline.sampling, steps=options.steps, chunk=options.chunk)
        self.policy = Policy.of(pipeline.export, self.sampling, policy)
        if options.image is not None:
            self.check_picture(options.image)
        scene = Scene(options.prompt, options.seed, options.image)
        self.fps = pipeline.export.fps if options.fps is None else options.fps
        self.paused = self.closed = False
        self.to_step = 0
        """Chunks that a paused video still makes."""
        self.fields = _first_fields(pipeline, options.fields)
        """Field of the conditioning -> what it holds for a frame, beside those that follow keys."""
        self.course = None if pipeline.control is None else Course(pipeline.control)
        """The camera that keys move, of a model that has some."""
        self.seen: list[Steered] = []
        """What the frames of the latest chunk were told by it."""
        self.scene, self.text = self.encode(scene, begins=True)
        """The scene, and (1,K,E) the prompt in force."""
        self._before = self.scene.said
        """The completed prompt in force before the latest command that had one."""
        self._held: tuple[str | None, Tensor | None] = (None, None)
        """The completed prompt of the latest chunk, and the latest latents (1,F,C,h,w) under it: not all."""
        self.live: Live | None = None
        self._decode: DecodeStream | None = None
        self._restyle = restyle
        self._given: Encoded | None = None
        if restyle is not None:
            restyle.check(pipeline.size, self.sampling, pipeline.codec)
            if options.image is not None:
                raise ValueError("a video begins with a picture or is made of a given one, not both")

    @property
    def can_run(self) -> bool:
        """Whether there is a next chunk to be made."""
        return not self.closed and (not self.paused or self.to_step > 0)

    # ---- chunks ----

    @property
    def feed(self) -> Feed | None:
        """Where the frames come from that it is made of, if somebody sends them."""
        return None if self._restyle is None else self._restyle.video.feed

    @property
    def is_waiting(self) -> bool:
        """Whether the next chunk waits for frames that somebody sends."""
        return self.feed is not None and self.feed.is_waiting

    def give(self, video: GivenVideo) -> None:
        """The frames of the given video, in place of what stood for them until everything else was checked."""
        assert self._restyle is not None and self.live is None
        self._restyle = replace(self._restyle, video=video)

    @property
    def given_bytes(self) -> int:
        """Memory of the frames of a given video."""
        return 0 if self._restyle is None else self._restyle.video.held

    @property
    def strength(self) -> float | None:
        """The noise level at which chunks begin, of a video that is made of a given one."""
        return None if self._restyle is None else self._restyle.strength

    def check_strength(self) -> None:
        """ValueError for a video that is made of noise alone."""
        if self._restyle is None:
            raise ValueError("strength is for a video that is made of a given one; this one is made of noise alone")

    def set_strength(self, strength: float) -> None:
        """Chunks begin at this noise level from the next one on."""
        assert self._restyle is not None
        self._restyle = replace(self._restyle, strength=strength)
        if self.live is not None:
            self.live.set_strength(strength)

    def has_input(self) -> bool:
        """Whether what it is made of, if anything, has another chunk; waits for a video that is still being made."""
        if self._restyle is None:
            return True
        if self._given is None:
            self._given = Encoded(self.pipeline.codec, self._restyle.video, self.pipeline.device)
        return self._given.has(self.sampling.chunk or 1)

    def decoder(self) -> DecodeStream:
        """What makes pixels of its chunks, one after the other."""
        if self._decode is None:
            self._decode = self.pipeline.codec.stream() if self.pipeline.decoder is None else self.pipeline.decoder(1)
        return self._decode

    def next_latents(self) -> Tensor:
        """(1,F,C,H,W): the next chunk, a given picture first of all."""
        latents = self._next_latents()
        looks = families.of(self.pipeline.export).text.looks
        if looks:
            said, held = self._held
            held = latents if held is None or said != self.scene.said else torch.cat([held, latents], dim=1)
            self._held = self.scene.said, held[:, -looks:]
        return latents

    def _next_latents(self) -> Tensor:
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
            over=self._given if self.has_input() else None,
            strength=None if self._restyle is None else self._restyle.strength,
            relative=W2C if self.course is not None and W2C in self.pipeline.fields else None,
        )
        return self._next_latents() if first is None else first

    def reset(self) -> None:
        """Free all that it holds on its device; the next chunk is the scene's first one. A closed one has none, and
        lets go of a given video too."""
        if self.live is not None:
            self.live.close()
        self.live = self._decode = None
        self._held = None, None
        if self._given is not None:
            self._given.close()
            self._given = None
        if self.closed and self._restyle is not None:
            self._restyle = replace(self._restyle, video=self._restyle.video.spent())
        if self.course is not None:
            self.course.begin()

    # ---- commands ----

    def encode(self, scene: Scene, *, begins: bool) -> tuple[Scene, Tensor]:
        """A scene -> the same with its prompt completed, and that as (1,K,E), where the encoder makes it; ValueError.

        begins: with the scene's picture.
        """
        picture = None if scene.picture is None or not begins else in_range(scene.picture)
        text = self.pipeline.text
        with torch.no_grad():
            said = text.complete(scene.prompt, scene.seed, picture, before=scene.said)
            encoded = text.encode([said])
        if encoded.is_cuda:  # chunks are made on another stream, and by another thread
            torch.cuda.current_stream(encoded.device).synchronize()
        return replace(scene, said=said), encoded

    def says_the_same(self, before: str | None) -> bool:
        """Whether the prompt in force, told in a video that goes on, would be completed like this behind another one.

        Drawing what is open takes no picture: only a beginning has one.
        """
        return self.scene.said == self._completed(before, self._seen(before))

    def _seen(self, before: str | None) -> Tensor | None:
        """What the encoder is shown of a video for which `before` holds: the latest frames (T,3,H,W), if that prompt
        has held for some.

        One that has not is not obeyed yet: things go where it sends them, and not where they are seen to go.
        """
        said, held = self._held
        seen = None if held is None or before != said else seen_in(self.pipeline, held)
        return None if seen is None else seen[0]

    def _completed(self, before: str | None, seen: Tensor | None) -> str:
        """The prompt in force as it changes a video for which `before` holds.

        Commands that take effect at the same chunk border count only by `before`, so that a record can do without those
        that are superseded.
        """
        return self.pipeline.text.complete(self.scene.prompt, self.scene.seed, None, before=before, seen=seen)

    @property
    def prompt_mode(self) -> Mode:
        """How another prompt is taken where nobody says."""
        return families.of(self.pipeline.export).text.mode

    def take(self, command: Command, encoded: tuple[Scene, Tensor] | None) -> None:
        """A command takes effect. encoded: what `encode` made of its scene, if it has one."""
        if encoded is not None:
            self._before = self.scene.said
            self.scene, self.text = encoded
        command.suited(self).apply(self)

    def read_prompt(self, mode: Mode, chunks: int) -> None:
        """Go over to the text in force; see `Live.tell`. What it leaves open stays as the latest frames show it, if the
        encoder looks at them: that is known only now."""
        family, past = families.of(self.pipeline.export).text, None
        if family.looks:
            was, _ = self._held
            shown = self._seen(was)  # whatever was told behind it that no frame shows
            said = self._completed(self._before, shown if self._before == was else None)
            with torch.no_grad():
                self.scene, self.text = replace(self.scene, said=said), self.pipeline.text.encode([said])
                if family.retold is not None and was is not None:
                    past = self.pipeline.text.encode([family.retold(was, said, shown)])
        if self.live is not None:
            self.live.tell(self.text, mode=mode, chunks=chunks, past=past)

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
        _known_field(name, self.pipeline)
        if name not in self.fields:
            raise ValueError(f"this video began without the field {name!r}; give its first value in `fields`")
        began, got = self.fields[name].shape, torch.tensor(value)
        if began != got.shape:
            raise ValueError(f"{name} must have the shape {tuple(began)}, as at the beginning; got {tuple(got.shape)}")
        check_values(name, got)

    def set_field(self, name: str, value: Any) -> None:
        """What a field holds from the next chunk on."""
        self.fields = {**self.fields, name: torch.tensor(value, dtype=torch.float32)}

    # ---- keys and cameras ----

    @property
    def pressed(self) -> tuple[str, ...]:
        """The keys held now."""
        return () if self.course is None else self.course.pressed

    @property
    def keys_told(self) -> tuple[str, ...]:
        """The keys that count in the latest chunk: held, or pressed for it and let go of."""
        return () if self.course is None else self.course.told

    @property
    def keys_down(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The keys held now, and those pressed and let go of that the next chunk is still to be told."""
        assert self.course is not None
        return self.course.pressed, self.course.tapped

    def holds(self, pressed: Sequence[str], tapped: Sequence[str] = ()) -> bool:
        """Whether these keys are held already, and nothing else moves the camera."""
        return self.course is not None and self.course.holds(pressed, tapped)

    def check_keys(self, pressed: Sequence[str]) -> None:
        """ValueError for keys that the model does not have."""
        steering_of(self.pipeline.export).check(pressed)

    def press(self, pressed: Sequence[str], tapped: Sequence[str] = ()) -> None:
        """These keys are held from the next frame on; those tapped count in the next chunk."""
        assert self.course is not None
        self.course.press(pressed, tapped)

    def check_trajectory(self, text: str, dialect: str) -> None:
        """ValueError for a string that the dialect cannot read or that leads too far, and for models without keys."""
        steering_of(self.pipeline.export)
        rule = strings.dialect(dialect)
        latents = len(strings.held(text, rule)) // (1 if rule.unit == "latent" else strings.FRAMES)
        if latents > MOST_AHEAD:
            raise ValueError(
                f"trajectory: leads through {latents:,} latent frames, at most {MOST_AHEAD:,} can be given at a time"
            )

    def follow_string(self, text: str, dialect: str) -> None:
        """The next frames go where the string leads."""
        assert self.course is not None
        self.course.follow(self.course.steering.ahead(text, dialect, self.course.pose))

    def check_poses(self, poses: Any, convention: str, intrinsics: Any) -> None:
        """ValueError for what are no poses or no normalised intrinsics, and for models without cameras."""
        steering_of(self.pipeline.export)
        if W2C not in self.pipeline.fields:
            raise ValueError("camera: this model has keys and no camera; send keys")
        _poses(poses, convention)
        _intrinsics(intrinsics)

    def follow_poses(self, poses: Any, convention: str, intrinsics: Any) -> None:
        """The next frames have these poses."""
        assert self.course is not None
        self.course.follow(_poses(poses, convention), _intrinsics(intrinsics))

    # ---- the rest ----

    def check_lora(self, name: str, strength: float) -> None:
        """ValueError unless the model was loaded with this LoRA and can have it at this strength."""
        if self.pipeline.loras is None:
            raise ValueError("this model was loaded without a LoRA, so that none can be set")
        self.pipeline.loras.check({name: strength})

    def _fields_of(self, frames: int) -> dict[str, Tensor]:
        """Name -> (1,frames,...): what is in force, for frames to be made."""
        held = {name: value.expand(1, frames, *value.shape) for name, value in self.fields.items()}
        if self.course is None:
            return held
        self.seen = self.course.next(frames)
        rows = {
            W2C: [frame.w2c for frame in self.seen],
            INTRINSICS: [frame.intrinsics for frame in self.seen],
            ACTIONS: [frame.actions for frame in self.seen],
        }
        ours = (name for name in rows if name in self.pipeline.fields)
        return held | {name: torch.tensor(np.array(rows[name]), dtype=torch.float32)[None] for name in ours}


def in_range(picture: Tensor) -> Tensor:
    """(H,W,3) uint8 -> (3,H,W) float32 in [-1,1]."""
    return picture.permute(2, 0, 1).float() / 127.5 - 1


def steering_of(export: Export) -> Steering:
    """How a model is steered; ValueError if it has no keys."""
    control = families.steering(export)
    if control is None:
        raise ValueError(f"{export.name} has no keys and no camera; prompts steer it")
    return control


def _poses(given: Any, convention: str) -> Array:
    poses = np.array(given, dtype=np.float64)
    poses = P.checked(poses[None] if poses.shape == (4, 4) else poses, "camera")
    return poses if convention == "c2w" else P.inverted(poses)


def _intrinsics(given: Any) -> list[float] | None:
    if given is None:
        return None
    rows = P.intrinsics_rows(given, "camera: intrinsics")
    if len(rows) != 1:
        raise ValueError(f"camera: intrinsics are one row, fx fy cx cy, for all frames; got {len(rows)}")
    P.check_unit(rows, is_normalised=True, what="camera: intrinsics")
    return rows[0].tolist()


def _first_fields(pipeline: Pipeline, given: Mapping[str, Any]) -> dict[str, Tensor]:
    """What a model's fields hold at first; ValueError for others, and for values that its network does not take."""
    for name in given:
        _known_field(name, pipeline)
    held = {name: torch.tensor(value, dtype=torch.float32) for name, value in given.items()}
    for name, value in held.items():
        check_values(name, value)
    frame = Conditioning(torch.zeros(1, 1, 1), {name: value[None, None] for name, value in held.items()})
    pipeline.denoiser.model.check_fields(frame, 1)
    return held


def check_values(name: str, value: Tensor) -> None:
    """ValueError for numbers that are not finite, and for a camera that is none."""
    if not value.isfinite().all():
        raise ValueError(f"{name} must be finite numbers of float32")
    if name == W2C and value.shape == (4, 4):
        P.checked(value[None].double().numpy(), name)
    if name == INTRINSICS and value.shape == (4,):
        P.intrinsics_rows(value[None].double().numpy(), name)


def _known_field(name: str, pipeline: Pipeline) -> None:
    fields = pipeline.fields
    if name not in fields:
        allowed = f"it has {', '.join(sorted(fields))}" if fields else "it has none"
        raise ValueError(f"this model has no field {name!r}; {allowed}")
    if pipeline.control is not None and name in (W2C, INTRINSICS, ACTIONS):
        raise ValueError(f"the field {name!r} of this model follows the keys: tell it keys, trajectory or camera")
