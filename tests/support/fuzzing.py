"""For tests that throw random input at what reads the outside world: how much, and who watches."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from diffmergefs.core.errors import DenseDiffError, DiffMergeError, UntrustedExtentsError
from diffmergefs.opening.images import open_chain
from diffmergefs.opening.trust import TrustPolicy
from tests.support.images import PAGE, signed, write_layer

#: Whose bytes a file has that nothing may read.
SECRET_LAYER = 0xFFF
_SHARE = 25  # of the full counts, `make test` runs one in so many


def inputs(full: int, soak: bool) -> settings:
    """So many inputs for `make soak`, and a small share of them for `make test`."""
    count = full if soak else full // _SHARE
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture
def ground(filesystem: Callable[[str], Path]) -> Iterator[Path]:
    """A directory in memory with `secret` in `outside`, beside where the store will be."""
    path = filesystem("tmpfs")
    for name in ("outside", "outside-2"):
        (path / name).mkdir()
        write_layer(path / name / "secret", 4 * PAGE, [(0, signed(SECRET_LAYER, 0, 4 * PAGE))])
    logging.disable()  # pytest would keep and format every line
    yield path
    logging.disable(logging.NOTSET)
    shutil.rmtree(path)


def require_one_line(error: Exception) -> None:
    """Fail unless a user can read the error in one line."""
    text = str(error)
    assert text and len(text) < 20_000 and len(text.splitlines()) == 1, text


#: What the kernel says of this process's own descriptors and mounts, and of tmpfs.
_OF_THE_KERNEL = ("/proc/self/fdinfo/", "/proc/self/mountinfo", "/sys/kernel/mm/")


class Guard:
    """Watches every open of this process, and judges those made while it is on duty.

    Each must be for reading, of a regular file or a directory beneath one of `roots`, and such
    that it cannot wait for anybody; the directories above may be passed, to see whom they let in.
    `opened` counts them.
    """

    def __init__(self, roots: Iterable[Path], patch: pytest.MonkeyPatch) -> None:
        self._roots = [os.path.realpath(root) for root in roots]
        self._on_duty = False
        self._expected = 0
        self.opened = 0
        real = os.open

        def watched(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            if not self._on_duty:
                return real(path, flags, mode, dir_fd=dir_fd)
            self._require_harmless(path, flags)
            self._expected += 1
            fd = real(path, flags, mode, dir_fd=dir_fd)
            self._judge(path, fd, flags)
            return fd

        patch.setattr(os, "open", watched)
        sys.addaudithook(self._hear)

    @contextmanager
    def on_duty(self) -> Iterator[None]:
        """Judge what the body opens, and that nothing was opened past `os.open`."""
        self._on_duty = True
        try:
            yield
        finally:
            self._on_duty = False
        assert self._expected == 0, "the audit hook heard of fewer opens than there were"

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        # An audit hook cannot be removed: off duty it costs next to nothing.
        if not self._on_duty:
            return
        path = arguments[0] if arguments else None
        known = isinstance(path, int) or str(path).startswith(_OF_THE_KERNEL)
        if event == "open" and not known:
            if self._expected == 0:
                raise AssertionError(f"{path!r} was opened, and not by os.open")
            self._expected -= 1
        elif event in ("os.listdir", "os.scandir") and not isinstance(path, int):
            raise AssertionError(f"{path!r} was listed by its name")
        elif event in ("subprocess.Popen", "os.exec", "os.fork", "os.remove", "os.rename"):
            raise AssertionError(f"{event} {arguments}")

    def _require_harmless(self, path: Any, flags: int) -> None:
        assert flags & os.O_ACCMODE == os.O_RDONLY, f"{path!r} was opened for writing"
        assert not flags & (os.O_CREAT | os.O_TRUNC), f"{path!r} would be made"
        passive = os.O_PATH | os.O_DIRECTORY | os.O_NONBLOCK
        assert flags & passive, f"{path!r}: an open that would wait if it were a FIFO"

    def _judge(self, path: Any, fd: int, flags: int) -> None:
        self.opened += 1
        real = os.readlink(f"/proc/self/fd/{fd}")
        inside = any(real == root or real.startswith(f"{root}/") for root in self._roots)
        inside |= path == ".." and bool(flags & os.O_PATH)
        assert inside, f"{path!r} led to {real}, outside"
        if not flags & os.O_PATH:
            mode = os.fstat(fd).st_mode
            assert stat.S_ISREG(mode) or stat.S_ISDIR(mode), f"{real} is no file, and was opened"


class FilledDiff:
    """A diff whose holes a copy has filled: only its sidecar tells whether its zeros are data.

    `parse` gives the extents in the text of a sidecar with this suffix, or raises `error`. `met`
    counts what became of the texts.
    """

    CONTENT = b"".join(bytes(PAGE) if n % 2 else signed(1, n * PAGE, PAGE) for n in range(4))
    _BELOW = signed(0, 0, len(CONTENT))

    def __init__(
        self,
        directory: Path,
        suffix: str,
        parse: Callable[[bytes], Iterable[tuple[int, int]]],
        error: type[DiffMergeError],
        patch: pytest.MonkeyPatch,
    ) -> None:
        directory.mkdir()
        self._base = write_layer(directory / "base", len(self._BELOW), [(0, self._BELOW)])
        self._diff = directory / "diff"
        self._diff.write_bytes(self.CONTENT)
        self._sidecar = directory / f"diff{suffix}"
        self._parse = parse
        self._error = error
        self._guard = Guard([directory], patch)
        self.met = {"inputs": 0, "unreadable": 0, "refused": 0, "views": 0}

    def examine(self, text: bytes) -> None:
        """Require that this sidecar is refused in one line, or that a view goes by it."""
        self.met["inputs"] += 1
        self._sidecar.write_bytes(text)
        policy = TrustPolicy(verify="full")
        try:
            with self._guard.on_duty():
                extents = list(self._parse(text))
        except self._error as error:
            require_one_line(error)
            with pytest.raises(self._error):
                open_chain(self._base, [self._diff], policy)
            self.met["unreadable"] += 1
            return
        try:
            image = open_chain(self._base, [self._diff], policy)
        except (self._error, DenseDiffError, UntrustedExtentsError) as error:
            require_one_line(error)
            self.met["refused"] += 1
            return
        self.met["views"] += 1
        shown = bytearray(self._BELOW)
        for start, stop in extents:
            shown[start:stop] = self.CONTENT[start:stop]
        assert all(ours in (0, theirs) for ours, theirs in zip(self.CONTENT, shown, strict=True))
        with image.view as view:
            assert view.read(0, view.size) == shown
