"""What only a GPU can show: compiled and graphed networks compute what the plain one does."""

from __future__ import annotations

import copy

import pytest
import torch

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.presets import ModelConfig
from causalreel.types import Conditioning

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

CONFIG = ModelConfig(dim=64, ffn_dim=96, heads=2, layers=2, text_dim=8, text_length=4, freq_dim=32, channels=4)


def denoisers(speed: str) -> tuple[DiTDenoiser, DiTDenoiser]:
    """The same network twice on the GPU: plain, and accelerated."""
    from causalreel.parallel.compile import compile_blocks
    from causalreel.parallel.graphs import graph_calls

    torch.manual_seed(0)
    plain = DiTDenoiser(CONFIG)
    torch.nn.init.normal_(plain.model.head.head.weight, std=0.2)
    fast = copy.deepcopy(plain).cuda()
    if speed in ("compiled", "graphed"):
        compile_blocks(fast)
    if speed == "graphed":
        graph_calls(fast)
    return plain.cuda(), fast


@pytest.mark.parametrize("speed", ["compiled", "graphed"])
@pytest.mark.parametrize("use", ["bidirectional", "teacher forcing"])
def test_accelerated_calls_and_their_gradients_are_the_plain_ones(speed: str, use: str) -> None:
    plain, fast = denoisers(speed)
    for seed in range(3):  # a replay must read the new input, not the captured one
        torch.manual_seed(seed)
        x, sigma = torch.randn(2, 4, 4, 8, 8, device="cuda"), torch.rand(2, 4, device="cuda")
        told = Conditioning(torch.randn(2, 4, 8, device="cuda"))
        found = []
        for net in (plain, fast):
            if use == "bidirectional":
                velocity = net(x, sigma, told)
            else:
                velocity = net.teacher_forced(x, sigma, told, clean=x.flip(0), sizes=[1] * 4)
            velocity.square().mean().backward()
            found.append(
                (velocity.detach(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]))
            )
            for parameter in net.parameters():
                parameter.grad = None
        for a, b in zip(*found, strict=True):
            assert (a - b).norm() / b.norm() < 2e-3


def test_graphed_calls_without_gradient_follow_the_weights() -> None:
    plain, fast = denoisers("graphed")
    x, sigma = torch.randn(2, 3, 4, 8, 8, device="cuda"), torch.rand(2, 1, device="cuda")
    told = Conditioning(torch.randn(2, 4, 8, device="cuda"))
    with torch.no_grad():
        before = fast(x, sigma, told)
        for net in (plain, fast):
            net.model.head.head.bias.add_(1)
        after = fast(x, sigma, told)
        assert (after - before - 1).abs().max() < 1e-3
        assert (after - plain(x, sigma, told)).abs().max() < 1e-2


@pytest.mark.parametrize("chunk", [1, 3])
def test_masked_attention_in_pieces_is_as_near_to_float32_as_plain_attention(chunk: int) -> None:
    from causalreel.nn.attention import attend
    from causalreel.nn.masks import Context, frame_mask, frames_of

    sizes, tokens = [chunk] * (6 // chunk), 256
    frames = frames_of(sizes) + frames_of(sizes, stream=1)
    mask = frame_mask(frames, frames, Context())
    given = [torch.randn(1, len(frames) * tokens, 12, 128, device="cuda") for _ in range(4)]

    def results(backend: str, dtype: torch.dtype) -> list[torch.Tensor]:
        q, k, v, gradient = (x.to(dtype, copy=True) for x in given)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, mask, tokens, backend=backend)
        return [out, *torch.autograd.grad(out, inputs, gradient)]

    exact = results("sdpa", torch.float32)
    errors = [
        [
            ((a.float() - b).norm() / b.norm()).item()
            for a, b in zip(results(backend, torch.bfloat16), exact, strict=True)
        ]
        for backend in ("pieces", "sdpa")
    ]
    assert all(ours < 1.3 * plain for ours, plain in zip(*errors, strict=True))


@torch.no_grad()
def test_a_network_that_waits_on_the_host_is_the_network() -> None:
    """Blocks come over pinned memory and a stream of their own, call after call, and as their weights are by then."""
    from causalreel.parallel.hosted import host_blocks

    config = ModelConfig(dim=512, ffn_dim=2048, heads=4, layers=6, text_dim=8, text_length=4, channels=4)
    torch.manual_seed(0)
    plain = DiTDenoiser(config)
    torch.nn.init.normal_(plain.model.head.head.weight, std=0.2)
    hosted = copy.deepcopy(plain)
    host_blocks(hosted, torch.device("cuda"))
    plain.cuda()
    x, sigma = torch.randn(2, 3, 4, 16, 16, device="cuda"), torch.rand(2, 1, device="cuda")
    told = Conditioning(torch.randn(2, 4, 8, device="cuda"))
    for _ in range(3):
        found = [hosted(x, sigma, told) for _ in range(4)]
        exact = plain(x, sigma, told)
        assert all(torch.equal(made, exact) for made in found)
        assert all(parameter.device.type == "cpu" for parameter in hosted.model.blocks.parameters())
        for net in (plain, hosted):
            for parameter in net.model.blocks.parameters():
                parameter.mul_(1.1)


@torch.no_grad()
def test_an_average_on_the_host_is_the_one_on_the_gpu() -> None:
    from causalreel.parallel.hosted import host_blocks
    from causalreel.train.average import Follower
    from causalreel.train.stage import Average

    config = ModelConfig(dim=512, ffn_dim=2048, heads=4, layers=6, text_dim=8, text_length=4, channels=4)
    torch.manual_seed(0)
    student = DiTDenoiser(config).cuda()
    roles = {"student": student, "here": copy.deepcopy(student), "away": copy.deepcopy(student)}
    host_blocks(roles["away"], torch.device("cuda"))
    followers = [
        Follower(Average(role=role, source="student", decay=0.9), roles, is_on_host=role == "away")
        for role in ("here", "away")
    ]
    for step in range(5):
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for follower in followers:
            follower.follow(step)
        for follower in followers:
            follower.wait()  # before the source changes, as the trainer does
    here, away = (dict(roles[role].named_parameters()) for role in ("here", "away"))
    for name, value in here.items():
        assert torch.allclose(away[name].cuda(), value, rtol=1e-6, atol=1e-7), name


def test_the_derivative_through_compiled_blocks_is_the_plain_one() -> None:
    """The loss of causal sCM and its gradient: forward mode runs through compiled blocks and their own attention."""
    from causalreel.nn.denoiser import Guided
    from causalreel.train.losses import tangent_loss

    plain, fast = denoisers("compiled")
    x0, noise = (torch.randn(2, 4, 4, 8, 8, device="cuda") for _ in range(2))
    sigma = torch.rand(2, 1, device="cuda").expand(2, 4) * 0.8 + 0.1
    told = Conditioning(torch.randn(2, 4, 8, device="cuda"))
    found = []
    for net in (plain, fast):
        teacher = Guided(net, Conditioning(torch.zeros(1, 4, 8, device="cuda")), 2.0)
        loss, shown = tangent_loss(net, teacher, x0, told, sigma=sigma, noise=noise, sizes=[1] * 4, warm=1.0)
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        found.append((loss.detach(), torch.as_tensor(shown["tangent"]), gradient))
    for a, b in zip(*found, strict=True):
        assert (a.cpu() - b.cpu()).norm() / b.norm().cpu() < 5e-3
