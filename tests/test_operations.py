"""The counted operations are those that torch counts, pass by pass."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.masks import Context
from causalreel.nn.presets import ModelConfig, preset
from causalreel.rollout import KeyedNoise, chunk_sizes, chunked, collect, rollout
from causalreel.train import operations as ops
from causalreel.train.stages.ar_diffusion import ARDiffusionConfig
from causalreel.train.stages.causal_cd import CausalCDConfig
from causalreel.train.stages.causal_scm import CausalSCMConfig
from causalreel.train.stages.dmd import DMDConfig
from causalreel.train.stages.pretrain import PretrainConfig
from causalreel.types import Conditioning, LatentSpec

SIZE = ModelConfig(dim=64, ffn_dim=128, heads=2, layers=3, text_dim=32, text_length=8, freq_dim=32, channels=4)
CLIP = ops.Clip(6, LatentSpec(4, 8, 8))
WAN, WAN_CLIP = preset("wan-1.3b"), ops.Clip(21, LatentSpec(16, 60, 104))


def counted(run, *, grad: bool = False) -> int:
    """Attention as plain products, which is what torch counts on every device."""
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.MATH):
        out = run()
        if grad:
            out.sum().backward()
    return counter.get_total_flops()


def net(context: Context = Context()) -> DiTDenoiser:
    torch.manual_seed(0)
    return DiTDenoiser(SIZE, context=context, backend="sdpa")


def inputs(frames: int = CLIP.frames) -> tuple[torch.Tensor, torch.Tensor, Conditioning]:
    return torch.randn(1, frames, 4, 8, 8), torch.full((1, frames), 0.5), Conditioning(torch.randn(1, 5, 32))


def small(model: ModelConfig = SIZE) -> float:
    """What is left out: embeddings of text and time."""
    text = 2 * model.text_length * (model.text_dim * model.dim + model.dim**2)
    return text + 2 * 2 * CLIP.frames * (model.freq_dim * model.dim + 7 * model.dim**2)


def test_a_bidirectional_pass_and_its_gradient() -> None:
    x, sigma, conditioning = inputs()
    mine = ops.bidirectional(SIZE, CLIP)
    assert mine <= counted(lambda: net()(x, sigma, conditioning)) <= mine + small()
    whole = counted(lambda: net()(x, sigma, conditioning), grad=True)
    assert (1 + ops.BACKWARD) * mine * 0.98 <= whole <= (1 + ops.BACKWARD) * (mine + small())


def test_a_rollout() -> None:
    conditioning = inputs()[2]
    sizes, levels = chunk_sizes(CLIP.frames, 2), (1.0, 0.6, 0.3)
    for context in (Context(), Context(4)):
        model = net(context)
        noise = KeyedNoise([0], CLIP.latent)

        def run(model: DiTDenoiser = model, noise: KeyedNoise = noise) -> torch.Tensor:
            plan, prepared = chunked(sizes, levels), model.prepare(conditioning)
            return collect(rollout(model, plan, conditioning=prepared, noise=noise, cache=model.new_cache()))

        once = 4 * SIZE.dim**2 * SIZE.text_length * SIZE.layers  # a prepared text is projected once
        calls = len(sizes) * len(levels) + len(sizes) - 1
        mine = ops.rolled_out(SIZE, CLIP, sizes, context, len(levels)) - (calls - 1) * once
        assert mine <= counted(run) <= mine + calls * small()


def test_pairs_that_see_each_other() -> None:
    """The numbers of the measurements that training at size is compared with."""
    for chunk, pairs, tflop in ((3, 504, 1188), (1, 462, 1132)):
        sizes = chunk_sizes(21, chunk)
        both = ops.frames_of(sizes, stream=0) + ops.frames_of(sizes, stream=1)
        assert ops._pairs(both, both, Context()) == pairs
        work = ops.step_work(ARDiffusionConfig(batch=1, chunk=chunk), {"student": WAN}, WAN_CLIP)
        assert work is not None
        assert work.flop / 1e12 == pytest.approx(tflop, rel=2e-3)
        assert work.tokens == 42 * 1560


def test_stages() -> None:
    one = {"student": SIZE, "teacher": SIZE, "critic": SIZE}
    sizes = chunk_sizes(6, 3)
    forced, whole = ops.teacher_forced(SIZE, CLIP, sizes, Context()), ops.bidirectional(SIZE, CLIP)

    def flop(settings: object, roles: dict[str, ModelConfig] = one) -> float:
        work = ops.step_work(settings, roles, CLIP)
        assert work is not None
        return work.flop

    assert flop(PretrainConfig(batch=2)) == pytest.approx(6 * whole)
    assert flop(ARDiffusionConfig(batch=1)) == pytest.approx(3 * forced)
    assert flop(ARDiffusionConfig(batch=1, forcing="diffusion")) == pytest.approx(
        3 * ops.causal(SIZE, CLIP, sizes, Context())
    )
    assert flop(CausalCDConfig(batch=1)) == pytest.approx(6 * forced)
    assert flop(CausalCDConfig(batch=1, guidance=1.0)) == pytest.approx(5 * forced)
    assert flop(CausalSCMConfig(batch=1)) == pytest.approx(7 * forced)  # a derivative is two passes
    base = flop(DMDConfig(batch=1))
    assert flop(DMDConfig(batch=1, critic_updates=6)) - base == pytest.approx(
        3 * whole + ops.rolled_out(SIZE, CLIP, sizes, Context(), 2.5)
    )
    assert flop(DMDConfig(batch=1, exits="last")) - base == pytest.approx(
        6 * (ops.rolled_out(SIZE, CLIP, sizes, Context(), 4) - ops.rolled_out(SIZE, CLIP, sizes, Context(), 2.5))
    )
    once = ops.rolled_out(SIZE, CLIP, sizes, Context(), 3) - ops.rolled_out(SIZE, CLIP, sizes, Context(), 2)
    first = (
        once - ops.rolled_out(SIZE, CLIP, sizes, Context(), 3, 3) + ops.rolled_out(SIZE, CLIP, sizes, Context(), 3, 2)
    )
    two = {"batch": 1, "steps": (1000, 500), "first_steps": (1000, 750, 500, 250)}
    turns = flop(DMDConfig(**two, exits="in_turn")) - flop(DMDConfig(**two))  # 1, 2, 2, 2 calls in place of 1, 2
    assert turns == pytest.approx(6 * first / 4)
    context = once - first  # the first chunk is committed once, the second one never
    assert flop(DMDConfig(batch=1)) - flop(DMDConfig(batch=1, noisy_from=0)) == pytest.approx(6 * context / 4)
    assert flop(DMDConfig(batch=1, noisy_from=1)) == base
    rollout = ops.rolled_out(SIZE, CLIP, sizes, Context(), 2.5)
    assert base - flop(DMDConfig(batch=1, critic_repeats=5)) == pytest.approx(4 * rollout)
    assert base - flop(DMDConfig(batch=1, critic_repeats=5, student_samples="critic")) == pytest.approx(5 * rollout)
    larger = flop(DMDConfig(batch=1), {**one, "teacher": replace(SIZE, layers=6)})
    assert larger - base == pytest.approx(2 * (ops.bidirectional(replace(SIZE, layers=6), CLIP) - whole))
    assert ops.step_work(object(), {}, CLIP) is None


def test_peaks_by_name() -> None:
    assert ops.peak_of("NVIDIA H200") == ops.peak_of("NVIDIA H100 80GB HBM3") == 989.4
    assert ops.peak_of("NVIDIA H100 PCIe") is None
    assert ops.peak_of("Some GPU") is None
