"""Who connects, and whether they may read the layers."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffmergefs.core.layer import Layer
from diffmergefs.fuse.access import Access
from diffmergefs.uffd.peer import Peer, has_ended, may_end, unreadable
from tests.support.images import PAGE, write_layer

OTHER = 54321


def peer(uid: int = OTHER, *groups: int) -> Peer:
    return Peer(1, uid, frozenset(groups))


def test_the_kernel_says_who_it_is() -> None:
    one, other = socket.socketpair()
    with one, other:
        found = Peer.of(one)
        assert found == Peer(os.getpid(), os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))
        pidfd = found.open_pidfd(one)
    try:
        assert may_end(pidfd) and not has_ended(pidfd)
    finally:
        os.close(pidfd)


def test_the_end_of_a_process_is_seen() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        pidfd = os.pidfd_open(process.pid)
        process.kill()
    try:
        assert has_ended(pidfd) and may_end(pidfd)
    finally:
        os.close(pidfd)


@pytest.mark.parametrize(
    ("who", "mode", "may"),
    [
        (peer(7), 0o400, True),
        (peer(7, 8), 0o044, False),  # the owner's class counts, whatever the others'
        (peer(9, 8), 0o040, True),
        (peer(9, 8), 0o404, False),
        (peer(9, 3), 0o004, True),
        (peer(9, 3), 0o440, False),
        (peer(0), 0o000, True),
    ],
)
def test_the_class_of_a_user_decides(who: Peer, mode: int, may: bool) -> None:
    assert who.has(0o4, Access(7, 8, mode)) is may


@pytest.fixture
def layer(public_path: Path) -> Iterator[Layer]:
    path = public_path / "folder" / "layer"
    path.parent.mkdir(mode=0o755)
    write_layer(path, PAGE, [(0, b"x" * PAGE)]).chmod(0o644)
    found = Layer.open(str(path))
    yield found
    found.close()


def test_file_and_directories_must_let_it_in(layer: Layer) -> None:
    path = Path(layer.path)
    assert unreadable([layer], peer()) is None
    for place, closed, opened in ((path, 0o640, 0o644), (path.parent, 0o754, 0o755)):
        place.chmod(closed)
        assert unreadable([layer], peer()) == layer.path
        assert unreadable([layer], peer(os.geteuid())) is None
        place.chmod(opened)
    assert unreadable([layer], peer()) is None


def test_a_deleted_layer_is_its_owners(layer: Layer) -> None:
    Path(layer.path).unlink()
    assert unreadable([layer], peer()) == layer.path
    assert unreadable([layer], peer(os.geteuid())) is None


def test_a_layer_counts_where_it_is_now(layer: Layer) -> None:
    path = Path(layer.path)
    closed = path.parent.parent / "closed"
    closed.mkdir(mode=0o700)
    path.rename(closed / "layer")
    write_layer(path, PAGE, []).chmod(0o644)
    assert unreadable([layer], peer()) == layer.path
