"""A socket and the server that reads it: uvicorn, set up for long streams and strangers."""

from __future__ import annotations

import socket
import sys
from typing import Any

GRACE_S = 5
"""Streams have so long to end when the server does."""
PING_S = 20.0
"""A stream whose other end does not answer for so long is closed."""
SWITCH_S = 0.001
"""A thread holds the interpreter for so long at most while others wait; Python's own 0.005 adds up where several work,
and health has to answer."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OSError if the address is taken or not this machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def run(app: Any, door: socket.socket, *, message_bytes: int, behind_proxy: bool = False) -> None:
    """Serve an ASGI application until a signal says to stop.

    message_bytes: largest WebSocket message that is taken. Frames are compressed already, so messages are not.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError("serving needs uvicorn; install it with: pip install 'causalreel[serve]'") from error
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=behind_proxy,
        ws_max_size=message_bytes,
        ws_ping_interval=PING_S,
        ws_ping_timeout=PING_S,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    sys.setswitchinterval(SWITCH_S)
    uvicorn.Server(config).run(sockets=[door])
