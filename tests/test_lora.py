"""Adapters: every layout read strictly, merged by the rule, written for other programs; peft as the oracle."""

from __future__ import annotations

import json
import math
import random as random_numbers
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from causalreel import cli
from causalreel.nn.dit import DiT
from causalreel.nn.presets import ModelConfig
from causalreel.weights.files import read_tensors, write_tensors
from causalreel.weights.layouts import load_file_into
from causalreel.weights.lora import (
    Lora,
    changed,
    check_fits,
    check_strength,
    check_together,
    from_tensors,
    is_lora,
    read_lora,
)
from causalreel.weights.lora_config import Patterns, Scales
from causalreel.weights.lora_files import parse, read_loras
from causalreel.weights.lora_layouts import LAYOUTS, write_lora
from causalreel.weights.lora_names import INSIDE, OUTSIDE, diffusers_name, understand
from ceilings import examples, work_within

CONFIG = ModelConfig(dim=16, ffn_dim=24, heads=2, layers=2, text_dim=8, text_length=4, freq_dim=16, channels=2)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def network() -> DiT:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        net = DiT(CONFIG)
        torch.nn.init.normal_(net.head.head.weight)
    return net.requires_grad_(False)


def base() -> dict[str, Tensor]:
    return dict(network().state_dict())


def shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in base().items()}


Q, K, FFN, TEXT = "blocks.0.self_attn.q", "blocks.1.cross_attn.k", "blocks.1.ffn.0", "text_embedding.0"


def random(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(layer: str, rank: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """down (R,E), up (O,R)."""
    out, into = shapes()[f"{layer}.weight"]
    return random(rank, into, seed=seed), random(out, rank, seed=seed + 1)


def merged(*loras: tuple[Lora, float]) -> dict[str, Tensor]:
    for lora, strength in loras:
        check_fits(lora, shapes())
        check_strength(strength, lora.source)
    check_together(loras)
    return base() | dict(changed(base().__getitem__, loras))


def by_rule(changes: Mapping[str, Tensor], strength: float) -> dict[str, Tensor]:
    """W + strength * change, in float64."""
    return {
        name: (value.double() + strength * changes[name].double()).float() if name in changes else value
        for name, value in base().items()
    }


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], value, rtol=1e-5, atol=1e-6) for name, value in other.items())


def written(layout: str) -> tuple[Path, dict[str, Tensor]]:
    """A file of the layout, made by hand, of layers with several ranks -> it, and the changes that it means."""
    layers = {Q: 2, K: 3, FFN: 2, TEXT: 2}
    pairs = {layer: pair(layer, rank) for layer, rank in layers.items()}
    alphas = {Q: 1.0, K: 12.0, FFN: 1.0, TEXT: 4.0}
    tensors: dict[str, Tensor] = {}
    path = Path(f"{layout}.safetensors")
    scale = {layer: alphas[layer] / rank for layer, rank in layers.items()}
    for layer, (down, up) in pairs.items():
        flat = layer.replace(".", "_")
        stem, a, b, alpha = {
            "peft": (f"base_model.model.{layer}", "lora_A", "lora_B", False),
            "longlive": (f"base_model.model.{layer}", "lora_A", "lora_B", False),
            "diffusers": (f"transformer.{diffusers_name(layer)}", "lora_A", "lora_B", False),
            "comfyui": (f"diffusion_model.{layer}", "lora_down", "lora_up", True),
            "musubi": (f"lora_unet_{flat}", "lora_down", "lora_up", True),
            "videox-fun": (f"lora_unet__{flat}", "lora_down", "lora_up", True),
            "diffsynth": (layer, "lora_A.default", "lora_B.default", False),
        }[layout]
        tensors |= {f"{stem}.{a}.weight": down, f"{stem}.{b}.weight": up}
        if alpha:
            tensors[f"{stem}.alpha"] = torch.tensor(alphas[layer])
    if layout in ("diffsynth", "longlive"):
        scale = dict.fromkeys(layers, 1.0)
    if layout == "peft":
        path = Path("peft/adapter_model.safetensors")
        path.parent.mkdir()
        told = {"peft_type": "LORA", "r": 2, "lora_alpha": 1.0, "rank_pattern": {"cross_attn.k": 3}}
        told["alpha_pattern"] = {r"blocks\.1\.cross_attn\.(k|v)": 12.0, "text_embedding.0": 4.0}
        Path("peft/adapter_config.json").write_text(json.dumps(told))
    metadata = {"format": "pt"}
    if layout == "diffusers":
        told = {"transformer.r": 2, "transformer.lora_alpha": 1.0, "transformer.rank_pattern": {"attn2.to_k": 3}}
        told["transformer.alpha_pattern"] = {diffusers_name(layer): alphas[layer] for layer in layers}
        metadata["lora_adapter_metadata"] = json.dumps(told)
    if layout == "longlive":
        path = Path("l.pt")
        torch.save({"generator_lora": tensors, "critic_lora": {k: -v for k, v in tensors.items()}, "step": 3}, path)
    else:
        save_file(tensors, path, metadata)
    changes = {f"{layer}.weight": scale[layer] * (up.double() @ down.double()) for layer, (down, up) in pairs.items()}
    return path, changes


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -2.0])
def test_a_layout_is_read_and_merged_by_the_rule(layout: str, strength: float) -> None:
    path, changes = written(layout)
    lora = read_lora(path.parent if layout == "peft" else path)
    assert lora.layout == layout and is_lora(path)
    assert same(merged((lora, strength)), by_rule(changes, strength))
    if not strength:
        assert all(torch.equal(value, base()[name]) for name, value in merged((lora, 0.0)).items())


@pytest.mark.parametrize("there", LAYOUTS)
@pytest.mark.parametrize("back", LAYOUTS)
def test_there_and_back_changes_no_weight(there: str, back: str) -> None:
    path, changes = written("comfyui")
    names = {"peft": "", "longlive": ".pt"}
    first = write_lora(read_lora(path), Path(f"there{names.get(there, '.safetensors')}"), there)
    last = write_lora(read_lora(first), Path(f"back{names.get(back, '.safetensors')}"), back)
    assert read_lora(first).layout == there and read_lora(last).layout == back
    assert same(merged((read_lora(last), 1.0)), by_rule(changes, 1.0))


def test_every_layer_is_known_under_every_name() -> None:
    for inside, layers in (("blocks.12.", INSIDE), ("", OUTSIDE)):
        for ours, theirs in layers.items():
            layer, other = inside + ours, inside + theirs
            flat, flat_other = layer.replace(".", "_"), other.replace(".", "_")
            for name in (f"{prefix}{layer}" for prefix in ("", "diffusion_model.", "base_model.model.", "pipe.dit.")):
                assert understand(f"{name}.lora_A.weight").layer == layer
            for name in (f"transformer.{other}", f"lora_unet_{flat}", f"lora_unet__{flat}", f"lora_unet_{flat_other}"):
                assert understand(f"{name}.lora_down.weight").layer == layer, name


def test_full_differences_count_as_much_as_pairs() -> None:
    down, up = pair(Q, 2)
    tensors = {
        "diffusion_model.blocks.0.self_attn.q.lora_down.weight": down,
        "diffusion_model.blocks.0.self_attn.q.lora_up.weight": up,
        "diffusion_model.blocks.0.self_attn.q.diff_b": random(16),
        "diffusion_model.blocks.0.self_attn.norm_q.diff": random(16, seed=1),
        "diffusion_model.blocks.1.norm3.diff": random(16, seed=2),
        "diffusion_model.blocks.1.norm3.diff_b": random(16, seed=3),
        "diffusion_model.blocks.1.diff_m": random(1, 6, 16),
        "diffusion_model.head.diff_m": random(1, 2, 16),
        "diffusion_model.head.head.diff": random(8, 16),
        "diffusion_model.patch_embedding.diff": random(16, 2, 1, 2, 2),
    }
    save_file(tensors, "step.safetensors")
    means = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}
    changes = {f"{Q}.weight": up @ down}
    for key, value in tensors.items():
        stem, _, leaf = key.removeprefix("diffusion_model.").rpartition(".")
        if leaf in means:
            changes[f"{stem}.{means[leaf]}"] = value
    lora = read_lora("step.safetensors")
    for strength in (1.0, -0.3):
        assert same(merged((lora, strength)), by_rule(changes, strength))
    write_lora(lora, "again.safetensors", "comfyui")
    assert same(merged((read_lora("again.safetensors"), 1.0)), by_rule(changes, 1.0))
    with pytest.raises(ValueError, match=r"diff.*' is a full difference.*comfyui.*not peft"):
        write_lora(lora, "p", "peft")
    assert not Path("p").exists()


def test_several_add_in_any_order_and_cancel() -> None:
    one, other = read_lora(written("comfyui")[0]), read_lora(written("diffsynth")[0])
    assert same(merged((one, 0.4), (other, 0.7)), merged((other, 0.7), (one, 0.4)))
    assert same(merged((one, 0.5), (one, 0.5)), merged((one, 1.0)))
    assert same(merged((one, 0.5), (one, -0.5)), base())


def test_small_changes_survive_bfloat16() -> None:
    """Added in float32 and rounded once: adding the parts in bfloat16 one after the other loses them."""
    down, up = torch.ones(1, 16), torch.full((16, 1), 0.003)
    save_file({f"{Q}.lora_A.weight": down.bfloat16(), f"{Q}.lora_B.weight": up.bfloat16()}, "a.safetensors")
    lora, weight = read_lora("a.safetensors"), {f"{Q}.weight": torch.ones(16, 16, dtype=torch.bfloat16)}
    (_, value), *rest = changed(weight.__getitem__, [(lora, 1.0), (lora, 1.0)])
    assert not rest and value.dtype == torch.bfloat16 and value[0, 0] == torch.tensor(1.006).bfloat16() != 1


def test_an_rslora_is_divided_by_the_root_of_its_rank() -> None:
    down, up = pair(Q, 4)
    Path("p").mkdir()
    save_file(
        {f"base_model.model.{Q}.lora_A.weight": down, f"base_model.model.{Q}.lora_B.weight": up},
        "p/adapter_model.safetensors",
    )
    Path("p/adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True}))
    changes = {f"{Q}.weight": 8 / math.sqrt(4) * (up @ down)}
    assert same(merged((read_lora("p"), 1.0)), by_rule(changes, 1.0))
    assert same(merged((read_lora("p/adapter_model.safetensors"), 1.0)), by_rule(changes, 1.0))


def test_a_dora_has_the_length_that_it_says_at_strength_1_only() -> None:
    down, up = pair(Q, 2)
    tensors = {f"diffusion_model.{Q}.lora_down.weight": down, f"diffusion_model.{Q}.lora_up.weight": up}
    save_file(tensors | {f"diffusion_model.{Q}.dora_scale": torch.full((16, 1), 2.5)}, "dora.safetensors")
    lora = read_lora("dora.safetensors")
    value = merged((lora, 1.0))[f"{Q}.weight"]
    assert torch.allclose(value.norm(dim=1), torch.full((16,), 2.5), rtol=1e-5)
    with pytest.raises(ValueError, match="DoRA, which has a meaning at strength 1"):
        merged((lora, 0.5))
    save_file(tensors, "plain.safetensors")
    with pytest.raises(ValueError, match="they do not add"):
        merged((lora, 1.0), (read_lora("plain.safetensors"), 1.0))
    write_lora(lora, "p", "peft")
    assert same(merged((read_lora("p"), 1.0)), merged((lora, 1.0)))
    with pytest.raises(ValueError, match="is a DoRA"):
        write_lora(lora, "m.safetensors", "musubi")
    save_file(tensors | {f"diffusion_model.{Q}.dora_scale": torch.ones(1, 16)}, "rows.safetensors")
    with pytest.raises(ValueError, match="a magnitude for each of the 16 outputs"):
        read_lora("rows.safetensors")


# ---- what is refused


def good() -> dict[str, Tensor]:
    down, up = pair(Q, 2)
    return {f"diffusion_model.{Q}.lora_down.weight": down, f"diffusion_model.{Q}.lora_up.weight": up}


S = "diffusion_model.blocks.0.self_attn"

GATE = "diffusion_model.blocks.0.gate.lora_up.weight"
HUNYUAN = "diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight"

BROKEN: dict[str, tuple[Any, str]] = {
    "rank": (lambda t: t | {f"{S}.q.lora_up.weight": torch.ones(16, 3)}, "ranks of down and up differ"),
    "rank 0": (
        lambda t: {f"{S}.q.lora_down.weight": torch.ones(0, 16), f"{S}.q.lora_up.weight": torch.ones(16, 0)},
        "rank 0",
    ),
    "inputs": (lambda t: t | {f"{S}.q.lora_down.weight": torch.ones(2, 20)}, "does not fit the layer"),
    "outputs": (lambda t: t | {f"{S}.q.lora_up.weight": torch.ones(20, 2)}, "does not fit the layer"),
    "wider": (
        lambda t: {f"{S}.q.lora_down.weight": torch.ones(2, 5120), f"{S}.q.lora_up.weight": torch.ones(5120, 2)},
        "made for a wider network.*14B",
    ),
    "half": (lambda t: dict(list(t.items())[:1]), "half of a pair is missing"),
    "other half": (lambda t: dict(list(t.items())[1:]), "half of a pair is missing"),
    "block": (lambda t: {k.replace("blocks.0", "blocks.2"): v for k, v in t.items()}, "block 2 of 2"),
    "image": (lambda t: {k.replace("self_attn.q", "cross_attn.k_img"): v for k, v in t.items()}, "image-to-video"),
    "some unknown": (lambda t: t | {GATE: torch.ones(2)}, "nothing is skipped.*gate"),
    "a bare weight": (lambda t: t | {"diffusion_model.blocks.0.ffn.0.weight": torch.ones(24, 16)}, "ffn.0.weight"),
    "checkpoint": (lambda t: base(), "checkpoint, not of an adapter"),
    "norm": (lambda t: {k.replace(".q.", ".norm_q."): v for k, v in t.items()}, "does not fit the layer"),
    "twice": (
        lambda t: t | {"lora_unet_blocks_0_self_attn_q.lora_up.weight": torch.ones(16, 2)},
        "one layer in two namings",
    ),
    "alpha alone": (lambda t: {f"{S}.q.alpha": torch.ones(())}, "no LoRA pair"),
    "alpha of another": (lambda t: t | {f"{S}.k.alpha": torch.ones(())}, "no LoRA pair for.*self_attn.k.alpha"),
    "infinite alpha": (lambda t: t | {f"{S}.q.alpha": torch.tensor(math.inf)}, "alpha is not finite"),
    "alphas": (lambda t: t | {f"{S}.q.alpha": torch.ones(2)}, "must be one number"),
    "nan": (lambda t: t | {f"{S}.q.lora_up.weight": torch.full((16, 2), math.nan)}, "not finite.*q.lora_up"),
    "whole numbers": (lambda t: t | {f"{S}.q.lora_up.weight": torch.ones(16, 2, dtype=torch.int8)}, "is int8"),
    "loha": (lambda t: {"lora_unet_blocks_0_self_attn_q.hada_w1_a": torch.ones(2, 2)}, "LoHa, not LoRA"),
    "lokr": (lambda t: {"lora_unet_blocks_0_self_attn_q.lokr_w1": torch.ones(2, 2)}, "LoKr, not LoRA"),
    "locon": (lambda t: t | {f"{S}.q.lora_mid.weight": torch.ones(2, 2)}, "LoCon"),
    "hunyuan": (lambda t: {HUNYUAN: torch.ones(2, 2)}, "another model"),
    "sdxl": (lambda t: {"lora_unet_down_blocks_1_attentions_0_proj.lora_up.weight": torch.ones(2, 2)}, "another model"),
    "text": (lambda t: {"lora_te1_layers_0_fc1.lora_up.weight": torch.ones(2, 2)}, "only a text encoder"),
    "nothing": (lambda t: {}, "no tensors"),
    "difference": (lambda t: {f"{S}.q.diff": torch.ones(16, 17)}, "does not fit the layer"),
    "block zeros": (lambda t: {k.replace("blocks.0", "blocks.00"): v for k, v in t.items()}, "blocks.00"),
    "bias of a norm": (lambda t: {f"{S}.norm_q.diff_b": torch.ones(16)}, "norm_q.diff_b"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_does_not_fit_is_refused_in_one_line(kind: str) -> None:
    breaks, words = BROKEN[kind]
    save_file({key: value.contiguous() for key, value in breaks(good()).items()}, "x.safetensors")
    with pytest.raises(ValueError, match=f"x.safetensors.*{words}") as caught:
        merged((read_lora("x.safetensors"), 1.0))
    assert "\n" not in str(caught.value)


CONFIGS: dict[str, tuple[Any, str]] = {
    "type": ({"peft_type": "IA3"}, "peft_type is IA3, not LORA"),
    "rank": ({"r": 0}, "r must be a whole number"),
    "another rank": ({"r": 3}, "has rank 2, and .* says 3"),
    "alpha": ({"r": 2, "lora_alpha": "much"}, "lora_alpha must be a number"),
    "pattern": ({"r": 2, "alpha_pattern": {"(a+)+": 2}}, "too involved"),
    "many stars": ({"r": 2, "alpha_pattern": {".*.*.*x": 2}}, "too involved"),
    "many expressions": ({"r": 2, "alpha_pattern": {f"blocks.*{i}": 2 for i in range(17)}}, "at most 16 regular"),
    "no pattern": ({"r": 2, "rank_pattern": {"(": 2}}, "too involved or no pattern"),
    "patterns": ({"r": 2, "rank_pattern": [2]}, "rank_pattern must be an object"),
    "pissa": ({"r": 2, "init_lora_weights": "pissa_niter_4"}, "changes the base too"),
    "transposed": ({"r": 2, "fan_in_fan_out": True}, "fan_in_fan_out"),
    "dora": ({"r": 2, "use_dora": True}, "no lora_magnitude_vector"),
    "flag": ({"r": 2, "use_rslora": "yes"}, "use_rslora must be true or false"),
    "saved": ({"r": 2, "modules_to_save": ["head"]}, "modules_to_save"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_means_something_else_is_refused(kind: str) -> None:
    told, words = CONFIGS[kind]
    Path("p").mkdir()
    save_file({k.replace("diffusion_model", "base_model.model").replace("down", "A").replace("up", "B"): v for k, v in good().items()}, "p/adapter_model.safetensors")  # fmt: skip # noqa: E501
    Path("p/adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=words) as caught:
        read_lora("p")
    assert "\n" not in str(caught.value)


def test_an_alpha_may_be_a_whole_number() -> None:
    """As kohya's trainers save it when they save no other type."""
    for kind in (torch.int64, torch.int32, torch.bfloat16, torch.float64):
        save_file(good() | {f"{S}.q.alpha": torch.tensor(6).to(kind)}, "x.safetensors")
        assert read_lora("x.safetensors").pairs[Q].scale == 3


def test_wrappers_may_stand_anywhere_and_a_counter_beside() -> None:
    wanted = from_tensors(good(), Scales(), "x")
    for place in (
        "base_model.model.model._fsdp_wrapped_module.blocks.0.self_attn",
        "module.blocks.0._orig_mod.self_attn",
    ):
        tensors = {key.replace(S, place): value for key, value in good().items()}
        torch.save({"generator_lora": tensors, "step": torch.tensor(3)}, "x.pt")
        assert same(merged((read_lora("x.pt"), 1.0)), merged((wanted, 1.0)))


def test_pickles_are_read_as_data_and_for_the_generator() -> None:
    torch.save({"generator_lora": Path}, "code.pt")
    with pytest.raises(ValueError, match="tensors-only unpickling"):
        read_lora("code.pt")
    tensors = {k.replace("diffusion_model.", ""): v for k, v in good().items()}
    torch.save({"critic_lora": tensors}, "critic.pt")
    with pytest.raises(ValueError, match="only the critic adapter"):
        read_lora("critic.pt")
    assert list(read_lora("critic.pt", "critic_lora").pairs) == [Q]
    torch.save({"generator_lora": tensors, "extra": torch.ones(1)}, "extra.pt")
    with pytest.raises(ValueError, match="'extra' stands beside"):
        read_lora("extra.pt")
    Path("cut.pt").write_bytes(Path("critic.pt").read_bytes()[:500])
    with pytest.raises(ValueError, match="cut off"):
        read_lora("cut.pt")
    torch.save(tensors, "flat.pt")
    assert list(read_lora("flat.pt").pairs) == [Q]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_given_as_weights_is_named(layout: str) -> None:
    path, _ = written(layout)
    with pytest.raises(ValueError, match=r"LoRA.*add --lora FILE") as caught:
        load_file_into(network(), path)
    assert "\n" not in str(caught.value)


def test_the_first_pattern_that_fits_counts() -> None:
    patterns = Patterns({"k": 1, r"blocks\.(0|1)\.self_attn\.q": 2, "self_attn.q": 3, "0.self_attn.v": 4, "v": 5}, "")
    names = ("blocks.0.cross_attn.k", "blocks.1.self_attn.q", "blocks.2.self_attn.q", "blocks.10.self_attn.v", "x")
    assert [patterns.find(name, 0) for name in names] == [1, 2, 3, 5, 0]
    assert patterns.find("blocks.0.self_attn.v", 0) == 4


def test_damaged_bytes_are_a_line(place: Path) -> None:
    """Whatever is changed in a file or its configuration: it is read, or refused by a ValueError of one line."""
    written("peft")
    written("longlive")
    files = {
        name: Path(name).read_bytes() for name in ("peft/adapter_config.json", "peft/adapter_model.safetensors", "l.pt")
    }
    draw = random_numbers.Random(0)
    for _ in range(examples(60)):
        name = draw.choice(list(files))
        data = bytearray(files[name])
        for _ in range(draw.choice((1, 3, 30))):
            at = draw.randrange(min(len(data), 4000))
            data[at : at + draw.choice((0, 1, 1, 2))] = bytes(
                draw.choices(b'{}[]":,019-.e\0\xff(*+', k=draw.choice((0, 1)))
            )
        Path(name).write_bytes(data)
        for source in ("peft", "l.pt"):
            try:
                merged((read_lora(source), 1.0))
            except ValueError as error:
                assert "\n" not in str(error)
        Path(name).write_bytes(files[name])


def test_a_small_file_cannot_ask_for_a_large_product() -> None:
    save_file(
        {f"{Q}.lora_A.weight": torch.ones(1, 400_000), f"{Q}.lora_B.weight": torch.ones(400_000, 1)}, "w.safetensors"
    )
    work = "from causalreel.weights.lora import *\nlora = read_lora('w.safetensors')\n"
    work += f"try: check_fits(lora, {shapes()!r})\nexcept ValueError as error: print(error)"
    assert "wider network" in work_within(64, work, setup="import causalreel.weights.lora").output


# ---- as it is asked for


def test_a_strength_stands_behind_the_last_colon() -> None:
    save_file(good(), "a:b.safetensors")
    save_file(good(), "a:1")
    assert parse("a:b.safetensors") == ("a:b.safetensors", 1.0)
    assert parse("a:b.safetensors:0.5") == ("a:b.safetensors", 0.5)
    assert parse("a:1") == ("a:1", 1.0) and parse("a:1:-2") == ("a:1", -2.0)
    assert parse("c.safetensors:1e-1") == ("c.safetensors", 0.1) and parse("o/r:.5") == ("o/r", 0.5)
    ((name, lora, strength),) = read_loras(["a:b.safetensors:0.25"])
    assert (name, strength) == ("a:b", 0.25) and list(lora.pairs) == [Q]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["a.safetensors:nan"], "finite number, got nan"),
        (["a.safetensors:-inf"], "finite number, got -inf"),
        (["a.safetensors:1e9"], "from -100 to 100"),
        (["a.safetensors:half"], "must be a number, got 'half'"),
        ([("a.safetensors", math.nan)], "from -100 to 100, got nan"),
        ([("a.safetensors", True)], "from -100 to 100, got True"),
        (["a.safetensors", "./a.safetensors:0.5"], "given twice"),
        (["b.safetensors"], "is not there: b.safetensors"),
        (["no/such/b.safetensors"], "the hub does not give it"),
        (["x\0y"], "is not there"),
        (["a" * 300 + ":1"], "too long"),
        (["folder"], "no single adapter"),
        ("a.safetensors", "must be a list"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    save_file(good(), "a.safetensors")
    Path("folder").mkdir()
    with pytest.raises(ValueError, match=words) as caught:
        read_loras(asked)
    assert "\n" not in str(caught.value)


def test_a_file_of_the_hub_is_taken_from_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from causalreel.weights import lora_files

    save_file(good(), "pytorch_lora_weights.safetensors")
    has = {("owner/style", "pytorch_lora_weights.safetensors"), ("owner/style", "x/y.safetensors")}
    found = Path("pytorch_lora_weights.safetensors")
    monkeypatch.setattr(lora_files, "find", lambda file: found if (file.repo, file.path) in has else None)
    for asked in ("owner/style:0.5", "owner/style/x/y.safetensors:0.5"):
        ((_, lora, strength),) = read_loras([asked])
        assert strength == 0.5 and list(lora.pairs) == [Q]


# ---- convert


def test_the_command_converts_and_merges(capsys: pytest.CaptureFixture[str]) -> None:
    path, changes = written("musubi")
    assert cli.main(["convert", str(path), "p", "--to", "peft"]) == 0
    assert sorted(file.name for file in Path("p").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert same(merged((read_lora("p"), 1.0)), by_rule(changes, 1.0))
    write_tensors("net.safetensors", base())
    assert cli.main(["convert", "net.safetensors", "m.safetensors", "--to", "wan", "--lora", "p:0.5"]) == 0
    assert same(read_tensors("m.safetensors"), by_rule(changes, 0.5))
    capsys.readouterr()


def test_values_beyond_float16_are_named() -> None:
    save_file(good() | {f"{S}.q.lora_up.weight": torch.full((16, 2), 1e6)}, "x.safetensors")
    with pytest.raises(ValueError, match=r"lora_up.weight has values beyond float16"):
        write_lora(read_lora("x.safetensors"), "y.safetensors", "comfyui", dtype=torch.float16)
    assert not Path("y.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["comfyui.safetensors", "x", "--to", "wan"], "the layout of a LoRA must be one of peft"),
        (["net.safetensors", "x", "--to", "peft"], "peft is for a LoRA, and the source is none"),
        (["comfyui.safetensors", "x", "--to", "musubi"], "target must be .safetensors"),
        (["comfyui.safetensors", "comfyui.safetensors", "--to", "musubi"], "already there"),
        (["comfyui.safetensors", "x.pt", "--to", "longlive", "--heads", "2"], "leave --heads"),
        (["net.safetensors", "x.safetensors", "--to", "wan", "--lora", "comfyui.safetensors:nan"], "finite"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written("comfyui")
    write_tensors("net.safetensors", base())
    before = sorted(Path().iterdir())
    assert cli.main(["convert", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and sorted(Path().iterdir()) == before


# ---- peft


def test_what_is_written_loads_in_peft_and_the_other_way_round() -> None:
    peft = pytest.importorskip("peft")
    write_lora(read_lora(written("comfyui")[0]), "ours", "peft")
    ours = merged((read_lora("ours"), 1.0))
    model = peft.PeftModel.from_pretrained(network(), "ours").merge_and_unload()
    assert same(dict(model.state_dict()), ours)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["self_attn.q", "ffn.2"], init_lora_weights=False,
        alpha_pattern={r"blocks\.1\.ffn\.2": 9}, rank_pattern={"blocks.0.self_attn.q": 2}, use_rslora=True,
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = peft.get_peft_model(network(), config)
    theirs.save_pretrained("theirs")
    assert same(merged((read_lora("theirs"), 1.0)), dict(theirs.merge_and_unload().state_dict()))


def test_peft_s_dora_is_the_same() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=2, target_modules=["self_attn.q"], init_lora_weights=False, use_dora=True)
    theirs = peft.get_peft_model(network(), config)
    theirs.save_pretrained("theirs")
    assert same(merged((read_lora("theirs"), 1.0)), dict(theirs.merge_and_unload().state_dict()))
