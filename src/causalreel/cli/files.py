"""`causalreel export`, `convert` and `models`: weights in and out of files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from causalreel.cli.parsing import LORA, Range

# --------------------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class ExportModel:
    """Write a trained model again as a folder of its own: bfloat16 weights with its codec, name and scores."""

    model: Annotated[Positional[Path], arg(metavar="FOLDER")]
    """Export folder of a training run, or an embedded model."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder to write."""
    name: str | None = None
    """What messages call it; default: as before."""
    codec: str | None = None
    """Codec that the config names, relative to OUT or an embedded family; default: a copy beside the model."""
    scores: Path | None = None
    """scores.json or control.json of an evaluation, recorded in the provenance."""
    label: str | None = None
    """Which of its models this is."""
    steps: Annotated[int | None, Range(1, 1000)] = None
    """Denoising steps that it has from now on, with 4 for the first frame of a frame-wise model; default: as before."""
    step_list: tuple[float, ...] = ()
    """The steps themselves in place of their number, such as 1000 200; default: as before."""
    first_steps: Annotated[int | None, Range(1, 1000)] = None
    """Those of the first chunk, if others; default: as before, or as --steps says."""
    weights_of: str | None = None
    """Name of a folder beside OUT, an export with the same weights, which are then not written again; needs --codec."""
    mean_with: tuple[str, ...] = ()
    """Other exports of the same network: the mean of all their weights is written, with the rest of FOLDER."""


def export_model(args: ExportModel) -> int:
    from causalreel.infer.schedule import in_few_steps, with_first_steps, with_step_list
    from causalreel.weights.export import read_export
    from causalreel.weights.re_export import re_export

    if args.steps is not None and args.step_list:
        raise ValueError("--steps and --step-list both say how chunks are made; give one of them")
    sampling = read_export(args.model).sampling
    sampling = sampling if args.steps is None else in_few_steps(sampling, args.steps)
    sampling = with_step_list(sampling, args.step_list) if args.step_list else sampling
    sampling = sampling if args.first_steps is None else with_first_steps(sampling, args.first_steps)
    how: dict[str, Any] = {"name": args.name, "codec": args.codec, "scores": args.scores, "label": args.label}
    how["mean_with"] = args.mean_with
    print(re_export(args.model, args.out, **how, sampling=sampling, weights_of=args.weights_of))
    return 0


# -------------------------------------------------------------------------------------------------------------- convert


@dataclass(frozen=True)
class Convert:
    """Write a network's weights in another layout, every name and shape checked: Wan2.1's own names, the .pt of Causal
    and Self Forcing, diffusers' folder, ComfyUI's repack. A LoRA is written as a LoRA, in the layout of
    another program: peft, diffusers, comfyui, musubi, videox-fun, diffsynth or longlive."""

    source: Annotated[Positional[Path], arg(metavar="SRC")]
    """File or folder, of any of these layouts."""
    target: Annotated[Positional[Path], arg(metavar="DST")]
    """official: a .pt; comfyui: a .safetensors; wan and diffusers: a .safetensors or a folder with config.json. Of a
    LoRA peft: a folder; longlive: a .pt; the others: a .safetensors."""
    to: Literal["wan", "official", "diffusers", "comfyui", "peft", "musubi", "videox-fun", "diffsynth", "longlive"]
    """Layout of DST; from peft on, and diffusers and comfyui too, for a LoRA."""
    which: str | None = None
    """Top-level key of a .pt file, such as generator_ema; default: the first of generator, model, generator_ema."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the values; default: as they are."""
    heads: Annotated[int | None, Range(1, 1024)] = None
    """Attention heads, where neither SRC nor a known size tells them."""
    lora: Annotated[tuple[str, ...], LORA] = ()
    """LoRA files to merge into the network, each FILE or FILE:STRENGTH; again for each."""


def convert(args: Convert) -> int:
    from causalreel.weights.convert import convert as write
    from causalreel.weights.lora_files import read_loras

    loras = [(lora, strength) for _, lora, strength in read_loras(args.lora)]
    how: dict[str, Any] = {"which": args.which, "dtype": args.dtype, "heads": args.heads, "loras": loras}
    print(write(args.source, args.target, args.to, **how))
    return 0


# --------------------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class Models:
    """List the models that have names: those that come with the package, and released ones at full size."""

    names: bool = False
    """Names only, one a line."""


def models(args: Models) -> int:
    from causalreel.families import MODELS
    from causalreel.families.files import table
    from causalreel.infer.models import variants

    if args.names:
        print("\n".join([*variants(), *MODELS]))
        return 0
    print("come with the package: " + ", ".join(variants()) + "\n")
    print(table())
    return 0
