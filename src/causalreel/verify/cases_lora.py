"""c20: adapters in every layout merged into a network, sums of them, and files that must be refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.verify.case import Case, Findings
from causalreel.verify.words import refusal
from causalreel.weights.lora import Lora, changed, check_fits, check_strength, check_together, read_lora


def loras(case: Case, found: Findings) -> None:
    """Every file of the case: merged and run at the recorded strengths, or refused."""
    folder = case.folder / str(case.config.get("folder", case.name))
    stems = {_stem(entry["file"]): folder / entry["file"] for entry in _entries(case, "files")}
    stems |= {_stem(entry["file"]): folder / entry["file"] for entry in _entries(case, "dora")}
    base = {name: value.clone() for name, value in case.network().model.state_dict().items()}
    found.left_out = ("out.flow_if_magnitudes_were_ignored",)  # what a wrong loader would show
    found.add("out.flow.no_lora", _flow(case, base, []))
    for name in case.tensors:
        recorded = re.fullmatch(r"out\.flow\.([^@]+?)\.(-?\d+\.\d+)", name)
        if recorded and recorded[1] in stems:
            found.add(name, _flow(case, base, [(read_lora(stems[recorded[1]]), float(recorded[2]))]))
        merged = re.fullmatch(r"out\.merged\.(.+?)\.(-?\d+\.\d+)\.([a-z].*)", name)
        if merged and merged[1] in stems:
            used = [(read_lora(stems[merged[1]]), float(merged[2]))]
            found.add(name, _merged(base, used)[merged[3]])
    for entry in _entries(case, "dora"):
        same = re.search(r"same numbers as (\w+)", str(entry["expected"]))
        if same:
            used = [(read_lora(folder / entry["file"]), 1.0)]
            found.add(f"out.flow.{same[1]}.1.0", _flow(case, base, used), via=entry["file"])
    for together in _entries(case, "combinations"):
        used = [(read_lora(stems[stem]), float(strength)) for stem, strength in together["adapters"]]
        for order in (used, used[::-1]):
            found.add(f"out.flow.combination.{together['name']}", _flow(case, base, order))
    for entry in _entries(case, "files"):
        lora = read_lora(folder / entry["file"])
        if "layers_changed" in entry:
            found.add_exact(
                f"{entry['file']}: layers changed", len(lora.pairs) + len(lora.differences), entry["layers_changed"]
            )
        found.add_exact(f"{entry['file']} at 0", _is_same(base, _merged(base, [(lora, 0.0)])), True)
    for entry in _entries(case, "refused"):
        path = folder / entry["file"]
        told = refusal(lambda path=path: _merged(base, [(read_lora(path), 1.0)]), path, entry["expected"])
        found.add_exact(f"{entry['file']} refused: {entry['expected']['reason']}", told, "")


def _entries(case: Case, name: str) -> list[dict[str, Any]]:
    return case.config.get(name) or []


def _stem(file: str) -> str:
    return Path(file).name.removesuffix(".safetensors").removesuffix(".pt")


def _merged(base: dict[str, Tensor], used: Sequence[tuple[Lora, float]]) -> dict[str, Tensor]:
    for lora, strength in used:
        check_strength(strength, lora.source)
        check_fits(lora, {name: tuple(value.shape) for name, value in base.items()})
    check_together(used)
    return base | dict(changed(base.__getitem__, used))


def _is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def _flow(case: Case, base: dict[str, Tensor], used: Sequence[tuple[Lora, float]]) -> Tensor:
    net = DiTDenoiser(case.size(), backend="sdpa")
    net.model.load_state_dict(_merged(base, used))
    x = case.tensors["in.noisy"].float()
    sigma = (case.tensors["in.timestep"].double().reshape(-1, 1) / 1000).expand(x.shape[:2])
    return net(x, sigma, case.conditioning())
