"""What all formats agree on: latents of Wan 2.1's VAE, finite, and in our order of axes."""

from __future__ import annotations

from torch import Tensor

from causalreel.foreign import shown
from causalreel.weights.sets import Wanted
from causalreel.weights.strict import ANY_FLOATS

CHANNELS = 16
"""Of the latents of Wan 2.1's VAE."""

PROMPT_BYTES = 1 << 20
"""Of one caption."""


def check_channels(found: int, place: str) -> None:
    """ValueError for latents of another codec."""
    if found != CHANNELS:
        known = ": those of the Wan 2.2 5B VAE" if found == 48 else ""
        raise ValueError(f"{place}: latents have {found} channels{known}; {CHANNELS} are read, those of Wan 2.1")


def channels_first(latents: Tensor, place: str, wanted: Wanted) -> Tensor:
    """latents (C,F,H,W), as most projects keep them -> (F,C,H,W), checked."""
    if latents.ndim != 4 or latents.dtype not in ANY_FLOATS or 0 in latents.shape:
        got = f"{tuple(latents.shape)} in {latents.dtype}"
        raise ValueError(f"{place}: latents of rank {latents.ndim}, {got}; (channels,frames,height,width) is expected")
    check_channels(latents.shape[0], place)
    return finished(latents.transpose(0, 1), place, wanted)


def finished(clip: Tensor, place: str, wanted: Wanted) -> Tensor:
    """A clip (...,F,C,H,W): finite, and cut to the frames that are wanted."""
    if not clip.isfinite().all():
        raise ValueError(f"{place}: latents are not finite, NaN or infinity is among them")
    if wanted.frames is not None:
        if clip.shape[-4] < wanted.frames:
            raise ValueError(f"{place}: {clip.shape[-4]} latent frames, at least {wanted.frames} are wanted")
        clip = clip[..., : wanted.frames, :, :, :]
    return clip.contiguous()


def check_text(text: Tensor, place: str) -> Tensor:
    """Text embeddings (K,E), checked; (1,K,E) is what an encoder gives for a batch of one."""
    if text.ndim == 3 and len(text) == 1:
        text = text[0]
    if text.ndim != 2 or text.dtype not in ANY_FLOATS or 0 in text.shape[1:]:
        raise ValueError(f"{place}: text embeddings {tuple(text.shape)} in {text.dtype}; (tokens,width) is expected")
    if not text.isfinite().all():
        raise ValueError(f"{place}: text embeddings are not finite, NaN or infinity is among them")
    return text


def caption(data: bytes, place: str) -> str:
    """A caption's bytes as they are: nothing is cleaned."""
    if len(data) > PROMPT_BYTES:
        raise ValueError(f"{place}: a caption of {len(data):,} bytes, at most {PROMPT_BYTES:,} are read")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: the caption is not UTF-8 text (byte {error.start} is {data[error.start]:#04x}): "
            f"{shown(data[:40].decode('latin-1'), 60)}"
        ) from None
