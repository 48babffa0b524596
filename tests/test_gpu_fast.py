"""The inference path on a GPU: kernels, split attention, recordings, fp8 and decoding beside the next chunk."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import causalreel
from causalreel.control.strings import latent_poses, view_matrices
from causalreel.infer.accelerate import accelerate as accelerate_pipeline
from causalreel.infer.pipeline import Pipeline
from causalreel.nn import kernels
from causalreel.nn.caches import growing_cache
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.fp8_attention import PackedMemory, attend_packed
from causalreel.nn.masks import Context, frame_mask, frames_of
from causalreel.nn.policies.deep_forcing import DeepForcing
from causalreel.nn.policies.infinity_rope import InfinityRope
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.memrope import MemRope
from causalreel.nn.policies.relax_forcing import RelaxForcing
from causalreel.nn.policies.rolling_forcing import RollingForcing
from causalreel.nn.policies.rolling_sink import RollingSink
from causalreel.nn.presets import ModelConfig
from causalreel.nn.split_attention import attend_split
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.rollout import KeyedNoise, chunked, collect, fuse, rollout
from causalreel.serve.session import Options, Session
from causalreel.types import Conditioning, LatentSpec
from causalreel.weights.files import write_tensors

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

CONFIG = ModelConfig(dim=384, ffn_dim=768, heads=3, layers=3, text_dim=32, text_length=16, channels=16)
SPEC = LatentSpec(16, 16, 24)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def test_triton_kernels_are_the_formulas() -> None:
    from test_kernels import compare

    compare("cuda")


@pytest.mark.parametrize(("chunk", "frames", "window"), [(1, 2, None), (1, 9, None), (1, 9, 8), (3, 12, None)])
@pytest.mark.parametrize("samples", [1, 2])
def test_split_attention_is_attention(chunk: int, frames: int, window: int | None, samples: int) -> None:
    tokens, heads, width = 390, 12, 128
    context = Context(window=window)
    mask = frame_mask(
        frames_of((chunk, chunk), start=frames - 2 * chunk), frames_of((chunk,) * (frames // chunk)), context
    )
    q = torch.randn(samples, 2 * chunk * tokens, heads, width, device="cuda")
    k, v = torch.randn(2, samples, frames * tokens, heads, width, device="cuda")
    bias = None if mask is None else mask.dense(tokens, q.device)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias).transpose(1, 2)
    half = [x.bfloat16() for x in (q[None], k, v)]
    for rows in (mask, None):
        if rows is None:
            plain = (x.transpose(1, 2) for x in (q, k, v))
            expected = F.scaled_dot_product_attention(*plain).transpose(1, 2)
        found, _ = attend_split(*half, rows, tokens)
        assert relative(found, expected) < 5e-3
        values, scale = attend_split(*half, rows, tokens, quantised=True)
        assert scale is not None
        coarse = values.float().flatten(2).flatten(0, 1) * scale
        assert relative(coarse, expected.flatten(2).flatten(0, 1)) < 4e-2


def run(
    net: DiTDenoiser,
    *,
    chunk: int,
    frames: int,
    context: ContextPolicy,
    plan: str,
    seed: int,
    fields: dict[str, torch.Tensor] | None = None,
    reads: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """reads: which of the clip's texts each frame reads; None: there is one for all."""
    fast = net.run
    if isinstance(fast, FastDiT):
        cache = fast.new_cache(context, chunk=chunk, frames=frames, batch=1, size=(SPEC.height, SPEC.width))
    else:
        cache = growing_cache(context, CONFIG.layers)
    calls = chunked([chunk] * (frames // chunk), (1.0, 0.7), first=(1.0, 0.8, 0.5))
    texts = torch.randn(1, 3, 16, 32, generator=torch.Generator().manual_seed(seed)).cuda()
    told = Conditioning(texts[:, 0] if reads is None else texts, fields or {}, prompts=reads)
    with torch.no_grad():
        chunks = rollout(
            net,
            fuse(calls) if plan == "fused" else calls,
            conditioning=net.prepare(told),
            noise=KeyedNoise([seed], SPEC, "cuda"),
            cache=cache,
        )
        return collect(chunks)


@pytest.mark.parametrize("plan", ["plain", "fused"])
@pytest.mark.parametrize(("chunk", "frames", "window"), [(1, 5, None), (1, 9, 4), (3, 15, 9)])
def test_recorded_rollouts_are_the_networks(chunk: int, frames: int, window: int | None, plan: str) -> None:
    torch.manual_seed(0)
    net = DiTDenoiser(CONFIG).requires_grad_(False).cuda()
    torch.nn.init.normal_(net.model.head.head.weight, std=0.1)
    context = Context(window=window)
    half = copy.deepcopy(net).to(torch.bfloat16)
    fast = accelerate(copy.deepcopy(half))
    coarse = [accelerate(copy.deepcopy(half), precision=precision) for precision in ("fp8", "fp8-attention")]
    for seed in (0, 1):  # the second rollout replays, with another prompt and other noise
        how = {"chunk": chunk, "frames": frames, "context": context, "seed": seed}
        exact = run(net, plan="plain", **how)
        plain = relative(run(half, plan="plain", **how), exact)
        assert relative(run(fast, plan=plan, **how), exact) < max(1.2 * plain, 1e-3)
        for net8 in coarse:
            assert relative(run(net8, plan=plan, **how), exact) < 0.2


@pytest.mark.parametrize("plan", ["plain", "fused"])
@pytest.mark.parametrize(
    "context",
    [
        Context(window=6, sink=1, last_position=5),
        RollingSink(sink_chunks=3, recent_chunks=2),
        InfinityRope(cache_chunks=5, sink_chunks=1, last_position=6),
        DeepForcing(sink=2, budget=6, recent=2),
        RelaxForcing(sink=1, budget=6, recent=2),
        MemRope(sink=1, local=3),
        RollingForcing(window=6, sink=1, cache=7),
    ],
    ids=str,
)
def test_recorded_rollouts_at_moving_positions_are_the_networks(context: ContextPolicy, plan: str) -> None:
    """Replayed calls read their own frames, however long the video; its length brings no other kind of call."""
    if plan == "fused" and not context.fuses:
        pytest.skip("this policy reads finished chunks in calls of their own")
    torch.manual_seed(0)
    net = DiTDenoiser(CONFIG).requires_grad_(False).cuda()
    torch.nn.init.normal_(net.model.head.head.weight, std=0.1)
    half = copy.deepcopy(net).to(torch.bfloat16)
    fast, kinds = accelerate(copy.deepcopy(half)), []
    unrecorded = accelerate(copy.deepcopy(half), graphs=False)
    for seed, frames in ((0, 24), (1, 40)):
        how = {"chunk": 1, "frames": frames, "context": context, "seed": seed}
        made = run(fast, plan=plan, **how)
        assert relative(made, run(unrecorded, plan=plan, **how)) < 1e-3
        if not context.selects:  # what these choose in bfloat16 may be something else
            exact = run(net, plan="plain", **how)
            plain = relative(run(half, plan="plain", **how), exact)
            assert relative(made, exact) < max(1.2 * plain, 1e-3)
        kinds.append(len(fast.run.graphs.graphs))
    assert 0 < kinds[0] == kinds[1]


@pytest.mark.parametrize(
    "context",
    [DeepForcing(sink=2, budget=6, recent=2), RelaxForcing(sink=1, budget=6, recent=2), MemRope(sink=1, local=3)],
    ids=str,
)
def test_recorded_rollouts_choose_as_the_network_does(context: ContextPolicy) -> None:
    """In float32, where rounding changes no choice."""
    torch.manual_seed(0)
    net = DiTDenoiser(CONFIG).requires_grad_(False).cuda()
    torch.nn.init.normal_(net.model.head.head.weight, std=0.1)
    fast, how = accelerate(copy.deepcopy(net)), {"chunk": 1, "frames": 40, "context": context, "plan": "plain"}
    for seed in range(2):
        assert relative(run(fast, seed=seed, **how), run(net, seed=seed, **how)) < 1e-3


@pytest.mark.parametrize(("chunk", "frames", "window"), [(1, 9, 4), (2, 8, None)])
def test_recorded_rollouts_with_cameras_are_the_networks(chunk: int, frames: int, window: int | None) -> None:
    """Replayed calls take the cameras and keys of their own frames."""
    torch.manual_seed(0)
    net = DiTDenoiser(dataclasses.replace(CONFIG, camera="prope", actions=4)).requires_grad_(False).cuda()
    for name, weight in net.named_parameters():
        if name.endswith(("prope_o.weight", "action_embedding.2.weight", "head.head.weight")):
            torch.nn.init.normal_(weight, std=0.1)
    context = Context(window=window)
    half = copy.deepcopy(net).to(torch.bfloat16)
    fast = accelerate(copy.deepcopy(half))
    coarse = [accelerate(copy.deepcopy(half), precision=precision) for precision in ("fp8", "fp8-attention")]
    for seed, keys in ((0, "w*9"), (1, "l*4,d*5")):
        w2c = torch.from_numpy(view_matrices(latent_poses(keys, "minwm", latents=frames))).float()[None].cuda()
        fields = {
            "w2c": w2c,
            "intrinsics": torch.tensor([0.6, 0.9, 0.5, 0.5], device="cuda").expand(1, frames, 4),
            "actions": torch.randn(1, frames, 4, generator=torch.Generator().manual_seed(seed)).cuda(),
        }
        how = {"chunk": chunk, "frames": frames, "context": context, "seed": seed, "fields": fields}
        exact = run(net, plan="plain", **how)
        plain = relative(run(half, plan="plain", **how), exact)
        assert relative(run(fast, plan="fused", **how), exact) < max(1.2 * plain, 1e-3)
        for net8 in coarse:
            assert relative(run(net8, plan="fused", **how), exact) < 0.2


@pytest.mark.parametrize("plan", ["plain", "fused"])
@pytest.mark.parametrize(("chunk", "reads"), [(1, (0, 0, 0, 1, 1, 1, 1, 2, 2)), (3, (0,) * 3 + (1,) * 6 + (2,) * 6)])
def test_recorded_rollouts_with_text_by_chunk_are_the_networks(chunk: int, reads: tuple[int, ...], plan: str) -> None:
    """Replayed calls read the text of their own chunk, and a fused one both."""
    torch.manual_seed(0)
    net = DiTDenoiser(CONFIG).requires_grad_(False).cuda()
    torch.nn.init.normal_(net.model.head.head.weight, std=0.1)
    half = copy.deepcopy(net).to(torch.bfloat16)
    fast = accelerate(copy.deepcopy(half))
    coarse = [accelerate(copy.deepcopy(half), precision=precision) for precision in ("fp8", "fp8-attention")]
    for seed in (0, 1):
        how = {"chunk": chunk, "frames": len(reads), "context": Context(window=3 * chunk), "seed": seed}
        exact = run(net, plan="plain", reads=reads, **how)
        assert relative(run(net, plan="plain", **how), exact) > 0.01  # the texts tell
        plain = relative(run(half, plan="plain", reads=reads, **how), exact)
        assert relative(run(fast, plan=plan, reads=reads, **how), exact) < max(1.2 * plain, 1e-3)
        for net8 in coarse:
            assert relative(run(net8, plan=plan, reads=reads, **how), exact) < 0.2


def test_clips_made_in_turn_are_those_made_alone() -> None:
    """Two streams of one pipeline, chunk by chunk: they share recordings, and must not share what is in them."""
    pipeline = accelerate_pipeline(causalreel.load("tiny", device="cuda"))
    prompts = ("a large red circle moves right", "a small blue square moves up")
    alone = [torch.cat(list(pipeline.stream(prompt, seed=5)), 1).cpu() for prompt in prompts]
    for ahead in ((True, True), (True, False)):
        streams = [pipeline.stream(p, seed=5, ahead=a) for p, a in zip(prompts, ahead, strict=True)]
        parts = list(zip(*streams, strict=True))
        for index, expected in enumerate(alone):
            assert torch.allclose(torch.cat([part[index] for part in parts], 1).cpu(), expected, atol=0.02)


@pytest.mark.parametrize("parts", [1, 5])
def test_long_sums_in_e4m3_do_not_shrink(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values with a mean over 32760 keys: added in an 8-bit product's own precision, a third of it was lost."""
    monkeypatch.setattr("causalreel.nn.fp8_attention.parts_of", lambda *args: parts)
    torch.manual_seed(0)
    size = {"layers": 1, "heads": 2, "head_dim": 128, "tokens": 1560, "frames": 21, "batch": 1}
    memory = PackedMemory(**size, dtype=torch.bfloat16, device="cuda")
    k, v = torch.randn(2, 1, 32760, 2, 128, device="cuda")
    memory.store(0, memory.places, k, v + torch.randn(2, 128, device="cuda"))
    q = kernels.to_fp8(torch.randn(1, 1560, 2, 128, device="cuda"))
    found, _ = attend_packed(q, memory, 0, slice(0, 32760), None, 1560)
    k, v = memory.view(0, slice(0, 32760))
    exact = F.scaled_dot_product_attention(*(x.float().transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert relative(found, exact) < 6e-3


def test_streams_in_turn_record_nothing_of_their_own() -> None:
    """What one stream has recorded serves others that live at the same time; each has the memory in turn."""
    pipeline = accelerate_pipeline(causalreel.load("tiny", device="cuda"))
    graphs = pipeline.denoiser.run.graphs
    list(pipeline.stream("a large red circle moves right", seed=5))
    recorded = dict(graphs.graphs)
    assert recorded
    for _ in zip(*(pipeline.stream("a small blue square moves up", seed=seed) for seed in range(3)), strict=True):
        assert graphs.graphs == recorded
    graphs.release()
    list(pipeline.stream("a large red circle moves right", seed=5))
    assert graphs.graphs.keys() == recorded.keys()


def test_the_tiny_model_makes_the_same_video_accelerated_and_ahead() -> None:
    prompt = "a large red circle moves right"
    exact = causalreel.load("tiny", device="cpu").generate(prompt, seed=3)
    pipeline = accelerate_pipeline(causalreel.load("tiny", device="cuda"))
    for ahead in (False, True, True):
        video = torch.cat(list(pipeline.stream(prompt, seed=3, ahead=ahead)), 1).cpu()
        assert video.shape == exact.shape
        assert (video - exact).abs().mean() < 0.03  # bfloat16 against float32; another video differs by 0.3


def test_a_session_that_begins_chunks_early_makes_the_same_bits() -> None:
    """Decoded beside the next chunk's denoising, with commands between them."""
    pipeline = accelerate_pipeline(causalreel.load("tiny/frame-2step", device="cuda"))
    prompt = "a large red circle moves right"
    one, shown = Session(pipeline, Options(prompt)), []
    for chunk in range(30):
        if chunk % 6 == 2:
            one.command("prompt", text="a blue square moves left", mode=("switch", "recompute")[chunk % 4 // 2])
        shown.append(one.next_chunk(ahead=lambda: True).frames)
    again = [made.frames for made in Session.replay(pipeline, json.loads(json.dumps(one.record())))]
    assert all(torch.equal(a, b) for a, b in zip(again, shown, strict=True))


def test_strengths_of_loras_are_set_in_recorded_calls(tmp_path: Path) -> None:
    """In the memory that recordings read: as if the pipeline had been loaded with them, and back to the model alone."""
    place, layer = tmp_path / "style.safetensors", "blocks.0.self_attn.k"
    width = causalreel.load("tiny", device="cpu").export.model.dim
    pair = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0))
    write_tensors(place, {f"{layer}.lora_A.weight": 0.3 * pair[0], f"{layer}.lora_B.weight": 0.3 * pair[1].t()})

    def video(pipeline: Pipeline) -> torch.Tensor:
        return torch.cat(list(pipeline.stream("a large red circle moves right", seed=5)), 1).cpu()

    made = accelerate_pipeline(causalreel.load("tiny", device="cuda", loras=[(place, 1.0)]))
    strong = video(made)
    for strength in (0.4, 0.0):
        made.set_loras({"style": strength})
        fresh = accelerate_pipeline(causalreel.load("tiny", device="cuda", loras=[(place, strength)]))
        states = made.denoiser.state_dict(), fresh.denoiser.state_dict()
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        assert relative(video(made), video(fresh)) < 1e-2 < relative(video(made), strong)
