"""What happens between two convolutions of the fast decoders, as one pass over memory.

A pass reads what a convolution left (its source), adds bias and residual, normalises, applies SiLU, and writes what
the next convolution wants (its sink), together with the two frames that a stream has to remember. Every function has
two backends: "torch", plain operations and the reference, and "triton", one kernel each (`codecs.triton_passes`).
Activations are channels-last. Arithmetic inside a pass is float32, storage is that of the tensors.

Sources, as stored -> frames (B,T,H,W,C):
    frames    (B,T,H,W,C)
    pairs     (B,T/2,H,W,2*C), two frames side by side
    winograd  four times (B,T/2,H,W,C), the products of F(2,3) over time
    stacked   (B,T,H,W,3*C), what each frame adds to the output two frames later, one later and its own
    phases    (B,T,H/2+1,W/2+1,4*C), the four output phases of a doubling followed by a 3x3 convolution
Sinks, frames (B,T,H,W,C) -> as stored:
    frames    (B,T,H,W,C)
    halo      (B,2+T,H,W,C), the two frames before in front
    taps      (B,T,H,W,3*C), each frame beside the two before it, oldest first
    winograd  (4,B,T/2,H,W,C), the four inputs of F(2,3) over time
    wide      (4,B,T/2,H,W+2,C), the same with a column of zeros on either side
    alone     (B,T,H,W,C), and remembered: for the first frame of a video, before which there is nothing
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Backend = Literal["torch", "triton"]
EPS = 1e-12


@dataclass(frozen=True)
class Source:
    """What a convolution left. bias (C,) float32; pending (B,2,H,W,C): sums begun by earlier calls, if stacked.

    data is the first of the four products if winograd, and `more` the others.
    """

    kind: Literal["frames", "pairs", "winograd", "stacked", "phases"]
    data: Tensor
    bias: Tensor | None = None
    pending: Tensor | None = None
    more: tuple[Tensor, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B,T,H,W,C) of the frames."""
        b, t, h, w, c = self.data.shape
        if self.kind == "winograd":
            return b, 2 * t, h, w, c
        if self.kind == "pairs":
            return b, 2 * t, h, w, c // 2
        if self.kind == "phases":
            return b, t, 2 * (h - 1), 2 * (w - 1), c // 4
        return b, t, h, w, c // 3 if self.kind == "stacked" else c


@dataclass(frozen=True)
class Sink:
    """What the next convolution wants. gamma (C,) float32: gain of norm and SiLU, None for neither.

    state (B,2,H,W,C): the last two frames of the stream, read and then replaced; unused by sink "frames".
    """

    kind: Literal["frames", "halo", "taps", "winograd", "alone", "wide"]
    gamma: Tensor | None = None
    state: Tensor | None = None

    def stored(self, shape: tuple[int, int, int, int, int]) -> tuple[int, ...]:
        """Shape as stored for frames (B,T,H,W,C)."""
        b, t, h, w, c = shape
        if self.kind == "winograd":
            return 4, b, t // 2, h, w, c
        if self.kind == "wide":
            return 4, b, t // 2, h, w + 2, c
        if self.kind == "taps":
            return b, t, h, w, 3 * c
        return b, t + 2 if self.kind == "halo" else t, h, w, c


def between(
    source: Source,
    sink: Sink | None,
    *,
    residual: Tensor | None = None,
    keep: bool = False,
    fresh: bool = False,
    backend: Backend = "torch",
) -> tuple[Tensor | None, Tensor | None]:
    """One pass. residual (B,T,H,W,C) is added before everything else -> (frames if `keep`, sink if any).

    fresh: a new video begins, what states and pending sums hold does not count.
    """
    if backend == "triton":
        from causalreel.codecs import triton_passes

        return triton_passes.between(source, sink, residual=residual, keep=keep, fresh=fresh)
    x = _read(source, fresh)
    if source.bias is not None:
        x = x + source.bias
    if residual is not None:
        x = x + residual.float()
    kept = x.to(source.data.dtype).contiguous() if keep else None
    return kept, None if sink is None else _write(sink, x, source.data.dtype, fresh)


def _read(source: Source, fresh: bool) -> Tensor:
    data = source.data.float()
    if source.kind == "pairs":
        return data.unflatten(-1, (2, -1)).movedim(-2, 2).flatten(1, 2)  # (B,T,H,W,C)
    if source.kind == "winograd":
        m0, (m1, m2, m3) = data, (part.float() for part in source.more)  # (B,T/2,H,W,C) each
        return torch.stack([m0 + m1 + m2, m1 - m2 - m3], 2).flatten(1, 2)
    if source.kind == "stacked":
        return _sum_stacked(data, source.pending, fresh)
    if source.kind == "phases":
        b, t, h, w, c = source.shape
        y = data.unflatten(-1, (2, 2, c))  # (B,T,h+1,w+1,2,2,C)
        rows = torch.stack([y[:, :, p : p + h // 2, :, p] for p in (0, 1)], 3)  # (B,T,h,2,w+1,2,C)
        both = torch.stack([rows[:, :, :, :, p : p + w // 2, p] for p in (0, 1)], 5)  # (B,T,h,2,w,2,C)
        return both.reshape(b, t, h, w, c)
    return data


def _sum_stacked(data: Tensor, pending: Tensor | None, fresh: bool) -> Tensor:
    assert pending is not None
    two_later, one_later, own = data.chunk(3, -1)  # (B,T,H,W,C) each
    begun = torch.zeros_like(pending) if fresh else pending
    total = F.pad(own, (0, 0, 0, 0, 0, 0, 0, 2))  # (B,T+2,H,W,C)
    total[:, 1:-1] += one_later
    total[:, 2:] += two_later
    total[:, :2] += begun.float()
    pending.copy_(total[:, -2:])
    return total[:, :-2]


def _write(sink: Sink, y: Tensor, dtype: torch.dtype, fresh: bool) -> Tensor:
    if sink.gamma is not None:
        y = F.silu(F.rms_norm(y, (y.shape[-1],), sink.gamma, eps=EPS))
    if sink.kind == "frames":
        return y.to(dtype).contiguous()
    assert sink.state is not None
    past = torch.zeros_like(sink.state) if fresh else sink.state
    padded = torch.cat([past.float(), y], 1)  # (B,2+T,H,W,C)
    sink.state.copy_(padded[:, -2:])
    if sink.kind == "halo":
        return padded.to(dtype)
    if sink.kind == "alone":
        return y.to(dtype).contiguous()
    if sink.kind == "taps":
        return torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], -1).to(dtype)
    d0, d1, d2, d3 = padded[:, :-2:2], padded[:, 1:-2:2], padded[:, 2::2], padded[:, 3::2]  # (B,T/2,H,W,C) each
    inputs = torch.stack([d0 - d2, d1 + d2, d2 - d1, d1 - d3]).to(dtype)
    return F.pad(inputs, (0, 0, 1, 1)) if sink.kind == "wide" else inputs


def gather_head(
    parts: Tensor,
    bias: Tensor,
    shape: tuple[int, int, int, int],
    *,
    times: int,
    pending: Tensor | None = None,
    fresh: bool = False,
    scale: float = 1.0,
    shift: float = 0.0,
    backend: Backend = "torch",
) -> Tensor:
    """Sum what every position adds to its neighbours: the end of a (times,3,3) convolution to few channels.

    parts (>= times*9*O, B*T*H*W), rows ordered (time, row, column, output), time oldest first; bias (O,) float32;
    shape (B,T,H,W); pending (B,2,O,H,W) float32: sums begun by earlier calls, if times is 3
    -> scale * sum + shift, clamped to [-1, 1], (B,T,O,H,W) float32.
    """
    if backend == "triton":
        from causalreel.codecs import triton_passes

        return triton_passes.gather_head(parts, bias, shape, pending=pending, fresh=fresh, scale=scale, shift=shift)
    (b, t, h, w), outputs = shape, bias.numel()
    g = parts[: times * 9 * outputs].float().view(times, 3, 3, outputs, b, t, h, w)
    g = F.pad(g, (1, 1, 1, 1))
    sums = sum(g[:, i, j, ..., i : i + h, j : j + w] for i in range(3) for j in range(3))
    assert isinstance(sums, Tensor)
    sums = sums.permute(0, 2, 3, 1, 4, 5)  # (times,B,T,O,H,W)
    total = sums[-1]
    if times == 3:
        assert pending is not None
        total = F.pad(total, (0, 0, 0, 0, 0, 0, 0, 2))  # (B,T+2,O,H,W)
        total[:, 1:-1] += sums[1]
        total[:, 2:] += sums[0]
        if not fresh:
            total[:, :2] += pending
        pending.copy_(total[:, -2:])
        total = total[:, :-2]
    return ((total + bias.view(-1, 1, 1)) * scale + shift).clamp(-1, 1)


def spread_phases(data: Tensor, times: int, *, rectify: bool, backend: Backend = "torch") -> Tensor:
    """data (B,T,h+1,w+1,4*times*C), channels ordered (row phase, column phase, frame, C) -> (B,T*times,2h,2w,C)."""
    if backend == "triton":
        from causalreel.codecs import triton_passes

        return triton_passes.spread_phases(data, times, rectify=rectify)
    frames = _read(Source("phases", data), False)  # (B,T,2h,2w,times*C)
    frames = frames.unflatten(-1, (times, -1)).movedim(-2, 2).flatten(1, 2)
    return (F.relu(frames) if rectify else frames).to(data.dtype).contiguous()


def phase_weights(weight: Tensor) -> Tensor:
    """A 3x3 kernel applied after a nearest-neighbour doubling, as a 2x2 kernel before it: (O,C,3,3) -> (4*O,C,2,2).

    An output row sees three rows of the doubled picture, which are copies of two rows: the weights of equal rows are
    summed. Output channels are ordered (row phase, column phase, O); phase p of row i is at row i + p of a
    convolution with padding 1. 4/9 of the arithmetic, and the doubled picture is never written.
    """
    first, middle, last = weight.unbind(2)  # (O,C,3) each
    rows = torch.stack([torch.stack([first, middle + last], 2), torch.stack([first + middle, last], 2)])  # (2,O,C,2,3)
    first, middle, last = rows.unbind(-1)
    both = torch.stack([torch.stack([first, middle + last], -1), torch.stack([first + middle, last], -1)], 1)
    return both.flatten(0, 2)  # (2,2,O,C,2,2) -> (4*O,C,2,2)


def winograd_weights(weight: Tensor) -> Tensor:
    """(O,C,3,k,k) -> the four kernels of F(2,3) over time, (4,O,C,k,k).

    Lavin and Gray (arXiv 1509.09308), section 4.1: two outputs from four products instead of six.
    """
    g0, g1, g2 = weight.unbind(2)
    return torch.stack([g0, (g0 + g1 + g2) / 2, (g0 - g1 + g2) / 2, g2])


def wide_weights(weight: Tensor) -> Tensor:
    """A 3x3 kernel over pixels as a 3x2 kernel over pairs of neighbours: (O,C,3,3) -> (2*O,2*C,3,2).

    Two outputs see four pixels of a row, which are two pairs if the row begins with a column of zeros. A third of the
    weights is 0; in return a convolution of few channels has twice as many.
    """
    first = F.pad(weight, (0, 1))  # (O,C,3,4): the output at the pair's first pixel
    both = torch.stack([first, first.roll(1, -1)])  # (2,O,C,3,4), as the last of four is 0
    return both.unflatten(-1, (2, 2)).permute(0, 1, 5, 2, 3, 4).flatten(0, 1).flatten(1, 2)
