"""Fast streaming decoding: the same function as a codec's `stream`, rearranged for a GPU and replayed as CUDA graphs.

`fast_decoder` takes a finished codec and leaves it as it is. The rearranged arithmetic is in `codecs.fast_wan` and
`codecs.fast_taehv`, named by the codec's row in `codecs.kinds`; this file owns what is common: sizes are fixed, state
lies in static buffers, the first latent frame of a video and a steady one are a graph each. One decoder serves several
streams by swapping: the state of the stream called last lies in the buffers, the others hold copies, so changing
streams costs one copy of the state out and one in (about 3 GB moved for the Wan VAE at 480x832, a millisecond). Without
CUDA the same code runs without graphs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from causalreel.codecs.codec import Codec, Program
from causalreel.codecs.fast_wan import Arithmetic
from causalreel.codecs.kinds import kind_of
from causalreel.codecs.passes import Backend

WARMUP = 3


class FastDecoder:
    """Makes streams (`stream`) that share graphs, buffers and weights; call them from one CUDA stream at a time."""

    def __init__(
        self,
        program: Program,
        latent: tuple[int, int, int, int],
        *,
        device: torch.device,
        sizes: Sequence[int] = (1,),
        graphs: bool = True,
    ) -> None:
        """latent: (B,C,h,w). sizes: numbers of latent frames decoded by one call of the program, 1 among them."""
        if 1 not in sizes or min(sizes) < 1:
            raise ValueError(f"sizes must be positive and have 1 among them, got {tuple(sizes)}")
        self.latent, self.device = latent, device
        self.sizes = sorted(set(sizes), reverse=True)
        self._program = program
        self._owner: weakref.ref[FastStream] | None = None
        self._graphs: dict[tuple[int, bool], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}
        if graphs:
            with torch.cuda.device(self.device):  # Triton starts kernels on the current device
                self._capture()

    def stream(self) -> FastStream:
        """A new video to be decoded piece by piece."""
        return FastStream(self)

    @property
    def state_bytes(self) -> int:
        """Size of one stream's state; 0 before the first call of a decoder without graphs."""
        return sum(state.nbytes for state in self._program.states.values())

    @torch.no_grad()
    def _capture(self) -> None:
        b, c, h, w = self.latent
        calls = [(1, True), *((size, False) for size in self.sizes)]
        given = {call: torch.zeros(b, call[0], c, h, w, device=self.device) for call in calls}
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side), _benchmarked():
            for call in calls:
                for _ in range(WARMUP):
                    self._program(given[call], call[1])
        torch.cuda.current_stream(self.device).wait_stream(side)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        pool = torch.cuda.graph_pool_handle()
        for call in calls:
            graph = torch.cuda.CUDAGraph()
            with _benchmarked(), torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                video = self._program(given[call], call[1])
            self._graphs[call] = graph, given[call], video

    def _run(self, latents: Tensor, fresh: bool) -> Tensor:
        found = self._graphs.get((latents.shape[1], fresh))
        if found is None:
            with torch.no_grad():
                return self._program(latents.float(), fresh)
        graph, given, video = found
        given.copy_(latents)
        graph.replay()
        return video.clone()

    def _give_state_to(self, stream: FastStream, *, fresh: bool) -> None:
        """Put the state of `stream` into the buffers, and what was there where it belongs."""
        owner = None if self._owner is None else self._owner()
        if owner is stream:
            return
        states = self._program.states
        if owner is not None:
            owner._saved = {key: state.clone() for key, state in states.items()}
        if not fresh:
            for key, saved in stream._saved.items():
                states[key].copy_(saved)
        stream._saved = {}
        self._owner = weakref.ref(stream)


class FastStream:
    """One video being decoded: latents (B,F,C,h,w) in order -> frames (B,T,3,H,W) in [-1, 1], any split over calls."""

    def __init__(self, decoder: FastDecoder) -> None:
        self._decoder = decoder
        self._saved: dict[object, Tensor] = {}
        self._has_begun = False

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        b, c, h, w = self._decoder.latent
        if latents.ndim != 5 or latents.shape[1] < 1 or (latents.shape[0], *latents.shape[2:]) != (b, c, h, w):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, this decoder was made for ({b},F,{c},{h},{w})"
            )
        latents = latents.to(self._decoder.device)
        self._decoder._give_state_to(self, fresh=not self._has_begun)
        pieces, start = [], 0
        while start < latents.shape[1]:
            left = latents.shape[1] - start if self._has_begun else 1
            size = next(size for size in self._decoder.sizes if size <= left)
            with torch.cuda.device_of(latents):
                pieces.append(self._decoder._run(latents[:, start : start + size], not self._has_begun))
            self._has_begun, start = True, start + size
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


@contextlib.contextmanager
def _benchmarked() -> Iterator[None]:
    """cuDNN tries its algorithms once per shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def fast_decoder(
    codec: Codec,
    height: int,
    width: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 1,
    device: torch.device | str | None = None,
    sizes: Sequence[int] = (1,),
    arithmetic: Arithmetic | None = None,
    graphs: bool | None = None,
    backend: Backend | None = None,
) -> FastDecoder:
    """A decoder of videos of height x width pixels on `device` (the codec's, if None); weights are copied as `dtype`.

    sizes: (1,) decodes latent by latent; (3, 1) decodes three at once where a call has them, with three times the
    working memory. arithmetic: how the Wan VAE's convolutions are done. graphs, backend: None is CUDA graphs and Triton
    kernels on a GPU, neither on a CPU. Capture tries cuDNN's algorithms and takes some seconds.
    """
    device = next(codec.parameters()).device if device is None else torch.device(device)
    latent = codec.geometry.latent_of(height, width)
    on_gpu = device.type == "cuda"
    backend = _backend(on_gpu) if backend is None else backend
    make = kind_of(codec.config).program
    if make is None:
        raise TypeError(f"{type(codec).__name__} has no fast form")
    program = make(codec, dtype, device, backend, arithmetic)
    return FastDecoder(
        program, (batch, *latent.shape), device=device, sizes=sizes, graphs=on_gpu if graphs is None else graphs
    )


def _backend(on_gpu: bool) -> Backend:
    if on_gpu and importlib.util.find_spec("triton") is not None:
        return "triton"
    if on_gpu:
        logging.getLogger(__name__).warning("fast decode without Triton: the passes are several kernels each, and slow")
    return "torch"


def fast_stream(
    codec: Codec,
    height: int,
    width: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    sizes: Sequence[int] = (1,),
    arithmetic: Arithmetic | None = None,
) -> FastStream:
    """A stream with a decoder of its own; for several videos make one `fast_decoder` and take its streams."""
    return fast_decoder(codec, height, width, dtype=dtype, sizes=sizes, arithmetic=arithmetic).stream()
