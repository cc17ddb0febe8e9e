"""Whether this machine can mount, checked without mounting anything."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from diffmergefs.checks.diagnosis import Finding
from diffmergefs.system import children
from diffmergefs.system.children import ROOTS_PATH
from diffmergefs.system.installation import install_command
from diffmergefs.system.mountpoint import FUSE_CONF, FUSE_DEVICE, others_may_be_let_in
from diffmergefs.system.tuning import CONNECTIONS

_FUSE_NUMBER = os.makedev(10, 229)
_HELPER = "fusermount3"
# The first with RWF_NOWAIT of preadv2, which moves reads that would block to a thread.
_OLDEST = (4, 14)
_COVERING = (6, 9)  # the first with FUSE_NOTIFY_RESEND
_IMPORT_SECONDS = 60
_CAP_SYS_ADMIN = 21

#: What a user can still do.
NO_MOUNT = "nothing can be mounted here; flatten, info, verify and seal still work"


def examine_host() -> Iterator[Finding]:
    """The findings on what this user needs to mount.

    Kernel, what it does for a mount whose server dies, /dev/fuse, fusermount3, the right to mount,
    /etc/fuse.conf, fusectl and pyfuse3. /dev/fuse is opened briefly, and another process imports
    pyfuse3. Nothing is raised.
    """
    yield _kernel()
    yield _cover()
    yield _device()
    yield _helper()
    yield _right()
    yield _others()
    yield _control()
    yield _library()


def obstacles() -> list[str]:
    """The known reasons why this user cannot mount on this machine, each with its remedy."""
    found = (_device(), _helper(), _right())
    return [f"{each.finding}; {each.remedy}" for each in found if each.severity != "fine"]


def _fine(check: str, finding: str) -> Finding:
    return Finding("host", check, "fine", finding)


def _warning(check: str, finding: str, why: str, remedy: str) -> Finding:
    return Finding("host", check, "warning", finding, why, remedy)


def _kernel() -> Finding:
    release = platform.release()
    if sys.platform != "linux":
        return Finding(
            "host",
            "kernel",
            "wrong",
            f"this is {sys.platform}",
            "data extents can be read on Linux only",
            "run diffmergefs on Linux",
        )
    if _is_older(release, _OLDEST):
        return _warning(
            "kernel",
            f"Linux {release} is older than {_OLDEST[0]}.{_OLDEST[1]}",
            "every read that misses the page cache would delay the others",
            "upgrade the kernel",
        )
    return _fine("kernel", f"Linux {release}")


def _cover() -> Finding:
    # By the number of the release. A mount asks the kernel itself.
    release = platform.release()
    if _is_older(release, _COVERING):
        return _warning(
            "cover",
            f"Linux {release} is older than {_COVERING[0]}.{_COVERING[1]}",
            "if the server of a mount dies, its readers get errors, and VMs on it are lost",
            f"upgrade the kernel to Linux {_COVERING[0]}.{_COVERING[1]} or newer, where another"
            " server goes on",
        )
    return _fine("cover", "if the server of a mount dies, another one goes on")


def _is_older(release: str, than: tuple[int, int]) -> bool:
    numbers = re.match(r"(\d+)\.(\d+)", release)
    return numbers is not None and (int(numbers[1]), int(numbers[2])) < than


def _device() -> Finding:
    try:
        fd = os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        device = os.fstat(fd).st_rdev
        os.close(fd)
    except FileNotFoundError:
        remedy = "load the module (modprobe fuse), or give the container --device /dev/fuse"
        return _warning("device", f"no {FUSE_DEVICE}", NO_MOUNT, remedy)
    except OSError as error:
        return _warning(
            "device",
            f"{FUSE_DEVICE}: {error.strerror}",
            NO_MOUNT,
            "set its mode to 0666, the default of distributions; in a container, allow the device"
            " (--device /dev/fuse)",
        )
    if device != _FUSE_NUMBER:
        return _warning(
            "device",
            f"{FUSE_DEVICE} is another device",
            NO_MOUNT,
            f"create it again: mknod -m 666 {FUSE_DEVICE} c 10 229",
        )
    return _fine("device", f"{FUSE_DEVICE} can be opened")


def _helper() -> Finding:
    is_root = os.geteuid() == 0
    path = shutil.which(_HELPER, path=ROOTS_PATH if is_root else None)
    install = "install it (Debian: apt-get install fuse3)"
    if path is None and is_root:
        return _fine("helper", f"no {_HELPER}; root mounts without it")
    if path is None:
        return _warning("helper", f"no {_HELPER} in $PATH", NO_MOUNT, install)
    status = os.stat(path)
    if not is_root and not (status.st_mode & stat.S_ISUID and status.st_uid == 0):
        return _warning(
            "helper",
            f"{path} is not setuid root",
            "only root can mount here",
            f"restore it: chown root {path}; chmod 4755 {path}",
        )
    return _fine("helper", f"{path} mounts for ordinary users")


def _right() -> Finding:
    if os.geteuid() != 0:
        return _fine("right", f"an ordinary user mounts with the rights of {_HELPER}")
    if _may_administer():
        return _fine("right", "root has the right to mount (CAP_SYS_ADMIN)")
    return _warning(
        "right",
        "root without CAP_SYS_ADMIN, the right to mount",
        NO_MOUNT,
        "give it that right: in a container, --cap-add SYS_ADMIN (and --device /dev/fuse)",
    )


def _may_administer() -> bool:
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return True  # unknown
    effective = next((line for line in lines if line.startswith("CapEff:")), "CapEff: 0")
    return bool(int(effective.split()[1], 16) >> _CAP_SYS_ADMIN & 1)


def _others() -> Finding:
    if others_may_be_let_in():
        return _fine("allow_other", f"{FUSE_CONF} lets users mount with --allow-other")
    if os.geteuid() == 0:
        return _fine("allow_other", "root may mount with --allow-other")
    return _warning(
        "allow_other",
        f"no line user_allow_other in {FUSE_CONF}",
        "a VMM that runs as another user cannot open the images that this user mounts",
        "ask root to add that line, or mount as the VMM's user",
    )


def _control() -> Finding:
    if os.path.ismount(CONNECTIONS):
        return _fine("fusectl", f"fusectl is mounted on {CONNECTIONS}")
    why = "--max-background has no effect"
    if _is_older(platform.release(), _COVERING):
        why = f"--prefetch=fadvise replaces notify, which is faster, and {why}"
    return _warning(
        "fusectl",
        f"fusectl is not mounted on {CONNECTIONS}",
        why,
        f"ask root to mount it: mount -t fusectl fusectl {CONNECTIONS}",
    )


def _library() -> Finding:
    # In another process: a crash, or a build for another Python, must not end this one.
    said = _import_error()
    if said is None:
        version = importlib.metadata.version("pyfuse3")
        return _fine("pyfuse3", f"pyfuse3 {version} can be imported")
    return _warning(
        "pyfuse3",
        f"pyfuse3 cannot be imported: {said}",
        NO_MOUNT,
        f"install libfuse3, and pyfuse3 with: {install_command('pyfuse3')}",
    )


def _import_error() -> str | None:
    try:
        with children.start_code("import pyfuse3, trio", stderr=subprocess.PIPE) as child:
            try:
                _, text = child.communicate(timeout=_IMPORT_SECONDS)
            except subprocess.TimeoutExpired as error:
                child.kill()
                return str(error)
    except OSError as error:
        return str(error)
    if child.returncode == 0:
        return None
    lines = text.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {child.returncode}"
