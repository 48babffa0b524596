"""c15 and c23: sets of other projects imported and read as training reads them, and files that must be refused."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causalreel.codecs.wan_vae import WAN21_MEAN, WAN21_STD
from causalreel.data.shards import read_ragged_text
from causalreel.data.streaming import ShardSource, open_set
from causalreel.types import ClipBatch
from causalreel.verify.case import Case, Check, Findings, relative_error
from causalreel.verify.words import message_of, refusal
from causalreel.weights.sets import Wanted, find_rows
from causalreel.weights.sets.importing import import_set

CLIPS = Wanted(dtype=torch.float32)
NORMALISED = 1e-6
"""How near latents must be that were normalised here."""
WHOLE = Wanted(trajectories=True, dtype=torch.float32)


def lmdb(case: Case, found: Findings) -> None:
    """Every folder of the case, as trajectories and as true clips; prompts byte for byte."""
    for name, told in case.config["folders"].items():
        path = case.folder / name
        if "expected" in told:
            _without_shape(path, told, found)
            continue
        is_ode = told["reader"] != "LatentLMDBDataset"
        latents, captions = _imported(path, WHOLE if is_ode else CLIPS)
        found.add_exact(f"{name}: length", len(captions), told.get("length"))
        listed = [prompt for prompt in told["prompts"] if prompt != "..."]
        found.add_exact(f"{name}: prompts", captions[: len(listed)], listed)
        if "followed by (i mod 40) times U+957F" in str(told.get("prompt_rule")):
            wanted = [f"prompt number {i} " + "\u957f" * (i % 40) for i in range(len(captions))]
            found.add_exact(f"{name}: prompt_rule", captions, wanted)
        for output in _outputs_of(name):
            found.add(output, torch.stack(latents))
            for number, clip in enumerate(latents):
                found.add(f"{output}.{number}", clip)
        if is_ode:
            for number, clip in enumerate(_imported(path, CLIPS)[0]):
                found.add(f"out.clean_latent_of_{name.removeprefix('c15_')}.{number}", clip)


def _outputs_of(name: str) -> list[str]:
    """What the outputs of a folder are called: c15_ode_lmdb -> out.ode_latent."""
    kind = name.removeprefix("c15_").removesuffix("_lmdb")
    return {"latent": ["out.clean_latent"], "ode": ["out.ode_latent"]}.get(
        kind, [f"out.{kind}_ode_latent", f"out.{kind}_ode_latents", f"out.{kind}_latent"]
    )


def _without_shape(path: Path, told: Mapping[str, Any], found: Findings) -> None:
    """Refused as it is, read with the row shape given from outside."""
    expected = {"reason": str(told["expected"]).split(":")[0]}
    found.add_exact(f"{path.name} refused", refusal(lambda: _imported(path, WHOLE), path, expected), "")
    if "true_row_shape" in told:
        shape = tuple(told["true_row_shape"])
        read = [row.read().clip for row in find_rows(path, Wanted(trajectories=len(shape) == 5, shape=shape))]
        shapes = [None if clip is None else tuple(clip.shape) for clip in read]
        found.add_exact(f"{path.name} with its shape", shapes, [shape] * int(told.get("rows", len(read))))


def foreign(case: Case, found: Findings) -> None:
    """rCM's tars, FastVideo's parquet, musubi's cache; files to be refused."""
    folder, config = case.folder / f"{case.name.split('_')[0]}_latents", case.config
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        for name in config["rcm"]["files"]:  # of a folder with others
            (home / name).write_bytes((folder / name).read_bytes())
        _compare(found, "out.rcm", home, config["rcm"]["prompts"], case)
    odd, whole = config["odd_order"], config["trajectory"]
    _compare(found, "out.odd_order", folder / odd["file"], [odd["prompt"]], case)
    _compare(found, "out.trajectory", folder / whole["file"], None, case, clip="clean")
    found.left_out = ("out.trajectory.latent",)  # its other entries, which no format explains
    path = folder / config["fastvideo"]["file"]
    _compare(found, "out.fastvideo", path, config["fastvideo"]["captions"], case)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (WAN21_MEAN, WAN21_STD))
    for number, clip in enumerate(_imported(path, CLIPS)[0]):
        raw = f"out.fastvideo.{number}.latent_raw"
        if found.wants(raw):  # stored before normalisation, normalised here
            is_same = torch.allclose(clip * std + mean, case.tensors[raw], rtol=0, atol=1e-5)
            found.add_exact(f"{raw} (back)", is_same, True)
            found.seen.add(raw)
    samples = config["musubi"]["samples"]
    _compare(
        found,
        "out.musubi",
        folder / "musubi",
        [s["caption"] for s in samples],
        case,
        names=[s["latent_file"] for s in samples],
    )
    for entry in case.document["must_be_refused"]:
        path = folder / entry["file"]
        said = message_of(lambda: _imported(path, CLIPS))  # noqa: B023
        is_one_line = path.name in said and "\n" not in said
        found.add_exact(f"{entry['file']} refused in one line that names it", is_one_line, True)
        if "one by one" in str(entry["reason"]):  # as a set it is refused, alone each is read
            found.add_exact(f"{entry['file']} one by one", len([row.read() for row in find_rows(path)]) > 1, True)


def _compare(
    found: Findings,
    output: str,
    path: Path,
    captions: Sequence[str] | None,
    case: Case,
    *,
    clip: str = "latent",
    names: Sequence[str] | None = None,
) -> None:
    """A set imported, text padded as the case has it. names: files in the case's order, where the set has another."""
    lengths = [value.shape[0] for name, value in case.tensors.items() if name.startswith(output) and "embeds" in name]
    with tempfile.TemporaryDirectory() as scratch:
        latents, stored, text, sources = _read(path, CLIPS, Path(scratch), max(lengths, default=0))
    order = range(len(stored)) if names is None else [sources.index(name) for name in names]
    if captions is not None:
        found.add_exact(f"{output}: captions", [stored[at] for at in order], list(captions))
    for number, at in enumerate(order):
        for name in (f"{output}.{number}", output):
            if found.wants(f"{name}.{clip}"):
                limit = NORMALISED if output == "out.fastvideo" else case.tolerance
                error = relative_error(latents[at], case.tensors[f"{name}.{clip}"])
                found.checks.append(Check(f"{name}.{clip}", error, limit))
                found.seen.add(f"{name}.{clip}")
                if text is not None:
                    found.add(f"{name}.prompt_embeds", text[at])
                    found.add(f"{name}.mask", text[at].ne(0).any(1).float())


def _imported(path: Path, wanted: Wanted) -> tuple[list[Tensor], list[str]]:
    with tempfile.TemporaryDirectory() as scratch:
        latents, captions, _, _ = _read(path, wanted, Path(scratch), 0)
    return latents, captions


def _read(
    path: Path, wanted: Wanted, scratch: Path, length: int
) -> tuple[list[Tensor], list[str], Tensor | None, list[str]]:
    """A set imported into `scratch` and read back: clips in float32, captions, text (R,length,E), files."""
    import_set(path, scratch, wanted=wanted, shard=2)
    data = open_set(scratch)
    latents = [shard.clip(row).float() for shard in data.shards for row in range(shard.clips)]
    sources = [source for shard in data.shards for source in read_ragged_text(shard, "sources")]
    if not data.text_width or not length:
        return latents, data.captions(), None, sources
    source = ShardSource(data, length=length)
    batch = source.batch(torch.arange(data.rows))
    source.close()
    assert isinstance(batch, ClipBatch)
    if not torch.equal(batch.latents.float(), torch.stack(latents)):
        raise ValueError(f"{path}: rows read for training differ from those in the shards")
    return latents, data.captions(), batch.conditioning.text.float(), sources
