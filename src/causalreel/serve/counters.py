"""Numbers for Prometheus: what happened (counters, histograms) and what is (read from the scheduler when asked)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from causalreel.serve.emitted import Emitted

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Counters:
    """One server's numbers, in a registry of their own.

    facts: name -> number of what is at the moment; asked at every scrape.
    """

    def __init__(self, facts: Callable[[], dict[str, Any]]) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        registry.register(_Facts(facts))
        self.stages = Histogram(
            "causalreel_chunk_seconds",
            "Seconds that a chunk spent in a stage",
            ["stage"],
            buckets=BUCKETS,
            registry=registry,
        )
        self.commands = Histogram(
            "causalreel_command_latency_seconds",
            "Seconds from a command to its first pixels",
            ["name"],
            buckets=BUCKETS,
            registry=registry,
        )
        self.chunks = Counter("causalreel_chunks", "Chunks given out", ["to"], registry=registry)
        self.frames = Counter("causalreel_frames", "Pixel frames given out", ["to"], registry=registry)
        self.bytes = Counter("causalreel_stream_bytes", "Bytes of chunks sent to viewers", registry=registry)
        self.sent = Histogram(
            "causalreel_send_seconds", "Seconds until a chunk had left", buckets=BUCKETS, registry=registry
        )
        self.dropped = Counter("causalreel_dropped_connections", "Streams that broke off", registry=registry)
        self.lost = Counter("causalreel_lost_resumptions", "Streams resumed too late", registry=registry)
        self.refused = Counter("causalreel_refused", "Requests answered with an error", ["code"], registry=registry)
        self.videos = Counter("causalreel_videos", "Video jobs by outcome", ["status"], registry=registry)

    def given(self, emitted: Emitted, to: str) -> None:
        """Count a chunk that leaves: `to` a stream or a video."""
        self.chunks.labels(to).inc()
        self.frames.labels(to).inc(len(emitted.frames))
        timings = emitted.timings
        for stage in ("queue", "denoise", "decode", "encode"):
            self.stages.labels(stage).observe(getattr(timings, f"{stage}_s"))
        for command in emitted.commands:
            self.commands.labels(command.name).observe(command.latency_s)

    def render(self) -> bytes:
        """Everything in Prometheus's text format."""
        return generate_latest(self.registry)


class _Facts:
    """Gauges made of the scheduler's facts: numbers by their name, tables of numbers with a label."""

    def __init__(self, facts: Callable[[], dict[str, Any]]) -> None:
        self.facts = facts

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return ()  # so that registering does not ask

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for name, value in self.facts().items():
            if isinstance(value, dict):
                family = GaugeMetricFamily(f"causalreel_{name}", name.replace("_", " "), labels=["of"])
                for label, number in value.items():
                    if _is_number(number):
                        family.add_metric([str(label)], float(number))
                yield family
            elif _is_number(value):
                yield GaugeMetricFamily(f"causalreel_{name}", name.replace("_", " "), value=float(value))


def _is_number(value: object) -> bool:
    return isinstance(value, (bool, int, float))
