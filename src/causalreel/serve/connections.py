"""Connections of strangers: uvicorn's protocols with an end to every wait.

uvicorn waits for ever for the head of a request and for a client to take its answer, counts no connections and answers
every ping. Here a head has `HEAD_S` seconds, an answer may stand still for `STALL_S`, connections are counted by client
and in all (the oldest that only waits makes room for a new one), and pings and slivers of messages have a rate.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from causalreel.serve.guard import HEAD_BYTES
from causalreel.serve.safety import KIB, Rates
from causalreel.serve.service import PATIENCE

HEAD_S = 10.0
"""A request's head has to be there in so many seconds."""
STALL_S = 60.0
"""An answer of which nothing is taken for so long is given up."""
MOST, MOST_A_CLIENT = 512, 128
"""Open connections without streams: in all, and of one client."""
SLIVER = KIB
"""Parts of a message that are shorter cost as much as a message."""


class Crowd:
    """The open connections, the oldest first."""

    def __init__(self, *, most: int = MOST, a_client: int = MOST_A_CLIENT) -> None:
        self.most, self.a_client = most, a_client
        self.open: dict[Connection, str] = {}

    def enter(self, connection: Connection, client: str) -> bool:
        """Whether there is room; of connections that only wait the oldest makes it, of the client with the most."""
        count = Counter(self.open.values())
        if count[client] >= self.a_client or len(self.open) >= self.most:
            greedy = client if count[client] >= self.a_client else count.most_common(1)[0][0]
            idle = next((one for one, whose in self.open.items() if whose == greedy and one.only_waits), None)
            if idle is None:
                return False
            self.leave(idle)
            idle.transport.abort()
        self.open[connection] = client
        return True

    def leave(self, connection: Connection) -> None:
        self.open.pop(connection, None)


class Connection(HttpToolsProtocol):
    """One HTTP connection; `protocols` gives it its crowd."""

    crowd: Crowd
    head_s, stall_s = HEAD_S, STALL_S

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.head_timer: asyncio.TimerHandle | None = None
        self.stall_timer: asyncio.TimerHandle | None = None
        self.head_bytes = 0

    @property
    def only_waits(self) -> bool:
        """The client has to send something before there is anything to do."""
        cycle = self.cycle
        return cycle is None or cycle.response_complete or cycle.more_body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        if self.crowd.enter(self, self.client[0] if self.client else "unknown"):
            self._await_head()
        else:
            self._refuse(503, "Service Unavailable", "busy", "too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override] - asyncio reads it, uvicorn returns nothing
        """A client that has sent its request and closed its half still gets its answer -> whether to stay open."""
        if not self.only_waits:
            self.cycle.keep_alive = False
        return not self.only_waits

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.head_timer is not None:
            self.head_bytes += len(data)
            if self.head_bytes > 2 * HEAD_BYTES:
                message = f"headers must have at most {HEAD_BYTES} bytes together"
                self._refuse(431, "Request Header Fields Too Large", "invalid_request", message)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def handle_websocket_upgrade(self) -> None:
        if not self.url.isascii() or not self.url.startswith(b"/"):
            self.send_400_response("the address of a WebSocket must be ASCII and begin with /")
            return
        self._forget()
        super().handle_websocket_upgrade()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stall_timer = self.loop.call_later(self.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.stall_timer is not None:
            self.stall_timer.cancel()
            self.stall_timer = None

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "Bad Request", "invalid_request", msg)

    def _await_head(self) -> None:
        if self.head_timer is None:
            self.head_bytes = 0
            self.head_timer = self.loop.call_later(self.head_s, self._late)

    def _stop_timer(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _late(self) -> None:
        self.head_timer = None
        if not self.only_waits:  # the next request already begins while this one is answered
            self._await_head()
        else:
            self._refuse(408, "Request Timeout", "too_slow", "the request did not arrive in time")

    def _refuse(self, status: int, phrase: str, code: str, message: str) -> None:
        """Answer in the form of all errors, before there is a request that the application could answer; and close."""
        body = json.dumps({"error": {"code": code, "message": message}}).encode("ascii")
        head = f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self._forget()
        if not self.transport.is_closing():
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(head.encode("ascii") + b"connection: close\r\n\r\n" + body)
            self.transport.close()

    def _forget(self) -> None:
        self.crowd.leave(self)
        self._stop_timer()
        if self.stall_timer is not None:
            self.stall_timer.cancel()
            self.stall_timer = None


class Talking(WebSocketsSansIOProtocol):
    """One WebSocket connection; `protocols` gives it its rate."""

    per_s: float
    burst: int

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.rate, self.refused = Rates(self.per_s, self.burst), 0

    def handle_ping(self) -> None:
        if self._may():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # the answer, which is not given

    def handle_pong(self, event: Any) -> None:
        if self._may():
            super().handle_pong(event)

    def handle_cont(self, event: Any) -> None:
        if event.fin or len(event.data) >= SLIVER or self._may():
            super().handle_cont(event)
        elif not self.close_sent:
            self._fail(1008, "too many parts of a message")

    def send_receive_event_to_app(self) -> None:
        if self.curr_msg_data_type == "text":
            try:
                b"".join(self.frames).decode()
            except UnicodeDecodeError:
                self.frames = []
                self._fail(1007, "text must be UTF-8")
                return
        super().send_receive_event_to_app()

    def _may(self) -> bool:
        may = self.rate.take("") == 0
        self.refused = 0 if may else self.refused + 1
        if self.refused >= PATIENCE and not self.close_sent:
            self._fail(1008, "too many pings")
        return may

    def _fail(self, code: int, reason: str) -> None:
        if self.conn.close_sent is None:
            self.conn.send_close(code, reason)
            self.handle_parser_exception()


def protocols(*, per_s: float, burst: int, shares_client: bool) -> tuple[type[Connection], type[Talking]]:
    """Classes of connections for one server. shares_client: all come through a proxy and look like one client."""
    crowd = Crowd(a_client=MOST if shares_client else MOST_A_CLIENT)
    return type("_Connection", (Connection,), {"crowd": crowd}), type(
        "_Talking", (Talking,), {"per_s": per_s, "burst": burst}
    )
