"""Training data on disk: latents and captions of the tiny world, in shards that are whole or absent.

A prepared folder holds `latents-00000.safetensors` (latents (R,F,C,h,w) float16), captions beside each shard, one a
line, and `info.yaml` (what made it). Preparing again continues where it stopped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from causalreel.data.world import WorldConfig, captions, render, simulate
from causalreel.types import VideoCodec

log = logging.getLogger(__name__)


def render_clips(
    count: int, *, seed: int, config: WorldConfig = WorldConfig(), device: torch.device | str = "cpu"
) -> Tensor:
    """-> (count,T,3,H,W) uint8 on `device`: clips of the training world, for the codec."""
    parts = []
    for first in range(0, count, 1024):
        state = simulate(min(1024, count - first), seed=seed, first=first, config=config, device=device)
        parts.append(((render(state) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


@torch.no_grad()
def prepare(
    out: str | Path,
    codec: VideoCodec,
    *,
    codec_id: str,
    clips: int,
    seed: int,
    config: WorldConfig = WorldConfig(),
    device: torch.device | str = "cpu",
    shard: int = 8192,
    batch: int = 256,
) -> Path:
    """Render clips of world `seed`, encode them, write shards. Raises ValueError where `out` holds other data.

    codec_id: what tells this codec from others, such as `weights.export.codec_identity`.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    info = {"world_seed": seed, "shard": shard, "frames": config.frames, "size": config.size, "codec": codec_id}
    _claim(folder, info)
    for number, first in enumerate(range(0, clips, shard)):
        path = folder / f"latents-{number:05d}.safetensors"
        size = min(shard, clips - first)
        if path.is_file() and len(_latents(path)) >= size:
            continue  # a shorter one is the last of a smaller set: made again
        told, parts = [], []
        for start in range(first, first + size, batch):
            state = simulate(min(batch, first + size - start), seed=seed, first=start, config=config, device=device)
            parts.append(codec.encode(render(state)).half().cpu())
            told += captions(state)
        _write_text(path.with_suffix(".txt"), "\n".join(told) + "\n")
        partial = path.with_name(f".{path.name}.tmp")
        save_file({"latents": torch.cat(parts)}, partial)
        os.replace(partial, path)
        log.info("prepared %d of %d clips", first + size, clips)
    return folder


def load_prepared(folder: str | Path, *, rows: int | None = None) -> tuple[Tensor, list[str]]:
    """-> latents (R,F,C,h,w) float16 on the CPU and their captions; the first `rows` of them."""
    folder = Path(folder)
    shards = sorted(folder.glob("latents-*.safetensors"))
    if not shards:
        raise ValueError(f"no prepared data in {folder}: make it with `causalreel encode`")
    latents, told = [], []
    for path in shards:
        latents.append(_latents(path))
        told += path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        if rows is not None and len(told) >= rows:
            break
    joined = torch.cat(latents)
    if len(joined) != len(told):
        raise ValueError(f"{folder} has {len(joined)} latents but {len(told)} captions: a shard is damaged")
    if rows is not None and rows > len(told):
        raise ValueError(f"{folder} has {len(told)} clips, {rows} were asked for")
    return joined[:rows], told[:rows]


def _latents(shard: Path) -> Tensor:
    try:
        return load_file(shard)["latents"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{shard} is damaged ({error}); delete it and run `causalreel encode` again") from None


def _claim(folder: Path, info: Mapping[str, int | str]) -> None:
    """Write what makes this data, or check that the folder holds the same."""
    path = folder / "info.yaml"
    if path.is_file():
        held = yaml.safe_load(path.read_text(encoding="utf-8"))
        differing = [key for key, value in info.items() if held.get(key) != value]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{folder} holds data with {key}={held.get(key)}, asked for {key}={info[key]}: use another folder"
            )
        return
    _write_text(path, yaml.safe_dump(dict(info)))


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def held_out(
    count: int, *, seed: int, config: WorldConfig = WorldConfig(), device: torch.device | str = "cpu"
) -> tuple[Tensor, Sequence[str]]:
    """-> real clips (count,T,3,H,W) in [-1, 1] and their captions, of a world that training never sees."""
    state = simulate(count, seed=seed, config=config, device=device, held_out=True)
    return render(state), captions(state)
