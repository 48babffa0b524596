"""Foreign layouts of weights: what is read, and in which words the rest is refused."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalreel.nn.dit import DiT
from causalreel.nn.presets import PRESETS, ModelConfig
from causalreel.types import Conditioning
from causalreel.weights.build import load_denoiser, random_denoiser
from causalreel.weights.convert import write_folder
from causalreel.weights.files import read_tensors, write_tensors
from causalreel.weights.layouts import (
    LAYOUTS,
    Network,
    bare_names,
    from_layout,
    guess_layout,
    load_file_into,
    read_network,
    to_layout,
)
from causalreel.weights.strict import check_finite, check_fits, load_strictly

FOLDER = Path(os.environ.get("CAUSALREEL_GOLDEN", Path(__file__).parents[1] / ".." / "shared" / "golden"))
KEYS = "c14_official_key_shapes.json"

CONFIG = ModelConfig(dim=16, ffn_dim=24, heads=2, layers=2, text_dim=8, text_length=4, freq_dim=16, channels=2)


def network(seed: int) -> DiT:
    torch.manual_seed(seed)
    return DiT(CONFIG)


def named(prefix: str, seed: int = 1) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in network(seed).state_dict().items()}


def same(net: DiT, seed: int = 1) -> bool:
    return all(torch.equal(value, net.state_dict()[name]) for name, value in network(seed).state_dict().items())


@pytest.mark.parametrize(
    "prefix",
    ["", "model.", "net.", "model._fsdp_wrapped_module.", "module.model.", "_orig_mod.model._fsdp_wrapped_module."],
)
@pytest.mark.parametrize("top", [None, "generator", "generator_ema", "model"])
def test_released_layouts_load_strictly(prefix: str, top: str | None, tmp_path: Path) -> None:
    """Law 8: whatever wraps the names, the same tensors arrive."""
    path, net = tmp_path / "weights.pt", network(0)
    torch.save(named(prefix) if top is None else {top: named(prefix)}, path)
    load_file_into(net, str(path))
    assert same(net)


def test_prefixes_may_differ_between_names(tmp_path: Path) -> None:
    """Each name is read by itself; what comes to one parameter twice is refused, whatever stands in front of it."""
    path, plain = tmp_path / "weights.pt", named("")
    prefixes = ("", "model.", "model._orig_mod.", "module.")
    mixed = {prefixes[i % 4] + name: value for i, (name, value) in enumerate(plain.items())}
    torch.save({"generator": mixed, "decay": torch.ones(()), "ema.decay": torch.ones(())}, path)
    net = network(0)
    load_file_into(net, path)
    assert same(net)
    for twice in ("model.head.head.bias", "_orig_mod.head.head.bias", "diffusion_model.head.head.bias"):
        torch.save({"generator": plain | {twice: plain["head.head.bias"] + 1}}, path)
        refused(path, "two names of the file map to one parameter", "'head.head.bias'")


def test_files_of_before_torch_1_6_are_read(tmp_path: Path) -> None:
    path, net = tmp_path / "weights.pt", network(0)
    torch.save({"generator": named("model.")}, path, _use_new_zipfile_serialization=False)
    load_file_into(net, path)
    assert same(net)
    path.write_bytes(path.read_bytes()[:3000])
    refused(path, "damaged, cut off")


def test_wrappers_inside_names_are_removed(tmp_path: Path) -> None:
    path, net = tmp_path / "weights.pt", network(0)
    inside = {
        name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module."): t for name, t in named("model.").items()
    }
    torch.save({"generator": inside}, path)
    load_file_into(net, str(path))
    assert same(net)


def test_raw_weights_are_the_default_and_others_can_be_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(
        {"critic": named("model.", 3), "generator_ema": named("model.", 2), "generator": named("model.", 1), "step": 7},
        path,
    )
    for which, seed in ((None, 1), ("generator", 1), ("generator_ema", 2), ("critic", 3)):
        net = network(0)
        load_file_into(net, path, which=which)
        assert same(net, seed)
    with pytest.raises(ValueError, match="no weights called 'average'; it has critic, generator_ema, generator"):
        read_network(path, "average")


def test_what_is_not_there_is_said_with_the_flag_that_would_load_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"generator": named("model.")}, path)
    with pytest.raises(ValueError, match=r"it has generator; the stages 1 and 2 .* --which generator$"):
        read_network(path, "generator_ema")
    torch.save({"generator_ema": named("model.")}, path)
    with pytest.raises(ValueError, match=r"it has generator_ema; the frame-wise, .* --which generator_ema$"):
        read_network(path, "generator")
    with caplog.at_level("INFO", "causalreel"):
        assert read_network(path).which == "generator_ema"
    assert "only the averaged weights" in caplog.text
    torch.save({"critic": named("model."), "critic_optimizer": {"state": 1}}, path)
    with pytest.raises(ValueError, match=r"no generator in the file: .* \(--which critic would load it"):
        read_network(path)
    torch.save({"student": named("")}, path)
    with pytest.raises(ValueError, match=r"no known network in the file: it has student, .* --which student"):
        read_network(path)
    for nothing in ({}, {"generator": {}, "step": 3}):
        torch.save(nothing, path)
        with pytest.raises(ValueError, match="holds no parameters"):
            read_network(path)
    torch.save(named(""), path)
    with pytest.raises(ValueError, match="only bare tensors; leave --which out"):
        read_network(path, "generator")


def test_there_and_back_is_the_identity(tmp_path: Path) -> None:
    path, net = tmp_path / "model.safetensors", network(0)
    write_tensors(path, network(1).state_dict())
    load_file_into(net, str(path))
    assert same(net)
    assert path.stat().st_mode & 0o044  # others can read what was installed


def test_missing_unexpected_and_misshapen_tensors_are_named() -> None:
    tensors = named("")
    value = tensors.pop("blocks.1.ffn.0.weight")
    with pytest.raises(
        ValueError, match=r"1 names missing \(first: blocks.1.ffn.0.weight\), 1 unexpected \(first: extra\)"
    ):
        load_strictly(network(0), tensors | {"extra": value}, source="weights.pt")
    tensors["blocks.1.ffn.0.weight"] = value[:-1]
    with pytest.raises(ValueError, match=r"blocks\.1\.ffn\.0\.weight has the wrong shape \(23, 16\), .* \(24, 16\)"):
        load_strictly(network(0), tensors, source="weights.pt")


def test_nothing_is_put_into_a_network_that_does_not_fit() -> None:
    net = network(0)
    tensors = named("")
    tensors["head.head.bias"] = tensors["head.head.bias"][:-1]
    with pytest.raises(ValueError):
        load_strictly(net, tensors, source="weights.pt")
    assert same(net, 0)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("condition_embedder.time_proj.weight", "diffusers"),
        ("model.diffusion_model.blocks.0.modulation", "ComfyUI"),
        ("decoder.upsamples.0.residual.0.gamma", "Wan VAE"),
        ("blocks.0.attn.q.lora_A.weight", "LoRA"),
        ("blocks.0.modulation", "Wan2.1"),
    ],
)
def test_layouts_are_guessed(name: str, layout: str) -> None:
    assert layout in guess_layout({name: None})


def refused(path: Path, *parts: str, which: str | None = None) -> None:
    """Loading fails with one line that contains all of `parts`."""
    with pytest.raises(ValueError) as caught:
        load_file_into(network(0), path, which=which)
    message = str(caught.value)
    assert "\n" not in message and str(path.parent) in message
    for part in parts:
        assert part in message


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.pt", tmp_path / "weights.pt"
    torch.save({"generator": named("model.")}, whole)
    path.write_bytes(whole.read_bytes()[:2000])
    refused(path, "cut off", "zip directory at its end is missing")
    torch.save({"generator": Path}, path)
    refused(path, "tensors-only unpickling", "Path")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(path, "not a checkpoint but a Git LFS pointer")
    path.write_text("<!DOCTYPE html><html>Not found</html>")
    refused(path, "a web page")
    path.write_text("prompt")
    refused(path, "not a checkpoint", "b'prompt'")
    path.write_bytes(b"")
    refused(path, "empty")
    torch.save([torch.ones(1)], path)
    refused(path, "holds a list")
    with pytest.raises(ValueError, match="not found"):
        read_tensors(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"not '\.zip'"):
        (tmp_path / "weights.zip").write_bytes(b"")
        read_tensors(tmp_path / "weights.zip")
    with pytest.raises(ValueError, match=r"come to the same name 'a\.weight'"):
        bare_names({"model.a.weight": torch.ones(1), "model.module.a.weight": torch.ones(1)})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float, tmp_path: Path) -> None:
    path, tensors = tmp_path / "weights.pt", named("model.")
    tensors["model.blocks.1.cross_attn.v.weight"][3, 2] = bad
    torch.save(tensors, path)
    refused(path, "not finite: blocks.1.cross_attn.v.weight has 1 values")


def test_large_values_are_no_alarm() -> None:
    """Their sum overflows, they do not."""
    check_finite({"a": torch.full((8,), 3e38), "b": torch.full((9000,), 6e4, dtype=torch.float16)}, source="x")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["blocks.0.attn.q.lora_A.weight"], ["LoRA", "--lora"]),
        (["decoder.upsamples.0.residual.0.gamma"], ["Wan VAE", "--wan-dir"]),
        (["decoder.up_blocks.0.conv.weight"], ["Wan VAE", "--wan-dir"]),
        (["token_embedding.weight"], ["umT5 text encoder", "--wan-dir"]),
        (["encoder.block.0.layer.0.SelfAttention.q.weight"], ["umT5 text encoder", "--wan-dir"]),
        (["decoder.1.weight"], ["TAEHV", "--decoder taehv"]),
        (["vace_blocks.0.ffn.0.weight"], ["VACE"]),
    ],
)
def test_other_files_are_named(names: list[str], parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    write_tensors(path, {name: torch.ones(2, 2) for name in names})
    refused(path, "does not fit", *parts)


@pytest.mark.parametrize(
    ("extra", "parts"),
    [
        ("blocks.0.self_attn.prope_o.weight", ["camera", "1 unexpected (first: blocks.0.self_attn.prope_o.weight)"]),
        ("img_emb.proj.0.weight", ["image-to-video", "--image"]),
        ("_cls_pred_branch.0.weight", ["critic with a GAN branch"]),
    ],
)
def test_relatives_of_the_network_are_named(extra: str, parts: list[str], tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"generator": named("model.") | {f"model.{extra}": torch.ones(2)}}, path)
    refused(path, *parts)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    """An image-to-video network has more names and another shape, and both are in the message."""
    tensors = named("")
    tensors["img_emb.proj.0.weight"] = torch.ones(3)
    tensors["patch_embedding.weight"] = torch.ones(16, 36, 1, 2, 2)
    with pytest.raises(ValueError) as caught:
        load_strictly(network(0), tensors, source="x")
    for part in ("1 unexpected (first: img_emb.proj.0.weight)", "patch_embedding.weight has the wrong shape (16, 36,"):
        assert part in str(caught.value)


def test_other_sizes_are_named() -> None:
    with torch.device("meta"):
        small, large = (DiT(PRESETS[name]) for name in ("wan-1.3b", "wan-14b"))
    with pytest.raises(
        ValueError, match=r"is of another model size: patch_embedding.weight has .* looks like: wan-14b \(width 5120"
    ):
        check_fits(small, large.state_dict(), source="x")
    with pytest.raises(ValueError, match=r"the network \(wan-14b .* looks like: wan-1.3b \(width 1536, 30 blocks\)"):
        check_fits(large, small.state_dict(), source="x")
    state = small.state_dict()
    state["patch_embedding.weight"] = torch.empty(1536, 36, 1, 2, 2, device="meta")
    with pytest.raises(
        ValueError, match=r"patch_embedding.weight has the wrong shape .* image-to-video \(36 input channels"
    ):
        check_fits(small, state, source="x")


@pytest.mark.parametrize("change", ["scale", "float8", "integers"])
def test_quantised_weights_are_refused(change: str, tmp_path: Path) -> None:
    path, tensors = tmp_path / "weights.safetensors", named("model.diffusion_model.")
    name = "model.diffusion_model.blocks.0.ffn.0.weight"
    if change == "scale":
        tensors["model.diffusion_model.blocks.0.ffn.0.scale_weight"] = torch.ones(())
    else:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn if change == "float8" else torch.int8)
    write_tensors(path, tensors)
    refused(path, "fp8 (quantised) weights" if change != "integers" else "integers", "bfloat16")


def shards(folder: Path, count: int = 3) -> Path:
    """The network as a folder of shards with its index; -> the index."""
    net = network(1)
    size = sum(value.numel() * 4 for value in net.state_dict().values())
    write_folder(folder, net.state_dict(), CONFIG, "wan", shard_bytes=size // count + 800)
    return folder / "diffusion_pytorch_model.safetensors.index.json"


def test_shards_are_read_by_folder_and_by_index(tmp_path: Path) -> None:
    index = shards(tmp_path / "wan")
    assert len(list(index.parent.glob("*.safetensors"))) == 3
    for path in (index, index.parent):
        net = network(0)
        load_file_into(net, path)
        assert same(net)
    one = sorted(index.parent.glob("*.safetensors"))[0]
    refused(one, "one shard of several", str(index.parent))


def test_broken_shards_are_named(tmp_path: Path) -> None:
    index = shards(tmp_path / "wan")
    _, second, third = sorted(index.parent.glob("*.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-10])
    refused(index.parent, second.name, f"shorter than its header says, {len(whole) - 10} of {len(whole)} bytes")
    second.unlink()
    refused(index.parent, "lacks 1 of the 3 shards", index.name, f"(missing: {second.name})")
    second.write_bytes(third.read_bytes())
    refused(index.parent, second.name, "not the shard that", "describes")
    second.write_bytes(whole)
    load_file_into(network(0), index.parent)
    told = json.loads(index.read_text())
    name = next(name for name, shard in told["weight_map"].items() if shard == third.name)
    index.write_text(json.dumps({"weight_map": {key: v for key, v in told["weight_map"].items() if key != name}}))
    refused(index.parent, third.name, f"{name} is in the shard but not in the index")
    index.write_text(json.dumps({"weight_map": told["weight_map"] | {"head.extra": third.name}}))
    refused(index.parent, third.name, "head.extra is in the index but not in the shard")
    index.write_text("{}")
    refused(index.parent, "no weight_map")


def test_folders_hold_one_set_of_weights(tmp_path: Path) -> None:
    folder = tmp_path / "pipe"
    refused(tmp_path / "nothing.pt", "not found")
    write_tensors(folder / "transformer" / "diffusion_pytorch_model.safetensors", network(1).state_dict())
    write_tensors(folder / "vae" / "x.safetensors", {"a": torch.ones(1)})
    load_file_into(net := network(0), folder)
    assert same(net)
    write_tensors(folder / "transformer" / "other.safetensors", network(1).state_dict())
    load_file_into(network(0), folder)  # the released name goes before others
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").rename(folder / "transformer" / "b.safetensors")
    refused(folder, "no single set of weights", "2 .safetensors files")


def test_heads_are_compared_with_the_config_beside(tmp_path: Path) -> None:
    shards(tmp_path / "wan")
    with pytest.raises(ValueError, match=r"network with 2 heads, as its config\.json says, not 4"):
        load_file_into(DiT(dataclasses.replace(CONFIG, heads=4)), tmp_path / "wan")
    with pytest.raises(ValueError, match=r"network with 2 heads"):
        load_denoiser(tmp_path / "wan", dataclasses.replace(CONFIG, heads=4))
    (tmp_path / "wan" / "config.json").write_text('{"num_heads": 7}')  # not one of Wan's: says nothing
    load_denoiser(tmp_path / "wan", CONFIG)


def test_files_are_mapped_and_not_copied(tmp_path: Path) -> None:
    """What is read has no memory of its own until it is used: the storage belongs to the file."""
    pickled, safe = tmp_path / "weights.pt", tmp_path / "weights.safetensors"
    torch.save({"generator": named("model.")}, pickled)
    write_tensors(safe, network(1).state_dict())
    for path in (pickled, safe):
        denoiser = load_denoiser(path, CONFIG)
        assert same(denoiser.model)
        where = {parameter.data_ptr() for parameter in denoiser.parameters()}
        lines = Path("/proc/self/maps").read_text().splitlines() if Path("/proc/self/maps").exists() else []
        spans = [line.split()[0].split("-") for line in lines if line.endswith(str(path))]
        assert not lines or all(any(int(a, 16) <= p < int(b, 16) for a, b in spans) for p in where)


def test_types_are_kept_or_changed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"generator": {name: value.bfloat16() for name, value in named("model.").items()}}, path)
    kept, wide = load_denoiser(path, CONFIG, dtype=None), load_denoiser(path, CONFIG)
    assert {p.dtype for p in kept.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert torch.equal(kept.model.head.head.weight.float(), wide.model.head.head.weight)
    assert not kept.training and not any(p.requires_grad for p in kept.parameters())


def test_random_networks_depend_on_their_seed_and_use_all_inputs() -> None:
    before = torch.random.get_rng_state()
    one, two, other = (random_denoiser(CONFIG, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()
        assert a.ndim == 1 or not torch.equal(a, c), name
        assert a.ndim > 1 or float(a.unique()) == float(not name.endswith("bias")), name
    x, sigma = torch.randn(1, 2, 2, 4, 4), torch.full((1, 2), 0.5)
    text = torch.randn(1, 4, 8)
    with torch.no_grad():
        y = one(x, sigma, Conditioning(text))
        assert not torch.allclose(y, one(x, sigma, Conditioning(text + 1)), atol=1e-6)
        assert not torch.allclose(y, one(x, sigma / 2, Conditioning(text)), atol=1e-6)
        half = random_denoiser(CONFIG, dtype=torch.bfloat16)
        assert half(x, sigma, Conditioning(text)).dtype == torch.float32
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_full_size_names_survive_every_layout() -> None:
    """Law 8 at 1.3B and 14B, names and shapes alone: every layout is met strictly on the way back."""
    for preset in ("wan-1.3b", "wan-14b"):
        with torch.device("meta"):
            net = DiT(PRESETS[preset])
        state = net.state_dict()
        for layout in LAYOUTS:
            there = to_layout(state, layout)
            assert len(set(there)) == len(state)
            assert layout == "wan" or set(there) != set(state)
            back = from_layout(there)
            assert list(back) == list(state) and all(back[name] is state[name] for name in state)
            load_strictly(net, back, source=layout, assign=True)
    with pytest.raises(ValueError, match="layout must be one of wan, official, diffusers, comfyui"):
        to_layout(state, "gguf")


@pytest.mark.skipif(not (FOLDER / KEYS).is_file(), reason=f"no {KEYS} in {FOLDER} (set CAUSALREEL_GOLDEN)")
def test_recorded_names_load_strictly_through_every_layout() -> None:
    recorded = json.loads((FOLDER / KEYS).read_text())
    for label, sizes in recorded["config"].items():
        if "text_len" not in sizes:
            continue
        shapes = recorded["shapes"][label]
        state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        config = Network(state, "wan", None, {}, label).config()
        assert config == PRESETS["wan-1.3b"] and len(state) == 825
        assert sum(value.numel() for value in state.values()) == 1_418_996_800
        for layout in LAYOUTS:
            with torch.device("meta"):
                net = DiT(config)
            load_strictly(net, from_layout(to_layout(state, layout)), source=layout, assign=True)


@pytest.mark.parametrize(
    ("name", "tensors", "numbers"), [("wan-1.3b", 825, 1_418_996_800), ("wan-14b", 1095, 14_288_491_584)]
)
def test_full_sizes_have_the_released_parameters(name: str, tensors: int, numbers: int) -> None:
    with torch.device("meta"):
        state = DiT(PRESETS[name]).state_dict()
    assert (len(state), sum(t.numel() for t in state.values())) == (tensors, numbers)


ADAPTERS = {
    "LoKr": "blocks.0.self_attn.q.lokr_w1",
    "LoHa": "lycoris_blocks_0_self_attn_q.hada_w1_a",
    "LoRA": "transformer.blocks.0.attn1.to_q.lora_A.weight",
    "DoRA": "diffusion_model.blocks.0.ffn.0.dora_scale",
    "OFT": "blocks.0.ffn.0.oft_blocks",
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_named_and_not_taken_for_networks(tmp_path: Path, kind: str) -> None:
    write_tensors(tmp_path / "a.safetensors", {ADAPTERS[kind]: torch.zeros(2, 2), "blocks.0.alpha": torch.zeros(1)})
    told = "--lora FILE" if kind in ("LoRA", "DoRA") else "merge it into its base model first"
    refused(tmp_path / "a.safetensors", kind, told)
    write_tensors(tmp_path / "b.safetensors", {"blocks.0.x": torch.zeros(1)})
    refused(tmp_path / "b.safetensors", "looks like: unknown")


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        ((".metadata", "__0_0.distcp"), ("distributed checkpoint", "damaged")),
        ((".metadata", "manifest.json", "trainer.pt"), ("checkpoint of a training run", "export")),
        (("model.pt",), ("model.pt; name that file", "model.pt")),
        (("a.pt", "b.pt"), ("2 PyTorch files", "a.pt")),
        (("zero_to_fp32.py", "latest"), ("DeepSpeed", "zero_to_fp32.py")),
        (("manifest.json", "trainer.pt", "config.yaml"), ("checkpoint of a training run", "export")),
        (("adapter_config.json", "adapter_model.bin"), ("PEFT", "--lora")),
        (("pytorch_model.bin.index.json",), (".bin files in shards",)),
        (("notes.txt",), ("name the file",)),
    ],
)
def test_folders_are_named_for_what_they_are(tmp_path: Path, files: tuple[str, ...], parts: tuple[str, ...]) -> None:
    folder = tmp_path / "w"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("")
    refused(folder, *parts)


def test_files_of_other_kinds_are_named(tmp_path: Path) -> None:
    for name, what in (("m.gguf", "GGUF"), ("__0_0.distcp", "DCP"), ("m.onnx", "ONNX")):
        (tmp_path / name).write_bytes(b"x" * 100)
        refused(tmp_path / name, what)


@pytest.mark.parametrize(
    ("change", "said"), [(float("nan"), "not finite: head.head.bias"), (torch.int64, "is int64, weights are")]
)
def test_a_refused_load_leaves_the_module_as_it_was(change: float | torch.dtype, said: str) -> None:
    net = network(1)
    tensors = {name: value.clone() for name, value in network(0).state_dict().items()}
    bias = tensors["head.head.bias"]
    tensors["head.head.bias"] = bias.to(change) if isinstance(change, torch.dtype) else bias.fill_(change)
    with pytest.raises(ValueError, match=f"^x: .*{said}"):
        load_strictly(net, tensors, source="x")
    assert same(net)


@pytest.mark.parametrize("top", [None, "generator"])
def test_a_counter_beside_the_weights_is_no_parameter(top: str | None, tmp_path: Path) -> None:
    path, net = tmp_path / "weights.pt", network(0)
    found = named("model.") | {"step": torch.tensor(600), "epoch": torch.tensor(1.5)}
    torch.save(found if top is None else {top: found, "step": torch.tensor(600)}, path)
    load_file_into(net, path)
    assert same(net)
    torch.save({"step": torch.tensor(600)}, path)
    refused(path, "holds no parameters")


def test_complex_weights_are_called_so(tmp_path: Path) -> None:
    path, tensors = tmp_path / "weights.safetensors", named("")
    name = next(iter(tensors))
    write_tensors(path, tensors | {name: tensors[name].to(torch.complex64)})
    refused(path, "complex numbers where weights should be", name, "complex64")
