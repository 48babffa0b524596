"""c8 and c16: the rolling plan of Rolling Forcing, and Causal-rCM's sampler with clean and noisy context."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from causalreel.nn.kv_cache import KVCache
from causalreel.nn.policies.rolling_forcing import RollingForcing
from causalreel.nn.rope import rope_table, rotate
from causalreel.rollout import Call, Plan, chunk_sizes, chunked, collect, rolling, rollout
from causalreel.verify.case import Case, Findings
from causalreel.verify.cases_rollout import warped
from causalreel.verify.reference import RecordedNoise, Released, Scaled, Table, in_float32, relabel

# ---- c8


class WindowNoise(RecordedNoise):
    """Recorded draws that cover the whole window, one for each chunk of it that is noised again."""

    def __init__(self, initial: Tensor, draws: list[Tensor], last: float) -> None:
        super().__init__(initial, draws)
        self.last, self._of = last, dict[int, Tensor]()

    def observe(self, call: Call) -> None:
        """Take the draws of a call; at the last noise level none is made."""
        for part in call.parts if call.joint else ():
            if part.sigma != self.last:
                drawn = self.rest.pop(0).unflatten(0, (-1, call.frames))
                own = drawn[:, part.start - call.start : part.end - call.start]
                self._of[part.start] = self.initial(part.start, part.frames) if part.sigma_next == 1 else own

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        return self._of[start]


def _as_released(plan: Plan, sigmas: tuple[float, ...], chunks: int) -> Iterator[Call]:
    """A clip with fewer chunks than steps: while the first one is in the window, they are told the highest levels, and
    the last one is its initial noise again."""
    steps = (*sigmas, 0.0)
    for call in plan:
        count = len(call.parts)
        if call.joint and call.start == 0 and count < len(sigmas):
            moves = list(zip(sigmas, steps[1:], strict=True))[:count][::-1]  # the oldest chunk first
            parts = [replace(p, sigma=a, sigma_next=b) for p, (a, b) in zip(call.parts, moves, strict=True)]
            if call.parts[0].sigma_next == 0:
                parts[0] = replace(parts[0], sigma_next=0.0)
            elif count == chunks:
                parts[-1] = replace(parts[-1], sigma_next=1.0)
            call = replace(call, parts=tuple(parts))
        yield call


@torch.no_grad()
def rolling_forcing(case: Case, found: Findings) -> None:
    """The released code also evaluates the first chunk for the cache before it is finished, and writes over that."""
    steps, table = case.steps() or [], Table(case.shift)
    times = table.released_times(steps)
    found.add("out.warped_steps", warped(steps, case.shift))
    levels, chunk = table.levels(times), case.chunk
    most, cached = int(case.extra["max_attention_frames"]), int(case.extra["cache_capacity_frames"])
    policy = RollingForcing(window=most, sink=chunk, cache=cached)
    net = case.network(context=policy)
    student = Released(net, tell=relabel((*levels, 0.0), (*times, 0.0)), table=table)
    initial = case.tensors["in.noise"]
    noise = WindowNoise(initial, [draw for _, draw in case.draws("renoise")], levels[-1])
    plan = rolling(chunk_sizes(initial.shape[1], chunk), levels, commit_last=True)
    cache, calls = net.new_cache(), list[Call]()

    def observe(call: Call, x: Tensor, velocity: Tensor) -> None:
        calls.append(call)
        noise.observe(call)

    how: dict[str, Any] = {"conditioning": case.conditioning(), "cache": cache, "observe": observe}
    found.add(
        "out.latents",
        collect(rollout(student, _as_released(plan, levels, initial.shape[1] // chunk), noise=noise, **how)),
    )
    noise.finish()
    middle = [logged for logged, call in zip(student.log, calls, strict=True) if call.joint]
    found.add("out.window_mid.x0", middle[int(case.extra["window_mid_index"])].x0)
    _rolling_calls(case, found, calls, [logged.time[0] for logged in student.log], chunk, policy.cache)
    assert isinstance(cache, KVCache)
    _rolling_keys(case, found, cache, policy)


def _rolling_calls(case: Case, found: Findings, calls: list[Call], times: list[Tensor], chunk: int, most: int) -> None:
    """The log, with the evaluations for the cache of the unfinished first chunk that we leave out."""
    width = case.tensors["out.calls.timestep_padded_minus1"].shape[1]
    rows: list[tuple[list[float], int, bool]] = []
    for call, time, after in zip(calls, times, [*calls[1:], None], strict=True):
        rows.append((time.tolist(), call.start, not call.joint))
        if call.joint and after is not None and after.joint:
            rows.append(([0.0] * chunk, call.start, True))
    padded = [time + [-1.0] * (width - len(time)) for time, _, _ in rows]
    found.add("out.calls.timestep_padded_minus1", torch.tensor(padded))
    found.add("out.calls.start_frame", torch.tensor([start for _, start, _ in rows]))
    found.add("out.calls.is_cache_update", torch.tensor([is_update for _, _, is_update in rows]))
    found.add("out.calls.cached_frames_after", torch.tensor([min(start + chunk, most) for _, start, _ in rows]))


def _rolling_keys(case: Case, found: Findings, cache: KVCache, policy: RollingForcing) -> None:
    """Theirs are rotated but for the first chunk, and lie at the start of their buffer; ours never are."""
    wanted = case.tensors["out.layer0_cache_k_final"]
    keys, at = cache.keys[0], tuple(frame.index for frame in cache.frames)
    assert keys is not None
    rows, columns = (side // 2 for side in case.tensors["in.noise"].shape[-2:])
    cos, sin = rope_table(at, rows, columns, keys.shape[-1], keys.device)
    first = policy.sink * rows * columns
    stored = torch.cat([keys[:, :first], rotate(keys, cos, sin)[:, first:]], dim=1)
    empty = wanted.shape[1] - stored.shape[1]
    found.add("out.layer0_cache_k_final", torch.nn.functional.pad(stored, (0, 0, 0, 0, 0, empty)))


# ---- c16


def rcm_levels(steps: list[int], middle: str, first: float = 1600 / 1601) -> list[tuple[float, ...]]:
    """Steps of the first chunk, the second ...; levels after the first, "15/16,5/6,5/8;5/8" -> exact levels."""
    lists = [[float(Fraction(entry)) for entry in part.replace(",", " ").split()] for part in middle.split(";")]
    return [(first, *levels[: count - 1]) for count, levels in zip(steps, lists, strict=True)]


@dataclass
class Log:
    """Calls of a rollout."""

    calls: list[Call] = field(default_factory=list)

    def observe(self, call: Call, x: Tensor, velocity: Tensor) -> None:
        self.calls.append(call)


@torch.no_grad()
def rcm_sampler(case: Case, found: Findings) -> None:
    """x stays in float64 between the calls of a chunk, and every time is rounded to float32 once."""
    config = case.config
    sigma_max = float(config["sigma_max"])
    levels = rcm_levels(config["steps_per_chunk"], config["mid_t_schedules"], sigma_max / (sigma_max + 1))
    initial, image = case.tensors["in.noise"], case.tensors.get("in.image_latent")
    given = 0 if image is None else image.shape[1]
    first = int(config["first_chunk_frames"]) if not given else case.chunk
    sizes = [first, *[case.chunk] * ((initial.shape[1] - first) // case.chunk)]
    found.add("out.sigmas_chunk0", torch.tensor([*levels[0], 0.0], dtype=torch.float64))
    found.add("out.sigmas_last_chunk", torch.tensor([*levels[-1], 0.0], dtype=torch.float64))
    net = case.network()
    student = Released(net, tell=in_float32)
    draws = [case.tensors[name] for name in ("in.image_noise",) if name in case.tensors]
    noise = RecordedNoise(initial, [*draws, *(draw for _, draw in case.draws("renoise"))], offset=given)
    is_noisy = config["context_from_last_step"]
    plan = chunked(
        sizes,
        levels,
        prefix=[given] if given else [],
        noisy_from=int(config["context_from_last_step_start_chunk"]) if is_noisy else None,
        commit_last=True,
    )
    cache, log = net.new_cache(), Log()
    how: dict[str, Any] = {"conditioning": case.conditioning(), "cache": cache, "observe": log.observe, "exact": True}
    latents = collect(rollout(student, plan, noise=Scaled(noise, levels[0][0]), prefix=image, **how))
    noise.finish()
    found.add("out.latents", latents if image is None else torch.cat([image, latents], dim=1))
    if "out.calls.velocity" in case.tensors:
        found.add("out.calls.velocity", torch.stack([logged.velocity for logged in student.log]))
    tokens = initial[0, 0, 0].numel() // net.config.patch**2
    found.add("out.calls.timestep", torch.stack([logged.time[0, 0] for logged in student.log]))
    found.add("out.calls.start_frame", torch.tensor([call.start for call in log.calls]))
    found.add("out.calls.writes_cache", torch.tensor([int(call.commit > 0) for call in log.calls]))
    cached = torch.tensor(list(accumulate(call.commit for call in log.calls))) * tokens
    found.add("out.calls.cached_tokens_after", cached)
    found.add_printed("num_network_calls", len(log.calls))
    assert isinstance(cache, KVCache)
    for name in [name for name in case.tensors if name.startswith("out.layer")]:
        layer, kind = name.removeprefix("out.layer").split("_")[::2]
        found.add(name, (cache.keys if kind == "k" else cache.values)[int(layer)])
