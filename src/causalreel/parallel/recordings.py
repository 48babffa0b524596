"""Calls of a network for inference as CUDA graphs: each kind recorded once, and replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from causalreel.nn.masks import Reading
from causalreel.nn.static_cache import CacheMemory, StaticCache
from causalreel.nn.texts import KeyValue, TextRun
from causalreel.parallel.fast_attention import Gather
from causalreel.parallel.mesh import release_first

WARMUP = 2
"""Runs before a recording, in which kernels are compiled and libraries choose theirs."""


@dataclass(frozen=True)
class Levels:
    """Modulation of one tuple of noise levels, float32: scales already hold the 1 that is added to them."""

    blocks: Tensor
    """(layers,6,F,E): shift, scale, gate of attention; the same of the feed-forward. With fields B*F instead of F."""
    head: Tensor
    """(2,F,E): shift and scale."""


TextOfBlocks = list[list[TextRun]]
"""For every block what the frames of a call read: the same runs of frames everywhere."""


class _Recording:
    """One kind of call as a CUDA graph, with the tensors it reads and writes."""

    def __init__(self, inputs: list[Tensor], run: Callable[[], Tensor], pool: Any, side: torch.cuda.Stream) -> None:
        self.inputs = inputs
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=side, capture_error_mode="thread_local"):
            self.result = run()

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        for held, given in zip(self.inputs, inputs, strict=True):
            if held is not given:
                held.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.result.clone()


class Recordings:
    """CUDA graphs of an evaluation's calls: one per shape, visible length and cache; memory is shared between them.

    What changes between calls of a kind is in tensors, which a graph reads: `evaluate` may ask `reading` and the cache
    for nothing but what the kind says.
    """

    def __init__(self, evaluate: Callable[..., Tensor]) -> None:
        self.evaluate = evaluate
        self.graphs: dict[tuple[Any, ...], _Recording] = {}
        self.text: dict[tuple[torch.Size, int], tuple[list[KeyValue], list[Tensor]]] = {}
        """Per shape of text keys and run of frames: those in use, and the tensors that graphs read."""
        self.gathers: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        """Per memory and chunk of a call: rows, cos, sin for as many frames as the memory has; graphs read a part."""
        self.pool: Any = None
        self.side: torch.cuda.Stream | None = None
        """Where all recordings are made: every stream has workspaces of its own, tens of MB each."""
        self.last: torch.Event | None = None
        """When the latest call is over."""
        release_first(self)

    @staticmethod
    def fit(x: Tensor, cache: object) -> bool:
        """Whether calls over x with this cache can be recorded."""
        return x.is_cuda and isinstance(cache, StaticCache)

    def release(self) -> None:
        """Give all recordings up; the next call of each kind records it again."""
        for recording in self.graphs.values():
            recording.graph.reset()
        self.graphs.clear()
        self.gathers.clear()
        self.pool = None  # torch forgets a pool with its last graph; another one needs another pool

    def __call__(
        self,
        x: Tensor,
        levels: Levels,
        rotation: tuple[Tensor, Tensor],
        text: TextOfBlocks,
        fields: Mapping[str, Tensor],
        reading: Reading,
        cache: StaticCache,
        gathers: tuple[Gather, ...],
    ) -> Tensor:
        here = torch.cuda.current_stream(x.device)
        if self.last is not None:  # recordings share memory: one call after the other, whatever streams they come from
            here.wait_event(self.last)
        text, names = self._place_text(text), sorted(fields)
        gathers = self._place_gathers(gathers, cache.memory)
        inputs = [x, levels.blocks, levels.head, *rotation, *(fields[name] for name in names)]
        shapes = tuple((part.shape, part.dtype) for part in (x, levels.blocks, *inputs[5:]))
        reads = tuple((frames, k.shape) for frames, k, _ in text[0])
        gathered = tuple((gather.queries, len(gather.rows)) for gather in gathers)
        kind = (shapes, tuple(names), reads, gathered, reading.mask, cache.call, cache.chunk, id(cache.memory))
        if kind not in self.graphs:
            held = [part.clone() for part in inputs]

            def run() -> Tensor:
                own = Levels(held[1], held[2])
                given = dict(zip(names, held[5:], strict=True))
                return self.evaluate(held[0], own, (held[3], held[4]), text, given, reading, cache, gathers)

            self.pool = self.pool or torch.cuda.graph_pool_handle()
            self.side = self.side or torch.cuda.Stream(x.device)
            self.graphs[kind] = _Recording(held, run, self.pool, self.side)
        velocity = self.graphs[kind](inputs)
        self.last = here.record_event()
        return velocity

    def _place_gathers(self, gathers: tuple[Gather, ...], memory: CacheMemory) -> tuple[Gather, ...]:
        """What is gathered, copied into tensors that all graphs over this memory read."""
        placed: list[Gather] = []
        for index, gather in enumerate(gathers):
            given, where = (gather.rows, gather.cos, gather.sin), (id(memory), index)
            if where not in self.gathers:
                most = memory.frames * memory.tokens
                self.gathers[where] = tuple(part.new_zeros(most, *part.shape[1:]) for part in given)
            rows, cos, sin = (whole[: len(gather.rows)] for whole in self.gathers[where])
            for mine, part in zip((rows, cos, sin), given, strict=True):
                mine.copy_(part, non_blocking=True)
            placed.append(Gather(gather.queries, rows, cos, sin))
        return tuple(placed)

    def _place_text(self, text: TextOfBlocks) -> TextOfBlocks:
        """The text keys, copied into the tensors that graphs read if they are not there yet."""
        placed = []
        for run, (frames, first, _) in enumerate(text[0]):
            pairs = [block[run][1:] for block in text]
            where = first.shape, run
            if where not in self.text:
                self.text[where] = pairs, [torch.stack(pair) for pair in pairs]
            known, held = self.text[where]
            if known[0][0] is not first:
                for mine, pair in zip(held, pairs, strict=True):
                    mine[0].copy_(pair[0])
                    mine[1].copy_(pair[1])
                self.text[where] = pairs, held
            placed.append([(frames, pair[0], pair[1]) for pair in held])
        return [list(block) for block in zip(*placed, strict=True)]
