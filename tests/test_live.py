"""Endless streams: segments equal rollouts put together by hand; the ways to change the prompt; flat for ever."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from causalreel import load
from causalreel.eval.metrics import measure
from causalreel.families import FAMILIES
from causalreel.infer.accelerate import accelerate
from causalreel.infer.commands import Prompt
from causalreel.infer.live import ENDLESS, Live, Policy, encode_prompt
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.schedule import noise_levels
from causalreel.nn.masks import Context
from causalreel.rollout import KeyedNoise, chunked, rollout
from causalreel.types import Conditioning
from causalreel.weights.export import Sampling
from test_infer import FULL, PROMPTS, close, pipeline

TWO_STEP = Sampling(1, (1000.0, 500.0), first_steps=(1000.0, 750.0, 500.0))


def stream(made: Pipeline, chunks: int, *, policy: Policy | None = None, seed: int = 3) -> tuple[Live, Tensor]:
    policy = Policy.of(made.export, made.sampling, "renew", 2) if policy is None else policy
    live = Live(made, encode_prompt(made, PROMPTS[0], seed), seed=seed, policy=policy)
    return live, torch.cat([live.next_chunk().latents for _ in range(chunks)], dim=1)


class Shifted:
    """Noise of frames counted from `base`."""

    def __init__(self, made: Pipeline, seed: int, base: int) -> None:
        self.noise, self.base = KeyedNoise([seed], made.export.latent), base

    def initial(self, start: int, frames: int) -> Tensor:
        return self.noise.initial(self.base + start, frames)

    def renoise(self, start: int, frames: int, draw: int) -> Tensor:
        return self.noise.renoise(self.base + start, frames, draw)


def behind(made: Pipeline, kept: Tensor, new: int, *, base: int, text: Tensor | Conditioning, seed: int = 3) -> Tensor:
    """`new` frames behind `kept` latents at positions from 0, with a plain plan and a plain cache."""
    sampling = made.sampling
    chunk = sampling.chunk or 1
    plan = chunked([chunk] * (new // chunk), noise_levels(sampling), prefix=[chunk] * (kept.shape[1] // chunk))
    chunks = rollout(
        made.denoiser,
        plan,
        conditioning=text if isinstance(text, Conditioning) else Conditioning(text),
        noise=Shifted(made, seed, base),
        cache=made.denoiser.new_cache(),
        prefix=kept,
    )
    return torch.cat([chunk.latents for chunk in chunks], dim=1)


@pytest.mark.parametrize("sampling", [TWO_STEP, Sampling(2), dataclasses.replace(TWO_STEP, guidance=2.0)])
def test_the_first_segment_is_a_clip(sampling: Sampling) -> None:
    made = pipeline(sampling)
    _, latents = stream(made, 4 // (sampling.chunk or 1))
    clip = torch.cat([chunk.latents for chunk in made.latents(PROMPTS[0], seed=3)], dim=1)
    assert torch.equal(latents, clip)


def test_a_segment_begins_behind_the_last_latents_at_positions_from_0() -> None:
    made = pipeline(TWO_STEP)
    _, latents = stream(made, 8)
    text = encode_prompt(made, PROMPTS[0], 3)
    close(behind(made, latents[:, 2:4], 2, base=2, text=text), latents[:, 4:6])
    close(behind(made, latents[:, 4:6], 2, base=4, text=text), latents[:, 6:8])


def test_chunks_say_where_they_are() -> None:
    made = pipeline(Sampling(2))
    live = Live(made, encode_prompt(made, PROMPTS[0]))
    assert [live.next_chunk().start for _ in range(5)] == [0, 2, 4, 6, 8] and live.frame == 10


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", ["renew", "slide"])
def test_positions_cache_and_noise_stay_in_order(kind: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    made = pipeline(TWO_STEP, Context(window=4) if kind == "slide" else Context())
    made = accelerate(made) if fast else made
    monkeypatch.setattr("causalreel.infer.live.POSITIONS", 10)
    policy = Policy.of(made.export, TWO_STEP, kind, 2)
    calls, drawn, visible = [], [], []
    forward, initial = type(made.denoiser).forward, KeyedNoise.initial

    def spy(self: object, x: Tensor, *args: object, start: int = 0, cache: object = None, **how: object) -> Tensor:
        calls.append((start, start + x.shape[1]))
        result = forward(self, x, *args, start=start, cache=cache, **how)
        visible.append(len(cache.frames))
        return result

    def spy_initial(self: KeyedNoise, start: int, frames: int) -> Tensor:
        drawn.append(start)
        return initial(self, start, frames)

    monkeypatch.setattr(type(made.denoiser), "forward", spy)
    monkeypatch.setattr(KeyedNoise, "initial", spy_initial)
    live, latents = stream(made, 40, policy=policy)
    assert drawn == list(range(40)) and latents.isfinite().all()
    assert max(end for _, end in calls) == (4 if kind == "renew" else 10)
    assert max(visible) <= 4 and live._kept.shape[1] == 2
    assert live.segments == (19 if kind == "renew" else 1 + 4)


def test_segments_share_one_memory() -> None:
    made = accelerate(pipeline(TWO_STEP))
    live, _ = stream(made, 10)
    live.tell(encode_prompt(made, PROMPTS[1]))
    live.next_chunk()
    (memory,) = made.denoiser.run._memories.values()
    assert memory.guest is not None
    live.close()
    assert memory.guest is None


@pytest.mark.parametrize("context", [Context(), Context(window=4)])
def test_slide_is_the_long_clip_until_positions_run_out(context: Context) -> None:
    made = pipeline(TWO_STEP, context)
    policy = Policy.of(made.export, TWO_STEP, "slide")
    assert policy.context == made.schedule(frames=45).context
    assert policy.length == (1024 if context.window else ENDLESS)
    _, latents = stream(made, 12, policy=policy)
    clip = torch.cat([chunk.latents for chunk in made.latents(PROMPTS[0], seed=3, frames=45)], dim=1)
    assert torch.equal(latents, clip)


def test_fast_networks_make_the_same_stream() -> None:
    torch.manual_seed(0)
    made = pipeline(TWO_STEP)
    results = []
    for one in (made, accelerate(pipeline(TWO_STEP))):
        live = Live(one, encode_prompt(one, PROMPTS[0]))
        parts = []
        for index in range(11):
            if index == 7:
                live.tell(encode_prompt(one, PROMPTS[1]))
            parts.append(live.next_chunk().latents)
        results.append(torch.cat(parts, dim=1))
    close(*results)


# ---- other prompts


def changed(made: Pipeline, mode: str, **how: int) -> tuple[Live, Tensor, Tensor, Tensor]:
    """Three chunks, a change, -> the stream, its old latents, the next chunk's and the new text."""
    live, old = stream(made, 3)
    text = encode_prompt(made, PROMPTS[1], 3)
    live.tell(text, mode=mode, **how)
    return live, old, live.next_chunk().latents, text


def test_recompute_reads_what_is_kept_under_the_new_text() -> None:
    made = pipeline(TWO_STEP)
    live, old, new, text = changed(made, "recompute")
    assert live.segments == 2
    close(new, behind(made, old[:, 1:3], 1, base=1, text=text))
    other = behind(made, old[:, 1:3], 1, base=1, text=encode_prompt(made, PROMPTS[0], 3))
    assert (new - other).abs().max() > 1e-2


def test_switch_keeps_the_cache() -> None:
    """Frames before the change stay as their own text made them, the last of them too, which is committed behind it."""
    made = pipeline(TWO_STEP)
    live, old, new, text = changed(made, "switch")
    assert live.segments == 1
    said = [encode_prompt(made, PROMPTS[0], 3), text]
    plan = made.schedule().plan(fused=True)
    parts: Iterator = rollout(
        made.denoiser,
        plan,
        conditioning=Conditioning(torch.stack(said, dim=1), prompts=(0, 0, 0, 1)),
        noise=Shifted(made, 3, 0),
        cache=made.denoiser.new_cache(),
    )
    expected = torch.cat([chunk.latents for chunk in parts], dim=1)
    close(torch.cat([old, new], dim=1), expected)
    assert (new - changed(made, "recompute")[2]).abs().max() > 1e-3


@pytest.mark.parametrize("begins_again", [False, True])
@pytest.mark.parametrize("is_retold", [False, True])
@pytest.mark.parametrize(("chunk", "left"), [(1, 2), (2, 2), (4, 4)])
def test_forget_begins_behind_two_frames_or_a_chunk_and_what_those_were_told(
    chunk: int, left: int, is_retold: bool, begins_again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or what they are told now in place of it. In some families encoded again, as a clip that begins there."""
    monkeypatch.setitem(FAMILIES, "tiny", dataclasses.replace(FAMILIES["tiny"], begins_again=begins_again))
    made = pipeline(Sampling(chunk, (1000.0, 500.0)))
    texts = [encode_prompt(made, prompt, 3) for prompt in PROMPTS[:2]]
    live = Live(made, texts[0], seed=3, policy=Policy("renew", 16, 8))
    old = torch.cat([live.next_chunk().latents for _ in range(8 // chunk)], dim=1)
    past = encode_prompt(made, "a yellow square", 3) if is_retold else None
    live.tell(texts[1], mode="forget", past=past)
    texts[0] = texts[0] if past is None else past
    new = torch.cat([live.next_chunk().latents for _ in range(2)], dim=1)
    said = Conditioning(torch.stack(texts, dim=1), prompts=(0,) * left + (1,) * 2 * chunk)
    kept = old[:, -left:]
    if begins_again:
        shown = made.codec.decode(old[:, -left - 1 :])[:, -(4 * left - 3) :]
        kept = made.codec.encode(shown)
        assert kept.shape[1] == left and (kept - old[:, -left:]).abs().max() > 1e-3
    close(new, behind(made, kept, 2 * chunk, base=8 - left, text=said))
    assert live.segments == 2 and live.frame == 8 + 2 * chunk


@pytest.mark.parametrize("given", [0, 1])
def test_forget_encodes_nothing_again_of_a_clip_that_has_just_begun(given: int) -> None:
    """Its two frames are those of a clip that begins with them as they are; behind three they are not."""
    made = pipeline(TWO_STEP)
    texts = [encode_prompt(made, prompt, 3) for prompt in PROMPTS[:2]]
    first = torch.randn(1, given, *made.export.latent.shape) if given else None
    for count in (2, 3):
        live = Live(made, texts[0], seed=3, first=first, policy=Policy("renew", 16, 8))
        old = [live.next_chunk().latents for _ in range(count - given)]
        old = torch.cat(old if first is None else [first, *old], dim=1)
        live.tell(texts[1], mode="forget")
        said = Conditioning(torch.stack(texts, dim=1), prompts=(0, 0, 1))
        shown = made.codec.decode(old)[:, -5:]
        kept = old if count == 2 else made.codec.encode(shown)
        close(live.next_chunk().latents, behind(made, kept, 1, base=count - 2, text=said))


def test_forget_is_another_way_and_nothing_where_there_is_nothing_yet() -> None:
    made = pipeline(TWO_STEP)
    new = changed(made, "forget")[2]
    for mode in ("switch", "recompute"):
        assert (new - changed(made, mode)[2]).abs().max() > 1e-3, mode
    fresh, spoken = (Live(made, encode_prompt(made, PROMPTS[n], 3), seed=3) for n in (0, 1))
    fresh.tell(encode_prompt(made, PROMPTS[1], 3), mode="forget")
    assert torch.equal(fresh.next_chunk().latents, spoken.next_chunk().latents)


@pytest.mark.parametrize(
    ("first", "last", "as_if"),
    [
        ("recompute", "forget", "forget"),
        ("forget", "recompute", "recompute"),
        ("forget", "switch", "forget"),
        ("recompute", "switch", "recompute"),
        ("switch", "forget", "forget"),
        ("fade", "forget", "forget"),
    ],
)
def test_of_prompts_before_one_chunk_the_last_that_begins_a_segment_counts(first: str, last: str, as_if: str) -> None:
    """Records drop what a later command supersedes: it must leave nothing behind."""
    made = pipeline(TWO_STEP)
    live, _ = stream(made, 3)
    live.tell(encode_prompt(made, PROMPTS[0], 9), mode=first)
    live.tell(encode_prompt(made, PROMPTS[1], 3), mode=last)
    assert torch.equal(live.next_chunk().latents, changed(made, as_if)[2])
    assert Prompt("b", last).supersede(Prompt("a", first)) == Prompt("b", as_if)


def test_fade_moves_the_text_evenly_and_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    made = pipeline(TWO_STEP)
    live, *_, text = changed(made, "fade", chunks=4)
    old = encode_prompt(made, PROMPTS[0], 3)
    for done in (1, 2, 3):
        close(live._conditioning.text, old + (text - old) * done / 4, 1e-6)
        live.next_chunk()
    assert torch.equal(live._conditioning.text, text) and live._fade is None
    live.tell(old, mode="fade", chunks=2)
    live.next_chunk()
    half = live._conditioning.text
    live.tell(text, mode="fade", chunks=2)  # from where the other one has got to
    live.next_chunk()
    close(live._conditioning.text, (half + text) / 2, 1e-6)
    live.tell(old, mode="switch")
    live.next_chunk()
    assert torch.equal(live._conditioning.text, old)


def test_other_steps() -> None:
    made = pipeline(TWO_STEP)
    live, old = stream(made, 3)
    one = Sampling(1, (1000.0,))
    live.resample(one)
    new = live.next_chunk().latents
    text = encode_prompt(made, PROMPTS[0], 3)
    close(new, behind(dataclasses.replace(made, sampling=one), old[:, 1:3], 1, base=1, text=text))
    with pytest.raises(ValueError, match="chunk cannot change in a stream: it is 1, got 2"):
        live.resample(Sampling(2))


def test_a_picture_to_begin_with() -> None:
    made = pipeline(TWO_STEP)
    picture = torch.rand(3, 32, 32) * 2 - 1
    first = made.codec.encode(picture[None, None]).detach()
    live = Live(made, encode_prompt(made, PROMPTS[0], 3), seed=3, first=first)
    latents = torch.cat([live.next_chunk().latents for _ in range(3)], dim=1)
    clip = list(made.stream(PROMPTS[0], seed=3, prefix=picture))
    decode = made.codec.stream()
    decode(first)
    close(decode(latents), torch.cat(clip[1:], dim=1))
    with pytest.raises(ValueError, match="multiple of the chunk's 2 latent frames, got 1"):
        Live(pipeline(Sampling(2)), first[:1], first=first)


def test_impossible_policies() -> None:
    export = pipeline().export
    for sampling, how, message in [
        (FULL, {}, "needs an autoregressive model"),
        (Sampling(4), {}, "chunk must be at most 2 for a live stream, got 4"),
        (Sampling(2), {"keep": 3}, "keep must be a multiple of 2, from 2 to 2; got 3"),
        (Sampling(1), {"keep": 4}, "from 1 to 3; got 4"),
        (Sampling(1), {"kind": "roll"}, "policy must be one of renew, slide, got 'roll'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Policy.of(export, sampling, **how)
    twelve = dataclasses.replace(export, frames=12)
    assert [Policy.of(twelve, Sampling(n), "renew").keep for n in (1, 2, 6)] == [3, 2, 6]
    assert Policy.of(twelve, Sampling(1), "slide").keep == 3  # its positions never grow
    windowed = dataclasses.replace(twelve, context=Context(12))
    assert Policy.of(windowed, Sampling(1), "slide").keep == 6
    assert Policy.of(export, Sampling(1)).kind == "slide"  # as its family's row says
    assert Policy.of(dataclasses.replace(export, family="wan21", text="umt5"), Sampling(1)).kind == "slide"
    live = Live(pipeline(TWO_STEP), encode_prompt(pipeline(), PROMPTS[0]))
    with pytest.raises(ValueError, match="mode must be one of switch, recompute, fade, forget, got 'cut'"):
        live.tell(encode_prompt(pipeline(), PROMPTS[0]), mode="cut")
    with pytest.raises(ValueError, match="chunks must be at least 1, got 0"):
        live.tell(encode_prompt(pipeline(), PROMPTS[0]), mode="fade", chunks=0)


@pytest.mark.slow
def test_the_tiny_model_holds_one_prompt_and_follows_another() -> None:
    tiny = load("tiny", device="cpu")
    live = Live(tiny, encode_prompt(tiny, PROMPTS[0]))
    decode = tiny.codec.stream()
    long = torch.cat([decode(live.next_chunk().latents) for _ in range(60)], dim=1)
    assert measure(long[:, -80:], [PROMPTS[0]]).follow.item() > 0.9
    live.tell(encode_prompt(tiny, PROMPTS[1]))
    new = torch.cat([decode(live.next_chunk().latents) for _ in range(24)], dim=1)
    assert measure(new[:, -32:], [PROMPTS[1]]).follow.item() > 0.5
