"""Roles that follow another role: exponential moving averages and the targets of consistency distillation."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.parallel.sharding import local
from causalreel.train.stage import Average

PIECE = 1 << 24
"""Numbers that come to the host at a time, two times 64 MiB of pinned memory."""


class Follower:
    """Moves the weights of one averaged role towards its source, all tensors at once, in float32.

    What of the role waits on the host is moved there, behind the computation: a thread copies the source piece by piece
    and averages. `wait` before anything reads the role or changes its source; calls of a role that is a network wait
    by themselves.
    """

    def __init__(self, average: Average, roles: dict[str, nn.Module], *, is_on_host: bool = False) -> None:
        self.average = average
        target, source = _tensors(roles[average.role]), _tensors(roles[average.source])
        shared = [name for name in target if name in source and target[name].data_ptr() == source[name].data_ptr()]
        for name in shared:  # a frozen base of adapters, which is one for both
            del target[name], source[name]
        if (
            differing := {k: v.shape for k, v in target.items()}.items()
            ^ {k: v.shape for k, v in source.items()}.items()
        ):
            name = min(key for key, _ in differing)
            raise ValueError(
                f"average {average.role!r}: {name} differs in name or shape from that of {average.source!r}"
            )
        for role, tensors in ((average.role, target), (average.source, source)):
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and tensor.dtype != torch.float32:
                    raise ValueError(f"average {average.role!r}: {role}'s {name} is {tensor.dtype}, not torch.float32")
        moving = [name for name, tensor in target.items() if tensor.is_floating_point()]
        away = {name for name in moving if is_on_host and target[name].device.type == "cpu"}
        self._pieces = [pair for name in moving if name in away for pair in _pieces(target[name], source[name])]
        moving = [name for name in moving if name not in away]
        self._target, self._source = [target[n] for n in moving], [source[n] for n in moving]
        self._copied = [(target[n], source[n]) for n in target if not target[n].is_floating_point()]
        self._running: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="average") if away else None
        if away:
            role = roles[average.role]
            network = role.model if isinstance(role, DiTDenoiser) else role
            network.register_forward_pre_hook(lambda *_: self.wait(), prepend=True)

    @torch.no_grad()
    def copy(self) -> None:
        """Make the role equal to its source."""
        self._move(None)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take one step towards the source, after an optimiser step on it in trainer step `step`."""
        if step < self.average.from_step:
            self.copy()
            return
        self._move(1 - self.average.decay)

    def wait(self) -> None:
        """Until what moves on the host has moved."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _move(self, share: float | None) -> None:
        """By `share` of the way, or all of it."""
        self.wait()
        if share is None and self._target:
            torch._foreach_copy_(self._target, self._source)  # pyright: ignore[reportPrivateImportUsage]
        elif share is not None and self._target:
            torch._foreach_lerp_(self._target, self._source, share)  # pyright: ignore[reportPrivateImportUsage]
        for target, source in self._copied:
            target.copy_(source)
        if self._thread is None:
            return
        device = self._pieces[0][1].device
        now = _mark(torch.cuda.current_stream(device)) if device.type == "cuda" else None
        self._running = self._thread.submit(_move_on_host, self._pieces, share, now)


@torch.no_grad()
def _move_on_host(pieces: list[tuple[Tensor, Tensor]], share: float | None, now: torch.cuda.Event | None) -> None:
    """Each target becomes its source, or moves by `share` towards it; now: when the GPU has the sources."""
    for (target, _), source in zip(pieces, _brought(pieces, now), strict=True):
        target.copy_(source) if share is None else target.lerp_(source, share)


def _brought(pieces: list[tuple[Tensor, Tensor]], now: torch.cuda.Event | None) -> Iterator[Tensor]:
    """The sources on the host, one after the other; the next is being copied while one is used."""
    if now is None:
        yield from (source for _, source in pieces)
        return
    stream = torch.cuda.Stream(pieces[0][1].device)
    room = [torch.empty(max(len(source) for _, source in pieces), pin_memory=True) for _ in range(2)]

    def bring(number: int) -> torch.cuda.Event:
        source = pieces[number][1]
        with torch.cuda.stream(stream):
            room[number % 2][: len(source)].copy_(source, non_blocking=True)
            return _mark(stream)

    stream.wait_event(now)
    coming = bring(0)
    for number, (_, source) in enumerate(pieces):
        coming.synchronize()
        if number + 1 < len(pieces):
            coming = bring(number + 1)
        yield room[number % 2][: len(source)]


def _mark(stream: torch.cuda.Stream) -> torch.cuda.Event:
    """When the stream has done what it was given so far."""
    event = torch.cuda.Event()
    event.record(stream)
    return event


def _pieces(target: Tensor, source: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat parts of both, in the same memory."""
    yield from zip(target.view(-1).split(PIECE), source.view(-1).split(PIECE), strict=True)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: local(tensor.detach()) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
