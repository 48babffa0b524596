"""`causalreel policy`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from causalreel.cli.parsing import Range


@dataclass(frozen=True)
class DrawPolicy:
    """Draw what a context policy lets each chunk see, and at which positions."""

    name: Annotated[Positional[str], arg(metavar="NAME[:key=value,...]")]
    """As of `generate --policy`: full, window, sink, re-indexed, rolling-sink, infinity-rope, deep-forcing, memrope,
    relax-forcing or rolling-forcing."""
    frames: Annotated[int, Range(1, 400)] = 60
    """Latent frames of the video."""
    chunk: Annotated[int, Range(1, 100)] = 3
    """Latent frames made together."""
    trained: Annotated[int, Range(1, 400)] = 21
    """Latent frames of a training clip, which numbers that are not given follow."""
    output: Annotated[Path, arg(aliases=["-o"])] = Path("policy.png")
    """Picture (.png)."""


def draw_policy(args: DrawPolicy) -> int:
    from causalreel.data.video import check_target
    from causalreel.infer.policy_picture import draw
    from causalreel.nn.policies.registry import described, policy_from

    if args.frames < args.chunk:
        raise ValueError(f"--frames must be at least the chunk's {args.chunk}, got {args.frames}")
    policy = policy_from(args.name, frames=args.trained, chunk=args.chunk)
    path = check_target(args.output, (".png",))
    found = draw(policy, args.frames, args.chunk, path)
    most = max(sum(share for _, _, share in sight.read) + len(sight.own) for sight in found)
    last = max(max((*sight.own, *(at for _, at, _ in sight.read))) for sight in found)
    print(f"{described(policy)}: a chunk sees up to {most:g} frames, its own included, at positions up to {last}")
    print(path)
    return 0
