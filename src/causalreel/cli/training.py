"""`causalreel train` and `causalreel encode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from causalreel.cli.flags import ThreadFlag
from causalreel.cli.parsing import BATCH, SEED, Range

# ---------------------------------------------------------------------------------------------------------------- train


@dataclass(frozen=True)
class Train(ThreadFlag):
    """Run a recipe: a YAML file, or the name of one that comes with the package, such as tiny/causal_cd."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """File or name."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]")] = ()
    """key.key=value, laid upon the recipe."""
    dry_run: bool = False
    """Print the resolved recipe, check all that the run needs, say what makes what is missing; touches nothing."""
    check: bool = True
    """Do not hash and compare data, weights and checkpoints, a second per GB; as trainer.check=false."""


def train(args: Train) -> int:
    from causalreel import config
    from causalreel.train.ingredients import networks
    from causalreel.train.readiness import problems, to_fetch
    from causalreel.train.recipe import describe, resolve
    from causalreel.train.run import run

    recipe = resolve(args.recipe, [*args.overrides, *([] if args.check else ["trainer.check=false"])])
    if args.dry_run:
        print(config.dump(recipe))
        print(describe(recipe))
        if found := problems(recipe):
            raise ValueError("; ".join(["not ready", *found]))
        if files := to_fetch(recipe):
            names = ", ".join(f"{file.repo}/{file.path} ({file.size_gb:.1f} GB)" for file in files)
            print(f"# fetched at the start, and not checked yet: {names}")
        print("# ready: data, codec, weights, device and room on the disk are there")
        return 0
    device = recipe.trainer.device
    args.set_threads(networks(recipe), None if device == "auto" else device)
    return run(recipe).exit_code


# --------------------------------------------------------------------------------------------------------------- encode


@dataclass(frozen=True)
class Encode(ThreadFlag):
    """Prepare training data: render clips of a tiny world, encode them into latent shards. Continues if stopped."""

    codec: Path
    """Folder of a trained codec, or tiny for the one of the package."""
    out: Path
    """Folder for the shards."""
    world: Literal["flat", "walk"] = "flat"
    """Objects that move on a plane, or a place that one walks in, with cameras and keys."""
    clips: Annotated[int, Range(1, 100_000_000)] = 32768
    """Clips to render."""
    seed: Annotated[int, SEED] = 0
    """Which training world."""
    events: Annotated[float, Range(0, 1)] = 0.0
    """Share of clips whose caption changes once, and what it describes with it."""
    named: Annotated[float, Range(0, 1)] = 0.75
    """Chance that such a change names where an object goes."""
    same_background: Annotated[float, Range(0, 1)] = 0.0
    """Chance that such a change leaves the background: models obey a direction least where nothing else changes."""
    two_objects: Annotated[float, Range(0, 1)] = 0.0
    """Chance that such a change ends with two objects, where models show most that does not belong there."""
    crowded: Annotated[float, Range(0, 1)] = 0.0
    """Chance that such a change needs no room between objects, as with people's prompts."""
    direction_alone: Annotated[float, Range(0, 1)] = 0.0
    """Chance that such a change says nothing but another direction, as people steer."""
    least_psnr: Annotated[float, Range(0, 100)] = 0.0
    """Encode nothing if the codec gives clips of this world back with less (dB; a trained one reaches 35 to 42)."""
    batch: Annotated[int | None, BATCH] = None
    """Clips encoded at once; default: 256 on a GPU, 4 on a CPU, where each takes 100 MB."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one."""


def encode(args: Encode) -> int:
    from causalreel.data.prepare import check_codec, prepare
    from causalreel.data.world import KINDS, WorldConfig
    from causalreel.data.worlds import WORLDS, flat
    from causalreel.infer.models import choose_device
    from causalreel.weights.export import codec_identity, load_codec

    if args.events and args.world != "flat":
        raise ValueError(f"--events are of the flat world, not of --world {args.world}")
    kinds = {name: getattr(args, name) for name in KINDS}
    changes = WorldConfig(events=args.events, **kinds)
    if not args.events and changes != WorldConfig():
        options = ", ".join(f"--{name.replace('_', '-')}" for name in KINDS)
        raise ValueError(f"{options} are of changes: give --events, the share of clips that have one")
    world = flat(changes) if args.events else WORLDS[args.world]()
    args.set_threads([], args.device)
    device = choose_device(args.device)
    codec = load_codec(args.codec).to(device)
    batch = args.batch or (256 if device.type == "cuda" else 4)
    if args.least_psnr:  # on clips behind those of the data
        how = {"seed": args.seed, "first": args.clips, "device": device, "batch": min(batch, 16)}
        print(f"PSNR of the codec: {check_codec(codec, world, args.least_psnr, **how):.1f} dB")
    folder = prepare(
        args.out,
        codec,
        codec_id=codec_identity(args.codec),
        clips=args.clips,
        seed=args.seed,
        world=world,
        batch=batch,
        device=device,
    )
    print(folder)
    return 0
