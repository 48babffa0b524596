"""Strings, files and sessions of cameras and keys: motions by hand, what is refused, and what all dialects share."""

from __future__ import annotations

import io
import itertools
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from causalreel.control import files, labels, poses
from causalreel.control.benchmarks import Item, manifest, output_name, read_benchmark
from causalreel.control.sessions import KEYS, parse_session, read_sessions
from causalreel.control.strings import DIALECTS, Walk, dialect, held, latent_poses, latent_times, padded
from causalreel.control.strings import poses as walked
from ceilings import work_within

# ---- motions ---------------------------------------------------------------------------------------------------------


def test_axes_are_opencvs() -> None:
    """By hand: forward is z, right is x, down is y; a right turn sees what was at x, a look up what was at -y."""
    steps = {"w*1": (0, 0, 0.08), "s*1": (0, 0, -0.08), "d*1": (0.08, 0, 0), "a*1": (-0.08, 0, 0), "dn*1": (0, 0.08, 0)}
    for text, place in steps.items():
        np.testing.assert_allclose(latent_poses(text, "minwm")[-1, :3, 3], place, atol=1e-15)
    forward = {"l*30": (1, 0, 0), "j*30": (-1, 0, 0), "i*30": (0, -1, 0), "k*30": (0, 1, 0)}
    for text, direction in forward.items():
        np.testing.assert_allclose(latent_poses(text, "minwm")[-1, :3, 2], direction, atol=1e-12)


def test_a_turn_moves_the_way_it_looks() -> None:
    np.testing.assert_allclose(latent_poses("l*30,w*10", "minwm")[-1, :3, 3], (0.8, 0, 0), atol=1e-12)


def test_walkers_stay_level_and_fliers_do_not() -> None:
    level, climbing = latent_poses("i-20,w-20", "lingbot"), latent_poses("i*7,w*5", "minwm")
    assert abs(level[-1, 1, 3]) < 1e-12
    assert climbing[-1, 1, 3] < -0.1
    assert np.linalg.norm(level[-1, :3, 3]) == pytest.approx(20 * 0.05, rel=1e-5)  # looking up does not slow the walk


@pytest.mark.parametrize(("name", "pitch"), [("lingbot", 84), ("sana", 84), ("sana-2", 60)])
def test_the_pitch_has_a_limit(name: str, pitch: float) -> None:
    rule = dialect(name)
    end = walked(held("i-300", rule), rule)[-1]
    assert np.degrees(np.arcsin(-end[1, 2])) == pytest.approx(pitch, abs=1e-6)


def test_the_same_string_means_different_motions() -> None:
    first, later = (walked(held("a-8", dialect(name)), dialect(name))[-1] for name in ("sana", "sana-2"))
    np.testing.assert_allclose(first[:3, :3], np.eye(3))
    np.testing.assert_allclose(later[:3, 3], 0)
    assert np.degrees(np.arctan2(later[0, 2], later[2, 2])) == pytest.approx(-8 * 0.6)


def test_a_released_key_coasts_by_the_later_rule() -> None:
    rule = dialect("sana-2")
    places = walked(held("w-4,none-64", rule), rule)[:, 2, 3]
    speeds = np.diff(places)
    np.testing.assert_allclose(speeds[:4], 0.025, rtol=1e-4)
    np.testing.assert_allclose(speeds[5:] / speeds[4:-1], np.exp(-1 / 16), rtol=1e-4)  # 1 s to lose it, 16 frames of it


@given(st.sampled_from(sorted(DIALECTS)), st.lists(st.sets(st.integers(0, 9), max_size=3), max_size=12))
def test_every_walk_is_rigid_and_starts_at_the_identity(name: str, picks: list[set[int]]) -> None:
    rule = dialect(name)
    keys = sorted(rule.keys)
    track = walked([{keys[pick % len(keys)] for pick in frame} for frame in picks], rule)
    assert len(track) == 1 + len(picks)
    np.testing.assert_array_equal(track[0], np.eye(4))
    np.testing.assert_allclose(poses.checked(track), track, atol=1e-12)


def test_keys_pressed_one_by_one_give_the_string_again() -> None:
    walk = Walk(dialect("sana-2"))
    live = [walk.step(keys) for keys in [{"w"}] * 3 + [{"w", "a"}] * 2 + [set[str]()] * 4]
    rule = dialect("sana-2")
    np.testing.assert_array_equal(live, walked(held("w-3,wa-2,none-4", rule), rule)[1:])
    with pytest.raises(ValueError, match="unknown key 'q'"):
        walk.step({"q"})


def test_latents_of_pixel_frames() -> None:
    np.testing.assert_array_equal(latent_times(10), [0, 4, 8])
    np.testing.assert_allclose(latent_times(10, "even"), [0, 4.5, 9])
    assert len(padded(held("w-8", dialect("lingbot")))) == 9
    assert len(latent_poses("w-16", "sana")) == 5
    assert len(latent_poses("w-16", "sana", latents=3)) == 3


# ---- strings that are refused ----------------------------------------------------------------------------------------

BAD = {
    "minwm": ["", "w5", "W*3", "x*3", "w*3,", "w-3", "w*-1", "w*1.5", "w *3", "w+k*3", "w*3;d*2", "w*٣", "w*1e9"],
    "worldplay": ["w-3-2", "w3", "x-3", "w-abc", "W-3", "w*3", "w-3 d-2", "w-inf", "w--1", "w-3,"],
    "lingbot": ["", "w-0", "w--3", "x-3", "w3", "w-3,,d-2", "w-3,", "none", "none-4x", "up-3", "w-2.5", "nonew-3"],
    "sana": ["", "w-0", "q-3", "w3"],
    "letters": ["W W", "w", "WX"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BAD.items() for text in texts])
def test_a_string_that_cannot_be_read_is_one_line(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"^trajectory: [^\n]+$"):
        latent_poses(text, name)


def test_lengths_are_bounded() -> None:
    with pytest.raises(ValueError, match="more than 1,000,000 frames"):
        held("w*999999,w*999999", dialect("minwm"))


def test_too_few_poses_say_how_many_steps_are_needed() -> None:
    with pytest.raises(ValueError, match=r"4 poses for 20 latent frames.*add up to 19 or more latent frames, got 3"):
        latent_poses("w*3", "minwm", latents=20)
    with pytest.raises(ValueError, match=r"add up to 76 or more pixel frames, got 10"):
        latent_poses("w-10", "sana", latents=20)


def test_an_unknown_dialect_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown 'lingbod', did you mean 'lingbot'\?"):
        dialect("lingbod")


# ---- poses -----------------------------------------------------------------------------------------------------------


def track(count: int = 9) -> poses.Array:
    """Some rigid poses away from the origin."""
    start = poses.from_quaternions(np.array([[3.0, -1, 2, 0.1, 0.2, -0.3, 0.9]]))
    return start @ latent_poses(f"l*{(count - 1) // 2},w*{count}", "minwm")[:count]


def test_quaternions_there_and_back() -> None:
    given_poses = track()
    np.testing.assert_allclose(poses.from_quaternions(poses.to_quaternions(given_poses)), given_poses, atol=1e-14)
    half_turn = poses.turn_right(np.pi)
    pose = np.eye(4)
    pose[:3, :3] = half_turn
    np.testing.assert_allclose(poses.from_quaternions(poses.to_quaternions(pose[None]))[0], pose, atol=1e-14)


def test_interpolation_is_linear_in_place_and_angle() -> None:
    made = poses.resampled(latent_poses("l*10", "minwm"), [2.5])
    assert np.degrees(np.arctan2(made[0, 0, 2], made[0, 2, 2])) == pytest.approx(7.5)
    ends = poses.resampled(track(5), [-1, 99])
    np.testing.assert_allclose(ends, track(5)[[0, -1]], atol=1e-14)


def test_a_common_world_transform_changes_no_relative_pose() -> None:
    moved = poses.from_quaternions(np.array([[1.0, 2, 3, 0.5, -0.5, 0.1, 0.7]])) @ track()
    np.testing.assert_allclose(poses.relative(moved), poses.relative(track()), atol=1e-13)
    np.testing.assert_array_equal(labels.labels_of_poses(moved), labels.labels_of_poses(track()))


def spoiled(change: Any) -> np.ndarray:
    found = track()
    change(found)
    return found


@pytest.mark.parametrize(
    ("given_poses", "why"),
    [
        (np.zeros((9, 3, 4)), r"expected numbers \(N,4,4\)"),
        (np.zeros((0, 4, 4)), "N at least 1"),
        (np.full((2, 4, 4), "a"), "expected numbers"),
        (spoiled(lambda p: p.__setitem__((4, 0, 0), np.nan)), "pose 4 is not finite"),
        (spoiled(lambda p: p.__setitem__((2, 3), 1)), "the last row of pose 2"),
        (spoiled(lambda p: p.__imul__(np.array([1.5, 1.5, 1.5, 1]))), "no rotation"),
        (spoiled(lambda p: p.__setitem__((5, slice(3), 0), -p[5, :3, 0])), "determinant -1"),
    ],
)
def test_what_is_no_rigid_pose_is_named(given_poses: np.ndarray, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        poses.checked(given_poses)


def test_rounded_rotations_are_made_exact() -> None:
    rounded = track().round(4)
    exact = poses.checked(rounded)[:, :3, :3]
    np.testing.assert_allclose(exact.transpose(0, 2, 1) @ exact, np.broadcast_to(np.eye(3), exact.shape), atol=1e-14)


def test_labels() -> None:
    keys = [set[str](), {"w"}, {"w", "d"}, {"s", "a"}, {"l"}, {"j", "k"}]
    rule = dialect("minwm")
    np.testing.assert_array_equal(labels.labels_of_poses(walked(keys, rule)), [0, 0, 9, 45, 72, 1, 8])
    assert labels.labels_of_keys([{"a"}, {"d"}]).tolist() == [0, 27, 36]  # minWM's table of strings
    assert labels.labels_of_poses(latent_poses("a*1,d*1", "minwm")).tolist() == [0, 36, 27]


def test_intrinsics_through_resize_and_crop() -> None:
    assert poses.cover((1280, 720), (832, 480)) == ((853, 480), (10, 0))
    rows = poses.cropped(np.array([[900.0, 900, 640, 360]]), (1280, 720), (832, 480))
    np.testing.assert_allclose(rows[0, 2:], (640 * 853 / 1280 - 10, 240))
    with pytest.raises(ValueError, match="looks like pixels"):
        poses.check_unit(rows, is_normalised=True)
    with pytest.raises(ValueError, match="looks normalised"):
        poses.check_unit(poses.normalised(rows, 832, 480), is_normalised=False)
    with pytest.raises(ValueError, match="above 0"):
        poses.intrinsics_rows([0, 1, 0.5, 0.5])


# ---- files -----------------------------------------------------------------------------------------------------------


def test_plain_pose_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", track().astype(np.float32))
    np.savez(tmp_path / "a.npz", w2c=poses.inverted(track()))
    np.save(tmp_path / "q.npy", poses.to_quaternions(track()))
    for name, convention in (("a.npy", "c2w"), ("a.npz", "w2c"), ("q.npy", "c2w")):
        np.testing.assert_allclose(files.read_poses(tmp_path / name, convention=convention).c2w, track(), atol=1e-6)
    with pytest.raises(ValueError, match="allowed c2w"):
        files.read_poses(tmp_path / "a.npy", convention="guess")
    with pytest.raises(ValueError, match="expected an array called c2w or poses"):
        files.read_poses(tmp_path / "a.npz", convention="c2w")
    with pytest.raises(ValueError, match="unknown ending"):
        (tmp_path / "a.txt").touch()
        files.read_poses(tmp_path / "a.txt", convention="c2w")


def npy(shape: tuple[int, ...], data: bytes = b"") -> bytes:
    """A .npy file whose header says `shape`, whatever follows."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def test_headers_that_lie_and_pickles_are_refused(tmp_path: Path) -> None:
    objects = io.BytesIO()
    np.save(objects, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name, data in {
        "huge": npy((10**12, 4, 4)),
        "short": npy((2, 4, 4), b"0"),
        "pickle": objects.getvalue(),
        "x": b"x",
    }.items():
        (tmp_path / f"{name}.npy").write_bytes(data)
        with pytest.raises(ValueError, match="is no array of numbers"):
            files.read_array(tmp_path / f"{name}.npy")
    (tmp_path / "x.npz").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"is no \.npz file"):
        files.read_arrays(tmp_path / "x.npz")


def test_a_zip_bomb_costs_nothing(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("c2w.npy", npy((1 << 25,), bytes(1 << 28)))
    cost = work_within(
        64,
        "try: files.read_arrays(arguments[0])\nexcept ValueError as error: print(error)",
        str(tmp_path / "bomb.npz"),
        setup="from causalreel.control import files",
    )
    assert "is larger than" in cost.output


def worldplay(count: int = 3) -> dict[str, Any]:
    camera = [[700.0, 0, 640], [0, 710, 360], [0, 0, 1]]
    return {str(i): {"extrinsic": pose.tolist(), "K": camera} for i, pose in enumerate(track(count))}


def test_worldplays_json(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(worldplay()), encoding="utf-8")
    found = files.read_worldplay(path)
    np.testing.assert_allclose(found.c2w, track(3), atol=1e-14)
    assert found.intrinsics is not None
    np.testing.assert_allclose(found.intrinsics, [[700 / 1280, 710 / 720, 0.5, 0.5]] * 3)
    with pytest.raises(ValueError, match="has 3 poses for 5 latent frames"):
        files.read_worldplay(path, latents=5)
    for key in ("K", "extrinsic"):
        broken = worldplay()
        del broken["1"][key]
        path.write_text(json.dumps(broken), encoding="utf-8")
        with pytest.raises(ValueError, match=f"entry '1' has no '{key}'"):
            files.read_worldplay(path)
    path.write_text(json.dumps({"0": {"extrinsic": [[1]], "K": []}}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"expected numbers \(4, 4\)"):
        files.read_worldplay(path)


def test_lingbots_folder(tmp_path: Path) -> None:
    np.save(tmp_path / "poses.npy", track(11))
    np.save(tmp_path / "intrinsics.npy", np.array([[500.0, 500, 416, 240]]))
    found = files.read_lingbot(tmp_path)
    np.testing.assert_allclose(found.c2w, track(11)[[0, 4, 8]], atol=1e-14)
    assert found.intrinsics is not None
    np.testing.assert_allclose(found.intrinsics, [[500 / 832, 500 / 480, 0.5, 0.5]] * 3)
    np.save(tmp_path / "intrinsics.npy", np.full((7, 4), 500.0))
    with pytest.raises(ValueError, match="has 7 rows for 11 poses"):
        files.read_lingbot(tmp_path)
    np.save(tmp_path / "wasd_action.npy", np.eye(4, dtype=np.int32))
    np.save(tmp_path / "ijkl_action.npy", np.full((4, 4), 0.5, dtype=np.float32))
    assert [sorted(keys) for keys in files.read_lingbot_actions(tmp_path)] == [["w"], ["a"], ["s"], ["d"]]
    np.save(tmp_path / "ijkl_action.npy", np.zeros((3, 4)))
    with pytest.raises(ValueError, match="has 3 rows"):
        files.read_lingbot_actions(tmp_path)


# ---- sessions and benchmarks -----------------------------------------------------------------------------------------


def session(
    frames: int = 37, reference: int = 0, controls: Any = (), text: str = "a lake", **more: Any
) -> dict[str, Any]:
    output = {"frames": frames, "height": 64, "width": 96}
    target = {"role": "target", "type": "video", "reference_frame_count": reference, "output": output, **more}
    said = {"role": "user", "type": "text", "content": text}
    return {"schema_version": 2, "sample_id": "s", "messages": [said, {**target, "controls": list(controls)}]}


def segments(*borders: int) -> dict[str, Any]:
    pairs = itertools.pairwise(borders)
    return {
        "type": "text_prompt_interval",
        "segments": [{"start": a, "end": b, "text": f" {a} "} for a, b in pairs],
    }


def keys(rows: int, value: Any = 1, columns: int = 8) -> dict[str, Any]:
    return {
        "type": "keyboard_direction_frame_interval",
        "action_keys": list(KEYS),
        "actions": [[value] * columns] * rows,
    }


def test_prompts_snap_to_latents() -> None:
    found = parse_session(session(controls=[segments(9, 23, 37)]))
    assert found.prompts == (("a lake", 3), ("9", 3), ("23", 4))
    assert found.chunks(2) == [(0, 1), (1, 3), (3, 5), (5, 6), (6, 8), (8, 10)]
    assert parse_session(session(controls=[segments(0, 7, 37)])).prompts == (("0", 2), ("7", 8))  # a tie goes down


def test_keys_go_to_the_latent_of_their_frames() -> None:
    found = parse_session(session(frames=8, reference=1, uri="a.png", controls=[keys(8, 0.5)])).keys
    assert found is not None
    assert found.shape == (3, 4, 8)
    assert (found[0] == 0).all()
    assert (found[1:] == 0.5).all()


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (session(frames=28), "expected 1 \\+ 4 N"),
        (session(reference=1, frames=28), "no uri"),
        (session(text="  "), "has no text"),
        (session(controls=[{"type": "mouse"}]), "unknown control of type mouse"),
        (session(controls=[segments(0, 37), segments(0, 37)]), "a second control"),
        (session(controls=[segments(0, 13)]), "end at frame 13, expected 37"),
        (session(controls=[segments(0, 13, 14, 37)]), "too short for a latent frame"),
        (session(controls=[keys(35)]), "has 35 rows of keys, expected 36"),
        (session(controls=[keys(36, 2)]), "numbers from 0 to 1"),
        (session(controls=[keys(36, True)]), "numbers from 0 to 1"),
        (session(controls=[keys(36, columns=7)]), "must be 8 numbers"),
        (session(frames=10**9), "allowed a whole number"),
        (session(output={"frames": 29, "height": 72, "width": 96}), "multiples of 32"),
        ({"schema_version": 1}, "expected 2"),
        ({"schema_version": 2, "messages": [1]}, "no message of role target"),
    ],
)
def test_a_session_that_cannot_be_is_one_line(document: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=rf"^session: [^\n]*{why}"):
        parse_session(document)


def test_a_session_file_names_line_and_sample(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(session()) + "\n\n" + json.dumps(session(frames=2)) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 3, s: has 2 frames"):
        read_sessions(path)
    path.write_text(json.dumps(session()), encoding="utf-8")
    assert [found.latents for found in read_sessions(path)] == [10]


def test_benchmark_lists(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(json.dumps([{"id": "a b", "caption": "x", "image": "i.png"}]), encoding="utf-8")
    assert read_benchmark(path) == [Item("a b", "x", None, tmp_path / "i.png")]
    path.write_text(json.dumps([{"id": "a b", "caption": "x"}, {"id": "a_b", "caption": "y"}]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"both give a_b\.mp4"):
        read_benchmark(path)
    path.write_text(json.dumps([{"id": 3, "caption": "x"}]), encoding="utf-8")
    with pytest.raises(ValueError, match="item 0: id is 3, expected text"):
        read_benchmark(path)
    assert manifest([Item("1", "x")], [7])["items"][0]["video"] == "1.mp4"
    assert [output_name(name) for name in ("w*3,d*2", "naïve", "  ", "x" * 120)] == [
        "w_3_d_2.mp4",
        "na_ve.mp4",
        "sample.mp4",
        "x" * 100 + ".mp4",
    ]


@pytest.mark.parametrize("name, text", [("minwm", "w*999999"), ("sana", "w-999999"), ("lingbot", "w-999999")])
def test_no_pose_is_made_that_nobody_uses(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A string may name a million frames; so many are never walked."""
    steps, step = [], Walk.step
    monkeypatch.setattr(Walk, "step", lambda self, keys: (steps.append(keys), step(self, keys))[1])
    assert len(latent_poses(text, name, latents=21)) == 21
    assert len(steps) <= 81
    with pytest.raises(ValueError, match=r"trajectory: leads through [\d,]+ latent frames, at most 10,000 can be used"):
        latent_poses(text, name)
    assert len(steps) <= 81


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_a_string_that_is_cut_gives_the_poses_of_the_whole(name: str) -> None:
    pieces = {
        "key*n": "w*9,l*7",
        "word-n": "w-9,right-7",
        "keys-n": "wl-23,none-5,j-11",
        "letters": "WWWLLLWWWJJJWWWWW",
    }
    text = pieces[dialect(name).grammar]
    whole = latent_poses(text, name)
    for latents in range(1, len(whole) + 1):
        np.testing.assert_allclose(latent_poses(text, name, latents=latents), whole[:latents], atol=1e-14)
