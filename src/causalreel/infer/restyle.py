"""Video to video: a given video, noised to a level and denoised from there, chunk by chunk as it is decoded.

Only where a chunk begins differs from any other rollout, so that is all there is here: noise whose first draw holds the
given frames. What a video keeps of the given one depends on the level: at 1 nothing, and the result is that of the
prompt alone.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from causalreel.data.pictures import Fit
from causalreel.data.video_in import count_frames, open_video
from causalreel.flow import add_noise
from causalreel.types import Geometry, NoiseSource, VideoCodec
from causalreel.weights.export import Sampling


@dataclass(frozen=True, eq=False)
class GivenVideo:
    """A video to be made another of: its frames at the model's rate and of the model's size, once for each use."""

    frames: int | None
    """Pixel frames; None: nobody knows yet, it is still being made."""
    size: tuple[int, int]
    """Their height and width."""
    read: Callable[[], Iterable[Tensor]]
    """-> parts (1,t,3,H,W) in [-1,1], in order; asked for when they are needed."""
    feed: Feed | None = None
    """Where frames come from in place of `read`, of a video that is never over."""
    held: int = 0
    """Bytes of frames that are kept in memory as long as it is."""

    @staticmethod
    def of(video: Tensor) -> GivenVideo:
        """A video that is there: (T,3,H,W) in [-1,1]."""
        if video.ndim != 4 or video.shape[1] != 3 or not video.is_floating_point():
            raise ValueError(f"the given video must be (T,3,H,W) in [-1,1], got {tuple(video.shape)} of {video.dtype}")
        height, width = video.shape[-2:]
        return GivenVideo(len(video), (height, width), lambda: [video[None]])

    @staticmethod
    def of_pictures(pictures: Sequence[np.ndarray], size: tuple[int, int]) -> GivenVideo:
        """A video that was decoded before: (H,W,3) uint8 each, of this size."""
        held = sum(picture.nbytes for picture in pictures)
        return GivenVideo(len(pictures), size, lambda: map(_as_video, pictures), held=held)

    def spent(self) -> GivenVideo:
        """The same without its frames, when nobody reads them any more."""
        return replace(self, read=lambda: (), held=0)

    @staticmethod
    def of_feed(feed: Feed, size: tuple[int, int]) -> GivenVideo:
        """Frames that somebody sends while it goes on."""
        return GivenVideo(None, size, lambda: (), feed)

    @staticmethod
    def of_file(
        path: str | os.PathLike[str], size: tuple[int, int], *, fps: float, how: Fit = "crop", most: int | None = None
    ) -> GivenVideo:
        """A file of any size and rate; decoded twice: to count its frames, at most `most`, and when it is used."""

        count = count_frames(path, fps=fps, most=most)
        return GivenVideo(count, size, lambda: _pictures(path, size, fps, how))

    @staticmethod
    def of_stream(
        source: str | os.PathLike[str] | BinaryIO, size: tuple[int, int], *, fps: float, how: Fit = "crop"
    ) -> GivenVideo:
        """A file, a named pipe or standard input, read as it comes; asked for again, an open one goes on."""
        reels: list[Iterator[Tensor]] = []

        def read() -> Iterator[Tensor]:
            if not reels or isinstance(source, str | os.PathLike):
                reels[:] = [_pictures(source, size, fps, how)]
            return (part for part in reels[0])  # which does not close it

        return GivenVideo(None, size, read)


class Feed:
    """Frames that come while a video is made of them, such as a camera's: the latest ones are kept, for any thread.

    A chunk is made of what came since the one before it, evenly picked or shown for longer, however many that is.
    """

    def __init__(self, room: int) -> None:
        """room: frames that are kept, such as a chunk's."""
        self._held: deque[np.ndarray] = deque(maxlen=room)
        self._lock = threading.Lock()

    @property
    def is_waiting(self) -> bool:
        """Whether no frame has come since the last chunk."""
        return not self._held

    def put(self, pictures: Iterable[np.ndarray]) -> None:
        """Further frames (H,W,3) uint8; what is too many goes, the oldest first."""
        with self._lock:
            self._held.extend(pictures)

    def hold(self, count: int) -> bool:
        """There are always as many as are wanted."""
        return True

    def take(self, count: int) -> Tensor:
        """(1,count,3,H,W) in [-1,1], the last one the latest."""
        with self._lock:
            came, many = list(self._held), len(self._held)
            self._held.clear()
        return torch.cat([_as_video(came[((place + 1) * many - 1) // count]) for place in range(count)], dim=1)

    def close(self) -> None:
        """A video that begins again takes what comes next."""


@dataclass(frozen=True, eq=False)
class Restyle:
    """What a live video is made of, instead of noise alone."""

    video: GivenVideo
    strength: float

    def check(self, size: tuple[int, int], sampling: Sampling, codec: VideoCodec) -> None:
        """ValueError unless a video of this size, sampled like that, can be made of it."""
        check_strength(self.strength)
        if self.video.size != size:
            (high, wide), (height, width) = size, self.video.size
            raise ValueError(f"the given video must be {high}x{wide} pixels, got {height}x{width}")
        if sampling.plan != "chunked":
            raise ValueError("a given video needs a model that goes chunk by chunk")
        if self.video.frames is None and getattr(codec, "encode_stream", None) is None:
            raise ValueError("this model's codec encodes whole clips only, so nothing can be made of a stream")


def _pictures(
    source: str | os.PathLike[str] | BinaryIO, size: tuple[int, int], fps: float, how: Fit
) -> Iterator[Tensor]:
    with open_video(source, fps=fps, size=size, how=how) as reel:
        for picture in reel.frames:
            yield _as_video(picture)


def _as_video(picture: np.ndarray) -> Tensor:
    """(H,W,3) uint8 -> (1,1,3,H,W) in [-1,1]."""
    return torch.from_numpy(picture).permute(2, 0, 1)[None, None].float().div_(127.5).sub_(1)


def check_strength(strength: float) -> None:
    """ValueError unless it is a noise level at which something is left to be done."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength:g}")


class Over:
    """Noise over the latents of a given video: a chunk's first draw is these, noised to `strength`. See NoiseSource."""

    def __init__(self, noise: NoiseSource, given: Callable[[int], Tensor], strength: float) -> None:
        """given: a number of latent frames -> the next ones (1,F,C,H,W), in order."""
        self.noise, self.given, self.strength = noise, given, strength

    def initial(self, start: int, frames: int) -> Tensor:
        drawn, kept = self.noise.initial(start, frames), self.given(frames)
        level = torch.full((1, 1), self.strength, device=drawn.device)
        return add_noise(kept.to(drawn).expand_as(drawn), drawn, level)

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        return self.noise.renoise(start, frames, draw)


class Encoded:
    """A given video as latents, decoded and encoded as they are asked for; all at once by a codec that must."""

    def __init__(self, codec: VideoCodec, given: GivenVideo, device: torch.device) -> None:
        self._codec, self._device = codec, device
        self._pixels = _Frames(given.read()) if given.feed is None else given.feed
        self._rest: Tensor | None = None
        """Latents that were encoded and not yet asked for."""
        self._begun = False
        stream: Any = getattr(codec, "encode_stream", None)
        self._encode: Callable[[Tensor], Tensor] = codec.encode if stream is None else stream()
        self._at_once = given.frames if stream is None else None

    def has(self, frames: int) -> bool:
        """Whether there are so many more latent frames; waits for a video that is still being made."""
        held = 0 if self._rest is None else self._rest.shape[1]
        return held >= frames or self._pixels.hold(self._count(frames - held))

    @torch.no_grad()
    def __call__(self, frames: int) -> Tensor:
        """The next latent frames (1,F,C,H,W); ValueError if the video ends before."""
        if self._rest is None or self._rest.shape[1] < frames:
            missing = frames - (0 if self._rest is None else self._rest.shape[1])
            count = self._count(missing) if self._at_once is None else self._at_once
            made = self._encode(self._pixels.take(count).to(self._device))
            self._begun = True
            self._rest = made if self._rest is None else torch.cat([self._rest, made], dim=1)
        made, self._rest = self._rest[:, :frames], self._rest[:, frames:]
        return made

    def _count(self, frames: int) -> int:
        """Pixel frames of so many latent ones."""
        geometry = self._codec.geometry
        return geometry.temporal * frames if self._begun else geometry.frames_of(frames)

    def close(self) -> None:
        """Let go of the file."""
        self._pixels.close()


class _Frames:
    """Frames of a video taken in other numbers than they come."""

    def __init__(self, parts: Iterable[Tensor]) -> None:
        self._parts, self._held = iter(parts), list[Tensor]()

    def take(self, count: int) -> Tensor:
        """The next `count` frames (1,count,3,H,W); ValueError if the video ends before."""
        if not self.hold(count):
            raise ValueError("the given video ended before its last frame: it was counted longer")
        joined = torch.cat(self._held, dim=1)
        self._held = [joined[:, count:]]
        return joined[:, :count]

    def hold(self, count: int) -> bool:
        """Read on until so many frames are there; whether they are."""
        while sum(part.shape[1] for part in self._held) < count:
            part = next(self._parts, None)
            if part is None:
                return False
            self._held.append(part)
        return True

    def close(self) -> None:
        """Let go of the file."""
        self._held = []
        close = getattr(self._parts, "close", None)
        if close is not None:
            close()


def latents_in(given: GivenVideo, geometry: Geometry, chunk: int) -> int:
    """Latent frames of its whole chunks; ValueError if it has none."""
    if given.frames is None:
        raise ValueError("a clip needs a given video of known length; a stream takes one that is still being made")
    found = geometry.latents_in(given.frames) // chunk * chunk
    if found == 0:
        raise ValueError(
            f"the given video has {given.frames} frames, fewer than one chunk ({geometry.frames_of(chunk)})"
        )
    return found
