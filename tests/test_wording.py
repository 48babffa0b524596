"""What a prompt leaves open, a picture may settle; what they say differently is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from causalreel.data.world import WorldConfig, captions, render, simulate
from causalreel.text.tiny import TinyTextEncoder, background_in
from causalreel.vocabulary import BACKGROUND_RGB, BACKGROUNDS, background_of


@pytest.fixture(scope="module")
def world() -> tuple[Tensor, list[str]]:
    state = simulate(64, seed=3, config=WorldConfig(frames=9))
    return render(state)[:, -1], captions(state)


def test_backgrounds_are_seen_in_every_clip_of_the_world(world: tuple[Tensor, list[str]]) -> None:
    for picture, caption in zip(*world, strict=True):
        assert background_in(picture) == background_of(caption)
        noisy = picture + 0.1 * torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
        assert TinyTextEncoder().complete(caption, 0, noisy) == caption


def test_other_pictures_show_no_background_of_the_world() -> None:
    ramp = torch.linspace(-1, 1, 64).expand(3, 64, 64)
    red = torch.tensor([0.9, -0.9, -0.9]).view(3, 1, 1).expand(3, 64, 64)
    for picture in (ramp, red, torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1):
        assert background_in(picture) is None
        assert TinyTextEncoder().complete("a red circle", 5, picture) == TinyTextEncoder().complete("a red circle", 5)


@pytest.mark.parametrize(("word", "levels"), list(zip(BACKGROUNDS, BACKGROUND_RGB, strict=True)))
def test_a_picture_settles_what_the_prompt_leaves_open(word: str, levels: tuple[int, int, int]) -> None:
    picture = (torch.tensor(levels).float() / 127.5 - 1).view(3, 1, 1).expand(3, 64, 64)
    for seed in range(6):
        assert TinyTextEncoder().complete("a red circle", seed, picture).endswith(f"on a {word} background")
    for other in BACKGROUNDS:
        prompt = f"a red circle on a {other} background"
        if other == word:
            TinyTextEncoder().complete(prompt, 0, picture)
            continue
        with pytest.raises(ValueError, match=f"asks for a {other} background, but the picture .* has a {word} one"):
            TinyTextEncoder().complete(prompt, 0, picture)
