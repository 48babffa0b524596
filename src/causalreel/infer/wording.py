"""The words that a model is given: a prompt completed by its seed, and in agreement with the picture it begins with."""

from __future__ import annotations

import torch
from torch import Tensor

from causalreel.data.world import BACKGROUND_RGB
from causalreel.text.tiny import TinyTextEncoder
from causalreel.types import TextEncoder
from causalreel.vocabulary import BACKGROUNDS, background_of

NEAR = 45.0
"""Levels of 255 by which a background may differ from the world's and still be taken for it."""


def full_prompt(encoder: TextEncoder, prompt: str, seed: int, picture: Tensor | None = None) -> str:
    """A prompt and the picture (3,H,W) in [-1,1] that the clip begins with, if any -> the wording the model reads.

    In the tiny world a picture settles a background that the prompt leaves open. ValueError if the prompt names
    another one than the picture shows: the model has never seen a background change.
    """
    if picture is None or not isinstance(encoder, TinyTextEncoder):
        return encoder.complete(prompt, seed)
    seen, named = background_in(picture), background_of(prompt)
    if seen is not None and named not in (None, seen):
        raise ValueError(
            f"the prompt asks for a {named} background, but the picture that the video begins with has a {seen} one: "
            f"{prompt!r}"
        )
    return encoder.complete(prompt, seed, background=seen)


def background_in(picture: Tensor) -> str | None:
    """(3,H,W) in [-1,1] -> the tiny world's word for what most of its border shows; None: nothing of that world."""
    shown = (picture.detach().float().cpu() + 1) * 127.5
    edges = [shown[:, :2].flatten(1), shown[:, -2:].flatten(1), shown[:, :, :2].flatten(1), shown[:, :, -2:].flatten(1)]
    border = torch.cat(edges, dim=1)  # (3,n)
    levels = torch.tensor(BACKGROUND_RGB).float()  # (backgrounds,3)
    middle = border.median(1).values
    is_even = ((border - middle[:, None]).abs().amax(0) < NEAR).float().mean() > 0.6
    distance = (levels - middle).abs().amax(1)
    return BACKGROUNDS[int(distance.argmin())] if is_even and distance.min() < NEAR else None
