"""Foreign formats, in which holes do not say what is data, recognised by their magic bytes.

The error names the format and says what to do instead. Sources: QEMU's docs/interop/qcow2 and
docs/devel/migration (mapped-ram), libvirt (src/qemu/qemu_saveimage.h), e2b-dev/infra
(storage/header), wrennhq/wrenn (internal/snapshot), kvcache-ai/AgentENV (storage/overlaybd,
docs/src/concepts/snapshots.md), checkpoint-restore/criu (criu/image-desc.c).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from diffmergefs.core.errors import ForeignFormatError

HEAD = 4096
_INSTEAD = "export the complete memory from it with its own tools, and give that as a base"
_QCOW2 = (
    "is a qcow2 image: its clusters lie anywhere in the file, so its holes say nothing; convert it"
    " with `qemu-img convert -O raw` and give the raw file as a base"
)
_MAPPED_RAM = (
    "is a QEMU migration file with mapped-ram: pages lie at offsets of its own beside a bitmap of"
    " its own; restore it with QEMU, or give the file of a memory-backend-file as a base"
)
_MIGRATION = (
    "is a QEMU migration stream, not a memory image; restore it with QEMU, or give the file of a"
    " memory-backend-file as a base"
)
_LIBVIRT = (
    "is a saved VM of libvirt: a QEMU migration stream behind a header; restore it with `virsh"
    " restore`, or give the file of a memory-backend-file as a base"
)
_AGENTENV = (
    "is of AgentENV: memory in OverlayBD layers, packed and often compressed, where holes mean"
    f" nothing; {_INSTEAD}"
)
_PACKED = "only changed blocks, packed one after another, so that holes mean nothing"
_MAPPED = f"its memfile holds {_PACKED}, and memfile.header maps them; {_INSTEAD}"
_E2B = f"is an e2b build: {_MAPPED}"
_WRENN = f"is a wrenn snapshot: {_MAPPED}"
_CRIU = (
    "is a CRIU dump: pages of processes, packed in pages-*.img, and no memory of a VM; restore it"
    " with `criu restore`"
)
_HEADER = "memfile.header"
_GENERATION = re.compile(r"memfile\.[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def of_head(head: bytes) -> str | None:
    """Why a file that begins with `head` is refused (`HEAD` bytes are enough), or None.

    Guest memory could begin with the same bytes; it is then refused too.
    """
    if head.startswith(b"QFI\xfb"):
        return _QCOW2
    if head.startswith(b"QEVM\0\0\0"):
        # The configuration section names the capabilities.
        return _MAPPED_RAM if b"mapped-ram" in head else _MIGRATION
    if head.startswith((b"LibvirtQemudSave", b"LibvirtQemudPart")):
        return _LIBVIRT
    if head.startswith((b"LSMT\0\1\2", b"ZFile\0\1")):
        return _AGENTENV
    return None


def of_directory(names: Collection[str]) -> str | None:
    """Why a directory with files of these names is refused, or None."""
    if _HEADER in names:
        is_wrenn = "rootfs.cow" in names or any(map(_GENERATION.fullmatch, names))
        return _WRENN if is_wrenn else _E2B
    if not {"mem_image.json", "mem_overlaybd", "firecracker-manifest.json"}.isdisjoint(names):
        return _AGENTENV
    if "inventory.img" in names and any(name.startswith("pagemap-") for name in names):
        return _CRIU
    return None


def require_own_file(fd: int, path: str) -> None:
    """Raise ForeignFormatError if the open file begins like one of these formats.

    A file whose first bytes cannot be read passes: whoever needs those bytes gets the error then.
    """
    try:
        head = os.pread(fd, HEAD, 0)
    except OSError:
        return
    if (declined := of_head(head)) is not None:
        raise ForeignFormatError(f"{path}: {declined}")


def require_own_neighbours(path: str) -> None:
    """Raise ForeignFormatError if the file at `path` is the memory of one of these directories.

    Its bytes show nothing, but its name and the map beside it do.
    """
    folder, name = os.path.split(os.path.realpath(path))
    is_memory = name == "memfile" or _GENERATION.fullmatch(name)
    if is_memory and os.path.lexists(os.path.join(folder, _HEADER)):
        require_own_directory(os.listdir(folder), path)


def require_own_directory(names: Collection[str], path: str) -> None:
    """Raise ForeignFormatError if a directory with these names is of one of these formats."""
    if (declined := of_directory(names)) is not None:
        raise ForeignFormatError(f"{path}: {declined}")
