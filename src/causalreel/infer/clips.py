"""A request for clips: the same object from the command line, the API and Python down to the rollout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor

from causalreel.infer.manner import beyond
from causalreel.infer.restyle import GivenVideo, check_strength, latents_in
from causalreel.infer.schedule import Schedule, adapt, schedule
from causalreel.infer.scripts import Spoken, Spread, chunks_of, is_script, read_script, spread
from causalreel.types import Geometry, TextEncoder
from causalreel.weights.export import Export, Sampling


class Model(Protocol):
    """What a request is checked against: a `models.Profile`, or a `pipeline.Pipeline`, whose weights are there too."""

    @property
    def export(self) -> Export: ...
    @property
    def sampling(self) -> Sampling: ...
    @property
    def geometry(self) -> Geometry: ...
    @property
    def size(self) -> tuple[int, int]: ...


@dataclass(frozen=True, eq=False)
class ClipRequest:
    """Clips of one length to be made together, one for each prompt."""

    prompts: str | Sequence[str]
    frames: int | None = None
    """Pixel frames of n latent frames with n a multiple of the chunk; None: as long as a training clip. A longer clip
    streams on with what its family has for that (`Family.longer`), or a window of the training clip's length, so its
    cost per chunk stays flat."""
    seed: int | Sequence[int] = 0
    """Of the first prompt, the others count up from it; or one for each prompt. It also decides what a prompt leaves
    open (see `TextEncoder.complete`)."""
    steps: int | Sequence[float] | None = None
    """Denoising steps per chunk, a number (4: 1000, 750, 500, 250) or a list; None: the model's own."""
    chunk: int | None = None
    """Latent frames made together; None: the model's own."""
    prefix: Tensor | None = None
    """The clip's first frames, (3,H,W), (T,3,H,W) or (B,T,3,H,W) in [-1,1]: one picture is image-to-video, more is
    continuation. It is encoded, decoded again and yielded first, and counts in `frames`."""
    video: GivenVideo | Tensor | None = None
    """A video to make another of, (T,3,H,W) in [-1,1] at the model's rate or a `GivenVideo`, the same for all prompts:
    each chunk is noised to `strength` and denoised from there. The clip is as long as its whole chunks, or `frames`."""
    strength: float | None = None
    """With `video`: noise level in (0, 1] at which its chunks begin; of 1 nothing of it is left."""
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    """For models whose conditioning has fields: name -> (B,F,...) or (1,F,...), a value for each of the F latent frames
    of the clip, those of the prefix included."""
    fused: bool = True
    """Fewer, larger denoiser calls with the same result."""
    ahead: bool = True
    """On a GPU, make the next chunk while one is decoded and looked at."""

    @staticmethod
    def of(prompts: ClipRequest | str | Sequence[str], **more: Any) -> ClipRequest:
        """A request as it is, with other values for some of its fields, or one made of its fields."""
        return replace(prompts, **more) if isinstance(prompts, ClipRequest) else ClipRequest(prompts, **more)

    def check(self, model: Model, encoder: TextEncoder | None) -> CheckedClips:
        """All that can be known before anything is made; ValueError for what cannot be. encoder: None, where the words
        are not looked at."""
        prompts = [self.prompts] if isinstance(self.prompts, str) else list(self.prompts)
        if not prompts:
            raise ValueError("prompts must hold at least one prompt, got none")
        seeds = _seeds(self.seed, len(prompts))
        given = None if self.prefix is None else _as_batch(self.prefix, len(prompts))
        if given is not None and tuple(given.shape[-2:]) != model.size:
            raise ValueError(f"the prefix must be {_by(model.size)} pixels, got {_by(given.shape[-2:])}")
        length = 0 if given is None else model.geometry.latents_of(given.shape[1], name="the prefix")
        sampling = adapt(model.sampling, steps=self.steps, chunk=self.chunk)
        video = self._video(model, sampling)
        how: dict[str, Any] = {"trained": model.export.frames, "context": model.export.context}
        how["longer"] = beyond(model.export, sampling)
        script = self._script(prompts, sampling.chunk)
        frames = self.frames if self.frames is not None or not script else _length(script, sampling, model)
        if video is not None:
            most = model.geometry.frames_of(latents_in(video, model.geometry, sampling.chunk or 1))
            if frames is not None and frames > most:
                raise ValueError(f"frames must be at most the {most} of the given video's whole chunks, got {frames}")
            frames = most if frames is None else frames
        plan = schedule(sampling, model.geometry, **how, frames=frames, prefix=length)
        plan = plan if video is None else replace(plan, strength=self.strength)
        spoken = None
        if script and sampling.chunk is not None:
            counts = chunks_of(script, per_second=_per_second(model), chunk=sampling.chunk)
            spoken = spread(counts, script, [sampling.chunk] * (plan.frames // sampling.chunk))
            prompts, seeds_of = [one.text for one in script], seeds * len(script)
        else:
            seeds_of = seeds
        if encoder is not None:
            pictures = [None] * len(prompts) if given is None else list(given[:, -1])
            pictures += [None] * (len(prompts) - len(pictures))  # only a script's first prompt begins with one
            words = zip(prompts, seeds_of, pictures, strict=True)
            prompts = [encoder.complete(prompt, seed, picture) for prompt, seed, picture in words]
        return CheckedClips(prompts, seeds, plan, given, spoken, video)

    def _video(self, model: Model, sampling: Sampling) -> GivenVideo | None:
        """The video that the clip is made of; ValueError unless it and `strength` go together."""
        if self.strength is not None:
            check_strength(self.strength)
        if self.video is None:
            if self.strength is not None:
                raise ValueError("strength is for a given video; there is none")
            return None
        if self.strength is None:
            raise ValueError("a given video needs a strength in (0, 1], the noise level at which its chunks begin")
        if self.prefix is not None:
            raise ValueError("a clip begins with a prefix or is made of a given video, not both")
        if sampling.chunk is None or sampling.plan != "chunked":
            raise ValueError(f"a given video needs a model that goes chunk by chunk; {model.export.name} does not")
        video = self.video if isinstance(self.video, GivenVideo) else GivenVideo.of(self.video)
        if video.size != model.size:
            raise ValueError(f"the given video must be {_by(model.size)} pixels, got {_by(video.size)}")
        return video

    @staticmethod
    def _script(prompts: Sequence[str], chunk: int | None) -> tuple[Spoken, ...]:
        """The prompts by time of the only clip; none if no prompt says times."""
        if not any(is_script(prompt) for prompt in prompts):
            return ()
        if len(prompts) > 1:
            raise ValueError(f"a prompt with times is made alone, not in a batch of {len(prompts)}")
        if chunk is None:
            raise ValueError("prompts by time need an autoregressive model; this one generates whole clips")
        return read_script(prompts[0])

    def fields_for(self, frames: int) -> dict[str, Tensor]:
        """Name -> (B,F,...) of the clips' latent frames; ValueError for a field of another number of them."""
        rows = 1 if isinstance(self.prompts, str) else len(self.prompts)
        for name, value in self.fields.items():
            if value.ndim < 2 or value.shape[0] not in (1, rows) or value.shape[1] != frames:
                raise ValueError(
                    f"the field {name!r} must be ({rows},{frames},...), a value for each latent frame; got "
                    f"{tuple(value.shape)}"
                )
        return {name: value.expand(rows, *value.shape[1:]) for name, value in self.fields.items()}


@dataclass(frozen=True, eq=False)
class CheckedClips:
    """What a request comes to."""

    prompts: list[str]
    """As the model reads them: complete, where an encoder was asked."""
    seeds: list[int]
    plan: Schedule
    prefix: Tensor | None
    """Pixels (B,T,3,H,W) that the clips begin with."""
    spread: Spread | None = None
    """Where a script's prompts, which `prompts` then are, are read in the only clip."""
    video: GivenVideo | None = None
    """What the clips are made of, from `plan.strength` on."""


def _per_second(model: Model) -> float:
    """Latent frames of a second."""
    return model.export.fps / model.geometry.temporal


def _length(script: Sequence[Spoken], sampling: Sampling, model: Model) -> int | None:
    """Pixel frames of a script that says how long everything is shown; None if its end is open."""
    counts = chunks_of(script, per_second=_per_second(model), chunk=sampling.chunk or 1)
    total = sum(count or 0 for count in counts) * (sampling.chunk or 1)
    return None if None in counts else model.geometry.frames_of(total)


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    if isinstance(seed, int):
        return [seed + i for i in range(count)]
    if len(seed) != count:
        raise ValueError(f"seed must be one number or one for each of the {count} prompts, got {len(seed)}")
    return list(seed)


def _as_batch(prefix: Tensor, count: int) -> Tensor:
    """(3,H,W), (T,3,H,W) or (B,T,3,H,W) -> (count,T,3,H,W)."""
    if prefix.ndim not in (3, 4, 5) or prefix.shape[-3] != 3:
        raise ValueError(f"the prefix must be (3,H,W), (T,3,H,W) or (B,T,3,H,W), got {tuple(prefix.shape)}")
    if not prefix.is_floating_point():
        raise ValueError(f"the prefix must be floating point in [-1, 1], got {prefix.dtype}")
    batch = prefix[(None,) * (5 - prefix.ndim)]  # (1 or B,T,3,H,W)
    if batch.shape[0] not in (1, count):
        raise ValueError(f"the prefix must be one clip or one for each of the {count} prompts, got {batch.shape[0]}")
    return batch.expand(count, -1, -1, -1, -1)


def _by(size: Sequence[int]) -> str:
    return "x".join(str(side) for side in size)
