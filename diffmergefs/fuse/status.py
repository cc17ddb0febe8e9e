"""What a mount says of itself: the facts, and the file in the mount where they stand."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from diffmergefs.fuse.metrics import Metrics

METRICS_FILE = "metrics"
STATUS_FILE = "status.json"


@dataclass(frozen=True)
class Operation:
    """One kind of request: how many came, and how many got an error, by the errno's name."""

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
class Bucket:
    """How many reads took at most so many seconds; those of the buckets before it included."""

    seconds: float
    reads: int


@dataclass(frozen=True)
class Status:
    """One look at the counters of a mount. It holds tags and numbers, and no path.

    `started` is a Unix time, `read_seconds` what all `reads` of views took together. `reads` counts
    the successful ones, `reads_in_threads` those of them that had to wait for their bytes.
    `open_images` are those whose layers are open, `open_files` the open files of memory images.
    `fast_loop` is True if the daemon waits for requests in the fast read loop (`readloop`).
    """

    version: str
    pid: int
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
        """As a JSON object with the same names."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Status:
        """What `to_json` gave. Raises ValueError for anything else."""
        try:
            known = json.loads(text)
            known["operations"] = tuple(Operation(**each) for each in known["operations"])
            known["read_buckets"] = tuple(Bucket(**each) for each in known["read_buckets"])
            known["supplied"] = tuple(Supplied(**each) for each in known["supplied"])
            return cls(**known)
        except (TypeError, KeyError) as error:
            raise ValueError(f"no status of this version: {error}") from error


def status_of(
    metrics: Metrics,
    *,
    version: str,
    pid: int,
    pushed_bytes: int,
    hit_bytes: int,
    taints: int,
    images: int,
    files: int,
) -> Status:
    """The facts that the counters hold now, and those told beside them."""
    return Status(
        version=version,
        pid=pid,
        started=metrics.started,
        fast_loop=metrics.fast_loop,
        operations=_operations(metrics),
        reads=sum(metrics.read_buckets),
        reads_in_threads=metrics.waited,
        read_seconds=metrics.read_ns / 1e9,
        read_buckets=_buckets(metrics.read_buckets),
        supplied=tuple(
            Supplied(tag, layer if layer >= 0 else None, count)
            for tag, totals in sorted(metrics.supplied.items())
            for layer, count in sorted(totals.items())
        ),
        prefetch_pushed_bytes=pushed_bytes,
        prefetch_hit_bytes=hit_bytes,
        tainted_layers=taints,
        open_images=images,
        open_files=files,
    )


def _operations(metrics: Metrics) -> tuple[Operation, ...]:
    failed: dict[str, dict[str, int]] = {}
    for (name, number), count in sorted(metrics.errors.items()):
        failed.setdefault(name, {})[errno.errorcode.get(number, str(number))] = count
    return tuple(
        Operation(name, count, failed.get(name, {}))
        for name, count in sorted(metrics.requests.items())
    )


# From 1 us to 17 s: what lies outside counts in the first of them, and in all alone.
_FIRST, _LAST = 10, 34


def _buckets(counts: Sequence[int]) -> tuple[Bucket, ...]:
    return tuple(Bucket(2**n / 1e9, sum(counts[: n + 1])) for n in range(_FIRST, _LAST + 1))
