"""c17: context policies of Causal-rCM, of which each recorded case says what every chunk sees and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from causalreel.infer.scripts import chunks_of, read_script, spread
from causalreel.nn.kv_cache import KVCache
from causalreel.nn.masks import frames_of
from causalreel.nn.policies.deep_forcing import DeepForcing
from causalreel.nn.policies.infinity_rope import InfinityRope
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.memrope import MemRope
from causalreel.nn.policies.relax_forcing import RelaxForcing
from causalreel.nn.policies.rolling_sink import RollingSink
from causalreel.nn.policies.selecting import Entries
from causalreel.nn.policies.window import Context
from causalreel.nn.rope import rope_table, rotate, token_table
from causalreel.nn.token_cache import TokenCache
from causalreel.rollout import Call, chunked, collect, rollout
from causalreel.types import Conditioning
from causalreel.verify.case import Case, Findings
from causalreel.verify.reference import RecordedNoise, Released, Scaled, in_float32

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
    "none": lambda n, first, chunk: Context(),
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
    "deep_forcing": lambda n, first, chunk: DeepForcing(
        sink=n["sink_frames"], budget=n["budget_frames"], recent=n["recent_frames"], observed=n["observation_layers"]
    ),
    "memrope": lambda n, first, chunk: MemRope(
        sink=n["sink_frames"], local=n["local_frames"], alpha_long=n["alpha_long"], alpha_short=n["alpha_short"]
    ),
    "relax_forcing": lambda n, first, chunk: RelaxForcing(
        sink=n["sink_frames"], budget=n["budget_frames"], recent=n["recent_frames"], alignment=n["alignment_weight"]
    ),
}

MEMORIES = {-1: "mem_long", -2: "mem_short"}
"""What the recorded cases call frames that are made up."""


def handler(case: Case) -> Callable[[Case, Findings], None] | None:
    return policies if case.config["policy"] in POLICIES else None


@dataclass
class Seen:
    """What every chunk of a rollout saw, as the recorded cases say it."""

    cache: KVCache | TokenCache
    policy: ContextPolicy
    found: Findings
    cuts: tuple[bool, ...] = ()
    blocks: list[dict[str, Any]] = field(default_factory=list)
    last: int = -1

    def observe(self, call: Call, x: Tensor, velocity: Tensor) -> None:
        if call.start > self.last:
            self.add(call.start, call.frames, bool(self.cuts and self.cuts[call.start]))
            self.last = call.start

    def add(self, start: int, size: int, cut: bool = False) -> None:
        """A chunk, before which the cache is as it is now."""
        if isinstance(self.cache, KVCache):
            view = self.policy.view(self.cache.frames, frames_of([size], start=start, cuts=[cut] * size))
            seen: dict[str, Any] = {"frames": [frame.index for frame in view.frames], "positions": list(view.positions)}
            own = list(view.own)
        else:
            self._scores(len(self.blocks) - 1)
            first = self.cache.context.first_position(start, self.cache.held)
            seen, own = _entries(self.cache), list(range(first, first + size))
        told = {"current_frames": list(range(start, start + size)), "current_positions": own}
        self.blocks.append({"block": len(self.blocks)} | seen | told)

    def _scores(self, block: int) -> None:
        assert isinstance(self.cache, TokenCache)
        name = f"out.selection_scores.block{block:02d}"
        wanted = self.found.case.tensors.get(name)
        if (scores := self.cache.state.pop("scores", None)) and wanted is not None:
            found = torch.stack(scores)  # (layers,B,candidates)
            if isinstance(self.policy, DeepForcing) and wanted.numel() < found.numel():
                found = found[-self.policy.observed :]  # of the layers that choose by them
            self.found.add(name, found.reshape(wanted.shape) if found.numel() == wanted.numel() else found)


def _entries(cache: TokenCache) -> dict[str, Any]:
    """What the first sample holds: tokens of every block where they choose for themselves, else frames."""
    layers = []
    for entries in cache.layers:
        names = ("frames", "tokens", "positions")
        found = {name: [] if entries is None else getattr(entries, name)[0].tolist() for name in names}
        layers.append(found)
    if isinstance(cache.context, DeepForcing):
        return {"layers": layers}
    step = len(layers[0]["frames"]) // max(cache.held, 1) or 1
    frames = [MEMORIES.get(frame, frame) for frame in layers[0]["frames"][::step]]
    return {"frames": frames, "positions": layers[0]["positions"][::step]}


@torch.no_grad()
def policies(case: Case, found: Findings) -> None:
    """Latents, stored keys and values to the tolerance; what is seen, and where, exactly."""
    first, chunk = int(case.config["first_chunk_frames"]), case.chunk
    policy = POLICIES[case.config["policy"]](case.config["policy_parameters"], first, chunk)
    net, levels = case.network(context=policy), case.config["sigmas"][:-1]
    frames = case.tensors["in.noise"].shape[1]
    sizes = [first, *[chunk] * ((frames - first) // chunk)]
    conditioning = _conditioning(case, sizes)
    if "segments" in case.config:
        _segments(case, found, sizes, chunk)
    student = Released(net, tell=in_float32)
    noise = RecordedNoise(case.tensors["in.noise"], [draw for _, draw in case.draws("renoise")])
    cache = net.new_cache()
    seen = Seen(cache, policy, found, conditioning.cuts or ())
    plan = chunked(sizes, tuple(levels), commit_last=True)
    how: dict[str, Any] = {"conditioning": conditioning, "cache": cache, "observe": seen.observe, "exact": True}
    found.add("out.latents", collect(rollout(student, plan, noise=Scaled(noise, levels[0]), **how)))
    noise.finish()
    seen.add(frames, chunk)
    seen.blocks[-1] |= {"not_generated": True}
    for got, wanted in zip(seen.blocks, case.extra["context"], strict=True):
        found.add_exact(f"extra.context of block {got['block']}", got, wanted)
    rows, columns = (side // net.config.patch for side in case.tensors["in.noise"].shape[-2:])
    for name in [name for name in case.tensors if name.startswith("out.layer")]:
        layer, kind = name.removeprefix("out.layer").split("_")[::2]
        found.add(name, _stored(cache, policy, int(layer), kind, seen.blocks[-1], (rows, columns)))


def _stored(
    cache: KVCache | TokenCache,
    policy: ContextPolicy,
    layer: int,
    kind: str,
    seen: dict[str, Any],
    size: tuple[int, int],
) -> Tensor:
    """Keys or values of a block, in the order of the next chunk's context, as the released code stores them."""
    if isinstance(cache, TokenCache):  # theirs are rotated, except with memory frames; ours never
        entries = cache.layers[layer]
        assert isinstance(entries, Entries)
        if kind == "v" or isinstance(policy, MemRope):
            return entries.values if kind == "v" else entries.keys
        return rotate(entries.keys, *token_table(entries.positions, entries.tokens, size, entries.keys.shape[-1]))
    stored = (cache.keys if kind == "k" else cache.values)[layer]
    assert stored is not None
    at = tuple(frame.index for frame in cache.frames)
    if kind == "k" and policy.is_absolute:  # ours are stored rotated, theirs are not
        cos, sin = rope_table(at, *size, stored.shape[-1], stored.device)
        stored = rotate(stored, cos, -sin)
    return stored.unflatten(1, (len(at), -1))[:, [at.index(frame) for frame in seen["frames"]]].flatten(1, 2)


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


def _segments(case: Case, found: Findings, sizes: list[int], chunk: int) -> None:
    """Prompts by time, four latent frames a second."""
    script = read_script(case.config["segments"])
    spoken = spread(chunks_of(script, per_second=4, chunk=chunk, first=sizes[0]), script, sizes)
    starts = list(accumulate(sizes, initial=0))[:-1]
    found.add_exact("prompts by time", [spoken.prompts[start] for start in starts], case.config["prompt_of_block"])
    cuts = [block for block, start in enumerate(starts) if spoken.cuts[start]]
    found.add_exact("scene cuts by time", cuts, case.config["cut_at_block"])


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])
