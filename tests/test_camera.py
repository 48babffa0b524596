"""Cameras and actions in the network: the laws hold with them, and without them the network is what it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from causalreel.control.poses import turn_right
from causalreel.control.strings import latent_poses, view_matrices
from causalreel.infer.live_video import check_values
from causalreel.nn.camera import Views, network, seen
from causalreel.nn.denoiser import DiTDenoiser, Guided
from causalreel.nn.kv_cache import FrameCache
from causalreel.nn.masks import Context
from causalreel.nn.policies.deep_forcing import DeepForcing
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.memrope import MemRope
from causalreel.nn.policies.relax_forcing import RelaxForcing
from causalreel.nn.policies.selecting import SelectingPolicy
from causalreel.nn.presets import ModelConfig
from causalreel.parallel.compile import compile_blocks
from causalreel.parallel.fast import FastDiT, accelerate
from causalreel.parallel.recompute import Recompute, recompute_blocks
from causalreel.rollout import KeyedNoise, chunk_sizes, chunked, collect, fuse, rollout, truncate
from causalreel.train.losses import teacher_forcing_loss
from causalreel.train.self_rollout import parallel_pass, record_rollout, replay_passes, training_plan
from causalreel.types import Cache, Conditioning, LatentSpec
from causalreel.weights.identify import config_of

PLAIN = ModelConfig(dim=48, ffn_dim=80, heads=3, layers=2, text_dim=16, text_length=8, freq_dim=32, channels=4)
PROPE = replace(PLAIN, camera="prope")
EMBEDDED = replace(PLAIN, camera="embedded", actions=5)
SPEC, FRAMES, CHUNK, BATCH = LatentSpec(4, 4, 4), 6, 2, 2
LEVELS = (1.0, 0.7, 0.3)
Tells = Callable[[ModelConfig], Conditioning]


def denoiser(config: ModelConfig = PROPE, context: ContextPolicy = Context(), seed: int = 0) -> DiTDenoiser:
    """A network none of whose parts is zero."""
    torch.manual_seed(seed)
    net = DiTDenoiser(config, context=context, backend="sdpa")
    for name, parameter in net.named_parameters():
        if "prope_o" in name or "embedding.2" in name or name.endswith("head.head.weight"):
            nn.init.normal_(parameter, std=0.2)
    return net


def poses(frames: int = FRAMES) -> Tensor:
    """Two walks (2,F,4,4)."""
    walks = [latent_poses(text, "minwm", latents=frames) for text in ("l*3,w*9", "w*2,i*2,d*9")]
    return torch.stack([torch.from_numpy(view_matrices(walk)).float() for walk in walks])


def given(config: ModelConfig = PROPE, frames: int = FRAMES) -> Conditioning:
    generator = torch.Generator().manual_seed(5)
    fields = {}
    if config.camera != "none":
        fields = {"w2c": poses(frames), "intrinsics": torch.tensor([0.6, 0.9, 0.5, 0.5]).expand(BATCH, frames, 4)}
    if config.actions:
        fields["actions"] = torch.randn(BATCH, frames, config.actions, generator=generator)
    return Conditioning(torch.randn(BATCH, 5, config.text_dim, generator=generator), fields)


def by_chunk(config: ModelConfig = PROPE, frames: int = FRAMES) -> Conditioning:
    """The same with a text of its own for every chunk."""
    text = torch.randn(BATCH, frames // CHUNK, 5, config.text_dim, generator=torch.Generator().manual_seed(6))
    return replace(given(config, frames), text=text, prompts=tuple(frame // CHUNK for frame in range(frames)))


def noise(seed: int = 1, frames: int = FRAMES) -> Tensor:
    return torch.randn(BATCH, frames, *SPEC.shape, generator=torch.Generator().manual_seed(seed))


def rolled_out(
    net: DiTDenoiser | Guided, conditioning: Conditioning, plan, cache: Cache | None = None, *, cached: bool = True
) -> Tensor:
    with torch.no_grad():
        source = KeyedNoise(range(BATCH), SPEC)
        cache = net.new_cache() if cached and cache is None else cache
        return collect(rollout(net, plan, conditioning=conditioning, noise=source, cache=cache))


def close(a: Tensor, b: Tensor, limit: float = 2e-5) -> None:
    assert (a - b).abs().max() < limit * b.abs().max()


both = pytest.mark.parametrize("config", [PROPE, EMBEDDED], ids=["prope", "embedded"])
texts = pytest.mark.parametrize("told", [given, by_chunk], ids=["one text", "text by chunk"])


# ---- laws ------------------------------------------------------------------------------------------------------------


@both
@texts
@torch.no_grad()
def test_cached_calls_are_the_masked_pass(config: ModelConfig, told: Tells) -> None:
    net, conditioning, sizes = denoiser(config), told(config), chunk_sizes(FRAMES, CHUNK)
    clean, x, sigma = noise(2), noise(3), torch.full((1, FRAMES), 0.6)
    whole = net.teacher_forced(x, sigma, conditioning, clean=clean, sizes=sizes)
    cache, parts = net.new_cache(), []
    for start in range(0, FRAMES, CHUNK):
        here, piece = slice(start, start + CHUNK), conditioning.frames(start, start + CHUNK)
        parts.append(net(x[:, here], sigma[:, here], piece, sizes=(CHUNK,), start=start, cache=cache))
        net(clean[:, here], torch.zeros(1, CHUNK), piece, sizes=(CHUNK,), start=start, cache=cache)
        cache.commit(CHUNK)
    close(torch.cat(parts, dim=1), whole)


@both
@texts
@pytest.mark.parametrize("context", [Context(), Context(4, 1), Context(4, 2, 3)], ids=["full", "window", "re-indexed"])
def test_fused_plans_are_plain_ones(config: ModelConfig, context: Context, told: Tells) -> None:
    net, conditioning = denoiser(config, context), told(config)

    def plan():
        return chunked(chunk_sizes(FRAMES, CHUNK), LEVELS)

    close(rolled_out(net, conditioning, fuse(plan())), rolled_out(net, conditioning, plan()))


@both
@pytest.mark.parametrize(
    "policy",
    [DeepForcing(sink=1, budget=20, recent=2), RelaxForcing(sink=1, budget=20, recent=2), MemRope(sink=1, local=20)],
    ids=lambda policy: policy.policy,
)
def test_a_policy_that_chooses_among_all_is_the_full_context(config: ModelConfig, policy: SelectingPolicy) -> None:
    """As long as it has room for everything: twins are stored and read as they are, their heads rotated once."""
    plans = [list(chunked(chunk_sizes(FRAMES, CHUNK), LEVELS)) for _ in range(2)]
    chosen = rolled_out(denoiser(config, policy), given(config), plans[0])
    close(chosen, rolled_out(denoiser(config, Context()), given(config), plans[1]))


@both
@texts
def test_replayed_gradient_is_the_parallel_one(config: ModelConfig, told: Tells) -> None:
    net, conditioning = denoiser(config), told(config)
    plan = list(training_plan(chunk_sizes(FRAMES, CHUNK), LEVELS, [2, 1]))
    source = KeyedNoise(range(BATCH), SPEC)
    record = record_rollout(net, fuse(plan), told=conditioning, noise=source, cache=net.new_cache(), keep_caches=True)
    aim, found = noise(7), []
    for passes in (
        lambda: [parallel_pass(net, record, conditioning)],
        lambda: replay_passes(net, record, conditioning),
    ):
        net.zero_grad()
        pieces = passes() if callable(passes) else passes
        start = 0
        for piece in pieces:
            latents = piece() if callable(piece) else piece
            (latents * aim[:, start : start + latents.shape[1]]).sum().backward()
            start += latents.shape[1]
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert (gradient - found[1][name]).abs().max() <= 1e-4 * max(gradient.abs().max(), 1e-2), name


@torch.no_grad()
def test_a_common_world_transform_changes_nothing() -> None:
    net, conditioning = denoiser(), given()
    moved = torch.eye(4)
    moved[:3, :3], moved[:3, 3] = torch.from_numpy(turn_right(0.7)).float(), torch.tensor([0.3, -0.2, 0.5])
    elsewhere = replace(conditioning, fields={**conditioning.fields, "w2c": conditioning.fields["w2c"] @ moved})
    sigma = torch.full((1, 1), 0.5)
    close(net(noise(), sigma, elsewhere), net(noise(), sigma, conditioning))


@torch.no_grad()
def test_cameras_matter_and_only_from_their_frame_on() -> None:
    net, conditioning = denoiser(), given()
    w2c = conditioning.fields["w2c"].clone()
    w2c[:, 4, :3, 3] += 0.5
    changed = replace(conditioning, fields={**conditioning.fields, "w2c": w2c})
    sizes, sigma = chunk_sizes(FRAMES, CHUNK), torch.full((1, FRAMES), 0.5)
    a, b = (net(noise(), sigma, one, sizes=sizes) for one in (conditioning, changed))
    assert torch.equal(a[:, :4], b[:, :4])
    assert (a[:, 4:] - b[:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("config", [PROPE, EMBEDDED, replace(PLAIN, actions=3)], ids=["prope", "embedded", "actions"])
@torch.no_grad()
def test_a_branch_that_starts_at_zero_is_the_model_without_it(config: ModelConfig) -> None:
    torch.manual_seed(3)
    plain = DiTDenoiser(PLAIN, backend="sdpa")
    nn.init.normal_(plain.model.head.head.weight, std=0.2)
    net = DiTDenoiser(config, backend="sdpa")
    missing = net.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing
    assert all("prope_o" in name or "camera_emb" in name or "action_emb" in name for name in missing)
    sigma = torch.full((1, 1), 0.5)
    conditioning = given(config)
    close(net(noise(), sigma, conditioning), plain(noise(), sigma, Conditioning(conditioning.text)), 1e-6)
    assert torch.equal(
        net(noise(), sigma, Conditioning(conditioning.text)), plain(noise(), sigma, Conditioning(conditioning.text))
    )


@both
def test_guidance_keeps_cameras(config: ModelConfig) -> None:
    net, conditioning = denoiser(config), given(config)
    negative = Conditioning(torch.zeros(1, 5, PLAIN.text_dim))
    guided = Guided(net, negative, 3.0)
    sigma = torch.full((BATCH, 1), 0.5)
    with torch.no_grad():
        rows = [
            net(noise(), sigma, replace(conditioning, text=text)) for text in (conditioning.text, conditioning.text * 0)
        ]
        close(guided(noise(), sigma, conditioning), rows[1] + 3.0 * (rows[0] - rows[1]))


@both
def test_it_trains_recomputed_as_plain(config: ModelConfig) -> None:
    found = []
    for mode in ("none", "full"):
        net = denoiser(config)
        recompute_blocks(net, mode)
        sizes, sigma = chunk_sizes(FRAMES, CHUNK), torch.full((BATCH, FRAMES), 0.6)
        how = {"sigma": sigma, "noise": noise(9), "weight": torch.ones_like(sigma), "sizes": sizes}
        teacher_forcing_loss(net, noise(2), given(config), **how).backward()
        found.append({name: p.grad for name, p in net.named_parameters()})
    for (name, a), b in zip(found[0].items(), found[1].values(), strict=True):
        assert a is not None, name
        assert b is not None, name
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    branch = "prope_o" if config.camera == "prope" else "camera_embedding"
    assert all(a.abs().max() > 0 for name, a in found[0].items() if branch in name and a is not None)


@both
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_a_call_behind_a_cache_is_recomputed_as_plain(config: ModelConfig, mode: Recompute) -> None:
    found = []
    for how in ("none", mode):
        net, plan = denoiser(config), truncate(chunked(chunk_sizes(FRAMES, CHUNK), LEVELS), [1])
        recompute_blocks(net, how)
        source = KeyedNoise(range(BATCH), SPEC)
        made = collect(rollout(net, plan, conditioning=given(config), noise=source, cache=net.new_cache()))
        made.square().sum().backward()
        found.append((made.detach(), net.model.blocks[0].self_attn.v.weight.grad))
    for plain, again in zip(*found, strict=True):
        close(plain, again)


# ---- faster forms, and what is refused -------------------------------------------------------------------------------


def test_the_light_form_is_accelerated() -> None:
    net, conditioning = denoiser(EMBEDDED), given(EMBEDDED)

    def plan():
        return fuse(chunked(chunk_sizes(FRAMES, CHUNK), LEVELS))

    plain = rolled_out(net, conditioning, plan())
    close(rolled_out(accelerate(net), conditioning, plan()), plain)


CONTEXTS = [Context(), Context(window=6), Context(window=4), Context(6, 2, 5)]


def fast_cache(net: DiTDenoiser, context: ContextPolicy, batch: int = BATCH) -> FrameCache:
    assert isinstance(net.run, FastDiT)
    return net.run.new_cache(context, chunk=CHUNK, frames=FRAMES, batch=batch, size=SPEC.shape[1:])


@pytest.mark.parametrize("context", CONTEXTS, ids=str)
@pytest.mark.parametrize("is_static", [True, False], ids=["static", "growing"])
def test_heads_with_cameras_are_accelerated(context: ContextPolicy, is_static: bool) -> None:
    """The fast form is the network, with cameras and without, fused and not, guided too."""
    plain, net = denoiser(context=context), accelerate(denoiser(context=context).requires_grad_(False))
    for conditioning in (given(), by_chunk(), Conditioning(given().text)):
        for fused in (False, True):
            plans = [chunked(chunk_sizes(FRAMES, CHUNK), LEVELS) for _ in range(2)]
            plans = [fuse(plan) for plan in plans] if fused else plans
            cache = fast_cache(net, context) if is_static else None
            close(rolled_out(net, conditioning, plans[0], cache), rolled_out(plain, conditioning, plans[1]))
    negative = Conditioning(torch.zeros(1, 5, PLAIN.text_dim))
    cache = fast_cache(net, context, 2 * BATCH) if is_static else None
    how = given(), chunked(chunk_sizes(FRAMES, CHUNK), LEVELS)
    guided = rolled_out(Guided(net, negative, 2.0), *how, cache or net.new_cache())
    how = given(), chunked(chunk_sizes(FRAMES, CHUNK), LEVELS)
    close(guided, rolled_out(Guided(plain, negative, 2.0), *how, plain.new_cache()))


def test_the_fast_form_shares_the_networks_weights_with_cameras() -> None:
    """Names and values stay; changed in place they count, and so does a bias behind `refresh`."""
    net, plain = denoiser(), denoiser()
    before = {name: value.clone() for name, value in net.model.state_dict().items()}
    accelerate(net.requires_grad_(False))
    after = net.model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with torch.no_grad():
        for own in (net, plain):
            for block in own.model.blocks:
                block.self_attn.prope_o.weight.mul_(0.5)
                block.self_attn.prope_o.bias.add_(0.3)
    net.run.refresh()
    plans = [chunked(chunk_sizes(FRAMES, CHUNK), LEVELS) for _ in range(2)]
    close(rolled_out(net, given(), plans[0], fast_cache(net, Context())), rolled_out(plain, given(), plans[1]))


@pytest.mark.parametrize("precision", ["fp8", "fp8-attention"])
def test_coarser_forms_are_near_with_cameras(precision: str) -> None:
    plain, net = denoiser(), accelerate(denoiser().requires_grad_(False), precision=precision)
    plans = [fuse(chunked(chunk_sizes(FRAMES, CHUNK), LEVELS)) for _ in range(2)]
    exact = rolled_out(plain, given(), plans[1])
    found = rolled_out(net, given(), plans[0], fast_cache(net, Context()))
    assert 1e-6 < (found - exact).norm() / exact.norm() < 0.2
    net.run.release_originals()
    assert net.model.blocks[0].self_attn.prope_o.weight.is_meta


def test_blocks_with_cameras_are_compiled() -> None:
    assert compile_blocks(denoiser()).config.attention_heads == 2 * PLAIN.heads


def test_what_views_do_is_undone() -> None:
    views = Views.of(*(given().fields[name] for name in ("w2c", "intrinsics")))
    x = torch.randn(BATCH, FRAMES * 4, 3, 16)
    torch.testing.assert_close(seen(seen(x, views.project), views.lift), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"w2c": poses()}, "a camera is two fields"),
        ({"w2c": poses(), "intrinsics": torch.ones(BATCH, FRAMES, 3)}, r"must be \(B,F,4\), got \(2,6,3\)"),
        ({"w2c": poses()[..., :3, :], "intrinsics": torch.ones(BATCH, FRAMES, 4)}, r"must be \(B,F,4,4\)"),
        ({"w2c": poses(4), "intrinsics": torch.ones(BATCH, FRAMES, 4)}, "is for 4 frames, the call has 6"),
        ({"actions": torch.ones(BATCH, FRAMES, 4)}, "no use for the field 'actions'"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, Tensor], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        denoiser()(noise(), torch.full((1, 1), 0.5), Conditioning(given().text, fields))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"camera": "plucker"}, "camera must be one of"),
        ({"actions": -1}, "actions must be"),
        ({"heads": 8}, "multiple of 4"),
    ],
)
def test_wrong_configs_are_named(wrong: dict[str, object], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        network(replace(PROPE, **wrong))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("config", [PROPE, EMBEDDED, PLAIN], ids=["prope", "embedded", "plain"])
def test_a_file_shows_what_a_network_takes(config: ModelConfig) -> None:
    shapes = {name: tuple(value.shape) for name, value in network(config).state_dict().items()}
    found = config_of(shapes)
    assert found is not None
    assert (found.camera, found.actions) == (config.camera, config.actions)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("w2c", torch.full((4, 4), float("nan")), "finite"),
        ("w2c", torch.zeros(4, 4), "last row"),
        ("w2c", torch.diag(torch.tensor([2.0, 2, 2, 1])), "no rotation"),
        ("intrinsics", torch.tensor([0.0, 1, 0.5, 0.5]), "fx, fy above 0"),
        ("actions", torch.tensor([float("inf")]), "finite"),
    ],
)
def test_a_live_camera_is_checked(name: str, value: torch.Tensor, message: str) -> None:
    check_values("w2c", torch.eye(4))
    check_values("intrinsics", torch.tensor([0.9, 1.1, 0.5, 0.5]))
    with pytest.raises(ValueError, match=message):
        check_values(name, value)
