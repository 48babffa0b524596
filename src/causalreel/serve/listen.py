"""A socket and the server that reads it: uvicorn, set up for long streams and strangers."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import signal
import socket
import sys
from typing import Any

try:
    import uvicorn
except ImportError as error:
    raise ImportError("serving needs uvicorn; install it with: pip install 'causalreel[serve]'") from error

from causalreel.serve.connections import protocols

GRACE_S = 5
"""Requests have so long to end when the server does."""
PARTING_S = 2.0
"""Streams have so long to tell their viewers that the session has ended."""
PING_S = 20.0
"""A stream whose other end does not answer for so long is closed."""
SWITCH_S = 0.001
"""A thread holds the interpreter for so long at most while others wait; Python's own 0.005 adds up where several work,
and health has to answer."""


WHY = {
    errno.EADDRINUSE: "something else listens there; name another --port, or 0 for a free one",
    errno.EADDRNOTAVAIL: "that is no address of this machine; name one of its own with --host, or 0.0.0.0 for all",
    errno.EACCES: "this user may not open that port; name a --port from 1024 on",
    socket.EAI_NONAME: "no address has that name here; name an address of this machine with --host, such as 127.0.0.1",
}
"""What keeps a server from listening, by the system's number, and what helps."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; ValueError for what is no host or port, OSError for an address that is taken or not here."""
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be from 0 to 65535, got {port}")
    if not host.strip() or not host.isprintable():  # an empty one would mean every address
        raise ValueError(f"host must be an address or a name, got {host!r:.80}; 0.0.0.0 is every address")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        why = WHY.get(error.errno or 0, str(error.strerror or error).partition(" (while")[0])
        raise OSError(error.errno, f"cannot listen on {host:.80} port {port}: {why}") from error


class Server(uvicorn.Server):
    """uvicorn, whose end is told: sessions end before their streams are cut."""

    def __init__(self, app: Any, *, behind_proxy: bool = False) -> None:
        self.service = app.state.service
        settings = self.service.settings
        http, talking = protocols(per_s=settings.requests_per_s, burst=settings.burst, shares_client=behind_proxy)
        config = uvicorn.Config(
            app,
            http=http,
            ws=talking,
            log_level="critical",  # what goes wrong in a request is logged by the doorkeeper; noise from outside is not
            access_log=False,
            server_header=False,
            proxy_headers=behind_proxy,
            ws_max_size=settings.body_bytes,
            ws_ping_interval=PING_S,
            ws_ping_timeout=PING_S,
            ws_per_message_deflate=False,  # frames are compressed already
            timeout_graceful_shutdown=GRACE_S,
        )
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the sessions, wait until their viewers have been told, then close as uvicorn does."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(None, self.service.stop)
        until = loop.time() + PARTING_S
        while self.service.viewers and loop.time() < until:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def run(app: Any, door: socket.socket, *, behind_proxy: bool = False) -> None:
    """Serve an application of `create_app` until a signal says to stop. SIGTERM is an orderly end: it returns."""
    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # would log what strangers send
    gc.collect()
    gc.freeze()  # what is loaded stays: walking all of it again would stop every thread for a tenth of a second
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has stopped
    try:
        Server(app, behind_proxy=behind_proxy).run(sockets=[door])
    finally:
        signal.signal(signal.SIGTERM, before)
        gc.unfreeze()
        sys.setswitchinterval(switch_s)
