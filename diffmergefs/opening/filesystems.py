"""The filesystems that report holes exactly: an allowlist. Any other is refused."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffmergefs.core import beneath, sparse
from diffmergefs.core.errors import FileAccessError
from diffmergefs.system.mounttable import Mount, mount_of

_NAMES = {
    0xEF53: "ext4",  # of ext2 and ext3 too
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    sparse.TMPFS_MAGIC: "tmpfs",
    sparse.NFS_MAGIC: "nfs",
    sparse.OVERLAYFS_MAGIC: "overlay",
    sparse.FUSE_MAGIC: "fuse",
}
_WITH_MAP = {"ext2", "ext3", "ext4", "xfs", "btrfs"}
_IN_MEMORY = {"tmpfs", "devtmpfs", "rootfs"}
_USER_MUST_JUDGE = {"f2fs", "bcachefs", "ocfs2", "gfs2", "virtiofs", "fuse", "fuseblk"}
_REASONS = {
    "zfs": "it stores blocks of zeros as holes",
    "squashfs": "it reports holes in its own blocks and stores blocks of zeros as holes",
    "erofs": "it reports whole files as data",
    "ceph": "it reports whole files as data",
    "cifs": "what it reports depends on the server",
    "smb3": "what it reports depends on the server",
    "9p": "it does not report holes",
    "vfat": "it has no holes",
    "exfat": "it has no holes",
    "ramfs": "it reports whole files as data",
    "hugetlbfs": "it stores huge pages only",
}
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_REOPEN = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY


def untrusted_filesystem(fd: int) -> str | None:
    """Why no extents on the filesystem of `fd` can be trusted, or None.

    `fd` is a regular file that is open for reading, or a directory. Trusted are ext2/3/4, xfs and
    btrfs, NFS 4.2, tmpfs without huge pages, and an overlayfs that stores the file on one of these.
    Raises OSError as fstat and fstatfs do.
    """
    name = _NAMES.get(sparse.filesystem_magic(fd), "")
    is_file = stat.S_ISREG(os.fstat(fd).st_mode)
    # 9p shows the type of the server's filesystem, but has no map of extents.
    if name in _WITH_MAP and is_file and sparse.has_map(fd):
        return None
    mount = mount_of(fd)
    kind = mount.kind if mount else name or f"type {sparse.filesystem_magic(fd):#x}"
    reason = _judged(fd, mount, kind, name)
    return f"the extents on {kind} cannot be trusted: {reason}" if reason else None


def _judged(fd: int, mount: Mount | None, kind: str, name: str) -> str | None:
    if kind in _WITH_MAP:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        return "it gives no map of the file's extents (FIEMAP)" if is_file else None
    if kind in _IN_MEMORY and name == "tmpfs":
        return _huge_pages(fd, mount)
    if kind in ("nfs", "nfs4"):
        return _before_nfs_4_2(mount)
    if kind == "overlay":
        return _below_overlay(fd, mount) if mount else _passed_through(fd)
    family = kind.partition(".")[0]
    if family in _USER_MUST_JUDGE:
        return "whether they are exact depends on how it is set up, which only you can judge"
    return _REASONS.get(family, "it is not known to report holes exactly")


def _before_nfs_4_2(mount: Mount | None) -> str | None:
    options = mount.options if mount else ()
    if "vers=4.2" in options:
        return None
    version = next((o for o in options if o.startswith("vers=")), "vers unknown")
    return f"before 4.2 it does not report holes ({version})"


def _huge_pages(fd: int, mount: Mount | None) -> str | None:
    enabled = _shmem_enabled()
    if enabled == "force":
        return f"{SHMEM_ENABLED} is 'force', so it stores huge pages"
    if mount is None and _is_kernels_own(fd):  # of a memfd; that setting is its `huge=`
        return None if enabled in ("never", "deny") else f"{SHMEM_ENABLED} is '{enabled}'"
    if mount is None:
        return "its mount is not listed for this process, so its option huge= is not known"
    huge = next((option for option in mount.options if option.startswith("huge=")), None)
    return f"with {huge} it may store huge pages" if huge else None


def _shmem_enabled() -> str:
    try:
        text = SHMEM_ENABLED.read_text(encoding="ascii")
    except OSError:
        # A kernel without huge pages has no such file. Without sysfs nothing is known.
        return "never" if SHMEM_ENABLED.parents[1].is_dir() else "unknown"
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen[1] if chosen else "unknown"


def _is_kernels_own(fd: int) -> bool:
    with (
        suppress(OSError),
        beneath.closing_fd(os.memfd_create("diffmergefs", os.MFD_CLOEXEC)) as memory,
    ):
        return os.fstat(memory).st_dev == os.fstat(fd).st_dev
    return False


def _below_overlay(fd: int, mount: Mount) -> str | None:
    # The filesystem that stores the file: found by the file's path in the overlay's directories. If
    # they are out of reach (in a container), what the overlay passes through must decide.
    with _found_below(fd, mount) as found:
        if found is None:
            return _passed_through(fd)
        layer, stored = found
        reason = untrusted_filesystem(stored)
        return f"{layer} stores the file, and {reason}" if reason else None


@contextmanager
def _found_below(fd: int, mount: Mount) -> Iterator[tuple[str, int] | None]:
    # The directory of the overlay that stores the file, and the file in it.
    for layer in overlay_directories(mount.options):
        if (stored := _stored_in(layer, fd, mount)) is not None:
            with beneath.closing_fd(stored):
                yield layer, stored
            return
    yield None


def is_filled_by_readers(fd: int) -> bool:
    """Whether a hole of the regular file `fd` becomes data when a process maps and reads it.

    That happens on tmpfs, and on an overlayfs that is known to store the file there. Raises OSError
    as fstatfs does.
    """
    magic = sparse.filesystem_magic(fd)
    if magic != sparse.OVERLAYFS_MAGIC:
        return magic == sparse.TMPFS_MAGIC
    if (mount := mount_of(fd)) is None:
        return False
    with _found_below(fd, mount) as found:
        return found is not None and is_filled_by_readers(found[1])


def overlay_directories(options: tuple[str, ...]) -> list[str]:
    r"""The directories of an overlay by its mount options, the upper one first, then the lower.

    Only those with absolute paths, because others are relative to where mount(8) was run. In
    `lowerdir` a colon in a name is `\:`. The upper directory is listed twice if its backslashes are
    ambiguous.
    """
    uppers, lowers = list[str](), list[str]()
    for option in options:
        name, _, value = option.partition("=")
        if name == "upperdir":
            uppers += dict.fromkeys((value, _without_backslashes(value)))
        elif name in ("lowerdir+", "datadir+"):
            lowers.append(value)
        elif name == "lowerdir":
            lowers += map(_without_backslashes, re.findall(r"(?:\\.|[^:\\])+", value))
    return [path for path in (*uppers, *lowers) if path.startswith("/")]


def _without_backslashes(path: str) -> str:
    return re.sub(r"\\(.)", r"\1", path)


def _stored_in(layer: str, fd: int, mount: Mount) -> int | None:
    # A descriptor of the same file in the directory `layer` of the overlay. A file of the same name
    # in another mount namespace has another ctime; one whose data is elsewhere (metacopy) has other
    # blocks.
    with suppress(OSError, FileAccessError):
        relative = _path_in_filesystem(fd, mount)
        with (
            beneath.passing(None, layer) as directory,
            beneath.closing_fd(beneath.open_handle(directory, relative)) as handle,
        ):
            if _content(handle) == _content(fd):
                return os.open(f"/proc/self/fd/{handle}", _REOPEN)
    return None


def _path_in_filesystem(fd: int, mount: Mount) -> str:
    path = os.readlink(f"/proc/self/fd/{fd}")
    inside = os.path.relpath(path, mount.path) if mount.path else ".."
    return os.path.normpath(os.path.join(mount.root.lstrip("/"), inside))


def _content(fd: int) -> tuple[int, ...]:
    s = os.fstat(fd)
    return s.st_mode, s.st_size, s.st_blocks, s.st_mtime_ns, s.st_ctime_ns


def _passed_through(fd: int) -> str | None:
    # The map and the flags come from the filesystem that stores the file. Every filesystem that has
    # both is on the list, or is not used for containers; erofs has only a map.
    unknown = "what stores the file is not found in its directories, and"
    if not stat.S_ISREG(os.fstat(fd).st_mode) or not sparse.has_map(fd):
        return f"{unknown} gives no map of the file's extents (FIEMAP)"
    if not sparse.has_flags(fd):
        return f"{unknown} gives no flags of the file (FS_IOC_GETFLAGS), as packed filesystems do"
    return None
