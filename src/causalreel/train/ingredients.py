"""What a denoiser's run is made from: data, codec, networks by role; loaded, checked, known by fingerprints.

What is missing is said with the command that makes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from causalreel import config as configs
from causalreel.codecs.wan_vae import CausalVAE
from causalreel.data.prepare import read_info
from causalreel.data.shards import caption_place, load_prepared, shards
from causalreel.data.sources import LatentSource
from causalreel.fingerprint import fingerprint
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.presets import ModelConfig, preset
from causalreel.rollout import chunk_sizes
from causalreel.text.tiny import TinyTextEncoder
from causalreel.train.contents import Content
from causalreel.types import Conditioning, LatentSpec
from causalreel.weights.export import codec_identity, load_codec, load_export, read_codec, read_export

if TYPE_CHECKING:
    from causalreel.train.run import Recipe

ROLES = {
    "dmd": ("student", "critic", "teacher"),
    "causal_cd": ("student", "teacher"),
    "causal_ode": ("student", "teacher"),
}
"""Networks a stage needs from outside; the others need a student only."""


@dataclass(frozen=True)
class Ingredients:
    """Everything a denoising stage is built from, on its device."""

    source: LatentSource
    spec: LatentSpec
    frames: int
    codec: CausalVAE
    null: Tensor
    """The unconditional text (1,K,E)."""
    roles: dict[str, DiTDenoiser]
    contents: tuple[Content, ...]
    """Fingerprints of all of them; none where the trainer does not check."""


def gather(recipe: Recipe, device: torch.device, *, is_loaded: bool = True) -> Ingredients:
    """Read all of it; ValueError, in one line, for what is missing, damaged or does not fit.

    is_loaded: put it on the device; else it stays on the CPU, for who only looks.
    """
    problems = missing(recipe)
    if problems:
        raise ValueError(problems[0])
    assert recipe.data is not None and recipe.codec is not None
    codec = load_codec(recipe.codec)
    latents, told = load_prepared(recipe.data, rows=recipe.rows)
    spec = LatentSpec(*latents.shape[2:])
    if spec.channels != codec.geometry.channels:
        raise ValueError(
            f"{recipe.data} has {spec.channels} latent channels, the codec {recipe.codec} {codec.geometry.channels}"
        )
    if (chunk := getattr(recipe.settings, "chunk", None)) is not None:
        chunk_sizes(latents.shape[1], chunk)
    encoder = TinyTextEncoder()
    text = _encode(encoder, told, recipe.data)
    compute = _compute(recipe, device)
    roles = _roles(recipe)
    for role, net in roles.items():
        _check_fits(role, net, spec, encoder.width)
    contents: tuple[Content, ...] = ()
    if recipe.trainer.check:
        _check_codec_of_data(recipe.data, recipe.codec)
        contents = (
            Content("data", str(recipe.data), fingerprint({"latents": latents}, *told)),
            Content("codec", str(recipe.codec), fingerprint(codec.state_dict(), configs.dump(codec.config))),
            *(_content(role, recipe.init[role], net) for role, net in roles.items() if role in recipe.init),
            Content("compute", f"arithmetic in {compute}", compute),
        )
    device = device if is_loaded else torch.device("cpu")
    for role, net in roles.items():
        _place(net, compute, device, is_trained=role in recipe.trainer.optimisers)
    source = LatentSource(latents.to(device), Conditioning(text.to(device)))
    null = encoder.null(1).to(device)
    return Ingredients(source, spec, latents.shape[1], codec.to(device), null, roles, contents)


def networks(recipe: Recipe) -> list[ModelConfig]:
    """Sizes of the networks that a recipe trains or learns from, as far as their files are there; none for a codec."""
    if recipe.stage == "pretrain":
        return [preset(recipe.model)]
    found = []
    for folder in recipe.init.values():
        with contextlib.suppress(ValueError):
            found.append(read_export(folder).model)
    return found


# ---- what is missing, and how it is made


def missing(recipe: Recipe) -> list[str]:
    """What the run needs and does not find, one line each, with the command that makes it. Reads configs only."""
    wanted, problems = ROLES.get(recipe.stage, ("student",)), []
    if recipe.stage == "codec":
        return []
    if recipe.data is None or recipe.codec is None:
        return [f"stage {recipe.stage} needs `data` (a prepared folder) and `codec` (a codec's export folder)"]
    try:
        shards(recipe.data)
    except ValueError:
        made = f"causalreel encode --codec {recipe.codec} --out {recipe.data} --clips {recipe.rows or 2048}"
        problems.append(f"no prepared data in {recipe.data}: make it with `{made}`")
    try:
        read_codec(recipe.codec)
    except ValueError as error:
        problems.append(f"{error}; {_maker(recipe.codec)}codec=tiny is the one that comes with the package")
    for role in recipe.init:
        if role not in wanted:
            problems.append(f"init names the role {role!r}; stage {recipe.stage} takes {', '.join(wanted)}")
    for role in wanted:
        if role in recipe.init:
            try:
                read_export(recipe.init[role])
            except ValueError as error:
                problems.append(f"init.{role}: {error}{_maker(recipe.init[role], before='; ', after='')}")
        elif role != "student" or recipe.stage != "pretrain":
            problems.append(f"stage {recipe.stage} needs init.{role}: the export folder it starts from")
    return problems


def _maker(folder: Path, *, before: str = "", after: str = ", or ") -> str:
    """The command that writes this export, if a recipe of the package does; empty otherwise."""
    from causalreel.train.run import resolve, shipped_recipes

    for name in shipped_recipes():
        if folder == Path(resolve(name).trainer.out) / "export":
            return f"{before}make it with `causalreel train {name}`{after}"
    return ""


# ---- loading and checking


def _encode(encoder: TinyTextEncoder, told: Sequence[str], data: Path) -> Tensor:
    """The captions (R,K,E); ValueError naming file and line of the first that cannot be read."""
    try:
        return torch.cat([encoder.encode(told[i : i + 4096]) for i in range(0, len(told), 4096)])
    except ValueError:
        for row, caption in enumerate(told):
            try:
                encoder.encode([caption])
            except ValueError as error:
                raise ValueError(f"captions of {data}: {caption_place(data, row)}: {error}") from None
        raise


def _roles(recipe: Recipe) -> dict[str, DiTDenoiser]:
    """The stage's networks in float32 on the CPU."""
    roles = {}
    for role in ROLES.get(recipe.stage, ("student",)):
        if role in recipe.init:
            roles[role] = load_export(recipe.init[role])[0]
        else:
            with torch.random.fork_rng():
                torch.manual_seed(recipe.trainer.seed)
                roles[role] = DiTDenoiser(preset(recipe.model))
    return roles


def _compute(recipe: Recipe, device: torch.device) -> str:
    if recipe.compute == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return recipe.compute


def _place(net: DiTDenoiser, compute: str, device: torch.device, *, is_trained: bool) -> None:
    """On the device; weights that are trained stay float32, frozen ones take the type that is computed in."""
    net.compute = torch.bfloat16 if compute == "bfloat16" else None
    net.to(device) if is_trained or net.compute is None else net.to(device, net.compute)
    net.requires_grad_(is_trained)


def _check_fits(role: str, net: DiTDenoiser, spec: LatentSpec, text_width: int) -> None:
    if (net.config.channels, net.config.text_dim) != (spec.channels, text_width):
        raise ValueError(
            f"{role} takes {net.config.channels} latent channels and text of width {net.config.text_dim}, "
            f"the data have {spec.channels} and {text_width}"
        )
    if spec.height % net.config.patch or spec.width % net.config.patch:
        raise ValueError(
            f"{role} takes latents whose sides are multiples of {net.config.patch}, "
            f"the data have {spec.height} x {spec.width}"
        )


def _check_codec_of_data(data: Path, codec: Path) -> None:
    """ValueError if the data say that another codec made them; data made by hand say nothing."""
    made_by = read_info(data).get("codec")
    if made_by is not None and made_by != codec_identity(codec):
        raise ValueError(f"{data} was encoded with another codec than {codec}: give the one that made it")


def _content(role: str, place: Path, net: DiTDenoiser) -> Content:
    facts = configs.dump(net.config) + configs.dump(net.context)
    return Content(f"init.{role}", str(place), fingerprint(net.model.state_dict(), facts))
