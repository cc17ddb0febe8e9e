"""Flattening on several filesystems, against the ways in which it is done without us."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

import diffmergefs
from tests.bench import profile
from tests.bench.goals import SHARED, SHARING
from tests.bench.images import Chain, Images
from tests.bench.measure import (
    MIB,
    Contestant,
    Figures,
    NotMeasured,
    Record,
    Scale,
    alternate,
    little_free,
    touch_free,
    warm,
)
from tests.bench.programs import compiled, need, run
from tests.support import loopfs, mounttable

_DEPTH = 3
# linux/fs.h
_FIFREEZE = 0xC0045877
_FITHAW = 0xC0045878


def flatten(place: Path, scale: Scale, kind: str, record: Record) -> None:
    """A new standalone image of a base and three diffs, on the disk (fsync) at the end.

    The filesystem lies on a file in `place`.
    """
    with ExitStack() as stack:
        size = 4 * scale.image + 512 * MIB
        root = stack.enter_context(filesystem(kind, place, size, allocated=True))
        images = Images(root, scale)
        chain, out = images.chain(_DEPTH), root / "out.img"

        def ours() -> None:
            image = diffmergefs.open_chain(str(chain.base), [str(diff) for diff in chain.diffs])
            with image.view as view:
                result = diffmergefs.flatten(view, out)
            record.facts["MiB shared"] = round(sum(result.shared) / MIB)
            record.facts["MiB copied"] = round(sum(result.copied) / MIB)

        ways: dict[str, Callable[[], object]] = {
            "diffmergefs.flatten": ours,
            "diffmergefs flatten, the command": partial(_command, chain, out),
            "cp, then pread and pwrite": partial(_overwrite, chain, out),
            "sendfile of each extent": partial(_copier, "sendfile", out, chain.layers),
            "qemu-img convert": partial(_convert, images, out),
        }
        if kind in SHARING:
            ways[SHARED] = partial(_copier, "reflink", out, chain.layers)
        # The first run of each tells whether the bytes are right; that round is not counted.
        verified: set[str] = set()

        def timed(name: str) -> Figures:
            began = time.perf_counter()
            try:
                ways[name]()
                seconds = time.perf_counter() - began
                if name not in verified:
                    images.verify(out)
                    verified.add(name)
            finally:
                out.unlink(missing_ok=True)
                if kind != "tmpfs":
                    _finish(root)
            return {name: ("s", seconds)}

        runs = [Contestant(name, partial(timed, name)) for name in ways]
        if scale.holds_memory:
            with suppress(NotMeasured):  # then `_convert` says it
                _ = images.overlay  # which takes memory, while there is some
            stack.enter_context(little_free(2 * scale.image))

        def ready() -> None:
            warm(*chain.layers)
            if scale.holds_memory:
                touch_free(scale.image * 3 // 2)

        alternate(record, runs, scale.rounds, ready)
        if kind in SHARING:
            # Of one more run of the floor: what the sharing of an extent takes.
            command: list[str | Path] = [compiled("copier"), "reflink", out, *chain.layers]
            profile.note(record, SHARED, partial(profile.program, command, scale.dirty_pages))


def _finish(root: Path) -> None:
    # A filesystem is still busy with the file that was removed, xfs for a second, which the next
    # run would pay for. To be frozen it must have finished.
    fd = os.open(root, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, _FIFREEZE, 0)
        fcntl.ioctl(fd, _FITHAW, 0)
    finally:
        os.close(fd)


def _command(chain: Chain, out: Path) -> None:
    run([sys.executable, "-m", "diffmergefs", "flatten", *chain.options, "-o", out])


def _overwrite(chain: Chain, out: Path) -> None:
    run(["cp", "--sparse=always", chain.base, out])
    _copier("overwrite", out, chain.diffs)


def _copier(way: str, out: Path, layers: Sequence[Path]) -> None:
    run([compiled("copier"), way, out, *layers])


def _convert(images: Images, out: Path) -> None:
    run([need("qemu-img"), "convert", "-O", "raw", images.overlay, out])
    run(["sync", out])


@contextmanager
def filesystem(kind: str, place: Path, size: int, *, allocated: bool = False) -> Iterator[Path]:
    """A filesystem of the kind and size on a file in `place`, or in memory; gone afterwards.

    With `allocated` the file has all its blocks from the start, so that no run is the first to
    write to one. NotMeasured where the kernel has no such filesystem.
    """
    with tempfile.TemporaryDirectory(dir=place) as name:
        if kind == "tmpfs":
            try:
                run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", name])
                yield Path(name)
            finally:
                mounttable.unmount_below(name)
            return
        # loopfs.made would give one in memory a size of its own.
        try:
            with loopfs.made(kind, Path(name), size) as root:
                if allocated:
                    with (Path(name) / f"{kind}.img").open("r+b") as file:
                        os.posix_fallocate(file.fileno(), 0, size)
                yield root
        except pytest.skip.Exception as error:
            raise NotMeasured(str(error)) from error
