"""What the figures were taken on: the machine, the kernel, and the version of each program."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

from tests.bench import newqemu
from tests.bench.measure import NotMeasured

_ROOT = Path(__file__).parents[2]
_PACKAGES = ("diffmergefs", "pyfuse3", "trio")
_COMMANDS = {
    "libfuse (fusermount3)": ["fusermount3", "--version"],
    "qemu-storage-daemon": ["qemu-storage-daemon", "--version"],
    "qemu-img": ["qemu-img", "--version"],
    "nbdkit": ["nbdkit", "--version"],
    "nbdfuse": ["nbdfuse", "--version"],
    "coreutils (cp)": ["cp", "--version"],
    "gcc": ["gcc", "-dumpfullversion"],
}


def facts() -> dict[str, str]:
    """Nothing that tells whose machine it is."""
    found = {
        "Linux": re.split(r"[-+]", platform.release())[0],
        "processor": _processor(),
        "processors": str(os.cpu_count()),
        "GiB of memory": str(
            round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
        ),
        "huge pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "Python": platform.python_version(),
    }
    found |= {name: importlib.metadata.version(name) for name in _PACKAGES}
    found["commit"] = _commit()
    found |= {name: _version(command) for name, command in _COMMANDS.items()}
    try:
        found["QEMU that restores"] = _version([newqemu.machine(128).program, "--version"])
    except NotMeasured:
        found["QEMU that restores"] = "not installed"
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    return platform.machine()


def _chosen(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="ascii")
    except OSError:
        return "unknown"
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else text.strip()


def _commit() -> str:
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _version(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except OSError:
        return "not installed"
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found[0] if found else "unknown"
