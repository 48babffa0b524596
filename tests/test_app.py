"""The HTTP and WebSocket interface: sessions that are opened, watched, steered and resumed, and what is refused."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import WebSocketDenialResponse

import causalreel
from causalreel.infer.live import hints
from causalreel.infer.pipeline import Pipeline
from causalreel.serve import safety, wire
from causalreel.serve.bodies import MEANINGS
from causalreel.serve.handle import Limits
from causalreel.serve.safety import Rates, Settings
from causalreel.serve.session import Options, Session
from served import BLUE, RED, coded, message, opened, picture, serving, small_pipeline, until

TOKEN = "a token/with+odd=characters"


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module")
def client(pipeline: Pipeline) -> Iterator[TestClient]:
    with serving(pipeline, Limits(sessions=64)) as found:
        yield found


@pytest.fixture(scope="module")
def guarded(pipeline: Pipeline) -> Iterator[TestClient]:
    with serving(pipeline, token=TOKEN, hosts=("testserver",), origins=("https://friend.example",)) as found:
        yield found


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


def error_of(answer: Any) -> tuple[int, str]:
    """Status and code; the body is an error and nothing else."""
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"code", "message"}, body
    assert "Traceback" not in answer.text and ".py" not in answer.text
    return answer.status_code, body["error"]["code"]


# ---- sessions --------------------------------------------------------------------------------------------------------


def test_frames_arrive_in_order_and_a_command_tells_when_it_took_effect(client: TestClient) -> None:
    session = opened(client, seed=3)
    with client.websocket_connect(f"/v1/sessions/{session}/stream?format=jpeg&quality=95") as socket:
        hello, _ = message(socket)
        assert hello["type"] == "hello" and (hello["width"], hello["height"]) == (64, 64)
        assert hello["state"]["prompt"] == RED and hello["state"]["seed"] == 3
        frame, header = 0, {}
        for number in range(4):
            header, payloads = message(socket)
            assert (header["type"], header["sequence"], header["first_frame"]) == ("chunk", number, frame)
            assert header["frames"] == len(payloads) == len(header["sizes"]) and header["format"] == "jpeg"
            assert header["prompt"] == RED and header["fps"] == 16 and not header["commands"]
            assert all(Image.open(io.BytesIO(part)).size == (64, 64) for part in payloads)
            assert set(header["timings"]) == {"denoise_s", "decode_s", "encode_s", "queue_s"}
            assert header["timings"]["encode_s"] > 0
            frame += header["frames"]
        socket.send_json({"type": "command", "id": "x1", "name": "prompt", "text": BLUE, "mode": "switch"})
        seen = until(socket, lambda m: m.get("commands"))
        acks = [m for m in seen if m["type"] == "ack"]
        assert acks == [{"type": "ack", "id": "x1", "number": 1}]
        assert seen[-1]["prompt"] == BLUE and seen[-1]["commands"][0]["number"] == 1
        assert seen[-1]["commands"][0]["latency_s"] > 0
        numbers = [m["sequence"] for m in seen if m["type"] == "chunk"]
        assert numbers == list(range(4, 4 + len(numbers)))
        state, _ = message(socket)
        assert state["type"] == "state" and state["state"]["prompt"] == BLUE
        socket.send_json({"type": "ping", "id": 5})
        assert until(socket, lambda m: m["type"] == "pong")[-1]["id"] == 5
    assert client.get(f"/v1/sessions/{session}").json()["state"]["prompt"] == BLUE


def test_a_dropped_viewer_resumes_without_loss_or_repetition(client: TestClient) -> None:
    session, after, frame = opened(client), -1, 0
    for _ in range(3):
        with client.websocket_connect(f"/v1/sessions/{session}/stream?after={after}") as socket:
            message(socket)
            for _ in range(3):
                header, _ = message(socket)
                assert (header["sequence"], header["first_frame"]) == (after + 1, frame)
                after, frame = header["sequence"], frame + header["frames"]


def test_who_comes_back_too_late_is_told_and_after_what_to_go_on(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(resume_chunks=1)) as client:
        session = opened(client, pace="max")
        with client.websocket_connect(f"/v1/sessions/{session}/stream") as socket:
            until(socket, lambda m: m.get("sequence") == 6)
        for missed in (0, 10**6):  # forgotten, and not made yet
            with client.websocket_connect(f"/v1/sessions/{session}/stream?after={missed}") as socket:
                error = until(socket, lambda m: m["type"] == "error")[-1]
                assert error["code"] == "lost"
                assert message(socket)[0] == {"type": "close", "code": 4003}
        with client.websocket_connect(f"/v1/sessions/{session}/stream?after={error['after']}") as socket:
            assert until(socket, lambda m: m["type"] == "chunk")[-1]["sequence"] == error["after"] + 1


def test_a_second_viewer_takes_the_first_ones_place(client: TestClient) -> None:
    session = opened(client)
    with client.websocket_connect(f"/v1/sessions/{session}/stream") as first:
        until(first, lambda m: m.get("sequence") == 1)
        with client.websocket_connect(f"/v1/sessions/{session}/stream?after=1") as second:
            assert until(first, lambda m: m["type"] == "close")[-1]["code"] == 4001
            assert until(second, lambda m: m["type"] == "chunk")[-1]["sequence"] == 2


def test_the_end_is_told_with_its_reason(client: TestClient) -> None:
    session = opened(client)
    with client.websocket_connect(f"/v1/sessions/{session}/stream") as socket:
        until(socket, lambda m: m["type"] == "chunk")
        assert client.delete(f"/v1/sessions/{session}").json() == {"id": session, "deleted": True}
        last = until(socket, lambda m: m["type"] == "ended")[-1]
        assert last == {"type": "ended", "reason": "closed by client", "is_error": False}
        assert message(socket)[0] == {"type": "close", "code": 1000}
    assert client.get(f"/v1/sessions/{session}").json()["ended"]["reason"] == "closed by client"


def test_pause_step_and_resume_over_http(client: TestClient) -> None:
    session = opened(client, pace="max")
    handle = client.app.state.service.scheduler.get(session)
    assert client.post(f"/v1/sessions/{session}/commands", json={"name": "pause"}).json()["number"] == 1
    after = -1
    while (got := handle.pull(after, 0.5)) is not None:
        after = got.sequence
    assert client.get(f"/v1/sessions/{session}").json()["state"]["paused"] is True
    assert client.post(f"/v1/sessions/{session}/commands", json={"name": "step", "chunks": 1}).status_code == 200
    assert handle.pull(after, 10).sequence == after + 1
    assert handle.pull(after + 1, 0.3) is None
    client.post(f"/v1/sessions/{session}/commands", json={"name": "resume"})
    assert handle.pull(after + 1, 10).sequence == after + 2


def test_a_record_taken_over_http_replays_bit_for_bit(client: TestClient, pipeline: Pipeline) -> None:
    session = opened(client, seed=11)
    handle = client.app.state.service.scheduler.get(session)
    frames = [handle.pull(-1, 10).frames, handle.pull(0, 10).frames]
    client.post(f"/v1/sessions/{session}/commands", json={"name": "prompt", "text": BLUE})
    frames += [handle.pull(after, 10).frames for after in range(1, 7)]
    record = json.loads(client.get(f"/v1/sessions/{session}/record").text)
    made = [emitted.frames for emitted in Session.replay(pipeline, record)]
    assert len(made) >= 8
    assert all(torch.equal(a, b) for a, b in zip(frames, made, strict=False))
    assert any(command["name"] == "prompt" for command in record["commands"])


@pytest.mark.parametrize("how", ["json", "data url", "form"])
def test_a_session_may_begin_with_a_picture(client: TestClient, how: str) -> None:
    data = picture(80, 60, "JPEG")
    if how == "form":
        form = {"data": {"prompt": RED, "seed": "4"}, "files": {"image": ("../../x.jpg", data, "image/jpeg")}}
        answer = client.post("/v1/sessions", **form)
    else:
        image = coded(data) if how == "json" else f"data:image/jpeg;base64,{coded(data)}"
        answer = client.post("/v1/sessions", json={"prompt": RED, "seed": 4, "image": image})
    assert answer.status_code == 201, answer.text
    assert answer.json()["state"]["has_image"] is True and answer.json()["state"]["seed"] == 4
    handle = client.app.state.service.scheduler.get(answer.json()["id"])
    red = handle.pull(-1, 10).frames[0].float().mean((0, 1))  # the picture itself is shown first
    assert red[0] > 200 and red[1:].max() < 60
    handle.close()


def test_a_record_opens_a_session_that_plays_it_again(client: TestClient, pipeline: Pipeline) -> None:
    first = Session(pipeline, Options(RED, image=torch.zeros(3, 64, 64)))
    frames = [first.next_chunk()]
    first.command("prompt", text=BLUE)
    frames += [first.next_chunk(), first.next_chunk()]
    record = first.record()
    answer = client.post("/v1/sessions/replay", json={**record, "version": "0.0.0"})
    assert answer.status_code == 201, answer.text
    assert answer.json()["notes"] == [f"version was 0.0.0, is {causalreel.__version__}"]
    handle = client.app.state.service.handle(answer.json()["id"])
    for after in range(3):
        assert torch.equal(handle.pull(after - 1, 60).frames, frames[after].frames)
    assert handle.pull(2, 0) is None and handle.session.state()["paused"]
    client.delete(f"/v1/sessions/{answer.json()['id']}")
    for body, status in [
        (b"{", 400),
        (b"[[],[]," * 100_000, 400),
        (json.dumps({**record, "chunks": 1e9}).encode(), 400),
        (json.dumps({**record, "options": {"prompt": "a purple hexagon"}}).encode(), 400),
        (b" " * (13 << 20), 413),
    ]:
        answer = client.post("/v1/sessions/replay", content=body, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
    other = {**record, "model": "tiny/walk", "options": {"prompt": "a red pillar ahead"}}
    said = client.post("/v1/sessions/replay", json=other).json()["error"]["message"]
    assert said.startswith(
        f"the record was made with tiny/walk, this server shows {pipeline.export.name}: unknown word"
    )
    assert client.post("/v1/sessions/replay", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415


def test_the_model_says_what_it_understands(client: TestClient, pipeline: Pipeline) -> None:
    model = client.get("/v1/model").json()
    assert (model["name"], model["width"], model["takes_picture"]) == (pipeline.export.name, 64, True)
    assert model["loras"] == {}
    assert model["words"]["shape"] == ["circle", "square", "triangle"] and model["synonyms"]["big"] == "large"
    assert model["changes"] is True
    pipeline.text.encode(model["examples"])
    free = hints(dataclasses.replace(pipeline.export, text="umt5", family="wan21"))
    assert free["words"] is None and len(free["examples"]) > 1


def test_all_sessions_are_listed(client: TestClient) -> None:
    session = opened(client)
    assert session in [entry["id"] for entry in client.get("/v1/sessions").json()["data"]]
    client.delete(f"/v1/sessions/{session}")


# ---- what is refused -------------------------------------------------------------------------------------------------

BAD_SESSIONS: list[tuple[dict[str, Any], int]] = [
    ({}, 422),
    ({"prompt": ""}, 400),
    ({"prompt": "x" * 2001}, 400),
    ({"prompt": "no such words"}, 400),
    ({"prompt": "a red\x00circle"}, 400),
    ({"prompt": RED, "seed": -1}, 422),
    ({"prompt": RED, "seed": "1"}, 422),
    ({"prompt": RED, "seed": 1 << 70}, 422),
    ({"prompt": RED, "steps": 0}, 422),
    ({"prompt": RED, "steps": True}, 422),
    ({"prompt": RED, "chunk": 999}, 400),
    ({"prompt": RED, "fps": 0}, 422),
    ({"prompt": RED, "pace": "fast"}, 422),
    ({"prompt": RED, "unknown": 1}, 422),
    ({"prompt": RED, "image": "!"}, 400),
    ({"prompt": RED, "image": coded(b"GIF89a" + bytes(40))}, 400),
]


@pytest.mark.parametrize(("body", "status"), BAD_SESSIONS, ids=lambda value: str(value)[:40])
def test_bad_sessions_are_refused_with_a_reason(client: TestClient, body: dict[str, Any], status: int) -> None:
    assert error_of(client.post("/v1/sessions", json=body)) == (status, "invalid_request")


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"prompt": "\\ud800"}', b'{"prompt": NaN}', b"\xff\xfe", b"[" * 50_000, b"9" * 5000],
    ids=lambda body: repr(body[:20]),
)
def test_bodies_that_are_not_what_they_say_are_refused(client: TestClient, body: bytes) -> None:
    session = opened(client)
    headers = {"content-type": "application/json"}
    for path in ("/v1/sessions", f"/v1/sessions/{session}/commands", "/v1/videos"):
        status, code = error_of(client.post(path, content=body, headers=headers))
        assert status in (400, 422) and code == "invalid_request"
    assert error_of(client.post("/v1/sessions", content=body)) == (415, "unsupported_type")
    client.delete(f"/v1/sessions/{session}")


BAD_COMMANDS: list[dict[str, Any]] = [
    {},
    {"name": "format"},
    {"name": "prompt"},
    {"name": "prompt", "text": RED, "mode": "jump"},
    {"name": "prompt", "text": "\ud800"},
    {"name": "prompt", "text": "no such words"},
    {"name": "pause", "now": True},
    {"name": "step", "chunks": 0},
    {"name": "fps", "fps": 1e9},
    {"name": "steps", "steps": 1.5},
    {"name": "image", "image": "aaaa"},
    {"name": ["pause"]},
]


def test_bad_commands_are_refused_over_both_ways(client: TestClient) -> None:
    session = opened(client)
    for body in BAD_COMMANDS:
        answer = client.post(
            f"/v1/sessions/{session}/commands", content=json.dumps(body), headers={"content-type": "application/json"}
        )
        assert error_of(answer) == (400, "invalid_request"), body
    with client.websocket_connect(f"/v1/sessions/{session}/stream") as socket:
        for number, body in enumerate(BAD_COMMANDS):
            socket.send_text(json.dumps({"type": "command", "id": number, **body}))
            error = until(socket, lambda m: m["type"] in ("error", "ack"))[-1]
            assert error["type"] == "error" and error["id"] == number and error["message"]
        for raw in ("", "{", "[]", "1", "null", '{"type": "x"}', '{"type": 1}', "[" * 50_000):
            socket.send_text(raw)
            assert until(socket, lambda m: m["type"] == "error")[-1]["message"]
        socket.send_bytes(b"\0\xff")
        assert until(socket, lambda m: m["type"] == "error")[-1]["message"]
        assert until(socket, lambda m: m["type"] == "chunk")  # and the stream goes on
    assert client.get(f"/v1/sessions/{session}").json()["state"]["pending"] == 0
    client.delete(f"/v1/sessions/{session}")


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation["responses"]


def test_the_document_names_each_status_with_its_shape(client: TestClient) -> None:
    found = dict(operations(client.get("/openapi.json").json()))
    assert len(found) >= 14
    for name, responses in found.items():
        assert all(re.fullmatch("[2-5][0-9][0-9]", status) for status in responses), name
        for status in (status for status in responses if status >= "400" and name != "GET /readyz"):
            schema = responses[status]["content"]["application/json"]["schema"]
            assert schema["$ref"].endswith("/ErrorView"), (name, status)
            assert responses[status]["description"] == MEANINGS[int(status)]
        assert {"400", "413", "431", "500"} <= responses.keys() or name.startswith("GET /healthz"), name
        if not re.search("healthz|readyz", name):
            assert {"401", "403", "421", "429"} <= responses.keys(), name
        assert ("404" in responses) == ("{" in name or name == "GET /v1/videos"), name
        assert not name.startswith("POST") or {"408", "415", "503"} <= responses.keys(), name


def test_every_status_that_the_server_raises_is_in_the_document(client: TestClient) -> None:
    source = "".join(path.read_text() for path in Path(wire.__file__).parent.glob("*.py"))
    raised = set(re.findall(r"ApiError\((\d{3})", source))
    said = {status for _, responses in operations(client.get("/openapi.json").json()) for status in responses}
    assert len(raised) > 12 and raised <= said and "HTTPValidationError" not in client.get("/openapi.json").text


def test_what_a_session_cannot_do_is_not_promised(client: TestClient) -> None:
    """One description of the limits: what the document allows, a session takes, as far as the model is not asked."""
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    steps, rate = schemas["StepsCommand"]["properties"]["steps"], schemas["RateCommand"]["properties"]["fps"]
    assert (steps["minimum"], steps["maximum"]) == (1, 100) and (rate["minimum"], rate["maximum"]) == (0.1, 240)
    most = {name: schemas[name]["properties"]["chunks"]["maximum"] for name in ("PromptCommand", "StepCommand")}
    session = opened(client)
    path = f"/v1/sessions/{session}/commands"
    for command in (
        {"name": "steps", "steps": 100},
        {"name": "fps", "fps": 0.1},
        {"name": "restart", "seed": (1 << 53) - 1},
        {"name": "prompt", "text": RED, "mode": "fade", "chunks": most["PromptCommand"]},
        {"name": "step", "chunks": most["StepCommand"]},
        {"name": "image", "image": None},
        {"name": "image", "image": coded(picture(8, 8))},
    ):
        assert client.post(path, json=command).status_code == 200, command
    for command in ({"name": "steps", "steps": 101}, {"name": "fps", "fps": 1e-300}, {"name": "fps", "fps": 1e308}):
        assert error_of(client.post(path, json=command)) == (400, "invalid_request"), command
    for body in ({"steps": 500}, {"fps": 1e-300}, {"fps": -1}, {"chunk": 10**6}):
        assert error_of(client.post("/v1/sessions", json={"prompt": RED} | body))[1] == "invalid_request", body
    client.delete(f"/v1/sessions/{session}")


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/healthz", "/metrics", "/openapi.json", "/v1/sessions", "/v1/videos", "/static/app.js"]
)
def test_heads_are_those_of_the_answers(client: TestClient, path: str) -> None:
    head, whole = client.head(path), client.get(path)
    assert head.status_code == whole.status_code == 200 and head.content == b""
    assert head.headers["content-type"] == whole.headers["content-type"]
    is_still = path not in ("/metrics", "/v1/sessions")
    assert not is_still or head.headers["content-length"] == str(len(whole.content))


def test_what_is_not_there_is_not_found(client: TestClient) -> None:
    for method, path in [
        ("GET", "/v1/sessions/x"),
        ("DELETE", "/v1/sessions/x"),
        ("POST", "/v1/sessions/x/commands"),
        ("GET", "/v1/sessions/x/record"),
        ("GET", "/v1/videos/x"),
        ("GET", "/v1/videos/..%2f..%2fetc%2fpasswd/content"),
        ("DELETE", "/v1/videos/x"),
        ("GET", "/v1/videos?after=x"),
        ("GET", "/nothing"),
        ("GET", "/static/../app.py"),
        ("GET", "/static/%2e%2e/app.py"),
    ]:
        assert client.request(method, path, json={"name": "pause"}).status_code == 404, path
    with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect("/v1/sessions/x/stream"):
        pass
    assert denied.value.status_code == 404


@pytest.mark.parametrize("query", ["format=gif", "after=-2", "after=x", "quality=0", f"after={1 << 60}"])
def test_bad_stream_queries_are_refused(client: TestClient, query: str) -> None:
    session = opened(client)
    with pytest.raises(Exception), client.websocket_connect(f"/v1/sessions/{session}/stream?{query}"):  # noqa: B017
        pass
    client.delete(f"/v1/sessions/{session}")


def test_a_full_server_says_so(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(sessions=1)) as client:
        session = opened(client)
        answer = client.post("/v1/sessions", json={"prompt": RED})
        assert error_of(answer) == (503, "busy") and int(answer.headers["retry-after"]) > 0
        assert client.get("/readyz").json()["free_sessions"] == 0
        client.delete(f"/v1/sessions/{session}")
        assert client.post("/v1/sessions", json={"prompt": RED}).status_code == 201


def test_only_so_many_streams_are_served(pipeline: Pipeline) -> None:
    with serving(pipeline, streams=1) as client:
        first, second = opened(client), opened(client)
        with client.websocket_connect(f"/v1/sessions/{first}/stream") as socket:
            message(socket)
            path = f"/v1/sessions/{second}/stream"
            with pytest.raises(WebSocketDenialResponse) as denied, client.websocket_connect(path):
                pass
            assert denied.value.status_code == 503


# ---- safety ----------------------------------------------------------------------------------------------------------

WITH_TOKEN = [
    ("GET", "/v1/sessions"),
    ("POST", "/v1/sessions"),
    ("GET", "/v1/sessions/x"),
    ("DELETE", "/v1/sessions/x"),
    ("POST", "/v1/sessions/x/commands"),
    ("GET", "/v1/sessions/x/record"),
    ("GET", "/v1/videos"),
    ("POST", "/v1/videos"),
    ("GET", "/v1/videos/x/content"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/whatever"),
]


@pytest.mark.parametrize(("method", "path"), WITH_TOKEN)
def test_everything_but_health_and_the_page_asks_for_the_token(guarded: TestClient, method: str, path: str) -> None:
    for headers in ({}, bearer(""), bearer("wrong"), bearer(TOKEN + "x"), bearer(TOKEN[:-1]), bearer("\xff"),
                    {"authorization": f"Basic {TOKEN}"}):  # fmt: skip
        answer = guarded.request(method, path, headers={k: v.encode("latin-1") for k, v in headers.items()})
        assert error_of(answer) == (401, "unauthorized") and answer.headers["www-authenticate"] == "Bearer"
    assert guarded.request(method, path + f"?token={TOKEN}").status_code == 401  # addresses end up in logs
    assert guarded.request(method, path, headers=bearer(TOKEN)).status_code != 401
    assert guarded.get("/healthz").json() == {"ok": True}
    assert guarded.get("/readyz").status_code in (200, 503)


def test_every_route_of_the_document_asks_for_the_token(guarded: TestClient) -> None:
    document = guarded.get("/openapi.json", headers=bearer(TOKEN)).json()
    routes = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert len(routes) >= 14
    for method, path in routes - {("GET", "/healthz"), ("GET", "/readyz")}:
        assert guarded.request(method, path).status_code == 401, path


def test_a_browser_brings_its_token_as_a_subprotocol(guarded: TestClient) -> None:
    session = guarded.post("/v1/sessions", json={"prompt": RED}, headers=bearer(TOKEN)).json()["id"]
    path = f"/v1/sessions/{session}/stream"

    def offered(token: str) -> list[str]:
        return ["causalreel.v1", "bearer." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")]

    for wrong in ([], ["causalreel.v1"], offered("wrong"), ["causalreel.v1", "bearer.!"], ["bearer."]):
        with pytest.raises(WebSocketDenialResponse) as denied, guarded.websocket_connect(path, subprotocols=wrong):
            pass
        assert denied.value.status_code == 401
    with guarded.websocket_connect(path, subprotocols=offered(TOKEN)) as socket:
        assert socket.accepted_subprotocol == "causalreel.v1"  # the token is not sent back
        assert message(socket)[0]["type"] == "hello"
    with guarded.websocket_connect(path, headers=bearer(TOKEN)) as socket:
        assert message(socket)[0]["type"] == "hello"


def test_pages_of_other_sites_and_other_names_are_kept_out(guarded: TestClient) -> None:
    evil, friend = {"origin": "https://evil.example"}, {"origin": "https://friend.example"}
    body = {"json": {"prompt": RED}}
    assert error_of(guarded.post("/v1/sessions", headers=bearer(TOKEN) | evil, **body)) == (403, "wrong_origin")
    assert error_of(guarded.post("/v1/sessions", headers=bearer(TOKEN) | {"origin": "null"}, **body))[0] == 403
    own = guarded.post("/v1/sessions", headers=bearer(TOKEN) | {"origin": "http://testserver"}, **body)
    assert own.status_code == 201 and "access-control-allow-origin" not in own.headers
    allowed = guarded.post("/v1/sessions", headers=bearer(TOKEN) | friend, **body)
    assert allowed.headers["access-control-allow-origin"] == "https://friend.example"
    path = f"/v1/sessions/{own.json()['id']}/stream"
    foreign = bearer(TOKEN) | evil
    with pytest.raises(WebSocketDenialResponse) as denied, guarded.websocket_connect(path, headers=foreign):
        pass
    assert denied.value.status_code == 403
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert guarded.options("/v1/sessions", headers=friend | preflight).status_code == 200
    assert "access-control-allow-origin" not in guarded.options("/v1/sessions", headers=evil | preflight).headers
    rebound = guarded.get("/v1/sessions", headers=bearer(TOKEN) | {"host": "rebound.example:80"})
    assert error_of(rebound) == (421, "wrong_host")
    assert guarded.get("/v1/sessions", headers=bearer(TOKEN) | {"host": "TestServer:80"}).status_code == 200


def test_cors_is_closed_unless_opened(client: TestClient) -> None:
    answer = client.get("/v1/sessions", headers={"origin": "https://friend.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_security_headers_are_on_every_answer(guarded: TestClient) -> None:
    paths = ("/healthz", "/v1/sessions", "/nothing", "/metrics")
    for answer in [guarded.get(path, headers=head) for path in paths for head in ({}, bearer(TOKEN))]:
        for name, value in safety.HEADERS.items():
            assert answer.headers[name] == value
    assert "unsafe" not in safety.POLICY and "default-src 'none'" in safety.POLICY
    assert guarded.get("/v1/sessions", headers=bearer(TOKEN)).headers["cache-control"] == "no-store"


def test_large_requests_are_refused_whether_or_not_they_tell_their_length(pipeline: Pipeline) -> None:
    with serving(pipeline, body_bytes=2000) as client:
        large = json.dumps({"prompt": RED, "image": "A" * 3000}).encode()
        told = client.post("/v1/sessions", content=large, headers={"content-type": "application/json"})
        assert error_of(told) == (413, "too_large")
        parts = (large[at : at + 500] for at in range(0, len(large), 500))
        untold = client.post("/v1/sessions", content=parts, headers={"content-type": "application/json"})
        assert error_of(untold) == (413, "too_large")
        session = opened(client)
        with client.websocket_connect(f"/v1/sessions/{session}/stream") as socket:
            socket.send_text(json.dumps({"type": "ping", "id": "x" * 3000}))
            assert "2000" in until(socket, lambda m: m["type"] in ("error", "pong"))[-1]["message"]


def test_image_bombs_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = picture(5000, 5000, mode="1")
    assert len(bomb) < 100_000  # small to send, 75 MB decoded
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="at most 16000000 pixels"):
        safety.decode_picture(bomb, (64, 64), pixels=16_000_000)
    with pytest.raises(ValueError, match="pixels"):
        safety.decode_picture(picture(14000, 14000, mode="1"), (64, 64), pixels=10**12)  # Pillow's own limit
    monkeypatch.undo()
    for broken in (picture(8, 8)[:-30], b"", bytes(100), picture(8, 8, "GIF"), picture(8, 8, "TIFF")):
        with pytest.raises(ValueError, match="cannot be read"):
            safety.decode_picture(broken, (64, 64), pixels=100)


def test_a_picture_is_cropped_to_the_models_size() -> None:
    shown = safety.decode_picture(picture(100, 50, "WEBP"), (64, 32), pixels=5000)
    assert shown.shape == (3, 64, 32) and shown[0].min() > 0.9 and shown[1].max() < -0.9


def test_rates_give_a_burst_and_then_so_many_a_second(pipeline: Pipeline) -> None:
    now = [0.0]
    rates = Rates(2, 3, clock=lambda: now[0])
    assert [rates.take("a") for _ in range(4)] == [0, 0, 0, 0.5]
    assert rates.take("b") == 0
    now[0] = 0.5
    assert rates.take("a") == 0 and rates.take("a") > 0
    now[0] = 1000
    assert [rates.take("a") > 0 for _ in range(4)] == [False, False, False, True]
    for number in range(safety.CLIENTS + 10):
        rates.take(str(number))
    assert len(rates.buckets) == safety.CLIENTS
    with serving(pipeline, requests_per_s=0.01, burst=4) as client:
        session = opened(client)
        with client.websocket_connect(f"/v1/sessions/{session}/stream") as socket:
            for expected in ("ack", "ack", "error"):
                socket.send_json({"type": "command", "name": "pause"})
                assert until(socket, lambda m: m["type"] in ("ack", "error"))[-1]["type"] == expected
        refused = client.get("/v1/sessions")
        assert error_of(refused) == (429, "too_many_requests") and int(refused.headers["retry-after"]) > 1
        assert client.get("/healthz").status_code == 200


@pytest.mark.parametrize("may", [True, False])
def test_logs_can_be_told_not_to_hold_prompts(pipeline: Pipeline, may: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with serving(pipeline, log_prompts=may) as client:
        session = opened(client)
        client.post(f"/v1/sessions/{session}/commands", json={"name": "prompt", "text": BLUE})
        client.post("/v1/sessions", json={"prompt": "secret words"})
        video = client.post("/v1/videos", json={"prompt": RED, "frames": 5})
        assert video.status_code == 202
    assert session in caplog.text
    assert (RED in caplog.text, BLUE in caplog.text) == (may, may)
    assert "secret" not in caplog.text


def test_what_nobody_foresaw_is_answered_without_details(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("/secret/path.py")

    monkeypatch.setattr(client.app.state.service.scheduler, "get", broken)
    answer = client.get("/v1/sessions/x")
    assert error_of(answer) == (500, "internal") and "secret" not in answer.text
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_settings_are_checked() -> None:
    for wrong in ({"token": ""}, {"token": "\u00e9"}, {"body_bytes": 0}, {"burst": 0}, {"requests_per_s": 0}):
        with pytest.raises(ValueError):
            Settings(**wrong)


# ---- messages and numbers --------------------------------------------------------------------------------------------


def test_a_binary_message_is_read_back_whole_or_not_at_all(client: TestClient) -> None:
    session = opened(client)
    with client.websocket_connect(f"/v1/sessions/{session}/stream?format=webp") as socket:
        message(socket)
        raw = socket.receive_bytes()
    header, payloads = wire.unpack(raw)
    assert raw[4:5] == b"{" and sum(header["sizes"]) + int.from_bytes(raw[:4], "big") + 4 == len(raw)
    assert payloads[0][8:12] == b"WEBP"
    for broken in (raw[:-1], raw + b"x", raw[:10]):
        with pytest.raises(ValueError):
            wire.unpack(broken)
    client.delete(f"/v1/sessions/{session}")


def test_h264_units_decode_from_where_a_viewer_begins(client: TestClient) -> None:
    session = opened(client)
    decoded = {}
    for after in (-1, 3):
        with client.websocket_connect(f"/v1/sessions/{session}/stream?format=h264&after={after}&quality=100") as socket:
            hello, _ = message(socket)
            assert re.fullmatch("avc1[.][0-9a-f]{6}", hello["codec"])
            decoder = av.CodecContext.create("h264", "r")
            chunks = [message(socket) for _ in range(4)]
        assert chunks[0][0]["keyframe"] is True and chunks[1][0]["keyframe"] is False
        units = [unit for header, units in chunks for unit in units]
        pictures = [f for unit in units for f in decoder.decode(av.Packet(unit))] + decoder.decode(None)
        assert len(pictures) == len(units) == sum(header["frames"] for header, _ in chunks)
        decoded[after] = pictures[0].to_ndarray(format="rgb24")
    with client.websocket_connect(f"/v1/sessions/{session}/stream?after=3") as socket:
        message(socket)
        still = np.array(Image.open(io.BytesIO(message(socket)[1][0])))
    assert np.abs(still.astype(float) - decoded[3]).mean() < 8
    client.delete(f"/v1/sessions/{session}")


def test_messages_hold_nothing_that_json_does_not() -> None:
    text = wire.dumps({"a": float("nan"), "b": (1, float("inf")), "c": torch.zeros(3, 2), "d": "\u00e9\ud800"})
    assert json.loads(text) == {"a": None, "b": [1, None], "c": "tensor 3x2", "d": "\u00e9\ud800"}
    assert text.isascii()


def test_metrics_are_prometheus_text_and_count(pipeline: Pipeline) -> None:
    with serving(pipeline) as client:
        session = opened(client)
        with client.websocket_connect(f"/v1/sessions/{session}/stream") as socket:
            socket.send_json({"type": "command", "name": "prompt", "text": BLUE})
            until(socket, lambda m: m.get("commands"))
            until(socket, lambda m: m["type"] == "chunk" and m["sequence"] >= 2)
        client.get("/nothing")
        answer = client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        found = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
    assert found["causalreel_sessions",] == 1
    assert found["causalreel_chunks_total", "stream"] >= 1
    assert found["causalreel_frames_total", "stream"] > found["causalreel_chunks_total", "stream"]
    for stage in ("denoise", "decode", "encode", "queue"):
        assert found["causalreel_chunk_seconds_count", stage] == found["causalreel_chunks_total", "stream"]
    assert found["causalreel_command_latency_seconds_count", "prompt"] == 1
    assert found["causalreel_refused_total", "not_found"] == 1
    assert found["causalreel_stream_bytes_total",] > 0
    for name in ("queue_depth", "process_bytes", "session_bytes", "viewers"):
        assert (f"causalreel_{name}",) in found
    assert ("causalreel_dropped_connections_total",) in found
    assert ("process_resident_memory_bytes",) in found


def test_readiness_follows_the_scheduler(pipeline: Pipeline) -> None:
    with serving(pipeline) as client:
        client.app.state.service.scheduler.close()
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200
        assert error_of(client.post("/v1/sessions", json={"prompt": RED})) == (503, "busy")
