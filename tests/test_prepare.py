"""Videos become training data: what is cut, left out and written; kills, several processes, and what goes wrong."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from causalreel import cli
from causalreel.codecs.tiny import tiny_codec
from causalreel.data import encoding
from causalreel.data.clips import Clip, Cutting, LeftOut, cut
from causalreel.data.encoding import encode
from causalreel.data.groups import Models, Plan, Share
from causalreel.data.listing import items_of
from causalreel.data.manifest import Manifest, read_manifest, write_manifest
from causalreel.data.packing import Row, pack, write_null
from causalreel.data.shards import read_ragged_text
from causalreel.data.streaming import ShardSource, open_set
from causalreel.data.video import write_video
from causalreel.data.video_in import read_video
from causalreel.data.videos import prepare_videos
from causalreel.infer import encoders
from causalreel.text.tiny import TinyTextEncoder
from causalreel.types import Geometry
from causalreel.weights.export import codec_identity
from patience import PATIENCE_S

RED, BLUE = "a large red circle moves right", "a small blue square moves left"
SMALL = Cutting(frames=5, fps=16, height=64, width=64)


def moving(frames: int, *, seed: int = 0, size: int = 64) -> torch.Tensor:
    """frames (T,3,H,W) uint8: a smooth pattern that drifts."""
    across, down = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy")
    phase = torch.arange(frames).view(-1, 1, 1) / 3 + seed
    waves = [torch.sin(across / (5 + seed % 3) + k * down / 9 + phase * (k + 1)) for k in range(3)]
    return ((torch.stack(waves, 1) + 1) * 127).to(torch.uint8)


def video(path: Path, frames: torch.Tensor, caption: str | None = RED, fps: float = 16) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, frames, fps)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption + "\n")
    return path


class Pooled(torch.nn.Module):
    """A codec without rounding, for comparisons of bits: means of 8 x 8 pixels of every fourth frame."""

    geometry = Geometry(channels=16, spatial=8, temporal=4)

    def encode(self, video: torch.Tensor) -> torch.Tensor:
        small = torch.nn.functional.avg_pool2d(((video + 1) * 127.5).round()[:, ::4].flatten(0, 1), 8)  # (B*F,3,h,w)
        return small.unflatten(0, (len(video), -1)).repeat(1, 1, 6, 1, 1)[:, :, :16] / 256


def plan(codec: torch.nn.Module | None = None, **how: object) -> Plan:
    codec = codec or Pooled()
    models = Models(lambda: codec, TinyTextEncoder, "tiny", "tiny", torch.device("cpu"))  # type: ignore[arg-type]
    return Plan(**({"cutting": SMALL, "models": models, "group": 2, "shard": 3} | how))  # type: ignore[arg-type]


def written(folder: Path) -> dict[str, bytes]:
    """Everything that is for the reader."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def reel(place: Path) -> Path:
    """A folder of five videos."""
    for number in range(5):
        video(place / "in" / f"{number}.mp4", moving(5 * (number + 1) + 2, seed=number), RED if number % 2 else BLUE)
    return place / "in"


# ---- from videos to a model


def test_a_folder_of_videos_becomes_a_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        video(place / "videos" / f"{number}.mp4", moving(60, seed=number, size=96), [RED, BLUE][number % 2], fps=30)
    made = ["prepare", "videos", "--out", "data", "--frames", "9", "--device", "cpu"]
    assert cli.main(made) == 0
    assert "data: 9 clips in 1 shards" in capsys.readouterr().out
    assert cli.main(["prepare", "--check", "data"]) == 0 and "wrong" not in capsys.readouterr().out
    manifest = read_manifest("data")
    assert manifest is not None and manifest.made["codec"] == codec_identity("tiny") and manifest.made["fps"] == 16
    small = ("trainer.steps=2", "trainer.device=cpu", "trainer.preview_every=0", "settings.batch=2")
    run = (*small, "data=data", "codec=tiny", "rows=null", "trainer.save_every=1")
    assert cli.main(["train", "tiny/base", *run, "model=tiny-smoke", "trainer.out=base"]) == 0
    assert cli.main(["train", "tiny/ar", *run, "init.student=base/export", "trainer.out=ar"]) == 0
    assert (
        cli.main(["train", "tiny/ar", *run[1:], "trainer.steps=3", "init.student=base/export", "trainer.out=ar"]) == 0
    )
    wanted = ["generate", RED, "--model", "ar/export", "-o", "out.mp4", "--steps", "2", "--device", "cpu"]
    assert cli.main(wanted) == 0 and read_video("out.mp4")[0].shape[0] == 9
    capsys.readouterr()
    big = ["train", "tiny/base", *run[:3], "settings.batch=10", *run[4:], "model=tiny-smoke", "trainer.out=b"]
    assert cli.main(big) == 2
    assert "has 9 clips, a batch has settings.batch=10" in capsys.readouterr().err
    video(place / "other" / "0.mp4", moving(60))
    assert cli.main(["train", "tiny/base", *run, "data=other", "model=tiny-smoke", "trainer.out=c"]) == 2


def test_prompts_and_stored_trajectories_train_their_stages(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("trainer.steps=1", "trainer.device=cpu", "trainer.preview_every=0", "settings.batch=2", "codec=tiny")
    video(place / "v" / "0.mp4", moving(20))
    assert cli.main(["prepare", "v", "--out", "clips", "--frames", "5", "--device", "cpu"]) == 0
    base = ["train", "tiny/base", *small, "rows=null", "data=clips", "model=tiny-smoke", "trainer.out=base"]
    assert cli.main(base) == 0
    (place / "p.txt").write_text(f"{RED}\n{BLUE}\n{RED} slowly\n")
    assert cli.main(["import", "p.txt", "--out", "prompts", "--model", "tiny"]) == 0
    roles = [f"init.{role}=base/export" for role in ("student", "teacher", "critic")]
    dmd = ["train", "tiny/dmd", *small, "rows=null", "data=prompts", "settings.critic_updates=1", *roles]
    assert cli.main([*dmd, "settings.critic_rollouts=1", "trainer.preview_every=1", "trainer.out=dmd"]) == 0
    capsys.readouterr()
    assert cli.main([*base[:-1], "data=prompts", "trainer.out=b"]) == 2
    assert "prompts holds only prompts, stage pretrain needs latents" in capsys.readouterr().err
    encoded = TinyTextEncoder().encode([RED])[0]
    rows = [Row(RED, str(n), torch.randn(6, 2, 16, 8, 8).half(), encoded) for n in range(3)]
    entry = pack(place / "paths" / "latents-0.safetensors", rows)
    write_manifest(place / "paths", Manifest((entry,), null=write_null(place / "paths", torch.zeros(1, 64))))
    ode = ["train", "tiny/causal_ode", *small, "rows=null", "data=paths", "init.student=base/export", "trainer.out=ode"]
    assert cli.main([*ode, "settings.keep=[0,1,2,3]", "settings.grid=4"]) == 0  # without a teacher
    assert not (place / "ode" / "trajectories").exists()
    assert cli.main([*ode[:-1], "trainer.out=o", "settings.keep=[0,1]", "settings.grid=4"]) == 2
    assert "trajectories of 6 states, settings.keep asks for 2" in capsys.readouterr().err


def test_rows_are_what_the_codec_makes_of_the_frames(reel: Path, place: Path) -> None:
    codec = tiny_codec(0).eval()
    manifest = prepare_videos("in", items_of(reel), place / "out", plan(codec, dtype=torch.float32))
    data = open_set(place / "out")
    assert manifest is not None and manifest.clips == data.rows == 1 + 2 + 3 + 4 + 5
    sources = [source for shard in data.shards for source in read_ragged_text(shard, "sources")]
    assert sources[:3] == ["0.mp4 at 0.000 s", "1.mp4 at 0.000 s", "1.mp4 at 0.312 s"]
    batch = ShardSource(data, length=16).batch(torch.tensor([2]))
    frames = read_video(reel / "1.mp4")[0][None, 5:10]
    with torch.no_grad():
        whole = codec.encode(frames)
    assert torch.allclose(batch.latents, whole, rtol=1e-4, atol=1e-4)  # type: ignore[attr-defined]
    assert torch.equal(batch.conditioning.text, TinyTextEncoder().encode([RED])) and data.captions()[2] == RED
    assert torch.equal(load_file(place / "out" / "null.safetensors")["text"], torch.zeros(0, 64))
    shapes = [(shard.path.name, shard.clips) for shard in data.shards]
    assert shapes == [
        ("latents-00000-000.safetensors", 3),
        ("latents-00001-000.safetensors", 3),
        ("latents-00001-001.safetensors", 3),
        ("latents-00001-002.safetensors", 1),
        ("latents-00002-000.safetensors", 3),
        ("latents-00002-001.safetensors", 2),
    ]


# ---- cutting and leaving out


def found(path: Path, **how: object) -> list[tuple[float, str]]:
    """When each part begins, and why it was left out, if it was."""
    cutting = Cutting(**({"frames": 5, "fps": 16, "height": 64, "width": 64} | how))  # type: ignore[arg-type]
    return [
        (each.start, each.reason.partition(":")[0] if isinstance(each, LeftOut) else "") for each in cut(path, cutting)
    ]


def test_clips_follow_each_other_or_stride(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", moving(18))
    assert [at for at, _ in found(path)] == [0, 5 / 16, 10 / 16]
    assert [at for at, _ in found(path, stride=3)] == [n / 16 for n in (0, 3, 6, 9, 12)]
    assert [at for at, _ in found(path, stride=8)] == [0, 0.5]
    assert [at for at, _ in found(path, most=2)] == [0, 5 / 16]
    clips = [each for each in cut(path, Cutting(5, 16, 64, 64, stride=3)) if isinstance(each, Clip)]
    whole = ((read_video(path)[0] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(clip.frames, whole[3 * n : 3 * n + 5]) for n, clip in enumerate(clips))


def test_frames_are_picked_by_their_time_and_from_a_part(tmp_path: Path) -> None:
    path = video(tmp_path / "a.mp4", moving(60), fps=30)
    assert len(found(path)) == 6  # two seconds at 16 a second
    clips = [each for each in cut(path, SMALL, start=0.5, end=1.2) if isinstance(each, Clip)]
    assert [clip.start for clip in clips] == [0.5, 0.5 + 5 / 16]
    whole = ((read_video(path)[0] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(clips[0].frames[0], whole[15])
    with pytest.raises(ValueError, match="holds no frames that can be decoded from 9 s on"):
        list(cut(path, SMALL, start=9))


def test_what_is_left_out_and_why(tmp_path: Path) -> None:
    still = video(tmp_path / "still.mp4", moving(1).expand(12, -1, -1, -1))
    assert found(still) == [(0, "static"), (5 / 16, "static")] and found(still, motion=0) == [(0, ""), (5 / 16, "")]
    assert found(video(tmp_path / "black.mp4", moving(6) // 40)) == [(0, "black")]
    assert found(video(tmp_path / "short.mp4", moving(4))) == [(0, "too short")]
    small = video(tmp_path / "small.mp4", moving(6, size=32))
    assert found(small) == [(0, "too small")] and found(small, upscale=True) == [(0, "")]
    wide = video(tmp_path / "wide.mp4", moving(6, size=64)[:, :, :32])
    assert found(wide) == [(0, "too small")] and found(wide, fit="pad") == [(0, "")]


def test_no_clip_goes_over_a_cut(tmp_path: Path) -> None:
    pytest.importorskip("scenedetect")
    drift = torch.arange(8, dtype=torch.uint8).view(-1, 1, 1, 1)
    path = video(tmp_path / "a.mp4", torch.cat([moving(1) // 2 + drift, 255 - moving(1, seed=4) // 4 - drift[:7]]))
    assert found(path, scenes=True) == [(0, ""), (5 / 16, "a cut after 3 frames"), (0.5, "")]


def test_encoding_piece_by_piece_is_encoding_whole() -> None:
    codec, frames = tiny_codec(0).eval(), moving(45)[None]
    with torch.no_grad():
        assert torch.allclose(encode(codec, frames), codec.encode(frames.float() / 127.5 - 1), rtol=1e-4, atol=1e-4)


# ---- kills and processes


class Killed(BaseException):
    pass


def test_a_kill_at_any_time_changes_nothing_and_nothing_is_encoded_twice(
    reel: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items, codec = items_of(reel), Pooled()
    prepare_videos("in", items, place / "whole", plan(codec))
    whole = written(place / "whole")
    encoded: list[str] = []
    part, count = encoding._encode_part, 0
    monkeypatch.setattr(
        encoding, "_encode_part", lambda *a: (part(*a), encoded.append(f"{a[1].parent.name}/{a[1].name}"))
    )
    replace, left = os.replace, [0]

    def fragile(*paths: object) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        replace(*paths)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", fragile)
    for attempt in range(60):
        left[0] = 1 + attempt % 13
        try:
            prepare_videos("in", items, place / "again", plan(codec))
            break
        except Killed:
            count += 1
    assert count > 5 and written(place / "again") == whole
    assert len(encoded) == len(set(encoded)) == 15


def test_killed_by_the_system(
    reel: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoders, "load_codec", lambda path: Pooled())
    words = ["prepare", "in", "--out", "out", "--frames", "5", "--group", "2", "--device", "cpu"]
    script = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from causalreel import cli
from causalreel.infer import encoders
from test_prepare import Pooled
encoders.load_codec = lambda path: Pooled()
from causalreel.data import groups
clips = groups.write_part
def write(path, tensors):
    clips(path, tensors)
    if path.name == "00001-00001.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
from causalreel.data import encoding
encoding.write_part = write
cli.main({words!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=PATIENCE_S)
    assert done.returncode == -signal.SIGKILL and not (place / "out" / "manifest.json").exists(), done.stderr
    shutil.copytree(place / "out", place / "cut")
    for name, gone in (("00000/00000-00000", "00000"), ("00001/text", "00001"), ("null", "null.safetensors")):
        part, again = place / "cut" / ".prepare" / f"{name}.safetensors", place / "cut" / ".prepare" / gone
        part.write_bytes(part.read_bytes()[:-1])
        assert cli.main(["cut" if word == "out" else word for word in words]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f".prepare/{name}.safetensors is damaged" in error and f"delete cut/.prepare/{gone} and run" in error
        shutil.rmtree(again) if again.is_dir() else again.unlink()
    assert cli.main(["cut" if word == "out" else word for word in words]) == 0
    assert cli.main(words) == 0
    whole = [*words[:3], "whole", *words[4:]]
    assert cli.main(whole) == 0
    assert written(place / "out") == written(place / "whole") == written(place / "cut")


def test_two_processes_write_what_one_writes(reel: Path, place: Path) -> None:
    items, codec = items_of(reel), Pooled()
    prepare_videos("in", items, place / "one", plan(codec))
    other = threading.Thread(target=prepare_videos, args=("in", items, place / "two", plan(codec), Share(1, 2)))
    other.start()
    prepare_videos("in", items, place / "two", plan(codec), Share(0, 2))
    other.join()
    assert written(place / "one") == written(place / "two")


def test_a_shard_that_was_deleted_is_made_again(reel: Path, place: Path) -> None:
    how = plan()
    prepare_videos("in", items_of(reel), place / "out", how)
    before = written(place / "out")
    (place / "out" / "latents-00001-001.safetensors").unlink()
    prepare_videos("in", items_of(reel), place / "out", how)
    assert written(place / "out") == before
    shutil.rmtree(place / "out" / ".prepare")  # nothing needs it any more
    again = prepare_videos("in", items_of(reel), place / "out", plan(codec=torch.nn.Identity()))
    assert again is not None and again.clips == 15 and not (place / "out" / ".prepare").exists()
    with pytest.raises(ValueError, match="holds data with shard=3, asked for shard=4: use another folder"):
        prepare_videos("in", items_of(reel), place / "out", plan(shard=4))
    video(reel / "new.mp4", moving(9))
    with pytest.raises(ValueError, match="holds data with videos=5, asked for videos=6"):
        prepare_videos("in", items_of(reel), place / "out", how)


# ---- sources


def names(source: Path) -> list[tuple[str, str | None, float, float | None]]:
    return [(item.name, item.caption, item.start, item.end) for item in items_of(source)]


def test_folders_tables_and_tars(place: Path) -> None:
    a = video(place / "v" / "a.mp4", moving(12), BLUE)
    video(place / "v" / "sub" / "b c.MP4".replace("MP4", "mp4"), moving(12), None)
    video(place / "v" / ".hidden.mp4", moving(2))
    assert names(place / "v") == [("a.mp4", BLUE, 0, None), ("sub/b c.mp4", None, 0, None)]
    (place / "t.csv").write_text(f'\ufeffPath,Caption,start,end\nv/a.mp4,"{RED}",0.1,0.5\nv/a.mp4,"x, y",,\n')
    assert names(place / "t.csv") == [("v/a.mp4#t=0.1,0.5", RED, 0.1, 0.5), ("v/a.mp4", "x, y", 0, None)]
    lines = [{"file_path": "v/a.mp4", "text": "x\u2028y"}, {"video_path": str(a), "caption": RED, "start": 0.25}]
    (place / "t.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    assert names(place / "t.jsonl") == [("v/a.mp4", "x\u2028y", 0, None), (f"{a}#t=0.25", RED, 0.25, None)]
    with tarfile.open(place / "t.tar", "w") as archive:
        for name, data in (("k/1.mp4", a.read_bytes()), ("k/1.json", json.dumps({"caption": RED}).encode())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert names(place / "t.tar") == [("t.tar/k/1.mp4", RED, 0, None)]
    for source in ("v", "t.csv", "t.tar"):
        prepare_videos(source, items_of(place / source), place / f"out-{source}", plan())
    first = [open_set(place / f"out-{source}").shards[0].clip(0) for source in ("v", "t.tar")]
    assert torch.equal(*first)
    (left,) = csv.DictReader((place / "out-t.csv" / "report.csv").open())
    assert left["source"] == "v/a.mp4" and left["reason"].startswith("bad caption: unknown word 'x'")
    assert open_set(place / "out-t.csv").rows == 1


@pytest.mark.parametrize(
    ("files", "source", "said"),
    [
        ({}, ".", "holds no videos"),
        ({}, "nowhere", "no videos at nowhere"),
        (
            {"a.mp4": b""},
            ".",
            "has 1 videos and no captions: each needs a text file beside it, such as a.txt for a.mp4",
        ),
        ({"a.mp4": b"", "a.txt": b" \n"}, ".", "no captions"),
        ({"a.mp4": b"", "a.txt": b"\xff\xfea"}, ".", "a.txt is not UTF-8"),
        ({"a.mp4": b"", "a.txt": b"x" * 70000}, ".", "too large for a caption"),
        ({"t.csv": b"a,b\n"}, "t.csv", "its first line must name the columns path"),
        ({"t.csv": b"path,caption\na.mp4,one, two\n"}, "t.csv", "line 2 has more cells"),
        ({"t.csv": b"path,caption,start\na.mp4,x,soon\n"}, "t.csv", "start must be seconds"),
        ({"t.csv": b"path,caption,start,end\na.mp4,x,2,1\n"}, "t.csv", "end 1 is not behind start 2"),
        ({"t.csv": b"path,caption\n"}, "t.csv", "holds no rows"),
        ({"t.jsonl": b'{"caption": "x"}\n'}, "t.jsonl", "line 1 has no path"),
        ({"t.jsonl": b"{\n"}, "t.jsonl", "line 1 is no JSON"),
        ({"t.jsonl": b'{"path": 3}\n'}, "t.jsonl", "path must be a text"),
        ({"t.tar": b"no tar"}, "t.tar", "is no tar"),
        ({"t.tar": tarfile.TarInfo("k/1.mp4").tobuf() * 2 + bytes(1024)}, "t.tar", "'k/1.mp4' is in it twice"),
        ({"t.xlsx": b""}, "t.xlsx", "is no folder of videos"),
    ],
)
def test_sources_that_are_none(
    place: Path, files: dict[str, bytes], source: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, data in files.items():
        (place / name).write_bytes(data)
    assert cli.main(["prepare", source, "--out", "out", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (place / "out").exists()


# ---- what goes wrong


def test_broken_videos_are_reported_and_cost_nothing(place: Path) -> None:
    video(place / "in" / "good.mp4", moving(6))
    for name, data in (("empty", b""), ("text", b"hello"), ("cut", (place / "in" / "good.mp4").read_bytes()[:900])):
        (place / "in" / f"{name}.mp4").write_bytes(data)
        (place / "in" / f"{name}.txt").write_text(RED)
    video(place / "in" / "mute.mp4", moving(6), None)
    for name, data in (("latin", "caf\xe9".encode("latin1")), ("wide", RED.encode("utf-16")), ("long", b"x" * 70000)):
        video(place / "in" / f"{name}.mp4", moving(6), None).with_suffix(".txt").write_bytes(data)
    manifest = prepare_videos("in", items_of(place / "in"), place / "out", plan())
    left = {row["source"]: row["reason"] for row in csv.DictReader((place / "out" / "report.csv").open())}
    assert manifest is not None and manifest.clips == 1 and left.pop("mute.mp4") == "no caption"
    assert re.fullmatch(r"bad caption: .*latin\.txt is not UTF-8 text \(byte 3 is 0xe9\).*", left.pop("latin.mp4"))
    assert "wide.txt is not UTF-8 text (it looks like UTF-16)" in left.pop("wide.mp4")
    assert "too large for a caption" in left.pop("long.mp4")
    assert all(reason.startswith("cannot be decoded: ") for reason in left.values()) and len(left) == 3
    assert manifest.statistics["left out"] == {"cannot be decoded": 3, "no caption": 1, "bad caption": 3}


def test_a_bad_caption_beside_a_name_that_is_no_utf_8_is_reported_too(place: Path) -> None:
    video(place / "in" / "good.mp4", moving(6))
    odd = video(place / "in" / "odd\udcff.mp4", moving(6), None)
    odd.with_suffix(".txt").write_bytes(b"caf\xe9")
    manifest = prepare_videos("in", items_of(place / "in"), place / "out", plan())
    assert manifest is not None and manifest.clips == 1 and manifest.statistics["left out"] == {"bad caption": 1}


def test_a_tar_goes_on_behind_a_caption_that_cannot_be_read(place: Path) -> None:
    data = video(place / "a.mp4", moving(6)).read_bytes()
    texts = {"1.txt": RED.encode(), "2.txt": b"\xff\xfe", "3.json": b"{", "4.json": b'{"caption": 3}'}
    with tarfile.open(place / "t.tar", "w") as archive:
        for name, content in (pair for key, text in texts.items() for pair in ((f"{key[0]}.mp4", data), (key, text))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    found = items_of(place / "t.tar")
    assert [item.caption for item in found] == [RED, None, None, None] and found[0].problem is None
    told = ("2.txt is not UTF-8", "3.json is no JSON", "caption must be a text, got 3")
    assert all(words in (item.problem or "") for words, item in zip(told, found[1:], strict=True))


def test_nothing_could_be_made(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video(place / "in" / "a.mp4", moving(2))
    assert cli.main(["prepare", "in", "--out", "out", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "no clip could be made of in (1 too short); out/report.csv says of each why" in error
    assert not (place / "out" / "manifest.json").exists()
    assert 'a.mp4,0.0,"too short' in (place / "out" / "report.csv").read_text()


def test_a_full_disk_is_one_line_and_the_next_run_goes_on(
    reel: Path, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from causalreel import hashed

    write, left = hashed.HashedFile.write, [40]

    def full(self: hashed.HashedFile, data: object) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    words = ["prepare", "in", "--out", "out", "--frames", "5", "--group", "2", "--device", "cpu"]
    with monkeypatch.context() as patched:
        patched.setattr(hashed.HashedFile, "write", full)
        assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error and "out/" in error and error.count("\n") == 1
    assert not list((place / "out").rglob("*.partial*"))
    assert cli.main(words) == 0 and open_set(place / "out").rows == 15


def test_a_check_finds_what_is_wrong(reel: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_videos("in", items_of(reel), place / "out", plan())
    path = place / "out" / "latents-00000-000.safetensors"
    tensors = load_file(path)
    tensors["latents"][1, 0, 0, 0, 0] = float("nan")
    tensors["latents"][2] = tensors["latents"][0]
    save_file(tensors, path)
    whole = (place / "out" / "latents-00001-000.safetensors").read_bytes()
    (place / "out" / "latents-00001-000.safetensors").write_bytes(whole[:-9])
    (place / "out" / "latents-00001-001.safetensors").unlink()
    capsys.readouterr()
    assert cli.main(["prepare", "--check", "out"]) == 2
    shown, error = capsys.readouterr()
    for part in (
        "clip 1 (1.mp4 at 0.000 s) has latents that are not finite",
        "clip 2 (1.mp4 at 0.312 s) is the same as",
        "latents-00001-000.safetensors is damaged or was cut off",
        "shard latents-00001-001.safetensors of manifest.json is missing",
        "latents-00000-000.safetensors is not as it was written",
    ):
        assert part in shown, shown
    assert error.count("\n") == 1 and "problems, the first: " in error
    assert cli.main(["prepare", "--check", "in"]) == 2 and "no prepared data in in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "needs SOURCE and --out"),
        (["in"], "needs SOURCE and --out"),
        (["in", "--out", "o", "--check", "o"], "--check reads a prepared folder"),
        (["in", "--out", "o", "--frames", "6"], "nearest: 5 or 9"),
        (["in", "--out", "o", "--height", "64"], "only for released models"),
        (["in", "--out", "o", "--random-weights"], "only for released models"),
        (["in", "--out", "o", "--model", "tinny"], "did you mean"),
        (["in", "--out", "o", "--fps", "0"], "--fps must be at least 0.1"),
    ],
)
def test_what_cannot_be_meant(place: Path, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    video(place / "in" / "a.mp4", moving(2))
    assert cli.main(["prepare", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (place / "o").exists()


def test_a_long_caption_is_cut_as_released_code_does_and_told(caplog: pytest.LogCaptureFixture) -> None:
    from causalreel.text.umt5 import Tokens, UMT5TextEncoder

    class Net(torch.nn.Module):
        config = type("Sizes", (), {"d_model": 4, "vocab_size": 9, "d_ff": 4, "num_heads": 1})

        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.ones(9, 4))

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> object:
            return type("Out", (), {"last_hidden_state": self.table[input_ids]})

    encoder = UMT5TextEncoder(Net, lambda text: Tokens((1,) * 8, len(text.split())), length=8, width=4)
    text = encoding.without_zeros(encoder.encode(["word " * 600])[0])
    assert text.shape == (8, 4) and "prompt has 600 tokens, only the first 8 count" in caplog.text
