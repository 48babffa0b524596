"""The laws of the core where every frame reads a text of its own, and rows change at frames of their own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from causalreel.codecs.tiny import tiny_codec
from causalreel.data.sources import LatentSource
from causalreel.flow import add_noise
from causalreel.infer.live import Live, Policy
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import Schedule
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.nn.masks import Context
from causalreel.parallel.fast import accelerate
from causalreel.rollout import KeyedNoise, chunk_sizes, chunked, collect, fuse, rollout
from causalreel.text.tiny import TinyTextEncoder
from causalreel.train.losses import surrogate_loss
from causalreel.train.self_rollout import parallel_pass, record_rollout, replay_passes, training_plan
from causalreel.train.stage import DataCursor, StepContext
from causalreel.train.stages.dmd import DMD
from causalreel.train.trajectories import cached_causal_trajectories, causal_trajectories
from causalreel.types import Conditioning
from causalreel.weights.export import Export, Sampling
from test_laws import CONFIG, FOUR, SPEC, TWO, close, latents, make
from test_stages import SELF_ROLLOUT, make_dmd

FRAMES = 6
NULL = Conditioning(torch.zeros(1, 5, 8))


def told() -> Conditioning:
    """Two clips: one changes at frame 2, the other at 4 and 5."""
    texts = torch.randn(5, 5, 8, generator=torch.Generator().manual_seed(9))
    reads = torch.tensor([[0, 0, 1, 1, 1, 1], [2, 2, 2, 2, 3, 4]])
    source = LatentSource(latents(FRAMES), Conditioning(texts), reads)
    return source.batch(torch.tensor([0, 1])).conditioning


def row(conditioning: Conditioning, clip: int, frame: int) -> Conditioning:
    """What one frame of one clip reads."""
    return Conditioning(conditioning.text[clip : clip + 1, frame])


@torch.no_grad()
def test_every_frame_reads_its_own_text() -> None:
    net, x, sigma, whole = make(), latents(FRAMES, seed=2), torch.full((2, 1), 0.6), told()
    found = net(x, sigma, whole)
    same = Conditioning(whole.text[:, :1].expand(-1, FRAMES, -1, -1), prompts=tuple(range(FRAMES)))
    close(net(x, sigma, same), net(x, sigma, Conditioning(whole.text[:, 0])))
    runs = [net(x[clip : clip + 1], sigma[:1], whole[clip : clip + 1]) for clip in (0, 1)]
    close(torch.cat(runs), found)
    two = Conditioning(whole.text[:1, [0, 2]], prompts=(0, 0, 1, 1, 1, 1))  # the first clip, as two runs of frames
    close(net(x[:1], sigma[:1], two), found[:1])
    other = whole.text.clone()
    other[0, 3] += 1
    assert (net(x, sigma, Conditioning(other, prompts=whole.prompts)) - found)[0].abs().amax((1, 2, 3)).min() > 1e-5
    close(net(x, sigma, net.prepare(whole)), found)
    guided = Guided(net, NULL, 2.0)
    close(guided(x, sigma, guided.prepare(whole)), guided(x, sigma, whole))
    blank = whole.without_text(torch.tensor([True, False]))
    close(net(x, sigma, blank)[:1], net(x[:1], sigma[:1], NULL))
    close(net(x, sigma, blank)[1:], found[1:])


@pytest.mark.parametrize("chunk", [1, 2])
@torch.no_grad()
def test_one_pass_is_cached_calls(chunk: int) -> None:
    net, clean, whole = make(), latents(FRAMES), told()
    sigma = torch.rand(2, FRAMES // chunk, generator=torch.Generator().manual_seed(3)).repeat_interleave(chunk, 1)
    x, sizes = add_noise(clean, latents(FRAMES, seed=2), sigma), chunk_sizes(FRAMES, chunk)
    found = net.teacher_forced(x, sigma, whole, clean=clean, sizes=sizes)
    close(net.behind(net.context_of(clean, whole, sizes=sizes), x, sigma, whole, sizes=sizes), found)
    for clip in (0, 1):
        cache, parts = net.new_cache(), []
        for start in range(0, FRAMES, chunk):
            here, own = slice(start, start + chunk), whole[clip : clip + 1].frames(start, start + chunk)
            parts.append(net(x[clip : clip + 1, here], sigma[clip : clip + 1, here], own, start=start, cache=cache))
            net(clean[clip : clip + 1, here], torch.zeros(1, chunk), own, sizes=(chunk,), start=start, cache=cache)
            cache.commit(chunk)
        close(torch.cat(parts, 1), found[clip : clip + 1])


@pytest.mark.parametrize("chunk", [1, 2])
@torch.no_grad()
def test_fused_is_plain_and_fast_is_exact(chunk: int) -> None:
    net, whole = make(), told()
    fast = accelerate(DiTDenoiser(CONFIG).requires_grad_(False))
    fast.model.load_state_dict(net.model.state_dict())
    sizes, found = chunk_sizes(FRAMES, chunk), []
    for denoise in (net, Guided(net, NULL, 2.0), fast, Guided(fast, NULL, 2.0)):
        for plan, conditioning in (
            (chunked(sizes, TWO), whole),
            (fuse(chunked(sizes, TWO)), denoise.prepare(whole)),
        ):
            noise = KeyedNoise([1, 2], SPEC)
            made = rollout(denoise, plan, conditioning=conditioning, noise=noise, cache=denoise.new_cache())
            found.append(collect(made))
    for first in (0, 2):
        for other in (first + 1, first + 4, first + 5):
            close(found[other], found[first], 1e-4)


@pytest.mark.parametrize("chunk", [1, 2])
def test_replayed_and_parallel_gradients_are_the_full_graphs(chunk: int) -> None:
    sizes, exits, whole = chunk_sizes(FRAMES, chunk), [2, 1], told()
    target = latents(FRAMES, seed=7)

    def gradients(net: DiTDenoiser) -> torch.Tensor:
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    full = make()
    plan = training_plan(sizes, FOUR, exits)
    made = collect(rollout(full, plan, conditioning=whole, noise=KeyedNoise([1, 2], SPEC), cache=full.new_cache()))
    surrogate_loss(made, target).backward()
    found = []
    for way in (parallel_pass, replay_passes):
        net = make()
        record = record_rollout(
            net,
            fuse(training_plan(sizes, FOUR, exits)) if way is parallel_pass else training_plan(sizes, FOUR, exits),
            told=net.prepare(whole),
            noise=KeyedNoise([1, 2], SPEC),
            cache=net.new_cache(),
            keep_caches=way is replay_passes,
        )
        close(record.latents, made.detach())
        again = way(net, record, whole)
        latent = again if isinstance(again, torch.Tensor) else torch.cat([part() for part in again], 1)
        close(latent.detach(), made.detach())
        surrogate_loss(latent, target).backward()
        found.append(gradients(net))
    for one in found:
        close(one, gradients(full), 1e-4)


@pytest.mark.parametrize("chunk", [1, 2])
def test_cached_trajectories_are_the_parallel_ones(chunk: int) -> None:
    guided, clean, noise = Guided(make(), NULL, 2.0), latents(FRAMES), latents(FRAMES, seed=2)
    how: dict = {"noise": noise, "sizes": chunk_sizes(FRAMES, chunk), "sigmas": (*TWO, 0.0), "keep": (0, 1, 2)}
    whole = guided.prepare(told())
    close(cached_causal_trajectories(guided, clean, whole, **how), causal_trajectories(guided, clean, whole, **how))


def test_rows_go_over_to_another_text() -> None:
    texts = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(3))
    one, other = Conditioning(texts[:2], {"speed": torch.zeros(2, 4)}), Conditioning(texts[2:])
    rows = torch.tensor([True, False])
    found = one.changing(other, rows, 1, 4)
    assert found.prompts == (0, 1, 1, 1) and found.fields == one.fields
    assert torch.equal(found.text, torch.stack([texts[:2], torch.stack([texts[2], texts[1]])], dim=1))
    several = told().changing(told()[torch.tensor([1, 0])], rows, 3, FRAMES)
    assert several.prompts == tuple(range(FRAMES))
    assert torch.equal(several.text[1], told().text[1])
    assert torch.equal(several.text[0], torch.cat([told().text[0, :3], told().text[1, 3:]]))


def test_training_rollouts_change_their_prompts() -> None:
    config = dataclasses.replace(SELF_ROLLOUT, prompt_changes=1.0)
    stage, rows = make_dmd(config)
    seen: list[Conditioning] = []
    assert isinstance(stage, DMD)
    forward = stage.critic.forward

    def watched(x: torch.Tensor, sigma: torch.Tensor, conditioning: Conditioning, **how: object) -> torch.Tensor:
        seen.append(conditioning)
        return forward(x, sigma, conditioning, **how)

    stage.critic.forward = watched  # type: ignore[method-assign]
    step = StepContext(0, 0, rows, DataCursor(len(rows), 0), torch.device("cpu"))
    for update in stage.updates(step):
        for loss in update.losses:
            value, _ = loss()
            assert value.isfinite()
    assert seen and all(one.prompts is not None and one.prompts[0] == 0 and one.prompts[-1] == 1 for one in seen)
    assert all(not torch.equal(one.text[:, 0], one.text[:, 1]) for one in seen)
    for wrong in ({"prompt_changes": 1.5}, {"prompt_changes": 0.5, "samples": "data"}):
        with pytest.raises(ValueError, match="prompt_changes"):
            dataclasses.replace(SELF_ROLLOUT, **wrong)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_a_live_stream_keeps_what_frames_were_told(guidance: float) -> None:
    """switch: as a clip whose later frames read the new text, also where a new segment reads old frames again."""
    codec, spec = tiny_codec(0), SPEC
    config = dataclasses.replace(CONFIG, text_dim=64, text_length=16)
    torch.manual_seed(0)
    net = DiTDenoiser(config).requires_grad_(False)
    torch.nn.init.normal_(net.model.head.head.weight, std=0.2)
    sampling = Sampling(chunk=1, guidance=guidance)
    card = Export("told", config, sampling, Context(), FRAMES, 16.0, spec)
    pipe = Pipeline(net, card, sampling, codec, TinyTextEncoder(), torch.device("cpu"))
    old, new = (pipe.text.encode([f"a large {color} square moves right"]) for color in ("red", "blue"))
    live, made, calls = Live(pipe, old, seed=3, policy=Policy("renew", FRAMES, 2)), [], []
    told_of = live._conditioning_of
    live._conditioning_of = lambda call: calls.append((live._base + call.start, told_of(call))) or calls[-1][1]  # type: ignore
    for frame in range(9):
        if frame == 4:
            live.tell(new, mode="switch")
        made.append(live.next_chunk().latents)
    whole = Conditioning(torch.stack([old, new], dim=1), prompts=(0, 0, 0, 0, 1, 1))
    plan = Schedule(FRAMES, 0, sampling, Context())
    noise = KeyedNoise([3], spec)
    expected = collect(pipe.rollout(plan, pipe.denoiser_for(sampling).prepare(whole), noise))
    close(torch.cat(made[:FRAMES], 1), expected, 1e-4)
    for start, conditioning in calls:
        count = len(conditioning.prompts) if conditioning.prompts else 1
        for f in range(count):
            text = conditioning.text[:, conditioning.prompts[f]] if conditioning.prompts else conditioning.text
            assert torch.equal(text, new if start + f >= 4 else old), (start, f)
    assert live.segments == 2 and [at for at, _ in live._spans] == [0, 4]
