"""What the filesystem must reach, as ratios, differences and values of what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.goal import Floor, Goal, against, at_least, at_most, series

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
WARM, CACHED, COLD, RECORDED = "flattened, warm", "view, warm", "view, cold", "view, cold, recorded"
UFFD, UFFD_RECORDED, UFFD_HUGE = "uffd 4 KiB", "uffd 4 KiB, recorded", "uffd 2 MiB"
ALLOWED = "1.2 x C floor + 8 us"
FLATTEN_FIRST = "flatten, then restore"
REPLY, SUM, PSS = "first reply", "sum of 32 MiB", "Pss of a VM's memory"
"""What is measured of a Firecracker that restores from each of those."""


def _pages(name: str) -> Floor:
    # Of pages that are cached no server is asked: what a C server's file takes is the kernel's.
    over, under = series("cached", f"{FLOOR}: {name}"), series("cached", f"flattened: {name}")
    return Floor("a C server's file, warm", "the kernel's FUSE", over, under)


def _sharing(case: str, *over: str) -> Floor:
    return Floor(SHARED, "the kernel's reflink", series(case, *over), series(case, SHARED))


def _depth() -> list[Goal]:
    title = "depth 32 against depth 1"
    found = [
        against(f"{title}: read in order, cold", "sequential", FLAT, DEEP, at_most(1.10)),
        against(
            f"{title}: read in order, warm",
            "sequential",
            f"{FLAT}, warm",
            f"{DEEP}, warm",
            at_most(1.10),
        ),
    ]
    touches = {
        "random": "first touch",
        "random-one-cpu": "first touch, one CPU",
        "threads": "first touch, 8 threads",
    }
    found += [
        against(f"{title}: {what}", case, DEEP, FLAT, at_most(1.10))
        for case, what in touches.items()
    ]
    cached = {
        "page fault": "page fault, cached",
        "MADV_POPULATE_READ": "MADV_POPULATE_READ, cached",
    }
    found += [
        against(f"{title}: {what}", "cached", f"{DEEP}: {name}", f"{FLAT}: {name}", at_most(1.10))
        for name, what in cached.items()
    ]
    return found


def _cached() -> list[Goal]:
    title = "view warm / flattened warm"
    ways = {"read": at_least(0.9), "page fault": None, "MADV_POPULATE_READ": None}
    return [
        against(
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
    over, under = series(case, f"{COLD_FLOOR}{suffix}"), series(case, flat)
    cold = Floor("a C server's file, cold", "the kernel's FUSE", over, under)
    kinds = {
        "view, warm": (at_most(1.07), None),
        "view, cold, prefetch=notify": (at_most(1.15), None),
        "view, cold, prefetch=fadvise": (None, None),
        "view, cold": (at_most(1.40), cold),
    }
    return [
        against(
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
    what, cold = FLATTEN_FIRST, COLD
    small, large = "restore-512", "restore-4096"
    return [
        against(f"first reply, 512 MiB: {what} / {cold}", small, what, COLD_BESIDE, at_least(2.5)),
        against(
            f"the same, {what} on ext4 in memory",
            small,
            f"{what}, ext4 in memory",
            COLD_BESIDE,
            at_least(2.5),
        ),
        against(
            f"the same, {what} on xfs in memory with reflink",
            small,
            f"{what}, xfs in memory with reflink",
            COLD_BESIDE,
            None,
        ),
        against(f"first reply, 4096 MiB: {what} / {cold}", large, what, COLD_BESIDE, at_least(10)),
        Goal(
            f"first reply, {cold}: 4096 MiB / 512 MiB",
            None,
            series(large, cold),
            series(small, cold),
        ),
    ]


def _many() -> list[Goal]:
    return [
        against(
            "second and later VMs on one view / on the flattened file",
            "many",
            "view: later VMs",
            "flattened: later VMs",
            at_most(1.10),
        ),
        Goal(
            "read requests at the daemon for them",
            at_most(0),
            series("many", "daemon: read requests for the later VMs"),
        ),
        Goal(
            "bytes that the daemon read for them, FUSE requests too",
            None,
            series("many", "daemon: bytes read for the later VMs"),
            unit="bytes",
        ),
        against(
            "a VM's memory file, shared: Pss / Rss, view",
            "many",
            "view: Pss of the image in a VM",
            "view: Rss of the image in a VM",
            None,
        ),
        against(
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
                at_least(1.0),
                series(case, *WAYS),
                series(case, ours),
                floor=_sharing(case, *WAYS) if shares else None,
            )
        )
        if shares:
            found.append(
                against(
                    f"flatten on {kind}, reflink: speed / cp and overwrite",
                    case,
                    WAYS[0],
                    ours,
                    at_least(3),
                    _sharing(case, WAYS[0]),
                )
            )
    return found


def _firecracker() -> list[Goal]:
    one, many = "firecracker", "firecracker-many"
    limits = {
        (one, REPLY, COLD, WARM): at_most(1.25),
        (one, SUM, RECORDED, WARM): at_most(1.05),
        (one, SUM, COLD, WARM): at_most(1.3),
        (one, REPLY, UFFD_RECORDED, RECORDED): at_most(1.1),
        (one, SUM, UFFD_RECORDED, RECORDED): at_most(1.1),
        (one, REPLY, UFFD_RECORDED, UFFD): at_most(1.1),
        (one, REPLY, UFFD, COLD): at_most(2),
        (one, SUM, UFFD, COLD): at_most(2),
        (one, SUM, UFFD_HUGE, COLD): at_most(1),
        (many, REPLY, COLD, WARM): None,
        (many, SUM, RECORDED, WARM): None,
        (many, SUM, COLD, WARM): None,
        (many, PSS, COLD, WARM): None,
        (many, SUM, UFFD_RECORDED, RECORDED): None,
        (many, PSS, COLD, UFFD): None,
    }
    found = [
        against(
            f"{'Firecracker' if case == one else 'VMs at once'}, {what}: {over} / {under}",
            case,
            f"{over}: {what}",
            f"{under}: {what}",
            limit,
        )
        for (case, what, over, under), limit in limits.items()
    ]
    title = f"Firecracker, {REPLY}: {FLATTEN_FIRST} / {COLD}"
    over, under = f"{FLATTEN_FIRST}: {REPLY}", f"{COLD_BESIDE}: {REPLY}"
    return [*found, against(title, one, over, under, None)]


def _kills() -> list[Goal]:
    # The store's chains are of four diffs.
    limits = {"1 client, 1 open": (30, 100), "16 clients, 1 open": (30, 100)}
    found = []
    for name, (usual, longest) in limits.items():
        for what, limit in ((f"{name}: median", usual), (f"{name}: longest", longest)):
            found.append(
                Goal(
                    f"server killed, a client's longest read beyond that without kills, {what}",
                    at_most(limit),
                    series("kills", what),
                    unit="ms",
                )
            )
    return found


GOALS: Sequence[Goal] = (
    against(
        "read in order, cold, each at its best readahead: speed / QEMU's export",
        "sequential",
        OURS,
        QEMU,
        at_least(1.8),
    ),
    against("the same: speed / the C floor's", "sequential", OURS, FLOOR, at_least(0.65)),
    against(
        "random first touch, a CPU each: time / QEMU's export", "random", OURS, QEMU, at_most(1.05)
    ),
    against(
        "the same, all on one CPU: time / QEMU's export", "random-one-cpu", OURS, QEMU, at_most(2.0)
    ),
    Goal(
        "the same, all on one CPU: time - the C floor's",
        at_most(25),
        series("random-one-cpu", OURS),
        series("random-one-cpu", FLOOR),
        subtract=True,
        unit="us",
    ),
    against("first touch by 8 threads: time / QEMU's export", "threads", OURS, QEMU, at_most(1.1)),
    *_depth(),
    *_cached(),
    *_restore("512", ""),
    *_restore("512", SMALL_PAGES),
    *_flatten_first(),
    *_many(),
    *_firecracker(),
    against(
        f"a fault that `uffd` serves, all on one CPU: time / {ALLOWED}",
        "faults",
        OURS,
        ALLOWED,
        at_most(1.0),
    ),
    against(
        "mount of 100 snapshots of 2 GiB: time until ready / of an empty mount",
        "mount-time",
        "full",
        "empty",
        at_most(2),
    ),
    Goal(
        "tenths of the time of looking at all 100 in which another's reads went on",
        at_least(10),
        series("reads-go-on", "tenths of that time with reads"),
    ),
    *_flatten(),
    *_kills(),
    Goal(
        "daemon memory, 16 chains of 100,000 segments open",
        at_most(80),
        series("memory", "all open"),
        unit="MiB",
    ),
    Goal("index of 4 x 1 M extents", at_most(5), series("index", "merge"), unit="s"),
    against(
        "rediff of two equal cached images: time / cmp", "rediff", "rediff", "cmp", at_most(1.2)
    ),
    against(
        "slow store (5 ms a read): 8 clients' reads / one client's",
        "slow-store",
        f"{OURS}: 8 clients",
        f"{OURS}: 1 client",
        at_least(4),
    ),
)
