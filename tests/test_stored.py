"""Trajectories that a run makes and keeps: all of their conditioning, on the device only where they are few."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from causalreel.train import stored
from causalreel.train.stored import Store
from causalreel.types import Conditioning


def test_fields_of_the_conditioning_are_kept(tmp_path: Path) -> None:
    def make(first: int) -> dict[str, torch.Tensor]:
        text, camera = torch.full((2, 3, 4), float(first)), torch.full((2, 5, 6), first + 0.5)
        return {"states": torch.zeros(2, 3, 5, 1, 2, 2), **Conditioning(text, {"camera": camera}).named()}

    store = Store(tmp_path, {"teacher": "one"}, False)
    for held in (store.get(4, [0, 2], make), store.get(4, [0, 2], lambda first: pytest.fail("made again"))):
        found = Conditioning.from_named(held)
        assert found.text[:, 0, 0].tolist() == [0, 0, 2, 2]
        assert found.fields["camera"][:, 0, 0].tolist() == [0.5, 0.5, 2.5, 2.5]


def test_trajectories_lie_on_the_device_only_where_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    held = {"states": torch.zeros(2, 3, 5, 1, 2, 2), "text": torch.zeros(2, 3, 4)}
    size = sum(value.nbytes for value in held.values())
    for limit, place in ((size, "meta"), (size - 1, "cpu")):
        monkeypatch.setattr(stored, "ON_DEVICE", limit)
        source = stored.placed(held, torch.device("meta"))
        assert source.latents.device.type == source.conditioning.text.device.type == place
