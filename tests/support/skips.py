"""Why a test may be skipped: every reason, and which of them CI lets pass.

A test skips with one of these constants (``pytest.skip(skips.NOT_ROOT)``), or
through a ``require_*`` function.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

import pytest

NOT_ROOT = "needs root"
NO_MOUNTS = "needs the right to mount (CAP_SYS_ADMIN)"
NO_LOOP = "needs loop devices (/dev/loop-control)"
NO_FUSE = "needs /dev/fuse"
NO_CGROUPS = "needs control groups that root may make"
NO_KERNEL_FS = "this kernel lacks the file system"
NO_BIG_BLOCKS = "this kernel mounts no XFS whose blocks are larger than a page"
NO_FIRECRACKER = "needs /dev/kvm, and Firecracker for x86-64 from a package index"
NO_USER_NAMESPACES = "needs a user namespace; a chroot and some systems have none"
NO_HUGE_TMPFS = "this kernel has no tmpfs with huge pages"
NO_RESEND = "this kernel gives no server the requests of one that died (Linux 6.9)"
NO_HUGE_PAGES = "this machine has no 2 MiB pages to reserve"
NO_MIRROR = "no mirror of Debian answers"

#: With CI=true a skip is a failure (strict_skips.py) unless its reason is here.
ALLOWED = frozenset({NO_FIRECRACKER, NO_USER_NAMESPACES, NO_RESEND, NO_MIRROR})

_CAP_SYS_ADMIN = 21


def may_mount() -> bool:
    """Whether this process has the right to mount."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "CapEff":
            return bool(int(value, 16) >> _CAP_SYS_ADMIN & 1)
    return False


def require_root() -> None:
    """Skip the test unless it runs as root."""
    if os.geteuid() != 0:
        pytest.skip(NOT_ROOT)


def require_mounts() -> None:
    """Skip the test unless it runs as a root that may mount."""
    require_root()
    if not may_mount():
        pytest.skip(NO_MOUNTS)


def require_loop() -> None:
    """Skip the test unless it may mount, and loop devices are to be had."""
    require_mounts()
    if not Path("/dev/loop-control").exists():
        pytest.skip(NO_LOOP)


def require_fuse() -> None:
    """Skip the test unless this process may open the FUSE device."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip(NO_FUSE)


def require_resend() -> None:
    """Skip the test unless this kernel is new enough to cover a mount whose server dies."""
    major, minor = platform.release().split(".")[:2]
    if (int(major), int(re.sub(r"\D.*", "", minor))) < (6, 9):
        pytest.skip(NO_RESEND)


def require_user_namespaces() -> None:
    """Skip the test unless a process may make a user namespace."""
    done = subprocess.run(["unshare", "--user", "true"], capture_output=True, timeout=60)
    if done.returncode != 0:
        pytest.skip(NO_USER_NAMESPACES)
