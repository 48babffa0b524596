"""Released models by name: where their files are, which weights inside are meant, and how they are sampled.

Facts are those of the releases: file names and the weights that the released commands read (raw or averaged) from the
model cards of Causal Forcing, Self Forcing and Wan2.1; step lists, shift, guidance and chunk from their configurations.
What no release says is marked as an assumption where it stands.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from causalreel.codecs.wan_vae import vae_config
from causalreel.nn.policies.registry import AnyPolicy
from causalreel.nn.policies.window import Context
from causalreel.nn.presets import PRESETS
from causalreel.types import LatentSpec
from causalreel.weights.export import Export, Sampling

CF, SF = "zhuhz22/Causal-Forcing", "gdhe17/Self-Forcing"
WAN_SMALL, WAN_LARGE = "Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-14B"

FOUR = (1000.0, 750.0, 500.0, 250.0)
GEOMETRY = vae_config("wan2.1").geometry
EVERYTHING, WIDE = Context(), GEOMETRY.latent_of(480, 832)


@dataclass(frozen=True)
class HubFile:
    """A file on the Hugging Face hub."""

    repo: str
    path: str
    size_gb: float
    """About how large it is, for messages."""


@dataclass(frozen=True)
class ReleasedModel:
    """One released model at full size."""

    name: str
    """What --model takes."""
    what: str
    """What it is, in a few words."""
    files: tuple[HubFile, ...]
    """Its weights; where there are several, the first is the index of the others."""
    which: str | None
    """Top-level key of a .pt file: generator is the raw weights, generator_ema the averaged ones; None takes the first
    that is there, and files without top-level keys need none."""
    preset: str
    """Its size, a key of nn.presets.PRESETS."""
    sampling: Sampling
    """How it is sampled."""
    context: AnyPolicy = EVERYTHING
    """What a chunk sees; longer clips than the training's get a window of that length."""
    frames: int = 21
    """Latent frames of a training clip."""
    fps: float = 16.0
    """Pixel frames per second."""
    latent: LatentSpec = WIDE
    """One latent frame of 480x832 pixels."""
    text: str = "umt5"
    """Text encoder."""
    codec: str = "wan2.1"
    """Video codec."""

    @property
    def repo(self) -> str:
        return self.files[0].repo

    @property
    def size_gb(self) -> float:
        return sum(file.size_gb for file in self.files)

    def export(self, *, height: int | None = None, width: int | None = None) -> Export:
        """Everything but the weights, as for exported models; for other sides in pixels if given."""
        model, own = PRESETS[self.preset], GEOMETRY.size_of(self.latent)
        sides = (own[0] if height is None else height, own[1] if width is None else width)
        latent = GEOMETRY.latent_of(*sides, patch=model.patch)
        return Export(
            self.name, model, self.sampling, self.context, self.frames, self.fps, latent, self.codec, self.text
        )


def _one(path: str, repo: str = CF) -> tuple[HubFile, ...]:
    return (HubFile(repo, path, 5.7),)


def _many(guidance: float, chunk: int | None, shift: float = 5.0) -> Sampling:
    """UniPC on 50 steps with guidance."""
    return Sampling(chunk, shift=shift, solver="unipc", guidance=guidance, multistep=50)


def _stages(kind: str, chunk: int) -> tuple[ReleasedModel, ...]:
    """The files of stages 1 and 2, frame-wise or chunk-wise."""
    return (
        ReleasedModel(
            f"causal-forcing/{kind}-ar-diffusion",
            f"stage 1, AR diffusion, {kind}: the many-step teacher",
            _one(f"{kind}/ar_diffusion.pt"),
            "generator",
            "wan-1.3b",
            _many(3.0, chunk),
        ),
        ReleasedModel(
            f"causal-forcing/{kind}-causal-ode",
            f"stage 2, causal ODE, {kind}: an initialisation",
            _one(f"{kind}/causal_ode.pt"),
            "generator",
            "wan-1.3b",
            Sampling(chunk, FOUR),
        ),
        ReleasedModel(
            f"causal-forcing/{kind}-causal-cd",
            f"stage 2, causal CD, {kind}: an initialisation",
            _one(f"{kind}/causal_cd.pt"),
            None,  # the released loaders try generator, model, generator_ema in this order, and so do we
            "wan-1.3b",
            Sampling(chunk, FOUR),
        ),
    )


_MODELS = (
    ReleasedModel(
        "causal-forcing/chunkwise",
        "4 steps, 3 latent frames at a time",
        _one("chunkwise/causal_forcing.pt"),
        "generator",  # the released command for this file, alone among the final ones, reads the raw weights
        "wan-1.3b",
        Sampling(3, FOUR),
    ),
    ReleasedModel(
        "causal-forcing/framewise",
        "4 steps, frame by frame; also from a picture",
        _one("framewise/causal_forcing.pt"),
        "generator_ema",
        "wan-1.3b",
        Sampling(1, FOUR),
    ),
    ReleasedModel(
        "causal-forcing/framewise-2step",
        "2 steps (first frame 4), frame by frame: Causal Forcing++",
        _one("causal-forcing++/framewise-2step.pt"),
        "generator_ema",
        "wan-1.3b",
        Sampling(1, (1000.0, 500.0), FOUR),
    ),
    ReleasedModel(
        "causal-forcing/framewise-1step",
        "1 step (first frame 4), frame by frame: Causal Forcing++",
        _one("causal-forcing++/framewise-1step.pt"),
        "generator_ema",
        "wan-1.3b",
        Sampling(1, (1000.0,), FOUR),
    ),
    ReleasedModel(
        "causal-forcing/longvideo",
        "minutes of video by a rolling window of 4 chunks",
        _one("chunkwise/longvideo.pt"),
        "generator_ema",
        "wan-1.3b",
        Sampling(3, FOUR, plan="rolling"),
        # the rolling attention sees 21 latent frames, the first chunk always among them
        context=Context(window=21, sink=3),
    ),
    *_stages("chunkwise", 3),
    *_stages("framewise", 1),
    ReleasedModel(
        "self-forcing",
        "Self Forcing with DMD: 4 steps, 3 latent frames at a time",
        _one("checkpoints/self_forcing_dmd.pt", SF),
        "generator_ema",
        "wan-1.3b",
        Sampling(3, FOUR),
    ),
    ReleasedModel(
        "wan2.1-t2v-1.3b",
        "the bidirectional base model: whole clips, 50 steps, guidance",
        _one("diffusion_pytorch_model.safetensors", WAN_SMALL),
        None,
        "wan-1.3b",
        _many(6.0, None, 8.0),  # as its model card recommends for this size; the script's defaults are 5 and 5
    ),
    ReleasedModel(
        "wan2.1-t2v-14b",
        "the large bidirectional model, teacher of stage 3: whole clips, 50 steps, guidance",
        (
            HubFile(WAN_LARGE, "diffusion_pytorch_model.safetensors.index.json", 0.0),
            *(
                HubFile(WAN_LARGE, f"diffusion_pytorch_model-{i:05d}-of-00006.safetensors", 57.2 / 6)
                for i in range(1, 7)
            ),
        ),
        None,
        "wan-14b",
        _many(5.0, None),
    ),
)

MODELS = {model.name: model for model in _MODELS}
"""Name -> released model, in the order in which they are listed."""

VAE_FILE = HubFile(WAN_SMALL, "Wan2.1_VAE.pth", 0.5)
TEXT_FILE = HubFile(WAN_SMALL, "models_t5_umt5-xxl-enc-bf16.pth", 11.4)
TOKENIZER = "google/umt5-xxl"
TOKENIZER_FILES = tuple(
    HubFile(WAN_SMALL, f"{TOKENIZER}/{name}", size)
    # assumption: the four files of the tokenizer folder of the same model in diffusers' layout
    for name, size in (
        ("special_tokens_map.json", 0.0),
        ("spiece.model", 0.005),
        ("tokenizer.json", 0.017),
        ("tokenizer_config.json", 0.0),
    )
)
TAEHV_FILE = HubFile("lightx2v/Autoencoders", "taew2_1.pth", 0.02)
"""A mirror of the file in github.com/madebyollin/taehv, which is not on the hub."""


def released(name: str) -> ReleasedModel:
    """The row called `name`; ValueError names the nearest and all there are."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown model {name!r}; did you mean {near!r}? there are {', '.join(MODELS)}")
    return MODELS[name]


def owner_of(path: str | Path) -> ReleasedModel | None:
    """The model whose released file has this path's last names, such as framewise/causal_forcing.pt."""
    path = Path(path)
    for model in MODELS.values():
        if model.repo in (CF, SF) and path.parts[-2:] == Path(model.files[0].path).parts[-2:]:
            return model
    return None


def table() -> str:
    """All released models as aligned text: name, what, size, steps, weights and where they are."""
    rows = [("name", "size", "GB", "chunk", "steps", "weights", "on the hub", "what")]
    for model in MODELS.values():
        sampling = model.sampling
        rows.append(
            (
                model.name,
                model.preset,
                f"{model.size_gb:.1f}",
                "whole clip" if sampling.chunk is None else str(sampling.chunk),
                steps_in_words(sampling),
                model.which or "first found" if model.files[0].path.endswith(".pt") else "-",
                f"{model.repo} {model.files[0].path}",
                model.what,
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = ["  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    shared = [VAE_FILE, TEXT_FILE, *TOKENIZER_FILES]
    needs = ", ".join(file.path for file in (VAE_FILE, TEXT_FILE))
    size = sum(file.size_gb for file in shared)
    lines.append(f"all of them also need {needs} and {TOKENIZER}/ of {WAN_SMALL} ({size:.1f} GB, once)")
    lines.append(f"--decoder taehv needs {TAEHV_FILE.path} of {TAEHV_FILE.repo} instead of the VAE")
    return "\n".join(lines)


def steps_in_words(sampling: Sampling) -> str:
    """4, or 2 (first chunk 4), or 50 UniPC x guidance 3."""
    if sampling.multistep is not None:
        return f"{sampling.multistep} {sampling.solver}, guidance {sampling.guidance:g}"
    first = f" (first chunk {len(sampling.first_steps)})" if sampling.first_steps else ""
    return f"{len(sampling.steps)}{first}"
