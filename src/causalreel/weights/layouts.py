"""From a file's layout to the network's names, and back, strictly.

Our parameter names are Wan2.1's; what Causal-rCM writes is in `weights.rcm`. Four layouts are read and written:

    wan        bare names: .safetensors, one or in shards with an index, or the folder of them
    official   released Causal Forcing and Self Forcing .pt: a top-level key chooses the weights (raw or averaged),
               every name begins with `model.`, and training wrappers leave segments anywhere in a name
    diffusers  the folder of a WanTransformer3DModel, or its files
    comfyui    a repack with `model.diffusion_model.` or `diffusion_model.` in front

The released inference script loads names it does not understand non-strictly, so that weights can be missing in
silence; here every name and shape must fit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from causalreel.foreign import TEXT_BYTES, number_of, ordinary_file, read_json, shown
from causalreel.headers import NAME
from causalreel.nn.presets import ModelConfig
from causalreel.weights import rcm
from causalreel.weights.diffusers import from_diffusers, to_diffusers
from causalreel.weights.files import PICKLE_SUFFIXES, read_shards, read_tensors
from causalreel.weights.identify import LORA, config_of, describe, folder_in_words, guess_layout
from causalreel.weights.strict import load_strictly

log = logging.getLogger(__name__)

LAYOUTS = ("wan", "official", "diffusers", "comfyui")

TOP_LEVEL = ("generator", "model", "generator_ema", "net_ema", "net")
"""Top-level keys of released .pt files, in the order tried when none is asked for, as the released trainers do; and the
prefixes of networks that lie side by side."""

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")
"""Name segments that FSDP, activation checkpointing, compile and DataParallel leave behind."""

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "net.")
"""What may stand in front of every name, once the wrappers are gone."""

FOLDER_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
"""What a folder of weights in one file calls it."""

FP8 = tuple(getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2") if hasattr(torch, name))


@dataclass(frozen=True)
class Network:
    """A network's tensors under Wan2.1's names, and where they come from. The tensors are mapped from the file."""

    tensors: dict[str, Tensor]
    layout: str
    """One of LAYOUTS."""
    which: str | None
    """The top-level key that they stood under, if any."""
    facts: dict[str, Any]
    """The config.json beside them; empty if there is none."""
    source: str
    """File or folder, for messages."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def config(self) -> ModelConfig:
        """The sizes that names, shapes and config.json show; ValueError if this is no Wan network."""
        config = config_of(self.shapes, self.facts)
        if config is None:
            raise ValueError(f"{self.source} holds no Wan network; {describe(self.shapes)}")
        return config


def read_network(path: str | Path, which: str | None = None) -> Network:
    """A file or folder of any known layout -> its network under Wan2.1's names. Nothing is checked against a size yet.

    which: a top-level key of a .pt file, such as generator_ema; None is the first of generator, model, generator_ema.
    """
    path = _settle(Path(path))
    if path.is_dir():
        found: Mapping[str, Any] = rcm.read_folder(path)
    else:
        found = read_shards(path) if path.name.endswith(".index.json") else read_tensors(path)
    facts = {} if path.suffix in PICKLE_SUFFIXES else _facts(path.parent)
    tensors, key = choose(rcm.by_network(found), which, source=str(path))
    try:
        bare = bare_names(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    layout = _layout(tensors, bare, key, path)
    if layout == "diffusers":
        bare = {from_diffusers(name): value for name, value in bare.items()}
    bare = rcm.with_convolution(bare)
    _refuse_quantised(bare, path)
    return Network(bare, layout, key, facts, str(path))


def to_layout(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Tensors under Wan2.1's names -> the same tensors under the layout's; top-level keys are the writer's business."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    if layout == "diffusers":
        return {to_diffusers(name): value for name, value in tensors.items()}
    prefix = {"wan": "", "official": "model.", "comfyui": "model.diffusion_model."}[layout]
    return {prefix + name: value for name, value in tensors.items()}


def from_layout(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under any layout's names -> the same tensors under Wan2.1's."""
    bare = bare_names(tensors)
    return {from_diffusers(name): value for name, value in bare.items()} if guess_layout(bare) == "diffusers" else bare


def select(found: Mapping[str, Any], which: str | None = None) -> dict[str, Tensor]:
    """What a file holds -> name -> tensor. which: a top-level key such as generator_ema; None is the first known."""
    return choose(found, which)[0]


def choose(
    found: Mapping[str, Any], which: str | None = None, *, source: str = "the file"
) -> tuple[dict[str, Tensor], str | None]:
    """As `select`, and the top-level key that was taken, if any; `source` is for messages."""
    nested = [str(key) for key, value in found.items() if isinstance(value, Mapping)]
    flat = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    bare = [name for name in flat if "." in str(name)]  # a step counter beside the networks is no network
    if which is not None and which not in nested:
        raise ValueError(
            f"{source}: the file has no weights called {which!r}; it has "
            f"{shown(', '.join(nested), 300) or 'only bare tensors'}{_told_by(nested)}"
        )
    if which is None:
        which = next((key for key in TOP_LEVEL if key in nested), None)
        if which is None and nested and not bare:
            raise ValueError(f"{source}: {_no_generator(nested)}")
        if which == "generator_ema":
            log.info("%s has only the averaged weights (generator_ema), which are used", source)
    chosen = flat if which is None else {n: v for n, v in found[which].items() if isinstance(v, Tensor)}
    chosen = {name: value for name, value in chosen.items() if not _is_counter(str(name), value)}
    if not chosen:
        raise ValueError(f"{source} holds no parameters" + (f" under {which!r}" if which else ""))
    return chosen, which


def _is_counter(name: str, value: Tensor) -> bool:
    """A number beside the weights, such as `step`: parameters of a network have a dot in their name, or a shape."""
    return "." not in name and value.ndim == 0 and value.dtype not in FP8


def bare_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop wrapper segments anywhere in a name, then one prefix of PREFIXES; no parameter is called like either."""
    cleaned: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(name, str) or len(name) > NAME:
            raise ValueError(
                f"a tensor is named {shown(name)} ({type(name).__name__}), names are texts, at most {NAME} long"
            )
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        bare = next((bare.removeprefix(prefix) for prefix in PREFIXES if bare.startswith(prefix)), bare)
        if bare in cleaned:
            raise ValueError(f"two names of the file map to one parameter: they come to the same name '{shown(bare)}'")
        cleaned[bare] = value
    return cleaned


def load_file_into(model: nn.Module, path: str | Path, *, which: str | None = None) -> None:
    """Load a weights file or folder of any known layout into a DiT (not its denoiser)."""
    network = read_network(path, which)
    check_heads(model, network)
    load_strictly(model, network.tensors, source=network.source)


def check_heads(model: nn.Module, network: Network) -> None:
    """ValueError if the config.json beside the weights has another number of heads: no shape shows that."""
    told = network.facts.get("num_heads") or network.facts.get("num_attention_heads")
    config = getattr(model, "config", None)
    if told and isinstance(config, ModelConfig) and int(told) != config.heads:
        raise ValueError(
            f"{network.source} is of a network with {told} heads, as its config.json says, not {config.heads}"
        )


def keys_of(path: str | Path) -> list[str]:
    """Top-level keys of a file under which networks stand, such as generator_ema; empty for bare tensors."""
    path = _settle(Path(path))
    if path.suffix not in PICKLE_SUFFIXES:
        return []
    found = read_tensors(path)
    return [key for key in ("generator", "generator_ema", "model", "critic") if isinstance(found.get(key), Mapping)]


def _settle(path: Path) -> Path:
    """A folder -> the index or the file in it, or the distributed checkpoint that it is; a file as it is."""
    if path.is_dir():
        if (folder := rcm.folder_of(path)) is not None:
            return folder
        if not any(path.glob("*.safetensors*")) and (path / "transformer").is_dir():
            path = path / "transformer"  # the folder of a diffusers pipeline
        indices = sorted(path.glob("*.safetensors.index.json"))
        files = [path / name for name in FOLDER_FILES if (path / name).is_file()]
        files = files or sorted(path.glob("*.safetensors"))
        if len(indices) == 1:
            return indices[0]
        if indices or len(files) != 1:
            there = f"{len(indices)} indices, {len(files)} .safetensors files"
            told = None if indices or files else folder_in_words(path)
            raise ValueError(f"{path} holds no single set of weights ({there}); {told or 'name the file'}")
        return files[0]
    path = ordinary_file(path, "weights file")
    if "-of-0" in path.name and path.suffix == ".safetensors":
        raise ValueError(f"{path} is one shard of several; name the folder {path.parent} or its index")
    return path


def _facts(folder: Path) -> dict[str, Any]:
    """The config.json of a folder of weights; empty if there is none, or one of something else."""
    path = folder / "config.json"
    if not path.is_file():
        return {}
    facts = read_json(path, most=TEXT_BYTES, what="config.json")
    if "Wan" not in shown(facts.get("_class_name")):
        return {}
    numbers = {"num_heads": int, "num_attention_heads": int, "text_len": int, "eps": float}
    told = {key: number_of(facts, key, str(path), kind) for key, kind in numbers.items()}
    return facts | {key: value for key, value in told.items() if value is not None}


def _layout(tensors: Mapping[str, Tensor], bare: Mapping[str, Tensor], key: str | None, path: Path) -> str:
    """Which of LAYOUTS these names are of."""
    if guess_layout(bare) == "diffusers":
        return "diffusers"
    if any("diffusion_model." in name for name in tensors):
        return "comfyui"
    is_wrapped = any(name not in bare for name in tensors)
    return "official" if key is not None or is_wrapped or path.suffix in PICKLE_SUFFIXES else "wan"


def _refuse_quantised(tensors: Mapping[str, Tensor], path: Path) -> None:
    scales = [name for name in tensors if name.endswith(("scale_weight", "scale_input", "scaled_fp8"))]
    low = [name for name, value in tensors.items() if value.dtype in FP8]
    unreal = [name for name, value in tensors.items() if value.is_complex()]
    whole = [name for name, value in tensors.items() if not value.is_floating_point() and name not in scales]
    if scales or low or whole:
        first = (low or scales or whole)[0]
        what = "fp8 (quantised) weights" if scales or low else "integers where weights should be (quantised?)"
        if unreal and not (scales or low):
            first, what = unreal[0], "complex numbers where weights should be"
        dtype = str(tensors[first].dtype).removeprefix("torch.")
        raise ValueError(
            f"{path} holds {what} (first: {shown(first)}, {dtype}), which are not read; "
            f"use the float32, bfloat16 or float16 file of the same model"
        )


def _no_generator(nested: list[str]) -> str:
    if any(key.endswith("_lora") for key in nested):
        return f"no network in the file but a LoRA ({shown(', '.join(nested), 300)}); {LORA}"
    if "critic" in nested or "net_fake_score" in nested:
        critic = "critic" if "critic" in nested else "net_fake_score"
        return (
            f"no generator in the file: it has {shown(', '.join(nested), 300)}; a critic scores videos and makes none "
            f"(--which {critic} would load it all the same)"
        )
    return (
        f"no known network in the file: it has {shown(', '.join(nested), 300)}, none of {', '.join(TOP_LEVEL)}; "
        f"--which {shown(nested[0])} would load that"
    )


def _told_by(nested: list[str]) -> str:
    """What the top-level keys of a file say about the stage that wrote it, and the flag that would load it."""
    if "generator" in nested and "generator_ema" not in nested:
        looks = "the stages 1 and 2 (AR diffusion, causal ODE) and the chunk-wise final model are saved so"
        return f"; {looks}: choose its model's name, or --which generator"
    if "generator_ema" in nested and "generator" not in nested:
        looks = "the frame-wise, 1- and 2-step, causal CD and long-video models are saved so"
        return f"; {looks}: choose its model's name, or --which generator_ema"
    return f"; --which {shown(nested[0])} would load that" if nested else "; leave --which out"
