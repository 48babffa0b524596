"""The doorkeeper, plain ASGI before routing, so that no route can be forgotten.

It checks the Host header (DNS rebinding), the Origin header (other sites' pages, WebSockets included, which no CORS
rule covers), the rate per client and the token; it counts and times a body while it arrives; and it lays security
headers on all answers. An answer that comes before the whole body is sent at once, and what is left of the body is read
and thrown away for a while before the connection closes: a client that still sends would be reset and never see it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, MutableMapping
from typing import Any

from starlette.requests import ClientDisconnect

from causalreel.serve.safety import (
    HEADERS,
    HEALTH,
    KIB,
    MIB,
    OPEN_PATHS,
    OPEN_PREFIX,
    ApiError,
    Rates,
    Receive,
    Scope,
    Send,
    Settings,
    client_of,
    headers_of,
    is_right,
    token_of,
)

log = logging.getLogger(__name__)

WITH_PICTURE = re.compile("/v1/(sessions|videos|sessions/replay|sessions/[^/]+/commands)")
"""Paths whose bodies may hold a picture; all others are small."""
SMALL = 64 * KIB
"""Bytes of a body or message that holds no picture."""
LARGE_BODIES, LARGE_A_CLIENT = 16, 6
"""Bodies beyond `SMALL` that may be in memory at once, of all clients and of one."""
HEAD_BYTES = 32 * KIB
"""Bytes of all headers."""
ONCE = ("host", "origin", "authorization", "content-type", "content-length")
"""Headers that decide: with two values, two readers may believe different ones."""
BODY_S, BYTES_PER_S = 10.0, 32 * KIB
"""A body is waited for so long, and longer by what has come of it at this rate."""
DRAIN_S, DRAIN_BYTES = 5.0, 64 * MIB
"""What a client still sends behind its answer is read for so long, and so much of it."""
LOOK_S = 0.5
"""How often a wait for a body looks whether the server is stopping."""


class Guard:
    """The doorkeeper: ASGI around ASGI."""

    def __init__(
        self,
        app: Any,
        settings: Settings,
        rates: Rates,
        count: Callable[[str], None],
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """count: called with the code of every refusal."""
        self.app, self.settings, self.rates, self.count, self.is_stopping = app, settings, rates, count, is_stopping
        self.large: Counter[str] = Counter()
        """Large bodies in memory, by client."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = Body(self, scope, receive)
        answer = Answer(scope, send, body)
        try:
            self.check(scope)
            body.expect()
            await self.app(scope, body.read, answer.send)
        except ClientDisconnect:
            return  # nobody is there to be answered
        except ApiError as error:
            self.count(error.code)
            if answer.began:
                raise
            await refuse(error, scope, body.read, answer.send)
        except Exception:
            number = self._log(scope)
            if answer.began:  # too late for another answer
                raise
            message = f"internal error; the server's log has more under {number}"
            await refuse(ApiError(500, "internal", message), scope, body.read, answer.send)
        finally:
            body.forget()

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self.check(scope)
        except ApiError as error:
            self.count(error.code)
            await refuse(error, scope, receive, send)
            return
        try:
            await self.app(scope, receive, send)
        except Exception:
            self._log(scope)
            raise

    def _log(self, scope: Scope) -> str:
        """Log the exception at hand -> the number under which it is found."""
        number = secrets.token_hex(4)
        log.exception("error %s at %.200r", number, scope["path"])
        self.count("internal")
        return number

    def check(self, scope: Scope) -> None:
        """Raise the ApiError that the request earns before its body is read."""
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEAD_BYTES:
            raise ApiError(431, "invalid_request", f"headers must have at most {HEAD_BYTES} bytes together")
        names = Counter(name.decode("latin-1").lower() for name, _ in scope["headers"])
        if twice := next((name for name in ONCE if names[name] > 1), None):
            raise ApiError(400, "invalid_request", f"the header {twice} must be given once")
        headers, path = headers_of(scope), scope["path"]
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
            raise too_many(wait)
        if not is_right(self.settings.token, token_of(scope)):
            raise ApiError(401, "unauthorized", "a bearer token is needed", {"www-authenticate": "Bearer"})

    def _is_own(self, origin: str, host: str) -> bool:
        scheme, _, name = origin.partition("://")  # an origin has no path (RFC 6454): nothing else is to be parsed
        return origin in self.settings.origins or (scheme in ("http", "https") and name.lower() == host.lower() != "")

    def limit(self, scope: Scope) -> int:
        """Bytes that the body of a request may have."""
        may_be_large = scope["method"] == "POST" and WITH_PICTURE.fullmatch(scope["path"])
        return self.settings.body_bytes if may_be_large else min(SMALL, self.settings.body_bytes)


class Body:
    """A request's body as it arrives: counted, timed, and what is left of it thrown away."""

    def __init__(self, guard: Guard, scope: Scope, receive: Receive) -> None:
        headers = headers_of(scope)
        self.guard, self.receive, self.client = guard, receive, client_of(scope)
        self.limit, self.length = guard.limit(scope), headers.get("content-length", "0")
        self.is_over = self.length == "0" and "transfer-encoding" not in headers
        """All of it has been read, or the client has gone."""
        self.seen, self.began, self.is_large = 0, time.monotonic(), False

    def expect(self) -> None:
        """Raise ApiError for a length that the headers give and that is too large."""
        if not re.fullmatch("[0-9]{1,18}", self.length):
            raise ApiError(400, "invalid_request", "content-length must be a number of bytes")
        if int(self.length) > self.limit:
            raise too_large(self.limit)

    async def read(self) -> MutableMapping[str, Any]:
        """The next message; ApiError if the body is too large or too slow, or the server stops."""
        if self.is_over:
            return await self.receive()
        message = await self._within(self.began + BODY_S + self.seen / BYTES_PER_S)
        self.seen += len(message.get("body", b""))
        if self.seen > self.limit:
            raise too_large(self.limit)
        if self.seen > SMALL and not self.is_large:
            self._count_as_large()
        return message

    async def drain(self) -> None:
        """Read what is left and throw it away, within limits."""
        until, most = time.monotonic() + DRAIN_S, self.seen + DRAIN_BYTES
        while not self.is_over and self.seen < most and time.monotonic() < until:
            try:
                message = await self._within(until)
            except ApiError:
                return
            self.seen += len(message.get("body", b""))

    async def _within(self, until: float) -> MutableMapping[str, Any]:
        while True:
            if self.guard.is_stopping():
                raise ApiError(503, "busy", "the server is shutting down")
            left = until - time.monotonic()
            if left <= 0:
                raise ApiError(408, "too_slow", "the body did not arrive in time")
            try:
                message = await asyncio.wait_for(self.receive(), min(left, LOOK_S))
            except asyncio.TimeoutError:
                continue
            self.is_over = message["type"] == "http.disconnect" or not message.get("more_body", False)
            return message

    def _count_as_large(self) -> None:
        large = self.guard.large
        if large[self.client] >= LARGE_A_CLIENT or large.total() >= LARGE_BODIES:
            raise ApiError(503, "busy", "too many pictures arrive at once", {"retry-after": "2"})
        self.is_large = True
        large[self.client] += 1

    def forget(self) -> None:
        """The request is over, and its memory free."""
        if self.is_large:
            self.guard.large[self.client] -= 1
            self.guard.large += Counter()  # those at zero go


class Answer:
    """An answer on its way out, dressed in the security headers."""

    def __init__(self, scope: Scope, send: Send, body: Body) -> None:
        self.sender, self.body, self.is_head = send, body, scope["method"] == "HEAD"
        self.began = False
        path = scope["path"]
        self.extra = dict(HEADERS)  # answers of the API are nobody's to keep; the page's files may change by an upgrade
        if path.startswith("/v1/"):
            self.extra["cache-control"] = "no-store"
        elif path.startswith(OPEN_PREFIX):
            self.extra["cache-control"] = "no-cache"

    async def send(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.began = True
            present = {name.lower() for name, _ in message["headers"]}
            closing = {} if self.body.is_over else {"connection": "close"}
            extra = [(name.encode(), value.encode()) for name, value in (self.extra | closing).items()]
            new = [(name, value) for name, value in extra if name not in present]
            message = {**message, "headers": [*message["headers"], *new]}
        elif message["type"] == "http.response.body":
            if self.is_head:
                message = {**message, "body": b""}
            if not message.get("more_body", False) and not self.body.is_over:
                await self.sender({**message, "more_body": True})
                await self.body.drain()
                message = {"type": "http.response.body", "body": b""}
        await self.sender(message)


def too_large(limit: int) -> ApiError:
    return ApiError(413, "too_large", f"the request must have at most {limit} bytes")


def too_many(wait_s: float) -> ApiError:
    return ApiError(429, "too_many_requests", "too many requests; slow down", {"retry-after": str(1 + int(wait_s))})


async def refuse(error: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the error; a WebSocket is not accepted."""
    prefix = "websocket.http.response" if scope["type"] == "websocket" else "http.response"
    extra = {"content-type": "application/json", **error.headers}
    if scope["type"] == "websocket":
        await receive()  # the request to connect
        if "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": error.message})
            return
        extra |= HEADERS
    body = error.body()
    extra["content-length"] = str(len(body))
    headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in extra.items()]
    await send({"type": f"{prefix}.start", "status": error.status, "headers": headers})
    await send({"type": f"{prefix}.body", "body": body})


def _name(host: str) -> str:
    """Host header -> its name without port, lower case; [::1]:8000 -> [::1]."""
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].lower()
