"""What the FlashDreams benchmark computes and how: sizes, rows of the table, options. No torch, no peer."""

from __future__ import annotations

from dataclasses import dataclass, field

VERSION = "0.1.0"
"""The release this driver was written against."""


@dataclass(frozen=True)
class Work:
    """What is computed: the defaults are Wan2.1-T2V-1.3B at 480x832."""

    frames: int = 21
    """Latent frames of one rollout."""
    height: int = 60
    """Latent height."""
    width: int = 104
    """Latent width."""
    network: dict[str, int] = field(default_factory=dict)
    """Sizes that differ from the 1.3B network."""
    vae: dict[str, int] = field(default_factory=dict)
    """Sizes that differ from the Wan VAE."""
    text: tuple[int, int] = (512, 4096)
    """Text tokens and their width."""

    @property
    def pixel_frames(self) -> int:
        return 4 * self.frames - 3


@dataclass(frozen=True)
class Setting:
    """One row of the table: a generator with its step lists, or a decoder (no steps)."""

    name: str
    group: str
    """Settings of one group share a process and what it has compiled."""
    chunk: int
    """Latent frames per block."""
    first: tuple[int, ...] = ()
    """Unshifted steps of the first block."""
    rest: tuple[int, ...] = ()
    """Unshifted steps of every other block."""
    decoder: str = ""
    """`wan` or `taehv`."""


FOUR, TWO, ONE = (1000, 750, 500, 250), (1000, 500), (1000,)
SETTINGS = {
    row.name: row
    for row in (
        Setting("vae-by1", "vae-by1", 1, decoder="wan"),
        Setting("vae-by3", "vae-by3", 3, decoder="wan"),
        Setting("chunkwise-4step", "chunkwise", 3, FOUR, FOUR),
        Setting("taehv-by3", "taehv-by3", 3, decoder="taehv"),
        Setting("taehv-by1", "taehv-by1", 1, decoder="taehv"),
        Setting("framewise-2step", "framewise", 1, FOUR, TWO),
        Setting("framewise-1step", "framewise", 1, FOUR, ONE),
        Setting("framewise-4step", "framewise", 1, FOUR, FOUR),
    )
}
DEFAULT_SETTINGS = tuple(name for name in SETTINGS if name not in ("vae-by3", "taehv-by1"))


@dataclass(frozen=True)
class Options:
    """How it is run."""

    compiled: bool = True
    graph_breaks: str = "auto"
    """`keep` (the package as shipped), `remove`, or `auto`: whichever was measured faster, removed if frame-wise."""
    compile_mode: str = ""
    """A torch.compile mode in place of the package's own; empty keeps its own."""
    repeats: int = 3
    warmup: int = 2
    device: str = "cuda"

    def removes_breaks(self, chunk: int) -> bool:
        """Whether the KV cache's torch.sym_min and sym_max give way to min and max."""
        return self.compiled and (self.graph_breaks == "remove" or (self.graph_breaks == "auto" and chunk == 1))
