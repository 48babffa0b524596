"""What goes wrong on purpose: fuzzed requests and messages, noise on the socket, wrong tokens, no memory, slowness."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from causalreel.infer.pipeline import Pipeline
from causalreel.serve.handle import Handle, Limits
from causalreel.serve.safety import MIB
from causalreel.serve.service import Talk
from causalreel.serve.session import Session
from causalreel.serve.wire import unpack
from patience import PATIENCE_S, wait_until
from served import BLUE, RED, listening, opened, serving, small_pipeline, until

TOKEN = "right"
FEW = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def place(pipeline: Pipeline) -> Iterator[str]:
    with listening(pipeline, Limits(sessions=4, idle_s=5), body_bytes=MIB, queued_videos=2) as found:
        yield found


@pytest.fixture(scope="module")
def document(place: str) -> Any:
    return schemathesis.openapi.from_url(f"http://{place}/openapi.json")


def is_error(answer: Any) -> bool:
    body = answer.json()
    return set(body) == {"error"} and set(body["error"]) == {"code", "message"} and "Traceback" not in answer.text


def fuzz(operation: Any, mode: Any, place: str, session: str) -> set[int]:
    """Requests to one route, made from the document -> the statuses they got."""
    tried = set()

    @FEW
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        if "session_id" in (case.path_parameters or {}):
            case.path_parameters["session_id"] = session  # or all would end at 404
        answer = case.call(base_url=f"http://{place}", timeout=PATIENCE_S)
        assert answer.status_code != 500, answer.text
        assert answer.status_code < 400 or operation.path == "/readyz" or is_error(answer), answer.text
        case.validate_response(answer, checks=[status_code_conformance, response_schema_conformance])
        tried.add(answer.status_code)

    with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with a route that takes nothing
        check()
    return tried


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_fuzzed_requests_are_answered_and_never_with_500(document: Any, place: str, mode: Any) -> None:
    """Requests that fit the OpenAPI document and that do not; every answer has a status and a shape of the document."""
    tried: dict[str, set[int]] = {}
    for found in document.get_all_operations():
        session = httpx.post(f"http://{place}/v1/sessions", json={"prompt": RED}).json()["id"]
        tried[found.ok().label] = fuzz(found.ok(), mode, place, session)
        httpx.delete(f"http://{place}/v1/sessions/{session}")
    is_negative = mode == schemathesis.GenerationMode.NEGATIVE
    assert sum(map(bool, tried.values())) >= (4 if is_negative else 13), tried
    assert {400, 415, 422} & tried["POST /v1/sessions/{session_id}/commands"], tried
    assert is_negative or 200 in tried["POST /v1/sessions/{session_id}/commands"], tried


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=40),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
names = st.sampled_from(["prompt", "pause", "resume", "step", "restart", "steps", "fps", "image", "close!", ""])
arguments = st.dictionaries(
    st.sampled_from(["text", "mode", "chunks", "seed", "prompt", "steps", "fps", "image", "name", "type", "id", "x"]),
    anything,
    max_size=5,
)
commands = st.builds(lambda name, more: {"type": "command", "id": 1, "name": name, **more}, names, arguments)
messages = st.one_of(
    st.text(max_size=200), anything.map(json.dumps), commands.map(json.dumps), arguments.map(json.dumps)
)


@pytest.fixture(scope="module")
def client(pipeline: Pipeline) -> Iterator[Any]:
    with serving(pipeline) as found:
        yield found


def test_fuzzed_messages_get_one_answer_each_and_the_session_lives(client: Any) -> None:
    service = client.app.state.service
    session = opened(client)
    talk = Talk(service, service.handle(session), "fuzz")

    @settings(FEW, max_examples=300)
    @given(messages)
    def check(text: str) -> None:
        answers = talk.answer(text)
        assert answers and answers[0]["type"] in ("ack", "error", "pong")
        for answer in answers:
            json.dumps(answer, allow_nan=False)

    check()
    talk.answer(json.dumps({"type": "command", "name": "prompt", "text": BLUE}))
    talk.answer(json.dumps({"type": "command", "name": "resume"}))
    with client.websocket_connect(f"/v1/sessions/{session}/stream") as socket:
        until(socket, lambda m: m["type"] == "chunk" and m["prompt"] == BLUE)


def test_random_bytes_on_the_port_do_no_harm(place: str) -> None:
    host, port = place.split(":")
    noise = random.Random(0)
    for begin in (
        b"",
        b"GET /healthz HTTP/1.1\r\n",
        b"POST /v1/sessions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n",
    ):
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as raw, contextlib.suppress(OSError):
            raw.sendall(begin + noise.randbytes(10_000))
            raw.shutdown(socket.SHUT_WR)
            while raw.recv(65536):
                pass
        assert httpx.get(f"http://{place}/healthz").json() == {"ok": True}


def test_random_bytes_on_an_open_stream_do_no_harm(place: str) -> None:
    base = f"http://{place}"
    noise = random.Random(1)

    async def run(session: str) -> None:
        async with connect(f"ws://{place}/v1/sessions/{session}/stream", max_size=None) as stream:
            await stream.recv()
            await stream.send(noise.randbytes(10_000))  # as a message: an error, and the stream goes on
            await stream.send(noise.randbytes(10_000).decode("latin-1"))
            seen = [await stream.recv() for _ in range(12)]
            errors = [json.loads(m) for m in seen if isinstance(m, str) and json.loads(m)["type"] == "error"]
            assert len(errors) == 2 and sum(isinstance(m, bytes) for m in seen) > 3
            stream.transport.write(noise.randbytes(10_000))  # below the protocol: the connection is closed
            with contextlib.suppress(WebSocketException):
                while True:
                    await asyncio.wait_for(stream.recv(), PATIENCE_S)
        async with connect(f"ws://{place}/v1/sessions/{session}/stream?after=0", max_size=None) as stream:
            assert json.loads(await stream.recv())["type"] == "hello"  # the session was not touched
            while isinstance(got := await stream.recv(), str):
                pass
            assert unpack(got)[0]["sequence"] == 1
            with contextlib.suppress(WebSocketException):
                await stream.send("x" * (MIB + 1))  # too large for the protocol
                while True:
                    await asyncio.wait_for(stream.recv(), PATIENCE_S)
            assert stream.close_code == 1009

    session = httpx.post(f"{base}/v1/sessions", json={"prompt": RED}).json()["id"]
    asyncio.run(run(session))
    assert httpx.get(f"{base}/healthz").status_code == 200
    assert httpx.delete(f"{base}/v1/sessions/{session}").status_code == 200


def test_wrong_tokens_are_refused_by_the_real_server_too(pipeline: Pipeline) -> None:
    with listening(pipeline, Limits(), token=TOKEN) as place:
        right = {"authorization": f"Bearer {TOKEN}"}
        assert httpx.get(f"http://{place}/v1/sessions").status_code == 401
        assert httpx.get(f"http://{place}/v1/sessions", headers={"authorization": "Bearer wrong"}).status_code == 401
        session = httpx.post(f"http://{place}/v1/sessions", json={"prompt": RED}, headers=right).json()["id"]

        async def run() -> None:
            path = f"ws://{place}/v1/sessions/{session}/stream"
            with pytest.raises(WebSocketException, match="401"):
                async with connect(path):
                    pass
            async with connect(path, subprotocols=["causalreel.v1", "bearer.cmlnaHQ"]) as stream:
                assert stream.subprotocol == "causalreel.v1"
                assert json.loads(await stream.recv())["type"] == "hello"

        asyncio.run(run())


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory")],
    ids=repr,
)
def test_running_out_of_memory_ends_one_session_with_a_message(
    client: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    unlucky, lucky = opened(client), opened(client)
    whole = Session.next_chunk

    def next_chunk(self: Session, **how: Any) -> Any:
        if self.id == unlucky and self.sequence >= 2:
            raise error
        return whole(self, **how)

    monkeypatch.setattr(Session, "next_chunk", next_chunk)
    with client.websocket_connect(f"/v1/sessions/{unlucky}/stream") as stream:
        last = until(stream, lambda m: m["type"] == "ended")[-1]
        assert last["is_error"] and "memory" in last["reason"]
    with client.websocket_connect(f"/v1/sessions/{lucky}/stream") as stream:
        until(stream, lambda m: m.get("sequence") == 4)
    assert client.get("/readyz").status_code == 200
    assert client.get(f"/v1/sessions/{unlucky}").json()["ended"]["is_error"] is True
    client.delete(f"/v1/sessions/{lucky}")
    assert client.post("/v1/sessions", json={"prompt": RED}).status_code == 201


def test_a_viewer_who_does_not_read_is_not_worked_for(pipeline: Pipeline) -> None:
    """What is made for a viewer who takes nothing is bounded, by the buffers of the sockets and the scheduler's."""
    with serving(pipeline, Limits(buffer_chunks=2)) as client:
        session = opened(client, pace="max")
        handle: Handle = client.app.state.service.handle(session)
        wait_until(lambda: handle.session.sequence == 2)
        time.sleep(0.5)  # no more than these
        assert handle.session.sequence <= 3
        with client.websocket_connect(f"/v1/sessions/{session}/stream") as stream:
            until(stream, lambda m: m.get("sequence") == 6)


def test_many_clients_slow_and_dropping_lose_and_repeat_nothing(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small load: see `benchmarks/serve_load.py` for the large one."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    from benchmarks.serve_load import Load, run

    with listening(pipeline, Limits(sessions=9, resume_chunks=16), streams=16) as place:
        report = asyncio.run(run(Load(f"http://{place}", clients=9, chunks=6, seed=0)))
    assert report.wrong == 0 and report.lost == 0, report
    assert report.chunks >= 9 * 6 and report.drops >= 6 and report.resumed >= 6
    assert report.failed_health == 0
