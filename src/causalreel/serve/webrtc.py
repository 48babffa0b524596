"""A session over a peer connection: its pixels on a video track, its messages on the data channel "control".

Signalling is one request: the client's offer comes with all of its candidates and the answer with all of the server's
(no trickling). The data channel carries the text messages of the WebSocket stream, and one message more: the header
of each chunk (`"type": "chunk"`) when its first frame is shown, since a video track has no room for it.

No STUN server is asked unless one is named, so that a server on a desk talks to nobody; and a server that listens on
one address offers that address alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

try:
    from aiortc import RTCConfiguration, RTCIceServer, RTCPeerConnection, RTCSessionDescription
    from aiortc.rtcrtpsender import RTCRtpSender
except ImportError as error:
    raise ImportError("WebRTC needs aiortc; install it with: pip install 'causalreel[webrtc]'") from error
from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel

from causalreel.infer.values import Choice, Text, Whole
from causalreel.serve.bodies import BODY, DOOR, errors, read_body, takes
from causalreel.serve.emitted import Emitted
from causalreel.serve.handle import Handle
from causalreel.serve.safety import ApiError, client_of
from causalreel.serve.service import Service, Talk
from causalreel.serve.track import Reader, SessionTrack, matrix_of
from causalreel.serve.wire import dumps

log = logging.getLogger(__name__)

CHANNEL = "control"
"""Label of the data channel."""
MAX_OFFER = 48 * 1024
"""Characters of an offer."""
MAX_CANDIDATES = 64
MAX_WAITING = 64
"""Messages of a client that wait for their answers; with more it is let go."""
PARTING_S = 1.0
"""Between the last message and the end of the connection."""


@dataclass(frozen=True)
class Hooks:
    """What the rest of the server does for a peer."""

    answers: Callable[[str | bytes], list[dict[str, Any]]]
    """A client's message -> the messages that answer it; may take a while, raises nothing."""
    threads: Callable[[str | bytes], Executor | None] = lambda said: None
    """Which do that; None: the event loop's own."""
    shown: Callable[[Emitted], None] = lambda chunk: None
    """Called when a chunk begins to be shown."""
    dropped: Callable[[], None] = lambda: None
    """Called when the connection broke off."""
    is_too_much: Callable[[], bool] = lambda: False
    """Whether the client goes on sending though it was told to slow down."""


@dataclass(frozen=True)
class Offer:
    """A client's session description, candidates included."""

    sdp: Annotated[str, Text("Candidates included.", most=MAX_OFFER)]
    type: Annotated[str, Choice(("offer",))]
    after: Annotated[int | None, Whole(-1, (1 << 53) - 1, "Last chunk seen; null: where the last viewer was.")] = None


class Answer(BaseModel):
    """The server's session description, candidates included."""

    sdp: str
    type: Literal["answer"] = "answer"


class PeersFull(RuntimeError):
    """As many peer connections are open as the server allows."""


@dataclass(frozen=True)
class PeerLimits:
    """What peers may ask for; all of it bounded."""

    peers: int = 32
    """Open peer connections of one process."""
    connect_s: float = 30.0
    """Seconds from the answer to a connection; a peer that takes longer is let go."""
    backlog: int = 1 << 20
    """Bytes on a data channel that the client has not taken; beyond them the peer is let go."""
    shorter_side: int = 256
    """Smaller videos have their pixels repeated up to this side, since 4:2:0 would blur their colours."""

    def __post_init__(self) -> None:
        for name in ("peers", "connect_s", "backlog", "shorter_side"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


class Control:
    """The data channel: commands in; acknowledgements, states, chunk headers and the end out."""

    def __init__(self, handle: Handle, hooks: Hooks, backlog: int, give_up: Callable[[], None]) -> None:
        self.handle, self.hooks, self.backlog, self.give_up = handle, hooks, backlog, give_up
        self.channel: Any = None
        self.early: dict[str, dict[str, Any]] = {}
        """Type -> its last message from before there was a channel."""
        self.waiting: asyncio.Queue[str | bytes] = asyncio.Queue(MAX_WAITING)

    def attach(self, channel: Any) -> None:
        """Serve a channel that the client opened; one named otherwise, or a second one, is closed."""
        if channel.label != CHANNEL or self.channel is not None:
            channel.close()
            return
        self.channel = channel
        channel.on("message", self.receive)
        state = self.handle.session.state()
        size = {"width": state["width"], "height": state["height"]}
        self.send({"type": "hello", "state": state, **size, "codec": None})
        for message in self.early.values():
            self.send(message)

    def send(self, message: dict[str, Any]) -> None:
        """Put a message on the channel, at the latest when there is one; a client that takes none of them is let go."""
        if self.channel is None:
            self.early[message["type"]] = message
            return
        if self.channel.readyState != "open":
            return
        if self.channel.bufferedAmount > self.backlog:
            self.give_up()
            return
        self.channel.send(dumps(message))

    def receive(self, text: str | bytes) -> None:
        """Take a message of the client; it is answered in turn."""
        try:
            self.waiting.put_nowait(text)
        except asyncio.QueueFull:
            self.give_up()

    async def serve(self) -> None:
        """Answer messages one after the other, for as long as the peer lasts; a command may have text to encode."""
        while True:
            text = await self.waiting.get()
            threads = self.hooks.threads(text)
            for message in await asyncio.get_running_loop().run_in_executor(threads, self.hooks.answers, text):
                self.send(message)
            if self.hooks.is_too_much():
                self.give_up()


class Peer:
    """One client's connection: a session's track and data channel, and the tasks that serve them."""

    def __init__(
        self, handle: Handle, hooks: Hooks, after: int | None, limits: PeerLimits, settings: RTCConfiguration
    ) -> None:
        self.hooks, self.limits = hooks, limits
        self.connection = RTCPeerConnection(settings)
        self.control = Control(handle, hooks, limits.backlog, self.leave)
        self.track = SessionTrack(Reader(handle, after), self.control.send, hooks.shown, limits.shorter_side)
        self.replaced = asyncio.Event()
        """Set by whoever wants to show the session instead."""
        self.is_over = asyncio.Event()
        self.connection.on("datachannel", self.control.attach)
        self.connection.on("connectionstatechange", self._watch)

    async def answer(self, sdp: str, hosts: Sequence[str]) -> str:
        """The client's offer -> the answer; ValueError if there is none."""
        connection = self.connection
        try:
            sender = connection.addTransceiver(self.track, direction="sendonly")
            sender.setCodecPreferences(by_preference())  # before the offer, which settles the codec
            await connection.setRemoteDescription(RTCSessionDescription(without_names(sdp, hosts), "offer"))
            takes_video = sender.mid is not None
            if takes_video:
                offer_only(connection, hosts)
                await connection.setLocalDescription(await connection.createAnswer())
        except Exception as error:  # the parser raises whatever it stumbles over
            log.info("an offer could not be answered: %r", error)
            raise ValueError("the offer cannot be read or answered") from error
        if not takes_video:
            raise ValueError("the offer must ask for one video track, got none")
        self.track.matrix = matrix_of(connection.localDescription.sdp)
        return connection.localDescription.sdp

    async def serve(self) -> None:
        """Stay until the client leaves, another viewer takes over or the session ends; then close everything."""
        tasks = [
            asyncio.ensure_future(part)
            for part in (self.control.serve(), self.is_over.wait(), self._give_way(), self._expect(), self._play())
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.close()

    async def close(self) -> None:
        """Close the connection; the session goes on."""
        self.track.stop()
        await self.connection.close()

    def leave(self) -> None:
        """Have `serve` return."""
        self.is_over.set()

    def _watch(self) -> None:
        if self.connection.connectionState == "failed":
            self.hooks.dropped()
        if self.connection.connectionState in ("failed", "closed"):
            self.leave()

    async def _expect(self) -> None:
        """Return if the client does not connect in time."""
        await asyncio.sleep(self.limits.connect_s)
        if self.connection.connectionState == "connected":
            await asyncio.Event().wait()
        log.info("a peer did not connect within %g s", self.limits.connect_s)

    async def _give_way(self) -> None:
        await self.replaced.wait()
        self.track.stop()
        self.control.send({"type": "ended", "reason": "another viewer took over", "is_error": False})
        await asyncio.sleep(PARTING_S)

    async def _play(self) -> None:
        await self.track.is_over.wait()
        await asyncio.sleep(PARTING_S)


class Peers:
    """All peer connections of one process, one a session: a newer viewer takes over. Belongs to one event loop.

    viewers: session -> what shows it, shared with other ways of showing one; each has an event `replaced`.
    """

    def __init__(
        self,
        limits: PeerLimits = PeerLimits(),
        *,
        hosts: Sequence[str] = (),
        ice_servers: Sequence[str] = (),
        viewers: dict[str, Any] | None = None,
    ) -> None:
        """hosts: addresses of this machine to offer; none: all of them. ice_servers: URLs such as `stun:host:port`."""
        self.limits, self.hosts = limits, tuple(hosts)
        self.settings = RTCConfiguration(iceServers=[RTCIceServer(url) for url in ice_servers])
        self.viewers = {} if viewers is None else viewers
        self.open: dict[Peer, asyncio.Future[None] | None] = {}

    async def answer(self, handle: Handle, sdp: str, hooks: Hooks, *, after: int | None = None) -> str:
        """A client's offer -> the answer, with a new peer connection behind it that shows this session.

        after: the last chunk the client has seen; None: go on where the last viewer was. Raises ValueError for an offer
        that cannot be answered, `PeersFull` when no more are taken.
        """
        check_offer(sdp)
        if after is not None and not -1 <= after <= handle.newest:
            raise ValueError(f"after must be from -1 to {handle.newest}, the last chunk made; got {after}")
        if len(self.open) >= self.limits.peers:
            raise PeersFull(f"{self.limits.peers} peer connections are open, the most this server takes")
        peer = Peer(handle, hooks, after, self.limits, self.settings)
        self.open[peer] = None
        try:
            answer = await peer.answer(sdp, self.hosts)
        except BaseException:
            del self.open[peer]
            await peer.close()
            raise
        before, self.viewers[handle.id] = self.viewers.get(handle.id), peer
        if before is not None:
            before.replaced.set()
        self.open[peer] = asyncio.ensure_future(self._serve(peer, handle.id))
        return answer

    async def _serve(self, peer: Peer, id: str) -> None:
        try:
            await peer.serve()
        except Exception:
            log.exception("a peer connection failed")
        finally:
            self.open.pop(peer, None)
            if self.viewers.get(id) is peer:
                del self.viewers[id]

    async def close(self) -> None:
        """Close every peer connection; sessions go on."""
        tasks = [task for task in self.open.values() if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def check_offer(sdp: str) -> None:
    """ValueError for an offer that is too large to be honest."""
    if len(sdp) > MAX_OFFER:
        raise ValueError(f"an offer must have at most {MAX_OFFER} characters, got {len(sdp)}")
    candidates = sdp.count("a=candidate:")
    if candidates > MAX_CANDIDATES:  # each is an address that packets are sent to
        raise ValueError(f"an offer must name at most {MAX_CANDIDATES} candidates, got {candidates}")


def without_names(sdp: str, hosts: Sequence[str]) -> str:
    """An offer, on loopback without candidates that are names, which browsers put for addresses
    (draft-ietf-mmusic-mdns-ice-candidates): finding them takes the network, and a client on this machine is known by
    where its checks come from."""
    if not hosts or not all(is_loopback(host) for host in hosts):
        return sdp
    lines = sdp.splitlines(keepends=True)
    return "".join(line for line in lines if not (line.startswith("a=candidate:") and ".local " in line))


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def by_preference() -> list[Any]:
    """H.264, then VP8; aiortc encodes no other."""
    codecs = RTCRtpSender.getCapabilities("video").codecs
    return sorted(codecs, key=lambda codec: codec.mimeType != "video/H264")


def offer_only(peer: RTCPeerConnection, hosts: Sequence[str]) -> None:
    """Have a peer open ports on these addresses alone, if any; call before its local description is set.

    aiortc has no setting for this and leaves loopback out, so its list of addresses is replaced where it is used.
    """
    if not hosts:
        return
    ends = [t.receiver.transport for t in peer.getTransceivers()] + ([peer.sctp.transport] if peer.sctp else [])
    for end in ends:
        connection = end.transport.iceGatherer._connection
        connection.get_component_candidates = _gathers(connection.get_component_candidates, list(hosts))


def _gathers(gather: Callable[..., Any], hosts: list[str]) -> Callable[..., Any]:
    async def gather_these(component: int, addresses: list[str], timeout: int = 5) -> Any:
        return await gather(component=component, addresses=hosts, timeout=timeout)

    return gather_these


# ---- the route -------------------------------------------------------------------------------------------------------

router = APIRouter(prefix="/v1/sessions", tags=["sessions"], responses=DOOR)


@router.post(
    "/{session_id}/webrtc", response_model=Answer, responses=BODY | errors(404, 422), openapi_extra=takes(Offer)
)
async def connect_session(request: Request, session_id: str) -> Answer:
    """Show a session over a peer connection: an offer with its candidates -> the answer with the server's."""
    offer = await read_body(request, Offer)
    service, peers = request.app.state.service, request.app.state.peers
    assert isinstance(service, Service) and isinstance(peers, Peers)
    handle = service.handle(session_id)
    talk = Talk(service, handle, client_of(request.scope))
    hooks = Hooks(
        talk.answer,
        talk.threads,
        partial(service.counters.given, to="webrtc"),
        service.counters.dropped.inc,
        lambda: talk.is_too_much,
    )
    try:
        return Answer(sdp=await peers.answer(handle, offer.sdp, hooks, after=offer.after))
    except PeersFull as error:
        raise ApiError(503, "busy", str(error), {"retry-after": "5"}) from error
    except ValueError as error:
        raise ApiError(400, "invalid_request", str(error)) from error


def add_webrtc(app: FastAPI, limits: PeerLimits = PeerLimits(), **addresses: Sequence[str]) -> None:
    """Give an application of `create_app` the route above; `addresses` are `Peers`' hosts and ice_servers."""
    app.state.peers = peers = Peers(limits, viewers=app.state.service.viewers, **addresses)
    before = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with before(app) as state:
            yield state
            await peers.close()

    app.router.lifespan_context = lifespan
    app.include_router(router)
