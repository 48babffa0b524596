"""Exports and codecs on disk: round trips, strictness, and one clear line for everything that can be wrong with a file.

`small_family` makes a complete embedded family of random models, which the tests of inference and of the CLI use too.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch

from causalreel import config
from causalreel.codecs.taehv import TAEHV, TAEHVConfig
from causalreel.codecs.wan_vae import CausalVAE, VAEConfig
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.masks import Context
from causalreel.nn.presets import PRESETS, ModelConfig
from causalreel.types import LatentSpec
from causalreel.weights.export import (
    Export,
    Sampling,
    codec_file,
    load_codec,
    load_export,
    read_codec,
    read_export,
    save_codec,
    save_export,
)
from causalreel.weights.files import read_metadata, read_tensors, write_tensors
from causalreel.weights.re_export import re_export

SMALL = PRESETS["tiny-smoke"]
SMALL_CODEC = VAEConfig(dim=4, res_blocks=1, latent_std=tuple([2.0] * 16))
SAMPLINGS = {
    "frame-2step": Sampling(1, (1000.0, 500.0)),
    "frame-1step": Sampling(1, (1000.0,), first_steps=(1000.0, 500.0)),
    "chunk-4step": Sampling(4, (1000.0, 750.0, 500.0, 250.0)),
}


def small_denoiser(model: ModelConfig = SMALL, seed: int = 0) -> DiTDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = DiTDenoiser(model)
        torch.nn.init.normal_(net.model.head.head.weight, std=0.2)
    return net


def small_export(name: str = "small", sampling: Sampling = SAMPLINGS["frame-2step"], **changes) -> Export:
    export = Export(name, SMALL, sampling, Context(), 12, 16.0, LatentSpec(16, 4, 4), codec="..")
    return dataclasses.replace(export, **changes)


def small_family(root: Path) -> Path:
    """root/tiny with a codec and the three variants, all random; -> root, to be used as the folder of assets."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        save_codec(root / "tiny", CausalVAE(SMALL_CODEC))
    for variant, sampling in SAMPLINGS.items():
        save_export(root / "tiny" / variant, small_denoiser(), small_export(f"tiny/{variant}", sampling))
    return root


def refuses(path: Path, *parts: str) -> None:
    """Loading fails with one line that contains all of `parts`."""
    with pytest.raises(ValueError) as caught:
        load_export(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_export_comes_back_as_saved(tmp_path: Path) -> None:
    net = small_denoiser()
    export = small_export(context=Context(window=8, sink=1), provenance={"recipe": "tiny/dmd", "metrics": {"x": 0.5}})
    save_export(tmp_path / "a", net, export, dtype=torch.float32)
    state = torch.get_rng_state()
    loaded, read = load_export(tmp_path / "a", compute=torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), state)
    assert read == export and loaded.context == export.context and loaded.compute == torch.bfloat16
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, value in net.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], value), name
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.yaml", "model.safetensors"]


def test_files_hold_bfloat16_under_the_networks_own_names(tmp_path: Path) -> None:
    save_export(tmp_path, small_denoiser(), small_export())
    tensors = read_tensors(tmp_path / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert "blocks.0.self_attn.q.weight" in tensors and "patch_embedding.weight" in tensors
    assert read_metadata(tmp_path / "model.safetensors")["name"] == "small"
    assert {p.dtype for p in load_export(tmp_path)[0].parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "sampling",
    [
        *SAMPLINGS.values(),
        Sampling(None, (), multistep=48, solver="euler", guidance=3.0),
        Sampling(6, multistep=1, solver="unipc"),
    ],
)
def test_config_survives_yaml(sampling: Sampling) -> None:
    export = small_export(sampling=sampling, provenance={"seed": 3})
    assert config.loads(config.dump(export), Export) == export


def test_codec_comes_back_with_its_statistics(tmp_path: Path) -> None:
    codec = CausalVAE(SMALL_CODEC)
    codec.set_statistics([0.5] * 16, [3.0] * 16)
    save_codec(tmp_path / "c", codec, {"recipe": "tiny/codec"}, dtype=torch.float32)
    loaded = load_codec(tmp_path / "c" / "codec.safetensors")
    video = torch.rand(1, 5, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        latents = codec.encode(video)
        assert torch.equal(loaded.encode(video), latents)
        assert torch.equal(load_codec(tmp_path / "c").decode(latents), codec.decode(latents))
    assert loaded.config == codec.config


def test_a_codec_is_named_by_family_folder_or_file() -> None:
    here = Path("exports/mine")
    assert codec_file(here, "tiny").parts[-3:] == ("assets", "tiny", "codec.safetensors")
    assert codec_file(here, "..") == here / ".." / "codec.safetensors"
    assert codec_file(here, "../codec-run/export") == here / "../codec-run/export/codec.safetensors"
    assert codec_file(here, "codec.safetensors") == here / "codec.safetensors"


def test_an_export_can_carry_its_codec(tmp_path: Path) -> None:
    save_export(tmp_path, small_denoiser(), small_export(), codec=CausalVAE(SMALL_CODEC))
    assert load_codec(codec_file(tmp_path, read_export(tmp_path).codec)).config == SMALL_CODEC


@pytest.mark.parametrize("size", [0, 5, 500, -100])
def test_truncated_weights_are_refused(tmp_path: Path, size: int) -> None:
    save_export(tmp_path, small_denoiser(), small_export())
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refuses(tmp_path, "model.safetensors", "damaged or was cut off")


def test_missing_files_are_named(tmp_path: Path) -> None:
    refuses(tmp_path, "is not an export", "config.yaml")
    save_export(tmp_path, small_denoiser(), small_export())
    (tmp_path / "model.safetensors").unlink()
    refuses(tmp_path, "model.safetensors", "not found")
    with pytest.raises(ValueError, match=r"no codec at .*codec\.yaml is missing"):
        load_codec(tmp_path)


def test_weights_of_another_export_are_refused(tmp_path: Path) -> None:
    """The same sizes, so that nothing but the recorded identity can tell."""
    save_export(tmp_path / "a", small_denoiser(), small_export("a"))
    save_export(tmp_path / "b", small_denoiser(seed=1), small_export("b"))
    shutil.copy(tmp_path / "b" / "model.safetensors", tmp_path / "a" / "model.safetensors")
    refuses(tmp_path / "a", "weights of 'b'", "not of 'a'")


def test_weights_of_another_size_are_refused(tmp_path: Path) -> None:
    larger = dataclasses.replace(SMALL, ffn_dim=160)
    save_export(tmp_path, small_denoiser(), small_export())
    write_tensors(tmp_path / "model.safetensors", small_denoiser(larger).model.state_dict())
    refuses(tmp_path, "another model size", "ffn")


def test_a_missing_or_extra_tensor_is_refused(tmp_path: Path) -> None:
    save_export(tmp_path, small_denoiser(), small_export())
    tensors = read_tensors(tmp_path / "model.safetensors")
    bias = tensors.pop("head.head.bias")
    write_tensors(tmp_path / "model.safetensors", tensors)
    refuses(tmp_path, "1 names missing (first: head.head.bias)")
    write_tensors(tmp_path / "model.safetensors", {**tensors, "head.head.bias": bias, "extra": bias + 1})
    refuses(tmp_path, "1 unexpected (first: extra)")


def test_sampling_may_be_edited_by_hand_and_typing_errors_are_found(tmp_path: Path) -> None:
    save_export(tmp_path, small_denoiser(), small_export())
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("shift: 5.0", "shift: 4.0"))
    assert load_export(tmp_path)[1].sampling.shift == 4.0
    path.write_text(path.read_text().replace("shift: 4.0", "shfit: 4.0"))
    refuses(tmp_path, "shfit", "did you mean 'shift'")


def test_saving_another_network_than_the_config_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="differs from the saved network"):
        save_export(tmp_path / "a", small_denoiser(dataclasses.replace(SMALL, ffn_dim=160)), small_export())
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"steps": (500.0, 1000.0)}, "steps must fall"),
        ({"steps": ()}, "steps must fall"),
        ({"first_steps": (1000.0, 1000.0)}, "steps must fall"),
        ({"multistep": 10}, "multistep must be"),
        ({"guidance": 0.0}, "guidance must be positive"),
        ({"shift": 0.5}, "shift must be at least 1"),
    ],
)
def test_impossible_sampling_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**changes)


def test_impossible_exports_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of chunk 5"):
        small_export(sampling=Sampling(5))
    with pytest.raises(ValueError, match="latent has 4 channels, the model 16"):
        small_export(latent=LatentSpec(4, 4, 4))


def test_codecs_of_any_kind_are_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    codec = TAEHV(TAEHVConfig(channels=4, encoder_width=8, decoder_widths=(8, 8, 4, 4), blocks=1))
    save_codec(tmp_path, codec, dtype=torch.float32)
    loaded, latents = load_codec(tmp_path), torch.randn(1, 2, 4, 2, 2)
    assert read_codec(tmp_path).kind == "taehv" and torch.equal(loaded.decode(latents), codec.decode(latents))
    text = (tmp_path / "codec.yaml").read_text()
    for wrong, said in {
        "channels: 5": "another codec than the config beside it: channels is 4, not 5",
        "blocks: 64": "another codec than the config beside it",
    }.items():
        name = wrong.split(":")[0]
        (tmp_path / "codec.yaml").write_text(re.sub(rf"{name}: \d+", wrong, text))
        with pytest.raises(ValueError, match=said):
            load_codec(tmp_path)
    for wrong, said in {"kind: jpeg": "kind must be one of wan, taehv", "kind: wan": "unknown key"}.items():
        (tmp_path / "codec.yaml").write_text(text.replace("kind: taehv", wrong))
        with pytest.raises(ValueError, match=said):
            load_codec(tmp_path)
    (tmp_path / "codec.yaml").write_text("codec: small\nkind: taehv\n")
    with pytest.raises(ValueError, match="codec must be a mapping with the keys of TAEHVConfig, got 'small'"):
        load_codec(tmp_path)


def with_shared(root: Path, name: str = "b", **changes: str) -> Path:
    """root/a, an export, and root/<name> of its weights in one step -> the latter, its config changed by hand."""
    if not (root / "a").exists():
        save_export(root / "a", small_denoiser(), small_export("a"))
    how = {"name": name, "codec": "..", "sampling": SAMPLINGS["frame-1step"], "weights_of": "a"}
    folder = re_export(root / "a", root / name, **how)
    text = (folder / "config.yaml").read_text()
    for key, value in changes.items():
        text = re.sub(rf"(?m)^{key}: .*$", f"{key}: {value}".replace("\\", r"\\"), text)
    (folder / "config.yaml").write_text(text)
    return folder


def test_an_export_can_have_the_weights_of_another(tmp_path: Path) -> None:
    save_export(tmp_path / "b", small_denoiser(seed=1), small_export("of before"))
    folder = with_shared(tmp_path)
    assert [file.name for file in folder.iterdir()] == ["config.yaml"]
    (one, export), (own, _) = load_export(folder), load_export(tmp_path / "a")
    assert export.name == "b" and len(export.sampling.steps) == 1 and export.weights_of == "a"
    states = [denoiser.model.state_dict() for denoiser in (one, own)]
    assert states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )
    save_export(tmp_path / "c", one, export)  # written again it has its own
    assert load_export(tmp_path / "c")[1].weights_of is None


def test_an_export_can_be_the_mean_of_several(tmp_path: Path) -> None:
    for seed, name in enumerate("abc"):
        scored = small_export(name, provenance={"metrics": {"follow": 1.0}, "seed": seed})
        save_export(tmp_path / name, small_denoiser(seed=seed), scored)
    others = [tmp_path / "b", tmp_path / "c"]
    folder = re_export(tmp_path / "a", tmp_path / "mean", name="mean", codec="..", mean_with=others)
    mean, *own = (read_tensors(tmp_path / name / "model.safetensors") for name in ("mean", "a", "b", "c"))
    for name, value in mean.items():
        exact = sum(tensors[name].float() for tensors in own) / 3
        assert torch.equal(value, exact.to(value.dtype)), name
    assert not torch.equal(mean["head.head.weight"], own[0]["head.head.weight"])
    export = load_export(folder)[1]
    marks = {name: load_export(tmp_path / name)[1].weights for name in "abc"}
    assert export.provenance == {"seed": 0, "mean_of": marks} and len(set(marks.values())) == 3


def test_a_mean_of_networks_that_differ_is_refused(tmp_path: Path) -> None:
    save_export(tmp_path / "a", small_denoiser(), small_export("a"))
    larger = dataclasses.replace(SMALL, ffn_dim=160)
    save_export(tmp_path / "b", small_denoiser(larger), small_export("b", model=larger))
    with pytest.raises(ValueError, match=r"mean_with: .*b must have the model of a"):
        re_export(tmp_path / "a", tmp_path / "d", codec="..", mean_with=[tmp_path / "b"])
    assert not (tmp_path / "d").exists()


def test_weights_of_another_are_looked_for_beside_the_export_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_export(tmp_path / "elsewhere", small_denoiser(), small_export("a"))
    for wrong in ("../a", "a/../../elsewhere", str(tmp_path / "elsewhere"), "..", ".", "''", '"a\\0"'):
        folder = with_shared(tmp_path / "here", weights_of=wrong)
        refuses(folder, "weights_of must be the plain name of a folder beside this one")
    refuses(with_shared(tmp_path / "here", weights="''"), "and weights the hash")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "elsewhere")
    refuses(with_shared(tmp_path / "here", weights_of="link"), "a link that leads out")
    monkeypatch.chdir(with_shared(tmp_path / "here"))
    assert load_export(".")[1].name == "b"


def test_weights_of_another_that_cannot_be_had_are_one_line(tmp_path: Path) -> None:
    refuses(with_shared(tmp_path, weights_of="gone"), "weights_of", "gone is not an export")
    refuses(with_shared(tmp_path, weights_of="b"), "weights_of must name an export that has its own weights", "'b'")
    with_shared(tmp_path)
    refuses(with_shared(tmp_path, "c", weights_of="b"), "must name an export that has its own weights", "those of 'a'")
    with pytest.raises(ValueError, match="must name an export that has its own weights"):
        re_export(tmp_path / "a", tmp_path / "d", codec="..", weights_of="b")
    save_export(tmp_path / "other", small_denoiser(seed=1), small_export("other"))
    with pytest.raises(ValueError, match="holds other weights than a"):
        re_export(tmp_path / "a", tmp_path / "d", codec="..", weights_of="other")
    with pytest.raises(ValueError, match=r"must name another export than .*, which would lose its weights"):
        re_export(tmp_path / "a", tmp_path / "a", codec="..", weights_of="a")
    load_export(tmp_path / "a")
    with pytest.raises(ValueError, match="codec: name one"):
        re_export(tmp_path / "a", tmp_path / "d", weights_of="a")
    assert not (tmp_path / "d").exists()


def test_weights_of_another_that_are_new_are_refused(tmp_path: Path) -> None:
    """Nothing changes beneath a model: it was written for certain weights."""
    folder = with_shared(tmp_path)
    save_export(tmp_path / "a", small_denoiser(seed=1), small_export("a"))
    refuses(folder, "does not hold the weights that", "b/config.yaml was written for")
    larger = dataclasses.replace(SMALL, ffn_dim=160)
    save_export(tmp_path / "a", small_denoiser(larger), small_export("a", model=larger))
    refuses(folder, "holds the weights of 'a'", "not of 'a' as")
    (tmp_path / "a/model.safetensors").unlink()
    refuses(folder, "weights file not found")
