"""Heads of files in other programs' formats."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.support.images import PAGE, write_layer
from tests.support.stores import SIZE

QCOW2 = b"QFI\xfb" + struct.pack(">I", 3)


def stream(*capabilities: bytes) -> bytes:
    """The head of a QEMU migration: magic, version 3, then the configuration section."""
    machine = b"pc-q35-9.0"
    section = b"\7" + struct.pack(">I", len(machine)) + machine
    section += struct.pack(">I", len(capabilities))
    section += b"".join(bytes([len(name)]) + name for name in capabilities)
    return b"QEVM" + struct.pack(">I", 3) + section


HEADS = {
    "qcow2": (QCOW2, "is a qcow2 image", "qemu-img convert"),
    "mapped-ram": (stream(b"mapped-ram"), "QEMU migration file with mapped-ram", "restore it"),
    "migration": (stream(), "QEMU migration stream", "restore it with QEMU"),
    "libvirt": (b"LibvirtQemudSave\2\0", "is a saved VM of libvirt", "`virsh restore`"),
    "overlaybd": (b"LSMT\0\1\2\0", "is of AgentENV", "export"),
    "zfile": (b"ZFile\0\1\0", "is of AgentENV", "export"),
}


@pytest.fixture(params=HEADS)
def foreign_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str]:
    head, name, instead = HEADS[request.param]
    path = write_layer(tmp_path / "image.mem", SIZE, [(0, head.ljust(PAGE, b"\0"))])
    return path, name, instead
