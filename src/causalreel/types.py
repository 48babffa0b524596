"""The nouns that every layer shares: conditioning, batches, chunks, and the protocols of exchangeable parts.

Letters, one meaning each: B batch, F latent frames, T pixel frames, C channels, H W height and width of what the
tensor is (latents or pixels), K text tokens, E text width. Nothing here computes with what a tensor holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What conditions a denoiser beside the latents: text, and fields with an entry for every latent frame.

    Rows of all tensors are the batch. Whoever passes it on passes it whole: what changes it are its methods.
    """

    text: Tensor
    """One text for all frames (B,K,E), or P texts (B,P,K,E); zero rows after a text's last token."""
    fields: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Name -> (B,F,...), such as cameras or actions. The network decides which names it takes."""
    prompts: tuple[int, ...] | None = None
    """With P texts: which of them each of the F frames reads."""
    cuts: tuple[bool, ...] | None = None
    """Of each frame whether a new scene begins with its chunk; None: nowhere. Some context policies use it."""
    prepared: Any = None
    """Private to the denoiser that made it: what it keeps of the text between calls."""

    def __post_init__(self) -> None:
        if (self.prompts is None) != (self.text.ndim == 3):
            raise ValueError(
                f"text must be (B,K,E), or (B,P,K,E) with the number of each frame's text in `prompts`; "
                f"got {tuple(self.text.shape)} and prompts={self.prompts}"
            )

    def __len__(self) -> int:
        return self.text.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        """Every tensor changed; what a denoiser prepared is left out."""
        fields = {name: change(value) for name, value in self.fields.items()}
        return Conditioning(change(self.text), fields, self.prompts, self.cuts)

    def __getitem__(self, rows: slice | Tensor) -> Conditioning:
        """Some rows of the batch."""
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditioning on another device."""
        return self.map(lambda tensor: tensor.to(device))

    def frames(self, start: int, stop: int) -> Conditioning:
        """That of the frames start .. stop. Frames beyond the last one read the last text; fields must reach there."""
        if not self.fields and self.prompts is None and self.cuts is None:
            return self
        for name, value in self.fields.items():
            if value.shape[1] < stop:
                raise ValueError(f"field {name!r} has {value.shape[1]} frames, the call needs {start} to {stop}")
        fields = {name: value[:, start:stop] for name, value in self.fields.items()}
        prompts = self.prompts and tuple(self.prompts[min(f, len(self.prompts) - 1)] for f in range(start, stop))
        cuts = self.cuts and tuple(f < len(self.cuts) and self.cuts[f] for f in range(start, stop))
        return replace(self, fields=fields, prompts=prompts, cuts=cuts)

    def twice(self) -> Conditioning:
        """All frames two times, one after the other: for a pass over clean frames and noisy ones."""
        fields = {name: torch.cat([value, value], dim=1) for name, value in self.fields.items()}
        return replace(self, fields=fields, prompts=self.prompts and 2 * self.prompts, cuts=self.cuts and 2 * self.cuts)

    def paired(self, negative: Conditioning) -> Conditioning:
        """[these rows; as many that read the negative's text]: for guidance. Fields stay, unless the negative has them.

        negative: one row or as many, one text.
        """

        def rows(tensor: Tensor, like: Tensor) -> Tensor:
            return torch.cat([like, tensor.to(like).expand(len(self), *like.shape[1:])])

        text = negative.text if self.prompts is None else negative.text.unsqueeze(1)
        fields = {name: rows(negative.fields.get(name, value), value) for name, value in self.fields.items()}
        return replace(self, text=rows(text, self.text), fields=fields)

    def without_text(self, rows: Tensor) -> Conditioning:
        """The text of these rows (B) bool blanked: for training that also sees no prompt."""
        keep = ~rows.view(-1, *[1] * (self.text.ndim - 1))
        return replace(self, text=self.text * keep, prepared=None)

    def changing(self, other: Conditioning, rows: Tensor, frame: int, frames: int) -> Conditioning:
        """These rows (B) bool read the other's text from `frame` of so many frames on; fields stay."""
        if self.prompts is None and other.prompts is None:
            own, new, prompts = self.text, other.text, (0,) * frame + (1,) * (frames - frame)
            later = torch.where(rows.view(-1, 1, 1), new, own)
            return replace(self, text=torch.stack([own, later], dim=1), prompts=prompts, prepared=None)
        own, new = (
            torch.stack([c.text[:, n] for n in c.prompts] if c.prompts else [c.text] * frames, dim=1)
            for c in (self, other)
        )
        later = torch.where(rows.view(-1, 1, 1, 1), new[:, frame:], own[:, frame:])
        text = torch.cat([own[:, :frame], later], dim=1)  # (B,F,K,E)
        return replace(self, text=text, prompts=tuple(range(frames)), prepared=None)

    def named(self) -> dict[str, Tensor]:
        """All of it as tensors by name, a row for each row: for files."""
        found = {"text": self.text, **{f"field.{name}": value for name, value in self.fields.items()}}
        if self.prompts is not None:
            found["prompts"] = torch.tensor(self.prompts).expand(len(self), -1)
        if self.cuts is not None:
            found["cuts"] = torch.tensor(self.cuts).expand(len(self), -1)
        return found

    @staticmethod
    def from_named(tensors: Mapping[str, Tensor]) -> Conditioning:
        """What `named` took apart; other names are left alone."""
        fields = {name.removeprefix("field."): value for name, value in tensors.items() if name.startswith("field.")}
        prompts = tuple(int(number) for number in tensors["prompts"][0]) if "prompts" in tensors else None
        cuts = tuple(bool(number) for number in tensors["cuts"][0]) if "cuts" in tensors else None
        return Conditioning(tensors["text"], fields, prompts, cuts)


@dataclass(frozen=True)
class LatentSpec:
    """The shape of one latent frame."""

    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width


@dataclass(frozen=True)
class Geometry:
    """How a codec's latents lie over pixels: F latent frames stand for first + temporal (F - 1) pixel frames."""

    channels: int
    """Latent channels."""
    spatial: int
    """Pixels along a side of one latent position."""
    temporal: int
    """Pixel frames of a latent frame."""
    first: int = 1
    """Pixel frames of a video's first latent frame."""

    def frames_of(self, latents: int) -> int:
        """Latent frames, at least 1 -> pixel frames."""
        return self.first + self.temporal * (latents - 1)

    def latents_of(self, frames: int, *, name: str = "the video") -> int:
        """Pixel frames -> latent frames; ValueError, which names the nearest, where they do not end with one."""
        latents = self.latents_in(frames)
        if latents < 1 or self.frames_of(latents) != frames:
            near = dict.fromkeys(self.frames_of(max(n, 1)) for n in (latents, latents + 1))
            raise ValueError(
                f"{name} must have {self.first} + {self.temporal} n frames, got {frames}; "
                f"nearest: {' or '.join(map(str, near))}"
            )
        return latents

    def latents_in(self, frames: int) -> int:
        """How many whole latent frames so many pixel frames hold; 0 where there are fewer than the first one's."""
        return max(1 + (frames - self.first) // self.temporal, 0)

    def size_of(self, latent: LatentSpec) -> tuple[int, int]:
        """A latent frame -> height and width of its pixels."""
        return latent.height * self.spatial, latent.width * self.spatial

    def latent_of(self, height: int, width: int, *, patch: int = 1) -> LatentSpec:
        """Sides in pixels -> the latent frame; ValueError, which names the nearest, unless `patch` positions fit."""
        unit = self.spatial * patch
        wrong = [f"{n} {side}" for n, side in (("height", height), ("width", width)) if side < unit or side % unit]
        if wrong:
            near = " x ".join(str(max(unit, round(side / unit) * unit)) for side in (height, width))
            raise ValueError(
                f"height and width must be positive multiples of {unit}, got {' and '.join(wrong)}; nearest: {near}"
            )
        return LatentSpec(self.channels, height // self.spatial, width // self.spatial)


@dataclass(frozen=True)
class Chunk:
    """Finished frames that leave a rollout together: latents (B,F,C,H,W), first of them at absolute frame `start`."""

    start: int
    latents: Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Training rows that hold their conditioning alone: prompts."""

    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.conditioning)

    def map(self: AnyBatch, change: Callable[[Tensor], Tensor]) -> AnyBatch:
        """Every tensor changed."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        changed = {n: v.map(change) if isinstance(v, Conditioning) else change(v) for n, v in values.items()}
        return replace(self, **changed)

    def __getitem__(self: AnyBatch, rows: slice) -> AnyBatch:
        """Some of the rows."""
        return self.map(lambda tensor: tensor[rows])

    def to(self: AnyBatch, device: torch.device | str) -> AnyBatch:
        return self.map(lambda tensor: tensor.to(device))


AnyBatch = TypeVar("AnyBatch", bound=Batch)


@dataclass(frozen=True, eq=False)
class ClipBatch(Batch):
    """Latents (B,...,F,C,H,W), in the type they are kept in: clips, or trajectories to them."""

    latents: Tensor

    @property
    def frames(self) -> int:
        """Latent frames of a clip."""
        return self.latents.shape[-4]

    @property
    def spec(self) -> LatentSpec:
        """The shape of a latent frame."""
        return LatentSpec(*self.latents.shape[-3:])


@dataclass(frozen=True, eq=False)
class LatentBatch(ClipBatch):
    """Clips: latents (B,F,C,H,W)."""


@dataclass(frozen=True, eq=False)
class TrajectoryBatch(ClipBatch):
    """A teacher's trajectories: latents (B,S,F,C,H,W), of which the last two are the end point and the true clip."""


@dataclass(frozen=True, eq=False)
class VideoBatch(Batch):
    """Pixels: video (B,T,3,H,W) in [-1, 1]."""

    video: Tensor


@runtime_checkable
class Denoise(Protocol):
    """x (B,F,C,H,W), sigma (B,F) or (B,1), conditioning of these frames -> velocity (B,F,C,H,W): what a rollout calls.

    `sizes` cuts the F frames into chunks: each sees itself and the chunks before it. Without a cache and without sizes
    all frames see each other. With a cache the frames start at absolute frame `start` and see the cached frames too.
    """

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        sizes: Sequence[int] | None = None,
        start: int = 0,
        cache: Cache | None = None,
    ) -> Tensor: ...


@runtime_checkable
class Denoiser(Denoise, Protocol):
    """A network as stages and pipelines use it; see `nn.denoiser.DiTDenoiser` for what each method does."""

    def new_cache(self) -> ReplayCache: ...

    def prepare(self, conditioning: Conditioning) -> Conditioning: ...

    def teacher_forced(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        clean: Tensor,
        sizes: Sequence[int],
        clean_sigma: Tensor | None = None,
    ) -> Tensor: ...

    def context_of(
        self, clean: Tensor, conditioning: Conditioning, *, sizes: Sequence[int], clean_sigma: Tensor | None = None
    ) -> ReplayCache: ...

    def behind(
        self,
        context: Cache,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        sizes: Sequence[int],
        start: int = 0,
    ) -> Tensor: ...


@runtime_checkable
class Differentiable(Denoiser, Protocol):
    """A denoiser that has a derivative in forward mode; see `nn.denoiser.DiTDenoiser`."""

    def derivative(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        along: Tensor,
        clean: Tensor,
        sizes: Sequence[int],
        clean_sigma: Tensor | None = None,
    ) -> Tensor: ...


@runtime_checkable
class Cache(Protocol):
    """Finished context. Calls read it; only `commit` writes it."""

    def commit(self, frames: int) -> None:
        """Make the first `frames` frames of the latest call permanent, then evict by policy."""
        ...


@runtime_checkable
class ReplayCache(Cache, Protocol):
    """A cache that can be read again after the rollout has gone on."""

    def copy(self) -> ReplayCache:
        """The same context, which later commits leave as it is."""
        ...


class DecodeStream(Protocol):
    """One video being decoded: feed latents (B,F,C,H,W) in order, get pixel frames (B,T,3,H,W) in [-1, 1].

    The first latent frame gives the pixel frames that the codec's geometry says, every later one `temporal`.
    """

    def __call__(self, latents: Tensor) -> Tensor: ...


@runtime_checkable
class VideoCodec(Protocol):
    """Video (B,T,3,H,W) in [-1, 1] <-> latents (B,F,C,h,w) with unit scale; T = geometry.frames_of(F)."""

    @property
    def geometry(self) -> Geometry: ...

    def encode(self, video: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...

    def stream(self) -> DecodeStream: ...


@runtime_checkable
class TextEncoder(Protocol):
    """Prompts -> text (B,K,E), zero rows after the last token; `null` is the unconditional input."""

    length: int
    width: int

    def complete(
        self,
        prompt: str,
        seed: int,
        picture: Tensor | None = None,
        *,
        before: str | None = None,
        seen: Tensor | None = None,
    ) -> str:
        """The prompt in the wording the model was trained on; encoders of free text return it unchanged.

        picture (3,H,W) in [-1,1]: what the clip begins with, if anything; ValueError if the prompt contradicts it.
        before: the completed prompt that holds until now, where this one changes a video: what it leaves open stays.
        seen (T,3,H,W) in [-1,1]: the last frames under that one, if the encoder looks at them (`families.family.Text`).
        """
        ...

    def encode(self, prompts: Sequence[str]) -> Tensor: ...

    def null(self, batch: int) -> Tensor: ...


class NoiseSource(Protocol):
    """Where a rollout's randomness comes from; see `rollout.KeyedNoise`."""

    def initial(self, start: int, frames: int) -> Tensor:
        """Pure noise (B,F,C,H,W) for new frames."""
        ...

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        """The `draw`-th further noise (B,F,C,H,W) for these frames."""
        ...


Move = Callable[[Tensor, Tensor, float, float, Callable[[], Tensor]], Tensor]
"""One move of a solver: x, velocity, sigma, sigma_next, fresh noise -> x at sigma_next."""

Solver = Callable[[], Move]
"""Makes the move for one chunk; multistep solvers keep their history in it."""
