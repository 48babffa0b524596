"""`causalreel stream` and `causalreel replay`: live videos without a server, and recorded ones made again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from causalreel.cli.flags import StreamFlags, ending, pixel_scale
from causalreel.cli.parsing import FRAMES, Range
from causalreel.foreign import parse_json, shown
from causalreel.infer.commands import MOST_VALUES, RATE, SEED, STEPS, Close, Options, Pause, Resume, Step
from causalreel.infer.values import NumbersByName, Text

if TYPE_CHECKING:
    from torch import Tensor

    from causalreel.infer.models import Profile
    from causalreel.infer.restyle import Restyle
    from causalreel.serve.emitted import Emitted
    from causalreel.serve.play import Timed
    from causalreel.serve.records import Record
    from causalreel.serve.session import Session

MOST_FRAMES = 1 << 40
"""Of a video that has an end."""

# -------------------------------------------------------------------------------------------------------------- stream


@dataclass(frozen=True)
class Stream(StreamFlags):
    """Play an endless video whose prompt changes on the way, in a window or into a file or pipe.

    Without -o it plays in a window (space pauses, r restarts, q closes; W A S D and arrows steer a model with keys).
    With --stdin a typed line is the next prompt; /switch, /recompute, /forget or /fade and a prompt say how. The other
    live commands are a slash, their name and what they take, such as /step 3 or /restart 7; /help lists them.
    """

    prompt: Annotated[Positional[str | None], arg(metavar="[PROMPT]")] = None
    """What to show first; default: the model's first example."""
    seed: Annotated[int, Range(SEED.least, SEED.most)] = 0
    """Of the noise, and of what a prompt leaves open."""
    steps: Annotated[int | None, Range(STEPS.least, STEPS.most)] = None
    """Denoising steps per chunk; default: the model's."""
    fps: Annotated[float | None, Range(RATE.least, RATE.most)] = None
    """Pixel frames per second; default: the model's."""
    frames: Annotated[int | None, FRAMES] = None
    """Pixel frames to make; default: no end."""
    seconds: Annotated[float | None, Range(0.001, 1_000_000)] = None
    """The same in seconds."""
    image: Path | None = None
    """Picture that the video starts with."""
    video: str | None = None
    """Video to make another of: a file, a named pipe, or - for standard input, read as it comes; the stream ends with
    it. Needs `strength`."""
    strength: Annotated[float | None, Range(0.001, 1)] = None
    """Noise level in (0, 1] from which each chunk of `video` is denoised anew: the higher, the less is kept of it."""
    fit: Literal["crop", "pad"] = "crop"
    """How `video` is brought to the model's shape: cut to fill the frame, or set between black bars."""
    fields: Annotated[str | None, arg(metavar="JSON")] = None
    """What the fields of the model's conditioning, if it has any, hold at first: '{"actions": [0, 0, 1]}'."""
    script: Path | None = None
    """Timed commands, a line each: "12.5 a blue square moves left", or JSON with time and command; checked as a whole
    before the model is loaded."""
    keys: Annotated[str | None, arg(metavar="FILE|KEYS|terminal")] = None
    """Steer a model with keys: by those of this terminal (W A S D and arrows, in real time; the space bar lets go); by
    keys and for how many latent frames, "w*5,left+w*3,none*2", with commas or spaces between them; or by a file with a
    line for every change: seconds and all keys held from then on, "1.5 w left". A window takes keys anyway."""
    stdin: bool = False
    """Take commands typed while it plays."""
    output: Annotated[str | None, arg(aliases=["-o"])] = None
    """Video file (.mp4, .mkv, .mov, .webm, .gif), or - for standard output."""
    pipe: Literal["rgb24", "y4m", "mp4"] = "mp4"
    """What goes to standard output: bare pixels, YUV4MPEG2 or fragmented mp4."""
    realtime: bool = False
    """Write no faster than it is played."""
    record: Path | None = None
    """Also write a replay file (.json), from which `causalreel replay` makes the same video."""


def stream(args: Stream) -> int:
    from causalreel.infer.inputs import read_picture
    from causalreel.infer.live import first_prompt
    from causalreel.infer.live_video import steering_of
    from causalreel.serve.keyboard import Terminal, read_keys
    from causalreel.serve.memory import steady_heap
    from causalreel.serve.play import Typed, Window, play
    from causalreel.serve.session import Session

    with ending(), contextlib.ExitStack() as stack:
        _check_stream(args)
        window = None if args.output is not None else stack.enter_context(Window())  # none here: said before the work
        profile = args.profile()
        if args.prompt is None:
            args = dataclasses.replace(args, prompt=first_prompt(profile.export))
        assert args.prompt is not None
        image = None if args.image is None else read_picture(args.image, profile.size)[0]
        script = _check_words(args, profile, image)
        terminal = None
        if args.keys == "terminal":
            steering_of(profile.export)
            terminal = stack.enter_context(Terminal())
        elif args.keys is not None:
            timed = read_keys(args.keys, profile, args.fps or profile.export.fps)
            script = sorted([*script, *timed], key=lambda timed: timed.time_s)
        frames = _frames(args.frames, args.seconds, "--seconds", args.fps or profile.export.fps)
        pipeline = args.load(adjustable=True)
        steady_heap()
        options = Options(args.prompt, args.seed, args.steps, args.chunk, args.fps, image, _fields(args))
        session = Session(pipeline, options, policy=args.kind, restyle=_restyle(args, profile))
        typed = Typed(sys.stdin) if args.stdin else None
        how: dict[str, Any] = {"script": script, "typed": typed, "realtime": args.realtime}
        how["attend"] = None if terminal is None else terminal.attend
        stack.enter_context(_recording(session, args.record))
        if window is None:
            _write(args.output, play(session, frames=frames, say=_say, **how), session, frames, args.pipe)
        else:
            window.begin(session, scale=pixel_scale(pipeline))
            for made in play(session, frames=frames, say=_say, idle=window.idle, **how):
                window.show(made)
    return 0


def _check_stream(args: Stream) -> None:
    """What can be refused without knowing the model."""
    from causalreel.data.video import OUTPUT_SUFFIXES, check_target

    if args.frames is not None and args.seconds is not None:
        raise ValueError("--frames and --seconds exclude each other")
    if args.output not in (None, "-"):
        check_target(args.output, OUTPUT_SUFFIXES)
        if args.frames is None and args.seconds is None and not args.stdin and args.video is None:
            raise ValueError("a file needs an end: --frames, --seconds, or --stdin and /close")
    if args.keys == "terminal":
        if args.stdin:
            raise ValueError("--keys terminal and --stdin exclude each other: both read what is typed")
        if args.output is not None and not args.realtime:
            raise ValueError("--keys terminal needs a window, or --realtime beside -o")
    if args.record is not None:
        check_target(args.record, (".json",))
    _check_given(args)
    if args.prompt is not None:
        Text().read("the prompt", args.prompt)
    _fields(args)


def _check_given(args: Stream) -> None:
    """ValueError unless a given video and what else is asked for go together."""
    if (args.video is None) != (args.strength is None):
        raise ValueError("--video and --strength go together: what to make another video of, and how much of it")
    if args.video is None:
        return
    if args.image is not None:
        raise ValueError("--image and --video exclude each other")
    if args.record is not None:
        raise ValueError("--record is for streams without --video, which a replay file does not hold")
    if args.video == "-" and args.stdin:
        raise ValueError("--stdin and --video - both read standard input")
    path = Path(args.video)
    if args.video != "-" and not (path.is_file() or path.is_fifo()):
        raise FileNotFoundError(f"no video file at {path}")


def _restyle(args: Stream, profile: Profile) -> Restyle | None:
    """What the stream is made of, if it is made of a video."""
    from causalreel.infer.restyle import GivenVideo, Restyle

    if args.video is None or args.strength is None:
        return None
    source = sys.stdin.buffer if args.video == "-" else args.video
    return Restyle(GivenVideo.of_stream(source, profile.size, fps=profile.export.fps, how=args.fit), args.strength)


def _fields(args: Stream) -> dict[str, Any]:
    """Field -> what it holds at first."""
    if args.fields is None:
        return {}
    return NumbersByName().read("--fields", parse_json(args.fields, "--fields", items=MOST_VALUES))


def _check_words(args: Stream, profile: Profile, image: Tensor | None) -> list[Timed]:
    """The script, when it, the prompts and the policy are known to be what the model takes."""
    from causalreel.infer.live import Policy, understand
    from causalreel.serve.play import read_script

    Policy.of(profile.export, profile.sampling, args.kind)
    assert args.prompt is not None
    understand(profile.export, [args.prompt], image)
    script = [] if args.script is None else read_script(args.script, profile)
    if image is not None or any(timed.command.picture is not None for timed in script):
        _check_pictures(profile)
    if not args.stdin:  # else nobody knows which prompt will be in force
        _check_beginnings(args, profile, script)
    waits = args.stdin or args.output is None
    for index, timed in enumerate(script):
        if isinstance(timed.command, Pause) and not waits and not _goes_on(script[index + 1 :]):
            raise ValueError(f"{args.script}: it pauses the video at {timed.time_s:g} s, and nothing resumes it")
    return script


def _check_beginnings(args: Stream, profile: Profile, script: Sequence[Timed]) -> None:
    """ValueError for a picture that the script begins with again while the prompt of then contradicts it."""
    from causalreel.infer.commands import Scene
    from causalreel.infer.live import understand

    assert args.prompt is not None
    scene = Scene(args.prompt, args.seed)
    for timed in script:
        scene = timed.command.scene(scene) or scene
        if timed.command.begins_again and scene.picture is not None:
            try:
                understand(profile.export, [scene.prompt], scene.picture.permute(2, 0, 1) / 127.5 - 1)
            except ValueError as error:
                raise ValueError(f"{args.script}: at {timed.time_s:g} s: {error}") from None


def _goes_on(later: Sequence[Timed]) -> bool:
    return any(isinstance(timed.command, Resume | Step | Close) for timed in later)


def _check_pictures(profile: Profile) -> None:
    if profile.sampling.chunk != 1:
        raise ValueError(
            f"a picture to begin with needs a frame-wise model (chunk 1); {profile.export.name} has chunk "
            f"{profile.sampling.chunk}"
        )


def _frames(frames: int | None, seconds: float | None, name: str, fps: float) -> int | None:
    """How many pixel frames are asked for, by either way of asking."""
    if seconds is None:
        return frames
    if not 0 < seconds <= MOST_FRAMES / fps:
        raise ValueError(f"{name} must be a number above 0, at most {MOST_FRAMES / fps:.0f}; got {seconds:g}")
    return max(1, round(seconds * fps))


@contextlib.contextmanager
def _recording(session: Session, path: Path | None) -> Iterator[None]:
    """Write the session's record at the end. What was there before is replaced only by a run that was not cut short: an
    interrupted one then writes beside it."""
    try:
        yield
    except BaseException:
        if path is not None and session.frames:
            aside = path.with_name(f"{path.stem}.interrupted.json") if path.exists() else path
            with contextlib.suppress(OSError):  # the reason why it ends is the one to tell
                _write_record(session, aside)
                _say(f"the record of what was played is in {aside}")
        raise
    if path is not None:
        _write_record(session, path)


def _write_record(session: Session, path: Path) -> None:
    from causalreel.files import write_text

    write_text(path, json.dumps(session.record(), indent=1))


# -------------------------------------------------------------------------------------------------------------- replay


@dataclass(frozen=True, kw_only=True)
class Replay(StreamFlags):
    """Make the video of a replay file again: one that the live page saved, or `causalreel stream --record`.

    With the same model, version and device its frames are those that were shown, bit for bit; what differs is said.
    """

    file: Annotated[Positional[Path], arg(metavar="FILE")]
    """Replay file (.json)."""
    model: str = ""
    """Model that makes it; default: the one that it was recorded with."""
    policy: Annotated[str | None, arg(metavar="NAME[:key=value,...]")] = None
    """Context policy; default: the one that it was recorded with. Another model has its own, or the one that was named
    for the recording, with its own numbers where none were named."""
    output: Annotated[Path, arg(aliases=["-o"])] = Path("out.mp4")
    """Video file (.mp4, .mkv, .mov, .webm, .gif)."""
    frames: Annotated[int | None, FRAMES] = None
    """Pixel frames to make; default: all."""
    until: Annotated[float | None, Range(0.001, 1_000_000)] = None
    """The same in seconds."""


def replay(args: Replay) -> int:
    from causalreel.data.video import OUTPUT_SUFFIXES, check_target
    from causalreel.serve.memory import steady_heap
    from causalreel.serve.play import play
    from causalreel.serve.records import read_record
    from causalreel.serve.session import Session

    if args.frames is not None and args.until is not None:
        raise ValueError("--frames and --until exclude each other")
    if args.steps is not None or args.chunk is not None:
        raise ValueError("--steps and --chunk are what the replay file says; leave them out")
    if args.policy in ("renew", "slide"):
        raise ValueError(f"--policy {args.policy} is what the replay file says; a context policy may be named")
    record = read_record(args.file)
    if record.chunks == 0:
        raise ValueError(f"{args.file} was saved before anything was shown: there is nothing to replay")
    check_target(args.output, OUTPUT_SUFFIXES)
    flags = dataclasses.replace(args, model=args.model or record.model)
    flags, profile = _recorded_profile(flags, record)
    fps = record.options.fps or profile.export.fps
    frames = _frames(args.frames, args.until, "--until", fps)
    with ending():
        pipeline = flags.load(adjustable=True)
        steady_heap()
        session = Session.of(pipeline, record)
        if differences := record.differences(pipeline):
            _say(f"the frames may differ from those recorded: {'; '.join(differences)}")
        most = profile.geometry.frames_of(
            1 + (session.video.sampling.chunk or 1) * record.chunks
        )  # restarts begin with fewer
        chunks = play(session, frames=frames) if frames is not None else session.replayed()
        chunks = (made for made in chunks if made.sequence < record.chunks)
        _write(str(args.output), chunks, session, min(frames or most, most))
    return 0


def _recorded_profile(flags: Replay, record: Record) -> tuple[Replay, Profile]:
    """The flags with the context policy that was recorded, and what is known of the model that replays the record;
    ValueError that names the file if it cannot."""
    from causalreel.infer.live import Policy, understand
    from causalreel.infer.schedule import adapt

    try:
        profile = flags.profile()
    except ValueError as error:
        if flags.model != record.model:
            raise
        raise ValueError(f"{flags.file} was recorded with {record.model[:80]!r}; give --model: {error}") from None
    try:
        sampling = adapt(profile.sampling, steps=record.options.steps, chunk=record.options.chunk)
        Policy.of(profile.export, sampling, record.policy)  # a chunk that is too long is so under every policy
        policy, is_known = (None, True) if flags.policy is not None else record.policy_for(profile)
        if policy is not None:
            flags = dataclasses.replace(flags, policy=policy, chunk=record.options.chunk)  # which it has to hold
            profile = _with_policy(flags, profile.export.name)
        sampling = adapt(profile.sampling, steps=record.options.steps, chunk=record.options.chunk)
        profile = dataclasses.replace(profile, sampling=sampling)
        record.fits(profile.size)
        if record.pictures:
            _check_pictures(profile)
        understand(profile.export, record.prompts)
        Policy.of(profile.export, profile.sampling, record.policy)
    except ValueError as error:
        raise ValueError(f"{flags.file}: {error}") from None
    if policy is not None and not is_known:
        name, was = shown(policy.partition(":")[0], 40), shown(record.model, 80)
        _say(
            f"the context policy's numbers are those of {was}, which is not here; --policy {name} has this model's own"
        )
    return flags, profile


def _with_policy(flags: Replay, model: str) -> Profile:
    """What is known of the model with the context policy that was recorded; ValueError if that does not suit it."""
    try:
        return flags.profile()
    except ValueError as error:
        told = f"the context policy that was recorded, {shown(flags.policy, 240)}, does not suit {model}"
        raise ValueError(f"{told}: {error}; --policy names another") from None


# -------------------------------------------------------------------------------------------------------------- output

PROGRESS_S = 10.0
"""Where there is no terminal, progress is a line every so often."""


def _write(
    output: str | None, chunks: Iterator[Emitted], session: Session, frames: int | None, form: Any = "mp4"
) -> None:
    from causalreel.serve.frames import pipe, write_mp4

    start = time.perf_counter()
    pictures = _watched(chunks, frames)
    if output is None or output == "-":
        count = pipe(sys.stdout.buffer, pictures, session.fps, form)
    else:
        count = write_mp4(output, pictures, session.fps, scale=pixel_scale(session.pipeline))
    total = time.perf_counter() - start
    _say(f"{count} frames in {total:.2f} s, {count / total:.1f} frames/s")


def _watched(chunks: Iterator[Emitted], frames: int | None) -> Iterator[Tensor]:
    """The chunks' frames (t,H,W,3), with progress: on a terminal in a line that changes."""
    is_terminal, said, count = sys.stderr.isatty(), time.perf_counter(), 0
    try:
        for made in chunks:
            count += len(made.frames)
            text = f"{count} frames" if frames is None else f"{count} of {frames} frames"
            if is_terminal:
                print(f"\r{text}", end="", file=sys.stderr, flush=True)
            elif time.perf_counter() - said >= PROGRESS_S:
                said = time.perf_counter()
                _say(text)
            yield made.frames
    finally:
        if is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _say(line: str) -> None:
    print(f"causalreel: {line}", file=sys.stderr, flush=True)
