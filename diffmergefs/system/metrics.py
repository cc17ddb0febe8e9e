"""Durations in buckets, and metrics in Prometheus' text format, by prometheus_client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Metric

#: How many counts of durations `buckets` takes. Count n is of those that took more than 2**(n - 1)
#: and at most 2**n nanoseconds.
BUCKETS = 65
# From 1 us to 17 s. The first bucket includes faster ones; only the total includes slower ones.
_FIRST, _LAST = 10, 34


@dataclass(frozen=True)
class Bucket:
    """How many reads, or faults, took at most this many seconds. Includes the buckets before it."""

    seconds: float
    reads: int


def buckets(counts: Sequence[int]) -> tuple[Bucket, ...]:
    """The buckets from 1 us to 17 s for these counts of durations."""
    return tuple(Bucket(2**n / 1e9, sum(counts[: n + 1])) for n in range(_FIRST, _LAST + 1))


def exposition(families: Callable[[], Iterator[Metric]]) -> bytes:
    """The metrics in Prometheus' text format 0.0.4.

    node_exporter's textfile collector reads this format, and refuses OpenMetrics. Raises
    ImportError if prometheus_client is missing.
    """
    # Imported here because it takes 14 MiB of a daemon's memory, and few mounts are scraped.
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class Snapshot(Collector):
        def collect(self) -> Iterator[Metric]:
            return families()

    registry = CollectorRegistry()
    registry.register(Snapshot())
    return generate_latest(registry)


def histogram(name: str, text: str, found: Iterable[Bucket], count: int, seconds: float) -> Metric:
    """A histogram of `count` durations, `seconds` in total. Raises as `exposition`."""
    from prometheus_client.metrics_core import HistogramMetricFamily

    bounds = [(str(bucket.seconds), float(bucket.reads)) for bucket in found]
    return HistogramMetricFamily(
        name, text, buckets=[*bounds, ("+Inf", float(count))], sum_value=seconds
    )
