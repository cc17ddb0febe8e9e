"""What a mount's status tells beside its counters, where a test asks for the counters alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families


class Beside(TypedDict):
    """The keyword arguments of `status_of`."""

    pushed_bytes: int
    hit_bytes: int
    images: int
    files: int


NOTHING = Beside(pushed_bytes=0, hit_bytes=0, images=0, files=0)


def metric_families(text: str) -> Iterator[Metric]:
    """What a parser reads in a text for Prometheus."""
    yield from text_string_to_metric_families(text)
