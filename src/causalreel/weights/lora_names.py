"""Names in adapter (LoRA) files: which layer of a Wan network a key means, and which part of its change.

A key is a prefix of the program that wrote it, a layer under Wan2.1's or diffusers' name, with dots or with underscores
for them, and a suffix that says which part. Every key must be understood; none is skipped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from causalreel.foreign import shown
from causalreel.weights.diffusers import INNER, OUTER
from causalreel.weights.layouts import WRAPPERS

IMAGE_INNER = {
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
}
IMAGE_OUTER = {
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
}
"""Layers of image-to-video networks: Wan2.1's name -> diffusers'."""

CAMERA_INNER = {"self_attn.prope_o": "attn1.prope_o"}
CAMERA_OUTER = {f"{name}_embedding.{i}": f"{name}_embedding.{i}" for name in ("camera", "action") for i in (0, 2)}
"""Layers of networks that take cameras and actions (`nn.camera`), which diffusers does not have."""

INSIDE = {ours: theirs for ours, theirs in INNER.items() if ours != "modulation"} | IMAGE_INNER | CAMERA_INNER
"""Layers in a block, behind `blocks.N.`: Wan2.1's name -> diffusers'."""
OUTSIDE = {ours: theirs for ours, theirs in OUTER.items() if ours != "head.modulation"} | IMAGE_OUTER | CAMERA_OUTER
"""Layers outside the blocks."""
PREFIXES = (
    "base_model.model.",
    "model.",
    "transformer.",
    "diffusion_model.",
    "pipe.dit.",
    "dit.",
    "generator.",
    "net.",
)
"""What may stand in front of a name with dots, one or several in a row; no layer begins with any of them. Segments that
wrappers leave behind (`layouts.WRAPPERS`) may stand anywhere."""

UNDERSCORE_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")

PARTS = (
    ("down", r"(?:lora_A(?:\.[^.]+)?|lora_down|lora\.down)\.weight"),
    ("up", r"(?:lora_B(?:\.[^.]+)?|lora_up|lora\.up)\.weight"),
    ("up_bias", r"lora_B(?:\.[^.]+)?\.bias"),
    ("alpha", r"alpha|lora_alpha"),
    ("magnitude", r"dora_scale|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?"),
    ("weight", r"diff"),
    ("bias", r"diff_b"),
    ("modulation", r"diff_m"),
)
"""Which part a suffix means. weight, bias and modulation are full differences."""

FOREIGN = (
    ("hada_", "it is a LoHa, not LoRA: other mathematics"),
    ("lokr_", "it is a LoKr, not LoRA: other mathematics"),
    ("oft_", "it is an OFT, not LoRA: other mathematics"),
    ("lora_mid", "it is a LoCon with a middle factor, which is not read"),
    ("text_encoder", "it is for a text encoder, which takes no LoRA here"),
    ("lora_te", "it is for a text encoder, which takes no LoRA here"),
    ("double_blocks", "it is of another model (HunyuanVideo or Flux)"),
    ("single_blocks", "it is of another model (HunyuanVideo or Flux)"),
    ("single_transformer_blocks", "it is of another model (Flux)"),
    ("transformer_2.", "it is for the second network of Wan2.2, which this model does not have"),
    ("joint_blocks", "it is of another model (Stable Diffusion 3)"),
    ("down_blocks", "it is of another model (SDXL or another U-Net)"),
    ("up_blocks", "it is of another model (SDXL or another U-Net)"),
    ("mid_block", "it is of another model (SDXL or another U-Net)"),
    ("input_blocks", "it is of another model (SDXL or another U-Net)"),
    ("output_blocks", "it is of another model (SDXL or another U-Net)"),
    ("vace_blocks", "it is of a VACE (control) network"),
    ("transformer_blocks", "it is of another model (LTX-Video, CogVideoX or another transformer)"),
)
"""Marks of keys that are not for a Wan network, and what such a key says of its file."""


@dataclass(frozen=True)
class Key:
    """A key of a file, understood."""

    text: str
    layer: str
    """Wan2.1's name of the layer; of a modulation, of what holds it: `blocks.N` or `head`."""
    part: str
    """A name of PARTS."""
    style: str
    """How it is written: `dotted`, `diffusers` or `underscored`."""
    prefix: str
    name: str
    """The layer as it is written, without the prefix."""

    @property
    def parameter(self) -> str:
        """What a full difference changes."""
        return f"{self.layer}.{self.part}"


def understand(text: str) -> Key:
    """A key -> what it means; ValueError that names it, and says why where that is known."""
    for part, pattern in PARTS:
        if match := re.fullmatch(rf"(.+)\.(?:{pattern})", text):
            layer = _layer(match[1], part)
            if layer is not None:
                return Key(text, layer[0], part, *layer[1:])
            break
    raise ValueError(_refusal(text))


def _refusal(text: str) -> str:
    found = next((why for mark, why in FOREIGN if mark in text), None)
    if found is not None:
        return f"'{shown(text)}': {found}"
    if re.search(r"\.(weight|bias|modulation)$", text) and not re.search(r"lora[._]", text):
        return f"'{shown(text)}' is a weight of a checkpoint, not of an adapter"
    return f"'{shown(text)}' is for no layer of a Wan2.1 network"


def _layer(stem: str, part: str) -> tuple[str, str, str, str] | None:
    """What stands before the suffix -> the layer, style, prefix, and name; None if it is no layer of a Wan network."""
    for prefix in UNDERSCORE_PREFIXES:
        if stem.startswith(prefix):
            name = stem.removeprefix(prefix)
            layer = _underscored(name)
            return None if layer is None else (layer, "underscored", prefix, name)
    stem = name = ".".join(part for part in stem.split(".") if part not in WRAPPERS)
    while found := next((prefix for prefix in PREFIXES if name.startswith(prefix)), None):
        name = name.removeprefix(found)
    prefix = stem.removesuffix(name)
    if part == "modulation":
        holder = re.fullmatch(r"(blocks\.\d{1,4}|head)(\.modulation)?", name)
        return (holder[1], "dotted", prefix, name) if holder else None
    before, inside = _in_block(name, r"\.")
    table = INSIDE if before else OUTSIDE
    if inside in table:
        return before + inside, "dotted", prefix, name
    ours = next((ours for ours, theirs in table.items() if theirs == inside), None)
    return None if ours is None else (before + ours, "diffusers", prefix, name)


def _underscored(name: str) -> str | None:
    """blocks_0_self_attn_q -> blocks.0.self_attn.q: by the whole name, so that k is not taken for k_img."""
    before, inside = _in_block(name, "_")
    for ours, theirs in (INSIDE if before else OUTSIDE).items():
        if inside in (ours.replace(".", "_"), theirs.replace(".", "_")):
            return before + ours
    return None


def _in_block(name: str, dot: str) -> tuple[str, str]:
    """(`blocks.N.` or nothing, what stands behind it)."""
    block = re.match(rf"blocks{dot}(0|[1-9]\d{{0,3}}){dot}", name)
    return (f"blocks.{block[1]}.", name[block.end() :]) if block else ("", name)


def diffusers_name(layer: str) -> str:
    """Wan2.1's name of a layer -> diffusers'."""
    before, inside = _in_block(layer, r"\.")
    return before + (INSIDE if before else OUTSIDE)[inside]


def is_adapter(names: list[str]) -> bool:
    """Whether these are names of an adapter's file: some key has a suffix that only adapters have."""
    return any(
        re.search(rf"\.(?:{pattern})$", name) for name in names if isinstance(name, str) for _, pattern in PARTS
    ) or any("hada_w1" in name or "lokr_w1" in name for name in names if isinstance(name, str))
