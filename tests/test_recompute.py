"""Recomputing activations changes no number, and computes again only what it says."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.lora import LoRAConfig, adapters, add_lora
from causalreel.parallel.compile import compile_blocks
from causalreel.parallel.recompute import recompute_blocks
from causalreel.rollout import StreamNoise, chunked, collect, rollout, truncate
from test_blocks import CONFIG, SPEC, adapted, denoiser, gradients, inputs, rolled_out, teacher_forced


class Counted(TorchDispatchMode):
    """How often each product (by its weight's shape) and each attention is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("addmm", "mm"):
            self.counts[tuple(args[-1].shape)] += 1
        elif "attention" in name and "backward" not in name:
            self.counts["attention"] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("make", [denoiser, adapted])
def test_recomputed_blocks_have_the_same_gradients_to_the_last_bit(make: Any, mode: Any) -> None:
    plain, net = make(), make()
    net.load_state_dict(plain.state_dict())
    assert recompute_blocks(net, mode) is net
    for one in (plain, net):
        teacher_forced(one).square().mean().backward()
    expected, found = gradients(plain), gradients(net)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(rolled_out(net), rolled_out(plain))
    assert [*net.state_dict()] == [*plain.state_dict()]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_dropout_of_adapters_is_the_same_when_it_is_computed_again(mode: Any) -> None:
    found = []
    for how in ("none", mode):
        net = denoiser()
        add_lora(net.model, LoRAConfig(rank=2, dropout=0.5), torch.Generator().manual_seed(0))
        for _, layer in adapters(net.model):
            torch.nn.init.constant_(layer.lora_B, 0.1)
        recompute_blocks(net, how)
        torch.manual_seed(1)
        teacher_forced(net).square().mean().backward()
        found.append(gradients(net))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


def test_what_is_computed_again() -> None:
    counts = {}
    for mode in ("none", "selective", "full"):
        net = recompute_blocks(denoiser(), mode)  # type: ignore[arg-type]
        with Counted() as counted:
            teacher_forced(net).square().mean().backward()
        counts[mode] = counted.counts
    up, down = (CONFIG.dim, CONFIG.ffn_dim), (CONFIG.ffn_dim, CONFIG.dim)
    layers = CONFIG.layers

    def more(mode: str, what: Any) -> int:
        return counts[mode][what] - counts["none"][what]

    assert (more("selective", up), more("selective", down)) == (layers, 0)
    assert more("full", up) == layers
    assert more("selective", "attention") == layers  # over the text, whose keys are few; that of the frames is kept
    assert more("full", "attention") == 2 * layers


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_cache_that_moves_on_is_not_read_again(mode: Any) -> None:
    """The full graph of a rollout: when a call is computed again, later calls have been committed long since."""
    found = []
    for net in (denoiser(), recompute_blocks(denoiser(), mode)):
        plan = truncate(chunked([2, 2, 2], (1.0, 0.6)), [1])
        noise = StreamNoise(2, SPEC, torch.Generator().manual_seed(0))
        collect(rollout(net, plan, conditioning=inputs()[2], noise=noise, cache=net.new_cache())).mean().backward()
        found.append(gradients(net))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_compiled_halves_are_recomputed_too(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found = []
    for net in (denoiser(), compile_blocks(recompute_blocks(denoiser(), mode))):
        teacher_forced(net).square().mean().backward()
        found.append(gradients(net))
    for name, value in found[0].items():
        assert torch.allclose(found[1][name], value, rtol=1e-4, atol=1e-7), name


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of none, selective, full; got 'some'"):
        recompute_blocks(DiTDenoiser(CONFIG), "some")  # type: ignore[arg-type]
