"""`causalreel stream` and `causalreel serve`: videos that people steer while they play."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from causalreel.cli.flags import ModelFlags, pixel_scale

if TYPE_CHECKING:
    from causalreel.serve.safety import Settings
    from causalreel.serve.session import Emitted, Session

# -------------------------------------------------------------------------------------------------------------- stream


@dataclass(frozen=True)
class Stream(ModelFlags):
    """Play an endless video whose prompt changes on the way, in a window or into a file or pipe.

    Without -o it plays in a window (space pauses, r restarts, q closes). With --stdin a typed line is the next prompt;
    /switch, /recompute or /fade and a prompt say how. /pause, /resume, /close, /step N, /restart SEED, /steps N and
    /fps N are the other commands.
    """

    prompt: Annotated[Positional[str], arg(metavar="[PROMPT]")] = "a large red circle moves right"
    """What to show first."""
    seed: int = 0
    """Of the noise, and of what a prompt leaves open."""
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
    """Video file (.mp4, .mkv, .mov, .webm, .gif), or - for standard output."""
    pipe: Literal["rgb24", "y4m", "mp4"] = "mp4"
    """What goes to standard output: bare pixels, YUV4MPEG2 or fragmented mp4."""
    realtime: bool = False
    """Write no faster than it is played."""
    record: Path | None = None
    """Also write the command log (.json), from which `Session.replay` makes the same video."""


def stream(args: Stream) -> int:
    if args.frames is not None and args.seconds is not None:
        raise ValueError("--frames and --seconds exclude each other")
    from causalreel.data.video import OUTPUT_SUFFIXES, check_target
    from causalreel.infer.inputs import read_picture
    from causalreel.serve.memory import steady_heap
    from causalreel.serve.play import Typed, Window, play, read_script
    from causalreel.serve.session import Options, Session

    if args.output not in (None, "-"):
        check_target(args.output, OUTPUT_SUFFIXES)
        if args.frames is None and args.seconds is None and not args.stdin:
            raise ValueError("a file needs an end: --frames, --seconds, or --stdin and /close")
    script = [] if args.script is None else read_script(args.script)
    pipeline = args.load()
    steady_heap()
    image = None if args.image is None else read_picture(args.image, pipeline.size)[0]
    options = Options(args.prompt, args.seed, args.steps, args.chunk, args.fps, image)
    session = Session(pipeline, options, policy=args.policy)
    frames = args.frames if args.seconds is None else max(1, round(args.seconds * session.fps))
    typed = Typed(sys.stdin) if args.stdin else None
    window = None if args.output is not None else Window(session, scale=pixel_scale(pipeline))
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

            from causalreel.files import write_text

            write_text(args.record, json.dumps(session.record(), indent=1))
    return 0


def _write(args: Stream, session: Session, chunks: Iterator[Emitted]) -> None:
    from causalreel.serve.frames import pipe, write_mp4

    start, pictures = time.perf_counter(), (made.frames for made in chunks)
    if args.output is None or args.output == "-":
        count = pipe(sys.stdout.buffer, pictures, session.fps, args.pipe)
    else:
        count = write_mp4(args.output, pictures, session.fps, scale=pixel_scale(session.pipeline))
    total = time.perf_counter() - start
    _say(f"{count} frames in {total:.2f} s, {count / total:.1f} frames/s")


def _say(line: str) -> None:
    print(f"causalreel: {line}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------------- serve


@dataclass(frozen=True)
class Serve(ModelFlags):
    """Serve live sessions and videos over HTTP and WebSocket, with a page for browsers. Listens on loopback only,
    unless told otherwise."""

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


LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def serve(args: Serve) -> int:
    from causalreel.serve.app import create_app
    from causalreel.serve.listen import listen, run
    from causalreel.serve.memory import steady_heap
    from causalreel.serve.scheduler import Limits, Scheduler
    from causalreel.serve.store import Store

    steady_heap()
    settings = _serve_settings(args)
    limits = Limits(
        sessions=args.max_sessions,
        buffer_chunks=args.buffer_chunks,
        resume_chunks=args.resume_chunks,
        idle_s=args.idle_s,
    )
    with listen(args.host, args.port) as door, closing(Store(settings.data, replica=args.replica)) as store:
        pipeline = args.load()  # after all that may be refused at once: a port that is taken, a folder that is not one
        scheduler = Scheduler(pipeline, limits)
        app = create_app(scheduler, settings, store=store)
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
            run(app, door, behind_proxy=args.behind_proxy)
        finally:
            scheduler.close()
    return 0


def _serve_settings(args: Serve) -> Settings:
    from causalreel.serve.safety import Settings

    token = None
    if args.token_file is not None:
        try:
            token = args.token_file.read_text(encoding="utf-8-sig").strip()
        except UnicodeDecodeError:
            raise ValueError(f"{args.token_file} holds no token: it is not text in UTF-8") from None
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
