"""`causalreel generate`."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from causalreel.cli.flags import ModelFlags, at_least, pixel_scale

if TYPE_CHECKING:
    from torch import Tensor

    from causalreel.infer.pipeline import Pipeline
    from causalreel.infer.requests import Wanted
    from causalreel.parallel.mesh import Mesh


@dataclass(frozen=True)
class Generate(ModelFlags):
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
    seed: int = 0
    """Seed of the first prompt."""
    frames: int | None = None
    """Pixel frames, 1 + 4 (n - 1); default: as many as a training clip. More streams on."""
    latent_frames: Annotated[int | None, arg(aliases=["--num-output-frames"])] = None
    """The same in latent frames: n."""
    blocks: Annotated[int | None, arg(aliases=["--total-blocks"])] = None
    """The same in chunks, those of a given picture or video counted too."""
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
    from causalreel.infer.distributed import ahead, spread

    paths = _outputs(args.output, wanted)
    for path in paths:  # before the work and not after it; the writers check again
        check_target(path, (*VIDEO_SUFFIXES, GIF_SUFFIX), may_make_folder=True)
    if args.sheet is not None:
        check_target(args.sheet, PICTURE_SUFFIXES)
    device, gpus = (None, 1) if mesh is None else (mesh.device, mesh.size)
    pipeline = args.load(device=device, gpus=gpus, graphs=len(wanted) > 1)
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


def _frames(args: Generate, pipeline: Pipeline) -> int | None:
    """Pixel frames of a clip, however they are asked for."""
    latent = args.latent_frames
    if args.blocks is not None:
        at_least(1, blocks=args.blocks)
        if pipeline.sampling.chunk is None:
            raise ValueError(f"--blocks needs an autoregressive model; {pipeline.export.name} makes whole clips")
        latent = args.blocks * pipeline.sampling.chunk
    if latent is None:
        return args.frames
    at_least(1, latent_frames=latent)
    return 1 + pipeline.codec.temporal_factor * (latent - 1)


def _scale(args: Generate, pipeline: Pipeline) -> int:
    return pixel_scale(pipeline) if args.scale is None else args.scale


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
