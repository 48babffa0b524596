"""A pipeline's fast form: the inference network, recorded calls, and a decoder that keeps up. The same videos."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch

from causalreel.infer.pipeline import Pipeline
from causalreel.parallel import fast

log = logging.getLogger(__name__)


def accelerate(pipeline: Pipeline, *, precision: str = "bf16", graphs: bool = True) -> Pipeline:
    """-> the pipeline with `parallel.fast.FastDiT` behind its denoiser, weights in the type they are computed in.

    precision: bf16, or fp8 (e4m3 products; a change of numerics, which is logged). graphs: record calls (CUDA only).
    """
    denoiser = pipeline.denoiser
    if denoiser.compute is not None:
        denoiser = denoiser.to(denoiser.compute)
    fast.accelerate(denoiser, precision=precision, graphs=graphs and pipeline.device.type == "cuda")
    if precision == "fp8":
        log.info("%s: products in fp8 (e4m3); videos differ slightly from those in bf16", pipeline.export.name)
    return dataclasses.replace(pipeline, denoiser=denoiser)


def warm_up(pipeline: Pipeline, prompt: str, **request: Any) -> None:
    """Make one clip and throw it away, so that kernels are compiled and calls recorded before anybody waits."""
    for _ in pipeline.stream(prompt, **request):
        pass
    if pipeline.device.type == "cuda":
        torch.cuda.synchronize(pipeline.device)
