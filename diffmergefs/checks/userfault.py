"""Whether a VMM of this user can be served pages (`uffd`), checked without making anything."""

from __future__ import annotations

import os
from collections.abc import Iterator

from diffmergefs.checks.diagnosis import Finding

#: 1 lets every user make a userfaultfd for faults in the kernel, as KVM has them.
SYSCTL = "/proc/sys/vm/unprivileged_userfaultfd"
#: Since Linux 6.1: whoever may open it may do the same.
DEVICE = "/dev/userfaultfd"
HUGE_PAGES = "/sys/kernel/mm/hugepages/hugepages-2048kB"


def examine_userfault() -> Iterator[Finding]:
    """The findings on userfaultfd(2), and on the 2 MiB pages that are free. Nothing is raised."""
    yield _right()
    yield _huge_pages()


def _right() -> Finding:
    value = _number(SYSCTL)
    if value is None:
        return _warning(
            "this kernel has no userfaultfd",
            "restore from a mount, or use a kernel with CONFIG_USERFAULTFD",
        )
    if value:
        return _fine("userfaultfd", "every user may make a userfaultfd")
    if os.geteuid() == 0:
        text = "root may make a userfaultfd; a jailed Firecracker of another user may not, unless"
        return _fine("userfaultfd", f"{text} vm.unprivileged_userfaultfd is 1 or {DEVICE} is its")
    if os.access(DEVICE, os.R_OK | os.W_OK):
        return _fine("userfaultfd", f"this user may make a userfaultfd with {DEVICE}")
    return _warning(
        "this user may not make a userfaultfd",
        f"ask root for access to {DEVICE}, or for sysctl vm.unprivileged_userfaultfd=1",
    )


def _huge_pages() -> Finding:
    free = _number(f"{HUGE_PAGES}/free_hugepages")
    if not free:
        return _fine("hugepages", "no 2 MiB page is free; only guests with huge pages need them")
    return _fine("hugepages", f"{free} pages of 2 MiB are free for guests with huge pages")


def _fine(check: str, finding: str) -> Finding:
    return Finding("host", check, "fine", finding)


def _warning(finding: str, remedy: str) -> Finding:
    why = "Firecracker cannot restore from a page server (`diffmergefs uffd`)"
    return Finding("host", "userfaultfd", "warning", finding, why, remedy)


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None
