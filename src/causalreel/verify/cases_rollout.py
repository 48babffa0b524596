"""c4 and c5: rollouts through the cache, call by call."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.flow import warp_steps
from causalreel.nn.denoiser import Guided
from causalreel.nn.kv_cache import KVCache
from causalreel.nn.masks import frames_of
from causalreel.rollout import Call, chunk_sizes, chunked, collect, rollout
from causalreel.solvers import unipc, unipc_sigmas
from causalreel.types import Conditioning
from causalreel.verify.case import Case, Findings
from causalreel.verify.reference import RecordedNoise, Released, Table, relabel


@dataclass
class Watch:
    """What a rollout did: its calls, and the cache before each of them and at the end."""

    cache: KVCache
    calls: list[Call] = field(default_factory=list)
    caches: list[KVCache] = field(default_factory=list)
    local_frames: list[int] = field(default_factory=list)
    """Frames that the cache holds or makes room for, the call's own included."""

    def observe(self, call: Call, x: Tensor, velocity: Tensor) -> None:
        now = self.cache.copy()
        kept = now.context.view(now.frames, frames_of([call.frames], start=call.start)).frames
        self.calls.append(call)
        self.caches.append(now)
        self.local_frames.append(len(kept) + call.frames)

    def after_frame(self, frame: int) -> KVCache | None:
        """The cache as soon as it holds this frame."""
        states = [*self.caches, self.cache]
        return next((cache for cache in states if cache.frames and cache.frames[-1].index >= frame), None)


@torch.no_grad()
def few_step(case: Case, found: Findings) -> None:
    """c4: the few-step sampler, with a prefix, a window, a sink, and other steps for the first chunk."""
    steps, first = case.steps() or [], case.steps("first_chunk_steps")
    warp, table = case.get("warp_denoising_step", default=True), Table(case.shift)
    times = table.released_times(steps, warp=warp)
    first_times = None if first is None else table.released_times(first, warp=warp)
    for name, listed in (("out.warped_steps", steps), ("out.warped_steps_first_chunk", first)):
        if listed and found.wants(name):
            computed = warped(listed, case.shift) if warp else torch.tensor(listed, dtype=torch.float32)
            found.add(name, computed[: len(case.tensors[name])])  # a final 0 is dropped there

    net = case.network(context=case.context(sink=True))
    everything = times + (first_times or [])
    # The last entry relabels context: read clean, at level 0.
    tell = relabel((*table.levels(everything), 0.0), (*everything, float(case.get("context_noise", default=0))))
    student = Released(net, tell=tell, table=table)
    levels, first_levels = table.levels(times), None if first_times is None else table.levels(first_times)
    watch, latents = _generate(case, student, case.conditioning(), levels=levels, first=first_levels)
    found.add("out.latents", latents)
    _calls(case, found, student, watch)
    _cache(case, found, watch, {"": slice(None)})


@torch.no_grad()
def many_step(case: Case, found: Findings) -> None:
    """c5: UniPC with guidance, one cache for both rows. The released network is conditioning whole numbers as times."""
    sigmas = unipc_sigmas(int(case.get("steps", "sampling_steps")), case.shift)
    times = torch.tensor(sigmas[:-1]) * 1000
    found.add("out.sampler_sigmas", torch.tensor(sigmas))
    found.add("out.sampler_timesteps", times.long())

    net = case.network(context=case.context(sink=True))
    scale = float(case.get("guidance_scale", default=1.0))
    guided = Guided(net, case.conditioning("in.negative_prompt_embeds"), scale)
    sampler = Released(guided, tell=relabel(sigmas[:-1], times.trunc().tolist()))
    watch, latents = _generate(case, sampler, case.conditioning(), levels=sigmas[:-1], solver=unipc)
    found.add("out.latents", latents)

    is_move = [call.parts[0].sigma_next is not None for call in watch.calls]
    moves = [logged for logged, moving in zip(sampler.log, is_move, strict=True) if moving]
    found.add("out.guided_velocity", lambda: torch.stack([logged.velocity for logged in moves]))

    def states() -> Tensor:  # the state after a move is the input of the chunk's next move, or the chunk itself
        after = []
        for now, later in zip(moves, [*moves[1:], None], strict=True):
            here = slice(now.start, now.start + now.x.shape[1])
            after.append(later.x if later is not None and later.start == now.start else latents[:, here])
        return torch.stack(after)

    found.add("out.states_after_step", states)
    rows = latents.shape[0]
    _cache(case, found, watch, {"_cond": slice(0, rows), "_uncond": slice(rows, None)})


def warped(steps: list[float], shift: float) -> Tensor:
    """A released step list, perhaps ended by 0, -> times, by the core's closed form."""
    levels = warp_steps([step for step in steps if step > 0], shift)
    return 1000 * torch.tensor([*levels, *[0.0] * sum(step == 0 for step in steps)])


def _generate(
    case: Case,
    denoise: Released,
    conditioning: Conditioning,
    *,
    levels: tuple[float, ...],
    first: tuple[float, ...] | None = None,
    solver: Callable | None = None,
) -> tuple[Watch, Tensor]:
    """Run the case's plan -> what it did, and all its latents with the prefix (B,F,C,H,W)."""
    initial, prefix = case.tensors["in.noise"], case.tensors.get("in.initial_latent")
    given = 0 if prefix is None else prefix.shape[1]
    noise = RecordedNoise(initial, [draw for _, draw in case.draws("renoise")], offset=given)
    watch = Watch(denoise.new_cache())
    plan = chunked(
        case.sizes(initial.shape[1]) if not given else chunk_sizes(initial.shape[1], case.chunk),
        levels,
        first=first,
        prefix=_prefix_sizes(given, case.chunk),
        commit_last=True,
    )
    how: dict[str, Any] = {} if solver is None else {"solver": solver}
    chunks = rollout(
        denoise,
        plan,
        conditioning=conditioning,
        noise=noise,
        cache=watch.cache,
        prefix=prefix,
        observe=watch.observe,
        **how,
    )
    latents = collect(chunks)
    noise.finish()
    return watch, latents if prefix is None else torch.cat([prefix, latents], dim=1)


def _prefix_sizes(frames: int, chunk: int) -> list[int]:
    """Given frames in chunks, a single first frame by itself."""
    return [1] * (frames % chunk) + [chunk] * (frames // chunk)


def _calls(case: Case, found: Findings, student: Released, watch: Watch) -> None:
    tokens = case.tensors["in.noise"][0, 0, 0].numel() // student.denoise.config.patch**2
    ends = [call.start + call.frames for call in watch.calls]
    estimates = [logged.x0 for logged in student.log]
    if len({estimate.shape for estimate in estimates}) == 1:
        found.add("out.calls.pred_x0", lambda: torch.stack(estimates))
    for index, estimate in enumerate(estimates):
        found.add(f"out.calls.pred_x0.{index:03d}", estimate)
    found.add("out.calls.timestep", torch.stack([logged.time[0, 0] for logged in student.log]))
    found.add("out.calls.start_frame", torch.tensor([call.start for call in watch.calls]))
    found.add("out.calls.global_end_tokens", torch.tensor(ends) * tokens)
    found.add("out.calls.local_end_tokens", torch.tensor(watch.local_frames) * tokens)
    found.add_printed("num_generator_calls", len(watch.calls))


def _cache(case: Case, found: Findings, watch: Watch, rows: dict[str, slice]) -> None:
    """`out.layer<n>_cache_<k|v>_<final|after_frame<f>><row>`: contents of the cache (B,tokens,N,D)."""
    for name in [name for name in case.tensors if name.startswith("out.layer")]:
        match = re.fullmatch(r"out\.layer(\d+)(_camera)?_cache_([kv])_(?:final|after_frame(\d+))(_cond|_uncond|)", name)
        if not match or match[5] not in rows:
            continue
        cache = watch.cache if match[4] is None else watch.after_frame(int(match[4]))
        if cache is not None:
            stored = (cache.keys if match[3] == "k" else cache.values)[int(match[1])]
            assert stored is not None
            if case.cameras():  # every head is followed by the one that sees through the camera
                stored = stored[:, :, (1 if match[2] else 0) :: 2]
            # A chunk may reach beyond the frame that the name gives, and a buffer be recorded before it is full.
            stored = stored[rows[match[5]], : case.tensors[name].shape[1]]
            found.add(name, F.pad(stored, (0, 0, 0, 0, 0, case.tensors[name].shape[1] - stored.shape[1])))
