"""A rollout from scratch: every layer's unrotated keys of all finished frames, read where a test says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.dit import sinusoid
from causalreel.nn.rope import rope_table, rotate
from causalreel.rollout import KeyedNoise
from causalreel.types import Conditioning

Past = dict[tuple[int, int], tuple[Tensor, Tensor]]
"""(frame, token) -> its key before rotation, and its value (B,N,D)."""


@dataclass(frozen=True)
class Read:
    """Keys that a chunk reads in one layer: (frame, token, position) of each, and positions of its own frames."""

    entries: list[tuple[int, int, int]]
    own: list[int]


def frames_at(frames: list[int], positions: list[int], own: list[int], tokens: int = 4) -> Read:
    """The same with whole frames."""
    return Read([(f, t, p) for f, p in zip(frames, positions, strict=True) for t in range(tokens)], own)


def turned(keys: Tensor, at: list[tuple[int, int]]) -> Tensor:
    """keys (B,L,N,D), of each its token and position, rotated."""
    tables = [rope_table((position,), 2, 2, keys.shape[-1], keys.device) for _, position in at]
    rows = [(table[0][token], table[1][token]) for table, (token, _) in zip(tables, at, strict=True)]
    cos, sin = (torch.stack([row[i] for row in rows]) for i in (0, 1))
    return rotate(keys, cos, sin)


@torch.no_grad()
def from_scratch(
    net: DiTDenoiser,
    given: Conditioning,
    noise: KeyedNoise,
    *,
    chunk: int,
    frames: int,
    sigmas: tuple[float, ...],
    read: Callable[[int, int], Read],
    remember: Callable[[Past, int], None] = lambda past, start: None,
    read_done: Callable[[int, int], Read] | None = None,
    listen: Callable[[int, int, Tensor], None] = lambda layer, start, queries: None,
) -> Tensor:
    """-> latents (B,F,C,4,4) of a chunked rollout; read(layer, start) says what the chunk that starts there sees, and
    read_done what it sees when it is read for the cache, if that is something else.

    remember: called after each commit with a block's keys and values and the next chunk's start, to make up some more.
    listen: called before it with the layer, the chunk's start and its rotated queries (B,L,N,D).
    """
    model, config, done = net.model, net.config, []
    past: list[Past] = [{} for _ in model.blocks]
    text = model.embed_text(given.text)

    def evaluate(x: Tensor, sigma: float, start: int, keep: bool) -> Tensor:
        time = model.time_embedding(sinusoid(torch.full(x.shape[:2], sigma), config.freq_dim).float())
        time6 = model.time_projection(time).unflatten(-1, (6, -1))
        y = model.tokens(x, {})
        for layer, block in enumerate(model.blocks):
            seen = (read_done or read)(layer, start) if keep else read(layer, start)
            own = [(token, position) for position in seen.own for token in range(4)]
            shift, scale, gate, shift2, scale2, gate2 = (block.modulation + time6).unbind(2)
            z = nn.functional.layer_norm(y, y.shape[-1:], eps=config.eps) * (1 + scale[:, :, None]) + shift[:, :, None]
            q, (k, v) = block.self_attn.query(z.flatten(1, 2)), block.self_attn.key_value(z.flatten(1, 2))
            before = [past[layer][frame, token] for frame, token, _ in seen.entries]
            keys = torch.cat([*(k[:, None] for k, _ in before), k], 1)
            values = torch.cat([*(v[:, None] for _, v in before), v], 1)
            at = [(token, position) for _, token, position in seen.entries] + own
            heads = [part.transpose(1, 2) for part in (turned(q, own), turned(keys, at), values)]
            found = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
            y = y + gate[:, :, None] * block.self_attn.o(found).view_as(y)
            query = block.cross_attn.query(block.norm3(y).flatten(1, 2)).transpose(1, 2)
            pair = [part.transpose(1, 2) for part in block.cross_attn.key_value(text)]
            found = nn.functional.scaled_dot_product_attention(query, *pair).transpose(1, 2).flatten(2)
            y = y + block.cross_attn.o(found).view_as(y)
            z = nn.functional.layer_norm(y, y.shape[-1:], eps=config.eps)
            y = y + gate2[:, :, None] * block.ffn(z * (1 + scale2[:, :, None]) + shift2[:, :, None])
            if keep:
                listen(layer, start, turned(q, own))
                names = [(start + frame, token) for frame in range(chunk) for token in range(4)]
                past[layer] |= {name: (k[:, i], v[:, i]) for i, name in enumerate(names)}
                remember(past[layer], start + chunk)
        return model.latents(y, time, 2, 2)

    for start in range(0, frames, chunk):
        x = noise.initial(start, chunk)
        for step, sigma in enumerate(sigmas):
            x = x - sigma * evaluate(x, sigma, start, False)
            if step + 1 < len(sigmas):
                x = (1 - sigmas[step + 1]) * x + sigmas[step + 1] * noise.renoise(start, chunk, step + 1)
        done.append(x)
        evaluate(x, 0.0, start, True)
    return torch.cat(done, 1)
