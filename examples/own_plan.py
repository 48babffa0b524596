"""A schedule of one's own: a rolling window that denoises four frames at four noise levels in every call.

A plan says which frames go in, at which levels; `rollout` does the rest. The denoiser is a toy that knows the answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from causalreel.flow import expand, warp_steps
from causalreel.rollout import Call, KeyedNoise, Part, chunked, collect, rollout
from causalreel.types import Conditioning, LatentSpec


def rolling(frames: int, sigmas: Sequence[float]) -> Iterator[Call]:
    """Frame f takes its k-th move in call f + k: a frame enters as pure noise while older ones are nearly clean."""
    moves = list(pairwise((*sigmas, 0.0)))
    for call in range(frames + len(moves) - 1):
        window = range(max(0, call - len(moves) + 1), min(call + 1, frames))
        yield Call(tuple(Part(frame, 1, *moves[call - frame]) for frame in window), joint=True)


def main(frames: int = 8) -> None:
    spec, sigmas = LatentSpec(channels=4, height=2, width=2), warp_steps((1000, 750, 500, 250), shift=5.0)
    goal = torch.linspace(-1, 1, frames).view(1, -1, 1, 1, 1).expand(1, frames, *spec.shape)

    def denoise(x, sigma, conditioning, *, sizes, start, cache):  # noqa: ANN001, ANN202 - see types.Denoiser
        return (x - goal[:, start : start + x.shape[1]]) / expand(sigma, x)  # the velocity that points at the goal

    for name, plan in {"rolling": rolling(frames, sigmas), "chunked": chunked([1] * frames, sigmas)}.items():
        calls, told = [call for call in plan if not call.commit], Conditioning(torch.zeros(1, 0, 0))
        made = collect(rollout(denoise, calls, conditioning=told, noise=KeyedNoise([0], spec)))
        print(f"{name}: {len(calls)} denoiser calls, error {(made - goal).abs().max():.1e}")  # noqa: T201


if __name__ == "__main__":
    main()
