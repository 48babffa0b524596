"""Models by name: those that come with the package, released full-size ones, and folders written by `save_export`."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from causalreel import families
from causalreel.families import MODELS, Family
from causalreel.families.family import ReleasedModel
from causalreel.families.files import model_files
from causalreel.foreign import shown
from causalreel.infer.estimate import MemoryRequest, weight_bytes
from causalreel.infer.fits import check, require_bfloat16
from causalreel.infer.manner import Manner, beyond
from causalreel.infer.pipeline import Pipeline
from causalreel.infer.released import Choices, choose_dtype, load_released, open_codec, open_text
from causalreel.infer.schedule import Schedule, adapt, schedule, step_count
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.registry import described
from causalreel.nn.policies.window import Context
from causalreel.nn.presets import ModelConfig
from causalreel.types import Geometry, TextEncoder
from causalreel.weights import export as exports
from causalreel.weights.export import (
    ALIASES,
    DEFAULT_VARIANTS,
    Export,
    Sampling,
    codec_file,
    load_codec,
    load_export,
    read_codec,
    read_export,
)

if TYPE_CHECKING:
    from causalreel.infer.loras import Found
    from causalreel.weights.lora_files import Asked

log = logging.getLogger(__name__)


def encoder_of(export: Export) -> TextEncoder | None:
    """The text encoder of a model, where it needs no files: what its prompts may say is known without weights."""
    family = families.of(export)
    return None if family.text.files else family.encoder()


def variants() -> dict[str, Path]:
    """Names of the embedded models, such as `tiny/frame-2step` -> their folders."""
    return exports.embedded()


def load(
    model: str | Path = "tiny",
    *,
    steps: int | Sequence[float] | None = None,
    chunk: int | None = None,
    device: torch.device | str | None = None,
    weights: str | Path | None = None,
    wan_dir: str | Path | None = None,
    decoder: str | None = None,
    height: int | None = None,
    width: int | None = None,
    which: str | None = None,
    prompt_cache: Path | None = None,
    before_loading: Callable[[Export, torch.device], None] | None = None,
    gpus: int = 1,
    loras: Sequence[Asked] = (),
    adjustable: bool = True,
    policy: str | ContextPolicy | None = None,
    manner: Manner = Manner(),
) -> Pipeline:
    """A pipeline for an embedded model (`tiny`, `tiny/frame-1step`, ...), a released one or an export's folder.

    steps, chunk: of a family such as `tiny` they choose the variant trained for them; where there is none, the nearest
    one is used with them, which is logged. device: None is CUDA if there is one, else the CPU. gpus: how many processes
    will share the pipeline (`infer.distributed.spread`), for the check of memory.

    loras: adapters to merge into the weights: files, FILE:STRENGTH, or (file, strength); see docs/lora.md. adjustable:
    keep the weights that they change, so that `Pipeline.set_loras` can set other strengths.

    policy: another context policy than the model's, such as "infinity-rope:cache_chunks=5"; see docs/long-video.md.
    manner: that, and other plans and noisy context, as `infer.manner.Manner`.

    On a CPU the embedded models are fastest with one thread, on a busy machine by far: `torch.set_num_threads(1)`. The
    command line does it; a program's own threads are not touched here.

    The other arguments are for released models (`causal-forcing/chunkwise` ..., see `families.MODELS`) and
    explained at `infer.released.Choices`; their files are fetched from the hub where no argument says where they are.
    """
    looks = before_loading or partial(_check_released, decoder=decoder, gpus=gpus)
    choices = Choices(weights, wan_dir, decoder, height, width, which, prompt_cache, looks)
    sampled: dict[str, Any] = {"steps": steps, "chunk": chunk}
    manner = manner if policy is None else replace(manner, policy=policy)
    known = profile(model, **sampled, manner=manner) if manner != Manner() else None  # refused before it is loaded
    found = _find_loras(loras, profile(model, **sampled).export.model) if loras else ()
    if str(model) in MODELS:
        pipeline = load_released(*MODELS[str(model)], choices, choose_device(device), **sampled)
    else:
        folder = find(model, **sampled)
        _refuse(model, choices, _family(folder))
        pipeline = _load_export(folder, choices, choose_device(device), gpus=gpus, **sampled)
    if known is not None:
        pipeline.denoiser.context = known.export.context
        export, sampling = manner.of(pipeline.export, pipeline.sampling)
        pipeline = replace(pipeline, export=export, sampling=sampling)
    if found:
        from causalreel.infer.loras import Loras

        pipeline = replace(pipeline, loras=Loras(pipeline.denoiser, found, is_adjustable=adjustable))
    return pipeline


def _find_loras(asked: Sequence[Asked], size: ModelConfig) -> Found:
    from causalreel.infer.loras import find_loras  # imported by who asks for one

    return find_loras(asked, size)


def _load_export(
    folder: Path,
    choices: Choices,
    device: torch.device,
    *,
    steps: int | Sequence[float] | None,
    chunk: int | None,
    gpus: int,
) -> Pipeline:
    """The pipeline of an export's folder. Files that its family shares are found as those of released models."""
    family, decoder = _family(folder), choices.decoder
    require_bfloat16(device)
    _check_memory(lambda: request_for(folder, steps=steps, chunk=chunk, gpus=gpus, decoder=decoder), device)
    files = None
    if family.text.files:
        own = ReleasedModel(str(folder), "", (), None, "", read_export(folder).sampling)
        files = model_files(family, own, weights=folder, wan_dir=choices.wan_dir, decoder=decoder)
    denoiser, export = load_export(folder, compute=torch.bfloat16 if device.type == "cuda" else None)
    if files is not None and (decoder is not None or export.codec in family.decoders):
        codec = open_codec(family, family.decoder(decoder), files, device, choose_dtype(device))
    else:
        codec = load_codec(codec_file(folder, export.codec)).to(device)
    if codec.geometry.channels != export.latent.channels:
        raise ValueError(
            f"{folder}: the codec has {codec.geometry.channels} channels, the model {export.latent.channels}"
        )
    sampling = adapt(export.sampling, steps=steps, chunk=chunk)
    if sampling != export.sampling:
        log.info("%s was trained for %s; now using %s", export.name, _describe(export.sampling), _describe(sampling))
    text = open_text(family, export, files, choices.prompt_cache, device)
    return Pipeline(denoiser.to(device), export, sampling, codec, text, device)


def _family(folder: Path) -> Family:
    """The family of an export; ValueError, naming the folder, if there is none such."""
    try:
        return families.of(read_export(folder))
    except ValueError as error:
        raise ValueError(f"{error}" if str(folder) in str(error) else f"{folder}: {error}") from None


@dataclass(frozen=True)
class Profile:
    """What is known of a model before its weights are read."""

    export: Export
    sampling: Sampling
    """How it will be sampled."""
    geometry: Geometry
    """What its latents stand for."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its videos in pixels."""
        return self.geometry.size_of(self.export.latent)

    def schedule(self, frames: int | None, prefix: int = 0) -> Schedule:
        """How a clip of `frames` pixel frames would be made behind `prefix` latent frames; ValueError if it cannot."""
        how: dict[str, Any] = {"trained": self.export.frames, "context": self.export.context}
        how["longer"] = beyond(self.export, self.sampling)
        return schedule(self.sampling, self.geometry, **how, frames=frames, prefix=prefix)


def profile(
    model: str | Path,
    *,
    steps: int | Sequence[float] | None = None,
    chunk: int | None = None,
    height: int | None = None,
    width: int | None = None,
    manner: Manner = Manner(),
) -> Profile:
    """What `load` would load, from its config alone."""
    if str(model) in MODELS:
        family, row = MODELS[str(model)]
        export, geometry = family.export(row, height=height, width=width), family.geometry
    else:
        folder = find(model, steps=steps, chunk=chunk)
        export = read_export(folder)
        geometry = _codec_sizes(folder, export).geometry
    export, sampling = manner.of(export, adapt(export.sampling, steps=steps, chunk=chunk))
    return Profile(export, sampling, geometry)


def _codec_sizes(folder: Path, export: Export) -> Any:
    """Sizes of the codec that an export names: its family's, or one that was saved."""
    released = _family(folder).decoders.get(export.codec)
    return released.sizes if released and released.file else read_codec(codec_file(folder, export.codec)).codec


def _check_memory(ask: Callable[[], MemoryRequest], device: torch.device) -> None:
    """ValueError if what is asked for plainly does not fit on the GPU; models small beside it are not looked at."""
    if device.type != "cuda":
        return
    request, (free, _) = ask(), torch.cuda.mem_get_info(device)
    if weight_bytes(request.model) > free / 10:
        check(request, free, where=torch.cuda.get_device_name(device))


def _check_released(export: Export, device: torch.device, *, decoder: str | None, gpus: int) -> None:
    """As `_check_memory`, for a clip as long as those of training."""
    asked = _asked_by(export, export.sampling) | {"context": export.context, "frames": export.frames}
    _check_memory(lambda: MemoryRequest(**asked, **_decoding(families.of(export), decoder), gpus=gpus), device)


def _asked_by(export: Export, sampling: Sampling) -> dict[str, Any]:
    """The fields of a `MemoryRequest` that a model decides."""
    return {
        "model": export.model,
        "latent": export.latent,
        "chunk": sampling.chunk,
        "steps": step_count(sampling),
        "joint": step_count(sampling) if sampling.plan == "rolling" else 1,
        "guided": sampling.guidance != 1,
    }


def _decoding(family: Family, decoder: str | None) -> dict[str, Any]:
    """The fields of a `MemoryRequest` that say what makes the pixels and reads the prompt of a released model."""
    sizes = None if decoder == "none" else family.decoder(decoder).sizes
    others = tuple((name, other.sizes) for name, other in family.decoders.items() if other != family.own)
    text = {"text_encoder_bytes": family.text.bytes} if family.text.files else {"text_encoder": "none"}
    return {"decoder": sizes, "decoders": others, **text}


def request_for(
    model: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | Sequence[float] | None = None,
    chunk: int | None = None,
    window: int | None = None,
    decoder: str | None = None,
    **options: Any,
) -> MemoryRequest:
    """What a video of `model` (as for `load`, or wan-1.3b and wan-14b) asks of memory; None: its own choice.

    height, width and frames are pixels and pixel frames, the latter 0 where the clip does not end; window is latent
    frames; options: fields of `infer.estimate.MemoryRequest`. ValueError as for `load` and for what they would refuse.
    """
    family = next((family for family in families.FAMILIES.values() if family.models and model in family.presets), None)
    size = None if family is None else family.presets[str(model)]
    name = model if family is None else family.models[0].name
    known = profile(name, steps=steps, chunk=chunk, height=height, width=width)
    export, context = known.export, known.export.context
    family = families.of(export)
    is_own = str(model) not in MODELS and size is None
    if is_own:
        _refuse(model, Choices(decoder=None if decoder == "none" else decoder, height=height, width=width), family)
        if options.get("text_encoder") is not None and not family.text.files:
            raise ValueError(f"text_encoder: only for released models, not {str(model)!r}, whose own is small")
    asked = _asked_by(export, known.sampling) | _decoding(family, decoder)
    if size is not None:
        asked["model"] = size
    if is_own:
        if decoder is None:
            asked["decoder"] = _codec_sizes(find(model, steps=steps, chunk=chunk), export)
        asked["dtype"] = "float32" if options.get("form") == "eager" else "bfloat16"  # as weights are left, or made
    if window is not None and not isinstance(context, Context):
        raise ValueError(f"window: the context policy of {name} has none, it is {described(context)}")
    context = replace(context, window=window) if window is not None and isinstance(context, Context) else context
    if frames == 0:
        context = beyond(replace(export, context=context), known.sampling) or context.bounded(export.frames)
        asked["frames"] = None
    else:
        plan = replace(known, export=replace(export, context=context)).schedule(frames)
        asked["frames"], context = plan.frames, plan.context
    return MemoryRequest(
        **{**asked, **{name: value for name, value in options.items() if value is not None}}, context=context
    )


def network_of(model: str | Path) -> ModelConfig:
    """The size of the network behind a name or a folder, as for `load`, before anything is loaded."""
    if str(model) in MODELS:
        family, row = MODELS[str(model)]
        return family.presets[row.preset]
    return read_export(find(model)).model


def find(model: str | Path, *, steps: int | Sequence[float] | None = None, chunk: int | None = None) -> Path:
    """The folder of a model; an unknown name is a ValueError that says which are near."""
    known = variants()
    name = ALIASES.get(str(model), str(model))
    if name in known:
        return known[name]
    family = {key: folder for key, folder in known.items() if key.startswith(f"{name}/")}
    if family:
        return _choose(name, family, steps, chunk)
    if Path(model).is_dir():
        return Path(model)
    if name in DEFAULT_VARIANTS:
        raise ValueError(f"model {name!r} is not part of this installation: {exports.ASSETS / name} holds no export")
    names = [*dict.fromkeys(key.partition("/")[0] for key in known), *known] or list(DEFAULT_VARIANTS)
    names += MODELS
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"unknown model {name!r}: no embedded or released model and no folder; did you mean {near!r}? "
        f"there are {', '.join(names)}"
    )


def _refuse(model: str | Path, choices: Choices, family: Family) -> None:
    """ValueError if something is chosen that only released models have, or those of a family with files."""
    plain = Choices(prompt_cache=choices.prompt_cache, before_loading=choices.before_loading)
    if family.text.files:
        plain = replace(plain, wan_dir=choices.wan_dir, decoder=choices.decoder)
    given = [name for name in vars(choices) if getattr(choices, name) != getattr(plain, name)]
    if given:
        raise ValueError(
            f"{', '.join(given)}: only for released models such as {next(iter(MODELS))}, not {str(model)!r}"
        )


def choose_device(device: torch.device | str | None, *, name: str = "device") -> torch.device:
    """The device, known to be there; None is CUDA if there is one, else the CPU. name: what messages call it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda" if count else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda") or (found.type == "cpu" and found.index):
        raise ValueError(f"{name} must be cpu, cuda or such as cuda:1, got '{shown(str(device), 60)}'")
    if found.type == "cuda" and not count:
        raise ValueError(f"{name} {str(found)!r}: there is no CUDA here, use cpu")
    if found.type == "cuda" and (found.index or 0) >= count:
        raise ValueError(f"{name} {str(found)!r}: there are {count} GPUs here, the last is cuda:{count - 1}")
    return found


def _choose(name: str, family: dict[str, Path], steps: int | Sequence[float] | None, chunk: int | None) -> Path:
    """The variant for these steps and this chunk, or the nearest one: chunk first, then steps."""
    default, is_default = f"{name}/{DEFAULT_VARIANTS.get(name, '')}", steps is None and chunk is None
    if is_default and default in family:
        return family[default]  # without a look at the others
    known = {key: read_export(folder) for key, folder in family.items()}
    known = {key: export for key, export in known.items() if export.family == name} or known
    default = default if default in known else next(iter(known))
    if is_default:
        return family[default]
    few = {key: export for key, export in known.items() if export.sampling.multistep is None}
    known = few or known  # teachers of many steps are taken by their full names only
    count = None if steps is None else steps if isinstance(steps, int) else len(steps)

    def distance(key: str) -> tuple[float, float, bool]:
        sampling = known[key].sampling
        return _apart(chunk, sampling.chunk), _apart(count, step_count(sampling)), key != default

    return family[min(known, key=distance)]


def _apart(wanted: int | None, trained: int | None) -> float:
    """How far a wanted number is from a trained one, in octaves; nothing is far from no wish."""
    if wanted is None:
        return 0.0
    return math.inf if trained is None else abs(math.log2(max(wanted, 1) / trained))


def _describe(sampling: Sampling) -> str:
    steps = sampling.multistep or ", ".join(f"{step:g}" for step in sampling.steps)
    return f"chunk {sampling.chunk}, steps {steps}"
