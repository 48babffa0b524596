"""How fast a run is, for its records: tokens and operations a second, MFU, the wait for data, memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from causalreel.train.operations import Work, peak_of

try:
    import resource
except ImportError:  # not on Windows
    resource = None


class Meter:
    """What is measured between two records. work: of a trainer step over the whole batch, None if it is not known."""

    def __init__(self, work: Work | None, device: torch.device, processes: int) -> None:
        self.work, self.device, self.processes = work, device, processes
        self._waited = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The body waits for data."""
        began = time.monotonic()
        yield
        self._waited += time.monotonic() - began

    def record(self, steps: int, seconds: float) -> dict[str, float]:
        """Of so many steps in so many seconds of training, since the last record."""
        per_second = steps / max(seconds, 1e-9)
        found = {"steps_per_second": per_second, "data_wait": min(1.0, self._waited / max(seconds, 1e-9))}
        self._waited = 0.0
        if self.work is not None:
            found["tokens_per_second"] = self.work.tokens * per_second
            found["tflops_per_gpu"] = self.work.flop * per_second / self.processes / 1e12
        if self.device.type == "cuda":
            peak = peak_of(torch.cuda.get_device_name(self.device))
            if peak is not None and self.work is not None:
                found["mfu"] = found["tflops_per_gpu"] / peak
            found["peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        if resource is not None:
            unit = 1 if sys.platform == "darwin" else 1024
            found["host_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        return found
