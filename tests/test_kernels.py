"""Fused pointwise kernels: Triton's interpreter gives what the formulas give, and these what the network computes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from causalreel.nn import kernels
from causalreel.nn.camera_kernels import norm_see, see_out
from causalreel.nn.dit import RMSNorm, modulate
from causalreel.nn.fp8_attention import PackedMemory, attend_packed
from causalreel.nn.masks import Context, frame_mask, frames_of
from causalreel.nn.rope import rope_table, rotate
from causalreel.nn.split_attention import Rectangle, groups_of
from patience import PATIENCE_S

ROOT = Path(__file__).resolve().parents[1]


def test_residual_norm_is_the_blocks_arithmetic() -> None:
    torch.manual_seed(0)
    batch, frames, tokens, width = 2, 3, 5, 24
    x, branch = torch.randn(2, batch, frames, tokens, width)
    gate, scale, shift = torch.randn(3, frames, width)
    total, y, _ = kernels.residual_norm(
        x.flatten(0, 2),
        scale + 1,
        shift,
        eps=1e-6,
        tokens=tokens,
        branch=branch.flatten(0, 2),
        gate=gate,
    )
    expected = x + gate[None, :, None] * branch
    assert torch.allclose(total.view_as(x), expected, atol=1e-6)
    normed = modulate(expected, shift.expand(batch, -1, -1), scale.expand(batch, -1, -1), 1e-6)
    assert torch.allclose(y.view_as(x), normed, atol=1e-5)


def test_norm_rotate_is_the_blocks_arithmetic() -> None:
    torch.manual_seed(0)
    heads, width, eps = 3, 36, 1e-6
    qkv = torch.randn(2, 2 * 4, 3 * width)
    norms = [RMSNorm(width, eps), RMSNorm(width, eps)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    cos, sin = rope_table((3, 7), 2, 2, width // heads, torch.device("cpu"))
    weights = [norm.weight.detach() for norm in norms]
    q, k, v = kernels.norm_rotate(qkv, *weights, cos[:, 0], sin[:, 0], heads=heads, eps=eps)
    for got, norm, part in ((q, norms[0], qkv[..., :width]), (k, norms[1], qkv[..., width : 2 * width])):
        expected = rotate(norm(part).unflatten(-1, (heads, -1)), cos, sin)
        assert torch.allclose(got, expected, atol=1e-5)
    assert torch.equal(v, qkv[..., 2 * width :].unflatten(-1, (heads, -1)))


def test_gathered_keys_are_those_rotated_where_they_are_read() -> None:
    torch.manual_seed(0)
    heads, width, eps = 3, 36, 1e-6
    qkv, norm = torch.randn(2, 2 * 4, 3 * width), RMSNorm(width, eps)
    weights = torch.randn(width), torch.nn.init.normal_(norm.weight).detach()
    cos, sin = (part[:, 0] for part in rope_table((9, 4), 2, 2, width // heads, torch.device("cpu")))
    memory = torch.full((2, 2, 16, heads, width // heads), float("nan"))
    slots = torch.tensor([12, 13, 14, 15, 4, 5, 6, 7])
    where = {"keys": memory[0], "values": memory[1], "slots": slots, "eps": eps, "turns_keys": False}
    q = kernels.norm_rotate_into(qkv, *weights, cos, sin, **where)
    assert torch.equal(q[0], kernels.norm_rotate(qkv, *weights, cos, sin, heads=heads, eps=eps)[0])
    turn = rope_table((0, 7), 2, 2, width // heads, torch.device("cpu"))  # the second frame first
    rows = torch.tensor([4, 5, 6, 7, 12, 13, 14, 15])
    k, v = kernels.gather_turned(memory[0], memory[1], rows, *(part[:, 0] for part in turn))
    plain = norm(qkv[..., width : 2 * width]).unflatten(-1, (heads, -1))
    back = [4, 5, 6, 7, 0, 1, 2, 3]
    assert torch.allclose(k, rotate(plain[:, back], *turn), atol=1e-5)
    assert torch.equal(v, qkv[:, back, 2 * width :].unflatten(-1, (heads, -1)))


def test_merging_parts_is_attention_over_all_keys() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 12, 8)  # (N,L,D)
    scores = q @ k.transpose(1, 2) / 8**0.5
    parts = []
    for keys in (slice(0, 4), slice(4, 7), slice(7, 12)):
        out = scores[..., keys].softmax(-1) @ v[:, keys]
        parts.append((out.transpose(0, 1)[None], scores[..., keys].logsumexp(-1)[None]))
    first = tuple(torch.cat(pair) for pair in zip(parts[0], parts[1], strict=True))
    merged = torch.empty(12, 2, 8)
    kernels.merge([(first[0], first[1]), parts[2]], merged)
    expected = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
    assert torch.allclose(merged, expected, atol=1e-6)


def test_quantised_rows_keep_three_bits_and_their_largest_entry() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 64) * torch.logspace(-3, 3, 16)[:, None]
    values, scale = kernels.quantise_rows(x)
    back = values.float() * scale
    assert values.dtype == kernels.FP8 and scale.shape == (16, 1)
    assert ((back - x).abs() <= 2**-4 * x.abs() + scale * 2**-9).all()  # half a step, or of the smallest number
    largest = x.abs().argmax(1, keepdim=True)
    assert torch.allclose(back.gather(1, largest), x.gather(1, largest), rtol=1e-6)
    zeros, scale = kernels.quantise_rows(torch.zeros(2, 8))
    assert (zeros.float() == 0).all() and scale.isfinite().all()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_triton_kernels_are_the_formulas() -> None:
    """In a process of its own: the interpreter must be chosen before Triton is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr


def compare(device: str = "cpu") -> None:
    """Every kernel against its formula, most of them with poisoned outputs."""
    torch.manual_seed(0)
    batch, frames, tokens, heads, dim = 2, 2, 3, 3, 8
    width = heads * dim

    def formula(function, *args, **how):
        chosen, kernels.uses_triton = kernels.uses_triton, lambda x: False
        try:
            return function(*args, **how)
        finally:
            kernels.uses_triton = chosen

    def check(name: str, got, expected, *, atol: float = 1e-5) -> None:
        for a, b in zip(got, expected, strict=True):
            assert (a is None) == (b is None), name
            if a is not None:
                assert a.dtype == b.dtype and a.shape == b.shape, name
                error = (a.float() - b.float()).abs().max().item()
                assert error <= atol * max(1.0, b.float().abs().max().item()), f"{name}: {error}"

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device)

    rows = batch * frames * tokens
    x, branch, gate = normal(rows, width), normal(rows, width), normal(frames, width)
    for scale, shift in ((normal(frames, width), normal(frames, width)), (normal(width), normal(width))):
        for together in (2, 4):  # rows of one frame that are handled together
            rows4 = frames * together
            args = normal(batch * rows4, width), scale, shift
            how = {"eps": 1e-6, "tokens": together, "branch": normal(batch * rows4, width), "gate": gate}
            check("residual_norm", kernels.residual_norm(*args, **how), formula(kernels.residual_norm, *args, **how))
        for how in ({}, {"branch": branch}, {"branch": branch, "gate": gate}):
            args = (x, scale, shift)
            how = {**how, "eps": 1e-6, "tokens": tokens}
            check("residual_norm", kernels.residual_norm(*args, **how), formula(kernels.residual_norm, *args, **how))
    length = frames * tokens
    qkv, weights = normal(batch, length, 3 * width), (normal(width), normal(width))
    turn = normal(length, dim // 2), normal(length, dim // 2)
    args, how = (qkv, *weights, *turn), {"heads": heads, "eps": 1e-6}
    check("norm_rotate", kernels.norm_rotate(*args, **how), formula(kernels.norm_rotate, *args, **how))
    found = []
    for run in (lambda f, *a, **k: f(*a, **k), formula):
        buffer = torch.full((2, batch, 9, heads, dim), -7.0, device=device)
        slots = torch.tensor([8, 0, 3, 1, 2, 6], device=device)
        where = {"keys": buffer[0], "values": buffer[1], "slots": slots, "eps": 1e-6, "copies": 3}
        found.append((run(kernels.norm_rotate_into, *args, **where), buffer))
    check("norm_rotate_into", *found)
    found = []
    for run in (lambda f, *a, **k: f(*a, **k), formula):
        buffer = torch.full((2, batch, 9, heads, dim), -7.0, device=device)
        where = {"keys": buffer[0], "values": buffer[1], "slots": slots, "eps": 1e-6, "turns_keys": False}
        queries = run(kernels.norm_rotate_into, *args, **where)
        rows = torch.tensor([3, 8, 8, 0, 6], device=device)
        turns = (part[:5].contiguous() for part in turn)
        found.append((queries, buffer, *run(kernels.gather_turned, *buffer, rows, *turns)))
    check("gather_turned", *found)
    rows = torch.stack([torch.randperm(9)[:5] for _ in range(batch)]).to(device)  # each sample has turns of its own
    turns = [part[rows % length].contiguous() for part in turn]
    found = []
    for run in (lambda f, *a, **k: f(*a, **k), formula):
        buffer = torch.full((2, batch, 9, heads, dim), -7.0, device=device)
        buffer[0] = torch.arange(buffer[0].numel(), device=device).view(buffer[0].shape) % 13 - 6.0
        one_row = buffer[0][:, :1].expand(-1, 5, -1, -1)
        spread = run(
            kernels.turn_into, one_row, *turns, torch.empty_like(one_row, memory_format=torch.contiguous_format)
        )
        found.append((spread, run(kernels.turn_into, buffer[0][:, 1:6], *turns, buffer[1][:, 3:8]), buffer))
    check("turn_into", *found)
    check("norm_rows", [kernels.norm_rows(x, weights[0], 1e-6)], [formula(kernels.norm_rows, x, weights[0], 1e-6)])
    part = normal(4, length, heads, dim), normal(4, heads, length)
    extra = normal(1, length, heads, dim), 3 * normal(1, heads, length)
    for parts in ([part], [part, extra], [(part[0][:, tokens:], part[1][:, :, tokens:])]):
        got = torch.full((2, *parts[0][0].shape[1:]), -7.0, device=device)
        kernels.merge(parts, got[0])
        formula(kernels.merge, parts, got[1])
        check("merge", [got[0]], [got[1]])
    check("gelu", kernels.gelu(x), formula(kernels.gelu, x))
    high = x.clone()
    high[:, -1] = 40  # in the smaller piece of a row
    scale = kernels.gelu(high, quantised=True)[1]
    assert scale is not None and torch.allclose(scale, torch.full_like(scale, 40 / 448)), "gelu, scale"
    compare_cameras(device, formula, check)
    compare_writing(device, formula)
    compare_attention(device, formula)
    if device == "cuda":
        for name, function, args, how in (
            ("residual_norm", kernels.residual_norm, (x, gate, gate), {"eps": 1e-6, "tokens": tokens}),
            ("gelu", kernels.gelu, (x,), {}),
        ):
            got = function(*args, **how, quantised=True)[-2:]
            expected = formula(function, *(a.cpu() for a in args), **how, quantised=True)[-2:]
            alike(name, got, expected)
        for where in ("cuda", "cpu"):
            out = torch.zeros(length, heads, dim, dtype=kernels.FP8, device=where)
            scale = torch.zeros(length, 1, device=where)
            parts = [tuple(t.to(where) for t in pair) for pair in (part, extra)]
            (kernels.merge if where == "cuda" else lambda *a: formula(kernels.merge, *a))(parts, out, scale)
            if where == "cuda":
                got = out, scale
            else:
                alike("merge", got, (out, scale))


def compare_cameras(device: str, formula: Callable, check: Callable) -> None:
    """Heads and their twins, in rows of their own and in a cache; and what they read, on its way out."""
    batch, frames, tokens, heads, dim = 2, 3, 4, 3, 8
    width, length = heads * dim, frames * tokens
    qkv = torch.randn(batch, length, 3 * width, device=device)
    weights = torch.randn(2, width, device=device)
    turn = torch.randn(2, length, dim // 2, device=device)
    views = torch.randn(2, batch, frames, 4, 4, device=device)
    for turns_keys in (True, False):
        args, how = (qkv, *weights, *turn, *views), {"heads": heads, "eps": 1e-6, "turns_keys": turns_keys}
        check("norm_see", norm_see(*args, **how), formula(norm_see, *args, **how))
    found = []
    for run in (lambda f, *a, **k: f(*a, **k), formula):
        buffer = torch.full((2, batch, 15, 2 * heads, dim), -7.0, device=device)
        slots = torch.tensor([8, 0, 3, 1, 2, 6, 14, 10, 11, 13, 4, 7], device=device)
        found.append(run(norm_see, *args, heads=heads, eps=1e-6, copies=3, into=(*buffer, slots)))
    check("norm_see, into a cache", *found)
    attended = torch.randn(batch, length, 2 * heads, dim, device=device)
    check("see_out", [see_out(attended, views[0])], [formula(see_out, attended, views[0])])


def packed_memory(device: str, tokens: int) -> PackedMemory:
    size = {"layers": 1, "heads": 2, "head_dim": 32, "tokens": tokens, "frames": 5, "batch": 2}
    return PackedMemory(**size, dtype=torch.bfloat16 if device == "cuda" else torch.float32, device=device)


def rounding(device: str) -> float:
    """Ties may round the other way; Triton's interpreter makes 1 of 1.95."""
    return 0.01 if device == "cuda" else 0.12


def compare_writing(device: str, formula: Callable) -> None:
    """Keys and values in e4m3: two runs of frames, whose columns begin within 16 and reach into a further block."""
    tokens, found = 252, []
    qkv, weights = torch.randn(2, 2 * tokens, 3 * 64, device=device), torch.randn(2, 64, device=device)
    weights[1] += 500  # keys that e4m3 cannot hold
    qkv[:, 3] *= 1e4  # and values
    turn = torch.randn(2, 2 * tokens, 16, device=device)
    for where in (lambda f, *a, **k: f(*a, **k), formula):
        memory = packed_memory(device, tokens)
        k, v = torch.ones(2, 2, 5 * tokens, 2, 32, device=device)
        memory.store(0, memory.places, k, v)
        slots = torch.cat([memory.places[3 * tokens : 4 * tokens], memory.places[tokens : 2 * tokens]])
        into = {"keys": memory.keys(0), "values": memory.values(0), "slots": slots}
        q = where(kernels.norm_rotate_packed, qkv, *weights, *turn, run=tokens, eps=1e-6, **into)
        found.append([part.float() for part in (q, *memory.view(0, slice(0, 5 * tokens)))])
    for name, got, expected in zip(("queries", "keys", "values"), *found, strict=True):
        assert (got - expected).norm() < rounding(device) * expected.norm(), name
        assert torch.equal(*((part == 1).all(3).all(2) for part in (got, expected))), name  # nowhere else
    assert all(found[0][i].abs().max() == 448 for i in (1, 2))


def compare_attention(device: str, formula: Callable) -> None:
    """Attention in e4m3, between rows that must not be read; every frame and sample has values of its own."""
    for tokens, chunk, first, mask in (
        (88, 2, 1, None),
        (88, 1, 0, frame_mask(frames_of((1, 1), start=3), frames_of((1,) * 5), Context())),
        (24, 1, 1, frame_mask(frames_of((1, 1), start=2), frames_of((1,) * 4), Context(window=3))),
    ):
        memory, q_frames = packed_memory(device, tokens), 2 if mask is None else len(mask.allowed)
        count = 4 if mask is None else len(mask.allowed[0])
        rows = slice(first * tokens, (first + count) * tokens)
        k, v = torch.randn(2, 2, 5 * tokens, 2, 32, device=device)
        own = torch.arange(5, device=device).repeat_interleave(tokens)
        v += 4 * own[None, :, None, None] + torch.tensor([1.0, -9.0], device=device)[:, None, None, None]
        q = kernels.to_fp8(torch.randn(2, q_frames * tokens, 2, 32, device=device))
        memory.store(0, memory.places, torch.full_like(k, 100.0), torch.full_like(v, 400.0))
        memory.store(0, memory.places[rows], k[:, rows], v[:, rows])
        expected, _ = formula(attend_packed, q, memory, 0, rows, mask, tokens)
        groups = (Rectangle(0, 2, 0, count),) if mask is None else tuple(groups_of(mask))
        for parts in (1, 2) if tokens > 64 else (1,):  # no more than there are blocks
            name = f"attend_e4m3, {tokens} tokens, chunk {chunk}, {parts} parts"
            with mock.patch("causalreel.nn.fp8_attention.parts_of", lambda *a, n=parts: n):
                found, _ = attend_packed(q, memory, 0, rows, mask, tokens)
                coarse = attend_packed(q, memory, 0, rows, mask, tokens, quantised=True) if parts == 1 else None
            error = ((found.float() - expected.float()).norm() / expected.float().norm()).item()
            assert error < max(0.02, rounding(device)), f"{name}: {error}"
            if coarse is not None:
                both = [(v.flatten(2).flatten(0, 1), s) for v, s in (coarse, kernels.quantise_heads(found))]
                alike(name, *both, within=max(0.02, rounding(device)))
            ((key, tiles),) = memory._tiles.items()
            assert key == (groups, rows.start)
            _, lse = kernels.attend_e4m3(q[1], memory.keys(0)[1], memory.values(0)[1], tiles, parts, torch.float32)
            scores = torch.einsum("qhd,khd->hqk", q[1].float(), memory.view(0, rows)[0][1].float()) / 32**0.5
            if mask is not None:
                scores = scores.masked_fill(~mask.dense(tokens, q.device), float("-inf"))
            away = (lse.logsumexp(0) - scores.logsumexp(-1)).abs().max().item()  # not a key too few, nor too many
            assert away < 1e-3, f"{name}: log-sum-exp {away} away"


def alike(name: str, got, expected, *, within: float = 0.02) -> None:
    """e4m3 values with their scales; a tie may round the other way."""
    both = [v.cpu().float().flatten(1) * s.cpu() for v, s in (got, expected)]
    assert (both[0] - both[1]).norm() < within * both[1].norm(), name


if __name__ == "__main__":
    kernels.uses_triton = lambda x: True
    compare()
