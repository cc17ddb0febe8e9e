"""What is said of a filesystem, under a mount table of the test's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from diffmergefs.core import sparse
from diffmergefs.opening import filesystems
from diffmergefs.opening.filesystems import untrusted_filesystem
from diffmergefs.system.mounttable import Mount
from tests.support.images import PAGE, write_layer

FINE = None


def reason(path: Path) -> str | None:
    fd = os.open(path, os.O_RDONLY)
    try:
        return untrusted_filesystem(fd)
    finally:
        os.close(fd)


def page(directory: Path) -> Path:
    return write_layer(directory / "file", 4 * PAGE, [(PAGE, b"x" * PAGE)])


@pytest.fixture
def as_mount(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``as_mount(kind, *options, magic=...)``: what the kernel says of every file from now on."""

    def pretend(kind: str, *options: str, magic: int = 0x1234) -> None:
        mount = Mount("/", "0:0", kind, "none", 1, 0, "/", options)
        monkeypatch.setattr(filesystems, "mount_of", lambda _: mount)
        monkeypatch.setattr(sparse, "filesystem_magic", lambda _: magic)

    return pretend


@pytest.fixture
def shmem_enabled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``shmem_enabled("never")``: what the kernel says of that setting from now on."""
    file = tmp_path / "gone" / "shmem_enabled"
    monkeypatch.setattr(filesystems, "SHMEM_ENABLED", file)

    def say(word: str) -> None:
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"always within_size advise never [{word}] deny force\n")

    return say
