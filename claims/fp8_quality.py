"""Claim: fp8 products, and fp8 attention, cost a trained model little of what its videos show.

    python claims/fp8_quality.py [CLIPS]       a minute on a GPU, about half an hour on a CPU with 512 clips

Verdict (one H200, torch 2.11, 512 clips): true. Follow and direction are those of bfloat16 within two standard errors;
quality falls by 0.001 to 0.002 with fp8 products, 0.003 to 0.005 with attention as well.

The embedded models, the same held-out prompts and the same noise in every precision; differences are paired. On a CPU
fp8 is computed with rounded factors in float32, and probabilities are not rounded.
"""

from __future__ import annotations

import sys

import torch

from causalreel.data.prepare import held_out
from causalreel.eval.metrics import measure
from causalreel.eval.run import sample
from causalreel.eval.statistics import compare, summarise
from causalreel.infer.models import load, variants
from causalreel.parallel.fast import PRECISIONS, accelerate

METRICS = ("follow", "first", "direction", "dynamic", "quality")


def main() -> None:
    clips = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    is_cuda = torch.cuda.is_available()
    _, prompts = held_out(clips, seed=0)
    print(f"{clips} clips, {torch.cuda.get_device_name() if is_cuda else 'CPU'}, torch {torch.__version__}")
    for name in variants():
        plain, exact = None, None
        for precision in PRECISIONS:
            pipeline = load(name)
            if pipeline.denoiser.compute is not None:
                pipeline.denoiser.to(pipeline.denoiser.compute)
            accelerate(pipeline.denoiser, precision=precision)
            video = sample(pipeline, prompts, seed=0, batch=64 if is_cuda else 8)
            scores = measure(video, prompts)
            line = f"{name}, {precision}: "
            line += ", ".join(f"{k} {v.mean:.3f}" for k, v in summarise(scores).items() if k in METRICS)
            if plain is None or exact is None:
                plain, exact = scores, video
            else:
                away = compare(scores, plain)
                line += "; against bf16 " + ", ".join(
                    f"{k} {away[k].mean:+.3f} ± {away[k].stderr:.3f}" for k in METRICS
                )
                line += f"; pixels {((video - exact).abs().mean() / 2).item():.4f} of their range away"
            print(line, flush=True)


if __name__ == "__main__":
    main()
