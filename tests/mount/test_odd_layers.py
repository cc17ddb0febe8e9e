"""A mount whose layers are slow or cannot be opened, or that meets a bug: others go on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.support.images import PAGE, overlay_oracle, signed
from tests.support.live import Gate, patch_children, until
from tests.support.mounts import mounted
from tests.support.stores import BASE_PAGES, SIZE, pages, write_chain, write_tag


def image_of(*layers: tuple[int, range | list[int]]) -> bytes:
    return overlay_oracle(SIZE, [pages(layer, numbers) for layer, numbers in layers])


def test_a_bug_met_by_a_mount(
    public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    code = (
        "from diffmergefs.core.view import MergedView\n"
        "real = MergedView.fill_nowait\n"
        "def fill_nowait(self, buffer, offset, supplied):\n"
        f"    if offset <= {3 * PAGE} < offset + len(buffer):\n"
        "        raise RuntimeError('on purpose')\n"
        "    return real(self, buffer, offset, supplied)\n"
        "MergedView.fill_nowait = fill_nowait\n"
    )
    patch_children(monkeypatch, public_path / "patch", code)
    with mounted(store, mountpoint, expect_log=("this is a bug", "Traceback")) as mount:
        fd = os.open(mountpoint / "leaf" / "memory.bin", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            with pytest.raises(OSError, match="Input/output error"):
                os.pread(fd, PAGE, 3 * PAGE)
            assert os.pread(fd, PAGE, 4 * PAGE) == signed(0, 4 * PAGE, PAGE)
        finally:
            os.close(fd)
        assert "RuntimeError: on purpose" in mount.log()


CLIENTS = """
import os, sys, threading
folder, count = sys.argv[1], int(sys.argv[2])
seen = []
def client():
    names = os.listdir(folder)
    with open(folder + '/memory.bin', 'rb') as file:
        seen.append((len(names), file.read()))
threads = [threading.Thread(target=client) for _ in range(count)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(seen) == count and len(set(seen)) == 1, len(seen)
sys.stdout.buffer.write(seen[0][1])
"""


def test_many_clients_of_a_slow_layer(
    public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait, for one sync of it; nobody else does. There are more than pyfuse3's own limit."""
    clients = 130
    store = write_chain(public_path / "store", ["base", "leaf"])
    write_tag(store, "slow", "base", layer=5)
    asked, synced = public_path / "asked", public_path / "synced"
    gate = Gate(public_path / "gate")
    code = (
        "import os\n"
        "from diffmergefs.fuse.operations import Operations\n"
        "def note(path):\n"
        "    with open(path, 'ab') as file:\n"
        "        file.write(b'x')\n"
        "real_sync, real_opendir = os.fsync, Operations.opendir\n"
        "def fsync(fd):\n"
        "    if 'slow/memory.bin' in os.readlink(f'/proc/self/fd/{fd}'):\n"
        f"        note({str(synced)!r})\n"
        "        wait_at_gate()\n"
        "    real_sync(fd)\n"
        "async def opendir(self, inode, ctx):\n"
        f"    note({str(asked)!r})\n"
        "    return await real_opendir(self, inode, ctx)\n"
        "os.fsync, Operations.opendir = fsync, opendir\n"
    )
    with monkeypatch.context() as patch:
        gate.patch(patch, code)
        command = [sys.executable, "-c", CLIENTS, str(mountpoint / "slow"), str(clients)]
        with mounted(store, mountpoint) as mount:
            patch.undo()
            process = subprocess.Popen(command, stdout=subprocess.PIPE)
            try:
                gate.wait_until_reached()
                until(
                    lambda: asked.exists() and asked.stat().st_size == clients,
                    "not all clients were let in",
                )
                for tag, layers in (("base", []), ("leaf", [(1, [1])])):
                    command = ["cat", str(mount.path / tag / "memory.bin")]
                    image = subprocess.run(command, capture_output=True, check=True, timeout=30)
                    assert image.stdout == image_of((0, BASE_PAGES), *layers)
                assert process.poll() is None
                gate.open()
                output, _ = process.communicate(timeout=60)
                assert process.returncode == 0
                assert output == image_of((0, BASE_PAGES), (5, [5]))
                assert synced.read_bytes() == b"x"
            finally:
                gate.open()
                process.kill()
                process.communicate()


def test_too_many_open_files_fail_one_lookup(
    public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    flag = public_path / "flag"
    flag.touch()
    code = (
        "import errno, os\n"
        "from diffmergefs.core import beneath\n"
        "real = beneath.open_regular\n"
        "def open_regular(root, path):\n"
        f"    if path == 'leaf/memory.bin' and os.path.exists({str(flag)!r}):\n"
        "        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)\n"
        "    return real(root, path)\n"
        "beneath.open_regular = open_regular\n"
    )
    patch_children(monkeypatch, public_path / "patch", code)
    expected = ("leaf: cannot be opened now: ", "Too many open files")
    with mounted(store, mountpoint, expect_log=expected) as mount:
        view = mountpoint / "leaf" / "memory.bin"
        for _ in range(2):
            with pytest.raises(OSError, match="Input/output error"):
                view.stat()
        assert os.listdir(mountpoint / "leaf") == ["snapshot.json", "vmstate"]
        image = (mountpoint / "base" / "memory.bin").read_bytes()
        assert image == image_of((0, BASE_PAGES))
        flag.unlink()
        assert view.read_bytes() == image_of((0, BASE_PAGES), (1, [1]))
        assert all(text in mount.log() for text in expected)


def test_a_slow_read_stops_no_other(
    public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_chain(public_path / "store", ["base", "leaf"])
    write_tag(store, "slow", numbers=BASE_PAGES)
    gate = Gate(public_path / "gate")
    code = (
        "import os\n"
        "real = os.preadv\n"
        "def preadv(fd, buffers, offset, flags=0):\n"
        "    if 'slow/memory.bin' in os.readlink(f'/proc/self/fd/{fd}'):\n"
        "        if flags & os.RWF_NOWAIT:\n"
        "            raise BlockingIOError(11, 'on purpose')\n"
        "        wait_at_gate()\n"
        "    return real(fd, buffers, offset, flags)\n"
        "os.preadv = preadv\n"
    )
    gate.patch(monkeypatch, code)
    command = ["cat", str(mountpoint / "slow" / "memory.bin")]
    with mounted(store, mountpoint):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        try:
            gate.wait_until_reached()
            command = ["cat", str(mountpoint / "leaf" / "memory.bin")]
            image = subprocess.run(command, capture_output=True, check=True, timeout=30)
            assert image.stdout == image_of((0, BASE_PAGES), (1, [1]))
            assert process.poll() is None
            gate.open()
            output, _ = process.communicate(timeout=60)
            assert output == image_of((0, BASE_PAGES))
        finally:
            gate.open()
            process.kill()
            process.communicate()


def test_users_who_open_all_the_files_they_can_do_not_starve_the_daemon(
    public_path: Path, mountpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some descriptors are kept for the looks; an open that would take one of them fails."""
    store = write_chain(public_path / "store", ["base", "leaf"])
    few = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (80, 80))\n"
    patch_children(monkeypatch, public_path / "patch", few)
    path = mountpoint / "base" / "vmstate"
    expected = ("leaf: cannot be opened now: ",)
    held: list[BinaryIO] = []
    with mounted(store, mountpoint, expect_log=expected) as mount:
        try:
            with pytest.raises(OSError) as caught:
                while len(held) < 80:
                    held.append(path.open("rb", buffering=0))
            assert caught.value.errno == errno.EMFILE and len(held) > 20
            view = mountpoint / "leaf" / "memory.bin"
            with pytest.raises(OSError, match="Input/output error"):
                view.stat()
            # It still looks SOURCE over, and serves who came before.
            write_tag(store, "later", layer=3, numbers=BASE_PAGES)
            until(lambda: (mountpoint / "later").exists(), "the daemon looks at nothing any more")
            assert {file.read() for file in held} == {b"state of base"}
        finally:
            for file in held:
                file.close()
        until(view.exists, "the layers cannot be opened though there is room")
        assert view.read_bytes() == image_of((0, BASE_PAGES), (1, [1]))
        assert "leaf: cannot be opened now: " in mount.log()
        assert "Too many open files" in mount.log()
