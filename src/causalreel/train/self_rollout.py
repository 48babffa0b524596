"""The student's own rollout in training, and three ways to send a gradient back through it.

Every chunk leaves at its exit step; only that call carries gradient, and past chunks are constants (the released code
lets gradient leak into them through its cache). The rollout itself therefore needs no gradient: it is recorded, the
loss is taken on what it generated, and the exit calls are evaluated once more with gradient.

- `parallel_pass`: all exit calls in one pass, each behind its part of the recorded context. Fastest; activations of the
  whole clip. The default.
- `replay_passes`: one exit call after the other behind the recorded cache. Activations of one chunk: for models whose
  clip does not fit.
- the full graph (rollout with gradient enabled): the definition that both are tested against.

A rollout may be longer than what is scored: only exit calls from the frame `first` on are kept then. A rolling one
(`rolling_training_plan`) runs whole; one window in as many as there are levels carries gradient, so that every chunk is
in one of these, and what it is there is what is scored.
Self Forcing (arXiv 2506.08009), algorithm 1; Causal-rCM for replayed back-propagation; Rolling Forcing (arXiv
2509.25161) for rolling rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from causalreel.flow import velocity_to_x0
from causalreel.rollout import Call, Plan, chunked, collect, rolling, rollout, truncate
from causalreel.types import Conditioning, Denoise, Denoiser, NoiseSource, ReplayCache, VideoCodec


@dataclass(frozen=True)
class Exit:
    """A call that carries gradient."""

    start: int
    x: Tensor
    """What went in (B,f,C,H,W)."""
    sigmas: tuple[float, ...]
    """Noise level of each of its frames."""
    sizes: tuple[int, ...]
    """Its chunks, as attention sees them."""
    cache: ReplayCache | None
    """The context that it read; kept only where asked for."""

    def sigma(self) -> Tensor:
        """(B,f)."""
        return torch.tensor(self.sigmas, device=self.x.device).expand(self.x.shape[0], -1)


@dataclass(frozen=True)
class Piece:
    """Some frames of a rollout that can be made again."""

    start: int
    """The first of them, counted from the rollout's first frame."""
    frames: int
    make: Callable[[], Tensor]
    """-> them (B,frames,C,H,W), with gradient to the student."""

    def __call__(self) -> Tensor:
        return self.make()


@dataclass
class Record:
    """What a training rollout left: enough to evaluate its exit calls again."""

    first: int = 0
    """Frame from which on exit calls are kept."""
    given: Tensor | None = None
    """Clean leading frames (B,P,C,H,W) that were not generated; part of `latents` and of `committed`."""
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    """What was generated (B,F,C,H,W), all of it."""
    exits: list[Exit] = field(default_factory=list)
    committed: list[Tensor] = field(default_factory=list)
    """Latents as they were written to the cache; equal to what was generated where their level is 0."""
    committed_at: list[float] = field(default_factory=list)
    """Noise level of each of their frames."""
    sizes: list[int] = field(default_factory=list)
    """Of all chunks."""


def training_plan(
    sizes: Sequence[int],
    sigmas: Sequence[float] | Sequence[Sequence[float]],
    exits: Sequence[int],
    *,
    first: Sequence[float] | None = None,
    prefix: Sequence[int] = (),
    context_sigma: float = 0.0,
    noisy_from: int | None = None,
    commit_last: bool = False,
) -> Plan:
    """The inference plan cut off at the exit steps; `exits[0]` is the first chunk's, the last entry everyone else's."""
    how = {"context_sigma": context_sigma, "noisy_from": noisy_from, "commit_last": commit_last}
    plan = chunked(sizes, sigmas, first=first, prefix=prefix, **how)
    return truncate(plan, exits)


def rolling_training_plan(
    sizes: Sequence[int], sigmas: Sequence[float], turn: int, *, context_sigma: float = 0.0
) -> Plan:
    """The rolling plan, in which windows number `turn`, `turn` + levels, ... carry gradient. The released code for long
    videos draws `turn` once a rollout."""
    window = 0
    for call in rolling(sizes, sigmas, context_sigma=context_sigma):
        if call.joint:
            call = replace(call, grad=window % len(sigmas) == turn)
            window += 1
        yield call


def record_rollout(
    student: Denoise,
    plan: Plan,
    *,
    told: Conditioning,
    noise: NoiseSource,
    cache: ReplayCache,
    keep_caches: bool = False,
    first: int = 0,
    given: Tensor | None = None,
) -> Record:
    """Run a training plan without gradient and remember its exit calls; `told` is the clip's conditioning.

    first: the frame, at the beginning of a chunk, from which on they are remembered. given: clean frames (B,P,C,H,W)
    with which the plan begins, each as a chunk.
    """
    record = Record(first, given)
    record.sizes = [] if given is None else [1] * given.shape[1]
    estimates: dict[int, Tensor] = {}

    def observe(call: Call, x: Tensor, velocity: Tensor) -> None:
        if call.grad:
            levels = tuple(part.sigma for part in call.parts for _ in range(part.frames))
            kept = cache.copy() if keep_caches and call.start + call.frames > first else None
            made = Exit(call.start, x, levels, call.sizes, kept)
            if call.joint:
                x0 = velocity_to_x0(x, velocity, made.sigma())
                estimates.update(zip(range(call.start, call.start + call.frames), x0.split(1, 1), strict=True))
            else:
                record.sizes.append(call.frames)
            if call.start + call.frames > first:
                record.exits.append(made)
        if call.commit and not call.joint:
            record.committed.append(x[:, : call.commit])
            record.committed_at += [call.parts[0].sigma] * call.commit

    with torch.no_grad():
        how = {"conditioning": told, "noise": noise, "cache": cache, "prefix": given, "observe": observe}
        chunks = list(rollout(student, plan, **how))
    if estimates:
        record.sizes = [chunk.latents.shape[1] for chunk in chunks]
        record.latents = torch.cat([estimates[frame] for frame in range(sum(record.sizes))], dim=1)
    else:
        record.latents = torch.cat([*([] if given is None else [given.float()]), collect(chunks)], dim=1)
    return record


@torch.no_grad()
def as_clip(codec: VideoCodec, latents: Tensor, begin: int) -> Tensor:
    """latents (B,n,C,H,W) of a rollout -> those from frame `begin` on as a clip of its own (B,n-begin,C,H,W).

    A clip's first latent frame stands for one picture and the others for several, so it is the last picture of what
    `begin` and all before it decode to, encoded again. As in the released code for long videos.
    """
    if begin == 0:
        return latents
    decode, shown = codec.stream(), latents
    for frame in range(begin + 1):
        shown = decode(latents[:, frame : frame + 1])
    return torch.cat([codec.encode(shown[:, -1:]).to(latents), latents[:, begin + 1 :]], dim=1)


def parallel_pass(student: Denoiser, record: Record, conditioning: Conditioning) -> Tensor:
    """-> the generated latents from `record.first` on (B,F,C,H,W) again, with gradient to the student, in one pass.

    Given frames lead: they go through it at noise level 0, where the clean estimate is the frame itself.
    """
    if any(one.x.shape[1] > max(record.sizes) for one in record.exits):
        raise ValueError("a rolling rollout cannot be made again in one pass: replay it")
    exits = [*_given(record), *record.exits]
    x, sigma = torch.cat([one.x for one in exits], 1), torch.cat([one.sigma() for one in exits], 1)
    # The last chunk's context is read by nobody: any latents will do where it was not committed.
    past = torch.cat([record.latents[:, :0], *record.committed], dim=1)
    clean = torch.cat([past, record.latents[:, past.shape[1] :]], dim=1)
    levels = record.committed_at + [0.0] * (clean.shape[1] - past.shape[1])
    clean_sigma = torch.tensor(levels, device=clean.device).expand(len(clean), -1)
    context = student.context_of(clean, conditioning, sizes=record.sizes, clean_sigma=clean_sigma)
    start, sizes = exits[0].start, [one.sizes[0] for one in exits]
    here = conditioning.frames(start, clean.shape[1])
    velocity = student.behind(context, x, sigma, here, sizes=sizes, start=start)
    return velocity_to_x0(x, velocity, sigma)


def _given(record: Record) -> list[Exit]:
    """Given frames as calls that make nothing."""
    frames = [] if record.given is None else record.given.float().split(1, dim=1)
    return [Exit(start, x, (0.0,), (1,), None) for start, x in enumerate(frames)]


def replay_passes(student: Denoiser, record: Record, conditioning: Conditioning) -> list[Piece]:
    """-> a piece per exit call, each giving what it made (B,k,C,H,W) again, from `record.first` on."""
    if any(one.cache is None for one in record.exits):
        raise ValueError("replay needs a rollout recorded with keep_caches=True")

    def one(call: Exit, begin: int) -> Tensor:
        assert call.cache is not None
        frames = conditioning.frames(call.start, call.start + call.x.shape[1])
        velocity = student(call.x, call.sigma(), frames, sizes=call.sizes, start=call.start, cache=call.cache.copy())
        return velocity_to_x0(call.x, velocity, call.sigma())[:, begin - call.start :]

    found = []
    for call in record.exits:
        begin = max(call.start, record.first)
        frames = call.start + call.x.shape[1] - begin
        found.append(Piece(begin, frames, lambda call=call, begin=begin: one(call, begin)))
    return found
