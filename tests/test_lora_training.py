"""Training with adapters: in every stage nothing else moves, bases are shared, checkpoints hold adapters alone."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from causalreel import cli, load
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.linear import effective_state
from causalreel.nn.lora import LoRAConfig, LoRALinear, adapter_state, adapters, add_lora, twin
from causalreel.parallel.fast import accelerate
from causalreel.parallel.sharding import Team
from causalreel.train.building import build_denoising
from causalreel.train.checkpoint import latest
from causalreel.train.recipe import resolve
from causalreel.weights.export import load_export
from causalreel.weights.lora import changed, check_fits, read_lora
from patience import PATIENCE_S
from test_blocks import denoiser, rolled_out, teacher_forced
from test_ranks import torchrun
from test_run import DATA, SMALL, made, reel
from test_run import place as untrained

__all__ = ["made", "untrained"]  # fixtures

CONFIG = LoRAConfig(rank=2, alpha=3.0)
LORA = ("lora.student.rank=2", "lora.student.alpha=3.0")
FAST = (
    "trainer.optimisers.student.lr=0.02",
    "trainer.optimisers.student.warmup_steps=0",
    "trainer.optimisers.student.schedule=constant",
)


def distinct_bytes(modules: Iterable[torch.nn.Module]) -> int:
    """Bytes of the storages that hold the modules' parameters and buffers, each once."""
    held: dict[int, int] = {}
    for module in modules:
        for tensor in (*module.parameters(), *module.buffers()):
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


def adapted(config: LoRAConfig = CONFIG, *, seed: int = 0) -> DiTDenoiser:
    """A network with adapters that do something."""
    net = denoiser()
    add_lora(net.model, config, torch.Generator().manual_seed(seed))
    for _, layer in adapters(net.model):
        torch.nn.init.normal_(layer.lora_B, std=0.2, generator=torch.Generator().manual_seed(seed + 1))
    return net


# ---- the adapter


def test_it_begins_as_the_network_it_adapts() -> None:
    net = denoiser()
    before = teacher_forced(net)
    names = add_lora(net.model, LoRAConfig(rank=2))
    assert torch.equal(teacher_forced(net), before)
    assert len(names) == 10 * len(net.model.blocks) and not any("embedding" in name for name in names)
    trained = {name for name, parameter in net.model.named_parameters() if parameter.requires_grad}
    assert trained == set(adapter_state(net.model)) == {f"{n}.lora_{x}" for n in names for x in "AB"}


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_is_attached(rslora: bool) -> None:
    net, plain = adapted(LoRAConfig(rank=4, alpha=8.0, rslora=rslora)), denoiser()
    plain.load_state_dict(effective_state(net))
    for compute in (teacher_forced, rolled_out):
        attached, merged = compute(net), compute(plain)
        assert (attached - merged).abs().max() <= 1e-6 * attached.abs().max() and not torch.equal(
            merged, compute(denoiser())
        )
    assert torch.allclose(rolled_out(accelerate(net, graphs=False)), rolled_out(plain), rtol=1e-4, atol=1e-5)


def test_it_computes_in_the_type_of_its_input_from_float32() -> None:
    net = adapted()
    net.model.bfloat16()
    for _, layer in adapters(net.model):
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    layer = next(layer for _, layer in adapters(net.model))
    assert layer(torch.ones(1, 48, dtype=torch.bfloat16)).dtype == torch.bfloat16
    teacher_forced(net).square().mean().backward()
    assert layer.lora_B.grad is not None and layer.lora_B.grad.dtype == torch.float32
    assert layer.merged()[0].dtype == torch.bfloat16


def test_dropout_is_for_calls_with_gradient() -> None:
    layer = LoRALinear(torch.nn.Linear(8, 8), LoRAConfig(rank=2, dropout=0.5))
    torch.nn.init.ones_(layer.lora_B)
    x = torch.ones(1, 8)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
    torch.manual_seed(0)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_a_twin_shares_what_is_frozen() -> None:
    net = adapted()
    before = distinct_bytes([net])
    other = twin(net)
    own = sum(value.nbytes for value in adapter_state(net).values())
    assert distinct_bytes([net, other]) == before + own
    next(layer for _, layer in adapters(other)).lora_B.data.zero_()
    assert not torch.equal(rolled_out(net), rolled_out(other))
    assert distinct_bytes([net, twin(denoiser())]) >= 2 * before - own - 1  # trained whole: a copy of all


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank: got 0"),
        ({"rank": 49}, "rank: got 49, allowed at most 48"),
        ({"alpha": float("nan")}, "alpha: got nan"),
        ({"alpha": 0.0}, "alpha: got 0"),
        ({"dropout": 1.0}, "dropout: got 1"),
        ({"targets": ()}, "targets: got none"),
        ({"targets": ("q", "qkv")}, "no linear layer 'qkv'; there are such as"),
        ({"targets": ("norm3",)}, "no linear layer 'norm3'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        add_lora(denoiser().model, LoRAConfig(**settings))


# ---- runs


@pytest.fixture
def place(untrained: Path) -> Path:
    """A working directory whose base has a head that does something, so that gradients reach what is before it."""
    file = untrained / "base/export/model.safetensors"
    weights = load_file(file)
    head = weights["head.head.weight"]
    weights["head.head.weight"] = 0.2 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0)).to(head)
    save_file(weights, file)
    return untrained


def state_of(folder: str) -> dict[str, torch.Tensor]:
    return load_export(folder)[0].model.state_dict()


STAGES = {
    "base": ("init.student=base/export",),
    "ar": ("init.student=base/export",),
    "causal_ode": ("init.student=base/export", "init.teacher=base/export", "settings.pairs=4", "settings.grid=4",
                   "settings.keep=[0,1,2,3]"),
    "causal_cd": ("init.student=base/export", "init.teacher=base/export"),
    "dmd": ("init.student=base/export", "init.teacher=base/export", "init.critic=base/export",
            "settings.critic_updates=2", "lora.critic.rank=3"),
}  # fmt: skip


def arguments(stage: str, out: str = "run") -> tuple[str, ...]:
    decay = "settings.target_decay=0.5" if stage == "causal_cd" else "settings.ema.decay=0.5"
    return (f"tiny/{stage}", *SMALL, *DATA, *STAGES[stage], *LORA, *FAST, decay, f"trainer.out={out}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_moves_adapters_alone(stage: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reel("train", *arguments(stage))
    base, after = state_of("base/export"), state_of("run/export")
    moved = {name for name, value in after.items() if not torch.equal(value, base[name])}
    adapted_ = {f"{layer}.weight" for layer in read_lora("run/lora").pairs}
    assert moved and moved <= adapted_ and len(adapted_) == 10 * len(load_export("base/export")[0].model.blocks)
    checkpoint = latest(Path("run/checkpoints"))
    assert checkpoint is not None
    for file in checkpoint.glob("*.safetensors"):
        names = set(load_file(file))
        assert all(name.endswith(("lora_A", "lora_B")) for name in names) and bool(names) == (file.stem != "teacher")
    # the file is the export: merged into the base, and exactly what a run goes on from
    lora = read_lora("run/lora")
    check_fits(lora, {name: tuple(value.shape) for name, value in base.items()})
    merged = base | dict(changed(base.__getitem__, [(lora, 1.0)]))
    assert all(torch.allclose(merged[name], value, rtol=0.01, atol=1e-3) for name, value in after.items())
    reel("train", *arguments(stage))  # nothing to do, nothing is lost
    assert {pair.rank for pair in lora.pairs.values()} == {2} and {pair.scale for pair in lora.pairs.values()} == {1.5}
    capsys.readouterr()


def test_resumed_is_uninterrupted_and_another_base_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reel("train", *arguments("causal_cd", "whole"), "trainer.steps=4")
    reel("train", *arguments("causal_cd"))
    reel("train", *arguments("causal_cd"), "trainer.steps=4")
    for name in ("export/model.safetensors", "lora/adapter_model.safetensors"):
        whole, resumed = load_file(f"whole/{name}"), load_file(f"run/{name}")
        assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    shutil.rmtree("run/lora")
    reel("train", *arguments("causal_cd"), "trainer.steps=4")  # nothing to train, but what is missing is written
    assert load_file("run/lora/adapter_model.safetensors").keys() == resumed.keys()
    shutil.copytree("base", "other")
    weights = load_file("other/export/model.safetensors")
    weights["head.head.bias"] += 1
    save_file(weights, "other/export/model.safetensors")
    capsys.readouterr()
    assert cli.main(["train", *arguments("causal_cd"), "trainer.steps=6", "init.student=other/export"]) == 2
    assert "init.student: other/export is not what" in capsys.readouterr().err
    assert cli.main(["train", *arguments("causal_cd"), "trainer.steps=6", "lora.student.alpha=4.0"]) == 2
    assert "of another config: lora.student.alpha" in capsys.readouterr().err


def test_the_networks_of_dmd_share_one_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Memory is that of one network and of the adapters: student, critic, and the average of the student's."""
    recipe = resolve(arguments("dmd")[0], arguments("dmd")[1:])
    stage = build_denoising(recipe, torch.device("cpu"), Team()).stage
    nets = dict(stage.roles)
    assert set(nets) == {"student", "critic", "teacher", "average"}
    own = sum(value.nbytes for net in nets.values() for value in adapter_state(net).values())
    assert distinct_bytes(nets.values()) == distinct_bytes([nets["teacher"]]) + own
    trained = {role: [n for n, p in net.named_parameters() if p.requires_grad] for role, net in nets.items()}
    assert {role for role, names in trained.items() if names} == {"student", "critic"}


def test_adapters_begin_as_those_of_an_earlier_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reel("train", *arguments("ar", "first"))
    begin = ("lora_init.student=first/lora", "lora.student.alpha=6.0")  # the same product at another scale
    stage = build_denoising(
        resolve(arguments("dmd")[0], (*arguments("dmd")[1:], *begin)), torch.device("cpu"), Team()
    ).stage
    student = effective_state(stage.roles["student"])
    wanted = dict(changed(state_of("base/export").__getitem__, [(read_lora("first/lora"), 1.0)]))
    assert all(torch.allclose(student[f"model.{name}"], value, atol=1e-6) for name, value in wanted.items())
    for wrong, words in (
        (("lora.student.rank=3",), "adapter of blocks.0.* has rank 3"),
        (("lora.student.targets=[q]",), "which lora.student does not adapt"),
        (("lora_init.student=base/export",), "lora_init.student: "),
        (("lora_init.critic=none",), "lora_init.critic: "),
    ):
        capsys.readouterr()
        assert cli.main(["train", *arguments("dmd"), *begin, *wrong]) == 2
        said = capsys.readouterr().err
        assert re.search(words, said) and said.count("\n") == 1, said


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("lora.teacher.rank=2", "lora.teacher: the role has no optimiser"),
        ("lora.student.rank=0", "rank: got 0"),
        ("lora.student.targets=[x]", "lora.student: targets: there is no linear layer 'x'"),
        ("lora.student.ranks=2", "did you mean"),
        ("lora_init.critic=first", "lora_init.critic: the role has no adapters"),
    ],
)
def test_recipes_that_cannot_be_are_one_line(
    setting: str, words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *arguments("causal_cd"), setting]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and not Path("run").exists(), said


def test_what_was_trained_loads_in_peft_and_in_generate(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reel("train", *arguments("causal_cd"), "compute=float32")
    plain, whole = load("base/export", device="cpu"), load("run/export", device="cpu")
    merged = load("base/export", device="cpu", loras=["run/lora"])
    state = merged.denoiser.model.state_dict()
    assert all(
        torch.allclose(value, state[name], atol=0.01) for name, value in whole.denoiser.model.state_dict().items()
    )
    assert merged.loras is not None and merged.loras.strengths == {"lora": 1.0}
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(plain.denoiser.model, "run/lora").merge_and_unload().state_dict()
    assert all(torch.allclose(value, theirs[name], atol=1e-6) for name, value in state.items())


def test_the_merged_weights_can_be_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reel("train", *arguments("causal_cd"), "lora_merged=false")
    assert Path("run/lora/adapter_config.json").is_file() and not Path("run/export").exists()


def test_two_processes_leave_the_adapters_of_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = [f"data={place / 'data'}", f"codec={place / 'codec/export'}"]
    where += [f"init.{role}={place / 'base/export'}" for role in ("student", "teacher")]
    reel("train", *arguments("causal_cd", "one"), *where)
    running = torchrun(2, "-m", "causalreel", "train", *arguments("causal_cd"), *where, f"trainer.out={place / 'two'}")
    _, said = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, said
    one, two = (load_file(f"{out}/lora/adapter_model.safetensors") for out in ("one", "two"))
    assert one.keys() == two.keys() and any(value.abs().max() > 0.01 for name, value in one.items() if "lora_B" in name)
    assert all(torch.allclose(value, two[name], atol=1e-3) for name, value in one.items())
    exports = [load_file(f"{out}/export/model.safetensors") for out in ("one", "two")]
    assert all(torch.allclose(v.float(), exports[1][k].float(), rtol=0.02, atol=2e-3) for k, v in exports[0].items())
