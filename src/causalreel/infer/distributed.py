"""A pipeline over several devices: one stream shared by the processes of a launch, and decoding on a device of its own.

The first process sees what comes in and what goes out: it encodes prompts and given frames, passes them on, decodes and
writes. The others only compute their share of the network; noise is keyed by seed and frame, so all draw the same.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from causalreel.infer.manner import beyond
from causalreel.infer.pipeline import Pipeline
from causalreel.nn.policies.window import Context
from causalreel.parallel.mesh import Mesh, join, launch
from causalreel.parallel.ulysses import shard_sequence
from causalreel.types import DecodeStream, TextEncoder, VideoCodec


def processes(device: str | None = None) -> contextlib.AbstractContextManager[Mesh | None]:
    """The process group of this launch, to be used as a context; None in a process that is alone."""
    where = launch()
    return contextlib.nullcontext() if where is None else join(where, device)


def spread(pipeline: Pipeline, mesh: Mesh | None, *, decode_device: torch.device | str | None = None) -> Pipeline:
    """The same pipeline, shared by the processes of `mesh` if given, and decoding on `decode_device` if given.

    In all processes but the first its videos have no frames. ValueError where the network cannot be shared by so many.
    """
    if decode_device is not None:  # by the codec's own stream: a fast decoder belongs to the device it was made for
        codec = CodecElsewhere(pipeline.codec, _existing(decode_device), pipeline.device)
        pipeline = replace(pipeline, codec=codec, decoder=None)
    if mesh is None:
        return pipeline
    latent, patch, export = pipeline.export.latent, pipeline.export.model.patch, pipeline.export
    longer = beyond(export, pipeline.sampling)
    if longer is not None and longer.selects:  # which cannot be shared: longer clips get a window
        pipeline = replace(pipeline, export=replace(export, context=Context(window=export.frames)))
    shard_sequence(pipeline.denoiser, tokens=latent.height * latent.width // patch**2)
    pipeline = replace(pipeline, text=SharedText(pipeline.text, mesh))
    if mesh.rank == 0:
        return replace(pipeline, codec=SharedCodec(pipeline.codec, mesh))
    return replace(pipeline, codec=SilentCodec(pipeline.codec, mesh), decoder=None)


class SharedText:
    """Implements `types.TextEncoder`: the first process encodes, all get the result; the others load no weights."""

    def __init__(self, text: TextEncoder, mesh: Mesh) -> None:
        self.text, self.mesh = text, mesh
        self.length, self.width = text.length, text.width

    def complete(
        self,
        prompt: str,
        seed: int,
        picture: Tensor | None = None,
        *,
        before: str | None = None,
        seen: Tensor | None = None,
    ) -> str:
        return self.text.complete(prompt, seed, picture, before=before, seen=seen)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        return _shared(self.text.encode(prompts) if self.mesh.rank == 0 else None, self.mesh)

    def null(self, batch: int) -> Tensor:
        return _shared(self.text.null(batch) if self.mesh.rank == 0 else None, self.mesh)


class SharedCodec:
    """Implements `types.VideoCodec` in the first process: what it encodes, the others get too."""

    def __init__(self, codec: VideoCodec, mesh: Mesh) -> None:
        self.codec, self.mesh = codec, mesh
        self.geometry = codec.geometry

    def encode(self, video: Tensor) -> Tensor:
        return _shared(self.codec.encode(video), self.mesh)

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)

    def stream(self) -> DecodeStream:
        return self.codec.stream()


class SilentCodec:
    """Implements `types.VideoCodec` in the other processes: gets what the first encodes, decodes to no frames."""

    def __init__(self, codec: VideoCodec, mesh: Mesh) -> None:
        self.mesh = mesh
        self.geometry = codec.geometry

    def encode(self, video: Tensor) -> Tensor:
        return _shared(None, self.mesh)

    def decode(self, latents: Tensor) -> Tensor:
        """(B,F,C,h,w) -> (B,0,3,H,W)."""
        size = (side * self.geometry.spatial for side in latents.shape[-2:])
        return latents.new_empty(latents.shape[0], 0, 3, *size)

    def stream(self) -> DecodeStream:
        return self.decode


class CodecElsewhere:
    """Implements `types.VideoCodec` on a device of its own; what is encoded comes back to the network's device."""

    def __init__(self, codec: VideoCodec, device: torch.device, home: torch.device) -> None:
        self.codec = codec.to(device) if isinstance(codec, torch.nn.Module) else codec
        self.device, self.home = device, home
        self.geometry = codec.geometry

    def encode(self, video: Tensor) -> Tensor:
        return self.codec.encode(video.to(self.device)).to(self.home)

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents.to(self.device))

    def stream(self) -> DecodeStream:
        stream = self.codec.stream()
        return lambda latents: stream(latents.to(self.device))


def ahead(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The same parts, made in another thread up to one ahead of the reader.

    While the reader waits for pixels from one device, the thread has the next latents made on another. An error comes
    out where the part would have; if the reader stops early, so does the thread, after the part it is at.
    """
    made: queue.Queue[tuple[Tensor | None, BaseException | None]] = queue.Queue(maxsize=1)
    stopped = threading.Event()

    def put(part: Tensor | None, error: BaseException | None = None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                made.put((part, error), timeout=0.1)
                return

    def work() -> None:
        try:
            for part in parts:
                put(part)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # not swallowed: raised in the reader's thread
            put(None, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            part, error = made.get()
            if error is not None:
                raise error
            if part is None:
                return
            yield part
    finally:
        stopped.set()
        thread.join()


def _shared(tensor: Tensor | None, mesh: Mesh) -> Tensor:
    """The first process's tensor of up to 5 dimensions, in every process: float32, on its device."""
    shape = torch.zeros(6, dtype=torch.int64)  # how many dimensions, and which
    if tensor is not None:
        shape[0] = tensor.ndim
        shape[1 : 1 + tensor.ndim] = torch.tensor(tensor.shape)
    shape = shape.to(mesh.device)
    dist.broadcast(shape, 0)
    dims, *sides = shape.tolist()
    found = torch.empty(sides[:dims], device=mesh.device) if tensor is None else tensor.to(mesh.device).float()
    found = found.contiguous()
    dist.broadcast(found, 0)
    return found


def _existing(device: torch.device | str) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError:
        raise ValueError(f"decode_device must be such as cpu or cuda:1, got {device!r}") from None
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"decode_device {str(device)!r}: there are {count} GPUs here")
    return device
