"""To make videos in another manner than a model was trained for: another context policy, plan or context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from causalreel import families
from causalreel.infer.schedule import step_count
from causalreel.nn.policies.interface import ContextPolicy
from causalreel.nn.policies.registry import described, policy_from
from causalreel.nn.policies.rolling_forcing import RollingForcing
from causalreel.nn.policies.window import Context
from causalreel.weights.export import Export, Sampling

Plan = Literal["chunked", "rolling"]


@dataclass(frozen=True)
class Manner:
    """What is asked for; None: as the model was trained."""

    policy: str | ContextPolicy | None = None
    """Context policy, as `nn.policies.registry.policy_from` reads it."""
    plan: Plan | None = None
    """chunked: chunk after chunk; rolling: a window of chunks at rising noise levels."""
    any_plan: bool = False
    """Allow a plan that the model was not trained for."""
    noisy_context: int | None = None
    """Chunks from this number on become context as their last denoising call read them: a call less for each."""

    def of(self, export: Export, sampling: Sampling) -> tuple[Export, Sampling]:
        """The same with what is asked for; ValueError for what cannot be."""
        chunk = sampling.chunk
        if self == Manner():
            return export, sampling
        if chunk is None:
            raise ValueError(f"policy, plan and noisy context need an autoregressive model; {export.name} is none")
        if self.plan is not None and self.plan != sampling.plan:
            if not self.any_plan:
                raise ValueError(
                    f"plan {self.plan}: {export.name} was not trained for it but for {sampling.plan}, and makes worse "
                    f"videos; --any-plan allows it"
                )
            sampling = replace(
                sampling, plan=self.plan, first_steps=None if self.plan == "rolling" else sampling.first_steps
            )
        is_rolling = sampling.plan == "rolling"
        frames = export.frames // chunk * chunk
        if is_rolling:  # all that is denoised together, and the sink before it
            frames = max(frames, (step_count(sampling) + 1) * chunk)
        policy = self.policy
        if isinstance(policy, str):
            policy = policy_from(policy, frames=frames, chunk=chunk)
        if policy is None and is_rolling != isinstance(export.context, RollingForcing):
            name = "rolling-forcing" if is_rolling else "full"
            policy = policy_from(name, frames=frames, chunk=chunk)
        if policy is not None:
            export = replace(export, context=policy)
        if is_rolling and not isinstance(export.context, Context | RollingForcing):
            raise ValueError(
                f"plan rolling reads a window of many chunks, for which the policy {described(export.context)} has no "
                f"rule; it works with rolling-forcing, full, window, sink and re-indexed"
            )
        if self.noisy_context is not None:
            if self.noisy_context < 0:
                raise ValueError(f"noisy_context must be at least 0, got {self.noisy_context}")
            sampling = replace(sampling, noisy_from=self.noisy_context)
        return export, sampling


def beyond(export: Export, sampling: Sampling) -> ContextPolicy | None:
    """What a video beyond a training clip's length sees, where its family has something better than a window for models
    whose own policy keeps everything; else None."""
    chunk, longer = sampling.chunk, families.of(export).longer
    if longer is None or chunk is None or sampling.plan != "chunked" or export.context != Context():
        return None
    if chunk > export.frames:  # no such clip can be made, as is said elsewhere
        return None
    return policy_from(longer, frames=export.frames // chunk * chunk, chunk=chunk)
