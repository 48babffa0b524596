"""What a weights file looks like, in words, and what would load it: for messages about files that do not fit."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from causalreel.foreign import shown
from causalreel.nn.presets import PRESETS, Camera, ModelConfig


@dataclass(frozen=True)
class Kind:
    """A kind of file, known by fragments that some of its names contain."""

    what: str
    marks: tuple[str, ...]
    hint: str
    """What would load it, or that nothing here does."""
    ends: tuple[str, ...] = ()
    """Or by how some of its names end."""


MERGE = "it changes a base model and is none: merge it into its base model first, with the tool that made it"

LORA = "it changes a base model and is none: choose the base model and add --lora FILE[:STRENGTH]"

KINDS = (
    Kind("LoKr (LyCORIS)", ("lokr_w1", "lokr_w2", "lokr_t2"), MERGE),
    Kind("LoHa (LyCORIS)", ("hada_w1", "hada_w2", "hada_t1"), MERGE),
    Kind("OFT (LyCORIS)", ("oft_blocks", "oft_diag", "oft_R"), MERGE),
    Kind("DoRA", ("dora_scale", "lora_magnitude_vector"), LORA),
    Kind("LoRA", ("lora_A", "lora_B", "lora_down", "lora_up", ".lora."), LORA, (".diff", ".diff_b", ".diff_m")),
    Kind("an optimiser's state", ("exp_avg", "param_groups"), "give the file of the network itself"),
    Kind("VACE (control) model", ("vace_blocks.", "vace_patch_embedding."), "VACE models are not supported"),
    Kind(
        "Wan image-to-video",
        ("img_emb.", "k_img", "image_embedder.", "add_k_proj"),
        "it needs CLIP image features; frame-wise text-to-video models start from a picture with --image",
    ),
    Kind("camera (minWM)", ("prope_o.",), "it needs the camera branch, which this network has not"),
    Kind(
        "critic with a GAN branch",
        ("cls_pred_branch", "gan_ca_blocks", "register_tokens"),
        "a critic scores videos and makes none; give the file of its generator",
    ),
    Kind(
        "umT5 text encoder",
        ("token_embedding.", "shared.weight", "encoder.block.", "pos_embedding.embedding"),
        "it belongs into the folder given with --wan-dir",
    ),
    Kind(
        "Wan VAE",
        ("encoder.downsamples.", "decoder.upsamples.", "decoder.up_blocks.", "encoder.down_blocks."),
        "it belongs into the folder given with --wan-dir",
    ),
    Kind(
        "TAEHV (tiny decoder)",
        ("decoder.1.weight", "encoder.0.weight"),
        "it belongs into the folder given with --wan-dir, for --decoder taehv",
    ),
    Kind("diffusers", ("condition_embedder.", "scale_shift_table", "attn1."), "causalreel convert reads it"),
    Kind("ComfyUI repack", ("diffusion_model.",), "causalreel convert reads it"),
)
"""In the order in which they are tried."""


def guess_layout(names: Iterable[str]) -> str:
    """What kind of file these names suggest, in words."""
    names = list(names)
    kind = guess_kind(names)
    if kind is not None:
        return kind.what
    is_wan = any(
        re.fullmatch(r"blocks\.\d+\.((self_attn\.[qkvo]|ffn\.[02])\.weight|modulation)", name) for name in names
    )
    return "Wan2.1 / Causal Forcing" if is_wan else "unknown"


def guess_kind(names: Iterable[str]) -> Kind | None:
    """The kind of file that these names suggest, if it is none of Wan2.1's own."""
    names = list(names)
    found = (
        kind
        for kind in KINDS
        if any(name.endswith(kind.ends) or any(mark in name for mark in kind.marks) for name in names)
    )
    return next(found, None)


SUFFIXES = {
    ".gguf": "a GGUF file, whose quantised weights are not read",
    ".distcp": "a part of a distributed checkpoint (DCP); name its folder",
    ".onnx": "an ONNX program",
    ".engine": "a TensorRT program",
    ".msgpack": "weights of Flax",
    ".h5": "weights of Keras",
    ".npz": "arrays of NumPy",
    ".zip": "an archive: unpack it first",
    ".tar": "an archive: unpack it first",
    ".gz": "an archive: unpack it first",
}
"""Suffix of a file that holds no weights that are read -> what it is."""


def folder_in_words(folder: Path) -> str | None:
    """What a folder without weights that are read here holds instead, and what would load or convert it."""
    names = sorted(path.name for path in itertools.islice(folder.iterdir(), 10_000))
    pickles = [name for name in names if Path(name).suffix in (".pt", ".pth", ".ckpt", ".bin")]
    if "zero_to_fp32.py" in names or any("model_states" in name for name in pickles):
        return f"it is a checkpoint of DeepSpeed; python zero_to_fp32.py {folder} OUT, which lies in it, converts it"
    if "manifest.json" in names and "trainer.pt" in names:
        return "it is a checkpoint of a training run, from which only training goes on; name the run's export folder"
    if any(name.endswith(".bin.index.json") for name in names):
        return "its weights are .bin files in shards; save them again as .safetensors"
    if "adapter_config.json" in names:
        return f"it is an adapter (PEFT, such as LoRA); {LORA}"
    if "export" in names and (folder / "export").is_dir():
        return f"it is the folder of a training run; name its export {folder / 'export'}"
    if len(pickles) == 1:
        return f"its weights are {shown(pickles[0])}; name that file, {shown(str(folder / pickles[0]), 300)}"
    if pickles:
        return f"it has {len(pickles)} PyTorch files, such as {shown(pickles[0])}; name one of them"
    if "config.yaml" in names:
        return "an export may have the weights of another one beside it, which weights_of in its config.yaml names"
    return None


def describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """One clause on what tensors of these names and shapes are, for a message: what they look like, what loads them."""
    kind = guess_kind(shapes)
    if kind is not None:
        return f"the file looks like: {kind.what}; {kind.hint}"
    config = config_of(shapes)
    if config is None:
        return f"the file looks like: {guess_layout(shapes)}"
    channels = shapes["patch_embedding.weight"][1]
    if channels in CHANNELS:
        return f"the file looks like: {CHANNELS[channels]} ({channels} input channels), which is not supported"
    return f"the file looks like: {size_in_words(config)}"


LAYERS = 1000
"""Blocks of a network at most; a block has about 25 tensors."""

CHANNELS = {36: "Wan image-to-video", 32: "a Wan control or inpainting model", 48: "Wan2.2 TI2V-5B"}
"""Input channels -> the model that has them, where it is not text-to-video's 16."""


def size_in_words(config: ModelConfig) -> str:
    """A size as its preset's name where it has one; heads and text length do not show in a file."""
    name = preset_of(config)
    numbers = f"width {config.dim}, {config.layers} blocks"
    return f"{name} ({numbers})" if name else f"a Wan network of {numbers}"


def preset_of(config: ModelConfig) -> str | None:
    """The preset whose parameters have these shapes."""
    return next((name for name, row in PRESETS.items() if visible(row) == visible(config)), None)


def config_of(shapes: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any] | None = None) -> ModelConfig | None:
    """The sizes that Wan2.1's names and shapes show; None if too little is there.

    facts: the config.json beside the weights, if any. Heads and text length are not in shapes: they come from facts,
    else from the preset of this size, else they are Wan2.1's (heads of width 128 where that goes, 512 tokens).
    """
    keys = ("patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight", "blocks.0.ffn.0.weight")
    if any(len(shapes.get(key, ())) < 2 or 0 in shapes[key] for key in keys):
        return None
    patch, text, time, ffn = (shapes[key] for key in keys)
    if len(shapes) > 40 * LAYERS:
        return None
    blocks = [name for name in shapes if re.fullmatch(r"blocks\.\d+\.ffn\.0\.weight", name)]
    seen = ModelConfig(
        dim=patch[0],
        ffn_dim=ffn[0],
        heads=1 if patch[0] % 128 else patch[0] // 128,
        layers=len(blocks),
        text_dim=text[1],
        text_length=512,
        freq_dim=time[1],
        channels=patch[1],
        patch=patch[-1],
    )
    preset = preset_of(seen)
    known = PRESETS[preset] if preset else seen
    facts = facts or {}
    return replace(
        seen,
        heads=int(facts.get("num_heads") or facts.get("num_attention_heads") or known.heads),
        text_length=int(facts.get("text_len") or known.text_length),
        eps=float(facts.get("eps") or known.eps),
        camera=_camera_of(shapes),
        actions=shapes.get("action_embedding.0.weight", (0, 0))[-1],
    )


def _camera_of(shapes: Mapping[str, tuple[int, ...]]) -> Camera:
    """How cameras enter a network, by what it has for them."""
    if "blocks.0.self_attn.prope_o.weight" in shapes:
        return "prope"
    return "embedded" if "camera_embedding.0.weight" in shapes else "none"


def visible(config: ModelConfig) -> dict[str, int]:
    """The sizes that show in the shapes of parameters."""
    fields = ("dim", "ffn_dim", "layers", "text_dim", "freq_dim", "channels", "patch")
    return {field: getattr(config, field) for field in fields}
