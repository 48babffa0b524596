"""Metrics of a long video window by window, as it streams past, and what they say of drift.

A window is as long as a training clip, so that one is compared with the next as clips are. Nothing but the frames of
one window is kept. Last minus first: Rolling Forcing (arXiv 2509.25161). VDE: LV-Bench.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from causalreel.eval.frames import frame_statistics
from causalreel.eval.metrics import MetricConfig, measure

EXACT = ("follow", "consistency", "quality", "dynamic")
"""Metrics of the tiny world that a window has by itself; dynamic is its motion, in pixels a frame."""


@dataclass(frozen=True)
class Windows:
    """Where windows lie, in pixel frames: [0, first), [first, first + further), and so on."""

    first: int
    further: int

    def __post_init__(self) -> None:
        if min(self.first, self.further) < 1:
            raise ValueError(f"a window must have at least 1 frame, got {self.first} and {self.further}")

    def size(self, number: int) -> int:
        return self.further if number else self.first


def curves(
    parts: Iterable[Tensor], windows: Windows, prompts: Sequence[str] | None = None, *, at_a_time: int = 128
) -> dict[str, Tensor]:
    """Parts (B,t,3,H,W) in [-1,1] of a video, in order -> metric -> a number of every clip and window (B,N).

    prompts: of the tiny world, one for each clip: its exact metrics (`EXACT`) too. A last window that is not full is
    left out, unless it is the only one. at_a_time: frames that the exact metrics read at a time.
    """
    found: list[dict[str, Tensor]] = []
    waiting: list[Tensor] = []
    before: Tensor | None = None
    start = count = 0

    def close(video: Tensor) -> None:
        nonlocal before, start
        numbers = {name: values.nanmean(1) for name, values in frame_statistics(video, before).items()}
        if prompts is not None:
            numbers |= _exact(video, prompts, start, at_a_time)
        found.append({name: values.float().cpu() for name, values in numbers.items()})
        before, start = video[:, -1], start + video.shape[1]

    for part in parts:
        waiting.append(part)
        count += part.shape[1]
        while count >= (size := windows.size(len(found))):
            video = torch.cat(waiting, dim=1)
            close(video[:, :size])
            waiting, count = [video[:, size:]], count - size
    if not found:
        if count == 0:
            raise ValueError("the video has no frame")
        close(torch.cat(waiting, dim=1))
    return {name: torch.stack([one[name] for one in found], dim=1) for name in found[0]}


def _exact(video: Tensor, prompts: Sequence[str], start: int, at_a_time: int) -> dict[str, Tensor]:
    """The window's metrics of the tiny world, read at the frames at which a whole clip is read."""
    config = MetricConfig()
    aligned = video[:, -start % config.stride :]
    scores = measure(aligned if aligned.shape[1] else video, prompts, config=config, chunk=at_a_time)
    return {name: getattr(scores, name) for name in EXACT}


def last_minus_first(values: Tensor, *, windows: int = 1) -> Tensor:
    """Numbers of windows (B,N) -> (B,): the mean of the last so many windows less that of as many first ones."""
    return values[:, -windows:].mean(1) - values[:, :windows].mean(1)


def drift_error(values: Tensor, *, weights: str = "linear") -> Tensor:
    """Numbers of windows (B,N) -> (B,): the video drift error, sum over i = 2 .. N of w_i |m_i - m_1| / |m_1|.

    weights: linear, w_i = N - i + 1, or log, its logarithm. Not divided by their sum: only equal N compare. One window
    gives 0, a first one of 0 infinity. LV-Bench (VDE), which divides by m_1 itself: of a negative one, less than 0.
    """
    if weights not in ("linear", "log"):
        raise ValueError(f"weights must be linear or log, got {weights!r}")
    count = values.shape[1]
    if count < 2:
        return torch.zeros_like(values[:, 0])
    w = torch.arange(count - 1, 0, -1, dtype=values.dtype, device=values.device)
    w = w.log() if weights == "log" else w
    apart = (values[:, 1:] - values[:, :1]).abs()
    error = (apart * w).sum(1) / values[:, 0].abs()
    return torch.where(values[:, 0] == 0, torch.full_like(error, float("inf")), error)


def ending(values: Tensor, count: int, *, share: float = 0.2) -> Tensor:
    """Numbers of windows (B,N) -> (B,): the mean of the last fifth of the first `count` windows, at least one."""
    return values[:, max(0, count - max(1, round(count * share))) : count].nanmean(1)


@dataclass(frozen=True)
class Long:
    """What a long video of one model, or a file, was like."""

    label: str
    curves: dict[str, Tensor]
    """Metric -> (B,N)."""
    seconds: float = 0.0

    @property
    def count(self) -> int:
        """Windows."""
        return next(iter(self.curves.values())).shape[1]
