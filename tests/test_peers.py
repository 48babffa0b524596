"""The benchmark of other systems: what it does without them, and that it drives FlashDreams right where that is there.

FlashDreams needs a GPU; here its attention and rotary kernels are replaced by plain ones and its sizes made small, and
the calls, steps and results of the driver are checked on the CPU. Nothing is timed.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks.peers import flashdreams as driver  # noqa: E402
from benchmarks.peers import flashdreams_package as package  # noqa: E402
from benchmarks.peers import flashdreams_timing as timing  # noqa: E402
from benchmarks.peers.flashdreams_settings import DEFAULT_SETTINGS, SETTINGS, Options, Setting, Work  # noqa: E402

NETWORK = {"dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "text_len": 8, "text_dim": 16, "freq_dim": 16}
SMALL = Work(frames=6, height=4, width=4, network=NETWORK, vae={"base_dim": 8}, text=(8, 16))
CPU = Options(compiled=False, repeats=1, warmup=1, device="cpu")


# ---- without the peer ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="would run the benchmark")
def test_absent_peer_is_one_line_and_success(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks/peers/flashdreams.py"),
        "--json",
        str(tmp_path / "a" / "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (
        done.stdout.startswith("flashdreams: ") and done.stdout.endswith("; skipped\n") and done.stdout.count("\n") == 1
    )
    assert json.loads((tmp_path / "a" / "out.json").read_text())["results"] == []
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "out.json"]


@pytest.mark.parametrize("bad", [["--latent-frames", "20"], ["--repeats", "0"], ["--settings", "chunkwise"]])
def test_bad_arguments_end_with_status_two(bad: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        driver.main(bad)
    assert ended.value.code == 2
    assert bad[1] in capsys.readouterr().err


def child(*lines: str, then: str = "") -> list[str]:
    """A command that prints `lines` and then runs `then`."""
    return [sys.executable, "-c", f"print({chr(10).join(lines)!r}, flush=True)\n{then}"]


def test_groups_hand_over_what_they_print_and_say_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    given = []

    def command(members: list[str]) -> list[str]:
        given.append(members)
        if members == ["vae-by1"]:
            return child("chatter", 'RECORD {"setting": "vae-by1", "status": "ok"}')
        return child('RECORD {"setting": "framewise-2step", "status": "ok"}', then="raise SystemExit(3)")

    names = ["framewise-2step", "vae-by1", "framewise-1step"]
    records = list(driver.run_groups(names, command, 60))
    assert given == [["framewise-2step", "framewise-1step"], ["vae-by1"]]
    assert [(r["setting"], r["status"]) for r in records] == [
        ("framewise-2step", "ok"),
        ("framewise-1step", "failed"),
        ("vae-by1", "ok"),
    ]
    assert records[1]["error"] == "its process ended with status 3"
    assert capsys.readouterr().out == "chatter\n"


def test_a_group_that_hangs_is_killed_with_its_children_and_the_rest_is_not_started(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its time is over when it has printed its first record, whatever the clock says."""
    now, timers = [0.0], []
    monkeypatch.setattr(driver, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(driver.threading, "Timer", lambda *timer: timers.append(timer) or Mock())
    late = 'import time; time.sleep(60); print(\'RECORD {"setting": "taehv-by3", "status": "ok"}\', flush=True)'

    def command(members: list[str]) -> list[str]:
        start = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {late!r}]); time.sleep(600)"
        return child('RECORD {"setting": "chunkwise-4step", "status": "ok"}', then=start)

    left = driver.run_groups(["chunkwise-4step", "taehv-by3"], command, 1.0)
    records, now[0] = [next(left)], 2.0
    ((limit_s, kill, arguments),) = timers
    kill(*arguments)
    records += left
    assert limit_s == 1.0
    assert [(r["setting"], r["status"]) for r in records] == [("chunkwise-4step", "ok"), ("taehv-by3", "failed")]
    assert records[1]["error"].startswith("not started")


def test_only_absent_packages_are_stubbed() -> None:
    try:
        assert package.stub_absent(["json", "no_such_peer_dependency", "no_such_peer_dependency.deeper"]) == [
            "no_such_peer_dependency",
            "no_such_peer_dependency.deeper",
        ]
        made = importlib.import_module("no_such_peer_dependency")
        made.logger.bind(a=1).info("nothing happens")
        assert issubclass(made.SomeError, Exception)
        assert importlib.util.find_spec("no_such_peer_dependency") is not None
    finally:
        for name in ("no_such_peer_dependency", "no_such_peer_dependency.deeper"):
            sys.modules.pop(name, None)


def test_each_setting_is_run_at_its_best_variant() -> None:
    assert {name: timing.variant(Options(), SETTINGS[name])["variant"] for name in DEFAULT_SETTINGS} == {
        "vae-by1": "eager kernels, CUDA graph",
        "chunkwise-4step": "compiled",
        "taehv-by3": "compiled, CUDA graph",
        "framewise-2step": "compiled, no graph breaks",
        "framewise-1step": "compiled, no graph breaks",
        "framewise-4step": "compiled, no graph breaks",
    }
    assert Options(graph_breaks="remove").removes_breaks(3) and not Options(graph_breaks="keep").removes_breaks(1)
    assert not Options(compiled=False, graph_breaks="remove").removes_breaks(1)


def test_the_report_holds_what_the_groups_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def groups(
        names: list[str], command: Callable[[list[str]], list[str]], budget_s: float
    ) -> Iterator[dict[str, Any]]:
        commands.append((names, command(["vae-by1"])[2:], budget_s))
        yield {"kind": "environment", "version": "0.1.0", "device": "none", "torch": "2", "stubbed": ["boto3"]}
        yield {"setting": "vae-by1", "status": "failed", "error": "why"}

    monkeypatch.setattr(driver, "absent_because", lambda: "")
    monkeypatch.setattr(driver, "run_groups", groups)
    asked = ["--settings", "vae-by1", "--mode", "eager", "--json", str(tmp_path / "out.json")]
    assert driver.main(asked) == 1
    assert commands == [(["vae-by1"], [*asked, "--in-process", "--settings", "vae-by1"], 290.0)]
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["environments"][0]["stubbed"] == ["boto3"] and report["results"][0]["error"] == "why"
    assert report["work"]["frames"] == 21 and not report["options"]["compiled"]
    assert capsys.readouterr().out == "flashdreams 0.1.0 on none, torch 2; stubbed: boto3\nvae-by1: failed: why\n"


def test_sums_pair_generators_and_decoders_of_one_chunk_size() -> None:
    generated = {"status": "ok", "kind": "generator", "rollout_ms": 1500.0, "block_1_denoise_ms": 50.0}
    decoded = {"status": "ok", "kind": "decoder", "first_chunk_ms": 20.0}
    results = [
        {**generated, "setting": "framewise-2step"},
        {**generated, "setting": "chunkwise-4step"},
        {"setting": "framewise-1step", "status": "failed", "error": "why"},
        {**decoded, "setting": "vae-by1", "steady_ms_per_latent": 70.0},
        {**decoded, "setting": "taehv-by3", "steady_ms_per_latent": 2.0},
    ]
    assert driver.sums(results, Work()) == [
        {
            "settings": ["framewise-2step", "vae-by1"],
            "pixel_fps": pytest.approx(81000 / (1500 + 20 + 20 * 70)),
            "first_pixels_ms": 70,
        },
        {
            "settings": ["chunkwise-4step", "taehv-by3"],
            "pixel_fps": pytest.approx(81000 / (1500 + 20 + 18 * 2)),
            "first_pixels_ms": 70,
        },
    ]


def test_a_group_s_process_prints_records(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []

    def group(settings: list[Setting], work: Work, options: Options) -> Iterator[dict[str, Any]]:
        seen.append(([row.name for row in settings], work.frames, options.removes_breaks(1)))
        yield {"setting": "taehv-by3", "status": "ok"}

    monkeypatch.setattr(driver, "absent_because", lambda: "")
    monkeypatch.setattr(timing, "run_group", group)
    asked = ["--settings", "chunkwise-4step", "--latent-frames", "27", "--graph-breaks", "keep"]
    assert driver.main([*asked, "--in-process", "--settings", "taehv-by3"]) == 0
    assert seen == [(["taehv-by3"], 27, False)]
    assert capsys.readouterr().out == 'RECORD {"setting": "taehv-by3", "status": "ok"}\n'


def test_steady_decoding_leaves_out_first_chunk_warm_up_and_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spans(timing.Marks):
        def spans_ms(self) -> list[float]:
            return [1000.0, 500, 500, 900, 6, 3, 3, 6, 9, 9, 12, 12]

    class Decoder:
        def initialize_autoregressive_cache(self) -> None:
            return None

        def __call__(self, input: Tensor, autoregressive_index: int, cache: None) -> Tensor:
            return torch.randn(1, 4 * input.shape[1] - 3 * (autoregressive_index == 0), 3, 2, 2)

    monkeypatch.setattr(timing, "Marks", Spans)
    times = timing.time_decoder(Decoder(), SETTINGS["taehv-by3"], Work(height=2, width=2), CPU)
    assert (times["steady_ms_per_latent"], times["first_chunk_ms"], times["clip_ms"]) == (2.5, 1000, 2900 + 6 + 3 + 3)


class FakePipeline:
    """Notes which calls come, and which scheduler is set while they do."""

    def __init__(self) -> None:
        self.diffusion_model = types.SimpleNamespace(scheduler="unset")
        self.seen: list[tuple[object, ...]] = []

    def initialize_cache(self, transformer_context: dict[str, Any]) -> str:
        assert (transformer_context["height"], transformer_context["width"]) == (4, 4)
        assert transformer_context["text_embeddings"].shape == (1, 8, 16)
        return "cache"

    def generate(self, block: int, cache: str) -> Tensor:
        self.seen.append(("generate", block, cache, self.diffusion_model.scheduler))
        return torch.randn(1, 16, 4, 4)

    def finalize(self, block: int, cache: str) -> None:
        self.seen.append(("finalize", block, cache))


def test_a_rollout_calls_in_order_and_splits_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spans(timing.Marks):
        def spans_ms(self) -> list[float]:
            return [10.0 * n for n in range(1, len(self.points))]

    monkeypatch.setattr(timing, "Marks", Spans)
    pipeline = FakePipeline()
    generator = timing.Generator(pipeline, SMALL, CPU)
    generator.blocks, generator.first, generator.rest = 3, "four", "two"
    for _ in range(2):
        pipeline.seen.clear()
        done = generator.rollout()
        assert pipeline.seen == [
            ("generate", 0, "cache", "four"),
            ("finalize", 0, "cache"),
            ("generate", 1, "cache", "two"),
            ("finalize", 1, "cache"),
            ("generate", 2, "cache", "two"),
            ("finalize", 2, "cache"),
        ]
        assert (done.denoise, done.update) == ([10, 30, 50], [20, 40, 60])


def test_a_record_gives_medians_with_and_without_the_last_update() -> None:
    rollouts = iter(
        timing.Rollout(total, [5.0, 6, 7], [1, 2, last], [torch.randn(4)])
        for total, last in ((0, 0), (0, 0), (110.0, 3.0), (130.0, 4.0), (100.0, 30.0))
    )
    fake = types.SimpleNamespace(work=SMALL, blocks=3, set_steps=lambda _: None, rollout=lambda: next(rollouts))
    fake.calls_of = lambda run: run() or 4 + 2 + 2 + 3
    pixels = iter((900.0, 800.0, 30.0, 50.0, 40.0))  # two to warm up
    fake.first_pixels = lambda decoder: next(pixels)
    options = Options(warmup=2, repeats=3, device="cpu")
    record = timing.time_generator(fake, SETTINGS["framewise-2step"], options, "decoder")  # type: ignore[arg-type]
    assert (record["rollout_ms"], record["without_last_update_ms"]) == (110, 107)
    assert (record["block_1_ms"], record["block_2_ms"], record["block_last_ms"]) == (6, 8, 11)
    assert (record["block_1_denoise_ms"], record["first_pixels_wan_vae_ms"]) == (5, 40)
    assert record["pixel_fps"] == pytest.approx(1000 * 21 / 110)

    fake.calls_of, fake.rollout = lambda run: 99, lambda: timing.Rollout(1, [1], [1], [])
    with pytest.raises(RuntimeError, match="99 network calls in a rollout, 11 expected"):
        timing.time_generator(fake, SETTINGS["framewise-2step"], options, None)  # type: ignore[arg-type]


# ---- with the peer, made small ---------------------------------------------------------------------------------------


def rotate(x: Tensor, freqs: Tensor, interleaved: bool = False, inplace: bool = True, **_: object) -> Tensor:
    """x (B,S,N,D), freqs (S,1,1,D) -> rotated in place; stands in for the package's GPU kernel."""
    assert interleaved and inplace
    angle = freqs[:, :, 0, 0::2]  # (S,1,D/2)
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    turned = (even * angle.cos() - odd * angle.sin(), odd * angle.cos() + even * angle.sin())
    return x.copy_(torch.stack(turned, -1).flatten(-2).to(x.dtype))


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """FlashDreams with kernels for the CPU; leaves no module behind."""
    if importlib.util.find_spec("flashdreams") is None:
        pytest.skip("flashdreams is not installed")
    before = set(sys.modules)
    kernel = types.ModuleType("flashdreams.core.attention.rope_kernel")
    kernel.__dict__["apply_rotary_pos_emb"] = rotate
    sys.modules[kernel.__name__] = kernel
    package.stub_absent()
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        package.part("core.attention.cp"), "torch_sdpa_cudnn", lambda q, k, v, return_lse=False: (attend(q, k, v), None)
    )
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.backends.cudnn.benchmark = benchmark
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("flashdreams", *package.STUBBED_WHEN_ABSENT):
            del sys.modules[name]


@pytest.mark.usefixtures("peer")
def test_the_network_timed_has_the_size_of_wan_1_3b() -> None:
    with torch.device("meta"):
        network = package.part("recipes.wan").WanDiTNetwork1pt3BConfig().setup()
    assert sum(p.numel() for p in network.parameters()) == 1_418_996_800


@pytest.mark.usefixtures("peer")
def test_the_pipeline_has_the_published_settings() -> None:
    pipeline = package.build_pipeline(3, SMALL, CPU)
    model = pipeline.diffusion_model
    chosen = model.transformer.config
    assert (chosen.len_t, chosen.window_size_t, chosen.sink_size_t, chosen.batch_shape) == (3, 21, 0, ())
    assert (chosen.guidance_scale, chosen.dtype, model.config.context_noise) == (1.0, torch.bfloat16, 0)
    assert {p.dtype for p in model.transformer.parameters()} == {torch.bfloat16}
    assert pipeline.encoder is None and pipeline.decoder is None and not pipeline.config.enable_sync_and_profile
    assert model.transformer.network.blocks[0].self_attn.attn_op.backend == "cudnn"
    steps = model.scheduler.denoising_step_list
    assert torch.allclose(steps, torch.tensor([1000.0, 937.5, 833.3333, 625.0]))


@pytest.mark.usefixtures("peer")
@pytest.mark.parametrize(("name", "later"), [("framewise-2step", [1000, 833, 0]), ("framewise-1step", [1000, 0])])
def test_short_lists_start_at_the_second_frame_of_every_rollout(name: str, later: list[int]) -> None:
    generator = timing.Generator(package.build_pipeline(1, SMALL, CPU), SMALL, CPU)
    generator.set_steps(SETTINGS[name])
    transformer, seen = generator.pipeline.diffusion_model.transformer, []
    plain = transformer.predict_flow

    def noted(noisy_latent: Tensor, timestep: Tensor, cache: object, input: object = None) -> Tensor:
        seen.append((transformer.latent_shape, cache.autoregressive_index, float(timestep)))  # type: ignore[attr-defined]
        return plain(noisy_latent, timestep, cache, input)

    transformer.predict_flow = noted
    for _ in range(2):
        seen.clear()
        done = generator.rollout()
        due = [(0, t) for t in (1000, 937.5, 833.3, 625, 0)] + [(i, t) for i in range(1, 6) for t in later]
        assert [index for _, index, _ in seen] == [index for index, _ in due]
        assert [t for *_, t in seen] == pytest.approx([t for _, t in due], abs=2)  # the package rounds them to bf16
    assert len(done.denoise) == len(done.update) == 6 and done.latents[0].shape == (1, 16, 4, 4)


@pytest.mark.usefixtures("peer")
def test_removing_graph_breaks_changes_no_latent() -> None:
    def latents() -> Tensor:
        work = Work(frames=24, height=4, width=4, network=NETWORK, text=(8, 16))  # past the window: the cache rolls
        generator = timing.Generator(package.build_pipeline(3, work, CPU), work, CPU)
        generator.set_steps(SETTINGS["chunkwise-4step"])
        return torch.cat(generator.rollout().latents)

    plain = latents()
    assert sorted(package.remove_graph_breaks()) == ["_current_write_bounds", "_visible_end"]
    assert torch.equal(latents(), plain)
    with pytest.raises(RuntimeError, match="another version"):
        package.remove_graph_breaks()


@pytest.mark.usefixtures("peer")
def test_a_group_gives_a_record_for_each_setting_and_survives_one_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["framewise-2step", "framewise-1step"]
    told, *records = timing.run_group([SETTINGS[name] for name in names], SMALL, CPU)
    assert told["version"] == "0.1.0" and told["min_max_in"] == []
    assert [(r["setting"], r["status"], r["network_calls"]) for r in records] == [
        (names[0], "ok", 20),
        (names[1], "ok", 15),
    ]
    assert all(len(r["block_ms"]) == 6 and r["first_pixels_wan_vae_ms"] > 0 for r in records)
    assert all(r["rollout_ms"] > r["without_last_update_ms"] > 0 for r in records)
    assert json.loads(json.dumps(records)) == records and all("pixel FPS" in driver.line_of(r) for r in records)

    monkeypatch.setattr(timing, "build_pipeline", lambda *_: 1 / 0)
    _, failed = timing.run_group([SETTINGS["chunkwise-4step"]], SMALL, CPU)
    assert (failed["status"], failed["error"]) == ("failed", "ZeroDivisionError: division by zero")
    assert driver.line_of(failed) == "chunkwise-4step: failed: ZeroDivisionError: division by zero"


@pytest.mark.usefixtures("peer")
@pytest.mark.parametrize("name", ["vae-by1", "vae-by3", "taehv-by3", "taehv-by1"])
def test_decoders_stream_every_pixel_frame(name: str) -> None:
    _, record = timing.run_group([SETTINGS[name]], SMALL, CPU)
    assert record["status"] == "ok", record
    assert len(record["chunk_ms"]) == 12 and record["clip_ms"] > 0
    assert "ms a latent frame" in driver.line_of(record)


def test_a_constant_latent_is_refused() -> None:
    with pytest.raises(RuntimeError, match="constant"):
        timing.require_finite([torch.zeros(3)], "latents")
    with pytest.raises(RuntimeError, match="not finite"):
        timing.require_finite([torch.tensor([1.0, float("nan")])], "latents")
