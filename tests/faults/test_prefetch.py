"""Clients read the very pages that are being pushed, and have them dropped: nothing ever hangs."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from diffmergefs.prefetch.record import WorkingSets
from tests.support.images import PAGE
from tests.support.mounts import abort, mounted, require_fusectl
from tests.support.processes import is_stuck
from tests.support.restores import ORACLE, ranges_of, save, scattered, shown, write_pair

READERS = 3
TOUCHED = scattered(64)
#: For a round that takes milliseconds; one that hangs is ended by the fixture's abort.
_TIMEOUT_SECONDS = 1500

# In each round each opens the image anew, which begins a push as pages have been dropped, reads its
# pages in an order of its own, by read(2) and through a mapping, compares every byte, and has the
# kernel drop them as it goes. Now and then nobody has the image open, and the push is cut off.
ROUNDS = """
import json, mmap, os, random, sys
view, oracle, (rounds, pages) = sys.argv[1], sys.argv[2], map(json.loads, sys.argv[3:])
oracle = open(oracle, "rb").read()
dice = random.Random()
read, before = 0, None
for _ in range(rounds):
    fd = os.open(view, os.O_RDONLY)
    if before is not None:
        os.close(before)
    with mmap.mmap(fd, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as memory:
        for page in dice.sample(pages, 16):
            start = page * 4096
            if dice.random() < 0.5:
                found = os.pread(fd, 4096, start)
            else:
                found = memory[start : start + 4096]
                memory.madvise(mmap.MADV_DONTNEED)
            if found != oracle[start : start + 4096]:
                sys.exit(f"wrong bytes in page {page}")
            read += 1
            if dice.random() < 0.5:
                os.posix_fadvise(fd, start, 4096, os.POSIX_FADV_DONTNEED)
            else:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    before = fd
    if dice.random() < 0.3:
        os.close(fd)
        before = None
print(read)
"""


@pytest.mark.parametrize("how", ["notify", "fadvise"])
def test_readers_of_the_pages_that_are_pushed(
    how: str,
    public_path: Path,
    mountpoint: Path,
    count: Callable[[int], int],
    seen: Callable[..., None],
) -> None:
    """Rounds of open, read by 3 readers under eviction, and close, with a push beside them"""
    require_fusectl()  # the guard of a push takes it
    base, diff = write_pair(public_path)
    sets = WorkingSets(str(public_path / "sets"))
    save(sets, shown(base, diff), TOUCHED)
    oracle = public_path / "oracle"
    oracle.write_bytes(ORACLE)
    # A child for each push is slower.
    rounds = count(10_000 if how == "notify" else 500)
    argv = [str(mountpoint / "base.mem"), str(oracle), str(rounds), json.dumps(TOUCHED)]
    options = ["--base", str(base), "--diff", str(diff), f"--prefetch={how}"]
    options += ["--working-set-dir", sets.directory]
    with mounted(None, mountpoint, *options) as mount:
        readers = [
            subprocess.Popen(
                [sys.executable, "-c", ROUNDS, *argv], stdout=subprocess.PIPE, text=True
            )
            for _ in range(READERS)
        ]
        try:
            texts = [reader.communicate(timeout=_TIMEOUT_SECONDS)[0] for reader in readers]
            assert [reader.returncode for reader in readers] == [0] * READERS
        finally:
            for reader in readers:
                reader.kill()
        pushes = mount.log().count("INFO diffmergefs.prefetch.prefetcher: ")
        assert (mountpoint / "base.mem").read_bytes() == ORACLE
    assert pushes > rounds // 100
    pages = sum(map(int, texts))
    seen(readers=READERS, rounds_of_each=rounds, pages_compared=pages, whole_pushes=pushes)


def test_kill_9_in_the_middle_of_a_push(
    public_path: Path, mountpoint: Path, count: Callable[[int], int], seen: Callable[..., None]
) -> None:
    """Keeper and server: readers of the pages that are being pushed get an error

    If the push waits for the page of a reader, the kernel cannot end the server before somebody
    aborts the connection.
    """
    base, diff = write_pair(public_path)
    sets = WorkingSets(str(public_path / "sets"))
    save(sets, shown(base, diff), TOUCHED)
    options = ["--base", str(base), "--diff", str(diff), "--working-set-dir", sets.directory]
    oracle = public_path / "oracle"
    oracle.write_bytes(ORACLE)
    argv = [str(mountpoint / "base.mem"), str(oracle), "1000000", json.dumps(TOUCHED)]
    kills, aborts = count(50), 0
    for _ in range(kills):
        with mounted(None, mountpoint, *options) as mount:
            reader = subprocess.Popen(
                [sys.executable, "-c", ROUNDS, *argv],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                time.sleep(0.1 + random.random() / 5)
                server = mount.pid
                mount.kill()
                if not ends_within(reader, 2):
                    assert is_stuck(server)
                    aborts += 1
                    subprocess.run(["umount", "-f", mountpoint], capture_output=True, check=False)
                assert reader.wait(20) in (1, -signal.SIGBUS)
            finally:
                reader.kill()
                abort(str(mountpoint))
                reader.wait(20)
    seen(kills=kills, of_which_a_push_waited_for_a_page=aborts)


def ends_within(process: subprocess.Popen[bytes], seconds: float) -> bool:
    with suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    return process.returncode is not None


def test_what_is_pushed_is_what_is_touched() -> None:
    assert len(set(TOUCHED)) == 64 and len(ranges_of(TOUCHED)) * PAGE * 4 <= len(ORACLE)
    assert os.sysconf("SC_PAGE_SIZE") == PAGE
