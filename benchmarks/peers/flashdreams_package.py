"""FlashDreams, got in as shipped and built with random weights: stubs for what is absent, the two changes, builders.

The configurations repeat the published settings of its Causal-Forcing integration (window 21, sink 0, shift 5, cuDNN
attention, compile and CUDA graphs on), which is not part of the package on PyPI.
"""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import inspect
import sys
import tempfile
import textwrap
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.flashdreams_settings import FOUR, VERSION, Options, Work

STUBBED_WHEN_ABSENT = ("boto3", "botocore", "botocore.exceptions", "ftfy", "loguru", "pynvml", "tyro")
"""Packages that FlashDreams imports for downloads, prompts, logs and its command line; no timed call reaches them."""


# ---- getting the package in, as shipped ------------------------------------------------------------------------------


def stub(name: str) -> types.ModuleType:
    """Put an inert module `name` in place: any attribute is an object that may be called and does nothing."""

    class Inert:
        def __call__(self, *_: Any, **__: Any) -> Inert:
            return self

        def __getattr__(self, attribute: str) -> Inert:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return self

    def attribute_of(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return type(attribute, (Exception,), {}) if attribute[0].isupper() else Inert()

    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
    module.__path__ = []
    module.__dict__["__getattr__"] = attribute_of
    sys.modules[name] = module
    return module


def stub_absent(names: Iterable[str] = STUBBED_WHEN_ABSENT) -> list[str]:
    """Import each of `names`; those that cannot be imported become stubs -> the names stubbed."""
    stubbed = []
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            stub(name)
            stubbed.append(name)
    return stubbed


def part(name: str) -> Any:
    """A module of FlashDreams, by the name behind `flashdreams.`."""
    return importlib.import_module(f"flashdreams.{name}")


def remove_graph_breaks() -> list[str]:
    """Rewrite the KV cache's methods with min and max for torch.sym_min and torch.sym_max -> the methods changed.

    On torch 2.11 the two calls break the graph in every block. Same values: all operands are plain or traced integers.
    """
    module = part("core.attention.kvcache")
    changed = []
    for name, method in list(vars(module.BlockKVCache).items()):
        if not (inspect.isfunction(method) and {"sym_min", "sym_max"} & set(method.__code__.co_names)):
            continue
        source = textwrap.dedent(inspect.getsource(method))
        source = source.replace("torch.sym_min(", "min(").replace("torch.sym_max(", "max(")
        made: dict[str, Any] = {}
        exec(compile(source, module.__file__, "exec"), vars(module), made)
        setattr(module.BlockKVCache, name, made[name])
        changed.append(name)
    if not changed:
        raise RuntimeError("no torch.sym_min or sym_max in FlashDreams' KV cache: another version than " + VERSION)
    return changed


def use_compile_mode(mode: str) -> None:
    """Compile network and TAEHV with another mode of torch.compile than the package chooses."""
    compile_module = part("infra.compile").compile_module
    for user in ("recipes.wan.transformer.wan21", "recipes.taehv.impl"):
        part(user).compile_module = functools.partial(compile_module, mode=mode)


# ---- building what is timed ------------------------------------------------------------------------------------------


def scheduler_config(steps: Sequence[int]) -> Any:
    """The package's few-step scheduler as its Causal-Forcing configs set it: shift 5, warped steps."""
    return part("infra.diffusion.scheduler.fm").FlowMatchSchedulerConfig(
        num_inference_steps=len(steps),
        denoising_timesteps=list(steps),
        warp_denoising_step=True,
        shift=5.0,
        sigma_min=0.0,
        extra_one_step=True,
        num_train_timesteps=1000,
    )


def build_pipeline(chunk: int, work: Work, options: Options) -> Any:
    """The package's Causal-Forcing pipeline without text encoder and decoder, randomly initialised on the device."""
    import torch

    wan = part("recipes.wan")
    transformer = wan.Wan21TransformerConfig(
        network=wan.WanDiTNetwork1pt3BConfig(patch_embedding_type="conv3d", cp_method="ring", **work.network),
        checkpoint_path=None,
        batch_shape=(),
        len_t=chunk,
        guidance_scale=1.0,
        window_size_t=21,
        sink_size_t=0,
        stamp_image_latent=False,
        compile_network=options.compiled,
        use_cuda_graph=options.device != "cpu",
    )
    config = part("infra.pipeline").StreamInferencePipelineConfig(
        name="causal-forcing",
        encoder=None,
        decoder=None,
        enable_sync_and_profile=False,
        diffusion_model=part("infra.diffusion.model").DiffusionModelConfig(
            seed=42, transformer=transformer, scheduler=scheduler_config(FOUR)
        ),
    )
    torch.manual_seed(0)
    with torch.device(options.device):
        return config.setup().to(options.device).eval()


def build_decoder(kind: str, work: Work, options: Options) -> Any:
    """The package's streaming decoder, reading randomly initialised weights through its own loader."""
    import torch

    torch.manual_seed(0)
    if kind == "wan":
        vae = part("recipes.wan.autoencoder.vae")
        decoder = vae.Decoder3d(
            dim=work.vae.get("base_dim", vae.WanVAE.BASE_DIM), z_dim=16, temperal_upsample=(True, True, False)
        )
        weights = {"decoder." + key: value for key, value in decoder.state_dict().items()}
        weights |= {"conv2." + key: value for key, value in vae.CausalConv3d(16, 16, 1).state_dict().items()}
        make: Any = functools.partial(part("recipes.wan").WanVAEDecoderConfig, **work.vae)
    else:
        taehv = part("recipes.taehv")
        weights = _taehv_weights()
        make = functools.partial(taehv.TeahvVAEDecoderConfig, use_compile=options.compiled)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / ("lighttae-random.pth" if kind == "taehv" else "random.pth"))
        torch.save(weights, path)
        built = make(checkpoint_path=path, use_cuda_graph=options.device != "cpu").setup()
    return built.to(options.device).eval()


def _taehv_weights() -> dict[str, Any]:
    """Random weights of the TAEHV decoder that the package builds by default."""
    import torch

    impl = part("recipes.taehv.impl")
    shapes = impl.TAEHV(checkpoint_path=None, use_cuda_graph=False).decoder
    decoder = impl.Decoder(
        n_f=part("recipes.taehv")._LIGHTTAE_CHANNELS,
        latent_channels=16,
        image_channels=3,
        patch_size=1,
        decoder_time_upscale=(True, True),
        decoder_space_upscale=(True, True, True),
        act_func=torch.nn.ReLU(inplace=True),
    )
    if {k: v.shape for k, v in shapes.state_dict().items()} != {k: v.shape for k, v in decoder.state_dict().items()}:
        raise RuntimeError("FlashDreams' TAEHV has other shapes than expected: another version than " + VERSION)
    return {"decoder." + key: value for key, value in decoder.state_dict().items()}
