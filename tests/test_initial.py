"""Where networks start from: exports, files of other layouts, released names, random; read once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from causalreel.fingerprint import fingerprint
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.presets import ModelConfig
from causalreel.train import initial
from causalreel.train.contents import facts_of
from causalreel.train.initial import Start, open_start, size_of
from causalreel.weights.export import load_export
from causalreel.weights.files import write_tensors
from causalreel.weights.layouts import to_layout
from ceilings import work_within

CONFIG = ModelConfig(dim=48, ffn_dim=80, heads=3, layers=2, text_dim=8, text_length=512, freq_dim=32, channels=4)


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in DiTDenoiser(CONFIG).model.state_dict().items()}


def filled(start: Start, **how: int) -> dict[str, Tensor]:
    net = start.denoiser()
    assert all(parameter.is_meta for parameter in net.parameters())
    net.to_empty(device="cpu")
    start.fill(net, **how)
    return net.model.state_dict()


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("layout", ["wan", "official", "diffusers", "comfyui"])
def test_weights_of_any_layout(layout: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, to_layout(weights(), layout))
    start = open_start(path)
    assert size_of(path) == start.config and start.config.dim == 48
    assert same(filled(start), weights())


def test_an_export_has_the_fingerprint_and_the_weights_that_it_had_when_it_was_loaded_whole() -> None:
    start, whole = open_start(Path("tiny/base")), load_export("tiny/base")[0]
    assert same(filled(start), whole.model.state_dict())
    assert start.fingerprint() == fingerprint(whole.model.state_dict(), facts_of(whole.config, whole.context))
    assert size_of(Path("tiny")) == load_export("tiny")[1].model


def test_random_weights_depend_on_the_seed() -> None:
    start = open_start(Path("random:tiny-smoke"))
    assert size_of(Path("random:tiny-smoke")) == start.config
    one = filled(start, seed=1)
    assert same(one, filled(start, seed=1)) and not same(one, filled(start, seed=2))


def test_a_released_name_is_its_file_and_no_other_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    write_tensors(path, weights())
    monkeypatch.setattr(initial, "fetch", lambda files, folder: (dict.fromkeys(files, path), ""))
    with pytest.raises(ValueError, match=r"model\.safetensors is of another model size.*wan-1\.3b"):
        open_start(Path("wan2.1-t2v-1.3b"))


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("nowhere", "nowhere is not an export"),
        ("random:huge", "huge"),
        ("folder", "folder"),
        ("note.txt", "note.txt"),
    ],
)
def test_what_is_no_network_is_refused(source: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("note.txt").write_text("no weights")
    for look in (open_start, size_of):
        with pytest.raises(ValueError, match=told) as caught:
            look(Path(source))
        assert "\n" not in str(caught.value)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    broken = weights()
    broken["blocks.1.ffn.0.weight"][3, 4] = torch.nan
    path = tmp_path / "model.safetensors"
    write_tensors(path, broken)
    with pytest.raises(ValueError, match=r"model\.safetensors: not finite: blocks\.1\.ffn\.0\.weight"):
        filled(open_start(path))


READ = """
import torch
from pathlib import Path
from causalreel.train.initial import open_start
start = open_start(Path(arguments[0]))
net = start.denoiser().to(torch.bfloat16).to_empty(device="cpu")
start.fill(net)
print(sum(p.numel() * 2 for p in net.parameters()) >> 20)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="measured by Linux's /proc")
def test_no_second_copy_is_made(tmp_path: Path) -> None:
    """In memory are the network, the pages of the file that are read (others share them), and one tensor."""
    size = ModelConfig(dim=1024, ffn_dim=4096, heads=8, layers=6, text_dim=64, text_length=512, freq_dim=32, channels=4)
    path = tmp_path / "large.safetensors"
    tensors = DiTDenoiser(size).model.state_dict()
    write_tensors(path, {name: torch.zeros(value.shape, dtype=torch.bfloat16) for name, value in tensors.items()})
    setup = "import torch, causalreel.train.initial, causalreel.weights.build, torch.distributed.tensor"
    cost = work_within(4096, READ, str(path), setup=setup)
    size_mib = int(cost.output)
    assert size_mib > 150 and cost.peak_mib < 2 * size_mib + 60
