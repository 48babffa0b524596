"""`causalreel serve`: live sessions, and videos made in the background, over HTTP."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from causalreel.cli.flags import StreamFlags
from causalreel.cli.parsing import FRAMES, Range

if TYPE_CHECKING:
    from causalreel.serve.safety import Settings


@dataclass(frozen=True)
class Serve(StreamFlags):
    """Serve live sessions and videos over HTTP and WebSocket, with a page for browsers. Listens on loopback only,
    unless --host says otherwise."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all, which asks for a token and TLS in front."""
    port: Annotated[int, Range(0, 65535)] = 8000
    """Port to listen on; 0: a free one, printed."""
    token_file: Path | None = None
    """File whose content is the bearer token that everything but health asks for."""
    data: Path | None = None
    """Folder of the videos made in the background; default: they last as long as the server."""
    hide_prompts: Annotated[bool, arg(aliases=["--no-log-prompts"])] = False
    """Keep prompts out of the log."""
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
    max_sessions: Annotated[int, Range(1, 1000)] = 8
    """Live sessions and videos being made at a time; fewer where memory is short."""
    max_streams: Annotated[int, Range(1, 100_000)] = 64
    """Connections that are served frames."""
    buffer_chunks: Annotated[int | None, Range(1, 1000)] = None
    """Chunks made ahead of a viewer; a command waits behind them. Default: 2, and 1 for a model with keys."""
    resume_chunks: Annotated[int, Range(0, 10_000)] = 32
    """Chunks kept for a viewer who comes back."""
    idle_s: Annotated[float, Range(0.1, 10_000_000)] = 60.0
    """A session that nobody reads or commands for so long is closed."""
    max_frames: Annotated[int, FRAMES] = 1000
    """Longest video made in the background, in pixel frames."""
    requests_per_s: Annotated[float, Range(0.001, 1_000_000)] = 20.0
    """Requests and commands that a client may go on making."""


LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def serve(args: Serve) -> int:
    from causalreel.serve.app import create_app
    from causalreel.serve.handle import Limits
    from causalreel.serve.listen import listen, run
    from causalreel.serve.memory import steady_heap
    from causalreel.serve.scheduler import Scheduler
    from causalreel.serve.store import Store

    steady_heap()
    settings = _serve_settings(args)
    with listen(args.host, args.port) as door, closing(Store(settings.data, replica=args.replica)) as store:
        pipeline = args.load(
            adjustable=True
        )  # after all that may be refused at once: a port that is taken, a folder that is not one
        has_keys = pipeline.control is not None
        limits = Limits(
            sessions=args.max_sessions,
            buffer_chunks=args.buffer_chunks or (1 if has_keys else 2),
            resume_chunks=args.resume_chunks,
            idle_s=args.idle_s,
        )
        scheduler = Scheduler(pipeline, limits, policy=args.kind)
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
        log_prompts=not args.hide_prompts,
        video_frames=args.max_frames,
        streams=args.max_streams,
        requests_per_s=args.requests_per_s,
        burst=max(1, round(3 * args.requests_per_s)),
    )
