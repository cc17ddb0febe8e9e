"""One small diff to open as a layer, and ways to change its file."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from diffmergefs.core.layer import Layer
from tests.support.images import PAGE, signed, write_layer

SIZE = 16 * PAGE
DATA = [(2 * PAGE, 4 * PAGE), (8 * PAGE, 9 * PAGE)]


def written(directory: Path) -> Path:
    extents = [(start, signed(1, start, stop - start)) for start, stop in DATA]
    return write_layer(directory / "layer", SIZE, extents)


def read(layer: Layer, offset: int = 2 * PAGE, length: int = PAGE) -> bytes:
    """As a view reads: the bytes, and then the judgement of them."""
    buffer = bytearray(length)
    layer.read_into(memoryview(buffer), offset)
    layer.check_unchanged()
    return bytes(buffer)


def keep_times(path: Path, change: Callable[[], object]) -> None:
    status = path.stat()
    change()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def poke(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), content, offset)
        os.fsync(file.fileno())


def punch(path: Path, offset: int, length: int) -> None:
    command = ["fallocate", "-p", "-o", str(offset), "-l", str(length), str(path)]
    subprocess.run(command, check=True)
