"""The only autoregressive loop in the project, and the plans that drive it.

A rollout is a list of denoiser calls. A `Call` names the frames going in, their noise levels before and after, how many
leading frames become context, and whether it carries gradient. A plan is an iterator of calls and may be endless.
Whoever needs another schedule writes a plan, never another loop.
Causal Forcing (arXiv 2602.02214), section 2; Self Forcing (arXiv 2506.08009), algorithm 1 for the training rollout.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor

from causalreel.flow import add_noise
from causalreel.solvers import renoise
from causalreel.types import Cache, Chunk, Conditioning, Denoise, LatentSpec, Move, NoiseSource, Solver


@dataclass(frozen=True)
class Part:
    """Frames `start` .. `start + frames` that move together, from `sigma` to `sigma_next`.

    `sigma_next` None: the frames are finished and only read again, noised to `sigma` (the context sigma), so that their
    keys and values can be committed.
    """

    start: int
    frames: int
    sigma: float
    sigma_next: float | None

    @property
    def end(self) -> int:
        return self.start + self.frames


@dataclass(frozen=True)
class Call:
    """One denoiser evaluation over neighbouring parts.

    commit: so many leading frames become context after the call. joint: all parts see each other (a rolling window);
    otherwise each sees itself and the parts before it. grad: the call carries gradient, if gradient is enabled at all.
    """

    parts: tuple[Part, ...]
    commit: int = 0
    joint: bool = False
    grad: bool = False

    @property
    def start(self) -> int:
        return self.parts[0].start

    @property
    def frames(self) -> int:
        return sum(part.frames for part in self.parts)

    @property
    def only_commits(self) -> bool:
        """Nothing in it is denoised."""
        return self.commit == self.frames and all(part.sigma_next is None for part in self.parts)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The chunks that attention sees."""
        return (self.frames,) if self.joint else tuple(part.frames for part in self.parts)


Plan = Iterable[Call]


# ---- plans ----------------------------------------------------------------------------------------------------------


def chunk_sizes(frames: int, chunk: int) -> list[int]:
    """frames latent frames in chunks of `chunk`; ValueError unless the one divides the other."""
    if chunk < 1 or frames < 1 or frames % chunk:
        below = max(frames // max(chunk, 1), 1) * max(chunk, 1)
        raise ValueError(
            f"frames must be a positive multiple of the chunk size {chunk}, got {frames} "
            f"(nearest: {below} or {below + chunk})"
        )
    return [chunk] * (frames // chunk)


def chunked(
    sizes: Iterable[int],
    sigmas: Sequence[float] | Sequence[Sequence[float]],
    *,
    first: Sequence[float] | None = None,
    prefix: Sequence[int] = (),
    context_sigma: float = 0.0,
    noisy_from: int | None = None,
    commit_last: bool = False,
) -> Iterator[Call]:
    """Chunk after chunk: denoise at each of `sigmas` (falling, without the final 0), then commit.

    sizes: frames of each new chunk, possibly endless. sigmas: one list for all chunks, or one for the first generated
    chunk, the second ... of which the last counts for all further ones. first: noise levels of the first generated
    chunk, if others (Causal Forcing++, 1- and 2-step models). prefix: sizes of given chunks, committed before anything
    is generated. context_sigma: noise level at which finished frames are written.
    noisy_from: chunks from this number on, given ones counted, are written as their last denoising call read them: a
    call less for each (noisy context, Causal-rCM, arXiv 2606.25473); given ones are noised to the first list's last
    level. commit_last: also commit the last chunk, whose context nobody reads in a finite rollout.
    """
    lists, start, number = _lists(sigmas, first), 0, 0
    noisy = sys.maxsize if noisy_from is None else noisy_from
    for size in prefix:
        yield _commit(start, size, lists[0][-1] if number >= noisy else context_sigma)
        start, number = start + size, number + 1
    pending = None
    for index, size in enumerate(sizes):
        if pending is not None:
            yield pending
        is_noisy = number + index >= noisy
        for sigma, sigma_next in pairwise((*lists[min(index, len(lists) - 1)], 0.0)):
            yield Call((Part(start, size, sigma, sigma_next),), commit=size if is_noisy and sigma_next == 0 else 0)
        pending = None if is_noisy else _commit(start, size, context_sigma)
        start += size
    if commit_last and pending is not None:
        yield pending


def _lists(sigmas: Sequence[float] | Sequence[Sequence[float]], first: Sequence[float] | None) -> list[Sequence[float]]:
    """Noise levels of the first chunk, the second ..., the last list for all further ones."""
    is_one = isinstance(sigmas[0], float | int)
    lists = [cast("Sequence[float]", sigmas)] if is_one else list(cast("Sequence[Sequence[float]]", sigmas))
    return lists if first is None else [first, *lists]


def rolling(
    sizes: Iterable[int],
    sigmas: Sequence[float],
    *,
    prefix: Sequence[int] = (),
    context_sigma: float = 0.0,
    commit_last: bool = False,
) -> Iterator[Call]:
    """A window of as many chunks as there are noise levels, the oldest at the lowest, all denoised together by a step.

    After each call the oldest chunk, if it is finished, is read again and committed, and a new one of pure noise
    enters. Arguments as for `chunked`. Rolling Forcing (arXiv 2509.25161); the released code evaluates the first chunk
    for the cache after every call, unfinished as it is, and writes over that: here it is evaluated once.
    """
    start = 0
    for size in prefix:
        yield _commit(start, size, context_sigma)
        start += size
    waiting, window, steps = iter(sizes), list[tuple[int, int, int]](), (*sigmas, 0.0)
    entering = next(waiting, None)
    while window or entering is not None:
        if entering is not None:
            window.append((start, entering, 0))
            start += entering
            entering = next(waiting, None)
        yield Call(tuple(Part(at, size, steps[step], steps[step + 1]) for at, size, step in window), joint=True)
        window = [(at, size, step + 1) for at, size, step in window]
        at, size, step = window[0]
        if step == len(sigmas):
            del window[0]
            if window or entering is not None or commit_last:
                yield _commit(at, size, context_sigma)


def _commit(start: int, size: int, context_sigma: float) -> Call:
    return Call((Part(start, size, context_sigma, None),), commit=size)


def fuse(plan: Plan) -> Iterator[Call]:
    """The same latents in fewer calls: a commit joins the first denoising call of the next chunk.

    Both chunks go through the network together, each at its own sigma; the later one sees the earlier one's keys in
    the call instead of in the cache.
    """
    held: Call | None = None
    for call in plan:
        fits = held is not None and not call.joint and not call.grad and call.start == held.start + held.frames
        if held is not None and fits and (call.only_commits or not call.commit):
            call = Call(held.parts + call.parts, commit=held.commit + call.commit)
            held = None
        if held is not None:
            yield held
            held = None
        if call.only_commits and not call.grad:
            held = call
        else:
            yield call
    if held is not None:
        yield held


def truncate(plan: Plan, exits: Sequence[int]) -> Iterator[Call]:
    """The training rollout: chunk i leaves after step `exits[i]` (0-based) with its clean estimate and gradient.

    The last entry of `exits` counts for all further chunks. Self Forcing (arXiv 2506.08009), algorithm 1: the exit
    step is drawn by the caller. Plain plans only, one part a call. A chunk whose context is what its last call read
    (noisy context) and that leaves earlier is noised to the level of that call instead, as in Causal-rCM.
    """
    step: dict[int, int] = {}
    order: dict[int, int] = {}
    pending: Call | None = None  # what the last chunk would leave, nobody reads
    for call in plan:
        if pending is not None:
            yield pending
            pending = None
        (part,) = call.parts
        if part.sigma_next is None:
            yield call
            continue
        chunk = order.setdefault(part.start, len(order))
        now = step.get(part.start, 0)
        step[part.start] = now + 1
        exit_step = exits[min(chunk, len(exits) - 1)]
        if now < exit_step and part.sigma_next > 0:
            yield call
        elif now <= exit_step:
            yield replace(call, parts=(replace(part, sigma_next=0.0),), grad=True)
        elif call.commit:
            pending = _commit(part.start, part.frames, part.sigma)


# ---- noise ----------------------------------------------------------------------------------------------------------


class KeyedNoise:
    """Noise drawn frame by frame from (seed, frame, draw), on the CPU: one seed per sample.

    A sample depends on its seed alone: not on the batch, the chunk size, the plan (fused or not) or the device.
    """

    def __init__(self, seeds: Sequence[int], spec: LatentSpec, device: torch.device | str = "cpu") -> None:
        self.seeds, self.spec, self.device = list(seeds), spec, device

    def initial(self, start: int, frames: int) -> Tensor:
        return self.renoise(start, frames, 0)

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        rows = [torch.stack([self._frame(seed, start + f, draw) for f in range(frames)]) for seed in self.seeds]
        drawn = torch.stack(rows)  # (B,F,C,H,W)
        if torch.device(self.device).type == "cuda":  # pinned, so that the host does not wait for the GPU here
            return drawn.pin_memory().to(self.device, non_blocking=True)
        return drawn.to(self.device)

    def _frame(self, seed: int, frame: int, draw: int) -> Tensor:
        generator = torch.Generator().manual_seed(((seed * 0x9E3779B1 + frame) * 0x85EBCA77 + draw) % (1 << 63))
        return torch.randn(self.spec.shape, generator=generator)


class StreamNoise:
    """Noise from one generator in the order of use: fast, for training rollouts."""

    def __init__(self, batch: int, spec: LatentSpec, generator: torch.Generator) -> None:
        self.batch, self.spec, self.generator = batch, spec, generator

    def initial(self, start: int, frames: int) -> Tensor:
        size = (self.batch, frames, *self.spec.shape)
        return torch.randn(size, generator=self.generator, device=self.generator.device)

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        return self.initial(start, frames)


# ---- the loop -------------------------------------------------------------------------------------------------------


def rollout(
    denoise: Denoise,
    plan: Plan,
    *,
    conditioning: Conditioning | Callable[[Call], Conditioning],
    noise: NoiseSource,
    solver: Solver = renoise,
    cache: Cache | None = None,
    prefix: Tensor | None = None,
    exact: bool = False,
    observe: Callable[[Call, Tensor, Tensor], None] | None = None,
) -> Iterator[Chunk]:
    """Run a plan; yield each chunk (B,F,C,H,W), float32, when it is finished.

    conditioning: of the clip, of which every call gets the frames that go in; or a function that is asked for those of
    a call before each one, so that a live session can change it between chunks.
    prefix: clean latents (B,P,C,H,W) of the frames that the plan commits before it generates; they are not yielded.
    exact: what a chunk is between its calls, and the noise levels, are float64, as in Causal-rCM's sampler.
    observe: called with (call, input x (B,F,C,H,W), velocity) after each denoiser call: logs, trajectories, replay.
    """
    frames: dict[int, Tensor] = {}  # state (B,1,C,H,W) of every frame that a later call may still read
    moves: dict[int, Move] = {}
    draws: dict[int, int] = {}
    state = torch.float64 if exact else torch.float32
    if prefix is not None:
        frames.update(enumerate(torch.split(prefix.to(state), 1, dim=1)))

    def fresh(part: Part) -> Tensor:
        draws[part.start] = draws.get(part.start, 0) + 1
        return noise.renoise(part.start, part.frames, draws[part.start])

    for call in plan:
        if cache is None and call.only_commits:
            continue  # nothing to write to
        x = torch.cat([_input(part, frames, noise, fresh, state) for part in call.parts], dim=1)
        levels = [part.sigma for part in call.parts for _ in range(part.frames)]
        sigma = torch.tensor(levels, dtype=state)  # (F,), on the CPU
        if callable(conditioning):
            given = conditioning(call)
        else:
            given = conditioning.frames(call.start, call.start + call.frames)
        finished: list[Chunk] = []
        with torch.set_grad_enabled(call.grad and torch.is_grad_enabled()):
            velocity = denoise(
                x.float(), sigma.expand(x.shape[0], -1), given, sizes=call.sizes, start=call.start, cache=cache
            )  # (B,F,C,H,W)
            if observe is not None:
                observe(call, x, velocity)
            offset = 0
            for part in call.parts:
                here = slice(offset, offset + part.frames)
                offset += part.frames
                if part.sigma_next is None:
                    continue
                move = moves.setdefault(part.start, solver())
                moved = move(x[:, here], velocity[:, here], part.sigma, part.sigma_next, lambda part=part: fresh(part))
                frames.update(zip(range(part.start, part.end), torch.split(moved, 1, dim=1), strict=True))
                if part.sigma_next == 0:
                    finished.append(Chunk(part.start, moved.float()))
        if cache is not None and call.commit:
            cache.commit(call.commit)
        _forget(call, finished, frames, moves, draws, keep=cache is not None)
        yield from finished


def _input(
    part: Part,
    frames: dict[int, Tensor],
    noise: NoiseSource,
    fresh: Callable[[Part], Tensor],
    state: torch.dtype,
) -> Tensor:
    """-> x (B,F,C,H,W) of one part: stored states, new noise, or finished frames at the context sigma."""
    if part.start not in frames:
        if part.sigma_next is None:
            raise ValueError(f"the plan commits frame {part.start}, which is neither given as prefix nor generated")
        x = noise.initial(part.start, part.frames).to(state)
        frames.update(zip(range(part.start, part.end), torch.split(x, 1, dim=1), strict=True))
        return x
    x = torch.cat([frames[f] for f in range(part.start, part.end)], dim=1)
    if part.sigma_next is None:
        x = x.detach()
        if part.sigma > 0:
            x = add_noise(x, fresh(part), torch.full((1, 1), part.sigma, device=x.device))
    return x


def _forget(
    call: Call,
    finished: list[Chunk],
    frames: dict[int, Tensor],
    moves: dict[int, Move],
    draws: dict[int, int],
    *,
    keep: bool,
) -> None:
    """Drop what no later call reads, so that an endless rollout stays flat in memory."""
    gone = [] if keep else [f for chunk in finished for f in range(chunk.start, chunk.start + chunk.latents.shape[1])]
    gone += range(call.start, call.start + call.commit)
    for frame in gone:
        frames.pop(frame, None)
        draws.pop(frame, None)
    for chunk in finished:
        moves.pop(chunk.start, None)


def collect(chunks: Iterable[Chunk]) -> Tensor:
    """All chunks of a finite rollout as one tensor (B,F,C,H,W)."""
    return torch.cat([chunk.latents for chunk in chunks], dim=1)
