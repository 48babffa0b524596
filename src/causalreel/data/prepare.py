"""Training data on disk: latents and captions of the tiny worlds, in shards that are whole or absent.

A prepared folder holds `latents-00000.safetensors` (latents (R,F,C,h,w) float16, and the world's fields if it has
any), captions beside each shard, one a line (`data.timed` where they change), and `info.yaml` (what made it).
Preparing again continues where it stopped; `data.shards` reads it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from causalreel import config as configs
from causalreel.data.manifest import read_manifest
from causalreel.data.shards import layout, read_captions
from causalreel.data.world import WorldConfig, captions, render, simulate
from causalreel.data.worlds import World, flat
from causalreel.files import replacing, write_text
from causalreel.fingerprint import fingerprint
from causalreel.folders import claim
from causalreel.hashed import write_tensors
from causalreel.types import VideoCodec

log = logging.getLogger(__name__)


def render_clips(
    count: int, *, seed: int, world: World = flat(), device: torch.device | str = "cpu", batch: int = 256
) -> Tensor:
    """-> (count,T,3,H,W) uint8 on `device`: clips of the training world, for the codec."""
    parts = []
    for first in range(0, count, batch):
        clips = world.clips(min(batch, count - first), seed=seed, first=first, device=device)
        parts.append(((clips.video + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


CHECKED = 16
"""Clips on which a codec is checked."""


@torch.no_grad()
def check_codec(
    codec: VideoCodec,
    world: World,
    least: float,
    *,
    seed: int,
    first: int,
    device: torch.device | str = "cpu",
    batch: int = 4,
) -> float:
    """PSNR in dB of clips `first` and further ones of a world, encoded and decoded; ValueError where it is too low.

    A codec that was trained on another world, or hardly, makes data that train without a complaint.
    """
    error = 0.0
    for start in range(0, CHECKED, batch):
        video = world.clips(min(batch, CHECKED - start), seed=seed, first=first + start, device=device).video
        again = codec.decode(codec.encode(video).half().float()).clamp(-1, 1)
        error += float(((again - video) / 2).square().mean()) * len(video) / CHECKED
    found = -10 * math.log10(max(error, 1e-10)) if math.isfinite(error) else 0.0
    if found < least:
        raise ValueError(
            f"the codec gives clips of this world back with a PSNR of {found:.1f} dB, at least {least:g} is asked for: "
            f"was it trained on this world, and to the end?"
        )
    return found


@torch.no_grad()
def prepare(
    out: str | Path,
    codec: VideoCodec,
    *,
    codec_id: str,
    clips: int,
    seed: int,
    world: World = flat(),
    device: torch.device | str = "cpu",
    shard: int = 8192,
    batch: int = 256,
) -> Path:
    """Render clips of a world, encode them, write shards. Raises ValueError where `out` holds other data.

    codec_id: what tells this codec from others, such as `weights.export.codec_identity`.
    """
    folder = Path(out)
    info = {"world_seed": seed, "shard": shard, **world.facts, "codec": codec_id}
    with claim(folder, "encoding"):
        _agree(folder, info)
        for number, first in enumerate(range(0, clips, shard)):
            path = folder / f"latents-{number:05d}.safetensors"
            size = min(shard, clips - first)
            if path.is_file() and _is_done(path, size):
                continue
            lines: list[str] = []
            parts: list[dict[str, Tensor]] = []
            for start in range(first, first + size, batch):
                made = world.clips(min(batch, first + size - start), seed=seed, first=start, device=device)
                named = {f"field.{name}": value.cpu() for name, value in made.fields.items()}
                parts.append({"latents": codec.encode(made.video).half().cpu()} | named)
                lines += made.captions
            write_text(path.with_suffix(".txt"), "\n".join(lines) + "\n")
            _write_latents(path, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            log.info("prepared %d of %d clips", first + size, clips)
    return folder


def _is_done(shard: Path, size: int) -> bool:
    """Whether a shard has `size` clips, each with its caption: a shorter one is the last of a smaller set."""
    clips = layout(shard)[0][0]
    if clips < size:
        return False
    try:
        read_captions(shard, clips)
    except ValueError:  # stopped between the two files
        return False
    return True


def _agree(folder: Path, info: Mapping[str, int | str | None]) -> None:
    """Write what makes this data, or check that the folder holds the same."""
    path = folder / "info.yaml"
    if path.is_file():
        held = read_info(folder)
        differing = [key for key, value in info.items() if held.get(key) != value]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{folder} holds data with {key}={held.get(key)}, asked for {key}={info[key]}: use another folder"
            )
        return
    write_text(path, yaml.safe_dump({key: value for key, value in info.items() if value is not None}))


def read_info(folder: str | Path) -> dict[str, Any]:
    """What made the data in a folder; empty for data made by hand."""
    if (manifest := read_manifest(folder)) is not None:
        return manifest.made
    path = Path(folder) / "info.yaml"
    return configs.read(path) if path.is_file() else {}


def _write_latents(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with replacing(path) as partial:
        write_tensors(partial, tensors, {"sha256": fingerprint(tensors)})


def held_out(
    count: int, *, seed: int, config: WorldConfig = WorldConfig(), device: torch.device | str = "cpu"
) -> tuple[Tensor, Sequence[str]]:
    """-> real clips (count,T,3,H,W) in [-1, 1] and their captions, of a world that training never sees."""
    state = simulate(count, seed=seed, config=config, device=device, held_out=True)
    return render(state), captions(state)
