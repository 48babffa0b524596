"""Recipes: a stage with its settings, and what its run begins with. They come with the package or are files of YAML.

A recipe names its stage and holds only what differs from the defaults.
"""

from __future__ import annotations

import difflib
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from causalreel import config as configs
from causalreel.config import FREE
from causalreel.nn.lora import LoRAConfig
from causalreel.train.contents import Content, fingerprints
from causalreel.train.elsewhere import masked
from causalreel.train.stages.ar_diffusion import ARDiffusionConfig
from causalreel.train.stages.causal_cd import CausalCDConfig
from causalreel.train.stages.causal_ode import CausalODEConfig
from causalreel.train.stages.causal_scm import CausalSCMConfig
from causalreel.train.stages.codec import CodecConfig
from causalreel.train.stages.dmd import DMDConfig
from causalreel.train.stages.pretrain import PretrainConfig
from causalreel.train.trainer import TrainerConfig

SETTINGS: dict[str, type] = {
    "codec": CodecConfig,
    "pretrain": PretrainConfig,
    "ar_diffusion": ARDiffusionConfig,
    "causal_ode": CausalODEConfig,
    "causal_cd": CausalCDConfig,
    "causal_scm": CausalSCMConfig,
    "dmd": DMDConfig,
}
"""The stages, and the dataclass of each one's `settings`."""


@dataclass(frozen=True)
class Recipe:
    """A training run."""

    stage: Literal["codec", "pretrain", "ar_diffusion", "causal_ode", "causal_cd", "causal_scm", "dmd"]
    """What is trained."""
    trainer: TrainerConfig
    """How long, with which optimisers, and where it is kept."""
    settings: Any = field(default_factory=dict)
    """The stage's own settings: losses, chunk size, step lists."""
    model: str = "tiny"
    """Size of a network that no `init` gives: a preset of nn.presets, or of the codec."""
    init: dict[str, Path] = field(default_factory=dict, metadata=FREE)
    """Role -> where its weights start from: an export folder, an embedded model such as tiny/base, a released one such
    as wan2.1-t2v-1.3b, a weights file or folder of any known layout, or random:wan-1.3b to measure with."""
    data: Path | None = field(default=None, metadata=FREE)
    """Prepared data (see `causalreel prepare` and `encode`); the codec stage renders its own clips."""
    rows: int | None = None
    """Clips used of the data; null for all."""
    world: Literal["flat", "walk"] = "flat"
    """Whose clips the codec stage renders, and the data are of: objects on a plane, or a place that one walks in."""
    data_seed: int = 0
    """Which world of that kind."""
    codec: Path | None = field(default=None, metadata=FREE)
    """Codec that made the data: a folder, tiny, or wan (of Wan2.1); used for previews and named in the export."""
    lora: dict[str, LoRAConfig] = field(default_factory=dict)
    """Role -> adapters that are trained in place of its weights. Roles that start from one folder share these then."""
    lora_init: dict[str, Path] = field(default_factory=dict, metadata=FREE)
    """Role -> LoRA file or folder that its adapters begin as, such as <out>/lora of an earlier run."""
    lora_merged: bool = field(default=True, metadata=FREE)
    """Whether the weights with the adapters in them are exported too, beside the adapters."""
    compute: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata=FREE)
    """Arithmetic of the networks; weights stay float32. auto: bfloat16 on the GPU."""
    speed: Literal["plain", "compiled", "graphed"] = field(default="plain", metadata=FREE)
    """On the GPU: compile blocks with torch.compile, and also replay calls as CUDA graphs. The CPU is always plain."""

    def __post_init__(self) -> None:
        expected = SETTINGS[self.stage]
        if isinstance(self.settings, dict):
            object.__setattr__(self, "settings", configs.build(expected, self.settings, "settings"))
        if not isinstance(self.settings, expected):
            raise ValueError(
                f"settings: got {self.settings!r}, expected a mapping with the keys of {expected.__name__}"
            )
        if self.stage == "codec" and self.model != "tiny":
            raise ValueError(f"model: got {self.model!r}, the codec stage trains only 'tiny'")
        if isinstance(self.settings, CodecConfig) and self.world != "flat" and self.settings.events:
            raise ValueError(f"settings.events: got {self.settings.events}, the world {self.world!r} has none: give 0")
        if isinstance(self.settings, CodecConfig) and self.world != "flat" and self.settings.rendered is not None:
            raise ValueError(f"settings.rendered: got {self.settings.rendered}, it is of the world 'flat': give null")
        if isinstance(self.settings, CodecConfig) and self.settings.decoder_only and "codec" not in self.init:
            raise ValueError("settings.decoder_only: got true, which needs init.codec: the codec whose encoder stays")
        for role in self.lora:
            if role not in self.trainer.optimisers or self.stage == "codec":
                raise ValueError(f"lora.{role}: the role has no optimiser that could train adapters")
        for role in self.lora_init:
            if role not in self.lora:
                raise ValueError(f"lora_init.{role}: the role has no adapters; lora.{role} says which")
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows: got {self.rows}, allowed 1 or more, or null for all")


RECIPES = Path(__file__).parents[1] / "recipes"


def shipped_recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def find_recipe(name: str) -> Path:
    """A YAML file, or the name of a recipe that ships with the package, such as `tiny/causal_cd`."""
    path, shipped = Path(name), RECIPES
    if path.suffix in (".yaml", ".yml"):
        return path
    found = shipped / f"{name}.yaml"
    if not found.is_file():
        names = shipped_recipes()
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        raise ValueError(f"no recipe {name!r}{hint} there are {', '.join(names)}, or give a .yaml file")
    return found


def resolve(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe `name` (see `find_recipe`) with `key.key=value` overrides laid upon it; reads, touches nothing."""
    return configs.load(find_recipe(name), Recipe, overrides)


def describe(recipe: Recipe) -> str:
    """The plan of a run in words."""
    s = recipe.trainer
    lines = [
        f"# stage {recipe.stage}: {s.steps} steps, trained roles: {', '.join(s.optimisers)}",
        *(f"# {role} starts from {path}" for role, path in recipe.init.items()),
        f"# data: {recipe.data or 'clips rendered on the fly'}",
        *(f"# {role} trains adapters of rank {lora.rank}" for role, lora in recipe.lora.items()),
        f"# checkpoints in {s.out}/checkpoints every {s.save_every} steps; export in {s.out}/export",
    ]
    if s.remote is not None:
        lines.append(f"# copies in {masked(s.remote)}")
    return "\n".join(lines)


def provenance(recipe: Recipe, contents: Sequence[Content] = ()) -> dict[str, Any]:
    """Where weights come from: the resolved recipe, the seed, what they were made from, the commit if there is one."""
    try:
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        commit = found.stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    return {
        "commit": commit,
        "seed": recipe.trainer.seed,
        "torch": str(torch.__version__),
        "recipe": configs.to_dict(recipe),
        "contents": fingerprints(contents),
    }
