"""CUDA graphs over a denoiser's cacheless calls in training: forward and backward replayed as one launch each.

A small network in training is bound by the host that launches its kernels; a graph removes that. Calls behind a cache
change shape from chunk to chunk and stay as they are. A graph's gradient buffers are reused by its next backward pass:
an update must not accumulate several graphed micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.dit import DiT
from causalreel.nn.masks import Reading
from causalreel.nn.rope import rope_table
from causalreel.types import Conditioning

WARMUP = 3


class _Fixed(nn.Module):
    """The network with everything but its tensors decided."""

    def __init__(self, model: DiT, names: Sequence[str], prompts: tuple[int, ...] | None, how: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.names, self.prompts, self.how = model, names, prompts, how

    def forward(self, x: Tensor, sigma: Tensor, text: Tensor, *fields: Tensor) -> Tensor:
        conditioning = Conditioning(text, dict(zip(self.names, fields, strict=True)), self.prompts)
        return self.model(x, sigma, conditioning, **self.how)


class GraphedCalls:
    """Stands in for a DiT: one graph per shape and mask, made at the first such call."""

    def __init__(self, model: DiT) -> None:
        self.model = model
        self.graphs: dict[tuple, Callable[..., Any]] = {}
        self.kept: list[Any] = []
        """Tables that graphs read: alive as long as the graphs, whatever the caches that made them drop."""

    def __call__(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, *, cache: Any = None, **how: Any
    ) -> Tensor:
        is_kept = conditioning.prepared is not None and not torch.is_grad_enabled()
        if cache is not None or is_kept or not x.is_cuda:
            return self.model(x, sigma, conditioning, cache=cache, **how)
        names, prompts = sorted(conditioning.fields), conditioning.prompts
        fields = [conditioning.fields[name] for name in names]
        inputs = (x.float().contiguous(), sigma.float().contiguous(), conditioning.text, *fields)
        is_training = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())
        shapes = tuple(part.shape for part in inputs)
        key = (shapes, tuple(names), prompts, tuple(sorted(how.items(), key=lambda item: item[0])), is_training)
        if key not in self.graphs:
            make = _capture_training if is_training else _capture
            self.kept.append(self._tables(x, how))
            fixed = _Fixed(self.model, names, prompts, how)
            self.graphs[key] = make(fixed, tuple(t.detach().clone() for t in inputs))
        return self.graphs[key](*inputs).clone()

    def _tables(self, x: Tensor, how: dict[str, Any]) -> tuple[Any, ...]:
        config = self.model.config
        height, width = x.shape[3] // config.patch, x.shape[4] // config.patch
        reading: Reading = how["reading"]
        mask = reading.mask and reading.mask.dense(height * width, x.device)
        positions = reading.positions, *(group.positions for group in reading.groups)
        return mask, [rope_table(at, height, width, config.dim // config.heads, x.device) for at in positions]


def _capture_training(module: nn.Module, samples: tuple[Tensor, ...]) -> Callable[..., Any]:
    """A graph of the forward and one of the backward pass."""
    return torch.cuda.make_graphed_callables(module, samples, allow_unused_input=True)


def _capture(module: nn.Module, samples: tuple[Tensor, ...]) -> Callable[..., Any]:
    """A graph without gradient."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(WARMUP):
            module(*samples)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        result = module(*samples)

    def replay(*inputs: Tensor) -> Tensor:
        for held, given in zip(samples, inputs, strict=True):
            held.copy_(given)
        graph.replay()
        return result

    return replay


def graph_calls(denoiser: DiTDenoiser) -> DiTDenoiser:
    """Replay cacheless calls of this denoiser from now on; weights may change in place, not move."""
    denoiser.run = GraphedCalls(denoiser.model)
    return denoiser
