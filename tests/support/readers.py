"""Many processes that read views and check every byte, until they are told to end.

Run as a program: `readers NUMBER WALKERS VIEW ORACLE [VIEW ORACLE ...]`. It starts NUMBER
processes, half of which read with pread(2) and half through private mappings, and WALKERS that use
the views as `walking` says, and says `up` once each has done something. When its input ends, they
do; when all have ended, it prints what became of them, as JSON.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support import walking
from tests.support.places import REPOSITORY

_MAX_LENGTH = 256 << 10
_WRONG = 99
_TIMEOUT_SECONDS = 60
_COUNTS = struct.Struct("=QQQ")
_Work = Callable[[random.Random, int, tuple[str, str], mmap.mmap], None]


class Readers:
    """The running program.

    `longest_ms` is the longest that one of them waited for an answer; it is known at the end.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.longest_ms = 0

    def end(self) -> tuple[int, int, Counter[str]]:
        """Tell all to end: how many reads and bytes were right, and how each process ended.

        'well', an error's text, 'SIGBUS', or 'wrong bytes'. Fails if one does not end.
        """
        out, err = self._process.communicate("", _TIMEOUT_SECONDS)
        assert self._process.returncode == 0 and not err, err
        reads, length, self.longest_ms, ends = json.loads(out)
        return reads, length, Counter(ends)

    def outcome(self) -> tuple[int, int, Counter[str]]:
        """Like `end`, but nobody is told to: each reads on until it gets an error."""
        self._process.wait(_TIMEOUT_SECONDS)
        return self.end()


@contextmanager
def reading(number: int, pairs: Sequence[tuple[Path, Path]], walkers: int = 0) -> Iterator[Readers]:
    """So many processes that read the views, each with the file that it must be equal to.

    `walkers` use them in every other way.
    """
    names = [str(path) for pair in pairs for path in pair]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.readers", str(number), str(walkers), *names],
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


def _main(number: int, walkers: int, pairs: list[tuple[str, str]]) -> None:
    total = number + walkers
    counts = mmap.mmap(-1, 1 + total * _COUNTS.size)
    children = [
        _start(_walk if n >= number else _read, n, pairs[n % len(pairs)], counts)
        for n in range(total)
    ]
    while not all(_COUNTS.unpack_from(counts, 1 + n * _COUNTS.size)[0] for n in range(total)):
        time.sleep(0.02)
    print("up", flush=True)
    ends = _wait(children, counts)
    totals = [_COUNTS.unpack_from(counts, 1 + n * _COUNTS.size) for n in range(total)]
    reads, lengths, longest = zip(*totals, strict=True)
    said = sum(reads), sum(lengths), max(longest) // 1_000_000, list(map(_named, ends))
    print(json.dumps(said))


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


def _start(work: _Work, n: int, pair: tuple[str, str], counts: mmap.mmap) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work(random.Random(), n, pair, counts)
        status = 0
    except OSError as error:
        status = error.errno or 1
    except AssertionError as error:
        print(error, file=sys.stderr, flush=True)
        status = _WRONG
    finally:
        os._exit(status)


def _note(counts: mmap.mmap, n: int, length: int, began: int) -> None:
    reads, total, longest = _COUNTS.unpack_from(counts, at := 1 + n * _COUNTS.size)
    took = time.monotonic_ns() - began
    _COUNTS.pack_into(counts, at, reads + 1, total + length, max(longest, took))


def _read(dice: random.Random, n: int, pair: tuple[str, str], counts: mmap.mmap) -> None:
    with open(pair[1], "rb") as file:
        oracle = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with open(pair[0], "rb", buffering=0) as file:
        view = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) if n % 2 else None
        while not counts[0]:
            start = dice.randrange(len(oracle))
            stop = min(len(oracle), start + dice.randrange(1, _MAX_LENGTH))
            began = time.monotonic_ns()
            if view is not None:
                found = view[start:stop]
                view.madvise(mmap.MADV_DONTNEED)
            else:
                found = _pread(file.fileno(), start, stop)
            _note(counts, n, len(found), began)
            wrong = f"{pair[0]}: wrong bytes in [{start}, {stop})"
            assert found == oracle[start:stop], wrong
            # So that the daemon is asked again, and not the kernel's memory.
            first = start // 4096 * 4096
            os.posix_fadvise(file.fileno(), first, stop - first, os.POSIX_FADV_DONTNEED)


def _walk(dice: random.Random, n: int, pair: tuple[str, str], counts: mmap.mmap) -> None:
    for length, began in walking.steps(dice, *pair):
        _note(counts, n, length, began)
        if counts[0]:
            return


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
    readers, walkers = map(int, sys.argv[1:3])
    _main(readers, walkers, list(zip(sys.argv[3::2], sys.argv[4::2], strict=True)))
