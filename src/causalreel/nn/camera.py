"""Cameras and actions: heads that see through each frame's camera, and embeddings beside that of the noise level.

PRoPE as minWM trains it, with its names. Every head of self-attention gets a twin, whose queries, keys and values are
those before the rotation, moved by the frame's camera: logits depend on the relative pose of the two frames, and values
arrive in the reader's camera. The twins lie beside the rotated heads, so masks, caches, context policies and the
exchange between processes are the same for both, and a cache holds twice the heads.
PRoPE (arXiv 2507.10496); Causal Forcing++ (arXiv 2605.15141), section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causalreel.nn.dit import Attention, Block, DiT, SelfAttention, modulate
from causalreel.nn.linear import named_layers
from causalreel.nn.presets import ModelConfig
from causalreel.nn.rope import rotate
from causalreel.nn.texts import CallText
from causalreel.types import Conditioning

W2C, INTRINSICS, ACTIONS = "w2c", "intrinsics", "actions"
"""Fields: camera from world (B,F,4,4), normalised fx fy cx cy (B,F,4), and what is pressed (B,F,actions)."""

POSE_NUMBERS = 16
"""Of a pose and its intrinsics as one row: the upper three rows of w2c, and fx fy cx cy."""


@dataclass(frozen=True)
class Views:
    """What each frame's camera makes of the world, and back: P and its inverse (B,F,4,4), float32."""

    project: Tensor
    lift: Tensor

    @staticmethod
    def of(w2c: Tensor, intrinsics: Tensor) -> Views:
        """w2c (B,F,4,4), intrinsics (B,F,4) -> P = diag(fx, fy, 1, 1) w2c. Principal points are left out, as there."""
        w2c, intrinsics = w2c.float(), intrinsics.float()
        scale = torch.ones_like(w2c[..., 0])  # (B,F,4)
        scale = torch.cat([intrinsics[..., :2], scale[..., 2:]], dim=-1)
        rotation, place = w2c[..., :3, :3], w2c[..., :3, 3:]
        back = torch.cat([rotation.mT, -rotation.mT @ place], dim=-1)  # (B,F,3,4)
        back = torch.cat([back, w2c[..., 3:, :]], dim=-2)
        return Views(scale.unsqueeze(-1) * w2c, back / scale.unsqueeze(-2))


def seen(x: Tensor, matrices: Tensor) -> Tensor:
    """x (B,F*S,N,D), matrices (B,F,4,4) -> every group of 4 neighbouring channels times its frame's matrix."""
    grouped = torch.unflatten(torch.unflatten(x.float(), 1, (matrices.shape[1], -1)), -1, (-1, 4))  # (B,F,S,N,D/4,4)
    columns = matrices.float()[:, :, None, None, None].unbind(-1)  # four of (B,F,1,1,1,4)
    moved = grouped[..., 0:1] * columns[0]
    for number in (1, 2, 3):  # products of numbers, which autocast leaves in float32 and a compiler fuses
        moved = moved + grouped[..., number : number + 1] * columns[number]
    return moved.flatten(-2).flatten(1, 2).to(x.dtype)


class CameraAttention(Attention):
    """Projections with a second output product, `prope_o`, for the heads that see through cameras; it starts at 0."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.prope_o = nn.Linear(config.dim, config.dim)

    def output(self, attended: Tensor) -> Tensor:
        """attended (B,L,N,D), or (B,L,2N,D) with every head's twin behind it -> (B,L,E)."""
        if attended.shape[2] == self.heads:
            return super().output(attended)
        plain, camera = torch.unflatten(attended, 2, (-1, 2)).unbind(3)
        return self.o(plain.flatten(2)) + self.prope_o(camera.flatten(2))


class CameraBlock(Block):
    """A block whose self-attention has twin heads, in calls that come with cameras."""

    attention_type = CameraAttention

    def forward(self, x: Tensor, time: Tensor, text: CallText, attention: SelfAttention) -> Tensor:
        """x (B,F,S,E), time (B,F,6,E) -> x (B,F,S,E)."""
        views = attention.views
        if not isinstance(views, Views):
            return super().forward(x, time, text, attention)
        cos, sin, turns_keys = attention.cos, attention.sin, attention.reading.turns_keys
        q, k, v = self.before_cameras(x, time, cos, sin, views, turns_keys)
        attended = self.seen_again(attention(self.layer, q, k, v), views.project)
        return self.after_attention(x, attended, time, text.of_block(self.layer, self.cross_attn.key_value))

    def seen_again(self, attended: Tensor, project: Tensor) -> Tensor:
        """attended (B,L,2N,D) with the twins' values brought into the reader's camera, project (B,F,4,4)."""
        plain, camera = torch.unflatten(attended, 2, (-1, 2)).unbind(3)
        return _twins(plain, seen(camera, project))

    def before_cameras(
        self, x: Tensor, time: Tensor, cos: Tensor, sin: Tensor, views: Views, turns_keys: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `before_attention`, every head followed by its twin: (B,F*S,2N,D)."""
        shift, scale = (self.modulation + time).unbind(2)[:2]
        y = modulate(x, shift, scale, self.eps).flatten(1, 2)
        q, (k, v) = self.self_attn.query(y), self.self_attn.key_value(y)
        return (
            _twins(rotate(q, cos, sin), seen(q, views.project.mT)),
            _twins(rotate(k, cos, sin) if turns_keys else k, seen(k, views.lift)),
            _twins(v, seen(v, views.lift)),
        )


def _twins(plain: Tensor, camera: Tensor) -> Tensor:
    """Two of (B,L,N,D) -> (B,L,2N,D), head and twin in turn: so processes that share heads share both kinds."""
    return torch.stack([plain, camera], dim=3).flatten(2, 3)


class CameraDiT(DiT):
    """A DiT that takes cameras and actions, as its config says. Without them it is the DiT that it was made from."""

    def __init__(self, config: ModelConfig) -> None:
        if config.camera == "prope":
            self.block_type = CameraBlock
        self.fields = fields_of(config)
        super().__init__(config)
        if config.camera == "embedded":
            self.camera_embedding = _embedding(POSE_NUMBERS, config.dim)
        if config.actions:
            self.action_embedding = _embedding(config.actions, config.dim)
        begin_at_zero = (".prope_o", "camera_embedding.2", "action_embedding.2")
        for name, module in named_layers(self):
            if isinstance(module, nn.Linear) and name.endswith(begin_at_zero):
                nn.init.zeros_(module.weight)
                nn.init.zeros_(module.bias)

    def views(self, fields: Mapping[str, Tensor]) -> Views | None:
        """The cameras of a call, if heads see through them."""
        if self.config.camera != "prope" or W2C not in fields:
            return None
        return Views.of(fields[W2C], fields[INTRINSICS])

    def check_fields(self, conditioning: Conditioning, frames: int) -> None:
        """As DiT.check_fields; also ValueError for poses without intrinsics, and for other widths."""
        super().check_fields(conditioning, frames)
        fields = conditioning.fields
        if (W2C in fields) != (INTRINSICS in fields):
            raise ValueError("a camera is two fields, w2c and intrinsics; got one of them")
        for name, width in ((W2C, (4, 4)), (INTRINSICS, (4,)), (ACTIONS, (self.config.actions,))):
            if name in fields and tuple(fields[name].shape[2:]) != width:
                raise ValueError(
                    f"field {name!r} must be (B,F,{','.join(map(str, width))}), got {_shape(fields[name])}"
                )

    def embed_time(self, sigma: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """sigma (B,F) -> (B,F,E), with what cameras and actions add to it."""
        time = super().embed_time(sigma, fields)
        if self.config.camera == "embedded" and W2C in fields:
            row = torch.cat([fields[W2C][..., :3, :].flatten(-2), fields[INTRINSICS]], dim=-1)
            time = time + self.camera_embedding(row.to(self.device, self.dtype))
        if ACTIONS in fields:
            time = time + self.action_embedding(fields[ACTIONS].to(self.device, self.dtype))
        return time


def fields_of(config: ModelConfig) -> frozenset[str]:
    """The fields that the network of a config takes."""
    camera = {W2C, INTRINSICS} if config.camera != "none" else set[str]()
    return frozenset(camera | ({ACTIONS} if config.actions else set[str]()))


def network(config: ModelConfig) -> DiT:
    """The network of a config: a DiT, with what cameras and actions need where it takes them."""
    return CameraDiT(config) if config.camera != "none" or config.actions else DiT(config)


def _embedding(width: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))


def _shape(x: Tensor) -> str:
    return f"({','.join(map(str, x.shape))})"
