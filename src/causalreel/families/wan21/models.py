"""Rows of the models that were released.

Facts are those of the releases: file names and the weights that the released commands read (raw or averaged) from the
model cards of Causal Forcing, Self Forcing and Wan2.1; step lists, shift, guidance and chunk from their configurations.
What no release says is marked as an assumption where it stands.
"""

from __future__ import annotations

from collections.abc import Iterator

from causalreel.families.family import ReleasedModel
from causalreel.nn.policies.rolling_forcing import RollingForcing
from causalreel.weights.export import Sampling
from causalreel.weights.hub import HubFile

CF, SF, RCM = "zhuhz22/Causal-Forcing", "gdhe17/Self-Forcing", "worstcoder/rcm-Wan"
WAN_SMALL, WAN_LARGE = "Wan-AI/Wan2.1-T2V-1.3B", "Wan-AI/Wan2.1-T2V-14B"

FOUR = (1000.0, 750.0, 500.0, 250.0)


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


RCM_FOUR = (1600 / 1601, 15 / 16, 5 / 6, 5 / 8)
"""Noise levels of Causal-rCM, exactly: the first is not 1."""


def _rcm(kind: str, chunk: int) -> Iterator[ReleasedModel]:
    """The final models of Causal-rCM (arXiv 2606.25473), whose frame-wise 1-step form shares the file of 2 steps."""
    forms = {
        "4step": ("step4", (), None),
        "2step": ("step2", (RCM_FOUR[0], 5 / 6), None),
        "2step-noisy": ("step2_noisy_ctx", (RCM_FOUR[0], 5 / 8), 1),
    } | ({"1step": ("step2", RCM_FOUR[:1], None)} if chunk == 1 else {})
    for name, (file, further, noisy_from) in forms.items():
        first = "" if name == "4step" else " (first chunk 4)"
        context = ", noisy context" if noisy_from is not None else ""
        yield ReleasedModel(
            f"causal-rcm/{kind}-{name}",
            f"{name[0]} step{'s' * (name[0] != '1')}{first}, {kind}: Causal-rCM{context}",
            (HubFile(RCM, f"Causal_rCM_Wan2.1_T2V_1.3B_480p_TF-dCM-init_SF-DMD_c{chunk}-{chunk}_{file}.pt", 2.84),),
            None,
            "wan-1.3b",
            Sampling(
                chunk,
                FOUR,
                levels=(RCM_FOUR, further) if further else (RCM_FOUR,),
                noisy_from=noisy_from,
                times="bfloat16",
            ),
        )


MODELS = (
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
        context=RollingForcing(),
    ),
    *_stages("chunkwise", 3),
    *_stages("framewise", 1),
    *_rcm("framewise", 1),
    *_rcm("chunkwise", 3),
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
