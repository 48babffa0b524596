"""What a run is made from is known by content: places may change, contents may not, trajectories are never mixed."""

# ruff: noqa: F811 - fixtures of another file

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from causalreel import cli, hashed
from causalreel.data import prepare
from causalreel.fingerprint import fingerprint
from causalreel.nn.masks import Context
from causalreel.nn.presets import preset
from causalreel.train import building, checkpoint, stored
from causalreel.train.contents import facts_of
from causalreel.weights import export
from causalreel.weights.export import load_export, read_export, save_export
from test_run import CD, DATA, FROM_BASE, SMALL, made, place, reel, refused  # noqa: F401 - fixtures
from test_weights import small_denoiser, small_export

ODE = ["train", "tiny/causal_ode", *SMALL, *DATA, *FROM_BASE, "settings.pairs=5", "settings.maker_batch=2"]
ODE += ["settings.grid=4", "settings.keep=[0,1,2,3]", "trainer.out=new"]
CODEC = ["train", "tiny/codec", *SMALL, "rows=4", "trainer.out=codec2"]
ENCODE = ["encode", "--codec", "codec/export", "--clips", "3", "--device", "cpu", "--out", "new"]


def other_latents() -> None:
    file = Path("data/latents-00000.safetensors")
    latents = load_file(file)["latents"]
    latents[3, 0, 0, 0, 0] += 1
    save_file({"latents": latents}, file)


def other_captions() -> None:
    file = Path("data/latents-00000.txt")
    lines = file.read_text().split("\n")
    file.write_text("\n".join([lines[1], lines[0], *lines[2:]]))


def other_weights() -> None:
    denoiser, card = load_export("base/export")
    next(denoiser.parameters()).data[0] += 1
    save_export("base/export", denoiser, card)


def other_codec() -> None:
    file = Path("codec/export/codec.safetensors")
    tensors = load_file(file)
    save_file({name: value * 1.01 for name, value in tensors.items()}, file)
    Path("data/info.yaml").unlink()  # as data made by hand


CHANGES: dict[str, Callable[[], None]] = {
    "data: data is not what": other_latents,
    "data: data is not  what": other_captions,
    "init.student: base/export is not what": other_weights,
    "codec: codec/export is not what": other_codec,
}


@pytest.mark.parametrize("message", CHANGES)
def test_other_contents_at_the_same_place_are_refused(
    place: Path, capsys: pytest.CaptureFixture[str], message: str
) -> None:
    reel(*CD)
    CHANGES[message]()
    refused(capsys, [*CD, "trainer.steps=3"], message.replace("  ", " "), "step-00000002 was made from", "another out")


def test_the_same_contents_elsewhere_go_on_bit_for_bit(place: Path) -> None:
    constant = ["trainer.optimisers.student.schedule=constant"]
    reel(*CD, *constant, "trainer.steps=3", "trainer.out=whole")
    reel(*CD, *constant)
    for name in ("data", "base", "codec"):
        shutil.move(name, f"moved-{name}")
    Path("link").symlink_to("moved-data")
    moved = ["data=./link/../link", f"codec={Path('moved-codec/export').resolve()}"]
    reel(*CD, *constant, "trainer.steps=3", *moved, "init.student=moved-base/export", "init.teacher=moved-base/export")
    one, two = (load_file(f"{out}/export/model.safetensors") for out in ("whole", "new"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    contents = read_export("new/export").provenance["contents"]
    assert contents == read_export("whole/export").provenance["contents"]
    assert set(contents) == {"data", "codec", "init.student", "init.teacher", "compute"}


def test_data_of_another_codec_and_other_arithmetic(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reel(*CD)
    more = [*CD, "trainer.steps=3"]
    refused(capsys, [*more, "compute=bfloat16"], "compute: arithmetic in bfloat16", "(float32 there, bfloat16 here)")
    info = Path("data/info.yaml").read_text()
    other_codec()
    Path("data/info.yaml").write_text(info)
    refused(capsys, more, "data was encoded with another codec than codec/export")
    assert cli.main([*more, "--no-check"]) == 0


def test_a_fingerprint_is_of_values() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    same = {"b": torch.ones(4, dtype=torch.bfloat16)[::2], "a": torch.arange(6.0).view(3, 2).view(2, 3)}
    assert fingerprint(tensors, "x") == fingerprint(same, "x")
    others = [
        ({**tensors, "a": tensors["a"].view(3, 2)}, "x"),
        ({**tensors, "a": tensors["a"].double()}, "x"),
        ({**tensors, "c": torch.zeros(0)}, "x"),
        (tensors, "y"),
        (tensors, "x", ""),
    ]
    assert fingerprint(tensors, "x") not in {fingerprint(first, *rest) for first, *rest in others}


# ---- trajectories


def test_trajectories_of_another_run_are_made_again(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Those of a run that had not yet begun to train; the result is that of a run from nothing."""
    reel(*ODE)
    for name in ("checkpoints", "export"):
        shutil.rmtree(f"new/{name}")
    with caplog.at_level(logging.INFO):
        reel(*ODE, "settings.guidance=1.5")
    assert "is made again: it was made from another settings.guidance (2.0 there, 1.5 here)" in caplog.text
    reel(*ODE, "settings.guidance=1.5", "trainer.out=whole")
    kept, whole = (load_file(f"{out}/trajectories.safetensors") for out in ("new", "whole"))
    assert all(torch.equal(value, whole[name]) for name, value in kept.items())
    caplog.clear()
    with caplog.at_level(logging.INFO):
        reel(*ODE, "settings.guidance=1.5", "trainer.steps=3")
    assert "trajectories" not in caplog.text.replace("trajectories: causal", "")


def test_trajectories_that_a_run_has_trained_on(
    place: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    reel(*ODE)
    file, more = Path("new/trajectories.safetensors"), [*ODE, "trainer.steps=3"]
    refused(capsys, [*more, "trainer.seed=1"], "trainer.seed")
    good = file.read_bytes()
    damaged = bytearray(good)
    damaged[-5] ^= 4
    file.write_bytes(damaged)
    refused(capsys, more, "new/trajectories.safetensors is damaged")
    save_file(load_file(file), file, {"made_from": '{"settings.guidance": "9.0"}'})
    refused(capsys, more, "made from another settings.guidance (9.0 there, 2.0 here)")
    file.write_bytes(good)
    save_file(load_file(file), file)
    with caplog.at_level(logging.INFO):
        reel(*more)
    assert "older than fingerprints are" in caplog.text


def test_stopped_trajectories_go_on_and_are_not_mixed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_parts: list[int] = []
    real = building.make_part

    def make(first: int, **how: object) -> object:
        if len(made_parts) == 2:
            raise KeyboardInterrupt
        made_parts.append(first)
        return real(first, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(building, "make_part", make)
    assert cli.main(ODE) == 130
    assert made_parts == [0, 2] and len(list(Path("new/trajectories").iterdir())) == 2
    made_parts.clear()
    assert cli.main([*ODE, "settings.guidance=1.5"]) == 130
    assert made_parts == [0, 2]  # none of the others is taken
    made_parts.clear()
    assert cli.main([*ODE, "settings.guidance=1.5"]) == 0
    assert made_parts == [4]
    assert not Path("new/trajectories").exists()
    monkeypatch.setattr(building, "make_part", real)
    reel(*ODE, "settings.guidance=1.5", "trainer.out=whole")
    one, two = (load_file(f"{out}/trajectories.safetensors") for out in ("new", "whole"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


# ---- exports


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda value: value * float("nan"), ["not finite", "NaN or infinite"]),
        (lambda value: value + float("inf"), ["not finite"]),
        (lambda value: value.to(torch.int8), ["is int8, weights are float32, bfloat16, float16"]),
        (lambda value: value > 0, ["is bool"]),
        (lambda value: value.double(), ["is float64"]),
        (lambda value: value[None], ["wrong shape"]),
    ],
    ids=["NaN", "infinite", "int8", "bool", "float64", "shape"],
)
def test_exports_that_are_no_weights(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[torch.Tensor], torch.Tensor],
    parts: list[str],
) -> None:
    for file in (Path("base/export/model.safetensors"), Path("codec/export/codec.safetensors")):
        tensors = load_file(file)
        name = sorted(tensors)[1]
        whole = file.read_bytes()
        save_file({**tensors, name: change(tensors[name])}, file)
        refused(capsys, CD, str(file), name, *parts)
        file.write_bytes(whole)


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    denoiser, card = small_denoiser(), small_export()
    next(denoiser.parameters()).data[0] = float("inf")
    with pytest.raises(ValueError, match="not finite"):
        save_export(tmp_path / "new", denoiser, card)
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_again_writes_no_export(place: Path) -> None:
    for command, file in ((CD, "new/export/model.safetensors"), (CODEC, "codec2/export/codec.safetensors")):
        reel(*command)
        written = Path(file).stat().st_mtime_ns
        reel(*command)
        assert Path(file).stat().st_mtime_ns == written
        Path(file).unlink()
        reel(*command)
        assert Path(file).is_file()


# ---- stopped while something is written


def leftovers() -> list[str]:
    return [str(path) for path in Path().rglob(".*") if path.name != ".lock"]


STOPS: dict[str, tuple[object, str, list[str], str]] = {
    "encode": (hashed, "write_tensors", ENCODE, "new/latents-00000.safetensors"),
    "trajectories": (stored, "write_tensors", ODE, "new/trajectories.safetensors"),
    "checkpoint": (checkpoint, "write_pickle", ODE, "new/export/model.safetensors"),
    "export": (export, "write_text", ODE, "new/export/model.safetensors"),
}


@pytest.mark.parametrize("how", ["SIGTERM", "no space"])
@pytest.mark.parametrize("what", STOPS)
def test_stopped_while_writing_and_started_again_is_uninterrupted(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str, how: str
) -> None:
    module, name, command, made = STOPS[what]
    real = getattr(module, name)

    def stop(path: Path, *arguments: object, **named: object) -> object:
        result = real(path, *arguments, **named)
        if how == "no space":
            raise OSError(28, "No space left on device", str(path))
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(prepare if what == "encode" else module, name, stop)
    try:
        status = cli.main(command)
    except SystemExit as end:
        status = end.code
    assert status in ((1,) if how == "no space" else (0, 130, 143))  # 0: the last step was done
    if how == "no space":
        assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert leftovers() == []
    monkeypatch.setattr(prepare if what == "encode" else module, name, real)
    reel(*command)
    reel(*(part.replace("new", "whole") if part in ("new", "trainer.out=new") else part for part in command))
    one, two = load_file(made), load_file(made.replace("new", "whole"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_a_network_without_cameras_is_known_as_before_there_were_any() -> None:
    before = """dim: 64
ffn_dim: 128
heads: 2
layers: 2
text_dim: 64
text_length: 16
freq_dim: 64
channels: 16
patch: 2
eps: 1.0e-06
window: null
sink: 0
last_position: null
"""
    size = preset("tiny-smoke")
    assert facts_of(size, Context()) == before
    assert facts_of(replace(size, camera="prope"), Context()) != before
    assert facts_of(replace(size, actions=3), Context()) != before
