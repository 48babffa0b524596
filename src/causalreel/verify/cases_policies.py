"""c17: context policies of Causal-rCM, of which each recorded case says what every chunk sees and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from causalreel.nn.kv_cache import KVCache
from causalreel.nn.masks import frames_of
from causalreel.nn.policies.infinity_rope import InfinityRope
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.rolling_sink import RollingSink
from causalreel.nn.policies.window import Context
from causalreel.nn.rope import rope_table, rotate
from causalreel.rollout import Call, chunked, collect, rollout
from causalreel.types import Conditioning
from causalreel.verify.case import Case, Findings
from causalreel.verify.reference import RecordedNoise, Released, Scaled

Numbers = dict[str, Any]

Make = Callable[[Numbers, int, int], ContextPolicy]
"""Their numbers, frames of the first chunk and of the others -> our policy."""


def _frames(chunks: int, first: int, chunk: int) -> int:
    """Latent frames of so many first chunks."""
    return first + (chunks - 1) * chunk if chunks else 0


def _window(numbers: Numbers, first: int, chunk: int) -> Context:
    """Their windows count chunks before the current one, ours frames with it."""
    sink = numbers.get("sink_blocks", 0)
    return Context(
        _frames(sink, first, chunk) + (numbers["window_blocks"] - sink + 1) * chunk, _frames(sink, first, chunk)
    )


POLICIES: dict[str, Make] = {
    "sliding_window": _window,
    "rolling_sink": lambda n, first, chunk: RollingSink(sink_chunks=n["sink_blocks"], recent_chunks=n["recent_blocks"]),
    "infinity_rope": lambda n, first, chunk: InfinityRope(
        cache_chunks=n["cache_blocks"],
        sink_chunks=n["sink_blocks"],
        last_position=n["f_limit"] - 1,
        flush_every=n["flush_interval_blocks"],
        cut_shift=n["rope_cut_delta"],
        shifts_single_frames=n["rope_cut_single_frame"],
    ),
}


def handler(case: Case) -> Callable[[Case, Findings], None] | None:
    return policies if case.config["policy"] in POLICIES else None


@dataclass
class Seen:
    """What every chunk of a rollout saw, as the recorded cases say it."""

    cache: KVCache
    policy: ContextPolicy
    blocks: list[dict[str, Any]] = field(default_factory=list)
    last: int = -1

    def observe(self, call: Call, x: Tensor, velocity: Tensor) -> None:
        if call.start > self.last:
            self.add(call.start, call.frames, bool(self.cuts and self.cuts[call.start]))
            self.last = call.start

    cuts: tuple[bool, ...] = ()

    def add(self, start: int, size: int, cut: bool = False) -> None:
        view = self.policy.view(self.cache.frames, frames_of([size], start=start, cuts=[cut] * size))
        seen = {"frames": [frame.index for frame in view.frames], "positions": list(view.positions)}
        own = {"current_frames": list(range(start, start + size)), "current_positions": list(view.own)}
        self.blocks.append({"block": len(self.blocks)} | seen | own)


@torch.no_grad()
def policies(case: Case, found: Findings) -> None:
    """Latents, stored keys and values to the tolerance; what is seen, and where, exactly."""
    first, chunk = int(case.config["first_chunk_frames"]), case.chunk
    policy = POLICIES[case.config["policy"]](case.config["policy_parameters"], first, chunk)
    net, levels = case.network(context=policy), case.config["sigmas"][:-1]
    frames = case.tensors["in.noise"].shape[1]
    sizes = [first, *[chunk] * ((frames - first) // chunk)]
    conditioning = _conditioning(case, sizes)
    student = Released(net, tell=lambda sigma: (1000 * sigma.double()).float().double() / 1000)
    noise = RecordedNoise(case.tensors["in.noise"], [draw for _, draw in case.draws("renoise")])
    cache = net.new_cache()
    seen = Seen(cache, policy, cuts=conditioning.cuts or ())
    plan = chunked(sizes, tuple(levels), commit_last=True)
    how: dict[str, Any] = {"conditioning": conditioning, "cache": cache, "observe": seen.observe}
    found.add("out.latents", collect(rollout(student, plan, noise=Scaled(noise, levels[0]), **how)))
    noise.finish()
    seen.add(frames, chunk)
    seen.blocks[-1] |= {"not_generated": True}
    for got, wanted in zip(seen.blocks, case.extra["context"], strict=True):
        found.add_exact(f"extra.context of block {got['block']}", got, wanted)
    grid = tuple(side // net.config.patch for side in case.tensors["in.noise"].shape[-2:])
    for name in [name for name in case.tensors if name.startswith("out.layer")]:
        layer, kind = name.removeprefix("out.layer").split("_")[::2]
        stored = (cache.keys if kind == "k" else cache.values)[int(layer)]
        assert stored is not None
        at = tuple(frame.index for frame in cache.frames)
        if kind == "k" and policy.is_absolute:  # our keys are stored rotated, theirs are not
            cos, sin = rope_table(at, *grid, net.config.dim // net.config.heads, stored.device)
            stored = rotate(stored, cos, -sin)
        read = [at.index(frame) for frame in seen.blocks[-1]["frames"]]
        found.add(name, stored.unflatten(1, (len(at), -1))[:, read].flatten(1, 2))


def _conditioning(case: Case, sizes: list[int]) -> Conditioning:
    """One prompt, or one for each chunk with scene cuts."""
    if "in.prompt_embeds" in case.tensors:
        return case.conditioning()
    names = sorted((name for name in case.tensors if name.startswith("in.prompt_embeds.")), key=_number)
    text = torch.stack([case.tensors[name].float() for name in names], dim=1)  # (B,P,K,E)
    numbers, cut_at = case.config["prompt_of_block"], case.config["cut_at_block"]
    prompts = tuple(n for n, size in zip(numbers, sizes, strict=True) for _ in range(size))
    cuts = tuple(block in cut_at for block, size in enumerate(sizes) for _ in range(size))
    return Conditioning(text, prompts=prompts, cuts=cuts)


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])
