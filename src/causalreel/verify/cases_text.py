"""c12 and c13: the text encoder and the cleaning before it, as released pipelines do both."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from causalreel.text.cleaning import clean
from causalreel.text.umt5 import Placement, Tokens, UMT5TextEncoder
from causalreel.verify.case import Case, Findings
from causalreel.weights.umt5_files import (
    load_umt5,
    official_name,
    official_shapes,
    sizes_of,
    to_official,
    transformers_name,
)


def umt5(case: Case, found: Findings) -> None:
    """A network read by official names: hidden states of padded batches, and embeddings as our encoder makes them."""
    if case.model.get("shared_pos"):
        raise ValueError("a table of positions shared by all layers is T5's, not UMT5's: not supported")
    name = str(case.get("weights", default="weights_t5")).removesuffix(".safetensors")
    path = case.folder / f"{name}.safetensors"
    model = load_umt5(path, dtype=torch.float32, max_distance=int(case.get("max_distance", default=128)))
    _sizes(case, found, model)
    ids, mask = case.tensors["in.ids"], case.tensors["in.mask"]
    lengths = mask.gt(0).sum(1)
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
    found.add("out.hidden_before_zeroing", hidden)
    kept = torch.arange(ids.shape[1]) < lengths[:, None]  # (B,K)
    found.add("out.prompt_embeds", hidden * kept[..., None], via="padded batch")
    found.add("out.prompt_embeds", _as_encoded(model, ids, lengths), via="encoder")
    for name in [name for name in case.tensors if name.startswith("out.bucket_of_relative_position_")]:
        low, high = (int(number) for number in re.findall(r"-?\d+", name.removeprefix("out.bucket"))[:2])
        found.add(name, _buckets(model, low, high))


def cleaning(case: Case, found: Findings) -> None:
    """Every recorded prompt in the cleaning mode that the pipelines use; other modes are not ours to meet."""
    mode = case.get("used_by_the_pipeline")
    if mode != "whitespace":
        raise ValueError(f"the case is about the cleaning mode {mode!r}, only 'whitespace' is known here")
    for number, row in enumerate(case.document["rows"]):
        found.add_exact(f"rows.{row.get('name', number)}", clean(row["input"]), row[mode])


def _sizes(case: Case, found: Findings, model: nn.Module) -> None:
    """The network has the stated sizes and names, and names translate as recorded, there and back."""
    official = to_official(dict(model.named_parameters()))
    sizes = sizes_of(official)
    ours = {
        "vocab": sizes.vocab,
        "dim": sizes.dim,
        "dim_attn": sizes.attention_dim,
        "dim_ffn": sizes.ffn_dim,
        "num_heads": sizes.heads,
        "num_layers": sizes.layers,
        "num_buckets": sizes.buckets,
    }
    for key in [key for key in ours if key in case.model]:
        found.add_exact(f"model.{key}", ours[key], case.model[key])
    found.add_exact("official names", official_shapes(sizes), {name: tuple(t.shape) for name, t in official.items()})
    count = case.get("number_of_official_keys")
    if count is not None:
        found.add_exact("number_of_official_keys", len(official), count)
    for theirs, transformers in case.config.get("key_map_official_to_transformers_UMT5EncoderModel", []):
        name, wanted = theirs.replace(".N.", ".0."), transformers.split(" ")[0].replace(".N.", ".0.")
        found.add_exact(f"key_map.{theirs}", transformers_name(name), wanted)
        found.add_exact(f"key_map.{theirs} (back)", official_name(wanted), name)


def _as_encoded(model: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """ids (B,K) -> text (B,K,E) from UMT5TextEncoder, its tokenizer replaced by the recorded tokens."""
    rows = {str(row): tuple(ids[row, : int(n)].tolist()) for row, n in enumerate(lengths)}
    encoder = UMT5TextEncoder(
        lambda: model,
        lambda text: Tokens(rows[text], len(rows[text])),
        length=ids.shape[1],
        width=int(model.config.d_model),  # type: ignore[union-attr]
        placement=Placement(dtype=torch.float32),
    )
    return encoder.encode(list(rows))


def _buckets(model: nn.Module, low: int, high: int) -> Tensor:
    """Buckets of key position minus query position, from low to high, read from the bias that attention adds.

    With each bucket's own number in the table of biases, the bias of a pair is its bucket.
    """
    attention: Any = copy.deepcopy(model.get_submodule("encoder.block.0.layer.0.SelfAttention"))
    table = attention.relative_attention_bias.weight
    table.data = torch.arange(len(table), dtype=table.dtype)[:, None].expand_as(table)
    reach = max(-low, high) + 1
    bias = attention.compute_bias(reach, reach)[0, 0].long()  # (1,N,Q,K) -> (Q,K)
    before, after = bias[-1].flip(0), bias[0]  # by distance, of keys before and after the query
    return torch.stack([after[at] if at > 0 else before[-at] for at in range(low, high + 1)])
