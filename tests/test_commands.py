"""Live commands stand once: every way in takes them, refuses in the same words, and describes what it takes."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from fastapi.testclient import TestClient

from causalreel.data.video import to_bytes
from causalreel.infer import values
from causalreel.infer.commands import COMMANDS, Command, Options, describe, parse, parse_line
from causalreel.infer.live import Live, encode_prompt
from causalreel.infer.models import profile
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.values import Choice, Number, Whole
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.serve.handle import Limits
from causalreel.serve.play import Typed, play, read_script
from causalreel.serve.session import Session
from patience import wait_until
from served import RED, coded, opened, picture, serving, small_pipeline, until
from test_conditioning import CONFIG
from test_conditioning import pipeline as steered_pipeline

DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class Grip(Command):
    """The key that is held from now on: a command that no file of the package knows."""

    name: ClassVar[str] = "grip"
    held: Annotated[str, Choice(("none", "left", "right"), "Which one.")]
    strength: Annotated[float, Number(0.0, 1.0, "How firmly.")] = 1.0

    def apply(self, video: Any) -> None:
        video.grip = (self.held, self.strength)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline()


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    COMMANDS["grip"] = Grip
    yield
    del COMMANDS["grip"]


@pytest.fixture(scope="module")
def client(pipeline: Pipeline, known: None) -> Iterator[TestClient]:
    with serving(pipeline, Limits(sessions=100)) as found:
        yield found


# ---- the ways in: each tells a session one command -> the session; ValueError with the refusal -----------------------


def by_http(client: TestClient, given: dict[str, Any], folder: Path) -> Session:
    session = opened(client)
    answer = client.post(f"/v1/sessions/{session}/commands", json=given)
    if answer.status_code != 200:
        assert answer.status_code == 400
        client.delete(f"/v1/sessions/{session}")
        raise ValueError(answer.json()["error"]["message"])
    return client.app.state.service.handle(session).session


def by_websocket(client: TestClient, given: dict[str, Any], folder: Path) -> Session:
    session = opened(client)
    with client.websocket_connect(f"/v1/sessions/{session}/stream") as socket:
        socket.send_json({"type": "command", "id": 1, **given})
        answer = until(socket, lambda m: m["type"] in ("ack", "error"))[-1]
        if answer["type"] == "error":
            client.delete(f"/v1/sessions/{session}")
            raise ValueError(answer["message"])
    return client.app.state.service.handle(session).session


def by_webrtc(client: TestClient, given: dict[str, Any], folder: Path) -> Session:
    rtc = pytest.importorskip("test_webrtc")

    async def run() -> Session:
        async with rtc.serving(client.app.state.service.scheduler, rtc.Settings()) as (app, http):
            session = (await http.post("/v1/sessions", json={"prompt": RED})).json()["id"]
            peer = rtc.Client()
            offer = {"sdp": await peer.offer(), "type": "offer"}
            answered = await http.post(f"/v1/sessions/{session}/webrtc", json=offer)
            await peer.accept(answered.json()["sdp"])
            await peer.until(lambda: peer.of("hello"), "channel")
            peer.send(type="command", id=1, **given)
            (answer,) = await peer.until(lambda: peer.of("ack") or peer.of("error"), "answer")
            await peer.peer.close()
            if answer["type"] == "error":
                raise ValueError(answer["message"])
            return app.state.service.handle(session).session

    return asyncio.run(run())


def by_script(client: TestClient, given: dict[str, Any], folder: Path) -> Session:
    path = folder / "script.jsonl"
    path.write_text(json.dumps({"time": 0, **given}))
    try:
        script = read_script(path, profile("tiny/frame-1step"))
    except ValueError as error:
        assert str(error).startswith(f"{path}:1: ")
        raise ValueError(str(error).partition(":1: ")[2]) from None
    session = Session(client.app.state.service.scheduler.pipeline, Options(RED))
    assert list(play(session, frames=1, script=script))
    return session


def by_typing(client: TestClient, given: dict[str, Any], folder: Path) -> Session:
    said: list[str] = []
    session, typed = Session(client.app.state.service.scheduler.pipeline, Options(RED)), Typed(io.StringIO())
    typed._lines.put(json.dumps(given))
    assert list(play(session, frames=1, typed=typed, say=said.append))
    if said[0].startswith("not understood: "):
        raise ValueError(said[0].removeprefix("not understood: "))
    return session


Way = Callable[[TestClient, dict[str, Any], Path], Session]
WAYS: list[Way] = [by_http, by_websocket, by_webrtc, by_script, by_typing]


@pytest.mark.parametrize("way", WAYS)
def test_one_entry_in_one_place_is_taken_by_every_way_in(client: TestClient, way: Way, tmp_path: Path) -> None:
    session = way(client, {"name": "grip", "held": "left", "strength": 0.5}, tmp_path)
    wait_until(lambda: getattr(session.video, "grip", None) == ("left", 0.5), "the command to take effect")
    wait_until(lambda: session.record()["commands"], "the record")
    (entry,) = session.record()["commands"]
    assert (entry["name"], entry["arguments"]) == ("grip", {"held": "left", "strength": 0.5})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"name": "grip", "held": "up"}, "held must be one of none, left, right, got 'up'"),
    ({"name": "grip"}, "held must be one of none, left, right, got None"),
    ({"name": "grip", "held": "left", "strength": 2}, "strength must be a number from 0 to 1, got 2"),
    ({"name": "grip", "held": "left", "firmly": 1}, "grip takes held, strength; got 'firmly'"),
    (
        {"name": "prompt", "text": RED, "mode": "jump"},
        "mode must be one of switch, recompute, fade, forget, got 'jump'",
    ),
    ({"name": "prompt", "text": " "}, "text must be a text that is not empty, got ' '"),
    ({"name": "prompt", "text": "a\x00b"}, "text must be a text without control characters"),
    ({"name": "prompt", "text": "no such words"}, "unknown word"),
    ({"name": "steps", "steps": 101}, "steps must be a whole number from 1 to 100, got 101"),
    ({"name": "fps", "fps": "8"}, "fps must be a number from 0.1 to 240, got '8'"),
    ({"name": "restart", "seed": 1 << 53}, "seed must be a whole number from 0 to 9007199254740991"),
    ({"name": "step", "chunks": None}, "chunks must be a whole number from 1 to 1000, got None"),
    ({"name": "image"}, "image needs the argument image: a picture, or None to begin without"),
    ({"name": "field", "field": "speed", "value": 1}, "this model has no field 'speed'; it has none"),
    ({"name": "field", "field": "a b", "value": 1}, "field must be a name, got 'a b'"),
    ({"name": "field", "field": "speed", "value": [[1], [1, 2]]}, "value must be a number, or at most 64 in lists"),
]  # fmt: skip


@pytest.mark.parametrize("way", [way for way in WAYS if way is not by_webrtc])
def test_every_way_in_refuses_in_the_same_words(client: TestClient, way: Way, tmp_path: Path) -> None:
    for given, words in BAD:
        with pytest.raises(ValueError) as error:
            way(client, given, tmp_path)
        assert str(error.value).startswith(words), (given, str(error.value))


def test_a_peer_is_refused_in_the_same_words(client: TestClient, tmp_path: Path) -> None:
    """One of them, since a connection takes a while; its messages are the WebSocket's."""
    with pytest.raises(ValueError, match="held must be one of none, left, right, got 'up'"):
        by_webrtc(client, BAD[0][0], tmp_path)


def test_what_a_video_begins_with_is_refused_in_the_same_words(client: TestClient, pipeline: Pipeline) -> None:
    """In a request for a session or a video, in a form, in a record and from Python."""
    record = Session(pipeline, Options(RED)).record()
    for given, words, status in [
        ({"steps": 0}, "steps must be a whole number from 1 to 100, got 0", 422),
        ({"seed": -1}, "seed must be a whole number from 0 to 9007199254740991, got -1", 422),
        ({"prompt": 7}, "prompt must be a text that is not empty, got 7", 422),
        ({"prompt": " "}, "prompt must be a text that is not empty, got ' '", 400),
    ]:
        with pytest.raises(ValueError) as error:
            Session(pipeline, Options(**({"prompt": RED} | given)))
        assert str(error.value) == words
        for path in ("/v1/sessions", "/v1/videos"):
            answer = client.post(path, json={"prompt": RED} | given)
            assert (answer.status_code, answer.json()["error"]["message"]) == (status, words)
        answer = client.post("/v1/sessions/replay", json=record | {"options": {"prompt": RED} | given})
        assert answer.json()["error"]["message"] == words
    for steps in ("0", "many"):
        form = {"data": {"prompt": RED, "steps": steps}, "files": {"image": ("a.png", picture(64, 64))}}
        answer = client.post("/v1/sessions", **form)
        assert answer.status_code == 422 and "steps must be a whole number from 1 to 100, got " in answer.text


# ---- what is said of them --------------------------------------------------------------------------------------------


def test_the_document_and_the_page_describe_every_command(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    names = schemas["CommandRequest"]["discriminator"]["mapping"]
    assert list(names) == list(COMMANDS) and names["grip"] == "#/components/schemas/GripCommand"
    assert len(schemas["CommandRequest"]["oneOf"]) == len(COMMANDS)
    grip = schemas["GripCommand"]
    assert grip["required"] == ["name", "held"] and grip["properties"]["name"]["const"] == "grip"
    assert grip["properties"]["strength"] == {
        "type": "number", "minimum": 0.0, "maximum": 1.0, "default": 1.0, "description": "How firmly.",
    }  # fmt: skip
    described = client.get("/v1/model").json()["commands"]
    assert described == json.loads(json.dumps(describe())) and [one["name"] for one in described] == list(COMMANDS)
    assert described[-1]["about"] == "The key that is held from now on: a command that no file of the package knows."
    typed = {one["name"]: one["typed"] for one in described}
    assert typed["grip"] == "/grip HELD [STRENGTH]" and typed["prompt"] == "/prompt TEXT" and typed["pause"] == "/pause"


def test_what_is_described_is_what_is_taken() -> None:
    """Of every number of every command: both ends are taken, what lies beyond them is not."""
    needed: dict[str, Any] = {
        "text": RED,
        "image": None,
        "field": "speed",
        "value": 1.0,
        "steps": 1,
        "fps": 1,
        "held": "left",
        "lora": "style-2",
        "strength": 0.5,
        "dialect": "minwm",
        "poses": 1.0,
    }
    for name, kind in COMMANDS.items():
        assert set(values.schema(kind)["properties"]) == {one.name for one in values.parameters(kind)}
        given = {one.name: needed[one.name] for one in values.parameters(kind) if one.is_needed}
        assert parse({"name": name, **given}).arguments.keys() == values.schema(kind)["properties"].keys()
        for one in values.parameters(kind):
            if not isinstance(one.kind, Whole | Number):
                continue
            is_above = isinstance(one.kind, Number) and one.kind.is_above
            for value in (0.001 if is_above else one.kind.least, one.kind.most):
                assert parse({"name": name, **given, one.name: value}).arguments[one.name] == value
            for value in (one.kind.least - 1, one.kind.most + 1, True, "1", float("nan"), 10**5000, [1]):
                with pytest.raises(ValueError, match=f"{one.name} must be"):
                    parse({"name": name, **given, one.name: value})


@pytest.mark.parametrize("page", ["serving.md", "live.md"])
def test_the_documentation_names_every_command_and_argument(page: str) -> None:
    text = (DOCS / page).read_text()
    for name, kind in COMMANDS.items():
        row = next(
            (line for line in text.splitlines() if line.startswith("|") and f"`{name}`" in line.split("|")[1]), ""
        )
        assert row or name == "grip", name
        for one in values.parameters(kind) if row else ():
            assert f"`{one.name}`" in row, (name, one.name)


def test_deep_and_huge_values_are_refused_in_a_line() -> None:
    deep: Any = 1
    for _ in range(3000):
        deep = [deep]
    for value in (deep, [0.0] * 65, {}, "x" * 10**6, float("inf"), [[]]):
        with pytest.raises(ValueError, match="value must be a number") as error:
            parse({"name": "field", "field": "speed", "value": value})
        assert len(str(error.value)) < 300


# ---- fields of the conditioning --------------------------------------------------------------------------------------

PROMPT = "a large red square moves right on a dark background"


def test_a_field_is_told_by_its_state_and_the_latest_counts() -> None:
    """As a stream whose every frame is given by hand; and its record makes the same frames again."""
    made = steered_pipeline()
    session, shown = Session(made, Options(PROMPT, fields={"speed": 0.5})), []
    for chunk in range(9):
        if chunk == 3:
            session.command("field", field="speed", value=-2.0)
            session.command("field", field="speed", value=1.5)  # nobody sees what was told before it
        if chunk == 6:
            session.command("restart")
        shown.append(session.next_chunk())
    assert shown[3].commands[1].arguments == {"field": "speed", "value": 1.5}
    assert session.state()["fields"] == {"speed": 1.5}
    speeds = [0.5] * 3 + [1.5] * 3
    live = Live(made, encode_prompt(made, PROMPT), policy=session.video.policy)
    decode = made.codec.stream()
    with torch.no_grad():
        for speed, chunk in zip(speeds, shown, strict=False):
            latents = live.next_chunk({"speed": torch.full((1, 1), speed)}).latents
            assert torch.equal(to_bytes(decode(latents)[0]), chunk.frames)
    record = json.loads(json.dumps(session.record()))
    assert record["options"]["fields"] == {"speed": 0.5}
    assert [entry["arguments"] for entry in record["commands"][:1]] == [{"field": "speed", "value": 1.5}]
    again = list(Session.replay(made, record))
    assert all(torch.equal(a.frames, b.frames) for a, b in zip(again, shown, strict=True))


def test_fields_are_refused_by_name() -> None:
    made = steered_pipeline()
    for fields, message in [
        ({"speed": 1, "camera": 2}, "this model has no field 'camera'; it has speed"),
        ({"speed": "fast"}, r"fields\.speed must be a number"),
        ([1], "fields must be an object"),
    ]:
        with pytest.raises(ValueError, match=message):
            Session(made, Options(PROMPT, fields=fields))  # type: ignore[arg-type]
    session = Session(made, Options(PROMPT, fields={"speed": 1}))
    for field, value, message in [
        ("camera", 1, "this model has no field 'camera'; it has speed"),
        ("speed", [1, 2], r"speed must have the shape \(\), as at the beginning; got \(2,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            session.command("field", field=field, value=value)
    assert session.state()["pending"] == 0


def test_cameras_and_actions_are_fields_of_a_session() -> None:
    """Those that it began with can be told; a model with fields goes on without them as one that has none."""
    made = steered_pipeline()
    torch.manual_seed(0)
    network = DiTDenoiser(replace(CONFIG, camera="embedded", actions=3)).requires_grad_(False)
    for part in ("action_embedding.2.weight", "camera_embedding.2.weight", "head.head.weight"):
        torch.nn.init.normal_(network.model.get_parameter(part), std=0.2)
    made = replace(made, denoiser=network)
    begun = {"w2c": torch.eye(4), "intrinsics": [0.6, 0.9, 0.5, 0.5], "actions": [0, 0, 0]}
    session, still = Session(made, Options(PROMPT, fields=begun)), Session(made, Options(PROMPT, fields=begun))
    for _ in range(2):
        assert torch.equal(session.next_chunk().frames, still.next_chunk().frames)
    session.command(parse_line("/field actions [0, 3, 0]"))
    shown = session.next_chunk()
    assert not torch.equal(shown.frames, still.next_chunk().frames)
    assert session.state()["fields"]["actions"] == [0, 3, 0]
    again = list(Session.replay(made, json.loads(json.dumps(session.record()))))
    assert len(again) == 3 and torch.equal(again[2].frames, shown.frames)
    bare = Session(made, Options(PROMPT))
    assert bare.next_chunk() is not None
    with pytest.raises(ValueError, match="this video began without the field 'actions'"):
        bare.command("field", field="actions", value=[0, 1, 0])
    for fields, message in [
        ({"w2c": torch.eye(4)}, "a camera is two fields, w2c and intrinsics; got one of them"),
        ({"actions": [0, 0]}, "field 'actions' must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            Session(made, Options(PROMPT, fields=fields))


def test_a_server_opens_and_steers_a_model_with_a_field() -> None:
    with serving(steered_pipeline()) as client:
        answer = client.post("/v1/sessions", json={"prompt": PROMPT, "fields": {"camera": 1}})
        assert answer.status_code == 400 and "no field 'camera'; it has speed" in answer.text
        assert client.get("/v1/model").json()["fields"] == ["speed"]
        session = opened(client, PROMPT, fields={"speed": 0.25})
        answer = client.post(f"/v1/sessions/{session}/commands", json={"name": "field", "field": "speed", "value": -1})
        assert answer.status_code == 200, answer.text
        wait_until(
            lambda: client.get(f"/v1/sessions/{session}").json()["state"]["fields"] == {"speed": -1.0}, "the field"
        )


def test_a_picture_comes_as_each_way_in_has_it(client: TestClient, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(64, 64))
    given = {"name": "image", "image": coded(picture(64, 64))}
    expected = torch.tensor([255, 0, 0], dtype=torch.uint8).expand(64, 64, 3)
    for way in (by_http, by_websocket):
        session = way(client, given, tmp_path)
        wait_until(lambda session=session: session.video.scene.picture is not None, "the picture")
        assert torch.equal(session.video.scene.picture, expected)
    for way, name in ((by_script, "a.png"), (by_typing, str(tmp_path / "a.png"))):
        assert torch.equal(way(client, {"name": "image", "image": name}, tmp_path).video.scene.picture, expected)
