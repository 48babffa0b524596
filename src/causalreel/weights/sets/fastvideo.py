"""Data of FastVideo: parquet files with latents and text embeddings as bytes. Needs pyarrow.

Latents are the VAE's means before normalisation, as FastVideo stores them and normalises after loading; here they are
normalised by Wan 2.1's statistics. Bytes are float32; rows whose type says otherwise are refused, because FastVideo
reads them as float32 all the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.codecs.wan_vae import WAN21_MEAN, WAN21_STD
from causalreel.data.packing import Row
from causalreel.foreign import shown
from causalreel.weights.sets import Found, Wanted
from causalreel.weights.sets.clips import caption, channels_first, check_text

WHAT = "parquet files of FastVideo, or a folder of such"
COLUMNS = (
    "caption",
    *(f"{what}_{part}" for what in ("vae_latent", "text_embedding") for part in ("bytes", "shape", "dtype")),
)
GROUP_BYTES = 1 << 33
"""Of a row group, unpacked."""
GROWTH = 64
"""Most that a row group may be of its size in the file."""


def is_one(path: Path) -> bool:
    return bool(_files(path))


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix == ".parquet" else []
    return sorted(path.rglob("*.parquet"))


def rows(path: Path, wanted: Wanted) -> Iterator[Found]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("parquet files need pyarrow: pip install 'causalreel[data]'") from error
    for file in _files(path):
        try:
            with parquet.ParquetFile(
                file, thrift_string_size_limit=1 << 24, thrift_container_size_limit=1 << 20
            ) as opened:
                _check(opened, file)
                for number, batch in enumerate(opened.iter_batches(batch_size=1, columns=list(COLUMNS))):
                    place = f"{file.relative_to(path) if path.is_dir() else file.name}, row {number}"
                    yield Found(place, partial(_row, batch.to_pylist()[0], wanted, place))
        except (pyarrow.ArrowException, OSError, MemoryError) as error:
            raise ValueError(
                f"{file} is no parquet file, is damaged or was cut off: {shown(str(error), 120)}"
            ) from None


def _check(opened: Any, file: Path) -> None:
    """ValueError unless the columns are there and no row group unpacks to far more than it is."""
    lost = [name for name in COLUMNS if name not in opened.schema_arrow.names]
    if lost:
        other = "trajectory_latents" in opened.schema_arrow.names
        why = "; it holds trajectories, which are not read" if other else ""
        raise ValueError(f"{file} has no column {lost[0]}: it is no data set of FastVideo for text to video{why}")
    size = file.stat().st_size
    for number in range(opened.metadata.num_row_groups):
        unpacked = opened.metadata.row_group(number).total_byte_size
        if not 0 <= unpacked <= min(GROUP_BYTES, GROWTH * size):
            raise ValueError(f"{file}: row group {number} unpacks to {unpacked:,} bytes, the file has {size:,}")


def _row(found: Mapping[str, Any], wanted: Wanted, place: str) -> Row:
    raw = _tensor(found, "vae_latent", place)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (WAN21_MEAN, WAN21_STD))
    clip = (channels_first(raw, place, wanted) - mean) / std  # (F,C,H,W)
    told = found["caption"]
    if not isinstance(told, str):
        raise ValueError(f"{place}: the caption is {shown(told, 40)}, a text is expected")
    return Row(caption(told.encode(), place), place, clip, check_text(_tensor(found, "text_embedding", place), place))


def _tensor(found: Mapping[str, Any], name: str, place: str) -> Tensor:
    data, shape, kind = (found[f"{name}_{part}"] for part in ("bytes", "shape", "dtype"))
    if (
        not isinstance(data, bytes)
        or not isinstance(shape, list)
        or not all(isinstance(n, int) and n > 0 for n in shape)
    ):
        raise ValueError(f"{place}: {name} has no bytes or no shape: {shown(shape, 60)}")
    if kind is not None and str(kind).removeprefix("torch.") != "float32":
        raise ValueError(f"{place}: the dtype column of {name} says {shown(kind, 40)}, the bytes are read as float32")
    if len(data) != 4 * math.prod(shape):
        raise ValueError(
            f"{place}: {name} has {len(data):,} bytes, fewer or more than its shape {tuple(shape)} needs in float32: "
            f"{4 * math.prod(shape):,}"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape)
