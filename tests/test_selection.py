"""What deep and relax forcing choose, entry by entry, said by hand; and every policy with noisy context."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from torch import Tensor

from by_hand import Past, Read, from_scratch, turned
from causalreel.nn.policies.deep_forcing import DeepForcing
from causalreel.nn.policies.relax_forcing import RelaxForcing
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.rollout import KeyedNoise, chunked, fuse
from test_policies import CASES, SELECTING, SIGMAS, SPEC, close, denoiser, given, run

TOKENS, CHUNK, FRAMES = 4, 2, 26
Entry = tuple[int, int, int]
"""Frame, token, position."""


class Choice:
    """What every block holds, as a rule says after each commit."""

    def __init__(self, layers: int) -> None:
        self.held: list[list[Entry]] = [[] for _ in range(layers)]
        self.reads: dict[tuple[int, int], list[Entry]] = {(layer, 0): [] for layer in range(layers)}
        self.queries: list[dict[int, Tensor]] = [{} for _ in range(layers)]
        self.committed = 0

    def listen(self, layer: int, start: int, queries: Tensor) -> None:
        for frame in range(CHUNK):
            self.queries[layer][start + frame] = queries[0, frame * TOKENS : (frame + 1) * TOKENS].sum(0)  # (N,D)

    def remember(self, past: Past, end: int) -> None:
        layer, self.committed = self.committed % len(self.held), self.committed + 1
        self.held[layer] += [(f, t, f) for f in range(end - CHUNK, end) for t in range(TOKENS)]
        self.held[layer] = self.rule(layer, past, end, self.held[layer])
        self.reads[layer, end] = self.held[layer]

    def rule(self, layer: int, past: Past, end: int, held: list[Entry]) -> list[Entry]:
        raise NotImplementedError

    def read(self, layer: int, start: int) -> Read:
        return Read(self.reads[layer, start], list(range(start, start + CHUNK)))


def key(past: Past, entry: Entry) -> Tensor:
    """The first sample's key (N,D), rotated to where it is read."""
    frame, token, position = entry
    return turned(past[frame, token][0][:, None], [(token, position)])[0, 0]


class Deep(Choice):
    def __init__(self, layers: int, policy: DeepForcing) -> None:
        super().__init__(layers)
        self.policy, self.first = policy, [policy.sink] * layers
        self.zeros = self.beaten = 0

    def rule(self, layer: int, past: Past, end: int, held: list[Entry]) -> list[Entry]:
        sink, budget, recent = self.policy.sink, self.policy.budget, self.policy.recent
        if len(held) <= budget * TOKENS:
            return held
        candidates, newest = held[sink * TOKENS : -recent * TOKENS], held[-recent * TOKENS :]
        asking = [q for frame, q in self.queries[layer].items() if frame >= max(CHUNK, end - recent)]
        scores = []
        for entry in candidates:
            is_new = entry[0] >= end - CHUNK
            score = sum((key(past, entry) * q).sum().item() for q in asking) / asking[0].shape[-1] ** 0.5
            scores.append(0.0 if is_new else score)
            self.zeros += is_new
        if self.policy.observed and layer < len(self.held) - self.policy.observed:
            scores = list(range(len(candidates)))
        count = (budget - sink - recent) * TOKENS
        best = sorted(sorted(range(len(candidates)), key=lambda i: -scores[i])[:count])
        first = end - recent - (budget - sink - recent)
        shift, self.first[layer] = first - self.first[layer], first
        moved = [(f, t, p + shift) for f, t, p in (candidates[i] for i in best)]
        return [(f, t, first - sink + f) for f, t, _ in held[: sink * TOKENS]] + moved + newest


class Relax(Choice):
    def __init__(self, layers: int, policy: RelaxForcing) -> None:
        super().__init__(layers)
        self.policy = policy
        self.chosen: dict[int, list[int]] = {}

    def rule(self, layer: int, past: Past, end: int, held: list[Entry]) -> list[Entry]:
        sink, budget, recent = self.policy.sink, self.policy.budget, self.policy.recent
        frames = [entry[0] for entry in held[::TOKENS]]
        if len(frames) <= budget:
            return held
        if layer == 0:
            means = defaultdict(list)
            for entry in held:
                means[entry[0]].append(key(past, entry).flatten())
            mean = {frame: torch.stack(keys).mean(0) for frame, keys in means.items()}
            tail = torch.stack([mean[frame] for frame in frames[-recent:]]).mean(0)
            candidates = frames[sink:-recent]
            cosine = lambda a, b: torch.nn.functional.cosine_similarity(a, b, dim=0).item()  # noqa: E731
            scores = {}
            for frame in candidates:
                others = [cosine(mean[frame], mean[other]) for other in candidates if other != frame]
                apart = 1 - sum(others) / len(others)
                scores[frame] = self.policy.alignment * cosine(mean[frame], tail) + (1 - self.policy.alignment) * apart
            best = sorted(candidates, key=lambda frame: -scores[frame])[: budget - sink - recent]
            self.chosen[end] = frames[:sink] + sorted(best) + frames[-recent:]
        kept = self.chosen[end]
        return [(f, t, end - budget + i) for i, f in enumerate(kept) for t in range(TOKENS)]


DEEP = (
    DeepForcing(sink=2, budget=8, recent=3),
    DeepForcing(sink=1, budget=6, recent=1, observed=1),
    DeepForcing(sink=1, budget=5, recent=1),
    DeepForcing(sink=3, budget=5, recent=2),
)
RELAX = (RelaxForcing(sink=2, budget=8, recent=2, alignment=0.7), RelaxForcing(sink=0, budget=6, recent=3))


@pytest.mark.parametrize("policy", [*DEEP, *RELAX], ids=str)
def test_what_is_chosen_is_what_the_rules_say(policy: DeepForcing | RelaxForcing) -> None:
    """Keys, queries, scores, choices and positions: nothing is taken from the cache."""
    net = denoiser(policy)
    choice = Deep(2, policy) if isinstance(policy, DeepForcing) else Relax(2, policy)
    how = {"chunk": CHUNK, "frames": FRAMES, "sigmas": SIGMAS}
    how |= {"read": choice.read, "remember": choice.remember, "listen": choice.listen}
    expected = from_scratch(net, given()[:1], KeyedNoise([1], SPEC), **how)
    made = run(net, net.new_cache(), CHUNK, FRAMES)
    close(made[:1], expected)
    if isinstance(choice, Deep) and policy.recent < CHUNK:
        assert choice.zeros > 0  # tokens of the new chunk among the candidates, which nobody has asked for yet


@pytest.mark.parametrize("name", [*CASES, *SELECTING])
def test_noisy_context_goes_with_every_policy(name: str) -> None:
    """What a chunk leaves is that of its last denoising call, in growing and in fast caches, fused or not."""
    policy, frames = CASES[name][0] if name in CASES else SELECTING[name], 12
    net, fast = denoiser(policy), accelerate(denoiser(policy))
    assert isinstance(fast.run, FastDiT)
    noisy = lambda plan: chunked([2] * (frames // 2), SIGMAS, noisy_from=1)  # noqa: E731
    expected = run(net, net.new_cache(), 2, frames, change=noisy)
    plain = run(net, net.new_cache(), 2, frames)
    close(expected[:, :4], plain[:, :4])
    assert (expected - plain).abs().max() > 1e-3  # the second chunk is read with its noise
    for change in (noisy, lambda plan: fuse(noisy(plan))) if policy.fuses else (noisy,):
        cache = fast.run.new_cache(policy, chunk=2, frames=frames, batch=2, size=(4, 4))
        close(run(fast, cache, 2, frames, change=change), expected)
