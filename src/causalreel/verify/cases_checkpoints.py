"""Checkpoint layouts: one network in many files that must load, broken files that must be refused in the right words,
and the names and shapes of full-size networks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from causalreel.codecs.wan_vae import CausalVAE, VAEConfig
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.dit import DiT
from causalreel.verify.case import Case, Findings, size_of
from causalreel.verify.words import message_of, refusal
from causalreel.weights.build import load_denoiser
from causalreel.weights.diffusers import to_diffusers
from causalreel.weights.layouts import LAYOUTS, Network, bare_names, from_layout, read_network, to_layout


def handler(case: Case) -> Callable[[Case, Findings], None] | None:
    """Which of the two kinds of case this is."""
    if isinstance(case.config.get("files"), list):
        return layouts
    return shapes if isinstance(case.document.get("shapes"), Mapping) else None


def layouts(case: Case, found: Findings) -> None:
    """Every file of the case: loaded and run, or refused."""
    folder = case.folder / str(case.config.get("folder", case.name))
    for entry in case.config["files"]:
        path, expected = folder / entry["file"], entry["expected"]
        if str(expected["status"]).startswith("loads"):
            _loads(case, found, path, expected, entry.get("top_level_keys"))
        else:
            told = refusal(lambda path=path: load_denoiser(path, case.size()), path, expected)
            found.add_exact(f"{entry['file']} refused: {expected['reason']}", told, "")
    for ours, theirs in case.config.get("key_map_official_to_diffusers", ()):
        names = [pair[0] for pair in _expand(ours, theirs)]
        found.add_exact(f"{ours} in diffusers", [to_diffusers(n) for n in names], [t for _, t in _expand(ours, theirs)])


@torch.no_grad()
def _loads(case: Case, found: Findings, path: Path, expected: Mapping[str, Any], keys: object) -> None:
    names = sorted({name.rpartition(".")[2] for name in case.tensors if name.startswith("out.")}, key=len, reverse=True)
    said = re.findall("|".join(map(re.escape, names)), str(expected["network"]))
    if not said:
        raise ValueError(f"{path.name}: no output of the case is called {expected['network']!r}")
    for i, name in enumerate(said):
        which = name if i else None  # the first is the default, others are had on request
        _outputs(case, found, load_denoiser(path, case.size(), which=which, backend="sdpa"), name, path.name)
    for key in keys if isinstance(keys, list) else ():
        if key in names and not any(name.startswith(key) for name in said):  # not asked for, but there and recorded
            _outputs(case, found, load_denoiser(path, case.size(), which=key, backend="sdpa"), key, path.name)
    if found.wants(f"out.flow_bidirectional.{said[0]}_bf16_weights"):  # as the released loader rounds them
        rounded = load_denoiser(path, case.size(), backend="sdpa")
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
        _outputs(case, found, rounded, f"{said[0]}_bf16_weights", path.name)
    network = read_network(path)
    found.add_exact(f"{path.name} there and back", _there_and_back(network.tensors), "")
    if network.layout == "diffusers":
        _outputs(case, found, load_denoiser(path, case.size()), f"{said[0]}_through_diffusers", path.name)
    if isinstance(keys, list) and "generator" not in keys and "generator_ema" in keys:
        found.add_exact(
            f"{path.name} has no raw weights", message_of(lambda: read_network(path, "generator")) != "", True
        )


def _outputs(case: Case, found: Findings, net: DiTDenoiser, name: str, via: str) -> None:
    x, conditioning = case.tensors["in.noisy"].float(), case.conditioning()
    with torch.no_grad():
        whole = case.tensors["in.timestep"].double().reshape(-1, 1) / 1000  # float32 would move the timestep by 2e-5
        found.add(f"out.flow_bidirectional.{name}", net(x, whole.expand(x.shape[:2]), conditioning), via=via)
        if found.wants(f"out.flow_causal_chunk1.{name}"):
            each = case.tensors["in.timestep_per_frame"].double() / 1000
            found.add(f"out.flow_causal_chunk1.{name}", net(x, each, conditioning, sizes=[1] * x.shape[1]), via=via)


def shapes(case: Case, found: Findings) -> None:
    """Names, shapes and counts of full-size networks, ours against those recorded; and every layout there and back."""
    for label, wanted in case.document["shapes"].items():
        sizes = case.config.get(label) or next((v for k, v in case.config.items() if label.startswith(k)), {})
        build = next((build for mark, build in BUILDERS.items() if mark in sizes), None)
        if build is None:
            raise ValueError(f"{case.name}: nothing here builds {label}")
        ours = {name: list(shape) for name, shape in build(sizes).items()}
        given = bare_names({name: torch.empty(shape, device="meta") for name, shape in wanted.items()})
        found.add_exact(f"{label}: names", sorted(ours), sorted(given))
        found.add_exact(f"{label}: shapes", ours, {name: list(tensor.shape) for name, tensor in given.items()})
        counts = case.document.get("counts", {}).get(label, {})
        total = sum(math.prod(shape) for shape in ours.values())
        counted = {"tensors": len(ours), "parameters": total}
        found.add_exact(f"{label}: counts", {key: counted.get(key) for key in counts}, counts)
        if "text_len" in sizes:
            found.add_exact(f"{label}: there and back", _there_and_back(given), "")
            config = Network(given, "wan", None, {}, label).config()
            found.add_exact(f"{label}: size", (config.dim, config.layers), (sizes["dim"], sizes["num_layers"]))


def _dit(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return _shapes_of(lambda: DiT(size_of(sizes)))


def _vae(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    config = VAEConfig(
        dim=sizes["dim"],
        multipliers=tuple(sizes["dim_mult"]),
        res_blocks=sizes["num_res_blocks"],
        z=sizes["z_dim"],
        temporal_down=tuple(sizes["temperal_downsample"]),
    )
    return _shapes_of(lambda: CausalVAE(config))


def _umt5(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    from causalreel.text.umt5 import UMT5Sizes
    from causalreel.weights.umt5_files import official_shapes

    return official_shapes(
        UMT5Sizes(
            vocab=sizes["vocab"],
            dim=sizes["dim"],
            attention_dim=sizes["dim_attn"],
            ffn_dim=sizes["dim_ffn"],
            heads=sizes["num_heads"],
            layers=sizes["num_layers"],
            buckets=sizes["num_buckets"],
        )
    )


def _taehv(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    from causalreel.codecs.taehv import TAEHV, TAEHVConfig

    widths = tuple(sizes["decoder_widths"])
    return _shapes_of(lambda: TAEHV(TAEHVConfig(encoder_width=sizes["encoder_width"], decoder_widths=widths)))


BUILDERS: dict[str, Callable[[Mapping[str, Any]], dict[str, tuple[int, ...]]]] = {
    "text_len": _dit,
    "z_dim": _vae,
    "dim_attn": _umt5,
    "encoder_width": _taehv,
}
"""A size that only this kind of network has -> its names and shapes at given sizes."""


def _shapes_of(build: Callable[[], nn.Module]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in build().state_dict().items()}


def _there_and_back(tensors: Mapping[str, Tensor]) -> str:
    """Whether the tensors survive every layout; else which not."""
    for layout in LAYOUTS:
        back = from_layout(to_layout(tensors, layout))
        if list(back) != list(tensors) or any(back[name] is not tensors[name] for name in tensors):
            return layout
    return ""


def _expand(ours: str, theirs: str) -> list[tuple[str, str]]:
    """A pattern of the key map as names: N is a block, * is weight or bias."""
    leaves = ("weight", "bias") if ours.endswith("*") else ("",)
    return [(ours.replace("N", "7").replace("*", leaf), theirs.replace("N", "7").replace("*", leaf)) for leaf in leaves]
