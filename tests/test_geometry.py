"""Pixel frames and latent frames, sides in pixels and in latents: one place for the arithmetic, for any codec."""

from __future__ import annotations

import pytest

from causalreel.codecs.taehv import TAEHVConfig
from causalreel.codecs.wan_vae import VAEConfig, vae_config
from causalreel.types import Geometry, LatentSpec

WAN, SQUARE, EVEN = Geometry(16, 8, 4), Geometry(48, 16, 4), Geometry(4, 32, 8, first=8)


@pytest.mark.parametrize("geometry", [WAN, SQUARE, EVEN, Geometry(2, 1, 1), Geometry(8, 8, 8, first=3)])
def test_frames_there_and_back(geometry: Geometry) -> None:
    for latents in range(1, 12):
        frames = geometry.frames_of(latents)
        assert geometry.latents_of(frames) == geometry.latents_in(frames) == latents
        assert geometry.latents_in(frames - 1) == latents - 1
    assert geometry.frames_of(1) == geometry.first


@pytest.mark.parametrize(
    ("geometry", "frames", "nearest"),
    [(WAN, 2, "1 or 5"), (WAN, 0, "1"), (WAN, -7, "1"), (EVEN, 1, "8"), (EVEN, 17, "16 or 24")],
)
def test_frames_that_end_inside_a_latent_frame_name_the_nearest(geometry: Geometry, frames: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=rf"the clip must have .* n frames, got {frames}; nearest: {nearest}$"):
        geometry.latents_of(frames, name="the clip")


def test_sides_there_and_back() -> None:
    for geometry, patch in ((WAN, 2), (SQUARE, 2), (EVEN, 1)):
        unit = geometry.spatial * patch
        latent = geometry.latent_of(3 * unit, 5 * unit, patch=patch)
        assert latent == LatentSpec(geometry.channels, 3 * patch, 5 * patch)
        assert geometry.size_of(latent) == (3 * unit, 5 * unit)
    with pytest.raises(ValueError, match=r"multiples of 32, got width 840; nearest: 480 x 832$"):
        SQUARE.latent_of(480, 840, patch=2)
    with pytest.raises(ValueError, match=r"got height 0 and width -16; nearest: 16 x 16$"):
        WAN.latent_of(0, -16, patch=2)


def test_codecs_say_theirs() -> None:
    assert vae_config("wan2.1").geometry == vae_config("tiny").geometry == TAEHVConfig().geometry == WAN
    assert VAEConfig(8, (1, 1, 1, 1, 1), z=48, temporal_down=(False, True, True, False)).geometry == SQUARE
