"""Recorded calls without a GPU: a tape of operations on the very same tensors stands in for a CUDA graph.

As a graph's, its memory stays, and nothing but operations happens again: what Python decided while it was taken, such
as which frames lie where, is decided for all replays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.policies.deep_forcing import DeepForcing
from causalreel.nn.policies.infinity_rope import InfinityRope
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.memrope import MemRope
from causalreel.nn.policies.relax_forcing import RelaxForcing
from causalreel.nn.policies.rolling_forcing import RollingForcing
from causalreel.nn.policies.rolling_sink import RollingSink
from causalreel.nn.policies.window import Context
from causalreel.nn.presets import ModelConfig
from causalreel.nn.static_cache import StaticCache
from causalreel.parallel import recordings
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.parallel.recordings import Recordings
from causalreel.rollout import KeyedNoise, chunked, collect, fuse, rolling, rollout
from causalreel.types import Conditioning, LatentSpec

CONFIG = ModelConfig(dim=48, ffn_dim=80, heads=3, layers=2, text_dim=8, text_length=4, freq_dim=32, channels=4)
SPEC = LatentSpec(4, 4, 4)

POLICIES: dict[str, ContextPolicy] = {
    "window": Context(8),
    "sink": Context(8, 2),
    "re-indexed": Context(8, 2, 7),
    "rolling-sink": RollingSink(sink_chunks=2, recent_chunks=1),
    "infinity-rope": InfinityRope(cache_chunks=3, sink_chunks=1, last_position=7),
    "infinity-rope, flushed": InfinityRope(cache_chunks=4, sink_chunks=1, last_position=9, flush_every=3),
    "deep-forcing": DeepForcing(sink=2, budget=8, recent=3),
    "relax-forcing": RelaxForcing(sink=2, budget=8, recent=2, alignment=0.7),
    "memrope": MemRope(sink=2, local=3, alpha_long=0.2, alpha_short=0.6),
    "rolling-forcing": RollingForcing(window=8, sink=2, cache=8),
}


class Tape(TorchDispatchMode):
    """Every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.taken.append((func, args, kwargs or {}, found))
        return found

    def play(self) -> None:
        for func, args, kwargs, held in self.taken:
            for mine, now in zip(tree_leaves(held), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(mine, Tensor) and mine.data_ptr() != now.data_ptr():
                    mine.copy_(now)


class Recording:
    """As `recordings._Recording`."""

    def __init__(self, inputs: list[Tensor], run: Callable[[], Tensor], pool: object, side: object) -> None:
        self.inputs, self.tape = inputs, Tape()
        run()
        with self.tape:
            self.result = run()

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self.tape.play()
        return self.result.clone()


class Stream:
    """Nothing waits on a CPU."""

    def wait_event(self, event: object) -> None: ...
    def record_event(self) -> object: ...


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Static caches' calls are recorded on a CPU too, on tapes."""
    monkeypatch.setattr(recordings, "_Recording", Recording)
    monkeypatch.setattr(Recordings, "fit", staticmethod(lambda x, cache: isinstance(cache, StaticCache)))
    for name in ("current_stream", "graph_pool_handle", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *device: Stream())


def denoiser(policy: ContextPolicy) -> DiTDenoiser:
    torch.manual_seed(0)
    net = DiTDenoiser(CONFIG, context=policy)
    nn.init.normal_(net.model.head.head.weight, std=0.2)
    return net.requires_grad_(False)


@torch.no_grad()
def run(net: DiTDenoiser, cache: Any, plan: str, *, chunks: int, seed: int) -> Tensor:
    calls = (rolling if plan == "rolling" else chunked)([2] * chunks, (1.0, 0.6))
    told = Conditioning(torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(seed)))
    calls = fuse(calls) if plan == "fused" else calls
    return collect(rollout(net, calls, conditioning=net.prepare(told), noise=KeyedNoise([seed], SPEC), cache=cache))


def static(fast: DiTDenoiser, policy: ContextPolicy) -> StaticCache:
    assert isinstance(fast.run, FastDiT)
    cache = fast.run.new_cache(policy, chunk=2, frames=None, batch=1, size=(4, 4))
    assert isinstance(cache, StaticCache)
    return cache


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        *((name, plan) for name, policy in POLICIES.items() for plan in ("plain", "fused") if policy.fuses),
        *((name, "plain") for name, policy in POLICIES.items() if not policy.fuses),
        ("rolling-forcing", "rolling"),
    ],
)
def test_replayed_calls_are_the_networks(name: str, plan: str) -> None:
    """Three videos in turn, by the same recordings: other noise, other text, frames at other places."""
    policy = POLICIES[name]
    net, fast = denoiser(policy), accelerate(denoiser(policy))
    assert isinstance(fast.run, FastDiT) and fast.run.graphs is not None
    counts = []
    for seed, chunks in ((1, 14), (2, 14), (3, 25)):
        expected = run(net, net.new_cache(), plan, chunks=chunks, seed=seed)
        got = run(fast, static(fast, policy), plan, chunks=chunks, seed=seed)
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
        counts.append(len(fast.run.graphs.graphs))
    assert counts[0] == counts[1] == counts[2] > 0  # however long, and wherever frames lie


@pytest.mark.usefixtures("recorded")
def test_a_tape_notices_what_python_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in can fail: rows that are not read from the call's own tensors are those of the first call."""
    policy = POLICIES["infinity-rope"]
    net, fast = denoiser(policy), accelerate(denoiser(policy))
    assert isinstance(fast.run, FastDiT)
    plain, first = fast.run.evaluate, ()

    def stale(*args: Any) -> Tensor:
        return plain(args[0], args[1], args[2], args[3], args[4], args[5], args[6], first)

    monkeypatch.setattr(fast.run.graphs, "evaluate", stale)
    gathers_of = fast.run.attention.gathers_of

    def keep(*args: Any) -> Any:
        nonlocal first
        first = gathers_of(*args)
        return first

    monkeypatch.setattr(fast.run.attention, "gathers_of", keep)
    expected = run(net, net.new_cache(), "plain", chunks=14, seed=1)
    got = run(fast, static(fast, policy), "plain", chunks=14, seed=1)
    assert (got - expected).abs().max() > 1e-2 * expected.abs().max()


def test_calls_that_processes_share_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    fast = FastDiT(DiTDenoiser(CONFIG).model)
    assert fast.records and not FastDiT(fast.model, graphs=False).records
    monkeypatch.setattr(fast.model, "exchange", object())
    assert not fast.records
