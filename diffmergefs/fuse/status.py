"""The counters of a mount, and its status as JSON and as text for Prometheus."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from diffmergefs.core import __version__
from diffmergefs.core.layer import Layer
from diffmergefs.fuse.service import Service
from diffmergefs.system.metrics import BUCKETS, Bucket, buckets, exposition, histogram

if TYPE_CHECKING:
    from prometheus_client import Metric

METRICS_FILE = "metrics"
STATUS_FILE = "status.json"
#: Stands for all tags that no longer exist. No tag has parentheses.
GONE = "(gone)"


@dataclass(eq=False, slots=True)
class Metrics:
    """Counters that start at zero with the mount and only grow. Use them from the event loop only.

    `requests` is by operation, `errors` by operation and errno. `supplied` is by tag: how many
    bytes each layer of the chain supplied to reads, by its position (0 is the base; `view.HOLE`
    stands for zeros that no layer supplied). `waited` counts the reads that went to a worker thread
    because some of their bytes were not in the page cache. `fast_loop` is no counter: it tells
    whether the fast read loop is in force (`readloop`).
    """

    started: float = field(default_factory=time.time)
    requests: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    errors: defaultdict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    supplied: dict[str, dict[int, int]] = field(default_factory=dict)
    waited: int = 0
    fast_loop: bool = False
    read_ns: int = 0
    read_buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def of_tag(self, tag: str) -> dict[int, int]:
        """The entry of `supplied` for this tag. It counts until a `fold` without this tag."""
        return self.supplied.setdefault(tag, {})

    def read(self, nanoseconds: int, supplied: dict[int, int], totals: dict[int, int]) -> None:
        """Count one read of a view: its duration, and the bytes that each layer supplied.

        `totals` comes from `of_tag`. Bucket n of `read_buckets` holds the reads that took more
        than 2**(n - 1) and at most 2**n nanoseconds.
        """
        self.read_ns += nanoseconds
        self.read_buckets[(nanoseconds - 1).bit_length() if nanoseconds > 0 else 0] += 1
        for layer, count in supplied.items():
            totals[layer] = totals.get(layer, 0) + count

    def fold(self, tags: Collection[str]) -> None:
        """Move the entries of all other tags into that of `GONE`, so that the table stays small."""
        for tag in self.supplied.keys() - {*tags, GONE}:
            totals = self.of_tag(GONE)
            for layer, count in self.supplied.pop(tag).items():
                totals[layer] = totals.get(layer, 0) + count


@dataclass(frozen=True)
class Operation:
    """One kind of request: how many came, and how many failed, by the errno's name."""

    operation: str
    requests: int
    errors: dict[str, int]


@dataclass(frozen=True)
class Supplied:
    """How many bytes one layer of a tag's chain supplied to reads.

    `layer` is its position in the chain (0 is the base), or None for holes in all layers.
    """

    tag: str
    layer: int | None
    bytes: int


@dataclass(frozen=True)
class Status:
    """The counters of a mount at one moment. It holds tags and numbers, but no path.

    The counters begin anew with each server. `pid` is the keeper of `service`, `started` the Unix
    time of the mount, `read_seconds` the total duration of all `reads` of views. `reads` counts the
    successful ones, `reads_in_threads` those of them that a worker thread served.
    `open_images` counts images whose layers are open, `open_files` open files of memory images.
    `fast_loop` is True if the daemon waits for requests in the fast read loop (`readloop`).
    """

    version: str
    pid: int
    service: Service
    started: float
    fast_loop: bool
    operations: tuple[Operation, ...]
    reads: int
    reads_in_threads: int
    read_seconds: float
    read_buckets: tuple[Bucket, ...]
    supplied: tuple[Supplied, ...]
    prefetch_pushed_bytes: int
    prefetch_hit_bytes: int
    tainted_layers: int
    open_images: int
    open_files: int

    def to_json(self) -> str:
        """This status as a JSON object with the same names."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Status:
        """Parse the result of `to_json`. Raises ValueError for anything else."""
        try:
            known = json.loads(text)
            known["service"] = Service(**known["service"])
            known["operations"] = tuple(Operation(**each) for each in known["operations"])
            known["read_buckets"] = tuple(Bucket(**each) for each in known["read_buckets"])
            known["supplied"] = tuple(Supplied(**each) for each in known["supplied"])
            return cls(**known)
        except (TypeError, KeyError) as error:
            raise ValueError(f"no status of this version: {error}") from error


def status_of(
    metrics: Metrics,
    *,
    pushed_bytes: int,
    hit_bytes: int,
    images: int,
    files: int,
    service: Service | None = None,
) -> Status:
    """The present status of this process: the counters, and the numbers that others count."""
    service = service or Service()
    return Status(
        version=__version__,
        pid=service.keeper,
        service=service,
        started=metrics.started,
        fast_loop=metrics.fast_loop,
        operations=_operations(metrics),
        reads=sum(metrics.read_buckets),
        reads_in_threads=metrics.waited,
        read_seconds=metrics.read_ns / 1e9,
        read_buckets=buckets(metrics.read_buckets),
        supplied=tuple(
            Supplied(tag, layer if layer >= 0 else None, count)
            for tag, totals in sorted(metrics.supplied.items())
            for layer, count in sorted(totals.items())
        ),
        prefetch_pushed_bytes=pushed_bytes,
        prefetch_hit_bytes=hit_bytes,
        tainted_layers=Layer.taints,
        open_images=images,
        open_files=files,
    )


def rendered(name: str, status: Status) -> bytes:
    """The content of the status file `name`: METRICS_FILE or STATUS_FILE."""
    return (
        exposition(lambda: _families(status)) if name == METRICS_FILE else status.to_json().encode()
    )


def _operations(metrics: Metrics) -> tuple[Operation, ...]:
    failed: dict[str, dict[str, int]] = {}
    for (name, number), count in sorted(metrics.errors.items()):
        failed.setdefault(name, {})[errno.errorcode.get(number, str(number))] = count
    return tuple(
        Operation(name, count, failed.get(name, {}))
        for name, count in sorted(metrics.requests.items())
    )


def _families(status: Status) -> Iterator[Metric]:
    from prometheus_client import metrics_core as core

    build = {"version": status.version}
    yield core.InfoMetricFamily("diffmergefs_build", "Version of the daemon.", build)
    for name, text, number in (
        ("start_time_seconds", "Start of the mount, as a Unix time.", status.started),
        ("open_images", "Images whose layers are open.", status.open_images),
        ("open_files", "Open files of memory images.", status.open_files),
        ("fast_loop", "1 if the fast read loop is in force, else 0.", status.fast_loop),
        ("covered", "1 if another server goes on when this one dies.", status.service.covered),
        (
            "longest_stall_seconds",
            "Longest time from the end of a server until the next one answered.",
            status.service.longest_stall_seconds,
        ),
    ):
        yield core.GaugeMetricFamily(f"diffmergefs_{name}", text, number)
    for name, text, number in (
        (
            "thread_reads",
            "Reads served from a worker thread (page-cache miss).",
            status.reads_in_threads,
        ),
        ("prefetch_pushed_bytes", "Prefetched bytes.", status.prefetch_pushed_bytes),
        (
            "prefetch_hit_bytes",
            "Prefetched bytes that no client requested.",
            status.prefetch_hit_bytes,
        ),
        ("tainted_layers", "Layers that changed while in use.", status.tainted_layers),
        ("servers", "Servers that were started, the present one included.", status.service.servers),
    ):
        yield core.CounterMetricFamily(f"diffmergefs_{name}", text, number)
    yield from _requests(status)
    yield _supplied(status)
    yield histogram(
        "diffmergefs_read_duration_seconds",
        "Time that the daemon took to serve a read of a memory file.",
        status.read_buckets,
        status.reads,
        status.read_seconds,
    )


def _requests(status: Status) -> Iterator[Metric]:
    from prometheus_client.metrics_core import CounterMetricFamily

    total = CounterMetricFamily(
        "diffmergefs_requests", "Requests from the kernel.", labels=["operation"]
    )
    failed = CounterMetricFamily(
        "diffmergefs_request_errors",
        "Requests answered with an error.",
        labels=["operation", "errno"],
    )
    for each in status.operations:
        total.add_metric([each.operation], each.requests)
        for name, count in each.errors.items():
            failed.add_metric([each.operation, name], count)
    yield total
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
        # The text is UTF-8, but a file's name may be any bytes.
        tag = os.fsencode(each.tag).decode("utf-8", "backslashreplace")
        family.add_metric([tag, layer], each.bytes)
    return family
