"""The diffusion transformer with Wan2.1's exact arithmetic and parameter names.

One network for bidirectional, diffusion-forcing, teacher-forcing and cached use: they differ in what frames read
(`masks.Reading`) and in the cache that is passed in. The noise level is per frame. It knows no batch of prompts, no
schedule. A block is a module with a forward, and the network calls nothing else of it: what shards, recomputes or
compiles a block goes around it, and what adapts a product goes around its linear layer (`nn.linear`).
Wan (arXiv 2503.20314), section 4; per-frame modulation as in CausVid (arXiv 2412.07772).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causalreel.nn.attention import attend
from causalreel.nn.kv_cache import FrameCache
from causalreel.nn.masks import Reading
from causalreel.nn.presets import ModelConfig
from causalreel.nn.rope import rope_table, rotate, rotate_keys
from causalreel.nn.static_cache import StaticCache
from causalreel.nn.texts import CallText, TextRun, read_text
from causalreel.nn.token_cache import TokenCache
from causalreel.types import Conditioning

TIME_SCALE = 1000.0
"""The network's time input is 1000 sigma; this factor exists nowhere else in the network."""


class TokenExchange(Protocol):
    """How several processes share one call: each holds some tokens of every frame, and all tokens of some heads.

    n processes; everything but self-attention is computed on tokens, self-attention on heads. See `parallel.ulysses`.
    """

    size: int
    """Processes that share the call."""

    def split(self, y: Tensor) -> Tensor:
        """Tokens of all (B,F,S,E) -> of this process (B,F,S/n,E)."""
        ...

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens of this process, all heads (B,F*S/n,N,D) -> all tokens, heads of this process (B,F*S,N/n,D)."""
        ...

    def to_tokens(self, x: Tensor, frames: int) -> Tensor:
        """The way back: (B,F*S,N/n,D) -> (B,F*S/n,N,D)."""
        ...

    def join(self, y: Tensor) -> Tensor:
        """Tokens of this process (B,F,S/n,C) -> of all (B,F,S,C), on every process."""
        ...


def _attend_text(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, None, 1, backend="sdpa")


@dataclass(frozen=True)
class SelfAttention:
    """How the tokens of one call attend to each other and to finished frames; the same in all blocks."""

    cos: Tensor
    """(L,1,D/2), with `sin` the rotation of this process's tokens."""
    sin: Tensor
    reading: Reading
    """Of [visible cache, own frames]."""
    cache: FrameCache | None
    size: tuple[int, int]
    """Rows and columns of a frame's tokens."""
    exchange: TokenExchange | None
    backend: str
    views: object | None = None
    """Cameras of the frames (`camera.Views`), for blocks that see through them: each head then has a twin behind it."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A block's q, k, v (B,L,N,D) of the call's tokens -> what its queries read (B,L,N,D).

        q is rotated; k too, unless keys are stored before their rotation (`Reading.turns_keys`).
        """
        frames, tokens = len(self.reading.positions), self.size[0] * self.size[1]
        if self.exchange is not None:
            q, k, v = self.exchange.to_heads(q, k, v, frames)
        if self.reading.by_token:
            assert isinstance(self.cache, TokenCache)
            if self.exchange is not None:
                raise ValueError(f"{self.cache.context} works on one device: it looks at what all heads hold")
            k, v = self.cache.read(layer, q, k, v, self.size, twins=self.views is not None)
        elif self.cache is not None:
            if isinstance(self.cache, StaticCache):
                self.cache.hear(layer, q)
            k, v = self.cache.extend(layer, k, v)
        if self.reading.groups:
            attended = self._by_groups(q, k, v, tokens)
        else:
            attended = attend(q, k, v, self.reading.mask, tokens, backend=self.backend)
        return attended if self.exchange is None else self.exchange.to_tokens(attended, frames)

    def _by_groups(self, q: Tensor, k: Tensor, v: Tensor, tokens: int) -> Tensor:
        """Every chunk over the keys it sees, rotated to where it sees them."""
        parts: list[Tensor] = []
        for group in self.reading.groups:
            rows = q[:, group.rows[0] * tokens : group.rows[1] * tokens]
            keys, values = (torch.unflatten(x, 1, (-1, tokens))[:, list(group.keys)].flatten(1, 2) for x in (k, v))
            table = rope_table(group.positions, *self.size, q.shape[-1], q.device)
            parts.append(
                attend(
                    rows,
                    rotate_keys(keys, table, twins=self.views is not None),
                    values,
                    None,
                    tokens,
                    backend=self.backend,
                )
            )
        return torch.cat(parts, dim=1)


def sinusoid(sigma: Tensor, width: int) -> Tensor:
    """sigma (B,F) -> (B,F,width) float64: cosines, then sines, of 1000 sigma at falling frequencies."""
    half = width // 2
    frequency = 10000.0 ** (-torch.arange(half, dtype=torch.float64, device=sigma.device) / half)
    angle = TIME_SCALE * sigma.double()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the full width, computed in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Projections and norms of one attention; what is attended is decided outside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads = config.heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = RMSNorm(dim, config.eps), RMSNorm(dim, config.eps)

    def query(self, x: Tensor) -> Tensor:
        """x (B,L,E) -> (B,L,N,D)."""
        return torch.unflatten(self.norm_q(self.q(x)), -1, (self.heads, -1))

    def key_value(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B,L,E) -> keys, values (B,L,N,D)."""
        return (
            torch.unflatten(self.norm_k(self.k(x)), -1, (self.heads, -1)),
            torch.unflatten(self.v(x), -1, (self.heads, -1)),
        )

    def output(self, attended: Tensor) -> Tensor:
        """attended (B,L,N,D) -> (B,L,E)."""
        return self.o(attended.flatten(2))


class Block(nn.Module):
    """Self-attention, cross-attention and feed-forward, the first and last modulated per frame."""

    attention_type = Attention
    """Of its self-attention."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim = config.dim
        self.layer, self.eps = layer, config.eps
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))
        self.self_attn = self.attention_type(config)
        self.norm3 = nn.LayerNorm(dim, eps=config.eps)
        self.cross_attn = Attention(config)
        self.ffn = nn.Sequential(
            nn.Linear(dim, config.ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(config.ffn_dim, dim)
        )

    def forward(self, x: Tensor, time: Tensor, text: CallText, attention: SelfAttention) -> Tensor:
        """x (B,F,S,E), time (B,F,6,E) -> x (B,F,S,E)."""
        attended = attention(
            self.layer, *self.before_attention(x, time, attention.cos, attention.sin, attention.reading.turns_keys)
        )
        return self.after_attention(x, attended, time, text.of_block(self.layer, self.cross_attn.key_value))

    def before_attention(
        self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor, turns_keys: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B,F,S,E), time (B,F,6,E) -> rotated q, rotated k (if `turns_keys`), and v, all (B,F*S,N,D)."""
        shift, scale = (self.modulation + time).unbind(2)[:2]
        y = modulate(x, shift, scale, self.eps).flatten(1, 2)  # (B,L,E)
        k, v = self.self_attn.key_value(y)
        return rotate(self.self_attn.query(y), cos, sin), rotate(k, cos, sin) if turns_keys else k, v

    def after_attention(self, x: Tensor, attended: Tensor, time: Tensor, text: Sequence[TextRun]) -> Tensor:
        """x (B,F,S,E), attended (B,F*S,N,D) -> x (B,F,S,E)."""
        _, _, gate1, shift2, scale2, gate2 = (self.modulation + time).unbind(2)  # (B,F,E) each
        x = x + gate1.unsqueeze(2) * self.self_attn.output(attended).view_as(x)
        q = self.cross_attn.query(self.norm3(x).flatten(1, 2))
        read = read_text(_attend_text, q, text)
        x = x + self.cross_attn.o(read.flatten(2)).view_as(x)
        return x + gate2.unsqueeze(2) * self.ffn(modulate(x, shift2, scale2, self.eps))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x (B,F,S,E), shift, scale (B,F,E) -> LayerNorm(x) (1 + scale) + shift."""
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)


class Head(nn.Module):
    """Modulated projection of tokens to latent patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / math.sqrt(config.dim))
        self.head = nn.Linear(config.dim, config.patch**2 * config.channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B,F,S,E), time (B,F,E) before its projection -> (B,F,S,patch*patch*C)."""
        shift, scale = (self.modulation + time.unsqueeze(2)).unbind(2)
        return self.head(modulate(x, shift, scale, self.eps))


class DiT(nn.Module):
    """x (B,F,C,H,W) at per-frame noise levels -> velocity.

    A network that takes fields of the conditioning names them and uses them in `time_levels` or `tokens`.
    """

    fields: frozenset[str] = frozenset()
    """Names of the fields it takes; others are refused."""

    block_type: type[Block] = Block

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.exchange: TokenExchange | None = None
        dim, patch = config.dim, (1, config.patch, config.patch)
        self.patch_embedding = nn.Conv3d(config.channels, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = cast(
            "Sequence[Block]", nn.ModuleList(self.block_type(config, layer) for layer in range(config.layers))
        )
        self.head = Head(config)
        self.initialise()

    def initialise(self) -> None:
        """Wan2.1's initialisation: Xavier, small embeddings, zero output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def embed_text(self, text: Tensor) -> Tensor:
        """text (B,K,text_dim), K at most text_length -> (B,text_length,E).

        The text is padded with zero rows to text_length, and these are attended like any other: there is no mask.
        """
        room = self.config.text_length - text.shape[1]
        if room < 0 or text.shape[2] != self.config.text_dim:
            raise ValueError(
                f"text must have at most {self.config.text_length} tokens of width {self.config.text_dim}, "
                f"got {tuple(text.shape[1:])}"
            )
        return self.text_embedding(F.pad(text, (0, 0, 0, room)).to(self.dtype))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        reading: Reading,
        cache: FrameCache | None = None,
        outputs: int | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """x (B,F,C,H,W), sigma (B,F) or (B,1) -> velocity (B,F,C,H,W), of the last `outputs` frames only if given.

        reading: what the frames read of [visible cache, own frames]. The input must have height and width that the
        patch divides.
        """
        patch = self.config.patch
        if x.shape[2] != self.config.channels or x.shape[3] % patch or x.shape[4] % patch:
            raise ValueError(
                f"latents must have {self.config.channels} channels and sides divisible by {patch}, "
                f"got {tuple(x.shape[2:])}"
            )
        height, width = x.shape[3] // patch, x.shape[4] // patch
        self.check_fields(conditioning, x.shape[1])
        text = CallText.of(conditioning, x.shape[1])
        text.embed(self.embed_text, len(self.blocks))
        time, time6 = self.time_levels(sigma, conditioning.fields)
        rotation = self.rotation(reading.positions, height, width, x.device)
        views = self.views(conditioning.fields)
        attention = SelfAttention(*rotation, reading, cache, (height, width), self.exchange, backend, views)
        y = self.tokens(x, conditioning.fields)
        for block in self.blocks:
            y = block(y, time6, text, attention)
        if outputs is not None:
            y, time = y[:, -outputs:], time[:, -outputs:] if time.shape[1] > 1 else time
        return self.latents(y, time, height, width)

    def check_fields(self, conditioning: Conditioning, frames: int) -> None:
        """ValueError for fields that the network does not take, and for those of other frames than the call's."""
        if unknown := conditioning.fields.keys() - self.fields:
            allowed = f"it takes {', '.join(sorted(self.fields))}" if self.fields else "it takes none"
            raise ValueError(f"the network has no use for the field {min(unknown)!r} of the conditioning; {allowed}")
        counts = {name: value.shape[1] for name, value in conditioning.fields.items()}
        if conditioning.prompts is not None:
            counts["prompts"] = len(conditioning.prompts)
        for name, count in counts.items():
            if count != frames:
                raise ValueError(f"{name!r} of the conditioning is for {count} frames, the call has {frames}")

    def time_levels(self, sigma: Tensor, fields: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """sigma (B,F) -> its embedding (B,F,E) for the head, and the blocks' modulation (B,F,6,E)."""
        time = self.embed_time(sigma, fields)
        return time, torch.unflatten(self.time_projection(time), -1, (6, -1))

    def embed_time(self, sigma: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """sigma (B,F) -> its embedding (B,F,E)."""
        return self.time_embedding(sinusoid(sigma, self.config.freq_dim).to(self.device, self.dtype))

    def views(self, fields: Mapping[str, Tensor]) -> object | None:
        """The cameras that heads see through, of a network that has such heads."""
        return None

    def rotation(
        self, positions: tuple[int, ...], height: int, width: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Absolute frame positions, token rows and columns -> cos, sin (L,1,D/2) of this process's tokens."""
        cos, sin = rope_table(positions, height, width, self.config.dim // self.config.heads, device)
        if self.exchange is None:
            return cos, sin
        shape = (1, len(positions), height * width, -1)
        cos, sin = (self.exchange.split(part.view(shape)).flatten(0, 2).unsqueeze(1) for part in (cos, sin))
        return cos, sin

    def tokens(self, x: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """Latents (B,F,C,H,W) -> tokens (B,F,S,E), those of this process."""
        y = self.patch_embedding(x.to(self.dtype).transpose(1, 2))  # (B,E,F,h,w)
        y = y.flatten(3).permute(0, 2, 3, 1)  # (B,F,S,E)
        return y if self.exchange is None else self.exchange.split(y)

    def latents(self, y: Tensor, time: Tensor, height: int, width: int) -> Tensor:
        """Tokens (B,F,S,E) after the last block, their noise level's embedding (B,F,E) -> velocity (B,F,C,H,W)."""
        return self.unpatch(self.head(y, time), height * self.config.patch, width * self.config.patch)

    def unpatch(self, y: Tensor, height: int, width: int) -> Tensor:
        """The head's output for this process's tokens (B,F,S,patch*patch*C) -> (B,F,C,height,width)."""
        patch = self.config.patch
        y = y if self.exchange is None else self.exchange.join(y)
        y = torch.unflatten(y, -1, (patch, patch, -1))
        y = torch.unflatten(y, 2, (height // patch, width // patch))  # (B,F,h,w,p,q,C)
        return y.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)  # (B,F,C,H,W)
