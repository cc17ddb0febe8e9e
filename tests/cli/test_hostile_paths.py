"""No path leads out of a directory of snapshots: links, mounts, and exchanges in mid-walk."""

from __future__ import annotations

import functools
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffmergefs.core import beneath
from diffmergefs.core.errors import FileAccessError, LayerChangedError
from diffmergefs.opening.images import open_snapshot
from diffmergefs.opening.opener import LayerPool
from diffmergefs.opening.trust import TrustPolicy
from diffmergefs.stores.catalog import read_catalog
from tests.support import mounttable, openat2, skips
from tests.support.places import REPOSITORY
from tests.support.stores import write_chain, write_tag

NAMES = ["dir", "inner", "file", "link", "up", "abs", "self", "fifo", "gone", ".", "", "é\n"]


@pytest.fixture(scope="module")
def maze(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A tree in which every directory holds a directory, a file, a FIFO and links to all sides."""
    top = tmp_path_factory.mktemp("maze")
    (top / "secret").write_bytes(b"secret")
    for folder in ("root", "root/dir", "root/dir/inner", "root/dir/inner/é\n", "root/inner"):
        (top / folder).mkdir()
        (top / folder / "file").write_bytes(folder.encode())
        (top / folder / "link").symlink_to("file")
        (top / folder / "up").symlink_to("..")
        (top / folder / "abs").symlink_to("/")
        (top / folder / "self").symlink_to(".")
        os.mkfifo(top / folder / "fifo")
    fd = os.open(top / "root", os.O_PATH | os.O_DIRECTORY)
    yield fd
    os.close(fd)


def opened(opener: object, *arguments: object) -> tuple[int, int] | None:
    """Device and inode of what was opened, None where it was refused."""
    try:
        fd = opener(*arguments)  # type: ignore[operator]
    except (OSError, FileAccessError):
        return None
    try:
        status = os.fstat(fd)
        return status.st_dev, status.st_ino
    finally:
        os.close(fd)


@given(names=st.lists(st.sampled_from(NAMES), max_size=6))
def test_the_walk_opens_what_openat2_opens(maze: int, names: list[str]) -> None:
    # A slash or a dot at the end asks the kernel for a directory; to the walk they mean nothing.
    while names and names[-1] in ("", "."):
        names.pop()
    path = "/".join(names) if names and names[0] else "."
    kernel = functools.partial(opened, openat2.open_beneath, maze, os.fsencode(path))
    found = kernel(os.O_PATH | os.O_NOFOLLOW)
    assert opened(beneath.open_handle, maze, path) == found
    if found is not None:
        status = beneath.stat_beneath(maze, path)
        assert (status.st_dev, status.st_ino) == found
        is_file = stat.S_ISREG(status.st_mode)
        assert opened(beneath.open_regular, maze, path) == (kernel() if is_file else None)
    assert opened(beneath.open_directory, maze, path) == kernel(os.O_RDONLY | os.O_DIRECTORY)


def test_the_maze_has_something_to_find(maze: int) -> None:
    found = {p: opened(beneath.open_handle, maze, p) for p in ("dir/inner/file", "fifo", "up")}
    assert None not in found.values()
    assert opened(openat2.open_beneath, maze, b"dir/up/dir") is None


@pytest.mark.parametrize("path", ["{}", "..", "../secret", "dir/../file", "dir/..", "/etc/passwd"])
def test_where_the_walk_is_stricter_it_refuses(maze: int, path: str) -> None:
    path = path.format(os.readlink(f"/proc/self/fd/{maze}"))
    assert opened(beneath.open_handle, maze, path) is None


def test_a_mount_inside_is_entered_and_its_magic_links_are_not(public_path: Path) -> None:
    skips.require_mounts()
    for name in ("root/bound", "root/proc", "other"):
        (public_path / name).mkdir(parents=True)
    (public_path / "other" / "file").write_bytes(b"bound")
    bound, proc = public_path / "root" / "bound", public_path / "root" / "proc"
    root = os.open(public_path / "root", os.O_PATH)
    try:
        subprocess.run(["mount", "--bind", public_path / "other", bound], check=True)
        subprocess.run(["mount", "-t", "proc", "proc", proc], check=True)
        for path in ("bound/file", "proc/self/root", "proc/self/root/etc", "proc/1/cwd", "proc/1"):
            flags = os.O_PATH | os.O_NOFOLLOW
            kernel = opened(openat2.open_beneath, root, path.encode(), flags)
            assert opened(beneath.open_handle, root, path) == kernel
        assert opened(beneath.open_regular, root, "bound/file") is not None
        assert opened(beneath.open_directory, root, "proc/1/root") is None
    finally:
        os.close(root)
        mounttable.unmount_below(str(public_path))


@pytest.mark.parametrize("wanted", ["folder/file", "folder/inner/file", "file"])
def test_no_exchange_in_mid_walk_leads_out(tmp_path: Path, wanted: str) -> None:
    # The enemy swaps a directory, or the file itself, for a link out of the root, again and again.
    for side in ("root", "outside"):
        (tmp_path / side / "folder" / "inner").mkdir(parents=True)
        for name in ("file", "folder/file", "folder/inner/file"):
            (tmp_path / side / name).write_bytes(side.encode())
    swapped = tmp_path / "root" / wanted.split("/")[0]
    trap = tmp_path / "root" / "trap"
    trap.symlink_to(tmp_path / "outside" / wanted.split("/")[0])
    root = os.open(tmp_path / "root", os.O_PATH)
    code = (
        "import sys; from pathlib import Path; from tests.support.openat2 import exchange\n"
        "one, other = map(Path, sys.argv[1:])\n"
        "while True: exchange(one, other)\n"
    )
    enemy = subprocess.Popen(
        [sys.executable, "-c", code, str(swapped), str(trap)],
        cwd=REPOSITORY,
    )
    outcomes = {"read": 0, "refused": 0}
    try:
        deadline = time.monotonic() + 60
        while min(outcomes.values()) < 200 and time.monotonic() < deadline:
            try:
                fd = beneath.open_regular(root, wanted)
            except (OSError, FileAccessError):
                outcomes["refused"] += 1
                continue
            outcomes["read"] += 1
            with open(fd, "rb") as file:
                assert file.read() == b"root"
    finally:
        enemy.kill()
        enemy.wait(60)
        os.close(root)
    assert min(outcomes.values()) >= 200, outcomes  # the race took place


def test_a_layer_exchanged_after_the_look_is_not_opened(tmp_path: Path) -> None:
    store, folder = tmp_path / "store", tmp_path / "store" / "work"
    write_chain(store, ["base", "work"])
    links = read_catalog(str(store)).chain("work")
    folder.rename(tmp_path / "moved")
    folder.symlink_to("../moved")
    root = os.open(store, os.O_PATH)
    try:
        with pytest.raises(FileAccessError, match=r"work/memory\.bin: Not a directory"):
            open_snapshot(links, LayerPool(root, TrustPolicy()), TrustPolicy())
        folder.unlink()
        write_tag(store, "work", "base", layer=2)
        with pytest.raises(LayerChangedError, match="changed since its directory was read"):
            open_snapshot(links, LayerPool(root, TrustPolicy()), TrustPolicy())
    finally:
        os.close(root)
