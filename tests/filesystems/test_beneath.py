"""Opening beneath a directory: what only root can set up."""

from __future__ import annotations

import os
import socket
import stat
import sys
from pathlib import Path

import pytest

from diffmergefs.core import beneath
from diffmergefs.core.errors import FileAccessError
from tests.support import skips, users
from tests.support.subjects.beneath import root, tree

__all__ = ["root", "tree"]


def test_a_socket_and_a_device_are_refused_and_not_opened(
    root: int, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    skips.require_root()
    # A device that has no driver: an open would fail with ENXIO instead.
    os.mknod(tree / "char", 0o600 | stat.S_IFCHR, os.makedev(240, 77))
    os.mknod(tree / "block", 0o600 | stat.S_IFBLK, os.makedev(240, 77))
    monkeypatch.chdir(tree)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        for name, kind in [("char", "character"), ("block", "block"), ("socket", "socket")]:
            with pytest.raises(FileAccessError, match=kind):
                beneath.open_regular(root, name)


_OPEN_AS_STRANGER = """
import os, sys
sys.path[:0] = sys.argv[2:]
from diffmergefs.core import beneath
root = os.open(sys.argv[1], os.O_PATH | os.O_DIRECTORY)
os.setgid(12345); os.setuid(12345)
print(os.read(beneath.open_regular(root, "folder/inner/deep"), 100).decode())
"""


def test_a_directory_that_may_be_searched_but_not_read_is_passed_through(tree: Path) -> None:
    for path in (tree, tree / "folder", tree / "folder" / "inner"):
        path.chmod(0o711)
    # Starts as root, which may read the interpreter and the package wherever they lie.
    command = [sys.executable, "-c", _OPEN_AS_STRANGER, str(tree), *sys.path]
    result = users.run_as(0, 0, command, text=True)
    assert (result.returncode, result.stdout) == (0, "deep\n"), result.stderr
