"""What a denoiser's run is made from: data, codec, networks by role; loaded, checked, known by fingerprints.

What is missing is said with the command that makes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from causalreel import config as configs
from causalreel import families
from causalreel.codecs.codec import Codec
from causalreel.data.compared import read_compared
from causalreel.data.manifest import NULL
from causalreel.data.prepare import read_info
from causalreel.data.shards import caption_place, load_prepared, shards
from causalreel.data.sources import LatentSource
from causalreel.data.streaming import PreparedSet, ShardSource, open_set
from causalreel.data.timed import Timed, readings, timed
from causalreel.families import MODELS
from causalreel.families.family import Family
from causalreel.fingerprint import fingerprint
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.presets import ModelConfig, preset
from causalreel.parallel.sharding import Team
from causalreel.rollout import chunk_sizes
from causalreel.train.adapters import adapt, read_beginnings, share_bases, tensors_of
from causalreel.train.codec_of import check_codec, maker_of_data, mark_of, open_codec
from causalreel.train.contents import Content
from causalreel.train.initial import RANDOM, Start, is_export, open_start, size_of
from causalreel.train.recipe import Recipe, resolve, shipped_recipes
from causalreel.train.sharded import together
from causalreel.train.stage import DataSource
from causalreel.train.stages.causal_ode import CausalODEConfig
from causalreel.train.stages.dmd import DMDConfig
from causalreel.types import Conditioning, LatentSpec, TextEncoder
from causalreel.weights.export import read_export
from causalreel.weights.identify import preset_of, size_in_words

ROLES = {
    "dmd": ("student", "critic", "teacher"),
    "causal_cd": ("student", "teacher"),
    "causal_scm": ("student", "teacher"),
    "causal_ode": ("student", "teacher"),
}
"""Networks a stage needs from outside; the others need a student only."""


@dataclass(frozen=True)
class Ingredients:
    """Everything a denoising stage is built from, on its device."""

    source: DataSource
    kind: str
    """What its rows hold: latents or trajectories."""
    spec: LatentSpec
    frames: int
    codec: Codec
    family: Family
    """Of the student."""
    null: Tensor
    """The unconditional text (1,K,E)."""
    roles: dict[str, DiTDenoiser]
    """Without storage where `starts` says what fills them."""
    starts: dict[str, Start]
    contents: tuple[Content, ...]
    """Fingerprints of all of them; none where the trainer does not check."""
    compared: dict[str, str]
    """Files of the data that hold what their hashes say, see `data.compared`."""
    team: Team

    def filled(self, role: str, device: torch.device) -> DiTDenoiser:
        """A role's network with its weights, whole in this process: for use before the training."""
        net = self.roles[role]
        if role in self.starts:
            net.to_empty(device=device)
            self.starts[role].fill(net)
        return net


def gather(recipe: Recipe, device: torch.device, team: Team | None = None, *, is_loaded: bool = True) -> Ingredients:
    """Read all of it, but for large networks, which are opened; ValueError, in one line, for what is missing, damaged
    or does not fit.

    is_loaded: put it on the device; else it stays on the CPU, for who only looks.
    """
    problems = missing(recipe)
    if problems:
        raise ValueError(problems[0])
    assert recipe.data is not None and recipe.codec is not None
    team = team or Team()
    with team.first_alone():  # which may fetch it
        codec = open_codec(recipe.codec)
    data = open_set(recipe.data, rows=recipe.rows)
    spec, frames = _clips_of(data, recipe)
    blank = None if data.kind is not None else (frames, *spec.shape)
    if spec.channels != codec.geometry.channels:
        raise ValueError(
            f"{recipe.data} has {spec.channels} latent channels, the codec {recipe.codec} {codec.geometry.channels}"
        )
    if (chunk := getattr(recipe.settings, "chunk", None)) is not None:
        chunk_sizes(frames, chunk)
    compute = _compute(recipe, device)
    adapted = read_beginnings(recipe.lora_init)
    with team.first_alone():  # which may fetch them
        starts = {role: open_start(recipe.init[role]) for role in wanted_roles(recipe) if role in recipe.init}
    roles = _roles(recipe, starts)
    device = device if is_loaded else torch.device("cpu")
    length = roles["student"].config.text_length
    family = _family(recipe)
    source, null, mark = (
        _held(data, family, device) if data.text_width is None else _streamed(data, device, length, blank)
    )
    for role, net in roles.items():
        _check_fits(role, net, spec, null.shape[2])
    _check_fields(source, roles, recipe.data)
    contents: tuple[Content, ...] = ()
    compared: dict[str, str] = {}
    if recipe.trainer.check:
        known = team.first(read_compared(Path(recipe.trainer.out)) if team.is_first else {})
        for part in together(team, lambda: data.verify(team.rank, team.size, known)):
            compared |= part
        _check_codec_of_data(recipe.data, recipe.codec)
        beginnings = {f"lora_init.{role}": lora for role, lora in adapted.items()}
        contents = (
            Content("data", str(recipe.data), mark),
            Content("codec", str(recipe.codec), fingerprint(codec.state_dict(), configs.dump(codec.config))),
            *(
                Content(f"init.{role}", start.place, team.first(start.fingerprint() if team.is_first else ""))
                for role, start in starts.items()
            ),
            *(Content(what, lora.source, fingerprint(tensors_of(lora))) for what, lora in beginnings.items()),
            Content("compute", f"arithmetic in {compute}", compute),
        )
    whole = recipe.trainer.optimisers.keys() - recipe.lora.keys()
    if recipe.lora:  # whole networks from here on, in every process
        places = {role: Path(recipe.init[role]).resolve() for role in starts}
        share_bases(roles, places, whole, lambda role: starts[role].fill(roles[role].to_empty(device="cpu")))
        starts.clear()
    for role, net in roles.items():
        _place(net, compute, device, is_trained=role in whole)
    for role, config in recipe.lora.items():
        adapt(role, roles[role], config, recipe.trainer.seed, adapted.get(role))
    return Ingredients(
        source, data.kind or "", spec, frames, codec.to(device), family, null, roles, starts, contents, compared, team
    )


def wanted_roles(recipe: Recipe) -> tuple[str, ...]:
    """Roles of networks that this run needs: trajectories that are there need no teacher."""
    roles = ROLES.get(recipe.stage, ("student",))
    if recipe.stage != "causal_ode" or recipe.data is None or "teacher" in recipe.init:
        return roles
    with contextlib.suppress(ValueError):
        return ("student",) if open_set(recipe.data).kind == "trajectories" else roles
    return roles


def networks(recipe: Recipe) -> list[ModelConfig]:
    """Sizes of the networks that a recipe trains or learns from, as far as their files are there; none for a codec."""
    if recipe.stage == "pretrain":
        return [preset(recipe.model)]
    found = []
    for folder in recipe.init.values():
        with contextlib.suppress(ValueError):
            found.append(size_of(folder))
    return found


# ---- what is missing, and how it is made


def missing(recipe: Recipe) -> list[str]:
    """What the run needs and does not find, one line each, with the command that makes it. Reads configs only."""
    problems: list[str] = []
    if recipe.stage == "codec":
        return []
    if recipe.data is None or recipe.codec is None:
        return [f"stage {recipe.stage} needs `data` (a prepared folder) and `codec` (a codec's export folder)"]
    try:
        shards(recipe.data)
    except ValueError:
        made = maker_of_data(recipe.codec, recipe.data, recipe.rows, recipe.world)
        problems.append(f"no prepared data in {recipe.data}: make it with `{made}`")
    try:
        check_codec(recipe.codec)
    except ValueError as error:
        there = "codec=tiny is the one that comes with the package" if recipe.world == "flat" else "give another"
        problems.append(f"{error}; {_maker(recipe.codec)}{there}")
    wanted = wanted_roles(recipe)
    for role in recipe.init:
        if role not in wanted:
            problems.append(f"init names the role {role!r}; stage {recipe.stage} takes {', '.join(wanted)}")
    for role in wanted:
        if role in recipe.init:
            try:
                size_of(recipe.init[role])
            except ValueError as error:
                problems.append(f"init.{role}: {error}{_maker(recipe.init[role], before='; ', after='')}")
        elif role != "student" or recipe.stage != "pretrain":
            problems.append(f"stage {recipe.stage} needs init.{role}: the export folder it starts from")
    return problems


def _maker(folder: Path, *, before: str = "", after: str = ", or ") -> str:
    """The command that writes this export, if a recipe of the package does; empty otherwise."""
    for name in shipped_recipes():
        if folder == Path(resolve(name).trainer.out) / "export":
            return f"{before}make it with `causalreel train {name}`{after}"
    return ""


# ---- loading and checking


def _clips_of(data: PreparedSet, recipe: Recipe) -> tuple[LatentSpec, int]:
    """The shape of a latent frame and the frames of a clip; ValueError for data that this stage cannot use."""
    is_self_made = isinstance(recipe.settings, DMDConfig) and recipe.settings.samples == "self_rollout"
    wanted = {"causal_ode": ("latents", "trajectories"), "dmd": ("latents", None)[: 1 + is_self_made]}
    allowed = wanted.get(recipe.stage, ("latents",))
    if data.kind not in allowed:
        held, needed = data.kind or "only prompts", " or ".join(kind or "prompts" for kind in allowed)
        raise ValueError(f"data: {data.folder} holds {held}, stage {recipe.stage} needs {needed}")
    if isinstance(recipe.settings, CausalODEConfig) and data.kind == "trajectories":
        states = len(recipe.settings.keep) + 2
        if data.shape[0] != states:
            raise ValueError(
                f"data: {data.folder} has trajectories of {data.shape[0]} states, settings.keep asks for "
                f"{states - 2}, the end point and the true clip: {states}"
            )
    batch = getattr(recipe.settings, "batch", 1)
    if data.rows < batch:
        raise ValueError(
            f"data: {data.folder} has {data.rows} clips{' (rows)' if recipe.rows else ''}, a batch has "
            f"settings.batch={batch}: prepare more clips or lower settings.batch"
        )
    if data.kind is None and getattr(recipe.settings, "given", 0):
        raise ValueError(
            f"settings.given needs true first frames, and {data.folder} holds only prompts: give 0 or clips"
        )
    if data.kind is None:
        return _clips_of_student(recipe.init["student"])
    return LatentSpec(*data.shape[-3:]), data.shape[-4]


def _clips_of_student(place: Path) -> tuple[LatentSpec, int]:
    """The clips that a student makes, as it says itself; as its family's released models where it says nothing."""
    if str(place) in MODELS:
        family, model = MODELS[str(place)]
        card = family.export(model)
    elif not str(place).startswith(RANDOM) and is_export(place):
        card = read_export(place)
    else:
        name = preset_of(size_of(place))
        likely = [(f, m) for f, m in MODELS.values() if m.preset == name]
        if not likely:
            raise ValueError(
                f"init.student: {place} does not say how large the clips are that it makes, and the data hold only "
                f"prompts: begin with an export or a released model"
            )
        card = likely[0][0].export(likely[0][1])
    return card.latent, card.frames


def _family(recipe: Recipe) -> Family:
    """The family of the network that is trained."""
    place = recipe.init.get("student", next(iter(recipe.init.values()), None))
    if place is None or str(place).startswith(RANDOM):
        return families.of_preset(recipe.model if place is None else str(place).removeprefix(RANDOM))
    if str(place) in MODELS:
        return MODELS[str(place)][0]
    if is_export(place):
        return families.of(read_export(place))
    config = size_of(place)
    name = preset_of(config)
    if name is None:
        raise ValueError(f"{place} holds {size_in_words(config)}, which no family of models has")
    return families.of_preset(name)


def _held(data: PreparedSet, family: Family, device: torch.device) -> tuple[DataSource, Tensor, str]:
    """A set without stored text, whose captions the family's encoder reads: small, and held on the device whole.

    -> the source, the unconditional text (1,K,E), the set's fingerprint.
    """
    held = load_prepared(data.folder, rows=data.rows)
    if family.text.files:
        raise ValueError(
            f"{data.folder} stores no text, which {family.text.name} would have to read from files again in every run: "
            f"`causalreel import --model` stores it"
        )
    encoder, captions = family.encoder(), [timed(line) for line in held.captions]
    reads = None
    if any(len(clip) > 1 for clip in captions):
        try:
            texts, reads = readings(captions, held.latents.shape[1])
        except ValueError as error:
            raise ValueError(f"captions of {data.folder}: {error}") from None
        reads = reads.to(device)
    else:
        texts = list(held.captions)
    text = _encode(encoder, texts, captions, data.folder)
    source = LatentSource(held.latents.to(device), Conditioning(text, held.fields).to(device), reads)
    return source, encoder.null(1).to(device), fingerprint({"latents": held.latents, **held.fields}, *held.captions)


def _streamed(
    data: PreparedSet, device: torch.device, length: int, blank: tuple[int, ...] | None
) -> tuple[DataSource, Tensor, str]:
    """A set with stored text, read row by row, its text padded to `length`; -> as `_held`. blank: see `ShardSource`.

    Its fingerprint is of the hashes in its manifest, and of file names and sizes for a set made by hand.
    """
    null = data.null()
    if null is None:
        raise ValueError(
            f"{data.folder} has no {NULL} with the unconditional text: `causalreel prepare` and `causalreel import "
            "--model` write it"
        )
    null = F.pad(null, (0, 0, 0, length - null.shape[1])).to(device)  # (1,K,E) -> (1,length,E)
    files = [f"{shard.path.name} {shard.path.stat().st_size}" for shard in data.shards]
    mark = data.manifest.fingerprint if data.manifest else fingerprint({}, *files)
    return ShardSource(data, length=length, device=device, blank=blank), null, fingerprint({}, mark, str(data.rows))


def _encode(encoder: TextEncoder, texts: Sequence[str], captions: Sequence[Timed], data: Path) -> Tensor:
    """The texts (R,K,E); ValueError naming file and line of the first of the clips' captions that cannot be read."""
    try:
        return torch.cat([encoder.encode(texts[i : i + 4096]) for i in range(0, len(texts), 4096)])
    except ValueError:
        for row, clip in enumerate(captions):
            try:
                encoder.encode([text for _, text in clip])
            except ValueError as error:
                raise ValueError(f"captions of {data}: {caption_place(data, row)}: {error}") from None
        raise


def _roles(recipe: Recipe, starts: dict[str, Start]) -> dict[str, DiTDenoiser]:
    """The stage's networks in float32: without storage, or new ones on the CPU."""
    roles = {}
    for role in wanted_roles(recipe):
        if role in starts:
            roles[role] = starts[role].denoiser()
        else:
            with torch.random.fork_rng():
                torch.manual_seed(recipe.trainer.seed)
                roles[role] = DiTDenoiser(preset(recipe.model))
    return roles


def _compute(recipe: Recipe, device: torch.device) -> str:
    if recipe.compute == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    return recipe.compute


def _place(net: DiTDenoiser, compute: str, device: torch.device, *, is_trained: bool) -> None:
    """On the device, if they have storage; weights that are trained stay float32, frozen ones take the type that is
    computed in."""
    net.compute = torch.bfloat16 if compute == "bfloat16" else None
    device = net.model.device if net.model.device.type == "meta" else device
    net.to(device) if is_trained or net.compute is None else net.to(device, net.compute)
    net.requires_grad_(is_trained)


def _check_fits(role: str, net: DiTDenoiser, spec: LatentSpec, text_width: int) -> None:
    if (net.config.channels, net.config.text_dim) != (spec.channels, text_width):
        raise ValueError(
            f"{role} takes {net.config.channels} latent channels and text of width {net.config.text_dim}, "
            f"the data have {spec.channels} and {text_width}"
        )
    if spec.height % net.config.patch or spec.width % net.config.patch:
        raise ValueError(
            f"{role} takes latents whose sides are multiples of {net.config.patch}, "
            f"the data have {spec.height} x {spec.width}"
        )


def _check_fields(source: DataSource, roles: Mapping[str, DiTDenoiser], data: Path) -> None:
    """ValueError for a network that takes cameras or keys that the data lack, or lacks what takes theirs."""
    fields = source.batch(torch.tensor([0])).conditioning.fields
    for role, net in roles.items():
        if lacking := sorted(net.model.fields - fields.keys()):
            raise ValueError(f"{role} takes {', '.join(lacking)}, which {data} does not hold: give data with cameras")
        if odd := sorted(fields.keys() - net.model.fields):
            raise ValueError(
                f"{data} holds {', '.join(odd)}, which {role} does not take: start from a network that does"
            )


def _check_codec_of_data(data: Path, codec: Path) -> None:
    """ValueError if the data say that another codec made them; data made by hand say nothing."""
    made_by = read_info(data).get("codec")
    if made_by is not None and made_by != mark_of(codec):
        raise ValueError(f"{data} was encoded with another codec than {codec}: give the one that made it")
