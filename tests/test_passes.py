"""Passes between convolutions: each source and sink against plain definitions, and the kernels against torch."""

from __future__ import annotations

import importlib
import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.codecs import passes
from causalreel.codecs.passes import Sink, Source, between, gather_head, phase_weights, spread_phases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHAPES = {"frames": (2, 4, 4, 6, 5), "pairs": (2, 2, 4, 6, 10), "winograd": (4, 2, 2, 4, 6, 5)}
SHAPES |= {"stacked": (2, 4, 4, 6, 15), "phases": (2, 4, 3, 4, 20)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def needs_triton() -> None:
    pytest.importorskip("triton")
    importlib.import_module("causalreel.codecs.triton_passes")


def run(backend: passes.Backend, source: str, sink: str | None, dtype: torch.dtype, fresh: bool) -> list[Tensor | None]:
    """One pass with everything in it -> frames, sink, state, pending."""
    pending, state = noise(2, 2, 4, 6, 5, seed=5).to(dtype), noise(2, 2, 4, 6, 5, seed=6).to(dtype)
    data = noise(*SHAPES[source]).to(dtype)
    first, more = (data[0], tuple(data[1:])) if source == "winograd" else (data, ())
    given = Source(source, first, noise(5, seed=1), pending, more)
    wanted = None if sink is None else Sink(sink, noise(5, seed=2) + 1, state)
    residual = noise(2, 4, 4, 6, 5, seed=3).to(dtype)
    kept, out = between(given, wanted, residual=residual, keep=True, fresh=fresh, backend=backend)
    return [kept, out, state, pending]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("sink", [None, "frames", "halo", "taps", "winograd", "alone", "wide"])
@pytest.mark.parametrize("source", SHAPES)
def test_kernels_do_what_torch_does(source: str, sink: str | None, fresh: bool) -> None:
    needs_triton()
    for got, wanted in zip(*(run(b, source, sink, torch.float32, fresh) for b in ("triton", "torch")), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None:
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("source", "sink"), [("winograd", "winograd"), ("frames", "halo"), ("phases", "taps")])
def test_kernels_in_bfloat16(source: str, sink: str) -> None:
    needs_triton()
    for got, wanted in zip(*(run(b, source, sink, torch.bfloat16, False) for b in ("triton", "torch")), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), wanted.float(), atol=0.02, rtol=0.01)


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("fresh", [False, True])
def test_head_kernel(times: int, fresh: bool) -> None:
    needs_triton()
    found = []
    for backend in ("triton", "torch"):
        pending = noise(2, 2, 3, 5, 6, seed=2) if times == 3 else None
        how = {"times": times, "pending": pending, "fresh": fresh, "scale": 0.3, "shift": 0.1, "backend": backend}
        found.append((gather_head(noise(88, 2 * 4 * 30), noise(3, seed=1), (2, 4, 5, 6), **how), pending))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("times", [1, 2])
def test_spreading_kernel(times: int) -> None:
    needs_triton()
    data = noise(2, 3, 4, 3, 4 * times * 5)
    for rectify in (False, True):
        got, wanted = (spread_phases(data, times, rectify=rectify, backend=b) for b in ("triton", "torch"))
        assert torch.equal(got, wanted) and got.shape == (2, 3 * times, 6, 4, 5)


def test_a_doubling_before_a_convolution_is_four_small_convolutions() -> None:
    x, weight = noise(2, 3, 4, 5), noise(7, 3, 3, 3, seed=1)
    wanted = F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, padding=1)
    y = F.conv2d(x, phase_weights(weight), padding=1).permute(0, 2, 3, 1).unsqueeze(1).contiguous()
    got, _ = between(Source("phases", y), None, keep=True)
    torch.testing.assert_close(got[:, 0].permute(0, 3, 1, 2), wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(spread_phases(y, 1, rectify=True), F.relu(got), atol=1e-5, rtol=0)
