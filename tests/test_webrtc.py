"""A session over a peer connection: frames in order, commands over the data channel, nothing unbounded; on loopback."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("aiortc", reason="needs the extra causalreel[webrtc]")

from aiortc import RTCConfiguration, RTCPeerConnection, RTCRtpReceiver, RTCSessionDescription
from aiortc.mediastreams import MediaStreamError
from fastapi import FastAPI
from httpx import ASGITransport, AsyncClient
from PIL import Image

import causalreel
from causalreel.data.colour import BT601, BT709
from causalreel.eval.metrics import MetricConfig, measure
from causalreel.infer.pipeline import Pipeline
from causalreel.serve import webrtc
from causalreel.serve.app import create_app
from causalreel.serve.emitted import Applied, Emitted, Timings
from causalreel.serve.handle import Ended, Lost
from causalreel.serve.safety import Settings
from causalreel.serve.track import CLOCK, LOOK_S, Pace, Reader, SessionTrack
from causalreel.serve.webrtc import Control, Hooks, PeerLimits, Peers, PeersFull, add_webrtc
from patience import PATIENCE_S

LOOPBACK = ["127.0.0.1"]
COLOURS = {"a red square": (220, 30, 30), "a blue square": (30, 30, 220)}


class Double:
    """A handle and its session: chunks of two frames of the prompt's colour."""

    def __init__(self, *, fps: float = 50.0, chunks: int = 10_000, kept: int = 10_000) -> None:
        self.id, self.session, self.ended = "double", self, None
        self.fps, self.chunks, self.kept = fps, chunks, kept
        self.prompt, self.number, self.pulled = "a red square", 0, []
        self.newest = self.taken = -1
        self.shown: list[Emitted] = []
        self.told: list[Callable[[], None]] = []
        self.applied: list[Applied] = []
        self.lock = threading.Lock()

    def state(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "fps": self.fps, "sequence": self.newest + 1, "width": 32, "height": 32}

    def listen(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.told.append(callback)
        return lambda: callback in self.told and self.told.remove(callback)

    def command(self, name: str, *, text: str | None = None, fps: float | None = None) -> int:
        if name not in ("prompt", "fps"):
            raise ValueError(f"name must be prompt or fps, got {name!r}")
        with self.lock:
            self.number += 1
            self.prompt, self.fps = text or self.prompt, fps or self.fps
            self.applied.append(Applied(self.number, name, {"text": text}, 0.01))
            return self.number

    def pull(self, after: int, timeout: float) -> Emitted | Ended | None:
        with self.lock:
            sequence = after + 1
            self.pulled.append(sequence)
            if not -1 <= after <= self.newest:
                raise ValueError(f"after must be from -1 to {self.newest}")
            self.taken = max(self.taken, after)
            if sequence >= self.chunks:
                return Ended("that was all", False)
            if sequence <= self.taken - self.kept:
                raise Lost(f"chunk {sequence} was dropped")
            self.newest = max(self.newest, sequence)
            frames = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
            frames[:] = torch.tensor(COLOURS[self.prompt], dtype=torch.uint8)
            frames[1] = (frames[1] * 0.6).to(torch.uint8)  # the second one is darker
            commands, self.applied = tuple(self.applied), []
            return Emitted(sequence, 2 * sequence, frames, self.prompt, Timings(0.01, 0.01, 0.0), commands)

    @property
    def hooks(self) -> Hooks:
        return Hooks(self.answers, shown=self.shown.append)

    def answers(self, text: str | bytes) -> list[dict[str, Any]]:
        """What `Service.answer` does, in short."""
        message = json.loads(text)
        del message["type"]
        number = message.pop("id")
        try:
            ack = {"type": "ack", "id": number, "number": self.command(**message)}
            return [ack, {"type": "state", "state": self.state()}]
        except ValueError as error:
            return [{"type": "error", "id": number, "message": str(error)}]


OPENED: list[RTCPeerConnection] = []
"""Peers of clients; one that a failed test leaves open keeps its loop from ending for ever."""


class Client:
    """What a browser does: asks for one video track, opens the data channel, keeps all that comes."""

    def __init__(self) -> None:
        self.peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        OPENED.append(self.peer)
        self.peer.addTransceiver("video", direction="recvonly")
        self.channel = self.peer.createDataChannel(webrtc.CHANNEL)
        self.messages: list[dict[str, Any]] = []
        self.frames: list[Any] = []
        self.news = asyncio.Event()
        self.channel.on("message", self._keep)
        self.peer.on("track", lambda track: asyncio.ensure_future(self._watch(track)))

    def _keep(self, text: str) -> None:
        self.messages.append(json.loads(text))
        self.news.set()

    async def _watch(self, track: Any) -> None:
        while True:
            self.frames.append(await track.recv())
            self.news.set()

    async def offer(self) -> str:
        webrtc.offer_only(self.peer, LOOPBACK)
        await self.peer.setLocalDescription(await self.peer.createOffer())
        return self.peer.localDescription.sdp

    async def accept(self, sdp: str) -> None:
        await self.peer.setRemoteDescription(RTCSessionDescription(sdp, "answer"))

    def send(self, **message: Any) -> None:
        self.channel.send(json.dumps(message))

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.messages if message["type"] == kind]

    async def until(self, holds: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
        async def wait() -> Any:
            while not (found := holds()):
                self.news.clear()
                await self.news.wait()
            return found

        try:
            return await asyncio.wait_for(wait(), seconds)
        except asyncio.TimeoutError:
            kinds = [message["type"] for message in self.messages]
            pytest.fail(f"no {what} within {seconds:g} s; {len(self.frames)} frames, messages {kinds}")


def colour(frame: Any) -> tuple[float, ...]:
    """A decoded frame -> its mean colour."""
    return tuple(frame.to_ndarray(format="rgb24").reshape(-1, 3).mean(0))


def is_near(frame: Any, wanted: tuple[int, ...]) -> bool:
    return bool(np.abs(np.subtract(colour(frame), wanted)).max() < 40)


def connected(scenario: Callable[[Client, Peers, Any], Any], handle: Any, **limits: Any) -> Any:
    """Run a scenario on a client that is connected to a session over loopback."""

    async def run() -> Any:
        peers, client = Peers(PeerLimits(**limits), hosts=LOOPBACK), Client()
        try:
            await client.accept(await peers.answer(handle, await client.offer(), handle.hooks))
            return await scenario(client, peers, handle)
        finally:
            await client.peer.close()
            await peers.close()

    return asyncio.run(run())


async def until_none_is_open(peers: Peers) -> None:
    for _ in range(int(PATIENCE_S / 0.05)):
        if not peers.open and not peers.viewers:
            return
        await asyncio.sleep(0.05)
    pytest.fail("the peer was kept")


def test_frames_arrive_and_a_prompt_change_is_acked_and_shown() -> None:
    async def scenario(client: Client, peers: Peers, handle: Double) -> None:
        await client.until(lambda: len(client.frames) >= 5, "frames")
        await client.until(lambda: is_near(client.frames[-1], COLOURS["a red square"]), "red frames")
        hello = await client.until(lambda: client.of("hello"), "hello")
        assert (hello[0]["width"], hello[0]["height"]) == (32, 32)
        assert hello[0]["state"]["prompt"] == "a red square"
        client.send(type="command", id="x7", name="prompt", text="a blue square")
        ack = await client.until(lambda: client.of("ack"), "ack")
        assert ack == [{"type": "ack", "id": "x7", "number": 1}]
        await client.until(lambda: is_near(client.frames[-1], COLOURS["a blue square"]), "blue frames")
        shown = [chunk for chunk in client.of("chunk") if chunk["prompt"] == "a blue square"]
        assert [command["number"] for chunk in shown for command in chunk["commands"]] == [1]
        state = await client.until(lambda: client.of("state"), "state")
        assert state[-1]["state"]["prompt"] == "a blue square"
        assert (client.frames[-1].width, client.frames[-1].height) == (256, 256)
        assert [peer.track.matrix for peer in peers.open] == [BT709]  # as browsers take H.264 without tags

    connected(scenario, Double())


def test_a_client_without_h264_gets_vp8() -> None:
    async def run() -> None:
        peers, client = Peers(hosts=LOOPBACK), Client()
        codecs = RTCRtpReceiver.getCapabilities("video").codecs
        (wanted,) = client.peer.getTransceivers()
        wanted.setCodecPreferences([codec for codec in codecs if codec.mimeType == "video/VP8"])
        handle = Double()
        answer = await peers.answer(handle, await client.offer(), handle.hooks)
        assert "VP8/90000" in answer and "H264" not in answer
        assert [peer.track.matrix for peer in peers.open] == [BT601]  # which VP8 is by its format
        await client.accept(answer)
        await client.until(lambda: client.frames and is_near(client.frames[-1], COLOURS["a red square"]), "red frames")
        await client.peer.close()
        await peers.close()

    asyncio.run(run())


def test_every_chunk_is_shown_once_and_in_order() -> None:
    async def scenario(client: Client, peers: Peers, handle: Double) -> None:
        chunks = await client.until(lambda: client.of("chunk")[20:] and client.of("chunk"), "chunks")
        numbers = [chunk["sequence"] for chunk in chunks]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        assert all(chunk["first_frame"] == 2 * chunk["sequence"] and chunk["frames"] == 2 for chunk in chunks)
        assert [chunk.sequence for chunk in handle.shown][numbers[0] :][: len(numbers)] == numbers
        stamps = [frame.pts for frame in client.frames]
        assert stamps == sorted(set(stamps))
        assert min(np.diff(stamps)) >= CLOCK / 50 - 1, "frames were sent faster than the session plays"
        assert len(handle.pulled) <= len(client.frames) / 2 + 30, "read far ahead of what was shown"

    connected(scenario, Double())


def test_the_end_of_a_session_is_told_and_the_peer_let_go() -> None:
    async def scenario(client: Client, peers: Peers, handle: Double) -> None:
        ended = await client.until(lambda: client.of("ended"), "end")
        assert ended == [{"type": "ended", "reason": "that was all", "is_error": False}]
        await until_none_is_open(peers)

    connected(scenario, Double(chunks=8))


def test_a_client_that_leaves_frees_its_place_and_not_the_session() -> None:
    async def scenario(client: Client, peers: Peers, handle: Double) -> None:
        await client.until(lambda: client.frames, "frames")
        other = Client()
        with pytest.raises(PeersFull, match="1 peer"):
            await peers.answer(Double(), await other.offer(), handle.hooks)
        await other.peer.close()
        await client.peer.close()
        await until_none_is_open(peers)
        before = len(handle.pulled)
        await asyncio.sleep(0.3)
        assert len(handle.pulled) <= before + 1, "still read after the client left"
        assert handle.ended is None

    connected(scenario, Double(), peers=1)


def test_a_peer_that_never_connects_is_let_go() -> None:
    async def run() -> None:
        peers = Peers(PeerLimits(connect_s=0.2), hosts=LOOPBACK)
        client = Client()
        await peers.answer(Double(), await client.offer(), Double().hooks)
        assert len(peers.open) == 1
        await until_none_is_open(peers)
        await client.peer.close()
        await peers.close()

    asyncio.run(run())


def test_answers_name_only_the_addresses_asked_for_and_no_server_is_asked() -> None:
    async def run() -> str:
        peers, client = Peers(hosts=LOOPBACK), Client()
        assert peers.settings.iceServers == []  # None would be a public STUN server
        try:
            return await peers.answer(Double(), await client.offer(), Double().hooks)
        finally:
            await client.peer.close()
            await peers.close()

    lines = asyncio.run(run()).splitlines()
    video = next(line for line in lines if line.startswith("m=video"))
    assert f"a=rtpmap:{video.split()[3]} H264/90000" in lines, "the first codec is the one that is sent"
    candidates = [line for line in lines if line.startswith("a=candidate:")]
    assert candidates
    assert {line.split()[4] for line in candidates} == {"127.0.0.1"}


BAD_OFFERS = [
    pytest.param("", "one video track", id="empty"),
    pytest.param("v=0\r\nnonsense", "offer", id="nonsense"),
    pytest.param("m=video 9 UDP/TLS/RTP/SAVPF 97\r\n" * 3, "cannot be read", id="only media lines"),
    pytest.param("x" * (webrtc.MAX_OFFER + 1), "at most 49152 characters", id="huge"),
    pytest.param("a=candidate:\r\n" * 65, "at most 64 candidates", id="many candidates"),
]


@pytest.mark.parametrize(("sdp", "message"), BAD_OFFERS)
def test_bad_offers_are_refused_and_leave_nothing_open(sdp: str, message: str) -> None:
    async def run() -> None:
        peers = Peers(hosts=LOOPBACK)
        with pytest.raises(ValueError, match=message):
            await peers.answer(Double(), sdp, Double().hooks)
        assert not peers.open
        await peers.close()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("hosts", "kept"), [(["127.0.0.1"], 1), (["::1"], 1), (["192.0.2.1"], 2), (["127.0.0.1", "192.0.2.1"], 2), ([], 2)]
)
def test_names_of_candidates_are_not_looked_up_on_loopback(hosts: list[str], kept: int) -> None:
    named = "a=candidate:1 1 udp 2113937151 0a1b2c3d.local 50000 typ host\r\n"
    plain = "a=candidate:2 1 udp 2113937151 127.0.0.1 50001 typ host\r\n"
    sdp = webrtc.without_names(f"v=0\r\n{named}{plain}a=end-of-candidates\r\n", hosts)
    assert sdp.count("a=candidate:") == kept
    assert plain in sdp
    assert sdp.startswith("v=0\r\n") and sdp.endswith("a=end-of-candidates\r\n")


def test_an_offer_without_video_is_refused() -> None:
    async def run() -> None:
        peers, client = Peers(hosts=LOOPBACK), RTCPeerConnection(RTCConfiguration(iceServers=[]))
        client.createDataChannel(webrtc.CHANNEL)
        webrtc.offer_only(client, LOOPBACK)
        await client.setLocalDescription(await client.createOffer())
        with pytest.raises(ValueError, match="one video track"):
            await peers.answer(Double(), client.localDescription.sdp, Double().hooks)
        assert not peers.open
        await client.close()
        await peers.close()

    asyncio.run(run())


class Channel:
    """A data channel whose far side takes nothing."""

    label, readyState, bufferedAmount = webrtc.CHANNEL, "open", 0

    def __init__(self, label: str = webrtc.CHANNEL) -> None:
        self.label, self.closed, self.sent = label, False, []

    def on(self, event: str, call: Any) -> None:
        pass

    def send(self, text: str) -> None:
        self.bufferedAmount += len(text)
        self.sent.append(text)

    def close(self) -> None:
        self.closed = True


def control(backlog: int = 1 << 20) -> tuple[Control, list[bool]]:
    """The server's side of a data channel, and where it says that it has had enough."""
    given_up: list[bool] = []
    return Control(Double(), Double().hooks, backlog, lambda: given_up.append(True)), given_up


def test_a_client_that_takes_no_messages_is_let_go() -> None:
    (side, given_up), channel = control(backlog=1000), Channel()
    side.attach(channel)
    for _ in range(100):
        side.send({"type": "state", "state": Double().state()})
    assert given_up
    assert channel.bufferedAmount < 1500


def test_a_client_that_floods_is_let_go() -> None:
    side, given_up = control()
    for _ in range(webrtc.MAX_WAITING):
        side.receive("{}")
    assert not given_up
    side.receive("{}")
    assert given_up


def test_what_was_said_before_there_was_a_channel_follows_the_greeting() -> None:
    side, _ = control()
    for sequence in (0, 1):
        side.send({"type": "chunk", "sequence": sequence})
    channel = Channel()
    side.attach(channel)
    assert [json.loads(text)["type"] for text in channel.sent] == ["hello", "chunk"]
    assert json.loads(channel.sent[1])["sequence"] == 1


def test_only_one_channel_of_the_right_name_is_served() -> None:
    side, _ = control()
    other, first, second = Channel("else"), Channel(), Channel()
    for channel in (other, first, second):
        side.attach(channel)
    assert [channel.closed for channel in (other, first, second)] == [True, False, True]
    assert side.channel is first


def test_late_frames_move_the_later_ones_and_early_ones_wait() -> None:
    times = iter([10.0, 10.0, 10.3, 10.3])
    pace = Pace(lambda: next(times))
    assert pace.next(10) == (0.0, 0)
    wait, stamp = pace.next(10)
    assert (round(wait, 6), stamp) == (0.1, 9000)
    assert pace.next(10) == (0.0, 27_000)  # due at 10.2, made at 10.3
    wait, stamp = pace.next(20)
    assert (round(wait, 6), stamp) == (0.05, 31_500)  # and the next counts from there


def read(handle: Double, after: int | None, count: int) -> tuple[list[int], list[str]]:
    """Sequence numbers that a reader comes to, and what it could not show."""

    async def run() -> tuple[list[int], list[str]]:
        reader = Reader(handle, after)
        numbers = [(await reader.next()).sequence for _ in range(count)]
        reader.close()
        assert await reader.next() is None
        assert not handle.told, "still listens"
        return numbers, reader.lost

    return asyncio.run(run())


def test_a_reader_goes_on_where_the_client_or_the_last_viewer_was() -> None:
    handle = Double()
    assert read(handle, None, 3) == ([0, 1, 2], [])
    assert (handle.taken, handle.newest) == (1, 2)
    assert read(handle, None, 2)[0] == [2, 3]  # nobody has said that 2 arrived
    assert read(handle, 0, 2)[0] == [1, 2]


def test_a_reader_that_lost_chunks_goes_on_with_those_that_are_there() -> None:
    handle = Double(kept=3)
    handle.newest, handle.taken = 22, 20
    assert read(handle, 5, 2) == ([21, 22], ["chunk 6 was dropped"])


def test_a_closed_reader_does_not_wait() -> None:
    handle = Double()
    handle.pull = lambda after, timeout: None

    async def run() -> None:
        reader = Reader(handle, None)
        waiting = asyncio.ensure_future(reader.next())
        await asyncio.sleep(0)
        reader.close()
        assert await asyncio.wait_for(waiting, LOOK_S / 2) is None

    asyncio.run(run())


def test_chunks_not_made_cannot_have_been_seen() -> None:
    async def run() -> None:
        peers = Peers(hosts=LOOPBACK)
        with pytest.raises(ValueError, match="after must be from -1 to -1"):
            await peers.answer(Double(), "", Double().hooks, after=0)

    asyncio.run(run())


def test_a_newer_viewer_takes_over() -> None:
    async def scenario(client: Client, peers: Peers, handle: Double) -> None:
        await client.until(lambda: client.of("chunk"), "chunks")
        other = Client()
        await other.accept(await peers.answer(handle, await other.offer(), handle.hooks))
        ended = await client.until(lambda: client.of("ended"), "end")
        assert ended[0]["reason"] == "another viewer took over"
        await other.until(lambda: other.of("chunk")[2:], "chunks")
        assert other.of("chunk")[0]["sequence"] <= client.of("chunk")[-1]["sequence"] + 1
        while len(peers.open) > 1:
            await asyncio.sleep(0.05)
        assert list(peers.viewers.values()) == list(peers.open)
        await other.peer.close()

    connected(scenario, Double())


# ---- the server ------------------------------------------------------------------------------------------------------

RED, BLUE = "a large red circle moves right", "a blue square moves left"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return causalreel.load("tiny", device="cpu")


@asynccontextmanager
async def serving(pipeline: Pipeline, settings: Settings, **limits: Any) -> AsyncIterator[tuple[FastAPI, AsyncClient]]:
    """The application with the extra, and one who asks it for things; whoever watches is gone before it ends."""
    OPENED.clear()
    app = create_app(pipeline, settings)
    add_webrtc(app, PeerLimits(**limits), hosts=LOOPBACK)
    async with (
        app.router.lifespan_context(app),
        AsyncClient(transport=ASGITransport(app), base_url="http://testserver", timeout=PATIENCE_S) as http,
    ):
        try:
            yield app, http
        finally:
            while OPENED:
                await OPENED.pop().close()


def follows(frames: list[Any], prompt: str, size: tuple[int, int]) -> float:
    """Decoded frames -> the share of them that show exactly what the prompt says."""
    pictures = torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in frames]))  # (T,H,W,3)
    small = torch.nn.functional.adaptive_avg_pool2d(pictures.permute(0, 3, 1, 2).float(), size)
    return float(measure(small[None] / 127.5 - 1, [prompt], config=MetricConfig(stride=1)).follow)


def test_the_server_shows_a_session_and_follows_a_prompt_told_on_the_channel(pipeline: Pipeline) -> None:
    async def run() -> None:
        async with serving(pipeline, Settings(token="secret")) as (app, http):
            client, known = Client(), {"authorization": "Bearer secret"}
            opened = await http.post("/v1/sessions", json={"prompt": RED, "fps": 30}, headers=known)
            assert opened.status_code == 201, opened.text
            url = f"/v1/sessions/{opened.json()['id']}/webrtc"
            offer = {"sdp": await client.offer(), "type": "offer"}
            assert (await http.post(url, json=offer)).status_code == 401
            answered = await http.post(url, json=offer, headers=known)
            assert answered.status_code == 200, answered.text
            await client.accept(answered.json()["sdp"])
            await client.until(lambda: len(client.frames) >= 24, "frames")
            assert follows(client.frames[8:24], RED, pipeline.size) > 0.9
            client.send(type="command", id=1, name="prompt", text=BLUE)
            ack = await client.until(lambda: client.of("ack") or client.of("error"), "ack")
            assert ack == [{"type": "ack", "id": 1, "number": 1}]
            told = await client.until(
                lambda: [c for c in client.of("chunk") if c["commands"]], "chunk with the command"
            )
            assert (told[0]["prompt"], told[0]["commands"][0]["number"]) == (BLUE, 1)
            assert told[0]["commands"][0]["latency_s"] > 0
            seen = len(client.frames)
            await client.until(lambda: len(client.frames) >= seen + 60, "frames of the new prompt")
            assert follows(client.frames[-16:], BLUE, pipeline.size) > 0.9
            assert follows(client.frames[-16:], RED, pipeline.size) == 0
            await client.peer.close()
            await until_none_is_open(app.state.peers)
            assert app.state.service.viewers == {}
            numbers = (await http.get("/metrics", headers=known)).text
            counted = float(re.search(r'^causalreel_chunks_total{to="webrtc"} (.*)$', numbers, re.MULTILINE).group(1))
            assert counted >= len(client.of("chunk")) > 10
            shown = await http.get(f"/v1/sessions/{opened.json()['id']}", headers=known)
            assert shown.json()["ended"] is None, "the session ended with its viewer"

    asyncio.run(run())


def test_frames_of_a_camera_come_over_the_channel(pipeline: Pipeline) -> None:
    """And what is sent back is made of them."""

    async def run() -> None:
        async with serving(pipeline, Settings()) as (_, http):
            client, file = Client(), io.BytesIO()
            asked = {"prompt": RED, "camera": True, "strength": 0.05}
            opened = await http.post("/v1/sessions", json=asked)
            offer = {"sdp": await client.offer(), "type": "offer"}
            answered = await http.post(f"/v1/sessions/{opened.json()['id']}/webrtc", json=offer)
            await client.accept(answered.json()["sdp"])
            await client.until(lambda: client.of("hello"), "the greeting")
            Image.new("RGB", (80, 60), (0, 200, 0)).save(file, "PNG")
            for chunks in range(1, 4):
                client.channel.send(len(file.getvalue()).to_bytes(4, "big") + file.getvalue())
                await client.until(lambda chunks=chunks: len(client.of("chunk")) >= chunks, "a chunk")
            await client.until(lambda: len(client.frames) >= 5, "frames")
            red, green, blue = client.frames[-1].to_ndarray(format="rgb24").mean((0, 1))
            assert green > red + 80 and green > blue + 80 and not client.of("error")
            await client.peer.close()

    asyncio.run(run())


def test_bad_requests_are_refused_in_the_form_of_the_api(pipeline: Pipeline) -> None:
    async def run() -> None:
        async with serving(pipeline, Settings(), peers=1) as (app, http):
            session = (await http.post("/v1/sessions", json={"prompt": RED})).json()["id"]
            url = f"/v1/sessions/{session}/webrtc"
            sent: list[tuple[str, Any, int]] = [
                ("/v1/sessions/nobody/webrtc", {"sdp": "v=0", "type": "offer"}, 404),
                (url, {"sdp": "v=0", "type": "offer"}, 400),
                (url, {"sdp": "v=0", "type": "answer"}, 422),
                (url, {"sdp": "x" * (webrtc.MAX_OFFER + 1), "type": "offer"}, 422),
                (url, {"sdp": "v=0", "type": "offer", "after": -2}, 422),
                (url, {"sdp": "v=0", "type": "offer", "after": 1 << 40}, 400),
                (url, [1], 400),
            ]
            for where, body, status in sent:
                answer = await http.post(where, json=body)
                assert answer.status_code == status, (body, answer.text)
                assert set(answer.json()["error"]) == {"code", "message"}
            client, other = Client(), Client()
            offer = {"sdp": await client.offer(), "type": "offer"}
            assert (await http.post(url, json=offer)).status_code == 200
            full = await http.post(url, json={"sdp": await other.offer(), "type": "offer"})
            assert (full.status_code, full.json()["error"]["code"]) == (503, "busy")
            assert url.replace(session, "{session_id}") in app.openapi()["paths"]
        assert not app.state.peers.open, "peers outlived the server"
        await client.peer.close()
        await other.peer.close()

    asyncio.run(run())


def test_a_track_gives_out_frames_in_order_and_waits_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    told: list[dict[str, Any]] = []
    handle = Double(fps=10)

    async def no_sleep(seconds: float) -> None:
        waits.append(seconds)

    async def run() -> list[Any]:
        reader = Reader(handle, None)
        track = SessionTrack(reader, told.append, handle.shown.append, 64)
        track.pace = Pace(lambda: 5.0)  # time stands still, so every frame is early
        handle.command("prompt", text="a blue square")
        frames = [await track.recv() for _ in range(4)]
        track.stop()
        assert not reader.is_open
        with pytest.raises(MediaStreamError):
            await track.recv()
        return frames

    monkeypatch.setattr(asyncio, "sleep", no_sleep)
    frames = asyncio.run(run())
    brightness = [float(frame.to_ndarray(format="rgb24").mean()) for frame in frames]
    assert brightness[0] > brightness[1] + 20 and brightness[2] > brightness[3] + 20, brightness
    assert [round(wait, 6) for wait in waits] == [0.1, 0.2, 0.3]
    assert [frame.pts for frame in frames] == [0, 9000, 18_000, 27_000]
    assert [message["type"] for message in told] == ["state", "chunk", "chunk"]
    assert [chunk.sequence for chunk in handle.shown] == [0, 1]


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="peers must be positive, got 0"):
        PeerLimits(peers=0)
