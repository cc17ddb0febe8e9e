"""A filesystem whose server hangs holds up what lies on it, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from diffmergefs.fuse.replies import CHANGING_SECONDS
from tests.support import faulty
from tests.support.images import PAGE, signed
from tests.support.live import until
from tests.support.mounts import Mount, mounted
from tests.support.stores import write_chain, write_tag

# More than one filesystem has threads, in MiB of the image and in names.
CLIENTS = 70
MIB = 1 << 20

TOUCH = """
import ctypes, mmap, os, sys, threading
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
fd, size = os.open(sys.argv[1], os.O_RDONLY), os.stat(sys.argv[1]).st_size
address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_PRIVATE, fd, 0)
libc.madvise(address, size, mmap.MADV_RANDOM)
def touch(n):
    libc.memcpy(ctypes.create_string_buffer(1), address + (n << 20), 1)
for n in range(int(sys.argv[2])):
    threading.Thread(target=touch, args=(n,)).start()
print(flush=True)
"""
LOOK = """
import os, sys, threading
def look(n):
    try:
        os.stat(f"{sys.argv[1]}/file-{n}")
    except OSError:
        pass
for n in range(int(sys.argv[2])):
    threading.Thread(target=look, args=(n,)).start()
print(flush=True)
"""
READ = "import sys; sys.stdout.buffer.write(open(sys.argv[1], 'rb').read(int(sys.argv[2])))"


@pytest.fixture
def store(public_path: Path) -> Path:
    return write_chain(public_path / "store", ["base", "leaf"])


@pytest.fixture
def far(public_path: Path, store: Path) -> Iterator[faulty.Faulty]:
    """The directory of the tag `far` is a file system whose server can hang."""
    source = write_tag(public_path, "source", layer=7, size=CLIENTS * MIB)
    (store / "far").mkdir()
    for n in range(CLIENTS):
        (source / f"file-{n}").touch()
    with faulty.mounted(source, store / "far", forgetful=True) as found:
        yield found


@contextmanager
def running(code: str, *arguments: object) -> Iterator[None]:
    """A process that runs this Python code, once it has printed a line; killed in the end.

    It ends once what it waits for is answered: leave it after that goes on.
    """
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"\n"
            yield
        finally:
            process.kill()


def read(path: Path, length: int = -1) -> bytes:
    """What another process reads, which need not be waited for where it hangs for ever."""
    command = [sys.executable, "-c", READ, str(path), str(length)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    found, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return found


def hanging(mount: Mount) -> int:
    """How many threads of the daemon wait for a server, or for a page or a name of one."""
    tasks = Path(f"/proc/{mount.pid}/task")
    waits = ("request_wait_answer", "folio_wait", "d_alloc_parallel", "filemap")
    waiting = [(tasks / name / "wchan").read_text(encoding="ascii") for name in os.listdir(tasks)]
    return sum(any(wait in where for wait in waits) for where in waiting)


def require_that_others_go_on(mountpoint: Path) -> None:
    assert read(mountpoint / "leaf" / "vmstate") == b"state of leaf"
    assert read(mountpoint / "leaf" / "memory.bin", PAGE) == signed(0, 0, PAGE)
    assert sorted(os.listdir(mountpoint / "leaf")) == ["memory.bin", "snapshot.json", "vmstate"]


SLOW_LOOK = ("look",)  # at a directory that hangs takes long, and the log may say so


def test_a_close_that_hangs(store: Path, far: faulty.Faulty, mountpoint: Path) -> None:
    with mounted(store, mountpoint, expect_log=SLOW_LOOK):
        passed = (mountpoint / "far" / "vmstate").open("rb")
        assert passed.read(5) == b"state"
        with far.hung():
            passed.close()
            require_that_others_go_on(mountpoint)


def test_many_reads_that_hang(store: Path, far: faulty.Faulty, mountpoint: Path) -> None:
    with mounted(store, mountpoint, expect_log=SLOW_LOOK) as mount:
        view = mountpoint / "far" / "memory.bin"
        assert view.stat().st_size == CLIENTS * MIB
        with ExitStack() as clients, far.hung():
            clients.enter_context(running(TOUCH, view, CLIENTS))
            until(lambda: hanging(mount) >= 64, "they do not hang")
            require_that_others_go_on(mountpoint)


def test_many_openings_that_hang(store: Path, far: faulty.Faulty, mountpoint: Path) -> None:
    with mounted(store, mountpoint, expect_log=SLOW_LOOK) as mount:
        # Known names, or the kernel would look for one after the other.
        for n in range(CLIENTS):
            assert (mountpoint / "far" / f"file-{n}").exists()
        time.sleep(CHANGING_SECONDS)  # it asks for them anew
        with ExitStack() as clients, far.hung():
            clients.enter_context(running(LOOK, mountpoint / "far", CLIENTS))
            until(lambda: hanging(mount) >= 64, "they do not hang")
            require_that_others_go_on(mountpoint)
