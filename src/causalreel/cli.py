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
    from causalreel.parallel.mesh import Mesh


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
    """Text file with one prompt a line, besides those on the command line."""
    model: str = "tiny"
    """Embedded model (tiny, tiny/frame-1step ...) or an export's folder."""
    seed: int = 0
    """Seed of the first prompt."""
    frames: int | None = None
    """Pixel frames, 1 + 4 (n - 1); default: as many as a training clip. More streams on."""
    steps: int | None = None
    """Denoising steps per chunk; default: the model's."""
    chunk: int | None = None
    """Latent frames made together; default: the model's."""
    image: Path | None = None
    """Picture that the video starts with."""
    video: Path | None = None
    """Video to continue; it becomes the beginning of the result."""
    sheet: Path | None = None
    """Also write a picture (.png, .jpg) with a row of frames per prompt."""
    scale: int = 4
    """Repeat each pixel so often, which keeps small videos sharp."""
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
    prompts = [*args.prompts, *_prompts_from(args.prompt_file)]
    if not prompts:
        raise ValueError("no prompt: give one on the command line or with --prompt-file")
    if args.image is not None and args.video is not None:
        raise ValueError("--image and --video exclude each other")
    from causalreel.data.video import (
        GIF_SUFFIX,
        PICTURE_SUFFIXES,
        VIDEO_SUFFIXES,
        check_target,
        contact_sheet,
        to_bytes,
        write_video,
    )
    from causalreel.infer.distributed import ahead, spread
    from causalreel.infer.models import load

    paths = _outputs(args.output, len(prompts))
    for path in paths:  # before the work and not after it; the writers check again
        check_target(path, (*VIDEO_SUFFIXES, GIF_SUFFIX), may_make_folder=True)
    if args.sheet is not None:
        check_target(args.sheet, PICTURE_SUFFIXES)
    device, gpus = (args.device, 1) if mesh is None else (mesh.device, mesh.size)
    pipeline = load(args.model, steps=args.steps, chunk=args.chunk, device=device, gpus=gpus)
    pipeline = spread(pipeline, mesh, decode_device=args.decode_device)
    pipeline.text.encode(prompts)  # all of them are understood before the first is made
    prefix = _prefix(args, pipeline)
    shown: list[Tensor] = []
    for index, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        clock = _Clock(path.name)
        parts = pipeline.stream(prompt, frames=args.frames, seed=args.seed + index, prefix=prefix)
        if mesh is not None and mesh.rank > 0:
            collections.deque(parts, maxlen=0)  # its share of the work; there are no frames in them
            continue
        parts = parts if args.decode_device is None else ahead(parts)
        kept: list[Tensor] = []  # (t,H,W,3) uint8, for the sheet only: a long clip is not held in memory
        keep = (lambda frames, kept=kept: kept.append(to_bytes(frames))) if args.sheet else None
        path.parent.mkdir(exist_ok=True)
        write_video(path, clock.watch(parts, keep), pipeline.export.fps, scale=args.scale)
        print(f"{path}: {clock.summary()}", flush=True)
        if args.sheet is not None:
            shown.append(_joined(kept).permute(0, 3, 1, 2))
    if args.sheet is not None and shown:
        contact_sheet(shown, args.sheet, prompts, scale=max(1, args.scale // 2))
        print(args.sheet)
    return 0


class _Clock:
    """Passes frames on, counts and times them, and shows progress on a terminal."""

    def __init__(self, name: str) -> None:
        self.name, self.frames, self.first_s, self.start = name, 0, 0.0, time.perf_counter()

    def watch(self, parts: Iterator[Tensor], keep: Callable[[Tensor], None] | None) -> Iterator[Tensor]:
        """Parts (1,t,3,H,W) -> (t,3,H,W)."""
        is_terminal = sys.stderr.isatty()
        try:
            for part in parts:
                frames = part[0].cpu()
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


def _prompts_from(path: Path | None) -> list[str]:
    if path is None:
        return []
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line]


def _outputs(output: Path, count: int) -> list[Path]:
    """Where each of `count` videos goes."""
    if output.is_dir() or (count > 1 and not output.suffix):
        return [output / f"{i}.mp4" for i in range(count)]
    if count == 1:
        return [output]
    return [output.with_name(f"{output.stem}-{i}{output.suffix}") for i in range(count)]


def _prefix(args: Generate, pipeline: Pipeline) -> Tensor | None:
    """The frames (T,3,H,W) that the video starts with, if any."""
    from causalreel.infer.inputs import read_clip, read_picture

    if args.image is not None:
        return read_picture(args.image, pipeline.size)
    if args.video is None:
        return None
    unit, factor = pipeline.sampling.chunk or 1, pipeline.codec.temporal_factor
    return read_clip(args.video, pipeline.size, unit=unit, factor=factor)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat(list(parts))


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
    """Time a model: first-frame latency, chunk latency, throughput. Decoding is included."""

    model: str = "tiny"
    """Embedded model or an export's folder."""
    prompt: str = "a large red circle moves right"
    """What to show."""
    batch: int = 1
    """Clips made together."""
    frames: int | None = None
    """Pixel frames; default: as many as a training clip."""
    runs: int = 3
    """Measured runs, after one to warm up."""
    steps: int | None = None
    """Denoising steps per chunk; default: the model's."""
    chunk: int | None = None
    """Latent frames made together; default: the model's."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one."""


def bench(args: Bench) -> int:
    _at_least(1, batch=args.batch)
    from causalreel.infer.bench import measure
    from causalreel.infer.models import load

    pipeline = load(args.model, steps=args.steps, chunk=args.chunk, device=args.device)
    speed = measure(pipeline, [args.prompt] * args.batch, frames=args.frames, runs=args.runs)
    memory = "" if speed.peak_memory_mib is None else f", peak memory {speed.peak_memory_mib:.0f} MiB"
    print(
        f"{pipeline.export.name} on {pipeline.device}, {speed.batch} x {speed.frames} frames: "
        f"first-frame latency {speed.first_frame_latency_s:.3f} s, chunk latency {speed.chunk_latency_s:.3f} s, "
        f"throughput {speed.throughput:.1f} frames/s{memory}"
    )
    return 0


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


def estimate_memory(args: EstimateMemory) -> int:
    from causalreel.infer.estimate import estimate, table
    from causalreel.infer.models import request_for

    options = dataclasses.asdict(args)
    request = request_for(options.pop("model"), **options)
    print(table(estimate(request)))
    return 0


# ---------------------------------------------------------------------------------------------------------------- main


Command: TypeAlias = (
    Annotated[Generate, subcommand("generate")]
    | Annotated[Train, subcommand("train")]
    | Annotated[Encode, subcommand("encode")]
    | Annotated[Evaluate, subcommand("eval")]
    | Annotated[ExportModel, subcommand("export")]
    | Annotated[Verify, subcommand("verify")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[EstimateMemory, subcommand("estimate")]
)

COMMANDS: dict[type, Callable[[Any], int]] = {
    Generate: generate,
    Train: train,
    Encode: encode,
    Evaluate: evaluate,
    ExportModel: export_model,
    Verify: verify,
    Bench: bench,
    EstimateMemory: estimate_memory,
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
