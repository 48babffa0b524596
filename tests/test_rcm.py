"""Causal-rCM's files: networks under prefixes, the linear patch embedding, folders of distributed checkpoints."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import metadata

from causalreel.nn.dit import DiT
from causalreel.nn.presets import ModelConfig
from causalreel.weights.build import load_denoiser
from causalreel.weights.layouts import read_network

CONFIG = ModelConfig(dim=12, ffn_dim=16, heads=1, layers=1, text_dim=16, text_length=8, freq_dim=16)


def network(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {name: torch.randn_like(value) for name, value in DiT(CONFIG).state_dict().items()}


def as_theirs(tensors: dict[str, Tensor], prefix: str = "net") -> dict[str, Tensor]:
    linear = tensors | {"patch_embedding.weight": tensors["patch_embedding.weight"].flatten(1)}
    return {f"{prefix}.{name}": value for name, value in linear.items()}


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def save_folder(folder: Path, tensors: dict[str, Tensor]) -> Path:
    dcp.save(dict(tensors), checkpoint_id=folder, no_dist=True)
    return folder


def test_files_and_folders_are_read_whole(tmp_path: Path) -> None:
    student, average, critic = network(1), network(2), network(3)
    torch.save(as_theirs(student), tmp_path / "net.pt")
    equal(read_network(tmp_path / "net.pt").tensors, student)
    both = as_theirs(student) | as_theirs(average, "net_ema") | as_theirs(critic, "net_fake_score")
    torch.save(both, tmp_path / "all.pt")
    equal(read_network(tmp_path / "all.pt").tensors, average)
    equal(read_network(tmp_path / "all.pt", "net").tensors, student)
    equal(read_network(save_folder(tmp_path / "alone", as_theirs(student))).tensors, student)
    save_folder(tmp_path / "iter_000000050" / "model", both)
    equal(read_network(tmp_path / "iter_000000050").tensors, average)
    equal(read_network(tmp_path / "iter_000000050" / "model").tensors, average)
    assert load_denoiser(tmp_path / "iter_000000050", CONFIG).config == CONFIG


def test_an_index_may_name_members_of_enumerations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some Pythons write a member by its name, as an attribute of its class, others by its value."""
    student = network(1)
    kind = metadata._MEM_FORMAT_ENCODING
    monkeypatch.setattr(kind, "__reduce_ex__", lambda self, protocol: (getattr, (type(self), self.name)))
    folder = save_folder(tmp_path / "alone", as_theirs(student))
    assert b"getattr" in (folder / ".metadata").read_bytes()
    equal(read_network(folder).tensors, student)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "__0_0.distcp").unlink(), "data file __0_0.distcp is missing"),
        (lambda f: (f / ".metadata").unlink(), "not a checkpoint folder"),
        (lambda f: (f / "__0_0.distcp").write_bytes(b"x" * 100), "cut off"),
        (lambda f: _overwrite(f / "__0_0.distcp"), "damaged there"),
        (lambda f: (f / ".metadata").write_bytes(b"\x80\x04nonsense"), "damaged"),
        (lambda f: (f / ".metadata").write_bytes(pickle.dumps(print)), "builtins.print.*refused"),
        (lambda f: (f / ".metadata").write_bytes(pickle.dumps({"no": "index"})), "damaged"),
        (lambda f: (f / ".metadata").write_bytes(b"\x80\x04})" + b"2\x86" * 60 + b"K\x01s."), "damaged: unhashable"),
        (lambda f: (f / ".metadata").write_bytes(b"\x80\x05\x96" + b"\xff" * 4 + b"\0\0\0\0x."), "damaged"),
        (lambda f: _edit(f, lambda told, _: setattr(told, "size", "16")), "whole numbers are expected"),
        (lambda f: _edit(f, lambda told, _: vars(told).update(size=[0, 3], chunks=[])), "do not make up the shape"),
        (lambda f: _edit(f, _doubled), "its pieces overlap"),
        (lambda f: _edit(f, lambda _, index: index.storage_data.update(_again(index))), "names places twice"),
    ],
)
def test_a_broken_folder_is_one_line(tmp_path: Path, break_it, message: str) -> None:
    folder = save_folder(tmp_path / "model", as_theirs(network()))
    break_it(folder)
    with pytest.raises(ValueError, match=message) as refusal:
        read_network(folder)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


def _edit(folder: Path, change: Callable[[Any, Any], object]) -> None:
    """Change what the index says of a weight (16,12)."""
    index = pickle.loads((folder / ".metadata").read_bytes())
    change(index.state_dict_metadata["net.blocks.0.ffn.0.weight"], index)
    (folder / ".metadata").write_bytes(pickle.dumps(index))


def _doubled(told: Any, _: Any) -> None:
    """The first half of a larger weight, and once more in place of the second."""
    told.size, told.chunks = (32, 12), told.chunks * 2


def _again(index: Any) -> dict[Any, Any]:
    """All places a second time, at other offsets of the same tensors."""
    places = list(index.storage_data.items())
    return {replace(key, offset=(7, *key.offset)): place for key, place in places}


def test_pieces_of_several_ranks_and_what_is_no_tensor(tmp_path: Path) -> None:
    """A step counter beside the weights is stored as bytes; a weight of two pieces is put together."""
    folder = save_folder(tmp_path / "model", as_theirs(network()) | {"iteration": 5, "net._extra_state": b"none"})
    equal(read_network(folder).tensors, network())
    theirs, name = as_theirs(network()), "net.blocks.0.ffn.0.weight"
    halves = {f"{name}{half}": part.clone() for half, part in enumerate(theirs.pop(name).chunk(2))}
    folder = save_folder(tmp_path / "two", theirs | halves)
    index = pickle.loads((folder / ".metadata").read_bytes())
    told = [index.state_dict_metadata.pop(half) for half in halves]
    told[1].chunks[0].offsets = torch.Size((8, 0))
    index.state_dict_metadata[name] = replace(
        told[0], size=torch.Size((16, 12)), chunks=told[0].chunks + told[1].chunks
    )
    for key, place in list(index.storage_data.items()):
        if key.fqn in halves:
            del index.storage_data[key]
            index.storage_data[replace(key, fqn=name, offset=torch.Size((8 * int(key.fqn[-1]), 0)))] = place
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    equal(read_network(folder).tensors, network())


def _overwrite(file: Path) -> None:
    file.write_bytes(b"\0" * file.stat().st_size)


def test_what_is_no_generator_or_does_not_fit_is_named(tmp_path: Path) -> None:
    torch.save(as_theirs(network(), "net_fake_score"), tmp_path / "critic.pt")
    with pytest.raises(ValueError, match="no generator in the file: it has net_fake_score"):
        read_network(tmp_path / "critic.pt")
    narrow = as_theirs(network())
    narrow["net.patch_embedding.weight"] = narrow["net.patch_embedding.weight"][:, :60]
    torch.save(narrow, tmp_path / "narrow.pt")
    with pytest.raises(ValueError, match=r"patch_embedding.weight has the wrong shape"):
        load_denoiser(tmp_path / "narrow.pt", CONFIG)
    lacking = as_theirs(network())
    del lacking["net.blocks.0.self_attn.norm_k.weight"]
    torch.save(lacking, tmp_path / "lacking.pt")
    with pytest.raises(ValueError, match=r"1 names missing .first: blocks.0.self_attn.norm_k.weight"):
        load_denoiser(tmp_path / "lacking.pt", CONFIG)
