"""An endless rollout whose prompt, steps and beginning can change between chunks.

It is made of *segments*: rollouts of finite length, each beginning with the last latents of the one before it, read
again at positions 0.. (prefix commits of the plan, which join its first denoising call). So positions stay in a known
range, and memory and the time of a chunk stay flat for ever. Noise is keyed by (seed, frame of the stream): what is
shown is a function of the seed and of what changed before which chunk, not of time.

Pixels, threads and sessions are not its business: see `serve.session`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from causalreel import families
from causalreel.infer.commands import MODES, Mode
from causalreel.infer.manner import beyond
from causalreel.infer.models import encoder_of
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.restyle import Over
from causalreel.infer.schedule import Schedule
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.window import Context
from causalreel.rollout import Call, KeyedNoise
from causalreel.types import Chunk, Conditioning, NoiseSource
from causalreel.weights.export import Export, Sampling

PolicyKind = Literal["renew", "slide"]

KEPT: dict[PolicyKind, int] = {"renew": 4, "slide": 2}
"""A new segment keeps the trained length divided by this. For renew a quarter held and followed prompts best, as
measured (`benchmarks/live_quality.py`, table in docs/live.md); so it is for slide where positions never grow and a new
segment means another prompt or weights; elsewhere half is a guess between speed and memory."""

FORGOTTEN_TO = 2
"""Latent frames that `forget` keeps, in whole chunks. With one, more videos show one of two objects twice; with all, as
`switch` has them, things turn less where they are told (docs/log.md)."""

POSITIONS = 1024
"""Positions of frames that sliding may reach before it begins again at 0: as many as the released code has tables."""


ENDLESS = 1 << 40
"""Length of a segment whose positions do not grow: longer than anybody looks."""


@dataclass(frozen=True)
class Policy:
    """How an endless stream is cut into segments; lengths in latent frames, multiples of the chunk.

    renew: a segment ends at the length of a training clip, so that no position is larger than in training.
    slide: a window of a training clip's length moves on at absolute positions, as in the released code; or for ever,
    where the context policy re-indexes positions.
    """

    kind: PolicyKind
    length: int
    """Of a segment, what it keeps of the one before it included."""
    keep: int
    """Frames that a new segment reads again: at the end of a segment and when a prompt is recomputed."""
    context: ContextPolicy = Context()

    @staticmethod
    def of(export: Export, sampling: Sampling, kind: PolicyKind | None = None, keep: int | None = None) -> Policy:
        """The policy for a model: its family's kind and that kind's share of a training clip kept, unless given."""
        chunk = sampling.chunk
        if chunk is None:
            raise ValueError(f"a live stream needs an autoregressive model; {export.name} generates whole clips")
        if kind is None:
            kind = families.of(export).policy
        if kind not in get_args(PolicyKind):
            raise ValueError(f"policy must be one of {', '.join(get_args(PolicyKind))}, got {kind!r}")
        trained = export.frames // chunk * chunk
        if trained < 2 * chunk:
            raise ValueError(f"chunk must be at most {export.frames // 2} for a live stream, got {chunk}")
        context = export.context
        if kind == "slide":
            context = beyond(export, sampling) or context.bounded(trained)
        if keep is None:
            share = KEPT["renew" if context.is_endless else kind]
            keep = max(trained // share // chunk * chunk, chunk)
        if not chunk <= keep <= trained - chunk or keep % chunk:
            raise ValueError(f"keep must be a multiple of {chunk}, from {chunk} to {trained - chunk}; got {keep}")
        if kind == "renew":
            return Policy(kind, trained, keep, context)
        length = ENDLESS if context.is_endless else POSITIONS
        return Policy(kind, max(length, trained) // chunk * chunk, keep, context)


class Live:
    """One endless stream of latents. `next_chunk` makes the next chunk; everything else takes effect with it.

    text (1,K,E): as `encode_prompt` returns it; with more rows, and a seed for each, streams that are made together and
    told the same at the same time. first: clean latents (1,P,C,H,W) that the stream begins behind, such as
    an encoded picture; P is a multiple of the chunk. They count as frames and are not returned. fields: theirs, name ->
    (1,P,...), for a network that takes some; `next_chunk` then takes those of the frames it makes. relative: of them
    the one with poses (4,4), w2c, which every segment sees from its own first frame, as clips do in training: numbers
    stay small however far a camera goes. over: what the noise of chunks is laid over, see `infer.restyle`; strength:
    the noise level at which they then begin.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        text: Tensor,
        *,
        seed: int | Sequence[int] = 0,
        sampling: Sampling | None = None,
        policy: Policy | None = None,
        first: Tensor | None = None,
        fields: Mapping[str, Tensor] | None = None,
        relative: str | None = None,
        over: Callable[[int], Tensor] | None = None,
        strength: float | None = None,
    ) -> None:
        self.pipeline, self._relative = pipeline, relative
        self.sampling = pipeline.sampling if sampling is None else sampling
        self.policy = Policy.of(pipeline.export, self.sampling) if policy is None else policy
        chunk = self.sampling.chunk
        assert chunk is not None  # Policy.of has refused
        if first is not None and first.shape[1] % chunk:
            raise ValueError(
                f"the first frames must be a multiple of the chunk's {chunk} latent frames, got {first.shape[1]}; "
                f"a frame-wise model (chunk 1) takes any picture"
            )
        self._chunk = chunk
        self._forgotten_to = math.ceil(FORGOTTEN_TO / chunk) * chunk
        self._begins_again = families.of(pipeline.export).begins_again
        self.frame = 0 if first is None else first.shape[1]
        """Latent frames of the stream so far."""
        self.segments = 0
        """Segments begun so far."""
        self._strengths: dict[str, float] = {}
        """Of LoRAs, waiting for the next chunk."""
        self._version = 0 if pipeline.loras is None else pipeline.loras.version
        seeds = [seed] if isinstance(seed, int) else seed
        self._noise: NoiseSource = KeyedNoise(seeds, pipeline.export.latent, pipeline.device)
        self._strength = strength
        if over is not None and strength is not None:
            self._noise = Over(self._noise, over, strength)
        self._conditioning = self._prepare(Conditioning(text.to(pipeline.device), fields or {}))
        """The text in force, and the fields of the last frames."""
        self._spans = [(0, self._conditioning)]
        """The texts of the last frames: each with the frame of the stream from which it is read."""
        self._fade: _Fade | None = None
        self._renewal: Mode | None = None
        """How a prompt that waits for the next chunk has a segment begin; None: it goes on."""
        self._kept = None if first is None else first[:, -self.policy.keep :]  # (1,<=keep,C,H,W)
        self._latest = None if first is None or not self._begins_again else first[:, -self._forgotten_to - 1 :]
        """The last latents, one more than `forget` keeps, where it encodes them again."""
        self._is_first = True
        self._base = 0
        self._segment: Iterator[Chunk] | None = None
        self._begun_with: Sampling | None = None
        self._origin: Tensor | None = None
        """c2w (1,1,4,4) of the segment's first frame."""

    def tell(self, text: Tensor, *, mode: Mode = "recompute", chunks: int = 4, past: Tensor | None = None) -> None:
        """Another prompt from the next chunk on. past, as text: what the latest frames are told in place of their own
        where they are read again; none for a fade.

        switch: new frames read the new text; those of the past stay as they were read under the old one, and read that
        again where a new segment begins with them.
        recompute: the last `policy.keep` frames are read again under the new text, in a new segment.
        forget: a new segment begins behind the last two latent frames, or the last chunk if that has more; they keep
        their own text. Little is left that says how things moved. In families of which `begins_again` says so, they
        are the latents of a clip that begins with their frames: the first of them is a picture, as in training.
        fade: as switch, but the text moves from the old to the new embedding in `chunks` equal moves, the last of which
        is the new text.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if chunks < 1:
            raise ValueError(f"chunks must be at least 1, got {chunks}")
        text = text.to(self.pipeline.device)
        if mode == "fade":
            self._fade = _Fade(self._conditioning.text, text, chunks)
            return
        self._fade = None
        self._say(text)
        if past is not None and len(self._spans) > 1:
            told = replace(self._conditioning, text=past.to(self.pipeline.device))
            self._spans[-2] = self._spans[-2][0], self._prepare(told)
        if mode != "switch":
            self._renewal, self._segment = mode, None

    def resample(self, sampling: Sampling) -> None:
        """Other steps from the next chunk on, in a new segment if they are others; the chunk must stay what it is."""
        if sampling.chunk != self.sampling.chunk:
            raise ValueError(f"chunk cannot change in a stream: it is {self.sampling.chunk}, got {sampling.chunk}")
        if sampling != self.sampling:
            self.sampling = sampling
            self._prepare_again()

    def set_strength(self, strength: float) -> None:
        """Another noise level at which chunks begin that are laid over a given video, in a new segment."""
        assert isinstance(self._noise, Over)
        if strength != self._strength:
            self._strength = self._noise.strength = strength
            self._segment = None

    def set_loras(self, strengths: Mapping[str, float]) -> None:
        """Other strengths of the pipeline's LoRAs, by name, from the next chunk on, in a new segment.

        What was read with the old weights is read again with the new ones, as after `tell` with recompute. The weights
        are the pipeline's: other streams of it change too, each in a new segment from its next chunk on. ValueError,
        and nothing changes, for what cannot be set.
        """
        loras = self.pipeline.loras
        if loras is None:
            raise ValueError(f"{self.pipeline.export.name} was loaded without a LoRA, so that none can be set")
        loras.check(self._strengths | dict(strengths))
        self._strengths |= strengths

    def next_chunk(self, fields: Mapping[str, Tensor] | None = None) -> Chunk:
        """The next latents (1,F,C,H,W) float32, at their frame of the stream; fields: theirs, name -> (1,F,...)."""
        self._extend(fields or {})
        self._renew()
        self._take_weights()
        if self._fade is not None:
            self._say(self._fade.move())
            self._fade = None if self._fade.is_over else self._fade
        if self._begun_with != self.sampling:
            self._segment = None
        made = None if self._segment is None else next(self._segment, None)
        if made is None:
            self._begin()
            assert self._segment is not None
            made = next(self._segment)
        kept = made.latents if self._kept is None else torch.cat([self._kept, made.latents], dim=1)
        self._kept, self._is_first = kept[:, -self.policy.keep :], False
        if self._begins_again:
            latest = made.latents if self._latest is None else torch.cat([self._latest, made.latents], dim=1)
            self._latest = latest[:, -self._forgotten_to - 1 :]
        self.frame = self._base + made.start + made.latents.shape[1]
        return Chunk(self._base + made.start, made.latents)

    def close(self) -> None:
        """Let go of the cache and of what is kept."""
        self._segment = self._kept = self._latest = None

    def _renew(self) -> None:
        """What the segment to come is to see, as the last prompt that began one said: others that were told before the
        same chunk leave nothing behind, so that a record need not hold them."""
        if self._renewal == "recompute":
            self._spans = self._spans[-1:]
        if self._renewal == "forget" and self._kept is not None:
            self._kept = self._kept[:, -self._forgotten_to :]
            if self._latest is not None and self._latest.shape[1] > self._forgotten_to:
                frames = self.pipeline.geometry.frames_of(self._forgotten_to)
                self._kept = self.pipeline.codec.encode(self.pipeline.codec.decode(self._latest)[:, -frames:])
        self._renewal = None

    def _begin(self) -> None:
        self._segment = None  # first of all: its cache's memory is the new one's
        prefix = 0 if self._kept is None else self._kept.shape[1]
        sampling = self.sampling
        if not self._is_first:
            sampling = replace(sampling, first_steps=None, levels=sampling.levels[-1:])
        plan = Schedule(self.policy.length, prefix, sampling, self.policy.context, self._strength)
        self._base = self.frame - prefix
        if self._relative is not None:
            poses = self._conditioning.fields[self._relative]
            self._origin = torch.linalg.inv_ex(poses[:, self._place(self._base)][:, None].double())[0]
        self._segment = self.pipeline.rollout(
            plan,
            self._conditioning_of,
            _Shifted(self._noise, self._base),
            batch=len(self._conditioning),
            prefix=self._kept,
        )
        self._begun_with = self.sampling
        self.segments += 1

    def _take_weights(self) -> None:
        """Merge the strengths that wait; begin anew if the weights are others than those of the chunk before."""
        loras = self.pipeline.loras
        if loras is None:
            return
        if self._strengths:
            waiting, self._strengths = self._strengths, {}
            self._segment = None  # its cache is of no more use, and merging needs room
            loras.set(waiting)
        if loras.version != self._version:
            self._version = loras.version
            self._segment = None
            self._prepare_again()

    def _say(self, text: Tensor) -> None:
        """Another text for the frames to come."""
        self._conditioning = self._prepare(replace(self._conditioning, text=text))
        self._spans = [span for span in self._spans if span[0] < self.frame]  # what nobody has read goes
        self._spans.append((self.frame, self._conditioning))
        oldest = self.frame - self.policy.keep - self._chunk  # before it nothing is read again
        while len(self._spans) > 1 and self._spans[1][0] <= oldest:
            del self._spans[0]

    def _prepare_again(self) -> None:
        """What is kept of the texts is of no more use."""
        self._spans = [(at, self._prepare(told)) for at, told in self._spans]
        self._conditioning = self._prepare(self._conditioning)

    def _prepare(self, conditioning: Conditioning) -> Conditioning:
        return self.pipeline.denoiser_for(self.sampling).prepare(conditioning)

    def _extend(self, fields: Mapping[str, Tensor]) -> None:
        """Add the fields of the frames to be made; those that no call can read any more are let go of."""
        chunk, old = self._chunk, self._conditioning.fields
        if (self.frame and fields.keys() != old.keys()) or any(new.shape[:2] != (1, chunk) for new in fields.values()):
            shapes = {name: tuple(new.shape) for name, new in fields.items()}
            raise ValueError(
                f"fields must be {', '.join(old) or 'as for the first chunk'}, (1,{chunk},...) each; got {shapes}"
            )
        new = {name: value.to(self.pipeline.device) for name, value in fields.items()}
        whole = {name: torch.cat([old[name], new[name]], dim=1) if name in old else new[name] for name in new}
        room = self.policy.keep + chunk  # what a new segment reads again, and what it makes
        fields = {name: value[:, -room:] for name, value in whole.items()}
        self._conditioning = replace(self._conditioning, fields=fields)

    def _conditioning_of(self, call: Call) -> Conditioning:
        """The conditioning of a call's frames: the fields that are kept end with the chunk that is being made."""
        first = self._place(self._base + call.start)
        told = self._by_frame(
            self._conditioning.frames(first, first + call.frames), self._base + call.start, call.frames
        )
        if self._relative is None or self._origin is None:
            return told
        poses = (told.fields[self._relative].double() @ self._origin).float()
        return replace(told, fields={**told.fields, self._relative: poses})

    def _by_frame(self, told: Conditioning, first: int, frames: int) -> Conditioning:
        """The conditioning of a call's frames, from `first` of the stream on, each with the text that it was told."""
        starts = [at for at, _ in self._spans]
        numbers = [max(sum(at <= first + f for at in starts) - 1, 0) for f in range(frames)]
        if numbers[0] == len(starts) - 1:
            return told
        used = self._spans[numbers[0] : numbers[-1] + 1]
        text = torch.stack([one.text for _, one in used], dim=1)  # (B,P,K,E)
        prepared = [kept for _, one in used for kept in one.prepared]
        return replace(told, text=text, prompts=tuple(n - numbers[0] for n in numbers), prepared=prepared)

    def _place(self, frame: int) -> int:
        """Where a frame of the stream lies among the fields that are kept."""
        count = next((value.shape[1] for value in self._conditioning.fields.values()), 0)
        return frame - (self.frame + self._chunk - count)


class _Fade:
    """From one text embedding (1,K,E) to another in equal moves."""

    def __init__(self, old: Tensor, new: Tensor, moves: int) -> None:
        self.old, self.new, self.moves, self.done = old, new, moves, 0

    @property
    def is_over(self) -> bool:
        return self.done >= self.moves

    def move(self) -> Tensor:
        self.done += 1
        return self.new if self.is_over else torch.lerp(self.old, self.new, self.done / self.moves)


class _Shifted:
    """Noise of a segment: that of the stream, from frame `base` on."""

    def __init__(self, noise: NoiseSource, base: int) -> None:
        self.noise, self.base = noise, base

    def initial(self, start: int, frames: int) -> Tensor:
        return self.noise.initial(self.base + start, frames)

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        return self.noise.renoise(self.base + start, frames, draw)


def understand(export: Export, prompts: Sequence[str], picture: Tensor | None = None) -> None:
    """ValueError for a prompt that `encode_prompt` would refuse, known without the model; picture: as there."""
    encoder = encoder_of(export)
    if encoder is not None:
        for prompt in prompts:
            encoder.encode([encoder.complete(prompt, 0, picture)])


def hints(export: Export) -> dict[str, Any]:
    """examples: prompts to begin with; words: what a prompt may say, None if anything; synonyms: other spellings;
    mode: how another prompt is taken; changes: whether it changes a video that plays."""
    text = families.of(export).text
    words = None if text.words is None else {slot: list(words) for slot, words in text.words.items()}
    told = {"examples": list(text.examples), "words": words, "synonyms": dict(text.synonyms)}
    return told | {"mode": text.mode, "changes": text.changes}


def first_prompt(export: Export) -> str:
    """What a model shows where nobody says: the first example of its family; ValueError where there is none."""
    examples = families.of(export).text.examples
    if not examples:
        raise ValueError(f"prompt: say what to show; {export.name or 'the model'} has no example of its own")
    return examples[0]


def encode_prompt(pipeline: Pipeline, prompt: str, seed: int = 0, picture: Tensor | None = None) -> Tensor:
    """-> text (1,K,E) where the encoder makes it; what the prompt leaves open is drawn by the seed, as in a clip.

    picture (3,H,W): what the stream begins with, if the prompt is the first; see `types.TextEncoder.complete`.

    `Live` moves it to the pipeline's device, so that a thread that only encodes leaves that device alone.
    """
    with torch.no_grad():
        return pipeline.text.encode([pipeline.text.complete(prompt, seed, picture)])


@torch.no_grad()
def seen_in(pipeline: Pipeline, latents: Tensor) -> Tensor | None:
    """The latest latents (B,F,C,h,w) of streams -> frames (B,T,3,H,W) that the encoder is shown when a prompt changes
    them (`TextEncoder.complete`); None: it looks at none, or these are too few."""
    looks = families.of(pipeline.export).text.looks
    if not looks or latents.shape[1] < looks:
        return None
    return pipeline.codec.decode(latents[:, -looks:])
