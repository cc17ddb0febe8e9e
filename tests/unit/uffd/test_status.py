"""The counters, the status, and its two forms."""

from __future__ import annotations

import os

import pytest
from prometheus_client.parser import text_string_to_metric_families

from diffmergefs.core.view import HOLE
from diffmergefs.uffd.status import Counters, Ledger, Served, Status, rendered

VM = Served(7, 1234, "/srv/base", 5.0, 2, None)


def found() -> Status:
    ledger = Ledger("/run/s", "/srv/base", 8192, started=1.0, accepted=3, refused=2, failed=1)
    ended, counters = Counters(faults=1, fault_ns=700, copied_bytes=4096), Counters(retries=4)
    ended.buckets[10] += 1
    ledger.ended.add(ended)
    for nanoseconds in (1024, 1025):
        counters.fault(nanoseconds)
    counters.supply({0: 4096, HOLE: 100})
    counters.supply({0: 4096})
    counters.ahead_bytes, counters.zero_bytes, counters.removed_bytes = 11, 12, 13
    return ledger.status([(VM, counters)])


def test_the_status_adds_up_what_was_done_for_all_vms() -> None:
    status = found()
    assert (status.pid, status.vms, status.stopping) == (os.getpid(), (VM,), False)
    assert (status.accepted, status.refused, status.failed) == (3, 2, 1)
    assert (status.faults, status.fault_seconds, status.retries) == (3, 2749 / 1e9, 4)
    assert (status.copied_bytes, status.zero_bytes, status.removed_bytes) == (4096, 12, 13)
    assert status.prefetched_bytes == 11
    assert [(each.layer, each.bytes) for each in status.supplied] == [(None, 100), (0, 8192)]
    buckets = {bucket.seconds: bucket.reads for bucket in status.fault_buckets}
    assert (buckets[1024 / 1e9], buckets[2048 / 1e9]) == (2, 3)


def test_json_gives_the_same_status_back() -> None:
    status = found()
    assert Status.from_json(rendered("status.json", status)) == status
    for text in ("{}", "[]", '{"vms": [{}]}', "x"):
        with pytest.raises(ValueError):
            Status.from_json(text)


def test_prometheus_reads_the_metrics() -> None:
    families = text_string_to_metric_families(rendered("metrics", found()).decode())
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }
    expected = {
        ("diffmergefs_start_time_seconds",): 1.0,
        ("diffmergefs_uffd_vms",): 1,
        ("diffmergefs_uffd_accepted_vms_total",): 3,
        ("diffmergefs_uffd_refused_connections_total",): 2,
        ("diffmergefs_uffd_failed_vms_total",): 1,
        ("diffmergefs_uffd_retries_total",): 4,
        ("diffmergefs_uffd_copied_bytes_total",): 4096,
        ("diffmergefs_uffd_zero_bytes_total",): 12,
        ("diffmergefs_uffd_removed_bytes_total",): 13,
        ("diffmergefs_uffd_prefetched_bytes_total",): 11,
        ("diffmergefs_uffd_supplied_bytes_total", ("layer", "hole")): 100,
        ("diffmergefs_uffd_supplied_bytes_total", ("layer", "0")): 8192,
        ("diffmergefs_uffd_fault_duration_seconds_count",): 3,
        ("diffmergefs_uffd_fault_duration_seconds_bucket", ("le", "+Inf")): 3,
    }
    assert {name: values[name] for name in expected} == expected
