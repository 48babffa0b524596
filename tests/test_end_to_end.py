"""From a folder of videos to a video: prepared, trained in two processes that are killed and go on, exported, shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from causalreel import cli
from causalreel.data.manifest import read_manifest
from causalreel.data.video_in import read_video
from causalreel.train.checkpoint import latest
from causalreel.weights.export import read_export
from patience import PATIENCE_S, wait_until
from test_launch import kill_all, steps
from test_prepare import BLUE, RED, moving, video
from test_ranks import torchrun

STEPS = 12
SMALL = (
    *("data=data", "codec=tiny", "rows=null", "settings.batch=4", "trainer.device=cpu", "trainer.preview_every=0"),
    *(f"trainer.steps={STEPS}", "trainer.save_every=1", "trainer.log_every=1", "trainer.probe_every=6"),
)


def reel(*arguments: str) -> None:
    assert cli.main(list(arguments)) == 0


def train_killed_and_resumed(place: Path, recipe: str, out: str, *more: str) -> None:
    """Two processes, killed between two steps or within one, and the same command again."""
    words = [word.replace("data=data", f"data={place / 'data'}") for word in (*SMALL, *more)]
    command = ("-m", "causalreel", "train", recipe, *words, f"trainer.out={place / out}")
    running = torchrun(2, *command)
    wait_until(lambda: running.poll() is not None or steps(place / out) >= 2, f"two steps of {recipe}")
    kill_all(running)
    running.communicate(timeout=PATIENCE_S)
    done = steps(place / out)
    assert 2 <= done < STEPS and not (place / out / "export").exists(), done
    running = torchrun(2, *command)
    _, errors = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0 and f"resumed {place / out}/checkpoints/step-{done:08}" in errors, errors
    end = latest(place / out / "checkpoints")
    assert end is not None and end.name == f"step-{STEPS:08}"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes by Linux's /proc")
def test_videos_become_a_model_that_makes_videos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        video(Path("videos") / f"{number}.mp4", moving(60, seed=number, size=96), [RED, BLUE][number % 2], fps=30)
    reel("prepare", "videos", "--out", "data", "--frames", "9", "--device", "cpu")
    manifest = read_manifest("data")
    assert manifest is not None and sum(1 for _ in Path("data").glob("latents-*.safetensors")) == 1
    reel("prepare", "--check", "data")

    train_killed_and_resumed(tmp_path, "tiny/base", "base", "model=tiny-smoke")
    start = f"init.student={tmp_path / 'base' / 'export'}"
    train_killed_and_resumed(tmp_path, "tiny/ar", "ar", start)

    reel("export", "ar/export", "given", "--name", "mine")
    assert read_export("given").name == "mine" and sorted(os.listdir("given"))[0] == "codec.safetensors"
    reel("generate", RED, "--model", "given", "-o", "out.mp4", "--steps", "2", "--device", "cpu")
    frames, _ = read_video("out.mp4")
    assert frames.shape[0] == 9 and frames.isfinite().all() and frames.std() > 0
    assert not torch.equal(frames[0], frames[-1])
    assert cli.main(["doctor", "ar"]) in (0, 1)  # two processes wrote its checkpoints
    assert "several processes wrote the checkpoints" in capsys.readouterr().out
