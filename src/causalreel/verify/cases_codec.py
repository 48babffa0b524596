"""c10 and c11: the Wan VAE and TAEHV, whole clips, every recorded split into calls, previews.

The recorded files order pixels as their code does; what differs is translated here: the released Wan encoder drops
frames beyond 1 + 4n, ours refuses them; the released TAEHV leaves dropping the first frames to its caller.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from causalreel.codecs.taehv import TAEHV, TAEHVConfig, shown
from causalreel.codecs.wan_vae import CausalVAE
from causalreel.families.wan21.codec_files import cut_growth, load_taehv, load_wan_vae
from causalreel.types import VideoCodec
from causalreel.verify.case import Case, Check, Findings, relative_error
from causalreel.weights.strict import load_strictly

DEMO_CHUNK = 3
"""Latents per call of the official demo, and latents that it decodes again."""


@torch.no_grad()
def wan_vae(case: Case, found: Findings) -> None:
    """c10: encoding, decoding, and decoding in every recorded split of the latents over calls."""
    codec = load_wan_vae(_weights(case, "weights_vae"))
    _check_size(case, codec)
    if "in.channel_mean" in case.tensors:
        codec.set_statistics(case.tensors["in.channel_mean"].tolist(), case.tensors["in.channel_std"].tolist())
    for name in [name for name in case.tensors if re.fullmatch(r"in\.video_\w+", name)]:
        _encode(codec, found, name.removeprefix("in.video_"))
    if "in.latents" in case.tensors:
        _decode(codec, case, found)


def _check_size(case: Case, codec: CausalVAE) -> None:
    """The sizes that the loader found in the file against those that the case states."""
    config, stated = codec.config, case.model
    ours = {
        "dim": config.dim,
        "z_dim": config.z,
        "dim_mult": list(config.multipliers),
        "num_res_blocks": config.res_blocks,
        "temperal_downsample": list(config.temporal_down),
    }
    differing = [key for key, value in ours.items() if key in stated and stated[key] != value]
    if differing or stated.get("attn_scales"):
        raise ValueError(f"the weights file has other sizes than the case: {', '.join(differing) or 'attn_scales'}")


def _encode(codec: CausalVAE, found: Findings, label: str) -> None:
    video = found.case.tensors[f"in.video_{label}"].transpose(1, 2)  # (B,T,3,H,W)
    factor = codec.geometry.temporal
    video = video[:, : 1 + (video.shape[1] - 1) // factor * factor]
    found.add(f"out.mu_{label}", codec.posterior(video)[0].movedim(-1, 2))
    found.add(f"out.latents_{label}", codec.encode(video))
    stream = codec.encode_stream()
    pieces = [video[:, :1], *(video[:, 1:].split(factor, 1) if video.shape[1] > 1 else [])]
    found.add(f"out.latents_{label}", torch.cat([stream(piece) for piece in pieces], 1), via="streamed")


def _decode(codec: CausalVAE, case: Case, found: Findings) -> None:
    latents = case.tensors["in.latents"]
    found.add("out.video_unclamped", codec.pixels(codec._raw(latents)))
    found.add("out.video_first_latent_only", codec.decode(latents[:, :1]))
    wanted = case.tensors["out.video_unclamped"].clamp(-1, 1)
    _compare(found, "clamped, whole", codec.decode(latents), wanted)
    for name, split in _splits(case, latents.shape[1]):
        stream = codec.stream()
        pieces = [stream(piece) for piece in latents.split(split, 1)]
        _compare(found, f"clamped, {name}", torch.cat(pieces, 1), wanted)
        stated = case.extra.get(name, {}).get("frames_per_call")
        if stated is not None:
            _compare(found, f"frames per call, {name}", *map(torch.tensor, ([p.shape[1] for p in pieces], stated)))
    found.add_printed("frames_if_every_latent_is_decoded_alone", sum(_frames(codec, z) for z in latents.split(1, 1)))
    used = codec.stream()
    used(latents)
    again = used(latents[:, :1]).shape[1]
    found.add_printed("frames_returned_for_one_latent_when_cache_was_not_cleared", again)


def _frames(codec: VideoCodec, latents: Tensor) -> int:
    return codec.decode(latents).shape[1]


def _splits(case: Case, count: int) -> Iterator[tuple[str, list[int]]]:
    """Recorded splits of the latents over calls, and one that is not recorded."""
    for name, facts in case.extra.items():
        if isinstance(facts, dict) and "latents_per_call" in facts:
            yield name, list(facts["latents_per_call"])
    yield "1 and the rest", [1, count - 1] if count > 1 else [1]


def _compare(found: Findings, label: str, got: Tensor, wanted: Tensor) -> None:
    found.checks.append(Check(label, relative_error(got, wanted), found.case.tolerance))


@torch.no_grad()
def taehv(case: Case, found: Findings) -> None:
    """c11: encoding, decoding whole, streamed, and as the official demo does it; previews."""
    codec = _network(case)
    if "parameters" in case.extra:
        found.add_printed("parameters", sum(p.numel() for p in codec.parameters()))
    found.add_printed("frames_to_trim", codec.dropped)
    if "in.latents" in case.tensors:
        latents = case.tensors["in.latents"]
        found.add("out.video_untrimmed_0_1", lambda: codec.all_pixels(latents))
        found.add("out.video_trimmed_pm1_clamped", lambda: codec.decode(latents))
        whole = shown(case.tensors["out.video_untrimmed_0_1"][:, codec.dropped :])
        for split in {1, 2, DEMO_CHUNK, latents.shape[1]}:
            stream = codec.stream()
            streamed = torch.cat([stream(piece) for piece in latents.split(split, 1)], 1)
            found.add("out.video_trimmed_pm1_clamped", streamed, via=f"streamed by {split}")
            _compare(found, f"streamed by {split}", streamed, whole)
        _previews(case, found, latents)
    if "in.latents_9" in case.tensors:
        latents = case.tensors["in.latents_9"]
        found.add("out.video_9_untrimmed_0_1", lambda: codec.all_pixels(latents))
        found.add("out.demo_chunked_pm1", lambda: _demo(codec, latents))
    if "in.video_0_1" in case.tensors:
        found.add("out.latents_encoded", lambda: codec.all_latents(case.tensors["in.video_0_1"]))


def _network(case: Case) -> TAEHV:
    """From the weights file, or made by the recipe that the case states."""
    if case.get("weights") != "recipe":
        return load_taehv(_weights(case, "weights_taehv"))
    config = TAEHVConfig(
        channels=case.model["latent_channels"],
        encoder_width=case.model["encoder_width"],
        decoder_widths=tuple(case.model["decoder_widths"]),
    )
    codec = TAEHV(config)
    made = recipe_weights(codec, str(case.get("weight_recipe")), case.config.get("weight_recipe_last_bias_shift"))
    load_strictly(codec, made, source="the recipe")
    total = sum(float(value.double().square().sum()) for value in made.values())
    stated = case.extra.get("sum_of_squares_of_all_weights")
    if stated is not None and abs(total - stated) > 1e-4 * stated:
        raise ValueError(f"the recipe is not understood: its weights' squares sum to {total:.6g}, not {stated:.6g}")
    return codec


def recipe_weights(codec: TAEHV, recipe: str, shift: Sequence[float] | None) -> dict[str, Tensor]:
    """Weights by the recorded recipe: normal numbers in the order of sorted names, scaled by fan-in and a gain.

    Seed and gains are read from the recipe's text.
    """
    seed = re.search(r"RandomState\((\d+)\)", recipe)
    default = re.search(r"else ([\d.]*\d)", recipe)
    bias_scale = re.search(r"biases: ([\d.]*\d)\*z", recipe)
    if seed is None or default is None or bias_scale is None:
        raise ValueError("the recipe is not understood: it names no seed, no default gain or no scale of biases")
    gains = {match[2]: float(match[1]) for match in re.finditer(r"([\d.]*\d) for ([\w.]+\.weight)", recipe)}
    gains |= {match[2]: float(match[1]) for match in re.finditer(r"([\d.]*\d) for names ending in ([\w.]+)", recipe)}
    shapes = {name: tuple(value.shape) for name, value in codec.state_dict().items()}
    last = f"decoder.{len(codec.decoder) - 1}.bias"
    random, made = np.random.RandomState(int(seed[1])), {}
    for name in sorted(shapes):
        z = random.standard_normal(math.prod(shapes[name])).astype(np.float32).reshape(shapes[name])
        if name.endswith("bias"):
            z = np.float32(float(bias_scale[1])) * z
            z = z + np.asarray(shift, np.float32) if name == last and shift is not None else z
        else:
            gain = next((gains[end] for end in gains if name.endswith(end)), float(default[1]))
            z = z * np.float32(gain / math.sqrt(math.prod(shapes[name][1:])))
        made[name] = torch.from_numpy(np.ascontiguousarray(z))
    return made


def _weights(case: Case, default: str) -> str:
    name = str(case.get("weights", default=default)).removesuffix(".safetensors")
    return str(case.folder / f"{name}.safetensors")


def _previews(case: Case, found: Findings, latents: Tensor) -> None:
    """Fewer frames (`preview_time`) or smaller ones (`preview_space`): as many latents as the output has frames of."""
    for name in [name for name in case.tensors if re.fullmatch(r"out\.preview_(time|space)(_(True|False))+", name)]:
        kind, _, switches = name.removeprefix("out.preview_").partition("_")
        flags = [flag == "True" for flag in switches.split("_")]
        if kind == "time":  # the first growth is 1 in this layout and has no switch
            codec = _smaller(case, growth=(1, *(2 if flag else 1 for flag in flags)))
            found.add_printed(f"frames_to_trim_time_{switches}", codec.dropped)
        else:
            codec = _smaller(case, upsample=tuple(flags))
        wanted = case.tensors[name]
        part = latents[: wanted.shape[0], : wanted.shape[1] // codec.geometry.temporal]
        found.add(name, codec.all_pixels(part))


def _smaller(case: Case, **less: tuple[int, ...] | tuple[bool, ...]) -> TAEHV:
    """The case's network with less growth or fewer doublings."""
    whole = _network(case)
    codec = TAEHV(replace(whole.config, **less))  # pyright: ignore[reportArgumentType]
    load_strictly(codec, cut_growth(codec.config, whole.state_dict()), source=case.name)
    return codec


def _demo(codec: TAEHV, latents: Tensor) -> Tensor:
    """The official demo's calls: from the second on, the latents of the call before are decoded again and dropped."""
    pieces = [codec.all_pixels(latents[:, :DEMO_CHUNK])[:, codec.dropped :]]
    for start in range(DEMO_CHUNK, latents.shape[1], DEMO_CHUNK):
        again = latents[:, start - DEMO_CHUNK : start + DEMO_CHUNK]
        pieces.append(codec.all_pixels(again)[:, DEMO_CHUNK * codec.geometry.temporal :])
    return torch.cat(pieces, 1) * 2 - 1
