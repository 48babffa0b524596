"""Wan2.1's parameter names and those of diffusers' WanTransformer3DModel: one table, both directions.

The tensors are the same in both; only names differ. Official norm3 is norm2 there, and both kinds of modulation are
called scale_shift_table. Official norm1, norm2 and the head's norm have no parameters.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from causalreel.nn.presets import ModelConfig

OUTER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
"""Outside the blocks: official module or parameter -> diffusers."""

INNER = {
    "modulation": "scale_shift_table",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
} | {
    f"{ours}.{part}": f"{theirs}.{name}"
    for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for part, name in {
        "q": "to_q",
        "k": "to_k",
        "v": "to_v",
        "o": "to_out.0",
        "norm_q": "norm_q",
        "norm_k": "norm_k",
    }.items()
}
"""Inside a block, behind `blocks.N.`."""

_OUTER_BACK = {theirs: ours for ours, theirs in OUTER.items()}
_INNER_BACK = {theirs: ours for ours, theirs in INNER.items()}


def to_diffusers(name: str) -> str:
    """Wan2.1's name of a parameter -> diffusers'. A name that is in neither table stays as it is."""
    return _translate(name, OUTER, INNER)


def from_diffusers(name: str) -> str:
    """diffusers' name of a parameter -> Wan2.1's. A name that is in neither table stays as it is."""
    return _translate(name, _OUTER_BACK, _INNER_BACK)


def _translate(name: str, outer: Mapping[str, str], inner: Mapping[str, str]) -> str:
    block = re.match(r"blocks\.\d+\.", name)
    before = block[0] if block else ""
    module, dot, leaf = name[len(before) :].rpartition(".")
    table = inner if block else outer
    if leaf in ("weight", "bias") and module in table:
        return f"{before}{table[module]}{dot}{leaf}"
    whole = name[len(before) :]  # a parameter that sits in the block or the network itself
    return before + table[whole] if whole.endswith(("modulation", "scale_shift_table")) and whole in table else name


def diffusers_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a WanTransformer3DModel with these sizes."""
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.dim // config.heads,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.channels,
        "num_attention_heads": config.heads,
        "num_layers": config.layers,
        "out_channels": config.channels,
        "patch_size": [1, config.patch, config.patch],
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def wan_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of an original Wan2.1 text-to-video folder with these sizes; text_dim and patch are not in it."""
    return {
        "_class_name": "WanModel",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.channels,
        "model_type": "t2v",
        "num_heads": config.heads,
        "num_layers": config.layers,
        "out_dim": config.channels,
        "text_len": config.text_length,
    }
