"""Action labels: 81 classes, translation * 9 + rotation, one a latent frame; the first frame's is 0.

Translation: 0 none, 1 forward, 2 back, 3 right, 4 left, 5 to 8 forward and back with right and left. Rotation: 1 right,
2 left, 3 up, 4 down, 5 to 8 right and left with up and down. HY-WorldPlay's and minWM's functions of poses agree with
this; minWM's table of its strings has 3 and 4 the other way round, and is here for its models alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from causalreel.control.poses import Array, inverted
from causalreel.control.strings import MOVES

STILL = {"worldplay": 1e-4, "minwm": 0.01}
"""Shorter motions than this count as none, by project."""
SIDE = 60.0
"""A motion is along an axis if it is within so many degrees of it."""
TURN = 0.05
"""Smaller turns in degrees count as none."""

_PAIRS = {(0, 0): 0, (1, 0): 1, (-1, 0): 2, (0, 1): 3, (0, -1): 4, (1, 1): 5, (1, -1): 6, (-1, 1): 7, (-1, -1): 8}


def labels_of_poses(c2w: Array, still: float = STILL["worldplay"]) -> NDArray[np.int64]:
    """c2w (N,4,4) -> labels (N,): the motion from each pose to the next, in the earlier camera's axes."""
    steps = inverted(c2w[:-1]) @ c2w[1:]
    return np.array([0, *(_label(step, still) for step in steps)], dtype=np.int64)


def _label(step: Array, still: float) -> int:
    move, rotation = step[:3, 3], step[:3, :3]
    length = float(np.linalg.norm(move))
    moved = _PAIRS[_side(move[2] / length), _side(move[0] / length)] if length > still else 0
    turn = np.degrees(np.arctan2(rotation[0, 2], rotation[2, 2]))
    look = np.degrees(np.arcsin(np.clip(-rotation[1, 2], -1, 1)))
    return moved * 9 + _PAIRS[_sign(turn), _sign(look)]


def _side(cosine: float) -> int:
    angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return int(angle < SIDE) - int(angle > 180 - SIDE)


def _sign(degrees: float) -> int:
    return int(degrees > TURN) - int(degrees < -TURN)


def labels_of_keys(frames: Sequence[Iterable[str]]) -> NDArray[np.int64]:
    """minWM's labels (1 + frames,) of the keys held in each latent frame: its table has left as 3 and right as 4."""
    found = [0]
    for keys in frames:
        motion = np.sum([MOVES[key] for key in keys] or [(0.0,) * 5], axis=0)
        forward, right, _, turn, look = (int(part) for part in np.sign(motion))
        found.append(_PAIRS[forward, -right] * 9 + _PAIRS[turn, look])
    return np.array(found, dtype=np.int64)
