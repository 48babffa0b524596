"""The denoiser: a DiT with a context policy, called the way rollouts and losses call it; and guidance around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from causalreel.flow import guide
from causalreel.nn.caches import growing_cache
from causalreel.nn.camera import network
from causalreel.nn.kv_cache import FrameCache, KVCache
from causalreel.nn.masks import Context, Frame, Reading, frames_of, reading
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.presets import ModelConfig
from causalreel.nn.texts import CallText, TextKeys
from causalreel.nn.token_cache import TokenCache
from causalreel.types import Cache, Conditioning, Denoiser, ReplayCache


class DiTDenoiser(nn.Module):
    """x (B,F,C,H,W), sigma (B,F) -> velocity (B,F,C,H,W) float32. See types.Denoiser for the arguments of a call.

    compute: type of the network's arithmetic where it differs from the weights' (bfloat16 over float32 masters).
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        context: ContextPolicy = Context(),
        backend: str = "auto",
        compute: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.model = network(config)
        self.context, self.backend, self.compute = context, backend, compute
        self.run: Callable[..., Tensor] | None = None
        """What evaluates the network in its place, if anything: see `parallel.graphs`."""

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    def new_cache(self) -> KVCache | TokenCache:
        """An empty context for one rollout."""
        return growing_cache(self.context, self.config.layers)

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """The same conditioning for many calls without gradient: its text keys are kept from the first one on."""
        return replace(conditioning, prepared=CallText.texts_of(conditioning))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        sizes: Sequence[int] | None = None,
        start: int = 0,
        cache: Cache | None = None,
    ) -> Tensor:
        """One call: bidirectional (no sizes), chunk-causal over its own frames (sizes), or behind a cache."""
        sizes = (x.shape[1],) if sizes is None else tuple(sizes)
        done = self.context.tells_done and not bool(sigma.any())
        queries = frames_of(sizes, start=start, cuts=conditioning.cuts or (), done=done)
        return self._call(x, sigma, conditioning, queries, cache)

    def teacher_forced(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        clean: Tensor,
        sizes: Sequence[int],
        clean_sigma: Tensor | None = None,
    ) -> Tensor:
        """Noisy x and its clean context (both (B,F,C,H,W)) in one pass -> velocity of x.

        Noisy chunk i sees clean chunks before it and itself: the same numbers as i cached calls with true context.
        clean_sigma (B,F): noise level that `clean` carries; 0 if absent. Causal Forcing (arXiv 2602.02214), stage 1.
        """
        whole, levels, told, read = self._halves(x, sigma, conditioning, clean, sizes, clean_sigma)
        with self._precision(x.device):
            return (self.run or self.model)(
                whole, levels, told, reading=read, outputs=x.shape[1], backend=self.backend
            ).float()

    @torch.no_grad()
    def derivative(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        along: Tensor,
        clean: Tensor,
        sizes: Sequence[int],
        clean_sigma: Tensor | None = None,
    ) -> Tensor:
        """How the velocity of `teacher_forced` changes as sigma grows and x moves by `along` (B,F,C,H,W) times that;
        the context stays -> (B,F,C,H,W) float32.

        In forward mode: one pass of the plain network, with twice its memory, in which attention writes its scores out
        frame by frame, because no fused kernel has such a derivative.
        """
        whole, levels, told, read = self._halves(x, sigma, conditioning, clean, sizes, clean_sigma)
        frames = x.shape[1]
        moves = torch.cat([torch.zeros_like(x), along], dim=1).to(whole.dtype)
        grows = torch.cat([torch.zeros_like(levels[:, :frames]), torch.ones_like(levels[:, frames:])], dim=1)
        forward: Any = forward_ad  # which torch has no types for
        written_out: Any = sdpa_kernel(SDPBackend.MATH)  # pyright: ignore[reportUnknownVariableType]
        not_compiled = torch.compiler.set_stance("force_eager")
        with forward.dual_level(), written_out, not_compiled, self._precision(x.device):
            dual = forward.make_dual(whole, moves), forward.make_dual(levels, grows)
            velocity = self.model(*dual, told, reading=read, outputs=frames, backend="by frame")
            return forward.unpack_dual(velocity).tangent.float()

    def _halves(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        clean: Tensor,
        sizes: Sequence[int],
        clean_sigma: Tensor | None,
    ) -> tuple[Tensor, Tensor, Conditioning, Reading]:
        """What a network is given in teacher forcing: context and noisy frames behind each other."""
        frames = x.shape[1]
        if clean.shape != x.shape or sum(sizes) != frames:
            raise ValueError(
                f"clean must match x {tuple(x.shape)} and sizes add up; got {tuple(clean.shape)}, {list(sizes)}"
            )
        sigma = sigma.expand(-1, frames)
        clean_sigma = torch.zeros_like(sigma) if clean_sigma is None else clean_sigma.expand(-1, frames)
        cuts = conditioning.cuts or ()
        both = frames_of(sizes, stream=0, cuts=cuts) + frames_of(sizes, stream=1, cuts=cuts)
        whole, levels = torch.cat([clean.to(x.dtype), x], dim=1), torch.cat([clean_sigma, sigma], dim=1)
        return whole, levels, self._checked(conditioning).twice(), reading(both, both, self.context)

    @torch.no_grad()
    def context_of(
        self, clean: Tensor, conditioning: Conditioning, *, sizes: Sequence[int], clean_sigma: Tensor | None = None
    ) -> KVCache:
        """Keys and values of a whole clip (B,F,C,H,W), chunk-causal, without gradient: for `behind`."""
        cache = KVCache(self.config.layers, self.context, keep_all=True)
        sigma = torch.zeros_like(clean[:, :, 0, 0, 0]) if clean_sigma is None else clean_sigma
        self._call(clean, sigma, conditioning, frames_of(sizes, cuts=conditioning.cuts or ()), cache)
        cache.commit(clean.shape[1])
        return cache

    def behind(
        self,
        context: Cache,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        sizes: Sequence[int],
        start: int = 0,
    ) -> Tensor:
        """All noisy chunks of x (B,F,C,H,W) at once, each behind the earlier chunks of `context` -> velocity.

        start: the clip's frame that x begins with; x, sigma and conditioning are of the frames from there on.
        The numbers of `teacher_forced`, but the context is constant: no gradient, and no work when it is used again.
        """
        queries = frames_of(sizes, start=start, stream=1, cuts=conditioning.cuts or ())
        return self._call(x, sigma, conditioning, queries, context)

    def _call(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, queries: tuple[Frame, ...], cache: Cache | None
    ) -> Tensor:
        if len(queries) != x.shape[1]:
            raise ValueError(f"sizes must add up to the {x.shape[1]} frames of the call, got {len(queries)}")
        if cache is None:
            read = reading(queries, queries, self.context)
        else:
            assert isinstance(cache, FrameCache)
            read = cache.begin(queries, x.shape[3] * x.shape[4] // self.config.patch**2)
        with self._precision(x.device):
            return (self.run or self.model)(
                x,
                sigma,
                self._checked(conditioning),
                reading=read,
                cache=cache,
                backend=self.backend,
            ).float()

    def _checked(self, conditioning: Conditioning) -> Conditioning:
        """ValueError if it was prepared for other rows than it has."""
        kept: list[TextKeys] = conditioning.prepared or []
        if any(len(text.text) != len(conditioning) for text in kept):
            raise ValueError(
                f"the conditioning of {len(conditioning)} rows was prepared for {len(kept[0].text)}: "
                f"guided calls need Guided.prepare, plain ones DiTDenoiser.prepare"
            )
        return conditioning

    def _precision(self, device: torch.device) -> nullcontext[None] | torch.autocast:
        if self.compute is None or self.compute == self.model.dtype:
            return nullcontext()
        return torch.autocast(device.type, self.compute, cache_enabled=False)


class Guided:
    """A denoiser with classifier-free guidance: one call over [conditional; unconditional] rows, one cache for both.

    negative: the unconditional input, one row or as many as the batch. The released code runs two calls and two caches.
    """

    def __init__(self, denoise: Denoiser, negative: Conditioning, scale: float) -> None:
        self.denoise, self.negative, self.scale = denoise, negative, scale

    def new_cache(self) -> ReplayCache:
        return self.denoise.new_cache()

    def prepare(self, conditioning: Conditioning) -> Conditioning:
        """As DiTDenoiser.prepare, for guided calls only: what is kept is of both rows."""
        return replace(conditioning, prepared=self.denoise.prepare(self._pair(conditioning)).prepared)

    def __call__(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        sizes: Sequence[int] | None = None,
        start: int = 0,
        cache: Cache | None = None,
    ) -> Tensor:
        """As types.Denoise."""
        call = partial(self.denoise, sizes=sizes, start=start, cache=cache)
        return self._both(call, x, sigma, conditioning)

    def teacher_forced(
        self,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        clean: Tensor,
        sizes: Sequence[int],
        clean_sigma: Tensor | None = None,
    ) -> Tensor:
        """As DiTDenoiser.teacher_forced, guided."""
        how = {"clean": _twice(clean), "clean_sigma": clean_sigma if clean_sigma is None else _twice(clean_sigma)}
        return self._both(partial(self.denoise.teacher_forced, sizes=sizes, **how), x, sigma, conditioning)

    def context_of(
        self, clean: Tensor, conditioning: Conditioning, *, sizes: Sequence[int], clean_sigma: Tensor | None = None
    ) -> ReplayCache:
        """As DiTDenoiser.context_of, of both rows."""
        clean_sigma = clean_sigma if clean_sigma is None else _twice(clean_sigma)
        return self.denoise.context_of(_twice(clean), self._pair(conditioning), sizes=sizes, clean_sigma=clean_sigma)

    def behind(
        self,
        context: Cache,
        x: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        *,
        sizes: Sequence[int],
        start: int = 0,
    ) -> Tensor:
        """As DiTDenoiser.behind, guided."""
        return self._both(partial(self.denoise.behind, context, sizes=sizes, start=start), x, sigma, conditioning)

    def _both(self, call: Callable[..., Tensor], x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        cond, uncond = call(_twice(x), _twice(sigma), self._pair(conditioning)).chunk(2)
        return guide(cond, uncond, self.scale)

    def _pair(self, conditioning: Conditioning) -> Conditioning:
        return conditioning.paired(self.negative)


def _twice(x: Tensor) -> Tensor:
    return torch.cat([x, x])
