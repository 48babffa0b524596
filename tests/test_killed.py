"""SIGKILL at any step that preparing data, exporting or making trajectories takes on the disk: what is there is whole
or named, and the same command again leaves what an undisturbed one writes, bit for bit, and nothing else.

A process imports everything once and forks a child for each moment; the child kills itself when it is about to do its
n-th operation on a file in the folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ceilings import examples
from patience import PATIENCE_S

FRAME = """
import hashlib, json, os, shutil, signal, sys
from pathlib import Path
import torch

folder, count = Path(sys.argv[1]).resolve(), int(sys.argv[2])
exec(compile(sys.argv[3], "work", "exec"))  # begin(), work(), look()
moments = [0]
last = -1

def hook(event, arguments):
    if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.link", "os.chmod"):
        names = [a for a in arguments[:2] if isinstance(a, (str, bytes, os.PathLike))]
        if any(os.path.abspath(os.fsdecode(name)).startswith(str(folder)) for name in names):
            if moments[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)
            moments[0] += 1

def child(do, kill_at=-1):
    global last
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        last, moments[0] = kill_at, 0
        if do is work:
            sys.addaudithook(hook)
        try:
            said = do()
        except ValueError as error:
            said = f"ValueError: {error}"
        os.write(writing, json.dumps([said, moments[0]]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) == (not text), (status, text)
    return json.loads(text) if text else None

def tree():
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder"
            for p in sorted(folder.rglob("*"))}

def fresh():
    shutil.rmtree(folder, ignore_errors=True)
    child(begin)

fresh()
said, steps = child(work)
report = {"whole": tree(), "steps": steps, "said": said, "killed": []}
for kill_at in sorted({round(i * (steps - 1) / max(1, count - 1)) for i in range(count)}):
    fresh()
    assert child(work, kill_at) is None
    seen = child(look)[0]
    again = child(work)[0]
    report["killed"].append({"at": kill_at, "seen": seen, "again": again, "tree": tree()})
print(json.dumps(report))
"""

ENCODE = """
from causalreel.data.prepare import prepare
from causalreel.data.world import WorldConfig
from causalreel.data.worlds import flat
from causalreel.data.shards import load_prepared

class Codec:
    def encode(self, video):
        return video[:, ::4].mean((-1, -2), keepdim=True)

def begin():
    pass

def work():
    world = flat(WorldConfig(frames=5, size=64))
    prepare(folder, Codec(), codec_id="c", clips=7, seed=3, shard=3, batch=2, world=world)

def look():
    return len(load_prepared(folder).captions)
"""

EXPORT = """
import dataclasses
from causalreel.codecs.tiny import tiny_codec
from causalreel.weights.export import load_codec, load_export, save_export
from test_weights import small_denoiser, small_export

def made(seed):
    torch.manual_seed(seed)
    denoiser = small_denoiser()
    with torch.no_grad():
        for value in denoiser.parameters():
            value.normal_(generator=torch.Generator().manual_seed(seed))
    return denoiser, dataclasses.replace(small_export(), fps=8.0 * (1 + seed))

def write(seed):
    save_export(folder, *made(seed), codec=tiny_codec(seed))

def begin():
    if BEFORE:
        write(0)

def work():
    write(1)

def look():
    denoiser, export = load_export(folder)
    first = next(denoiser.parameters()).flatten()[0].item()
    expected = [next(made(seed)[0].parameters()).flatten()[0].bfloat16().item() for seed in (0, 1)]
    codec = load_codec(folder / "codec.safetensors")
    of_codec = [tiny_codec(seed).state_dict() for seed in (0, 1)]
    held = [all(torch.equal(v, c[k].half().float()) for k, v in codec.state_dict().items()) for c in of_codec]
    return [expected.index(first), int(export.fps / 8) - 1, held.index(True)]
"""

TRAJECTORIES = """
from causalreel.train.stored import Store

def begin():
    if BEFORE:  # of another teacher
        Store(folder, {"teacher": "old"}, False).get(5, [0, 2, 4], make)

def make(first):
    generator = torch.Generator().manual_seed(first)
    count = min(2, 5 - first)
    return {"states": torch.randn(count, 3, 2, generator=generator).half(), "text": torch.full((count, 1, 2), first)}

def work():
    rows = Store(folder, {"teacher": "new"}, False).get(5, [0, 2, 4], make)
    return [row.sum().item() for row in rows["states"].float()]

def look():
    pass
"""


def killed(folder: Path, program: str, moments: int, *, before: bool = False) -> dict[str, Any]:
    """What the program's work leaves when it is killed at so many moments and done again, and undisturbed."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", FRAME, str(folder), str(examples(moments)), f"BEFORE = {before}\n{program}"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["steps"] > 8 and len(report["killed"]) == min(examples(moments), report["steps"])
    for one in report["killed"]:
        assert one["tree"] == report["whole"], f"killed at step {one['at']} of {report['steps']}"
        assert one["again"] == report["said"]
    return report


def test_preparing_data(tmp_path: Path) -> None:
    report = killed(tmp_path / "data", ENCODE, 16)
    assert sorted(report["whole"]) == sorted(
        ["info.yaml", *(f"latents-0000{n}.{kind}" for n in range(3) for kind in ("safetensors", "txt"))]
    )
    seen = [one["seen"] for one in report["killed"]]
    assert {3, 6} <= {count for count in seen if isinstance(count, int)} <= {3, 6, 7}  # shards, whole ones


@pytest.mark.parametrize("before", [False, True], ids=["new", "over another"])
def test_exporting(tmp_path: Path, before: bool) -> None:
    """Old or new as a whole, or refused in words; never the weights of one with the config or the codec of another."""
    report = killed(tmp_path / "export", EXPORT, 20, before=before)
    assert sorted(report["whole"]) == ["codec.safetensors", "codec.yaml", "config.yaml", "model.safetensors"]
    seen = [one["seen"] for one in report["killed"]]
    whole = [found for found in seen if isinstance(found, list)]
    assert all(found in ([0, 0, 0], [1, 1, 1]) for found in whole), seen
    refused = {found for found in seen if isinstance(found, str)}
    assert refused and ([0, 0, 0] in whole) == before
    for message in refused:
        assert "was stopped between the two files" in message if before else "is not an export" in message


@pytest.mark.parametrize("before", [False, True], ids=["new", "over another teacher's"])
def test_making_trajectories(tmp_path: Path, before: bool) -> None:
    report = killed(tmp_path / "run", TRAJECTORIES, 16, before=before)
    assert list(report["whole"]) == ["trajectories.safetensors"]
