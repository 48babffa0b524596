"""A chunk on its way from latents to pixels, so that the next one can be begun meanwhile.

On a GPU latents are made on a stream of their own and pixels on another: while one chunk is decoded the next one is
denoised, and both are the same bits as one after the other. On a CPU the two follow each other.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from causalreel.control.steering import Frame
from causalreel.data.video import to_bytes
from causalreel.infer.live_video import LiveVideo
from causalreel.infer.pipeline import side_stream
from causalreel.serve.emitted import Applied, Timings
from causalreel.types import DecodeStream


def aside(device: torch.device) -> AbstractContextManager[object]:
    """The stream on which latents are made, for what they depend on."""
    return torch.cuda.stream(side_stream(device)) if is_gpu(device) else nullcontext()


def is_gpu(device: torch.device) -> bool:
    """Whether it has streams."""
    return device.type == "cuda"


@dataclass
class Begun:
    """A chunk whose latents are made, or are being made on a GPU."""

    latents: Tensor
    decode: DecodeStream
    prompt: str
    keys: tuple[str, ...]
    seen: list[Frame]
    clock: Callable[[], float]
    marks: list[torch.cuda.Event | float]
    """When its latents were begun and done, and its pixels: by the clock, or by a GPU."""
    taken: list[Applied] = field(default_factory=list)
    """Commands that took effect with it."""

    @staticmethod
    def of(video: LiveVideo, clock: Callable[[], float], *, is_ahead: bool = False) -> Begun:
        """Have the latents of the video's next chunk made; on a GPU it returns before they are. is_ahead: beside the
        work that the current stream has, which is another chunk's pixels; otherwise behind it."""
        device, decode = video.pipeline.device, video.decoder()
        if is_gpu(device) and not is_ahead:
            side_stream(device).wait_stream(torch.cuda.current_stream(device))
        with torch.no_grad(), aside(device):
            start = _mark(device, clock)
            latents = video.next_latents()
            made = _mark(device, clock)
        return Begun(latents, decode, video.scene.prompt, video.keys_told, video.seen, clock, [start, made])

    def decoded(self) -> Tensor:
        """Pixel frames (t,H,W,3) uint8 where they are made; on a GPU before they are."""
        device, ready = self.latents.device, self.marks[1]
        if isinstance(ready, torch.cuda.Event):
            here = torch.cuda.current_stream(device)
            here.wait_event(ready)
            self.latents.record_stream(here)
            self.marks[1:] = [ready, _mark(device, self.clock)]
        frames = to_bytes(self.decode(self.latents)[0], leave=True)
        self.marks.append(_mark(device, self.clock))
        return frames

    def timings(self, done: float) -> Timings:
        """When the pixels are on the CPU. done: now, by the clock."""
        events = [mark for mark in self.marks if isinstance(mark, torch.cuda.Event)]
        if events:
            start, made, begun, end = events
            return Timings(start.elapsed_time(made) / 1000, begun.elapsed_time(end) / 1000)
        start, made = (mark for mark in self.marks[:2] if not isinstance(mark, torch.cuda.Event))
        return Timings(made - start, done - made)


def _mark(device: torch.device, clock: Callable[[], float]) -> torch.cuda.Event | float:
    if not is_gpu(device):
        return clock()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
