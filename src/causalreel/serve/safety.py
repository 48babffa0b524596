"""What keeps a server safe: its limits, the bearer token, rates, and checks of texts and pictures. `guard` has the
doorkeeper, who applies them to every request."""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from causalreel.data import pictures

KIB, MIB = 1 << 10, 1 << 20
HEALTH = ("/healthz", "/readyz")
"""Probes ask by address and without a token."""
OPEN_PATHS = (*HEALTH, "/", "/docs")
"""Paths that need no token: health, and the pages, which ask for the token themselves and hold no secret."""
OPEN_PREFIX = "/static/"
SUBPROTOCOL = "causalreel.v1"
"""WebSocket subprotocol that the server answers with."""
BEARER_PREFIX = "bearer."
"""A second subprotocol, this and the token in base64url without padding, carries a browser's token."""
FORMATS = ("PNG", "JPEG", "WEBP")
SCANNED = 170_000_000
"""Most pixels of all pictures of a message, a JPEG's counted once for each scan: the largest picture, or as many frames
as a message takes, in the ten scans of a common progressive JPEG."""
_decoding = threading.Lock()
CLIENTS = 4096
"""Clients whose rate is remembered; the one not seen for longest is forgotten first."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(self), geolocation=(), microphone=()",
}

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


REPLICA = re.compile("[a-z0-9]{1,16}")


@dataclass(frozen=True)
class Settings:
    """What a server allows."""

    token: str | None = None
    """Bearer token for everything but health and the page; None: everybody may."""
    hosts: tuple[str, ...] = ()
    """Names that the Host header may hold, without port; none: any."""
    origins: tuple[str, ...] = ()
    """Origins besides the server's own whose pages may use it, such as https://example.org."""
    data: Path | None = None
    """Folder of videos and their records; None: they last as long as the server."""
    replica: str | None = None
    """Name that ids of sessions and videos bear, by which a proxy finds the process that holds them; None: none."""
    log_prompts: bool = True
    """Whether log lines may hold prompts."""
    body_bytes: int = 12 * MIB
    """Largest request or message; a picture in base64 has to fit."""
    image_pixels: int = 16_000_000
    """Largest picture, width times height, known before it is decoded."""
    video_frames: int = 1000
    """Longest video of a job, pixel frames."""
    queued_videos: int = 16
    """Jobs that may wait or run."""
    kept_videos: int = 1000
    """Videos kept before a client has to delete some."""
    streams: int = 64
    """Connections that are served frames at once."""
    requests_per_s: float = 20
    """Requests and commands a client may go on making."""
    burst: int = 60
    """Requests and commands a client may make at once."""

    def __post_init__(self) -> None:
        if self.token is not None and not self.token:
            raise ValueError("token must not be empty; None means that everybody may")
        if self.token is not None and not self.token.isascii():
            raise ValueError("token must be ASCII, got other characters")
        if self.replica is not None and not REPLICA.fullmatch(self.replica):
            raise ValueError(f"replica must be 1 to 16 small letters and digits, got {self.replica!r}")
        for name in ("body_bytes", "image_pixels", "video_frames", "queued_videos", "kept_videos"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.streams < 1 or self.burst < 1 or not self.requests_per_s > 0:
            raise ValueError("streams, burst and requests_per_s must be positive")


class ApiError(Exception):
    """An answer that is an error: HTTP status, a code for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}

    def body(self) -> bytes:
        """{"error": {"code", "message"}}; ASCII, so that no text of a client can fail to be encoded."""
        return json.dumps({"error": {"code": self.code, "message": self.message}}).encode("ascii")


class Rates:
    """Token buckets, one a client: `burst` at once, then `per_s`. Memory is bounded."""

    def __init__(self, per_s: float, burst: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s, self.burst, self.clock = per_s, burst, clock
        self.buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # client -> (left, when)
        self.lock = threading.Lock()

    def take(self, client: str) -> float:
        """Take one -> 0, or the seconds after which there is one again."""
        with self.lock:
            now = self.clock()
            left, when = self.buckets.pop(client, (float(self.burst), now))
            left = min(float(self.burst), left + (now - when) * self.per_s)
            wait = 0.0 if left >= 1 else (1 - left) / self.per_s
            self.buckets[client] = (left - 1 if wait == 0 else left, now)
            if len(self.buckets) > CLIENTS:
                self.buckets.popitem(last=False)
            return wait


def decode_base64(text: Any, wanted: str = "image must be base64 of a PNG, JPEG or WebP file") -> bytes:
    """Base64, or a data: URL of it -> bytes; ValueError."""
    try:
        text = text.partition(",")[2] if text.startswith("data:") else text
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, AttributeError) as error:
        raise ValueError(wanted) from error


def decode_picture(data: bytes, size: tuple[int, int], *, pixels: int) -> Tensor:
    """A picture's bytes -> (3,H,W) in [-1,1], cropped to `size` (height, width).

    Its kind and size are read from its head before any pixel is; more than `pixels` are refused, or `SCANNED` in all
    scans, and kinds other than PNG, JPEG and WebP are not even tried. One is decoded at a time. Raises ValueError.
    """
    with _decoding:
        return pictures.decode_picture(data, size, formats=FORMATS, pixels=pixels, scanned=SCANNED)[0]


def token_of(scope: Scope) -> str | None:
    """The token a request brings: `Authorization: Bearer`, or a browser's WebSocket subprotocol."""
    headers = headers_of(scope)
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    for offered in headers.get("sec-websocket-protocol", "").split(","):
        offered = offered.strip()
        if scope["type"] == "websocket" and offered.startswith(BEARER_PREFIX):
            coded = offered[len(BEARER_PREFIX) :]
            try:
                return base64.b64decode(coded + "=" * (-len(coded) % 4), altchars=b"-_", validate=True).decode("ascii")
            except (binascii.Error, ValueError):
                return None
    return None


def is_right(token: str | None, given: str | None) -> bool:
    """Whether the token is the one; takes as long for nearly right ones as for wrong ones."""
    if token is None:
        return True
    return given is not None and hmac.compare_digest(token.encode(), given.encode("utf-8", "replace"))


def client_of(scope: Scope) -> str:
    """Who asks: the address of the peer (uvicorn puts that of a trusted proxy's client there)."""
    return str(scope["client"][0]) if scope.get("client") else "unknown"


def headers_of(scope: Scope) -> dict[str, str]:
    """Headers by their small names; of a repeated one all values, as one list."""
    found: dict[str, list[str]] = {}
    for name, value in scope["headers"]:
        found.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
    return {name: ", ".join(values) for name, values in found.items()}
