"""Arguments that several subcommands share, and what is made of them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from causalreel.cli.parsing import CHUNK, LORA, SIDE, Range

if TYPE_CHECKING:
    import torch

    from causalreel.infer.live import PolicyKind
    from causalreel.infer.manner import Manner
    from causalreel.infer.models import Profile
    from causalreel.infer.pipeline import Pipeline
    from causalreel.nn.presets import ModelConfig

log = logging.getLogger("causalreel")

Precision = Literal["eager", "bf16", "fp8", "fp8-attention"]


SMALL = 50_000_000
"""Parameters below which a network is computed by one thread: its products take microseconds, and on a busy machine a
thread waits milliseconds for the others at the end of each."""


@dataclass(frozen=True, kw_only=True)
class ThreadFlag:
    """How many threads compute on the CPU."""

    threads: Annotated[int | None, Range(1, 1024)] = None
    """CPU threads; default: OMP_NUM_THREADS if it is set, else 1 for a network of less than 50 million parameters and
    torch's own number for a larger one."""

    def set_threads(self, networks: Iterable[ModelConfig], device: torch.device | str | None = None) -> None:
        """For these networks on this device; without networks, and on a GPU, only what is asked for is set."""
        import torch

        from causalreel.infer.models import choose_device

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        elif "OMP_NUM_THREADS" not in os.environ and choose_device(device).type == "cpu":
            largest = max((n.layers * n.dim * (8 * n.dim + 2 * n.ffn_dim) for n in networks), default=SMALL)
            if largest < SMALL and torch.get_num_threads() > 1:
                torch.set_num_threads(1)
                log.info("one CPU thread, which is fastest for a network this small; --threads N takes N")


@dataclass(frozen=True)
class ModelFlags(ThreadFlag):
    """Which model, from which files, of which size, and how it computes."""

    model: str = "tiny"
    """Embedded model (tiny, tiny/frame-1step ...), released one (see `causalreel models`) or an export's folder."""
    weights: str | None = None
    """Released models: their weights' file or folder here, of any layout; "random" needs no file, for benchmarks."""
    which: str | None = None
    """Released models: top-level key of a .pt file, such as generator_ema; default: the one that the release means."""
    wan_dir: Path | None = None
    """Released models: folder with VAE, text encoder and tokenizer (Wan2.1_VAE.pth ...), and taew2_1.pth."""
    decoder: str | None = None
    """Released models: what makes the pixels, such as taehv, a tiny codec, faster and less exact; default: the model's
    own VAE, wan."""
    height: Annotated[int | None, arg(aliases=["--pixel-height"]), SIDE] = None
    """Released models: height in pixels, for Wan2.1 a multiple of 16; default: the model's."""
    width: Annotated[int | None, arg(aliases=["--pixel-width"]), SIDE] = None
    """Released models: width in pixels, for Wan2.1 a multiple of 16; default: the model's."""
    steps: Annotated[int | None, Range(1, 1000)] = None
    """Denoising steps per chunk; default: the model's."""
    chunk: Annotated[int | None, CHUNK] = None
    """Latent frames made together; default: the model's."""
    precision: Precision = "bf16"
    """On a GPU: fused kernels in bfloat16; fp8 with e4m3 products, fp8-attention with e4m3 attention and cache as well,
    both slightly other videos; eager the plain network."""
    device: str | None = None
    """Such as cpu or cuda:1; default: CUDA if there is one."""
    lora: Annotated[tuple[str, ...], LORA] = ()
    """LoRA to merge into the weights: FILE or FILE:STRENGTH, a path or OWNER/REPOSITORY[/FILE]; again for each."""

    def load(
        self,
        *,
        device: torch.device | str | None = None,
        gpus: int = 1,
        graphs: bool = True,
        adjustable: bool = False,
    ) -> Pipeline:
        """The pipeline. device: in place of the flag. graphs: record calls on a GPU; pays from the second clip on.

        adjustable: strengths of LoRAs can be changed.
        """
        from causalreel.infer.models import load, network_of

        self.set_threads([network_of(self.model)], device or self.device)
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
            prompt_cache=cache_folder("prompts"),  # embeddings take seconds to make
            loras=self.lora,
            adjustable=adjustable,
            manner=self.manner(),
        )
        if (precision := self.precision_on(pipeline.device)) == "eager":
            return pipeline
        from causalreel.infer.accelerate import accelerate

        return accelerate(pipeline, precision=precision, graphs=graphs)

    def profile(self) -> Profile:
        """What is known of the model before it is loaded."""
        from causalreel.families import FAMILIES
        from causalreel.infer.models import profile

        names = dict.fromkeys(name for family in FAMILIES.values() for name in family.decoders)
        if self.decoder is not None and self.decoder not in names:
            raise ValueError(f"--decoder must be one of {', '.join(names)}, got {self.decoder!r}")
        size: dict[str, int | None] = {"height": self.height, "width": self.width}
        return profile(self.model, steps=self.steps, chunk=self.chunk, manner=self.manner(), **size)

    def manner(self) -> Manner:
        """In which other manner than the model's own; see `MannerFlags`."""
        from causalreel.infer.manner import Manner

        return Manner()

    def precision_on(self, device: torch.device) -> str:
        """What the flag comes to: bf16 is for GPUs, a CPU runs the plain network."""
        return "eager" if self.precision == "bf16" and device.type != "cuda" else self.precision


@dataclass(frozen=True)
class MannerFlags(ModelFlags):
    """And in which manner, where it is not the one that it was trained for."""

    policy: Annotated[str | None, arg(metavar="NAME[:key=value,...]")] = None
    """What stays of the past and where it is read: full, window, sink, re-indexed, rolling-sink, infinity-rope,
    deep-forcing, memrope or relax-forcing, with its numbers; see `causalreel policy`. Default: the model's."""
    plan: Literal["chunked", "rolling"] | None = None
    """chunked: chunk after chunk; rolling: a window of chunks at rising noise levels. Default: the model's."""
    any_plan: bool = False
    """Allow a plan that the model was not trained for."""
    noisy_context: Annotated[int | None, Range(0, 1_000_000)] = None
    """Chunks from this number on become context as their last denoising call read them: a call less for each, and
    another video. Default: the model's."""

    def manner(self) -> Manner:
        """What is asked for."""
        from causalreel.infer.manner import Manner

        return Manner(self.policy, self.plan, self.any_plan, self.noisy_context)


@dataclass(frozen=True)
class StreamFlags(ModelFlags):
    """And how a stream goes on for ever."""

    policy: Annotated[str | None, arg(metavar="NAME[:key=value,...]")] = None
    """How it goes on for ever: renew, in segments of the trained length; slide, as clips beyond that length go on; or a
    context policy with its numbers, such as memrope (see `causalreel policy`). Default: the model's."""

    @property
    def kind(self) -> PolicyKind | None:
        """Of `infer.live.Policy`: whatever the context policy, one that is named is not cut into segments."""
        if self.policy == "renew":
            return "renew"
        return None if self.policy is None else "slide"

    def manner(self) -> Manner:
        """With the context policy, if one is named."""
        from causalreel.infer.manner import Manner

        return Manner(None if self.policy in ("renew", "slide") else self.policy)


def cache_folder(name: str) -> Path | None:
    """Where this user's files that can be made again are kept; None, and no cache, where the user has no home."""
    try:
        above = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except RuntimeError:
        return None
    folder = Path(above)
    return folder / "causalreel" / name if folder.is_absolute() else None


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """Within it SIGTERM ends the process as Ctrl-C does, by an exception, so that what is half-written is removed."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def own_threads() -> Iterator[None]:
    """A command chooses its number of threads; whoever called it from a program with torch has the former one back."""
    torch = sys.modules.get("torch")  # not imported for this
    before = None if torch is None else torch.get_num_threads()
    try:
        yield
    finally:
        if torch is not None and torch.get_num_threads() != before:
            torch.set_num_threads(before)


def pixel_scale(pipeline: Pipeline) -> int:
    """How often each pixel is repeated, so that small videos can be seen."""
    return 4 if min(pipeline.size) < 128 else 1
