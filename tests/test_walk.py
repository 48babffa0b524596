"""The walkable world: keys and poses, pictures against slow geometry, captions, the text encoder, prepared sets."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from causalreel import cli
from causalreel.data import prepare as preparing
from causalreel.data.draws import uniform
from causalreel.data.packing import Row, pack
from causalreel.data.prepare import check_codec, prepare
from causalreel.data.shards import load_prepared, read_shard
from causalreel.data.streaming import ShardSource, open_set
from causalreel.data.walk import (
    CELL,
    EYE,
    FOCAL,
    STEP,
    TURN,
    WalkConfig,
    WalkState,
    between,
    cameras,
    captions,
    fields,
    from_cameras,
    held,
    is_free,
    opposite,
    scenes,
    simulate,
    there_and_back,
    walk,
)
from causalreel.data.walk_render import COLOR_RGB, FLOOR, HEIGHTS, RADIUS, SKY, meet, paint, render, seen, shown, slopes
from causalreel.data.world import WorldConfig
from causalreel.data.worlds import WORLDS, flat, walkable
from causalreel.parallel.sharding import Team
from causalreel.scenery import DIRECTIONS, KEYS, complete, compose, parse
from causalreel.text.walk import WalkTextEncoder
from causalreel.train.building import build_codec
from causalreel.train.recipe import resolve
from causalreel.types import Geometry
from causalreel.weights.export import load_codec

CONFIG = WalkConfig(size=32, latents=8)


@pytest.fixture(scope="module")
def state() -> WalkState:
    return simulate(64, seed=1, config=CONFIG)


def test_keys_go_where_they_say() -> None:
    yaw, at = walk(held([], ["w"], ["right"], ["w"], ["d"])[None])
    assert yaw[0].tolist() == pytest.approx([0, 0, TURN, TURN, TURN])
    assert at[0, 1].tolist() == pytest.approx([0, STEP])
    assert (at[0, 3] - at[0, 2]).tolist() == pytest.approx([STEP * math.sin(TURN), STEP * math.cos(TURN)])
    assert (at[0, 4] - at[0, 3]).tolist() == pytest.approx([STEP * math.cos(TURN), -STEP * math.sin(TURN)])


def test_opposite_keys_lead_back_exactly(state: WalkState) -> None:
    back = state.walking(there_and_back(state.keys))
    torch.testing.assert_close(back.yaw.flip(1), back.yaw, rtol=0, atol=1e-12)
    torch.testing.assert_close(back.at.flip(1), back.at, rtol=0, atol=1e-12)
    assert torch.equal(opposite(opposite(state.keys)), state.keys)


def test_cameras_are_rigid_and_tell_their_poses(state: WalkState) -> None:
    w2c = cameras(state.yaw, state.at)
    torch.testing.assert_close(w2c[..., :3, :3] @ w2c[..., :3, :3].mT, torch.eye(3).expand(64, 8, 3, 3))
    yaw, at = from_cameras(w2c)
    torch.testing.assert_close(torch.cos(yaw - state.yaw), torch.ones_like(yaw), rtol=0, atol=1e-6)
    torch.testing.assert_close(at, state.at, rtol=0, atol=1e-5)
    step = fields(simulate(1, seed=0).walking(held([], ["w"])[None]))["w2c"][0, 1]
    assert step[2, 3] == pytest.approx(-CELL * STEP) == pytest.approx(-0.08)  # minWM's step


def test_a_clip_depends_on_its_seed_and_number_alone(state: WalkState) -> None:
    part = simulate(3, seed=1, first=40, config=CONFIG)
    for name in ("place", "color", "keys", "at"):
        assert torch.equal(getattr(part, name), getattr(state, name)[40:43])
    assert not torch.equal(simulate(3, seed=1, config=CONFIG, held_out=True).place, state.place[:3])
    assert uniform(torch.tensor([1]), 0, 3).shape == (1, 3)


def test_no_path_ends_in_an_object_and_some_go_back(state: WalkState) -> None:
    many = simulate(2000, seed=5)
    assert is_free(many).all()
    assert not is_free(many.walking(held(*[[]], *[["w"]] * 15).expand(2000, -1, -1))).all()
    assert (many.present.sum(1) >= 3).all() and (many.color.sort(1).values == torch.arange(6)).all()
    pressed = many.keys[:, 1:].float().mean((0, 1))
    assert (pressed > 0.05).all() and not many.keys[:, 0].any()
    returns = ((many.at[:, 1:].norm(dim=-1) < 1e-9) & (many.yaw[:, 1:].abs() < 1e-9))[:, 5:].any(1).float().mean()
    assert 0.25 < returns < 0.6


# ---- pictures against a slow reference -------------------------------------------------------------------------------


def march(state: WalkState, clip: int, yaw: float, at: tuple[float, float], u: float, v: float) -> tuple[int, float]:
    """What a ray meets, found by walking along it in small steps: an object's number, FLOOR or SKY, and how far."""
    c, s = math.cos(yaw), math.sin(yaw)
    for t in np.arange(0.002, 7, 0.002):
        x, y, z = at[0] + t * (c * u + s), v * t, at[1] + t * (c - s * u)
        for number in range(6):
            if not state.present[clip, number]:
                continue
            kind, scale = int(state.shape[clip, number]), float(state.scale[clip, number])
            ox, oz = state.place[clip, number].tolist()
            size, top = RADIUS[kind] * scale, EYE - HEIGHTS[kind] * scale
            far = math.hypot(ox, oz)
            along = ((x - ox) * ox + (z - oz) * oz) / far
            across = ((x - ox) * oz - (z - oz) * ox) / far
            inside = math.hypot(x - ox, z - oz) < size if kind == 0 else max(abs(along), abs(across)) < size
            if inside and y >= top:
                return number, t
        if y >= EYE:
            return FLOOR, t
    return (SKY, math.inf) if v <= 0 else (FLOOR, EYE / v)


def test_rays_meet_what_a_slow_march_meets(state: WalkState) -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(60):
        clip, frame = int(rng.integers(64)), int(rng.integers(8))
        u, v = float(rng.uniform(-0.8, 0.8)), float(rng.uniform(-0.5, 0.5))
        one = state[clip : clip + 1]
        yaw, at = one.yaw[:, frame : frame + 1], one.at[:, frame : frame + 1]
        columns = meet(one, yaw, at, torch.full((1, 1, 1), u))
        what, depth = shown(one, columns.depth, torch.tensor([v]))
        found, far = march(state, clip, float(yaw), (float(at[0, 0, 0]), float(at[0, 0, 1])), u, v)
        if int(what) != found or (found >= 0 and abs(float(depth) - far) > 0.01):
            wrong += 1
    assert wrong <= 1  # a ray may graze an edge


def test_a_block_ahead_is_where_a_pinhole_puts_it() -> None:
    """Its face is as wide and high in the picture as similar triangles say."""
    base = simulate(1, seed=0, config=WalkConfig(size=256, latents=1))
    place = torch.zeros(1, 6, 2)
    place[0, :, 1] = 3.0
    one = WalkState(
        present=torch.tensor([[True] + [False] * 5]),
        shape=torch.ones(1, 6, dtype=torch.long),
        color=torch.arange(6)[None],
        scale=torch.ones(1, 6),
        place=place,
        floor=base.floor,
        sky=base.sky,
        keys=base.keys,
        yaw=base.yaw,
        at=base.at,
        config=base.config,
    )
    picture = (paint(one, one.yaw, one.at)[0, 0] + 1) * 127.5
    mask = (picture - torch.tensor(COLOR_RGB[0]).float()[:, None, None]).norm(dim=0) < 3
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    depth, unit = 3.0 - RADIUS[1], FOCAL * 256
    assert len(columns) == pytest.approx(2 * RADIUS[1] / depth * unit, abs=2)
    assert int(rows[0]) == pytest.approx(128 + (EYE - HEIGHTS[1]) / depth * unit, abs=2)
    assert int(rows[-1]) == pytest.approx(128 + EYE / depth * unit, abs=2)


def test_turning_moves_the_picture_as_the_angle_says(state: WalkState) -> None:
    """What is in the middle after a turn was at the tangent of the angle before it; this holds for every object."""
    u = slopes(32, 1, torch.device("cpu"))
    angle = 0.3
    zero, turned = torch.zeros(64, 1), torch.full((64, 1), angle)
    at = torch.zeros(64, 1, 2)
    before, _ = shown(state, meet(state, zero, at, torch.full((64, 1, 1), math.tan(angle))).depth, u)
    after, _ = shown(state, meet(state, turned, at, torch.zeros(64, 1, 1)).depth, u * math.cos(angle))
    assert (before == after).float().mean() > 0.99


def test_what_was_seen_looks_the_same(state: WalkState) -> None:
    mask = seen(state, state.yaw, state.at)
    assert mask[:, 0].float().mean() > 0.995
    there = state.walking(there_and_back(state.keys[:, :4]))
    assert seen(there, there.yaw, there.at)[:, -1].float().mean() > 0.995
    away = seen(state, torch.full((64, 1), math.pi), torch.zeros(64, 1, 2))
    assert not away.any()


def test_videos_go_straight_between_latent_frames(state: WalkState) -> None:
    video = render(state[:2])
    assert video.shape == (2, CONFIG.frames, 3, 32, 32) and CONFIG.frames == 29 and video.abs().max() <= 1
    torch.testing.assert_close(video[:, ::4], paint(state[:2], state.yaw[:2], state.at[:2]), rtol=0, atol=1e-5)
    torch.testing.assert_close(between(state.at)[:, 2], (state.at[:, 0] + state.at[:, 1]) / 2)


# ---- words ----------------------------------------------------------------------------------------------------------


def test_captions_are_true_and_read_back(state: WalkState) -> None:
    for scene, caption, row in zip(scenes(state), captions(state), range(len(state)), strict=True):
        assert parse(caption) == scene
        for number, direction in enumerate(DIRECTIONS):
            bearing = math.atan2(*state.place[row, number].tolist())
            away = (bearing - number * math.pi / 3 + math.pi) % (2 * math.pi) - math.pi
            assert abs(math.degrees(away)) <= 22.001
            assert (scene.objects[direction] is not None) == bool(state.present[row, number])
    turned = torch.arange(6) * math.pi / 3  # looking at each direction shows its object's colour
    for row in range(8):
        one = state[row : row + 1]
        what, _ = shown(
            one,
            meet(one, turned[None], torch.zeros(1, 6, 2), slopes(32, 1, turned.device).expand(1, 6, -1)).depth,
            slopes(32, 1, turned.device),
        )
        for number in range(6):
            if one.present[0, number]:
                assert (what[0, number] == number).any()


def test_prompts_may_leave_things_open() -> None:
    scene = parse("A red pillar is ahead, nothing behind, under a night sky.")
    assert scene.objects == {"ahead": ("red", "pillar"), "behind": None} and scene.floor is None
    whole = complete(scene, 3)
    assert whole.is_complete and whole.objects["ahead"] == ("red", "pillar") and whole.sky == "night"
    assert parse(compose(whole)) == whole == complete(scene, 3) != complete(scene, 4)
    colors = [found[0] for found in whole.objects.values() if found]
    assert len(set(colors)) == len(colors)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a red piller ahead", "did you mean 'pillar'"),
        ("a red pillar", "expected a direction"),
        ("a red pillar ahead, a blue block ahead", "twice"),
        ("snow floor", "sand, slate, grass, clay"),
        ("", "describes nothing"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused_in_a_line(prompt: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        WalkTextEncoder().encode([prompt])
    assert "\n" not in str(error.value)


def test_texts_tell_scenes_apart(state: WalkState) -> None:
    encoder = WalkTextEncoder()
    text = encoder.encode(captions(state))
    assert text.shape == (64, encoder.length, encoder.width) and not encoder.null(1).any()
    assert len({row.numpy().tobytes() for row in text}) == len(set(captions(state)))
    assert encoder.encode(["a red pillar ahead"]).any(-1).sum() == 1


# ---- prepared sets --------------------------------------------------------------------------------------------------


class Squeeze:
    """A codec without weights."""

    geometry = Geometry(channels=3, spatial=8, temporal=4)

    def encode(self, video: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(video[:, ::4].flatten(0, 1), 8).unflatten(0, (len(video), -1))

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    stream = decode


def test_prepared_sets_hold_cameras_and_keys(tmp_path: Path) -> None:
    prepare(tmp_path, Squeeze(), codec_id="c", clips=5, seed=3, world=walkable(CONFIG), shard=3, batch=2)
    held_ = load_prepared(tmp_path)
    state = simulate(5, seed=3, config=CONFIG)
    assert held_.captions == captions(state) and held_.latents.shape == (5, 8, 3, 4, 4)
    for name, value in fields(state).items():
        assert torch.equal(held_.fields[name], value)
    assert held_.fields["actions"].shape[-1] == len(KEYS)
    with pytest.raises(ValueError, match="frames=29, asked for frames=25"):
        prepare(tmp_path, Squeeze(), codec_id="c", clips=5, seed=3, world=walkable(WalkConfig(32, 7)), shard=3)


def test_sets_with_stored_text_give_the_same_fields(tmp_path: Path) -> None:
    state = simulate(5, seed=3, config=CONFIG)
    told, made = WalkTextEncoder().encode(captions(state)), fields(state)
    latents = torch.randn(5, 8, 3, 4, 4)
    rows = [
        Row("c", f"clip {i}", latents[i], told[i], {name: value[i] for name, value in made.items()}) for i in range(5)
    ]
    pack(tmp_path / "latents-00000.safetensors", rows[:3])
    pack(tmp_path / "latents-00001.safetensors", rows[3:])
    source = ShardSource(open_set(tmp_path), length=8)
    batch = source.batch(torch.tensor([4, 0, 2]))
    assert torch.equal(batch.conditioning.text, told[[4, 0, 2]])
    for name, value in made.items():
        assert torch.equal(batch.conditioning.fields[name], value[[4, 0, 2]])
    source.close()
    with pytest.raises(ValueError, match=r"clip 1 has fields .*all clips need the same"):
        pack(tmp_path / "x.safetensors", [rows[0], replace(rows[1], fields={})])
    with pytest.raises(ValueError, match=r"w2c \(7, 4, 4\), expected finite numbers \(8,\.\.\.\)"):
        pack(tmp_path / "x.safetensors", [replace(rows[0], fields={"w2c": made["w2c"][0, 1:]})])


def test_the_codec_learns_the_world_that_its_recipe_names() -> None:
    recipe = resolve("tiny/walk_codec", ["rows=2"])
    stage = build_codec(recipe, torch.device("cpu"), Team())
    clips = stage.source.batch(torch.tensor([0, 1])).video
    torch.testing.assert_close(clips, render(simulate(2, seed=0)), rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="the world 'walk' has none"):
        resolve("tiny/walk_codec", ["settings.events=0.5"])


def test_a_codec_of_another_world_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "CHECKED", 2)
    codec, how = load_codec("tiny"), {"seed": 0, "first": 50_000, "batch": 1}
    assert check_codec(codec, flat(WorldConfig(frames=5)), 30, **how) > 30
    with pytest.raises(ValueError, match=r"PSNR of 2\d\.\d dB, at least 30 is asked for"):
        check_codec(codec, walkable(WalkConfig(latents=2)), 30, **how)
    monkeypatch.setattr(preparing, "CHECKED", 1)
    monkeypatch.setitem(WORLDS, "walk", lambda: walkable(WalkConfig(latents=2)))
    arguments = ["encode", "--world", "walk", "--codec", "tiny", "--out", str(tmp_path / "data"), "--device", "cpu"]
    assert cli.main([*arguments, "--clips", "1", "--least-psnr", "30"]) == 2
    assert "dB, at least 30" in capsys.readouterr().err and not (tmp_path / "data").exists()


def test_fields_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    latents = torch.zeros(2, 4, 3, 4, 4)
    save_file({"latents": latents, "field.w2c": torch.zeros(2, 3, 4, 4)}, tmp_path / "latents-00000.safetensors")
    with pytest.raises(ValueError, match=r"field\.w2c.*an entry for each latent frame") as error:
        read_shard(tmp_path / "latents-00000.safetensors")
    assert "\n" not in str(error.value)
    save_file({"latents": latents, "field.a": torch.full((2, 4, 1), torch.nan)}, tmp_path / "latents-00000.safetensors")
    (tmp_path / "latents-00000.txt").write_text("x\ny\n")
    with pytest.raises(ValueError, match=r"field\.a that are not finite"):
        load_prepared(tmp_path)
