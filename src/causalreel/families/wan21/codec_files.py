"""Video codecs from released files: the Wan VAE (official, diffusers names) and TAEHV, strict, sizes from shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.codecs.taehv import TAEHV, TAEHVConfig
from causalreel.codecs.wan_vae import WAN21_MEAN, WAN21_STD, CausalVAE, VAEConfig
from causalreel.weights.files import read_tensors
from causalreel.weights.layouts import bare_names, guess_layout, select
from causalreel.weights.strict import filled_codec

VAE_FILES = ("Wan2.1_VAE.pth", "vae/diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors")
"""Where a folder may have the Wan VAE, in the order tried."""

TAEHV_FILES = ("taew2_1.safetensors", "taew2_1.pth")
"""Where a folder may have TAEHV, in the order tried."""

WAN_GROWTH = (1, 2, 2)
"""Growth in time of TAEHV for Wan 2.1; files with more are cut to it."""

BLOCK_NAMES = (
    ("residual.0.", "norm1."),
    ("residual.2.", "conv1."),
    ("residual.3.", "norm2."),
    ("residual.6.", "conv2."),
    ("shortcut.", "conv_shortcut."),
)
"""Inside a residual block: official name, diffusers name."""

OUTER_NAMES = (
    ("conv1.", "quant_conv."),
    ("conv2.", "post_quant_conv."),
    ("encoder.conv1.", "encoder.conv_in."),
    ("decoder.conv1.", "decoder.conv_in."),
    ("encoder.head.0.", "encoder.norm_out."),
    ("encoder.head.2.", "encoder.conv_out."),
    ("decoder.head.0.", "decoder.norm_out."),
    ("decoder.head.2.", "decoder.conv_out."),
    ("encoder.middle.0.", "encoder.mid_block.resnets.0."),
    ("encoder.middle.1.", "encoder.mid_block.attentions.0."),
    ("encoder.middle.2.", "encoder.mid_block.resnets.1."),
    ("decoder.middle.0.", "decoder.mid_block.resnets.0."),
    ("decoder.middle.1.", "decoder.mid_block.attentions.0."),
    ("decoder.middle.2.", "decoder.mid_block.resnets.1."),
)
"""Beginnings of names: official, diffusers."""


def load_wan_vae(path: str | Path) -> CausalVAE:
    """The Wan VAE of a file or folder, official or diffusers names, in float32 on the CPU, in evaluation mode.

    Sizes come from the file. With 16 latent channels the latents are scaled by Wan 2.1's statistics, which no file
    holds. Raises ValueError for anything else, saying what the file looks like.
    """
    path, tensors = _read(path, VAE_FILES)
    looks = looks_like(tensors)
    if any(name.startswith(("post_quant_conv.", "decoder.up_blocks.")) for name in tensors):
        tensors = vae_from_diffusers(tensors)
    config = vae_config_of(tensors, source=f"{path} (which looks like: {looks})")
    codec = filled_codec(config, tensors, source=str(path))
    assert isinstance(codec, CausalVAE)
    return codec


def load_taehv(
    path: str | Path, *, growth: Sequence[int] | None = None, upsample: Sequence[bool] | None = None
) -> TAEHV:
    """TAEHV from a file or folder in the taew2_1 layout, in float32 on the CPU, in evaluation mode.

    growth: frames made of one at each resolution, at most what the file has; None is the file's, but no more than
    `WAN_GROWTH`. upsample: which doublings of height and width to use; None is all. Less of either gives previews.
    """
    path, tensors = _read(path, TAEHV_FILES)
    config = taehv_config_of(tensors, source=str(path))
    wanted = tuple(map(min, config.growth, WAN_GROWTH)) if growth is None else tuple(growth)
    config = replace(config, growth=wanted, upsample=config.upsample if upsample is None else tuple(upsample))
    codec = filled_codec(config, cut_growth(config, tensors), source=str(path))
    assert isinstance(codec, TAEHV)
    return codec


def cut_growth(config: TAEHVConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a file for a network with less growth in time: the last output channels stay.

    They make the last frames, so that a preview shows the newest of the frames that it stands for.
    """
    cut = dict(tensors)
    with torch.device("meta"):
        decoder = TAEHV(config).decoder
    for name, wanted in decoder.state_dict().items():
        full = tensors.get(f"decoder.{name}")
        if name.endswith(".conv.weight") and full is not None and full.shape[0] > wanted.shape[0]:
            cut[f"decoder.{name}"] = full[-wanted.shape[0] :]
    return cut


def looks_like(names: Mapping[str, Any]) -> str:
    """What kind of file these names suggest, in words, codecs included."""
    if any(name.startswith(("post_quant_conv.", "decoder.up_blocks.")) for name in names):
        return "Wan VAE (diffusers)" if any("mid_block.resnets" in name for name in names) else "a diffusers VAE"
    if any(re.match(r"decoder\.\d+\.conv\.\d", name) for name in names):
        return "TAEHV"
    return guess_layout(names)


def vae_config_of(tensors: Mapping[str, Tensor], *, source: str) -> VAEConfig:
    """The sizes of a Wan VAE from its tensors under official names."""
    try:
        dim, z = tensors["encoder.conv1.weight"].shape[0], tensors["conv2.weight"].shape[0]
        widths, temporal, blocks = _levels(tensors)
    except KeyError as error:
        raise ValueError(f"{source} is not a Wan VAE: it has no {error}") from None
    except (IndexError, ValueError):
        raise ValueError(f"{source} is not a Wan VAE: its tensors have other shapes or names") from None
    if dim < 1 or z < 1:
        raise ValueError(f"{source} is not a Wan VAE: its tensors are empty")
    if any(width % dim for width in widths) or len(widths) != len(temporal) + 1:
        raise ValueError(f"{source} is not a Wan VAE of a known build: widths {widths}, halvings {len(temporal)}")
    is_wan = z == len(WAN21_MEAN)
    return VAEConfig(
        dim=dim,
        multipliers=tuple(width // dim for width in widths),
        res_blocks=blocks,
        z=z,
        temporal_down=tuple(temporal),
        latent_mean=WAN21_MEAN if is_wan else None,
        latent_std=WAN21_STD if is_wan else None,
    )


def _levels(tensors: Mapping[str, Tensor]) -> tuple[list[int], list[bool], int]:
    """Width of each resolution, whether its halving halves time, and residual blocks per resolution."""
    layers = "encoder.downsamples"
    count = 1 + max((int(name.split(".")[2]) for name in tensors if name.startswith(layers)), default=-1)
    if count > len(tensors):
        raise ValueError(f"layers are numbered up to {count - 1}")
    halvings = [i for i in range(count) if f"{layers}.{i}.resample.1.weight" in tensors]
    ends = [*(i - 1 for i in halvings), count - 1]
    widths = [tensors[f"{layers}.{i}.residual.6.weight"].shape[0] for i in ends]
    temporal = [f"{layers}.{i}.time_conv.weight" in tensors for i in halvings]
    return widths, temporal, ends[0] + 1


def taehv_config_of(tensors: Mapping[str, Tensor], *, source: str) -> TAEHVConfig:
    """The sizes of a TAEHV from its tensors."""
    try:
        decoder, encoder = _stages(tensors, "decoder"), _stages(tensors, "encoder")
        widths = [tensors[f"decoder.{i}.conv.weight"].shape[1] for i in decoder]
        if not decoder or not encoder:
            raise KeyError("decoder.7.conv.weight")
        return TAEHVConfig(
            channels=tensors["decoder.1.weight"].shape[1],
            encoder_width=tensors["encoder.0.weight"].shape[0],
            decoder_widths=(*widths, tensors[f"decoder.{decoder[-1] + 1}.weight"].shape[0]),
            growth=tuple(
                tensors[f"decoder.{i}.conv.weight"].shape[0] // w for i, w in zip(decoder, widths, strict=True)
            ),
            upsample=(True,) * len(decoder),
            pooling=tuple(_ratio(tensors[f"encoder.{i}.conv.weight"]) for i in encoder),
            blocks=decoder[0] - 4,  # before the first growth: squash, convolution, ReLU, the blocks, doubling
        )
    except (IndexError, ZeroDivisionError, ValueError):
        raise ValueError(f"{source} is not TAEHV in the taew2_1 layout: its tensors have other shapes") from None
    except KeyError as error:
        raise ValueError(
            f"{source} is not TAEHV in the taew2_1 layout: it has no {error}; "
            f"the file looks like: {looks_like(tensors)}"
        ) from None


def _stages(tensors: Mapping[str, Tensor], part: str) -> list[int]:
    """Places of the layers of `part` that change the number of frames."""
    found = (re.fullmatch(rf"{part}\.(\d+)\.conv\.weight", name) for name in tensors)
    return sorted(int(match[1]) for match in found if match)


def _ratio(weight: Tensor) -> int:
    return weight.shape[1] // weight.shape[0]


def vae_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names of a Wan VAE -> those of diffusers' AutoencoderKLWan."""
    return {_to_diffusers(name, _stride(tensors)): value for name, value in tensors.items()}


def vae_from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of diffusers' AutoencoderKLWan -> official names of a Wan VAE."""
    resnets = (re.match(r"decoder\.up_blocks\.0\.resnets\.(\d+)\.", name) for name in tensors)
    stride = 2 + max((int(match[1]) for match in resnets if match), default=-1)
    return {_from_diffusers(name, stride): value for name, value in tensors.items()}


def _stride(tensors: Mapping[str, Tensor]) -> int:
    """Layers per resolution in the official list of the decoder: its residual blocks and the doubling."""
    doublings = (re.match(r"decoder\.upsamples\.(\d+)\.resample\.", name) for name in tensors)
    return 1 + min((int(match[1]) for match in doublings if match), default=0)


def _to_diffusers(name: str, stride: int) -> str:
    for ours, theirs in OUTER_NAMES:
        if name.startswith(ours):
            return _renamed(theirs + name.removeprefix(ours))
    if match := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name):
        block, place = divmod(int(match[1]), stride)
        part = "upsamplers.0" if match[2].startswith(("resample.", "time_conv.")) else f"resnets.{place}"
        return _renamed(f"decoder.up_blocks.{block}.{part}.{match[2]}")
    return _renamed(name.replace("encoder.downsamples.", "encoder.down_blocks.", 1))


def _from_diffusers(name: str, stride: int) -> str:
    for ours, theirs in OUTER_NAMES:
        if name.startswith(theirs):
            return _renamed(ours + name.removeprefix(theirs), back=True)
    if match := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.(.*)", name):
        place = int(match[3]) if match[2] == "resnets" else stride - 1
        return _renamed(f"decoder.upsamples.{int(match[1]) * stride + place}.{match[4]}", back=True)
    return _renamed(name.replace("encoder.down_blocks.", "encoder.downsamples.", 1), back=True)


def _renamed(name: str, *, back: bool = False) -> str:
    """The part of a name inside a residual block, in the other layout."""
    for ours, theirs in BLOCK_NAMES:
        old, new = (theirs, ours) if back else (ours, theirs)
        stem, found, leaf = name.rpartition(old)
        if found and "." not in leaf and re.search(r"\d\.$", stem):
            return stem + new + leaf
    return name


def _read(path: str | Path, names: Sequence[str]) -> tuple[Path, dict[str, Tensor]]:
    """A file, or the first of `names` in a folder, as bare names -> tensors."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path} has none of {', '.join(names)}")
        path = found[0]
    return path, bare_names(select(read_tensors(path)))
