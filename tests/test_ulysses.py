"""Several processes for one stream give what one gives: single calls, cached rollouts, the command line, and errors.

The processes are real ones, started once for each number of them, with gloo on the CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from causalreel.control.strings import latent_poses, view_matrices
from causalreel.infer.distributed import CodecElsewhere, ahead
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.nn.masks import Context
from causalreel.nn.policies.infinity_rope import InfinityRope
from causalreel.nn.presets import PRESETS, ModelConfig
from causalreel.nn.static_cache import StaticCache
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.parallel.mesh import Launch, device_of
from causalreel.parallel.ulysses import Ulysses, allowed_sizes
from causalreel.rollout import Call, KeyedNoise, chunked, collect, fuse, rollout
from causalreel.types import Conditioning, Geometry, LatentSpec
from patience import PATIENCE_S, wait_until

HERE = Path(__file__).resolve()
SRC = HERE.parents[1] / "src"
HEADS = {2: 6, 3: 12}  # processes -> heads of the network that they share
LATENT = LatentSpec(4, 6, 8)  # 12 tokens a frame: 6 or 4 a process
STEPS = (1.0, 0.7)
ROLLOUTS = {
    "frame-wise": (1, Context(), True),
    "frame-wise, not fused": (1, Context(), False),
    "frame-wise, window and sink": (1, Context(window=3, sink=1), True),
    "chunk-wise": (2, Context(), True),
    "chunk-wise, window and sink": (2, Context(window=5, sink=1), True),
    "frame-wise, infinity-rope": (1, InfinityRope(cache_chunks=3, last_position=4), True),
}
"""Name -> chunk, context, whether the plan is fused."""
STORED = [name for name, (_, context, _) in ROLLOUTS.items() if context.is_absolute]
"""Those whose caches may hold e4m3; others grow, in bfloat16."""


def network(heads: int, context: Context = Context()) -> DiTDenoiser:
    """The same random network in every process, with weights that make attention and modulation matter."""
    config = ModelConfig(heads * 12, heads * 16, heads, 2, text_dim=8, text_length=4, freq_dim=32, channels=4)
    torch.manual_seed(heads)
    net = DiTDenoiser(config, context=context).requires_grad_(False).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def inputs(frames: int, batch: int = 2) -> tuple[Tensor, Tensor, Conditioning]:
    torch.manual_seed(frames)
    x, sigma = torch.randn(batch, frames, *LATENT.shape), torch.rand(batch, frames)
    return x, sigma, Conditioning(torch.randn(batch, 4, 8))


def seeing(heads: int, camera: Literal["prope", "embedded"], share=lambda net: net) -> dict[str, Tensor]:
    """Every way of use of a network with cameras and keys, told a text for every frame -> its result."""
    config = ModelConfig(heads * 16, heads * 16, heads, 2, text_dim=8, text_length=4, freq_dim=32, channels=4)
    torch.manual_seed(heads)
    network = DiTDenoiser(replace(config, camera=camera, actions=3)).requires_grad_(False).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    walks = [latent_poses(text, "minwm", latents=6) for text in ("l*3,w*9", "w*2,i*2,d*9")]
    fields = {
        "w2c": torch.from_numpy(np.stack([view_matrices(walk) for walk in walks])).float(),
        "intrinsics": torch.tensor([0.6, 0.9, 0.5, 0.5]).expand(2, 6, 4),
        "actions": torch.randn(2, 6, 3),
    }
    told = Conditioning(torch.randn(2, 3, 4, 8), fields, prompts=(0, 0, 1, 1, 2, 2))
    x, sigma, found = torch.randn(2, 6, *LATENT.shape), torch.rand(2, 6), {}
    with torch.no_grad():
        net = share(network)
        found["bidirectional"] = net(x, sigma, told)
        found["teacher forcing"] = net.teacher_forced(x, sigma, net.prepare(told), clean=x.flip(0), sizes=[2, 2, 2])
        for how in ("cached", "accelerated"):
            cache = net.new_cache()
            if how == "accelerated":
                fast, size = accelerate(net).run, (LATENT.height, LATENT.width)
                assert isinstance(fast, FastDiT)
                cache = fast.new_cache(net.context, chunk=2, frames=6, batch=2, size=size)
            noise = KeyedNoise([5, 6], LATENT)
            found[how] = collect(rollout(net, fuse(plan_of(2)), conditioning=told, noise=noise, cache=cache))
    return {f"{camera}, {name}": value for name, value in found.items()}


def everything(heads: int, share=lambda net: net) -> dict[str, Tensor]:
    """Every way of use -> its result; `share` is applied to each network first."""
    found = {}
    with torch.no_grad():
        net = share(network(heads))
        x, sigma, told = inputs(3)
        found["bidirectional"] = net(x, sigma, told)
        found["causal"] = net(x, sigma, told, sizes=[1, 2])
        found["prepared text"] = net(x, sigma, net.prepare(told), sizes=[1, 1, 1])
        found["teacher forcing"] = net.teacher_forced(x, sigma, told, clean=x.flip(0), sizes=[1, 2])
        found["guided"] = Guided(net, Conditioning(torch.zeros(1, 4, 8)), 3.0)(x, sigma, told)
        for name, (chunk, context, fused) in ROLLOUTS.items():
            net, cache = share(network(heads, context)), None
            plan = plan_of(chunk)
            cache = net.new_cache()
            noise = KeyedNoise([5, 6], LATENT)
            told = net.prepare(inputs(1)[2])
            chunks = rollout(net, fuse(plan) if fused else plan, conditioning=told, noise=noise, cache=cache)
            found[name] = collect(chunks)
            assert cache.keys[0] is not None
            found[f"cached heads, {name}"] = torch.tensor(cache.keys[0].shape[2])
            found[f"cached frames, {name}"] = torch.tensor(cache.keys[0].shape[1])
            for precision in ("fp8", "fp8-attention") if name in STORED else ():
                found[f"stored, {precision}, {name}"] = stored(share(network(heads, context)), chunk, precision)
            for how, precision in (("accelerated", "bf16"), ("e4m3", "fp8-attention")):
                fast = accelerate(net, precision=precision).run
                assert isinstance(fast, FastDiT)
                size = (LATENT.height, LATENT.width)
                held = fast.new_cache(context, chunk=chunk, frames=6, batch=2, size=size)
                plan = plan_of(chunk)
                chunks = rollout(net, fuse(plan) if fused else plan, conditioning=told, noise=noise, cache=held)
                found[f"{name}, {how}"] = collect(chunks)
    return found | seeing(heads, "prope", share) | seeing(heads, "embedded", share)


def stored(net: DiTDenoiser, chunk: int, precision: str) -> Tensor:
    """The first block's keys and values (2,B,L,N,D) that one call leaves in a cache; the sums before the first
    rounding to e4m3, 16 whole multiples of 2^-8, are exact in any order."""
    embedding = net.model.patch_embedding
    for parameter in (embedding.weight, embedding.bias):
        parameter.copy_((parameter * 256).round() / 256)
    fast = accelerate(net, precision=precision).run
    assert isinstance(fast, FastDiT)
    x, sigma, told = inputs(chunk)
    held = fast.new_cache(net.context, chunk=chunk, frames=6, batch=len(x), size=(LATENT.height, LATENT.width))
    net(x.sign(), sigma[:1], told, cache=held)
    if isinstance(held, StaticCache):
        return torch.stack(held.memory.view(0, held.rows))
    held.commit(chunk)  # a window and a chunk that fit no static cache
    return torch.stack([held.keys[0], held.values[0]])


def plan_of(chunk: int) -> Iterator[Call]:
    return chunked([chunk] * (6 // chunk), STEPS, first=(1.0, 0.9, 0.5), commit_last=True)


def process(folder: str) -> None:
    """What each of the processes does: everything, shared; then what must be refused."""
    from causalreel.parallel.mesh import join, launch, release_first
    from causalreel.parallel.ulysses import shard_sequence

    where, holder = launch(), GroupHolder()
    assert where is not None
    with join(where, "cpu") as mesh:
        release_first(holder)
        result: dict = dict(everything(HEADS[mesh.size], lambda net: shard_sequence(net)))
        net = network(HEADS[mesh.size])
        result["gradient"] = gradient(shard_sequence(network(HEADS[mesh.size]), tokens=12), mesh.size)
        result["errors"] = [
            refusal(lambda: shard_sequence(network(mesh.size + 1))),
            refusal(lambda: shard_sequence(net, tokens=35)),
            refusal(lambda: Ulysses().split(torch.zeros(1, 1, 35, 2))),
        ]
        q, k, v = (torch.randn(2, 3 * 4, HEADS[mesh.size], 2).bfloat16() for _ in range(3))
        there = Ulysses().to_heads(q, k, v, 3)
        result["identity"] = [
            torch.equal(part, Ulysses().to_tokens(moved, 3)) for part, moved in zip((q, k, v), there, strict=True)
        ]
    result["released"] = holder.released_in_group
    torch.save(result, Path(folder) / f"{where.rank}.pt")


def gradient(net: DiTDenoiser, processes: int = 1) -> list[Tensor]:
    """Of all weights, of losses over every kind of call: the mean of what the processes find."""
    x, sigma, told = inputs(3)
    net.requires_grad_(True)
    context = net.context_of(x.flip(1), told, sizes=[1, 2])
    for found in (
        net(x, sigma, told),
        net.teacher_forced(x, sigma, told, clean=x.flip(0), sizes=[1, 2]),
        net.behind(context, x, sigma, told, sizes=[1, 2]),
    ):
        (found - x).square().mean().backward()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    for part in gradients:
        if processes > 1:
            torch.distributed.all_reduce(part)
        part /= processes
    return gradients


class GroupHolder:
    """Stands for recorded calls, which NCCL waits for when its group goes."""

    released_in_group = False

    def release(self) -> None:
        self.released_in_group = torch.distributed.is_initialized()


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def stuck() -> None:
    """The second process fails while the first waits for it in a collective."""
    import torch.distributed as dist

    from causalreel.parallel.crew import crew, leave
    from causalreel.parallel.mesh import join, launch

    where = launch()
    assert where is not None
    print_line = lambda line: print(f"error: {line}", file=sys.stderr, flush=True)  # noqa: E731
    with crew(where, describe=str, report=print_line), join(where, "cpu"):
        if where.rank == 1:
            raise ValueError("the second has had enough")
        dist.all_reduce(torch.ones(1))
    leave(where, 0)


def torchrun(count: int, *command: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.Popen(
        [*launcher, *command], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HERE.parent
    )


@pytest.fixture(scope="module", params=HEADS, ids=lambda count: f"{count} processes")
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each process found, in the order of their ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    running = torchrun(request.param, str(HERE), str(folder))
    output, errors = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, output + errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


@pytest.fixture(scope="module")
def alone() -> dict[int, dict[str, Tensor]]:
    return {count: everything(heads) for count, heads in HEADS.items()}


def test_shared_calls_and_rollouts_are_those_of_one_process(results: list[dict], alone: dict) -> None:
    expected = alone[len(results)]
    for found in results:
        for name, value in expected.items():
            if name.startswith("cached heads"):
                assert found[name] * len(results) == value == HEADS[len(results)]
            elif name.startswith("cached frames"):
                assert found[name] == value
            elif name.startswith("stored") or name.endswith("e4m3"):
                continue  # what lies between two of its numbers may be rounded either way: the next two tests
            else:
                assert value.std() > 0.1, name
                assert (found[name] - value).abs().max() < 1e-5 * max(1, value.abs().max()), name


def test_what_is_shared_in_e4m3_is_rounded_to_the_nearest(results: list[dict], alone: dict) -> None:
    """Heads of each process's cache against what one process stores in float32: half a step of e4m3 away at the most.

    e4m3 has 3 bits behind the leading one and steps of 2^-9 below 2^-6, so half a step of x is 2^floor(log2 |x|) / 16,
    and not less than 2^-10. Whether a number between two of them goes up or down hangs on the last bit of a sum, which
    is another on another machine and with other shapes; both are right.
    """
    expected, count = alone[len(results)], len(results)
    for name in STORED:
        exact = expected[f"stored, fp8, {name}"]
        half = torch.exp2(exact.abs().clamp(min=2**-6).log2().floor()) / 16
        for rank, found in enumerate(results):
            kept = exact.chunk(count, 3)[rank], half.chunk(count, 3)[rank]
            away = (found[f"stored, fp8-attention, {name}"] - kept[0]).abs()
            assert (away <= kept[1] * (1 + 1e-3) + 1e-6).all(), name


def test_rollouts_shared_in_e4m3_err_as_those_of_one_process(results: list[dict], alone: dict) -> None:
    """One number of e4m3 that is rounded the other way (by 2^-4 of it) moves everything after it, so two rollouts in
    e4m3 may differ by as much as e4m3 itself costs. What is the same is that cost, their distance from float32: it is
    the sum of some hundred thousand roundings, and all of them would have to grow or shrink to change it by a half. A
    head, a scale or a frame out of place costs as much as the whole value, some twenty times as much."""
    expected = alone[len(results)]
    for name in ROLLOUTS:
        exact = expected[name]
        cost = (expected[f"{name}, e4m3"] - exact).norm()
        for found in results:
            assert 0.5 * cost <= (found[f"{name}, e4m3"] - exact).norm() <= 1.5 * cost, name


def test_the_accelerated_network_is_the_network(alone: dict) -> None:
    for found in alone.values():
        for name in ROLLOUTS:
            assert (found[f"{name}, accelerated"] - found[name]).abs().max() < 1e-4 * found[name].abs().max()
            assert 1e-3 < (found[f"{name}, e4m3"] - found[name]).norm() / found[name].norm() < 0.3
        for camera in ("prope", "embedded"):
            fast, plain = found[f"{camera}, accelerated"], found[f"{camera}, cached"]
            assert (fast - plain).abs().max() < 1e-4 * plain.abs().max()


def test_all_processes_get_the_same_bits(results: list[dict]) -> None:
    for name, value in results[0].items():
        if isinstance(value, Tensor) and not name.startswith("stored"):  # each has heads of its own
            assert all(torch.equal(other[name], value) for other in results[1:]), name


def test_there_and_back_is_the_identity(results: list[dict]) -> None:
    assert all(all(found["identity"]) for found in results)
    assert all(found["released"] for found in results)  # before the group was gone


def test_the_mean_gradient_is_that_of_one_process(results: list[dict]) -> None:
    alone = gradient(network(HEADS[len(results)]))
    for found in results:
        for mean, one in zip(found["gradient"], alone, strict=True):
            assert (mean - one).norm() <= 2e-5 * max(one.norm(), 1e-3)


def test_what_cannot_be_shared_is_refused(results: list[dict]) -> None:
    count = len(results)
    for heads, tokens, frame in (found["errors"] for found in results):
        assert f"{count} processes cannot share a network with {count + 1} attention heads" in heads
        assert heads.endswith("one of " + ", ".join(map(str, allowed_sizes(count + 1))))
        assert "35 tokens per latent frame" in tokens
        assert f"{count} processes cannot share the 35 tokens" in frame


def test_allowed_numbers_of_processes() -> None:
    tokens = 480 // 16 * (832 // 16)
    assert allowed_sizes(PRESETS["wan-1.3b"].heads, tokens) == [1, 2, 3, 4, 6, 12]
    assert allowed_sizes(PRESETS["wan-14b"].heads, tokens) == [1, 2, 4, 5, 8, 10, 20, 40]
    assert allowed_sizes(4, 6) == [1, 2]


def test_a_process_takes_the_gpu_of_its_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    where = Launch(rank=5, size=8, local_rank=1, local_size=4)
    assert device_of(where, "cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="takes its own device"):
        device_of(where, "cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert device_of(where, None) == device_of(where, "cuda") == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"4 processes .* 2 GPUs.*--nproc_per_node=2"):
        device_of(where, None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA here"):
        device_of(where, "cuda")


# ---- the command line ------------------------------------------------------------------------------------------------

PROMPT = "a large red circle moves right"


def test_torchrun_makes_the_video_of_one_process(tmp_path: Path) -> None:
    """With a picture to begin with, which the first process alone encodes; one line, one file."""
    from PIL import Image

    from causalreel import cli
    from causalreel.data.video_in import read_video
    from causalreel.infer.inputs import read_picture

    Image.new("RGB", (40, 40), (0, 0, 255)).save(tmp_path / "blue.png")
    request = [PROMPT, "--frames", "17", "--scale", "1", "--image", str(tmp_path / "blue.png"), "--device", "cpu"]
    files = {
        name: ["-o", str(tmp_path / f"{name}.mp4"), "--sheet", str(tmp_path / f"{name}.png")] for name in ("one", "two")
    }
    running = torchrun(2, "-m", "causalreel", "generate", *request, *files["two"])
    assert cli.main(["generate", *request, *files["one"]]) == 0
    output, errors = running.communicate(timeout=PATIENCE_S)
    assert running.returncode == 0, errors
    assert re.fullmatch(r"\S*two\.mp4: 17 frames in [^\n]*\n\S*two\.png\n", output)
    assert errors.count("attention: sdpa") == 1
    videos = [read_video(tmp_path / f"{name}.mp4")[0] for name in files]
    assert all(video.shape == (17, 3, 64, 64) for video in videos)
    one, two = (read_picture(tmp_path / f"{name}.png") for name in files)  # the frames before H.264 takes its choices
    assert one.std() > 0.05 and (one - two).abs().max() < 1.5 / 127.5  # a sum in another order: one level at the most
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blue.png", "one.mp4", "one.png", "two.mp4", "two.png"]


@pytest.mark.parametrize(
    ("count", "arguments", "said"),
    [
        (2, ["generate", PROMPT, "--frames", "44"], "41 or 45"),
        (3, ["generate", PROMPT], "one of 1, 2, 4"),
        (2, ["bench"], "only generate, prepare and train run in several processes"),
    ],
)
def test_errors_are_one_line_of_the_first_process(count: int, arguments: list[str], said: str, tmp_path: Path) -> None:
    output = ["-o", str(tmp_path / "x.mp4")] if arguments[0] == "generate" else []
    running = torchrun(count, "-m", "causalreel", *arguments, *output, "--device", "cpu")
    printed, errors = running.communicate(timeout=PATIENCE_S)
    ours = [line for line in errors.splitlines() if line.startswith("causalreel: error")]
    assert running.returncode != 0 and printed == "" and len(ours) == 1 and said in ours[0], errors
    assert not list(tmp_path.iterdir())


def test_a_process_that_waits_for_one_that_failed_is_ended() -> None:
    running = torchrun(2, str(HERE), "stuck")
    _, errors = running.communicate(timeout=PATIENCE_S)  # a collective alone waits for half an hour
    ours = [line for line in errors.splitlines() if line.startswith("error:")]
    assert running.returncode != 0
    assert ours == ["error: process 1 of 2: the second has had enough"], errors


# ---- decoding elsewhere ----------------------------------------------------------------------------------------------


def test_parts_are_made_one_ahead() -> None:
    made = []

    def parts() -> Iterator[Tensor]:
        for i in range(5):
            made.append(i)
            yield torch.tensor(i)

    reader = ahead(parts())
    assert next(reader) == 0
    wait_until(lambda: len(made) >= 3)  # one waits in the queue, one to be put there
    time.sleep(0.05)  # no more than these
    assert made == [0, 1, 2]
    assert [int(part) for part in reader] == [1, 2, 3, 4]


def test_errors_and_early_ends_pass_between_the_threads() -> None:
    def failing() -> Iterator[Tensor]:
        yield torch.zeros(1)
        raise ValueError("half way")

    reader = ahead(failing())
    assert next(reader) == 0
    with pytest.raises(ValueError, match="half way"):
        next(reader)
    count = threading.active_count()
    reader = ahead(torch.tensor(i) for i in range(10**9))
    assert next(reader) == 0
    reader.close()
    assert threading.active_count() == count


def test_a_codec_elsewhere_is_the_same_codec() -> None:
    from causalreel.codecs.wan_vae import CausalVAE
    from test_weights import SMALL_CODEC

    codec = CausalVAE(SMALL_CODEC).requires_grad_(False)
    other = CodecElsewhere(codec, torch.device("cpu"), torch.device("cpu"))
    video = torch.rand(1, 5, 3, 16, 16)
    latents = other.encode(video)
    assert torch.equal(latents, codec.encode(video))
    assert torch.equal(other.decode(latents), codec.decode(latents))
    assert torch.equal(other.stream()(latents[:, :1]), codec.stream()(latents[:, :1]))
    assert other.geometry == Geometry(16, 8, 4)


def test_decoding_on_a_device_of_its_own_is_checked(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from causalreel import cli

    request = ["generate", PROMPT, "--device", "cpu", "-o", str(tmp_path / "x.mp4"), "--frames", "5"]
    assert cli.main([*request, "--decode-device", "cuda:64"]) == 2
    assert "decode_device 'cuda:64'" in capsys.readouterr().err
    assert cli.main([*request, "--decode-device", "screen"]) == 2
    assert not list(tmp_path.iterdir())
    assert cli.main([*request, "--decode-device", "cpu"]) == 0
    assert (tmp_path / "x.mp4").is_file()


# ---- GPUs ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.multigpu
@pytest.mark.parametrize("count", [2, 4])
def test_gpus_share_a_stream(count: int, tmp_path: Path) -> None:
    """Wan2.1 1.3B's width with 4 blocks at 480x832, bfloat16, chunk-wise: the latents of one GPU up to rounding."""
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA GPUs")
    found = []
    script = HERE.parents[1] / "benchmarks" / "multi_gpu.py"
    for processes in (1, count):
        folder = tmp_path / str(processes)
        env = {**os.environ, "PYTHONPATH": str(SRC)}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        request = [str(script), "--models", "wan-1.3b", "--layers", "4", "--runs", "1", "--long", "0"]
        subprocess.run([*launcher, *request, "--out", str(folder)], env=env, check=True, timeout=2 * PATIENCE_S)
        found.append(torch.load(folder / f"wan-1.3b-{processes}.pt"))
    one, several = found[0]["latents"].float(), found[1]["latents"].float()
    noise = found[0]["bf16_error"]  # of one GPU against float32, the same rollout
    assert (several - one).norm() / one.norm() < 2 * noise


if __name__ == "__main__":
    if sys.argv[1] == "stuck":
        stuck()
    else:
        process(sys.argv[1])
