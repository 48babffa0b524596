"""Conditioning goes whole wherever a call goes: a field of every frame, and a text for every chunk, frame by frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from causalreel.codecs.tiny import tiny_codec
from causalreel.data.sources import LatentSource
from causalreel.infer.clips import ClipRequest
from causalreel.infer.live import Live, Policy, encode_prompt
from causalreel.infer.pipeline import Pipeline
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.nn.dit import DiT
from causalreel.nn.masks import Context
from causalreel.nn.presets import ModelConfig
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.rollout import KeyedNoise, chunk_sizes, chunked, collect, fuse, rollout
from causalreel.text.tiny import TinyTextEncoder
from causalreel.train.losses import teacher_forcing_loss
from causalreel.train.self_rollout import parallel_pass, record_rollout, replay_passes, training_plan
from causalreel.train.stage import DataCursor, StepContext
from causalreel.types import Batch, Conditioning, Denoise, LatentBatch, LatentSpec, TrajectoryBatch
from causalreel.weights.export import Export, Sampling

CONFIG = ModelConfig(dim=48, ffn_dim=80, heads=3, layers=2, text_dim=64, text_length=16, freq_dim=32, channels=16)
SPEC, FRAMES = LatentSpec(16, 4, 4), 6


class Steered(DiT):
    """A network with a number for every frame, `speed` (B,F), in its embedding of time."""

    fields = frozenset({"speed"})

    def time_levels(self, sigma: Tensor, fields: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        time, _ = super().time_levels(sigma, fields)
        time = time + fields["speed"].unsqueeze(-1)
        return time, self.time_projection(time).unflatten(-1, (6, -1))


def steered(context: Context = Context()) -> DiTDenoiser:
    torch.manual_seed(0)
    net = DiTDenoiser(CONFIG, context=context)
    net.model = Steered(CONFIG)
    nn.init.normal_(net.model.head.head.weight, std=0.2)
    return net


def given(batch: int = 2, frames: int = FRAMES) -> Conditioning:
    generator = torch.Generator().manual_seed(5)
    text, speed = torch.randn(batch, 7, 64, generator=generator), torch.randn(batch, frames, generator=generator)
    return Conditioning(text, {"speed": speed})


def latents(seed: int = 1) -> Tensor:
    return torch.randn(2, FRAMES, *SPEC.shape, generator=torch.Generator().manual_seed(seed))


def changed(conditioning: Conditioning, frame: int) -> Conditioning:
    """The same with another number at one frame."""
    speed = conditioning.fields["speed"].clone()
    speed[:, frame] += 1
    return replace(conditioning, fields={"speed": speed})


def rolled_out(net: Denoise, conditioning: Conditioning, cache, plan, *, batch: int = 2) -> Tensor:
    with torch.no_grad():
        noise = KeyedNoise(range(batch), SPEC)
        return collect(rollout(net, plan, conditioning=conditioning, noise=noise, cache=cache))


def close(a: Tensor, b: Tensor) -> None:
    assert (a - b).abs().max() < 3e-5 * b.abs().max()


def first_difference(a: Tensor, b: Tensor) -> int:
    """The first frame in which two videos differ."""
    return int((a - b).abs().amax((0, 2, 3, 4)).gt(1e-4).nonzero()[0])


@pytest.mark.parametrize("chunk", [1, 2])
@torch.no_grad()
def test_a_field_reaches_its_frame_in_every_pass(chunk: int) -> None:
    """Teacher forcing in one pass is cached chunk by chunk, and what changes at frame 3 changes nothing before its
    chunk."""
    net, clean, x, sizes = steered(), latents(), latents(2), chunk_sizes(FRAMES, chunk)
    sigma, whole = torch.full((2, FRAMES), 0.6), given()
    found = net.teacher_forced(x, sigma, whole, clean=clean, sizes=sizes)
    cache, parts = net.new_cache(), []
    for start in range(0, FRAMES, chunk):
        here, own = slice(start, start + chunk), whole.frames(start, start + chunk)
        parts.append(net(x[:, here], sigma[:, here], own, sizes=(chunk,), start=start, cache=cache))
        net(clean[:, here], torch.zeros(2, chunk), own, sizes=(chunk,), start=start, cache=cache)
        cache.commit(chunk)
    close(torch.cat(parts, 1), found)
    close(net.behind(net.context_of(clean, whole, sizes=sizes), x, sigma, whole, sizes=sizes), found)
    other = net.teacher_forced(x, sigma, changed(whole, 3), clean=clean, sizes=sizes)
    assert first_difference(other, found) == 3 // chunk * chunk
    speed = whole.fields["speed"]
    with pytest.raises(ValueError, match="no use for the field 'camera' of the conditioning; it takes speed"):
        net(x, sigma, replace(whole, fields={"speed": speed, "camera": speed}))
    with pytest.raises(ValueError, match="'speed' of the conditioning is for 5 frames, the call has 6"):
        net(x, sigma, replace(whole, fields={"speed": speed[:, :5]}))
    with pytest.raises(ValueError, match="field 'speed' has 6 frames, the call needs 5 to 7"):
        whole.frames(5, 7)


@pytest.mark.parametrize("context", [Context(), Context(window=4, sink=1)], ids=["all", "window"])
def test_a_field_goes_through_guidance_fused_plans_and_static_caches(context: Context) -> None:
    negative = Conditioning(torch.zeros(1, 7, 64))
    nets = [steered(context), accelerate(steered(context).requires_grad_(False))]
    plain = chunked([1] * FRAMES, (1.0, 0.6))
    expected = rolled_out(nets[0], given(), nets[0].new_cache(), plain)
    guided = rolled_out(Guided(nets[0], negative, 2.0), given(), nets[0].new_cache(), chunked([1] * FRAMES, (1.0, 0.6)))
    assert not torch.allclose(guided, expected, atol=1e-2)
    for net in nets:
        for denoise, reference, rows in ((net, expected, 2), (Guided(net, negative, 2.0), guided, 4)):
            for conditioning in (given(), denoise.prepare(given())):
                cache = net.new_cache()
                if isinstance(net.run, FastDiT):
                    cache = net.run.new_cache(context, chunk=1, frames=FRAMES, batch=rows, size=(4, 4))
                plan = fuse(chunked([1] * FRAMES, (1.0, 0.6)))
                close(rolled_out(denoise, conditioning, cache, plan), reference)
    other = rolled_out(nets[0], changed(given(), 3), nets[0].new_cache(), chunked([1] * FRAMES, (1.0, 0.6)))
    assert first_difference(other, expected) == 3


def test_a_negative_may_have_fields_of_its_own() -> None:
    net, x, sigma = steered(), latents(), torch.full((2, 1), 0.5)
    speed = torch.zeros(1, FRAMES)
    negative = Conditioning(torch.zeros(1, 7, 64), {"speed": speed})
    with torch.no_grad():
        cond, uncond = net(x, sigma, given()), net(x, sigma, Conditioning(torch.zeros(2, 7, 64), {"speed": speed}))
        close(Guided(net, negative, 3.0)(x, sigma, given()), uncond + 3 * (cond - uncond))


def test_a_field_goes_from_the_data_into_losses_and_training_rollouts() -> None:
    net = steered()
    source = LatentSource(latents().flatten(0, 1).unflatten(0, (2, FRAMES)), given())
    step = StepContext(0, 0, source, DataCursor(2, 0), torch.device("cpu"))
    batch = step.batch(2, LatentBatch)
    order = [(batch.latents[0] == row).all() for row in source.latents].index(True)
    assert torch.equal(batch.conditioning.fields["speed"][0], given().fields["speed"][order])
    with pytest.raises(ValueError, match="this stage needs trajectories, the data source has latents"):
        step.batch(2, TrajectoryBatch)
    assert len(Batch(given())[:1]) == 1 and batch[1:].conditioning.fields["speed"].shape == (1, FRAMES)

    sigma, whole = torch.full((2, FRAMES), 0.5), given()
    speed = whole.fields["speed"].requires_grad_()
    how: dict = {"sigma": sigma, "noise": latents(3), "weight": torch.ones(2, FRAMES), "sizes": [2, 2, 2]}
    teacher_forcing_loss(net, latents(), whole.without_text(torch.tensor([True, False])), **how).backward()
    assert speed.grad is not None and (speed.grad.abs() > 0).all()

    sizes, exits = [2, 2, 2], [1, 1]
    record = record_rollout(
        net,
        fuse(training_plan(sizes, (1.0, 0.6), exits)),
        told=given(),
        noise=KeyedNoise([1, 2], SPEC),
        cache=net.new_cache(),
        keep_caches=True,
    )
    again = parallel_pass(net, record, given())
    close(again.detach(), record.latents)
    plain = record_rollout(
        net,
        training_plan(sizes, (1.0, 0.6), exits),
        told=given(),
        noise=KeyedNoise([1, 2], SPEC),
        cache=net.new_cache(),
        keep_caches=True,
    )
    close(torch.cat([part() for part in replay_passes(net, plain, given())], 1).detach(), record.latents)


def pipeline() -> Pipeline:
    codec = tiny_codec(0)
    card = Export("steered", CONFIG, Sampling(chunk=1), Context(), FRAMES, 16.0, SPEC)
    net = steered().requires_grad_(False).eval()
    return Pipeline(net, card, card.sampling, codec, TinyTextEncoder(), torch.device("cpu"))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_field_reaches_its_frame_in_a_live_stream(guidance: float) -> None:
    """Segments begin anew, by themselves and for a prompt, and read the frames they keep with the fields they had."""
    pipe = pipeline()
    speed = torch.randn(1, 14, generator=torch.Generator().manual_seed(2))
    seen: list[Tensor] = []

    def live(of: Tensor, *, recompute: bool = True) -> Tensor:
        sampling = replace(pipe.sampling, guidance=guidance)
        text = encode_prompt(pipe, "a large red square moves right on a dark background")
        stream, made = Live(pipe, text, sampling=sampling, policy=Policy("renew", FRAMES, 2)), []
        for frame in range(14):
            if frame == 7 and recompute:
                stream.tell(text)
            made.append(stream.next_chunk({"speed": of[:, frame : frame + 1]}).latents)
        assert stream._conditioning.fields["speed"].shape[1] == 3  # two kept and one made
        return torch.cat(made, 1)

    model = pipe.denoiser.model
    levels = model.time_levels

    def watched(sigma: Tensor, fields: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        seen.append(fields["speed"][0])
        return levels(sigma, fields)

    model.time_levels = watched  # type: ignore[method-assign]
    with torch.no_grad():
        expected = live(speed)
        known = speed[0].tolist()
        reads = [[known.index(number) for number in call.tolist()] for call in seen]
        assert all(read == list(range(read[0], read[-1] + 1)) for read in reads)
        assert [4, 5, 6] in reads and [5, 6, 7] in reads  # a new segment by length, and one for the prompt
        for frame in (0, 5, 9):
            other = speed.clone()
            other[:, frame] += 1
            assert first_difference(live(other), expected) == frame
        with pytest.raises(ValueError, match=r"fields must be speed, \(1,1,...\) each; got \{\}"):
            stream = Live(pipe, encode_prompt(pipe, "a small blue circle moves left on a light background"))
            stream.next_chunk({"speed": speed[:, :1]})
            stream.next_chunk()


@torch.no_grad()
def test_every_chunk_may_read_a_text_of_its_own() -> None:
    """As one text for the clip where all are the same; chunk by chunk as calls with the chunk's own text."""
    torch.manual_seed(0)
    net = DiTDenoiser(CONFIG)
    nn.init.normal_(net.model.head.head.weight, std=0.2)
    texts = torch.randn(2, 2, 7, 64, generator=torch.Generator().manual_seed(4))
    several = Conditioning(texts, prompts=(0, 0, 1, 1, 1, 1))
    sizes, clean, x, sigma = [2, 2, 2], latents(), latents(2), torch.full((2, FRAMES), 0.6)
    one = Conditioning(texts[:, :1].expand(-1, 2, -1, -1), prompts=several.prompts)
    close(net(x, sigma, one, sizes=sizes), net(x, sigma, Conditioning(texts[:, 0]), sizes=sizes))
    whole = net.teacher_forced(x, sigma, several, clean=clean, sizes=sizes)
    cache, parts = net.new_cache(), []
    for chunk, start in enumerate((0, 2, 4)):
        here, text = slice(start, start + 2), Conditioning(texts[:, min(chunk, 1)])
        parts.append(net(x[:, here], sigma[:, here], text, sizes=(2,), start=start, cache=cache))
        net(clean[:, here], torch.zeros(2, 2), text, sizes=(2,), start=start, cache=cache)
        cache.commit(2)
    close(torch.cat(parts, 1), whole)

    fast = accelerate(DiTDenoiser(CONFIG).requires_grad_(False))
    fast.model.load_state_dict(net.model.state_dict())
    for denoise in (net, fast):
        for guided in (denoise, Guided(denoise, Conditioning(torch.zeros(1, 7, 64)), 2.0)):
            plain = rolled_out(guided, several, net.new_cache(), chunked(sizes, (1.0, 0.6)))
            fused = rolled_out(guided, guided.prepare(several), net.new_cache(), fuse(chunked(sizes, (1.0, 0.6))))
            close(fused, plain)
    assert several.frames(5, 8).prompts == (1, 1, 1)
    with pytest.raises(ValueError, match="text must be"):
        Conditioning(texts)


def test_conditioning_survives_files() -> None:
    texts = torch.randn(2, 2, 7, 64)
    whole = Conditioning(texts, {"speed": torch.randn(2, 3)}, (0, 1, 1))
    again = Conditioning.from_named({"states": torch.zeros(1), **whole.named()})
    assert torch.equal(again.text, texts) and torch.equal(again.fields["speed"], whole.fields["speed"])
    assert again.prompts == whole.prompts and Conditioning.from_named(given().named()).prompts is None


@torch.no_grad()
def test_a_field_goes_from_a_request_into_a_clip() -> None:
    """Frame by frame, the given ones included; a request that leaves it out is refused by name."""
    pipe, prompts = pipeline(), ["a large red square moves right", "a small blue circle moves left"]
    speed = torch.randn(2, FRAMES, generator=torch.Generator().manual_seed(2))
    request = ClipRequest(prompts, seed=3, fields={"speed": speed})
    made = torch.cat([chunk.latents for chunk in pipe.latents(request)], 1)
    for frame in (0, 4):
        other = speed.clone()
        other[:, frame] += 1
        again = torch.cat([chunk.latents for chunk in pipe.latents(request, fields={"speed": other})], 1)
        assert first_difference(again, made) == frame
    one = ClipRequest(prompts[1], seed=4, fields={"speed": speed[1:]})
    close(torch.cat([chunk.latents for chunk in pipe.latents(one)], 1), made[1:])
    height, width = pipe.size
    behind = pipe.generate(request, prefix=torch.zeros(3, height, width))
    assert behind.shape[1] == pipe.geometry.frames_of(FRAMES)
    for fields, message in [
        ({"speed": speed, "camera": speed}, "no use for the field 'camera' of the conditioning; it takes speed"),
        ({"speed": speed[:, 1:]}, rf"the field 'speed' must be \(2,{FRAMES},...\), a value for each latent frame; got"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe.stream(request, fields=fields)
