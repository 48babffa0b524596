"""Arguments that several subcommands share, and what is made of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

if TYPE_CHECKING:
    import torch

    from causalreel.infer.pipeline import Pipeline

Precision = Literal["eager", "bf16", "fp8", "fp8-attention"]


@dataclass(frozen=True)
class ModelFlags:
    """Which model, from which files, of which size, and how it computes."""

    model: str = "tiny"
    """Embedded model (tiny, tiny/frame-1step ...), released one (see `causalreel models`) or an export's folder."""
    weights: str | None = None
    """Released models: their weights' file or folder here, of any layout; "random" needs no file, for benchmarks."""
    which: str | None = None
    """Released models: top-level key of a .pt file, such as generator_ema; default: the one that the release means."""
    wan_dir: Path | None = None
    """Released models: folder with VAE, text encoder and tokenizer (Wan2.1_VAE.pth ...), and taew2_1.pth."""
    decoder: Literal["wan", "taehv"] = "wan"
    """Released models: the model's own VAE, or a tiny one, faster and less exact."""
    height: Annotated[int | None, arg(aliases=["--pixel-height"])] = None
    """Released models: height in pixels, a multiple of 16; default: the model's 480."""
    width: Annotated[int | None, arg(aliases=["--pixel-width"])] = None
    """Released models: width in pixels, a multiple of 16; default: the model's 832."""
    steps: int | None = None
    """Denoising steps per chunk; default: the model's."""
    chunk: int | None = None
    """Latent frames made together; default: the model's."""
    precision: Precision = "bf16"
    """On a GPU: fused kernels in bfloat16; fp8 with e4m3 products, fp8-attention with e4m3 attention and cache as well,
    both slightly other videos; eager the plain network."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one."""

    def load(self, *, device: torch.device | str | None = None, gpus: int = 1, graphs: bool = True) -> Pipeline:
        """The pipeline. device: in place of the flag. graphs: record calls on a GPU; pays from the second clip on."""
        from causalreel.infer.accelerate import accelerate
        from causalreel.infer.models import load

        pipeline = load(
            self.model,
            steps=self.steps,
            chunk=self.chunk,
            device=device or self.device,
            gpus=gpus,
            weights=self.weights,
            which=self.which,
            wan_dir=self.wan_dir,
            decoder=self.decoder,
            height=self.height,
            width=self.width,
            prompt_cache=Path("~/.cache/causalreel/prompts").expanduser(),  # embeddings take seconds to make
        )
        if (precision := self.precision_on(pipeline.device)) == "eager":
            return pipeline
        return accelerate(pipeline, precision=precision, graphs=graphs)

    def precision_on(self, device: torch.device) -> str:
        """What the flag comes to: bf16 is for GPUs, a CPU runs the plain network."""
        return "eager" if self.precision == "bf16" and device.type != "cuda" else self.precision


def at_least(least: int, **values: int) -> None:
    """ValueError that names the first of `values` below `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def pixel_scale(pipeline: Pipeline) -> int:
    """How often each pixel is repeated, so that small videos can be seen."""
    return 4 if min(pipeline.size) < 128 else 1
