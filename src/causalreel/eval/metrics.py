"""Exact metrics of tiny-world videos, from pixels and captions alone; the same code scores real and generated clips.

What the evaluated frames show is read by `eval.reading`; positions over time give direction, speed and turns. Nothing
here is learned. What is computed over sets of clips (means, intervals, Frechet distance) is in `eval.statistics`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel.data.drawing import BOUNDS, RADII
from causalreel.data.world import SPEED_PIXELS
from causalreel.eval.reading import ANY, TEMPLATES, Captions, MetricConfig, Reading, median, read
from causalreel.vocabulary import Caption


@dataclass(frozen=True)
class Scores:
    """One number per clip (B,), NaN where the caption or the clip's length leaves it undefined."""

    follow: Tensor
    """Fraction of frames that show exactly what is captioned: colours, shapes, sizes, background, nothing extra."""
    first: Tensor
    """`follow` of the first frame alone."""
    present: Tensor
    """Fraction of captioned objects found, whatever their shape."""
    direction: Tensor
    """Fraction of objects whose first heading is within 45 degrees of the captioned direction."""
    speed: Tensor
    """|median speed / captioned speed - 1|, averaged over objects; 1 for an object that is never found."""
    dynamic: Tensor
    """Mean move in pixels per frame, over steps in which an object is found twice and does not jump."""
    consistency: Tensor
    """Fraction of steps in which an object stays what it was, well shaped, and moves a plausible distance."""
    turn: Tensor
    """Turns per step away from walls and the other object; compare it with real clips, not with zero."""
    quality: Tensor
    """Intersection over union of the soft mask with the ideal drawing, over found objects; blur and dents lower it."""
    fidelity: Tensor
    """PSNR in dB of the frames against their ideal drawing: sharpness and cleanliness of the whole picture."""
    follow_drift: Tensor
    """`follow` of the first third of the frames minus that of the last third."""
    quality_drift: Tensor
    """The same for `quality`."""

    def __getitem__(self, rows: slice | Tensor) -> Scores:
        return Scores(**{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)})

    @staticmethod
    def cat(parts: Sequence[Scores]) -> Scores:
        """Scores of several batches, one after the other."""
        return Scores(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Scores)})


@torch.no_grad()
def measure(
    video: Tensor, captions: Sequence[str | Caption], *, config: MetricConfig = MetricConfig(), chunk: int = 128
) -> Scores:
    """video (B,T,3,H,W) in [-1,1] and one caption per clip -> Scores, on the video's device.

    `chunk` frames are read at a time, to bound memory. Raises ValueError for captions that cannot be measured: two
    objects of one colour, unknown words.
    """
    if video.ndim != 5 or video.shape[2] != 3:
        raise ValueError(f"video must be (B,T,3,H,W), got {tuple(video.shape)}")
    if len(captions) != len(video):
        raise ValueError(f"captions must be one per clip: {len(video)} clips, {len(captions)} captions")
    want = Captions.of(captions, video.device)
    picked = video[:, :: config.stride]  # (B,E,3,H,W)
    count, steps = picked.shape[:2]
    frames = picked.flatten(0, 1)
    owner = torch.arange(count, device=video.device).repeat_interleave(steps)
    parts = [read(f, want[o], config) for f, o in zip(frames.split(chunk), owner.split(chunk), strict=True)]
    joined = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(Reading)}
    reading = Reading(**{name: value.unflatten(0, (count, steps)) for name, value in joined.items()})
    return _score(reading, want, config, video.shape[-2:])


def _score(r: Reading, want: Captions, config: MetricConfig, size: Sequence[int]) -> Scores:
    """Reading with leading (B,E) -> Scores."""
    named = want.named[:, None].expand_as(r.found)  # (B,E,N)
    right = ((r.good | ~named).all(-1) & r.clean).float()  # (B,E)
    move = r.centre[:, 1:] - r.centre[:, :-1]  # (B,E-1,N,2)
    distance = move.norm(dim=-1)
    tracked = r.found[:, 1:] & r.found[:, :-1]  # (B,E-1,N)
    plausible = distance <= config.stride * max(SPEED_PIXELS) * 1.25 + 1
    same = (r.template[:, 1:] == r.template[:, :-1]) & (r.overlap >= config.overlap)[:, 1:]
    same = same & (r.overlap >= config.overlap)[:, :-1]
    third = max(1, right.shape[1] // 3)
    quality_drift = _clip_quality(r, slice(None, third)) - _clip_quality(r, slice(-third, None))
    return Scores(
        follow=right.mean(1),
        first=right[:, 0],
        present=_mean(r.found.float(), named, dim=(1, 2)),
        direction=_direction(r, want, config),
        speed=_speed(distance, tracked, want, config),
        dynamic=_mean(distance / config.stride, tracked & plausible, dim=(1, 2), empty=0.0),
        consistency=_mean((tracked & plausible & same).float(), named[:, 1:], dim=(1, 2)),
        turn=_turn(r, move, tracked, config, size),
        quality=_mean(r.quality, r.found, dim=(1, 2), empty=0.0),
        fidelity=-10 * torch.log10(r.error.mean(1).clamp_min(1e-8)),
        follow_drift=right[:, :third].mean(1) - right[:, -third:].mean(1),
        quality_drift=quality_drift,
    )


def _clip_quality(r: Reading, steps: slice) -> Tensor:
    return _mean(r.quality[:, steps], r.found[:, steps], dim=(1, 2), empty=0.0)


def _mean(values: Tensor, where: Tensor, dim: tuple[int, ...], empty: float = float("nan")) -> Tensor:
    """Mean of the selected values; `empty` where none is selected."""
    count = where.sum(dim)
    total = torch.where(where, values, 0.0).sum(dim)
    return torch.where(count > 0, total / count.clamp_min(1), empty)


def _direction(r: Reading, want: Captions, config: MetricConfig) -> Tensor:
    """(B,): the heading over the quiet frames (from where the object is first to where it is last found in them)."""
    last = min(config.quiet // config.stride, r.found.shape[1] - 1)
    if last < 1:
        return torch.full((len(r.found),), float("nan"), device=r.found.device)
    seen = r.found[:, : last + 1]  # (B,last+1,N)
    begin = seen.int().argmax(dim=1)  # (B,N)
    end = last - seen.flip(1).int().argmax(dim=1)

    def at(step: Tensor) -> Tensor:
        return r.centre.gather(1, step[:, None, :, None].expand(-1, 1, -1, 2))[:, 0]  # (B,N,2)

    move = at(end) - at(begin)
    unit = torch.tensor([(1, 0), (0, 1), (-1, 0), (0, -1)], device=move.device, dtype=move.dtype)  # as DIRECTIONS
    along = (move * unit[want.direction.clamp_min(0)]).sum(-1)
    obeyed = seen.any(1) & (end > begin) & (along > move.norm(dim=-1) * 0.7071) & (along >= 0.5)
    return _mean(obeyed.float(), want.named & (want.direction != ANY), dim=(1,))


def _speed(distance: Tensor, tracked: Tensor, want: Captions, config: MetricConfig) -> Tensor:
    """(B,): relative error of the median speed."""
    pace = torch.where(tracked, distance / config.stride, float("nan"))
    if pace.shape[1] == 0:
        return torch.full((len(pace),), float("nan"), device=pace.device)
    typical = median(pace.transpose(1, 2)).nan_to_num(0.0)  # (B,N)
    nominal = torch.tensor(SPEED_PIXELS, device=pace.device)[want.speed.clamp_min(0)]
    return _mean((typical / nominal - 1).abs().clamp(max=3.0), want.named & (want.speed != ANY), dim=(1,))


def _turn(r: Reading, move: Tensor, tracked: Tensor, config: MetricConfig, size: Sequence[int]) -> Tensor:
    """(B,): share of steps, in free space, after which the heading changes."""
    bound = torch.tensor([BOUNDS[t[0]] * RADII[t[1]] for t in TEMPLATES], device=move.device)[r.template]  # (B,E,N)
    room = torch.tensor([size[1], size[0]], device=move.device)
    free = (torch.minimum(r.centre, room - r.centre) > bound[..., None] + 3).all(-1)  # (B,E,N)
    gap = (r.centre[:, :, 0] - r.centre[:, :, 1]).norm(dim=-1) - bound.sum(-1)  # (B,E)
    free = free & ((gap > 8) | ~r.found.all(-1))[..., None]
    eligible = tracked[:, 1:] & tracked[:, :-1] & free[:, :-2] & free[:, 1:-1] & free[:, 2:]
    before, after = move[:, :-1], move[:, 1:]
    eligible = eligible & (before.norm(dim=-1) > 0.8) & (after.norm(dim=-1) > 0.8)
    cosine = F.cosine_similarity(before, after, dim=-1)
    limit = torch.cos(torch.deg2rad(torch.tensor(config.turn_degrees)))
    return _mean((cosine < limit.item()).float(), eligible, dim=(1, 2))
