"""Given first frames in training: what stages draw, what scores see, and that a rollout's gradient stays its own."""

from __future__ import annotations

import pytest
import torch

from causalreel.data.sources import LatentSource
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.masks import Context
from causalreel.nn.presets import ModelConfig
from causalreel.rollout import StreamNoise
from causalreel.train.kit import given_first
from causalreel.train.losses import critic_loss, distribution_matching_gradient
from causalreel.train.self_rollout import parallel_pass, record_rollout, replay_passes, training_plan
from causalreel.train.stage import DataCursor, StepContext
from causalreel.train.stages.dmd import DMD, DMDConfig
from causalreel.train.stages.pretrain import Pretrain, PretrainConfig
from causalreel.types import Conditioning, LatentSpec

CONFIG = ModelConfig(
    dim=32, ffn_dim=32, heads=2, layers=2, text_dim=8, text_length=3, freq_dim=16, channels=3, camera="prope", actions=2
)
FRAMES, ROWS, SPEC = 5, 8, LatentSpec(3, 4, 4)


def network(seed: int, context: Context = Context()) -> DiTDenoiser:
    torch.manual_seed(seed)
    net = DiTDenoiser(CONFIG, context=context)
    for parameter in net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)  # branches that begin at zero
    return net


def conditioning(rows: int) -> Conditioning:
    torch.manual_seed(3)
    w2c = torch.eye(4).repeat(rows, FRAMES, 1, 1)
    w2c[..., :3, 3] = torch.randn(rows, FRAMES, 3)
    lens = torch.full((rows, FRAMES, 4), 0.6)
    fields = {"w2c": w2c, "intrinsics": lens, "actions": torch.randn(rows, FRAMES, 2)}
    return Conditioning(torch.randn(rows, 3, 8), fields)


def step(number: int = 0) -> StepContext:
    torch.manual_seed(4)
    source = LatentSource(torch.randn(ROWS, FRAMES, *SPEC.shape), conditioning(ROWS))
    return StepContext(number, 0, source, DataCursor(ROWS, 0), torch.device("cpu"))


def test_the_share_of_given_clips() -> None:
    given = given_first(step(), 4000, FRAMES, 0.25)
    assert given.shape == (4000, FRAMES) and not given[:, 1:].any()
    assert given[:, 0].float().mean() == pytest.approx(0.25, abs=0.03)
    assert given_first(step(), 8, FRAMES, 1.0)[:, 0].all() and not given_first(step(), 8, FRAMES, 0.0).any()


def test_the_base_sees_given_frames_clean_and_learns_nothing_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(0)
    stage = Pretrain(PretrainConfig(batch=4, given=1.0, text_dropout=0.0), student=net, viewer=None)  # type: ignore[arg-type]
    calls = []
    plain = net.forward

    def watched(x, sigma, conditioning, **how):
        calls.append((x, sigma))
        return plain(x, sigma, conditioning, **how) + watched.error * (torch.arange(FRAMES) == 0)[:, None, None, None]

    watched.error = 0.0
    monkeypatch.setattr(net, "forward", watched)
    (update,) = stage.updates(step())
    loss, _ = update.losses[0]()
    x, sigma = calls[0]
    x0 = step().batch(4, type(step().source.batch(torch.tensor([0])))).latents
    assert torch.equal(x[:, 0], x0[:, 0]) and not sigma[:, 0].any() and (sigma[:, 1:] > 0).all()
    watched.error = 100.0  # whatever is said of a given frame, the loss is the same
    assert update.losses[0]()[0] == loss


@pytest.mark.parametrize("sigma", [0.0, 0.1])
def test_a_rollout_behind_a_given_frame_is_its_gradient_in_three_ways(sigma: float) -> None:
    """The parallel pass and the replay agree; the given frame is kept and gets no gradient."""
    net, rows = network(1, Context(window=3)), 2
    told, given = conditioning(rows), torch.randn(rows, 1, *SPEC.shape)
    plan = list(
        training_plan([1] * (FRAMES - 1), (1.0, 0.6), [1, 0], first=(1.0, 0.9, 0.5), prefix=[1], context_sigma=sigma)
    )
    noise = StreamNoise(rows, SPEC, torch.Generator().manual_seed(5))
    record = record_rollout(
        net, plan, told=told, noise=noise, cache=net.new_cache(), given=given, first=1, keep_caches=True
    )
    assert torch.equal(record.latents[:, :1], given) and record.latents.shape[1] == FRAMES
    weight = torch.randn(rows, FRAMES, *SPEC.shape)

    def gradients(latents: torch.Tensor, part: torch.Tensor) -> list[torch.Tensor]:
        found = torch.autograd.grad((latents * part).sum(), list(net.parameters()), allow_unused=True)
        return [torch.zeros(1) if g is None else g for g in found]

    whole = parallel_pass(net, record, told)
    torch.testing.assert_close(whole, record.latents, rtol=1e-4, atol=1e-5)
    assert torch.equal(whole[:, :1], given)
    parallel = gradients(whole, weight)
    pieces = replay_passes(net, record, told)
    assert len(pieces) == FRAMES - 1
    replayed = [gradients(piece(), weight[:, f : f + 1]) for f, piece in enumerate(pieces, 1)]
    for together, apart in zip(parallel, zip(*replayed, strict=True), strict=True):
        torch.testing.assert_close(together, sum(apart) + 0 * together, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["parallel", "replay"])
def test_distribution_matching_leaves_given_frames_alone(how: str) -> None:
    config = DMDConfig(
        batch=2,
        chunk=1,
        steps=(1000, 500),
        critic_updates=1,
        guidance=2.0,
        given=1.0,
        student_pass=how,  # type: ignore[arg-type]
    )
    nets = {
        role: network(i, Context(window=3) if role == "student" else Context())
        for i, role in enumerate(("student", "critic", "teacher"))
    }
    stage = DMD(config, **nets, null=torch.zeros(1, 3, 8), viewer=None)  # type: ignore[arg-type]
    sigmas = []
    plain = nets["critic"].forward

    def watched(x, sigma, *rest, **more):
        sigmas.append(sigma)
        return plain(x, sigma, *rest, **more)

    nets["critic"].forward = watched  # type: ignore[method-assign]
    for update in stage.updates(step()):
        for loss in update.losses:
            value, _ = loss()
            assert value.isfinite()
            value.backward()
    assert all(not s[:, 0].any() and (s[:, 1:] > 0).all() for s in sigmas) and len(sigmas) == 2
    assert any(p.grad is not None and p.grad.any() for p in nets["student"].parameters())


@pytest.mark.parametrize("given", [0.0, 1.0])
def test_a_students_gradient_is_one_however_it_is_computed(given: float) -> None:
    """Behind a given frame too, which counts in no mean."""
    found = []
    for how in ("parallel", "replay"):
        settings = {"given": given, "student_pass": how, "exits": "last"}
        config = DMDConfig(batch=2, chunk=1, steps=(1000, 500), critic_updates=1, guidance=2.0, **settings)  # type: ignore[arg-type]
        nets = {role: network(i) for i, role in enumerate(("student", "critic", "teacher"))}
        stage = DMD(config, **nets, null=torch.zeros(1, 3, 8), viewer=None)  # type: ignore[arg-type]
        (losses,) = [update.losses for update in stage.updates(step()) if update.role == "student"]
        for loss in losses:
            (loss()[0] / len(losses)).backward()  # as the trainer does
        found.append(torch.cat([p.grad.flatten() for p in nets["student"].parameters() if p.grad is not None]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_a_given_frame_is_not_in_the_mean_distance() -> None:
    x, noise = torch.randn(2, 2, FRAMES, *SPEC.shape).unbind(0)
    sigma = torch.full((2, FRAMES), 0.5) * (torch.arange(FRAMES) > 0)
    how = {"sigma": sigma, "noise": noise}

    def off(by: float):
        return lambda at, *_: noise - x + by

    whole = distribution_matching_gradient(x, off(0.5), off(0.0), conditioning(2), **how, given=1)
    behind = distribution_matching_gradient(
        x[:, 1:],
        lambda *_: (noise - x)[:, 1:] + 0.5,
        lambda *_: (noise - x)[:, 1:],
        conditioning(2),
        sigma=sigma[:, 1:],
        noise=noise[:, 1:],
    )
    assert not whole[:, 0].any()
    torch.testing.assert_close(whole[:, 1:], behind)


def test_the_share_of_given_rollouts() -> None:
    config = DMDConfig(batch=2, chunk=1, given=0.3)
    stage = DMD(
        config, student=network(0), critic=network(1), teacher=network(2), null=torch.zeros(1, 3, 8), viewer=None
    )  # type: ignore[arg-type]
    found = [stage._given(step(number), "student") for number in range(400)]
    assert sum(found) / 400 == pytest.approx(0.3, abs=0.08)


def test_a_given_frame_is_not_in_the_critics_loss() -> None:
    x, noise = torch.randn(2, 2, FRAMES, *SPEC.shape).unbind(0)
    sigma = torch.full((2, FRAMES), 0.5) * (torch.arange(FRAMES) > 0)
    told = conditioning(2)

    def off(first: float):
        def critic(x, sigma, conditioning, **_):
            return torch.cat([torch.full_like(x[:, :1], first), torch.zeros_like(x[:, 1:])], dim=1)

        return critic

    losses = [critic_loss(off(e), x, told, sigma=sigma, noise=noise, given=1) for e in (0.0, 9.0)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"given": 1.5}, "0 to 1"),
        ({"given": 0.5, "chunk": 3}, "chunk: 1"),
        ({"given": 0.5, "samples": "data"}, "self_rollout"),
    ],
)
def test_impossible_settings_are_refused(change: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DMDConfig(**{"chunk": 1, **change})
    if "chunk" not in change and "samples" not in change:
        with pytest.raises(ValueError, match=told):
            PretrainConfig(**change)
