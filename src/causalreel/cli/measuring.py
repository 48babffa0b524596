"""`causalreel bench`, `estimate`, `eval` and `verify`: how fast, how large, how good, how exact."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from causalreel.cli.flags import MannerFlags, Precision, ThreadFlag
from causalreel.cli.parsing import BATCH, CHUNK, FRAMES, LORA, SEED, SIDE, Range

# ---------------------------------------------------------------------------------------------------------------- bench


@dataclass(frozen=True)
class Bench(MannerFlags):
    """Time a model: first pixels, chunk latency at the start and with a full window, throughput, memory."""

    prompt: str | None = None
    """What to show; default: the model's first example."""
    batch: Annotated[int, BATCH] = 1
    """Clips made together."""
    frames: Annotated[int | None, FRAMES] = None
    """Pixel frames; default: as many as a training clip. More fill the window."""
    runs: Annotated[int, Range(1, 100_000)] = 3
    """Measured runs of each kind, after one to warm up."""
    output: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Also write everything as JSON."""


def bench(args: Bench) -> int:
    import json

    from causalreel.data.video import check_target
    from causalreel.files import write_text
    from causalreel.infer.bench import measure
    from causalreel.infer.live import first_prompt

    if args.output is not None:
        check_target(args.output, (args.output.suffix.lower(),))  # before minutes of measuring
    pipeline = args.load()
    prompt = first_prompt(pipeline.export) if args.prompt is None else args.prompt
    speed = measure(pipeline, [prompt] * args.batch, frames=args.frames, runs=args.runs)
    print(speed.table())
    if args.output is not None:
        write_text(
            args.output, json.dumps(speed.record() | {"precision": args.precision_on(pipeline.device)}, indent=1)
        )
    return 0


# ------------------------------------------------------------------------------------------------------------- estimate


@dataclass(frozen=True)
class EstimateMemory:
    """Say how much memory of a GPU a video takes, before anything is loaded."""

    model: str = "wan-1.3b"
    """Released or embedded model, an export's folder, or a size (wan-1.3b, wan-14b)."""
    height: Annotated[int | None, SIDE] = None
    """Released models: height in pixels, for Wan2.1 a multiple of 16; default: the model's."""
    width: Annotated[int | None, SIDE] = None
    """Released models: width in pixels, for Wan2.1 a multiple of 16; default: the model's."""
    frames: Annotated[int | None, Range(0, 1_000_000)] = None
    """Pixel frames, 1 + 4 (n - 1); default: as many as a training clip. 0 is endless."""
    steps: Annotated[int | None, Range(1, 1000)] = None
    """Denoising steps per chunk; default: the model's."""
    chunk: Annotated[int | None, CHUNK] = None
    """Latent frames made together; default: the model's."""
    window: Annotated[int | None, FRAMES] = None
    """Latent frames that a chunk sees; default: the model's."""
    batch: Annotated[int, BATCH] = 1
    """Clips made together."""
    guided: bool | None = None
    """Classifier-free guidance; default: as the model."""
    precision: Precision | None = None
    """As of `generate`: bf16, fp8 or fp8-attention with recorded calls and a fast decoder, or eager; default: bf16, or
    eager where `dtype` is given."""
    dtype: Literal["bfloat16", "float16", "float32"] | None = None
    """Type of weights and arithmetic where the precision is eager; default: bfloat16, or float32 for models of one's
    own."""
    decoder: str | None = None
    """As of `generate`; none: another GPU makes the pixels."""
    text_encoder: Literal["cpu", "gpu"] | None = None
    """Where UMT5-XXL stays; default: cpu. Released models only."""
    gpus: Annotated[int, Range(1, 1024)] = 1
    """GPUs that share the stream; the numbers are of the first, which decodes."""
    lora: Annotated[tuple[str, ...], LORA] = ()
    """As of `generate`: checked for whether it fits. Merged into the weights, it takes no memory of the GPU."""


def estimate_memory(args: EstimateMemory) -> int:
    from causalreel.infer.estimate import estimate
    from causalreel.infer.loras import find_loras
    from causalreel.infer.models import request_for

    options = dataclasses.asdict(args)
    form = options.pop("precision") or ("bf16" if args.dtype is None else "eager")
    if form != "eager" and args.dtype not in (None, "bfloat16"):
        raise ValueError(f"dtype {args.dtype} is for --precision eager; {form} computes in bfloat16")
    loras = options.pop("lora")
    request = request_for(options.pop("model"), form=form, **options)
    find_loras(loras, request.model)
    print(estimate(request).table())
    return 0


# ----------------------------------------------------------------------------------------------------------------- eval


@dataclass(frozen=True)
class Evaluate(ThreadFlag):
    """Measure models: what their videos show against what the prompts say, beside real clips. Prints a table."""

    models: Annotated[Positional[tuple[str, ...]], arg(metavar="[LABEL=]MODEL[@STEPS] ...")] = ()
    """Embedded models or export folders; @1, @2 or @4 samples a few-step model with so many steps. Default: tiny, where
    no `videos` are named."""
    out: Path = Path("runs/eval")
    """Folder for the table, the scores of every clip and contact sheets."""
    clips: Annotated[int | None, Range(2, 1_000_000)] = None
    """Held-out prompts; default: 512, 256 with --control, or 32 for long videos."""
    seed: Annotated[int, SEED] = 0
    """Which held-out prompts, and the noise."""
    batch: Annotated[int | None, BATCH] = None
    """Clips generated together; default: 128 on a GPU, 8 on a CPU, whose caches are small."""
    control: bool = False
    """Models of the walkable world: whether they go where cameras and keys say, and still know what they have seen."""
    steps: Annotated[int, Range(1, 1000)] = 24
    """With --control: denoising steps of many-step models."""
    guidance: Annotated[float | None, Range(0.1, 100)] = None
    """Guidance of many-step models; default: 1.5 with --control, their own with --changes."""
    metrics: Path | None = None
    """Python file with metrics of your own, see docs/evaluation.md; their columns join the table."""
    changes: Annotated[int | None, Range(1, 100_000)] = None
    """Instead of clips: play so many live videos that are told another prompt, and judge the frames around it; of a
    model that is not autoregressive, clips."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one."""
    long: bool = False
    """Measure drift instead: long clips, or video files, window by window; see docs/long-video.md."""
    lengths: Annotated[int, Range(1, 100_000)] = 10
    """Long: how many training lengths a clip has."""
    policies: tuple[str, ...] = ()
    """Long: context policies to run every model under, as of `generate --policy`, or renew; default: its own."""
    videos: tuple[Path, ...] = ()
    """Long: video files to be measured too: light, colour, sharpness and motion of their windows. With --control:
    folders of finished videos with a manifest.json, measured where their trajectories come back."""
    dialect: str | None = None
    """Of the trajectories in these manifests: minwm, worldplay, lingbot, sana, sana-2 or letters."""
    window: Annotated[float, Range(0.2, 3600)] = 3.0
    """Long: seconds of a window of a video file."""
    vbench: Path | None = None
    """Long: instead of measuring, make the videos of `prompt-file` for VBench-Long in this folder, which must be empty
    or hold some of them already; one model."""
    prompt_file: Path | None = None
    """Long: prompts for `vbench`, one a line, as VBench lists them."""
    samples: Annotated[int, Range(1, 100)] = 5
    """Long: videos of each prompt for `vbench`, with seeds that count up."""
    vbench_results: Path | None = None
    """Instead of measuring: read the *_eval_results.json that VBench or VBench-I2V has left in this folder, and give
    Quality, Semantic or I2V, and Total; see docs/evaluation.md."""


MODES = ("control", "changes", "long", "vbench_results")
"""Flags of `eval` that choose what is measured; without any it is clips."""


def evaluate(args: Evaluate) -> int:
    from causalreel.eval import streams
    from causalreel.eval.run import parse_model, run, table
    from causalreel.infer.models import network_of

    modes = [_flag(name) for name in MODES if getattr(args, name) not in (None, False)]
    if len(modes) > 1:
        raise ValueError(f"{' and '.join(modes)} measure different things: give one of them")
    if args.vbench_results is not None:
        return _evaluate_vbench(args, args.vbench_results)
    models = args.models or (() if args.videos else ("tiny",))
    args.set_threads([network_of(parse_model(spec)[1]) for spec in models], args.device)
    if args.guidance is not None and (args.long or not (args.control or args.changes)):
        raise ValueError("--guidance is for --control and --changes")
    if args.long:
        return _evaluate_long(args, models)
    for name in ("policies", "vbench", "prompt_file", *(() if args.control else ("videos", "dialect"))):
        if getattr(args, name):
            raise ValueError(f"{_flag(name)} is for --long")
    if args.control:
        return _evaluate_control(args, models)
    if args.changes is not None:
        how = {"seed": args.seed, "guidance": args.guidance, "device": args.device}
        rows = streams.run(models, out=args.out, streams=args.changes, **how)
        print(streams.table(rows))
        return 0
    how = {"seed": args.seed, "batch": args.batch, "device": args.device, "metrics": args.metrics}
    rows = run(models, out=args.out, clips=args.clips or 512, **how)
    print(table(rows))
    return 0


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _evaluate_vbench(args: Evaluate, folder: Path) -> int:
    from causalreel.eval.vbench_scores import run, table

    for one in dataclasses.fields(args):
        if one.name not in ("vbench_results", "out") and getattr(args, one.name) != one.default:
            told = "models" if one.name == "models" else _flag(one.name)
            raise ValueError(f"--vbench-results only reads what VBench has measured: leave out {told}")
    print(table(*run(folder, out=args.out)))
    return 0


def _evaluate_control(args: Evaluate, models: tuple[str, ...]) -> int:
    from causalreel.eval.walking import run, table

    if args.metrics is not None:
        raise ValueError("--metrics is for clips with captions alone; with --control leave it out")
    if args.videos:
        return _evaluate_revisits(args)
    how = {
        "steps": args.steps,
        "guidance": 1.5 if args.guidance is None else args.guidance,
        "seed": args.seed,
        "batch": args.batch,
        "device": args.device,
    }
    print(table(run(models, out=args.out, clips=args.clips or 256, **how)))
    return 0


def _evaluate_revisits(args: Evaluate) -> int:
    from causalreel.eval.revisits import measure
    from causalreel.eval.statistics import summarise

    if args.dialect is None:
        raise ValueError("--videos with --control needs --dialect: the same trajectory means other motions elsewhere")
    if args.models:
        raise ValueError("models and --videos are measured apart with --control: give one of them")
    print("| videos | clips that come back | PSNR on revisits |\n|---|---|---|")
    for folder in args.videos:
        found = summarise(measure(folder, args.dialect))["revisit psnr"]
        told = f"{found.mean:.2f} ± {found.stderr:.2f}" if found.count > 1 else f"{found.mean:.2f}"
        print(f"| {folder} | {found.count} | {told if found.count else 'n/a'} |")
    return 0


def _evaluate_long(args: Evaluate, models: tuple[str, ...]) -> int:
    from causalreel.eval.long import for_vbench, run, table

    if args.metrics is not None:
        raise ValueError("--metrics is for clips; with --long leave it out")
    if (args.vbench is None) != (args.prompt_file is None):
        raise ValueError("--vbench and --prompt-file go together: where videos go, and of which prompts")
    if args.vbench is not None and args.prompt_file is not None:
        how = {"lengths": args.lengths, "samples": args.samples, "seed": args.seed, "device": args.device}
        for path in for_vbench(models, args.prompt_file, args.vbench, policies=args.policies, **how):
            print(path, flush=True)
        return 0
    how = {"lengths": args.lengths, "policies": args.policies, "files": args.videos, "window_s": args.window}
    how |= {"clips": args.clips or 32, "seed": args.seed, "batch": args.batch, "device": args.device}
    rows = run(models, out=args.out, **how)
    print(table(rows))
    return 0


# --------------------------------------------------------------------------------------------------------------- verify


@dataclass(frozen=True)
class Verify(ThreadFlag):
    """Compare this package with golden values recorded from released implementations."""

    folder: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Folder of golden files."""
    pattern: str | None = None
    """Only the cases whose name fits this glob, such as c4_*."""
    allow_uncovered: bool = False
    """Do not fail for cases that nothing here covers."""


def verify(args: Verify) -> int:
    from causalreel import verify as golden
    from causalreel.nn.presets import preset

    args.set_threads([preset("tiny")], "cpu")  # recorded networks are as small
    results = golden.run(args.folder, allow_uncovered=args.allow_uncovered, pattern=args.pattern)
    print(golden.format_table(results))
    return 0 if golden.passed(results, args.allow_uncovered) else 1
