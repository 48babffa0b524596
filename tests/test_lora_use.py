"""LoRAs in use: merged at any strength, set while a video runs, in every form of the network, and from the commands."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from causalreel import cli, load
from causalreel.infer.accelerate import accelerate
from causalreel.infer.commands import Options, parse_line
from causalreel.infer.live import Live, Policy, encode_prompt
from causalreel.infer.loras import Loras
from causalreel.infer.pipeline import Pipeline
from causalreel.nn.dit import DiT
from causalreel.parallel import fast
from causalreel.serve.records import checked_record
from causalreel.serve.session import Session
from causalreel.weights.lora import changed, read_lora
from causalreel.weights.lora_files import read_loras
from test_infer import PROMPTS, pipeline
from test_live import behind

MODEL = "tiny/frame-1step"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: str, model: DiT, *, seed: int = 0, size: float = 0.1) -> str:
    """A LoRA of some products of every block, and full differences of everything else that may have one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in model.state_dict().items():
        stem, _, leaf = f"diffusion_model.{name}".rpartition(".")
        if leaf == "weight" and weight.ndim == 2 and "blocks.0" not in name:
            tensors[f"{stem}.lora_down.weight"] = size * torch.randn(2, weight.shape[1], generator=generator)
            tensors[f"{stem}.lora_up.weight"] = size * torch.randn(weight.shape[0], 2, generator=generator)
        elif seed == 0:
            suffix = {"weight": "diff", "bias": "diff_b", "modulation": "diff_m"}[leaf]
            tensors[f"{stem}.{suffix}"] = 0.3 * size * torch.randn(weight.shape, generator=generator)
    save_file(tensors, path)
    return path


def small(*loras: tuple[str, float], adjustable: bool = True) -> Pipeline:
    made = pipeline()
    for path, seed in (("a.safetensors", 0), ("b.safetensors", 1)):
        write(path, made.denoiser.model, seed=seed)
    found = read_loras(loras)
    return dataclasses.replace(made, loras=Loras(made.denoiser, found, is_adjustable=adjustable)) if found else made


def clip(made: Pipeline) -> Tensor:
    return torch.cat([chunk.latents for chunk in made.latents(PROMPTS[0], seed=3)], dim=1)


A, B = "a.safetensors", "b.safetensors"


def test_strengths_do_not_drift_and_0_is_the_model_without() -> None:
    plain = {name: value.clone() for name, value in small().denoiser.state_dict().items()}
    made = small((A, 1.0), (B, 0.3))
    for strengths in ({"a": 0.5}, {"a": -1.0, "b": 2.0}, {"a": 0.25, "b": 0.75}):
        made.set_loras(strengths)
        fresh = small(*((f"{name}.safetensors", strength) for name, strength in made.loras.strengths.items()))
        assert all(
            torch.equal(value, fresh.denoiser.state_dict()[n]) for n, value in made.denoiser.state_dict().items()
        )
    assert not all(torch.equal(value, plain[name]) for name, value in made.denoiser.state_dict().items())
    made.set_loras({"a": 0.0, "b": 0})
    assert all(torch.equal(value, plain[name]) for name, value in made.denoiser.state_dict().items())


@pytest.mark.parametrize("form", ["bf16", "fp8", "fp8 alone"])
def test_the_fast_form_is_renewed_in_place(form: str) -> None:
    """As if it had been made from the new weights; calls with kept modulation were made before."""

    def fastened(made: Pipeline) -> Pipeline:
        fast.accelerate(made.denoiser, precision=form[:4].strip(), graphs=False)
        if form == "fp8 alone":
            made.denoiser.run.release_originals()
        return made

    made = fastened(small((A, 1.0), (B, 0.3)))
    before = clip(made)
    places = [block.qkv.weight.data_ptr() for block in made.denoiser.run.blocks]
    made.set_loras({"a": 0.5, "b": 1.0})
    assert not torch.equal(clip(made), before)
    assert torch.equal(clip(made), clip(fastened(small((A, 0.5), (B, 1.0)))))
    made.set_loras({"a": 0.0, "b": 0.0})
    assert torch.equal(clip(made), clip(fastened(small())))
    assert places == [block.qkv.weight.data_ptr() for block in made.denoiser.run.blocks]


@pytest.mark.parametrize("is_fast", [False, True])
def test_a_stream_changes_at_the_next_chunk_and_comes_back_exactly(is_fast: bool) -> None:
    def live_of(made: Pipeline) -> Live:
        made = accelerate(made) if is_fast else made
        policy = Policy.of(made.export, made.sampling, "renew", 2)
        return Live(made, encode_prompt(made, PROMPTS[0], 3), seed=3, policy=policy)

    live, plain = live_of(small((A, 0.0))), live_of(small())
    other = Live(live.pipeline, encode_prompt(live.pipeline, PROMPTS[0], 3), seed=3, policy=live.policy)
    for _ in range(3):
        expected = plain.next_chunk().latents
        assert torch.equal(live.next_chunk().latents, expected) and torch.equal(other.next_chunk().latents, expected)
    live.set_loras({"a": 1.0})
    assert live.pipeline.loras.strengths == {"a": 0.0}  # until the next chunk
    assert live._kept is not None
    kept, text = live._kept.clone(), encode_prompt(plain.pipeline, PROMPTS[0], 3)
    made = live.next_chunk().latents
    assert live.pipeline.loras.strengths == {"a": 1.0}
    again = behind(small((A, 1.0)), kept, 1, base=live.frame - 3, text=text)
    assert torch.allclose(made, again, atol=1e-5)
    assert torch.equal(other.next_chunk().latents, made)  # its cache was stale too
    live.set_loras({"a": 0.0})
    kept = live._kept.clone()
    back = behind(small(), kept, 1, base=live.frame - 2, text=text)
    assert torch.allclose(live.next_chunk().latents, back, atol=1e-5)


def test_what_cannot_be_set_is_refused_and_changes_nothing() -> None:
    made = small((A, 1.0))
    live = Live(made, encode_prompt(made, PROMPTS[0], 3), policy=Policy.of(made.export, made.sampling, "renew", 2))
    for strengths, words in (
        ({"c": 1.0}, "no LoRA called 'c'; there are a"),
        ({"a": float("nan")}, "from -100 to 100, got nan"),
        ({"a": 1e9}, "from -100 to 100"),
    ):
        for change in (live.set_loras, made.set_loras):
            with pytest.raises(ValueError, match=words):
                change(strengths)
    assert made.loras.strengths == {"a": 1.0} and made.loras.version == 0
    live.next_chunk()
    assert live.segments == 1
    with pytest.raises(ValueError, match="without a LoRA"):
        small().set_loras({"a": 1.0})
    with pytest.raises(ValueError, match="without its original weights"):
        small((A, 1.0), adjustable=False).set_loras({"a": 0.0})


def test_a_sum_that_is_not_finite_leaves_what_was() -> None:
    made = pipeline()
    write("a.safetensors", made.denoiser.model)
    name = "diffusion_model.blocks.1.ffn.0.diff"
    save_file({name: torch.full(made.denoiser.model.blocks[1].ffn[0].weight.shape, 1e37)}, "b.safetensors")
    found = read_loras([("a.safetensors", 1.0), ("b.safetensors", 0.0)])
    made = dataclasses.replace(made, loras=Loras(made.denoiser, found, is_adjustable=True))
    before = {name: value.clone() for name, value in made.denoiser.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        made.set_loras({"a": 0.5, "b": 99.0})
    assert all(torch.equal(value, before[name]) for name, value in made.denoiser.state_dict().items())
    assert made.loras.strengths == {"a": 1.0, "b": 0.0}


def test_a_session_is_told_strengths() -> None:
    """By the command; a replay begins and changes alike."""
    made = small((A, 0.0))
    session = Session(made, Options(PROMPTS[0], 3))
    first = [session.next_chunk() for _ in range(2)]
    with pytest.raises(ValueError, match="no LoRA called 'b'; there are a"):
        session.command("lora", lora="b", strength=1.0)
    session.command(parse_line("/lora a 0.5"))
    changed_ = session.next_chunk()
    assert made.loras.strengths == {"a": 0.5} and all(first)
    session.command("lora", lora="a", strength=0)
    session.next_chunk()
    assert made.loras.strengths == {"a": 0.0}
    again = [emitted.frames for emitted in Session.replay(small((A, 0.0)), session.record())]
    assert torch.equal(again[2], changed_.frames)
    record = checked_record(session.record())
    assert record.made_by["loras"] == "a 0" and record.differences(small((A, 0.0))) == []
    assert record.differences(small((A, 1.0))) == ["loras was a 0, is a 1"]
    with pytest.raises(ValueError, match="loaded without a LoRA"):
        Session(small(), Options(PROMPTS[0], 3)).command("lora", lora="a", strength=1.0)


def test_strengths_that_another_session_sets_are_in_the_record() -> None:
    """Its frames change with them, and a replay makes the same."""
    made = small((A, 0.0))
    watching, setting = (Session(made, Options(PROMPTS[0], seed)) for seed in (3, 4))
    frames = [watching.next_chunk().frames for _ in range(2)]
    for strength in (0.5, 1.0):
        setting.command("lora", lora="a", strength=strength)
        setting.next_chunk()
        frames.append(watching.next_chunk().frames)
    record = watching.record()
    assert [(entry["at"], entry["arguments"]) for entry in record["commands"]] == [
        (2, {"lora": "a", "strength": 0.5}),
        (3, {"lora": "a", "strength": 1.0}),
    ]
    again = [emitted.frames for emitted in Session.replay(small((A, 0.0)), record)]
    assert all(torch.equal(one, other) for one, other in zip(again, frames, strict=True))
    assert not torch.equal(Session.replay(small((A, 0.0)), {**record, "commands": []}).__next__().frames, frames[2])


def test_a_record_that_has_no_room_for_them_ends_where_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """It never says that it makes frames again that it does not."""
    monkeypatch.setattr("causalreel.serve.session.MAX_COMMANDS", 2)
    made = small((A, 0.0))
    watching, setting = (Session(made, Options(PROMPTS[0], seed)) for seed in (3, 4))
    frames = []
    for strength in (0.25, 0.5, 1.0, 0.75):
        made.set_loras({"a": strength})
        frames.append(watching.next_chunk().frames)
    setting.next_chunk()
    record = watching.record()
    assert record["chunks"] == 2 and [entry["arguments"]["strength"] for entry in record["commands"]] == [0.25, 0.5]
    again = [emitted.frames for emitted in Session.replay(small((A, 0.0)), record)]
    assert len(again) == 2 and all(torch.equal(one, other) for one, other in zip(again, frames[:2], strict=True))


# ---- models by name, and the commands


def test_a_model_is_loaded_with_it() -> None:
    plain = load(MODEL, device="cpu")
    write("style.safetensors", plain.denoiser.model)
    made = load(MODEL, device="cpu", loras=["style.safetensors:0.5"])
    wanted = dict(changed(plain.denoiser.model.get_parameter, [(read_lora("style.safetensors"), 0.5)]))
    assert wanted and made.loras.strengths == {"style": 0.5}
    assert all(torch.equal(made.denoiser.model.get_parameter(name), value) for name, value in wanted.items())
    video = plain.generate("a red circle moves right", seed=1)
    assert not torch.equal(made.generate("a red circle moves right", seed=1), video)
    made.set_loras({"style": 0})
    assert torch.equal(made.generate("a red circle moves right", seed=1), video)


def test_the_commands_take_it(capsys: pytest.CaptureFixture[str]) -> None:
    write("s:1.safetensors", load(MODEL, device="cpu").denoiser.model)
    how = ["a red circle moves right", "--model", MODEL, "--frames", "5", "--device", "cpu"]
    for output, flags in (
        ("plain.gif", []),
        ("off.gif", ["--lora", "s:1.safetensors:0"]),
        ("half.gif", ["--lora", "s:1.safetensors:0.5"]),
        ("whole.gif", ["--lora", "s:1.safetensors"]),
    ):
        assert cli.main(["generate", *how, "-o", output, *flags]) == 0
    made = [Path(f"{name}.gif").read_bytes() for name in ("plain", "off", "half", "whole")]
    assert made[0] == made[1] and len(set(made)) == 3
    assert cli.main(["stream", *how, "-o", "stream.gif", "--lora", "s:1.safetensors"]) == 0
    assert cli.main(["estimate", "--model", MODEL, "--lora", "s:1.safetensors"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "red", "--lora", "none.safetensors"], "the LoRA is not there: none.safetensors"),
        (["generate", "red", "--lora", "wide.safetensors"], "was made for a wider network"),
        (["stream", "red", "--frames", "5", "-o", "x.gif", "--lora", "wide.safetensors"], "made for a wider network"),
        (["serve", "--port", "0", "--lora", "wide.safetensors"], "made for a wider network"),
        (["estimate", "--model", "tiny", "--lora", "wide.safetensors"], "made for a wider network"),
        (["generate", "red", "--lora", "wide.safetensors:nan"], "finite number, got nan"),
        (["generate", "red", "--lora", "deep.safetensors", "--lora", "deep.safetensors:2"], "given twice"),
        (["generate", "red", "--lora", "deep.safetensors"], "block 90 of"),
        (
            ["generate", "red", "--model", "wan2.1-t2v-1.3b", "--lora", "wide.safetensors"],
            "made for a wider network.*14B",
        ),
        (["convert", "wide.safetensors", "x", "--to", "wan"], "the layout of a LoRA must be one of peft"),
    ],
)
def test_what_does_not_fit_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    import re

    for path, layer, width in (("wide", "blocks.0.self_attn.q", 5120), ("deep", "blocks.90.self_attn.q", 64)):
        pair = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(width, 2)}
        save_file(pair, f"{path}.safetensors")
    before = sorted(Path().iterdir())
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    error = [line for line in said.splitlines() if "error" in line]
    assert len(error) == 1 and re.search(words, error[0]), said
    assert sorted(Path().iterdir()) == before
