"""Claim: the UMT5-XXL encoder leaves a GPU as it found it, and its bfloat16 agrees with float32 to bfloat16 rounding.

    python claims/text_encoder.py FOLDER              random weights of full size, 11.4 GB written into FOLDER
    python claims/text_encoder.py FOLDER --weights F  those of a file or folder

Needs a CUDA GPU with 32 GB (24 without the comparison with float32), 32 GB of memory, transformers and ftfy; tokens are
drawn, so no tokenizer. Prints memory, times and errors.

Verdict: not run on a GPU yet. On a CPU with an empty file of full size, loading added 0.11 GiB of memory of the
process's own and encoding 0.02 GiB.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from causalreel.text.umt5 import Offload, Placement, Tokens, UMT5TextEncoder, embed, needed_bytes
from causalreel.weights.umt5_files import load_umt5, official_shapes, read_umt5, sizes_of

GIB = 2**30
LENGTHS = (10, 60, 200, 512)
OFFLOADS: tuple[Offload, ...] = ("cpu", "host", "keep")


def random_weights(path: Path) -> Path:
    """A full-size file whose activations stay in range: what is added to the residual stream is small."""
    generator = torch.Generator("cuda").manual_seed(0)
    tensors = {}
    for name, shape in official_shapes().items():
        scale = 1.0 if "embedding" in name else 0.3 * shape[-1] ** -0.5
        value = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) * scale
        tensors[name] = torch.ones(shape, dtype=torch.bfloat16) if "norm" in name else value.cpu()
    torch.save(tensors, path)
    return path


def own_memory() -> float:
    """GiB that this process holds besides mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20


def timed(encoder: UMT5TextEncoder, prompt: str) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    text = encoder.encode([prompt])
    torch.cuda.synchronize()
    return text, time.perf_counter() - began


def measure(weights: Path, ids: dict[int, tuple[int, ...]], width: int) -> dict[tuple[str, int], torch.Tensor]:
    """Embeddings (n,E) by (offload, tokens), on the GPU; times and memory are printed on the way."""
    began = time.perf_counter()
    model = load_umt5(weights)
    print(f"loaded in {time.perf_counter() - began:.1f} s; own memory {own_memory():.2f} GiB")
    found = {}
    for offload in OFFLOADS:
        encoder = UMT5TextEncoder(
            lambda: model,
            lambda text: Tokens(ids[int(text)], int(text)),
            width=width,
            placement=Placement("cuda", offload),
        )
        free = torch.cuda.mem_get_info()[0]
        torch.cuda.reset_peak_memory_stats()
        for n in ids:
            text, first = timed(encoder, str(n))
            text, second = timed(encoder, str(n))
            found[offload, n] = text[0, :n]
            print(f"offload {offload}, {n} tokens: {first:.3f} s, again {second:.3f} s")
        peak, left = torch.cuda.max_memory_allocated() / GIB, (free - torch.cuda.mem_get_info()[0]) / GIB
        needed = needed_bytes(model, max(ids)) / GIB
        print(f"offload {offload}: peak {peak:.2f} GiB, estimated {needed:.2f}; kept {left:.2f}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", type=Path)
    args = parser.parse_args()
    weights = args.weights or random_weights(args.folder / "models_t5_umt5-xxl-enc-bf16.pth")
    sizes = sizes_of(read_umt5(weights))
    ids = {n: (*torch.randint(2, sizes.vocab, (n - 1,)).tolist(), 1) for n in LENGTHS}
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; own memory before {own_memory():.2f} GiB")
    found = measure(weights, ids, sizes.dim)
    torch.cuda.empty_cache()
    exact = load_umt5(weights, dtype=torch.float32).cuda()
    for n in LENGTHS:
        wanted = embed(exact, ids[n], torch.device("cuda"))
        errors = {way: (found[way, n].float() - wanted).norm() / wanted.norm() for way in OFFLOADS}
        said = ", ".join(f"{way} {error:.2e}" for way, error in errors.items())
        print(f"{n} tokens, relative error against float32: {said}")


if __name__ == "__main__":
    main()
