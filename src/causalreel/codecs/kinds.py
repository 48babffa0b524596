"""The kinds of codecs that there are: one row each. A family of models brings its own with `add`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from causalreel.codecs.codec import Codec, CodecKind, DecoderMemory, Program
from causalreel.codecs.taehv import TAEHV, Enlarge, MemoryBlock, TAEHVConfig
from causalreel.codecs.wan_vae import CausalConv, CausalVAE, FrameConv, Upsample, VAEConfig

Shapes = Mapping[str, tuple[int, ...]]


def wan_differs(sizes: VAEConfig, shapes: Shapes) -> str | None:
    """How tensors of these shapes plainly differ from a causal VAE of these sizes."""
    found = {
        "dim": next(iter(shapes.get("encoder.conv1.weight", ())), None),
        "z": next(iter(shapes.get("conv2.weight", ())), None),
    }
    for name, value in {"dim": sizes.dim, "z": sizes.z}.items():
        if found[name] != value:
            return f"{name} is {found[name]}, not {value}"
    widths = {shape[0] for shape in shapes.values() if shape}
    absent = [m for m in sizes.multipliers if m < 1 or m * sizes.dim not in widths]
    layers = len(sizes.multipliers) * sizes.res_blocks
    is_odd = absent or layers > len(shapes) or min(sizes.res_blocks, sizes.dim, sizes.z) < 1
    return f"multipliers {sizes.multipliers}" if is_odd else None


def taehv_differs(sizes: TAEHVConfig, shapes: Shapes) -> str | None:
    """How tensors of these shapes plainly differ from a TAEHV of these sizes."""
    layers = len(sizes.decoder_widths) * sizes.blocks
    widths = {shape[0] for shape in shapes.values() if shape}
    if layers > len(shapes) or not {*sizes.decoder_widths, sizes.encoder_width} <= widths:
        return f"decoder_widths {sizes.decoder_widths}"
    channels = next(iter(shapes.get("decoder.1.weight", (0, None))[1:]), None)
    return None if channels == sizes.channels else f"channels is {channels}, not {sizes.channels}"


@lru_cache(maxsize=32)
def _counted(build: Any, sizes: Any) -> tuple[int, int, int]:
    """Parameters of the codec and of its decoder, and numbers that a stream remembers for a latent position, without
    those of the last convolution; on the meta device."""
    with torch.device("meta"):
        codec = build(sizes)
    whole = (
        [codec.decoder.conv1, *codec.decoder.middle, *codec.decoder.upsamples] if build is CausalVAE else codec.decoder
    )
    side, state = 1, 0
    for layer in whole:
        convolutions = [part for part in layer.modules() if isinstance(part, CausalConv)]
        state += side**2 * sum(2 * part.in_channels for part in convolutions)  # two frames of what each reads
        if isinstance(layer, MemoryBlock):
            first = next(part for part in layer.modules() if isinstance(part, FrameConv))  # reads a frame and the last
            state += side**2 * first.in_channels // 2
        side *= 2 if isinstance(layer, Upsample) or (isinstance(layer, Enlarge) and layer.is_used) else 1
    return count(codec), count(codec.decoder), state


def count(module: nn.Module) -> int:
    """Its parameters."""
    return sum(part.numel() for part in module.parameters())


def wan_memory(sizes: VAEConfig, *, frames: int, width: int, is_fast: bool) -> DecoderMemory:
    """Decoding with a causal VAE; the widest activation is what the last convolution reads, at full resolution."""
    parameters, decoder, state = _counted(CausalVAE, sizes)
    last, temporal, pixels = sizes.dim * sizes.multipliers[0], sizes.geometry.temporal, sizes.geometry.spatial**2
    if is_fast:  # a kernel of 27 taps is 36 for Winograd and 9 for a first frame. A residual block's first
        # convolution: the products before it (2 in size), residual, x, what goes in (2), products (2)
        copies, tensors, remembered = 1.5, 8, 2 * 3 * 4  # two frames' sums of three colours, float32
    else:  # its second convolution: x, first result, normed, that behind two frames, three taps side by side
        copies, tensors, remembered = 0, 7 + 2 / (temporal * frames), 2 * last * width
    return DecoderMemory(
        (parameters + copies * decoder) * width,
        state * width + pixels * remembered,
        tensors * frames * temporal * pixels * last * width,
    )


def taehv_memory(sizes: TAEHVConfig, *, frames: int, width: int, is_fast: bool) -> DecoderMemory:
    """Decoding with a TAEHV, whose widest moment is a growth at full resolution."""
    parameters, decoder, state = _counted(TAEHV, sizes)
    tensors = 2 if is_fast else 2.5  # its result in either order, and enlarged frames, half as many; phases, result
    pixels = frames * sizes.geometry.temporal * sizes.geometry.spatial**2
    return DecoderMemory(
        (parameters + (decoder if is_fast else 0)) * width,
        state * width,
        tensors * pixels * sizes.decoder_widths[-1] * width,
    )


def wan_program(codec: CausalVAE, dtype: Any, device: Any, backend: Any, arithmetic: Any = None) -> Program:
    """See `codecs.fast_wan`."""
    from causalreel.codecs.fast_wan import Arithmetic, WanProgram

    return WanProgram(codec, dtype, device, backend, arithmetic or Arithmetic())


def taehv_program(codec: TAEHV, dtype: Any, device: Any, backend: Any, arithmetic: Any = None) -> Program:
    """See `codecs.fast_taehv`."""
    from causalreel.codecs.fast_taehv import TAEHVProgram

    if arithmetic is not None:
        raise ValueError("arithmetic is for the Wan VAE, this codec is a TAEHV")
    return TAEHVProgram(codec, dtype, device, backend)


KINDS = {
    kind.name: kind
    for kind in (
        CodecKind("wan", VAEConfig, CausalVAE, wan_differs, wan_memory, wan_program),
        CodecKind("taehv", TAEHVConfig, TAEHV, taehv_differs, taehv_memory, taehv_program, joins=True),
    )
}
"""Name -> kind."""


def add(kind: CodecKind) -> None:
    """Enter another kind; ValueError if its name is taken by another one."""
    if KINDS.setdefault(kind.name, kind) != kind:
        raise ValueError(f"there is a kind of codec called {kind.name!r} already")


def kind_of(sizes: Any) -> CodecKind:
    """The kind of a codec by its sizes; ValueError if there is none of such."""
    for kind in KINDS.values():
        if isinstance(sizes, kind.sizes):
            return kind
    raise ValueError(f"a codec's sizes must be those of {', '.join(KINDS)}; got {sizes!r}")


def build(sizes: Any) -> Codec:
    """A codec of these sizes, with random weights."""
    return kind_of(sizes).build(sizes)
