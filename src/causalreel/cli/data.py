"""`causalreel import`: training data of other projects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from causalreel.cli.flags import ThreadFlag
from causalreel.cli.parsing import Range

ROWS = Range(1, 65536)

# --------------------------------------------------------------------------------------------------------------- import


@dataclass(frozen=True)
class Import(ThreadFlag):
    """Bring training data of other projects into prepared shards: LMDBs of Causal and Self Forcing, rCM's tars,
    FastVideo's parquet, musubi-tuner's cache, lists of prompts. Continues if stopped."""

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """File or folder."""
    out: Path
    """Folder for the shards."""
    model: str | None = None
    """Model whose text encoder embeds captions that have no embeddings (LMDBs, prompts), and the negative prompt:
    wan2.1-t2v-1.3b, tiny ...; without it, embeddings are those that SOURCE has."""
    wan_dir: Path | None = None
    """With --model: folder with text encoder, tokenizer and VAE; default: the hub's cache and the hub."""
    random_weights: bool = False
    """With --model: no files, every caption has the same random embedding; for trying."""
    trajectories: bool = False
    """LMDBs: whole trajectories, for causal ODE; default: the true clips at their ends."""
    shape: str | None = None
    """LMDBs that do not say it: shape of a row, such as 6,21,16,60,104."""
    frames: Annotated[int | None, Range(1, 10_000)] = None
    """Cut clips to their first latent frames; default: all, which must then be of one length."""
    dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Type of latents and text; default: that of the first row, which no other may need to be rounded to."""
    shard: Annotated[int, ROWS] = 64
    """Rows of a shard."""
    device: str | None = None
    """Where captions are embedded, such as cpu or cuda:1; default: CUDA if there is one."""


def import_data(args: Import) -> int:
    import torch

    from causalreel.infer.encoders import encoders
    from causalreel.infer.models import choose_device
    from causalreel.weights.sets import Wanted
    from causalreel.weights.sets.importing import Text, import_set

    args.set_threads([], args.device)
    text = None
    if args.model is not None:
        how = {"wan_dir": args.wan_dir, "is_random": args.random_weights, "device": choose_device(args.device)}
        made = encoders(args.model, **how)
        text = Text(made.load_text, made.text)
    elif args.wan_dir is not None or args.random_weights:
        raise ValueError("--wan-dir and --random-weights need --model, whose text encoder they are about")
    wanted = Wanted(
        args.trajectories, _shape(args.shape), args.frames, None if args.dtype is None else getattr(torch, args.dtype)
    )
    manifest = import_set(args.source, args.out, wanted=wanted, text=text, shard=args.shard)
    print(f"{args.out}: {manifest.clips} rows in {len(manifest.shards)} shards")
    return 0


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) not in (4, 5) or not all(part.strip().isdecimal() and 0 < int(part) < 1 << 20 for part in parts):
        raise ValueError(f"--shape must be 4 or 5 numbers such as 6,21,16,60,104, got {text[:60]!r}")
    return tuple(map(int, parts))
