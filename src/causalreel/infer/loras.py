"""The LoRAs of a loaded network: merged into its weights, at strengths that can be changed while it is in use.

Merged means that a call costs what it costs without. Every change is computed from the weights as they were loaded, so
that strengths do not drift and 0 is exactly the model without.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from causalreel.foreign import shown
from causalreel.nn.denoiser import DiTDenoiser
from causalreel.nn.presets import ModelConfig
from causalreel.parallel.fast import FastDiT
from causalreel.weights.build import empty_denoiser
from causalreel.weights.lora import Lora, changed, check_fits, check_strength, check_together
from causalreel.weights.lora_files import Asked, read_loras

log = logging.getLogger(__name__)

Found = Sequence[tuple[str, Lora, float]]
"""Names, adapters and strengths."""


def find_loras(asked: Sequence[Asked], config: ModelConfig) -> Found:
    """The adapters, known to fit a network of this size and each other; ValueError before anything large is read."""
    found = read_loras(asked)
    if found:
        shapes = {name: tuple(value.shape) for name, value in empty_denoiser(config).model.state_dict().items()}
        for _, lora, _ in found:
            check_fits(lora, shapes)
        check_together([(lora, strength) for _, lora, strength in found])
    return found


class Loras:
    """The adapters of a network. Made once the network is where it will be used, and before it is accelerated.

    is_adjustable: keep the original weights that the adapters change, in the CPU's memory, for `set`.
    """

    def __init__(self, denoiser: DiTDenoiser, found: Found, *, is_adjustable: bool) -> None:
        self.denoiser = denoiser
        self.adapters = {name: lora for name, lora, _ in found}
        self.strengths = {name: strength for name, _, strength in found}
        self.version = 0
        """Counts changes: what was computed with the weights of another version is to be computed again."""
        self._base: dict[str, Tensor] | None = None
        names = list({name: None for lora in self.adapters.values() for name in lora.touched()})
        if is_adjustable:
            self._base = {name: self._parameter(name).detach().to("cpu", copy=True) for name in names}
        for name, value in changed(self._parameter, self._used(self.strengths)):
            self._parameter(name).data = value
        for name, strength in self.strengths.items():
            log.info("LoRA %s at strength %g", name, strength)

    def check(self, strengths: Mapping[str, float]) -> dict[str, float]:
        """All strengths as they would be after `set`; ValueError if it would refuse."""
        if self._base is None:
            raise ValueError("the LoRAs of this model cannot be changed: it was loaded without its original weights")
        for name, strength in strengths.items():
            if name not in self.adapters:
                there = ", ".join(self.adapters)
                raise ValueError(f"there is no LoRA called '{shown(str(name), 60)}'; there are {there}")
            check_strength(strength, name)
        after = self.strengths | {name: float(strength) for name, strength in strengths.items()}
        check_together(self._used(after))
        return after

    @torch.no_grad()
    def set(self, strengths: Mapping[str, float]) -> None:
        """Other strengths, of some or all, by name. What was made with the old weights (caches, text keys) is stale."""
        after = self.check(strengths)
        if after == self.strengths:
            return
        changing = [name for name in self.adapters if after[name] != self.strengths[name]]
        names = list({name: None for one in changing for name in self.adapters[one].touched()})
        assert self._base is not None
        base, device = self._base, self.denoiser.model.device
        done: list[str] = []
        if self._is_on_gpu():
            torch.cuda.synchronize(device)  # nothing reads the weights while they change
        try:
            for name, value in changed(lambda name: base[name].to(device), self._used(after), names):
                self._put(name, value)
                done.append(name)
        except ValueError:  # a sum that is not finite: back to what was
            for name, value in changed(lambda name: base[name].to(device), self._used(self.strengths), done):
                self._put(name, value)
            raise
        finally:
            self._refresh()
        self.strengths = after
        self.version += 1

    def _used(self, strengths: Mapping[str, float]) -> list[tuple[Lora, float]]:
        return [(lora, strengths[name]) for name, lora in self.adapters.items()]

    def _parameter(self, name: str) -> Tensor:
        return self.denoiser.model.get_parameter(name)

    def _is_on_gpu(self) -> bool:
        return self.denoiser.model.device.type != "cpu"

    def _put(self, name: str, value: Tensor) -> None:
        """In place: other forms of the network share the memory, or are told."""
        parameter = self._parameter(name)
        if not parameter.is_meta:
            parameter.data.copy_(value)
        if isinstance(self.denoiser.run, FastDiT):
            self.denoiser.run.renew(name, value)

    def _refresh(self) -> None:
        if isinstance(self.denoiser.run, FastDiT):
            self.denoiser.run.forget_levels()
