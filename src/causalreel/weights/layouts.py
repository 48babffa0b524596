"""From a file's layout to the network's names, strictly.

Our parameter names are Wan2.1's. Released Causal Forcing and Self Forcing files wrap them: a top-level key chooses the
weights (raw or averaged), and training wrappers leave segments anywhere in a name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

TOP_LEVEL = ("generator_ema", "generator", "model", "critic")
"""Top-level keys of released .pt files, in the order tried when none is asked for (the critic never is)."""

WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "module")
"""Name segments that FSDP, activation checkpointing, compile and DataParallel leave behind."""

LAYOUT_MARKS = {
    "diffusers": ("condition_embedder.", "scale_shift_table", "attn1."),
    "ComfyUI repack": ("diffusion_model.",),
    "Wan image-to-video": ("img_emb.", "k_img"),
    "camera (minWM)": ("prope_o.",),
    "umT5 text encoder": ("token_embedding.", "shared.weight"),
    "Wan VAE": ("encoder.downsamples.", "decoder.upsamples."),
    "LoRA": ("lora_A", "lora_B", "lora_down", "lora_up"),
}


def select(found: Mapping[str, Any], which: str | None = None) -> dict[str, Tensor]:
    """What a file holds -> name -> tensor. which: a top-level key such as `generator_ema`; None is the first one."""
    nested = [key for key, value in found.items() if isinstance(value, Mapping)]
    if which is not None and which not in nested:
        raise ValueError(f"the file has no weights called {which!r}; it has {', '.join(nested) or 'only bare tensors'}")
    if which is None:
        which = next((key for key in TOP_LEVEL[:3] if key in nested), None)
    if which is None and nested:
        raise ValueError(f"none of {', '.join(TOP_LEVEL[:3])} is in the file; it has {', '.join(nested)}: name one")
    chosen = found if which is None else found[which]
    return {name: value for name, value in chosen.items() if isinstance(value, Tensor)}


def bare_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Drop wrapper segments anywhere, and one leading `model.` or `net.` where every name has it."""
    cleaned: dict[str, Tensor] = {}
    for name, value in tensors.items():
        bare = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if bare in cleaned:
            raise ValueError(f"two tensors of the file come to the same name {bare!r}")
        cleaned[bare] = value
    for prefix in ("model.", "net."):
        if cleaned and all(name.startswith(prefix) for name in cleaned):
            return {name.removeprefix(prefix): value for name, value in cleaned.items()}
    return cleaned


def guess_layout(names: Mapping[str, Any]) -> str:
    """What kind of file these names suggest, in words."""
    for layout, marks in LAYOUT_MARKS.items():
        if any(mark in name for name in names for mark in marks):
            return layout
    return "Wan2.1 / Causal Forcing" if any(name.startswith("blocks.") for name in names) else "unknown"


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Put the tensors into the module; every name and shape must match, or a ValueError says what does not."""
    wanted = module.state_dict()
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted]
    if missing or unexpected:
        raise ValueError(
            f"{source} does not fit the network: "
            f"{len(missing)} names missing (first: {missing[0] if missing else '-'}), "
            f"{len(unexpected)} unexpected (first: {unexpected[0] if unexpected else '-'}); "
            f"the file looks like: {guess_layout(tensors)}"
        )
    for name, value in wanted.items():
        if value.shape != tensors[name].shape:
            raise ValueError(
                f"{source} is of another model size: {name} is {tuple(tensors[name].shape)}, "
                f"the network has {tuple(value.shape)}"
            )
    module.load_state_dict(dict(tensors), strict=True)


def load_file_into(model: nn.Module, path: str, *, which: str | None = None) -> None:
    """Load a weights file of any known layout into a DiT (not its denoiser): the names are those of Wan2.1."""
    from causalreel.weights.files import read_tensors

    load_strictly(model, bare_names(select(read_tensors(path), which)), source=str(path))
