"""c9's trajectory strings and c21: control strings and files of several projects to poses, labels and spans."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalreel.control import files, labels, poses, strings
from causalreel.control.benchmarks import output_name
from causalreel.control.poses import Array
from causalreel.control.sessions import TimedSession, parse_session, read_sessions
from causalreel.foreign import parse_json
from causalreel.verify import cases_network, cases_rollout, cases_training
from causalreel.verify.case import Case, Findings

FLOAT32 = 1e-6
ROUNDED = 2e-4
"""Of files whose rotations were written with four digits: each library makes them exact in its own way."""

WORLDPLAY_INTRINSICS = (969.6969696969696 / 1920, 969.6969696969696 / 1080, 0.5, 0.5)
MINWM_INTRINSICS = {  # the first version keeps them in float32
    "v0.1": (float(np.float32(0.5050505)), float(np.float32(0.89786756)), 0.5, 0.5),
    "v0.2": (0.5, 0.5, 0.5, 0.5),
}


def cameras(case: Case) -> Callable[[Case, Findings], None] | None:
    """c9: which part of it a case is, from what it holds."""
    if "strings" in case.extra:
        return pose_strings
    if "in.noise" in case.tensors:
        return cases_rollout.few_step
    if case.draws():
        return cases_training.flow_matching
    return cases_network.teacher_forcing if "in.clean" in case.tensors else cases_network.bidirectional


def pose_strings(case: Case, found: Findings) -> None:
    """c9: strings of minWM, of WorldPlay, and of one letter a pixel frame."""
    for name, text in case.extra["strings"].items():
        if name.startswith("stepwise"):
            made = strings.latent_poses(text, "minwm")
            found.add(f"out.{name}.viewmats", _tensor(poses.inverted(made)))
            found.add(f"out.{name}.Ks", _intrinsics(MINWM_INTRINSICS["v0.1"], len(made)))
        elif name.startswith("dash"):
            found.add(f"out.{name}.c2w", _tensor(strings.latent_poses(text, "worldplay")))
        else:
            made = strings.latent_poses(text, "letters")
            rule = strings.dialect("letters")
            found.add(f"out.{name}.w2c", _tensor(poses.inverted(strings.poses(strings.held(text, rule), rule))))
            found.add(f"out.{name}.latent_w2c", _tensor(poses.inverted(made[1:])))
            found.add(f"out.{name}.latent_c2w_with_first", _tensor(made))
    found.add("out.pixelwise.default_K", _intrinsics(WORLDPLAY_INTRINSICS, 1)[0])


def controls(case: Case, found: Findings) -> None:
    """c21: every string and file in every reading that was recorded; what must be refused is refused."""
    _minwm(case, found)
    _worldplay(case, found)
    _lingbot(case, found)
    _sana(case, found)
    _zing(case, found)
    _quaternions(case, found)
    for name, wanted in case.extra.get("minwm_benchmark_output_names", {}).items():
        found.add_exact(f"output name of {name!r}", output_name(name), wanted)
    for number, entry in enumerate(case.document.get("must_be_refused", [])):
        found.add_exact(f"refused.{number} {entry}", _is_refused(case, entry), True)


def _minwm(case: Case, found: Findings) -> None:
    rule = strings.dialect("minwm")
    for name, text in case.extra.get("minwm", {}).items():
        made = strings.latent_poses(text, "minwm")
        found.add(f"out.{name}.w2c", _tensor(poses.inverted(made)))
        for version, row in MINWM_INTRINSICS.items():
            found.add(f"out.{name}.K_default_{version}", _intrinsics(row, len(made)))
        held = strings.held(text, rule)
        found.add(f"out.{name}.labels_from_string", _tensor(labels.labels_of_keys(held)))
        found.add(f"out.{name}.labels_from_poses", _tensor(labels.labels_of_poses(made, labels.STILL["minwm"])))


def _worldplay(case: Case, found: Findings) -> None:
    texts = case.extra.get("worldplay", {})
    for name, text in texts.items():
        if name.endswith(".pixel_frames"):
            continue
        made = strings.latent_poses(text, "worldplay")
        found.add(f"out.{name}.w2c", _tensor(poses.inverted(made)))
        found.add(f"out.{name}.K", _intrinsics(WORLDPLAY_INTRINSICS, len(made)))
        found.add(f"out.{name}.action", _tensor(labels.labels_of_poses(made)))
        frames = texts.get(f"{name}.pixel_frames")
        if isinstance(frames, int):
            found.add_exact(f"{name}.pixel_frames", 1 + strings.FRAMES * (len(made) - 1), frames)
    if found.wants("out.worldplay_json.w2c"):
        track = files.read_worldplay(_file(case, "worldplay_json", "worldplay_traj.json"))
        found.add("out.worldplay_json.w2c", _tensor(track.w2c))
        found.add("out.worldplay_json.w2c_relative", _tensor(track.relative.w2c))
        found.add("out.worldplay_json.K", _matrices(track))
        found.add("out.worldplay_json.action", _tensor(labels.labels_of_poses(track.c2w)))


def _lingbot(case: Case, found: Findings) -> None:
    rule = strings.dialect("lingbot")
    for name, entry in case.extra.get("lingbot", {}).items():
        text = entry["string"]
        held = strings.padded(strings.held(text, rule))
        for keys in ("wasd", "ijkl"):
            found.add(f"out.{name}.{keys}", torch.tensor([[float(k in frame) for k in keys] for frame in held]))
        walked = strings.poses(held, rule)
        found.add(f"out.{name}.c2w_pixel", _tensor(walked))
        made = strings.latent_poses(text, "lingbot")
        found.add(f"out.{name}.w2c_latent", _tensor(poses.inverted(made)))
        plain = walked[: len(held) : strings.FRAMES]
        found.add(f"out.{name}.w2c_latent_every_4th", _tensor(poses.inverted(plain)))
        found.add(f"out.{name}.framewise_normalised", _tensor(poses.motions(made)))
        found.add_exact(f"{name}.frames_in_string", len(strings.held(text, rule)), entry["frames_in_string"])
        found.add_exact(f"{name}.latent_frames", len(made), entry["latent_frames"])
        times = strings.latent_times(len(walked), "even")
        found.add_exact(f"{name}.times", bool(np.allclose(times, entry["pixel_frame_of_latent"], atol=1e-9)), True)
    if not found.wants("out.lingbot_files.w2c_latent"):
        return
    folder = _file(case, "lingbot_files", "lingbot")
    track = files.read_lingbot(folder)
    found.add("out.lingbot_files.w2c_latent", _tensor(track.w2c), limit=ROUNDED)
    found.add("out.lingbot_files.w2c_latent_relative", _tensor(track.relative.w2c), limit=ROUNDED)
    found.add("out.lingbot_files.framewise_normalised", _tensor(poses.motions(track.c2w)), limit=ROUNDED)
    first = files.read_lingbot(folder, per_frame=False).intrinsics
    found.add("out.lingbot_files.K_normalised_first_row", _tensor(first), limit=FLOAT32)
    found.add("out.lingbot_files.K_normalised_per_frame", _tensor(track.intrinsics), limit=FLOAT32)
    walked = files.lingbot_walk(files.read_lingbot_actions(folder))
    found.add("out.lingbot_files.c2w_pixel_from_actions", _tensor(walked))


def _sana(case: Case, found: Findings) -> None:
    rules = {"first_rule": strings.dialect("sana"), "later_rule": strings.dialect("sana-2")}
    rules["later_rule_no_smoothing"] = strings.steady(rules["later_rule"])
    for name, text in case.extra.get("sana", {}).items():
        for kind, rule in rules.items():
            walked = strings.poses(strings.held(text, rule), rule)
            found.add(f"out.{name}.c2w_pixel_{kind}", _tensor(walked))
            found.add(f"out.{name}.w2c_latent_{kind}", _tensor(poses.inverted(walked[:: strings.FRAMES])))
    said = case.extra.get("sana_npz")
    if not said:
        return
    source, target = tuple(said["source_size_wh"]), tuple(said["target_size_wh"])
    track = files.read_sana(case.folder / said["file"], source, target)
    resized, offsets = poses.cover(source, target)
    found.add_exact("sana_npz.resized_wh", list(resized), said["resized_wh"])
    found.add_exact("sana_npz.crop_left_top", list(offsets), said["crop_left_top"])
    found.add("out.sana_npz.w2c_pixel_relative", _tensor(track.w2c), limit=FLOAT32)
    for stride in (4, 8):
        found.add(f"out.sana_npz.w2c_latent_relative_stride{stride}", _tensor(track.every(stride).w2c), limit=FLOAT32)
    rows = files.read_arrays(case.folder / said["file"])["intrinsics"]
    pixels = poses.cropped(poses.intrinsics_rows(rows), source, target)
    found.add("out.sana_npz.K_pixels_after_crop", _tensor(pixels), limit=FLOAT32)
    found.add("out.sana_npz.K_normalised_latent_stride4", _tensor(track.every(4).intrinsics), limit=FLOAT32)


def _zing(case: Case, found: Findings) -> None:
    recorded = case.extra.get("zing")
    if not recorded:
        return
    sessions = {session.name: session for session in read_sessions(_file(case, "zing", "zing.jsonl"))}
    for name, entry in recorded.items():
        session: TimedSession = sessions[name]
        found.add_exact(f"zing.{name}.latent_frames", session.latents, entry["latent_frames"])
        found.add_exact(f"zing.{name}.prompts", [text for text, _ in session.prompts], entry["prompts"])
        found.add_exact(f"zing.{name}.prompt_lengths", [n for _, n in session.prompts], entry["prompt_lengths"])
        for size, key in ((2, "chunk_spans"), (3, "chunk_spans_3_per_block")):
            found.add_exact(f"zing.{name}.{key}", session.chunks(size), [tuple(span) for span in entry[key]])
        if session.keys is not None:
            found.add(f"out.zing.{name}.action_windows", torch.from_numpy(session.keys), limit=FLOAT32)


def _quaternions(case: Case, found: Findings) -> None:
    if "in.quaternion_poses_w2c" not in case.tensors:
        return
    rows = case.tensors["in.quaternion_poses_w2c"].double().numpy()
    w2c = poses.from_quaternions(rows)
    first = poses.relative(poses.inverted(w2c))
    found.add("out.quaternion.viewmats", _tensor(poses.inverted(first)), limit=FLOAT32)
    for name in [name for name in case.tensors if name.startswith("out.quaternion.interpolated_")]:
        count = len(case.tensors[name])
        spaced = np.arange(len(rows)) * (count - 1) / (len(rows) - 1)
        made = poses.to_quaternions(poses.resampled(w2c, np.arange(count), spaced))
        sign = np.sign((made[:, 3:] * case.tensors[name][:, 3:].double().numpy()).sum(1, keepdims=True))
        made[:, 3:] *= sign  # q and -q are the same rotation
        found.add(name, _tensor(made), limit=FLOAT32)


# ---- refusals --------------------------------------------------------------------------------------------------------


def _is_refused(case: Case, entry: Mapping[str, Any]) -> bool:
    kind, path = entry["format"], case.folder / str(entry.get("file", ""))
    readers: dict[str, Callable[[], object]] = {
        "worldplay_json": lambda: files.read_worldplay(path),
        "lingbot_files": lambda: _lingbot_file(path),
        "sana_npz": lambda: files.read_sana(path, (1280, 720), (832, 480)),
        "zing": lambda: _zing_line(path, str(entry.get("sample_id"))),
    }
    read = readers.get(kind, lambda: strings.latent_poses(entry["string"], kind, latents=entry.get("latent_frames")))
    try:
        read()
    except ValueError:
        return True
    return False


def _lingbot_file(path: Path) -> None:
    given = files.read_array(path)
    if "intrinsics" in path.name:
        count = len(files.read_array(path.parent / "lingbot" / "poses.npy"))
        files.lingbot_intrinsics(given, count)
    else:
        poses.checked(given)


def _zing_line(path: Path, sample: str) -> None:
    """Read the line of one sample alone."""
    for line in path.read_text(encoding="utf-8").splitlines():
        document = parse_json(line, "session")
        if document["sample_id"] == sample:
            parse_session(document)


def _file(case: Case, key: str, name: str) -> Path:
    said = case.extra.get(key)
    file = said.get("file") if isinstance(said, Mapping) else None
    return case.folder / (file or f"{case.name.split('_')[0]}_files/{name}")


def _tensor(value: Array | np.ndarray | None) -> Tensor:
    assert value is not None
    return torch.from_numpy(np.ascontiguousarray(value))


def _intrinsics(row: tuple[float, ...], count: int) -> Tensor:
    return _tensor(poses.as_matrices(np.tile(np.array(row), (count, 1))))


def _matrices(track: files.Track) -> Tensor:
    assert track.intrinsics is not None
    return _tensor(poses.as_matrices(track.intrinsics))
