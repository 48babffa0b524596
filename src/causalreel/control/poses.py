"""Camera poses (N,4,4) in float64: checked, inverted, made relative, interpolated; intrinsics by image size.

A pose is rigid: a rotation and a translation. Intrinsics are rows (fx, fy, cx, cy), in pixels of an image or normalised
by its size.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array: TypeAlias = NDArray[np.float64]

ROTATION_ERROR = 1e-3
"""Largest entry of R^T R - 1 that counts as rounding."""


def turn_right(angle: float) -> Array:
    """A rotation (3,3) by `angle` radians about the camera's y axis: positive looks right."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=np.float64)


def look_up(angle: float) -> Array:
    """A rotation (3,3) by `angle` radians about the camera's x axis: positive looks up."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]], dtype=np.float64)


def checked(poses: ArrayLike, what: str = "poses") -> Array:
    """Poses (N,4,4), N at least 1, with rotations made exact where they were rounded. ValueError, naming the first bad
    pose, for other shapes, numbers that are not finite, another last row, and scaled, sheared or mirrored axes."""
    given = np.asarray(poses)
    if given.ndim != 3 or given.shape[1:] != (4, 4) or not len(given) or given.dtype.kind not in "fiu":
        raise ValueError(f"{what}: expected numbers (N,4,4) with N at least 1, got {given.dtype} {given.shape}")
    found = given.astype(np.float64)
    for index, pose in enumerate(found):
        if not np.isfinite(pose).all():
            raise ValueError(f"{what}: pose {index} is not finite")
        if np.abs(pose[3] - (0, 0, 0, 1)).max() > 1e-6:
            raise ValueError(f"{what}: the last row of pose {index} is {pose[3].tolist()}, expected [0, 0, 0, 1]")
        rotation = pose[:3, :3]
        error = np.abs(rotation.T @ rotation - np.eye(3)).max()
        if error > ROTATION_ERROR or np.linalg.det(rotation) < 0:
            raise ValueError(
                f"{what}: the upper left of pose {index} is no rotation (R^T R differs from 1 by {error:.2g}, "
                f"determinant {np.linalg.det(rotation):.3g}): scaled, sheared or mirrored axes are not allowed"
            )
    left, _, right = np.linalg.svd(found[:, :3, :3])
    found[:, :3, :3] = left @ right  # the nearest rotation
    return found


def inverted(poses: Array) -> Array:
    """c2w (N,4,4) -> w2c, and the other way round."""
    found = np.zeros_like(poses)
    rotation = poses[:, :3, :3].transpose(0, 2, 1)
    found[:, :3, :3] = rotation
    found[:, :3, 3] = -np.einsum("nij,nj->ni", rotation, poses[:, :3, 3])
    found[:, 3, 3] = 1
    return found


def relative(c2w: Array) -> Array:
    """c2w (N,4,4) seen from the first camera, whose pose becomes the identity."""
    return inverted(c2w[:1]) @ c2w


def motions(c2w: Array) -> Array:
    """The motion (N,4,4) from each pose to the next, the first one none, translations divided by the largest: what
    LingBot-World's network takes, which so knows the course of the speed but not the speed."""
    steps = np.concatenate([np.eye(4)[None], inverted(c2w[:-1]) @ c2w[1:]])
    largest = np.linalg.norm(steps[:, :3, 3], axis=1).max()
    if largest > 0:
        steps[:, :3, 3] /= largest
    return steps


# ---- quaternions and interpolation -----------------------------------------------------------------------------------


def from_quaternions(rows: ArrayLike, what: str = "poses") -> Array:
    """Rows (N,7) of tx ty tz qx qy qz qw -> poses (N,4,4); the quaternions need not be of length 1, but not 0."""
    given = np.asarray(rows)
    if given.ndim != 2 or given.shape[1] != 7 or not len(given) or given.dtype.kind not in "fiu":
        raise ValueError(f"{what}: expected numbers (N,7), tx ty tz qx qy qz qw, got {given.dtype} {given.shape}")
    found = given.astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError(f"{what}: row {int(np.argwhere(~np.isfinite(found))[0][0])} is not finite")
    length = np.linalg.norm(found[:, 3:], axis=1)
    if (length < 1e-6).any():
        raise ValueError(f"{what}: the quaternion of row {int(length.argmin())} is 0")
    x, y, z, w = (found[:, 3:] / length[:, None]).T
    poses = np.zeros((len(found), 4, 4))
    poses[:, 0, :3] = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], -1)
    poses[:, 1, :3] = np.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], -1)
    poses[:, 2, :3] = np.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], -1)
    poses[:, :3, 3], poses[:, 3, 3] = found[:, :3], 1
    return poses


def to_quaternions(poses: Array) -> Array:
    """Poses (N,4,4) -> rows (N,7) of tx ty tz qx qy qz qw, qw at least 0."""
    return np.concatenate([poses[:, :3, 3], np.stack([_quaternion(pose[:3, :3]) for pose in poses])], axis=1)


def resampled(poses: Array, times: ArrayLike, at: ArrayLike | None = None) -> Array:
    """Poses (N,4,4) of the times `at` (N,), rising, 0 .. N-1 unless given -> poses at `times` (M,).

    Translations are interpolated linearly, rotations by slerp; times outside take the first or the last pose.
    """
    known = np.arange(len(poses), dtype=np.float64) if at is None else np.asarray(at, dtype=np.float64)
    rows = to_quaternions(poses)
    found = np.zeros((np.size(times), 7))
    for place, time in enumerate(np.clip(np.asarray(times, dtype=np.float64), known[0], known[-1])):
        right = int(np.clip(np.searchsorted(known, time, side="right"), 1, max(1, len(known) - 1)))
        left = right - 1
        if len(known) == 1:
            found[place] = rows[0]
            continue
        share = (time - known[left]) / (known[right] - known[left])
        found[place, :3] = (1 - share) * rows[left, :3] + share * rows[right, :3]
        found[place, 3:] = _slerp(rows[left, 3:], rows[right, 3:], share)
    return from_quaternions(found)


def _slerp(a: Array, b: Array, share: float) -> Array:
    cosine = float(a @ b)
    if cosine < 0:
        b, cosine = -b, -cosine
    sine = float(np.linalg.norm(b - cosine * a))  # exact for small angles, where 1 - cosine^2 is not
    angle = np.arctan2(sine, cosine)
    if angle < 1e-12:
        return a
    return (np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle)


def _quaternion(rotation: Array) -> Array:
    """(3,3) -> (4,) x y z w: the row of the symmetric form with the largest entry, which loses no digits."""
    r = rotation
    squares = np.array(  # 4 times the square of x, y, z, w
        [
            1 + r[0, 0] - r[1, 1] - r[2, 2],
            1 - r[0, 0] + r[1, 1] - r[2, 2],
            1 - r[0, 0] - r[1, 1] + r[2, 2],
            1 + r[0, 0] + r[1, 1] + r[2, 2],
        ]
    )
    xy, xz, yz = r[0, 1] + r[1, 0], r[0, 2] + r[2, 0], r[1, 2] + r[2, 1]
    xw, yw, zw = r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]
    rows = [
        [squares[0], xy, xz, xw],
        [xy, squares[1], yz, yw],
        [xz, yz, squares[2], zw],
        [xw, yw, zw, squares[3]],
    ]
    found = np.array(rows[int(squares.argmax())])
    found /= np.linalg.norm(found)
    return -found if found[3] < 0 else found


# ---- intrinsics ------------------------------------------------------------------------------------------------------


def intrinsics_rows(given: ArrayLike, what: str = "intrinsics") -> Array:
    """(4,), (N,4), (3,3) or (N,3,3) -> rows (N,4) of fx fy cx cy; ValueError if not finite or a focal length is not
    positive."""
    found = np.asarray(given)
    if found.dtype.kind not in "fiu" or not (found.shape[-1:] == (4,) or found.shape[-2:] == (3, 3)):
        raise ValueError(f"{what}: expected numbers (N,4), fx fy cx cy, or (N,3,3), got {found.dtype} {found.shape}")
    found = found.astype(np.float64)
    if found.shape[-2:] == (3, 3):
        found = np.stack([found[..., 0, 0], found[..., 1, 1], found[..., 0, 2], found[..., 1, 2]], -1)
    found = found.reshape(1, 4) if found.ndim == 1 else found
    if found.ndim != 2 or not len(found):
        raise ValueError(f"{what}: expected numbers (N,4), fx fy cx cy, or (N,3,3), got {np.asarray(given).shape}")
    if not np.isfinite(found).all() or (found[:, :2] <= 0).any():
        raise ValueError(f"{what}: every number must be finite and fx, fy above 0")
    return found


def normalised(pixels: Array, width: float, height: float) -> Array:
    """Rows (N,4) in pixels of an image -> normalised by its size."""
    return pixels / np.array([width, height, width, height], dtype=np.float64)


def as_matrices(rows: Array) -> Array:
    """Rows (N,4) -> matrices (N,3,3)."""
    found = np.zeros((len(rows), 3, 3))
    found[:, 0, 0], found[:, 1, 1], found[:, 0, 2], found[:, 1, 2] = rows.T
    found[:, 2, 2] = 1
    return found


def cover(source: tuple[int, int], target: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes (width, height) -> the size to which the source is resized so that it covers the target, and the offsets
    (left, top) of the centre crop."""
    scale = max(target[0] / source[0], target[1] / source[1])
    resized = (round(source[0] * scale), round(source[1] * scale))
    return resized, ((resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2)


def cropped(pixels: Array, source: tuple[int, int], target: tuple[int, int]) -> Array:
    """Rows (N,4) in pixels of the source image (width, height) -> of the target that is resized and cropped from it."""
    (width, height), (left, top) = cover(source, target)
    x, y = width / source[0], height / source[1]
    return pixels * np.array([x, y, x, y]) - np.array([0, 0, left, top], dtype=np.float64)


def check_unit(rows: Array, *, is_normalised: bool, what: str = "intrinsics") -> None:
    """ValueError where the numbers can hardly be in the unit that was named: focal lengths above 4 as normalised ones,
    or below 4 as pixels."""
    largest = float(rows[:, :2].max())
    if is_normalised and largest > 4:
        told = "it looks like pixels: divide by the image's width and height"
        raise ValueError(f"{what}: got a focal length of {largest:g} as a normalised one; {told}")
    if not is_normalised and largest < 4:
        raise ValueError(f"{what}: got a focal length of {largest:g} in pixels; it looks normalised")
