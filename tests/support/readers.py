"""Many processes that read views and check every byte, until they are told to end.

Run as a program: `readers NUMBER VIEW ORACLE [VIEW ORACLE ...]`. It starts NUMBER processes, half
of which read with pread(2) and half through private mappings, and says `up` once each has read
something. When its input ends, they do; when all have ended, it prints what became of them, as
JSON.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import select
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.places import REPOSITORY

_MAX_LENGTH = 256 << 10
_WRONG = 99
_TIMEOUT_SECONDS = 60
_COUNTS = struct.Struct("=QQ")


class Readers:
    """The running program."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def end(self) -> tuple[int, int, Counter[str]]:
        """Tell all to end: how many reads and bytes were right, and how each process ended.

        'well', an error's text, 'SIGBUS', or 'wrong bytes'. Fails if one does not end.
        """
        out, err = self._process.communicate("", _TIMEOUT_SECONDS)
        assert self._process.returncode == 0 and not err, err
        reads, length, ends = json.loads(out)
        return reads, length, Counter(ends)

    def outcome(self) -> tuple[int, int, Counter[str]]:
        """Like `end`, but nobody is told to: each reads on until it gets an error."""
        self._process.wait(_TIMEOUT_SECONDS)
        return self.end()


@contextmanager
def reading(number: int, pairs: Sequence[tuple[Path, Path]]) -> Iterator[Readers]:
    """So many processes that read the views, each with the file that it must be equal to."""
    names = [str(path) for pair in pairs for path in pair]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.readers", str(number), *names],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line == "up\n", line
        yield Readers(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _main(number: int, pairs: list[tuple[str, str]]) -> None:
    counts = mmap.mmap(-1, 1 + number * _COUNTS.size)
    children = [_start(n, number, pairs[n % len(pairs)], counts) for n in range(number)]
    while not all(_COUNTS.unpack_from(counts, 1 + n * _COUNTS.size)[0] for n in range(number)):
        time.sleep(0.02)
    print("up", flush=True)
    ends = _wait(children, counts)
    totals = [_COUNTS.unpack_from(counts, 1 + n * _COUNTS.size) for n in range(number)]
    reads, length = map(sum, zip(*totals, strict=True))
    print(json.dumps([reads, length, [_named(end) for end in ends]]))


def _wait(children: list[int], counts: mmap.mmap) -> list[int]:
    ends: dict[int, int] = {}
    while len(ends) < len(children):
        if not counts[0] and select.select([sys.stdin], [], [], 0.02)[0]:
            counts[0] = 1
        for child in set(children) - ends.keys():
            ended, status = os.waitpid(child, 0 if counts[0] else os.WNOHANG)
            if ended:
                ends[child] = os.waitstatus_to_exitcode(status)
    return list(ends.values())


def _named(end: int) -> str:
    if end < 0:
        return signal.Signals(-end).name
    return {0: "well", _WRONG: "wrong bytes"}.get(end) or os.strerror(end)


def _start(n: int, number: int, pair: tuple[str, str], counts: mmap.mmap) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        _read(random.Random(), n, pair, counts)
        status = 0
    except OSError as error:
        status = error.errno or 1
    finally:
        os._exit(status)


def _read(dice: random.Random, n: int, pair: tuple[str, str], counts: mmap.mmap) -> None:
    with open(pair[1], "rb") as file:
        oracle = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    reads = total = 0
    with open(pair[0], "rb", buffering=0) as file:
        view = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) if n % 2 else None
        while not counts[0]:
            start = dice.randrange(len(oracle))
            stop = min(len(oracle), start + dice.randrange(1, _MAX_LENGTH))
            if view is not None:
                found = view[start:stop]
                view.madvise(mmap.MADV_DONTNEED)
            else:
                found = _pread(file.fileno(), start, stop)
            if found != oracle[start:stop]:
                print(f"{pair[0]}: wrong bytes in [{start}, {stop})", file=sys.stderr, flush=True)
                os._exit(_WRONG)
            # So that the daemon is asked again, and not the kernel's memory.
            first = start // 4096 * 4096
            os.posix_fadvise(file.fileno(), first, stop - first, os.POSIX_FADV_DONTNEED)
            reads, total = reads + 1, total + len(found)
            _COUNTS.pack_into(counts, 1 + n * _COUNTS.size, reads, total)


def _pread(fd: int, start: int, stop: int) -> bytes:
    # The kernel answers with what it got before an error; the error comes with the next read.
    found = b""
    while len(found) < stop - start:
        more = os.pread(fd, stop - start - len(found), start + len(found))
        if not more:
            return found  # an end where there is none: the comparison tells
        found += more
    return found


if __name__ == "__main__":
    _main(int(sys.argv[1]), list(zip(sys.argv[2::2], sys.argv[3::2], strict=True)))
