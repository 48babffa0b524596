"""The memory estimate against real tensors and torch's own record of allocations; what is said if it is too much."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from causalreel import cli
from causalreel.codecs.wan_vae import CausalVAE, VAEConfig
from causalreel.infer.estimate import (
    Estimate,
    Request,
    activation_bytes,
    cache_bytes,
    decoder_bytes,
    estimate,
    table,
    table_bytes,
    text_bytes,
    umt5_bytes,
    weight_bytes,
)
from causalreel.infer.estimate_fast import estimate_fast
from causalreel.infer.fits import check, require_bfloat16
from causalreel.infer.models import request_for
from causalreel.infer.outline import Held
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.dit import DiT
from causalreel.nn.masks import Context
from causalreel.nn.presets import ModelConfig, preset
from causalreel.nn.rope import rope_table
from causalreel.rollout import KeyedNoise, chunked, fuse, rollout
from causalreel.types import Conditioning, LatentSpec

MODEL = ModelConfig(dim=96, ffn_dim=400, heads=4, layers=5, text_dim=8, text_length=4, freq_dim=32, channels=4)
LATENT = LatentSpec(4, 16, 24)
SMALL = Request(MODEL, LatentSpec(4, 4, 6), chunk=2, frames=8, decoder="none", dtype="float32")
WAN = Request(preset("wan-1.3b"), LatentSpec(16, 60, 104))


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def roll(request: Request, observe: Callable[..., None] | None = None, device: str = "cpu") -> tuple[Any, Any]:
    """A real rollout -> the cache at its end, and the text keys."""
    torch.manual_seed(0)
    dtype = getattr(torch, request.dtype)
    net = DiTDenoiser(request.model, context=Context(window=request.window)).to(device, dtype).requires_grad_(False)
    text = torch.randn(request.rows, request.model.text_length, request.model.text_dim, device=device)
    noise = KeyedNoise([0] * request.rows, request.latent, device)
    assert request.frames is not None
    plan = chunked([request.chunk] * (request.frames // request.chunk), (1.0, 0.5))
    with torch.no_grad():
        told, cache = net.prepare(Conditioning(text)), net.new_cache()
        plan = fuse(plan) if request.fused else plan
        for _ in rollout(net, plan, conditioning=told, noise=noise, cache=cache, observe=observe):
            pass
    return cache, [told.prepared.pairs[layer] for layer in range(request.model.layers)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny", "tiny-smoke"])
def test_weights_are_those_of_the_network(name: str, dtype: str) -> None:
    net = DiT(preset(name)).to(getattr(torch, dtype))
    assert weight_bytes(preset(name), dtype) == bytes_of(*net.state_dict().values())


def test_weights_of_the_full_sizes() -> None:
    assert weight_bytes(preset("wan-1.3b"), "bfloat16") == 2 * 1_418_996_800
    linear = sum(m.weight.numel() for m in DiT(MODEL).blocks.modules() if isinstance(m, nn.Linear))  # type: ignore[attr-defined]
    assert weight_bytes(MODEL, "bfloat16") - weight_bytes(MODEL, "fp8") == linear
    assert umt5_bytes() == 2 * 5_680_910_336


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize(
    "change", [{}, {"window": 4}, {"window": 5, "batch": 2}, {"chunk": 1}, {"chunk": 8}, {"dtype": "bfloat16"}], ids=str
)
def test_cache_fresh_and_text_keys_are_the_real_ones(change: dict[str, Any], fused: bool) -> None:
    """Of the last call that is at a fused call's width, exactly: what the cache has and what it holds besides."""
    request = replace(SMALL, fused=fused, **change)
    calls = []
    net_cache: list[Any] = []

    def spy(call: Any, x: torch.Tensor, velocity: torch.Tensor) -> None:
        cache = net_cache[0]
        keys = [tensor for tensor in (*cache.keys, *cache.values) if tensor is not None]
        calls.append((bytes_of(*keys), bytes_of(*(t for pair in cache._fresh.values() for t in pair))))

    original = DiTDenoiser.new_cache

    def new_cache(self: DiTDenoiser) -> Any:
        net_cache.append(original(self))
        return net_cache[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiTDenoiser, "new_cache", new_cache)
        _, prepared = roll(request, spy)
    cached, fresh = max(calls, key=sum)
    assert cache_bytes(request, request.kept) == cached
    assert cache_bytes(request, request.fresh) == fresh
    assert text_bytes(request) == bytes_of(*(t for pair in prepared for t in pair))


def allocated(work: Callable[[], Any]) -> int:
    """Most bytes that torch's CPU allocator had given out at once during `work`, by its own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    now = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "change",
    [{}, {"window": 6}, {"chunk": 1}, {"batch": 2}, {"model": replace(MODEL, layers=20)}],
    ids=lambda c: str(c)[:12],
)
def test_activations_are_within_a_tenth_of_the_allocators_record(change: dict[str, Any]) -> None:
    request = replace(SMALL, latent=LATENT, fused=False, frames=12, **change)
    net_bytes = weight_bytes(request.model, "float32")
    found = estimate(request)
    expected = found.cache + found.fresh + found.activations + found.text_keys
    rope_table.cache_clear()
    expected += found.tables
    real = allocated(lambda: roll(request)) - net_bytes
    assert found.activations > 0.05 * expected  # there is something to compare
    assert abs(real - expected) < 0.1 * expected, (real, expected)


def test_many_blocks_are_as_if_all_had_been_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both where the calls are the widest point and where the commits are."""
    for layers, tokens in ((6, 24), (14, 24), (14, 4)):
        request = replace(SMALL, model=replace(MODEL, layers=layers), latent=LatentSpec(4, 4, tokens))
        found = activation_bytes(request)
        with monkeypatch.context() as patch:
            patch.setattr("causalreel.infer.estimate.FEW", layers)
            assert found == activation_bytes(request)


def test_what_a_stand_in_for_other_processes_holds() -> None:
    """Two GPUs hold about half of everything but weights and text keys."""
    one, two = (estimate(replace(WAN, gpus=n, decoder="none")) for n in (1, 2))
    assert two.cache * 2 == one.cache and two.fresh * 2 == one.fresh
    assert two.weights == one.weights and two.text_keys == one.text_keys
    assert 0.45 < two.activations / one.activations < 0.65


def test_rotary_tables_are_the_real_ones() -> None:
    for request in (SMALL, replace(SMALL, fused=False), replace(SMALL, chunk=1)):
        made: list[tuple] = []

        def spy(*key: Any, made: list[tuple] = made) -> Any:
            made.append(key)
            return rope_table(*key)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("causalreel.nn.dit.rope_table", spy)
            roll(request)
        assert table_bytes(request) == sum(bytes_of(*rope_table(*key)) for key in set(made))
    endless = replace(SMALL, frames=None, window=4)
    assert table_bytes(endless) == 64 * 3 * endless.tokens * 24 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoder_against_a_real_stream(dtype: str) -> None:
    config = VAEConfig(dim=8, z=4)
    request = replace(SMALL, decoder=config, decoder_dtype=dtype, latent=LATENT)
    codec = CausalVAE(config).to(getattr(torch, dtype)).requires_grad_(False)
    weights, state, workspace = decoder_bytes(request)
    assert weights == bytes_of(*codec.parameters(), *codec.buffers())
    stream = codec.stream()

    def three() -> None:
        for _ in range(3):
            stream(torch.randn(1, 2, *LATENT.shape))

    real = allocated(three)
    assert state == bytes_of(*stream._history.values())
    assert abs(real - state - workspace) < 0.1 * real, (real, state, workspace)


def test_peak_is_the_sum_of_what_stays_and_the_larger_of_what_passes() -> None:
    names = [name for name, _ in estimate(SMALL).parts()]
    parts = dict.fromkeys(names, 1) | {"activations": 10, "decoder_workspace": 7}
    assert len(names) == 11
    assert Estimate(**parts, overlap=False).peak == 9 + 10
    assert Estimate(**parts, overlap=True).peak == 9 + 17


def test_held_counts_what_is_alive() -> None:
    with Held("cpu") as held:
        x = torch.empty(100)
        view, y = x[10:], x + 1
        assert held.now == 800
        del x
        assert held.now == 800  # the view keeps it
        del view, y
        assert held.now == 0 and held.peak == 800


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"window": 1}, "window must hold the chunk's 2 frames"),
        ({"frames": None}, "endless clip needs a window"),
        ({"frames": 7}, "multiple of the chunk's 2"),
        ({"gpus": 3}, "gpus must divide the 4 heads"),
        ({"latent": LatentSpec(4, 5, 6)}, "sides that the patch"),
        ({"decoder": "jpeg"}, "decoder must be wan, taehv or none"),
    ],
)
def test_impossible_requests(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        estimate(replace(SMALL, **change))


def test_too_little_memory_says_how_much_and_what_helps() -> None:
    found = estimate(WAN)
    assert check(WAN, found.peak) == found
    least = min(found, estimate_fast(WAN), key=lambda one: one.peak)
    assert importlib.util.find_spec("triton") is None or (
        least.peak < found.peak - 2**30 and check(WAN, least.peak) == least
    )  # accelerated it fits
    with pytest.raises(ValueError) as caught:
        check(WAN, least.peak - 2**30, where="a small GPU")
    message = str(caught.value)
    assert f"{least.peak / 2**30:.1f} GiB are needed" in message and "free on a small GPU, 1.0 GiB too few" in message
    two = estimate(replace(WAN, gpus=2)).peak
    assert f"2 GPUs ({two / 2**30:.1f} GiB)" in message and "--decode-device" in message
    assert "\n" not in message
    with pytest.raises(ValueError, match="the text encoder on the CPU"):
        check(replace(WAN, text_encoder="gpu"), found.peak)


def test_a_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    require_bfloat16(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"Tesla T4 \(compute capability 7.5\) has no bfloat16"):
        require_bfloat16(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    require_bfloat16(torch.device("cuda"))


def test_a_model_that_does_not_fit_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from causalreel.infer import models

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a very small GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**25, 2**26))
    with pytest.raises(ValueError, match=r"not enough memory: .* a very small GPU"):
        models._check_memory(models.find("tiny"), torch.device("cuda"))
    models._check_memory(models.find("tiny"), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**31, 2**32))
    models._check_memory(models.find("tiny"), torch.device("cuda"))


def test_requests_by_name() -> None:
    plain = {"height": None, "width": None, "frames": None}
    assert request_for("wan-1.3b", **plain) == WAN
    long = request_for("wan-14b", height=720, width=1280, frames=0, window=21, chunk=1)
    assert long.latent == LatentSpec(16, 90, 160) and long.frames is None and long.window == 21 and long.chunk == 1
    tiny = request_for("tiny", **plain)
    assert tiny.model == preset("tiny") and tiny.frames == 12 and isinstance(tiny.decoder, VAEConfig)
    assert tiny.dtype == "float32" and tiny.text_encoder == "none" and tiny.chunk == 1
    released = request_for("causal-forcing/framewise-2step", **plain, decoder="taehv")
    assert released == replace(WAN, chunk=1, decoder="taehv")
    assert request_for("causal-forcing/longvideo", **plain).window == 21
    assert request_for("causal-forcing/framewise-ar-diffusion", **plain).guided


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "--decoder", "none", "--frames", "9", "--height", "64", "--width", "64"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["weights", "2.643", "GiB"] and lines[-1].startswith("peak")
    for arguments, said in [(["--height", "500"], "multiple of 16"), (["--frames", "80"], "1 + 4 (n - 1)")]:
        assert cli.main(["estimate", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("causalreel: error:") and error.count("\n") == 1 and said in error


def test_memory_that_runs_out_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(args: Any) -> int:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB.")

    monkeypatch.setitem(cli.COMMANDS, cli.EstimateMemory, full)
    assert cli.main(["estimate"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("causalreel: error: CUDA out of memory. Tried") and error.count("\n") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("chunk", [1, 3])
def test_the_peak_on_a_gpu(chunk: int) -> None:
    """1.3B with a third of its blocks at 480x832, without decoding: torch's own peak within a tenth."""
    model = replace(preset("wan-1.3b"), layers=10)
    request = replace(WAN, model=model, chunk=chunk, frames=12, window=9, fused=False, decoder="none")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    roll(request, device="cuda")
    real = torch.cuda.max_memory_allocated() - before
    assert abs(real - estimate(request).peak) < 0.1 * real, (real, estimate(request))


def test_what_torch_counts_leaves_out_what_recordings_keep() -> None:
    parts = dict.fromkeys((name for name, _ in estimate(SMALL).parts()), 0)
    parts |= {"weights": 10, "cache": 50, "activations": 3, "decoder_state": 2, "decoder_workspace": 20}
    plain = Estimate(**parts, overlap=True)
    assert plain.peak == plain.tensors == 85
    recorded = replace(plain, recorded=True)
    assert recorded.peak == 85 and recorded.tensors == 65  # while the network's calls are recorded
    small = replace(recorded, cache=1)
    assert small.tensors == 32  # while the decoder's are, before the cache is there
    assert "of it in tensors" in table(small) and "of it in tensors" not in table(plain)
    assert estimate_fast(replace(SMALL, dtype="bfloat16", decoder="none", frames=12)).recorded


@pytest.mark.parametrize(("chunk", "window"), [(1, None), (3, None), (1, 4), (2, 6)])
def test_the_accelerated_estimate_counts_what_the_accelerated_code_holds(chunk: int, window: int | None) -> None:
    """Cache memory exactly; what recordings would hold for each kind of call; and working memory that grows with it."""
    from causalreel.nn.static_cache import StaticCache

    request = replace(SMALL, chunk=chunk, frames=12, window=window, dtype="bfloat16", decoder="none")
    found = estimate_fast(request)
    places = StaticCache.places(Context(window=window), chunk, 12)
    rows, tokens, model = request.rows, request.tokens, request.model
    keys = 2 * model.layers * rows * places * tokens * model.dim * 2
    assert found.cache == keys + 2 * places * tokens * 8  # and the rows of the memory, int64
    assert found.fresh == 0 and found.activations > 0 and found.tables > 0
    hidden = rows * request.fresh * tokens * model.ffn_dim * 2
    assert hidden < found.activations < 40 * hidden
    packed = estimate_fast(replace(request, dtype="fp8-attention"))
    columns = -(-places * tokens // 128) * 128
    each = model.layers * rows * model.dim
    assert packed.cache == each * (places * tokens + columns) + 8 * (2 * places * tokens + columns)
    double = estimate_fast(replace(request, batch=2 * request.batch))
    assert 1.5 < double.activations / found.activations < 2.5 and double.cache > 1.9 * found.cache


def test_a_released_model_is_refused_by_a_gpu_too_small_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from causalreel.infer.models import _check_released
    from causalreel.weights.registry import MODELS

    export, device = MODELS["causal-forcing/chunkwise"].export(), torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a small one")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * 2**30, 8 * 2**30))
    with pytest.raises(
        ValueError, match=r"1[0-9]\.[0-9] GiB are needed and 8\.0 GiB free on a small one.*--decoder taehv"
    ):
        _check_released(export, device, decoder="wan", gpus=1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (22 * 2**30, 24 * 2**30))
    _check_released(export, device, decoder="wan", gpus=1)
