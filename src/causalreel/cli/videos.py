"""`causalreel generate`."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from causalreel.cli.flags import MannerFlags, pixel_scale
from causalreel.cli.parsing import FRAMES, SEED, Range

if TYPE_CHECKING:
    from torch import Tensor

    from causalreel.infer.clips import ClipRequest
    from causalreel.infer.models import Profile
    from causalreel.infer.requests import Wanted
    from causalreel.infer.restyle import GivenVideo
    from causalreel.parallel.mesh import Mesh

log = logging.getLogger("causalreel")

Course = Callable[[int], "dict[str, Tensor]"] | None
"""Latent frames of a clip -> its fields."""


@dataclass(frozen=True)
class Generate(MannerFlags):
    """Make videos from prompts, for example "a large red circle moves right".

    One prompt is written to `output`; several go to output-0.mp4, output-1.mp4 ... If `output` is a folder, ends in a
    slash or, for several prompts, has no suffix, they go to 0.mp4, 1.mp4 ... in it, and it is made if need be.
    """

    prompts: Annotated[Positional[tuple[str, ...]], arg(metavar="[PROMPT ...]")] = ()
    """What to show; the seed of each further prompt is one higher. "a[5s] | b[10s] | c[5s#]" shows one after the other,
    # in a new scene."""
    output: Annotated[str, arg(aliases=["-o"], metavar="PATH")] = "out.mp4"
    """Video file (.mp4, .mkv, .mov, .webm, .gif), or a folder, which a slash at the end says."""
    prompt_file: Path | None = None
    """Text file with one prompt a line, or .jsonl with {"prompt": ..., "image": ..., "seed": ...} a line, besides those
    on the command line."""
    seed: Annotated[int, SEED] = 0
    """Seed of the first prompt."""
    frames: Annotated[int | None, FRAMES] = None
    """Pixel frames, 1 + 4 (n - 1); default: as many as a training clip. More streams on."""
    latent_frames: Annotated[int | None, arg(aliases=["--num-output-frames"]), FRAMES] = None
    """The same in latent frames: n."""
    blocks: Annotated[int | None, arg(aliases=["--total-blocks"]), FRAMES] = None
    """The same in chunks, those of a given picture or video counted too."""
    image: Path | None = None
    """Picture that the video starts with; or a folder of pictures, each with its prompt in a .txt of the same name."""
    video: Path | None = None
    """Video to continue; it becomes the beginning of the result. With `strength`: video to make another of."""
    strength: Annotated[float | None, Range(0.001, 1)] = None
    """Noise level in (0, 1] from which each chunk of `video` is denoised anew: the higher, the less is kept of it."""
    fit: Literal["crop", "pad"] = "crop"
    """A picture or video of another shape keeps its aspect: cut to fill the frame, or set between black bars."""
    keys: str | None = None
    """Models that are steered: keys, and for how many latent frames: "w*5,left+w*3,none*2", with commas or spaces
    between them; + holds keys together."""
    trajectory: str | None = None
    """Models that are steered: a trajectory string of another project, such as "w*3,l*2" with --dialect minwm."""
    trajectory_file: Path | None = None
    """The same in a text file."""
    dialect: str | None = None
    """Of the trajectory: minwm, worldplay, lingbot, sana, sana-2 or letters."""
    poses: Path | None = None
    """Models that are steered: a file with a camera pose for each latent frame (.npy, .npz, .json, or a folder)."""
    convention: Literal["c2w", "w2c"] | None = None
    """Of the poses: world from camera, or camera from world."""
    intrinsics: Annotated[str | None, arg(metavar="FX,FY,CX,CY")] = None
    """Models with a camera: its intrinsics, normalised by the image's size. Default: those of the file of poses, or of
    the model."""
    sheet: Path | None = None
    """Also write a picture (.png, .jpg) with a row of frames per prompt."""
    scale: Annotated[int | None, Range(1, 64)] = None
    """Repeat each pixel so often, which keeps small videos sharp; default: 4 for videos below 128 pixels, else 1."""
    decode_device: str | None = None
    """Where latents become pixels, such as cuda:1, at the same time as the next are made; default: as `device`."""


def generate(args: Generate) -> int:
    """Under torchrun all processes make each video together; the first one alone decodes, writes and prints."""
    from causalreel.infer.distributed import processes

    with processes(args.device) as mesh, contextlib.ExitStack() as made:
        return _generate(args, mesh, made)


def _generate(args: Generate, mesh: Mesh | None, made: contextlib.ExitStack) -> int:
    wanted = _wanted(args)
    from causalreel.data.video import OUTPUT_SUFFIXES, SHEET_SUFFIXES, Spread, check_target, contact_sheet, write_video
    from causalreel.infer.distributed import ahead, spread
    from causalreel.infer.models import encoder_of

    is_folder, paths = _outputs(args.output, wanted)
    for path in paths:  # before the work and not after it; the writers check again
        check_target(path, OUTPUT_SUFFIXES, may_make_folder=is_folder)
    if args.sheet is not None:
        check_target(args.sheet, SHEET_SUFFIXES)
    profile = args.profile()
    frames, course = _steered(args, profile, _frames(args, profile))
    if args.strength is not None:
        given: Any = _given(args, profile, frames)
    else:
        given = None if args.video is None else _beginning(args, profile, frames)
    requests = [partial(_request, args, profile, frames, given, *item, course=course) for item in enumerate(wanted)]
    for request in requests:  # before anything is loaded; pictures are read again, and not all of them kept
        request().check(profile, encoder_of(profile.export))
    device, gpus = (None, 1) if mesh is None else (mesh.device, mesh.size)
    pipeline = args.load(device=device, gpus=gpus, graphs=len(wanted) > 1)
    pipeline = spread(pipeline, mesh, decode_device=args.decode_device)
    prompts = [one.prompt for one in wanted]
    for request in requests:
        pipeline.text.encode(request().check(pipeline, None).prompts)  # understood before the first is made
    scale = pixel_scale(pipeline) if args.scale is None else args.scale
    shown: list[Tensor] = []
    if is_folder and (mesh is None or mesh.rank == 0):
        made.enter_context(_folder(paths[0].parent))
    for request, path in zip(requests, paths, strict=True):
        parts = pipeline.stream(request())
        if mesh is not None and mesh.rank > 0:
            collections.deque(parts, maxlen=0)  # its share of the work; there are no frames in them
            continue
        parts = parts if args.decode_device is None else ahead(parts)
        clock, sheet = _Clock(path.name), Spread()
        keep = sheet.add if args.sheet is not None else None
        write_video(path, clock.watch(parts, keep), pipeline.export.fps, scale=scale)
        print(f"{path}: {clock.summary()}", flush=True)
        if args.sheet is not None:
            shown.append(sheet.clip())
    if args.sheet is not None and shown:
        contact_sheet(shown, args.sheet, prompts, scale=max(1, scale // 2))
        print(args.sheet)
    return 0


PROGRESS_S = 10.0
"""Where there is no terminal, progress is a line every so often."""


class _Clock:
    """Passes frames on, counts and times them, and shows progress: on a terminal a line that changes."""

    def __init__(self, name: str) -> None:
        self.name, self.frames, self.first_s, self.start = name, 0, 0.0, time.perf_counter()
        self.is_terminal, self.said = sys.stderr.isatty(), self.start

    def watch(self, parts: Iterator[Tensor], keep: Callable[[Tensor], None] | None) -> Iterator[Tensor]:
        """Parts (1,t,3,H,W) -> uint8 (t,3,H,W) on the CPU."""
        from causalreel.data.video import to_bytes

        try:
            for part in parts:
                frames = to_bytes(part[0]).permute(0, 3, 1, 2)  # bytes before they leave the GPU
                self.first_s = self.first_s or time.perf_counter() - self.start
                self.frames += len(frames)
                self._say()
                if keep is not None:
                    keep(frames)
                yield frames
        finally:
            if self.is_terminal:
                sys.stderr.write("\r\033[K")

    def _say(self) -> None:
        now = time.perf_counter()
        if self.is_terminal:
            print(f"\r{self.name}: {self.frames} frames", end="", file=sys.stderr, flush=True)
        elif now - self.said >= PROGRESS_S:
            print(f"{self.name}: {self.frames} frames after {now - self.start:.0f} s", file=sys.stderr, flush=True)
            self.said = now

    def summary(self) -> str:
        total = time.perf_counter() - self.start
        return (
            f"{self.frames} frames in {total:.2f} s, first frame after {self.first_s:.2f} s, "
            f"{self.frames / total:.1f} frames/s"
        )


def _wanted(args: Generate) -> list[Wanted]:
    """Every video that is asked for."""
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
    return wanted


def _frames(args: Generate, profile: Profile) -> int | None:
    """Pixel frames of a clip, however they are asked for."""
    latent = args.latent_frames
    if args.blocks is not None:
        if profile.sampling.chunk is None:
            raise ValueError(f"--blocks needs an autoregressive model; {profile.export.name} makes whole clips")
        latent = args.blocks * profile.sampling.chunk
    if latent is None:
        return args.frames
    return profile.geometry.frames_of(latent)


def _request(
    args: Generate,
    profile: Profile,
    frames: int | None,
    given: Tensor | GivenVideo | None,
    index: int,
    one: Wanted,
    *,
    course: Course,
) -> ClipRequest:
    """A video that is asked for; given: the beginning (T,3,H,W) of all, or what all are made of, if anything."""
    from causalreel.data.pictures import read_picture
    from causalreel.infer.clips import ClipRequest

    picture, seed = one.image or args.image, args.seed + index if one.seed is None else one.seed
    if args.strength is not None:
        request = ClipRequest(one.prompt, frames, seed, video=given, strength=args.strength)
    else:
        prefix: Any = given if picture is None else read_picture(picture, profile.size, args.fit)
        request = ClipRequest(one.prompt, frames, seed, prefix=prefix)
    if course is None:
        return request
    return dataclasses.replace(request, fields=course(request.check(profile, None).plan.frames))


def _steered(args: Generate, profile: Profile, frames: int | None) -> tuple[int | None, Course]:
    """Pixel frames of a clip, and what gives the fields that its camera's course comes to; None: a model without keys.

    How long a clip is, prompts by time and given videos decide as well.
    """
    from causalreel import families
    from causalreel.foreign import read_text
    from causalreel.infer.steered import Steered
    from causalreel.nn.camera import INTRINSICS, fields_of

    trajectory = args.trajectory
    if args.trajectory_file is not None:
        if trajectory is not None:
            raise ValueError("--trajectory and --trajectory-file exclude each other")
        trajectory = read_text(args.trajectory_file, what="trajectory file").strip()
    asked = Steered(args.keys, trajectory, args.dialect, args.poses, args.convention, args.intrinsics)
    steering = families.steering(profile.export)
    if steering is None:
        if asked.is_given or args.intrinsics is not None:
            told = "--keys, --trajectory, --poses and --intrinsics are not for it"
            raise ValueError(f"{profile.export.name} has no camera: {told}")
        return frames, None
    taken = fields_of(profile.export.model)
    if args.intrinsics is not None and INTRINSICS not in taken:
        raise ValueError(f"{profile.export.name} has keys and no camera: --intrinsics is not for it")
    if asked.is_given and frames is None:
        frames = profile.geometry.frames_of(asked.fields(steering, None)["w2c"].shape[1])

    @functools.lru_cache(maxsize=4)
    def course(latents: int) -> dict[str, Tensor]:
        return {name: value for name, value in asked.fields(steering, latents).items() if name in taken}

    return frames, course


def _outputs(output: str, wanted: Sequence[Wanted]) -> tuple[bool, list[Path]]:
    """Whether the videos go into a folder of their own, and where each of them goes."""
    from causalreel.infer.requests import numbered

    names, path = numbered(wanted), Path(output)
    is_folder = output.endswith(("/", os.sep)) or path.is_dir() or (len(wanted) > 1 and not path.suffix)
    if is_folder:
        return True, [path / f"{name}.mp4" for name in names]
    if len(wanted) == 1:
        return False, [path]
    return False, [path.with_name(f"{path.stem}-{name}{path.suffix}") for name in names]


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder for videos, made if need be; one that was made goes again if nothing is in it at the end."""
    from causalreel import folders

    if made := folders.make(path):
        log.info("made the folder %s", path)
    try:
        yield
    finally:
        folders.unmake(made)


def _given(args: Generate, profile: Profile, frames: int | None) -> GivenVideo:
    """The video that all are made of, not yet decoded; ValueError."""
    from causalreel.infer.restyle import GivenVideo

    if args.video is None:
        raise ValueError("--strength is for --video, the video to make another of")
    how: dict[str, Any] = {"fps": profile.export.fps, "how": args.fit, "most": frames}
    return GivenVideo.of_file(args.video, profile.size, **how)


def _beginning(args: Generate, profile: Profile, frames: int | None) -> Tensor:
    """The frames (T,3,H,W) of the given video; no more are read than there is room for."""
    from causalreel.infer.inputs import read_clip

    assert args.video is not None
    unit = profile.sampling.chunk
    if unit is None:
        raise ValueError(f"--video needs an autoregressive model; {profile.export.name} makes whole clips")
    most = profile.export.frames // unit * unit if frames is None else profile.schedule(frames).frames - unit
    if most < unit:
        raise ValueError(f"a video of {frames} frames leaves no room behind {args.video}; ask for more with --frames")
    how: dict[str, Any] = {"unit": unit, "geometry": profile.geometry, "how": args.fit}
    return read_clip(args.video, profile.size, fps=profile.export.fps, most=most, **how)
