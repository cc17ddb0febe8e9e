"""The counters of a page server, and its status as JSON and as text for Prometheus."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from diffmergefs.core import __version__
from diffmergefs.core.layer import Layer
from diffmergefs.core.view import HOLE
from diffmergefs.fuse.status import METRICS_FILE, STATUS_FILE
from diffmergefs.system.metrics import BUCKETS, Bucket, buckets, exposition, histogram

if TYPE_CHECKING:
    from prometheus_client import Metric

#: What a status socket answers: the name of a mount's status file is a line that asks for it.
ANSWERS = (STATUS_FILE, METRICS_FILE)


@dataclass(eq=False, slots=True)
class Counters:
    """What was done for one VM. Only its thread counts.

    `supplied` is by layer (0 is the base, `view.HOLE` zeros that no layer supplied). `retries`
    counts faults that had to wait for an event to be read. Bucket n of `buckets` holds the faults
    that took more than 2**(n - 1) and at most 2**n nanoseconds.
    """

    faults: int = 0
    fault_ns: int = 0
    retries: int = 0
    copied_bytes: int = 0
    zero_bytes: int = 0
    removed_bytes: int = 0
    ahead_bytes: int = 0
    supplied: dict[int, int] = field(default_factory=dict)
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def fault(self, nanoseconds: int) -> None:
        """Count a fault that was served in this time."""
        self.faults += 1
        self.fault_ns += nanoseconds
        self.buckets[(nanoseconds - 1).bit_length() if nanoseconds > 0 else 0] += 1

    def supply(self, supplied: dict[int, int]) -> None:
        """Count the bytes that each layer supplied."""
        totals = self.supplied
        for layer, count in supplied.items():
            totals[layer] = totals.get(layer, 0) + count

    def add(self, other: Counters) -> None:
        """Add the numbers of another VM."""
        for name in self.__slots__[:-2]:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.supply(dict(other.supplied))
        self.buckets = [one + more for one, more in zip(self.buckets, other.buckets, strict=True)]


@dataclass(frozen=True)
class Served:
    """One VM that is connected. `problem` says why it gets no more pages, and is None if it does.

    `pid` and `uid` are those of the process that connected, `connected` is a Unix time. `image` is
    the image or the tag that it gets.
    """

    pid: int
    uid: int
    image: str
    connected: float
    faults: int
    problem: str | None


@dataclass(frozen=True)
class Supplied:
    """How many bytes one layer supplied: its position in the chain, or None for holes in all."""

    layer: int | None
    bytes: int


@dataclass(frozen=True)
class Status:
    """What a page server has done since its start, at one moment.

    `socket` is its socket, or its directory of sockets. `image` is what it serves there: an image,
    or the directory of snapshots; then `size` is None.
    `stopping` says that it takes no new VMs. `accepted` counts the VMs that were served, `refused`
    the connections that were not, and `failed` the VMs that could not be served to their end. The
    other counters are sums over all VMs, those that have ended too.
    """

    version: str
    pid: int
    started: float
    socket: str
    image: str
    size: int | None
    stopping: bool
    vms: tuple[Served, ...]
    accepted: int
    refused: int
    failed: int
    faults: int
    fault_seconds: float
    fault_buckets: tuple[Bucket, ...]
    retries: int
    copied_bytes: int
    zero_bytes: int
    removed_bytes: int
    prefetched_bytes: int
    supplied: tuple[Supplied, ...]
    tainted_layers: int

    def to_json(self) -> str:
        """This status as a JSON object with the same names."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Status:
        """Parse the result of `to_json`. Raises ValueError for anything else."""
        try:
            known = json.loads(text)
            known["vms"] = tuple(Served(**each) for each in known["vms"])
            known["fault_buckets"] = tuple(Bucket(**each) for each in known["fault_buckets"])
            known["supplied"] = tuple(Supplied(**each) for each in known["supplied"])
            return cls(**known)
        except (TypeError, KeyError) as error:
            raise ValueError(f"no status of this version: {error}") from error


@dataclass(eq=False)
class Ledger:
    """The numbers of a page server; `ended` are the sums over the VMs that are gone."""

    socket: str
    image: str
    size: int | None
    started: float = field(default_factory=time.time)
    stopping: bool = False
    accepted: int = 0
    refused: int = 0
    failed: int = 0
    ended: Counters = field(default_factory=Counters)

    def status(self, vms: Iterable[tuple[Served, Counters]]) -> Status:
        """The status, with the VMs that are connected now."""
        total, shown = Counters(), []
        total.add(self.ended)
        for vm, counters in vms:
            total.add(counters)
            shown.append(vm)
        return Status(
            version=__version__,
            pid=os.getpid(),
            started=self.started,
            socket=self.socket,
            image=self.image,
            size=self.size,
            stopping=self.stopping,
            vms=tuple(shown),
            accepted=self.accepted,
            refused=self.refused,
            failed=self.failed,
            faults=total.faults,
            fault_seconds=total.fault_ns / 1e9,
            fault_buckets=buckets(total.buckets),
            retries=total.retries,
            copied_bytes=total.copied_bytes,
            zero_bytes=total.zero_bytes,
            removed_bytes=total.removed_bytes,
            prefetched_bytes=total.ahead_bytes,
            supplied=tuple(
                Supplied(None if layer == HOLE else layer, count)
                for layer, count in sorted(total.supplied.items())
            ),
            tainted_layers=Layer.taints,
        )


def rendered(name: str, status: Status) -> bytes:
    """The answer to the line `name`, one of ANSWERS."""
    return (
        exposition(lambda: _families(status)) if name == METRICS_FILE else status.to_json().encode()
    )


def _families(status: Status) -> Iterator[Metric]:
    from prometheus_client import metrics_core as core

    build = {"version": status.version}
    yield core.InfoMetricFamily("diffmergefs_build", "Version of the daemon.", build)
    for name, text, number in (
        ("start_time_seconds", "Start of the server, as a Unix time.", status.started),
        ("uffd_vms", "VMs that are connected.", len(status.vms)),
    ):
        yield core.GaugeMetricFamily(f"diffmergefs_{name}", text, number)
    for name, text, number in (
        ("uffd_accepted_vms", "VMs that were served.", status.accepted),
        ("uffd_refused_connections", "Connections that were refused.", status.refused),
        ("uffd_failed_vms", "VMs that could not be served to their end.", status.failed),
        ("uffd_retries", "Faults that waited for an event to be read.", status.retries),
        ("uffd_copied_bytes", "Bytes that were copied into VMs.", status.copied_bytes),
        ("uffd_zero_bytes", "Bytes that were filled with zeros in VMs.", status.zero_bytes),
        ("uffd_removed_bytes", "Bytes that VMs gave away.", status.removed_bytes),
        ("uffd_prefetched_bytes", "Bytes that were copied ahead.", status.prefetched_bytes),
        ("tainted_layers", "Layers that changed while in use.", status.tainted_layers),
    ):
        yield core.CounterMetricFamily(f"diffmergefs_{name}", text, number)
    family = core.CounterMetricFamily(
        "diffmergefs_uffd_supplied_bytes", "Bytes that each layer supplied.", labels=["layer"]
    )
    for each in status.supplied:
        family.add_metric(["hole" if each.layer is None else str(each.layer)], each.bytes)
    yield family
    yield histogram(
        "diffmergefs_uffd_fault_duration_seconds",
        "Time that the server took to serve a fault.",
        status.fault_buckets,
        status.faults,
        status.fault_seconds,
    )
