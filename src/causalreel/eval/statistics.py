"""What is computed over sets of clips: means with intervals, paired differences, and the Frechet distance.

Every function takes plain tensors, or numbers of clips by name, as a mapping or as a dataclass such as
`eval.metrics.Scores`; NaN marks a clip for which a number is undefined and is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LAYERS = (((24, 3, 3, 4, 4), 2), ((48, 24, 3, 3, 3), 2), ((32, 48, 3, 3, 3), 2))
"""Weight shape and stride of each layer of the fixed random network."""


FRECHET_CLIPS = 128
"""Fewest clips of which a Frechet distance means something: twice as many as there are features, whose covariance has
no full rank below half of that. With 2 clips it is over a million where 512 give 0.5."""


@dataclass(frozen=True)
class Estimate:
    """A mean over clips, its standard error, and a bootstrap confidence interval; NaN clips are left out."""

    mean: float
    stderr: float
    low: float
    high: float
    count: int


def estimate(values: Tensor, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0) -> Estimate:
    """values (B,) -> Estimate by percentile bootstrap over clips."""
    values = values.detach().cpu().double()
    values = values[~values.isnan()]
    count = len(values)
    if count == 0:
        return Estimate(*[float("nan")] * 4, count=0)
    rows = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(seed))
    tail = (1 - confidence) / 2
    means = values[rows].mean(1)
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    stderr = (values.std() / count**0.5).item() if count > 1 else float("nan")
    return Estimate(values.mean().item(), stderr, low, high, count)


def by_name(scores: Mapping[str, Tensor] | Any) -> Mapping[str, Tensor]:
    """Numbers of clips (B,) by name, from a dataclass of them as well."""
    if isinstance(scores, Mapping):
        return scores
    return {field.name: getattr(scores, field.name) for field in dataclasses.fields(scores)}


def summarise(scores: Mapping[str, Tensor] | Any, *, resamples: int = 2000, seed: int = 0) -> dict[str, Estimate]:
    """Metric name -> Estimate over the clips."""
    return {name: estimate(values, resamples=resamples, seed=seed) for name, values in by_name(scores).items()}


def compare(
    a: Mapping[str, Tensor] | Any, b: Mapping[str, Tensor] | Any, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Estimate]:
    """Metric name -> Estimate of a - b, paired: clip i of both answers the same prompt."""
    first, second = by_name(a), by_name(b)
    for name, values in first.items():
        if len(values) != len(second[name]):
            raise ValueError(f"paired scores must have equal length, got {len(values)} and {len(second[name])}")
    differences = {name: values - second[name] for name, values in first.items()}
    return summarise(differences, resamples=resamples, seed=seed)


@torch.no_grad()
def features(video: Tensor, *, chunk: int = 32) -> Tensor:
    """video (B,T,3,H,W) -> (B,64) float64 on the CPU: a fixed random 3-D convolution, averaged over the clip.

    Half of the features see the frames, half the differences between frames four apart, so that motion counts and not
    only looks. The network is part of the metric's definition: distances compare only within this package.
    """
    generator = torch.Generator().manual_seed(20)
    weights = [
        torch.randn(shape, generator=generator) * (2 / torch.Size(shape[1:]).numel()) ** 0.5 for shape, _ in _LAYERS
    ]
    found = []
    for part in video.split(chunk):
        x = torch.nan_to_num(part.float(), nan=0.0).clamp(-1, 1).transpose(1, 2)  # (B,3,T,H,W)
        lag = min(4, x.shape[2] - 1)
        moves = F.softshrink(x[:, :, lag:] - x[:, :, : x.shape[2] - lag], 0.15)  # forgives faint noise
        found.append(torch.cat([_random_network(x, weights), _random_network(moves, weights)], dim=1).double().cpu())
    return torch.cat(found)


def _random_network(x: Tensor, weights: list[Tensor]) -> Tensor:
    """(B,3,T,H,W) -> (B,32)."""
    for weight, (_, stride) in zip(weights, _LAYERS, strict=True):
        x = F.relu(F.conv3d(x, weight.to(x.device), stride=stride, padding=1))
    return x.mean((2, 3, 4))


def frechet(reference: Tensor, samples: Tensor) -> float:
    """Frechet distance between two sets of videos (B,T,3,H,W), or of their `features` (B,D), in float64.

    Every feature is divided by its standard deviation in the reference. The finite-sample value between two real sets
    of the same size is not zero: report it beside the result.
    """
    a, b = (x.double().cpu() if x.ndim == 2 else features(x) for x in (reference, samples))
    if min(len(a), len(b)) < 2:
        raise ValueError(f"frechet needs at least 2 clips in each set, got {len(a)} and {len(b)}")
    scale = a.std(0).clamp_min(1e-8)
    a, b = a / scale, b / scale
    root = _root(torch.cov(a.T))
    cross = _root(root @ torch.cov(b.T) @ root)
    distance = (a.mean(0) - b.mean(0)).square().sum() + a.var(0).sum() + b.var(0).sum() - 2 * cross.trace()
    return max(distance.item(), 0.0)


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semi-definite matrix; small negative eigenvalues count as zero."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T
