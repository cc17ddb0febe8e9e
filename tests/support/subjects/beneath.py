"""The tree of the tests of opening beneath a directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def tree(public_path: Path) -> Path:
    """A directory with one of everything; `outside` lies beside it."""
    root = public_path / "root"
    (root / "folder" / "inner").mkdir(parents=True)
    (root / "file").write_bytes(b"in the root")
    (root / "folder" / "inner" / "deep").write_bytes(b"deep")
    (public_path / "outside").write_bytes(b"secret")
    (root / "link").symlink_to("file")
    (root / "folder_link").symlink_to("folder")
    (root / "out").symlink_to("..")
    (root / "dangling").symlink_to("nothing")
    os.mkfifo(root / "fifo")
    return root


@pytest.fixture
def root(tree: Path) -> Iterator[int]:
    before = set(os.listdir("/proc/self/fd"))
    fd = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)
    assert set(os.listdir("/proc/self/fd")) == before  # no descriptor was left behind
