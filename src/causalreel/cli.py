"""The command `causalreel`: reads arguments, calls the package, prints. Nothing else in the package does any of it.

Each subcommand is a dataclass of its arguments and a function that imports what it needs. Known errors (ValueError,
OSError, a loss that is not finite, a missing optional package) become one line on standard error and exit status 2;
Ctrl-C is 130.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import tyro
from tyro.conf import Positional, arg, subcommand

from causalreel.parallel.mesh import Launch, launch

if TYPE_CHECKING:
    from torch import Tensor

    from causalreel.infer.pipeline import Pipeline
    from causalreel.infer.requests import Wanted
    from causalreel.parallel.mesh import Mesh
    from causalreel.serve.safety import Settings
    from causalreel.serve.session import Emitted, Session


# ------------------------------------------------------------------------------------------------------------ generate


@dataclass(frozen=True)
class Generate:
    """Make videos from prompts, for example "a large red circle moves right".

    One prompt is written to `output`; several go to output-0.mp4, output-1.mp4 ... or, if `output` is a directory or
    has no suffix, to 0.mp4, 1.mp4 ... in it.
    """

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="[PROMPT ...]")] = ()
    """What to show; the seed of each further prompt is one higher."""
    output: Annotated[Path, arg(aliases=["-o"])] = Path("out.mp4")
    """Video file (.mp4, .mkv, .mov, .gif), or a directory."""
    prompt_file: Path | None = None
    """Text file with one prompt a line, or .jsonl with {"prompt": ..., "image": ..., "seed": ...} a line, besides those
    on the command line."""
    model: str = "tiny"
    """Embedded model (tiny, tiny/frame-1step ...), released one (see `causalreel models`) or an export's folder."""
    weights: str | None = None
    """Released models: their weights' file or folder here, of any layout; "random" needs no file, for benchmarks."""
    which: str | None = None
    """Released models: top-level key of a .pt file, such as generator_ema; default: the one that the release means."""
    wan_dir: Path | None = None
    """Released models: folder with VAE, text encoder and tokenizer (Wan2.1_VAE.pth ...), and taew2_1.pth."""
    decoder: Literal["wan", "taehv"] = "wan"
    """Released models: the model's own VAE, or a tiny one, faster and less exact."""
    height: Annotated[int | None, arg(aliases=["--pixel-height"])] = None
    """Released models: height in pixels, a multiple of 16; default: the model's 480."""
    width: Annotated[int | None, arg(aliases=["--pixel-width"])] = None
    """Released models: width in pixels, a multiple of 16; default: the model's 832."""
    seed: int = 0
    """Seed of the first prompt."""
    frames: int | None = None
    """Pixel frames, 1 + 4 (n - 1); default: as many as a training clip. More streams on."""
    latent_frames: Annotated[int | None, arg(aliases=["--num-output-frames"])] = None
    """The same in latent frames: n."""
    blocks: Annotated[int | None, arg(aliases=["--total-blocks"])] = None
    """The same in chunks, those of a given picture or video counted too."""
    steps: int | None = None
    """Denoising steps per chunk; default: the model's."""
    chunk: int | None = None
    """Latent frames made together; default: the model's."""
    image: Path | None = None
    """Picture that the video starts with; or a folder of pictures, each with its prompt in a .txt of the same name."""
    video: Path | None = None
    """Video to continue; it becomes the beginning of the result."""
    fit: Literal["crop", "pad"] = "crop"
    """A picture or video of another shape keeps its aspect: cut to fill the frame, or set between black bars."""
    sheet: Path | None = None
    """Also write a picture (.png, .jpg) with a row of frames per prompt."""
    scale: int | None = None
    """Repeat each pixel so often, which keeps small videos sharp; default: 4 for videos below 128 pixels, else 1."""
    precision: Literal["eager", "bf16", "fp8"] = "bf16"
    """On a GPU: fused kernels in bfloat16; fp8 with e4m3 products, slightly other videos; eager the plain network."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one."""
    decode_device: str | None = None
    """Where latents become pixels, such as cuda:1, at the same time as the next are made; default: as `device`."""


def generate(args: Generate) -> int:
    """Under torchrun all processes make each video together; the first one alone decodes, writes and prints."""
    from causalreel.infer.distributed import processes

    with processes(args.device) as mesh:
        return _generate(args, mesh)


def _generate(args: Generate, mesh: Mesh | None) -> int:
    wanted = _wanted(args)
    from causalreel.data.video import (
        GIF_SUFFIX,
        PICTURE_SUFFIXES,
        VIDEO_SUFFIXES,
        check_target,
        contact_sheet,
        to_bytes,
        write_video,
    )
    from causalreel.infer.accelerate import accelerate
    from causalreel.infer.distributed import ahead, spread
    from causalreel.infer.models import load

    paths = _outputs(args.output, wanted)
    for path in paths:  # before the work and not after it; the writers check again
        check_target(path, (*VIDEO_SUFFIXES, GIF_SUFFIX), may_make_folder=True)
    if args.sheet is not None:
        check_target(args.sheet, PICTURE_SUFFIXES)
    device, gpus = (args.device, 1) if mesh is None else (mesh.device, mesh.size)
    how = _full_size(args)
    pipeline = load(args.model, steps=args.steps, chunk=args.chunk, device=device, gpus=gpus, **how)
    if args.precision == "fp8" or (args.precision == "bf16" and pipeline.device.type == "cuda"):
        pipeline = accelerate(pipeline, precision=args.precision, graphs=len(wanted) > 1)
    pipeline = spread(pipeline, mesh, decode_device=args.decode_device)
    prompts = [one.prompt for one in wanted]
    pipeline.text.encode(prompts)  # all of them are understood before the first is made
    frames, scale = _frames(args, pipeline), _scale(args, pipeline)
    shown: list[Tensor] = []
    for index, (one, path) in enumerate(zip(wanted, paths, strict=True)):
        clock = _Clock(path.name)
        seed = args.seed + index if one.seed is None else one.seed
        parts = pipeline.stream(one.prompt, frames=frames, seed=seed, prefix=_prefix(args, one.image, pipeline))
        if mesh is not None and mesh.rank > 0:
            collections.deque(parts, maxlen=0)  # its share of the work; there are no frames in them
            continue
        parts = parts if args.decode_device is None else ahead(parts)
        kept: list[Tensor] = []  # (t,H,W,3) uint8, for the sheet only: a long clip is not held in memory
        keep = (lambda frames, kept=kept: kept.append(to_bytes(frames))) if args.sheet else None
        path.parent.mkdir(exist_ok=True)
        write_video(path, clock.watch(parts, keep), pipeline.export.fps, scale=scale)
        print(f"{path}: {clock.summary()}", flush=True)
        if args.sheet is not None:
            shown.append(_joined(kept).permute(0, 3, 1, 2))
    if args.sheet is not None and shown:
        contact_sheet(shown, args.sheet, prompts, scale=max(1, scale // 2))
        print(args.sheet)
    return 0


class _Clock:
    """Passes frames on, counts and times them, and shows progress on a terminal."""

    def __init__(self, name: str) -> None:
        self.name, self.frames, self.first_s, self.start = name, 0, 0.0, time.perf_counter()

    def watch(self, parts: Iterator[Tensor], keep: Callable[[Tensor], None] | None) -> Iterator[Tensor]:
        """Parts (1,t,3,H,W) -> uint8 (t,3,H,W) on the CPU."""
        from causalreel.data.video import to_bytes

        is_terminal = sys.stderr.isatty()
        try:
            for part in parts:
                frames = to_bytes(part[0]).permute(0, 3, 1, 2)  # bytes before they leave the GPU
                self.first_s = self.first_s or time.perf_counter() - self.start
                self.frames += len(frames)
                if is_terminal:
                    sys.stderr.write(f"\r{self.name}: {self.frames} frames")
                    sys.stderr.flush()
                if keep is not None:
                    keep(frames)
                yield frames
        finally:
            if is_terminal:
                sys.stderr.write("\r\033[K")

    def summary(self) -> str:
        total = time.perf_counter() - self.start
        return (
            f"{self.frames} frames in {total:.2f} s, first frame after {self.first_s:.2f} s, "
            f"{self.frames / total:.1f} frames/s"
        )


def _wanted(args: Generate) -> list[Wanted]:
    """Every video that is asked for; the pictures are known to be pictures."""
    from causalreel.infer.inputs import read_picture
    from causalreel.infer.requests import Wanted, read_pairs, read_prompts

    if args.image is not None and args.video is not None:
        raise ValueError("--image and --video exclude each other")
    if sum(given is not None for given in (args.frames, args.latent_frames, args.blocks)) > 1:
        raise ValueError("--frames, --latent-frames and --blocks exclude each other")
    wanted = [Wanted(prompt) for prompt in args.prompts]
    wanted += read_prompts(args.prompt_file) if args.prompt_file is not None else []
    if args.image is not None and args.image.is_dir():
        if wanted:
            raise ValueError(f"{args.image} is a folder with prompts of its own; leave out the other prompts")
        wanted = read_pairs(args.image)
    if not wanted:
        raise ValueError("no prompt: give one on the command line or with --prompt-file")
    if (args.image or args.video) is not None and args.prompt_file and any(one.image for one in wanted):
        raise ValueError(f"{args.prompt_file} names pictures of its own; leave out --image and --video")
    for picture in dict.fromkeys(one.image or args.image for one in wanted):
        if picture is not None:
            read_picture(picture)
    return wanted


def _full_size(args: Generate | Bench | Stream | Serve) -> dict[str, Any]:
    """What `load` takes for released models."""
    names = ("weights", "which", "wan_dir", "decoder", "height", "width")
    cache = Path("~/.cache/causalreel/prompts").expanduser()  # embeddings of prompts, which take seconds to make
    return {name: getattr(args, name) for name in names} | {"prompt_cache": cache}


def _frames(args: Generate, pipeline: Pipeline) -> int | None:
    """Pixel frames of a clip, however they are asked for."""
    latent = args.latent_frames
    if args.blocks is not None:
        _at_least(1, blocks=args.blocks)
        if pipeline.sampling.chunk is None:
            raise ValueError(f"--blocks needs an autoregressive model; {pipeline.export.name} makes whole clips")
        latent = args.blocks * pipeline.sampling.chunk
    if latent is None:
        return args.frames
    _at_least(1, latent_frames=latent)
    return 1 + pipeline.codec.temporal_factor * (latent - 1)


def _scale(args: Generate, pipeline: Pipeline) -> int:
    return _pixel_scale(pipeline) if args.scale is None else args.scale


def _pixel_scale(pipeline: Pipeline) -> int:
    """How often each pixel is repeated, so that small videos can be seen."""
    return 4 if min(pipeline.size) < 128 else 1


def _outputs(output: Path, wanted: Sequence[Wanted]) -> list[Path]:
    """Where each of the wanted videos goes."""
    from causalreel.infer.requests import numbered

    names = numbered(wanted)
    if output.is_dir() or (len(wanted) > 1 and not output.suffix):
        return [output / f"{name}.mp4" for name in names]
    if len(wanted) == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{name}{output.suffix}") for name in names]


def _prefix(args: Generate, image: Path | None, pipeline: Pipeline) -> Tensor | None:
    """The frames (T,3,H,W) that a video starts with, if any."""
    from causalreel.infer.inputs import read_clip, read_picture

    if (picture := image or args.image) is not None:
        return read_picture(picture, pipeline.size, args.fit)
    if args.video is None:
        return None
    unit, factor = pipeline.sampling.chunk or 1, pipeline.codec.temporal_factor
    return read_clip(args.video, pipeline.size, unit=unit, factor=factor, how=args.fit)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(list(parts))


# -------------------------------------------------------------------------------------------------------------- stream


@dataclass(frozen=True)
class Stream:
    """Play an endless video whose prompt changes on the way, in a window or into a file or pipe.

    Without -o it plays in a window (space pauses, r restarts, q closes). With --stdin a typed line is the next prompt;
    /switch, /recompute or /fade and a prompt say how. /pause, /resume, /close, /step N, /restart SEED, /steps N and
    /fps N are the other commands.
    """

    prompt: Annotated[Positional[str], arg(metavar="[PROMPT]")] = "a large red circle moves right"
    """What to show first."""
    model: str = "tiny"
    """Embedded model (tiny, tiny/frame-1step ...), released one (see `causalreel models`) or an export's folder."""
    weights: str | None = None
    """Released models: their weights' file or folder here; "random" needs no file and no text encoder."""
    which: str | None = None
    """Released models: top-level key of a .pt file, such as generator_ema."""
    wan_dir: Path | None = None
    """Released models: folder with VAE, text encoder and tokenizer."""
    decoder: Literal["wan", "taehv"] = "wan"
    """Released models: the model's own VAE, or a tiny one."""
    height: int | None = None
    """Released models: height in pixels, a multiple of 16."""
    width: int | None = None
    """Released models: width in pixels, a multiple of 16."""
    seed: int = 0
    """Of the noise, and of what a prompt leaves open."""
    steps: int | None = None
    """Denoising steps per chunk; default: the model's."""
    chunk: int | None = None
    """Latent frames made together; default: the model's."""
    fps: float | None = None
    """Pixel frames per second; default: the model's."""
    frames: int | None = None
    """Pixel frames to make; default: no end."""
    seconds: float | None = None
    """The same in seconds."""
    image: Path | None = None
    """Picture that the video starts with."""
    policy: Literal["renew", "slide"] | None = None
    """How it goes on for ever: segments of the trained length, or a window that slides; default: the model's."""
    script: Path | None = None
    """Timed commands, a line each: "12.5 a blue square moves left", or JSON with time and command."""
    stdin: bool = False
    """Take commands typed while it plays."""
    output: Annotated[str | None, arg(aliases=["-o"])] = None
    """Video file (.mp4, .mkv, .mov, .gif), or - for standard output."""
    pipe: Literal["rgb24", "y4m", "mp4"] = "mp4"
    """What goes to standard output: bare pixels, YUV4MPEG2 or fragmented mp4."""
    realtime: bool = False
    """Write no faster than it is played."""
    record: Path | None = None
    """Also write the command log (.json), from which `Session.replay` makes the same video."""
    precision: Literal["eager", "bf16", "fp8"] = "bf16"
    """On a GPU: fused kernels in bfloat16; fp8 with e4m3 products, slightly other videos; eager the plain network."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one."""


def stream(args: Stream) -> int:
    if args.frames is not None and args.seconds is not None:
        raise ValueError("--frames and --seconds exclude each other")
    from causalreel.data.video import GIF_SUFFIX, VIDEO_SUFFIXES, check_target
    from causalreel.infer.accelerate import accelerate
    from causalreel.infer.inputs import read_picture
    from causalreel.infer.models import load
    from causalreel.serve.memory import steady_heap
    from causalreel.serve.play import Typed, Window, play, read_script
    from causalreel.serve.session import Options, Session

    if args.output not in (None, "-"):
        check_target(args.output, (*VIDEO_SUFFIXES, GIF_SUFFIX))
        if args.frames is None and args.seconds is None and not args.stdin:
            raise ValueError("a file needs an end: --frames, --seconds, or --stdin and /close")
    script = [] if args.script is None else read_script(args.script)
    pipeline = load(args.model, steps=args.steps, chunk=args.chunk, device=args.device, **_full_size(args))
    if args.precision == "fp8" or (args.precision == "bf16" and pipeline.device.type == "cuda"):
        pipeline = accelerate(pipeline, precision=args.precision)
    steady_heap()
    image = None if args.image is None else read_picture(args.image, pipeline.size)[0]
    options = Options(args.prompt, args.seed, args.steps, args.chunk, args.fps, image)
    session = Session(pipeline, options, policy=args.policy)
    frames = args.frames if args.seconds is None else max(1, round(args.seconds * session.fps))
    typed = Typed(sys.stdin) if args.stdin else None
    window = None if args.output is not None else Window(session, scale=_pixel_scale(pipeline))
    idle = None if window is None else window.idle
    try:
        how: dict[str, Any] = {"script": script, "typed": typed, "realtime": args.realtime, "idle": idle}
        chunks = play(session, frames=frames, say=_say, **how)
        if window is None:
            _write(args, session, chunks)
        else:
            for made in chunks:
                window.show(made)
    finally:
        if args.record is not None:
            import json

            from causalreel.weights.files import write_text

            write_text(args.record, json.dumps(session.record(), indent=1))
    return 0


def _write(args: Stream, session: Session, chunks: Iterator[Emitted]) -> None:
    from causalreel.serve.frames import pipe, write_mp4

    start, pictures = time.perf_counter(), (made.frames for made in chunks)
    if args.output is None or args.output == "-":
        count = pipe(sys.stdout.buffer, pictures, session.fps, args.pipe)
    else:
        count = write_mp4(args.output, pictures, session.fps, scale=_pixel_scale(session.pipeline))
    total = time.perf_counter() - start
    _say(f"{count} frames in {total:.2f} s, {count / total:.1f} frames/s")


def _say(line: str) -> None:
    print(f"causalreel: {line}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------- train


@dataclass(frozen=True)
class Train:
    """Run a recipe: a YAML file, or the name of one that comes with the package, such as tiny/causal_cd."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """File or name."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]")] = ()
    """key.key=value, laid upon the recipe."""
    dry_run: bool = False
    """Print the resolved recipe and check it without training."""


def train(args: Train) -> int:
    from causalreel import config
    from causalreel.train.run import describe, resolve, run

    recipe = resolve(args.recipe, args.overrides)
    if args.dry_run:
        print(config.dump(recipe))
        print(describe(recipe))
        return 0
    return run(recipe).exit_code


# -------------------------------------------------------------------------------------------------------------- encode


@dataclass(frozen=True)
class Encode:
    """Prepare training data: render clips of the tiny world, encode them into latent shards. Continues if stopped."""

    codec: Path
    """Folder of a trained codec."""
    out: Path
    """Folder for the shards."""
    clips: int = 32768
    """Clips to render."""
    seed: int = 0
    """Which training world."""
    batch: int = 256
    """Clips encoded at once."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one."""


def encode(args: Encode) -> int:
    _at_least(1, clips=args.clips, batch=args.batch)
    from causalreel.data.prepare import prepare
    from causalreel.infer.models import choose_device
    from causalreel.weights.export import codec_identity, load_codec

    device = choose_device(args.device)
    codec = load_codec(args.codec).to(device)
    folder = prepare(
        args.out,
        codec,
        codec_id=codec_identity(args.codec),
        clips=args.clips,
        seed=args.seed,
        batch=args.batch,
        device=device,
    )
    print(folder)
    return 0


# ---------------------------------------------------------------------------------------------------------------- eval


@dataclass(frozen=True)
class Evaluate:
    """Measure models: what their videos show against what the prompts say, beside real clips. Prints a table."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="[LABEL=]MODEL[@STEPS] ...")] = ("tiny",)
    """Embedded models or export folders; @1, @2 or @4 samples a few-step model with so many steps."""
    out: Path = Path("runs/eval")
    """Folder for the table, the scores of every clip and contact sheets."""
    clips: int = 512
    """Held-out prompts."""
    seed: int = 0
    """Which held-out prompts, and the noise."""
    batch: int | None = None
    """Clips generated together; default: 128 on a GPU, 8 on a CPU, whose caches are small."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one."""


def evaluate(args: Evaluate) -> int:
    _at_least(2, clips=args.clips)
    _at_least(1, batch=1 if args.batch is None else args.batch)
    from causalreel.eval.run import run, table

    rows = run(args.models, out=args.out, clips=args.clips, seed=args.seed, batch=args.batch, device=args.device)
    print(table(rows))
    return 0


# -------------------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class ExportModel:
    """Write a trained model again as a folder of its own: bfloat16 weights with its codec, name and scores."""

    model: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Export folder of a training run."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder to write."""
    name: str | None = None
    """What messages call it; default: as before."""
    codec: str | None = None
    """Codec that the config names, relative to OUT or an embedded family; default: a copy beside the model."""
    scores: Path | None = None
    """scores.json of an evaluation, recorded in the provenance."""
    label: str | None = None
    """Which of its models this is."""


def export_model(args: ExportModel) -> int:
    from causalreel.weights.export import re_export

    print(re_export(args.model, args.out, name=args.name, codec=args.codec, scores=args.scores, label=args.label))
    return 0


# ------------------------------------------------------------------------------------------------------------- convert


@dataclass(frozen=True)
class Convert:
    """Write a network's weights in another layout, every name and shape checked: Wan2.1's own names, the .pt of Causal
    and Self Forcing, diffusers' folder, ComfyUI's repack."""

    source: Annotated[Positional[Path], arg(metavar="SRC")]
    """File or folder, of any of these layouts."""
    target: Annotated[Positional[Path], arg(metavar="DST")]
    """official: a .pt; comfyui: a .safetensors; wan and diffusers: a .safetensors or a folder with config.json."""
    to: Literal["wan", "official", "diffusers", "comfyui"]
    """Layout of DST."""
    which: str | None = None
    """Top-level key of a .pt file, such as generator_ema; default: the first of generator, model, generator_ema."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the values; default: as they are."""
    heads: int | None = None
    """Attention heads, where neither SRC nor a known size tells them."""


def convert(args: Convert) -> int:
    from causalreel.weights.convert import convert as write

    print(write(args.source, args.target, args.to, which=args.which, dtype=args.dtype, heads=args.heads))
    return 0


# -------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Models:
    """List the models that have names: those that come with the package, and released ones at full size."""

    names: bool = False
    """Names only, one a line."""


def models(args: Models) -> int:
    from causalreel.infer.models import variants
    from causalreel.weights.registry import MODELS, table

    if args.names:
        print("\n".join([*variants(), *MODELS]))
        return 0
    print("come with the package: " + ", ".join(variants()) + "\n")
    print(table())
    return 0


# -------------------------------------------------------------------------------------------------------------- verify


@dataclass(frozen=True)
class Verify:
    """Compare this package with golden values recorded from released implementations."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Folder of golden files."""
    pattern: str | None = None
    """Only the cases whose name fits this glob, such as c4_*."""
    allow_uncovered: bool = False
    """Do not fail for cases that nothing here covers."""


def verify(args: Verify) -> int:
    from causalreel import verify as golden

    results = golden.run(args.folder, allow_uncovered=args.allow_uncovered, pattern=args.pattern)
    print(golden.format_table(results))
    return 0 if golden.passed(results, args.allow_uncovered) else 1


# --------------------------------------------------------------------------------------------------------------- bench


@dataclass(frozen=True)
class Bench:
    """Time a model: first pixels, chunk latency at the start and with a full window, throughput, memory."""

    model: str = "tiny"
    """Embedded model, released one (see `causalreel models`) or an export's folder."""
    weights: str | None = None
    """Released models: their weights' file or folder here; "random" needs no file and no text encoder."""
    which: str | None = None
    """Released models: top-level key of a .pt file, such as generator_ema."""
    wan_dir: Path | None = None
    """Released models: folder with VAE, text encoder and tokenizer."""
    decoder: Literal["wan", "taehv"] = "wan"
    """Released models: the model's own VAE, or a tiny one."""
    height: int | None = None
    """Released models: height in pixels, a multiple of 16."""
    width: int | None = None
    """Released models: width in pixels, a multiple of 16."""
    prompt: str = "a large red circle moves right"
    """What to show."""
    batch: int = 1
    """Clips made together."""
    frames: int | None = None
    """Pixel frames; default: as many as a training clip. More fill the window."""
    runs: int = 3
    """Measured runs of each kind, after one to warm up."""
    steps: int | None = None
    """Denoising steps per chunk; default: the model's."""
    chunk: int | None = None
    """Latent frames made together; default: the model's."""
    precision: Literal["eager", "bf16", "fp8"] = "bf16"
    """bf16: fused kernels, and recorded calls on a GPU; fp8: with e4m3 products; eager: the plain network."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Also write everything as JSON."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one."""


def bench(args: Bench) -> int:
    _at_least(1, batch=args.batch, runs=args.runs)
    import json

    from causalreel.infer.accelerate import accelerate
    from causalreel.infer.bench import measure
    from causalreel.infer.models import load
    from causalreel.weights.files import write_text

    pipeline = load(args.model, steps=args.steps, chunk=args.chunk, device=args.device, **_full_size(args))
    if args.precision != "eager":
        pipeline = accelerate(pipeline, precision=args.precision)
    speed = measure(pipeline, [args.prompt] * args.batch, frames=args.frames, runs=args.runs)
    print(speed.table())
    if args.output is not None:
        write_text(args.output, json.dumps(speed.record() | {"precision": args.precision}, indent=1))
    return 0


# --------------------------------------------------------------------------------------------------------------- serve


@dataclass(frozen=True)
class Serve:
    """Serve live sessions and videos over HTTP and WebSocket, with a page for browsers. Listens on loopback only,
    unless told otherwise."""

    model: str = "tiny"
    """Embedded model, released one (see `causalreel models`) or an export's folder."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all, which asks for a token and TLS in front."""
    port: int = 8000
    """Port to listen on; 0: a free one, printed."""
    token_file: Path | None = None
    """File whose content is the bearer token that everything but health asks for."""
    data: Path | None = None
    """Folder of the videos made in the background; default: they last as long as the server."""
    log_prompts: bool = True
    """Whether log lines may hold prompts."""
    allow_host: tuple[str, ...] = ()
    """Names that browsers may call this server by; default: those of loopback, or any on another address."""
    allow_origin: tuple[str, ...] = ()
    """Other sites whose pages may use this server, such as https://example.org."""
    replica: str | None = None
    """Of several servers behind one proxy: a name for this one, which ids of sessions and videos then bear."""
    webrtc: bool = False
    """Show sessions over WebRTC too."""
    webrtc_host: tuple[str, ...] = ()
    """Addresses of this machine for WebRTC's ports; default: the one listened on, or all of them."""
    ice_server: tuple[str, ...] = ()
    """STUN or TURN servers for WebRTC, such as stun:stun.example.org:3478; default: none is asked."""
    behind_proxy: bool = False
    """Believe a reverse proxy on this machine about who its clients are (X-Forwarded-For)."""
    max_sessions: int = 8
    """Live sessions and videos being made at a time; fewer where memory is short."""
    max_streams: int = 64
    """Connections that are served frames."""
    buffer_chunks: int = 2
    """Chunks made ahead of a viewer; a command waits behind them."""
    resume_chunks: int = 32
    """Chunks kept for a viewer who comes back."""
    idle_s: float = 60.0
    """A session that nobody reads or commands for so long is closed."""
    max_frames: int = 1000
    """Longest video made in the background, in pixel frames."""
    requests_per_s: float = 20.0
    """Requests and commands that a client may go on making."""
    weights: str | None = None
    """Released models: their weights' file or folder here; "random" needs no file, for measurements."""
    which: str | None = None
    """Released models: top-level key of a .pt file, such as generator_ema."""
    wan_dir: Path | None = None
    """Released models: folder with VAE, text encoder and tokenizer."""
    decoder: Literal["wan", "taehv"] = "wan"
    """Released models: the model's own VAE, or a tiny one, faster and less exact."""
    height: int | None = None
    """Released models: height in pixels, a multiple of 16."""
    width: int | None = None
    """Released models: width in pixels, a multiple of 16."""
    steps: int | None = None
    """Denoising steps per chunk of sessions that do not say; default: the model's."""
    chunk: int | None = None
    """Latent frames made together in sessions that do not say; default: the model's."""
    precision: Literal["eager", "bf16", "fp8"] = "bf16"
    """On a GPU: fused kernels in bfloat16; fp8 with e4m3 products, slightly other videos; eager the plain network."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one."""


LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def serve(args: Serve) -> int:
    from causalreel.serve.app import create_app
    from causalreel.serve.listen import listen, run
    from causalreel.serve.memory import steady_heap
    from causalreel.serve.scheduler import Limits, Scheduler

    steady_heap()
    settings = _serve_settings(args)
    limits = Limits(
        sessions=args.max_sessions,
        buffer_chunks=args.buffer_chunks,
        resume_chunks=args.resume_chunks,
        idle_s=args.idle_s,
    )
    with listen(args.host, args.port) as door:  # a port that is taken is found before a model is loaded
        from causalreel.infer.accelerate import accelerate
        from causalreel.infer.models import load

        pipeline = load(args.model, steps=args.steps, chunk=args.chunk, device=args.device, **_full_size(args))
        if args.precision == "fp8" or (args.precision == "bf16" and pipeline.device.type == "cuda"):
            pipeline = accelerate(pipeline, precision=args.precision)
        scheduler = Scheduler(pipeline, limits)
        app = create_app(scheduler, settings)
        host, port = door.getsockname()[:2]
        if args.webrtc:
            from causalreel.serve.webrtc import add_webrtc

            hosts = args.webrtc_host or (() if host in ("0.0.0.0", "::") else (host,))
            add_webrtc(app, hosts=hosts, ice_servers=args.ice_server)
        print(f"serving {pipeline.export.name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        if settings.token is None and args.host not in (*LOOPBACK, "::1"):
            logging.getLogger("causalreel").warning("whoever reaches this address may use it; see --token-file")
        scheduler.start()
        try:
            run(app, door, message_bytes=settings.body_bytes, behind_proxy=args.behind_proxy)
        finally:
            scheduler.close()
    return 0


def _serve_settings(args: Serve) -> Settings:
    from causalreel.serve.safety import Settings

    token = None
    if args.token_file is not None:
        token = args.token_file.read_text(encoding="utf-8").strip()
        if not token:
            raise ValueError(f"{args.token_file} holds no token")
    is_local = args.host in (*LOOPBACK, "::1")
    return Settings(
        token=token,
        hosts=args.allow_host or (LOOPBACK if is_local else ()),
        origins=args.allow_origin,
        data=args.data,
        replica=args.replica,
        log_prompts=args.log_prompts,
        video_frames=args.max_frames,
        streams=args.max_streams,
        requests_per_s=args.requests_per_s,
        burst=max(1, round(3 * args.requests_per_s)),
    )


# ------------------------------------------------------------------------------------------------------------ estimate


@dataclass(frozen=True)
class EstimateMemory:
    """Say how much memory of a GPU a video takes, before anything is loaded."""

    model: str = "wan-1.3b"
    """Size (wan-1.3b, wan-14b), embedded model or an export's folder."""
    height: int | None = None
    """Pixels; default: 480, or the model's."""
    width: int | None = None
    """Pixels; default: 832, or the model's."""
    frames: int | None = None
    """Pixel frames, 1 + 4 (n - 1); default: 81, or as many as a training clip. 0 is endless and needs a window."""
    window: int | None = None
    """Latent frames that a chunk sees; default: all, or the model's."""
    chunk: int | None = None
    """Latent frames made together; default: 3, or the model's."""
    batch: int = 1
    """Clips made together."""
    guided: bool | None = None
    """Classifier-free guidance; default: as the model."""
    dtype: Literal["bfloat16", "float16", "float32", "fp8"] | None = None
    """Type of the network's weights; default: bfloat16, or as the model is loaded."""
    decoder: Literal["wan", "taehv", "none"] = "wan"
    """What makes pixels; none: another GPU does. A model with a codec of its own uses that."""
    decoder_dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type of its weights; default: bfloat16, or as the model's own is loaded."""
    overlap: bool = False
    """Decode beside the network and not after it."""
    text_encoder: Literal["cpu", "gpu"] = "cpu"
    """Where UMT5-XXL stays."""
    gpus: int = 1
    """GPUs that share the stream; the numbers are of the first, which decodes."""
    precision: Literal["eager", "bf16", "fp8"] | None = None
    """As of `generate`: the plain network, or recorded calls and a fast decoder; default: bf16 for wan-1.3b and
    wan-14b, eager for models of one's own."""


def estimate_memory(args: EstimateMemory) -> int:
    from causalreel.infer.estimate import estimate, table
    from causalreel.infer.estimate_fast import estimate_fast
    from causalreel.infer.models import request_for

    options = dataclasses.asdict(args)
    precision = options.pop("precision") or ("bf16" if args.model.startswith("wan-") else "eager")
    request = request_for(options.pop("model"), **options)
    if precision != "eager":
        dtype = "fp8" if precision == "fp8" else "bfloat16"
        print(table(estimate_fast(dataclasses.replace(request, dtype=dtype, decoder_dtype="bfloat16"))))
    else:
        print(table(estimate(request)))
    return 0


# ---------------------------------------------------------------------------------------------------------------- main


Command: TypeAlias = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Stream, subcommand("stream")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Encode, subcommand("encode")]
    | Annotated[Evaluate, subcommand("eval")]
    | Annotated[ExportModel, subcommand("export")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Models, subcommand("models")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[EstimateMemory, subcommand("estimate")]
    | Annotated[Serve, subcommand("serve")]
)

COMMANDS: dict[type, Callable[[Any], int]] = {
    Generate: generate,
    Stream: stream,
    Train: train,
    Encode: encode,
    Evaluate: evaluate,
    ExportModel: export_model,
    Convert: convert,
    Models: models,
    Verify: verify,
    Bench: bench,
    EstimateMemory: estimate_memory,
    Serve: serve,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: the process's arguments), run the subcommand -> exit status.

    In one of several processes (torchrun) all but the first are silent, and an error in any of them ends all.
    """
    where = launch()
    if where is None:
        return _main(argv, None)
    from causalreel.parallel.crew import leave

    with contextlib.ExitStack() as silence:
        if where.rank > 0:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            status = _main(argv, where)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:  # not swallowed: the process says what it was and ends with it, and does not wait for others
            traceback.print_exc()
            status = 1
        return leave(where, status)


def _main(argv: Sequence[str] | None, where: Launch | None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv == ["--version"]:
        from causalreel import __version__

        print(f"causalreel {__version__}")
        return 0
    _log_to_stderr()
    try:
        with _together(where):
            args = tyro.cli(
                Command,  # type: ignore[arg-type] - a union is as good as a class to tyro
                prog="causalreel",
                description="Causal video diffusion: few-step autoregressive generation and its training.",
                args=argv,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
            if where is not None and not isinstance(args, Generate):
                raise ValueError("only generate runs in several processes; start this command without torchrun")
            return COMMANDS[type(args)](args)
    except KeyboardInterrupt:
        print("causalreel: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        _print_error(_one_line(error))
        return 2
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's own, which is not imported for this
            raise
        _print_error(f"{_one_line(error)} (causalreel estimate says what takes how much)")
        return 2


def _together(where: Launch | None) -> AbstractContextManager[None]:
    if where is None:
        return contextlib.nullcontext()
    from causalreel.parallel.crew import crew

    return crew(where, describe=_one_line, report=_print_error)


def _print_error(line: str) -> None:
    print(f"causalreel: error: {line}", file=sys.stderr, flush=True)


class _ToStderr(logging.Handler):
    """Log lines to what is standard error at the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def _log_to_stderr() -> None:
    logger = logging.getLogger("causalreel")
    if not logger.handlers:
        handler = _ToStderr()
        handler.setFormatter(logging.Formatter("causalreel: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _at_least(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
