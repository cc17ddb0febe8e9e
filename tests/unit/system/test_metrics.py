"""Durations in buckets, and metrics as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hypothesis import given
from hypothesis import strategies as st

from diffmergefs.system.metrics import BUCKETS, buckets, exposition, histogram
from tests.support.counters import metric_families

if TYPE_CHECKING:
    from prometheus_client import Metric


@given(st.lists(st.integers(0, 9), min_size=BUCKETS, max_size=BUCKETS))
def test_a_bucket_includes_all_counts_up_to_its_bound(counts: list[int]) -> None:
    found = buckets(counts)
    assert (found[0].seconds, found[-1].seconds) == (2**10 / 1e9, 2**34 / 1e9)
    for bucket in found:
        bound = round(bucket.seconds * 1e9).bit_length()
        assert bucket.reads == sum(counts[:bound])


def test_a_histogram_is_in_the_text() -> None:
    counts = [0] * BUCKETS
    counts[11], counts[40] = 2, 1

    def families() -> Iterator[Metric]:
        yield histogram("tries_seconds", "How long.", buckets(counts), 3, 1100.5)

    (family,) = metric_families(exposition(families).decode())
    assert (family.name, family.type, family.documentation) == (
        "tries_seconds",
        "histogram",
        "How long.",
    )
    values = {sample.name + sample.labels.get("le", ""): sample.value for sample in family.samples}
    assert values["tries_seconds_bucket" + str(2**10 / 1e9)] == 0
    assert values["tries_seconds_bucket" + str(2**34 / 1e9)] == 2
    assert values["tries_seconds_bucket+Inf"] == values["tries_seconds_count"] == 3
    assert values["tries_seconds_sum"] == 1100.5
