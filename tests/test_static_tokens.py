"""Policies that look at what frames hold, in memory that never moves; tests/test_policies.py has the laws."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.policies.deep_forcing import DeepForcing
from causalreel.nn.policies.memrope import MemRope
from causalreel.nn.policies.relax_forcing import RelaxForcing
from causalreel.nn.policies.selecting import Entries, SelectingPolicy
from causalreel.nn.presets import ModelConfig
from causalreel.nn.static_tokens import StaticTokenCache
from causalreel.nn.token_cache import TokenCache
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.rollout import KeyedNoise, chunked, collect, fuse, rollout
from causalreel.types import Conditioning, LatentSpec

CONFIG = ModelConfig(dim=48, ffn_dim=80, heads=3, layers=2, text_dim=8, text_length=4, freq_dim=32, channels=4)
SPEC, SIGMAS = LatentSpec(4, 4, 8), (1.0, 0.6)
POLICIES: list[SelectingPolicy] = [
    DeepForcing(sink=2, budget=8, recent=3),
    DeepForcing(sink=1, budget=6, recent=1, observed=1),
    RelaxForcing(sink=2, budget=8, recent=2, alignment=0.7),
    MemRope(sink=2, local=3, alpha_long=0.2, alpha_short=0.6),
]


def denoiser(policy: SelectingPolicy, **config: Any) -> DiTDenoiser:
    torch.manual_seed(0)
    net = DiTDenoiser(dataclasses.replace(CONFIG, **config), context=policy)
    for name, weight in net.named_parameters():
        if name.endswith(("head.head.weight", "prope_o.weight")):
            nn.init.normal_(weight, std=0.2)
    return accelerate(net.requires_grad_(False))


def given(fields: bool = False) -> Conditioning:
    generator = torch.Generator().manual_seed(5)
    text = torch.randn(2, 4, 8, generator=generator)
    if not fields:
        return Conditioning(text)
    w2c = torch.eye(4).repeat(2, 40, 1, 1)
    w2c[:, :, :3, 3] = torch.randn(2, 40, 3, generator=generator)
    lens = torch.tensor([0.6, 0.9, 0.5, 0.5]).expand(2, 40, 4)
    return Conditioning(text, fields={"w2c": w2c, "intrinsics": lens})


def static(net: DiTDenoiser, *, frames: int | None = None, chunk: int = 2, size: tuple[int, int] = (4, 8)) -> Any:
    assert isinstance(net.run, FastDiT)
    cache = net.run.new_cache(net.context, chunk=chunk, frames=frames, batch=2, size=size)
    assert isinstance(cache, StaticTokenCache)
    return cache


def steps(net: DiTDenoiser, cache: Any, sizes: list[int], told: Conditioning, seed: int = 1) -> Any:
    noise = KeyedNoise([seed, seed + 1], SPEC)
    return rollout(net, chunked(sizes, SIGMAS), conditioning=told, noise=noise, cache=cache)


@torch.no_grad()
def run(net: DiTDenoiser, cache: Any, sizes: list[int], told: Conditioning, seed: int = 1) -> Tensor:
    return collect(steps(net, cache, sizes, told, seed))


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() < 1e-5 * b.abs().max()


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_what_is_held_is_what_a_growing_cache_holds(policy: SelectingPolicy) -> None:
    """The same entries of the same frames at the same positions, chunk by chunk, for more than ten windows."""
    net = denoiser(policy)
    caches = static(net), net.new_cache()
    assert isinstance(caches[1], TokenCache)
    buffers = [x.data_ptr() for x in caches[0].memory.tensors]
    rollouts = [steps(net, cache, [2] * 50, given()) for cache in caches]
    with torch.no_grad():
        for pair in zip(*rollouts, strict=True):
            close(pair[0].latents, pair[1].latents)
            for mine, other in zip(*(cache.layers for cache in caches), strict=True):
                if other is None:
                    continue
                for name in ("frames", "tokens", "positions"):
                    assert torch.equal(getattr(mine, name), getattr(other, name))
                close(mine.keys, other.keys)
                close(mine.values, other.values)
                assert mine.keys.data_ptr() in range(buffers[-2], buffers[-2] + caches[0].memory.unturned.nbytes)
    assert caches[0].held == caches[1].held == policy.most_held(2) and caches[0].end == caches[1].end == 98
    assert [x.data_ptr() for x in caches[0].memory.tensors] == buffers


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_rollouts_of_one_size_take_turns_in_one_memory(policy: SelectingPolicy) -> None:
    net, told = denoiser(policy), given()
    alone = [run(net, net.new_cache(), [2] * 9, told, seed) for seed in (1, 7)]
    caches = [static(net) for _ in range(2)]
    assert caches[0].memory is caches[1].memory
    for tensor in caches[0].memory.tensors:
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))  # what nobody wrote must not be read
    rollouts, made = [steps(net, cache, [2] * 9, told, seed) for cache, seed in zip(caches, (1, 7), strict=True)], []
    with torch.no_grad():
        for pair in zip(*rollouts, strict=True):
            made.append([chunk.latents for chunk in pair])
    for number, expected in enumerate(alone):
        close(torch.cat([pair[number] for pair in made], dim=1), expected)


def test_frames_of_another_shape_have_another_memory() -> None:
    """Even with as many tokens: keys are turned by their row and column."""
    net = denoiser(POLICIES[0])
    assert static(net).memory is static(net).memory is not static(net, size=(8, 4)).memory
    assert static(net, frames=4).memory.frames == 4 and static(net).memory.frames == 10


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_chunks_of_other_sizes_fit(policy: SelectingPolicy) -> None:
    """A shorter first chunk, such as a picture."""
    net, sizes = denoiser(policy), [1, *[2] * 9]
    close(run(net, static(net), sizes, given()), run(net, net.new_cache(), sizes, given()))


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_heads_that_see_through_cameras_are_not_turned(policy: SelectingPolicy) -> None:
    net, told = denoiser(policy, camera="prope", dim=48, heads=3), given(fields=True)
    expected = run(net, net.new_cache(), [2] * 9, told)
    close(run(net, static(net), [2] * 9, told), expected)
    assert (run(net, static(net), [2] * 9, given()) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_what_cannot_be_is_one_line() -> None:
    net, told = denoiser(POLICIES[0]), given()
    with pytest.raises(ValueError, match="room for 10 more frames, the call has 11"):
        run(net, static(net), [11], told)
    with pytest.raises(ValueError, match="needs calls of one chunk"), torch.no_grad():
        noise = KeyedNoise([1, 2], SPEC)
        collect(rollout(net, fuse(chunked([2] * 4, SIGMAS)), conditioning=told, noise=noise, cache=static(net)))
    first, second = static(net), static(net)
    x, sigma = torch.zeros(2, 2, *SPEC.shape), torch.ones(2, 2)
    with torch.no_grad():
        net(x, sigma, told, cache=first)
        with pytest.raises(ValueError, match="commit takes 1 to 2 frames"):
            first.commit(3)
        net(x, sigma, told, cache=second)
    with pytest.raises(RuntimeError, match="another rollout has begun a call"):
        first.commit(2)
    with pytest.raises(ValueError, match="the call starts at frame 4, but the cache ends at frame 0"), torch.no_grad():
        net(x, sigma, told, cache=static(net), start=4)
    with pytest.raises(ValueError, match="made for 8 tokens a frame"), torch.no_grad():
        net(x[..., :4], sigma, told, cache=static(net))


def test_a_policy_may_answer_with_parts_of_what_is_held() -> None:
    """Views of the memory that is written over."""

    @dataclasses.dataclass(frozen=True)
    class Newest(DeepForcing):
        def settle(self, now: Any) -> list[Entries]:
            return [entries.part(max(0, len(entries) - 4 * now.tokens)) for entries in now.layers]

    net = denoiser(Newest(sink=1, budget=4, recent=3))
    close(run(net, static(net), [2] * 9, given()), run(net, net.new_cache(), [2] * 9, given()))


def test_e4m3_has_no_such_cache() -> None:
    net = denoiser(POLICIES[0])
    coarse = FastDiT(net.model, precision="fp8-attention")
    assert isinstance(coarse.new_cache(net.context, chunk=2, frames=None, batch=2, size=(4, 8)), TokenCache)
