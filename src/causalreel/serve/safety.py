"""What keeps a server safe: limits, the bearer token, rates, and the doorkeeper that every request passes first.

The doorkeeper (`Guard`) is plain ASGI and stands before routing, so that no route can be forgotten: it checks the
Host header (DNS rebinding), the Origin header (other sites' pages, WebSockets included, which no CORS rule covers),
the rate per client, the token, and the size of the body while it arrives; and it lays security headers on all answers.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import json
import logging
import re
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from causalreel.data import pictures

log = logging.getLogger(__name__)

MIB = 1 << 20
HEALTH = ("/healthz", "/readyz")
"""Probes ask by address and without a token."""
OPEN_PATHS = (*HEALTH, "/")
"""Paths that need no token: health, and the page, which asks for the token itself and holds no secret."""
OPEN_PREFIX = "/static/"
SUBPROTOCOL = "causalreel.v1"
"""WebSocket subprotocol that the server answers with."""
BEARER_PREFIX = "bearer."
"""A second subprotocol, this and the token in base64url without padding, carries a browser's token."""
FORMATS = ("PNG", "JPEG", "WEBP")
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
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
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
    prompt_chars: int = 2000
    """Longest prompt."""
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
        for name in ("body_bytes", "image_pixels", "prompt_chars", "video_frames", "queued_videos", "kept_videos"):
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


def decode_base64(text: str) -> bytes:
    """Base64, or a data: URL of it -> bytes; ValueError."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("image must be base64 of a PNG, JPEG or WebP file") from error


def decode_picture(data: bytes, size: tuple[int, int], *, pixels: int) -> Tensor:
    """A picture's bytes -> (3,H,W) in [-1,1], cropped to `size` (height, width).

    Its kind and size are read from its head before any pixel is; more than `pixels` are refused, and kinds other than
    PNG, JPEG and WebP are not even tried. One is decoded at a time. Raises ValueError.
    """
    with _decoding:
        return pictures.decode_picture(data, size, formats=FORMATS, pixels=pixels)[0]


def is_readable(text: str, limit: int) -> str:
    """The text if it is a prompt that may be kept, shown and encoded; ValueError."""
    if not text.strip():
        raise ValueError("prompt must hold text, got none")
    if len(text) > limit:
        raise ValueError(f"prompt must have at most {limit} characters, got {len(text)}")
    if any(0xD800 <= ord(letter) <= 0xDFFF or (ord(letter) < 32 and letter not in "\t\n\r") for letter in text):
        raise ValueError("prompt must hold no control characters and no halves of surrogate pairs")
    return text


def token_of(scope: Scope) -> str | None:
    """The token a request brings: `Authorization: Bearer`, or a browser's WebSocket subprotocol."""
    headers = _headers(scope)
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


class Guard:
    """The doorkeeper: ASGI around ASGI."""

    def __init__(self, app: Any, settings: Settings, rates: Rates, count: Callable[[str], None]) -> None:
        """count: called with the code of every refusal."""
        self.app, self.settings, self.rates, self.count = app, settings, rates, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            self.check(scope)
        except ApiError as error:
            self.count(error.code)
            await refuse(error, scope, receive, send)
            return
        is_http = scope["type"] == "http"
        began: list[bool] = []
        try:
            limited = _limited(receive, self.settings.body_bytes) if is_http else receive
            await self.app(scope, limited, _dressed(scope, send, began))
        except Exception:
            number = secrets.token_hex(4)
            log.exception("error %s at %s", number, scope["path"])
            self.count("internal")
            if not is_http or began:  # too late for another answer
                raise
            message = f"internal error; the server's log has more under {number}"
            await refuse(ApiError(500, "internal", message), scope, receive, send)

    def check(self, scope: Scope) -> None:
        """Raise the ApiError that the request earns before its body is read."""
        headers, path = _headers(scope), scope["path"]
        host = headers.get("host", "")
        if self.settings.hosts and path not in HEALTH and _name(host) not in self.settings.hosts:
            raise ApiError(421, "wrong_host", "this server does not go by that name; see --allow-host")
        origin = headers.get("origin")
        is_change = scope["type"] == "websocket" or scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if origin is not None and is_change and not self._is_own(origin, host):
            raise ApiError(403, "wrong_origin", "pages of other sites may not use this server; see --allow-origin")
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            return
        if scope["type"] == "http" and scope["method"] == "OPTIONS":
            return  # a preflight carries no token; CORS answers it
        wait = self.rates.take(client_of(scope))
        if wait > 0:
            raise ApiError(
                429, "too_many_requests", "too many requests; slow down", {"retry-after": str(1 + int(wait))}
            )
        if not is_right(self.settings.token, token_of(scope)):
            raise ApiError(401, "unauthorized", "a bearer token is needed", {"www-authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.settings.body_bytes:
            raise too_large(self.settings.body_bytes)

    def _is_own(self, origin: str, host: str) -> bool:
        return origin in self.settings.origins or urlsplit(origin).netloc.lower() == host.lower()


def client_of(scope: Scope) -> str:
    """Who asks: the address of the peer (uvicorn puts that of a trusted proxy's client there)."""
    return str(scope["client"][0]) if scope.get("client") else "unknown"


def too_large(limit: int) -> ApiError:
    return ApiError(413, "too_large", f"the request must have at most {limit} bytes")


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the error; a WebSocket is not accepted."""
    prefix = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    if scope["type"] == "websocket":
        await receive()  # the request to connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": error.message})
            return
    body = error.body()
    extra = {"content-type": "application/json", "content-length": str(len(body)), **HEADERS, **error.headers}
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in extra.items()]
    await send({"type": f"{prefix}.start", "status": error.status, "headers": headers})
    await send({"type": f"{prefix}.body", "body": body})


def _limited(receive: Receive, limit: int) -> Receive:
    """Count a body as it arrives: its length need not have been told."""
    seen = 0

    async def counted() -> MutableMapping[str, Any]:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > limit:
            raise too_large(limit)
        return message

    return counted


def _dressed(scope: Scope, send: Send, began: list[bool]) -> Send:
    """Lay the security headers on the answer and note that it began. Answers of the API are nobody's to keep, and the
    page's files are asked for again after an upgrade."""
    path = scope["path"]
    kept = {"cache-control": "no-store"} if path.startswith("/v1/") else {}
    kept = {"cache-control": "no-cache"} if path.startswith(OPEN_PREFIX) else kept

    async def dressed(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            began.append(True)
            present = {name.lower() for name, _ in message["headers"]}
            extra = [(name.encode(), value.encode()) for name, value in (HEADERS | kept).items()]
            new = [(name, value) for name, value in extra if name not in present]
            message = {**message, "headers": [*message["headers"], *new]}
        await send(message)

    return dressed


def _headers(scope: Scope) -> dict[str, str]:
    """Of repeated headers the first: a client cannot add one behind that of a proxy."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in reversed(scope["headers"])}


def _name(host: str) -> str:
    """Host header -> its name without port, lower case; [::1]:8000 -> [::1]."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()
