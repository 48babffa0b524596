"""Videos made in the background: what a restart, a cancel, a full disk or a second server does to them."""

from __future__ import annotations

import errno
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from causalreel.cli import main
from causalreel.data.video_in import read_video
from causalreel.files import replacing
from causalreel.infer.pipeline import Pipeline
from causalreel.serve import jobs
from causalreel.serve.handle import Ended, Handle, Limits
from causalreel.serve.jobs import Store
from causalreel.serve.listen import listen
from causalreel.serve.session import Options, Session
from patience import PATIENCE_S, wait_until
from served import RED, coded, folder_files, picture, serving, small_pipeline, wait_for

FIELDS: dict[str, Any] = {"model": "m", "prompt": RED, "seed": 0, "frames": 5, "fps": 16.0, "size": "64x64"}
LONG = 997


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return small_pipeline()


@pytest.fixture
def client(pipeline: Pipeline, tmp_path: Path) -> Iterator[TestClient]:
    with serving(pipeline, data=tmp_path / "data", queued_videos=3) as found:
        yield found


def asked(client: TestClient, **fields: Any) -> str:
    answer = client.post("/v1/videos", json={"prompt": RED, **fields})
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"].endswith(answer.json()["id"])
    return answer.json()["id"]


# ---- the life of a video ---------------------------------------------------------------------------------------------


def test_a_video_holds_the_frames_that_a_session_of_its_seed_makes(client: TestClient, pipeline: Pipeline) -> None:
    video = asked(client, seed=5, frames=29)
    row = wait_for(client, video, "completed", "failed")
    assert (row["status"], row["progress"], row["frames"], row["error"]) == ("completed", 100, 29, None)
    assert row["completed_at"] >= row["started_at"] >= row["created_at"]
    answer = client.get(f"/v1/videos/{video}/content")
    assert answer.headers["content-type"] == "video/mp4" and len(answer.content) == row["bytes"]
    path = client.app.state.service.settings.data / "copy.mp4"
    path.write_bytes(answer.content)
    shown, fps = read_video(path)
    assert len(shown) == 29 and fps == 16
    session, frames = Session(pipeline, Options(RED, seed=5)), []
    while sum(map(len, frames)) < 29:
        frames.append(session.next_chunk().frames)
    wanted = frames[3][0].permute(2, 0, 1).float() / 127.5 - 1
    at = sum(map(len, frames[:3]))
    difference = (shown[at, :, 1::4, 1::4] - wanted).abs().mean()  # pixels are repeated four times in small videos
    assert difference < 0.03
    assert (shown[at, :, 1::4, 1::4] - shown[0, :, 1::4, 1::4]).abs().mean() > 2 * difference  # it moves


def test_ranges_of_a_video_can_be_asked_for(client: TestClient) -> None:
    video = asked(client, frames=5)
    wait_for(client, video, "completed")
    whole = client.get(f"/v1/videos/{video}/content").content
    part = client.get(f"/v1/videos/{video}/content", headers={"range": "bytes=10-19"})
    assert part.status_code == 206 and part.content == whole[10:20]
    assert part.headers["content-range"] == f"bytes 10-19/{len(whole)}"
    head = client.head(f"/v1/videos/{video}/content")
    assert (head.status_code, head.headers["content-length"], head.content) == (200, str(len(whole)), b"")
    assert head.headers["accept-ranges"] == "bytes"
    assert client.get(f"/v1/videos/{video}/content", headers={"range": "bytes=-5"}).content == whole[-5:]
    beyond = client.get(f"/v1/videos/{video}/content", headers={"range": "bytes=9999999-"})
    assert beyond.status_code == 416 and beyond.headers["content-range"] == f"bytes */{len(whole)}"
    assert set(beyond.json()["error"]) == {"code", "message"}


def test_videos_are_listed_in_pages(client: TestClient) -> None:
    made = []
    for seed in range(5):
        made.append(asked(client, seed=seed, frames=1))
        wait_for(client, made[-1], "completed")
    page = client.get("/v1/videos?limit=2").json()
    assert [row["id"] for row in page["data"]] == made[:2:-1] and page["has_more"] is True
    page = client.get(f"/v1/videos?limit=2&after={made[3]}").json()
    assert [row["id"] for row in page["data"]] == [made[2], made[1]] and page["has_more"] is True
    page = client.get(f"/v1/videos?order=asc&after={made[3]}").json()
    assert [row["id"] for row in page["data"]] == [made[4]] and page["has_more"] is False


def test_a_video_may_begin_with_a_picture(client: TestClient) -> None:
    video = asked(client, frames=5, image=coded(picture()))
    wait_for(client, video, "completed")
    path = client.app.state.service.jobs.store.file(video)
    first = read_video(path)[0][0].mean((1, 2))
    assert first[0] > 0.6 and first[1:].max() < -0.5


@pytest.mark.parametrize(
    "body",
    [
        {"frames": 0},
        {"frames": 1001},
        {"frames": 46},
        {"frames": 1, "image": coded(picture())},
        {"prompt": "no such words"},
        {"prompt": f"{RED}[1s] | {RED}[1s]"},
        {"seed": -1},
        {"steps": 101},
        {"chunk": 1000},
        {"image": "x"},
        {"fps": 3},
    ],
    ids=str,
)
def test_bad_videos_are_refused_at_once(client: TestClient, body: dict[str, Any]) -> None:
    answer = client.post("/v1/videos", json={"prompt": RED} | body)
    assert answer.status_code in (400, 422) and answer.json()["error"]["code"] == "invalid_request"
    assert client.get("/v1/videos").json()["data"] == []


def test_running_and_waiting_videos_can_be_cancelled(client: TestClient) -> None:
    running, waiting = asked(client, frames=LONG), asked(client, frames=LONG)
    wait_for(client, running, "in_progress")
    assert client.get(f"/v1/videos/{running}/content").json()["error"]["code"] == "not_completed"
    assert client.delete(f"/v1/videos/{waiting}").json()["status"] == "cancelled"
    assert client.delete(f"/v1/videos/{running}").json()["status"] == "cancelled"
    short = asked(client, frames=5)
    assert wait_for(client, short, "completed", "failed")["status"] == "completed"
    for video in (running, waiting):
        assert client.get(f"/v1/videos/{video}").json()["status"] == "cancelled"
    assert folder_files(client.app.state.service.jobs.store.folder) == {f"{short}.mp4"}
    assert all(handle.ended for handle in client.app.state.service.scheduler.handles())
    assert client.delete(f"/v1/videos/{short}").json() == {"id": short, "deleted": True}
    assert client.delete(f"/v1/videos/{waiting}").json()["deleted"] is True
    assert folder_files(client.app.state.service.jobs.store.folder) == set()
    assert client.get(f"/v1/videos/{short}").status_code == 404


def test_a_cancel_in_the_last_moment_stays_a_cancel(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = jobs.write_video

    def written(path: Path, frames: Iterator[Any], fps: float, **how: Any) -> int:
        count = whole(path, frames, fps, **how)
        assert client.delete(f"/v1/videos/{path.stem}").json()["status"] == "cancelled"
        return count

    monkeypatch.setattr(jobs, "write_video", written)
    video = asked(client, frames=5)
    wait_for(client, video, "cancelled")
    monkeypatch.undo()
    wait_for(client, asked(client, frames=1), "completed")
    assert client.get(f"/v1/videos/{video}").json()["status"] == "cancelled"
    assert f"{video}.mp4" not in folder_files(client.app.state.service.jobs.store.folder)


def test_progress_grows(client: TestClient) -> None:
    video = asked(client, frames=LONG)
    seen: list[int] = []

    def some_more() -> bool:
        seen.append(client.get(f"/v1/videos/{video}").json()["progress"])
        return len(set(seen)) > 3

    wait_until(some_more, "progress")
    assert seen == sorted(seen) and max(seen) < 100
    client.delete(f"/v1/videos/{video}")


def test_only_so_many_videos_wait(client: TestClient) -> None:
    made = [asked(client, frames=LONG) for _ in range(3)]
    answer = client.post("/v1/videos", json={"prompt": RED})
    assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
    client.delete(f"/v1/videos/{made[2]}")
    assert client.post("/v1/videos", json={"prompt": RED}).status_code == 202


def test_only_so_many_videos_are_kept(pipeline: Pipeline) -> None:
    with serving(pipeline, kept_videos=1) as client:
        video = asked(client, frames=1)
        wait_for(client, video, "completed")
        answer = client.post("/v1/videos", json={"prompt": RED})
        assert answer.status_code == 507 and answer.json()["error"]["code"] == "store_full"
        client.delete(f"/v1/videos/{video}")
        asked(client, frames=1)


def test_a_video_waits_for_room_among_the_sessions(pipeline: Pipeline) -> None:
    with serving(pipeline, Limits(sessions=1)) as client:
        session = client.post("/v1/sessions", json={"prompt": RED}).json()["id"]
        video = asked(client, frames=5)
        time.sleep(0.5)
        assert client.get(f"/v1/videos/{video}").json()["status"] == "queued"
        client.delete(f"/v1/sessions/{session}")
        wait_for(client, video, "completed")


# ---- failures --------------------------------------------------------------------------------------------------------


def test_a_session_that_ends_early_fails_its_video_with_the_reason(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Handle.pull

    def pull(self: Handle, after: int, timeout: float) -> Any:
        return Ended("out of memory: none left", is_error=True) if after >= 2 else whole(self, after, timeout)

    monkeypatch.setattr(Handle, "pull", pull)
    row = wait_for(client, asked(client, frames=49), "failed", "completed")
    assert row["error"] == {"code": "generation", "message": "out of memory: none left"}
    monkeypatch.undo()
    assert folder_files(client.app.state.service.jobs.store.folder) == set()
    wait_for(client, asked(client, frames=5), "completed")


def test_a_full_disk_fails_one_video_and_leaves_nothing(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = client.app.state.service.jobs.store.folder

    def full(path: Path, frames: Iterator[Any], fps: float, **how: Any) -> int:
        next(frames)
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(jobs, "write_video", full)
    row = wait_for(client, asked(client, frames=5), "failed", "completed")
    assert row["error"] == {"code": "storage", "message": "the file could not be written: No space left on device"}
    assert str(folder) not in str(row)
    monkeypatch.undo()
    wait_for(client, asked(client, frames=5), "completed")


def test_a_disk_that_takes_no_record_is_an_answer_and_the_queue_goes_on(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Store, fields: dict[str, Any]) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Store, "add", full)
    answer = client.post("/v1/videos", json={"prompt": RED})
    assert answer.status_code == 507 and answer.json()["error"]["code"] == "storage"
    monkeypatch.undo()

    def broken(self: Store, *_: Any, **__: Any) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(Store, "update", broken)
    video = asked(client, frames=5)
    time.sleep(0.5)
    monkeypatch.undo()
    wait_for(client, video, "completed")  # tried again when the disk works


def test_a_disk_that_is_full_to_the_end_leaves_no_video_in_progress(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the file nor the record of its failure fits: the reader learns of it all the same, the log is short."""
    whole, is_full = Store.update, threading.Event()

    def update(self: Store, video: str, **fields: Any) -> bool:
        if is_full.is_set():
            raise sqlite3.OperationalError("database or disk is full")
        return whole(self, video, **fields)

    def write(path: Path, frames: Iterator[Any], fps: float, **how: Any) -> int:
        is_full.set()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Store, "update", update)
    monkeypatch.setattr(jobs, "write_video", write)
    monkeypatch.setattr(jobs, "LEAST_WAIT_S", 0.01)
    video = asked(client, frames=5)
    row = wait_for(client, video, "failed", "completed")
    assert row["error"]["code"] == "storage" and row["completed_at"]
    assert client.app.state.service.jobs.store.get(video)["status"] == "in_progress"  # as far as the disk knows
    is_full.clear()
    monkeypatch.undo()
    wait_for(client, asked(client, frames=5), "completed")
    assert client.app.state.service.jobs.store.get(video)["status"] == "failed"
    assert caplog.text.count("disk is full") == 1 and "Traceback" not in caplog.text


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from causalreel.data.video import write_video
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    write_video(Path(sys.argv[1]) / "x.mp4", (torch.randint(0, 255, (5, 3, 256, 256)).byte() for _ in range(9)), 16)
except OSError as error:
    print(type(error).__name__, list(Path(sys.argv[1]).iterdir()))
"""


def test_a_real_write_error_is_an_os_error_and_removes_the_partial_file(tmp_path: Path) -> None:
    """The system refuses to let a file grow, as a full disk does."""
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr


# ---- restarts --------------------------------------------------------------------------------------------------------


def test_a_restart_keeps_marks_and_continues(tmp_path: Path) -> None:
    store = Store(tmp_path)
    done, renamed, running, waiting, gone = (store.add(FIELDS)["id"] for _ in range(5))
    store.file(done).write_bytes(b"x" * 10)
    store.update(done, status="in_progress")
    store.complete(done)
    store.update(renamed, status="in_progress")
    store.file(renamed).write_bytes(b"x" * 20)  # killed between the rename and the record
    store.update(running, status="in_progress")
    with replacing(tmp_path / "half.mp4") as partial:
        pass
    partial.write_bytes(b"half")
    (tmp_path / "half.mp4").unlink()
    store.update(gone, status="completed")
    store.close()
    again = Store(tmp_path)
    rows = {row["id"]: row for row in again.rows()}
    assert [rows[v]["status"] for v in (done, renamed, running, waiting, gone)] == [
        "completed", "completed", "interrupted", "queued", "failed"
    ]  # fmt: skip
    assert rows[renamed]["bytes"] == 20 and rows[gone]["error_code"] == "missing" and not partial.exists()
    again.close()


def test_files_without_a_record_go_unless_the_records_are_lost(tmp_path: Path) -> None:
    store = Store(tmp_path)
    kept = store.add(FIELDS)["id"]
    store.file(kept).write_bytes(b"x")
    store.update(kept, status="in_progress")
    store.complete(kept)
    failed = store.add(FIELDS)["id"]
    store.update(failed, status="failed")
    mine = tmp_path / "video_of_my_cat.mp4"
    for file in (store.file("video_" + "0" * 24), store.file("video_a-" + "0" * 24), store.file(failed), mine):
        file.write_bytes(b"x")
    (tmp_path / ".causalreel-1-2-3.partial.mp4").write_bytes(b"x")
    store.close()
    Store(tmp_path).close()
    assert {file.name for file in tmp_path.glob("*.mp4")} == {f"{kept}.mp4", mine.name}
    assert not list(tmp_path.glob(".*"))
    for file in tmp_path.glob("videos.sqlite*"):
        file.unlink()
    Store(tmp_path).close()
    assert {file.name for file in tmp_path.glob("*.mp4")} == {f"{kept}.mp4", mine.name}


def damaged(folder: Path, how: str) -> Path:
    """A place that cannot be a folder of videos."""
    if how == "a file":
        folder.write_bytes(b"")
    elif how == "below a file":
        folder.write_bytes(b"")
        return folder / "x"
    elif how == "no database":
        folder.mkdir()
        (folder / "videos.sqlite").write_bytes(b"no database" * 1000)
    elif how == "of another version":
        folder.mkdir()
        with sqlite3.connect(folder / "videos.sqlite") as database:
            database.execute("CREATE TABLE videos (id TEXT PRIMARY KEY, prompt TEXT)")
    elif how == "corrupt":
        store = Store(folder)
        for _ in range(200):
            store.add(FIELDS)
        store.close()
        data = bytearray((folder / "videos.sqlite").read_bytes())
        data[4096 * 3 : 4096 * 6] = bytes(4096 * 3)
        (folder / "videos.sqlite").write_bytes(data)
    elif how == "a folder for a database":
        (folder / "videos.sqlite").mkdir(parents=True)
    elif how == "/proc":
        return Path("/proc/self/x")
    return folder


WRONG = [
    "a file",
    "below a file",
    "no database",
    "of another version",
    "corrupt",
    "a folder for a database",
    "/proc",
]


@pytest.mark.parametrize("how", WRONG)
def test_a_folder_that_cannot_be_used_is_one_line_before_the_model_is_loaded(
    tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = damaged(tmp_path / "13:30", how)
    assert main(["serve", "--model", "no such model", "--port", "0", "--data", str(place)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(place) in said and "no such model" not in said, said


def test_addresses_that_cannot_be_are_one_line_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with listen("127.0.0.1", 0) as door:
        for wrong in (
            ["--port", "99999"],
            ["--port", "-1"],
            ["--port", str(door.getsockname()[1])],
            ["--host", "x.invalid"],
        ):
            assert main(["serve", "--model", "no such model", *wrong]) == 2
            said = capsys.readouterr().err
            assert said.count("\n") == 1 and wrong[1] in said and "no such model" not in said, said


def test_a_folder_may_be_called_like_a_protocol(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(pipeline, data=Path("13:30")) as client:
        video = asked(client, frames=5)
        assert wait_for(client, video, "completed", "failed")["status"] == "completed"
    assert folder_files(tmp_path / "13:30") == {f"{video}.mp4"}


def test_two_servers_do_not_share_a_folder(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ValueError, match="data folder of its own"):
        Store(tmp_path)
    store.close()
    Store(tmp_path).close()


def test_an_orderly_stop_marks_the_running_video_and_keeps_the_queue(pipeline: Pipeline, tmp_path: Path) -> None:
    with serving(pipeline, data=tmp_path) as client:
        running, waiting = asked(client, frames=LONG), asked(client, frames=5)
        wait_for(client, running, "in_progress")
    with serving(pipeline, data=tmp_path) as client:
        assert client.get(f"/v1/videos/{running}").json()["status"] == "interrupted"
        wait_for(client, waiting, "completed")


KILLED = """
import sys, time
from served import RED, serving, small_pipeline, wait_for
with serving(small_pipeline(), data=sys.argv[1]) as client:
    ask = lambda frames: client.post("/v1/videos", json={"prompt": RED, "frames": frames}).json()["id"]
    done = ask(5)
    wait_for(client, done, "completed")
    running, waiting = ask(997), ask(9)
    wait_for(client, running, "in_progress")
    while client.get(f"/v1/videos/{running}").json()["progress"] < 5:
        time.sleep(0.02)
    print(done, running, waiting, flush=True)
    time.sleep(600)
"""


def test_a_killed_server_loses_no_finished_video(pipeline: Pipeline, tmp_path: Path) -> None:
    paths = [str(Path(__file__).parent), str(Path(jobs.__file__).parents[2])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        done, running, waiting = process.stdout.readline().split()
        process.send_signal(signal.SIGKILL)
    with serving(pipeline, data=tmp_path) as client:
        assert client.get(f"/v1/videos/{running}").json()["status"] == "interrupted"
        assert client.get(f"/v1/videos/{done}").json()["status"] == "completed"
        assert len(read_video(tmp_path / f"{done}.mp4")[0]) == 5
        assert client.get(f"/v1/videos/{running}/content").status_code == 409
        wait_for(client, waiting, "completed")
        assert not list(tmp_path.glob(".*partial*"))
        again = client.delete(f"/v1/videos/{running}").json()
        assert again["deleted"] is True
