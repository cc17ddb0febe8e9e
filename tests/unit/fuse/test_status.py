"""The counters, the status that they become, and its text for Prometheus."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmergefs.core.view import HOLE
from diffmergefs.fuse.status import (
    GONE,
    METRICS_FILE,
    Metrics,
    Operation,
    Status,
    Supplied,
    rendered,
    status_of,
)
from tests.support.counters import NOTHING, metric_families


def counted() -> Metrics:
    metrics = Metrics()
    metrics.requests["read"] += 3
    metrics.requests["lookup"] += 2
    metrics.errors["lookup", errno.ENOENT] += 1
    metrics.errors["read", 99999] += 1
    metrics.read(1000, {0: 4096, HOLE: 100}, metrics.of_tag("leaf"))
    metrics.read(5_000_000, {0: 4096, 2: 50}, metrics.of_tag("leaf"))
    metrics.read(20_000_000_000, {1: 7}, metrics.of_tag("base"))
    metrics.waited += 1
    return metrics


def status() -> Status:
    found = status_of(counted(), pushed_bytes=8192, hit_bytes=4096, images=2, files=3)
    return dataclasses.replace(found, version="1.2", pid=7, tainted_layers=1)


def samples(found: Status) -> dict[str, float]:
    """Each sample of the text, as a parser reads it."""
    text = rendered(METRICS_FILE, found).decode()
    return {
        sample.name + "".join(f",{key}={sample.labels[key]}" for key in sorted(sample.labels)): (
            sample.value
        )
        for family in metric_families(text)
        for sample in family.samples
    }


def test_the_status_holds_what_was_counted() -> None:
    found = status()
    assert found.operations == (
        Operation("lookup", 2, {"ENOENT": 1}),
        Operation("read", 3, {"99999": 1}),
    )
    assert found.supplied == (
        Supplied("base", 1, 7),
        Supplied("leaf", None, 100),
        Supplied("leaf", 0, 8192),
        Supplied("leaf", 2, 50),
    )
    assert (found.reads, found.reads_in_threads, found.read_seconds) == (3, 1, 20.005001)
    assert (found.prefetch_pushed_bytes, found.prefetch_hit_bytes) == (8192, 4096)
    assert (found.tainted_layers, found.open_images, found.open_files) == (1, 2, 3)
    assert (found.version, found.pid) == ("1.2", 7)


@given(st.integers(0, 40 * 10**9))
@settings(max_examples=200)
def test_a_bucket_counts_the_reads_that_took_at_most_so_long(nanoseconds: int) -> None:
    metrics = Metrics()
    metrics.read(nanoseconds, {}, {})
    found = status_of(metrics, **NOTHING)
    assert found.reads == 1
    for bucket in found.read_buckets:
        assert bucket.reads == (nanoseconds <= round(bucket.seconds * 1e9))


def test_the_json_holds_the_status_and_can_be_parsed() -> None:
    found = status()
    text = found.to_json()
    assert json.loads(text).keys() == {field.name for field in dataclasses.fields(Status)}
    assert Status.from_json(text) == found
    for other in ("", "[]", "{}", '{"version": "9"}', "nonsense"):
        with pytest.raises(ValueError):
            Status.from_json(other)


def test_a_process_without_a_keeper_serves_alone() -> None:
    found = status_of(counted(), **NOTHING)
    assert (found.pid, found.service.server, found.service.servers) == (os.getpid(),) * 2 + (1,)
    assert not found.service.covered and found.service.obstacle


def test_the_text_for_prometheus_has_the_same_numbers() -> None:
    found = samples(status())
    assert found["diffmergefs_build_info,version=1.2"] == 1
    assert found["diffmergefs_requests_total,operation=read"] == 3
    assert found["diffmergefs_request_errors_total,errno=ENOENT,operation=lookup"] == 1
    assert found["diffmergefs_supplied_bytes_total,layer=0,tag=leaf"] == 8192
    assert found["diffmergefs_supplied_bytes_total,layer=hole,tag=leaf"] == 100
    assert found["diffmergefs_read_duration_seconds_bucket,le=1.024e-06"] == 1
    assert found["diffmergefs_read_duration_seconds_bucket,le=0.008388608"] == 2
    assert found["diffmergefs_read_duration_seconds_bucket,le=+Inf"] == 3
    assert found["diffmergefs_read_duration_seconds_count"] == 3
    assert found["diffmergefs_read_duration_seconds_sum"] == 20.005001
    plain = {
        "thread_reads_total": 1,
        "prefetch_pushed_bytes_total": 8192,
        "prefetch_hit_bytes_total": 4096,
        "tainted_layers_total": 1,
        "open_images": 2,
        "open_files": 3,
    }
    assert {name: found[f"diffmergefs_{name}"] for name in plain} == plain
    assert abs(found["diffmergefs_start_time_seconds"] - status().started) < 60


@given(st.text(max_size=20))
@settings(max_examples=50)
def test_a_name_of_any_characters_is_one_label(name: str) -> None:
    metrics = Metrics()
    metrics.read(1, {0: 5}, metrics.of_tag(name))
    found = status_of(metrics, **NOTHING)
    assert f"diffmergefs_supplied_bytes_total,layer=0,tag={name}" in samples(found)


def test_a_name_that_is_not_utf_8_is_escaped() -> None:
    metrics = Metrics()
    metrics.read(1, {0: 5}, metrics.of_tag("a\udcffb"))
    found = status_of(metrics, **NOTHING)
    assert "diffmergefs_supplied_bytes_total,layer=0,tag=a\\xffb" in samples(found)
    assert Status.from_json(found.to_json()) == found


def test_the_counts_of_tags_that_are_gone_are_added_up() -> None:
    metrics = Metrics()
    for tag, supplied in (("a", {0: 1, 1: 2}), ("b", {0: 10}), ("c", {0: 100, HOLE: 5})):
        metrics.read(1, supplied, metrics.of_tag(tag))
    metrics.fold({"b", "new"})
    assert metrics.supplied == {"b": {0: 10}, GONE: {0: 101, 1: 2, HOLE: 5}}
    metrics.fold(set())
    assert metrics.supplied == {GONE: {0: 111, 1: 2, HOLE: 5}}
