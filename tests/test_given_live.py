"""Sessions that are made of a video file or of a camera's frames: over HTTP and the socket, with the given frames in
what they show, bounded, and refused in a line where it cannot be."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("fastapi", reason="needs the extra serve")

from PIL import Image

from causalreel.data.video import write_video
from causalreel.data.video_in import open_video
from causalreel.infer.commands import Options
from causalreel.infer.restyle import Feed, GivenVideo, Restyle
from causalreel.serve import given
from causalreel.serve.given import film, pictures_in
from causalreel.serve.handle import Limits
from causalreel.serve.records import checked_record
from causalreel.serve.safety import decode_picture
from causalreel.serve.service import WORKERS
from causalreel.serve.session import Session
from jpegs import of_scans
from patience import PATIENCE_S, wait_until
from served import BLUE, RED, coded, message, opened, picture, serving, small_pipeline, until
from steered import PROMPT, STEP, random_pipeline

FAINT = 0.05
"""A strength at which the given frames shine through."""


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return small_pipeline()


def grey(level: int) -> np.ndarray:
    return np.full((64, 64, 3), level, np.uint8)


def sent(*levels: int) -> bytes:
    """A message of frames."""
    held = b""
    for level in levels:
        file = io.BytesIO()
        Image.fromarray(grey(level)).save(file, "PNG")
        held += len(file.getvalue()).to_bytes(4, "big") + file.getvalue()
    return held


def clip(path: Path, frames: int = 29, size: int = 64) -> bytes:
    """A file that gets brighter."""
    levels = torch.linspace(-0.8, 0.8, frames)[:, None, None, None].expand(-1, 3, size, size)
    write_video(path, levels[None], 16)
    return path.read_bytes()


# ---- frames that come while it goes on -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "came, count, taken",
    [([1], 4, [1, 1, 1, 1]), ([1, 2], 4, [1, 1, 2, 2]), ([1, 2, 3, 4], 4, [1, 2, 3, 4]), ([1, 2, 3], 1, [3]),
     ([1, 2, 3, 4, 5, 6], 4, [3, 4, 5, 6]), ([1, 2, 3], 2, [2, 3])],
)  # fmt: skip
def test_a_chunk_is_made_of_what_came_since_the_last_one(came: list[int], count: int, taken: list[int]) -> None:
    feed = Feed(4)
    assert feed.is_waiting
    feed.put(grey(level) for level in came)
    assert not feed.is_waiting
    shown = feed.take(count)
    assert shown.shape == (1, count, 3, 64, 64) and feed.is_waiting
    assert ((shown[0, :, 0, 0, 0] + 1) * 127.5).round().tolist() == taken


def test_a_session_waits_for_frames_and_shows_the_latest(pipeline: Any) -> None:
    restyle = Restyle(GivenVideo.of_feed(Feed(4), pipeline.size), FAINT)
    one = Session(pipeline, Options(RED), restyle=restyle)
    assert not one.can_run and one.next_chunk() is None
    seen = []
    for level in (40, 200, 120, 120):
        one.feed(grey(level) for _ in range(9))
        made = one.next_chunk()
        seen.append(float(made.frames[-1].float().mean()))
        assert one.next_chunk() is None and not one.closed
    assert seen[0] < seen[2] < seen[1] and seen[1] - seen[0] > 60
    assert (one.sequence, one.frames) == (4, 13)
    one.command("strength", strength=1.0)
    one.command("restart")
    one.feed([grey(200)])
    assert one.next_chunk().frames.shape[0] == 1  # a video's first frame, of the prompt alone
    assert one.state()["strength"] == 1.0 and one.state()["camera"] is True
    with pytest.raises(ValueError, match="has no replay file"):
        one.record()
    plain = Session(pipeline, Options(RED))
    with pytest.raises(ValueError, match="strength is for a video that is made of a given one"):
        plain.command("strength", strength=0.5)
    with pytest.raises(ValueError, match=r"strength must be a number above 0 and at most 1, got 0"):
        one.command("strength", strength=0)


def test_another_strength_counts_from_the_next_chunk_on(pipeline: Any, tmp_path: Path) -> None:
    """And the chunks before it are as without."""
    pictures, shown = [grey(60 + 4 * at) for at in range(29)], []
    for changes in (False, True):
        one = Session(
            pipeline, Options(RED, seed=3), restyle=Restyle(GivenVideo.of_pictures(pictures, (64, 64)), FAINT)
        )
        made = [one.next_chunk().frames for _ in range(3)]
        if changes:
            one.command("strength", strength=0.9)
        shown.append([*made, one.next_chunk().frames])
    assert all(torch.equal(a, b) for a, b in zip(*(each[:3] for each in shown), strict=True))
    assert (shown[0][3].int() - shown[1][3].int()).abs().max() > 30


# ---- over the network ------------------------------------------------------------------------------------------------


def means(client: Any, id: str, chunks: int, **more: Any) -> list[float]:
    """Brightness of the last frame of chunks, in order."""
    found = []
    with client.websocket_connect(f"/v1/sessions/{id}/stream?format=webp") as socket:
        while len(found) < chunks:
            told, parts = message(socket)
            if told["type"] == "chunk":
                found.append(float(np.asarray(Image.open(io.BytesIO(parts[-1]))).mean()))
            elif told["type"] == "ended":
                found.append(told)
    return found


@pytest.mark.parametrize("way", ["form", "json"])
def test_a_session_is_made_of_a_file_and_ends_with_it(pipeline: Any, way: str, tmp_path: Path) -> None:
    data = clip(tmp_path / "a.mp4", size=96)
    with serving(pipeline) as client:
        if way == "form":
            fields = {"prompt": RED, "strength": str(FAINT), "pace": "max"}
            answer = client.post("/v1/sessions", data=fields, files={"video": ("a.mp4", data, "video/mp4")})
            assert answer.status_code == 201, answer.text
            id = answer.json()["id"]
        else:
            id = opened(client, video=base64.b64encode(data).decode(), strength=FAINT, pace="max")
        *found, end = means(client, id, 9)
        assert found[-1] - found[0] > 80 and all(b > a - 8 for a, b in itertools.pairwise(found))
        assert end == {"type": "ended", "reason": "the given video is over", "is_error": False}


def test_a_session_is_made_of_frames_that_are_sent(pipeline: Any) -> None:
    with serving(pipeline) as client:
        id = opened(client, camera=True, strength=FAINT, pace="max")
        with client.websocket_connect(f"/v1/sessions/{id}/stream?format=webp") as socket:
            assert until(socket, lambda m: m["type"] == "hello")[0]["state"]["camera"] is True
            seen = []
            for level in (40, 200):
                socket.send_bytes(sent(level, level))
                while (got := message(socket))[0]["type"] != "chunk":
                    pass
                seen.append(float(np.asarray(Image.open(io.BytesIO(got[1][-1]))).mean()))
            assert seen[1] - seen[0] > 60
            socket.send_json({"type": "command", "id": "a", "name": "prompt", "text": BLUE})
            until(socket, lambda m: m["type"] == "ack")
            for data in (b"", b"\0\0\0\5abc", b"\0\0\0\3abc", b"\0\0\0\0", sent(*range(9))):
                socket.send_bytes(data)
                wrong = until(socket, lambda m: m["type"] == "error")[-1]["message"]
                assert "\n" not in wrong and wrong
            socket.send_bytes(sent(90))
            until(socket, lambda m: m["type"] == "chunk")
        assert client.get(f"/v1/sessions/{id}/record").status_code == 400


def test_one_walks_in_what_a_camera_sees_and_comes_back_to_it() -> None:
    """Keys and a prompt at once, a connection that drops in the middle, and a restart with the key still held."""

    def chunk(socket: Any, level: int) -> dict[str, Any]:
        socket.send_bytes(sent(level, level, level, level))
        return until(socket, lambda m: m["type"] == "chunk")[-1]

    with serving(random_pipeline()) as client:
        id = opened(client, PROMPT, camera=True, strength=0.5, pace="max")
        stream = f"/v1/sessions/{id}/stream?format=webp"
        with client.websocket_connect(stream) as socket:
            assert chunk(socket, 60)["camera"] == [[0, 0, 0, 0, 0]]
            for told in ({"name": "keys", "pressed": ["w"]}, {"name": "prompt", "text": BLUE}):
                socket.send_json({"type": "command", "id": 1, **told})
                until(socket, lambda m: m["type"] == "ack")
            both = chunk(socket, 90)
            assert [one["name"] for one in both["commands"]] == ["keys", "prompt"] and both["prompt"] == BLUE
            assert both["keys"] == ["w"] and both["camera"] == [[0, 0, STEP, 0, 0]]
        assert client.get(f"/v1/sessions/{id}").json()["state"]["sequence"] == 2  # it waits for frames
        with client.websocket_connect(f"{stream}&after=0") as socket:  # what was missed comes again
            state = until(socket, lambda m: m["type"] == "hello")[-1]["state"]
            assert state["camera"] and state["keys"] == ["w"] and state["prompt"] == BLUE
            assert until(socket, lambda m: m["type"] == "chunk")[-1]["sequence"] == 1
            assert chunk(socket, 90)["camera"] == [[0, 0, 2 * STEP, 0, 0]]
            socket.send_json({"type": "command", "id": 2, "name": "restart"})
            until(socket, lambda m: m["type"] == "ack")
            again = [chunk(socket, 90) for _ in range(2)]
            assert [one["camera"] for one in again] == [[[0, 0, 0, 0, 0]], [[0, 0, STEP, 0, 0]]]


def test_one_walks_in_a_given_video_until_it_is_over(tmp_path: Path) -> None:
    one = Session(
        random_pipeline(), Options(PROMPT), restyle=Restyle(GivenVideo.of_pictures([grey(90)] * 13, (64, 64)), 0.5)
    )
    one.next_chunk()
    one.command("keys", pressed=["d", "left"])
    one.command("prompt", text=BLUE)
    made = [one.next_chunk() for _ in range(3)]
    assert [chunk.camera[0].yaw for chunk in made] == pytest.approx([-12, -24, -36])
    assert all(chunk.keys == ("d", "left") and chunk.prompt == BLUE for chunk in made)
    assert one.next_chunk() is None and one.closed and not one.has_input and one.given_bytes == 0


def test_frames_cost_tokens_and_are_for_sessions_with_a_camera(pipeline: Any) -> None:
    with serving(pipeline, requests_per_s=0.001, burst=6) as client:
        id = opened(client, camera=True)
        with client.websocket_connect(f"/v1/sessions/{id}/stream") as socket:
            for _ in range(6):
                socket.send_bytes(sent(90))
            assert until(socket, lambda m: m["type"] == "error")[-1]["message"] == "too many messages; slow down"
    with serving(pipeline) as client:
        id = opened(client)
        with client.websocket_connect(f"/v1/sessions/{id}/stream") as socket:
            socket.send_bytes(sent(90))
            assert "camera: true" in until(socket, lambda m: m["type"] == "error")[-1]["message"]


def test_what_cannot_be_is_one_line_and_opens_nothing(pipeline: Any, tmp_path: Path, monkeypatch: Any) -> None:
    data = coded(clip(tmp_path / "a.mp4"))
    monkeypatch.setattr(given, "FILM_BYTES", 20 * 64 * 64 * 3)
    with serving(pipeline) as client:
        for body, words in [
            ({"strength": 0.5}, "strength is for a given video or a camera; there is none"),
            ({"camera": True, "strength": 0}, "strength must be a number above 0 and at most 1, got 0"),
            ({"camera": True, "strength": 1.5}, "strength must be a number above 0 and at most 1, got 1.5"),
            ({"camera": 1}, "camera must be true or false, got 1"),
            ({"camera": True, "video": data}, "a session is made of a video or of a camera's frames, not of both"),
            (
                {"camera": True, "image": coded(picture(64, 64))},
                "a video begins with a picture or is made of a given one",
            ),
            ({"video": "?"}, "video must be base64 of a video file"),
            ({"video": coded(b"no video")}, "video: cannot be read as a video"),
            ({"video": data}, "video: it has more than 20 frames at 16 a second, the most that a session takes"),
        ]:
            answer = client.post("/v1/sessions", json={"prompt": RED, **body})
            said = answer.json()["error"]["message"]
            assert answer.status_code in (400, 422) and words in said and "\n" not in said, said
        assert client.get("/v1/sessions").json()["data"] == []


def test_a_film_is_decoded_within_bounds(pipeline: Any, tmp_path: Path, monkeypatch: Any) -> None:
    data = clip(tmp_path / "a.mp4")
    assert len(film(data, pipeline, frames=100, pixels=1 << 20)) == 29
    with pytest.raises(ValueError, match="video: its frames must have at most 1000 pixels, got 64x64"):
        film(data, pipeline, frames=100, pixels=1000)
    monkeypatch.setattr(given, "FILM_S", -1)
    with pytest.raises(ValueError, match="video: its frames cannot be decoded in -1 s"):
        film(data, pipeline, frames=100, pixels=1 << 20)
    with pytest.raises(ValueError, match=r"image|picture"):
        pictures_in(b"\0\0\0\3abc", (64, 64))


def test_what_is_decoded_and_never_shown_takes_time_too(tmp_path: Path, monkeypatch: Any) -> None:
    """Of frames far faster than the model's rate few are shown; the clock is looked at for each that is decoded."""
    clock = iter(range(10_000))
    monkeypatch.setattr("causalreel.data.video_in.monotonic", lambda: next(clock))
    write_video(tmp_path / "fast.mp4", torch.zeros(1, 200, 3, 64, 64), 400)
    data = (tmp_path / "fast.mp4").read_bytes()
    with (
        pytest.raises(ValueError, match="its frames cannot be decoded in 50 s"),
        open_video(io.BytesIO(data), fps=1, size=(64, 64), seconds=50) as reel,
    ):
        list(reel.frames)


def test_a_full_server_decodes_no_video(pipeline: Any, monkeypatch: Any) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a video was decoded for a session that there is no room for")

    monkeypatch.setattr(given, "film", never)
    with serving(pipeline, Limits(sessions=1)) as client:
        opened(client)
        answer = client.post("/v1/sessions", json={"prompt": RED, "video": coded(b"a film")})
        assert answer.status_code == 503 and "session is taken" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "an elephant"}, "unknown word"),
        ({"fields": {"keys": 1}}, "this model has no field 'keys'"),
        ({"strength": 0}, "strength must be a number above 0"),
        ({"strength": 2}, "strength must be a number above 0"),
        ({"steps": 5000}, "steps must be a whole number"),
        ({"chunk": 4000}, "chunk"),
        ({"image": coded(picture(64, 64))}, "a video begins with a picture or is made of a given one"),
        ({"camera": True}, "a session is made of a video or of a camera's frames, not of both"),
        ({"pace": "fast"}, "pace must be one of"),
    ],
)
def test_all_else_is_checked_before_a_video_is_decoded(
    pipeline: Any, monkeypatch: Any, body: dict[str, Any], words: str
) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a video was decoded for a session that cannot be")

    monkeypatch.setattr(given, "film", never)
    with serving(pipeline) as client:
        answer = client.post("/v1/sessions", json={"prompt": RED, "video": coded(b"a film"), **body})
        said = answer.json()["error"]["message"]
        assert answer.status_code in (400, 422) and words in said and "\n" not in said, said
        assert client.get("/v1/sessions").json()["data"] == []


def test_given_videos_count_when_a_session_is_admitted(pipeline: Any, tmp_path: Path) -> None:
    """And they are let go of with the session, though it is still remembered."""
    body = {"prompt": RED, "video": coded(clip(tmp_path / "a.mp4"))}
    frames = 29 * 64 * 64 * 3
    with serving(pipeline, Limits(sessions=4)) as client:
        scheduler = client.app.state.service.scheduler  # type: ignore[attr-defined]
        wait_until(lambda: scheduler.is_ready, "the server")
        share = scheduler.limits.memory_share
        scheduler._host_budget = int((2 * scheduler.session_bytes + 1.5 * frames) / share)
        first = client.post("/v1/sessions", json=body).json()["id"]
        assert scheduler.get(first).session.given_bytes == frames
        answer = client.post("/v1/sessions", json=body)
        said = answer.json()["error"]["message"]
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert said.startswith("no memory for this session's video: its frames need more than the ") and "MiB" in said
        assert len(client.get("/v1/sessions").json()["data"]) == 1
        opened(client)  # without one there is room
        client.delete(f"/v1/sessions/{first}")
        wait_until(lambda: scheduler.get(first) is None or scheduler.get(first).session.given_bytes == 0, "its frames")
        assert client.post("/v1/sessions", json=body).status_code == 201


def test_pictures_of_a_record_count_too(pipeline: Any) -> None:
    one = Session(pipeline, Options(RED))
    before = one.given_bytes
    one.command("image", image=torch.zeros(3, 64, 64))
    assert one.given_bytes - before == 64 * 64 * 3
    one.next_chunk()
    assert one.given_bytes - before == 64 * 64 * 3
    again = Session.of(pipeline, checked_record(one.record()))
    assert again.given_bytes == 64 * 64 * 3


def test_a_slow_camera_holds_up_nobody_else(pipeline: Any, monkeypatch: Any) -> None:
    """More of them than threads that answer commands, each with a frame that is never done; another session's frames
    and commands are answered, and of a slow one no second message is begun."""
    slow, begun, go_on, decode = sent(13), threading.Semaphore(0), threading.Event(), given.decode_picture

    def decoded(data: bytes, *size: Any, **how: Any) -> Any:
        if data == slow[4:]:
            begun.release()
            assert go_on.wait(PATIENCE_S)
        return decode(data, *size, **how)

    monkeypatch.setattr(given, "decode_picture", decoded)
    with serving(pipeline, Limits(sessions=WORKERS + 2)) as client, contextlib.ExitStack() as stack:
        stack.callback(go_on.set)
        sockets = []
        for _ in range(WORKERS + 1):
            id = opened(client, camera=True, strength=FAINT)
            sockets.append(stack.enter_context(client.websocket_connect(f"/v1/sessions/{id}/stream")))
            sockets[-1].send_bytes(slow)
            assert begun.acquire(timeout=PATIENCE_S)
        quick = opened(client, camera=True, strength=FAINT)
        with client.websocket_connect(f"/v1/sessions/{quick}/stream?format=webp") as socket:
            socket.send_bytes(sent(200))
            until(socket, lambda m: m["type"] == "chunk")
            socket.send_json({"type": "command", "name": "prompt", "text": BLUE})
            until(socket, lambda m: m["type"] == "ack")
        with client.websocket_connect(f"/v1/sessions/{id}/stream") as again:
            again.send_bytes(slow)
            assert "still being decoded" in until(again, lambda m: m["type"] == "error")[-1]["message"]
        go_on.set()


def test_the_scans_of_a_messages_jpegs_are_bounded_together() -> None:
    """Before one of them is decoded; as many as a message takes, of common scans and of 1080p, are taken."""

    def message(scans: int) -> bytes:
        data = of_scans(1920, 1080, scans)
        return given.MOST_FRAMES * (len(data).to_bytes(4, "big") + data)

    assert len(pictures_in(message(10), (64, 64))) == given.MOST_FRAMES
    with pytest.raises(
        ValueError, match=r"^frames of a message must have at most 170000000 pixels together[^\n]*: send"
    ):
        pictures_in(message(11), (64, 64))
    with pytest.raises(ValueError, match=r"at most 170000000 pixels, counted once for each scan; got 4000x4000 in 11"):
        decode_picture(of_scans(4000, 4000, 11), (64, 64), pixels=16_000_000)
    assert decode_picture(of_scans(4000, 4000, 10), (64, 64), pixels=16_000_000).shape == (3, 64, 64)


def test_a_codec_without_a_stream_refuses_a_camera(pipeline: Any) -> None:
    class Whole:
        geometry = pipeline.codec.geometry

    with pytest.raises(ValueError, match="codec encodes whole clips only"):
        Restyle(GivenVideo.of_feed(Feed(4), (64, 64)), 0.5).check((64, 64), pipeline.sampling, Whole())  # type: ignore[arg-type]
