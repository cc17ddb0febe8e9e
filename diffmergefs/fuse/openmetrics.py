"""A mount's status as OpenMetrics text, for Prometheus and whatever else reads that."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from diffmergefs.fuse.status import Status

if TYPE_CHECKING:
    from prometheus_client import Metric


def exposition(status: Status) -> bytes:
    """The status in the OpenMetrics text format, by prometheus_client.

    Raises ImportError where that package is missing.
    """
    # Imported here: it takes a daemon 14 MiB, and most are never scraped.
    from prometheus_client import CollectorRegistry
    from prometheus_client.openmetrics.exposition import generate_latest
    from prometheus_client.registry import Collector

    class Once(Collector):
        def collect(self) -> Iterator[Metric]:
            return _families(status)

    registry = CollectorRegistry()
    registry.register(Once())
    text: bytes = generate_latest(registry)  # type: ignore[no-untyped-call]  # it is not annotated
    return text


def _families(status: Status) -> Iterator[Metric]:
    from prometheus_client import metrics_core as core

    build = {"version": status.version}
    yield core.InfoMetricFamily("diffmergefs_build", "What serves the mount.", build)
    for name, text, number in (
        ("start_time_seconds", "When the mount was made, as a Unix time.", status.started),
        ("open_images", "Images whose layers are open.", status.open_images),
        ("open_files", "Open files of memory images.", status.open_files),
        ("fast_loop", "1 if the fast read loop is in force, else 0.", status.fast_loop),
    ):
        yield core.GaugeMetricFamily(f"diffmergefs_{name}", text, number)
    for name, text, number in (
        ("thread_reads", "Reads that waited for bytes.", status.reads_in_threads),
        ("prefetch_pushed_bytes", "Bytes that were prefetched.", status.prefetch_pushed_bytes),
        ("prefetch_hit_bytes", "Those that nobody asked for.", status.prefetch_hit_bytes),
        ("tainted_layers", "Layers that changed while in use.", status.tainted_layers),
    ):
        yield core.CounterMetricFamily(f"diffmergefs_{name}", text, number)
    yield from _requests(status)
    yield _supplied(status)
    yield _durations(status)


def _requests(status: Status) -> Iterator[Metric]:
    from prometheus_client.metrics_core import CounterMetricFamily

    asked = CounterMetricFamily(
        "diffmergefs_requests", "Requests of the kernel.", labels=["operation"]
    )
    failed = CounterMetricFamily(
        "diffmergefs_request_errors",
        "Requests that were answered with an error.",
        labels=["operation", "errno"],
    )
    for each in status.operations:
        asked.add_metric([each.operation], each.requests)
        for name, count in each.errors.items():
            failed.add_metric([each.operation, name], count)
    yield asked
    yield failed


def _supplied(status: Status) -> Metric:
    from prometheus_client.metrics_core import CounterMetricFamily

    family = CounterMetricFamily(
        "diffmergefs_supplied_bytes",
        "Bytes that each layer of a tag's chain supplied to reads.",
        labels=["tag", "layer"],
    )
    for each in status.supplied:
        layer = "hole" if each.layer is None else str(each.layer)
        # The text is UTF-8, a file's name may be anything.
        tag = os.fsencode(each.tag).decode("utf-8", "backslashreplace")
        family.add_metric([tag, layer], each.bytes)
    return family


def _durations(status: Status) -> Metric:
    from prometheus_client.metrics_core import HistogramMetricFamily

    buckets = [(str(bucket.seconds), float(bucket.reads)) for bucket in status.read_buckets]
    return HistogramMetricFamily(
        "diffmergefs_read_duration_seconds",
        "How long the daemon took to read from a memory file.",
        buckets=[*buckets, ("+Inf", float(status.reads))],
        sum_value=status.read_seconds,
    )
