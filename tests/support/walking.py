"""A client that uses a view in every way but reading much: names, attributes, opens and closes."""

from __future__ import annotations

import ctypes
import os
import random
import time
from collections.abc import Iterator

_MAX_LENGTH = 16 << 10
_libc = ctypes.CDLL(None, use_errno=True)


def steps(dice: random.Random, view: str, oracle: str) -> Iterator[tuple[int, int]]:
    """Use the view again and again: what each step read, and when it began (monotonic ns).

    Raises AssertionError when an answer is not what it was at first, or has wrong bytes.
    """
    folder = os.path.dirname(view)
    root = os.path.dirname(folder)
    size = os.stat(oracle).st_size
    first = _attributes(view)
    names = set(os.listdir(folder))
    with open(oracle, "rb") as truth:
        while True:
            began = time.monotonic_ns()
            what = dice.randrange(5)
            if what == 0:
                # Names that other processes add and remove may come and go.
                assert os.path.basename(folder) in os.listdir(root), f"{root}: it lacks {folder}"
                assert set(os.listdir(folder)) == names, f"{folder}: another listing"
            elif what == 1:
                assert _attributes(view) == first, f"{view}: other attributes than at first"
                assert os.stat(view).st_size == size
            elif what == 2:
                os.statvfs(root)
                assert not os.path.exists(f"{folder}/{dice.randrange(1 << 60)}")
            elif what == 3:
                for path in (root, folder, view):
                    _forget(path)
                assert _attributes(view) == first, f"{view}: other attributes after a look-up"
            else:
                at = dice.randrange(size)
                with open(view, "rb", buffering=0) as file:
                    found = os.pread(file.fileno(), _MAX_LENGTH, at)
                truth.seek(at)
                wrong = f"{view}: wrong bytes from {at} on"
                assert found == truth.read(len(found)) and found, wrong
                yield len(found), began
                continue
            yield 0, began


def _attributes(view: str) -> tuple[object, ...]:
    status = os.stat(view)
    values = [(name, os.getxattr(view, name)) for name in sorted(os.listxattr(view))]
    return (status.st_ino, status.st_size, status.st_mode, status.st_mtime_ns, *values)


def _forget(path: str) -> None:
    # statx(2) with AT_STATX_FORCE_SYNC asks the server, whatever the kernel remembers.
    buffer = ctypes.create_string_buffer(256)
    done = _libc.statx(-100, os.fsencode(path), 0x2000, 0x7FF, buffer)
    if done:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), path)
