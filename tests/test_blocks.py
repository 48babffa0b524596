"""What goes around a block or a product changes no number: sharding, recomputing, adapters."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.linear import effective
from causalreel.nn.presets import ModelConfig
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.parallel.recompute import Recompute, recompute_blocks
from causalreel.rollout import KeyedNoise, chunked, collect, fuse, rollout
from causalreel.types import Conditioning, LatentSpec
from causalreel.weights.export import Export, Sampling, load_export, save_export

CONFIG = ModelConfig(dim=48, ffn_dim=80, heads=3, layers=2, text_dim=8, text_length=4, freq_dim=32, channels=4)
SPEC = LatentSpec(4, 4, 6)


def denoiser() -> DiTDenoiser:
    torch.manual_seed(0)
    net = DiTDenoiser(CONFIG)
    nn.init.normal_(net.model.head.head.weight, std=0.2)
    return net


def inputs(frames: int = 4) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(3)
    x, text = torch.randn(2, frames, *SPEC.shape, generator=generator), torch.randn(2, 3, 8, generator=generator)
    return x, torch.full((2, frames), 0.6), Conditioning(text)


def teacher_forced(net: DiTDenoiser) -> Tensor:
    x, sigma, text = inputs()
    return net.teacher_forced(x, sigma, text, clean=x.flip(0), sizes=(2, 2))


@torch.no_grad()
def rolled_out(net: DiTDenoiser) -> Tensor:
    plan = fuse(chunked([2, 2, 2], (1.0, 0.6)))
    given = net.prepare(inputs()[2])
    return collect(rollout(net, plan, conditioning=given, noise=KeyedNoise([1, 2], SPEC), cache=net.new_cache()))


def gradients(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


# ---- blocks


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    """What each of two processes finds that share every block and the rest, recomputing or not."""
    folder = tmp_path_factory.mktemp("shared")
    call = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_blocks; test_blocks.process"
    commands = [[sys.executable, "-c", f"{call}({rank}, {str(folder)!r})"] for rank in range(2)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    for process_ in running:
        _, said = process_.communicate(timeout=300)
        assert process_.returncode == 0, said
    return [torch.load(folder / f"{mode}-{rank}.pt") for mode in get_args(Recompute) for rank in range(2)]


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    for mode in get_args(Recompute):
        torch.save(sharded(mode), f"{folder}/{mode}-{rank}.pt")
    dist.destroy_process_group()


def sharded(mode: Recompute) -> dict[str, Tensor]:
    """What every process finds, and the gradients that all of them have together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    net, mesh = recompute_blocks(denoiser(), mode), init_device_mesh("cpu", (2,))
    for block in net.model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net.model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in net.parameters())
    found = {"cached": rolled_out(net), "teacher forced": teacher_forced(net)}
    found["teacher forced"].square().mean().backward()
    for name, parameter in net.named_parameters():
        assert isinstance(parameter.grad, DTensor)
        found[name] = parameter.grad.full_tensor()
    return {name: value.detach() for name, value in found.items()}


def test_blocks_shared_by_two_processes_are_the_blocks_of_one(shared: list[dict[str, Tensor]]) -> None:
    net = denoiser()
    whole = {"cached": rolled_out(net), "teacher forced": teacher_forced(net)}
    whole["teacher forced"].square().mean().backward()
    whole |= gradients(net)
    assert len(whole) == 2 + len(list(net.parameters()))
    for found in shared:
        for name, value in whole.items():
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


# ---- products


class LowRank(nn.Module):
    """W + up down around a linear layer, which is frozen."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, base.in_features) * 0.3)
        self.up = nn.Parameter(torch.randn(base.out_features, rank) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.t() @ self.up.t()

    @torch.no_grad()
    def merged(self) -> tuple[Tensor, Tensor]:
        return self.base.weight + self.up @ self.down, self.base.bias


def adapted() -> DiTDenoiser:
    """A frozen network with an adapter around every product of its blocks."""
    net = denoiser().requires_grad_(False)
    for block in net.model.blocks:
        for part in (block.self_attn, block.cross_attn):
            for name in "qkvo":
                setattr(part, name, LowRank(getattr(part, name)))
        for place in (0, 2):
            layer = block.ffn[place]
            assert isinstance(layer, nn.Linear)
            block.ffn[place] = LowRank(layer)
    return net


def trained(net: DiTDenoiser) -> Iterator[float]:
    optimiser = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = (teacher_forced(net) - inputs()[0]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        yield loss.item()


def test_adapters_train_and_the_rest_stays() -> None:
    net, before = adapted(), denoiser().state_dict()
    losses = list(trained(net))
    assert losses[-1] < losses[0]
    after = net.state_dict()
    assert torch.equal(after["model.blocks.0.self_attn.q.base.weight"], before["model.blocks.0.self_attn.q.weight"])
    assert torch.equal(after["model.head.head.weight"], before["model.head.head.weight"])


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_the_fast_form_reads_adapters(precision: str) -> None:
    net = adapted()
    expected, without = rolled_out(net), rolled_out(denoiser())
    accelerate(net, precision=precision)
    assert isinstance(net.run, FastDiT)
    if precision == "fp8":
        net.run.release_originals()
        assert all(p.is_meta for p in net.model.blocks[0].self_attn.q.parameters() if p.ndim == 2)
    distance = (rolled_out(net) - expected).norm() / expected.norm()
    assert distance < (1e-5 if precision == "bf16" else 0.1)
    assert (without - expected).norm() / expected.norm() > 3 * max(distance, 0.03)


def test_an_export_holds_the_merged_weights(tmp_path: Path) -> None:
    net = adapted()
    card = Export("adapted", CONFIG, Sampling(), net.context, 4, 16.0, SPEC)
    plain, _ = load_export(save_export(tmp_path, net, card, dtype=torch.float32))
    assert torch.allclose(rolled_out(plain), rolled_out(net), atol=1e-5)
    assert [*plain.state_dict()] == [*denoiser().state_dict()]


def test_a_layer_whose_product_cannot_be_read_is_refused() -> None:
    net = denoiser()
    net.model.blocks[0].self_attn.q = nn.Sequential(net.model.blocks[0].self_attn.q)  # type: ignore[assignment]
    with pytest.raises(TypeError, match="Sequential stands in the place of a linear layer"):
        accelerate(net)
    assert effective(net.model.blocks[1].self_attn.q)[0] is net.model.blocks[1].self_attn.q.weight
