"""What the filesystem must reach, as ratios, differences and values of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench.figures import Limit, Spread, difference, ratio, spread, verdict

DEEP, FLAT = "diffmergefs, depth 32", "diffmergefs, depth 1"
OURS, QEMU, FLOOR = "diffmergefs", "qemu export", "C floor"
SMALL_PAGES = ", no MADV_HUGEPAGE"
COLD_FLOOR = f"{FLOOR}, cold"
COLD_BESIDE = "view, cold, beside those that flatten"
"""That which ran in the rounds of those that flatten first."""
WAYS = ("cp, then pread and pwrite", "sendfile of each extent", "qemu-img convert")
SHARING = ("xfs", "btrfs")
"""The filesystems whose files can share blocks."""
SHARED = "the same sharing from C"
"""No peer: nobody ships it. It does what `flatten` does there, and nothing besides."""

Cases = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Series:
    """One series of one case. Several names: that with the least median."""

    case: str
    names: tuple[str, ...]

    def values(self, cases: Cases) -> list[float]:
        """What was measured; raises Absent with the reason where it was not."""
        if self.case not in cases:
            raise Absent(f"the case {self.case} was not run")
        case = cases[self.case]
        found = [case["series"][name]["values"] for name in self.names if name in case["series"]]
        if not any(found):
            raise Absent(_why(case["missing"], self.names[0]) or f"no series {self.names[0]!r}")
        return min((values for values in found if values), key=lambda v: spread(v).median)


def _why(missing: Mapping[str, str], name: str) -> str | None:
    # What is missing is named by its contestant: the beginning of its series' names, "" of all.
    keys = sorted((key for key in missing if name.startswith(key)), key=len)
    return missing[keys[-1]] if keys else None


class Absent(Exception):
    """A series is not there; the message says why."""


@dataclass(frozen=True)
class Floor:
    """What can be had at all of a goal's number: that of a program which does only what it must.

    `over` and `under` take the place of the goal's own. The program that is measured for it lies
    in the same case, so that it ran in the same rounds.
    """

    what: str
    """What does only what it must, for the table."""
    within: str
    """What sets the floor: what lies under both programs."""
    over: Series
    under: Series


@dataclass(frozen=True)
class Goal:
    """One line of the table: `over / under`, or `over - under`, or `over` itself."""

    title: str
    limit: Limit | None
    """None: reported only."""
    over: Series
    under: Series | None = None
    subtract: bool = False
    unit: str = ""
    floor: Floor | None = None
    """Told beside the outcome, which it never changes."""

    @property
    def is_ratio(self) -> bool:
        return self.under is not None and not self.subtract

    @property
    def cases(self) -> set[str]:
        return {self.over.case, *([self.under.case] if self.under else [])}

    def measured(self, cases: Cases) -> Spread:
        """The number; raises Absent."""
        return self._number(cases, self.over, self.under)

    def floor_measured(self, cases: Cases) -> Spread | None:
        """The floor's number, in the goal's unit; None without a floor, or one not measured."""
        if self.floor is None:
            return None
        try:
            return self._number(cases, self.floor.over, self.floor.under)
        except Absent:
            return None

    def _number(self, cases: Cases, above: Series, below: Series | None) -> Spread:
        over = above.values(cases)
        if below is None:
            return spread(over)
        under = below.values(cases)
        if self.subtract:
            return difference(over, under)
        if not all(under):
            raise Absent(f"{below.names[0]!r} has a zero")
        return ratio(over, under)

    def outcome(self, cases: Cases) -> str:
        """'met', 'not met', 'equal', 'reported', or 'not measured: ' and the reason."""
        try:
            measured = self.measured(cases)
        except Absent as absent:
            return f"not measured: {absent}"
        return self._verdict(measured)

    def beyond_floor(self, cases: Cases) -> bool:
        """Whether the goal's floor was measured, and does not meet the limit either."""
        floor = self.floor_measured(cases)
        return floor is not None and self._verdict(floor) == "not met"

    def _verdict(self, measured: Spread) -> str:
        if self.limit is None:
            return "reported"
        return verdict(self.limit, measured, is_ratio=self.is_ratio)


def _s(case: str, *names: str) -> Series:
    return Series(case, names)


def _most(value: float) -> Limit:
    return Limit(value)


def _least(value: float) -> Limit:
    return Limit(value, least=True)


def _against(
    title: str, case: str, over: str, under: str, limit: Limit | None, floor: Floor | None = None
) -> Goal:
    return Goal(title, limit, _s(case, over), _s(case, under), floor=floor)


def _pages(name: str) -> Floor:
    # Of pages that are cached no server is asked: what a C server's file takes is the kernel's.
    over, under = _s("cached", f"{FLOOR}: {name}"), _s("cached", f"flattened: {name}")
    return Floor("a C server's file, warm", "the kernel's FUSE", over, under)


def _sharing(case: str, *over: str) -> Floor:
    return Floor(SHARED, "the kernel's reflink", _s(case, *over), _s(case, SHARED))


def _depth() -> list[Goal]:
    title = "depth 32 against depth 1"
    found = [
        _against(f"{title}: read in order, cold", "sequential", FLAT, DEEP, _most(1.10)),
        _against(
            f"{title}: read in order, warm",
            "sequential",
            f"{FLAT}, warm",
            f"{DEEP}, warm",
            _most(1.10),
        ),
    ]
    touches = {
        "random": "first touch",
        "random-one-cpu": "first touch, one CPU",
        "threads": "first touch, 8 threads",
    }
    found += [
        _against(f"{title}: {what}", case, DEEP, FLAT, _most(1.10))
        for case, what in touches.items()
    ]
    cached = {
        "page fault": "page fault, cached",
        "MADV_POPULATE_READ": "MADV_POPULATE_READ, cached",
    }
    found += [
        _against(f"{title}: {what}", "cached", f"{DEEP}: {name}", f"{FLAT}: {name}", _most(1.10))
        for name, what in cached.items()
    ]
    return found


def _cached() -> list[Goal]:
    title = "view warm / flattened warm"
    ways = {"read": _least(0.9), "page fault": None, "MADV_POPULATE_READ": None}
    return [
        _against(
            f"{title}: {name}{'()' if name == 'read' else ''}",
            "cached",
            f"{OURS}: {name}",
            f"flattened: {name}",
            limit,
            _pages(name),
        )
        for name, limit in ways.items()
    ]


def _restore(guest: str, suffix: str) -> list[Goal]:
    case, flat = f"restore-{guest}", f"flattened, warm{suffix}"
    over, under = _s(case, f"{COLD_FLOOR}{suffix}"), _s(case, flat)
    cold = Floor("a C server's file, cold", "the kernel's FUSE", over, under)
    kinds = {
        "view, warm": (_most(1.07), None),
        "view, cold, prefetch=notify": (_most(1.15), None),
        "view, cold, prefetch=fadvise": (None, None),
        "view, cold": (_most(1.40), cold),
    }
    return [
        _against(
            f"first reply, {guest} MiB{suffix}: {kind} / flattened, warm",
            case,
            f"{kind}{suffix}",
            flat,
            limit,
            floor,
        )
        for kind, (limit, floor) in kinds.items()
    ]


def _flatten_first() -> list[Goal]:
    what, cold = "flatten, then restore", "view, cold"
    small, large = "restore-512", "restore-4096"
    return [
        _against(f"first reply, 512 MiB: {what} / {cold}", small, what, COLD_BESIDE, _least(2.5)),
        _against(
            f"the same, {what} on ext4 in memory",
            small,
            f"{what}, ext4 in memory",
            COLD_BESIDE,
            _least(2.5),
        ),
        _against(
            f"the same, {what} on xfs in memory with reflink",
            small,
            f"{what}, xfs in memory with reflink",
            COLD_BESIDE,
            None,
        ),
        _against(f"first reply, 4096 MiB: {what} / {cold}", large, what, COLD_BESIDE, _least(10)),
        Goal(f"first reply, {cold}: 4096 MiB / 512 MiB", None, _s(large, cold), _s(small, cold)),
    ]


def _many() -> list[Goal]:
    return [
        _against(
            "second and later VMs on one view / on the flattened file",
            "many",
            "view: later VMs",
            "flattened: later VMs",
            _most(1.10),
        ),
        Goal(
            "read requests at the daemon for them",
            _most(0),
            _s("many", "daemon: read requests for the later VMs"),
        ),
        Goal(
            "bytes that the daemon read for them, FUSE requests too",
            None,
            _s("many", "daemon: bytes read for the later VMs"),
            unit="bytes",
        ),
        _against(
            "a VM's memory file, shared: Pss / Rss, view",
            "many",
            "view: Pss of the image in a VM",
            "view: Rss of the image in a VM",
            None,
        ),
        _against(
            "a VM's memory file, shared: Pss / Rss, flattened",
            "many",
            "flattened: Pss of the image in a VM",
            "flattened: Rss of the image in a VM",
            None,
        ),
    ]


def _flatten() -> list[Goal]:
    ours, found = "diffmergefs.flatten", []
    for kind in ("ext4", "xfs", "btrfs", "tmpfs"):
        case, shares = f"flatten-{kind}", kind in SHARING
        found.append(
            Goal(
                f"flatten on {kind}: speed / the best peer's",
                _least(1.0),
                _s(case, *WAYS),
                _s(case, ours),
                floor=_sharing(case, *WAYS) if shares else None,
            )
        )
        if shares:
            found.append(
                _against(
                    f"flatten on {kind}, reflink: speed / cp and overwrite",
                    case,
                    WAYS[0],
                    ours,
                    _least(3),
                    _sharing(case, WAYS[0]),
                )
            )
    return found


GOALS: Sequence[Goal] = (
    _against(
        "read in order, cold, each at its best readahead: speed / QEMU's export",
        "sequential",
        OURS,
        QEMU,
        _least(1.8),
    ),
    _against("the same: speed / the C floor's", "sequential", OURS, FLOOR, _least(0.65)),
    _against(
        "random first touch, a CPU each: time / QEMU's export", "random", OURS, QEMU, _most(1.05)
    ),
    _against(
        "the same, all on one CPU: time / QEMU's export", "random-one-cpu", OURS, QEMU, _most(2.0)
    ),
    Goal(
        "the same, all on one CPU: time - the C floor's",
        _most(25),
        _s("random-one-cpu", OURS),
        _s("random-one-cpu", FLOOR),
        subtract=True,
        unit="us",
    ),
    _against("first touch by 8 threads: time / QEMU's export", "threads", OURS, QEMU, _most(1.1)),
    *_depth(),
    *_cached(),
    *_restore("512", ""),
    *_restore("512", SMALL_PAGES),
    *_flatten_first(),
    *_many(),
    _against(
        "mount of 100 snapshots of 2 GiB: time until ready / of an empty mount",
        "mount-time",
        "full",
        "empty",
        _most(2),
    ),
    Goal(
        "tenths of the time of looking at all 100 in which another's reads went on",
        _least(10),
        _s("reads-go-on", "tenths of that time with reads"),
    ),
    *_flatten(),
    Goal(
        "daemon memory, 16 chains of 100,000 segments open",
        _most(80),
        _s("memory", "all open"),
        unit="MiB",
    ),
    Goal("index of 4 x 1 M extents", _most(5), _s("index", "merge"), unit="s"),
    _against(
        "rediff of two equal cached images: time / cmp", "rediff", "rediff", "cmp", _most(1.2)
    ),
    _against(
        "slow store (5 ms a read): 8 clients' reads / one client's",
        "slow-store",
        f"{OURS}: 8 clients",
        f"{OURS}: 1 client",
        _least(4),
    ),
)
