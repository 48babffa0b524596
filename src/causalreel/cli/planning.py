"""`causalreel plan`: what a training run will take, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from causalreel.cli.parsing import FRAMES, SIDE, Range


@dataclass(frozen=True)
class PlanRun:
    """Say what a recipe takes: memory of each GPU by part, operations, seconds a step. Loads nothing."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """File or name, such as wan/ar."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]")] = ()
    """key.key=value, laid upon the recipe."""
    gpus: Annotated[int, Range(1, 100_000)] = 1
    """GPUs of the launch."""
    memory: Annotated[float, Range(1, 100_000)] = 80.0
    """GiB of each GPU; status 1 if the run does not fit."""
    card: Literal["H100", "H200", "A100", "A800", "H800", "B200", "L40S"] = "H100"
    """For the seconds, by its datasheet's rate."""
    size: str = "wan-1.3b"
    """Size of networks whose weights are not here yet."""
    frames: Annotated[int, FRAMES] = 81
    """Pixel frames of a clip, where the data are not here yet."""
    height: Annotated[int, SIDE] = 480
    """Of a clip in pixels, where the data are not here yet."""
    width: Annotated[int, SIDE] = 832
    """Of a clip in pixels, where the data are not here yet."""


def plan_run(args: PlanRun) -> int:
    from causalreel.train.operations import PEAKS, Clip
    from causalreel.train.plan import GIB, clip_of, plan, sizes_of, told
    from causalreel.train.recipe import resolve

    recipe = resolve(args.recipe, args.overrides)
    if recipe.stage == "codec":
        raise ValueError("plan: codecs are not planned, only networks that denoise")
    if recipe.lora:
        raise ValueError(
            f"lora.{min(recipe.lora)}: runs with adapters are not planned, only those that train all weights"
        )
    sizes = sizes_of(recipe, args.size)
    clip: Clip = clip_of(recipe, args.frames, (args.height, args.width))
    found = plan(recipe, sizes, clip, gpus=args.gpus, rate=PEAKS[args.card])
    print(f"{args.recipe}: stage {recipe.stage}, clips of {clip.frames} latent frames {clip.latent.shape}")
    for role, size in sizes.items():
        print(f"  {role}: {size.layers} blocks of {size.dim}, from {recipe.init.get(role, Path('nothing'))}")
    print("\n".join(told(found, args.memory)))
    return 0 if found.peak / GIB <= args.memory else 1
