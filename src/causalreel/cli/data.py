"""`causalreel prepare` and `causalreel import`: training data from videos, and from other projects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from causalreel.cli.flags import ThreadFlag
from causalreel.cli.parsing import BATCH, FRAMES, SIDE, Range

ROWS = Range(1, 65536)

# -------------------------------------------------------------------------------------------------------------- prepare


@dataclass(frozen=True)
class Prepare(ThreadFlag):
    """Make training data of videos: cut clips, encode them and their captions, write shards with a manifest, a report
    of what was left out and a contact sheet. Continues if stopped; torchrun shares the work."""

    source: Annotated[Positional[Path | None], arg(metavar="SOURCE")] = None
    """Folder of videos with captions beside them (x.mp4, x.txt), .csv or .jsonl (path, caption, start, end), .tar."""
    out: Path | None = None
    """Folder for the shards."""
    check: Path | None = None
    """Instead of preparing: read this prepared folder whole and say what is wrong with it."""
    model: str = "tiny"
    """Whose codec and text encoder: wan2.1-t2v-1.3b or another released model, tiny, or an export's folder."""
    wan_dir: Path | None = None
    """Released models: folder with VAE, text encoder and tokenizer; default: the hub's cache and the hub."""
    random_weights: bool = False
    """Released models: random weights at full size, for trying; every caption then has the same embedding."""
    height: Annotated[int | None, SIDE] = None
    """Released models: height in pixels, a multiple of 16; default: the model's 480."""
    width: Annotated[int | None, SIDE] = None
    """Released models: width in pixels, a multiple of 16; default: the model's 832."""
    frames: Annotated[int | None, FRAMES] = None
    """Pixel frames of a clip, 1 + 4 n; default: as many as the model was trained with."""
    fps: Annotated[float | None, Range(0.1, 1000)] = None
    """Frames in a second that are taken of a video; default: the model's 16."""
    fit: Literal["crop", "pad"] = "crop"
    """Videos of another shape: cropped around the centre, or between black bars."""
    stride: Annotated[int | None, Range(1, 1_000_000)] = None
    """Frames from one clip's start to the next one's; default: clips follow each other."""
    clips: Annotated[int | None, Range(1, 1_000_000)] = None
    """Most clips of one video, the first ones; default: all."""
    upscale: bool = False
    """Take videos that are smaller than a clip, too."""
    scenes: bool = False
    """Find cuts between scenes, over which no clip goes (pip install 'causalreel[data]')."""
    motion: Annotated[float, Range(0, 255)] = 0.5
    """Leave out clips whose frames differ by less than this, of 255, from one to the next."""
    brightness: Annotated[float, Range(0, 255)] = 8.0
    """Leave out clips that are darker than this on average, of 255."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the latents."""
    batch: Annotated[int, BATCH] = 1
    """Clips of one video that are encoded at once."""
    shard: Annotated[int, ROWS] = 64
    """Clips of a shard, at most."""
    group: Annotated[int, ROWS] = 16
    """Videos that a process takes at a time."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one, under torchrun each process its own."""


def prepare(args: Prepare) -> int:
    if args.check is not None:
        if args.source is not None or args.out is not None:
            raise ValueError("--check reads a prepared folder: give neither SOURCE nor --out with it")
        return _check(args.check)
    if args.source is None or args.out is None:
        raise ValueError("prepare needs SOURCE and --out (or --check with a prepared folder)")
    import torch

    from causalreel.data.clips import Cutting
    from causalreel.data.groups import Models, Plan, Share
    from causalreel.data.listing import items_of
    from causalreel.data.videos import prepare_videos
    from causalreel.infer.encoders import encoders
    from causalreel.infer.models import choose_device
    from causalreel.parallel.mesh import device_of, launch

    where = launch()
    share = Share() if where is None else Share(where.rank, where.size)
    device = choose_device(args.device) if where is None else device_of(where, args.device)
    args.set_threads([], device)
    sizes: dict[str, Any] = {"height": args.height, "width": args.width, "wan_dir": args.wan_dir}
    made = encoders(args.model, **sizes, is_random=args.random_weights, device=device)
    height, width = made.geometry.size_of(made.export.latent)
    frames = made.geometry.frames_of(made.export.frames) if args.frames is None else args.frames
    made.geometry.latents_of(frames, name="--frames: a clip")
    cutting = Cutting(
        frames=frames,
        fps=made.export.fps if args.fps is None else args.fps,
        height=height,
        width=width,
        fit=args.fit,
        stride=args.stride,
        most=args.clips,
        upscale=args.upscale,
        motion=args.motion,
        brightness=args.brightness,
        scenes=args.scenes,
    )
    models = Models(made.load_codec, made.load_text, made.codec, made.text, device)
    plan = Plan(cutting, models, getattr(torch, args.dtype), args.batch, args.shard, args.group)
    manifest = prepare_videos(str(args.source), items_of(args.source), args.out, plan, share)
    if manifest is not None:
        left = sum(manifest.statistics["left out"].values())
        told = f"{args.out}: {manifest.clips} clips in {len(manifest.shards)} shards"
        print(f"{told}; {left} left out (report.csv)" if left else told)
    return 0


def _check(folder: Path) -> int:
    from causalreel.data.checking import check

    found = check(folder)
    shape = "x".join(map(str, found.shape)) or "no latents"
    print(f"{folder}: {found.clips} clips of {shape} in {found.shards} shards, {found.tokens} tokens of text")
    if told := found.moments.told():
        mean, std = ([f"{edge(told[name]):.3f}" for edge in (min, max)] for name in ("mean", "std"))
        print(f"mean of channels {' to '.join(mean)}, deviation {' to '.join(std)}")
    for line in found.warnings:
        print(f"look: {line}")
    for line in found.problems:
        print(f"wrong: {line}")
    if found.problems:
        raise ValueError(f"{folder}: {len(found.problems)} problems, the first: {found.problems[0]}")
    return 0


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
