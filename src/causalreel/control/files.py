"""Pose files of the field: .npy and .npz, HY-WorldPlay's JSON, LingBot-World's folder, SANA-WM's .npz, minWM's rows.

Everything is read within bounds and checked; nothing is repaired but rotations that were rounded in the file.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from causalreel.control import poses as P
from causalreel.control.poses import Array
from causalreel.control.strings import FRAMES, dialect
from causalreel.control.strings import poses as walked
from causalreel.foreign import ordinary_file, read_json, shown

ARRAY_BYTES = 64 << 20
"""Of one array in a file: a million poses in float32."""

LINGBOT_SIZE = (832, 480)
"""Width and height of the image that LingBot-World's intrinsics are given for, whatever the real one is."""


@dataclass(frozen=True)
class Track:
    """A camera's course: c2w (N,4,4) as in the file, and normalised intrinsics (N,4), fx fy cx cy, if it has any."""

    c2w: Array
    intrinsics: Array | None = None

    @property
    def w2c(self) -> Array:
        return P.inverted(self.c2w)

    @property
    def relative(self) -> Track:
        """Seen from the first camera."""
        return Track(P.relative(self.c2w), self.intrinsics)

    def every(self, stride: int) -> Track:
        """Every `stride`-th pose from the first on."""
        return Track(self.c2w[::stride], None if self.intrinsics is None else self.intrinsics[::stride])


# ---- arrays ----------------------------------------------------------------------------------------------------------


def read_array(path: str | Path, what: str = "poses") -> NDArray[np.generic]:
    """The array of a .npy file; ValueError for what is no plain array of numbers or holds more than `ARRAY_BYTES`."""
    path = ordinary_file(path, what)
    if path.stat().st_size > ARRAY_BYTES:
        raise ValueError(f"{what}: {path} has more than {ARRAY_BYTES:,} bytes")
    return _array(path.read_bytes(), f"{what}: {path}")


def read_arrays(path: str | Path, what: str = "poses") -> dict[str, NDArray[np.generic]]:
    """The arrays of an .npz file by name, each bounded as `read_array`."""
    path = ordinary_file(path, what)
    found = {}
    try:
        with zipfile.ZipFile(path) as archive:
            if len(archive.infolist()) > 64:
                raise ValueError(f"{what}: {path} holds {len(archive.infolist())} arrays, 64 at most are read")
            for entry in archive.infolist():
                if entry.file_size > ARRAY_BYTES:
                    raise ValueError(f"{what}: {shown(entry.filename)} in {path} is larger than {ARRAY_BYTES:,} bytes")
                name = entry.filename.removesuffix(".npy")
                found[name] = _array(archive.read(entry), f"{what}: {shown(name)} in {path}")
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{what}: {path} is no .npz file: {error}") from None
    return found


def _array(data: bytes, where: str) -> NDArray[np.generic]:
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, kind = read(file)
        if kind.hasobject or math.prod(shape) * kind.itemsize != len(data) - file.tell():
            raise ValueError("its header does not fit its contents")
        file.seek(0)
        return np.load(file, allow_pickle=False)
    except Exception as error:  # numpy raises many kinds for a foreign header
        raise ValueError(f"{where} is no array of numbers: {shown(str(error))}") from None


# ---- poses in plain files --------------------------------------------------------------------------------------------


def read_poses(path: str | Path, *, convention: str) -> Track:
    """Poses of a file by its ending: .npy and .npz (N,4,4) or (N,7), .json as HY-WorldPlay's; the folder of
    LingBot-World. `convention`: c2w or w2c, which no file says. Intrinsics where the file has them in a known form: of
    an .npz its array `intrinsics`, normalised, one for all poses or one for each.
    """
    if convention not in ("c2w", "w2c"):
        raise ValueError(f"convention: got {shown(convention)!r}, allowed c2w (world from camera) or w2c")
    place, intrinsics = Path(path), None
    if place.is_dir():
        return _of_convention(read_lingbot(place), convention, "a LingBot-World folder holds")
    if place.suffix == ".json":
        return _of_convention(read_worldplay(place), convention, "HY-WorldPlay's JSON holds")
    if place.suffix == ".npz":
        arrays = read_arrays(place)
        names = [name for name in (convention, "poses", "extrinsics") if name in arrays]
        if not names:
            there = ", ".join(map(shown, arrays)) or "nothing"
            raise ValueError(f"poses: {place} holds {there}; expected an array called {convention} or poses")
        given = arrays[names[0]]
        if "intrinsics" in arrays:
            intrinsics = P.intrinsics_rows(arrays["intrinsics"], f"{place}: intrinsics")
            P.check_unit(intrinsics, is_normalised=True, what=f"{place}: intrinsics")
    elif place.suffix == ".npy":
        given = read_array(place)
    else:
        raise ValueError(f"poses: {place} has an unknown ending; allowed .npy, .npz, .json and LingBot-World's folder")
    rows = P.from_quaternions(given, str(place)) if given.ndim == 2 else P.checked(given, str(place))
    if intrinsics is not None and len(intrinsics) not in (1, len(rows)):
        raise ValueError(f"poses: {place} has {len(intrinsics)} intrinsics for {len(rows)} poses")
    intrinsics = None if intrinsics is None else np.broadcast_to(intrinsics, (len(rows), 4))
    return Track(rows if convention == "c2w" else P.inverted(rows), intrinsics)


def _of_convention(track: Track, convention: str, holds: str) -> Track:
    if convention != "c2w":
        raise ValueError(f"convention: got w2c, but {holds} c2w")
    return track


def read_worldplay(path: str | Path, latents: int | None = None) -> Track:
    """HY-WorldPlay's JSON: index -> {"extrinsic": c2w (4,4), "K": (3,3) in pixels}, in the file's order, one a latent.

    The principal point is taken to be the image's centre, as there: fx/(2 cx), fy/(2 cy), 0.5, 0.5. `latents`: how many
    there must be.
    """
    found = read_json(path, what="pose file")
    if not found:
        raise ValueError(f"pose file {path} holds no pose")
    c2w, rows = [], []
    for index, entry in found.items():
        for key in ("extrinsic", "K"):
            if not isinstance(entry, Mapping) or key not in entry:
                raise ValueError(f"pose file {path}: entry {shown(index)!r} has no {key!r}")
        c2w.append(_numbers(entry["extrinsic"], (4, 4), f"pose file {path}: extrinsic of {shown(index)!r}"))
        rows.append(_numbers(entry["K"], (3, 3), f"pose file {path}: K of {shown(index)!r}"))
    if latents is not None and len(c2w) != latents:
        raise ValueError(
            f"pose file {path}: has {len(c2w)} poses for {latents} latent frames; "
            f"give as many, or make {1 + FRAMES * (len(c2w) - 1)} pixel frames"
        )
    pixels = P.intrinsics_rows(np.stack(rows), f"pose file {path}: K")
    if (pixels[:, 2:] <= 0).any():
        raise ValueError(f"pose file {path}: K must have its principal point inside the image")
    focal = pixels[:, :2] / (2 * pixels[:, 2:])
    return Track(P.checked(np.stack(c2w), f"pose file {path}"), np.concatenate([focal, np.full_like(focal, 0.5)], 1))


def _numbers(value: object, shape: tuple[int, ...], where: str) -> Array:
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        found = np.empty(0)
    if found.shape != shape:
        raise ValueError(f"{where}: expected numbers {shape}")
    return found


def read_lingbot(folder: str | Path, *, per_frame: bool = True) -> Track:
    """LingBot-World's folder: poses.npy (N,4,4) c2w and, if it is there, intrinsics.npy in pixels of 832x480.

    N is cut to 4n+1; latent i is pixel frame 4i. per_frame: each latent has its own intrinsics; otherwise the first
    row counts for all, as in its first versions. One row counts for all frames; else there must be one for each pose.
    """
    folder = Path(folder)
    c2w = P.checked(read_array(folder / "poses.npy"), str(folder / "poses.npy"))
    file = folder / "intrinsics.npy"
    rows = None
    if file.exists():
        rows = lingbot_intrinsics(read_array(file, "intrinsics"), len(c2w), per_frame=per_frame, what=str(file))
    return Track(c2w, rows).every(FRAMES)


def lingbot_intrinsics(given: ArrayLike, count: int, *, per_frame: bool = True, what: str = "intrinsics") -> Array:
    """Rows in pixels of 832x480 for `count` poses -> normalised (count,4)."""
    rows = P.normalised(P.intrinsics_rows(given, what), *LINGBOT_SIZE)
    if 1 < len(rows) < count:
        raise ValueError(f"{what}: has {len(rows)} rows for {count} poses; give one for all or one for each")
    return np.repeat(rows[:1], count, axis=0) if len(rows) == 1 or not per_frame else rows[:count]


def read_lingbot_actions(folder: str | Path) -> list[frozenset[str]]:
    """wasd_action.npy and ijkl_action.npy (N,4) -> the keys held in each pixel frame: above 0.5 is held."""
    keys: list[set[str]] = []
    for name in ("wasd", "ijkl"):
        path = Path(folder) / f"{name}_action.npy"
        rows = read_array(path, "actions")
        if rows.ndim != 2 or rows.shape[1] != 4 or rows.dtype.kind not in "fiu" or not np.isfinite(rows).all():
            raise ValueError(f"actions: {path} is {rows.dtype} {rows.shape}, expected finite numbers (N,4)")
        keys = keys or [set() for _ in rows]
        if len(rows) != len(keys):
            raise ValueError(f"actions: {path} has {len(rows)} rows, wasd_action.npy {len(keys)}")
        for held, row in zip(keys, rows, strict=True):
            held |= {key for key, value in zip(name, row, strict=True) if value > 0.5}
    return [frozenset(held) for held in keys]


def lingbot_walk(frames: list[frozenset[str]]) -> Array:
    """Keys held in each pixel frame -> c2w (1 + frames, 4, 4) by LingBot-World's rule."""
    return walked(frames, dialect("lingbot"))


def read_sana(path: str | Path, source: tuple[int, int], target: tuple[int, int]) -> Track:
    """SANA-WM's .npz: c2w (N,4,4) and intrinsics (N,3,3) in pixels of the source image, one a pixel frame.

    source, target: width and height of the image that the intrinsics are of, and of the video it is resized and cropped
    to. Poses are relative to the first; intrinsics are normalised by the target's size. Take `every(4)` for Wan's VAE.
    """
    arrays = read_arrays(path)
    for name in ("c2w", "intrinsics"):
        if name not in arrays:
            there = ", ".join(map(shown, arrays)) or "nothing"
            raise ValueError(f"poses: {path} has no array {name!r}; it holds {there}")
    c2w = P.checked(arrays["c2w"], f"{path}: c2w")
    rows = P.intrinsics_rows(arrays["intrinsics"], f"{path}: intrinsics")
    if len(rows) not in (1, len(c2w)):
        raise ValueError(f"poses: {path} has {len(rows)} intrinsics for {len(c2w)} poses")
    rows = np.broadcast_to(rows, (len(c2w), 4))
    return Track(P.relative(c2w), P.normalised(P.cropped(rows, source, target), *target))
