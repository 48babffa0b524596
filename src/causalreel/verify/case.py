"""One recorded case: its description, its tensors, its networks, and what our code makes of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.masks import Context
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.presets import ModelConfig
from causalreel.rollout import chunk_sizes
from causalreel.types import Conditioning
from causalreel.weights.files import read_tensors
from causalreel.weights.layouts import load_file_into

PRINTED_TOLERANCE = 2e-5
"""Numbers in the JSON are printed with six digits: they cannot be met more closely than this."""

ROLES = {
    "generator": ("generator", "student"),
    "teacher": ("teacher", "real", "real_score", "causal teacher", "bidirectional teacher"),
    "critic": ("critic", "ema", "target", "fake", "fake_score", "fake score"),
}
"""What a case with several networks may call them."""


@dataclass(frozen=True)
class Case:
    """<name>.json and <name>.safetensors of a folder. Tensors are `in.*`, draws in order of use, and `out.*`.

    Cases of text or names have no tensors: what they hold is in `document`, the whole JSON.
    """

    name: str
    folder: Path
    description: str
    config: dict[str, Any]
    extra: dict[str, Any]
    model: dict[str, Any]
    tensors: dict[str, Tensor]
    tolerance: float
    document: dict[str, Any] = field(default_factory=dict)

    def get(self, *keys: str, default: Any = None) -> Any:
        """The first of these settings that the case has, in its `config` or `extra`: a single value, not a list."""
        found = (place[key] for key in keys for place in (self.config, self.extra) if key in place)
        return next((value for value in found if value is not None and not isinstance(value, (list, dict))), default)

    def steps(self, key: str = "steps", default: list[float] | None = None) -> list[float] | None:
        """A step list on the 0..1000 scale, from a setting or from the description ("steps 1000/500")."""
        found = next((place[key] for place in (self.config, self.extra) if isinstance(place.get(key), list)), None)
        if found is None and key == "steps" and (said := re.search(r"steps (\d+(?:/\d+)+)", self.description)):
            found = [float(step) for step in said[1].split("/")]
        return default if found is None else found

    @property
    def shift(self) -> float:
        said = re.search(r"shift[ -](\d+(?:\.\d+)?)", self.description)
        return float(self.get("shift", "timestep_shift", default=said[1] if said else 5.0))

    @property
    def chunk(self) -> int:
        return int(self.get("frames_per_chunk", "num_frame_per_block", default=1))

    def sizes(self, frames: int) -> list[int]:
        """Chunks of a clip that starts at frame 0."""
        if self.get("independent_first_frame", default=False):
            return [1, *(chunk_sizes(frames - 1, self.chunk) if frames > 1 else [])]
        first = min(int(self.get("first_chunk_frames", default=self.chunk)), frames)
        return [first, *(chunk_sizes(frames - first, self.chunk) if frames > first else [])]

    def context(self, *, sink: bool) -> Context:
        """The window; `sink` False where the released code knows no sink (its masks)."""
        window = int(self.get("local_attn_size", default=-1))
        return Context(window if window > 0 else None, int(self.get("sink_size", default=0)) if sink else 0)

    def conditioning(self, name: str = "in.prompt_embeds") -> Conditioning:
        return Conditioning(self.tensors[name].float(), self.cameras())

    def cameras(self) -> dict[str, Tensor]:
        """The fields of a case with cameras; of any other none."""
        if "in.viewmats" not in self.tensors:
            return {}
        matrices = self.tensors["in.Ks"]
        rows = [matrices[..., 0, 0], matrices[..., 1, 1], matrices[..., 0, 2], matrices[..., 1, 2]]
        return {"w2c": self.tensors["in.viewmats"], "intrinsics": torch.stack(rows, dim=-1)}

    def size(self) -> ModelConfig:
        """The size of the case's networks."""
        return replace(size_of(self.model), camera="prope" if "in.viewmats" in self.tensors else "none")

    def network(self, role: str = "generator", context: ContextPolicy = Context()) -> DiTDenoiser:
        """A network of the case's size with the weights that this role has, read by their official names."""
        net = DiTDenoiser(self.size(), context=context, backend="sdpa")
        load_file_into(net.model, str(self.folder / f"{self._weights(role)}.safetensors"))
        return net

    def _weights(self, role: str) -> str:
        """`weights_a`, or `generator=weights_a, teacher=weights_b, ema/critic=weights_c` -> the role's file."""
        text = str(self.get("weights", default="weights_a"))
        text = text.replace(".safetensors", "")
        if "=" not in text:
            return text.strip()
        named = {}
        for entry in text.split(","):
            names, file = entry.split("=")
            named.update(dict.fromkeys((part.strip() for part in names.split("/")), file.strip()))
        found = next((named[alias] for alias in ROLES[role] if alias in named), None)
        if found is None:
            raise ValueError(f"{self.name} names no weights for the {role}; it has {text!r}")
        return found

    def draws(self, prefix: str = "draw") -> list[tuple[str, Tensor]]:
        """Recorded random draws `<prefix>.NNN.<kind>` as (kind, tensor), in order of use."""
        names = sorted(name for name in self.tensors if re.fullmatch(rf"{prefix}\.\d+\.\w+", name))
        return [(name.split(".")[2], self.tensors[name]) for name in names]


def read_case(path: Path) -> Case | None:
    """A case's JSON with its tensors; None if the file describes something else."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "case" not in found:
        return None
    tolerance = found.get("tolerance") or {"suggested_max_abs_error_relative_to_max_abs_output": 0}
    return Case(
        name=path.stem,
        folder=path.parent,
        description=str(found.get("description", "")),
        config=found.get("config") or {},
        extra=found.get("extra") or {},
        model=found.get("model") or {},
        tensors=read_tensors(path.with_suffix(".safetensors")) if "tensors" in found else {},
        tolerance=float(tolerance["suggested_max_abs_error_relative_to_max_abs_output"]),
        document=found,
    )


@dataclass(frozen=True)
class Check:
    """One output met, or not: error relative to its largest absolute value."""

    name: str
    error: float
    limit: float

    @property
    def ratio(self) -> float:
        """Met up to 1."""
        if self.limit <= 0:
            return math.inf if self.error else 0.0
        return self.error / self.limit

    @property
    def is_printed(self) -> bool:
        return self.name.startswith("extra.")


@dataclass
class Findings:
    """What our code makes of a case, compared as it comes in; outputs that the case does not have are ignored."""

    case: Case
    checks: list[Check] = field(default_factory=list)
    left_out: tuple[str, ...] = ()
    """Beginnings of outputs that are not met on purpose."""
    seen: set[str] = field(default_factory=set)

    def wants(self, name: str) -> bool:
        return name in self.case.tensors

    def add(
        self,
        name: str,
        value: Tensor | Callable[[], Tensor | None] | None,
        *,
        via: str = "",
        limit: float | None = None,
    ) -> None:
        """Compare with the case's tensor of that name; several ways to one output are told apart by `via`.

        limit: tolerance of this output, where the case states another one for it.
        """
        if name not in self.case.tensors:
            return
        got = value() if callable(value) else value
        if got is None:
            return
        label = f"{name} ({via})" if via else name
        self.seen.add(name)
        tolerance = self.case.tolerance if limit is None else limit
        self.checks.append(Check(label, relative_error(got, self.case.tensors[name]), tolerance))

    def add_exact(self, name: str, got: object, wanted: object) -> None:
        """Compare what is not a tensor, such as text; only equality will do."""
        self.checks.append(Check(name, float(got != wanted), 0.0))

    def add_printed(self, name: str, value: float | Mapping[str, float], *, via: str = "") -> None:
        """Compare with a number, or a table of numbers, printed in the JSON; each relative to itself."""
        wanted = self.case.extra.get(name)
        if wanted is None:
            return
        wanted = wanted if isinstance(wanted, Mapping) else {"": wanted}
        got = value if isinstance(value, Mapping) else {"": value}
        errors = [abs(got[key] - w) / abs(w) if w else abs(got[key]) for key, w in wanted.items()]
        label = f"extra.{name} ({via})" if via else f"extra.{name}"
        self.checks.append(Check(label, max(errors), max(self.case.tolerance, PRINTED_TOLERANCE)))

    def add_gradients(self, prefix: str, printed: str, net: nn.Module, *, via: str = "") -> None:
        """Compare all parameter gradients of a network, then drop them."""
        gradients = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone()
            for name, p in net.named_parameters()
        }
        net.zero_grad(set_to_none=True)
        for name, gradient in gradients.items():
            self.add(f"{prefix}.{name}", gradient, via=via)
        norms = {name: gradient.double().norm().item() for name, gradient in gradients.items()}
        self.add_printed(f"{printed}_norm_per_parameter", norms, via=via)
        self.add_printed(f"{printed}_total_norm", math.hypot(*norms.values()), via=via)

    @property
    def unchecked(self) -> list[str]:
        outputs = (name for name in self.case.tensors if name.startswith("out."))
        return [name for name in outputs if name not in self.seen and not name.startswith(self.left_out)]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest absolute difference over the largest absolute wanted value; infinite for another shape or a NaN."""
    if got.shape != wanted.shape:
        return math.inf
    if not wanted.numel():
        return 0.0
    a, b = got.detach().double(), wanted.double()
    scale = b.abs().max().item()
    error = (a - b).abs().max().item() / (scale or 1.0)
    return error if math.isfinite(error) else math.inf


def size_of(model: Mapping[str, Any]) -> ModelConfig:
    """A network's size as the released code names its numbers."""
    return ModelConfig(
        dim=model["dim"],
        ffn_dim=model["ffn_dim"],
        heads=model["num_heads"],
        layers=model["num_layers"],
        text_dim=model["text_dim"],
        text_length=model["text_len"],
        freq_dim=model.get("freq_dim", 256),
        channels=model.get("in_dim", 16),
        eps=model.get("eps", 1e-6),
    )
